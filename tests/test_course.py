"""Code in the manner of the fast.ai course's notebooks (learner, initialisation, accelerated SGD, ResNet, augmentation,
CIFAR, diffusion, super-resolution and VAE chapters) runs on `from fastswa.all import *`: names and signatures"""
import contextlib
import inspect
from functools import partial, wraps
from types import SimpleNamespace

import fastcore.all as fc
import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset
from torcheval.metrics import Mean, MulticlassAccuracy

matplotlib.use('agg')

from fastswa.all import *  # noqa: E402, F403
from fastswa.tables import format_value  # noqa: E402
from helpers import Hits, data, learner  # noqa: E402


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
        left_out = {n for n in public if not hasattr(fastswa.all, n)}
        assert left_out <= {'gain', 'gradients', 'merge', 'sandbox', 'summary'}, package
    own = ('batch_size save load export plain reading style newest VERSION STEPS FORMAT say written '
           'opt model data dls learn gain gradients merge sandbox summary').split()
    assert [n for n in own if hasattr(fastswa.all, n)] == []


class StandIn(optim.Optimizer):
    "As accelerate's AcceleratedOptimizer: no hooks of its own, passes on where gradients are complete"
    def __init__(self, opt, every): self.optimizer, self.every, self.calls = opt, every, 0
    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)
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
    learn = learner(cls(every), ema, rec, BatchSchedCB(partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)),
                            cls=Learner, lr=0.1)
    learn.fit(1)
    assert learn.opt_steps == ema.average.n == 10//every
    np.testing.assert_allclose(rec.recs['lr'], [0.1*0.5**(i//every) for i in range(10)])


# --- the chapters on CIFAR, DDPM, super-resolution, U-nets and VAE. Callbacks, metrics and functions that their
# notebooks define (fastai/course22p2, Apache 2.0) stand here word for word


SIGNATURES = dict(
    ActivationStats='mod_filter', BatchTransformCB='tfm on_train on_val', CapturePreds='', DataLoaders='',
    DeviceCB='device', GeneralRelu='leak sub maxv', Hook='m f', Hooks='ms f',
    HooksCallback='hookfunc mod_filter on_train on_valid mods', LRFinderCB='gamma max_mult',
    Learner='model dls loss_func lr cbs opt_func', MixedPrecision='',
    MomentumLearner='model dls loss_func lr cbs opt_func mom', ProgressCB='plot', RandCopy='pct max_num',
    RandErase='pct max_num', ResBlock='ni nf stride ks act norm', TrainCB='n_inp', collate_dict='ds',
    conv='ni nf ks stride act norm bias', get_dls='train_ds valid_ds bs', get_grid='n nrows ncols title weight size',
    get_model='act nfs norm', init_weights='m leaky', inplace='f', lsuv_init='model m m_in xb',
    plot_func='f start end steps', rand_copy='x pct max_num', rand_erase='x pct max_num', run_cbs='cbs method_nm learn',
    set_seed='seed deterministic', show_image='im ax figsize title noframe', show_images='ims nrows ncols titles',
    subplots='nrows ncols figsize imsize suptitle', to_cpu='x', to_device='x device', with_cbs='nm')


@pytest.mark.parametrize('name', SIGNATURES)
def test_parameters_of_the_course_by_place(name):
    import fastswa.all
    wanted = SIGNATURES[name].split()
    assert list(inspect.signature(getattr(fastswa.all, name)).parameters)[:len(wanted)] == wanted


def test_get_dls():
    "The validation loader keeps its order, takes twice as many and draws nothing from the global generator"
    x = torch.arange(40)
    train, valid = get_dls(TensorDataset(x), TensorDataset(x[:20]), bs=8, num_workers=0, generator=torch.Generator())
    assert [len(b) for b, in train] == [8]*5 and [len(b) for b, in valid] == [16, 4]
    assert torch.equal(torch.cat([b for b, in valid]), x[:20]) and not torch.equal(torch.cat([b for b, in train]), x)
    state = torch.get_rng_state()
    list(valid)
    assert torch.equal(torch.get_rng_state(), state)
    assert DataLoaders(*get_dls([0], [0], 1, collate_fn=len)).train.collate_fn is len
    with pytest.raises(ValueError, match='bs must be a whole number, 1 or more; got 0'): get_dls([0], [0], 0)


def image_pairs(n=24):
    "Blurred images and sharp ones, (3, 16, 16)"
    y = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(F.avg_pool2d(y, 2), scale_factor=2)
    return DataLoaders(*get_dls(TensorDataset(x, y), TensorDataset(x, y), bs=8))


def test_superresolution_chapter():
    "`zero_wgts` finds biases before the norms too. Wrong: 'NoneType' object has no attribute 'zero_'"
    def up_block(ni, nf, ks=3, act=act_gr, norm=None):
        return nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2),
                             ResBlock(ni, nf, ks=ks, act=act, norm=norm))

    def zero_wgts(l):
        with torch.no_grad():
            l.weight.zero_()
            l.bias.zero_()

    class Unet(nn.Module):
        def __init__(self, act=act_gr, nfs=(4, 8), norm=nn.BatchNorm2d):
            super().__init__()
            self.dn = ResBlock(3, nfs[1], stride=2, act=act, norm=norm)
            self.up = up_block(nfs[1], 3, act=nn.Identity, norm=norm)
        def forward(self, x): return x + self.up(self.dn(x))

    model, dls = Unet(), image_pairs()
    last_res = model.up[-1]
    zero_wgts(last_res.convs[-1][-1])
    zero_wgts(last_res.idconv[0])
    zero_wgts(last_res.idconv[-1])
    opt_func = partial(optim.AdamW, eps=1e-5)
    metrics = MetricsCB()
    cbs = [DeviceCB(), metrics, ProgressCB(plot=True), MixedPrecision()]
    learn = Learner(model, dls, F.mse_loss, lr=1e-2, cbs=cbs, opt_func=opt_func)
    p, t, inp = learn.capture_preds(inps=True)
    assert torch.allclose(p, inp, atol=1e-2)                          # a U-net that begins as the identity
    learn.lr_find(start_lr=1e-4, gamma=1.5, show=False)
    tmax = 2*len(dls.train)
    sched = BatchSchedCB(partial(lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=tmax))
    learn.fit(2, cbs=[sched, EMACB(), BNUpdateCB()])
    assert learn.opt_steps == tmax and [r['weights'] for r in learn.history[-3:]] == ['raw', 'raw', 'ema']
    learn.restore()
    for o in model.dn.parameters(): o.requires_grad_(False)
    frozen = [o.clone() for o in model.dn.parameters()]
    Learner(model, dls, F.mse_loss, lr=1e-2, cbs=cbs, opt_func=opt_func).fit(1)
    assert all(map(torch.equal, frozen, model.dn.parameters()))


def test_vae_chapter(dls):
    "A model with several outputs, and metrics that are functions of them: each validation batch counts as one"
    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.SiLU(), nn.BatchNorm1d(8))
            self.mu, self.lv = nn.Linear(8, 4), nn.Linear(8, 4)
            self.dec = nn.Linear(4, 784)
        def forward(self, x):
            x = self.enc(x)
            mu,lv = self.mu(x),self.lv(x)
            z = mu + (0.5*lv).exp()*torch.randn_like(lv)
            return self.dec(z),mu,lv

    def kld_loss(inp, x):
        x_hat,mu,lv = inp
        return -0.5 * (1 + lv - mu.pow(2) - lv.exp()).mean()

    def bce_loss(inp, x): return F.binary_cross_entropy_with_logits(inp[0], x)
    def vae_loss(inp, x): return kld_loss(inp, x) + bce_loss(inp,x)

    class FuncMetric(Mean):
        def __init__(self, fn, device=None):
            super().__init__(device=device)
            self.fn = fn

        def update(self, inp, targets):
            self.weighted_sum += self.fn(inp, targets)
            self.weights += 1

    pixels = [(x.clamp(-1, 1)/2 + 0.5, y) for x, y in dls.valid]
    batches = [(x, x.flatten(1)) for x, _ in pixels]
    set_seed(0)
    learn = Learner(VAE(), DataLoaders(batches, batches), vae_loss, lr=1e-2, opt_func=optim.Adam, cbs=[
        DeviceCB(), MetricsCB(kld=FuncMetric(kld_loss), bce=FuncMetric(bce_loss)), MixedPrecision(), EMACB()])
    learn.fit(2)
    with torch.no_grad(), learn.using('raw'):
        learn.model.eval()
        kld = torch.stack([kld_loss(learn.model(x.to(def_device)), None) for x, _ in batches]).mean()
    raw, ema = learn.validate()
    assert raw['kld'] == pytest.approx(kld.item(), abs=0.02*kld.item() + 1e-3)          # predictions were in bf16
    assert ema['weights'] == 'ema' and ema['kld'] != raw['kld']


