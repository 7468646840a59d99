"Schedules step as torch's own loop does, and leave nothing behind"
import math, warnings
from functools import partial

import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import optim
from torch.optim import lr_scheduler as S
from torch.optim.swa_utils import SWALR

from fastswa.averaging.average import Average
from fastswa.training.events import Callback, CancelStepException
from fastswa.training.learner import TrainLearner
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.core import quiet
from fastswa.callbacks.basics import RecorderCB
from fastswa.callbacks.swa import EMACB
from fastswa.callbacks.schedule import BatchSchedCB, EpochSchedCB, OneCycleCB
from helpers import Accumulate, AtEpoch, NoOptimizer, image_learner, linear, regression, reopened

N, EPOCHS = 5, 4     # steps in an epoch, epochs in a fit

OPTS = dict(sgd=lambda p, lr: optim.SGD(p, lr, momentum=0.9), adam=optim.AdamW,
            tensor=lambda p, lr: optim.AdamW(p, torch.tensor(lr)),
            groups=lambda p, lr: optim.SGD([dict(params=p[:1]), dict(params=p[1:], lr=lr/10)], lr, momentum=0.9))

class Used(Callback):
    "Rates and momenta, at the moment of each step"
    order = 90
    def __init__(self): self.seen = []
    def after_backward(self, learn): self.seen.append(options(learn.opt))

def options(opt):
    return [(float(g['lr']), float(g['momentum'] if 'momentum' in g else g['betas'][0])) for g in opt.param_groups]

SCHEDS = dict(
    step=partial(S.StepLR, step_size=2, gamma=0.5), multistep=partial(S.MultiStepLR, milestones=[1, 3], gamma=0.3),
    exponential=partial(S.ExponentialLR, gamma=0.9), cosine=partial(S.CosineAnnealingLR, T_max=5),
    constant=partial(S.ConstantLR, factor=0.3),
    linear=partial(S.LinearLR, start_factor=0.1, total_iters=3),
    polynomial=partial(S.PolynomialLR, total_iters=6, power=2.),
    lambdas=partial(S.LambdaLR, lr_lambda=lambda i: 1/(1 + i)),
    multiplicative=partial(S.MultiplicativeLR, lr_lambda=lambda i: 0.95),
    restarts=partial(S.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    cyclic=partial(S.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3),
    cyclic_exp=partial(S.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3, mode='exp_range', gamma=0.9),
    cyclic_own=partial(S.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3, scale_fn=lambda i: 1/(1 + i)),
    onecycle=partial(S.OneCycleLR, max_lr=0.2, total_steps=N*EPOCHS),
    three_phase=partial(S.OneCycleLR, max_lr=0.2, total_steps=40, three_phase=True),
    swalr=partial(SWALR, swa_lr=0.02, anneal_epochs=3),
    sequential=lambda o: S.SequentialLR(
        o, [S.LinearLR(o, 0.1, total_iters=2), S.CosineAnnealingLR(o, 4), S.ExponentialLR(o, 0.5)], [2, 6]),
    chained=lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.1, total_iters=2), S.ExponentialLR(o, 0.9)], optimizer=o),
    plateau=partial(S.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.3),
)

def test_every_scheduler_of_torch_is_tried():
    opt = optim.SGD(linear().parameters(), 0.1, momentum=0.9)
    assert {type(o(opt)).__name__ for o in SCHEDS.values()} >= set(S.__all__) - {'LRScheduler'}

def by_hand(sched, opt_func, per, lr=0.1, n_epochs=EPOCHS):
    "The loop of torch's documentation, of one schedule or several"
    model, dls, used = linear(), regression(N), []
    opt = opt_func(list(model.parameters()), lr)
    scheds = [o(opt) for o in (sched if isinstance(sched, list) else [sched])]
    for _ in range(n_epochs):
        for xb, yb in dls.train:
            loss = F.mse_loss(model(xb), yb)
            loss.backward()
            used.append(options(opt))
            opt.step()
            if per == 'batch':
                for s in scheds: s.step(*([loss.detach()] if isinstance(s, S.ReduceLROnPlateau) else []))
            opt.zero_grad()
        if per == 'epoch':
            with torch.no_grad(): value = sum(F.mse_loss(model(xb), yb).item() for xb, yb in dls.valid)/2
            for s in scheds: s.step(*([value] if isinstance(s, S.ReduceLROnPlateau) else []))
    return used, model.weight.detach()

