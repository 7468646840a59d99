"What Lightning tests of EarlyStopping, ModelCheckpoint and GradientAccumulationScheduler"
import math
import os
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from fastswa.callbacks.schedule import BatchSchedCB, EpochSchedCB
from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.steps import GradAccumCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.checkpoint.archive import read_checkpoint
from fastswa.training.events import Callback, CancelEpochException
from fastswa.training.learner import MomentumLearner, TrainLearner
from helpers import AtEpoch, Losses, Scripted, copied, linear, quick, regression, same, state

# --- EarlyStopping


def last_epoch(losses, *cbs, n=10, **kw):
    "The last epoch of a fit whose validation has these losses"
    learn = quick(Losses([*losses, *[losses[-1]]*n]), *cbs, EarlyStoppingCB(**kw))
    learn.fit(n)
    return learn.history[-1]['epoch']


@pytest.mark.parametrize('losses, patience, stops', [
    ([6, 5, 5, 5, 5, 5], 3, 4), ([6, 5, 4, 4, 3, 3], 1, 3), ([6, 5, 6, 5, 5, 5], 3, 4),
    ([8, 4, 2, 3, 4, 5, 8, 10], 3, 5)])
def test_the_fit_ends_when_patience_is_exhausted(losses, patience, stops):
    assert last_epoch(losses, patience=patience) == stops


@pytest.mark.parametrize('validate', [True, False])
@pytest.mark.parametrize('losses, patience, stops', [([6, 5, 5, 5, 5, 5], 3, 4), ([6, 5, 4, 4, 3, 3], 1, 3),
                                                     ([6, 5, 6, 5, 5, 5], 3, 4)])
def test_the_row_of_training_can_be_watched(losses, patience, stops, validate):
    "check_on_train_epoch_end, with validation and without it"
    learn = quick(Losses([*losses, *[losses[-1]]*5], 'train'), EarlyStoppingCB('train/loss', patience=patience))
    learn.fit(10, valid=validate)
    assert learn.history[-1]['epoch'] == stops


@pytest.mark.parametrize('stop_at, diverged_at, losses, stops', [
    (None, None, [8, 4, 2, 3, 4, 5, 8, 10], 5), (2.9, None, [9, 8, 7, 6, 5, 6, 4, 3, 2, 1], 8),
    (None, 15.9, [9, 4, 2, 16, 32, 64], 3)])
@pytest.mark.parametrize('sign', [1, -1])
def test_thresholds(stop_at, diverged_at, losses, stops, sign):
    "stopping_threshold, divergence_threshold; where small is good, and where large is"
    kw = {k: v and sign*v for k, v in dict(stop_at=stop_at, diverged_at=diverged_at).items()}
    assert last_epoch([sign*v for v in losses], mode='min' if sign > 0 else 'max', **kw) == stops


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_validation_that_is_not_finite(bad):
    "check_finite=True: a bound ends the fit there; without one it is an epoch that is not better, and patience decides"
    assert last_epoch([4, 3, bad, 2, 1], n=5, diverged_at=1e9) == 2
    assert last_epoch([4, 3, bad, 2, 1], n=5) == 4
    assert last_epoch([4, 3, bad], patience=3) == 4


@pytest.mark.parametrize('min_epochs, patience, stops', [(0, 1, 1), (2, 1, 1), (3, 1, 2), (6, 1, 5), (6, 7, 7),
                                                         (20, 1, 9), (1, 3, 3), (4, 3, 3), (5, 3, 4)])
def test_a_least_number_of_epochs(min_epochs, patience, stops):
    "The loss never gets better. (min_steps: a multiple of the steps of an epoch)"
    assert last_epoch([1.]*10, min_epochs=min_epochs, patience=patience) == stops


@pytest.mark.parametrize('losses, kw, why', [
    ([10.]*10, dict(patience=2), 'has not been better than 10 of epoch 0 for 2 epochs'),
    ([5., 3., 1., 0.5], dict(stop_at=0.6), 'loss is 0.5 in epoch 3, as good as stop_at=0.6'),
    ([1., 2., 5., 10.], dict(diverged_at=8.), 'loss is 10 in epoch 3, worse than diverged_at=8'),
    ([5., 4., 3.], dict(patience=3), None)])
