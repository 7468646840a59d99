"What skorch tests of EarlyStopping, Checkpoint, TrainEndCheckpoint, LoadInitState, Initializer, Freezer and Unfreezer"
import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD

from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.checkpoint.archive import read_checkpoint
from fastswa.nets.init import init_weights
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner
from helpers import AtEpoch, Hits, Losses, Scripted, copied, data, floats, learner, net, quick, same, state

# --- EarlyStopping


def epochs(learn, n=8):
    learn.fit(n)
    return len([r for r in learn.history if r['train'] == 'train'])


class Broken(nn.Module):
    "Does not improve: each class has the same score"
    def __init__(self):
        super().__init__()
        self.layer = net()
    def forward(self, x): return self.layer(x)*0 + 0.5


@pytest.mark.parametrize('metric', ['loss', 'accuracy'])
def test_a_net_that_improves_is_trained_to_the_end(metric):
    cbs = [MetricsCB(accuracy=Scripted([*range(2, 20)])), Losses([*range(20, 0, -1)])]
    assert epochs(quick(*cbs, EarlyStoppingCB(metric, patience=5, mode='min' if metric == 'loss' else 'max'))) == 8


@pytest.mark.parametrize('metric', ['loss', 'accuracy'])
def test_a_net_that_does_not_is_stopped(metric, capsys):
    "After patience + 1 epochs, with a line that says why"
    mode = 'min' if metric == 'loss' else 'max'
    learn = learner(MetricsCB(accuracy=Hits()), EarlyStoppingCB(metric, patience=5, mode=mode), model=Broken())
    assert epochs(learn) == 6
    lines = [l for l in capsys.readouterr().out.splitlines() if 'early stopping' in l]
    assert len(lines) == 1 and f'{metric} has not been better' in lines[0] and '5 epochs' in lines[0]


def test_a_large_absolute_threshold_stops_it():
    "threshold_mode='abs': improvements of 0.05 are none"
    losses = [1 - 0.05*i for i in range(8)]
    assert epochs(quick(Losses(losses), EarlyStoppingCB(patience=1, min_delta=0.1))) == 2


@pytest.mark.parametrize('wrong', ['incorrect', '-1', None])
def test_a_threshold_that_means_nothing(wrong):
    "threshold_mode='incorrect'"
    with pytest.raises((TypeError, ValueError), match='min_delta'): EarlyStoppingCB(min_delta=wrong)


def test_what_is_monitored_needs_validation():
    "In a sentence: a fit without it has no such row"
    learn = quick(EarlyStoppingCB())
    with pytest.raises(ValueError, match='does not validate'): learn.fit(3, valid=False)


@pytest.mark.parametrize('metric', ['loss', 'accuracy'])
def test_the_weights_of_the_best_epoch_come_back(metric, capsys):
    """load_best: those of a net that was trained for as many epochs, bit for bit (but for the count of batches, which
    is that of the net), and they validate as they did"""
    torch.manual_seed(0)
    def make(*cbs): return learner(MetricsCB(accuracy=Hits()), *cbs, dls=data(bs=40), lr=2.)
    learn = make(cb := EarlyStoppingCB(metric, patience=3, restore_best=True))
    learn.fit(30)
    rows = [r for r in learn.history if r['train'] == 'eval']
    assert len(rows) < 30 and rows[cb.best_epoch][metric] == cb.best
    again = make()
    again.fit(cb.best_epoch + 1)
    assert same(copied(floats(learn.model)), copied(floats(again.model)))
    assert learn.validate('best')[-1][metric] == again.validate()[-1][metric] == cb.best
    out = capsys.readouterr().out
    assert f'{metric} has not been better' in out and f"'best' weights, of epoch {cb.best_epoch}" in out
    learn.restore()
    assert not same(copied(floats(learn.model)), copied(floats(again.model)))


# --- Checkpoint


def files(folder): return sorted(p.name for p in folder.iterdir())


def named(*steps): return [f'step-{s:08}.pt' for s in steps]


@pytest.mark.parametrize('wrong', ['foobar', 'f_params', 'monitor'])
def test_an_argument_that_there_is_not(wrong, tmp_path):
    with pytest.raises(TypeError, match=wrong): CheckpointCB(tmp_path, **{wrong: 'x'})


