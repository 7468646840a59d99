"Hooks that go whatever happens, statistics that are right, and a training run that does not notice"
import copy
import gc
import sys
import warnings
import weakref
from functools import partial
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from fastswa.callbacks.metrics import MetricsCB
from fastswa.random_state import set_seed
from fastswa.training.events import Callback, CancelBatchException, CancelEpochException, CancelFitException
from fastswa.callbacks.activations import ActivationStats, HooksCallback
from fastswa.nets.hooks import Hook, Hooks
from fastswa.nets.layers import get_model
from fastswa.nets.statistics import StatsHistory, _allow_nondeterministic, append_stats, get_hist, get_min, tensor_stats
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB
from helpers import ctrl_c, memory, moments

matplotlib.use('agg')
import matplotlib.pyplot as plt  # noqa: E402

is_act = lambda m: isinstance(m, (nn.ReLU, nn.Tanh))  # noqa: E731


def data(n=96, bs=16):
    g = torch.Generator().manual_seed(0)
    ds = TensorDataset(torch.randn(n, 1, 6, 6, generator=g), torch.randint(3, (n,), generator=g))
    return SimpleNamespace(train=DataLoader(ds, bs, shuffle=True), valid=DataLoader(ds, 2*bs))       # 6 and 3 batches


def net(act=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), act()), nn.Dropout(0.3), nn.Flatten(),
                         nn.Linear(64, 3))


def learner(*cbs, model=None, cls=TrainLearner, lr=0.1):
    set_seed(0)
    return cls(net() if model is None else model, data(), F.cross_entropy, lr, cbs, partial(optim.SGD, momentum=0.9))


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


# --- the run

@pytest.mark.parametrize('every', [1, 2])
def test_training_is_the_same_bit_for_bit(every):
    runs = []
    for watching in ([], [ActivationStats(every=every, grads=True), HooksCallback(append_stats, on_valid=True)]):
        learn = learner(EMACB(apply=False), BNUpdateCB(), *watching)
        learn.fit(2)
        runs.append((learn.model.state_dict(), learn.history, torch.get_rng_state(), learn.averages['ema'].weights))
    for a, b in zip(*runs):
        if isinstance(a, dict): assert all(torch.equal(a[k], b[k]) for k in a)
        else: assert a == b if isinstance(a, list) else torch.equal(a, b)


class Looks(Callback):
    "Does in the middle of a batch what other callbacks may do there"
    def after_batch(self, learn):
        if not learn.training or learn.epoch: return
        learn.validate()
        learn.capture_preds()
        if learn.iter == 2: learn.lr_find(show=False)


def test_only_the_run_itself_is_read():
    "Rows of averages, their BatchNorm statistics, validate, lr_find and captured predictions pass the same modules"
    stats, both = ActivationStats(is_act, every=1, grads=True), HooksCallback(append_stats, is_act, on_valid=True)
    learn = learner(stats, both, EMACB(), BNUpdateCB(), Looks())
    learn.fit(2)
    learn.validate()
    learn.lr_find(show=False)
    h, = stats
    assert h.stats.batches == h.grads.batches == tuple(range(12)) and h.calls == 12
    assert next(iter(both)).stats.n == 2*(6 + 3)
    assert n_hooks(learn.model) == 0


def test_every():
    class Skips(Callback):
        def after_predict(self, learn):
            if learn.training and learn.iter == 3: raise CancelBatchException
    stats = ActivationStats(is_act, every=4, grads=True)
    learn = learner(stats, Skips())
    learn.fit(3)
    h, = stats
    assert h.stats.batches == (0, 4, 8, 12, 16)
    assert h.grads.batches == (0, 4, 8, 12, 16)
    learn.fit(1)                                            # a fit starts with nothing
    assert next(iter(stats)).stats.batches == (0, 4)


def test_a_cancelled_batch_has_no_gradients():
    class Skips(Callback):
        def after_predict(self, learn): raise CancelBatchException
    stats = ActivationStats(is_act, every=1, grads=True)
    learner(stats, Skips()).fit(1, valid=False)
    h, = stats
    assert h.stats.n == 6 and not hasattr(h, 'grads')
    assert stats.report(grads=True)[0].note == 'no gradient came back'


def test_one_callback_serves_several_learners():
    stats, a, b = ActivationStats(is_act, every=1), learner(), learner(model=net(nn.Tanh))
    for learn, name in ((a, '0.2 ReLU'), (b, '0.2 Tanh'), (a, '0.2 ReLU')):
        learn.fit(1, cbs=stats)
        assert [(h.name, h.stats.n) for h in stats] == [(name, 6)]


