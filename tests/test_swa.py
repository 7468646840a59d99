"Averaging callbacks in company: defaults, several learners and fits, loaded weights, statistics, saved states"
import copy
import math
import re
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fastswa.averaging.average import Average
from fastswa.averaging.swad import SWAD
from fastswa.averaging.rules import ema
from fastswa.averaging.batchnorm import update_bn
from fastswa.callbacks.basics import BatchTransformCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.training.events import Callback, CancelEpochException
from fastswa.callbacks.schedule import BatchSchedCB, EpochSchedCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.training.learner import Learner, TrainCB, TrainLearner
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import AverageCB
from fastswa.callbacks.swa_variants import BEMACB, PostHocEMACB, SWADCB, SWAGCB, SwitchEMACB
from fastswa.callbacks.swa import EMACB, LAWACB, SWACB
from helpers import Accumulate, AtEpoch, Trail, copied, data, learner, net, one, same

N, BS = 160, 16      # samples and batch size of `data()`


def weights_of(cb): return cb.average.weights['0.weight']


def long_epochs():
    "Of 100 steps: to train for many without validating often"
    return SimpleNamespace(train=data(400, 4).train, valid=data().valid)


def test_defaults_to_the_letter():
    """Half-life a twentieth of the steps so far; snapshots every hundredth from three quarters on

    Of 200 steps every second. Wrong: a half-life of a twentieth of the whole fit, from the start"""
    trail, e, s = Trail(), EMACB(), SWACB()
    learner(trail, e, s, BNUpdateCB(), dls=long_epochs()).fit(2)
    avg = trail.weights[0]
    for n, w in enumerate(trail.weights[1:], 1):
        d = (n/(n + 1))**(np.log(2)/0.05)
        avg = d*avg + (1 - d)*w
    np.testing.assert_allclose(weights_of(e), avg, rtol=1e-4, atol=1e-6)
    assert s.average.n == 26
    np.testing.assert_allclose(weights_of(s), np.mean(trail.weights[149::2], axis=0), rtol=1e-4, atol=1e-6)
    assert BNUpdateCB().valid_batches == 20 and BNUpdateCB().n_batches is None


@pytest.mark.parametrize('kw, rule', [(dict(decay=0.8), ema(0.8)),
                                      (dict(decay=0.99, warmup='ratio'), ema(0.99, warmup='ratio')),
                                      (dict(half_life='0.5ep', warmup='power'), ema(half_life=5, warmup='power'))])
def test_rules(kw, rule):
    trail, cb = Trail(), EMACB(**kw)
    learner(trail, cb).fit(1)
    avg = trail.weights[0]
    for n, w in enumerate(trail.weights[1:], 1): avg = avg + rule(n)*(w - avg)
    np.testing.assert_allclose(weights_of(cb), avg, rtol=1e-5, atol=1e-6)


def test_a_warm_up_is_of_steps():
    """With a snapshot every 5 steps the warm-up is as long as with one at each

    Wrong: each snapshot counts as one step, and the memory stays five times too short"""
    trail, cb = Trail(), EMACB(warmup='ratio', every='5ba', apply=False)
    learner(trail, cb, dls=long_epochs()).fit(2)
    seen, avg = trail.weights[4::5], None
    for n, w in enumerate(seen):
        left = min(2**(-1/10), (1 + 5*n)/(10 + 5*n))**5
        avg = w if avg is None else left*avg + (1 - left)*w
    np.testing.assert_allclose(weights_of(cb), avg, rtol=1e-4, atol=1e-6)


def test_choice_of_weights_and_rows():
    part = EMACB(name='part', include='*.weight', exclude='3.*', apply=False)
    hidden = EMACB(name='hidden', valid=False, apply=False)
    learn = learner(part, hidden)
    learn.fit(1)
    assert list(part.average.weights) == ['0.weight', '1.weight']
    assert [r['weights'] for r in learn.history] == ['raw', 'raw', 'part']
    assert learn.weights == 'raw' and len(learn.validate('hidden')) == 1


def test_start_of_the_second_half_under_accumulation_and_early_epoch_ends():
    "Counted in steps of the loader's length, neither would ever reach the second half of the fit"
    class EarlyEnd(Callback):
        def after_batch(self, learn):
            if learn.iter == 4 and learn.training: raise CancelEpochException
    cb = SWACB(start='0.5dur', every='1ba')
    learner(cb, EarlyEnd(), BNUpdateCB()).fit(4)
    assert cb.average.n == 10


