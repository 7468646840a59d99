"""Code in the manner of the fast.ai course's notebooks (learner, initialisation, accelerated SGD, ResNet and
augmentation chapters) runs on `from fastswa.all import *`: the names and signatures it relies on"""
from functools import partial

import fastcore.all as fc
import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import lr_scheduler
from torcheval.metrics import MulticlassAccuracy

matplotlib.use('agg')

import helpers  # noqa: E402
from fastswa.all import *  # noqa: E402, F403


@pytest.fixture(scope='module')
def dls():
    dd = toy_images(640, 256, seed=0)
    x, y = dd['train'].features

    @inplace
    def transformi(b): b[x] = [(torch.tensor(np.array(o))[None]/255 - 0.4)/0.2 for o in b[x]]
    return DataLoaders.from_dd(dd.with_transform(transformi), 64, num_workers=0)


def cbs(): return [DeviceCB(), MetricsCB(accuracy=MulticlassAccuracy()), ProgressCB(plot=True)]


def test_learner_chapter(dls):
    class CompletionCB(Callback):
        def before_fit(self, learn): self.count = 0
        def after_batch(self, learn): self.count += 1
        def after_fit(self, learn): print(f'Completed {self.count} batches')

    class ThreeBatches(Callback):
        order = MetricsCB.order + 1
        def after_batch(self, learn):
            if learn.iter == 2: raise CancelEpochException()

    done = CompletionCB()
    run_cbs([done], 'before_fit')
    run_cbs([done], 'after_batch')
    assert done.count == 1
    set_seed(42)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10)).to(def_device)
    learn = Learner(model, dls, F.cross_entropy, lr=0.1, cbs=[TrainCB(), done, *cbs()])
    learn.fit(1)
    assert done.count == 10 + 2
    learn.fit(1, cbs=[ThreeBatches()])
    xb, yb = learn.batch
    assert xb.shape[1:] == (1, 28, 28) and learn.preds.shape[1] == 10
    metrics = MetricsCB(MulticlassAccuracy())
    TrainLearner(model, dls, F.cross_entropy, lr=0.1, cbs=[SingleBatchCB(), metrics]).fit(1)
    MomentumLearner(model, dls, F.cross_entropy, lr=0.1, cbs=cbs(), mom=0.85).fit(1)
    learn = MomentumLearner(model, dls, F.cross_entropy, lr=0.1, cbs=DeviceCB())
    learn.lr_find(start_lr=1e-4, gamma=1.3)
    learn.fit(3, lr=1e-4, cbs=[LRFinderCB()])


def test_initialisation_chapter(dls):
    clean_ipython_hist(), clean_tb(), clean_mem()
    set_seed(42)
    iw = partial(init_weights, leaky=0.1)
    act = partial(GeneralRelu, leak=0.1, sub=0.4)
    plot_func(GeneralRelu(leak=0.1, sub=0.4))
    model = get_model(act, norm=nn.BatchNorm2d).apply(iw)
    learn = MomentumLearner(model, dls, F.cross_entropy, lr=0.2, cbs=cbs())
    learn.fit(3)
    assert learn.history[-1]['accuracy'] > 0.3
    assert isinstance(conv(1, 8, act=act_gr), nn.Sequential)
    xb, _ = to_device(next(iter(dls.train)), def_device)
    assert to_cpu(model(xb)).shape == (64, 10)


def test_accelerated_sgd_chapter(dls):
    def _lr(cb): return cb.pg['lr']
    def _beta1(cb): return cb.pg['betas'][0]
    tmax = 2*len(dls.train)
    sched = partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=tmax)
    rec = RecorderCB(lr=_lr, mom=_beta1)
    learn = TrainLearner(get_model(act_gr, norm=nn.BatchNorm2d), dls, F.cross_entropy, lr=0.05, opt_func=optim.AdamW,
                         cbs=cbs() + [BatchSchedCB(sched), rec])
    learn.fit(2)
    rec.plot()
    assert len(rec.recs['lr']) == tmax and max(rec.recs['lr']) == pytest.approx(0.05)
    sched = EpochSchedCB(partial(lr_scheduler.CosineAnnealingLR, T_max=2))
    learn = TrainLearner(get_model(), dls, F.cross_entropy, lr=0.01, cbs=[sched])
    learn.fit(2)
    assert issubclass(BatchSchedCB, BaseSchedCB)

    class Keeps(HasLearnCB):
        def after_batch(self, learn): assert self.learn is learn
    learn.fit(1, cbs=Keeps())


