"""Checkpoints: what is in them, a resume that is exact wherever the run was stopped, and files that are refused"""
import contextlib, io, os, random, resource, signal, time, warnings
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

import helpers
import killed_run
from fastswa.callbacks.augment import AugmentCB
from fastswa.callbacks.augment import MixUpCB
from fastswa.data.transforms import RandErase, RandFlip
from fastswa.callbacks.basics import RecorderCB
from fastswa.averaging.interchange import save_safetensors
from fastswa.callbacks.loggers import CSVLoggerCB, TensorBoardCB
from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.checkpoint.archive import numbered, read_checkpoint, step_of
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.checkpoint.resume import learner_state
from fastswa.checkpoint.saving import load_weights
from fastswa.core import quiet
from fastswa.random_state import set_seed
from fastswa.callbacks.schedule import BatchSchedCB, EpochSchedCB, OneCycleCB, WarmupStableDecayCB
from fastswa.data.loaders import BatchLoader
from fastswa.training.essentials import LossMeter
from fastswa.training.events import Callback
from fastswa.training.learner import MomentumLearner, TrainLearner
from fastswa.callbacks.speed import MixedPrecisionCB
from fastswa.callbacks.progress import LogView, ProgressCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa_variants import BEMACB, PostHocEMACB, SWADCB, SWAGCB, SwitchEMACB
from fastswa.callbacks.swa import EMACB, LAWACB, SWACB
from fastswa.callbacks.steps import ClosureCB, GradAccumCB, GradClipCB, NaNGuardCB
from helpers import AtEpoch, Hits, end_workers, forkserver
from killed_run import Data, learner, net, result, the_run

pytestmark = pytest.mark.filterwarnings('ignore:the model has BatchNorm', 'ignore:.*lr_scheduler.step')
spawn = forkserver()


def same(a, b):
    wrong = [k for k in a if a[k] != b[k]]
    assert a.keys() == b.keys() and not wrong, wrong


@pytest.fixture(scope='module')
def whole():
    "The result of a run that nothing stopped"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)      # as in the processes that are killed: two threads round otherwise
    try:
        learn = the_run()
        set_seed(1)
        learn.fit(killed_run.N_EPOCHS)
        return result(learn)
    finally: torch.set_num_threads(threads)


def start(*args):
    "A process that goes on with the run"
    here,there = spawn.Pipe()
    p = spawn.Process(target=killed_run.main, args=(args[0], there, *args[1:]))
    p.start()
    there.close()
    assert here.recv() == 'begun'
    return p, here


def finish(p, pipe):
    while isinstance(res := pipe.recv(), str): pass
    p.join()
    return res


def test_killed_at_random_moments(tmp_path, whole):
    """SIGKILL, again and again; a checkpoint at each step, so that many of the kills hit its writing

    Wrong: a loader that replays, an average that restarts."""
    rnd,kills,folder,finished = random.Random(0),0,tmp_path/'0',0
    p,pipe = start(folder)
    began = time.perf_counter()
    same(finish(p, pipe), whole)
    length = time.perf_counter() - began
    folder = tmp_path/'1'
    while kills < 8:
        p,pipe = start(folder)
        p.join(rnd.uniform(0, 0.25*length))
        kills += p.exitcode is None
        p.kill()
        p.join()
        if p.exitcode == 0:                              # it came to its end: the next one starts from the beginning
            same(finish(p, pipe), whole)
            finished,folder = finished + 1, tmp_path/f'{finished + 2}'
    same(finish(*start(folder)), whole)
    assert not [*folder.glob('.*')], 'what a killed process left half-written is removed'


@pytest.mark.parametrize('die', [('replace', 1), ('replace', 7), ('fsync', 1), ('fsync', 12), ('unlink', 20)])
def test_killed_in_the_middle_of_a_checkpoint_write(tmp_path, whole, die):
    p,pipe = start(tmp_path, '1ba', die)
    p.join()
    assert p.exitcode == -signal.SIGKILL
    assert all(f.suffix == '.pt' and read_checkpoint(f) for f in tmp_path.glob('step-*'))
    same(finish(*start(tmp_path)), whole)


@pytest.mark.parametrize('sig, status', [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_signals_leave_a_checkpoint(tmp_path, whole, sig, status):
    "With checkpoints far apart, the one that a signal asks for is the only one"
    p,pipe = start(tmp_path, '100ep', None, True)
    assert pipe.recv() == 'a batch'
    os.kill(p.pid, sig)
    pipe.send('go on')
    p.join()
    assert p.exitcode == status
    assert len([*tmp_path.glob('step-*.pt')]) == 1
    same(finish(*start(tmp_path)), whole)


def test_second_ctrl_c_does_not_wait(tmp_path):
    class Pressed(Callback):
        def after_batch(self, learn):
            if learn.iter == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
    learn,before = learner(Pressed(), CheckpointCB(tmp_path)),signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): learn.fit(2)
    assert not [*tmp_path.glob('step-*')] and signal.getsignal(signal.SIGINT) is before


class PowerCut(Callback):
    "End a fit by an error after a batch, and save before"
    order = 99
    def __init__(self, epoch, batch, path): self.at,self.path = (epoch, batch),path
    def after_batch(self, learn):
        if not learn.training or (learn.epoch, learn.iter) != self.at: return
        learn.save(self.path)
        raise RuntimeError('power cut')


class SaveAt(Callback):
    "Save after each of these batches: a dict of epoch and batch → path"
    order = 99
    def __init__(self, files): self.files = files
    def after_batch(self, learn):
        if learn.training and (at := (learn.epoch, learn.iter)) in self.files: learn.save(self.files[at])


class Noise:
    "A transform with a generator of its own"
    def __init__(self): self.generator = torch.Generator().manual_seed(5)
    def __call__(self, x): return x + torch.randn(x.shape, generator=self.generator)/10


class Endless:
    "A loader without a length"
    def __init__(self, dl): self.dl = dl
    def __iter__(self): return iter(self.dl)


def loaders(kind):
    data = Data()
    x,y = data.train.dataset.tensors
    pixels = (x - x.min()).mul(20).byte()
    if kind == 'workers': data = Data(num_workers=2)
    elif kind == 'generator':
        data.train = DataLoader(data.train.dataset, 32, shuffle=True, collate_fn=list,
                                generator=torch.Generator().manual_seed(3))
    elif kind == 'in memory': data.train = BatchLoader(pixels, y, 32, Noise(), True)
    elif kind == 'in memory, seeded':
        data.train = BatchLoader(pixels, y, 32, Noise(), True, torch.Generator().manual_seed(3))
    elif kind == 'no length': data.train = Endless(data.train)
    return data


def plateau(): return EpochSchedCB(partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5), metric='ema/loss')