def test_copies_of_the_model_are_not_read():
    "A copy made during the fit takes the functions torch calls along: they must not add its outputs to the statistics"
    class Copies(Callback):
        def after_predict(self, learn): copy.deepcopy(learn.model)(learn.batch[0])
    stats = ActivationStats(is_act, every=1)
    learner(stats, Copies()).fit(1, valid=False)
    h, = stats
    assert h.stats.n == h.calls == 6


# --- hooks go

class Boom(Callback):
    def __init__(self, event, exc): setattr(self, event, self.go); self.exc = exc
    def go(self, learn): raise self.exc


EVENTS = ['before_fit', 'before_epoch', 'before_batch', 'after_predict', 'after_backward', 'after_batch', 'after_epoch',
          'cleanup_fit']


@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('exc',
                         [ZeroDivisionError, KeyboardInterrupt, CancelFitException, CancelEpochException,
                          CancelBatchException])
def test_hooks_go_whatever_ends_the_fit(event, exc):
    for order in (-50, 50):
        boom = Boom(event, exc)
        boom.order = order
        stats = ActivationStats(every=1, grads=True)
        learn = learner(stats, boom)
        learn.dls = data(32)                                # two batches, and one
        try: learn.fit(1)
        except (ZeroDivisionError, KeyboardInterrupt, CancelFitException, CancelEpochException, CancelBatchException):
            pass
        assert n_hooks(learn.model) == 0 and stats.learn is None


FILES = 'fastswa/callbacks/', 'fastswa/nets/hooks', 'fastswa/training/'      # the code in whose lines Ctrl-C is pressed


def test_ctrl_c_at_any_line(monkeypatch):
    "Wrong: hooks that stay on the modules, or a callback that watches no other fit"
    monkeypatch.setattr(sys, 'unraisablehook', lambda *args: None)      # Ctrl-C in a __del__, which Python swallows
    batches = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))]*3
    def watched():
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        stats = ActivationStats(is_act, every=2, grads=True)
        return TrainLearner(model, SimpleNamespace(train=batches, valid=batches[:1]), F.cross_entropy, cbs=stats)
    def fit(learn): learn.fit(1, valid=False)
    lines = moments(partial(fit, watched()), FILES, every=('callbacks/activations', 'nets/hooks'))
    assert len(lines) > 300
    for at in lines:
        learn = watched()
        ctrl_c(partial(fit, learn), at)
        assert n_hooks(learn.model) == 0, at
        fit(learn)
        assert next(iter(learn.cbs[0])).stats.batches == (0, 2)


def test_single_hooks_go_when_nobody_holds_them():
    model = net()
    h = Hook(model[0], append_stats)
    assert n_hooks(model) == 1
    h = Hook(model[0], append_stats)                        # the cell of a notebook, run again
    assert n_hooks(model) == 1 and h.hook is not None
    h.remove()
    h.remove()
    assert n_hooks(model) == 0
    with pytest.raises(ZeroDivisionError), Hooks(model, append_stats) as hooks:
        assert n_hooks(model) == 4
        1/0
    assert n_hooks(model) == 0
    hooks = Hooks(model, append_stats)
    kept = list(hooks)
    del hooks[1:3]
    assert n_hooks(model) == 2 and len(hooks) == 2 and len(kept) == 4
    with pytest.raises(TypeError, match="needs a module; got 'x'") as e: Hooks([model, 'x'], append_stats)
    assert n_hooks(model) == 2 and e.tb is not None         # though the traceback holds the list


def test_what_a_hook_returns_replaces_the_output():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with Hooks([model[1]], lambda h, m, i, o: o + 7): assert model(torch.zeros(1, 2)).min() >= 7
    assert model(torch.zeros(1, 2)).max() < 7