def test_features_of_a_classifier():
    "What the chapter on FID does: a learner without an optimizer, whose `noop` for a loss gives the predictions"
    model, samples = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), torch.rand(7, 3, 16, 16)
    learn = TrainLearner(model, DataLoaders([], [(samples, torch.tensor([0]))]), loss_func=fc.noop,
                         cbs=[DeviceCB()], opt_func=None)
    feats, y = learn.capture_preds()
    with torch.no_grad(): assert torch.allclose(feats, to_cpu(model(samples.to(def_device))), atol=1e-6)
    assert feats.shape == (7, 5) and y.tolist() == [0]


class Bar:
    "In place of fastprogress's bars: without a length, and with tables that take text only, as in a terminal"
    def __init__(self, gen, leave=True, parent=None): self.gen, self.lines, self.graphs = gen, [], []
    def __iter__(self): yield from self.gen
    def write(self, line, table=False): self.lines.append('|'.join(line))
    def update_graph(self, graphs): self.graphs = graphs


progress_bar = master_bar = Bar


class CourseProgressCB(Callback):
    order = MetricsCB.order+1
    def __init__(self, plot=False): self.plot = plot
    def before_fit(self, learn):
        learn.epochs = self.mbar = master_bar(learn.epochs)
        self.first = True
        if hasattr(learn, 'metrics'): learn.metrics._log = self._log
        self.losses = []
        self.val_losses = []

    def _log(self, d):
        if self.first:
            self.mbar.write(list(d), table=True)
            self.first = False
        self.mbar.write(list(d.values()), table=True)

    def before_epoch(self, learn): learn.dl = progress_bar(learn.dl, leave=False, parent=self.mbar)
    def after_batch(self, learn):
        learn.dl.comment = f'{learn.loss:.3f}'
        if self.plot and hasattr(learn, 'metrics') and learn.training:
            self.losses.append(learn.loss.item())
            if self.val_losses: self.mbar.update_graph([[fc.L.range(self.losses), self.losses],
                [fc.L.range(learn.epoch).map(lambda x: (x+1)*len(learn.dls.train)), self.val_losses]])

    def after_epoch(self, learn):
        if not learn.training:
            if self.plot and hasattr(learn, 'metrics'):
                self.val_losses.append(learn.metrics.all_metrics['loss'].compute())
                self.mbar.update_graph([[fc.L.range(self.losses), self.losses],
                    [fc.L.range(learn.epoch+1).map(lambda x: (x+1)*len(learn.dls.train)), self.val_losses]])