def flat(rates): return [v for groups in rates for pair in groups for v in pair]

CBS = dict(batch=BatchSchedCB, epoch=EpochSchedCB)

@pytest.mark.parametrize('opt, per', [*((o, 'batch') for o in OPTS), ('sgd', 'epoch'), ('groups', 'epoch')])
@pytest.mark.parametrize('name', SCHEDS)
def test_as_torch(name, opt, per):
    "Rates and momenta at every step, and the weights after them, of two fits in a row; no warning, nothing left behind"
    used, tol = Used(), 0 if opt in ('sgd', 'adam') else 1e-6      # those round: a share of the rate, a rate in float32
    same = lambda rates: pytest.approx(flat(rates), rel=tol, abs=tol)
    learn = TrainLearner(linear(), regression(N), lr=0.1, cbs=[CBS[per](SCHEDS[name]), used], opt_func=OPTS[opt])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(EPOCHS)
        want, weight = by_hand(SCHEDS[name], OPTS[opt], per)
        assert flat(used.seen) == same(want)
        torch.testing.assert_close(learn.model.weight.detach(), weight, rtol=tol, atol=tol)
        used.seen.clear()
        learn.fit(2, lr=0.03)
    if name != 'plateau': assert flat(used.seen) == same(by_hand(SCHEDS[name], OPTS[opt], per, lr=0.03, n_epochs=2)[0])
    fresh = OPTS[opt](list(learn.model.parameters()), 0.03)
    for g, f in zip(learn.opt.param_groups, fresh.param_groups):
        assert g.keys() == f.keys() | {'lr_mult'}
        assert all(g[k] == (pytest.approx(v) if k == 'lr' else v) for k, v in f.items() if k != 'params')

@pytest.mark.parametrize('per', CBS)
def test_several_callbacks(per):
    used, scheds = Used(), [SCHEDS['constant'], SCHEDS['exponential']]
    TrainLearner(linear(), regression(N), lr=0.1, cbs=[*map(CBS[per], scheds), used]).fit(EPOCHS)
    assert [o[0] for o, in used.seen] == [o[0] for o, in by_hand(scheds, OPTS['sgd'], per)[0]]

def test_per_batch_and_per_epoch_together():
    used, warm = Used(), partial(S.LinearLR, start_factor=0.1, total_iters=3)
    drop = partial(S.StepLR, step_size=2, gamma=0.1)
    TrainLearner(linear(), regression(N), lr=0.1, cbs=[BatchSchedCB(warm), EpochSchedCB(drop), used]).fit(EPOCHS)
    want = [(0.1*min(1, 0.1 + 0.3*i))*(1 if i < 2*N else 0.1) for i in range(N*EPOCHS)]
    assert [o[0] for o, in used.seen] == pytest.approx(want)

def test_one_list_of_callbacks_for_two_learners():
    used = Used()
    cbs = [BatchSchedCB(partial(S.OneCycleLR, max_lr=0.2)), used]
    for epochs in (1, 3): TrainLearner(linear(), regression(N), lr=0.1, cbs=cbs).fit(epochs)
    one = lambda n: by_hand(partial(S.OneCycleLR, max_lr=0.2, total_steps=n*N), OPTS['sgd'], 'batch', n_epochs=n)[0]
    assert [o[0][0] for o in used.seen] == [o[0][0] for o in one(1) + one(3)]

def test_steps_only_with_the_optimizer():
    cb = BatchSchedCB(partial(S.ExponentialLR, gamma=0.5))
    TrainLearner(linear(), regression(N), cbs=[cb, Accumulate(2)]).fit(1)
    assert cb.schedo.last_epoch == N//2

class NoSteps(Callback):
    def after_backward(self, learn): raise CancelStepException

