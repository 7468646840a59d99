"What Lightning tests of WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging"
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastswa.averaging.averages import Averages
from fastswa.averaging.rules import ema
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.callbacks.schedule import BatchSchedCB, EpochSchedCB
from fastswa.callbacks.steps import GradAccumCB
from fastswa.callbacks.basics import RecorderCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner
from fastswa.training.optim import param_groups
from helpers import Trail, copied, net, one, same, state

pytestmark = pytest.mark.filterwarnings('ignore:the model has BatchNorm')


class Stream(IterableDataset):
    "The samples of a data set, one after the other, without a length"
    def __init__(self, ds): self.ds = ds
    def __iter__(self): return iter(self.ds)


def data(stream=False, n=32, bs=4):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, generator=g), torch.randint(3, (n,), generator=g)
    ds = TensorDataset(x, y)
    dl = DataLoader(Stream(ds) if stream else ds, bs)
    return SimpleNamespace(train=dl, valid=dl)


def learner(*cbs, norm=True, dls=None, **kw):
    "8 batches an epoch, of which two make a step: 4 steps"
    return TrainLearner(net(norm=norm), dls or data(), F.cross_entropy, 0.1, [GradAccumCB(2), *cbs], **kw)


class Crash(Callback):
    "An error in the first batch of an epoch"
    def __init__(self, epoch): self.epoch = epoch
    def before_batch(self, learn):
        if learn.training and learn.epoch == self.epoch: raise RuntimeError('CRASH')


def resumed(make, epoch, folder, n_epochs):
    "A learner from `make(*cbs)` whose fit crashed in an epoch, and went on in a new one"
    with pytest.raises(RuntimeError, match='CRASH'): make(Crash(epoch), CheckpointCB(folder)).fit(n_epochs, valid=False)
    learn = make(CheckpointCB(folder))
    learn.fit(n_epochs, valid=False, resume=folder)
    return learn


def has_same_weights(a, b):
    assert list(a.averages) == list(b.averages)
    for name in ['raw', *a.averages]: assert same(copied(a.averages.weights(name)), copied(b.averages.weights(name)))
    assert same(state(a), state(b))


# --- WeightAveraging, EMAWeightAveraging


class Rows(Callback):
    "Snapshots in the average at the end of each epoch, and what each validation was of"
    order = 99
    def __init__(self, name): self.name = name
    def before_fit(self, learn): self.n, self.weights = [], []
    def after_epoch(self, learn):
        if learn.training: self.n.append(learn.averages[self.name].n)
        else: self.weights.append(learn.weights)


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('stream', [True, False])
def test_an_update_for_each_step(norm, stream):
    "Not for each batch of an accumulated step; a look at the average after each epoch; the model holds it in the end"
    learn = learner(EMACB(decay=0.999), rows := Rows('ema'), norm=norm, dls=data(stream))
    learn.fit(8)
    assert rows.n == [4*(i + 1) for i in range(8)] and learn.opt_steps == 32
    assert rows.weights == ['raw', 'ema']*8
    assert learn.weights == 'ema' and all(torch.equal(learn.model.state_dict()[k], t)
                                          for k, t in learn.averages['ema'].weights.items())


@pytest.mark.parametrize('epoch', [1, 3, 5])
def test_ema_after_a_crash_is_ema_without_one(epoch, tmp_path):
    whole = learner(EMACB(decay=0.9))
    whole.fit(8, valid=False)
    has_same_weights(resumed(lambda *cbs: learner(EMACB(decay=0.9), *cbs), epoch, tmp_path, 8), whole)


@pytest.mark.parametrize('epoch', [1, 3])
@pytest.mark.parametrize('kind', ['ema', 'swa'])
def test_a_stream_after_a_crash(kind, epoch, tmp_path):
    "Of a loader without a length"
    def make(*cbs):
        cb = EMACB(decay=0.9) if kind == 'ema' else SWACB('2ep', '1ep')
        return learner(cb, *cbs, dls=data(stream=True))
    whole = make()
    whole.fit(4, valid=False)
    has_same_weights(resumed(make, epoch, tmp_path, 4), whole)


def test_snapshots_at_chosen_epochs():
    "should_update in epochs 3, 5 and 7"
    learn = learner(SWACB('4ep', '2ep'), rows := Rows('swa'), trail := Trail())
    learn.fit(8)
    assert rows.n == [0, 0, 0, 1, 1, 2, 2, 3]
    mean = np.mean([trail.seen[4*i - 1]['0.weight'].double().numpy() for i in (4, 6, 8)], axis=0)
    np.testing.assert_allclose(learn.averages['swa'].weights['0.weight'].numpy(), mean, rtol=1e-5, atol=1e-7)