def test_the_reason(losses, kw, why, capsys):
    "In words, on the callback and in the output; none where the fit came to its end"
    n = 10 if why else len(losses)
    learn = quick(Losses([*losses, *[losses[-1]]*n]), cb := EarlyStoppingCB(**kw))
    learn.fit(n)
    if why is None: assert cb.reason is None and cb.stopped_epoch is None
    else: assert why in cb.reason and cb.reason in capsys.readouterr().out
    assert cb.stopped_epoch == (learn.history[-1]['epoch'] if why else None)


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('rows', ['', 'train/'])
def test_of_several_the_first_to_be_exhausted_ends_the_fit(first, rows):
    "In either order, by rows of validation and of training"
    cbs = [EarlyStoppingCB(f'{rows}loss', patience=2), EarlyStoppingCB(f'{rows}flat', patience=3, mode='min')]
    losses = Losses([8, 4, 2, 3, 4, 5, 8, 10], 'train' if rows else 'eval')
    learn = quick(MetricsCB(flat=Scripted([0.]*20)), losses, *cbs[::1 if first else -1])
    learn.fit(8)
    assert learn.history[-1]['epoch'] == 3


def test_a_callback_can_be_pickled():
    "Before a fit and after one"
    cb = EarlyStoppingCB(patience=2)
    assert pickle.loads(pickle.dumps(cb)).patience == 2
    quick(Losses([1, 2, 2, 2]), cb).fit(4)
    assert pickle.loads(pickle.dumps(cb)).state_dict() == cb.state_dict()


def test_a_mode_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="mode must be.*got 'unknown_option'"): EarlyStoppingCB(mode='unknown_option')
    with pytest.raises(ValueError, match="mode must be.*got 'unknown_option'"):
        CheckpointCB('x', best='loss', mode='unknown_option')


def test_it_looks_once_an_epoch():
    "Wrong: also at the row of another set of weights, or in training"
    looks = []
    cb = EarlyStoppingCB()
    better = cb.watched.better
    cb.watched.better = lambda *args: looks.append(args) or better(*args)
    quick(cb).fit(4)
    assert len(looks) == 4


@pytest.mark.parametrize('shape', [(), (1,), (1, 1, 1)])
def test_a_score_may_be_a_tensor_of_one_element(shape):
    "Their squeeze()"
    scores = Scripted([torch.full(shape, v) for v in (1., 2., 2., 2., 2.)])
    learn = quick(MetricsCB(score=scores), EarlyStoppingCB('score', patience=2, mode='max'))
    learn.fit(5)
    assert learn.history[-1]['epoch'] == 3 and learn.history[-1]['score'] == 2.


def test_the_state_is_in_the_checkpoint_and_comes_back(tmp_path):
    losses = [3., 2., 2.5, 2.5, 2.5, 2.5]
    def make(): return quick(Losses(losses), EarlyStoppingCB(patience=3), CheckpointCB(tmp_path))
    first = make()
    first.fit(6, cbs=AtEpoch(4))
    whole = first.cbs[1].state_dict()
    learn = make()
    learn.load(tmp_path)
    assert learn.cbs[1].state_dict() == whole and (whole['best'], whole['best_epoch']) == (2., 1)


def test_a_checkpoint_beyond_the_end_of_the_fit(tmp_path):
    "MisconfigurationException there; here: an error, and nothing is trained"
    quick(CheckpointCB(tmp_path)).fit(3)
    learn = quick(CheckpointCB(tmp_path))
    with pytest.raises(ValueError, match='epoch'): learn.fit(1, resume=tmp_path)
    assert learn.history == [] and same(state(learn), copied(linear().state_dict()))


# --- ModelCheckpoint


def files(folder, best=True): return sorted(p.name for p in folder.glob('*.pt') if best or p.name != 'best.pt')


def named(*steps): return [f'step-{s:08}.pt' for s in steps]


