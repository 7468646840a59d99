"""A checkpoint of a model of 25 million weights with an EMA: the time to write it, against `torch.save` of the same
tensors.

    python benchmarks/checkpoint.py [--rounds 7] [--folder DIR]

The writers take turns in one process. A checkpoint is also flushed to the disk, which `torch.save` alone leaves to the
system; the line `torch.save, flushed` does that too. Target: at most 1.5 x `torch.save`.
"""
import os, statistics, tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.swa import EMACB
from fastswa.checkpoint.archive import read_checkpoint
from fastswa.checkpoint.resume import learner_state
from fastswa.core import quiet
from fastswa.training.learner import TrainLearner
from timing import parser, ratio, seconds


def flushed(state, path):
    torch.save(state, path)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def main():
    options = parser(__doc__, rounds=7)
    options.add_argument('--folder', default=None, help='where to write; a temporary folder by default')
    args = options.parse_args()
    model = nn.Sequential(*(o for _ in range(24) for o in (nn.Linear(1020, 1020), nn.LayerNorm(1020), nn.ReLU())))
    x = torch.randn(2, 1020)
    dls = SimpleNamespace(train=[(x, x)], valid=None)
    learn = TrainLearner(model, dls, F.mse_loss, 1e-4, EMACB(apply=False), optim.SGD)
    with quiet(): learn.fit(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        ours,theirs = Path(folder)/'ours.pt',Path(folder)/'theirs.pt'
        tensors = dict(raw=model.state_dict(), ema=learn.averages['ema'].weights)
        writers = {
            'torch.save': lambda: torch.save(tensors, theirs),
            'torch.save, flushed': lambda: flushed(tensors, theirs),
            'learn.save': lambda: learn.save(ours),
            'learner_state alone': lambda: learner_state(learn),
        }
        times = {k: [] for k in writers}
        for r in range(args.rounds + 1):
            for k, f in writers.items():
                theirs.unlink(missing_ok=True)           # both write a new file
                os.sync()
                t = seconds(f, 'cpu')
                if r: times[k].append(t)             # the first round warms up
        reading = seconds(lambda: read_checkpoint(ours), 'cpu')
        loading = seconds(lambda: torch.load(ours, weights_only=True), 'cpu')
        size = sum(p.numel() for p in model.parameters())
        print(f'{size/1e6:.1f}M weights and an EMA, {ours.stat().st_size/1e6:.0f} MB\n')
        for k, ts in times.items():
            print(f'{k:22}{1e3*statistics.median(ts):9.1f} ms {ratio(times, k, "torch.save"):8.2f} x')
        print(f'read, checksums too   {1e3*reading:9.1f} ms {reading/loading:8.2f} x torch.load')


if __name__ == '__main__': main()
