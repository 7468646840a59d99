"Schedules that know the length of the fit, and what is drawn before it"
import io, math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest, torch
from torch import optim
from torch.optim import lr_scheduler as S

from fastswa.training.events import Callback, CancelFitException
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.schedule import (
    BatchSchedCB, EpochSchedCB, OneCycleCB, WarmupStableDecayCB, sched_rates)
from helpers import AtEpoch, NoOptimizer, linear, regression

N, EPOCHS = 5, 4

def data(n=N): return SimpleNamespace(train=regression(n).train, valid=None)

class Used(Callback):
    order = 90
    def __init__(self): self.lrs, self.moms = [], []
    def after_backward(self, learn):
        self.lrs.append([float(g['lr']) for g in learn.opt.param_groups])
        self.moms.append([moment(g) for g in learn.opt.param_groups])

def moment(g): return g['betas'][0] if 'betas' in g else g.get('momentum')

OPTS = dict(
    sgd=lambda p, lr: optim.SGD(p, lr, momentum=0.9), adamw=optim.AdamW, plain=optim.SGD, rmsprop=optim.RMSprop,
    adagrad=optim.Adagrad, tensor=lambda p, lr: optim.AdamW(p, torch.tensor(lr)),
    groups=lambda p, lr: optim.AdamW([dict(params=p[:1]), dict(params=p[1:], lr_mult=10)], lr),
    mixed=lambda p, lr: optim.SGD([dict(params=p[:1], momentum=0.9), dict(params=p[1:], lr_mult=0.5)], lr))

def fit(cb, opt='sgd', n_epochs=EPOCHS, n=N, lr=0.1, cbs=(), **kwargs):
    used = Used()
    learn = TrainLearner(linear(), data(n), lr=lr, cbs=[cb, used, *cbs], opt_func=OPTS[opt])
    learn.fit(n_epochs, **kwargs)
    return used, learn

@pytest.mark.parametrize('max_lr', [None, 0.3])
@pytest.mark.parametrize('opt', OPTS)
def test_one_cycle_as_torch(opt, max_lr):
    "torch's own schedule, told the highest rate of each group and the number of steps; momentum where there is some"
    used, learn = fit(OneCycleCB(max_lr, pct_start=0.3), opt)
    p = list(linear().parameters())
    ref = OPTS[opt](p, 0.1)
    mults = [g.get('lr_mult', 1) for g in ref.param_groups]
    tops = [(max_lr or 0.1)*m for m in mults]
    has = [bool(moment(g)) for g in ref.param_groups]
    moms = dict(cycle_momentum=False)
    if any(has): moms = dict(max_momentum=[0.95*o for o in has], base_momentum=[0.85*o for o in has])
    sched = S.OneCycleLR(ref, tops, N*EPOCHS, pct_start=0.3, div_factor=25, final_div_factor=4000, **moms)
    for lrs, ms in zip(used.lrs, used.moms, strict=True):
        assert lrs == pytest.approx([float(g['lr']) for g in ref.param_groups], rel=1e-6)
        assert ms == pytest.approx([moment(g) for g in ref.param_groups])
        ref.step()
        sched.step()
    top = max(lrs[0] for lrs in used.lrs)
    assert top == pytest.approx((max_lr or 0.1)*mults[0], rel=1e-6)
    assert [float(g['lr']) for g in learn.opt.param_groups] == pytest.approx([0.1*m for m in mults])
    assert [moment(g) for g in learn.opt.param_groups] == [moment(g) for g in OPTS[opt](p, 0.1).param_groups]

def test_one_cycle_against_the_formula():
    "fastai's: from top/25 up along a cosine in the first quarter, down to top/1e5; the last step uses the lowest"
    used, _ = fit(OneCycleCB(), 'adamw', n_epochs=4, n=25)
    cos = lambda a, b, x: b + (a - b)*(1 + math.cos(math.pi*x))/2
    peak = 0.25*100 - 1
    want = [cos(0.1/25, 0.1, i/peak) if i <= peak else cos(0.1, 0.1/1e5, (i - peak)/(99 - peak)) for i in range(100)]
    moms = [cos(0.95, 0.85, i/peak) if i <= peak else cos(0.85, 0.95, (i - peak)/(99 - peak)) for i in range(100)]
    np.testing.assert_allclose([o[0] for o in used.lrs], want, rtol=1e-9)
    np.testing.assert_allclose([o[0] for o in used.moms], moms, rtol=1e-9)

def test_one_cycle_options():
    used, _ = fit(OneCycleCB(moms=None), 'sgd', lr=0.2)
    assert {o[0] for o in used.moms} == {0.9} and max(o[0] for o in used.lrs) == pytest.approx(0.2)
    used, _ = fit(OneCycleCB(div=10, div_final=100), lr=0.3)      # the rate that the fit was given
    assert used.lrs[0][0] == pytest.approx(0.03) and used.lrs[-1][0] == pytest.approx(0.003)
    for pct in 0, 0.1, 0.25, 0.5, 0.999: fit(OneCycleCB(pct_start=pct))

