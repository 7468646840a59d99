"What a run with averages promises: looking and trying things out cost nothing, and no state is half changed"
import signal
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from fastswa.averaging.average import Average, update_all
from fastswa.averaging.rules import ema, equal, power
from fastswa.core import set_seed
from fastswa.training.events import Callback, CancelStepException
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.schedule import EpochSchedCB
from fastswa.callbacks.swa import BNUpdateCB
from fastswa.callbacks.swa import EMACB, LAWACB, PostHocEMACB, SWACB, SWAGCB, SwitchEMACB


def data():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (160,), generator=g)
    ds = TensorDataset(F.one_hot(y, 3).float() + torch.randn(160, 3, generator=g)/2, y)
    return SimpleNamespace(train=DataLoader(ds, 16), valid=DataLoader(ds, 32))


def learner(*cbs, seed=0, **kw):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return TrainLearner(model, data(), F.cross_entropy, 0.3, cbs, **kw)



@pytest.mark.parametrize('what', ['predict', 'using'])
def test_what_is_put_back_was_not_changed(what):
    "After a fit the model holds its only average; something else held for a moment must not make that average the raw weights"
    cb = SWAGCB(start='0ba', every='1ba') if what == 'predict' else PostHocEMACB(every='3ba')
    learn = learner(cb, BNUpdateCB())
    learn.fit(1)
    assert learn.weights == cb.name
    with learn.using('raw'): raw = {k: v.clone() for k, v in learn.model.state_dict().items()}
    if what == 'predict': cb.average.predict(learn.dls.valid, n=2, bn_data=learn.dls.train)
    else:
        with cb.average.using(0.15): pass
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.validate()
        learn.restore()
    assert cb.average.n == 10
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, raw[k]), k


def test_real_changes_are_still_noticed():
    learn = learner(EMACB(), BNUpdateCB())
    learn.fit(1)
    with torch.no_grad(): learn.model[3].weight[0, 0] += 1
    with pytest.warns(UserWarning, match='were changed'): learn.validate()


@pytest.mark.parametrize('make', [EMACB, SWACB, LAWACB, SWAGCB, PostHocEMACB, SwitchEMACB, BNUpdateCB])
def test_making_a_callback_draws_no_random_number(make):
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)


class EveryFourth(Callback):
    "Accumulation over four batches"
    def after_backward(self, learn):
        if learn.iter % 4 != 3: raise CancelStepException


class Trail(Callback):
    def before_fit(self, learn): self.seen = []
    def after_step(self, learn): self.seen.append(learn.model[0].weight.detach().double().numpy().copy())


def test_a_half_life_is_a_share_of_the_fit_under_accumulation():
    "In steps of the loader's length it would be four times as long: 8 steps of 16 instead of 2"
    trail, cb, post = Trail(), EMACB(half_life='0.125dur', apply=False), PostHocEMACB(every='0.25dur')
    learner(trail, EveryFourth(), cb, post, BNUpdateCB()).fit(8)          # 80 batches, 8*2 steps
    assert len(trail.seen) == 16
    at = [10*e + i for e in range(8) for i in (4, 8)]                      # batches after which a step was taken
    avg, d = trail.seen[0], 2**(-1/10)                                     # 0.125 of 80 batches are 10
    for i in range(1, 16):
        w = d**(at[i] - at[i-1])
        avg = w*avg + (1 - w)*trail.seen[i]
    np.testing.assert_allclose(cb.average.weights['0.weight'], avg, rtol=1e-4, atol=1e-6)
    assert len(post.average.steps) == 4


def test_swa_lr_holds_beside_a_schedule_by_epochs():
    "The schedule sets its rate at the end of an epoch; the first step of the next one must not use it"
    used = []
    class Rates(Callback):
        order = 50
        def after_backward(self, learn): used.append(learn.opt.param_groups[0]['lr'])
    sched = EpochSchedCB(lambda opt: optim.lr_scheduler.ExponentialLR(opt, 0.5))
    learner(SWACB(start='1ep', swa_lr=0.05, anneal='0ep'), sched, BNUpdateCB(), Rates()).fit(3)
    assert used[10:] == pytest.approx([0.05]*20)