@pytest.mark.parametrize('kind', ['plateau', 'step'])
@pytest.mark.parametrize('watched, validate', [('loss', True), ('train/loss', True), ('train/loss', False)])
def test_a_checkpoint_holds_score_epoch_step_and_schedule(kind, watched, validate, tmp_path):
    "As they are after the epoch that it is of; by the row of validation, or of training, with validation or without"
    rows = 'train' if '/' in watched else 'eval'
    sched = dict(plateau=partial(ReduceLROnPlateau, factor=0.5, patience=0),
                 step=partial(StepLR, step_size=1, gamma=2.))
    losses = [3., 4., 5.]
    learn = quick(Losses(losses, rows), EpochSchedCB(sched[kind], watched), lr=1e-3)
    learn.fit(3, valid=validate, cbs=CheckpointCB(tmp_path, keep=None, best=watched))
    for epoch, name in enumerate(named(7, 14, 21)):
        saved = read_checkpoint(tmp_path/name)
        found = [r for r in saved['history'] if r['train'] == rows]
        assert [r['loss'] for r in found] == losses[:epoch + 1] and saved['opt_steps'] == 7*(epoch + 1)
        now = next(cb['state']['now'] for cb in saved['callbacks'] if cb['state'].get('now'))
        expected = 2e-3*2**epoch if kind == 'step' else 1e-3*0.5**epoch
        assert now['_last_lr'] == pytest.approx([expected])


@pytest.mark.parametrize('keep, left', [(None, (7, 14)), (1, (14,)), (2, (7, 14))])
def test_how_many_stay(keep, left, tmp_path):
    quick(CheckpointCB(tmp_path, keep=keep)).fit(2)
    assert files(tmp_path) == named(*left)


@pytest.mark.parametrize('wrong', [dict(keep=0), dict(keep=-3), dict(every='-3ep'), dict(every='-3ba'),
                                   dict(every='0ba'), dict(every='x')])
def test_numbers_that_mean_nothing(wrong, tmp_path):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))): CheckpointCB(tmp_path, **wrong)


def test_the_default_is_every_epoch(tmp_path):
    quick(CheckpointCB(tmp_path, keep=None)).fit(3)
    assert files(tmp_path) == named(7, 14, 21)


@pytest.mark.parametrize('every', [1, 2, 3])
def test_every_so_many_epochs(every, tmp_path):
    "And once more when the fit ends, which Lightning asks save_last for"
    quick(CheckpointCB(tmp_path, f'{every}ep', keep=None)).fit(5)
    assert files(tmp_path) == named(*sorted({*range(7*every, 36, 7*every), 35}))


def test_every_so_many_steps(tmp_path):
    quick(CheckpointCB(tmp_path, '4ba', keep=None)).fit(2)
    assert files(tmp_path) == named(4, 8, 12, 14)


def test_there_is_one_interval(tmp_path):
    "A combination of several is an error"
    with pytest.raises(TypeError): CheckpointCB(tmp_path, every_n_epochs=2, every_n_train_steps=1)
    with pytest.raises(TypeError): CheckpointCB(tmp_path, every='1ep', every_n_train_steps=1)


@pytest.mark.differs('times are steps, epochs or shares of the fit, so that two runs write alike: no minutes')
def test_there_is_no_interval_in_minutes(tmp_path):
    with pytest.raises(ValueError, match="every must be a number with a unit, such as '200ba'"):
        CheckpointCB(tmp_path, '1min')


def test_the_last_holds_the_newest(tmp_path):
    "save_last: the newest file is that of the end; one more of the same step is not written"
    learn = quick(CheckpointCB(tmp_path, '3ba'))
    learn.fit(3)
    assert files(tmp_path) == named(15, 18, 21)
    assert same(read_checkpoint(tmp_path/named(21)[0])['weights']['raw'], state(learn))
    new = quick()
    new.load(tmp_path)      # of a folder the newest
    assert same(state(new), state(learn))


@pytest.mark.parametrize('mode', ['min', 'max'])
def test_nan_is_never_the_best(mode, tmp_path):
    "Neither as the first value nor later"
    losses = [math.nan, *([8., 7., 5.] if mode == 'min' else [5., 7., 8.]), math.nan]
    quick(Losses(losses), cb := CheckpointCB(tmp_path, best='loss', mode=mode)).fit(5)
    assert (cb.best, cb.best_epoch) == (losses[3], 3)


@pytest.mark.differs('a run in which nothing was ever better has no best: None, where Lightning says infinity')
def test_without_a_number_there_is_no_best(tmp_path):
    for mode in 'min', 'max':
        quick(Losses([math.nan]*2), cb := CheckpointCB(tmp_path/mode, best='loss', mode=mode)).fit(2)
        assert cb.best is None and not (tmp_path/mode/'best.pt').exists()


