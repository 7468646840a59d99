"What is logged is what happened: read back with other means, interrupted, resumed, and with all around it failing"
import csv, os, signal, sys, threading, warnings
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import fastswa.callbacks.loggers
from fastswa.callbacks.metrics import MetricsCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.callbacks.loggers import CSVLoggerCB, LogCB, TensorBoardCB
from fastswa.training.events import Callback, CancelFitException
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.schedule import BatchSchedCB
from fastswa.callbacks.swa import EMACB, SWACB
from helpers import Accumulate, forkserver

class Error:
    "The mean absolute error"
    def reset(self): self.sum = self.n = 0
    def update(self, preds, targets):
        self.sum += (preds - targets).abs().sum().item()
        self.n += targets.numel()
    def compute(self): return self.sum/self.n
    def state_dict(self): return dict(vars(self))
    def load_state_dict(self, d): vars(self).update(d)

class Kept:
    def __init__(self): self.dicts = []
    def log(self, d): self.dicts.append(d)
    def of(self, name): return [(d['step'], d[name]) for d in self.dicts if name in d]

class At(Callback):
    "Do something in batch `iter` of training epoch `epoch`, at one moment"
    def __init__(self, epoch, iter, f, event='after_batch', order=0):
        self.at, self.order = (epoch, iter), order
        def at_last(learn):
            if learn.training and (learn.epoch, learn.iter) == self.at: f(learn)
        setattr(self, event, at_last)

class Losses(Callback):
    def before_fit(self, learn): self.seen = getattr(self, 'seen', [])
    def after_batch(self, learn):
        if learn.training: self.seen.append((len(learn.batch[0]), learn.loss.item()))

class Quiet(Callback):
    shows_rows = True                                        # MetricsCB prints nothing

def learner(*cbs, seed=0, sizes=(10, 10, 10, 10, 3), noise=0., **kwargs):
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, 3, generator=g) for n in sizes]
    batches = [(x, x.sum(-1, keepdim=True) + 0.3) for x in xs]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(noise), nn.Linear(4, 1))
    dls = SimpleNamespace(train=batches, valid=batches[:2])
    return TrainLearner(model, dls, lr=0.05, cbs=[Quiet(), *cbs], **kwargs)

def fit(learn, *args, **kwargs):
    learn.fit(*args, **kwargs)
    return learn

def raises(e):
    def _f(learn): raise e
    return _f

def read(path):
    with open(path, newline='', encoding='utf-8') as f: return list(csv.DictReader(f))

def check(path, history):
    "The file has these rows, and each number in it is that in the history to the last bit"
    rows = read(path)
    assert len(rows) == len(history)
    for got, want in zip(rows, history):
        assert float(got.pop('time') or 0) >= 0      # unknown where the file was not there
        got = {k: v for k, v in got.items() if v != ''}
        assert {k: type(want[k])(v) for k, v in got.items()} == want

def files(path): return sorted(p.name for p in path.iterdir())

class Resuming(Callback):
    "What a checkpoint does: the fit starts at a later epoch, and history and steps are back before its first batch"
    def __init__(self, epoch, history, steps): self.epoch, self.history, self.steps = epoch, history, steps
    def before_fit(self, learn): learn.epochs = range(self.epoch, learn.n_epochs)
    def before_batch(self, learn):
        if self.steps is None: return
        learn.history, learn.opt_steps, self.steps = [dict(r) for r in self.history], self.steps, None

@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield

# the CSV file

def test_csv_is_the_history(tmp_path, strict):
    learn = learner(EMACB(), MetricsCB(error=Error()), CSVLoggerCB(tmp_path/'deep'/'log.csv'))
    learn.fit(2)
    check(tmp_path/'deep'/'log.csv', learn.history)
    assert [r['weights'] for r in read(tmp_path/'deep'/'log.csv')] == ['raw', 'raw', 'ema']*2
    assert files(tmp_path/'deep') == ['log.csv']

def test_csv_columns_are_the_union(tmp_path, strict):
    learn = learner(CSVLoggerCB(tmp_path/'log.csv'))
    learn.fit(1)
    first = [r['time'] for r in read(tmp_path/'log.csv')]
    learn.fit(1, cbs=MetricsCB(error=Error()))
    learn.fit(1)
    check(tmp_path/'log.csv', learn.history)
    assert list(read(tmp_path/'log.csv')[0]) == ['loss', 'epoch', 'train', 'weights', 'error', 'time']
    assert [r['time'] for r in read(tmp_path/'log.csv')][:2] == first
    assert files(tmp_path) == ['log.csv']

