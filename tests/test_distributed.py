"""Two processes that train one model, started as torchrun does: as one process with batches of twice the size; what
they decide together; what goes wrong in one is an error in all"""
import contextlib
import io
import math
import os
import signal
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset
from torcheval.metrics import MulticlassAccuracy

from accelerate import Accelerator

from fastswa.all import (
    AccelerateCB, BNUpdateCB, CSVLoggerCB, Callback, CheckpointCB, DistributedCB, EMACB, EarlyStoppingCB, GradAccumCB,
    Learner, LogCB, MetricsCB, NaNGuardCB, PostHocEMA, PostHocEMACB, SWACB, TrainLearner)
from fastswa.callbacks import distributed
from fastswa.data.loaders import BatchLoader
from fastswa.processes import Processes, _leave
from helpers import Hits, check_case, copied, end_ranks, errors_of, raises_on_all, run_cases, start_ranks

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='needs gloo')
LIMIT = 300 # seconds: only so that processes that wait for each other come to an end


def rank(): return dist.get_rank()


def examples(n):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=g)
    return F.one_hot(y, 3).float() + torch.randn(n, 3, generator=g)/2, y


def loaders(n=37, bs=4, shuffle=True, seed=3, **kw):
    "Shuffled by a generator of their own; validation in batches of another size"
    ds, g = TensorDataset(*examples(n)), torch.Generator().manual_seed(seed)
    return SimpleNamespace(train=DataLoader(ds, bs, shuffle=shuffle, generator=g, **kw), valid=DataLoader(ds, bs + 1))


def net(norm=False, dropout=0.):
    torch.manual_seed(0)
    act = nn.BatchNorm1d(8) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(3, 8), act, nn.Dropout(dropout), nn.Linear(8, 3))


sgd = partial(optim.SGD, momentum=0.9)


def accuracy(preds, targets): return (preds.argmax(1) == targets).float().mean()


def learner(*cbs, dls=None, model=None, together=True, **kw):
    cbs = [DistributedCB(timeout=30)]*together + [*cbs]
    return TrainLearner(net() if model is None else model, dls or loaders(), F.cross_entropy, 0.1, cbs, sgd, **kw)


def metrics(): return MetricsCB(accuracy, of_torcheval=MulticlassAccuracy())


def everywhere(value):
    "Every process has the same, bit for bit"
    tensors = isinstance(value, list) and torch.is_tensor(value[0])
    raw = [t.detach().clone() for t in value] if tensors else value
    got = learner().processes.gather(raw)
    if tensors: return all(torch.equal(a, b) for o in got for a, b in zip(o, raw))
    return all(o == raw for o in got)


