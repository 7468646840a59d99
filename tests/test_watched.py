"A column to go by: its name, which way is good, what is no number; early stopping and the weights of the best epoch"
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.schedule import EpochSchedCB
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.checkpoint.saving import load_weights
from fastswa.core import quiet
from fastswa.random_state import set_seed
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner
from helpers import AtEpoch, Hits, Losses, copied, floats, learner, same, state


class Told:
    "A metric whose values are told beforehand, one for each epoch of training and validation"
    def __init__(self, *values): self.values, self.n = values, -1
    def reset(self): self.n += 1
    def update(self, preds, targets): pass
    def compute(self): return self.values[self.n//2]

class Scores(Callback):
    "A column whose values are told beforehand, one for each epoch"
    order, role = 20, 'watches'
    def __init__(self, *values): self.values = values
    def after_epoch(self, learn): learn.history[-1]['accuracy'] = self.values[learn.epoch]


class MeanSquaredError(Told): "Called as torcheval's"

class F1Score(Told): "And this one"

class HigherIsBetter(Told): higher_is_better = True


class Steps(Callback):
    "Counts training batches"
    n = 0
    def before_batch(self, learn): self.n += learn.training


def run(*cbs, n=9, **metrics):
    learn = learner(*cbs, MetricsCB(**metrics))
    with quiet(): learn.fit(n)
    return learn


FALLS, RISES, DOUBLES = (9., 5., 3., 4., 5., 6.), (0.1, 0.5, 0.9, 0.8, 0.7, 0.6), (0.1, 0.2, 0.4, 0.8, 1.6)


@pytest.mark.parametrize('metrics, watch, values', [
    (dict(mse=Told(*FALLS)), 'mse', FALLS), (dict(val_rmse=Told(*FALLS)), 'val_rmse', FALLS),
    (dict(score=MeanSquaredError(*FALLS)), 'score', FALLS),             # the class tells better than the name
    (dict(word_error_rate=Told(*FALLS)), 'word_error_rate', FALLS), (dict(dice_loss=Told(*FALLS)), 'dice_loss', FALLS),
    (dict(mAP50=Told(*RISES)), 'mAP50', RISES), (dict(top=F1Score(*RISES)), 'top', RISES),
    (dict(hmean=HigherIsBetter(*RISES)), 'hmean', RISES), (dict(perplexity=Told(*FALLS)), 'train/perplexity', FALLS)])
def test_known_names_say_which_way_is_good(metrics, watch, values, tmp_path):
    "Wrong: the fit ends because the mse falls, and its worst epoch is kept"
    stop, kept = EarlyStoppingCB(watch, patience=2), CheckpointCB(tmp_path, best=watch)
    learn = run(stop, kept, **metrics)
    assert (stop.best, stop.best_epoch, stop.stopped_epoch) == (values[2], 2, 4)
    assert (kept.best, kept.best_epoch) == (values[2], 2)
    assert learn.opt_steps == 50


@pytest.mark.parametrize('make', [EarlyStoppingCB, lambda m: CheckpointCB('nowhere', best=m)])
def test_a_name_that_tells_nothing_asks_for_the_mode(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps, metrics = Steps(), dict(throughput=Told(*RISES), accuracy_gap=Told(*RISES))
    for name in metrics:
        with pytest.raises(ValueError, match=f"is small or large '{name}' good.*mode='min' or 'max'"):
            run(make(name), steps, **metrics)
    assert not steps.n
    stop = EarlyStoppingCB('throughput', 1, mode='min')
    run(stop, throughput=Told(*FALLS))
    assert stop.best == 3.


@pytest.mark.parametrize('name, words', [
    ('acuracy', "'acuracy': no such column; there are accuracy, loss, ema/accuracy, ema/loss, train/accuracy"),
    ('ema/acc', "'ema/acc': no such column"), ('train/acc', "'train/acc': no such column"),
    ('swa/accuracy', "no weights are called 'swa'; there are raw, ema, and train"), ('epoch', 'no such column')])
def test_a_misspelled_column_is_told_before_training(name, words, tmp_path):
    for make in (EarlyStoppingCB, lambda *args: CheckpointCB(tmp_path, '1ep', 3, *args)):
        steps = Steps()
        args = [name, 3, 0., 'max'] if make is EarlyStoppingCB else [name, 'max']
        with pytest.raises(ValueError, match=words): run(make(*args), EMACB(), steps, accuracy=Hits())
        assert not steps.n


def test_columns_of_other_callbacks_are_known_with_the_first_row():
    class Adds(Callback):
        def after_epoch(self, learn): learn.history[-1]['margin'] = 1/(1 + learn.epoch)
    stop = EarlyStoppingCB('margin', 1, mode='max')
    run(stop, Adds())
    assert stop.best == 1. and stop.stopped_epoch == 1
    with pytest.raises(ValueError, match="'margins': no such column; there are loss, margin"):
        run(EarlyStoppingCB('margins', mode='max'), Adds())


def test_the_row_of_training():
    "For a fit without validation. Wrong: an error that this fit does not validate, or the validation's value"
    stop = EarlyStoppingCB('train/loss', patience=1, min_delta=10.)
    learn = learner(stop)
    with quiet(): learn.fit(5, valid=False)
    assert stop.best == learn.history[0]['loss'] and len(learn.history) == 2
    learn.dls.valid = None
    with quiet(): learn.fit(5)
    assert stop.best == learn.history[2]['loss'] and len(learn.history) == 4
    for name in ('loss', 'ema/loss'):
        steps = Steps()
        with pytest.raises(ValueError, match=f"'{name}': this fit does not validate .*'train/loss'"):
            learner(EarlyStoppingCB(name), EMACB(decay=0.5), steps, dls=learn.dls).fit(5)
        assert not steps.n
    sched = EpochSchedCB(partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.9999), 'train/loss')
    rates = []
    learn = learner(sched, AtEpoch(2, lambda learn: rates.append(learn.opt.param_groups[0]['lr'])))
    with quiet(): learn.fit(3, valid=False)
    assert rates == [pytest.approx(0.03)]                   # nothing was good enough


@pytest.mark.parametrize('name, mode, warns', [
    ('accuracy', 'min', "has mode='min', and the good values of 'accuracy' are its largest: mode='max' is meant"),
    ('accuracy', 'max', None), ('train/loss', 'max', "mode='min' is meant"), ('loss', 'min', None),
    ('throughput', 'min', None)])
def test_a_schedule_that_takes_good_for_bad_is_warned_of(name, mode, warns):
    "torch's default is 'min'. Wrong: the rate falls because the accuracy rises, without a word"
    sched = EpochSchedCB(partial(lr_scheduler.ReduceLROnPlateau, mode=mode), name)
    cbs = [sched, MetricsCB(accuracy=Hits(), throughput=Told(*RISES))]
    with warnings.catch_warnings(record=True) as caught, quiet():
        warnings.simplefilter('always')
        learner(*cbs).fit(1)
    said = [str(w.message) for w in caught if 'is meant' in str(w.message)]
    assert len(said) == (warns is not None) and all(warns in text for text in said)


@pytest.mark.parametrize('value, words', [
    (torch.eye(2), 'a list'), (dict(a=1.), 'a dict'), (None, 'empty'), ('good', 'a str'), (torch.tensor(1.), None)])
def test_only_a_number_can_be_watched(value, words, tmp_path):
    "At the first value. Wrong: a TypeError at the second"
    for cb in (EarlyStoppingCB('odd', mode='max'), CheckpointCB(tmp_path, best='odd', mode='max', keep=1)):
        if words is None: assert run(cb, odd=Told(*[value]*9), n=1).history[-1]['odd'] == 1.
        else:
            with pytest.raises(ValueError, match=f"'odd' has to be a number; in the row of epoch 0 it is {words}"):
                run(cb, odd=Told(*[value]*9))


def test_a_validation_without_a_loss():
    "As of detection models, which give losses in training only. Wrong: the last training loss is watched in its place"
    class Detection(TrainLearner):
        def get_loss(self):
            if self.training: super().get_loss()
    for cb in EarlyStoppingCB(), EpochSchedCB(lr_scheduler.ReduceLROnPlateau):
        with pytest.raises(ValueError, match="'loss' has to be a number; in the row of epoch 0 it is empty"):
            learner(cb, cls=Detection).fit(3)
    cb = EarlyStoppingCB('train/loss', patience=1, min_delta='99%')
    with quiet(): learner(cb, cls=Detection).fit(3)
    assert cb.stopped_epoch == 1


def test_names_of_averages_and_metrics_leave_columns_clear():
    with pytest.raises(ValueError, match="other than 'raw' and 'train'"): learner(EMACB(name='train')).fit(1)
    with pytest.raises(ValueError, match="without '/', as in top_5; got 'top/5'"): MetricsCB(**{'top/5': Hits()})


@pytest.mark.parametrize('kwargs, values, stopped, reason', [
    (dict(patience=2), RISES, 4, 'accuracy has not been better than 0.9 of epoch 2 for 2 epochs'),
    (dict(patience=1, min_epochs=5), RISES, 4, 'accuracy has not been better than 0.9 of epoch 2 for 2 epochs'),
    (dict(stop_at=0.5), RISES, 1, 'accuracy is 0.5 in epoch 1, as good as stop_at=0.5 asks for'),
    (dict(stop_at=0.5, min_epochs=3), RISES, 2, 'accuracy is 0.9 in epoch 2, as good as'),
    (dict(stop_at=1.), RISES[:3], None, None),
    (dict(diverged_at=0.75, patience=None, min_epochs=3), RISES, 4,
     'accuracy is 0.7 in epoch 4, worse than diverged_at=0.75'),
    (dict(patience=1, min_delta='100%'), DOUBLES, 1, 'not been better than 0.1 of epoch 0 for 1 epoch'),
    (dict(patience=1, min_delta='99%'), DOUBLES, None, None),
    (dict(patience=1, min_delta=0.15), DOUBLES, 1, 'not been better than 0.1'),
    (dict(patience=2), (float('nan'),)*9, 1, 'accuracy has not been a number for 2 epochs'),
    (dict(stop_at=0.1, patience=None), (float('nan'),)*5, None, None)])
def test_why_and_when_a_fit_is_stopped(kwargs, values, stopped, reason, capsys):
    cb = EarlyStoppingCB('accuracy', **kwargs)
    learn = learner(cb, Scores(*values))
    learn.fit(len(values))
    out = [line for line in capsys.readouterr().out.splitlines() if 'early stopping' in line]
    assert cb.stopped_epoch == stopped
    assert learn.opt_steps == 10*(len(values) if stopped is None else stopped + 1)
    if reason is None: assert cb.reason is None and not out
    else: assert reason in cb.reason and out == [f'early stopping: {cb.reason}']


def test_arguments_are_checked():
    for kwargs, words in ((dict(min_delta='1'), "a share such as '1%'; got '1'"), (dict(min_delta='-1%'), 'min_delta'),
                          (dict(min_epochs=-1), 'min_epochs'), (dict(stop_at='0.9'), 'stop_at'),
                          (dict(diverged_at=float('nan')), 'diverged_at'), (dict(patience=0.5), 'patience')):
        with pytest.raises(ValueError, match=words): EarlyStoppingCB(**kwargs)


class Copies(Callback):
    "The model's weights and statistics at each validation, by name and epoch"
    order = 50
    def before_fit(self, learn): self.seen = {}
    def after_epoch(self, learn):
        if not learn.training: self.seen[learn.weights, learn.epoch] = copied(floats(learn.model))


@pytest.mark.parametrize('watch, cbs', [
    ('accuracy', lambda: []), ('accuracy', lambda: [EMACB(0.8), BNUpdateCB()]),
    ('ema/accuracy', lambda: [EMACB(0.8)]), ('ema/accuracy', lambda: [EMACB(0.8), BNUpdateCB(valid_batches=2)]),
    ('swa/accuracy', lambda: [SWACB('0ba', '3ba'), EMACB(), BNUpdateCB(valid_batches=2)])])
def test_the_best_weights_are_those_that_were_validated(watch, cbs, capsys):
    """Bit for bit, BatchNorm statistics too, and validating them gives the best value again

    Wrong: the newest weights, raw ones where an average was best, statistics of another epoch."""
    stop, copies = EarlyStoppingCB(watch, patience=2, restore_best=True), Copies()
    class Best(Callback):
        "Makes the second epoch the best one"
        order,role = 20,'watches'
        def after_epoch(self, learn):
            if not learn.training: learn.history[-1]['accuracy'] += 10*(learn.epoch == 1)
    learn = learner(stop, copies, MetricsCB(accuracy=Hits()), Best(), *cbs())
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'the model has BatchNorm')
        learn.fit(9)
    weights = watch.split('/')[0] if '/' in watch else 'raw'
    assert stop.best_epoch == 1 and learn.weights == 'best'
    assert same(floats(learn.model), copies.seen[weights, 1])
    held = [line for line in capsys.readouterr().out.splitlines() if line.startswith('The model holds')]
    assert held == ["The model holds its 'best' weights, of epoch 1; learn.restore() gives it its raw ones back."]
    row, = learn.validate('best')
    assert row['loss'] == next(r['loss'] for r in learn.history if r['weights'] == weights and r['accuracy'] > 10)
    learn.restore()
    assert same(floats(learn.model), copies.seen['raw', 3])
    assert same(floats(learn.module('best')), copies.seen[weights, 1])