def test_csv_takes_any_value(tmp_path, strict):
    class Odd(Error):
        def compute(self): return torch.tensor([0.1, float('nan')], dtype=torch.float64)
    class Says(Error):
        def compute(self): return 'a "b", c\r\nd'
    class Nothing(Error):
        def compute(self): return None
    learn = learner(MetricsCB(odd=Odd(), says=Says(), nothing=Nothing()), CSVLoggerCB(tmp_path/'log.csv'))
    learn.fit(1)
    learn.fit(1)
    row = read(tmp_path/'log.csv')[-1]
    assert (row['odd'], row['says'], row['nothing']) == ('[0.1, nan]', 'a "b", c\r\nd', '')
    assert files(tmp_path) == ['log.csv']

def test_csv_after_ctrl_c(tmp_path, strict):
    learn = learner(CSVLoggerCB(tmp_path/'log.csv'), At(1, 3, raises(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt): learn.fit(3)
    assert len(learn.history) == 2
    check(tmp_path/'log.csv', learn.history)
    learn.cbs.pop()
    learn.fit(1)
    check(tmp_path/'log.csv', learn.history)
    assert files(tmp_path) == ['log.csv']

@pytest.mark.parametrize('when', ['first', 'later'])
def test_csv_ctrl_c_while_writing(tmp_path, monkeypatch, when):
    calls = []
    @contextmanager
    def pressed(path):
        calls.append(path)
        if len(calls) == (1 if when == 'first' else 3): raise KeyboardInterrupt
        with real(path) as tmp: yield tmp
    real = fastswa.callbacks.loggers.written
    monkeypatch.setattr(fastswa.callbacks.loggers, 'written', pressed)
    learn = learner(CSVLoggerCB(tmp_path/'log.csv'))
    with pytest.raises(KeyboardInterrupt): learn.fit(3)
    check(tmp_path/'log.csv', learn.history)
    assert files(tmp_path) == ['log.csv']

def test_csv_full_disk(tmp_path, monkeypatch):
    full = [True]
    @contextmanager
    def writes(path):
        with real(path) as tmp:
            if full[0]: raise OSError(28, 'No space left on device')
            yield tmp
    real = fastswa.callbacks.loggers.written
    monkeypatch.setattr(fastswa.callbacks.loggers, 'written', writes)
    learn = learner(CSVLoggerCB(tmp_path/'log.csv'), At(2, 0, lambda learn: full.clear() or full.append(False)))
    with pytest.warns(UserWarning, match='No space left') as w: learn.fit(3)
    assert len(w) == 1 and learn.opt_steps == 15
    check(tmp_path/'log.csv', learn.history)

def test_csv_row_of_a_fit_that_a_callback_ends(tmp_path, strict):
    class Stops(Callback):
        order = 20
        def after_epoch(self, learn):
            if not learn.training: raise CancelFitException
    kept = Kept()
    learn = learner(Stops(), CSVLoggerCB(tmp_path/'log.csv'), LogCB(kept))
    learn.fit(3)
    assert len(learn.history) == 2
    check(tmp_path/'log.csv', learn.history)
    assert kept.of('raw/loss') == [(5, learn.history[-1]['loss'])]

def test_csv_columns_that_come_late(tmp_path, strict):
    "A callback that completes the row after the logger's turn: the file has it when the fit has ended, no row twice"
    class Late(Callback):
        order = 80
        def after_epoch(self, learn): learn.history[-1] = {**learn.history[-1], 'late': 1.5}
    kept = Kept()
    learn = fit(learner(Late(), CSVLoggerCB(tmp_path/'log.csv'), LogCB(kept)), 2)
    check(tmp_path/'log.csv', learn.history)
    assert len(kept.of('raw/loss')) == 2

@pytest.mark.parametrize('content', [b'a,b\n1,2\n', b'not a table at all', b'\xff\xfe\x00',
                                     b'loss,epoch,train,weights\n', b'"', b'a\x00b\n1\n'])
def test_csv_leaves_what_is_not_its_own(tmp_path, content):
    path = tmp_path/'log.csv'
    path.write_bytes(content)
    learn = learner(CSVLoggerCB(path))
    says = 'log.csv was not written by this run.*give another path, or remove it'
    for _ in range(2):
        with pytest.raises(FileExistsError, match=says): learn.fit(2)
    assert learn.opt_steps == 0 and files(tmp_path) == ['log.csv'] and path.read_bytes() == content
    path.unlink()
    learn.fit(1)
    check(path, learn.history)

def test_csv_empty_file(tmp_path, strict):
    (tmp_path/'log.csv').touch()
    learn = fit(learner(CSVLoggerCB(tmp_path/'log.csv')), 1)
    check(tmp_path/'log.csv', learn.history)
    assert files(tmp_path) == ['log.csv']

def test_csv_of_a_table_that_somebody_changed(tmp_path):
    path = tmp_path/'log.csv'
    learn = fit(learner(CSVLoggerCB(path)), 1)
    changed = path.read_text().replace('raw', 'RAW', 1)
    path.write_text(changed)
    with pytest.raises(FileExistsError): learn.fit(1)
    assert path.read_text() == changed and learn.opt_steps == 5

def test_csv_removed_between_two_fits(tmp_path, strict):
    learn = fit(learner(CSVLoggerCB(tmp_path/'log.csv')), 1)
    (tmp_path/'log.csv').unlink()
    learn.fit(1)
    check(tmp_path/'log.csv', learn.history)

def test_csv_untouched_by_fits_without_a_row(tmp_path, strict):
    learn = learner(CSVLoggerCB(tmp_path/'log.csv'), At(0, 1, raises(CancelFitException())))
    learn.fit(0)
    learn.fit(1)
    learn.validate()
    assert files(tmp_path) == []

def test_csv_serves_learners_in_turn(tmp_path):
    path = tmp_path/'log.csv'
    cb = CSVLoggerCB(path)
    a = fit(learner(cb), 2)
    with pytest.raises(FileExistsError): fit(learner(cb, seed=1), 1)
    check(path, a.history)
    path.rename(tmp_path/'a.csv')
    b = fit(learner(cb, seed=1), 1)
    check(path, b.history)
    check(tmp_path/'a.csv', a.history)

def killed(path, folder, n_epochs, more):
    "A run whose last checkpoint is after `n_epochs`, and which had come `more` rows further when it was killed"
    learn = fit(learner(CSVLoggerCB(path), CheckpointCB(folder, '1ep', keep=None)), 4)
    for file in sorted(folder.glob('step-*.pt'))[n_epochs:]: file.unlink()
    path.write_bytes(b''.join(path.read_bytes().splitlines(keepends=True)[:1 + 2*n_epochs + more]))
    return learn

@pytest.mark.parametrize('more', [0, 1, 3])
def test_csv_resumed(tmp_path, strict, more):
    "Rows up to the checkpoint stay with their times; those that the killed run had written beyond it are replaced"
    path, folder = tmp_path/'log.csv', tmp_path/'ckpt'
    whole = killed(path, folder, 2, more)
    before = read(path)[:4]
    learn = learner(CSVLoggerCB(path), CheckpointCB(folder))
    learn.quiet = True
    learn.fit(4, resume=folder)
    assert learn.history == whole.history and read(path)[:4] == before
    check(path, learn.history)

def test_csv_of_another_run_when_resumed(tmp_path):
    "A logger that was not there when the checkpoint was written, or wrote elsewhere, has no table to go on with"
    path, folder = tmp_path/'log.csv', tmp_path/'ckpt'
    killed(path, folder, 2, 0)
    (tmp_path/'mine.csv').write_text('mine')
    learn = learner(CSVLoggerCB(tmp_path/'mine.csv'), CheckpointCB(folder))
    with pytest.raises(FileExistsError, match='mine.csv was not written by this run'): learn.fit(4, resume=folder)
    assert (tmp_path/'mine.csv').read_text() == 'mine' and learn.opt_steps == 10
    learn = fit(learner(CSVLoggerCB(tmp_path/'other.csv'), CheckpointCB(folder)), 4, resume=folder)
    check(tmp_path/'other.csv', learn.history)

@pytest.mark.parametrize('cb', [lambda p: CSVLoggerCB(p), lambda p: CSVLoggerCB(p/'log.csv'),
                                lambda p: TensorBoardCB(p), lambda p: TensorBoardCB(p/'runs')])
def test_no_such_folder(tmp_path, cb):
    if isinstance(cb(tmp_path), TensorBoardCB): pytest.importorskip('tensorboard')
    path = tmp_path/'there'
    path.write_text('a file')
    if type(cb(path)) is CSVLoggerCB and cb(path).path == path: path = tmp_path
    learn = learner(cb(path))
    with pytest.raises(OSError): learn.fit(1)
    assert learn.opt_steps == 0 and (tmp_path/'there').read_text() == 'a file'

def test_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    "Played, since root may write anywhere"
    def refuses(dir): raise PermissionError(13, 'Permission denied', str(dir))
    monkeypatch.setattr('tempfile.TemporaryFile', refuses)
    learn = learner(CSVLoggerCB(tmp_path/'log.csv'))
    with pytest.raises(PermissionError): learn.fit(1)
    assert learn.opt_steps == 0

def test_csv_device_file():
    "As root, a file renamed to /dev/null would be the end of it"
    learn = learner(CSVLoggerCB('/dev/null'))
    with pytest.raises(OSError, match='must be a file'): learn.fit(1)
    assert not os.path.isfile('/dev/null')

# objects with log(dict)

def test_losses_are_the_mean_over_samples():
    kept, losses = Kept(), Losses()
    learn = learner(losses, LogCB(kept, every='2ba'))
    learn.fit(2)
    learn.fit(1)
    ends = [2, 4, 6, 8, 10, 12, 14, 15]
    n, values = np.array(losses.seen, dtype=np.float64).T
    means = [np.average(values[a:b], weights=n[a:b]) for a, b in zip([0, *ends], ends)]
    assert [s for s, _ in kept.of('train/loss')] == ends
    np.testing.assert_allclose([v for _, v in kept.of('train/loss')], means, rtol=1e-12)

def test_rows_have_the_values_of_the_history():
    kept = Kept()
    learn = learner(EMACB(), SWACB(start='1ep', every='1ba'), MetricsCB(error=Error()), LogCB(kept))
    learn.fit(2)
    for name in 'raw', 'ema', 'swa':
        for k in 'loss', 'error':
            rows = [r for r in learn.history if r['weights'] == name and r['train'] == 'eval']
            assert [v for _, v in kept.of(f'{name}/{k}')] == [r[k] for r in rows]
    rows = [r for r in learn.history if r['train'] == 'train']
    for k, name in dict(loss='epoch_loss', error='error').items():
        assert kept.of(f'train/{name}') == [(5*(i + 1), r[k]) for i, r in enumerate(rows)]
    assert all({'epoch', 'step'} <= set(d) for d in kept.dicts)
    steps = [d['step'] for d in kept.dicts]
    assert steps == sorted(steps)

@pytest.mark.parametrize('every,want', [('1ba', range(1, 16)), ('0.5ep', [3, 5, 8, 10, 13, 15]),
                                        ('0.2dur', [3, 6, 9, 12, 15]), ('100ba', [15]), ('0.3ba', range(1, 16))])
def test_every(every, want):
    kept = Kept()
    fit(learner(LogCB(kept, every=every)), 3)
    assert [s for s, _ in kept.of('train/loss')] == list(want)

def test_several_steps_in_a_batch():
    "Where the count goes up by two, no interval is passed over"
    class Twice(TrainLearner):
        def step(self):
            self.opt.step()
            self.opt.step()
    kept, base = Kept(), learner(sizes=[4]*9)
    fit(Twice(base.model, base.dls, lr=0.01, cbs=[LogCB(kept, every='3ba')]), 1)
    assert [s for s, _ in kept.of('train/loss')] == [4, 6, 10, 12, 16, 18]

def test_rate_is_that_of_the_step():
    "Schedules move on after the step: what is logged is what the step used, group by group"
    def two(params, lr):
        a, b, c, d = params
        return optim.SGD([dict(params=[a, b], name='body', lr=lr), dict(params=[c, d], lr=lr/10)], lr, momentum=0.9)
    kept, used = Kept(), []
    class Sees(Callback):
        order = -5
        def step(self, learn): pass
    class Uses(TrainLearner):
        def step(self):
            used.append([g['lr'] for g in self.opt.param_groups])
            self.opt.step()
    base = learner()
    learn = Uses(base.model, base.dls, lr=0.05, opt_func=two, cbs=[
        BatchSchedCB(partial(lr_scheduler.OneCycleLR, max_lr=[0.2, 0.02])), LogCB(kept, every='1ba')])
    learn.fit(2)
    opt = two(nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(4)]), 0.05)
    sched = lr_scheduler.OneCycleLR(opt, [0.2, 0.02], total_steps=10)
    want = []
    for _ in range(10):
        want.append([g['lr'] for g in opt.param_groups])
        opt.step()
        sched.step()
    got = [[a, b] for (_, a), (_, b) in zip(kept.of('lr/body'), kept.of('lr/1'))]
    assert got == want == used