def test_which_modules_are_watched():
    "With containers there are 20 curves for 10 layers; a ModuleList has no forward and is never watched"
    stats, everything = ActivationStats(every=1), ActivationStats(lambda m: True, every=1)
    learner(stats, everything).fit(1, valid=False)
    layers = ['0.0 Conv2d', '0.1 BatchNorm2d', '0.2 ReLU', '1 Dropout', '2 Flatten', '3 Linear']
    assert [h.name for h in stats] == layers
    assert [h.name for h in everything] == ['Sequential', '0 Sequential', *layers]
    outer, inner = (next(h for h in everything if h.name == name).stats for name in ('0 Sequential', '0.2 ReLU'))
    assert torch.equal(outer.means, inner.means) and torch.equal(outer.hists, inner.hists)
    stats = ActivationStats(lambda m: not isinstance(m, nn.Linear), every=1)
    learner(stats, model=Odd(same=lambda x: x)).fit(1, valid=False)
    assert [h.name for h in stats] == ['Odd', 'odd.same Thing', 'more.0 Tanh']


def test_an_output_that_is_a_parameter_keeps_no_hook():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(36))
        def forward(self): return self.w
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos, self.lin = Positions(), nn.Linear(36, 3)
        def forward(self, x): return self.lin(x.flatten(1) + self.pos())
    stats = ActivationStats(every=1, grads=True)
    learn = learner(stats, model=Net())
    learn.fit(1)
    assert not learn.model.pos.w._backward_hooks
    assert [r.batches for r in stats.report(grads=True)] == [6, 6]


# --- what is read

@pytest.mark.parametrize('dtype, tol',
                         [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
@pytest.mark.parametrize('shape', [(), (7,), (50, 4), (20, 4, 9), (20, 4, 5, 5), (3, 4, 2, 5, 5)])
def test_statistics_against_numpy(dtype, tol, shape):
    torch.manual_seed(0)
    x = (torch.randn(shape)*4).relu().to(dtype)
    if x.ndim > 1: x[:, 1] = 0
    a = x.double().numpy()
    units = np.moveaxis(a, 1, 0).reshape(a.shape[1], -1) if a.ndim > 1 else a.reshape(1, -1)
    got = tensor_stats(x)
    assert got.dtype == (dtype if dtype == torch.float64 else torch.float32)
    expected = [a.mean(), a.std(), (a == 0).mean(), (units == 0).all(1).mean()]
    np.testing.assert_allclose(got[:4], expected, rtol=tol, atol=1e-6)
    edges = np.arange(0, 10.25, 0.25)
    inside = np.abs(a[..., None] - edges).min(-1) > 1e-6 if dtype.itemsize > 2 else np.zeros(shape, bool)
    if inside.all(): np.testing.assert_array_equal(got[4:], np.histogram(a, [*edges, np.inf])[0])
    assert got[4:].sum() == a.size and got[-1] == (a >= 10).sum()


def test_units_along_the_last_axis():
    "A sequence (N, T, C): its units are not its places"
    x = torch.ones(5, 6, 8)
    x[..., :2] = 0
    assert tensor_stats(x, axis=-1)[3] == 2/8 and tensor_stats(x, axis=2)[3] == 2/8 and tensor_stats(x, axis=1)[3] == 0


def test_the_threshold_for_dead():
    "In the course, |x| < 0.25 counts as dead, which small signals are in good health"
    x = torch.rand(50, 10)*0.2 + 1e-3
    assert tensor_stats(x)[3] == 0 and tensor_stats(x)[2] == 0
    assert tensor_stats(x, dead=0.25)[3] == 1
    x[:, :3] = torch.tensor([0., -1e-7, 1e-7])
    assert tensor_stats(x)[3] == pytest.approx(0.3) and tensor_stats(x, dead=0)[3] == pytest.approx(0.1)


def test_beyond_ten_is_counted():
    counts = tensor_stats(torch.tensor([[0.1, -9.9, 10.1, -1e30, torch.inf]]))[4:]
    assert counts[0] == 1 and counts[39] == 1 and counts[40] == 3


@pytest.mark.parametrize('scale', [1e-30, 1e-12, 1., 1e12, 1e30])
def test_huge_and_tiny(scale):
    "Squares of 1e30 are infinite in float32, those of 1e-30 zero"
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))*scale
    np.testing.assert_allclose(tensor_stats(x)[:2], [x.double().mean(), x.double().std(correction=0)], rtol=1e-4)


def test_a_large_mean():
    "The mean of the squares less the square of the mean would be noise"
    x = 1000 + torch.randn(100_000, generator=torch.Generator().manual_seed(0))/100
    assert tensor_stats(x)[1] == pytest.approx(x.double().std(correction=0).item(), rel=1e-2)