RUNS = {
    'sgd, cosine by epochs': lambda: learner(EpochSchedCB(partial(lr_scheduler.CosineAnnealingLR, T_max=3)),
                                             opt_func=partial(optim.SGD, momentum=0.9)),
    'plateau on an average': lambda: learner(EMACB(0.8, apply=False), plateau()),
    'warm restarts, by batches': lambda: learner(
        BatchSchedCB(partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=5))),
    'warmup, stable, decay': lambda: learner(WarmupStableDecayCB(), LAWACB(2, '3ba', apply=False)),
    'all averages': lambda: learner(
        EMACB(apply=False), EMACB(0.7, every='3ba', name='slow'), SWACB('0.2dur', '2ba', swa_lr=0.05, anneal='1ep'),
        SWAGCB(3, '5ba', '2ba'), LAWACB(3, '2ba'), PostHocEMACB(every='4ba'),
        SwitchEMACB(half_life='3ba', switch='5ba'), SWADCB(1, 2), BEMACB(every='2ba'),
        BNUpdateCB(valid_batches=2)),
    'accumulation, clipping': lambda: learner(GradAccumCB(3), GradClipCB(norm=0.3), EMACB(0.8), OneCycleCB()),
    'accumulation by samples, no length': lambda: learner(GradAccumCB(samples=70), EMACB(0.8, every='2ba'),
                                                          dls=loaders('no length')),
    'fp16': lambda: learner(MixedPrecisionCB('fp16', init_scale=2.**40, growth_interval=3), EMACB(0.8), OneCycleCB()),
    'bf16, guarded, mixup': lambda: learner(MixedPrecisionCB(), NaNGuardCB(),
                                            MixUpCB(classes=4, generator=torch.Generator().manual_seed(2))),
    'momentum in the gradients': lambda: learner(EMACB(0.8), cls=MomentumLearner),
    'lbfgs': lambda: learner(ClosureCB(), opt_func=lambda ps, lr: optim.LBFGS(ps, 0.1, max_iter=3)),
    'adagrad': lambda: learner(EMACB(0.8), opt_func=optim.Adagrad),
    'erased by a generator of its own': lambda: learner(
        AugmentCB(RandErase(generator=torch.Generator().manual_seed(1)), RandFlip())),
    'workers': lambda: learner(EMACB(0.8), dls=loaders('workers')),
    'a generator of its own': lambda: learner(OneCycleCB(), dls=loaders('generator')),
    'in memory': lambda: learner(OneCycleCB(), dls=loaders('in memory')),
    'in memory, seeded': lambda: learner(OneCycleCB(), dls=loaders('in memory, seeded')),
    'stopped early': lambda: learner(EarlyStoppingCB(patience=1, min_delta=0.1), EMACB(0.8), ProgressCB(view=LogView),
                                     MetricsCB(hits=Hits())),
}


@pytest.mark.parametrize('name', RUNS)
def test_any_run_resumes_exactly(name, tmp_path):
    """Stopped after the first, a middle and the last batch of an epoch; the first resumed run writes the other files

    Wrong: whatever a callback, a loader or a generator does not remember."""
    def resumed(path, **kwargs):
        learn = RUNS[name]()
        set_seed(99)                                     # another process has other random state
        learn.fit(3, resume=path, **kwargs)
        return result(learn)
    whole,cut,first = RUNS[name](),RUNS[name](),tmp_path/'first.pt'
    set_seed(1)
    whole.fit(3)
    whole = result(whole)
    set_seed(1)
    with pytest.raises(RuntimeError, match='power cut'): cut.fit(3, cbs=PowerCut(0, 0, first))
    files = {at: tmp_path/f'{at}.pt' for at in ((1, 3), (1, 7), (2, 4))}
    same(resumed(first, cbs=SaveAt(files)), whole)
    written = [path for path in files.values() if path.exists()]
    for path in written: same(resumed(path), whole)
    assert len(written) == 3 or name == 'stopped early' and written


def test_resumed_twice_and_with_more_epochs(tmp_path):
    "A finished run of a constant rate goes on with more epochs as if they had been asked for at once"
    cb = lambda: EMACB(0.8, apply=False)
    set_seed(1)
    whole = learner(cb())
    whole.fit(3)
    set_seed(1)
    learner(cb()).fit(1, cbs=CheckpointCB(tmp_path))
    for n, was in (2, '1 epoch'), (3, '2 epochs'):
        learn = learner(cb())
        with pytest.warns(UserWarning, match=f'the fit was of {was} and is of {n} now'):
            learn.fit(n, cbs=CheckpointCB(tmp_path), resume=tmp_path)
    same(dict(result(learn), random=None), dict(result(whole), random=None))
    # wrong: one more, a batch after the last
    assert [step_of(p) for p in numbered(tmp_path)] == [learn.opt_steps*n//3 for n in (1, 2, 3)]


def test_what_is_in_it(tmp_path):
    "All that is promised, readable without the library. Wrong: only one of raw and average; whatever needs pickle"
    learn = the_run()
    learn.fit(2)
    learn.apply('ema')
    learn.save(tmp_path/'a.pt')
    state = torch.load(tmp_path/'a.pt', weights_only=True)
    raw = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.restore()
    for k, v in learn.model.state_dict().items(): assert torch.equal(state['weights']['raw'][k], v)
    assert not torch.equal(state['weights']['raw']['0.weight'], raw['0.weight'])
    for name, a in learn.averages.items():
        saved = state['averages']['averages'][name]['average']
        # the rule as it was given, not what it comes to in this run
        assert saved['n'] == a.n and saved['rule'] == repr(getattr(a.rule, 'given', a.rule))
        for k, v in a.weights.items(): assert torch.equal(saved['weights'][k], v)
    assert {*state['opt']} >= {'param_groups', 'state'}
    assert {*state['rng']} >= {'python', 'numpy', 'torch', 'cuda'}
    assert {*state['made']} >= {'python', 'torch', 'fastswa', 'time'}
    assert state['history'] == learn.history and state['opt_steps'] == learn.opt_steps


@pytest.mark.parametrize('change, words', [
    (dict(model=lambda: nn.Sequential(*net()[:5], nn.Linear(54, 5))),
     r'other shapes: 5.weight \(4, 54\), here \(5, 54\)'),
    (dict(opt_func=optim.SGD), 'AdamW'),
    (dict(dls=lambda: Data(300)), r'8 batches, here 10; 250 samples, here 300'),
    (dict(dls=lambda: Data(250, 25)), r'32 batch size, here 25'),
    (dict(cbs=[BatchSchedCB(partial(lr_scheduler.CosineAnnealingLR, T_max=32)), EMACB(0.8)]),
     r'only in the file: OneCycleCB; only here: BatchSchedCB'),
    (dict(cbs=[OneCycleCB()]), r"only in the file: EMACB 'ema'"),
])
def test_another_run_is_refused(tmp_path, change, words):
    "At once, by a sentence; nothing that is trained has changed"
    learner(OneCycleCB(), EMACB(0.8)).fit(4, cbs=PowerCutQuiet(1, 2, tmp_path/'a.pt'))
    change = {k: v() if k in ('model', 'dls') else v for k, v in change.items()}
    cbs,n = change.pop('cbs', [OneCycleCB(), EMACB(0.8)]),change.pop('n', 4)
    learn = learner(*cbs, **change)
    before,file = {k: v.clone() for k, v in learn.model.state_dict().items()},(tmp_path/'a.pt').read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match=words): learn.fit(n, resume=tmp_path/'a.pt')
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
    assert (tmp_path/'a.pt').read_bytes() == file


@pytest.mark.parametrize('sched, n, words', [
    (OneCycleCB(pct_start=0.5), 4, '.*differ in schedule_phases'), (OneCycleCB(), 6, '.*differ in total_steps')])
def test_another_schedule_takes_over(tmp_path, sched, n, words):
    "One warning says what differs, and the rates are those of the new schedule at that step. Wrong: a mixture of both"
    def rates(): return RecorderCB(lr=lambda cb: cb.pg['lr'], mom=lambda cb: cb.pg['betas'][0])
    learner(OneCycleCB()).fit(4, cbs=PowerCutQuiet(1, 2, tmp_path/'a.pt'))
    whole,rest = rates(),rates()
    learner(sched, whole).fit(n)
    with pytest.warns(UserWarning, match='the saved schedule is another one: ' + words):
        learner(sched, rest).fit(n, resume=tmp_path/'a.pt')
    for k in ('lr', 'mom'): assert rest.recs[k] == whole.recs[k][11:]


