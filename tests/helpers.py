"What test files share: toy data, small nets, learners on them, copies of tensors, memory, Ctrl-C anywhere, processes"
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import traceback
from collections import defaultdict
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from fastswa.training.events import Callback, CancelFitException, CancelStepException
from fastswa.training.learner import TrainLearner

# the code of the room core in whose lines Ctrl-C is pressed
CORE = 'fastswa/core.py', 'fastswa/random_state.py', 'fastswa/module_state.py'


# --- data, nets, learners


class WholeBatches(TensorDataset):
    "A `TensorDataset` that gives a batch at once, to loaders with `collate_fn=list`: a third of the time"
    def __getitems__(self, indices): return self[torch.tensor(indices)]


def data(n=160, bs=16, shuffle=False, **kw):
    "Loaders of `n` vectors of length 3 in three classes that can be learned; validation in batches of `2*bs`"
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=g)
    ds = WholeBatches(F.one_hot(y, 3).float() + torch.randn(n, 3, generator=g)/2, y)
    loader = partial(DataLoader, ds, collate_fn=list, **kw)
    return SimpleNamespace(train=loader(batch_size=bs, shuffle=shuffle), valid=loader(batch_size=2*bs))


def net(seed=0, norm=True, dropout=None):
    "A perceptron for `data()`: linear, BatchNorm (or Identity), ReLU, (dropout,) linear"
    torch.default_generator.manual_seed(seed)
    drop = [] if dropout is None else [nn.Dropout(dropout)]
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), *drop,
                         nn.Linear(8, 3))


def learner(*cbs, model=None, dls=None, cls=TrainLearner, lr=0.3, **kw):
    "A learner of `net()` on `data()`: 10 steps an epoch"
    return cls(net() if model is None else model, dls or data(), F.cross_entropy, lr, cbs, **kw)


def regression(n=7, bs=8):
    "`n` batches of vectors of length 3 and their sums, as lists; two of them for validation"
    xs = torch.randn(n, bs, 3, generator=torch.Generator().manual_seed(0))
    train = [(x, x.sum(1, keepdim=True)) for x in xs]
    return SimpleNamespace(train=train, valid=train[:2])


def linear():
    "A linear layer for `regression()`, always the same"
    torch.default_generator.manual_seed(0)
    return nn.Linear(3, 1)


def image_data(n=56, bs=8, valid=20):
    "Loaders of `n` images (N, 1, 6, 6) in three classes, shuffled; validation in batches of `valid`"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 6, 6, generator=g), torch.randint(3, (n,), generator=g)
    loader = partial(DataLoader, WholeBatches(x + y.view(-1, 1, 1, 1), y), collate_fn=list)
    return SimpleNamespace(train=loader(batch_size=bs, shuffle=True), valid=loader(batch_size=valid))


def image_net():
    "A convolution, BatchNorm, ReLU, dropout and a linear layer, for `image_data()`"
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                         nn.Linear(64, 3))


def image_learner(*cbs, model=None, dls=None, cls=TrainLearner, lr=0.05, opt_func=partial(optim.SGD, momentum=0.9)):
    "A learner of `image_net()` on `image_data()`: 7 steps an epoch, the last batches smaller"
    return cls(model or image_net(), dls or image_data(), F.cross_entropy, lr, cbs, opt_func)


class At(Callback):
    "Raise an exception at an event, in training or in validation"
    def __init__(self, event, exc, order=0, training=True):
        self.exc, self.order, self.training = exc, order, training
        setattr(self, event, self.go)
    def go(self, learn):
        if learn.training == self.training: raise self.exc


class Accumulate(Callback):
    "A step each `k` batches, for the sum of their gradients"
    def __init__(self, k): self.k = k
    def after_backward(self, learn):
        if (learn.iter + 1) % self.k: raise CancelStepException


class NoOptimizer:
    "What a learner takes for an optimizer, and a schedule does not"
    def __init__(self, params, lr): pass
    def step(self): pass
    def zero_grad(self): pass


class AtEpoch(Callback):
    "Do something when a training epoch begins, after all other callbacks; without `f`: end the fit"
    order = 95
    def __init__(self, epoch, f=None): self.epoch, self.f = epoch, f
    def before_epoch(self, learn):
        if not learn.training or learn.epoch != self.epoch: return
        if self.f is None: raise CancelFitException
        self.f(learn)