def test_more_elements_than_float32_can_count():
    "Counting by ones in float32 stops at 16,777,216"
    x = torch.zeros(20_000_000, dtype=torch.float16)
    assert tensor_stats(x)[4] == 20_000_000


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_a_sample_of_large_outputs(layout):
    "A stride of 8 would read one channel of eight, or one column of the images"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, 32, 32, generator=g) + torch.arange(8).view(8, 1, 1)*2 - 4 + torch.arange(32.)/8
    x[:, 5] = 0
    x = x.to(memory_format=layout)
    a, got = x.double(), tensor_stats(x).double()
    np.testing.assert_allclose(got[:4], [a.mean(), a.std(), 1/8, 1/8], rtol=5e-3)
    counts = np.histogram(a.abs().numpy(), [*np.arange(0, 10.25, 0.25), np.inf])[0]
    assert got[4:].sum().item() == pytest.approx(a.numel())
    np.testing.assert_allclose(got[4:], counts, rtol=0.05, atol=300)
    for place in (0, 123_456, -1):                          # told from the whole, whether the sample has it or not
        for bad in (torch.nan, torch.inf):
            y = x.clone(memory_format=torch.preserve_format)
            y[place % 256, 4, 3, 3] = bad
            assert not tensor_stats(y)[:2].isfinite().any()
    z = torch.zeros(256, 8, 32, 32)
    z[100, 3, 7, 7] = 1
    assert tensor_stats(z)[3] == 7/8


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_statistics_take_little_memory(layout):
    "The largest activation of a network, three times more, may be too much"
    x = torch.randn(64, 32, 64, 64).to(memory_format=layout)        # 32 MB
    top, _ = memory(lambda: tensor_stats(x))
    assert 0 < top < 6*2**20


def test_nan_is_seen():
    x = torch.ones(10, 2)
    x[3, 0] = torch.nan
    got = tensor_stats(x)
    assert got[:2].isnan().all() and got[3] == 0 and got[4:].sum() == 19
    assert not tensor_stats(torch.tensor([[1., torch.inf]]))[:2].isfinite().any()


def test_the_input_stays():
    x = torch.randn(10, 2, requires_grad=True)
    before = x.detach().clone()
    assert not tensor_stats(x).requires_grad and not tensor_stats(x.detach(), log=True).requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize('inplace', [False, True])
def test_gradients_are_those_of_autograd(inplace):
    "Full backward hooks fail where the next module works in place"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace), nn.Linear(8, 3))
    x, y = torch.randn(64, 3)*3, torch.randint(3, (64,))
    outs, h = [], x
    for m in copy.deepcopy(model):
        h = F.relu(h) if isinstance(m, nn.ReLU) else m(h)
        outs.append(h)
    expected = torch.autograd.grad(F.cross_entropy(h, y), outs)
    stats = ActivationStats(every=1, grads=True)
    TrainLearner(model, SimpleNamespace(train=[(x, y)], valid=None), F.cross_entropy, cbs=stats).fit(1)
    for h, o, g in zip(stats, outs, expected, strict=True):
        o, g = o.detach().double().numpy(), g.double().numpy()
        np.testing.assert_allclose([h.stats.means[0], h.stats.stds[0]], [o.mean(), o.std()], rtol=1e-5,
                                   atol=1e-6*o.std())
        np.testing.assert_allclose([h.grads.means[0], h.grads.stds[0]], [g.mean(), g.std()], rtol=1e-5,
                                   atol=1e-6*g.std())
        assert h.grads.zeros[0] == pytest.approx((g == 0).mean())
        assert h.grads.dead[0] == pytest.approx((g == 0).all(0).mean())
        np.testing.assert_array_equal(h.grads.hists[0],
                                      np.histogram(np.abs(g), [0, *10**np.arange(-10, 0.25, 0.25), np.inf])[0])


def test_the_axis_of_the_units():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.act, self.head = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
        def forward(self, x): return self.head(self.act(self.lin(x[:, 0]))).mean(1)     # a sequence: (N, 6, 5)
    for axis, dead in ((-1, 2/5), (1, 0)):
        model = Net()
        with torch.no_grad(): model.lin.bias.copy_(torch.tensor([-99., -99., 9, 9, 9]))
        stats = ActivationStats(is_act, every=1, grads=True, axis=axis)
        learner(stats, model=model, lr=0.).fit(1)
        assert (next(iter(stats)).stats.dead == torch.tensor(dead)).all()