class PowerCutQuiet(PowerCut):
    def after_batch(self, learn):
        from fastswa.training.events import CancelFitException
        try: super().after_batch(learn)
        except RuntimeError: raise CancelFitException


def test_a_corrupt_byte_anywhere(tmp_path):
    "Each changed byte is noticed, or it changes nothing: `torch.load` itself reads changed weights without a word"
    path = tmp_path/'a.pt'
    learn = learner(EMACB(0.8))
    learn.fit(1)
    learn.save(path)
    good,whole,rnd = read_checkpoint(path),path.read_bytes(),random.Random(0)
    silent,refused = 0,0
    for _ in range(300):
        i = rnd.randrange(len(whole))
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << rnd.randrange(8)]) + whole[i + 1:])
        try: state = read_checkpoint(path)
        except ValueError as e:
            assert str(path) in str(e)
            refused += 1
            continue
        silent += 1                                      # alignment, dates: nothing that is read
        assert equal(state, good)
    assert refused > 100, (refused, silent)
    weights = whole.find(good['weights']['raw']['5.weight'].numpy().tobytes()[:64])
    path.write_bytes(whole[:weights] + bytes([whole[weights] ^ 1]) + whole[weights + 1:])
    assert not torch.equal(torch.load(path, weights_only=True)['weights']['raw']['5.weight'],
                           good['weights']['raw']['5.weight'])
    with pytest.raises(ValueError, match='another checksum'): read_checkpoint(path)


def test_a_damaged_newest_falls_back(tmp_path, capsys):
    "The one before it is used, and a warning says so; where all are damaged, the fit does not start from the beginning"
    learner().fit(2, cbs=CheckpointCB(tmp_path))
    newest = tmp_path/'step-00000016.pt'
    newest.write_bytes(newest.read_bytes()[:1000])
    says = 'step-00000016.pt is damaged.*step-00000008.pt, which is older, is used instead'
    with pytest.warns(UserWarning, match=says):
        learner().fit(2, resume=tmp_path)
    assert 'resuming from' in capsys.readouterr().out
    (tmp_path/'step-00000008.pt').write_text('')
    with pytest.raises(ValueError, match='step-00000008.pt is damaged'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learner().fit(2, resume=tmp_path)


def _full_disk(folder, pipe):
    "In a new process: files can only be small from the fifth batch on; the error of the fit"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    class Full(Callback):
        order = 94
        def after_batch(self, learn):
            if learn.iter == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    try: learner(EMACB(0.8)).fit(2, cbs=[CheckpointCB(folder, '2ba'), Full()])
    except Exception as e: pipe.send((isinstance(e, OSError), str(e)))


def test_a_full_disk(tmp_path):
    "A write that fails half-way: an OSError that says so, no half file, and the one before is whole"
    here,there = spawn.Pipe()
    p = spawn.Process(target=_full_disk, args=(tmp_path, there))
    p.start()
    there.close()
    of_the_system,words = here.recv()
    p.join()
    assert of_the_system and 'could not be written to' in words, words
    assert 'step-00000006.pt (what was there before still is): ' in words
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000002.pt', 'step-00000004.pt']
    assert read_checkpoint(tmp_path/'step-00000004.pt')['opt_steps'] == 4


def test_folders_that_cannot_be_written_to(tmp_path):
    "Before training, not after an epoch"
    (tmp_path/'file').write_text('')
    seen = []
    class Seen(Callback):
        def before_batch(self, learn): seen.append(1)
    for folder in (tmp_path/'file', '/proc/checkpoints'):
        with pytest.raises(OSError, match='a folder that can be written to is needed'):
            learner(Seen(), CheckpointCB(folder)).fit(1)
    if os.geteuid():
        (tmp_path/'locked').mkdir(mode=0o500)
        with pytest.raises(PermissionError, match='a folder that can be written to is needed'):
            learner(Seen(), CheckpointCB(tmp_path/'locked')).fit(1)
    assert not seen


def test_the_home_folder(tmp_path, monkeypatch):
    "Wrong: a folder that is called ~ beside the script"
    (tmp_path/'here').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path/'here')
    learner(EMACB(0.8)).fit(1, cbs=CheckpointCB('~/runs'))
    assert [p.name for p in (tmp_path/'runs').iterdir()] == ['step-00000008.pt']
    learn = learner(EMACB(0.8))
    with pytest.warns(UserWarning, match='is of 2 now'): learn.fit(2, cbs=CheckpointCB('~/runs'), resume='~/runs')
    assert learn.opt_steps == 16
    learn.save('~/a.pt')
    learn.load('~/a.pt')
    learn.export('~/a.safetensors')
    assert {'a.pt', 'a.safetensors'} < {p.name for p in tmp_path.iterdir()} and not [*(tmp_path/'here').iterdir()]
    assert read_checkpoint('~/a.pt')['opt_steps'] == 16 and load_weights('~/runs')
    cbs = [CSVLoggerCB('~/logs/log.csv'), PostHocEMACB(every='4ba', folder='~/posthoc')]
    if find_spec('tensorboard'): cbs.append(TensorBoardCB('~/tensorboard'))
    learner().fit(1, cbs=cbs)
    save_safetensors(cbs[1].average, '~/b.safetensors')
    folders = {'logs', 'posthoc', 'b.safetensors'} | {'tensorboard' for _ in cbs[2:]}
    assert folders < {p.name for p in tmp_path.iterdir()} and not [*(tmp_path/'here').iterdir()]
    assert (tmp_path/'logs'/'log.csv').is_file() and [*(tmp_path/'posthoc').glob('ema-*.pt')]


def test_every_global_generator_goes_on(tmp_path):
    "Python's and NumPy's too. Wrong: augmentation that draws from these repeats itself or takes another way"
    class Draw(Callback):
        def before_fit(self, learn): self.drawn = []
        def before_batch(self, learn):
            if learn.training: self.drawn.append((random.random(), float(np.random.rand()), float(np.random.randn())))
    whole, rest = Draw(), Draw()
    set_seed(1)
    learner().fit(2, cbs=[whole, PowerCutQuiet(1, 2, tmp_path/'a.pt')])
    set_seed(1)
    learner().fit(2, cbs=whole)
    set_seed(99)
    learner().fit(2, cbs=rest, resume=tmp_path/'a.pt')
    assert len(rest.drawn) == 5 and rest.drawn == whole.drawn[-5:]


def test_quiet(tmp_path, capsys):
    "Wrong: a line about the checkpoint in the middle of somebody's own table"
    with quiet():
        learner().fit(1, cbs=CheckpointCB(tmp_path), resume=tmp_path)
        learner().fit(1, resume=tmp_path)
    assert capsys.readouterr().out == ''
    learner().fit(1, resume=tmp_path)
    assert 'resuming from' in capsys.readouterr().out


def test_a_finished_run_says_that_nothing_is_left(tmp_path, capsys):
    "Wrong: that it goes on"
    learner().fit(2, cbs=CheckpointCB(tmp_path), resume=tmp_path)
    capsys.readouterr()
    learner().fit(2, cbs=CheckpointCB(tmp_path), resume=tmp_path)
    last = tmp_path/'step-00000016.pt'
    assert capsys.readouterr().out == f'resuming from {last}: all 2 epochs are done, nothing is left to train\n'
    with pytest.warns(UserWarning, match='is of 3 now'): learner().fit(3, cbs=CheckpointCB(tmp_path), resume=tmp_path)
    assert f'resuming from {last}: 2/3 epochs and 0 batches, 16 steps\n' in capsys.readouterr().out