def close(a, b): torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def same_rows(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert {k: pytest.approx(v, rel=2e-5) if isinstance(v, float) else v for k, v in x.items()} == y


# --- what runs in each of two processes, one after the other


def as_one_with_twice_the_batch():
    """Wrong: each sample seen by both; a padded one counted twice; the last, smaller batch of one process weighed as
    that of the other; means of means in the table"""
    for n in (37, 33, 2):                                      # 33: the last batch is one sample, for two processes
        torch.manual_seed(100 + rank())                        # nothing depends on seeds outside
        two = learner(EMACB(decay=0.9, apply=False), metrics(), dls=loaders(n))
        two.fit(3)
        one = learner(EMACB(decay=0.9, apply=False), metrics(), dls=loaders(n, 8), together=False)
        one.fit(3)
        assert (two.opt_steps, two.averages['ema'].n) == (one.opt_steps, math.ceil(n/8)*3)
        close(two.model.state_dict(), one.model.state_dict())
        close(two.averages['ema'].weights, one.averages['ema'].weights)
        same_rows(one.history, two.history)
        assert everywhere([*two.model.parameters(), *two.averages['ema'].weights.values()]) and everywhere(two.history)
        assert type(two.model) is nn.Sequential and isinstance(two.dls.train, DataLoader)       # as before the fit


class Seen(Callback):
    order = -10
    def __init__(self): self.seen = [[], []]
    def after_batch(self, learn):
        if learn.dl.n_samples(learn.batch): self.seen[learn.training] += learn.batch[0].flatten().tolist()


def numbered_loaders(n, bs, kind):
    x, ds = torch.arange(n), TensorDataset(torch.arange(n).float().view(n, 1), torch.zeros(n, 1))
    if kind == 'memory':
        x8 = x.to(torch.uint8).view(n, 1, 1, 1)
        return SimpleNamespace(train=BatchLoader(x8, x, bs, lambda b: b.flatten(1)*255, shuffle=True),
                               valid=BatchLoader(x8, x, bs, lambda b: b.flatten(1)*255))
    order = dict(batch_size=bs, shuffle=True)
    if kind == 'sampler': order = dict(batch_size=bs, sampler=DistributedSampler(ds, 2, rank(), seed=5))
    if kind == 'batches': order = dict(batch_sampler=Twos(SequentialSampler(ds), 2, False))
    if kind == 'workers': order |= dict(num_workers=1, persistent_workers=True)
    return SimpleNamespace(train=DataLoader(ds, **order), valid=DataLoader(ds, bs))


class Twos(BatchSampler): "Batches that somebody has put together"


def each_sample_once():
    "In training and validation, from all kinds of loaders, in an order that changes by the epoch"
    for kind, n in (('plain', 11), ('memory', 11), ('sampler', 11), ('batches', 11), ('workers', 11), ('memory', 9)):
        torch.manual_seed(rank())                              # orders that are drawn differently on each would overlap
        seen, dls = Seen(), numbered_loaders(n, 2, kind)
        learn = learner(seen, dls=dls, model=nn.Linear(1, 1))
        learn.loss_func, epochs = lambda p, t: p.mean()*0, []
        for _ in range(2):
            seen.seen = [[], []]
            learn.fit(1)
            both = learn.processes.gather([[int(i) for i in o] for o in seen.seen])
            assert sorted(both[0][0] + both[1][0]) == [*range(n)], (kind, 'validation', both)
            assert sorted(both[0][1] + both[1][1]) == [*range(n)], (kind, both)
            epochs.append(both[0][1])
        if kind == 'workers': dls.train._iterator = None


class Epochs(DistributedSampler):
    told = ()
    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        self.told = *self.told, epoch


def set_epoch_is_called():
    "Wrong: the same order in each epoch"
    ds, seen = TensorDataset(torch.arange(12.).view(12, 1), torch.zeros(12, 1)), Seen()
    sampler = Epochs(ds, 2, rank())
    dls = SimpleNamespace(train=DataLoader(ds, 2, sampler=sampler), valid=None)
    learn = learner(seen, dls=dls, model=nn.Linear(1, 1))
    learn.loss_func = lambda p, t: p.mean()*0
    learn.fit(2)
    assert sampler.told == (0, 1) and seen.seen[1][:6] != seen.seen[1][6:]


def nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner(EMACB(), metrics()).fit(1)


class Memory:
    def __init__(self): self.rows = []
    def log(self, values): self.rows.append(values)


def one_of_them_speaks(folder):
    "Rows, logs and files. Wrong: the losses of its own samples in the log"
    out, two, one = io.StringIO(), Memory(), Memory()
    with contextlib.redirect_stdout(out):
        learner(metrics(), LogCB(two, '2ba'), CSVLoggerCB(folder/'log.csv')).fit(1)
    assert bool(out.getvalue()) == bool(two.rows) == (rank() == 0)
    if rank(): return
    assert len((folder/'log.csv').read_text().splitlines()) == 3
    learner(metrics(), LogCB(one, '2ba'), dls=loaders(bs=8), together=False).fit(1)
    same_rows(one.rows, two.rows)


def predictions_are_all():
    "Of each sample, in order, on every process"
    learn = learner(metrics())
    learn.fit(1)
    preds, targets = learn.get_preds()
    assert torch.equal(targets, examples(37)[1])
    close(preds, learn.model.eval()(examples(37)[0]).detach())
    assert [r['loss'] for r in learn.validate()] == pytest.approx([F.cross_entropy(preds, targets).item()])


def statistics_are_pooled():
    "Of all samples, once: as one process has them. Wrong: those of a part, or of the fill-in too"
    learn = learner(SWACB(start='0ep', every='1ba'), BNUpdateCB(), model=net(norm=True), dls=loaders(36))
    learn.fit(2)
    for n in (36, 37, 33):                                     # 33: the last batch is one sample, for two processes
        if n != 36:                                            # that of the fit's end
            learn.dls = loaders(n)
            learn.restore()
            learn.averages['swa'].update()
            learn.apply('swa')
        model = net(norm=True)
        model.load_state_dict(learn.averages['swa'].weights, strict=False)
        h = model[0](examples(n)[0]).detach().double()
        torch.testing.assert_close(learn.model[1].running_mean.double(), h.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(learn.model[1].running_var.double(), h.var(0), rtol=1e-6, atol=1e-7)
        assert everywhere([*learn.model.buffers()]) and everywhere(learn.history)


def by_target(preds, targets):
    "A mean that counts some samples more than others, as tokens do"
    weight = 1. + targets
    return (F.cross_entropy(preds, targets, reduction='none')*weight).sum()/weight.sum()


def accumulated():
    "Windows of two batches, the last of them shorter and smaller. Wrong: a mean of means"
    for n, kw, loss in ((19, dict(batches=2), F.cross_entropy), (19, dict(samples=7), F.cross_entropy),
                        (19, dict(batches=2, weight=lambda b: (1. + b[1]).sum()), by_target),
                        (17, dict(batches=2, weight=lambda b: (1. + b[1]).sum()), by_target)):
        ends = []
        for together, bs in ((True, 2), (False, 4)):
            learn = learner(GradAccumCB(**kw), dls=loaders(n, bs), together=together)
            learn.loss_func = loss
            learn.fit(2)
            ends.append((learn.opt_steps, learn.model.state_dict()))
        assert ends[0][0] == ends[1][0] == 6, kw
        close(ends[0][1], ends[1][1])


def accumulated_from_batches_of_all_sizes():
    "Wrong: each counts its own samples, and they step at different batches, or wait for each other for ever"
    x, y = examples(24)
    pairs, ends = [(1, 3), (4, 2), (1, 1), (2, 4), (3, 3)], []
    for sizes in ([n for p in pairs for n in p], [sum(p) for p in pairs]):
        dls = SimpleNamespace(train=[*zip(x.split(sizes), y.split(sizes))], valid=None)
        learn = learner(GradAccumCB(samples=5), dls=dls, together=len(sizes) > 5)
        learn.fit(1, valid=False)
        ends.append((learn.opt_steps, learn.model.state_dict()))
    assert ends[0][0] == ends[1][0] == 3
    close(ends[0][1], ends[1][1])


def snapshots_are_files_of_one(folder):
    "Wrong: both write the same file, and remove each other's; the other does not find it when the fit is over"
    def run(cb, **kw):
        learn = learner(cb, CheckpointCB(folder/'run', every='3ba'))
        learn.fit(**kw)
        return cb.average.reconstruct(0.1)
    def cb(folder=None): return PostHocEMACB(every='2ba', keep=5, folder=folder, apply=False)
    def equal(a, b): return all(torch.equal(a[k], v) for k, v in b.items())
    learn = learner(other := cb())
    learn.fit(2)
    whole = other.average.reconstruct(0.1)
    if rank() == 0:                                            # of a run that was killed before its first checkpoint
        PostHocEMA(net(), folder=folder/'ema').update()
        (folder/'run').mkdir()
    dist.barrier()
    assert equal(run(cb(folder/'ema'), n_epochs=1, resume=folder/'run'), whole) is False
    found = run(cb(folder/'ema'), n_epochs=2, resume=folder/'run')
    assert equal(found, whole) and everywhere([*found.values()])
    assert len([*(folder/'ema').iterdir()]) == 5
    raises_on_all(RuntimeError, 'holds snapshots up to step 10', lambda: learner(cb(folder/'ema')).fit(1))


def the_rate_is_found_together():
    learn = learner()
    before = copied(learn.model.state_dict())
    found = learn.lr_find(show=False, max_steps=30)
    alone = learner(dls=loaders(bs=8), together=False).lr_find(show=False, max_steps=30)
    assert everywhere(found.losses)
    assert len(found.losses) == len(alone.losses)
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())


def stopped_early_together():
    stop = EarlyStoppingCB(patience=1)
    learn = learner(stop, dls=loaders(20))
    learn.lr = 30.
    learn.fit(12)
    assert stop.reason and everywhere(stop.stopped_epoch) and everywhere(len(learn.history))


class BadLoss(Callback):
    "In one process, in one batch"
    order = -18
    def __init__(self, at=2): self.at = at
    def after_loss(self, learn):
        if learn.training and rank() == 1 and learn.iter == self.at: learn.loss = learn.loss*math.nan


def a_bad_loss_is_skipped_or_stops_all():
    guard = NaNGuardCB()
    learn = learner(BadLoss(), guard)
    learn.fit(1)
    assert (guard.skipped, learn.opt_steps) == (1, 4) and everywhere([*learn.model.parameters()])
    learn = learner(BadLoss())
    with pytest.raises(FloatingPointError, match='at batch 2 of epoch 0'): learn.fit(1)
    assert everywhere(learn.opt_steps)


class Press(Callback):
    "Ctrl-C, in one process; with `valid`, in the validation that follows"
    def __init__(self, at, valid=False): self.at, self.valid = at, valid
    def after_batch(self, learn):
        if learn.training != self.valid and rank() == 1 and learn.opt_steps == self.at:
            self.at = None
            signal.raise_signal(signal.SIGINT)


class Clock(Callback):
    "A batch takes a tenth of a second in one process, two in the other, and an hour in epoch 1"
    seconds, met = 0., ()
    def after_predict(self, learn):
        if learn.training: self.seconds += 3600 if learn.epoch == 1 else (0.1, 0.2)[rank()]
    def __call__(self): return self.seconds


def they_agree_now_and_then(folder):
    """On whether to stop. Wrong: in each batch, which costs; more seldom than batches take; at other batches in one
    process than in the other; a stop that is asked for after the last agreement is forgotten"""
    def run(*cbs, epochs=1, raises=None):
        clock, met, largest = Clock(), [], Processes.max
        def noted(self, *values):
            met.append((learn.epoch, learn.iter))
            return largest(self, *values)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(distributed, 'perf_counter', clock)
            m.setattr(DistributedCB, 'pause', 0.5)
            m.setattr(Processes, 'max', noted)
            learn = learner(clock, *cbs, dls=loaders(80))                 # ten batches
            with raises or contextlib.nullcontext(): learn.fit(epochs)
        assert everywhere(met) and everywhere(learn.opt_steps)
        return met, learn.opt_steps
    some, end = [0, 2, 4, 6, 8], [(0, 7)]                                 # then the last batch of the validation
    assert run()[0] == [(0, i) for i in some] + end
    assert run(epochs=2)[0] == [(0, i) for i in some] + [(1, i) for i in range(10)] + [(1, 7)]
    bad = pytest.raises(FloatingPointError, match='at batch 5 of epoch 0')
    assert run(BadLoss(5), raises=bad) == ([(0, i) for i in some[:4]], 7)
    bad = pytest.raises(FloatingPointError, match='at batch 9 of epoch 0')
    assert run(BadLoss(9), raises=bad) == ([(0, i) for i in some], 10)
    def stopped(at, epochs, valid=False):
        path = folder/f'{at} {epochs} {valid}'
        _, steps = run(CheckpointCB(path), Press(at, valid), epochs=epochs, raises=pytest.raises(KeyboardInterrupt))
        assert max(p.name for p in path.iterdir()) == f'step-{steps:08}.pt'
        return steps
    assert [stopped(4, 1), stopped(10, 1), stopped(10, 1, valid=True)] == [5, 10, 10]
    assert [stopped(10, 2), stopped(10, 2, valid=True)] == [11, 11]


def averages(): return EMACB(decay=0.8, apply=False), SWACB(start='0ep', every='2ba', apply=False)


def resumed(folder):
    "With dropout of each process's own. Wrong: all go on with the random numbers of the first"
    logs = []
    def run(*cbs, **kw):
        logs.append(Memory())
        learn = learner(*averages(), metrics(), LogCB(logs[-1], '5ba'), *cbs, model=net(dropout=0.3))
        torch.manual_seed(7 + rank())
        return learn, partial(learn.fit, 4, **kw)
    whole, fit = run()
    fit()
    learn, fit = run(CheckpointCB(folder/'run', every='3ba'), Press(12))
    learn.cbs[0].pause = 0                                    # they agree after each batch
    with pytest.raises(KeyboardInterrupt): fit()
    assert everywhere(learn.opt_steps) and learn.opt_steps == 13
    rest, fit = run(CheckpointCB(folder/'run', every='3ba'), resume=folder/'run')
    fit()
    assert everywhere(sorted(p.name for p in (folder/'run').iterdir()))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters()))
    assert whole.history == rest.history
    assert logs[0].rows[-3:] == logs[2].rows[-3:]
    for name, a in whole.averages.items():
        assert all(torch.equal(v, rest.averages[name].weights[k]) for k, v in a.weights.items())
    again, fit = run(CheckpointCB(folder/'run', every='3ba'), resume=folder/'run')
    fit()                                                     # all of it is done: not one batch
    assert again.history == whole.history and everywhere([*again.model.parameters()])


