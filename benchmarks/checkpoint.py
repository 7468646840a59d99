"""A checkpoint of a model of 25 million weights with an EMA: how long a step waits for it.

    python benchmarks/checkpoint.py [--rounds 9] [--folder DIR]

The writers take turns in one process, and each writes a new file. Written at once, against `torch.save` of the
same tensors, with an fsync of file and folder on both sides; target: at most 1.3 x. In the background, what the
step waits for, against a copy of the same tensors (`clone`); target: at most 1.1 x. Ratios are medians, round
by round, with the smallest and the largest.
"""
import os, statistics, tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.swa import EMACB
from fastswa.checkpoint.archive import read_checkpoint, write_checkpoint
from fastswa.checkpoint.checkpoint import BackgroundWriter
from fastswa.checkpoint.resume import learner_state
from fastswa.core import quiet
from fastswa.training.learner import TrainLearner
from timing import parser, seconds, spread


def flush(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def saved(tensors, path):
    torch.save(tensors, path)
    flush(path)
    flush(path.parent)


def main():
    options = parser(__doc__, rounds=9)
    options.add_argument('--folder', default=None, help='where to write; a temporary folder by default')
    args = options.parse_args()
    model = nn.Sequential(*(o for _ in range(24) for o in (nn.Linear(1020, 1020), nn.LayerNorm(1020), nn.ReLU())))
    x = torch.randn(2, 1020)
    dls = SimpleNamespace(train=[(x, x)], valid=None)
    learn = TrainLearner(model, dls, F.mse_loss, 1e-4, EMACB(apply=False), optim.SGD)
    with quiet(): learn.fit(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder)/'a.pt'
        tensors = dict(raw=model.state_dict(), ema=learn.averages['ema'].weights)
        writer = BackgroundWriter()
        def in_background(): writer.start(lambda state: write_checkpoint(state, path), learner_state(learn))
        def copied(): return [v.clone() for d in tensors.values() for v in d.values()]
        rows = {
            'torch.save': lambda: torch.save(tensors, path),
            'torch.save, with fsync': lambda: saved(tensors, path),
            'learn.save': lambda: learn.save(path),
            'a copy': copied,
            'learn.save in the background': in_background,
        }
        times = {k: [] for k in rows}
        for r in range(args.rounds + 1):
            for k, f in rows.items():
                writer.wait()
                path.unlink(missing_ok=True)
                os.sync()
                t = seconds(f, 'cpu')
                if r: times[k].append(t)             # the first round warms up
        writer.wait()
        reading = seconds(lambda: read_checkpoint(path), 'cpu')
        loading = seconds(lambda: torch.load(path, weights_only=True), 'cpu')
        size = sum(p.numel() for p in model.parameters())
        print(f'{size/1e6:.1f}M weights and an EMA, {path.stat().st_size/1e6:.0f} MB\n')
        bases = {'learn.save': 'torch.save, with fsync', 'learn.save in the background': 'a copy'}
        for k, ts in times.items():
            against = f'{spread(times, k, bases[k], 2)} x {bases[k]}' if k in bases else ''
            print(f'{k:29}{1e3*statistics.median(ts):9.1f} ms   {against}')
        print(f'{"read, with checksums":29}{1e3*reading:9.1f} ms   {reading/loading:.2f} x torch.load')


if __name__ == '__main__': main()