def test_a_file_without_an_ending(tmp_path):
    "Wrong: torch's writer, which names what is in the file after it, finds no name in a hidden one without an ending"
    learn = learner(EMACB(0.8, apply=False))
    learn.fit(1)
    for name in ('model', '.model', 'model.of.today'):
        learn.save(tmp_path/name)
        other = learner(EMACB(0.8, apply=False))
        other.load(tmp_path/name)
        same(dict(result(other), random=0), dict(result(learn), random=0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.model', 'model', 'model.of.today']
    set_seed(1)
    whole = learner()
    whole.fit(2)
    set_seed(1)
    learner().fit(2, cbs=PowerCutQuiet(1, 2, tmp_path/'run'))
    rest = learner()
    rest.fit(2, resume=tmp_path/'run')
    same(dict(result(rest), random=0), dict(result(whole), random=0))
    (tmp_path/'notes').write_text('no checkpoint')
    with pytest.raises(ValueError, match='notes is damaged, or no checkpoint'):
        learner().fit(1, resume=tmp_path/'notes')


def test_files_have_the_permissions_of_the_user(tmp_path):
    "Wrong: those of a temporary file, which nobody else may read"
    old = os.umask(0o027)
    try: learner().save(tmp_path/'a.pt')
    finally: os.umask(old)
    assert (tmp_path/'a.pt').stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_saved_is_said_before_training(tmp_path):
    class Odd(Callback):
        def before_fit(self, learn): pass
        def state_dict(self): return dict(a=[{1, 2}])
    with pytest.raises(TypeError, match=r'callbacks.\d.state.a.0 is a set'):
        learner(Odd(), CheckpointCB(tmp_path)).fit(1)
    class MySGD:
        def __init__(self, ps, lr): self.ps = [*ps]
        def step(self): pass
        def zero_grad(self): pass
    with pytest.raises(TypeError, match='MySGD'): learner(CheckpointCB(tmp_path), opt_func=MySGD).fit(1)


def test_best_is_remembered(tmp_path):
    "After a resume too (skorch#267): a worse epoch must not replace best.pt"
    class Fixed(MetricsCB):
        values = [0.5, 0.9, 0.7, 0.8]
        def after_epoch(self, learn): learn.history[-1]['score'] = self.values[learn.epoch]
    learner(Fixed()).fit(2, cbs=CheckpointCB(tmp_path, best='score'))
    cb = CheckpointCB(tmp_path, best='score')
    with pytest.warns(UserWarning, match='is of 4 now'): learner(Fixed()).fit(4, cbs=cb, resume=tmp_path)
    assert (cb.best, cb.best_epoch) == (0.9, 1)
    best = read_checkpoint(tmp_path/'best.pt')
    assert best['opt_steps'] == 16 and best['history'][-1]['score'] == 0.9


def test_keep_and_every(tmp_path):
    cases = [('1ep', None, [8, 16, 24]), ('0.5ep', None, [4, 8, 12, 16, 20, 24]), ('10ba', None, [10, 20, 24]),
             ('0.25dur', 2, [18, 24])]
    for every, keep, steps in cases:
        folder = tmp_path/f'{every}{keep}'
        learner().fit(3, cbs=CheckpointCB(folder, every, keep))
        assert sorted(int(p.stem[5:]) for p in folder.iterdir()) == steps, every


class Told(MetricsCB):
    "A column whose values are told beforehand"
    values = 0.5, 0.9, 0.7, 0.8, 0.6, 0.95
    def after_epoch(self, learn): learn.history[-1]['score'] = self.values[learn.epoch]


def test_the_best_few_stay(tmp_path):
    "Wrong: the newest few, or what was best before a resume is forgotten"
    def names(): return sorted(p.name for p in tmp_path.iterdir() if p.name.startswith('best'))
    def cb(): return CheckpointCB(tmp_path, keep=1, best='score', keep_best=2)
    learner(Told()).fit(6, cbs=[cb(), AtEpoch(4)])
    assert names() == ['best-00000016.pt', 'best-00000032.pt', 'best.pt']      # the second and the fourth epoch
    last = cb()
    learner(Told()).fit(6, cbs=last, resume=tmp_path)
    assert names() == ['best-00000016.pt', 'best-00000048.pt', 'best.pt']
    assert read_checkpoint(tmp_path/'best.pt')['opt_steps'] == 48 and (last.best, last.best_epoch) == (0.95, 5)
    assert [p.name for p in tmp_path.glob('step-*')] == ['step-00000048.pt']
    for k in (0, 1.5):
        with pytest.raises(ValueError, match='keep_best must be a whole number'): CheckpointCB(tmp_path, keep_best=k)


def test_nothing_of_another_run_is_overwritten(tmp_path):
    """Wrong: best.pt alone is replaced; a run resumed from elsewhere clears the folder out; a second learner with the
    same callback writes over the first one's"""
    a,b = tmp_path/'a',tmp_path/'b'
    first = CheckpointCB(a, best='loss')
    learner().fit(2, cbs=first)
    kept = {p.name: p.read_bytes() for p in a.iterdir()}
    with pytest.raises(ValueError, match='a holds checkpoints of another run, such as'): learner().fit(1, cbs=first)
    learner().fit(3, cbs=[CheckpointCB(b), AtEpoch(2)])
    with pytest.raises(ValueError, match='a holds checkpoints of another run, such as best.pt: resume from'):
        learner().fit(3, cbs=CheckpointCB(a, best='loss'), resume=b)
    assert kept == {p.name: p.read_bytes() for p in a.iterdir()}
    for p in a.glob('step-*'): p.unlink()
    with pytest.raises(ValueError, match='such as best.pt'): learner().fit(1, cbs=CheckpointCB(a, best='loss'))
    assert (a/'best.pt').read_bytes() == kept['best.pt']
    learner().fit(3, cbs=CheckpointCB(b, keep=1), resume=b)                    # its own
    assert [p.name for p in b.iterdir()] == ['step-00000024.pt']


class Fails:
    "A loader that raises an error instead of its batch number `at`, in the second epoch"
    def __init__(self, dl, at, error): self.dl,self.at,self.error,self.epoch = dl,at,error,-1
    def __len__(self): return len(self.dl)
    def __getattr__(self, name): return getattr(self.__dict__['dl'], name)
    def __iter__(self):
        self.epoch += 1
        for i, batch in enumerate(self.dl):
            if (self.epoch, i) == (1, self.at): raise self.error
            yield batch


def averaged_cycle(): return EMACB(0.8), OneCycleCB(), MetricsCB(hits=Hits())


@cache
def whole_averaged_cycle():
    learn = learner(*averaged_cycle())
    set_seed(1)
    learn.fit(3)
    return result(learn)


@pytest.mark.parametrize('at, error', [
    (1, OSError('lost')), (3, RuntimeError('a worker died')), (7, KeyboardInterrupt())])
def test_an_error_between_two_batches_leaves_a_checkpoint(at, error, tmp_path):
    "From which the run goes on exactly. Wrong: the work since the last checkpoint is lost"
    def make(): return learner(*averaged_cycle(), CheckpointCB(tmp_path, '10ep'))
    whole,learn = whole_averaged_cycle(),make()
    learn.dls.train = Fails(learn.dls.train, at, error)
    set_seed(1)
    with pytest.raises(type(error)): learn.fit(3)
    assert [p.name for p in tmp_path.iterdir()] == [f'step-{8 + at:08}.pt']
    rest = make()
    rest.fit(3, resume=tmp_path)
    same(result(rest), whole)


class Draws(Callback):
    "Has a state, and random numbers, that change in each event between epochs"
    order,n,sum = 20,0,0.
    def before_epoch(self, learn): self.go(learn)
    def after_epoch(self, learn): self.go(learn)
    def go(self, learn):
        if learn.weights == 'raw': self.n,self.sum = self.n + 1,self.sum + torch.rand(()).item()
    def state_dict(self): return dict(n=self.n, sum=self.sum)
    def load_state_dict(self, state): self.n,self.sum = state['n'],state['sum']


class BreaksOnce(Callback):
    "An error in an event of an epoch, of training or of validation of some weights, once"
    role = 'watches'
    def __init__(self, event, epoch, training, order, weights='raw'):
        self.order,self.when = order,(epoch, training, weights)
        setattr(self, event, self.go)
    def go(self, learn):
        if (learn.epoch, learn.training, learn.weights) == self.when: raise ZeroDivisionError


def drawing_cbs():
    schedule = EpochSchedCB(partial(lr_scheduler.StepLR, step_size=1))
    return Draws(), EMACB(0.8), schedule, MetricsCB(hits=Hits())


@cache
def whole_run_that_draws():
    learn = learner(*drawing_cbs())
    set_seed(1)
    learn.fit(3)
    return learn.cbs[0].state_dict(), result(learn)


@pytest.mark.parametrize('order', [-30, 99])
@pytest.mark.parametrize('event, epoch, training, weights, steps', [
    ('before_epoch', 1, True, 'raw', 8), ('after_epoch', 1, True, 'raw', 16), ('before_epoch', 1, False, 'raw', 16),
    ('after_predict', 1, False, 'raw', 16), ('after_epoch', 1, False, 'raw', 16), ('after_epoch', 1, False, 'ema', 16),
    ('before_batch', 1, True, 'raw', 8), ('cleanup_epoch', 1, True, 'raw', 16), ('after_epoch', 2, False, 'raw', 24)])
def test_an_error_between_epochs_leaves_the_last_whole_position(
        event, epoch, training, weights, steps, order, tmp_path):
    "From which the run goes on exactly. Wrong: an epoch is lost, or others' events are called twice, or not at all"
    def make(): return learner(*drawing_cbs(), CheckpointCB(tmp_path, '10ep'))
    (drawn,whole),learn = whole_run_that_draws(),make()
    learn.cbs.append(BreaksOnce(event, epoch, training, order, weights))
    set_seed(1)
    with pytest.raises(ZeroDivisionError): learn.fit(3)
    assert [p.name for p in tmp_path.iterdir()] == [f'step-{steps:08}.pt'] and len(learn.cbs) == 6
    rest = make()
    rest.fit(3, resume=tmp_path)
    same(result(rest), whole)
    assert rest.cbs[0].state_dict() == drawn


def test_what_has_changed_since_is_not_saved(tmp_path):
    "Wrong: weights that a callback has changed after the epoch are saved as those of its end"
    class Changes(Callback):
        def after_epoch(self, learn):
            if not learn.training: return
            with torch.no_grad(): next(learn.model.parameters()).mul_(2)
    with pytest.raises(ZeroDivisionError):
        learner(Changes(), CheckpointCB(tmp_path, '1ep'), BreaksOnce('before_epoch', 1, False, 0)).fit(3)
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000008.pt']


@pytest.mark.parametrize('event', ['before_batch', 'after_predict', 'after_backward', 'after_step', 'after_batch',
                                   'before_fit'])
def test_an_error_in_a_batch_leaves_the_last_checkpoint(event, tmp_path):
    "Wrong: one of a batch that is half done, of weights that are NaN, or of a run that has not begun"
    class Breaks(Callback):
        order = 96 if event == 'before_fit' else 15
    def go(self, learn):
        if event == 'before_fit' or (learn.training and (learn.epoch, learn.iter) == (1, 3)): raise ZeroDivisionError
    setattr(Breaks, event, go)
    with pytest.raises(ZeroDivisionError): learner(Breaks(), CheckpointCB(tmp_path, '2ba')).fit(2)
    steps = sorted(int(p.stem[5:]) for p in tmp_path.iterdir())
    assert steps == ([] if event == 'before_fit' else [6, 8, 10])


def read_late(self, loss, n):
    "As of a loss on an accelerator, which is not read before it has to be"
    self.losses.append(loss.detach())
    self.sizes.append(n)


@pytest.mark.parametrize('at, saved', [(5, [2, 4]), (7, [2, 4, 6]), (15, [10, 12, 14])],
                         ids=['within an epoch', 'at its end', 'at the end'])
@pytest.mark.parametrize('late', [False, True])
def test_a_loss_that_is_not_finite_is_not_saved(late, at, saved, tmp_path, monkeypatch):
    "Wrong: checkpoints of weights that are NaN push out the good ones before anybody has looked at the loss"
    if late: monkeypatch.setattr(LossMeter, 'add', read_late)
    class Bad(Callback):
        order = -50
        def before_batch(self, learn):
            if learn.training and learn.opt_steps == at: learn.batch = learn.batch[0]*float('nan'),learn.batch[1]
    with pytest.raises(FloatingPointError, match=f'at batch {at%8} of epoch {at//8}'):
        learner(Bad(), CheckpointCB(tmp_path, '2ba')).fit(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'step-{n:08}.pt' for n in saved]


def test_a_second_ctrl_c_in_the_loader_does_not_wait(tmp_path):
    learn = learner(CheckpointCB(tmp_path))
    class Loader(Fails):
        def __iter__(self):
            for i, batch in enumerate(self.dl):
                if i == 3:
                    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
                yield batch
    learn.dls.train = Loader(learn.dls.train, 0, None)
    with pytest.raises(KeyboardInterrupt): learn.fit(2)
    assert not [*tmp_path.iterdir()]


def test_the_sums_of_a_validation_are_not_those_of_the_next_epoch(tmp_path):
    "A fit that is stopped before its metrics begin an epoch. Wrong: resumed, that epoch's row counts samples twice"
    stop = AtEpoch(1)
    stop.order = -30
    def fit(**kwargs):
        learn = learner(MetricsCB(hits=Hits()))
        set_seed(1)
        learn.fit(2, **kwargs)
        return learn.history
    fit(cbs=[CheckpointCB(tmp_path), stop])
    assert fit(resume=tmp_path) == fit()


def test_metric_without_state(tmp_path):
    class Bare:
        def reset(self): self.n = 0
        def update(self, preds, targets): self.n += 1
        def compute(self): return self.n
    learner(MetricsCB(n=Bare())).fit(1, cbs=PowerCutQuiet(0, 3, tmp_path/'a.pt'))
    with pytest.warns(UserWarning, match="the metric 'n' has no saved state"):
        learner(MetricsCB(n=Bare())).fit(1, resume=tmp_path/'a.pt')


def test_compiled_prefixes_stay_out(tmp_path):
    "Lightning#20233: a checkpoint of a compiled model is one of the model, and the other way round"
    model = torch.compile(net(), backend='eager')
    learn = learner(EMACB(0.8), model=model)
    with torch.compiler.set_stance('force_eager'):      # the names are the point, not the graph
        learn.fit(1, cbs=CheckpointCB(tmp_path))
    state = read_checkpoint(tmp_path/'step-00000008.pt')
    ema = state['averages']['averages']['ema']['average']['weights']
    names = [*state['weights']['raw'], *ema, *(n for g in state['opt']['param_groups'] for n in g['param_names'])]
    assert names and not [n for n in names if '_orig_mod' in n]
    plain = learner(EMACB(0.8))
    plain.load(tmp_path/'step-00000008.pt')
    learn.export(tmp_path/'raw.safetensors', 'raw')
    from safetensors.torch import load_file
    assert sorted(load_file(tmp_path/'raw.safetensors')) == sorted(net().state_dict())


def test_export_of_tied_and_channels_last_weights(tmp_path):
    "safetensors itself refuses both"
    from safetensors.torch import load_file
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3),
                          nn.Conv2d(3, 3, 3)).to(memory_format=torch.channels_last)
    model[2].weight = model[1].weight
    learner(model=model).export(tmp_path/'a.safetensors')
    file = load_file(tmp_path/'a.safetensors')
    for k, v in model.state_dict().items(): assert torch.equal(file[k], v)