def test_rate_that_is_a_tensor():
    kept = Kept()
    sgd = lambda params, lr: optim.SGD(params, torch.tensor(lr))
    sched = BatchSchedCB(partial(lr_scheduler.ExponentialLR, gamma=0.5))
    fit(learner(LogCB(kept, every='2ba'), sched, opt_func=sgd), 1)
    np.testing.assert_allclose([v for _, v in kept.of('lr')], [0.05/2, 0.05/8, 0.05/16], rtol=1e-6)

def test_optimizer_without_groups():
    class Own:
        def __init__(self, params, lr): self.params, self.lr = list(params), lr
        def step(self):
            with torch.no_grad():
                for p in self.params: p -= self.lr*p.grad
        def zero_grad(self):
            for p in self.params: p.grad = None
    kept = Kept()
    fit(learner(LogCB(kept, every='5ba'), opt_func=Own), 1)
    assert [s for s, _ in kept.of('train/loss')] == [5] and not kept.of('lr')

def test_steps_not_batches():
    "Under accumulation the interval is in optimizer steps, and its mean is over all the batches that led to them"
    kept, losses = Kept(), Losses()
    learn = fit(learner(losses, Accumulate(2), LogCB(kept, every='1ba'), sizes=(4, 2, 8, 5)), 2)
    n, values = np.array(losses.seen, dtype=np.float64).T
    assert learn.opt_steps == 4
    assert [s for s, _ in kept.of('train/loss')] == [1, 2, 3, 4]
    want = [np.average(values[i:i+2], weights=n[i:i+2]) for i in range(0, 8, 2)]
    np.testing.assert_allclose([v for _, v in kept.of('train/loss')], want, rtol=1e-12)

