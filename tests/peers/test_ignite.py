"What ignite tests of its handlers: EMAHandler, EarlyStopping, Checkpoint, TerminateOnNan"
import math
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from fastswa.averaging.average import Average
from fastswa.averaging.averages import Averages
from fastswa.averaging.rules import ema
from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.schedule import EpochSchedCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.checkpoint.archive import read_checkpoint
from fastswa.training.events import Callback
from helpers import AtEpoch, Losses, Scripted, copied, learner, net, one, quick, same

# --- EMAHandler


@pytest.mark.parametrize('momentum', [-1, 2])
def test_a_momentum_beyond_0_and_1_is_an_error(momentum):
    with pytest.raises(ValueError, match=f'between 0 and 1; got {1 - momentum}'): ema(1 - momentum)


@pytest.mark.parametrize('warmup', [-1, 2, 'linear'])
def test_a_warm_up_that_is_none_is_an_error(warmup):
    with pytest.raises(ValueError, match="warmup must be None, 'ratio' or 'power'"): ema(0.9, warmup=warmup)


@pytest.mark.parametrize('model', ['Invalid Model', None, nn.Linear])
def test_what_is_no_module_is_an_error(model):
    "ignite's ValueError is a TypeError here"
    with pytest.raises(TypeError, match='module'): Average(model)


def test_weights_can_be_loaded_into_the_average():
    average, other = Average(one(1.)), one(2.)
    average.update()
    average.load_state_dict(dict(average.state_dict(), weights=other.state_dict()))
    assert average.weights['weight'] == 2 and average.source.weight == 1


@pytest.mark.parametrize('n', range(1, 5))
def test_without_a_warm_up_the_weight_is_constant(n): assert ema(0.998)(n) == 1 - 0.998


def test_the_weight_goes_from_one_value_to_another():
    "Their linear warm-up is a function of the number of updates here: at its ends and between"
    def momentum(n): return 0.1 + 0.1*min(n/4, 1)
    average, mean = Average(model := one()), 0.
    average.update()
    for n in range(1, 8):
        nn.init.constant_(model.weight, n)
        average.update()
        mean += momentum(n)*(n - mean)
    assert (momentum(0), momentum(4)) == (0.1, 0.2)
    by_rule = Average(model, momentum)
    nn.init.zeros_(model.weight)
    by_rule.update()
    for n in range(1, 8):
        nn.init.constant_(model.weight, n)
        by_rule.update()
    np.testing.assert_allclose(by_rule.weights['weight'].item(), mean, rtol=1e-6)


def test_statistics_of_batchnorm_are_those_of_the_model_if_they_are_left_out():
    "handle_buffers='copy', which is ignite's default; ours averages them, since the raw ones would not fit"
    model = nn.Sequential(nn.BatchNorm2d(2))
    left_out, average = (Average(model, ema(0.5), exclude=e) for e in ('*.running_*', None))
    torch.manual_seed(0)
    for _ in range(4):
        model(torch.rand(4, 2, 8, 8))
        for o in left_out, average: o.update()
        assert all(map(torch.equal, left_out.module().buffers(), model.buffers()))
    assert not torch.allclose(average.weights['0.running_mean'], model[0].running_mean)


def test_buffers_of_other_kinds_are_those_of_the_model():
    model = nn.Sequential(one(), nn.Identity())
    model.register_buffer('scale', torch.tensor(0.))
    average = Average(model, ema(0.5))
    for _ in range(4):
        model.scale += 1
        average.update()
    assert average.module().scale == 4


def test_buffers_can_be_averaged():
    "handle_buffers='update', by name"
    model = nn.Sequential(one())
    model.register_buffer('scale', torch.tensor(0.))
    average = Average(model, ema(0.5), include=['*', 'scale'])
    for _ in range(3):
        model.scale += 1
        average.update()
    assert average.module().scale == 0.25*1 + 0.25*2 + 0.5*3