def zero_net():
    model = net()
    for p in model.parameters(): nn.init.zeros_(p)
    return model


@pytest.mark.parametrize('cbs, names', [
    (lambda: [EMACB(0.8, apply=False), BNUpdateCB(valid_batches=3)], ['raw', 'ema']),
    (lambda: [SWACB('0.2dur', '2ba', apply=False), EMACB(0.8, include='*weight')], ['raw', 'swa', 'ema']),
    (lambda: [EMACB(0.8, apply=False), EarlyStoppingCB('ema/loss', restore_best=True), BNUpdateCB()],
     ['raw', 'best', 'ema'])])
def test_weights_without_a_learner(cbs, names, tmp_path):
    "Predictions are those of the last validation. Wrong: raw statistics, or averaged ones, under averaged weights"
    learn,seen = learner(*cbs()),{}
    class Preds(Callback):
        order = 20
        def after_epoch(self, learn):
            if not learn.training: seen[learn.weights] = predicted(learn.model)
    def predicted(model):
        with torch.no_grad(): return model.eval()(learn.dls.valid.dataset.tensors[0])
    learn.fit(3, cbs=[Preds(), CheckpointCB(tmp_path)])
    seen['best'] = seen.get('ema')                          # whose last epoch is the best
    for name in names:
        model = zero_net()
        model.load_state_dict(load_weights(tmp_path, name))
        assert torch.equal(predicted(model), seen[name])
    for wrong in ('swag', 'raw '):
        says = f'holds no weights called {wrong!r}; there are {", ".join(names)}'
        with pytest.raises(ValueError, match=says): load_weights(tmp_path, wrong)
    with pytest.raises(FileNotFoundError): load_weights(tmp_path/'nothing.pt')