def test_a_start_beyond_the_fit_is_said():
    with pytest.warns(UserWarning, match='starts after this fit has ended'): learner(EMACB(start='10ep')).fit(2)


def test_the_same_callbacks_and_model_with_a_second_learner():
    "The course makes a second learner for the second rate; the average is still applied then"
    cbs, model = [EMACB(half_life='5ba'), BNUpdateCB()], net()
    first = learner(*cbs, model=model)
    first.fit(1)
    with first.using('raw'): raw = copied(model.state_dict())
    second = learner(*cbs, model=model)
    class Start(Callback):
        order = 99
        def before_fit(self, learn): self.weights = copied(learn.model.state_dict())
    start = Start()
    second.fit(1, cbs=start)
    assert same(start.weights, raw) and second.averages['ema'].n == 20


LOOKS = dict(validate=lambda learn: learn.validate(), restore=lambda learn: learn.restore(),
             preds=lambda learn: learn.get_preds('raw'), lr_find=lambda learn: learn.lr_find(show=False),
             nothing=lambda learn: None)


@pytest.mark.parametrize('look', LOOKS.values(), ids=LOOKS)
def test_loaded_weights_survive_a_look(look):
    learn = learner(EMACB(), BNUpdateCB())
    learn.fit(1)
    other = net(5).state_dict()
    learn.model.load_state_dict(other)
    with pytest.warns(UserWarning, match='were changed'):
        look(learn)
        learn.fit(0)
    assert same(copied(learn.model.state_dict()), copied(other))
    assert learn.averages['ema'].n == 0


def test_apply_raw_is_restore():
    learn = learner(EMACB())
    learn.fit(1)
    learn.apply('raw')
    learn.fit(1, valid=False)
    learn.restore()
    assert learn.weights == 'raw'


def test_statistics_after_a_fit_with_callbacks_of_its_own():
    "The transform of the fit has to prepare the batches of the statistics too, also later"
    learn = learner()
    tfm = BatchTransformCB(lambda b: (b[0]*3 + 1, b[1]))
    learn.fit(1, cbs=[tfm, EMACB(apply=False), BNUpdateCB()])
    learn.apply('ema')
    expected = learn.averages['ema'].module().train()
    update_bn(expected, [x*3 + 1 for x, _ in learn.dls.train])
    assert torch.allclose(learn.model[1].running_mean, expected[1].running_mean, atol=1e-6)


def test_statistics_for_a_bare_learner_and_added_later():
    learn = learner(cls=Learner)
    learn.fit(1, cbs=[TrainCB(), EMACB(apply=False)])
    own = learn.averages['ema'].weights['1.running_mean'].clone()
    learn.averages.bn_data = learn.dls.train
    learn.apply('ema')
    assert not torch.allclose(learn.model[1].running_mean, own)


def test_row_and_final_statistics(monkeypatch):
    "A row takes valid_batches, weights that are applied take n_batches; neither repeats a pass it has made"
    passes = []
    def counted(*args, n_batches, **kwargs):
        passes.append(n_batches)
        update_bn(*args, n_batches=n_batches, **kwargs)
    monkeypatch.setattr('fastswa.averaging.averages.update_bn', counted)
    learn = learner(EMACB(), BNUpdateCB(n_batches=7, valid_batches=3))
    learn.fit(2)
    assert passes == [3, 3, 7]
    learn.validate()
    assert passes == [3, 3, 7]
    learn.restore()
    learn.averages['ema'].load_state_dict(copy.deepcopy(learn.averages['ema'].state_dict()))
    learn.apply('ema')
    assert passes == [3, 3, 7, 7]             # the same count, but another average


def test_dict_batches_and_two_inputs_reach_the_statistics():
    class Steps(TrainCB):
        def predict(self, learn): learn.preds = learn.model(learn.batch['x'])
        def get_loss(self, learn): learn.loss = F.cross_entropy(learn.preds, learn.batch['labels'])
    dls = data()
    dicts = SimpleNamespace(train=[dict(labels=y, x=x) for x, y in dls.train],
                            valid=[dict(labels=y, x=x) for x, y in dls.valid])
    learn = learner(Steps(), EMACB(), BNUpdateCB(), MetricsCB(), cls=Learner, dls=dicts)
    learn.fit(1)
    expected = learn.averages['ema'].module().train()
    update_bn(expected, [x for x, _ in dls.train])
    assert torch.allclose(learn.model[1].running_var, expected[1].running_var, rtol=1e-5)


