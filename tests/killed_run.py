"""A run in a process of its own, which somebody kills: used by test_checkpoint"""
import os, signal, sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader

from fastswa.callbacks.augment import AugmentCB
from fastswa.data.transforms import RandFlip
from fastswa.callbacks.basics import RecorderCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.core import local
from fastswa.random_state import set_seed
from fastswa.callbacks.schedule import OneCycleCB
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.callbacks.batchnorm import BNUpdateCB
from helpers import Hits, WholeBatches

N_EPOCHS = 3


class Data:
    "Shuffled images in batches, the last of them smaller"
    def __init__(self, n=250, bs=32, num_workers=0):
        g = torch.Generator().manual_seed(0)
        x,y = torch.randn(n, 1, 8, 8, generator=g),torch.randint(4, (n,), generator=g)
        x[range(n), 0, y, y] += 3
        loader = partial(DataLoader, WholeBatches(x, y), collate_fn=list)
        self.train,self.valid = loader(batch_size=bs, shuffle=True, num_workers=num_workers),loader(batch_size=100)


def net():
    set_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                         nn.Linear(54, 4))


adamw = partial(optim.AdamW, weight_decay=0.1)


def learner(*cbs, dls=None, opt_func=adamw, cls=TrainLearner, model=None, lr=0.01):
    return cls(model or net(), dls or Data(), F.cross_entropy, lr, cbs, opt_func)


def the_run():
    "AdamW, one cycle, dropout, shuffling, augmentation, EMA and SWA"
    averages = [EMACB(half_life='0.5ep', apply=False), SWACB(start='0.3dur', every='0.05dur', apply=False)]
    return learner(OneCycleCB(), AugmentCB(RandFlip()), *averages, BNUpdateCB(valid_batches=3), MetricsCB(hits=Hits()),
                   RecorderCB(lr=lambda cb: cb.pg['lr']))


def result(learn):
    "All that must be the same, as bytes and numbers"
    def raw(t): return local(t).detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    sets = dict(raw=learn.model.state_dict(), **{k: a.weights for k, a in learn.averages.items()})
    res = {f'{name}/{k}': raw(v) for name, d in sets.items() for k, v in d.items()}
    for n, p in learn.model.named_parameters():
        for k, v in learn.opt.state.get(p, {}).items():
            res[f'opt/{n}/{k}'] = len(v) if isinstance(v, list) else raw(torch.as_tensor(v))
    groups = [{k: v for k, v in g.items() if k != 'params'} for g in learn.opt.param_groups]
    res |= dict(history=learn.history, groups=groups, steps=learn.opt_steps, random=torch.rand(3).tolist(),
                n={k: a.n for k, a in learn.averages.items()})
    return res | {f'recs/{i}': cb.recs for i, cb in enumerate(learn.cbs) if hasattr(cb, 'recs')}


def die_in(name, call):
    "Kill this process at the n-th call of a function of `os`"
    real,calls = getattr(os, name),[0]
    def f(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, f)


class TellCB(Callback):
    "Tell when the first batch is done, and wait for an answer if asked to"
    def __init__(self, pipe, wait): self.pipe,self.wait,self.told = pipe,wait,False
    def after_batch(self, learn):
        if self.told: return
        self.told = True
        self.pipe.send('a batch')
        if self.wait: self.pipe.recv()


def main(folder, pipe, every='1ba', die=None, wait=False):
    "In a new process: go on with the run in `folder`, and send its result"
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    if die: die_in(*die)
    learn = the_run()
    pipe.send('begun')
    set_seed(1)
    learn.fit(N_EPOCHS, cbs=[CheckpointCB(folder, every, keep=2), TellCB(pipe, wait)], resume=folder)
    pipe.send(result(learn))
