"A run of which progress is told, for a process with a terminal, a log or a notebook: used by test_progress"
import fcntl, os, sys, termios
from multiprocessing.reduction import DupFd
from types import SimpleNamespace

import torch
from torch import nn

from fastswa.averaging.rules import ema
from fastswa.callbacks.progress import ProgressCB
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner

class AveragesCB(Callback):
    def before_fit(self, learn): learn.averages.add('ema', ema(decay=0.9))
    def after_step(self, learn): learn.averages.update_due()

class Clock:
    "Time that passes where a test says so"
    now = 0.
    def __call__(self): return self.now

class SlowCB(Callback):
    "Each batch takes so many seconds, of the clock"
    role = 'watches'      # time goes on in the rows of averages too
    def __init__(self, clock, seconds=0.05): self.clock, self.seconds = clock, seconds
    def before_batch(self, learn): self.clock.now += self.seconds

class Waits(Callback):
    "In the middle of the second epoch, until a line comes in"
    def before_batch(self, learn):
        if learn.training and (learn.epoch, learn.iter) == (1, 15): sys.stdin.readline()

def learner(*cbs, n=30):
    torch.manual_seed(0)
    x = torch.randn(n, 8, 3)
    batches = list(zip(x, x.sum(-1, keepdim=True)))
    return TrainLearner(nn.Linear(3, 1), SimpleNamespace(train=batches, valid=batches[:10]), lr=0.02, cbs=cbs)

def script(epochs, wait=False):
    "A training run for a process of its own"
    clock = Clock()
    learner(AveragesCB(), SlowCB(clock), *[Waits() for _ in range(wait)], ProgressCB(clock=clock)).fit(epochs)

class Fd:
    "A file descriptor that travels to a process that is started"
    def __init__(self, fd): self.fd = fd
    def __getstate__(self): return DupFd(self.fd)
    def __setstate__(self, dup): self.fd = dup.detach()

def run(fds, terminal, *args):
    "`script`, in a process that has these as stdin, stdout and stderr, as the interpreter opens them"
    if terminal:
        os.setsid()                                          # its own terminal: Ctrl-C reaches it, and nobody else
        fcntl.ioctl(fds[0].fd, termios.TIOCSCTTY, 0)
    for name in 'COLUMNS', 'LINES': os.environ.pop(name, None)      # which would hide the size of the terminal
    for i, fd in enumerate(fds): os.dup2(fd.fd, i)
    for fd in fds: os.close(fd.fd)
    # nothing of the environment makes these unbuffered, which would hide that nothing is flushed
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w')
    script(*args)