@pytest.mark.parametrize('f, says', [
    (lambda: BNUpdateCB(valid_batches=2.5), 'valid_batches must be a whole number.*2.5'), (lambda: BNUpdateCB('5'), "n_batches .*'5'"),
    (lambda: SWACB(swa_lr='0.1'), "swa_lr must be a number above 0; got '0.1'"),
    (lambda: Average(nn.Linear(1, 1), dtype=torch.int64), 'dtype must be a floating-point'),
    (lambda: Average(nn.Linear(1, 1), dtype='float32'), "got 'float32'"),
    (lambda: Average(nn.Linear(1, 1), include=['weight', 'wieght']), "'wieght' matches no weights; there are weight, bias"),
    (lambda: Average(nn.Linear(1, 1), exclude='hed.*'), "'hed.*' matches no weights"),
    (lambda: Average(nn.Linear(1, 1)).update(5), 'takes a module; got 5'),
    (lambda: Average(nn.Linear(1, 1)).load_state_dict(nn.Linear(1, 1).state_dict()), 'no state of an average.* n, skipped, rule, weights missing'),
    (lambda: Average(nn.Linear(1, 1)).load_state_dict(dict(n=-3, skipped=0, rule='equal()', weights={})), 'n must be 0 or more; got -3')])
def test_bad_input_is_named_at_once(f, says):
    with pytest.raises((ValueError, TypeError), match=says): f()


def test_a_model_that_holds_an_average_is_not_averaged():
    "Otherwise the second average would take the first one for the weights"
    net = nn.Linear(2, 2)
    a, b = Average(net), Average(net)
    a.update(), b.update()
    with a.applied():
        with pytest.raises(RuntimeError, match='outside of applied'): b.update()
        with pytest.raises(RuntimeError, match='outside of applied'): update_all([b])
    b.update()
    assert b.n == 2


def moved(avg): return {k: v.clone() for k, v in avg.weights.items()}


@pytest.mark.parametrize('what', ['half', 'several', 'converted'])
def test_ctrl_c_at_any_line_of_an_update(what):
    "The average has taken the snapshot, or it has not: no part of it has moved, and nothing is left uninitialised"
    def fresh():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 200), nn.BatchNorm1d(200))
        if what == 'half': net.bfloat16()
        avgs = [Average(net, ema(decay=d)) for d in ((0.5, 0.9) if what == 'several' else (0.5,))]
        for a in avgs: a.update()
        if what == 'converted': net.double()
        with torch.no_grad():
            for p in net.parameters(): p += 1
        return net, avgs

    def run(at=None):
        net, avgs = fresh()
        count = 0
        def trace(frame, event, arg):
            nonlocal count
            if not any(o in frame.f_code.co_filename for o in ('fastswa/averaging/', 'fastswa/core.py')):
                return None
            if event == 'line':
                count += 1
                if count == at: signal.raise_signal(signal.SIGINT)
            return trace
        sys.settrace(trace)
        try: update_all(avgs) if what == 'several' else avgs[0].update()
        except KeyboardInterrupt: pass
        finally: sys.settrace(None)
        return avgs, count

    _, before = fresh()
    after, total = run()
    step = max(1, total//60)
    for at in range(1, total + 1, step):
        got, _ = run(at)
        for a, b, c in zip(got, before, after):
            expected = moved(c if a.n == 2 else b)
            for k, v in moved(a).items(): torch.testing.assert_close(v, expected[k].to(v), msg=f'line {at} of {total}: {k}, n = {a.n}')


@pytest.mark.parametrize('default', [torch.float64, torch.bfloat16])
def test_the_flags_do_not_follow_the_default_dtype(default):
    "A gradient scaler's operator takes fp32 alone, and a bf16 counter stops at 256"
    from fastswa.averaging.kernels import Late, bad_flag
    kept = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        flag, late = bad_flag([torch.tensor([1., float('nan')], dtype=torch.float32)]), Late('cpu')
        for _ in range(300): late.add(flag)
    finally: torch.set_default_dtype(kept)
    assert late.news() == 300


@pytest.mark.parametrize('rule', [power(gamma=2), power(sigma_rel=0.1), equal(), lambda n: 0.3])
def test_rules_together_and_alone(rule):
    "`update_all` and `update` against float64"
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    a, b, exact = Average(net, rule), Average(net, ema(decay=0.9)), None
    for n in range(12):
        with torch.no_grad(): net.weight += torch.randn(2, 3)
        update_all([a, b])
        w, new = 1. if n == 0 else rule(n), net.weight.detach().double().numpy()
        exact = new if exact is None else exact + w*(new - exact)
    np.testing.assert_allclose(a.weights['weight'], exact, rtol=1e-5, atol=1e-5)