def test_no_warning_where_no_step_was_made():
    cb = EpochSchedCB(partial(S.ExponentialLR, gamma=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        TrainLearner(linear(), regression(N), cbs=[cb, NoSteps()]).fit(2)
    assert cb.schedo.last_epoch == 2

class Accuracy(Callback):
    "A column that rises for the raw weights and falls for those called ema"
    order, role = 10, 'measures'
    def after_epoch(self, learn):
        sign = (-1 if learn.weights == 'ema' else 1)*(1 if not learn.training else -1)
        learn.history[-1]['accuracy'] = (learn.epoch + 1)*sign

class EmaCB(Callback):
    def __init__(self, n=1): self.n = n
    def before_fit(self, learn):
        average = learn.averages.add('ema', Average(learn.model))
        for _ in range(self.n): average.update()

plateau = partial(S.ReduceLROnPlateau, mode='max', factor=0.5, patience=0)

def epoch_rates(metric, *cbs, **kwargs):
    used = Used()
    cbs = [EpochSchedCB(plateau, metric), Accuracy(), used, *cbs]
    TrainLearner(linear(), regression(N), lr=0.1, cbs=cbs).fit(4, **kwargs)
    return [o[0] for o, in used.seen[::N]]

def test_plateau_watches_the_row_it_is_told():
    falls = [0.1, 0.1, 0.05, 0.025]
    assert epoch_rates('accuracy') == [0.1]*4
    assert epoch_rates('accuracy', EmaCB()) == [0.1]*4
    assert epoch_rates('ema/accuracy', EmaCB()) == falls
    assert epoch_rates('accuracy', valid=False) == falls            # the training row's
    assert epoch_rates('ema/accuracy', EmaCB(0)) == [0.1]*4         # no snapshot, so no row yet
    with pytest.raises(ValueError, match="does not validate the weights 'ema'"):
        epoch_rates('ema/accuracy', EmaCB(), valid=False)
    with pytest.raises(ValueError, match="no weights are called 'emma'; there are raw, ema"):
        epoch_rates('emma/accuracy', EmaCB())
    with pytest.raises(ValueError, match='there are loss, accuracy, ema/loss, ema/accuracy'):
        epoch_rates('ema/acc', EmaCB())

def saved(cls, sched, opt='sgd', n_epochs=EPOCHS, at=2, **kwargs):
    "The state of a schedule and its optimizer after so many epochs, and the rates of the whole fit"
    cb, used, res = cls(sched, **kwargs), Used(), []
    take = AtEpoch(at, lambda learn: res.extend(reopened([cb.state_dict(), learn.opt.state_dict()])))
    TrainLearner(linear(), regression(N), lr=0.1, cbs=[cb, take, used], opt_func=OPTS[opt]).fit(n_epochs, valid=False)
    return res, used.seen

def resumed(cls, sched, state, opt='sgd', n_epochs=EPOCHS, lr=0.1, **kwargs):
    "The rates of the first two epochs of a fit that begins with that state"
    cb, used = cls(sched, **kwargs), Used()
    def give(learn):
        learn.opt.load_state_dict(state[1])
        cb.load_state_dict(state[0])
    learn = TrainLearner(linear(), regression(N), lr=lr, cbs=[cb, AtEpoch(0, give), AtEpoch(2), used],
                         opt_func=OPTS[opt])
    learn.fit(n_epochs, valid=False)
    return used.seen

def warm(o, then, n=3): return S.SequentialLR(o, [S.LinearLR(o, 0.01, 1., n), then(o)], [n])
COMPOSED = dict(
    multistep=lambda o: warm(o, lambda o: S.MultiStepLR(o, [2, 4], 0.5)),
    restarts=lambda o: warm(o, lambda o: S.CosineAnnealingWarmRestarts(o, 2, 2)),
    cycle=lambda o: warm(o, lambda o: S.OneCycleLR(o, 0.3, total_steps=20)),
    lambdas=lambda o: warm(o, lambda o: S.LambdaLR(o, lambda i: 1/(1 + i))),
    cyclic=lambda o: warm(o, lambda o: S.CyclicLR(o, 0.01, 0.2, 2, scale_fn=lambda i: 1/(1 + i))),
    three=lambda o: S.SequentialLR(
        o, [S.ConstantLR(o, 0.5, 2), S.MultiStepLR(o, [1, 3], 0.7), S.MultiStepLR(o, [1, 2], 0.3)], [2, 6]),
    nested=lambda o: S.SequentialLR(o, [warm(o, lambda o: S.MultiStepLR(o, [1], 0.5), 2), S.StepLR(o, 2, 0.5)], [5]),
    chained=lambda o: S.ChainedScheduler([S.LinearLR(o, 0.1, 1., 3), S.MultiStepLR(o, [2, 5, 5], 0.5)], optimizer=o),
    swa=lambda o: warm(o, lambda o: SWALR(o, 0.02, 3)), plateau=partial(S.ReduceLROnPlateau, factor=0.5, patience=0))

@pytest.mark.filterwarnings('ignore:.*lr_scheduler.step')      # torch's own, where one is inside another
@pytest.mark.parametrize('name, per', [*((o, 'batch') for o in COMPOSED),
                                       *((o, 'epoch') for o in ('multistep', 'three', 'chained', 'plateau'))])
def test_a_composed_schedule_resumes_at_every_step(name, per, tmp_path):
    "Rates and weights bit for bit. Wrong: AttributeError, hours later, where the milestones were read back as a dict"
    def go(*cbs, **kwargs):
        learn = TrainLearner(linear(), regression(5 if per == 'batch' else 1), lr=0.1, opt_func=OPTS['sgd'],
                             cbs=[CBS[per](COMPOSED[name]), used := Used(), *cbs])
        with quiet(): learn.fit(2 if per == 'batch' else 8, **kwargs)
        return used.seen, learn.model.weight.detach()
    seen, weight = go(CheckpointCB(tmp_path, '1ba', keep=None))
    files = sorted(tmp_path.glob('step-*.pt'))
    assert len(files) == len(seen)
    for i, file in enumerate(files, 1):
        rest, end = go(resume=file)
        assert rest == seen[i:] and torch.equal(end, weight)

@pytest.mark.parametrize('per', CBS)
@pytest.mark.parametrize('opt', ['sgd', 'tensor', 'groups'])
@pytest.mark.parametrize('name', SCHEDS)
def test_state_resumes_every_schedule(name, opt, per):
    "From a file opened with weights_only, after two of four epochs; the rates are the very same"
    if opt == 'groups' and name == 'plateau': pytest.skip('depends on the weights')
    state, used = saved(CBS[per], SCHEDS[name], opt)
    if name != 'plateau': assert resumed(CBS[per], SCHEDS[name], state, opt) == used[2*N:]

def test_plateau_resumes():
    never = partial(S.ReduceLROnPlateau, mode='max', factor=0.5, patience=1)
    for kwargs in {}, dict(metric='loss'):
        state, used = saved(EpochSchedCB, never, **kwargs)
        got = resumed(EpochSchedCB, never, state, **kwargs)
        assert got[:N] == used[2*N:3*N] and state[0]['row']['epoch'] == 1      # its step is still to come

@pytest.mark.parametrize('valid', [True, False])
def test_plateau_resumes_between_training_and_its_metric(valid):
    "Saved when the training of an epoch has ended: the schedule owes a step for it, before the first batch of the next"
    sched = partial(S.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.9999)
    class Take(Callback):
        order = 95
        def after_epoch(self, learn):
            if learn.training and learn.epoch == 1: self.state = reopened([cb.state_dict(), learn.opt.state_dict()])
    class Later(Callback):
        def before_fit(self, learn): learn.epochs = range(2, EPOCHS)
    cb, take, used, rest, new = EpochSchedCB(sched), Take(), Used(), Used(), EpochSchedCB(sched)
    TrainLearner(linear(), regression(N), lr=0.1, cbs=[cb, take, used], opt_func=OPTS['sgd']).fit(EPOCHS, valid=valid)
    assert take.state[0]['row']['epoch'] == 1
    def give(learn):
        learn.opt.load_state_dict(take.state[1])
        new.load_state_dict(take.state[0])
    learn = TrainLearner(linear(), regression(N), lr=0.1, cbs=[new, Later(), AtEpoch(2, give), rest],
                         opt_func=OPTS['sgd'])
    learn.fit(EPOCHS, valid=False)
    assert rest.seen[:N] == used.seen[2*N:3*N] and rest.seen[0] != used.seen[N]

def test_numbers_of_numpy_in_a_state():
    "A rate from np.logspace is common; torch.load(weights_only=True) refuses it"
    cb = BatchSchedCB(partial(S.StepLR, step_size=np.int64(2), gamma=np.float64(0.5)))
    TrainLearner(linear(), regression(N), lr=np.float64(0.1), cbs=cb).fit(1)
    state = reopened(cb.state_dict())
    assert type(state['now']['gamma']) is float and type(state['new']['step_size']) is int

OTHERS = [
    (SCHEDS['step'], SCHEDS['exponential'], "StepLR was saved, ExponentialLR is here"),
    (SCHEDS['step'], partial(S.StepLR, step_size=3, gamma=0.4), 'differ in step_size, gamma;'),
    (SCHEDS['multistep'], partial(S.MultiStepLR, milestones=[1, 4], gamma=0.3), 'differ in .*milestones'),
    (SCHEDS['cosine'], partial(S.CosineAnnealingLR, T_max=5, eta_min=0.01), 'differ in .*eta_min'),
    (SCHEDS['linear'], partial(S.LinearLR, start_factor=0.1, total_iters=4), 'differ in .*total_iters'),
    (SCHEDS['restarts'], partial(S.CosineAnnealingWarmRestarts, T_0=3), 'differ in .*T_mult'),
    (SCHEDS['cyclic'], partial(S.CyclicLR, base_lr=0.01, max_lr=0.3, step_size_up=3), 'differ in .*max_lrs'),
    (SCHEDS['polynomial'], partial(S.PolynomialLR, total_iters=6), 'differ in .*power'),
    (SCHEDS['plateau'], partial(S.ReduceLROnPlateau, factor=0.5, patience=2, threshold=0.3), 'differ in .*patience'),
    (SCHEDS['swalr'], partial(SWALR, swa_lr=0.02, anneal_epochs=4), 'differ in .*anneal_epochs'),
    (SCHEDS['chained'],
     lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.1, total_iters=3), S.ExponentialLR(o, 0.9)], optimizer=o),
     'differ in .*schedulers'),
    (SCHEDS['chained'],
     lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.1, total_iters=2), S.StepLR(o, 9)], optimizer=o),
     'and they differ in .*schedulers'),
    (SCHEDS['chained'], lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.1, total_iters=2)], optimizer=o),
     'differ in .*schedulers'),
]