def test_without_a_monitor_each_epoch_is_saved(tmp_path):
    quick(CheckpointCB(tmp_path, keep=None)).fit(10)
    assert len(files(tmp_path)) == 10


def test_what_cannot_be_written_is_an_error(tmp_path):
    "Where skorch prints a line and goes on without. Before training, for a folder that is a file"
    (tmp_path/'file').write_text('')
    learn = quick(CheckpointCB(tmp_path/'file'))
    with pytest.raises(OSError): learn.fit(1)
    assert learn.opt_steps == 0


@pytest.mark.differs('a checkpoint is one file, written whole: no names for parts of it, which could be of two moments')
def test_the_parts_have_no_files_of_their_own(tmp_path):
    "f_params, f_optimizer, f_criterion, f_history, f_pickle, fn_prefix"
    learn = quick(CheckpointCB(tmp_path, keep=1), opt_func=partial(SGD, momentum=0.9))
    learn.fit(2)
    assert files(tmp_path) == named(14)
    saved = read_checkpoint(tmp_path/named(14)[0])
    assert same(saved['weights']['raw'], state(learn)) and saved['opt'] and len(saved['history']) == 4


def test_one_set_of_weights_alone_is_an_export(tmp_path):
    "f_params"
    learn = quick()
    learn.export(tmp_path/'weights.safetensors')
    assert same(load_file(tmp_path/'weights.safetensors'), dict(sorted(state(learn).items())))


@pytest.mark.parametrize('folder', ['exp1', 'a/b/exp2'])
def test_the_folder_is_made(folder, tmp_path):
    "dirname"
    quick(CheckpointCB(tmp_path/folder)).fit(1)
    assert files(tmp_path/folder) == named(7)


def test_what_is_monitored_for_a_checkpoint_needs_validation(tmp_path):
    with pytest.raises(ValueError, match='does not validate'):
        quick(CheckpointCB(tmp_path, best='loss')).fit(3, valid=False)


def test_a_score_of_our_own(tmp_path):
    "1 in the third epoch and 0 before and after: the first and the third were the best when they came"
    scores = MetricsCB(third=Scripted([0, 0, 1, *[0]*7]))
    learn = quick(scores, cb := CheckpointCB(tmp_path, keep=1, best='third', mode='max'))
    learn.fit(10)
    assert cb.best_epoch == 2 and read_checkpoint(tmp_path/'best.pt')['opt_steps'] == 21


def test_modules_beside_the_model_can_be_saved(tmp_path):
    "f_mymodule: what the callback of a learner holds, by its state_dict"
    class Beside(Callback):
        def __init__(self): self.module = nn.Linear(1, 1)
        def after_fit(self, learn): self.seen = self.module.weight
        def state_dict(self): return self.module.state_dict()
        def load_state_dict(self, state): self.module.load_state_dict(state)
    a, b = Beside(), Beside()
    quick(a, CheckpointCB(tmp_path)).fit(1)
    quick(b).load(tmp_path)
    assert same(copied(a.module.state_dict()), copied(b.module.state_dict()))


@pytest.mark.parametrize('load_best', [False, True])
def test_the_best_is_loaded_or_not(load_best, tmp_path):
    "load_best, by hand. Wrong: the weights of the last epoch under its name"
    learn = quick(Losses([1., 2., 3.]), CheckpointCB(tmp_path, best='loss'))
    learn.fit(3)
    last = state(learn)
    if load_best: learn.load(tmp_path/'best.pt')
    saved = read_checkpoint(tmp_path/'best.pt')
    assert saved['opt_steps'] == 7
    assert same(state(learn), saved['weights']['raw']) == load_best and same(state(learn), last) == (not load_best)


# --- LoadInitState, TrainEndCheckpoint


def test_a_new_net_goes_on_from_the_last_checkpoint(tmp_path):
    "Ten epochs and ten more: a history of twenty"
    quick(CheckpointCB(tmp_path)).fit(10)
    learn = quick(CheckpointCB(tmp_path))
    with pytest.warns(match='the fit was of 10 epochs and is of 20'): learn.fit(20, resume=tmp_path)
    assert [r['epoch'] for r in learn.history if r['train'] == 'train'] == [*range(20)]