def test_gradients_of_frozen_layers():
    model = net().requires_grad_(False)
    model[3].requires_grad_(True)
    stats = ActivationStats(every=1, grads=True)
    learner(stats, model=model).fit(1)
    notes = {r.name: r.note for r in stats.report(grads=True)}
    assert notes['0.0 Conv2d'] == 'no gradient came back' and notes['3 Linear'] == ''
    stats.color_dim(grads=True)
    assert 'no gradient came back' in [ax.get_xlabel() for ax in plt.gcf().axes]


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_runs_a_module_twice(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(36, 8), nn.ReLU())
            self.lin = nn.Linear(8, 3)
        def forward(self, x):
            return self.lin(checkpoint(self.inner, x.flatten(1).requires_grad_(), use_reentrant=reentrant))
    stats = ActivationStats(is_act, every=1, grads=True)
    learner(stats, model=Net()).fit(1, valid=False)
    h, = stats
    assert h.stats.batches == h.grads.batches == tuple(range(6))


# --- odd models

class Odd(nn.Module):
    def __init__(self, **things):
        super().__init__()
        self.first, self.odd = nn.Linear(36, 6), nn.ModuleDict({name: Thing(f) for name, f in things.items()})
        self.last, self.never, self.more = nn.Linear(6, 3), nn.Linear(1, 1), nn.ModuleList([nn.Tanh()])
    def forward(self, x):
        x = self.first(x.flatten(1))
        for thing in self.odd.values(): thing(x)
        return self.last(self.more[0](x))


class Thing(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, x): return self.f(x)


# what a module gives, and the mean that is read
OUTPUTS = dict(
    pair=(lambda x: (x*0 + 2, x), 2), nested=(lambda x: dict(a='text', b=[x*0 + 3]), 3),
    namespace=(lambda x: SimpleNamespace(x=x*0 + 5), 5), none=(lambda x: None, None), empty=(lambda x: x[:0], None),
    complex=(lambda x: torch.view_as_complex(x.view(-1, 2)), None), sparse=(lambda x: x.to_sparse(), None),
    ragged=(lambda x: torch.nested.nested_tensor([x[0], x[1]]), None), whole=(lambda x: (x*0).long() + 4, 4),
    bools=(lambda x: x > -torch.inf, 1), scalar=(lambda x: x.sum()*0, 0))