def test_progress_of_the_course(capsys):
    "Beside ours and early stopping. Wrong: 'Bar' object is not subscriptable; a later fit that writes into this one's"
    metrics, bar, ours = MetricsCB(hits=Hits()), CourseProgressCB(plot=True), ProgressCB(view=LogView)
    learn = learner(metrics, bar, EarlyStoppingCB(patience=1, min_delta=9.), ours)
    learn.fit(5)
    assert learn.metrics is metrics
    rows = [{k: format_value(v) for k, v in r.items()} for r in learn.history]
    assert bar.mbar.lines == ['|'.join(r.values()) for r in [{k: k for k in rows[0]}, *rows]]
    assert len(rows) == 4 and learn.completed == 2                     # early stopping, as without that bar
    assert bar.val_losses == [r['loss'] for r in learn.history if r['train'] == 'eval']
    xs, ys = bar.mbar.graphs[1]
    assert list(xs) == [10, 20] and ys == bar.val_losses
    assert 'hits' in capsys.readouterr().out.splitlines()[-2] and ours.total == 5          # our own lines, also
    lines = list(bar.mbar.lines)
    learn.cbs.remove(bar)
    learn.validate(), learn.fit(1, cbs=CourseProgressCB())
    assert bar.mbar.lines == lines
    learn.cbs.pop()
    learn.fit(1)
    assert "'hits': '" in capsys.readouterr().out