def test_buffers_can_be_averaged_by_halves():
    "ignite's numbers: 1, 2, 3, 4, 5"
    model = nn.Sequential(one())
    model.register_buffer('scale', torch.tensor(1.))
    average = Average(model, lambda n: 0.5, include=['*', 'scale'])
    average.update()
    for _ in range(4):
        model.scale += 1
        average.update()
    assert average.module().scale == 4.0625


def test_a_buffer_that_there_is_not_is_an_error():
    "handle_buffers='invalid'"
    with pytest.raises(ValueError, match="'invalid' matches no weights"): Average(net(), include=['*', 'invalid'])


@pytest.mark.parametrize('every, expected', [(1, 4.0625), (2, 3.5)])
def test_weights_1_to_5_by_halves(every, expected):
    "By hand: the average of 1, 2, 3, 4, 5, and of 1, 3, 5, half of it new each time"
    averages = Averages(model := one(1.))
    average = averages.add('ema', lambda n: 0.5, every=f'{every}ba')
    average.update()
    for _ in range(4):
        with torch.no_grad(): model.weight += 1
        averages.step()
    assert average.weights['weight'].item() == expected and model.weight == 5
    assert average.weights['weight'].device == model.weight.device


def test_two_averages_of_two_models_at_two_intervals():
    models = one(1.), one(1.)
    both = [Averages(m) for m in models]
    found = [o.add('ema', lambda n: 0.5, every=f'{k}ba') for o, k in zip(both, (1, 2))]
    for average in found: average.update()
    for _ in range(4):
        with torch.no_grad():
            for m in models: m.weight += 1
        for o in both: o.step()
    assert [a.weights['weight'].item() for a in found] == [4.0625, 3.5]


@pytest.mark.parametrize('every, expected', [('1ep', 3.5), ('2ep', 4.), ('2ba', 3.5), ('1ba', 4.0625)])
def test_an_average_by_epochs(every, expected):
    "attach(event=EPOCH_COMPLETED), EPOCH_COMPLETED(every=2): two batches an epoch, weights 1 to 5, by halves"
    averages = Averages(model := one(1.), steps_per_epoch=2, n_epochs=2)
    average = averages.add('ema', lambda n: 0.5, every=every)
    if every != '2ep': average.update()
    else: average.load_state_dict(dict(average.state_dict(), n=1, weights=one(3.).state_dict()))
    for _ in range(4):
        with torch.no_grad(): model.weight += 1
        averages.step()
    assert average.weights['weight'].item() == expected


def test_two_averages_need_two_names():
    averages = Averages(one())
    averages.add('ema', ema(0.9))
    with pytest.raises(ValueError, match="two averages are called 'ema': give one of them another name"):
        averages.add('ema', ema(0.99))


@pytest.mark.parametrize('wrap', [nn.DataParallel, nn.Sequential])
def test_a_wrapped_model_is_averaged(wrap):
    "DataParallel is looked through, so that the names are those of the model itself"
    average = Average(wrapped := wrap(one(1.)), ema(0.5))
    for _ in range(2):
        average.update()
        with torch.no_grad(): next(wrapped.parameters()).add_(1)
    assert list(average.weights) == (['weight'] if wrap is nn.DataParallel else ['0.weight'])
    assert next(iter(average.weights.values())) == 1.5


# --- EarlyStopping


def epochs_trained(scores, n=10, **kw):
    "How many epochs a fit takes that watches these scores, the higher the better"
    learn = quick(MetricsCB(score=Scripted([*scores, *[scores[-1]]*n])), EarlyStoppingCB('score', mode='max', **kw))
    learn.fit(n)
    return len(learn.history)//2


@pytest.mark.parametrize('kw', [dict(patience=-1), dict(patience=2, min_delta=-0.1), dict(patience=1.5),
                                dict(mode='up')])