def test_generators_of_loaders_are_put_back():
    def run(*cbs):
        g, ds = torch.Generator().manual_seed(1), data().train.dataset
        dls = SimpleNamespace(train=DataLoader(ds, BS, sampler=RandomSampler(ds, generator=g), collate_fn=list),
                              valid=data().valid)
        learn = learner(*cbs, dls=dls)
        learn.fit(2)
        learn.restore()
        return copied(learn.model.state_dict())
    assert same(run(), run(EMACB(), BNUpdateCB()))


def test_state_of_a_callback_in_a_new_process():
    "Stopped after one of two epochs, saved, loaded into new objects: as if not stopped"
    def make(model):
        cbs = EMACB(half_life='5ba', apply=False), SWACB(start='5ba', every='1ba', apply=False), BNUpdateCB()
        return learner(*cbs, model=model)
    whole = make(net())
    whole.fit(1), whole.fit(1)
    first = make(net())
    first.fit(1)
    saved = copy.deepcopy([first.model.state_dict(), *(cb.state_dict() for cb in first.cbs[:2])])
    second = make(net(9))
    second.model.load_state_dict(saved[0])
    for cb, state in zip(second.cbs, saved[1:]): cb.load_state_dict(state)
    second.fit(1)
    for a, b in zip(whole.cbs[:2], second.cbs[:2]):
        assert a.average.n == b.average.n and same(a.average.weights, b.average.weights)
    second.cbs[0].load_state_dict({})
    second.fit(1)
    assert second.cbs[0].average.n == 10          # an empty state is a new beginning


def test_state_loaded_within_a_fit_counts_at_once():
    saved = learner(EMACB(decay=0.9))
    saved.fit(1)
    state = copy.deepcopy(saved.cbs[0].state_dict())
    class Load(Callback):
        order = 99
        def before_epoch(self, learn):
            if learn.training: learn.cbs[0].load_state_dict(state)
    learn = learner(EMACB(decay=0.9), Load())
    learn.fit(1)
    assert learn.averages['ema'].n == 20


@pytest.mark.parametrize('cbs, says', [
    ([EMACB(), SWACB()], 'ema, swa'), ([EMACB(), SWACB(start='1000ba')], 'ema'),
    ([EMACB(apply=False), SWACB(start='0ba')], 'ema, swa'),
    ([EMACB(apply=False), SWACB(apply=False)], ''), ([EMACB(apply=True), SWACB()], None), ([EMACB()], None),
    ([EMACB(apply=False)], ''), ([EMACB(start='1000ba')], '')])