def new_from(cls, sched, n_epochs=EPOCHS, lr=0.1):
    "The rates of the third and fourth epoch of a fit with a schedule"
    used = Used()
    learn = TrainLearner(linear(), regression(N), lr=lr, cbs=[cls(sched), used], opt_func=OPTS['sgd'])
    learn.fit(n_epochs, valid=False)
    return used.seen[2*N:4*N]

@pytest.mark.parametrize('there, here, match', OTHERS, ids=[o[2][:24] for o in OTHERS])
def test_another_schedule_takes_over(there, here, match):
    "One warning says what differs; the rates are those of the new schedule at that step. Wrong: a mixture of both"
    for cls in BatchSchedCB, EpochSchedCB:
        state, _ = saved(cls, there)
        with pytest.warns(UserWarning, match='the saved schedule is another one: .*' + match) as w:
            got = resumed(cls, here, state)
        assert len(w) == 1
        if 'patience' not in match: assert got == new_from(cls, here)      # that follows a metric

def test_another_length_and_another_rate_take_over():
    onecycle = partial(S.OneCycleLR, max_lr=0.2)
    state, _ = saved(BatchSchedCB, onecycle)
    with pytest.warns(UserWarning, match='differ in total_steps'):
        assert resumed(BatchSchedCB, onecycle, state, n_epochs=6) == new_from(BatchSchedCB, onecycle, 6)
    state, _ = saved(BatchSchedCB, SCHEDS['exponential'])
    with pytest.warns(UserWarning, match='differ in .*base_lrs'):
        got = resumed(BatchSchedCB, SCHEDS['exponential'], state, lr=0.3)
    assert got == new_from(BatchSchedCB, SCHEDS['exponential'], lr=0.3)