@pytest.mark.parametrize('times', [1, 4])
def test_a_finished_run_resumed_does_nothing(times, tmp_path):
    "No step, no file, no row, however often"
    quick(CheckpointCB(tmp_path)).fit(2)
    before, stamp = files(tmp_path), (tmp_path/named(14)[0]).stat().st_mtime_ns
    for _ in range(times):
        learn = quick(CheckpointCB(tmp_path))
        learn.fit(2, resume=tmp_path)
        assert learn.opt_steps == 14 and len(learn.history) == 4
    assert files(tmp_path) == before and (tmp_path/named(14)[0]).stat().st_mtime_ns == stamp


def test_validation_leaves_files_and_counts_alone(tmp_path):
    learn = quick(CheckpointCB(tmp_path))
    learn.fit(1)
    for _ in range(3): learn.validate()
    assert files(tmp_path) == named(7) and learn.opt_steps == 7


def test_several_of_them(tmp_path):
    "Each to its folder; two to one folder is an error before training"
    quick(CheckpointCB(tmp_path/'a'), CheckpointCB(tmp_path/'b', '3ba', keep=1)).fit(1)
    assert files(tmp_path/'a') == named(7) and files(tmp_path/'b') == named(7)
    with pytest.raises(ValueError, match='two CheckpointCB write to'):
        quick(CheckpointCB(tmp_path/'c'), CheckpointCB(tmp_path/'c')).fit(1)


@pytest.mark.differs('a run does not write among the files of another, with -v1 in the names: a folder for each')
def test_a_second_run_needs_another_folder(tmp_path):
    quick(CheckpointCB(tmp_path)).fit(1)
    before = files(tmp_path)
    with pytest.raises(ValueError, match='give another folder'): quick(CheckpointCB(tmp_path)).fit(1)
    assert files(tmp_path) == before


def test_a_second_fit_of_the_same_learner_goes_on(tmp_path):
    learn = quick(CheckpointCB(tmp_path, keep=None))
    learn.fit(1)
    learn.fit(2)
    assert files(tmp_path) == named(7, 14, 21)


@pytest.mark.differs('what is watched is validated in each epoch: a missing row is an error, not a wait without end')
def test_a_watched_row_is_there_in_each_epoch(tmp_path):
    "check_val_every_n_epoch=2. A checkpoint that watches nothing does not mind"
    class EverySecond(Callback):
        def before_epoch(self, learn):
            if not learn.training and learn.epoch % 2 == 0: raise CancelEpochException
    for cb in EarlyStoppingCB(), CheckpointCB(tmp_path/'best', best='loss'):
        with pytest.raises(ValueError, match='does not validate'): quick(EverySecond(), cb).fit(4)
    quick(EverySecond(), CheckpointCB(tmp_path/'all', keep=None)).fit(4)
    assert files(tmp_path/'all') == named(7, 14, 21, 28)


def test_the_state_of_the_callback(tmp_path):
    "Best and position; a folder of another name is no part of it"
    quick(Losses([2., 3.]), a := CheckpointCB(tmp_path/'a', best='loss')).fit(2)
    b = CheckpointCB(tmp_path/'b', best='loss')
    quick(b).fit(0)
    b.load_state_dict(a.state_dict())
    assert (b.best, b.best_epoch, b.path) == (2., 0, tmp_path/'b')


def test_going_on_elsewhere_leaves_the_old_folder(tmp_path):
    quick(CheckpointCB(tmp_path/'a', '1ba', keep=2)).fit(1)
    before = files(tmp_path/'a')
    quick(CheckpointCB(tmp_path/'b', '1ba', keep=2)).fit(2, resume=tmp_path/'a')
    assert files(tmp_path/'a') == before == named(6, 7) and files(tmp_path/'b') == named(13, 14)


@pytest.mark.differs('the newest so many stay, whoever wrote them, without one from which a run went on')
def test_going_on_in_the_same_folder_counts_what_is_there(tmp_path):
    quick(CheckpointCB(tmp_path, '2ba', keep=2), AtEpoch(1)).fit(3)
    assert files(tmp_path) == named(6, 7)
    quick(CheckpointCB(tmp_path, '2ba', keep=2)).fit(3, resume=tmp_path)
    assert files(tmp_path) == named(20, 21)


def test_a_folder_in_the_home_of_the_user(tmp_path, monkeypatch):
    "Wrong: a folder that is called ~"
    monkeypatch.setenv('HOME', str(tmp_path))
    assert CheckpointCB('~/checkpoints').path == tmp_path/'checkpoints'
    quick(CheckpointCB('~/checkpoints')).fit(1)
    quick().load('~/checkpoints')
    assert files(tmp_path/'checkpoints') == named(7)