def test_the_model_may_be_made_after_the_callback():
    "configure_model: the average is of the model that is trained"
    cb = EMACB(decay=0.5)
    learn = learner(cb)
    learn.model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    learn.fit(1)
    assert cb.average.source is learn.model and cb.average.n == 4


@pytest.mark.parametrize('make', [partial(EMACB, 0.9), partial(SWACB, '0ba', '1ba')])
def test_loaders_on_the_model_are_not_copied(make):
    "Their average is a deepcopy of the module, which took loaders and data along"
    class Whole(DataLoader):
        def __deepcopy__(self, memo): raise AssertionError('a loader was copied')
    learn = learner(make())
    learn.model.train_dataloader = Whole(TensorDataset(torch.zeros(1)))
    learn.fit(1)
    assert learn.averages[learn.weights].n == 4


def by_step(n, **kw):
    "After which of `n` steps an average takes a snapshot, 4 steps in an epoch"
    averages, res = Averages(one(), steps_per_epoch=4, n_epochs=n//4), []
    average = averages.add('ema', ema(0.9), **kw)
    for step in range(1, n + 1):
        averages.step()
        if average.n > len(res): res.append(step)
    return res


@pytest.mark.parametrize('kw, at', [
    (dict(), [*range(1, 25)]), (dict(every='5ba'), [5, 10, 15, 20]), (dict(start='10ba'), [*range(10, 25)]),
    (dict(start='3ep'), [*range(12, 25)]), (dict(start='10ba', every='5ba'), [10, 15, 20]),
    (dict(start='2ep', every='1ep'), [8, 12, 16, 20, 24])])
def test_when_updates_are_taken(kw, at):
    "update_every_n_steps, update_starting_at_step, update_starting_at_epoch. Theirs starts at step 0 for the last"
    assert by_step(24, **kw) == at


@pytest.mark.parametrize('every', ['5ba', '1ba'])
def test_an_ema_with_an_interval_in_a_fit(every):
    learn = learner(EMACB(decay=0.95, every=every))
    learn.fit(8)
    assert learn.averages['ema'].n == 32//int(every[:-2])


@pytest.mark.parametrize('kw', [dict(every='2ba'), dict(start='10ba'), dict(start='3ep')])
def test_ema_options_survive_a_crash(kw, tmp_path):
    whole = learner(EMACB(decay=0.99, **kw))
    whole.fit(4, valid=False)
    has_same_weights(resumed(lambda *cbs: learner(EMACB(decay=0.99, **kw), *cbs), 2, tmp_path, 4), whole)


@pytest.mark.parametrize('decay', [0.9, 0.99, 0.999, 0.9999])
def test_the_average_by_each_decay(decay):
    learn = learner(EMACB(decay=decay), trail := Trail())
    learn.fit(3)
    first, *others = [s['0.weight'].double() for s in trail.seen]
    for w in others: first = first*decay + w*(1 - decay)
    torch.testing.assert_close(learn.averages['ema'].weights['0.weight'].double(), first, rtol=1e-5, atol=1e-7)


# --- StochasticWeightAveraging


def test_the_state_before_a_fit():
    "Arguments as they were given, and no average yet"
    cb = SWACB('0.1dur', '2ep', swa_lr=0.01, anneal='1ep')
    assert (cb.start, cb.every, cb.swa_lr, str(cb.anneal), cb.average) == ('0.1dur', '2ep', 0.01, '1ep', None)


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('stream', [True, False])
def test_swa_over_the_last_three_of_five_epochs(norm, stream):
    "A snapshot for each; the statistics of BatchNorm need no backward pass, and accumulation is as it was"
    backward = 0
    class Count(Callback):
        order = -1
        def after_backward(self, learn):
            nonlocal backward
            backward += 1
    learn = learner(SWACB('3ep', '1ep', swa_lr=0.1, anneal='1ep'), BNUpdateCB(), Count(), rows := Rows('swa'),
                    norm=norm, dls=data(stream))
    learn.fit(5)
    assert rows.n == [0, 0, 1, 2, 3] and backward == 5*8 and learn.opt_steps == 5*4
    assert learn.weights == 'swa' and learn.cbs[0].batches == 2
    if norm:
        z = learn.model[0](torch.cat([b[0] for b in learn.dls.train])).detach()
        torch.testing.assert_close(learn.model[1].running_mean, z.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('stream', [True, False])
@pytest.mark.parametrize('max_steps, snapshots', [(24, 5), (20, 4), (8, 1), (22, 4)])
def test_a_run_of_so_many_steps(max_steps, snapshots, stream):
    "max_epochs=-1: 4 steps an epoch, a snapshot after each from the second on; of a stream the cut one counts"
    snapshots += stream and max_steps % 4 > 0
    learn = learner(SWACB('2ep', '1ep', swa_lr=0.1, anneal='1ep'), BNUpdateCB(), dls=data(stream))
    learn.fit(max_steps=max_steps, valid=False)
    assert learn.opt_steps == max_steps and learn.averages['swa'].n == snapshots and learn.weights == 'swa'


SCHEDULES = dict(epoch=lambda: EpochSchedCB(partial(ExponentialLR, gamma=0.1)),
                 step=lambda: BatchSchedCB(partial(ExponentialLR, gamma=0.8)),
                 custom=lambda: EpochSchedCB(partial(LambdaLR, lr_lambda=lambda _: 0.1)))


@pytest.mark.parametrize('kind', SCHEDULES)
def test_swa_lr_comes_after_a_schedule(kind):
    "From where that has led, whether it steps after epochs or after steps"
    recorder = RecorderCB(lr=lambda cb: cb.pg['lr'])
    learn = learner(SCHEDULES[kind](), SWACB('2ep', '1ep', swa_lr=0.05, anneal='1ep'), recorder)
    learn.fit(4, valid=False)
    lrs = recorder.recs['lr']
    before = dict(epoch=0.1*0.1**2, step=0.1*0.8**8, custom=0.01)[kind]
    np.testing.assert_allclose(lrs[16:24], [0.05 + (before - 0.05)*(1 + np.cos(np.pi*i/8))/2 for i in range(8)])
    np.testing.assert_allclose(lrs[24:], 0.05)


@pytest.mark.parametrize('wrong', [dict(start='1.5dur'), dict(start='-1ep'), dict(start=-1), dict(swa_lr=[0.2, 1]),
                                   dict(swa_lr=0.), dict(swa_lr=-0.1), dict(every='0ep'), dict(anneal='x')])
def test_arguments_that_mean_nothing(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))): SWACB(**wrong)