# --- errors that are the same everywhere


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, n): self.n = n
    def __iter__(self): return iter([(torch.ones(3), torch.tensor(0))]*self.n)


def refused(folder):
    mine = rank() == 1
    raises_on_all(ValueError, 'differ in train data: 37 samples, 10 batches on process 0, 33 samples, 9 batches',
                  lambda: learner(dls=loaders(33 if mine else 37)).fit(1))
    stream = SimpleNamespace(train=DataLoader(Stream(8 if mine else 12), 2), valid=None)
    raises_on_all(ValueError, 'loader of process 1 has ended after 4 batches', lambda: learner(dls=stream).fit(1))
    raises_on_all(ValueError, 'differ in callbacks: DistributedCB, EMACB',
                  lambda: learner(*[EMACB()]*(not mine)).fit(1))
    raises_on_all(ValueError, 'differ in parameters', lambda: learner(model=nn.Linear(3, 3, bias=mine)).fit(1))
    raises_on_all(ValueError, 'differ in fit', lambda: learner().fit(1 + mine))
    raises_on_all(TypeError, 'merge_state', lambda: learner(MetricsCB(hits=Hits())).fit(1))
    learn = learner()
    learn.averages.add('ema')
    if mine: learn.averages.remove('ema')
    raises_on_all((ValueError, RuntimeError), 'differ in averages', lambda: learn.validate())
    wrapped = nn.parallel.DistributedDataParallel(net())
    raises_on_all(ValueError, 'is in DistributedDataParallel already', lambda: learner(model=wrapped).fit(1))
    own = CheckpointCB(folder/f'own-{rank()}')
    raises_on_all(ValueError, 'own-[01] is another folder for process 1', lambda: learner(own).fit(1))
    learner(CheckpointCB(folder/'seen')).fit(1)
    hidden = folder/'hidden' if mine else folder/'seen'
    raises_on_all(ValueError, 'nothing in .*hidden on process 1',
                  lambda: learner(CheckpointCB(hidden)).fit(2, resume=hidden))
    raises_on_all(ValueError, 'of another model', lambda: learner(model=nn.Linear(3, 3)).fit(2, resume=folder/'seen'))
    raises_on_all(ValueError, 'holds checkpoints of another run', lambda: learner(CheckpointCB(folder/'seen')).fit(1))
    (folder/'a file').write_text('')
    raises_on_all(OSError, 'a folder that can be written to', lambda: learner(CheckpointCB(folder/'a file')).fit(1))
    raises_on_all(RuntimeError, 'have met already', AccelerateCB)
    from accelerate.state import PartialState
    PartialState()
    try:
        with pytest.raises(RuntimeError, match='accelerate runs these processes'): learner()
    finally: PartialState._reset_state()