def test_the_line_that_says_how_to_choose(cbs, says, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(*cbs, BNUpdateCB())
        learn.fit(1)
    out = capsys.readouterr().out
    if says is None:
        assert learn.weights == 'ema'
        assert out == "The model holds its 'ema' weights; learn.restore() gives it its raw ones back.\n"
    else:
        assert learn.weights == 'raw'
        line = f'The model holds its raw weights; learn.apply(name) gives it those of an average: {says}.\n'
        assert out == (line if says else '')


def test_a_look_within_an_epoch_leaves_its_metrics_alone():
    class Right:
        def reset(self): self.n = 0
        def update(self, preds, targets): self.n += len(targets)
        def compute(self): return self.n
    class Look(Callback):
        def after_batch(self, learn):
            if learn.training and learn.iter == 3: learn.validate()
    learn = learner(MetricsCB(n=Right()), Look())
    learn.fit(1)
    assert [r['n'] for r in learn.history] == [N, N]


def test_swa_lr_respects_the_groups():
    groups = lambda p, lr: optim.SGD([dict(params=p[:1]), dict(params=p[1:], lr=lr/10)], lr)
    seen = []
    class Rates(Callback):
        order = 50
        def after_step(self, learn): seen.append([g['lr'] for g in learn.opt.param_groups])
    learner(SWACB(start='5ba', swa_lr=0.1, anneal='2ba'), BNUpdateCB(), Rates(), opt_func=groups).fit(1)
    assert seen[-1] == pytest.approx([0.1, 0.01])


def test_average_device_dtype_and_check():
    m = nn.Linear(2, 1)
    avg = Average(m, dtype=torch.float64, device='cpu', check_finite=False)
    avg.update()
    assert avg.weights['weight'].dtype is torch.float64
    nn.init.constant_(m.weight, float('inf'))
    avg.update()
    assert avg.n == 2 and avg.skipped == 0
    other = Average(nn.Linear(2, 1))
    with torch.inference_mode(): other.update()
    other.update()                                # made under inference_mode, its tensors could not be written to
    assert other.n == 2


def test_nothing_is_swapped_before_the_first_update():
    "Not: a row, a prediction, or a model at the end, of weights that were never trained (Lightning#21724)"
    trail, cb = Trail(), EMACB(start='100ep')
    learn = learner(cb, BNUpdateCB(), trail)
    with pytest.warns(UserWarning, match='starts after this fit'): learn.fit(2)
    assert cb.average.n == 0 and [r['weights'] for r in learn.history] == ['raw']*4
    assert learn.weights == 'raw' and torch.equal(learn.model[0].weight, trail.seen[-1]['0.weight'])
    for look in (learn.apply, learn.validate, learn.get_preds):
        with pytest.raises(RuntimeError, match=r'call update\(\) first'): look('ema')
        assert learn.weights == 'raw' and torch.equal(learn.model[0].weight, trail.seen[-1]['0.weight'])
    assert cb.state_dict()['weights'] == {}


def test_raw_and_average_at_any_moment():
    "At every moment of a row of the average both can be had, each under its own name (nequip#590: only one is saved)"
    class Save(Callback):
        order = 99
        def after_batch(self, learn):
            if learn.weights != 'ema': return
            kept = copied(learn.model.state_dict())
            with learn.using('raw'): raw = copied(learn.model.state_dict())
            assert same(copied(learn.model.state_dict()), kept)           # the row goes on with the average
            saved.append((raw, copy.deepcopy(learn.averages['ema'].state_dict())))
    saved, trail = [], Trail()
    learn = learner(EMACB(decay=0.8), trail, Save())
    learn.fit(2)
    assert len(saved) == 10
    for i, (raw, state) in enumerate(saved):
        n = 10*(i//5 + 1)
        avg = trail.seen[0]['0.weight'].double()
        for w in trail.seen[1:n]: avg = 0.8*avg + 0.2*w['0.weight'].double()
        assert same(raw, trail.seen[n - 1]) and state['n'] == n
        torch.testing.assert_close(state['weights']['0.weight'].double(), avg, rtol=1e-5, atol=1e-6)


def test_micro_batches_do_not_count():
    "Five steps in ten batches: five updates, and the decay is per step (F5-TTS#631)"
    trail, e, s = Trail(), EMACB(decay=0.8, apply=False), SWACB(start='0ba', every='2ba', apply=False)
    learner(trail, e, s, Accumulate(2), BNUpdateCB()).fit(2)
    assert len(trail.seen) == 10 and (e.average.n, s.average.n) == (10, 5)
    avg = trail.seen[0]['0.weight'].double()
    for w in trail.seen[1:]: avg = 0.8*avg + 0.2*w['0.weight'].double()
    torch.testing.assert_close(e.average.weights['0.weight'].double(), avg, rtol=1e-5, atol=1e-6)
    mean = torch.stack([w['0.weight'].double() for w in trail.seen[1::2]]).mean(0)
    torch.testing.assert_close(s.average.weights['0.weight'].double(), mean, rtol=1e-5, atol=1e-6)


class Scaled(TrainLearner):
    "Mixed precision's scaler, with an overflow in some batches"
    overflow = ()
    def backward(self):
        self.scaler.scale(self.loss).backward()
        if self.iter in self.overflow: self.model[0].weight.grad[0, 0] = math.inf
    def step(self):
        self.scaler.step(self.opt)
        self.scaler.update()


def test_a_step_that_the_scaler_skipped():
    "No snapshot then, and no step of the half-life either (pytorch#67590, accelerate#4243)"
    trail, cb = Trail(), EMACB(decay=0.8, every='3ba', apply=False)
    learn = Scaled(net(), data(), F.cross_entropy, 0.3, [trail, cb])
    learn.scaler, learn.overflow = torch.amp.GradScaler('cpu', init_scale=8.), (0, 3, 4)
    learn.fit(1)
    assert learn.scaler.get_scale() == 1. and learn.opt_steps == len(trail.seen) == 7      # halved three times
    avg = 0.8**3*trail.seen[2]['0.weight'].double() + (1 - 0.8**3)*trail.seen[5]['0.weight'].double()
    assert cb.average.n == 2
    torch.testing.assert_close(cb.average.weights['0.weight'].double(), avg, rtol=1e-5, atol=1e-6)


def test_the_default_fits_a_short_run():
    "From 10 to about 0 in 100 steps: a decay of 0.999 is far off, the default is where the raw weight is (measured)"
    x = torch.linspace(-1, 1, 400).view(-1, 1)
    dls = SimpleNamespace(train=DataLoader(TensorDataset(x, torch.zeros_like(x)), 8, shuffle=True), valid=None)
    model = one(10.)
    default, usual = EMACB(apply=False), EMACB(decay=0.999, name='usual', apply=False)
    TrainLearner(model, dls, lr=0.1, cbs=[default, usual]).fit(2)
    weights = model.weight, default.average.weights['weight'], usual.average.weights['weight']
    far = [abs(w.item()) for w in weights]
    assert far[0] < far[1] < 0.3 and far[2] > 5


@pytest.mark.parametrize('what', ['predict', 'using'])
def test_what_is_put_back_was_not_changed(what):
    "After a fit the model holds its only average; what else it held for a moment must not make that the raw weights"
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


@pytest.mark.parametrize('make', [EMACB, SWACB, LAWACB, SWAGCB, PostHocEMACB, SwitchEMACB, SWADCB, BEMACB, BNUpdateCB])
def test_making_a_callback_draws_no_random_number(make):
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_half_life_is_a_share_of_the_fit_under_accumulation():
    "In steps of the loader's length it would be four times as long: 8 steps of 16 instead of 2"
    trail, cb, post = Trail(), EMACB(half_life='0.125dur', apply=False), PostHocEMACB(every='0.25dur')
    learner(trail, Accumulate(4), cb, post, BNUpdateCB()).fit(8)          # 80 batches, 8*2 steps
    assert len(trail.weights) == 16
    at = [10*e + i for e in range(8) for i in (4, 8)]                      # batches after which a step was taken
    avg, d = trail.weights[0], 2**(-1/10)                                     # 0.125 of 80 batches are 10
    for i in range(1, 16):
        w = d**(at[i] - at[i-1])
        avg = w*avg + (1 - w)*trail.weights[i]
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


@pytest.mark.parametrize('make, value', [
    (lambda v: EMACB(decay=v), 1.5), (lambda v: EMACB(half_life=v), '0ba'), (lambda v: EMACB(every=v), '-1ba'),
    (lambda v: EMACB(start=v), '2dur'),
    (lambda v: SWACB(every=v), '0ep'), (lambda v: SWACB(swa_lr=v), 0), (lambda v: BNUpdateCB(n_batches=v), 0)])
def test_values_out_of_range(make, value):
    "Refused where they are given, and the message holds the value"
    with pytest.raises(ValueError, match=re.escape(str(value))): make(value)


@pytest.mark.parametrize('f, says', [
    (lambda: BNUpdateCB(valid_batches=2.5), 'valid_batches must be a whole number.*2.5'),
    (lambda: BNUpdateCB('5'), "n_batches .*'5'"),
    (lambda: SWACB(swa_lr='0.1'), "swa_lr must be a number above 0; got '0.1'")])
def test_bad_input_is_named_at_once(f, says):
    with pytest.raises((ValueError, TypeError), match=says): f()


@pytest.mark.parametrize('cb', [EMACB, SWACB, LAWACB, PostHocEMACB])
def test_validation_before_any_training_and_a_load_into_a_new_learner(cb, tmp_path):
    "Wrong: a time in `dur` asks for the length of a run that there is not"
    learn = learner(cb(), BNUpdateCB())
    learn.fit(1, train=False)
    assert [r['weights'] for r in learn.history] == ['raw']
    learn.fit(2)
    learn.save(tmp_path/'a.pt')
    new = learner(cb(), BNUpdateCB())
    new.load(tmp_path/'a.pt')
    new.apply(new.cbs[0].name)
    assert same(copied(new.model.state_dict()), copied(learn.model.state_dict()))
    new.fit(1)
    assert new.averages[new.cbs[0].name].n > 0


# --- at the minima of the rate


class Taken(AverageCB):
    "Notes the steps after which a snapshot was taken, and the weights"
    def before_fit(self, learn):
        super().before_fit(learn)
        self.steps, self.seen = [], []
    def taken(self, learn):
        self.steps.append(learn.clock.steps)
        self.seen.append(learn.model[0].weight.detach().double().numpy().copy())


def minima(rates, start=0):
    """Steps, from 1, at whose rate it was lowest: it had fallen, and rises afterwards

    The end is one too, unless a cycle is cut short there: then the rate is far above that of the minimum before."""
    found, falling, newest = [], False, None
    for i, rate in enumerate(rates):
        if i and rate != rates[i - 1]: falling = rate < rates[i - 1]
        ends = i + 1 == len(rates) and (newest is None or rate <= 2*newest)
        if falling and (ends or i + 1 < len(rates) and rates[i + 1] > rate):
            falling, newest = False, rate
            if i + 1 >= start: found.append(i + 1)
    return found


S = optim.lr_scheduler
CYCLES = dict(
    restarts=partial(S.CosineAnnealingWarmRestarts, T_0=7),
    growing=partial(S.CosineAnnealingWarmRestarts, T_0=4, T_mult=2),
    triangular=partial(S.CyclicLR, base_lr=0.01, max_lr=0.3, step_size_up=3, step_size_down=5),
    triangular2=partial(S.CyclicLR, base_lr=0.01, max_lr=0.3, step_size_up=4, mode='triangular2'),
    one=partial(S.OneCycleLR, max_lr=0.3, total_steps=30), cosine=partial(S.CosineAnnealingLR, T_max=30, eta_min=0.01),
    waves=partial(S.CosineAnnealingLR, T_max=5, eta_min=0.01),
    plateaus=partial(S.LambdaLR, lr_lambda=lambda i: (1, 0.5, 0.1, 0.1, 0.1, 0.7)[i % 6]),
    constant=partial(S.LambdaLR, lr_lambda=lambda i: 1), rising=partial(S.LambdaLR, lr_lambda=lambda i: 1 + i))


@pytest.mark.parametrize('cycle', CYCLES)
@pytest.mark.parametrize('start', ['0ba', '11ba'])
@pytest.mark.filterwarnings('ignore:.*rate had no minimum')
def test_snapshots_at_the_minima_of_a_schedule_by_batches(cycle, start):
    "Wrong: at multiples of `every`, which are in the midst of a cycle; or a step late, when the rate is high again"
    cb, rates = Taken(at='lr_min', start=start), []
    class Rates(Callback):
        def before_batch(self, learn):
            if learn.training: rates.append(learn.opt.param_groups[0]['lr'])
    learner(cb, Rates(), BatchSchedCB(CYCLES[cycle])).fit(3)
    assert cb.steps == minima(rates, int(start[:-2]))
    assert cb.steps or cycle in ('constant', 'rising')
    if cb.seen: np.testing.assert_allclose(weights_of(cb), np.mean(cb.seen, 0), rtol=1e-5, atol=1e-6)


def triangle(epoch): return 1 if epoch < 7 else 0.1 + 0.9*(1 - (epoch - 7) % 5/4)


@pytest.mark.parametrize('kw, epochs', [(dict(at='lr_min', start='7ep'), [12, 17, 22]),
                                        (dict(at='lr_min'), [12, 17, 22]),
                                        (dict(at='lr_min', start='13ep'), [17, 22]),
                                        (dict(start='7ep', every='5ep', phase='start'), [7, 12, 17, 22]),
                                        (dict(start='12ep', every='5ep', phase='start'), [12, 17, 22]),
                                        (dict(start='7ep', every='5ep'), [10, 15, 20])])
@pytest.mark.parametrize('accumulate', [False, True])
def test_snapshots_at_the_minima_of_a_schedule_by_epochs(kw, epochs, accumulate):
    "Each is in the row of its own epoch; 12, 17, 22 are where the paper on SWA takes them"
    cb, sched = Taken(**kw), EpochSchedCB(partial(S.LambdaLR, lr_lambda=triangle))
    learn = learner(cb, sched, *([Accumulate(2)] if accumulate else []), dls=data(16, 4))
    learn.fit(22)
    per_epoch = 2 if accumulate else 4
    assert cb.steps == [e*per_epoch for e in epochs]
    rows = [r['epoch'] + 1 for r in learn.history if r.get('weights') == 'average']
    assert rows == list(range(epochs[0], 23))


def test_a_run_resumed_between_two_minima(tmp_path):
    "It remembers that the rate was falling. Wrong: the minimum in the first resumed epoch is missed"
    def run(*cbs, resume=None):
        cycle = partial(S.CyclicLR, base_lr=0.01, max_lr=0.3, step_size_up=6, step_size_down=9)
        cb = SWACB(start='0ba', at='lr_min', apply=False)
        learner(cb, BatchSchedCB(cycle), *cbs, model=net(norm=False)).fit(4, resume=resume)
        return cb.average
    whole = run()
    run(CheckpointCB(tmp_path), AtEpoch(1))      # after 10 steps, of which the last 4 went down
    resumed = run(resume=tmp_path)
    assert whole.n == resumed.n == 2 and same(copied(whole.weights), copied(resumed.weights))


def test_minima_that_cannot_be():
    with pytest.raises(ValueError, match="at must be 'lr_min'; got 'lr_max'"): AverageCB(at='lr_max')
    with pytest.raises(ValueError, match='swa_lr=0.1 holds the rate'): SWACB(swa_lr=0.1, at='lr_min')
    with pytest.warns(UserWarning, match="'swa' has no snapshot: from 0.75dur on the learning rate had no minimum"):
        learner(SWACB(at='lr_min'), BNUpdateCB()).fit(1)


# --- fits in a row


@pytest.mark.parametrize('make, n', [(SWACB, 26), (lambda **kw: SWAGCB(3, **kw), 26)], ids=['swa', 'swag'])
def test_swa_begins_anew_in_each_fit(make, n):
    "Wrong: the mean of the ends of two fits, the first before layers were unfrozen"
    trail, cb = Trail(), make(apply=False)
    learn = learner(trail, cb, BNUpdateCB(), dls=long_epochs())
    learn.fit(2)
    learn.fit(2)
    assert cb.average.n == n
    np.testing.assert_allclose(weights_of(cb), np.mean(trail.weights[149::2], axis=0), rtol=1e-4, atol=1e-6)
    on = make(apply=False, restart=False)
    learn = learner(on, BNUpdateCB(), dls=long_epochs())
    learn.fit(2)
    learn.fit(2)
    assert on.average.n == 2*n


def test_a_new_head_and_what_to_do():
    "The error comes before training, and its advice is right"
    cb = EMACB()
    learn = learner(cb)
    learn.fit(1)
    learn.restore()
    learn.model[-1] = nn.Linear(8, 5)
    says = r'weight is \(5, 8\) instead of \(3, 8\).*call reset\(\).*cb.average'
    with pytest.raises(ValueError, match=says): learn.fit(1)
    cb.average.reset()
    learn.fit(1)
    assert cb.average.n == 10 and cb.average.weights['3.weight'].shape == (5, 8)


def test_a_live_module_of_a_callback_follows_the_fit():
    "A teacher made of a callback's average after one fit follows it through the next"
    cb = EMACB(0.8, apply=False)
    learn = learner(cb, BNUpdateCB())
    learn.fit(1)
    live, x = cb.average.live(), torch.randn(4, 3)
    before = live(x)
    learn.fit(1)
    assert torch.equal(live(x), cb.average.module()(x)) and not torch.equal(live(x), before)


def test_swad_without_validation_losses():
    "Wrong: an average of nothing in silence, or a failing conversion of None to a number"
    with pytest.raises(ValueError, match="this fit does not validate the weights 'raw'"):
        learner(SWADCB(1, 2)).fit(2, valid=False)
    with pytest.raises(ValueError, match="this fit does not validate the weights 'raw'"):
        learner(SWADCB(1, 2), EMACB(0.8)).fit(2, valid='ema')
    learn = learner(SWADCB(1, 2))
    learn.dls.valid = None
    with pytest.raises(ValueError, match='there is no validation loader'): learn.fit(2)


def test_swad_counts_what_it_skipped():
    "In all segments, also loaded. Wrong: 0, or those of the present segment"
    model = nn.Linear(2, 1)
    avg = SWAD(model, 1, 2)
    def update(value):
        with torch.no_grad(): model.weight.fill_(value)
        avg.update()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        for values, skipped in [((1., math.nan), 1), ((2., math.inf, math.nan), 3), ((3.,), 3)]:
            for v in values: update(v)
            assert avg.skipped == skipped and f'{skipped} skipped' in repr(avg)
            avg.step(1.)
            assert avg.skipped == skipped
    assert len(seen) == 1
    other = SWAD(nn.Linear(2, 1), 1, 2)
    other.load_state_dict(avg.state_dict())
    assert other.skipped == 3
    other.reset()
    assert other.skipped == 0