def test_a_scheduler_of_your_own():
    "Its settings are compared too; functions among its attributes are not saved"
    class Own(S.LRScheduler):
        def __init__(self, opt, speed):
            self.speed, self.f = speed, lambda x: x
            super().__init__(opt)
        def get_lr(self): return [o/(1 + self.speed*self.last_epoch) for o in self.base_lrs]
    state, used = saved(BatchSchedCB, partial(Own, speed=2))
    assert resumed(BatchSchedCB, partial(Own, speed=2), state) == used[2*N:]
    with pytest.warns(UserWarning, match='differ in .*speed'): resumed(BatchSchedCB, partial(Own, speed=3), state)

def test_a_new_fit_starts_anew():
    "A state that is loaded between fits has no effect: only a fit that resumes takes it up"
    for cls in CBS.values():
        sched = SCHEDS['exponential']
        state, used = saved(cls, sched)
        cb, again = cls(sched), Used()
        assert cb.state_dict() == {}
        cb.load_state_dict(state[0])
        learn = TrainLearner(linear(), regression(N), lr=0.1, cbs=[cb, again], opt_func=OPTS['sgd'])
        learn.fit(EPOCHS, valid=False)
        cb.load_state_dict(state[0])
        learn.fit(EPOCHS, valid=False)
        assert again.seen == used*2