def test_statistics_of_other_weights_are_told(tmp_path):
    "A checkpoint between two validations. Wrong: statistics of another average, without a word"
    learner(EMACB(0.8, apply=False), BNUpdateCB()).fit(3, cbs=[CheckpointCB(tmp_path, '2ba'), AtEpoch(2)])
    load_weights(tmp_path/'step-00000016.pt', 'ema')
    with pytest.warns(UserWarning, match="of 'ema' after 8 snapshots, and its weights after 14: recompute them"):
        load_weights(tmp_path/'step-00000014.pt', 'ema')


@pytest.mark.parametrize('cbs', [lambda: [EMACB(0.8, apply=False)], lambda: [EMACB(0.8, apply=False), BNUpdateCB()]])
def test_export_without_data(cbs, tmp_path):
    "A learner that only loads and exports. Wrong: AttributeError, since its data have no train"
    from safetensors.torch import load_file
    learn = learner(*cbs())
    learn.fit(1)
    learn.save(tmp_path/'a.pt')
    other = TrainLearner(zero_net(), cbs=cbs())
    other.load(tmp_path/'a.pt', opt=False)
    for name in ('raw', 'ema'):
        other.export(tmp_path/'b.safetensors', name)
        file,weights = load_file(tmp_path/'b.safetensors'),load_weights(tmp_path/'a.pt', name)
        assert file.keys() == weights.keys() and all(torch.equal(file[k], v) for k, v in weights.items())
    assert torch.equal(other.module('ema')[0].weight, learn.averages['ema'].weights['0.weight'])
    if len(cbs()) == 1: return
    other.averages['ema'].update()
    with pytest.raises(ValueError, match="statistics of 'ema' are not known.*give the learner its training data"):
        other.export(tmp_path/'b.safetensors', 'ema')
    assert other.weights == 'raw'
    other.dls = learn.dls
    other.export(tmp_path/'b.safetensors', 'ema')


def _two_processes(rank, folder, pipe):
    "Each trains weights of its own; what is there when its fit is over"
    from pathlib import Path

    import torch.distributed as dist
    folder = Path(folder)
    dist.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=2, timeout=timedelta(seconds=60))
    class Slow(CheckpointCB):
        def before_epoch(self, learn):
            if learn.n_epochs == 2 and learn.epoch == 1 and rank == 0: time.sleep(0.3)      # the others have to wait
            super().before_epoch(learn)
    with quiet():
        learn,cb = learner(EMACB(0.8), MetricsCB(hits=Hits()), lr=0.01*(rank + 1)),Slow(folder/'run', best='loss')
        learn.fit(2, cbs=[cb, CSVLoggerCB(folder/'log.csv')])
        found = [p.name for p in numbered(folder/'run')]
        learn.save(folder/f'saved-{rank}')
        learn.export(folder/f'exported-{rank}')
        dist.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learner(EMACB(0.8), MetricsCB(hits=Hits())).fit(3, cbs=CheckpointCB(folder/'run'), resume=folder/'run')
    pipe.send((found, cb.best, learn.history, learn.averages.weights('raw')['0.weight'].tolist()))
    dist.destroy_process_group()


@pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason='no gloo')
def test_the_first_of_several_processes_writes(tmp_path):
    "And the others wait for it. Wrong: two processes replace each other's files, or one refuses those of the other"
    pipes,processes = [],[]
    for rank in range(2):
        here,there = spawn.Pipe()
        processes.append(spawn.Process(target=_two_processes, args=(rank, str(tmp_path), there)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    (found, best, history, weight),(found_1, *_, weight_1) = [pipe.recv() for pipe in pipes]
    for p in processes: p.join()
    assert weight != weight_1 and found == found_1 == ['step-00000008.pt', 'step-00000016.pt']
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != 'meet') == ['exported-0', 'log.csv', 'run', 'saved-0']
    state = read_checkpoint(tmp_path/'run'/'step-00000016.pt')
    assert state['weights']['raw']['0.weight'].tolist() == weight and state['history'] == history
    assert (tmp_path/'run'/'step-00000024.pt').is_file()
    assert read_checkpoint(tmp_path/'run'/'best.pt')['history'][-2]['loss'] == best


# What an audit found


def test_finder_leaves_swa_alone():
    "Wrong: the average takes snapshots of the finder's weights"
    cb = SWACB('0ba', '1ba', apply=False)
    learn = learner(cb)
    learn.fit(1)
    before = {k: v.clone() for k, v in cb.average.weights.items()}
    learn.lr_find(show=False, max_steps=5)
    assert cb.average.n == 8
    for k, v in cb.average.weights.items(): assert torch.equal(v, before[k])


@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_backward', 'after_step', 'after_epoch'])
def test_saving_while_a_batch_is_half_done_is_refused(event, tmp_path):
    "Wrong: it resumes, one step or half an epoch's row short"
    class Save(Callback):
        order = 95
    setattr(Save, event, lambda self, learn: learn.save(tmp_path/'a.pt') if learn.training else None)
    with pytest.raises(RuntimeError, match='a batch is half done: save in after_batch'): learner(Save()).fit(1)


def test_saved_in_validation_is_not_for_resume(tmp_path):
    class Save(Callback):
        order = 95
        def after_epoch(self, learn):
            if not learn.training: learn.save(tmp_path/'a.pt')
    learner(Save()).fit(1)
    learner().load(tmp_path/'a.pt')
    with pytest.raises(ValueError, match='was not saved during training'): learner().fit(1, resume=tmp_path/'a.pt')


def test_a_look_within_a_window(tmp_path):
    "Wrong: the window of accumulated gradients starts anew where somebody validates or looks for a rate within it"
    class Look(Callback):
        order = 96
        def after_batch(self, learn):
            if learn.training and learn.iter in (1, 4):
                learn.validate()
                learn.get_preds()
    a,b = learner(GradAccumCB(4)),learner(GradAccumCB(4), Look())
    results = []
    for o in (a, b):
        set_seed(1)
        o.fit(2)
        results.append(result(o))
    same(*results)


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    "Wrong: each start of the script trains one epoch more"
    def go():
        learn = learner(EarlyStoppingCB(patience=1, min_delta=10.), CheckpointCB(tmp_path))
        set_seed(1)
        learn.fit(20, resume=tmp_path)
        return learn
    first = go()
    for _ in range(2): assert go().history == first.history


def test_load_keeps_the_options_of_this_learner(tmp_path):
    "Wrong: momentum and weight decay are those of the midst of a schedule, for good"
    one = learner(OneCycleCB())
    one.fit(2, cbs=CheckpointCB(tmp_path))
    other = learner(opt_func=partial(optim.AdamW, weight_decay=0.3))
    other.load(tmp_path)
    group = other.opt.param_groups[0]
    assert group['betas'] == (0.9, 0.999) and group['weight_decay'] == 0.3 and 'initial_lr' not in group
    for p, q in zip(one.opt.param_groups[0]['params'], group['params']):
        assert torch.equal(one.opt.state[p]['exp_avg'], other.opt.state[q]['exp_avg'])
    with pytest.raises(ValueError, match='With opt=False the optimizer is left alone'):
        learner(opt_func=optim.SGD).load(tmp_path)
    learner(opt_func=optim.SGD).load(tmp_path, opt=False)


def test_workers_that_persist(tmp_path):
    "They are seeded once, in the first epoch. Wrong: the order of the epochs after a resume"
    def go(**kwargs):
        data = Data(num_workers=1)
        data.train = DataLoader(data.train.dataset, 32, shuffle=True, num_workers=1, persistent_workers=True,
                                collate_fn=list)
        learn = learner(EMACB(0.8), dls=data)
        if 'resume' not in kwargs: set_seed(1)
        try: learn.fit(3, **kwargs)
        except RuntimeError as e: assert str(e) == 'power cut'
        end_workers(data)
        return result(learn)
    whole = go()
    for at in ((0, 3), (1, 3)):
        go(cbs=PowerCut(*at, tmp_path/'a.pt'))
        with warnings.catch_warnings(record=True) as caught: same(go(resume=tmp_path/'a.pt'), whole)
        # what a dataset draws in them is not repeated, which is told where it matters
        assert any('persistent_workers=False' in str(w.message) for w in caught) == (at[0] > 0)


def test_metric_with_an_empty_state(tmp_path):
    "As torchmetrics' by default. Wrong: it counts as saved"
    class Empty(Hits):
        def state_dict(self): return {}
        def reset(self): self.n = self.right = 0
    learner(MetricsCB(n=Empty())).fit(1, cbs=PowerCutQuiet(0, 3, tmp_path/'a.pt'))
    with pytest.warns(UserWarning, match="the metric 'n' has no saved state"):
        learner(MetricsCB(n=Empty())).fit(1, resume=tmp_path/'a.pt')


def test_buffers_that_are_not_in_the_state_dict(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('seen', torch.zeros(()), persistent=False)
        def forward(self, x):
            if self.training: self.seen += 1
            return x + self.seen/100
    def go(**kwargs):
        learn = learner(model=nn.Sequential(Counts(), *net()))
        set_seed(1)
        learn.fit(2, **kwargs)
        return learn
    whole = go()
    go(cbs=PowerCutQuiet(1, 2, tmp_path/'a.pt'))
    learn = go(resume=tmp_path/'a.pt')
    assert learn.model[0].seen == whole.model[0].seen == 16
    same(dict(result(learn), random=0), dict(result(whole), random=0))


def test_post_hoc_snapshots_in_a_folder(tmp_path):
    "Wrong: the folder's own snapshots refuse the run that goes on with them"
    def go(n, **kwargs):
        learn = learner(PostHocEMACB(every='4ba', folder=tmp_path/str(n)))
        (tmp_path/str(n)).mkdir(exist_ok=True)
        set_seed(1)
        learn.fit(3, **kwargs)
        return result(learn)
    whole = go(0)
    go(1, cbs=PowerCutQuiet(1, 2, tmp_path/'a.pt'))
    same(go(1, resume=tmp_path/'a.pt'), whole)


def test_fp16_with_an_open_window_at_the_end_of_an_epoch(tmp_path):
    "Wrong: the new process's scaler has no scale before its first loss"
    def go(**kwargs):
        learn = learner(MixedPrecisionCB('fp16'), GradAccumCB(3))
        if 'resume' not in kwargs: set_seed(1)
        try: learn.fit(2, **kwargs)
        except RuntimeError as e: assert str(e) == 'power cut'
        return learn
    whole = result(go())
    go(cbs=PowerCut(0, 7, tmp_path/'a.pt'))
    same(result(go(resume=tmp_path/'a.pt')), whole)


def test_looks_before_a_fit_under_mixed_precision(tmp_path):
    learn = learner(MixedPrecisionCB(), EMACB(0.8), BNUpdateCB())
    learn.summary()
    learn.fit(1)
    learn.save(tmp_path/'a.pt')
    other = learner(MixedPrecisionCB(), EMACB(0.8), BNUpdateCB())
    other.load(tmp_path/'a.pt')
    assert torch.equal(other.get_preds('ema')[0], learn.get_preds('ema')[0])


def test_a_stream_without_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self): return iter(zip(*Data().train.dataset.tensors))
    def go(**kwargs):
        data = Data()
        data.train = DataLoader(Stream(), 32)
        learn = learner(EMACB(0.8), dls=data)
        set_seed(1)
        learn.fit(2, **kwargs)
        return result(learn)
    whole = go()
    go(cbs=PowerCutQuiet(1, 2, tmp_path/'a.pt'))
    same(go(resume=tmp_path/'a.pt'), whole)


def test_a_refused_resume_leaves_the_optimizer(tmp_path):
    learner(OneCycleCB()).fit(2, cbs=PowerCutQuiet(1, 2, tmp_path/'a.pt'))
    learn = learner(OneCycleCB(), opt_func=optim.Adam)
    learn.fit(1)
    before = {k: v.clone() for k, v in learn.opt.state[learn.model[0].weight].items()}
    with pytest.raises(ValueError, match='a.pt cannot be resumed: the state is of another optimizer'):
        learn.fit(2, resume=tmp_path/'a.pt')
    for k, v in learn.opt.state[learn.model[0].weight].items(): assert torch.equal(v, before[k])


def test_changed_options_are_told(tmp_path):
    "Where another schedule takes over, its rates are not among those that go on as saved"
    learner().fit(2, cbs=PowerCutQuiet(1, 2, tmp_path/'a.pt'))
    says = 'goes on with the options that were saved: lr was 0.01 and is 0.5, weight_decay was 0.1 and is 0.2'
    with pytest.warns(UserWarning, match=f'^the optimizer {says}$'):
        learner(lr=0.5, opt_func=partial(optim.AdamW, weight_decay=0.2)).fit(2, resume=tmp_path/'a.pt')
    learner(OneCycleCB()).fit(2, cbs=PowerCutQuiet(1, 2, tmp_path/'a.pt'))
    rates = RecorderCB(lr=lambda cb: cb.pg['lr'])
    says = '^but for what a schedule sets, the optimizer goes on with .*: lr was 0.01 and is 0.5$'
    with pytest.warns(UserWarning, match=says):
        learner(OneCycleCB(), rates, lr=0.5).fit(2, resume=tmp_path/'a.pt')
    assert 0.05 < max(rates.recs['lr']) < 0.5


def test_generators_must_be_as_many(tmp_path):
    RUNS['a generator of its own']().fit(2, cbs=PowerCutQuiet(1, 2, tmp_path/'a.pt'))
    says = 'of a run with 1 generators of its own, in loaders and transforms; here are 0'
    with pytest.raises(ValueError, match=says):
        learner(OneCycleCB()).fit(2, resume=tmp_path/'a.pt')


def test_two_of_a_kind():
    for make in (lambda: GradAccumCB(2), MixedPrecisionCB):
        with pytest.raises(ValueError, match=f'there are several {type(make()).__name__} in the callbacks: keep one'):
            learner(make(), make()).fit(1)


def equal(a, b):
    "Bit for bit, whatever is nested"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Scaled(nn.Module):
    "A loss with a parameter, class weights and a count"
    def __init__(self, classes=3):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(()))
        self.register_buffer('classes', torch.linspace(1, 2, classes))
        self.register_buffer('calls', torch.zeros(()), persistent=False)
    def forward(self, preds, y):
        if self.training: self.calls += 1
        return F.cross_entropy(preds*self.s.exp(), y, self.classes)


