"""Each operation on the disk fails once, in each way; then the program is started again, and all is as if nothing had
happened

Wrong: a part of a file under its name, a checkpoint removed before the next one is on the disk, a run that cannot be
started again."""
import os, re, shutil, signal, threading, warnings
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import optim

from fastswa.callbacks.distributed import DistributedCB
from fastswa.callbacks.loggers import CSVLoggerCB
from fastswa.callbacks.swa import EMACB
from fastswa.callbacks.swa_variants import PostHocEMACB
from fastswa.checkpoint.archive import read_checkpoint, write_checkpoint
from fastswa.checkpoint.background import HostCopies
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.checkpoint.saving import load_weights
from fastswa.compare.runs import compare
from fastswa.core import quiet
from fastswa.processes import _leave
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner
from faulty_disk import ERRORS, KILLS, FaultyDisk, Killed
from helpers import AtEpoch, linear, regression
from killed_run import result


def new_learner(*cbs, lr=0.1):
    learn = TrainLearner(linear(), regression(2), F.mse_loss, lr, [EMACB(0.5, apply=False), *cbs],
                         partial(optim.SGD, momentum=0.9))
    learn.quiet = True
    return learn


def names(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


def looks(folder):
    "What tells one state of the disk from another: names, without what is random in them, and sizes"
    return tuple((re.sub(r'[0-9a-f]{8}\.tmp', 'tmp', o), (folder/o).lstat().st_size) for o in names(folder))


def fail_everywhere(tmp_path, go, intact, ready=lambda folder: None, only=lambda path: True, every=False, ways=None,
                    threads=False):
    """Call `go(folder)` with one operation failing, `intact(folder)`, and `go(folder)` once more, for each operation
    and each way, or `ways` of them by turns. `ready` makes what was there before, `only` chooses paths. Where a failure
    leaves the disk as another one has, the second call would do the same once more, and is left out but with `every`;
    a process killed before an operation is one killed after the last, where no `threads` write beside each other"""
    def in_folder(name, at=None, how=None):
        folder = tmp_path/name
        folder.mkdir()
        ready(folder)
        return folder, FaultyDisk(folder, at, how)
    folder, disk = in_folder('whole')
    with disk: whole = go(folder)
    left, seen, n, all_ops = names(folder), set(), 0, disk.ops
    ops = [(i, op, path) for i, (op, path) in enumerate(all_ops) if only(path)]
    for i, op, path in ops:
        possible = [how for how in (*KILLS, *ERRORS) if how != 'torn write' or op in ('write', 'rmtree')]
        if i and only(all_ops[i - 1][1]) and not threads: possible.remove('killed before')
        for how in (possible[(i + k) % len(possible)] for k in range(ways or len(possible))):
            folder, disk = in_folder(f'{i}-{how}', i, how)
            where = f'{how}: operation {i}, {op}'
            with disk, warnings.catch_warnings():
                warnings.filterwarnings('ignore', '.*(could not be|CSVLoggerCB failed)')
                try: go(folder)
                except (Killed, OSError): pass
            assert disk.failed, where
            intact(folder)
            n += 1
            if looks(folder) in seen and not every: continue
            seen.add(looks(folder))
            with FaultyDisk(folder): assert go(folder) == whole, where
            kept = {path} if op == 'unlink' and how in ERRORS else set()      # until the next save, if there is one
            assert {*names(folder)} - kept == {*left}, where
    print(f'\n{len(ops)} operations, {n} failures, {len(seen)} states: {dict(Counter(op for _, op, _ in ops))}')
    return n


def train(folder, *cbs, **kw):
    learn = new_learner(CheckpointCB(folder/'run', best='loss', keep=1, **kw), *cbs)
    learn.fit(2, valid='raw', resume=folder/'run')
    return result(learn), read_checkpoint(folder/'run'/'best.pt')['opt_steps']


def checkpoints_intact(folder):
    for p in (folder/'run').glob('*.pt'): read_checkpoint(p)


def test_checkpoints_of_a_run(tmp_path):
    assert fail_everywhere(tmp_path, train, checkpoints_intact) > 100


def test_checkpoints_in_the_background(tmp_path):
    assert fail_everywhere(tmp_path, partial(train, background=True), checkpoints_intact) > 100


@pytest.fixture
def in_parts():
    "The processes that hold the weights in parts: this one"
    yield DistributedCB('fsdp')
    _leave()


def train_in_parts(cb, folder, **kw):
    learn = new_learner(cb, CheckpointCB(folder/'run', best='loss', keep=1, **kw), lr=0.01)      # the loss falls
    learn.fit(2, valid='raw', resume=folder/'run')
    return result(learn), {k: v.tolist() for k, v in load_weights(folder/'run'/'best', 'ema').items()}


def parts_intact(folder):
    for p in (folder/'run').glob('[sb]*'): load_weights(p, 'ema')      # which reads all of it


@pytest.mark.parametrize('background, ways', [
    (False, 1), pytest.param(False, None, marks=pytest.mark.slow), pytest.param(True, None, marks=pytest.mark.slow)])
def test_checkpoints_in_parts(tmp_path, in_parts, background, ways):
    "Every operation of torch's own writer, too. Wrong: a folder under its name before all of it is on the disk"
    go = partial(train_in_parts, in_parts, background=background)
    assert fail_everywhere(tmp_path, go, parts_intact, ways=ways, threads=True) > 50*(ways or 6)


@pytest.fixture(scope='module')
def learners():
    "One that has trained, and one that has trained on"
    first, second = new_learner(), new_learner()
    first.fit(1)
    second.fit(2)
    return first, second


def test_a_saved_learner(tmp_path, learners):
    def go(folder):
        learners[1].save(folder/'a.pt')
        other = new_learner()
        other.load(folder/'a.pt')
        return result(other)
    def intact(folder): assert read_checkpoint(folder/'a.pt')['opt_steps'] in (2, 4)
    assert fail_everywhere(tmp_path, go, intact, lambda folder: learners[0].save(folder/'a.pt')) > 30


def test_an_export(tmp_path, learners):
    def go(folder):
        learners[1].export(folder/'a.safetensors', 'ema')
        return {k: v.tolist() for k, v in load_file(folder/'a.safetensors').items()}
    def ready(folder): learners[0].export(folder/'a.safetensors', 'ema')
    ready(tmp_path)
    old = load_file(tmp_path/'a.safetensors')
    new = learners[1].averages['ema'].weights
    def intact(folder):
        found = load_file(folder/'a.safetensors')
        assert any(all(torch.equal(v, o[k]) for k, v in found.items()) for o in (old, new))
    assert fail_everywhere(tmp_path, go, intact, ready) > 30


def test_a_log_beside_checkpoints(tmp_path, monkeypatch):
    "Wrong: a run that was killed before its first checkpoint is refused for its own log"
    monkeypatch.setattr('fastswa.callbacks.loggers.time', SimpleNamespace(perf_counter=lambda: 0.))
    def go(folder): return train(folder, CSVLoggerCB(folder/'log.csv')), (folder/'log.csv').read_text()
    def intact(folder):
        checkpoints_intact(folder)
        if (folder/'log.csv').exists(): assert (folder/'log.csv').read_text()[-1] == '\n'
    assert fail_everywhere(tmp_path, go, intact, only=lambda path: 'log' in path) > 100


def test_snapshots_in_a_folder(tmp_path):
    "Wrong: a snapshot is removed that the checkpoint still needs"
    def go(folder):
        cb = PostHocEMACB(every='1ba', keep=3, folder=folder/'ema', apply=False)
        res = train(folder, cb)
        return res, {k: v.tolist() for k, v in cb.average.reconstruct(0.1).items()}
    def intact(folder):
        checkpoints_intact(folder)
        for p in (folder/'ema').glob('*.pt'): torch.load(p, weights_only=True)
    assert fail_everywhere(tmp_path, go, intact, only=lambda path: 'ema' in path) > 100


def make_learner(seed):
    learn = new_learner()
    learn.cbs = []
    return learn


def test_a_comparison(tmp_path):
    def go(folder):
        with quiet(): found = compare(make_learner, dict(ema=EMACB(0.5)), 2, 1, folder/'out', n_jobs=1)
        return found.table.to_csv()
    assert fail_everywhere(tmp_path, go, lambda folder: None) > 50


# --- in the background


class Later(Callback):
    "Let the writer wait until training is two steps further"
    order = 90
    def __init__(self, monkeypatch):
        self.go = threading.Event()
        def waits(state, path): return self.go.wait(60) and write_checkpoint(state, path)
        monkeypatch.setattr('fastswa.checkpoint.checkpoint.write_checkpoint', waits)
    def before_batch(self, learn):
        if learn.training and (learn.epoch, learn.iter) == (1, 1): self.go.set()


def test_what_is_written_later_is_of_the_moment_of_the_save(tmp_path, monkeypatch):
    "Wrong: weights, averages, momentum or history of a later step; or a step that waits for the disk, here for ever"
    new_learner(CheckpointCB(tmp_path/'a', '2ba', keep=None)).fit(3)
    new_learner(CheckpointCB(tmp_path/'b', '2ba', keep=None, background=True), Later(monkeypatch)).fit(3)
    assert names(tmp_path/'a') == names(tmp_path/'b') == [f'step-{i:08}.pt' for i in (2, 4, 6)]
    for name in names(tmp_path/'a'):
        a, b = (read_checkpoint(tmp_path/o/name) for o in 'ab')
        for state in a, b:
            del state['made']
            state['callbacks'] = [o for o in state['callbacks'] if o['name'] != 'Later']
        assert str(a) == str(b), name


@pytest.mark.filterwarnings('ignore:CheckpointCB.cleanup_fit failed too')
def test_what_the_writer_could_not_write_is_raised(tmp_path):
    "At the next save, or when the fit ends; then the learner is as it was, and can go on"
    for at, steps in (0, 4), (2, 6):
        gone = AtEpoch(at, lambda learn: (tmp_path/'run').rename(tmp_path/f'gone-{at}'))
        learn = new_learner(CheckpointCB(tmp_path/'run', background=True), gone)
        with pytest.raises(OSError, match='could not be written to .*run/step-'): learn.fit(3)
        assert learn.opt_steps == steps
        learn.cbs.remove(gone)
        learn.fit(1)
        assert names(tmp_path/'run') == [f'step-{steps + 2:08}.pt']
        shutil.rmtree(tmp_path/'run')


@pytest.mark.parametrize('error', ['Ctrl-C', ZeroDivisionError])
def test_the_end_of_a_fit_waits_for_the_writer(tmp_path, monkeypatch, error):
    class Ends(Callback):
        def after_batch(self, learn):
            if not learn.training or learn.epoch != 1: return
            if error == 'Ctrl-C': os.kill(os.getpid(), signal.SIGINT)
            else: raise error
    learn = new_learner(CheckpointCB(tmp_path, background=True), Later(monkeypatch), Ends())
    learn.cbs[2].go.set()
    with pytest.raises(KeyboardInterrupt if error == 'Ctrl-C' else error): learn.fit(3)
    left = dict.fromkeys(names(tmp_path))
    assert [*left] == ['step-00000002.pt', 'step-00000003.pt'][:2 if error == 'Ctrl-C' else 1]
    for name in left: read_checkpoint(tmp_path/name)


def test_copies_share_what_the_originals_share():
    "Wrong: tied weights become two; a slice, a transposed or an empty tensor becomes another"
    t, copies = torch.arange(12.).reshape(3, 4), HostCopies()
    state = dict(a=t, b=[t, t.T, t[1:, ::2]], c=(torch.empty(0, 3), torch.tensor(True), 'text', torch.ones(2).half()))
    first = copies(state)
    assert str(first) == str(state) and first['b'][1].stride() == (1, 4)
    t += 1
    assert first['a'][0, 0] == 0
    first['a'][0, 0] = 5
    assert all(o[0, 0] == 5 for o in first['b'][:2])
    place = first['a'].data_ptr()
    second = copies(state)
    assert second['a'].data_ptr() == place and str(second) == str(state)
