"Averaging callbacks in company: defaults, several learners and fits, loaded weights, statistics, saved states"
import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fastswa.averaging.average import Average
from fastswa.averaging.rules import ema
from fastswa.averaging.batchnorm import update_bn
from fastswa.callbacks.basics import BatchTransformCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.training.events import Callback, CancelEpochException
from fastswa.training.learner import Learner, TrainCB, TrainLearner
from fastswa.callbacks.swa import BNUpdateCB
from fastswa.callbacks.swa import AverageCB
from fastswa.callbacks.swa import EMACB, SWACB

N, BS = 160, 16


def data(shuffle=False, **kw):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (N,), generator=g)
    ds = TensorDataset(F.one_hot(y, 3).float() + torch.randn(N, 3, generator=g)/2, y)
    return SimpleNamespace(train=DataLoader(ds, BS, shuffle=shuffle, **kw), valid=DataLoader(ds, 2*BS))


def net(seed=0, norm=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 3))


def learner(*cbs, model=None, dls=None, cls=TrainLearner, **kw):
    return cls(net() if model is None else model, dls or data(), F.cross_entropy, 0.3, cbs, **kw)


def copied(tensors): return {k: v.detach().clone() for k, v in tensors.items()}


def same(a, b): return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


class Trail(Callback):
    def before_fit(self, learn): self.seen = []
    def after_step(self, learn): self.seen.append(learn.model[0].weight.detach().double().numpy().copy())


def weights_of(cb): return cb.average.weights['0.weight']


def test_defaults_to_the_letter():
    "Half-life a twentieth of the fit; snapshots from three quarters on, every hundredth: in 200 steps from 150 on, every second"
    trail, e, s = Trail(), EMACB(), SWACB()
    learner(trail, e, s, BNUpdateCB()).fit(20)
    d, avg = 2**(-1/10), trail.seen[0]
    for w in trail.seen[1:]: avg = d*avg + (1 - d)*w
    np.testing.assert_allclose(weights_of(e), avg, rtol=1e-4, atol=1e-6)
    assert s.average.n == 26
    np.testing.assert_allclose(weights_of(s), np.mean(trail.seen[149::2], axis=0), rtol=1e-4, atol=1e-6)
    assert BNUpdateCB().valid_batches == 20 and BNUpdateCB().n_batches is None


@pytest.mark.parametrize('kw, rule', [(dict(decay=0.8), ema(0.8)), (dict(decay=0.99, warmup='ratio'), ema(0.99, warmup='ratio')),
                                      (dict(half_life='0.5ep', warmup='power'), ema(half_life=5, warmup='power'))])
def test_rules(kw, rule):
    trail, cb = Trail(), EMACB(**kw)
    learner(trail, cb).fit(1)
    avg = trail.seen[0]
    for n, w in enumerate(trail.seen[1:], 1): avg = avg + rule(n)*(w - avg)
    np.testing.assert_allclose(weights_of(cb), avg, rtol=1e-5, atol=1e-6)


def test_choice_of_weights_and_rows():
    part, hidden = EMACB(name='part', include='*.weight', exclude='3.*', apply=False), EMACB(name='hidden', valid=False, apply=False)
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


LOOKS = dict(validate=lambda learn: learn.validate(), restore=lambda learn: learn.restore(), preds=lambda learn: learn.get_preds('raw'),
             lr_find=lambda learn: learn.lr_find(show=False), nothing=lambda learn: None)


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
    learn.cbs[0].restore()
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
    learn.cbs += [TrainCB(), BNUpdateCB()]
    learn.apply('ema')
    assert not torch.allclose(learn.model[1].running_mean, own)


def test_row_and_final_statistics():
    "A row takes valid_batches, weights that are applied take n_batches; neither repeats a pass it has made"
    class Count(BNUpdateCB):
        def _compute(self, learn, n):
            self.passes.append(n)
            super()._compute(learn, n)
    bn = Count(n_batches=7, valid_batches=3)
    bn.passes = []
    learn = learner(EMACB(), bn)
    learn.fit(2)
    assert bn.passes == [3, 3, 7]
    learn.validate()
    assert bn.passes == [3, 3, 7]
    learn.restore()
    learn.averages['ema'].load_state_dict(copy.deepcopy(learn.averages['ema'].state_dict()))
    learn.apply('ema')
    assert bn.passes == [3, 3, 7, 7]             # the same count, but another average


def test_dict_batches_and_two_inputs_reach_the_statistics():
    class Steps(TrainCB):
        def predict(self, learn): learn.preds = learn.model(learn.batch['x'])
        def get_loss(self, learn): learn.loss = F.cross_entropy(learn.preds, learn.batch['labels'])
    dls = data()
    dicts = SimpleNamespace(train=[dict(labels=y, x=x) for x, y in dls.train], valid=[dict(labels=y, x=x) for x, y in dls.valid])
    learn = learner(Steps(), EMACB(), BNUpdateCB(), MetricsCB(), cls=Learner, dls=dicts)
    learn.fit(1)
    expected = learn.averages['ema'].module().train()
    update_bn(expected, [x for x, _ in dls.train])
    assert torch.allclose(learn.model[1].running_var, expected[1].running_var, rtol=1e-5)


def test_generators_of_loaders_are_put_back():
    def run(*cbs):
        g, ds = torch.Generator().manual_seed(1), data().train.dataset
        dls = SimpleNamespace(train=DataLoader(ds, BS, sampler=RandomSampler(ds, generator=g)), valid=data().valid)
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
    ([EMACB(), SWACB()], 'ema, swa'), ([EMACB(), SWACB(start='1000ba')], 'ema'), ([EMACB(apply=False), SWACB(start='0ba')], 'ema, swa'),
    ([EMACB(apply=False), SWACB(apply=False)], None), ([EMACB(apply=True), SWACB()], None), ([EMACB(apply=False)], None)])
def test_the_line_that_says_how_to_choose(cbs, says, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(*cbs, BNUpdateCB())
        learn.fit(1)
    out = capsys.readouterr().out
    assert (out == '') if says is None else out.endswith(f'hold an average: {says}\n')


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


def test_averaging_by_a_base_without_a_rule():
    with pytest.raises(TypeError, match='does not say by which rule'): learner(AverageCB(name='x')).fit(1)


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