def test_progress_of_the_course_resumes(tmp_path):
    "The order of the batches is the loader's own generator's, which that bar hides. Wrong: another order from there on"
    def run(*cbs, resume=None, n=3):
        learn = learner(MetricsCB(), CourseProgressCB(), *cbs, dls=data(shuffle=True, generator=torch.Generator()))
        with contextlib.suppress(KeyboardInterrupt): learn.fit(n, resume=resume)
        return [o.clone() for o in learn.model.state_dict().values()]

    class Stop(Callback):
        order = Stage.save + 1
        def after_batch(self, learn):
            if learn.training and (learn.epoch, learn.iter) == (1, 4): raise KeyboardInterrupt
    whole = run()
    run(CheckpointCB(tmp_path, every='3ba'), Stop())
    assert all(map(torch.equal, run(CheckpointCB(tmp_path), resume=tmp_path), whole))
    assert all(map(torch.equal, run(CheckpointCB(tmp_path), resume=tmp_path), whole))       # nothing is left to do


def test_metrics_that_log_elsewhere():
    "As the CIFAR chapter's callback for W&B: a subclass with a `_log` of its own, which gets every row as text"
    class LogElsewhere(MetricsCB):
        order = 100
        def before_fit(self, learn): self.logged = []
        def _log(self, d): self.logged.append(dict({m: float(d[m]) for m in self.all_metrics}, train=self.train))

    log = LogElsewhere(hits=Hits())
    learn = learner(log, ProgressCB(view=LogView), EMACB())
    learn.fit(2)
    assert [o['hits'] for o in log.logged] == pytest.approx([r['hits'] for r in learn.history], abs=1e-3)
    assert [o['loss'] for o in log.logged] == pytest.approx([r['loss'] for r in learn.history], abs=1e-3)
    assert [o['train'] for o in log.logged] == [True, False, False]*2
    learn.validate()
    assert len(log.logged) == 6                                        # what is only looked at is not logged


class StandInAccelerator:
    "In place of accelerate's `Accelerator`, in one process"
    def __init__(self, mixed_precision=None): pass
    def prepare(self, *args): return [StandIn(o, 1) if type(o) is optim.Adam else o for o in args]
    def backward(self, loss): loss.backward()