CASES = (as_one_with_twice_the_batch, each_sample_once, set_epoch_is_called, one_of_them_speaks, nothing_is_warned_of,
         predictions_are_all, statistics_are_pooled, accumulated, accumulated_from_batches_of_all_sizes,
         snapshots_are_files_of_one, the_rate_is_found_together, stopped_early_together,
         a_bad_loss_is_skipped_or_stops_all, they_agree_now_and_then, resumed, refused)


def work(folder):
    "All cases, so that processes are started once; says of each whether it failed"
    warnings.simplefilter('ignore')
    signal.signal(signal.SIGINT, signal.default_int_handler)
    DistributedCB(timeout=30)
    run_cases(CASES, folder)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    end_ranks(start_ranks(2, work, folder, folder=folder), LIMIT)
    return folder


@pytest.mark.parametrize('case', [c.__name__ for c in CASES])
def test_in_two_processes(case, results): check_case(case, results, 2)


# --- with accelerate


def accelerated():
    "Wrong: a sample seen by both, a step counted twice, a model that stays wrapped"
    warnings.simplefilter('ignore')
    cb = AccelerateCB(accelerator=Accelerator(cpu=True), timeout=30)
    def run(cls, *cbs, bs=4):
        learn = cls(net(), loaders(37, bs), F.cross_entropy, 0.1, [*cbs, EMACB(decay=0.9, apply=False), metrics()], sgd)
        learn.fit(1)
        learn.fit(2)
        return learn
    two, one = run(Learner, cb), run(TrainLearner, bs=8)
    assert two.opt_steps == two.averages['ema'].n == one.opt_steps == 15 and type(two.model) is nn.Sequential
    close(two.model.state_dict(), one.model.state_dict())
    close(two.averages['ema'].weights, one.averages['ema'].weights)
    same_rows(one.history, two.history)
    assert len(two.lr_find(show=False, max_steps=5).losses) == 5
    with pytest.raises(RuntimeError, match='accelerate runs these processes already'): DistributedCB()
    print('all of it')