def test_arguments_of_early_stopping(kw):
    "In the words of the argument, when it is given"
    with pytest.raises((ValueError, TypeError), match=next(reversed(kw))): EarlyStoppingCB(**kw)


@pytest.mark.parametrize('scores, patience, stops', [
    ([1.0, 0.8, 0.88], 2, 3), ([42.], 1, 2), ([1.0, 0.8, 1.2, 1.3, 1.4, 1.5], 2, None),
    ([1.0, 0.8, 1.2, 1.5, 0.9, 1.0, 0.99, 1.1, 0.9], 3, 7), ([0.047], 4, 5),
    ([1.0, 0.8, 1.2, 1.23, 0.9, 1.0, 1.1, 1.253, 1.26, 1.2], 5, None)])
def test_when_the_fit_ends(scores, patience, stops):
    "After `patience` epochs that are not better than the best. Wrong: one more, or counting from the start"
    n = len(scores) if stops is None else 10
    assert epochs_trained(scores, n, patience=patience) == (stops or n)


def test_small_improvements_do_not_count():
    assert epochs_trained([1.0, 2.0, 2.01, 3.0, 3.01, 3.02], patience=2, min_delta=0.1) == 6


def test_small_improvements_add_up():
    "cumulative_delta=True: against the best that counted. 0, 0.3, 0.6 with 0.4 to be more: the third is"
    assert epochs_trained([0., 0.3, 0.6, 0.6], n=4, patience=2, min_delta=0.4) == 4


@pytest.mark.parametrize('mode, scores', [('max', [1.0, 2.0, 2.1, 3.0, 3.2, 3.25]), ('min', [1.0, 0.8, 0.79, 0.78])])
def test_improvements_by_a_share_of_the_best(mode, scores):
    "threshold_mode='rel' with 0.1. Wrong: 0.1 itself, by which 2.1 and then 3.2 would be better"
    losses = [*scores, *[scores[-1]]*5]
    learn = quick(Losses(losses), EarlyStoppingCB(patience=2, min_delta='10%', mode=mode))
    learn.fit(8)
    assert learn.history[-1]['epoch'] == len(scores) - 1


@pytest.mark.parametrize('losses, kw, stops', [([1.0, 1.2, 0.9], {}, None),
                                               ([1.1, 0.95, 0.94, 0.93], dict(min_delta=0.1), 4)])
def test_small_is_good(losses, kw, stops):
    "mode='min', with a threshold and without"
    learn = quick(Losses([*losses, 1.]), EarlyStoppingCB(patience=2, **kw))
    learn.fit(len(losses))
    assert len(learn.history) == 2*(stops or len(losses))


@pytest.mark.differs('an improvement is measured against the best that counted, as their cumulative_delta=True')
def test_small_improvements_do_not_move_the_best():
    "Their default compares with the epoch before, and ends here after the third"
    assert epochs_trained([0., 0.3, 0.6], n=3, patience=2, min_delta=0.4) == 3
    cb = EarlyStoppingCB('score', patience=2, min_delta=0.4, mode='max')
    quick(MetricsCB(score=Scripted([0., 0.3, 0.6])), cb).fit(3)
    assert (cb.best, cb.best_epoch) == (0.6, 2)


def test_early_stopping_goes_on_from_its_state(tmp_path):
    "A run that is resumed after two of the three bad epochs ends after the third"
    losses = [1., 2., 2., 2., 2., 2., 2.]
    quick(Losses(losses), EarlyStoppingCB(patience=3), CheckpointCB(tmp_path), AtEpoch(3)).fit(7)
    learn = quick(Losses(losses), stop := EarlyStoppingCB(patience=3), CheckpointCB(tmp_path))
    learn.fit(7, resume=tmp_path)
    assert learn.history[-1]['epoch'] == 3 and (stop.best, stop.best_epoch) == (1., 0)


# --- Checkpoint


def files(folder): return sorted(p.name for p in folder.iterdir())


