"Fits of a number of steps, and epochs of loaders without a length: clocks, schedules, averages, progress, resume"
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import optim
from torch.optim.lr_scheduler import OneCycleLR

from fastswa.callbacks.basics import RecorderCB
from fastswa.callbacks.progress import LogView, ProgressCB
from fastswa.callbacks.schedule import BatchSchedCB, EpochSchedCB, OneCycleCB, WarmupStableDecayCB
from fastswa.callbacks.steps import GradAccumCB
from fastswa.callbacks.swa import EMACB, LAWACB, SWACB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.random_state import set_seed
from fastswa.training.events import Callback, CancelFitException
from helpers import Accumulate, Trail, data, learner, net, same, state

momentum = partial(optim.SGD, momentum=0.9)


class Unsized:
    "The batches of a loader, without a length"
    def __init__(self, dl): self.dl = dl
    def __iter__(self): return iter(self.dl)


def run(*cbs, unsized=False, **kw):
    "A learner after a fit: 10 steps an epoch, shuffled"
    set_seed(0)
    dls = data(shuffle=True)
    if unsized: dls.train = Unsized(dls.train)
    learn = learner(*cbs, model=net(norm=False), dls=dls, opt_func=momentum)
    set_seed(1)
    learn.fit(**kw)
    return learn


def rates(): return RecorderCB(lr=lambda cb: cb.pg['lr'])


@pytest.mark.parametrize('unsized', [False, True])
@pytest.mark.parametrize('cbs', [lambda: [OneCycleCB(), EMACB()],
                                 lambda: [WarmupStableDecayCB(), SWACB(swa_lr=0.1, anneal='4ba')],
                                 lambda: [EMACB(half_life='0.1dur', every='0.05dur'), GradAccumCB(batches=2)]],
                         ids=['one cycle', 'SWA', 'accumulated'])
def test_whole_epochs_by_their_steps(cbs, unsized):
    "Schedules and averages go as in a fit of so many epochs, also where the loader has no length"
    one, other = cbs(), cbs()
    accumulated = isinstance(one[-1], GradAccumCB)
    a = run(*one, n_epochs=3)
    b = run(*other, max_steps=15 if accumulated else 30, unsized=unsized)
    assert same(state(a), state(b)) and a.history == b.history and a.n_epochs == b.n_epochs == 3
    assert len(b.averages) == 1 and b.weights != 'raw'


@pytest.mark.parametrize('unsized', [False, True])
def test_an_epoch_cut_short_has_its_row_and_ends_the_fit_normally(unsized):
    "15 steps of 10 in an epoch, against a loop by hand; wrong: 20, or an exception, or no average applied"
    events = []
    class Sees(Callback):
        def after_fit(self, learn): events.append((learn.epoch, learn.iter, learn.n_epochs))
    ema, trail = EMACB(), Trail()
    learn = run(ema, Sees(), trail, max_steps=15, unsized=unsized)
    assert learn.opt_steps == ema.average.n == len(trail.seen) == 15
    assert events[0][0] == 1 and events[0][2] == 2 and learn.completed == 2
    assert learn.weights == 'ema'                                                    # as at any end
    assert [(r['epoch'], r['weights'], r['train']) for r in learn.history] == [
        (e, w, t) for e in (0, 1) for w, t in (('raw', 'train'), ('raw', 'eval'), ('ema', 'eval'))]
    set_seed(0)
    dls, model = data(shuffle=True), net(norm=False)
    set_seed(1)
    opt, losses = momentum(model.parameters(), 0.3), []
    for epoch in range(2):
        for i, (x, y) in enumerate(dls.train):
            if epoch*10 + i == 15: break
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
            opt.step()
            opt.zero_grad()
        list(dls.valid)      # draws a number
    assert learn.history[3]['loss'] == pytest.approx(torch.stack(losses[10:]).mean().item())
    assert same(trail.seen[-1], model.state_dict())


@pytest.mark.parametrize('cb, epochs', [(lambda: Accumulate(3), 3), (lambda: GradAccumCB(batches=3), 2)])
def test_only_steps_that_happened_count(cb, epochs):
    "3 steps of 10 batches, or 4 with that of the last window"
    trail = Trail()
    learn = run(cb(), trail, max_steps=7)
    assert learn.opt_steps == len(trail.seen) == 7
    assert [r['epoch'] for r in learn.history if r['train'] == 'train'] == [*range(epochs)]


def test_whichever_comes_first():
    "Epochs that end before the steps decide, and times are shares of them, also with steps that are fewer than batches"
    for cb in ([], [GradAccumCB(batches=4)]):
        a, b = run(EMACB(), OneCycleCB(), *cb, n_epochs=2), run(EMACB(), OneCycleCB(), *cb, n_epochs=2, max_steps=20)
        assert same(state(a), state(b)) and a.history == b.history
    assert run(n_epochs=3, max_steps=4).opt_steps == 4
    assert run(n_epochs=3, max_steps=4).n_epochs == 1
    assert run(max_steps=4).n_epochs == 1 and run().opt_steps == 10


