"What Composer tests of its algorithms EMA and SWA, and of resuming with them"
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from fastswa.averaging.average import Average
from fastswa.averaging.averages import Averages
from fastswa.averaging.rules import ema, power
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.schedule import EpochSchedCB
from fastswa.callbacks.speed import MixedPrecisionCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.training.events import Callback
from helpers import AtEpoch, Scripted, Trail, copied, floats, learner, one, quick, same, state

SMOOTHING = [0, 0.5, 0.99, 1]


def conv(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def transformer(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(10, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))


def tied(seed):
    "As BERT's: the embedding is the weight of the last layer too"
    model = transformer(seed)
    model[2] = nn.Linear(8, 10)
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize('smoothing', SMOOTHING)
@pytest.mark.parametrize('make', [conv, transformer, tied])
def test_the_average_is_old_times_smoothing_plus_new(smoothing, make):
    "Parameters and float buffers, in float64"
    model = make(0)
    average = Average(model, ema(smoothing))
    average.update()
    old = copied(average.weights)
    average.update(make(1))
    for k, new in floats(make(1)).items():
        expected = old[k].double()*smoothing + new.double()*(1 - smoothing)
        torch.testing.assert_close(average.weights[k].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('half_life, every, decay', [
    ('10ba', '1ba', 2**(-1/10)), ('1ep', '1ep', 0.5), ('20ba', '5ba', 2**(-1/4)), ('2ep', '10ba', 0.5**0.5),
    ('0.5dur', '1ep', 0.5**0.5)])
@pytest.mark.parametrize('make', [one, lambda: nn.BatchNorm1d(1), lambda: nn.Embedding(1, 1)])
def test_a_half_life_is_one_whatever_the_interval_is(half_life, every, decay, make):
    "exp(-ln 2 · interval / half-life), with each in its own unit: 10 batches in an epoch here, 4 epochs"
    averages = Averages(make(), steps_per_epoch=10, n_epochs=4)
    average = averages.add('ema', ema(half_life=half_life), every=every)
    values = []
    for step in range(20):
        nn.init.constant_(averages.model.weight, 0. if not average.n else 1.)
        averages.step()
        if average.n and (not values or average.n != values[-1][0]):
            values.append((average.n, average.weights['weight'].item()))
    assert len(values) >= 2
    np.testing.assert_allclose(values[1][1], 1 - decay, rtol=1e-6)


def test_smoothing_without_a_half_life():
    "Their constructor crashes on half_life=None, smoothing=0.9 (traps of others)"
    learn = quick(EMACB(decay=0.999))
    learn.fit(1)
    assert learn.averages['ema'].rule(3) == 1 - 0.999


def test_both_or_neither():
    "Both: an error. Neither: a half-life that is a share of the steps so far, where theirs is an error"
    with pytest.raises(ValueError, match='give decay or half_life, not both'): EMACB(decay=0.9, half_life='1ep')
    assert EMACB().rule == power(half_life=0.05)


class Held(Callback):
    "What the model holds at each validation, and in training"
    order = 99
    def before_fit(self, learn): self.seen = []
    def after_batch(self, learn):
        if learn.iter == 0: self.seen.append((learn.training, learn.weights, state(learn)))


def test_validation_is_by_the_average_and_training_by_the_weights():
    "And afterwards the weights are as before. Theirs validates the average alone; here there is a row for each"
    plain = quick(trail := Trail())
    plain.fit(2)
    learn = quick(EMACB(decay=0.5), held := Held(), ours := Trail())
    learn.fit(2)
    assert [o[:2] for o in held.seen] == [(True, 'raw'), (False, 'raw'), (False, 'ema')]*2
    assert all(map(same, ours.seen, trail.seen))
    assert same(held.seen[-1][2], copied(learn.averages['ema'].weights))


@pytest.mark.parametrize('start', ['5ba', '0.5dur', '1ep'])
def test_the_average_starts_when_it_is_told(start):
    "ema_start. The first snapshot is copied. 2 epochs of 7 batches"
    learn = quick(EMACB(decay=0.5, start=start, apply=False), trail := Trail())
    learn.fit(2)
    first = {'5ba': 5, '0.5dur': 7, '1ep': 7}[start]
    mean = trail.seen[first - 1]['weight']
    for s in trail.seen[first:]: mean = mean.lerp(s['weight'], 0.5)
    assert learn.averages['ema'].n == 14 - first + 1
    torch.testing.assert_close(learn.averages['ema'].weights['weight'], mean)


@pytest.mark.parametrize('start, every, at', [
    ('1ep', '5ba', (10, 15, 20)), ('0.5dur', '1ep', (14, 21)), ('2ep', '2ba', (14, 16, 18, 20))])
def test_swa_is_the_mean_of_the_snapshots_since_its_start(start, every, at):
    "swa_start and update_interval: the first whole multiple of the interval once the start is reached"
    learn = quick(SWACB(start, every, apply=False), trail := Trail())
    learn.fit(3)
    mean = np.mean([trail.seen[i - 1]['weight'].double().numpy() for i in at], axis=0)
    np.testing.assert_allclose(learn.averages['swa'].weights['weight'].numpy(), mean, rtol=1e-6)


def test_training_goes_on_after_the_average_has_ended():
    "swa_end='2ep' of 3: a fit of two epochs, and a further one without the callback, from the raw weights"
    learn = quick(swa := SWACB('1ep', '1ba', apply=False), trail := Trail())
    learn.fit(2)
    first = trail.seen
    average = copied(swa.average.weights)
    learn.cbs.remove(swa)
    learn.fit(1)
    mean = np.mean([s['weight'].double().numpy() for s in first[6:]], axis=0)
    np.testing.assert_allclose(average['weight'].numpy(), mean, rtol=1e-6)
    assert not same(first[-1], trail.seen[-1])


@pytest.mark.parametrize('wrong', ['-0.1dur', '1.5dur', '5', 0.5, 'ep'])
def test_a_start_that_is_no_time_is_an_error(wrong):
    with pytest.raises(ValueError, match='start must'): SWACB(start=wrong)


@pytest.mark.parametrize('wrong', ['0ba', '-1ba', '1.5dur'])
def test_an_interval_that_is_none_is_an_error(wrong):
    with pytest.raises(ValueError, match='every must'): SWACB(every=wrong)


@pytest.mark.parametrize('swa_lr', [0.02, None])
def test_the_rate_under_swa(swa_lr):
    "schedule_swa_lr: along a cosine from `start` on; without it the rate is left alone. Afterwards it is as before"
    rates = []
    class Rates(Callback):
        def after_loss(self, learn):
            if learn.training: rates.append(learn.opt.param_groups[0]['lr'])
    learn = quick(SWACB('1ep', swa_lr=swa_lr, anneal='7ba'), Rates())
    learn.fit(3)
    way = [0]*7 + [min(1, i/7) for i in range(14)]
    expected = [0.1 if swa_lr is None else 0.02 + 0.08*(1 + math.cos(math.pi*w))/2 for w in way]
    np.testing.assert_allclose(rates, expected)
    assert learn.opt.param_groups[0]['lr'] == 0.1


def test_the_model_holds_the_average_with_statistics_that_fit():
    "At the end of the fit, from all the training data"
    learn = learner(SWACB('0.5dur', '1ba'), BNUpdateCB(), lr=0.1)
    learn.fit(2)
    assert learn.weights == 'swa'
    x = torch.cat([b[0] for b in learn.dls.train])
    z = learn.model[0](x).detach().double()
    np.testing.assert_allclose(learn.model[1].running_mean.double(), z.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(learn.model[1].running_var.double(), z.var(0), rtol=1e-4)


KINDS = dict(ema=lambda: [EMACB(decay=0.8)], ema_by_epoch=lambda: [EMACB(half_life='1ep', every='1ep')],
             swa=lambda: [SWACB('1ep', '3ba', swa_lr=0.05, anneal='1ep')],
             both=lambda: [EMACB(), SWACB('0.4dur', '2ba'), EpochSchedCB(partial(ExponentialLR, gamma=0.7))])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('epoch', [1, 2, 3])
def test_a_run_that_is_resumed_is_the_run_without_a_break(kind, epoch, tmp_path):
    "Weights and averages bit for bit, with a stop after each epoch"
    def make(*cbs): return quick(*KINDS[kind](), *cbs, opt_func=partial(SGD, momentum=0.9))
    whole = make()
    whole.fit(4)
    make(AtEpoch(epoch), CheckpointCB(tmp_path)).fit(4)
    rest = make(CheckpointCB(tmp_path))
    rest.fit(4, resume=tmp_path)
    for name in ['raw', *whole.averages]:
        assert same(copied(rest.averages.weights(name)), copied(whole.averages.weights(name)))


@pytest.mark.parametrize('kind', ['ema', 'swa', 'both'])
@pytest.mark.parametrize('step', [3, 9])
def test_a_run_in_half_precision_is_resumed_in_the_midst_of_an_epoch(kind, step, tmp_path):
    "As their test of resumption: Adam, a schedule by epochs, bf16, a checkpoint at each step"
    def make(*cbs):
        made = KINDS[kind]()
        if kind != 'both': made.append(EpochSchedCB(partial(ExponentialLR, gamma=0.5)))
        return quick(*made, MixedPrecisionCB('bf16'), *cbs, opt_func=Adam, lr=0.01)
    whole = make()
    whole.fit(2, valid=False)
    make(CheckpointCB(tmp_path, '3ba', keep=None)).fit(2, valid=False)
    rest = make(CheckpointCB(tmp_path/'rest'))
    rest.fit(2, valid=False, resume=tmp_path/f'step-{step:08}.pt')
    for name in ['raw', *whole.averages]:
        assert same(copied(rest.averages.weights(name)), copied(whole.averages.weights(name)))


# --- EarlyStopper, ThresholdStopper


@pytest.mark.parametrize('scores', [[0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1], [0.1, 0.2]])
def test_the_fit_ends_three_epochs_after_the_last_improvement(scores):
    learn = quick(MetricsCB(accuracy=Scripted([*scores, *[scores[-1]]*30])), EarlyStoppingCB('accuracy', patience=3))
    learn.fit(30)
    assert learn.history[-1]['epoch'] + 1 == len(scores) + 3


@pytest.mark.differs('patience counts what is watched, rows of the table, so epochs: a batch has no row')
def test_patience_is_no_time():
    with pytest.raises(ValueError, match="patience must be a whole number"): EarlyStoppingCB(patience='3ba')


@pytest.mark.parametrize('scores, threshold, stops', [([0.1, 0.5, 0.6, 0.7], 0.6, 3), ([0.1, 0.2, 0.3], 0.6, 3)])
def test_the_fit_ends_at_a_threshold(scores, threshold, stops):
    cb = EarlyStoppingCB('accuracy', patience=None, stop_at=threshold)
    learn = quick(MetricsCB(accuracy=Scripted(scores)), cb)
    learn.fit(len(scores))
    assert learn.history[-1]['epoch'] + 1 == stops