@pytest.mark.differs('averaging from the beginning is a choice: the equal mean of a whole run, as a baseline')
def test_swa_may_start_at_once():
    "swa_epoch_start=0 is an error there"
    learn = learner(SWACB('0ba', '1ba'))
    learn.fit(2)
    assert learn.averages['swa'].n == 8


def test_each_group_has_its_rate():
    "A list of swa_lrs there; here one, times the multiplier of each group"
    def opt(params, lr): return SGD(param_groups(learn.model, {'0.*': dict(lr_mult=0.5), '3.*': dict(lr_mult=2.)}), lr)
    seen = RecorderCB(lr=lambda cb: {g['name']: g['lr'] for g in cb.learn.opt.param_groups})
    swa = SWACB('1ep', '1ep', swa_lr=0.3, anneal='0ep')
    learn = TrainLearner(net(), data(), F.cross_entropy, 0.1, [swa, seen], opt)
    learn.fit(2)
    assert [*seen.recs['lr'][0].values()] == [0.05, 0.1, 0.2]
    np.testing.assert_allclose([*seen.recs['lr'][-1].values()], [0.15, 0.3, 0.6])


@pytest.mark.parametrize('kind', [None, *SCHEDULES])
@pytest.mark.parametrize('epoch', [1, 3])
def test_swa_after_a_crash_is_swa_without_one(kind, epoch, tmp_path):
    "Before its start and after it, with and without a schedule"
    def make(*cbs):
        schedule = [SCHEDULES[kind]()] if kind else []
        return learner(*schedule, SWACB('3ep', '1ep', swa_lr=0.1, anneal='2ep'), BNUpdateCB(), *cbs)
    whole = make()
    whole.fit(5, valid=False)
    has_same_weights(resumed(make, epoch, tmp_path, 5), whole)


def test_a_crash_leaves_the_raw_weights():
    "In the midst of a look at the average too (theirs has swapped models then)"
    class InLook(Callback):
        def after_predict(self, learn):
            if learn.weights == 'ema': raise RuntimeError('CRASH')
    learn = learner(EMACB(decay=0.5), InLook(), trail := Trail())
    with pytest.raises(RuntimeError, match='CRASH'): learn.fit(2)
    assert learn.weights == 'raw' and torch.equal(learn.model[0].weight, trail.seen[-1]['0.weight'])