def test_schedules_of_so_many_steps():
    "The rates of torch's OneCycleLR over 15 steps, and a schedule by epochs over the two they take"
    rec = rates()
    run(BatchSchedCB(partial(OneCycleLR, max_lr=1.)), rec, max_steps=15, unsized=True)
    opt = momentum(net().parameters(), 0.3)
    sched, want = OneCycleLR(opt, 1., total_steps=15), []
    for _ in range(15):
        want.append(opt.param_groups[0]['lr'])
        opt.step()
        sched.step()
    assert rec.recs['lr'] == want
    by_epoch = EpochSchedCB(partial(OneCycleLR, max_lr=1.))
    run(by_epoch, max_steps=15)
    assert by_epoch.schedo.total_steps == 2


def test_times_of_averages_in_a_fit_of_so_many_steps():
    "15 of 20 steps are '0.75dur'; the half-life of 5 % is a step. A pass that is cut short is over"
    swa, ema, lawa = SWACB(every='1ba'), EMACB(half_life='0.05dur', apply=False), LAWACB(k=9)
    run(swa, ema, lawa, max_steps=20, unsized=True)
    assert (swa.average.n, ema.average.n) == (6, 20)
    assert ema.average.rule(5) == pytest.approx(0.5)
    assert lawa.average.n == 2
    lawa = LAWACB(k=9)
    run(lawa, max_steps=25, unsized=True)
    assert lawa.average.n == 3
    with pytest.warns(UserWarning, match='starts after this fit'): run(SWACB(start='30ba'), max_steps=20, unsized=True)


@pytest.mark.parametrize('unsized', [False, True])
@pytest.mark.parametrize('cb', [lambda: [], lambda: [GradAccumCB(batches=2)]], ids=['', 'accumulated'])
def test_a_resumed_fit_ends_at_the_same_step(cb, unsized, tmp_path):
    class Stop(Callback):
        order = 96
        def after_step(self, learn):
            if learn.opt_steps == 12: raise KeyboardInterrupt
    def cbs(): return [*cb(), OneCycleCB(), EMACB(), SWACB(), CheckpointCB(tmp_path, every='6ba')]
    whole = run(*cbs()[:-1], max_steps=25, unsized=unsized)
    with pytest.raises(KeyboardInterrupt): run(*cbs(), Stop(), max_steps=25, unsized=unsized)
    resumed = run(*cbs(), max_steps=25, resume=tmp_path, unsized=unsized)
    assert same(state(whole), state(resumed)) and whole.history == resumed.history and resumed.opt_steps == 25
    again = run(*cbs(), max_steps=25, resume=tmp_path, unsized=unsized)
    assert again.opt_steps == 25 and again.history == whole.history                  # nothing is left to train


def test_errors_before_training():
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match='max_steps must be a whole number'): run(max_steps=bad)
    with pytest.raises(ValueError, match='needs train=True'): run(max_steps=3, train=False)
    for cb in (OneCycleCB(), WarmupStableDecayCB()):
        with pytest.raises(ValueError, match='no length: give the fit max_steps'): run(cb, unsized=True)
    with pytest.raises(ValueError, match="'200ba', or the fit max_steps"): run(EMACB(half_life='0.05dur'), unsized=True)


class Longer:
    "A loader that gives more batches than its length says"
    def __init__(self, dl): self.dl = dl
    def __iter__(self): return iter(self.dl)
    def __len__(self): return len(self.dl) - 3


@pytest.mark.parametrize('make', [OneCycleCB, lambda: BatchSchedCB(partial(OneCycleLR, max_lr=1., total_steps=7))],
                         ids=['one cycle', 'total_steps'])
def test_epochs_longer_than_the_length_of_the_loader(make):
    "Wrong: torch's 'Tried to step 8 times', without a word of the loader"
    dls = data()
    dls.train = Longer(dls.train)
    with pytest.raises(ValueError, match='schedule has 7 steps.*longer than the length of the loader says.*max_steps'):
        learner(make(), dls=dls).fit(1)
    learner(OneCycleCB(), dls=dls).fit(max_steps=20)


def test_progress_of_fits_without_a_length(capsys):
    "Of how many epochs, nobody knows until the last one"
    run(ProgressCB(view=LogView), max_steps=25, unsized=True)
    lines = [line.split(' |')[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ['1 epochs', '2 epochs', '3/3 epochs']
    run(ProgressCB(view=LogView), max_steps=25)
    lines = [line.split(' |')[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ['1/3 epochs', '2/3 epochs', '3/3 epochs']
    class Stop(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 1: raise CancelFitException
    run(ProgressCB(view=LogView), Stop(), max_steps=25, unsized=True)
    assert 'stopped at 1 epochs' in capsys.readouterr().out