def test_outputs_of_any_kind():
    stats = ActivationStats(every=1, grads=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')      # nested tensors are a prototype
        learner(stats, model=Odd(**{name: f for name, (f, _) in OUTPUTS.items()})).fit(1)
    rows = {r.name: r for r in stats.report()}
    # no containers
    odd = {name: rows.pop(f'odd.{name} Thing') for name in OUTPUTS}
    assert list(rows) == ['first Linear', 'last Linear', 'never Linear', 'more.0 Tanh']
    assert rows['never Linear'].note == 'never reached' and rows['first Linear'].note == ''
    for name, (_, mean) in OUTPUTS.items():
        if mean is None: assert odd[name].note == 'its output has no real numbers to read', name
        else: assert odd[name].mean == mean and odd[name].note == '', name
    assert 'never reached' in repr(stats.report())
    stats.color_dim()
    stats.dead_chart()
    stats.plot_stats()


def test_several_calls_in_a_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.a, self.b = nn.ReLU(), nn.Linear(36, 8), nn.Linear(8, 3)
        def forward(self, x): return self.act(self.b(self.act(self.a(x.flatten(1)))))
    stats = ActivationStats(every=1, grads=True)
    learner(stats, model=Net()).fit(1)
    rows = {r.name: r for r in stats.report()}
    assert rows['act ReLU'].batches == 6
    assert rows['act ReLU'].note == 'called several times in a batch, read the first time'
    assert torch.allclose(next(h for h in stats if h.name == 'act ReLU').stats.hists.sum(1), torch.tensor(16.*8))


def test_activations_that_are_not_finite():
    class Explodes(Callback):
        def before_batch(self, learn):
            if learn.training and learn.iter > 2:
                with torch.no_grad(): learn.model[0][0].weight.fill_(torch.nan)
    stats = ActivationStats(lambda m: isinstance(m, (nn.Conv2d, nn.ReLU)), every=1, grads=True)
    with pytest.raises(FloatingPointError): learner(stats, Explodes()).fit(2)
    notes = {r.name: r.note for r in stats.report()}
    assert notes['0.0 Conv2d'] == 'not finite in batch 3'
    for grads in (False, True):
        stats.color_dim(grads=grads)
        plt.gcf().canvas.draw()
        stats.dead_chart(grads=grads)
        stats.plot_stats(grads=grads)
        plt.gcf().canvas.draw()


def test_not_finite_from_a_batch_on():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.odd, self.n = nn.Linear(36, 3), Thing(lambda x: x/0 if self.n > 3 else x), 0
        def forward(self, x):
            self.n += 1
            x = self.lin(x.flatten(1))
            self.odd(x)
            return x
    stats = ActivationStats(every=1)
    learner(stats, model=Net()).fit(1, valid=False)
    assert {r.name: r.note for r in stats.report()}['odd Thing'] == 'not finite from batch 3 on'


def test_bad_input():
    for every in (0, -1, 2.5):
        with pytest.raises(ValueError, match='every must be a whole number, 1 or more; got'):
            ActivationStats(every=every)
    with pytest.raises(ValueError, match='dead must be a number, 0 or more; got nan'):
        ActivationStats(dead=float('nan'))
    stats = ActivationStats(lambda m: False)
    with pytest.warns(UserWarning, match='no module of the model, so nothing is watched; there are Sequential, Conv2d'):
        learner(stats).fit(1)
    for plot in (stats.color_dim, stats.dead_chart, stats.plot_stats):
        with pytest.raises(ValueError, match='no training batch'): plot()
    stats = ActivationStats()
    learner(stats).fit(1, train=False)
    with pytest.raises(ValueError, match='no training batch'): stats.plot_stats()
    learner(stats).fit(1)
    with pytest.raises(ValueError, match=r'ActivationStats\(grads=True\)'): stats.plot_stats(grads=True)
    with pytest.raises(ValueError, match='no modules'): Hooks([], append_stats)
    assert repr(ActivationStats().report())
    assert len(ActivationStats()) == 0 and ActivationStats()        # `[cb] if cb else []` must not lose it


def test_autocast():
    "Statistics in bfloat16 have three digits"
    class Cast(TrainLearner):
        def predict(self):
            with torch.autocast('cpu', torch.bfloat16): super().predict()
    dtypes = []
    stats = ActivationStats(is_act, every=1, grads=True)
    see = HooksCallback(lambda h, m, i, o: dtypes.append(o.dtype), is_act)
    learner(stats, see, cls=Cast, model=nn.Sequential(nn.Flatten(), nn.Linear(36, 50), nn.ReLU(),
                                                      nn.Linear(50, 3))).fit(1)
    h, = stats
    assert set(dtypes) == {torch.bfloat16} and h.stats.means.dtype == h.grads.stds.dtype == torch.float32
    assert (h.grads.stds > 0).all() and (h.stats.hists.sum(1) == 16*50).all()


# --- memory, compilation

@pytest.mark.parametrize('grads', [False, True])
def test_no_activation_is_kept(grads):
    outs = []
    stats = ActivationStats(every=1, grads=grads)
    keep = HooksCallback(lambda h, m, i, o: outs.append(weakref.ref(o)))
    learn = learner(stats, keep)
    learn.fit(2, valid=False)
    learn.batch = learn.preds = learn.loss = None
    gc.collect()
    assert len(outs) > 50 and not any(o() is not None for o in outs)
    for h in stats:
        for r in (h.stats, h.grads) if grads else (h.stats,):
            assert all(row.numel() <= 46 and row.untyped_storage().nbytes() <= 4*46 for _, row in r._new)


def test_many_statistics_move_to_the_cpu():
    rec = StatsHistory()
    for i in range(2500): rec.add(torch.full((45,), float(i)), i)
    assert len(rec._new) == 500 and len(rec.batches) == rec.n == 2500
    assert torch.equal(rec.means, torch.arange(2500.))


@pytest.mark.parametrize('style', ['wrapper', 'in place', 'a part', 'a part, in place'])
def test_compiled_models(style):
    "Compiled code does not see hooks that came later, so those batches run without; the others do not compile anew"
    torch._dynamo.reset()
    runs, built = [], []

    def backend(gm, inputs):
        built.append(gm)
        return lambda *args: (runs.append(1), gm(*args))[1]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.act, self.head = nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)
        def forward(self, x): return self.head(self.act(self.body(x.flatten(1))))
    model = Net()
    if style == 'wrapper': model = torch.compile(model, backend=backend)
    elif style == 'in place': model.compile(backend=backend)
    elif style == 'a part': model = nn.Sequential(torch.compile(model, backend=backend), nn.Identity())
    else:
        model = nn.Sequential(model, nn.Identity())
        model[0].compile(backend=backend)
    learn = learner(model=model)
    learn.fit(1, valid=False)
    n_built, n_runs = len(built), len(runs)
    assert n_runs == 6
    stats = ActivationStats(is_act, every=3, grads=True)
    learn.fit(2, valid=False, cbs=stats)
    h, = stats
    assert h.name.endswith('act ReLU') and '_orig_mod' not in h.name
    assert h.stats.batches == h.grads.batches == (0, 3, 6, 9)
    assert len(runs) == n_runs + 12 - 4 and len(built) == n_built
    learn.fit(1, valid=False)                               # and compilation is on again
    assert len(runs) == n_runs + 8 + 6
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, cbs=[ActivationStats(is_act, every=1), Boom('after_predict', ZeroDivisionError)])
    learn.fit(1, valid=False)
    assert len(runs) == n_runs + 8 + 6 + 6