def steps(*numbers): return [f'step-{7*n:08}.pt' for n in numbers]


def test_what_cannot_be_saved_is_an_error_before_training(tmp_path):
    "Theirs when the first checkpoint is due"
    class Odd(Callback):
        def before_fit(self, learn): pass
        def state_dict(self): return dict(f=lambda: 0)
        def load_state_dict(self, state): pass
    learn = quick(Odd(), CheckpointCB(tmp_path))
    with pytest.raises(TypeError): learn.fit(1)
    assert learn.opt_steps == 0


@pytest.mark.parametrize('kw', [dict(keep=0), dict(keep=-1), dict(every='0ep'), dict(every=2),
                                dict(best='loss', mode='least')])
def test_arguments_of_a_checkpoint(tmp_path, kw):
    with pytest.raises((ValueError, TypeError), match=next(reversed(kw))): CheckpointCB(tmp_path, **kw)


@pytest.mark.parametrize('score', [dict(a=1), [0.5, 0.5], None, 'good'])
def test_a_score_that_is_no_number_is_an_error(score, tmp_path):
    "Such as one for each class. The message names the column"
    learn = quick(MetricsCB(score=Scripted([score]*3)), CheckpointCB(tmp_path, best='score', mode='max'))
    with pytest.raises(ValueError, match="'score' has to be a number; in the row of epoch 0 it is"): learn.fit(3)


@pytest.mark.parametrize('metric', [12345, None, ['loss']])
def test_what_is_no_name_of_a_column_is_an_error(metric, tmp_path):
    "score_function=12345"
    with pytest.raises(TypeError, match='name of a column'): EarlyStoppingCB(metric)


@pytest.mark.parametrize('keep, left', [(1, (4,)), (2, (3, 4)), (None, (1, 2, 3, 4))])
@pytest.mark.parametrize('momentum', [0., 0.9])
def test_the_newest_stay(tmp_path, keep, left, momentum):
    "n_saved; None: all of them; with a state of the optimizer and without"
    quick(cb := CheckpointCB(tmp_path, keep=keep), opt_func=partial(SGD, momentum=momentum)).fit(4)
    assert files(tmp_path) == steps(*left)
    assert cb.saved[-1] == tmp_path/steps(4)[0]      # last_checkpoint


@pytest.mark.parametrize('mode, best', [('max', 2), ('min', 3)])
def test_the_best_stays(tmp_path, mode, best):
    "By a score of an epoch. Wrong: the weights after the epoch that follows it"
    learn = quick(Losses([1.2, -2., 3.1, -4.]), cb := CheckpointCB(tmp_path, keep=1, best='loss', mode=mode))
    learn.fit(4)
    assert files(tmp_path) == ['best.pt', *steps(4)]
    assert (cb.best, cb.best_epoch) == ([1.2, -2., 3.1, -4.][best], best)
    assert read_checkpoint(tmp_path/'best.pt')['opt_steps'] == 7*(best + 1)


@pytest.mark.parametrize('mode, kept', [('max', (7, 21)), ('min', (14, 28))])
def test_the_best_so_many_stay(mode, kept, tmp_path):
    "n_saved=2 by a score: 1.2, -2, 3.1, -4"
    quick(Losses([1.2, -2., 3.1, -4.]), CheckpointCB(tmp_path, keep=1, best='loss', mode=mode, keep_best=2)).fit(4)
    assert files(tmp_path) == [*(f'best-{s:08}.pt' for s in kept), 'best.pt', *steps(4)]


def test_each_is_removed_once(tmp_path):
    "Scores 0, 1, 1, 2, 3 with two to keep"
    quick(Losses([0., 1., 1., 2., 3.]), CheckpointCB(tmp_path, keep=1, best='loss', mode='max', keep_best=2)).fit(5)
    assert files(tmp_path) == ['best-00000028.pt', 'best-00000035.pt', 'best.pt', *steps(5)]