def test_augmentation_chapter(dls):
    learn = TrainLearner(get_model(act_gr, norm=nn.BatchNorm2d), dls, F.cross_entropy, lr=0.01, cbs=cbs())
    learn.fit(1)
    assert 'BatchNorm' in learn.summary() or 'Sequential' in learn.summary()
    tfmx = nn.Sequential(nn.Identity())
    def tfm_batch(b, tfm_x=fc.noop, tfm_y=fc.noop): return tfm_x(b[0]), tfm_y(b[1])
    flip = BatchTransformCB(partial(tfm_batch, tfm_x=lambda x: x.flip(-1)), on_val=True)
    learn.show_image_batch(max_n=9, cbs=[BatchTransformCB(partial(tfm_batch, tfm_x=tfmx), on_val=False)], imsize=1.5)
    ap1, at = learn.capture_preds()
    ap2, at2 = learn.capture_preds(cbs=[flip])
    assert torch.equal(at, at2) and ap1.shape == (256, 10) and not torch.equal(ap1, ap2)
    assert ap1.device.type == 'cpu'


def test_data_and_plots(dls):
    xb, yb = next(iter(dls.train))
    show_image(xb[0])
    show_images(xb[:16], imsize=1.5, nrows=4)
    fig, axs = get_grid(5)
    assert axs.size >= 5
    subplots(2, 2)
    assert len(collate_device([(xb[0], 1), (xb[1], 2)])) == 2
    assert collate_dict(toy_images(4, 2)['train'])([dict(image=xb[0], label=3)])[1].tolist() == [3]


def test_all_brings_public_names_and_none_that_a_notebook_has_for_its_own():
    import importlib
    import fastswa.all
    for package in ('averaging', 'callbacks', 'checkpoint', 'data', 'nets', 'training'):
        public = importlib.import_module(f'fastswa.{package}').__all__
        assert [n for n in public if not hasattr(fastswa.all, n)] == [], package
    own = ('batch_size save load export plain reading style newest VERSION STEPS FORMAT say written '
           'opt model data dls learn').split()
    assert [n for n in own if hasattr(fastswa.all, n)] == []


class StandIn(optim.Optimizer):
    "As accelerate's AcceleratedOptimizer: no hooks of its own, passes on where gradients are complete"
    def __init__(self, opt, every): self.optimizer, self.every, self.calls = opt, every, 0
    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    def complete(self): return self.calls % self.every == 0
    def state_dict(self): return self.optimizer.state_dict()
    def load_state_dict(self, state): self.optimizer.load_state_dict(state)
    def step(self, closure=None):
        self.calls += 1
        if self.complete(): self.optimizer.step(closure)
    def zero_grad(self, set_to_none=True):
        if self.complete(): self.optimizer.zero_grad()


class Accelerated(TrainCB):
    "The course's AccelerateCB, with a stand-in for accelerate"
    order = DeviceCB.order + 10
    def __init__(self, every=1): self.n_inp, self.every = 1, every
    def before_fit(self, learn): learn.opt = StandIn(learn.opt, self.every)


class WithAccelerate(TrainCB):
    "The same with accelerate"
    order = DeviceCB.order + 10
    def __init__(self, every=1):
        accelerate = pytest.importorskip('accelerate')
        self.n_inp, self.acc = 1, accelerate.Accelerator(cpu=True, gradient_accumulation_steps=every)
    def before_fit(self, learn):
        dls = learn.dls
        learn.model, learn.opt, dls.train, dls.valid = self.acc.prepare(learn.model, learn.opt, dls.train, dls.valid)
    def before_batch(self, learn):
        self.inside = self.acc.accumulate(learn.model)
        self.inside.__enter__()
    def cleanup_batch(self, learn): self.inside.__exit__(None, None, None)
    def backward(self, learn): self.acc.backward(learn.loss)


@pytest.mark.parametrize('every', [1, 2])
@pytest.mark.parametrize('cls', [Accelerated, WithAccelerate])
def test_steps_behind_accelerate(cls, every):
    "Wrong: none is seen, so no snapshot and no schedule; or also those that it leaves out while it accumulates"
    ema, rec = EMACB(0.5, apply=False), RecorderCB(lr=lambda cb: cb.pg['lr'])
    learn = helpers.learner(cls(every), ema, rec, BatchSchedCB(partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)),
                            cls=Learner, lr=0.1)
    learn.fit(1)
    assert learn.opt_steps == ema.average.n == 10//every
    np.testing.assert_allclose(rec.recs['lr'], [0.1*0.5**(i//every) for i in range(10)])