class Hits:
    "A metric: the share of right answers"
    def reset(self): self.n = self.right = 0
    def update(self, preds, targets):
        self.n += len(targets)
        self.right += (preds.argmax(1) == targets).sum().item()
    def compute(self): return self.right/self.n
    def state_dict(self): return dict(n=self.n, right=self.right)
    def load_state_dict(self, state): self.n, self.right = state['n'], state['right']


class TiedNet(nn.Module):
    "Two linear layers, of which the second may have the first one's weight or its transpose, BatchNorm and a counter"
    def __init__(self, norm=False, tied=None, dtype=torch.float32):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, dtype=dtype), nn.Linear(3, 3, bias=False, dtype=dtype)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.register_buffer('steps', torch.tensor(0))
        if tied == 'shared': self.b.weight = self.a.weight
        if tied == 'transposed': self.b.weight = nn.Parameter(self.a.weight.data.t())

    def forward(self, x): return self.b(self.norm(self.a(x)))

    def step(self, generator):
        "A step of a random walk"
        with torch.no_grad():
            for p in {p.data_ptr(): p for p in floats(self).values()}.values():
                p += torch.randn(p.shape, generator=generator).to(p)
            self.steps += 1


def one(value=0., dtype=None):
    "A layer of one weight, for averages that can be worked out by hand"
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


class Losses(Callback):
    "The loss in the rows of validation (or of training) is one of these, epoch by epoch"
    def __init__(self, values, rows='eval'): self.values, self.rows = values, rows
    def after_epoch(self, learn):
        if learn.history[-1]['train'] == self.rows: learn.history[-1]['loss'] = self.values[learn.epoch]


class Scripted:
    "A metric that is one of these, epoch by epoch: the same for the training row and the raw row of validation"
    def __init__(self, values): self.values, self.rows = values, 0
    def reset(self): pass
    def update(self, preds, targets): pass
    def compute(self):
        self.rows += 1
        return self.values[(self.rows - 1)//2]


def quick(*cbs, lr=0.1, **kw):
    "A learner of `linear()` on `regression()`: 7 steps an epoch, at almost no cost"
    return TrainLearner(linear(), regression(), F.mse_loss, lr, cbs, **kw)


# --- tensors


def copied(tensors):
    "A copy of a dict of tensors"
    return {k: v.detach().clone() for k, v in tensors.items()}


def same(a, b):
    "Whether two dicts of tensors have the same names in the same order, and the same values bit for bit"
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def floats(model):
    "The floating-point entries of a model's state, which are the model's own tensors"
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def reopened(x):
    "What is read back of `x` from a file that torch opens with weights_only=True"
    f = io.BytesIO()
    torch.save(x, f)
    f.seek(0)
    return torch.load(f, weights_only=True)


def state(learn):
    "A copy of the state of a learner's model"
    return copied(learn.model.state_dict())


class Trail(Callback):
    "The weights after each step: `seen`, copies of the state; `weights`, those of the first layer in float64"
    order = 99
    def before_fit(self, learn): self.seen = []
    def after_step(self, learn): self.seen.append(copied(learn.model.state_dict()))
    @property
    def weights(self): return [s['0.weight'].double().numpy() for s in self.seen]


# --- memory, interruptions, processes


def memory(f):
    "Bytes that torch held at most during `f`, and after it, beyond those before"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    events = sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'),
                    key=lambda e: e.start_ns())
    now = top = 0
    for e in events:
        now += e.nbytes()
        top = max(top, now)
    assert events
    return top, now


def end_workers(dls):
    "End the persistent workers of loaders: where the garbage collection has to, torch waits 5 seconds for each of them"
    for dl in (dls.train, dls.valid): dl._iterator = None


def _traced(f, trace):
    "Call `f` with a trace function; whether KeyboardInterrupt came out"
    sys.settrace(trace)
    try: f()
    except KeyboardInterrupt: return True
    finally: sys.settrace(None)
    return False


def moments(f, files, last=(), every=(), alike=False):
    """When to press Ctrl-C: file, line and how often it has run by then, for each line of `files` (parts of paths)

    The first time that it runs, in the files `last` the last time too, and in the files `every` each time. A run has
    20 times as many moments, nearly all of which are one line in a loop. Where another handler than Python's waits for
    the end of a block, as in `uninterrupted`, all moments until then are the same one, and one is given, but with
    `alike` all of them."""
    handlers = defaultdict(list)                               # of Ctrl-C, each time that a line ran

    @cache
    def watched(file): return any(o in file for o in files)

    def note(frame, event, arg):
        if event == 'line': handlers[frame.f_code.co_filename, frame.f_lineno].append(signal.getsignal(signal.SIGINT))
        return note
    _traced(f, lambda frame, event, arg: note if watched(frame.f_code.co_filename) else None)
    def runs(file, n):
        if any(o in file for o in every): return range(1, n + 1)
        return {1, n} if any(o in file for o in last) else {1}
    found, waiting = [], set()
    for (file, line), of_line in handlers.items():
        for run in runs(file, len(of_line)):
            handler = of_line[run - 1]
            if alike or handler not in waiting: found.append((file, line, run))
            if handler is not signal.default_int_handler: waiting.add(handler)
    return found