class SaysItsSteps(Callback):
    "As accumulation does: says how many steps an epoch has, before the schedules ask"
    order = 25
    def before_fit(self, learn): learn.clock.epoch_steps = math.ceil(N/2)
    def after_backward(self, learn):
        if learn.iter % 2 == 0 and learn.iter < N - 1: raise CancelStepException

def test_length_under_accumulation():
    used, steps = [], math.ceil(N/2)*2
    class AtStep(Callback):
        order = 20
        def after_step(self, learn): used.append(options(learn.opt))
    cb = BatchSchedCB(partial(S.OneCycleLR, max_lr=0.2))
    TrainLearner(linear(), regression(N), lr=0.1, cbs=[cb, SaysItsSteps(), AtStep()], opt_func=OPTS['sgd']).fit(2)
    opt, want = OPTS['sgd'](linear().parameters(), 0.1), []
    sched = S.OneCycleLR(opt, 0.2, total_steps=steps)
    for _ in range(steps):
        want.append(options(opt))
        opt.step()
        sched.step()
    assert used == want

class NoRate(optim.SGD):
    "As transformers' Adafactor, which finds its own rate"
    def __init__(self, params, lr):
        super().__init__(params, 0.1)
        for g in self.param_groups: g['lr'] = None
    def step(self, closure=None): pass

class OtherName(optim.SGD):
    "Has a rate by another name"
    def __init__(self, params, lr):
        super().__init__(params, 0.1)
        for g in self.param_groups: g['step_size'] = g.pop('lr')
    def step(self, closure=None): pass

@pytest.mark.parametrize('opt_func', [NoRate, OtherName])
def test_an_optimizer_without_a_rate(opt_func):
    "It trains; under a schedule, a search or a cycle an error says so before training. Wrong: float() of None"
    def make(*cbs): return TrainLearner(linear(), regression(N), lr=0.1, cbs=cbs, opt_func=opt_func)
    learn = make(EMACB(0.5), RecorderCB(lr=lambda cb: cb.pg.get('lr')))
    learn.fit(1)
    assert learn.opt_steps == N
    for fit in (learn.fit_one_cycle, make(BatchSchedCB(SCHEDS['step'])).fit, make(EpochSchedCB(SCHEDS['plateau'])).fit):
        with pytest.raises(ValueError, match=f'{opt_func.__name__} has no learning rate that a schedule could change'):
            fit(1)
    with pytest.raises(ValueError, match='the finder needs an optimizer whose param_groups have a learning rate'):
        learn.lr_find(show=False)
    assert learn.opt_steps == N

def test_one_cycle_in_the_words_of_fastai():
    "As fastai's: from lr_max/div up to lr_max in a quarter of the fit, down to lr_max/div_final, by cosines"
    used = Used()
    learn = TrainLearner(linear(), regression(8), lr=0.1, cbs=used, opt_func=OPTS['sgd'])
    learn.fit_one_cycle(2, 0.3, div=10., div_final=1e3, pct_start=0.25, cbs=(more := Used()), valid=False)
    def cos(a, b, x): return a + (1 - math.cos(math.pi*x))/2*(b - a)
    rises, falls = np.arange(4)/3, np.arange(1, 13)/12            # 16 steps: the first and the last are the ends
    want = [cos(0.03, 0.3, x) for x in rises] + [cos(0.3, 0.3e-3, x) for x in falls]
    moms = [cos(0.95, 0.85, x) for x in rises] + [cos(0.85, 0.95, x) for x in falls]
    np.testing.assert_allclose([o[0] for o in used.seen], [(a, b) for a, b in zip(want, moms)], rtol=1e-9)
    assert more.seen == used.seen and learn.cbs == [used]
    with pytest.raises(ValueError, match='lr_max must be a number above 0, or None; got 0'): learn.fit_one_cycle(1, 0)
    with pytest.raises(TypeError, match='unexpected keyword argument'): learn.fit_one_cycle(1, 0.1, train=False, wd=1)