@pytest.mark.parametrize('epoch', [1, 2])
def test_a_loader_without_a_length_goes_on(epoch, tmp_path):
    "Lightning#20565: saved after each step, resumed, and as without a break"
    class Stream:
        def __init__(self, dl): self.dl = dl
        def __iter__(self): return iter(self.dl)
    def make(*cbs):
        dls = regression()
        dls.train, dls.valid = Stream(dls.train), Stream(dls.valid)
        return TrainLearner(linear(), dls, F.mse_loss, 0.1, cbs)
    whole = make()
    whole.fit(4)
    make(CheckpointCB(tmp_path, '1ba'), AtEpoch(epoch)).fit(4)
    rest = make(CheckpointCB(tmp_path, '1ba'))
    rest.fit(4, resume=tmp_path)
    assert same(state(rest), state(whole)) and rest.opt_steps == 28


def test_without_validation_the_end_is_saved_too(tmp_path):
    quick(CheckpointCB(tmp_path, '1dur')).fit(2, valid=False)
    assert files(tmp_path) == named(14)


@pytest.mark.parametrize('k, kept', [(1, []), (2, [14, 28]), (3, [7, 14, 28])])
def test_the_best_so_many_stay(k, kept, tmp_path):
    "save_top_k, in the order of their scores: 3, 1, 4, 2"
    quick(Losses([3., 1., 4., 2.]), cb := CheckpointCB(tmp_path, keep=1, best='loss', keep_best=k)).fit(4)
    assert files(tmp_path) == [*(f'best-{s:08}.pt' for s in kept), 'best.pt', *named(28)]
    assert [value for value, *_ in cb.top] == [1., 2., 3.][:k]
    assert read_checkpoint(tmp_path/'best.pt')['opt_steps'] == 14


@pytest.mark.parametrize('wrong', [0, -1, 1.5])
def test_no_number_of_best_ones(wrong, tmp_path):
    with pytest.raises(ValueError, match='keep_best'): CheckpointCB(tmp_path, best='loss', keep_best=wrong)


class Broken:
    "A loader that fails after its third batch"
    def __init__(self, batches): self.batches = batches
    def __len__(self): return len(self.batches)
    def __iter__(self):
        yield from self.batches[:3]
        raise RuntimeError('Trouble!')


def test_an_error_between_two_batches_leaves_a_checkpoint(tmp_path):
    "save_on_exception: from which the run goes on as if nothing had happened"
    whole, learn = quick(), quick(CheckpointCB(tmp_path, '7ep'))
    whole.fit(2)
    learn.dls.train = Broken(learn.dls.train)
    with pytest.raises(RuntimeError, match='Trouble!'): learn.fit(2)
    assert files(tmp_path) == named(3)
    rest = quick(CheckpointCB(tmp_path, '7ep'))
    rest.fit(2, resume=tmp_path)
    assert same(state(rest), state(whole))


@pytest.mark.differs('a half-finished batch is no place to go on from: after an error within one the last file stands')
def test_an_error_within_a_batch_leaves_none(tmp_path):
    class Trouble(Callback):
        def after_backward(self, learn):
            if learn.opt_steps == 9: raise RuntimeError('Trouble!')
    with pytest.raises(RuntimeError, match='Trouble!'): quick(CheckpointCB(tmp_path, '4ba'), Trouble()).fit(2)
    assert files(tmp_path) == named(4, 8)


@pytest.mark.parametrize('every, newest', [('1ba', 14), ('4ba', 14), ('5ba', 14), ('1ep', 14)])
def test_of_a_folder_the_newest_is_found(every, newest, tmp_path):
    "By its number, among files of other names. Wrong: by its place in the alphabet, or the time of the file"
    learn = quick(CheckpointCB(tmp_path, every, keep=None, best='loss'))
    learn.fit(2)
    (tmp_path/'zz.pt').write_text('another file')
    os.utime(tmp_path/files(tmp_path)[1])
    new = quick()
    new.load(tmp_path)
    assert new.history == learn.history and same(state(new), state(learn))