@pytest.mark.parametrize('end', ['well', 'cancelled', 'early'])
def test_the_best_weights_are_held_however_the_fit_ends(end):
    "Wrong (Keras#12511): only if it was stopped early"
    cb = EarlyStoppingCB('accuracy', patience=2 if end == 'early' else None, restore_best=True)
    copies, other = Copies(), [AtEpoch(5)] if end == 'cancelled' else []
    learn = learner(cb, copies, Scores(*RISES), *other)
    with quiet(): learn.fit(6)
    assert same(floats(learn.model), copies.seen['raw', 2]) and learn.weights == 'best'
    assert (cb.stopped_epoch is None) == (end != 'early')
    with quiet(): learn.fit(1, cbs=Callback())              # goes on from the raw weights
    assert cb.best_epoch == 0


def test_an_error_leaves_the_raw_weights():
    cb = EarlyStoppingCB('accuracy', restore_best=True)
    class Fails(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 4: raise ZeroDivisionError
    learn = learner(cb, Scores(*RISES), Fails())
    with quiet(), pytest.raises(ZeroDivisionError): learn.fit(6)
    assert learn.weights == 'raw'
    learn.apply('best')
    assert learn.weights == 'best' and cb.best_epoch == 2


def test_the_best_weights_survive_a_file(tmp_path):
    "In a resume, which is exact, and for a learner that loads. Wrong: the best epoch is that of the rest of the run"
    def make():
        return learner(EarlyStoppingCB('ema/accuracy', 4, restore_best=True), EMACB(0.8), BNUpdateCB(), Scores(*RISES))
    def fit(learn, **kwargs):
        set_seed(1)
        with quiet(): learn.fit(6, **kwargs)
        return learn
    whole = fit(make())
    fit(make(), cbs=[CheckpointCB(tmp_path/'a'), AtEpoch(4)])
    set_seed(99)
    rest = make()
    with quiet(): rest.fit(6, resume=tmp_path/'a')
    assert same(state(rest), state(whole)) and rest.weights == 'best'
    assert rest.cbs[0].best_epoch == whole.cbs[0].best_epoch == 2
    whole.save(tmp_path/'b.pt')
    other = make()
    other.load(tmp_path/'b.pt')
    other.apply('best')
    assert same(state(other), state(whole))


def test_one_set_is_held():
    with pytest.raises(ValueError, match='apply=True is set for best, ema'):
        learner(EarlyStoppingCB(restore_best=True), EMACB(apply=True)).fit(1)
    learn = learner(EarlyStoppingCB(restore_best=False), EMACB())
    with quiet(): learn.fit(1)
    assert learn.weights == 'ema' and 'best' not in learn.averages


def test_a_validation_alone_is_not_watched():
    "Wrong: it counts as an epoch, or forgets what was best"
    cb = EarlyStoppingCB('accuracy', 2, restore_best=True)
    learn = learner(cb, Scores(*RISES))
    with quiet():
        learn.fit(6)
        learn.fit(1, train=False)
    assert (cb.best, cb.best_epoch, cb.stopped_epoch) == (0.9, 2, 4)


class Counts(nn.Module):
    "A classifier with what a forward pass writes: counts, flags, a float; one of them is not in its `state_dict`"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(3, 3)
        for k, dtype in dict(codes=torch.int64, used=torch.bool, peak=torch.float32).items():
            self.register_buffer(k, torch.zeros(3, dtype=dtype))
        self.register_buffer('calls', torch.zeros((), dtype=torch.int32), persistent=False)

    def forward(self, x):
        out = self.lin(x)
        self.calls += 1
        if self.training:
            self.codes += out.argmax(1).bincount(minlength=3)
            self.used[self.codes % 3 == 1] ^= True
            self.peak.copy_(out.abs().amax(0))
        return out


def test_the_best_weights_have_all_buffers(tmp_path):
    "Wrong: whole numbers and flags of the last epoch under the weights of the best one; raw ones that are not its own"
    cb, seen = EarlyStoppingCB(patience=None, restore_best=True), {}
    class Rows(Callback):
        role, order = 'watches', 99
        def after_epoch(self, learn):
            if not learn.training: seen[learn.epoch] = copied(dict(learn.model.named_buffers()) | state(learn))
    learn = learner(Losses([3., 1., 2., 2.]), cb, model=Counts())
    with quiet(): learn.fit(4, cbs=[Rows(), CheckpointCB(tmp_path)])
    assert not torch.equal(seen[1]['codes'], seen[3]['codes'])
    with torch.no_grad(): learn.model.eval()(torch.zeros(2, 3))      # which is no change of weights
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.validate()
    held = dict(learn.model.named_buffers())
    assert learn.weights == 'best' and all(torch.equal(held[k], seen[1][k]) for k in ('codes', 'used', 'peak'))
    assert held['codes'].dtype == torch.int64 and held['used'].dtype == torch.bool
    learn.restore()
    assert all(torch.equal(v, seen[3][k]) for k, v in learn.model.named_buffers())
    saved = load_weights(tmp_path, 'best')
    assert all(torch.equal(saved[k], seen[1][k]) for k in learn.model.state_dict())


@pytest.mark.parametrize('before, after', [(True, False), (True, None), (False, True), (None, True)])
def test_a_run_is_resumed_with_or_without_early_stopping(before, after, tmp_path):
    "The raw run is the same; None: no early stopping at all. Wrong: a ValueError about callbacks or averages"
    def cbs(best): return [] if best is None else [EarlyStoppingCB(patience=9, restore_best=best)]
    def fit(*cbs, **kw):
        learn = learner(EMACB(0.8, apply=False), *cbs)
        set_seed(1)
        with quiet(): learn.fit(3, **kw)
        learn.restore()
        return learn
    whole = fit()
    fit(*cbs(before), CheckpointCB(tmp_path), AtEpoch(2))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        rest = fit(*cbs(after), resume=tmp_path)
    assert same(state(rest), state(whole)) and ('best' in rest.averages) == bool(after)
    assert same(rest.averages['ema'].weights, whole.averages['ema'].weights)


@pytest.mark.parametrize('make', [
    lambda name, path: CheckpointCB(path, best=name), lambda name, path: EarlyStoppingCB(name)])
def test_a_misspelled_column_is_not_asked_for_its_mode(make, tmp_path):
    "Where the columns are known. Wrong: one gives a mode, and only then hears that there is no such column"
    for name in 'acuracy', 'train/acuracy':
        with pytest.raises(ValueError, match=f"'{name}': no such column; there are accuracy, loss"):
            run(make(name, tmp_path), n=1, accuracy=Told(0.5))
    with pytest.raises(ValueError, match="good\\? Its name does not tell: give mode='min'"):
        run(make('odd', tmp_path), n=1, odd=Told(0.5))
    with pytest.raises(ValueError, match='Its name does not tell'):
        run(make('other', tmp_path), Scores(0.5), n=1, odd=Told(0.5))      # which may add it