@pytest.mark.parametrize('name', ['stand-in', 'accelerate'])
def test_accelerate_of_the_course(name):
    "Every step counts. Wrong: weights move, `opt_steps` stays 0, and no average has a snapshot"
    Accelerator = StandInAccelerator if name == 'stand-in' else pytest.importorskip('accelerate').Accelerator

    class AccelerateCB(TrainCB):
        order = DeviceCB.order+10
        def __init__(self, n_inp=1, mixed_precision="fp16"):
            super().__init__(n_inp=n_inp)
            self.acc = Accelerator(mixed_precision=mixed_precision)

        def before_fit(self, learn):
            learn.model,learn.opt,learn.dls.train,learn.dls.valid = self.acc.prepare(
                learn.model, learn.opt, learn.dls.train, learn.dls.valid)

        def backward(self, learn): self.acc.backward(learn.loss)

    def run(*cbs, cls=Learner):
        ema, rec = EMACB(decay=0.9), RecorderCB(lr=lambda cb: cb.pg['lr'])
        sched = BatchSchedCB(partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=20))
        set_seed(0)
        learn = learner(DeviceCB('cpu'), MetricsCB(), sched, rec, ema, *cbs, cls=cls, opt_func=optim.Adam)
        learn.fit(2)
        return learn, ema, rec.recs['lr']

    learn, ema, lrs = run(AccelerateCB(mixed_precision='no'))
    plain, plain_ema, plain_lrs = run(cls=TrainLearner)
    assert learn.opt_steps == ema.average.n == 20 and lrs == plain_lrs
    assert all(torch.equal(ema.average.weights[k], v) for k, v in plain_ema.average.weights.items())
    assert learn.history == plain.history
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.lr_find(show=False, max_steps=5)
    assert learn.validate()[1]['loss'] == pytest.approx(plain.validate()[1]['loss'])
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    learn.fit(1)
    assert learn.opt_steps == 30                                       # and not 40, after a look


class Noise(nn.Module):
    "In place of diffusers' `UNet2DModel`: takes images and time steps, and gives an object with a `sample`"
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1)
    def forward(self, x, t): return SimpleNamespace(sample=self.conv(self.norm(x))*(1 + t.view(-1, 1, 1, 1)/1000))


def test_predictions_replaced():
    "A callback that replaces `learn.preds` does so in looks too. Wrong: SimpleNamespace has no attribute 'size'"
    class DDPMCB2(Callback):
        def after_predict(self, learn): learn.preds = learn.preds.sample

    class Penalty(Callback):
        def after_loss(self, learn): learn.loss = learn.loss + 1

    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.arange(32), x)]
    learn = Learner(Noise(), DataLoaders(batches, batches), nn.MSELoss(), lr=1e-2, cbs=[
        DDPMCB2(), TrainCB(n_inp=2), DeviceCB(), MetricsCB(), ProgressCB(), Penalty(), EMACB(), BNUpdateCB()])
    learn.fit(2)
    assert [r['loss'] for r in learn.validate()] == [r['loss'] for r in learn.history[-2:]]
    assert learn.history[-1]['loss'] > 1
    assert learn.get_preds()[0].shape == x.shape
    assert learn.lr_find(show=False, max_steps=5).losses[0] > 1


class DDPMCB(TrainCB):
    order = DeviceCB.order+1
    def __init__(self, n_steps, beta_min, beta_max):
        super().__init__()
        self.n_steps,self.βmin,self.βmax = n_steps,beta_min,beta_max
        # variance schedule, linearly increased with timestep
        self.β = torch.linspace(self.βmin, self.βmax, self.n_steps)
        self.α = 1. - self.β
        self.ᾱ = torch.cumprod(self.α, dim=0)
        self.σ = self.β.sqrt()

    def predict(self, learn): learn.preds = learn.model(*learn.batch[0]).sample

    def before_batch(self, learn):
        device = learn.batch[0].device
        ε = torch.randn(learn.batch[0].shape, device=device)  # noise, x_T
        x0 = learn.batch[0] # original images, x_0
        self.ᾱ = self.ᾱ.to(device)
        n = x0.shape[0]
        # select random timesteps
        t = torch.randint(0, self.n_steps, (n,), device=device, dtype=torch.long)
        ᾱ_t = self.ᾱ[t].reshape(-1, 1, 1, 1).to(device)
        xt = ᾱ_t.sqrt()*x0 + (1-ᾱ_t).sqrt()*ε #noisify the image
        # input to our model is noisy image and timestep, ground truth is the noise
        learn.batch = ((xt, t), ε)