class Far(torch.Tensor):
    "A tensor that says it is on a GPU, and counts how often somebody waits for it"
    reads = 0
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.__float__,
                    torch.Tensor.__bool__): cls.reads += 1
        if func == torch.Tensor.device.__get__: return torch.device('cuda')
        return super().__torch_function__(func, types, args, kwargs or {})

@pytest.mark.parametrize('every,most', [('1ba', 200), ('50ba', 4), ('1ep', 2)])
def test_device_is_waited_for_once_in_every(every, most):
    class FarCB(Callback):
        order = 50
        def after_loss(self, learn):
            if learn.training: learn.loss = learn.loss.as_subclass(Far)
    class Backward(TrainLearner):
        def backward(self): self.loss.as_subclass(torch.Tensor).backward()
    def reads(*cbs):
        base = learner(sizes=[2]*100)
        Far.reads, learn = 0, Backward(base.model, base.dls, lr=0.01, cbs=[FarCB(), *cbs])
        learn.fit(2)
        return Far.reads
    kept = Kept()
    per_log = 2                                              # moved to the CPU, then its one number
    assert 0 < reads(LogCB(kept, every=every)) - reads() <= per_log*most
    assert len(kept.of('train/loss')) == most

def test_silent_while_looking(tmp_path):
    class Looks(Callback):
        def after_epoch(self, learn):
            if not learn.training: return
            learn.validate()
            learn.get_preds()
            learn.lr_find(max_steps=12, show=False)
    kept, path = Kept(), tmp_path/'log.csv'
    learn = learner(Looks(), EMACB(), CSVLoggerCB(path), LogCB(kept, every='1ba'))
    learn.fit(2)
    plain = Kept()
    fit(learner(EMACB(), LogCB(plain, every='1ba')), 2)
    assert kept.dicts == plain.dicts
    check(path, learn.history)

