"Promises of the learner that need more than a line to break: frozen layers, other optimizers, leftovers, workers, looking"
import gc
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from fastswa.callbacks.basics import BatchTransformCB, DeviceCB, RecorderCB, SingleBatchCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.core import set_seed
from fastswa.training.events import Callback, CancelBatchException, CancelEpochException, CancelFitException
from fastswa.training.learner import MomentumLearner, TrainLearner
from fastswa.callbacks.swa import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB


def data(n=96, bs=16, **kw):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, generator=g), torch.randint(3, (n,), generator=g)
    ds = TensorDataset(x, y)
    return SimpleNamespace(train=DataLoader(ds, bs, shuffle=True, **kw), valid=DataLoader(ds, 2*bs, **kw))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def learner(*cbs, dls=None, cls=TrainLearner, **kw): return cls(net(), dls or data(), F.cross_entropy, 0.1, cbs, **kw)


def state(learn): return [t.clone() for t in learn.model.state_dict().values()]


def same(a, b): return all(map(torch.equal, a, b))


class Two:
    "Anything with step and zero_grad, and nothing else"
    def __init__(self, params, lr): self.params, self.lr, self.steps = list(params), lr, 0
    def step(self):
        self.steps += 1
        with torch.no_grad():
            for p in self.params: p -= self.lr*p.grad
    def zero_grad(self):
        for p in self.params: p.grad = None


def test_any_optimizer_with_step_and_zero_grad():
    cb = EMACB()
    learn = learner(cb, opt_func=Two)
    learn.fit(1)
    assert learn.opt.steps == learn.opt_steps == cb.average.n == 6


def test_a_layer_frozen_by_a_callback_stays_frozen():
    "model.train() at each epoch would thaw it"
    class Freeze(Callback):
        def before_fit(self, learn): learn.model[1].eval()
    learn = learner(Freeze())
    before = learn.model[1].running_mean.clone()
    learn.fit(2)
    assert torch.equal(learn.model[1].running_mean, before)
    assert learn.model[1].training                     # as it was before the fit


def test_frozen_layers_keep_their_statistics_under_an_average():
    "A validation leaves the model in eval mode, where no layer looks frozen"
    learn = learner(EMACB(), SWACB(start='0dur'), BNUpdateCB())
    learn.model[1].eval()
    learn.model[1].running_mean.fill_(5.)
    learn.fit(2)
    for name in ('raw', 'ema', 'swa'):
        with learn.using(name) as m: assert torch.equal(m[1].running_mean, torch.full((8,), 5.)), name


def test_gradients_others_left_are_not_stepped_on():
    a, b = learner(), learner()
    for p in a.model.parameters(): p.grad = torch.full_like(p, 1e3)
    for learn in (a, b):
        set_seed(1)
        learn.fit(1)
    assert same(state(a), state(b))


def test_another_learner_does_not_meet_the_momentum():
    learn = learner(cls=MomentumLearner)
    set_seed(1)
    learn.fit(1)
    assert all(p.grad is None for p in learn.model.parameters())
    model, dls = learn.model, learn.dls
    kept = [t.clone() for t in model.state_dict().values()]
    set_seed(2)
    TrainLearner(model, dls, F.cross_entropy, 0.1).fit(1)
    other = net()
    other.load_state_dict(dict(zip(model.state_dict(), kept)))
    set_seed(2)
    TrainLearner(other, dls, F.cross_entropy, 0.1).fit(1)
    assert same(model.state_dict().values(), other.state_dict().values())


@pytest.mark.parametrize('look', [
    lambda learn: learn.validate(), lambda learn: learn.get_preds(), lambda learn: learn.capture_preds(inps=True),
    lambda learn: learn.summary(), lambda learn: learn.lr_find(max_steps=12, show=False), lambda learn: learn.validate('ema'),
    lambda learn: learn.get_preds('ema')], ids=['validate', 'preds', 'capture', 'summary', 'lr_find', 'validate ema', 'preds ema'])