def test_deterministic_algorithms_stay_as_asked():
    on_gpu = SimpleNamespace(is_cuda=True)
    try:
        for warn in (False, True):
            torch.use_deterministic_algorithms(True, warn_only=warn)
            with pytest.raises(ZeroDivisionError), _allow_nondeterministic(on_gpu):
                assert not torch.are_deterministic_algorithms_enabled()
                1/0
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn
        torch.use_deterministic_algorithms(False)
        with _allow_nondeterministic(on_gpu): pass
        assert not torch.are_deterministic_algorithms_enabled()
    finally: torch.use_deterministic_algorithms(False)


# --- pictures

@pytest.mark.parametrize('n', [1, 2, 5, 20])
def test_any_number_of_modules_fits(n):
    """In the course, five hooks get four axes, and the fifth is not shown

    Of 20, the colours repeat where they are the ten of matplotlib, and a legend with all names is too long"""
    stats = ActivationStats(is_act, every=1, grads=True)
    model = nn.Sequential(nn.Flatten(), *(nn.Tanh() for _ in range(n)), nn.Linear(36, 3))
    set_seed(0)
    dls = data()
    dls.train = [tuple(b) for b in dls.train]
    for x, _ in dls.train: x.requires_grad_()
    TrainLearner(model, dls, F.cross_entropy, cbs=stats).fit(1)
    assert len(stats) == n
    for grads in (False, True):
        stats.color_dim(grads=grads)
        axes = plt.gcf().axes
        assert sum(len(ax.images) for ax in axes[:-1]) == n
        assert axes[-1].get_ylabel() == f'share of {"gradients" if grads else "outputs"}'
        image = axes[0].images[0]
        assert image.norm.vmin == 1e-5 and np.nanmax(image.get_array()) <= 1 and image.get_extent()[:2] == [-0.5, 5.5]
        titles = [ax.get_title() for ax in axes[:n]]
        assert titles == [h.name for h in stats]
        stats.dead_chart(grads=grads)
        fig = plt.gcf()
        assert sum(len(ax.lines) for ax in fig.axes) == 2*n
        assert fig.get_supxlabel() == 'training batch'
        assert fig.get_supylabel() == 'share'
        assert ('exactly zero' if grads else '1e-06') in fig.legends[0].get_title().get_text()
        stats.plot_stats(grads=grads)
        fig = plt.gcf()
        assert [ax.get_title() for ax in fig.axes] == ['Means', 'Stdevs'] and all(len(ax.lines) == n for ax in fig.axes)
        assert len({line.get_color() if isinstance(line.get_color(), str) else tuple(line.get_color())
                    for line in fig.axes[0].lines}) == n
        assert min(n, 10) <= len(fig.legends[0].get_texts()) <= 12
        assert all(ax.get_xlabel() and ax.get_ylabel() for ax in fig.axes)
        plt.close('all')