def test_logging_changes_no_bit_of_the_run(tmp_path):
    bare = fit(learner(EMACB(), noise=0.5), 2)
    logged = fit(learner(EMACB(), CSVLoggerCB(tmp_path/'log.csv'), LogCB(Kept(), every='1ba'), noise=0.5), 2)
    assert bare.history == logged.history
    for a, b in zip(bare.model.parameters(), logged.model.parameters()): assert torch.equal(a, b)

def test_logger_that_fails():
    class Down:
        calls = 0
        def log(self, d):
            self.calls += 1
            raise ConnectionError('no route')
    down = Down()
    learn = learner(LogCB(down, every='1ba'))
    with pytest.warns(UserWarning, match='no route') as w: learn.fit(2)
    assert (len(w), down.calls, learn.opt_steps) == (1, 14, 10)
    with pytest.warns(UserWarning, match='no route') as w: learn.fit(1)       # the next fit says it again
    assert len(w) == 1

def test_an_interval_begins_with_each_fit():
    kept = Kept()
    learn = learner(LogCB(kept, every='3ba'))
    for _ in range(3): learn.fit(1)
    assert [s for s, _ in kept.of('train/loss')] == [3, 5, 8, 10, 13, 15]

def test_ctrl_c_in_the_logger():
    class Pressed:
        def log(self, d): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learner(LogCB(Pressed(), every='1ba')).fit(1)

