"The finder of learning rates leaves no trace, stops where it should, and uses the rates that it tries"
import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from fastswa.callbacks.schedule import OneCycleCB, WarmupStableDecayCB
from fastswa.callbacks.finder import LRFinderCB, lr_find
from fastswa.callbacks.schedule import BatchSchedCB, EpochSchedCB
from fastswa.callbacks.swa import SWACB
from fastswa.random_state import set_seed
from fastswa.training.events import Callback
from fastswa.training.learner import Learner, MomentumLearner, TrainCB, TrainLearner
from helpers import Accumulate, image_learner, linear, regression

N = 7     # steps in an epoch
SCHEDS = dict(
    batches=lambda: BatchSchedCB(partial(lr_scheduler.OneCycleLR, max_lr=0.1)),
    epochs=lambda: EpochSchedCB(lr_scheduler.ReduceLROnPlateau),
    one_cycle=OneCycleCB, wsd=lambda: WarmupStableDecayCB('1ba', '2ba'),
    swa=lambda: SWACB('3ba', '1ba', swa_lr=0.01, anneal='3ba'))

def noisy_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

class Noise(Callback):
    prepares = True
    def before_batch(self, learn): learn.batch = learn.batch[0] + torch.randn(3)/100, learn.batch[1]

class Breaks(Callback):
    "Raises at one of the batches of a search"
    prepares, armed = True, False
    def before_batch(self, learn):
        if self.armed and learn.iter == 2: raise self.exc

LEARNERS = dict(sgd=partial(TrainLearner, opt_func=partial(optim.SGD, momentum=0.9)),
                adam=partial(TrainLearner, opt_func=optim.AdamW),
                momentum=MomentumLearner, bare=partial(Learner, cbs=TrainCB()))

def search(learn, breaks, exc):
    "A search for a rate that ends well, or by an exception"
    breaks.exc, breaks.armed = exc, exc is not None
    names = 'opt', 'history', 'cbs', 'dls', 'batch', 'averages'
    before = [getattr(learn, k) for k in names]
    if exc is None:
        res = lr_find(learn, show=False)
        assert len(res.lrs) > 10 and res.lrs[1]/res.lrs[0] == pytest.approx(1.3)
    else:
        with pytest.raises(type(exc)): lr_find(learn, show=False)
    breaks.armed = False
    assert all(getattr(learn, k) is o for k, o in zip(names, before))
    assert all(p.grad is None for p in learn.model.parameters())

@cache
def trained(kind, first, look=None):
    "What is left after fits of `first` and two epochs, with a look at the learner between them"
    set_seed(0)
    x = torch.randn(60, 3)
    gen = torch.Generator().manual_seed(1)
    ds = TensorDataset(x, x.sum(1, keepdim=True))
    dls = SimpleNamespace(train=DataLoader(ds, 10, shuffle=True, generator=gen),
                          valid=DataLoader(ds, 20, shuffle=True))
    learn, breaks = LEARNERS[kind](noisy_net(), dls, lr=0.01), Breaks()
    learn.cbs += [Noise(), breaks, BatchSchedCB(partial(lr_scheduler.OneCycleLR, max_lr=0.05))]
    learn.fit(first)
    if look: look(learn, breaks)
    learn.fit(2)
    return [*learn.model.state_dict().values(), torch.rand(1), gen.get_state()], learn.history, learn.opt_steps

@pytest.mark.parametrize('kind', LEARNERS)
@pytest.mark.parametrize('exc', [None, KeyboardInterrupt(), ZeroDivisionError()])
@pytest.mark.parametrize('first', [0, 1])
def test_finder_leaves_no_trace(kind, exc, first):
    (a, *rest_a), (b, *rest_b) = trained(kind, first, partial(search, exc=exc)), trained(kind, first)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and rest_a == rest_b

def test_finder_stops_where_it_should():
    big = LRFinderCB(max_mult=2, show=False)
    TrainLearner(linear(), regression(N), lr=1e-3).fit(100, cbs=big, valid=False)
    assert 10 < len(big.lrs) < 100 and big.losses[-1] > min(big.losses)     # the explosion, not the last step
    negative = TrainLearner(linear(), regression(N), loss_func=lambda p, y: F.mse_loss(p, y) - 100.)
    assert len(negative.lr_find(show=False).lrs) > 20                       # a loss below zero is no explosion
    assert len(TrainLearner(linear(), regression(N)).lr_find(max_steps=9, show=False).lrs) == 9
    assert len(TrainLearner(linear(), regression(N)).lr_find(max_epochs=2, show=False).lrs) == 2*N

def test_finder_with_gradients_that_add_up():
    cb = Accumulate(2)
    cb.prepares = True                                              # so that it takes part
    res = TrainLearner(linear(), regression(N), cbs=cb).lr_find(max_steps=60, show=False)
    assert len(set(res.lrs)) < len(res.lrs) and all(map(math.isfinite, res.smooth[1]))

BAD = [('gamma', 1), ('gamma', math.nan), ('max_mult', 0.5), ('max_steps', 0), ('start_lr', -1)]

@pytest.mark.parametrize('name, value', BAD)
def test_finder_arguments(name, value):
    with pytest.raises(ValueError, match=f'{name} must be a (whole )?number.*; got {value}'):
        TrainLearner(linear(), regression(N)).lr_find(**{name: value})

def test_finder_plot_shows_the_suggestion():
    import matplotlib
    matplotlib.use('Agg')
    ax = TrainLearner(linear(), regression(N)).lr_find(show=False).plot()
    assert ax.get_xscale() == 'log' and ax.get_xlabel() == 'learning rate' and ax.get_ylabel() == 'training loss'
    assert any('steepest descent' in t.get_text() for t in ax.get_legend().get_texts())

class RatesSGD(optim.SGD):
    "Writes down the rate of each step"
    def step(self, closure=None):
        self.rates.append(self.param_groups[0]['lr'])
        return super().step(closure)

@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('name', SCHEDS)
def test_a_search_uses_the_rates_it_tries(name):
    "Those of the steps themselves: what the finder writes down stays the same when a schedule sets others"
    RatesSGD.rates = []
    learn = image_learner(SCHEDS[name](), opt_func=RatesSGD)
    found = learn.lr_find(max_steps=20, show=False)
    assert RatesSGD.rates == pytest.approx([1e-5*1.3**i for i in range(len(RatesSGD.rates))])
    assert len(RatesSGD.rates) >= 19
    assert found.lrs[:len(RatesSGD.rates)] == pytest.approx(RatesSGD.rates)