def test_what_the_axes_show():
    "A histogram upside down, or shares of another batch, would look just as well"
    stats = ActivationStats(lambda m: isinstance(m, nn.Identity), every=2)
    x = torch.cat([torch.full((6, 1), 0.1), torch.full((3, 1), 4.1), torch.full((1, 1), 99.)])
    batches = [(x*k, torch.zeros(10, 1)) for k in (1, 0, 0, 0, 1)]
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 1))
    TrainLearner(model, SimpleNamespace(train=batches, valid=None), lr=0., cbs=stats).fit(1)
    stats.color_dim((4, 3))
    ax = plt.gcf().axes[0]
    image, = ax.images
    assert image.origin == 'lower' and image.get_extent() == [-1, 5, 0, 10.25]
    shares = np.asarray(image.get_array())
    assert shares.shape == (41, 3)
    assert shares[[0, 16, 40], 0] == pytest.approx([0.6, 0.3, 0.1])
    assert shares[[0, 16, 40], 1] == pytest.approx([1, 1e-5, 1e-5])
    assert dict(zip([t.get_text() for t in ax.get_yticklabels()], ax.get_yticks()))['> 10'] == 10.125
    stats.dead_chart()
    lines = {line.get_label(): line.get_ydata().tolist() for line in plt.gcf().axes[0].lines}
    assert lines == {'elements that are zero': [0, 1, 0], 'dead units: zero in the whole batch': [0, 1, 0]}
    stats.plot_stats()
    mean, std = (ax.lines[0] for ax in plt.gcf().axes)
    assert list(mean.get_xdata()) == [0, 2, 4]
    a = x.double().numpy()
    assert mean.get_ydata().tolist() == pytest.approx([a.mean(), 0, a.mean()])
    assert std.get_ydata().tolist() == pytest.approx([a.std(), 0, a.std()])


def test_a_single_batch():
    stats = ActivationStats(is_act, every=1000)
    learner(stats).fit(1)
    stats.color_dim()
    assert plt.gcf().axes[0].images[0].get_extent()[:2] == [-0.5, 0.5]
    stats.plot_stats()
    assert plt.gcf().axes[0].lines[0].get_marker() == '.'


def test_as_the_course_does_it():
    "The activations chapter: hooks around a fit, their three lists, and its plots written by hand"
    model = get_model().cpu()
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 1, 28, 28, generator=g), torch.randint(10, (16,), generator=g)) for _ in range(4)]
    learn = TrainLearner(model, SimpleNamespace(train=batches, valid=batches), F.cross_entropy, lr=0.1, cbs=MetricsCB())
    with Hooks(model, append_stats) as hooks:
        learn.fit(1, valid=False)
        fig, axs = plt.subplots(1, 2, figsize=(10, 4))
        for h in hooks:
            for i in 0, 1: axs[i].plot(h.stats[i])
    for h in hooks:
        assert [len(o) for o in h.stats] == [4, 4, 4]
        assert torch.stack(h.stats[2]).t().float().log1p().equal(get_hist(h))
        assert get_hist(h).shape == (41, 4) and get_min(h).shape == (4,)
    hc = HooksCallback(append_stats, mod_filter=lambda m: isinstance(m, nn.Conv2d))
    learn.fit(1, cbs=[hc])
    assert len(hc) == 5 and [len(h.stats[0]) for h in hc] == [4]*5
    astats = ActivationStats(lambda m: isinstance(m, nn.ReLU))
    learn.fit(1, cbs=[astats])
    astats.color_dim()
    astats.dead_chart()
    astats.plot_stats()
    astats.color_dim(figsize=(11, 5))

    def _lsuv_stats(hook, mod, inp, outp): hook.mean, hook.std = outp.mean(), outp.std()
    h = Hook(model[0][0], _lsuv_stats)
    with torch.no_grad(): assert model(batches[0][0]) is not None and h.std > 0
    h.remove()


# --- on a GPU


@pytest.mark.parametrize('log', [False, True])
@pytest.mark.parametrize('deterministic', [False, True])
class TestOnAGPU:
    pytestmark = pytest.mark.gpu

    def test_nothing_waits_and_all_is_right(self, log, deterministic):
        x = (torch.randn(64, 8, 14, 14, generator=torch.Generator().manual_seed(0))*4).relu()
        on_gpu = x.cuda()
        tensor_stats(on_gpu, log=log)                            # loads the kernels
        torch.use_deterministic_algorithms(deterministic)
        torch.cuda.set_sync_debug_mode('error')
        try:
            rec = StatsHistory()
            for i in range(5): rec.add(tensor_stats(on_gpu, log=log))
        finally:
            torch.cuda.set_sync_debug_mode('default')
            torch.use_deterministic_algorithms(False)
        expected = tensor_stats(x, log=log)
        torch.testing.assert_close(rec._read()[1][-1][:4], expected[:4], rtol=1e-5, atol=1e-6)
        assert (rec.hists[-1] - expected[4:]).abs().sum() <= 4 and rec.hists[-1].sum() == x.numel()