@pytest.mark.parametrize('steps', [1, 2, 3, 4, 5, 8])
def test_short_fits(steps):
    "torch divides by zero where the rise would have no step: four steps, of which a quarter"
    for cb in OneCycleCB(), OneCycleCB(pct_start=0.5), WarmupStableDecayCB():
        used, _ = fit(cb, n_epochs=1, n=steps)
        assert len(used.lrs) == steps and all(0 <= o[0] <= 0.1 + 1e-9 for o in used.lrs)

# warm-up, plateau, decay

@pytest.mark.parametrize('shape, f', [('1-sqrt', lambda x: 1 - math.sqrt(x)), ('linear', lambda x: 1 - x),
                                      ('cosine', lambda x: (1 + math.cos(math.pi*x))/2)])
@pytest.mark.parametrize('opt', ['groups', 'tensor'])
def test_wsd_against_a_plain_loop(opt, shape, f):
    used, learn = fit(WarmupStableDecayCB('1ep', '0.4dur', shape, 0.1), opt)      # 5 steps up, 8 down, of 20
    ref = OPTS[opt](list(linear().parameters()), 0.1)
    mults = [g.get('lr_mult', 1) for g in ref.param_groups]
    share = [(i + 1)/5 if i < 5 else 1 if i < 12 else 0.1 + 0.9*f((i - 12)/8) for i in range(20)]
    np.testing.assert_allclose(used.lrs, np.outer(share, [0.1*m for m in mults]), rtol=1e-6)
    np.testing.assert_allclose([float(g['lr']) for g in learn.opt.param_groups], [0.1*m for m in mults], rtol=1e-6)

def test_wsd_times():
    def shares(n, **kw):
        rates, = (g['lr'] for g in sched_rates(WarmupStableDecayCB(shape='linear', **kw), steps=n, lr=1.))
        return np.round(rates, 9).tolist()
    assert shares(6, warmup='2ba', decay='2ba') == [0.5, 1, 1, 1, 1, 0.5]
    assert shares(4, warmup='0ba', decay='4ba') == [1, 0.75, 0.5, 0.25]              # no step at a rate of zero
    assert shares(4, warmup='2ba', decay='2ba', final=1) == [0.5, 1, 1, 1]
    two = sched_rates(WarmupStableDecayCB('1ep', '1/2ep', 'linear'), n_epochs=2, steps=4, lr=1.)[0]['lr']
    assert two.tolist() == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5]

def test_wsd_errors():
    says = 'warmup and decay take 12 and 10 steps, together more than the 20 of this fit'
    with pytest.raises(ValueError, match=says): fit(WarmupStableDecayCB('12ba', '2ep'))
    for kw, match in ((dict(warmup='5'), "warmup must be a number with a unit.*got '5'"),
                      (dict(decay='2dur'), 'decay must be between'),
                      (dict(warmup='-1ba'), 'warmup must not be negative'),
                      (dict(shape='exp'), "'linear', '1-sqrt' or 'cosine'; got 'exp'"),
                      (dict(final=-0.1), 'final must be a number from 0 to 1; got -0.1'), (dict(final='0'), "got '0'")):
        with pytest.raises(ValueError, match=match): WarmupStableDecayCB(**kw)

@pytest.mark.parametrize('kw, match', [
    (dict(max_lr=0), 'max_lr must be a number above 0, or None; got 0'), (dict(max_lr=math.nan), 'got nan'),
    (dict(max_lr=[0.1]), r'got \[0.1\]'),
    (dict(max_lr=math.inf), 'got inf'), (dict(pct_start=1), 'pct_start must be a number from 0 to 0.999; got 1'),
    (dict(div=0), 'div must be'), (dict(div_final=0.5), 'div_final must be a number, 1 or more; got 0.5'),
    (dict(moms=0.9), 'got 0.9'), (dict(moms=(0.95, 0.85, 0.9)), 'the last the same as the first'),
    (dict(moms=(1., 0.5, 1.)), 'moms must be a number')])
def test_one_cycle_arguments(kw, match):
    with pytest.raises(ValueError, match=match): OneCycleCB(**kw)

@pytest.mark.parametrize('cb', [OneCycleCB, WarmupStableDecayCB])
def test_errors_of_the_fit(cb):
    endless = SimpleNamespace(train=(b for b in data().train), valid=None)
    with pytest.raises(ValueError, match='the training loader has no length'):
        TrainLearner(linear(), endless, cbs=cb()).fit(1)
    with pytest.raises(TypeError, match='not an Optimizer'):
        TrainLearner(linear(), data(), opt_func=NoOptimizer, cbs=cb()).fit(1)

# saved and resumed

def stop(learn): raise CancelFitException

@pytest.mark.parametrize('make, other, match', [
    (partial(OneCycleCB, 0.3), partial(OneCycleCB, 0.2), 'differ in base_lrs'),
    (OneCycleCB, partial(OneCycleCB, pct_start=0.5), 'differ in schedule_phases'),
    (WarmupStableDecayCB, partial(WarmupStableDecayCB, final=0.5), 'differ in lr_lambdas'),
    (WarmupStableDecayCB, OneCycleCB, 'LambdaLR was saved, OneCycleLR is here')])