@pytest.mark.parametrize('kind', ['file', 'link', 'dangling'])
def test_what_is_in_the_place_of_the_best_is_replaced(kind, tmp_path):
    "A better one comes there, and what a link led to stays"
    other = tmp_path/'other'
    other.write_text('mine')
    learn = quick(losses := Losses([3., 2.]), CheckpointCB(tmp_path/'a', best='loss'))
    learn.fit(1)
    if kind != 'file':
        (tmp_path/'a'/'best.pt').unlink()
        (tmp_path/'a'/'best.pt').symlink_to(other if kind == 'link' else tmp_path/'none')
    losses.values = [1.]
    learn.fit(1)
    assert read_checkpoint(tmp_path/'a'/'best.pt')['opt_steps'] == 14 and other.read_text() == 'mine'


def test_a_checkpoint_callback_can_be_pickled(tmp_path):
    cb = CheckpointCB(tmp_path, best='loss')
    again = pickle.loads(pickle.dumps(cb))
    assert (again.path, again.keep, again.watched.name) == (tmp_path, 3, 'loss')


def test_each_score_is_that_of_its_epoch(tmp_path):
    "current_score, saved in each file"
    quick(Losses([0.1, 0.2, 0.3]), CheckpointCB(tmp_path, keep=None, best='loss', mode='min')).fit(3)
    saved = [read_checkpoint(tmp_path/n)['history'] for n in named(7, 14, 21)]
    assert [h[-1]['loss'] for h in saved] == [0.1, 0.2, 0.3]


# --- gradient accumulation


class Zeros(Callback):
    "How often the optimizer stepped and gradients were cleared"
    def before_fit(self, learn):
        self.n = 0
        clear = learn.opt.zero_grad
        def count(*args, **kw):
            self.n += 1
            clear(*args, **kw)
        learn.opt.zero_grad = count
    def cleanup_fit(self, learn): del learn.opt.zero_grad


@pytest.mark.parametrize('k', [1, 2, 3])
def test_gradients_are_cleared_once_a_step(k):
    "20 batches: the last, shorter window is a step too"
    learn = TrainLearner(linear(), regression(20), F.mse_loss, 0.1, [GradAccumCB(k), zeros := Zeros()])
    learn.fit(1)
    assert zeros.n == learn.opt_steps == math.ceil(20/k)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_accumulated_batches_are_one_large_batch(k):
    "The weights after a fit by hand, on batches put together"
    model, dls = linear(), regression(20)
    learn = TrainLearner(linear(), regression(20), F.mse_loss, 0.1, GradAccumCB(k))
    learn.fit(1, valid=False)
    opt = SGD(model.parameters(), 0.1)
    for i in range(0, 20, k):
        x, y = (torch.cat(o) for o in zip(*dls.train[i:i + k]))
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        opt.step()
    torch.testing.assert_close(learn.model.weight, model.weight)


@pytest.mark.parametrize('scheduling, steps', [({0: 1, 1: 2, 3: 4}, 10 + 5 + 5 + 3), ({0: 2, 2: 1}, 5 + 5 + 10 + 10)])
def test_another_number_from_an_epoch_on(scheduling, steps):
    "By a fit for each number, with its callback; the optimizer is the same one"
    learn = TrainLearner(linear(), regression(10), F.mse_loss, 0.1)
    epochs = [*scheduling, 4]
    for first, end in zip(epochs, epochs[1:]): learn.fit(end - first, cbs=GradAccumCB(scheduling[first]))
    assert learn.opt_steps == steps


@pytest.mark.parametrize('wrong', [0, -1, '2', 1.5, {1: 2}])
def test_a_number_that_is_none_is_an_error(wrong):
    with pytest.raises((TypeError, ValueError), match='batches must be'): GradAccumCB(wrong)


def test_two_of_them_are_an_error():
    with pytest.raises(ValueError, match='several GradAccumCB'): quick(GradAccumCB(2), GradAccumCB(2)).fit(1)


def test_a_learner_that_keeps_its_gradients_is_an_error():
    "Their manual optimization"
    with pytest.raises(ValueError, match='GradAccumCB does not go with MomentumLearner'):
        MomentumLearner(linear(), regression(), F.mse_loss, 0.1, GradAccumCB(2)).fit(1)


def test_schedules_count_the_steps_that_are_taken():
    "10 batches by two: a schedule of the whole fit makes 5 steps an epoch"
    learn = TrainLearner(linear(), regression(10), F.mse_loss, 0.1, [GradAccumCB(2), sched := BatchSchedCB(
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1))])
    learn.fit(2)
    assert sched.schedo.total_steps == 10 == sched.schedo.last_epoch