def test_what_is_left_is_logged_when_a_fit_is_interrupted():
    kept, losses = Kept(), Losses()
    learn = learner(losses, LogCB(kept, every='2ba'), At(0, 4, raises(ZeroDivisionError()), 'after_predict'),
                    sizes=[4]*6)
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert [s for s, _ in kept.of('train/loss')] == [2, 4]
    learn = learner(losses, LogCB(kept, every='100ba'), At(0, 4, raises(KeyboardInterrupt()), 'after_predict'),
                    sizes=[4]*6)
    losses.seen = []
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    step, value = kept.of('train/loss')[-1]
    assert step == 4
    np.testing.assert_allclose(value, np.mean([l for _, l in losses.seen]), rtol=1e-12)

def test_interval_goes_on_where_a_checkpoint_was_taken():
    states, want, got = [], Kept(), Kept()
    cb = LogCB(want, every='4ba')
    fit(learner(cb, At(0, 2, lambda learn: states.append(cb.state_dict()), order=80), sizes=[4]*8), 1)
    other = LogCB(got, every='4ba')
    learn = learner(other, sizes=[4]*8)
    trained = learner(At(0, 2, raises(CancelFitException()), order=80), sizes=[4]*8)
    trained.fit(1)
    learn.model.load_state_dict(trained.model.state_dict())
    learn.dls.train = learn.dls.train[3:]
    def back(learn):
        learn.opt_steps = learn.clock.steps = 3
        learn.clock.batches = 4                              # this one is counted already
        other.load_state_dict(states[0])
    learn.cbs.append(At(0, 0, back, 'before_batch'))
    learn.fit(1)
    assert got.of('train/loss') == want.of('train/loss')

def test_bad_loggers():
    for bad in None, print, Kept, 'wandb', {}:
        with pytest.raises(TypeError, match='has log'): LogCB(bad)
    for bad in '0ba', 10, 'often':
        with pytest.raises(ValueError, match='every must be'): LogCB(Kept(), every=bad)
    with pytest.raises(ValueError, match="'train' is the training"): learner(EMACB(name='train'), LogCB(Kept())).fit(1)
    learn = learner(LogCB(Kept(), every='0.5dur'))
    learn.dls.train = iter(learn.dls.train)
    with pytest.raises(ValueError, match='loader with a length'): learn.fit(1)

def test_only_validation():
    kept = Kept()
    learn = fit(learner(LogCB(kept)), 1, train=False)
    assert kept.dicts == [{'raw/loss': learn.history[0]['loss'], 'epoch': 0, 'step': 0}]

@pytest.mark.parametrize('at', [(0, 1), (1, 3), (2, 4), (3, 0)])
def test_with_a_checkpoint_every_log_is_that_of_a_run_that_was_not_stopped(tmp_path, at):
    "Stopped at any batch and resumed by another learner: no row twice, no interval cut short, no file kept aside"
    def run(kept, *cbs, folder=tmp_path): return learner(
        EMACB(), MetricsCB(error=Error()), CSVLoggerCB(folder/'log.csv'), LogCB(kept, every='3ba'), *cbs, noise=0.5)
    whole, first, then = Kept(), Kept(), Kept()
    want = fit(run(whole, folder=tmp_path/'whole'), 4)
    stopped = run(first, At(*at, raises(ZeroDivisionError()), order=99), CheckpointCB(tmp_path/'ckpt', every='1ba'))
    with pytest.raises(ZeroDivisionError): stopped.fit(4)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn = run(then, CheckpointCB(tmp_path/'ckpt', every='1ba'))
        learn.fit(4, resume=tmp_path/'ckpt')
    assert learn.history == want.history
    check(tmp_path/'log.csv', want.history)
    assert files(tmp_path) == ['ckpt', 'log.csv', 'whole']
    here = at[0]*5 + at[1] + 1
    seen = [d for d in first.dicts
            if d['step'] <= here and not (here % 3 and 'lr' in d and d['step'] == here)] + then.dicts
    assert seen == whole.dicts