@pytest.mark.parametrize('cls', [TrainLearner, MomentumLearner])
def test_looking_between_two_fits_changes_nothing(look, cls):
    def run(look):
        noise = BatchTransformCB(lambda b: (b[0] + torch.randn(3)/10, b[1]))
        learn = learner(noise, DeviceCB('cpu'), MetricsCB(), EMACB(apply=False), BNUpdateCB(), cls=cls,
                        opt_func=partial(optim.SGD, momentum=0.5))
        set_seed(3)
        learn.fit(1)
        if look: look(learn)
        learn.fit(1)
        return state(learn), torch.get_rng_state(), learn.history, learn.opt_steps
    (a, rng, hist, steps), (b, rng2, hist2, steps2) = run(look), run(None)
    assert same(a, b) and torch.equal(rng, rng2) and hist == hist2 and steps == steps2


def test_watching_with_persistent_workers_changes_nothing():
    "Workers draw random numbers of their own; a look that restarts them would change what they draw next"
    def run(*cbs):
        learn = learner(*cbs, dls=data(num_workers=1, persistent_workers=True))
        set_seed(4)
        learn.fit(2)
        learn.restore()
        return state(learn)
    assert same(run(), run(EMACB(), BNUpdateCB()))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")
def test_an_error_says_where_it_happened():
    dls = data()
    dls.train = [(torch.zeros(4, 3), torch.tensor([0, 1, 2, 7]))]
    with pytest.raises(IndexError) as e: learner(dls=dls).fit(1)         # label out of range
    assert '(4, 3) float32, (4,) int64' in e.value.__notes__[0] and 'training epoch 0' in e.value.__notes__[0]


@pytest.mark.parametrize('exc', [CancelFitException, CancelEpochException, CancelBatchException])
def test_a_cancelled_batch_reaches_no_record(exc):
    class Stop(Callback):
        def after_loss(self, learn):
            if learn.iter == 1 and learn.training: raise exc
    rec = RecorderCB(lr=lambda cb: cb.pg['lr'])
    learn = learner(rec, Stop(), MetricsCB())
    learn.fit(1, valid=False)
    assert len(rec.recs['lr']) == dict(CancelFitException=1, CancelEpochException=1, CancelBatchException=5)[exc.__name__]
    assert len(learn.history) == (exc is CancelBatchException)


def test_a_learner_that_failed_is_freed():
    "A traceback or a cycle that holds the learner would hold its GPU memory too"
    class Fail(Callback):
        def after_batch(self, learn): raise ValueError
    learn = learner(Fail(), EMACB())
    try: learn.fit(1)
    except ValueError: pass
    ref = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert ref() is None


def test_validation_only_needs_no_optimizer():
    learn = learner(opt_func=None)
    learn.fit(1, train=False)
    assert learn.opt is None and learn.history[0]['train'] == 'eval'
    learn.dls.valid = None
    with pytest.raises(ValueError, match='no validation loader'): learn.validate()


def test_a_single_batch_is_seen_by_all():
    seen = []
    class See(Callback):
        order = 50
        def after_batch(self, learn): seen.append(learn.iter)
    learner(SingleBatchCB(), See()).fit(3)
    assert seen == [0]


def test_momentum_learner_with_a_parameter_that_gets_no_gradient():
    learn = learner(cls=MomentumLearner)
    learn.model.unused = nn.Parameter(torch.zeros(3))
    learn.model.forward = lambda x: learn.model[4](learn.model[0](x))
    learn.fit(2)
    assert learn.opt_steps == 12


def test_showing_a_batch_trains_nothing(monkeypatch):
    import matplotlib
    matplotlib.use('agg')
    g = torch.Generator().manual_seed(0)
    dls = SimpleNamespace(train=[(torch.rand(4, 1, 8, 8, generator=g), torch.zeros(4).long())], valid=None)
    learn = TrainLearner(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), dls, F.cross_entropy, 0.1)
    before = state(learn)
    learn.show_image_batch(max_n=4)
    assert same(before, state(learn)) and learn.opt is None and learn.batch is None


def test_an_error_before_backward_keeps_no_activations():
    "Wrong: `learn.preds` and `learn.loss` hold the graph of the batch, and with it the memory, until the next fit (Lightning#3275)"
    import gc, weakref
    kept = []
    class Fails(Callback):
        def after_loss(self, learn): raise ValueError('no more')
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda m, i, o: kept.append(weakref.ref(o)))
    learn = TrainLearner(model, SimpleNamespace(train=[(torch.randn(4, 3), torch.randint(3, (4,)))], valid=None), F.cross_entropy, 0.1, Fails())
    try: learn.fit(1)
    except ValueError: pass
    gc.collect()
    assert learn.loss is not None and kept[0]() is None