def test_ddpm_of_the_course():
    """BatchNorm gets statistics of noisy images, as in training; looks get them too. Wrong: an error, or those of the
    clean images, mean 3 and variance 0"""
    x = torch.full((512, 1, 8, 8), 3.)
    ds = TensorDataset(x, torch.arange(512))
    dls = DataLoaders(*get_dls(ds, ds, bs=64))
    set_seed(0)
    tmax = 2*len(dls.train)
    sched = partial(lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=tmax)
    ddpm_cb, ema = DDPMCB(n_steps=1000, beta_min=0.0001, beta_max=0.02), EMACB()
    cbs = [ddpm_cb, DeviceCB(), ProgressCB(plot=True), MetricsCB(), BatchSchedCB(sched), ema, BNUpdateCB()]
    learn = Learner(Noise(), dls, nn.MSELoss(), lr=1e-2, cbs=cbs, opt_func=optim.Adam)
    learn.fit(2)
    assert learn.opt_steps == ema.average.n == tmax and learn.weights == 'ema'
    scale = ddpm_cb.ᾱ.double()                        # of the variance of the images, at each of the steps
    mean = 3*scale.sqrt().mean()
    var = (1 - scale + 9*scale).mean() - mean**2
    assert learn.model.norm.running_mean.item() == pytest.approx(mean.item(), abs=0.2)
    assert learn.model.norm.running_var.item() == pytest.approx(var.item(), abs=0.3)
    assert [r['weights'] for r in learn.history[-2:]] == ['raw', 'ema'] and learn.history[-1]['loss'] < 2
    p, t, (inp, steps) = learn.capture_preds(inps=True)
    assert p.shape == t.shape == inp.shape == x.shape and steps.shape == (512,)
    assert abs(t.mean()) < 0.02 < inp.var() and steps.max() > 900
    assert 'BatchNorm2d' in learn.summary()
    learn.lr_find(show=False, max_steps=5)
    (xt, t), ε = learn.batch
    show_images(xt[:4], titles=[str(o.item()) for o in t[:4]], imsize=1.5)


def test_unet_chapter_whose_blocks_patch_forward():
    """`saved` puts a function on a convolution that keeps its outputs for the way up. Wrong: a copy whose convolutions
    are those of the original, so that `module('ema')` gives neither the average's predictions nor the raw ones"""
    def saved(m, blk):
        m_ = m.forward

        @wraps(m.forward)
        def _f(*args, **kwargs):
            res = m_(*args, **kwargs)
            blk.saved.append(res)
            return res

        m.forward = _f
        return m

    class DownUp(nn.Module):
        def __init__(self):
            super().__init__()
            # the second one twice
            self.convs = nn.ModuleList([saved(nn.Conv2d(1, 1, 3, padding=1), self),
                                        saved(saved(nn.Conv2d(1, 1, 3, padding=1), self), self)])
        def forward(self, x):
            self.saved = []
            for conv in self.convs: x = conv(x)
            return x + sum(self.saved)

    set_seed(0)
    x = torch.randn(8, 1, 8, 8)
    model = nn.Sequential(DownUp(), nn.BatchNorm2d(1))
    learn = TrainLearner(model, DataLoaders([(x, 2*x)]*5, [(x, 2*x)]), nn.MSELoss(), lr=0.1,
                         cbs=[DeviceCB('cpu'), EMACB(decay=0.9, apply=False), BNUpdateCB()])
    learn.fit(2)
    copy = learn.module('ema')
    with torch.no_grad():
        with learn.using('ema'): wanted = learn.model.eval()(x)
        assert torch.equal(copy(x), wanted) and not torch.equal(wanted, learn.model.eval()(x))
        assert len(copy[0].saved) == len(model[0].saved) == 3
        for p in copy.parameters(): p.zero_()
        assert (copy(x) == 0).all()                                    # no layer of it is the original's