def test_equal_scores_do_not_replace_the_best(tmp_path):
    "greater_or_equal=False; and no file is removed twice"
    quick(Losses([0., 1., 1., 1.]), cb := CheckpointCB(tmp_path, best='loss', mode='max')).fit(4)
    assert cb.best_epoch == 1 and read_checkpoint(tmp_path/'best.pt')['opt_steps'] == 14


def test_a_folder_is_made(tmp_path):
    "ignite's create_dir, which is its default too"
    quick(CheckpointCB(tmp_path/'a'/'b')).fit(1)
    assert files(tmp_path/'a'/'b') == steps(1)


def test_a_folder_that_holds_checkpoints_of_another_run_is_an_error(tmp_path):
    "require_empty"
    quick(CheckpointCB(tmp_path)).fit(1)
    with pytest.raises(ValueError, match='holds checkpoints of another run.*give another folder'):
        quick(CheckpointCB(tmp_path)).fit(1)


def test_other_files_in_the_folder_stay(tmp_path):
    for name in 'notes.txt', 'weights.pt': (tmp_path/name).write_text('mine')
    quick(CheckpointCB(tmp_path, keep=1)).fit(3)
    assert files(tmp_path) == ['notes.txt', *steps(3), 'weights.pt']


def test_a_checkpoint_that_cannot_be_written_leaves_none(tmp_path, monkeypatch):
    "Neither half a file nor the loss of the one before"
    learn = quick()
    learn.save(tmp_path/'a.pt')
    before = (tmp_path/'a.pt').read_bytes()
    def fail(state, f):
        f.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='could not be written.*what was there before still is'):
        learn.save(tmp_path/'a.pt')
    with pytest.raises(OSError): learn.save(tmp_path/'b.pt')
    assert files(tmp_path) == ['a.pt'] and (tmp_path/'a.pt').read_bytes() == before


def test_a_checkpoint_is_plain_tensors_and_numbers(tmp_path):
    "torch.load(weights_only=True) opens it, and gives the state of the model by its names"
    learn = quick(CheckpointCB(tmp_path))
    learn.fit(2)
    state = torch.load(tmp_path/steps(2)[0], weights_only=True)
    assert same(state['weights']['raw'], copied(learn.model.state_dict()))


def test_a_wrapped_model_is_saved_by_its_own_names(tmp_path):
    learn = quick()
    learn.model = nn.DataParallel(learn.model)
    learn.save(tmp_path/'a.pt')
    assert list(read_checkpoint(tmp_path/'a.pt')['weights']['raw']) == ['weight', 'bias']


def with_schedule(folder, losses):
    "What ignite saves together: model, optimizer, schedule, early stopping, the checkpoint's own state"
    return quick(Losses(losses), EpochSchedCB(partial(ExponentialLR, gamma=0.5)), EarlyStoppingCB(patience=2),
                 CheckpointCB(folder, keep=1, best='loss'), opt_func=partial(SGD, momentum=0.9))


def test_all_of_a_run_comes_back(tmp_path):
    "Model, momentum, rate, patience, best. Resumed after the third epoch, it ends after the fourth, as without a break"
    losses = [0.3, 0.2, 0.3, 0.3, 0.3, 0.3]
    whole = with_schedule(tmp_path/'whole', losses)
    whole.fit(6)
    with_schedule(tmp_path/'parts', losses).fit(6, cbs=AtEpoch(3))
    rest = with_schedule(tmp_path/'parts', losses)
    rest.fit(6, resume=tmp_path/'parts')
    assert rest.history[-1]['epoch'] == whole.history[-1]['epoch'] == 3
    assert same(copied(rest.model.state_dict()), copied(whole.model.state_dict()))
    momenta = [[s['momentum_buffer'] for s in o.opt.state.values()] for o in (rest, whole)]
    assert all(map(torch.equal, *momenta))
    assert [(cb.best, cb.best_epoch) for cb in rest.cbs if isinstance(cb, (EarlyStoppingCB, CheckpointCB))] == [
        (0.2, 1)]*2
    assert files(tmp_path/'parts') == ['best.pt', *steps(4)]