def ctrl_c(f, moment):
    "Call `f` with Ctrl-C at one of its `moments`; whether KeyboardInterrupt came out"
    file, line, n = moment

    def press(frame, event, arg):
        nonlocal n
        if event == 'line' and frame.f_lineno == line:
            n -= 1
            if n == 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return press
    return _traced(f, lambda frame, event, arg: press if frame.f_code.co_filename == file else None)


def in_new_process(script, env=None):
    "What a script prints in a new process, which may import from tests/; fails with its traceback where it fails"
    res = subprocess.run([sys.executable, '-c', textwrap.dedent(script)], capture_output=True, text=True,
                         cwd=os.path.dirname(__file__), env=env)
    assert res.returncode == 0, res.stderr
    return res.stdout


# --- several processes that train one model


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _as_rank(f, args, rank, size, port, folder, threads):
    "In a new process: what torchrun does for one, then `f`; an exception is written down"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port), OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(threads)
    multiprocessing.set_start_method('fork', force=True)      # of a loader's workers, as in a script of one's own
    sys.stdout = open(folder/f'out.{rank}', 'w')
    sys.stderr = open(folder/f'err.{rank}', 'w')
    try: f(*args)
    except BaseException:
        (folder/f'error.{rank}').write_text(traceback.format_exc())
        sys.stdout.flush()
        os._exit(1)                                            # as a script that fails: the others see it at once
    sys.stdout.flush()


def forkserver():
    "What starts processes by forking one that has imported torch once, the same one for all tests"
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['torch._dynamo', 'torch.distributed.fsdp', 'torch.distributed.checkpoint',
                                'fastswa.all', 'accelerate', 'torcheval.metrics', 'pytest', 'helpers', 'killed_run'])
    return ctx


def start_ranks(size, f, *args, folder, port=None, threads=1):
    "Processes that each call `f` as one of `size` ranks; they are forked from one that has imported torch once"
    ctx = forkserver()
    port = free_port() if port is None else port
    folder.mkdir(exist_ok=True)
    ps = [ctx.Process(target=_as_rank, args=(f, args, r, size, port, folder, threads)) for r in range(size)]
    for p in ps: p.start()
    return ps


def end_ranks(processes, seconds):
    "Exit codes, None for one that did not end in time and is killed"
    end = time.monotonic() + seconds
    for p in processes: p.join(max(0, end - time.monotonic()))
    codes = [p.exitcode for p in processes]
    for p in processes:
        if p.exitcode is None: p.kill()
        p.join()
    return codes


def errors_of(folder, size):
    "What each rank has failed with; '' where it has not"
    files = [folder/f'error.{r}' for r in range(size)]
    return [f.read_text() if f.exists() else '' for f in files]


def run_cases(cases, folder):
    "In each rank: one case after the other, in a folder of its own; what it fails with is written down"
    only = os.environ.get('ONLY', '')                          # to look into one of them
    for case in [c for c in cases if not only or c.__name__ in only]:
        error = ''
        sub = folder/case.__name__
        sub.mkdir(exist_ok=True)
        try: case(*[sub]*case.__code__.co_argcount)
        except BaseException: error = traceback.format_exc()
        (folder/f'{case.__name__}.{os.environ["RANK"]}').write_text(error)
        torch.distributed.barrier()


def check_case(name, folder, size):
    "Fails with what a case of `run_cases` has failed with, or where a rank did not come to it"
    for r in range(size):
        file = folder/f'{name}.{r}'
        assert file.exists(), f'process {r} did not come to it: {errors_of(folder, size)}'
        assert file.read_text() == '', f'process {r}: {file.read_text()}'


def raises_on_all(kind, match, f):
    "In each rank: all raise it, within a minute"
    began = time.monotonic()
    try:
        with pytest.raises(kind, match=match): f()
        text = ''
    except BaseException: text = traceback.format_exc()
    took = time.monotonic() - began
    texts = [None]*torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    assert not any(texts), text or 'another has not'
    assert took < 60