def test_accelerate(tmp_path):
    end_ranks(start_ranks(2, accelerated, folder=tmp_path), LIMIT)
    assert errors_of(tmp_path, 2) == ['', ''] and 'all of it' in (tmp_path/'out.1').read_text()


# --- those that lose a process


class Die(Callback):
    order = 99
    def after_batch(self, learn):
        if learn.training and learn.opt_steps == 12 and rank() == 1: os.kill(os.getpid(), signal.SIGKILL)


def with_a_death(folder):
    warnings.simplefilter('ignore')
    learner(*averages(), CheckpointCB(folder/'run', every='5ba'), Die()).fit(50)


def test_one_is_killed(tmp_path):
    "The other ends with an error that says so; the last checkpoint is whole"
    began = time.monotonic()
    codes = end_ranks(start_ranks(2, with_a_death, tmp_path, folder=tmp_path), LIMIT)
    assert codes == [1, -signal.SIGKILL]
    assert 'another process has ended' in errors_of(tmp_path, 2)[0] and time.monotonic() - began < 60
    learn = learner(*averages(), together=False)
    learn.load(tmp_path/'run')
    assert (learn.opt_steps, learn.averages['ema'].n) == (10, 10)


def test_accelerate_in_one_process_is_no_launch():
    "Trainer's arguments make accelerate's state, too. Wrong: after them nothing can train with its weights in parts"
    from accelerate.state import PartialState
    PartialState()
    try:
        learn = TrainLearner(net(), loaders(), F.cross_entropy, 0.1, [DistributedCB('fsdp')], sgd)
        learn.fit(1)
    finally:
        _leave()
        PartialState._reset_state()
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def one_has_no_average():
    warnings.simplefilter('ignore')
    learn = learner(EMACB(apply=False), BNUpdateCB(), model=net(norm=True))
    learn.fit(1)
    if rank() == 1: learn.averages.remove('ema')
    learn.apply('ema')                                         # statistics for it are computed together


def test_an_average_that_one_does_not_have(tmp_path):
    "Wrong: the other waits for it for ever"
    began = time.monotonic()
    codes = end_ranks(start_ranks(2, one_has_no_average, folder=tmp_path), LIMIT)
    other, lacking = errors_of(tmp_path, 2)
    assert codes == [1, 1] and time.monotonic() - began < 60
    assert "'ema'" in lacking.splitlines()[-1] and 'one of them has ended, or did not come to the same place' in other


def alone_at_the_rendezvous(): DistributedCB(timeout=2)


@pytest.mark.parametrize('r', [0, 1])
def test_nobody_comes(tmp_path, r):
    "Wrong: it waits for half an hour, the first, at whose address they meet, or another"
    processes = start_ranks(2, alone_at_the_rendezvous, folder=tmp_path)
    processes[1 - r].kill()
    end_ranks(processes, LIMIT)
    text = errors_of(tmp_path, 2)[r]
    assert f'process {r} of 2 did not meet the others at 127.0.0.1:' in text and 'within 2 seconds' in text