@pytest.mark.parametrize('opt', [True, False])
def test_a_file_gives_all_or_the_model_alone(tmp_path, opt):
    "load_objects with one of several objects"
    a = quick(opt_func=partial(SGD, momentum=0.9))
    a.fit(1)
    a.save(tmp_path/'a.pt')
    b = quick(opt_func=partial(SGD, momentum=0.9))
    b.load(tmp_path/'a.pt', opt=opt)
    assert same(copied(a.model.state_dict()), copied(b.model.state_dict())) and bool(b.opt.state) == opt


def test_a_file_of_another_model_is_an_error(tmp_path):
    "That names what differs; nothing of it was loaded"
    quick().save(tmp_path/'a.pt')
    other = learner()
    before = copied(other.model.state_dict())
    with pytest.raises(ValueError, match='weight'): other.load(tmp_path/'a.pt')
    assert same(copied(other.model.state_dict()), before)


def test_a_part_of_a_model_is_loaded_by_hand(tmp_path):
    "Their strict=False, for a head with other classes: the file is a dict by names"
    a = learner()
    a.save(tmp_path/'a.pt')
    state = read_checkpoint(tmp_path/'a.pt')['weights']['raw']
    model = nn.Sequential(*net(seed=1)[:4 - 1], nn.Linear(8, 7))
    missing = model.load_state_dict({k: v for k, v in state.items() if not k.startswith('3.')}, strict=False)
    assert missing.missing_keys == ['3.weight', '3.bias'] and torch.equal(model[0].weight, a.model[0].weight)


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    (tmp_path/'text.pt').write_text('no checkpoint')
    torch.save(dict(a=1), tmp_path/'other.pt')
    for name in 'text.pt', 'other.pt':
        with pytest.raises(ValueError, match='no checkpoint'): quick().load(tmp_path/name)
    with pytest.raises(FileNotFoundError): quick().load(tmp_path/'none.pt')


@pytest.mark.differs('names of files are fixed, step-00000123.pt and best.pt: what is in one is asked of the file')
def test_names_of_files_have_no_pattern(tmp_path):
    with pytest.raises(TypeError): CheckpointCB(tmp_path, filename='{name}-{score}')
    quick(Losses([3.]), CheckpointCB(tmp_path, best='loss')).fit(1)
    state = read_checkpoint(tmp_path/'best.pt')
    assert state['opt_steps'] == 7 and state['history'][-1]['loss'] == 3.


# --- TerminateOnNan


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_fit(bad):
    "At once, with the batch in the message. ignite stops without an error"
    losses = count()
    def loss(preds, targets): return F.mse_loss(preds, targets)*(bad if next(losses) == 4 else 1)
    learn = quick()
    learn.loss_func = loss
    with pytest.raises(FloatingPointError, match='batch 4 of epoch 0'): learn.fit(2)
    assert learn.iter == 4


@pytest.mark.parametrize('epoch', [0, 1])
@pytest.mark.parametrize('batch', [0, 3, 6])
def test_wherever_the_loss_is_not_finite(batch, epoch):
    "In the first batch, in the midst, in the last of an epoch: no step more, and validation is not reached"
    losses = count()
    def loss(preds, targets):
        bad = next(losses) == (7 + 2)*epoch + batch      # two batches of validation
        return F.mse_loss(preds, targets)*(math.nan if bad else 1)
    learn = quick()
    learn.loss_func = loss
    with pytest.raises(FloatingPointError, match=f'batch {batch} of epoch {epoch}'): learn.fit(3)
    assert len(learn.history) == 2*epoch


def test_a_finite_loss_does_not_end_the_fit():
    learn = quick()
    learn.fit(2)
    assert learn.opt_steps == 14