def test_resume(make, other, match):
    "A new callback goes on from a state opened with weights_only; one with other settings says so"
    def take(learn): torch.save((cb.state_dict(), learn.opt.state_dict()), file)
    def give(learn):
        file.seek(0)
        state, opt = torch.load(file, weights_only=True)
        learn.opt.load_state_dict(opt)
        new.load_state_dict(state)
    file, cb, new = io.BytesIO(), make(), make()
    whole, _ = fit(cb, 'groups', cbs=[AtEpoch(2, take)])
    rest, learn = fit(new, 'groups', cbs=[AtEpoch(0, give), AtEpoch(2, stop)])
    assert rest.lrs == whole.lrs[2*N:] and rest.moms == whole.moms[2*N:]
    assert [g['lr'] for g in learn.opt.param_groups] == [0.1, 1.]
    new = other()
    with pytest.warns(UserWarning, match=match): fit(new, 'groups', cbs=[AtEpoch(0, give), AtEpoch(2, stop)])
    new = make()
    with pytest.warns(UserWarning, match='another one'):
        fit(new, 'groups', n_epochs=6, cbs=[AtEpoch(0, give), AtEpoch(4, stop)])

# looking before the fit

SCHEDS = [OneCycleCB(), WarmupStableDecayCB('3ba', '1ep'), BatchSchedCB(partial(S.OneCycleLR, max_lr=0.2)),
          BatchSchedCB(partial(S.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=4, cycle_momentum=False)),
          EpochSchedCB(partial(S.StepLR, step_size=2, gamma=0.5)), EpochSchedCB(partial(S.CosineAnnealingLR, T_max=4))]

@pytest.mark.parametrize('fits', [0, 1])
@pytest.mark.parametrize('opt', ['sgd', 'groups', 'tensor'])
@pytest.mark.parametrize('cb', SCHEDS, ids=lambda o: type(o).__name__)
def test_shown_is_used(cb, opt, fits):
    "What is shown before a fit, the first or a later one, is what it uses; and looking changes nothing"
    used = Used()
    learn = TrainLearner(linear(), data(), lr=0.1, cbs=[used], opt_func=OPTS[opt])
    learn.fit(fits)
    used.lrs.clear()
    def options():
        if learn.opt is None: return None
        return [{k: v for k, v in g.items() if k != 'params'} for g in learn.opt.param_groups]
    before = options()
    shown = sched_rates(cb, learn, EPOCHS, lr=0.05)
    assert options() == before
    learn.fit(EPOCHS, lr=0.05, cbs=cb)
    lrs = np.array([g['lr'] for g in shown]).T
    if isinstance(cb, EpochSchedCB): lrs = lrs.repeat(N, axis=0)
    np.testing.assert_allclose(used.lrs, lrs, rtol=1e-7)

def test_looking_in_the_middle_of_a_fit():
    cb, looks = OneCycleCB(), []
    look = AtEpoch(2, lambda learn: looks.append(sched_rates(cb, learn, EPOCHS, lr=0.1)[0]['lr']))
    used, _ = fit(cb, cbs=[look])
    assert used.lrs == fit(OneCycleCB())[0].lrs and [o[0] for o in used.lrs] == pytest.approx(looks[0])

def test_sched_rates_errors():
    with pytest.raises(ValueError, match='how long is the fit'): sched_rates(OneCycleCB())
    with pytest.raises(ValueError, match='follows a metric'): sched_rates(BatchSchedCB(S.ReduceLROnPlateau), steps=3)
    with pytest.raises(ValueError, match='n_epochs must be a whole number, 1 or more; got 0'):
        sched_rates(OneCycleCB(), n_epochs=0, steps=3)
    with pytest.raises(TypeError, match='cb must be a schedule'): sched_rates(S.StepLR, steps=3)

def test_plot():
    import matplotlib
    matplotlib.use('Agg')
    groups = [dict(params=[torch.zeros(1)], lr=0.1*2**-i, lr_mult=2.**-i, name=f'layer {i}') for i in range(9)]
    axes = OneCycleCB().plot(optim.AdamW(groups), 2, steps=50)
    assert [ax.get_ylabel() for ax in axes] == ['learning rate', 'momentum']
    assert {ax.get_xlabel() for ax in axes} == {'optimizer step'}
    assert len(axes[0].lines) == 9 and len({tuple(l.get_color()) for l in axes[0].lines}) == 9
    assert [t.get_text() for t in axes[1].get_legend().get_texts()] == [f'layer {i}' for i in range(9)]
    groups = [dict(params=[torch.zeros(1)]) for _ in range(3)]
    ax, = EpochSchedCB(partial(S.StepLR, step_size=2)).plot(optim.SGD(groups, 0.1), 6)
    line, = ax.lines                                             # the same curve three times is drawn once
    assert line.get_label() == 'group 0, rate × 1 and 2 more' and ax.get_xlabel() == 'epoch'
    assert line.get_ydata().tolist() == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001])
    given = matplotlib.pyplot.subplots(1, 2)[1]
    assert OneCycleCB().plot(steps=10, axes=given) is given