def test_a_new_net_goes_on_from_the_best(tmp_path):
    "From the third of ten epochs: those that are left follow it. (skorch trains ten more, epochs 4 to 13)"
    quick(Losses([3, 2, 1, *[4]*7]), CheckpointCB(tmp_path/'a', best='loss')).fit(10)
    learn = quick(Losses([3, 2, 1, *[4]*7]), cb := CheckpointCB(tmp_path/'b', best='loss'))
    learn.fit(10, resume=tmp_path/'a'/'best.pt')
    assert learn.opt_steps == 70 and (cb.best, cb.best_epoch) == (1, 2) and len(learn.history) == 20


def test_the_end_of_a_fit_is_saved(tmp_path):
    "TrainEndCheckpoint: only then; also where a callback ended it"
    quick(CheckpointCB(tmp_path/'a', '1dur')).fit(10)
    assert files(tmp_path/'a') == named(70)
    quick(CheckpointCB(tmp_path/'b', '1dur'), AtEpoch(4)).fit(10)
    assert files(tmp_path/'b') == named(28)


def test_what_was_saved_at_the_end_predicts_as_it_did(tmp_path):
    "skorch#528"
    learn = learner(CheckpointCB(tmp_path))
    learn.fit(3)
    new = learner()
    assert not torch.equal(new.get_preds()[0], learn.get_preds()[0])
    new.load(tmp_path)
    assert torch.equal(new.get_preds()[0], learn.get_preds()[0])
    assert new.validate()[-1]['loss'] == learn.validate()[-1]['loss']


@pytest.mark.parametrize('copy', [deepcopy, lambda cb: pickle.loads(pickle.dumps(cb))])
def test_callbacks_can_be_copied(copy, tmp_path):
    "skorch#459: sklearn's clone"
    for cb in CheckpointCB(tmp_path, best='loss'), EarlyStoppingCB(patience=4):
        assert type(copy(cb)) is type(cb) and copy(cb).watched.name == 'loss'


@pytest.mark.parametrize('kind', ['checkpoint', 'stopping', 'best'])
def test_callbacks_can_be_pickled_after_a_fit(kind, tmp_path):
    "With what they know of it"
    cb = dict(checkpoint=lambda: CheckpointCB(tmp_path, best='loss'), stopping=EarlyStoppingCB,
              best=lambda: EarlyStoppingCB(restore_best=True))[kind]()
    quick(Losses([2., 1., 3.]), cb).fit(3)
    again = pickle.loads(pickle.dumps(cb))
    assert (again.best, again.best_epoch) == (cb.best, cb.best_epoch) == (1., 1)


# --- Initializer, Freezer, Unfreezer


def test_weights_can_be_given_before_a_fit():
    "By pattern or function there, by any function on modules here; at a rate that moves nothing"
    learn = TrainLearner(net(norm=False), data(), F.cross_entropy, 1e-30)
    learn.model.apply(partial(init_weights, leaky=0.))
    for name, p in learn.model.named_parameters():
        if name.endswith('weight'): nn.init.constant_(p, 5.)
    nn.init.constant_(learn.model[3].bias, 10.)
    learn.fit(1)
    assert (learn.model[0].weight == 5).all() and (learn.model[3].weight == 5).all()
    assert (learn.model[3].bias == 10).all()


def frozen(model, *names):
    for n, p in model.named_parameters(): p.requires_grad_(n not in names)


FROZEN = '0.weight', '3.weight', '3.bias'


def test_frozen_weights_stay():
    learn = learner(model=net(norm=False))
    frozen(learn.model, *FROZEN)
    before = state(learn)
    learn.fit(2)
    assert {n for n, t in learn.model.named_parameters() if torch.equal(t, before[n])} == set(FROZEN)


@pytest.mark.parametrize('within', [False, True])
def test_weights_train_once_they_are_not_frozen_any_more(within):
    "In a further fit, and in the midst of one"
    learn = learner(model=net(norm=False))
    frozen(learn.model, *FROZEN)
    before = state(learn)
    if within: learn.fit(3, cbs=AtEpoch(1, lambda learn: frozen(learn.model)))
    else:
        learn.fit(1)
        assert torch.equal(learn.model[0].weight, before['0.weight'])
        frozen(learn.model)
        learn.fit(2)
    assert not any(torch.equal(t, before[n]) for n, t in learn.model.named_parameters())