# TensorBoard

def scalars(folder):
    "Step and value of every scalar, as TensorBoard shows them"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    seen = EventAccumulator(str(folder), size_guidance=dict(scalars=0)).Reload()
    return {k: [(e.step, e.value) for e in seen.Scalars(k)] for k in seen.Tags()['scalars']}

def single(pairs): return [(s, float(np.float32(v))) for s, v in pairs]

def n_threads(): return sum('Writer' in type(t).__name__ for t in threading.enumerate())

def test_tensorboard(tmp_path, strict):
    pytest.importorskip('tensorboard')
    kept = Kept()
    class Vector(Error):
        def compute(self): return torch.ones(3)
    learn = learner(EMACB(), MetricsCB(error=Error(), vector=Vector()), TensorBoardCB(tmp_path/'a'/'b', every='2ba'),
                    LogCB(kept, every='2ba'))
    learn.fit(2)
    learn.fit(1)
    names = {k for d in kept.dicts for k in d} - {'step'}
    got = scalars(tmp_path/'a'/'b')
    assert set(got) == {k for k in names if 'vector' not in k}
    for k in got: assert got[k] == single(kept.of(k)), k
    assert n_threads() == 0

def test_tensorboard_interrupted_and_resumed(tmp_path, strict):
    pytest.importorskip('tensorboard')
    learn = learner(TensorBoardCB(tmp_path, every='1ba'), At(2, 3, raises(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt): learn.fit(3)
    assert n_threads() == 0
    first = scalars(tmp_path)['train/loss']
    assert [s for s, _ in first] == list(range(1, 14))
    again = learner(TensorBoardCB(tmp_path, every='1ba'), Resuming(1, learn.history[:2], 7), seed=1)
    again.fit(2)
    got = scalars(tmp_path)
    assert [s for s, _ in got['train/loss']] == list(range(1, 13))
    assert got['train/loss'][:7] == first[:7] and got['train/loss'][7] != first[7]
    assert [s for s, _ in got['raw/loss']] == [5, 12]

def killed_in_its_fourth_batch(folder):
    kill = At(0, 3, lambda learn: os.kill(os.getpid(), signal.SIGKILL), order=99)
    learner(TensorBoardCB(folder, every='1ba'), kill).fit(1)

def test_tensorboard_is_in_the_file_before_a_kill(tmp_path):
    pytest.importorskip('tensorboard')
    p = forkserver().Process(target=killed_in_its_fourth_batch, args=(tmp_path,))
    p.start()
    p.join()
    assert p.exitcode == -signal.SIGKILL
    assert [s for s, _ in scalars(tmp_path)['train/loss']] == [1, 2, 3, 4]

def test_tensorboard_folder_of_another_run(tmp_path):
    pytest.importorskip('tensorboard')
    fit(learner(TensorBoardCB(tmp_path)), 3)
    with pytest.warns(UserWarning, match='give each run a folder'):
        learn = fit(learner(TensorBoardCB(tmp_path), seed=1), 2)
    assert scalars(tmp_path)['raw/loss'] == single((5*(i + 1), r['loss']) for i, r in enumerate(learn.history[1::2]))

def test_tensorboard_that_cannot_write(tmp_path, monkeypatch):
    tb = pytest.importorskip('torch.utils.tensorboard')
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(tb.SummaryWriter, 'add_scalar', full)
    learn = learner(TensorBoardCB(tmp_path, every='1ba'))
    with pytest.warns(UserWarning, match='No space left') as w: learn.fit(1)
    assert len(w) == 1 and learn.opt_steps == 5 and n_threads() == 0

def test_tensorboard_not_installed(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, 'torch.utils.tensorboard', raising=False)
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    learn = learner(TensorBoardCB(tmp_path/'runs'))
    with pytest.raises(ImportError, match=r'pip install fastswa\[tensorboard\]'): learn.fit(1)
    assert learn.opt_steps == 0