def test_a_loss_with_parameters_is_saved_and_resumed(tmp_path):
    "Bit for bit. Wrong: its parameter, or its momentum, starts anew; averages are of the model only"
    def go(*cbs, loss=None, **kwargs):
        torch.manual_seed(0)
        learn = helpers.learner(*cbs, EMACB(0.5, apply=False), opt_func=optim.AdamW)
        learn.loss_func = loss or Scaled()
        with contextlib.redirect_stdout(io.StringIO()): learn.fit(2, **kwargs)
        return learn
    path = tmp_path/'a.pt'
    ref, cut = go(), go(PowerCutQuiet(1, 1, path))
    assert not any('loss_func' in k for k in cut.averages['ema'].weights)
    torch.manual_seed(5)
    learn = go(resume=path)
    a, b = learner_state(learn), learner_state(ref)
    assert all(equal(a[k], b[k]) for k in ('weights', 'opt', 'loss', 'averages'))
    assert a['loss']['loss_func.calls'] == 2*len(learn.dls.train) and a['loss']['loss_func.s'] != 0
    new = helpers.learner(EMACB(0.5), opt_func=optim.AdamW)
    new.loss_func = Scaled()
    new.load(path)
    saved = read_checkpoint(path)
    assert torch.equal(new.loss_func.s, saved['loss']['loss_func.s']) and new.loss_func.s.is_leaf
    words = r'another loss function. other shapes: loss_func.classes \(3,\), here \(4,\)'
    with pytest.raises(ValueError, match=words):
        go(loss=Scaled(4), resume=path)
    new.loss_func = (other := Scaled(4))
    with pytest.warns(UserWarning, match='another loss function.*The loss function stays as it is'): new.load(path)
    assert other.s == 0


class Pair:
    "Two optimizers in one, with a state of its own"
    def __init__(self, params, lr):
        self.a, self.b = optim.Adam(params[::2], lr), optim.SGD(params[1::2], lr, momentum=0.9)
    def step(self): self.a.step(), self.b.step()
    def zero_grad(self): self.a.zero_grad(), self.b.zero_grad()
    def state_dict(self): return dict(a=self.a.state_dict(), b=self.b.state_dict())
    def load_state_dict(self, state): self.a.load_state_dict(state['a']), self.b.load_state_dict(state['b'])


class PairWithGroups(Pair):
    param_groups = property(lambda self: self.a.param_groups + self.b.param_groups)


class InList(Pair):
    def state_dict(self): return dict(all=[o.state_dict() for o in (self.a, self.b)])
    def load_state_dict(self, state):
        for o, s in zip((self.a, self.b), state['all']): o.load_state_dict(s)


@pytest.mark.parametrize('opt_func', [Pair, PairWithGroups, InList])
def test_several_optimizers_in_one(opt_func, tmp_path):
    "Wrong: KeyError('param_groups') at the first checkpoint"
    def go(*cbs, **kwargs):
        learn = helpers.learner(*cbs, opt_func=opt_func)
        with contextlib.redirect_stdout(io.StringIO()): learn.fit(2, **kwargs)
        return learn
    go(PowerCutQuiet(1, 1, path := tmp_path/'a.pt'))
    ref, learn = go(CheckpointCB(tmp_path/'b')), go(resume=path)
    assert equal(learner_state(learn)['weights'], learner_state(ref)['weights'])
    assert equal(learn.opt.state_dict(), ref.opt.state_dict()) and learn.opt_steps == ref.opt_steps
    other = helpers.learner()
    with pytest.raises(ValueError, match=f'saved from {opt_func.__name__}, here is SGD'): other.load(path)


def test_an_optimizer_whose_state_cannot_be_saved(tmp_path):
    class Odd(Pair):
        def state_dict(self): return dict(self=self)
    class Stateless(Pair): state_dict = None
    for opt_func, words in ((Odd, 'own.self is a Odd'), (Stateless, 'state_dict')):
        learn = helpers.learner(CheckpointCB(tmp_path), opt_func=opt_func)
        with pytest.raises(TypeError, match=words): learn.fit(1)
        assert learn.opt_steps == 0


@pytest.mark.parametrize('saved, here, words', [
    (lambda: [BNUpdateCB()], lambda: [], 'gone: BNUpdateCB'),
    (lambda: [], lambda: [GradClipCB(norm=1.)], 'new: GradClipCB'),
    (lambda: [Mine(), GradClipCB(norm=1.)], lambda: [NaNGuardCB()], 'gone: Mine, GradClipCB; new: NaNGuardCB'),
    (lambda: [], lambda: [], None), (lambda: [ProgressCB()], lambda: [RecorderCB()], None)])
def test_other_callbacks_than_the_run_had(saved, here, words, tmp_path):
    "Those on which the run depends. Wrong: silence, and it goes another way"
    def go(*cbs, **kwargs):
        learn = helpers.learner(*cbs, EMACB(0.5, apply=False))
        with contextlib.redirect_stdout(io.StringIO()): learn.fit(2, **kwargs)
    go(*saved(), PowerCutQuiet(1, 1, path := tmp_path/'a.pt'))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        go(*here(), resume=path)
    told = [str(o.message) for o in w if 'other callbacks' in str(o.message)]
    assert len(told) == (words is not None)
    if words: assert f'({words})' in told[0]


class Mine(Callback):
    def before_batch(self, learn): learn.batch = learn.batch