def test_errors_before_training():
    learn = TrainLearner(linear(), regression(N))
    for sched, exc, match in (
        (partial(S.OneCycleLR, max_lr=1., epochs=1), ValueError, 'total_steps'),           # torch's own word
        (lambda o: S.ChainedScheduler([S.OneCycleLR(o, 1., total_steps=5)], o), ValueError,
         '=5, but the fit has 10 steps'),
    ):
        with pytest.raises(exc, match=match): learn.fit(2, cbs=BatchSchedCB(sched))
    assert learn.opt_steps == 0 and learn.opt.param_groups[0]['lr'] == 0.1 and 'max_lr' not in learn.opt.param_groups[0]
    with pytest.raises(TypeError, match='not an Optimizer'):
        TrainLearner(linear(), regression(N), opt_func=NoOptimizer).fit(1, cbs=BatchSchedCB(SCHEDS['step']))

class Counting(optim.Optimizer):
    "Keeps state in its groups, as Prodigy's d, Schedule-Free's weight_sum and fused Adam's step"
    def __init__(self, params, lr): super().__init__(params, dict(lr=lr, k=0, total=torch.zeros(())))
    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            g['k'] += 1
            g['total'] += 1
            for p in g['params']: p.sub_(g['lr']/g['k']*p.grad)

@pytest.mark.parametrize('per', CBS)
def test_only_what_a_schedule_changed_is_put_back(per):
    "Wrong: the optimizer's own counts are those of before the fit (f07)"
    learn = TrainLearner(linear(), regression(N), lr=0.1, opt_func=Counting, cbs=CBS[per](SCHEDS['exponential']))
    for n in 1, 2:
        learn.fit(2)
        group, = learn.opt.param_groups
        assert group['k'] == int(group['total']) == 2*n*N and group['lr'] == 0.1 and 'initial_lr' not in group

@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('order', [-50, 20, 35, 99])
def test_the_recorded_rate_is_the_one_that_the_step_used(order):
    "Wherever the recorder stands, in the list and by its order"
    class Steps(TrainLearner):
        def step(self):
            used.append([self.opt.param_groups[0][k] for k in ('lr', 'momentum')])
            super().step()
    for i in range(3):
        rec, used = RecorderCB(lr=lambda cb: cb.pg['lr'], mom=lambda cb: cb.learn.opt.param_groups[0]['momentum']), []
        rec.order = order
        cbs = [BatchSchedCB(partial(S.OneCycleLR, max_lr=0.1)), EMACB()]
        cbs.insert(i, rec)
        image_learner(*cbs, cls=Steps).fit(2)
        assert list(zip(rec.recs['lr'], rec.recs['mom'])) == [tuple(o) for o in used]
        assert len({lr for lr, _ in used}) == 14


class GroupsOnly:
    "An optimizer with groups that is none of torch's"
    def __init__(self, params, lr): self.param_groups = [dict(params=list(params), lr=lr)]
    def step(self): pass
    def zero_grad(self): pass


@pytest.mark.parametrize('cb', [
    OneCycleCB, lambda: BatchSchedCB(partial(S.StepLR, step_size=2)), lambda: EpochSchedCB(S.ReduceLROnPlateau)])
def test_a_schedule_of_torch_needs_an_optimizer_of_torch(cb):
    "Wrong: 'GroupsOnly is not an Optimizer', and nobody knows who wants one"
    learn, cb = TrainLearner(linear(), regression(), F.mse_loss, 0.1, opt_func=GroupsOnly), cb()
    with pytest.raises(TypeError, match=f'{type(cb).__name__} needs an optimizer derived from torch.optim.Optimizer; '
                       'GroupsOnly is none'): learn.fit(1, cbs=cb)


def test_an_error_of_the_factory_is_its_own():
    def broken(opt): raise TypeError('mine')
    with pytest.raises(TypeError, match='^mine'):
        TrainLearner(linear(), regression(), F.mse_loss, 0.1).fit(1, cbs=BatchSchedCB(broken))
