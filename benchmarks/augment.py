"""Augmentation of a batch: a loop over its images, and whole-batch operations.

    python benchmarks/augment.py [--rounds 15] [--bs 256] [--size 28] [--channels 1]

The variants take turns in one process, on the accelerator where there is one; each figure is the median over the
rounds, each ratio the median of the ratios round by round, with the smallest and the largest. The loop does the same
to one image at a time, with numbers from Python's `random`, as transforms of single images do.
"""
import random, statistics
from functools import partial

import torch
import torch.nn.functional as F

from fastswa.batches import default_device
from fastswa.data.transforms import cutmix, mixup, rand_copy, rand_crop, rand_erase, rand_flip
from timing import parser, place, spread, take_turns


def span(n, size):
    "Start and end of a part of that size, anywhere among `n` pixels"
    start = random.randint(0, n - size)
    return start, start + size


def erase1(x, pct=0.2, max_num=4):
    x,lo,hi = x.clone(),x.min(),x.max()
    mean,std = x.mean(),x.std()
    for _ in range(random.randint(0, max_num)):
        (t, b), (l, r) = (span(n, int(pct*n)) for n in x.shape[-2:])
        x[:, t:b, l:r] = (mean + std*torch.randn_like(x[:, t:b, l:r])).clamp(lo, hi)
    return x


def copy1(x, pct=0.2, max_num=4):
    new = x.clone()
    for _ in range(random.randint(0, max_num)):
        rows,cols = ([slice(*span(n, int(pct*n))) for _ in range(2)] for n in x.shape[-2:])
        new[:, rows[0], cols[0]] = x[:, rows[1], cols[1]]
    return new


def crop1(x, pad=2):
    big = F.pad(x, (pad,)*4, mode='reflect')
    (t, b), (l, r) = (span(n + 2*pad, n) for n in x.shape[-2:])
    return big[:, t:b, l:r]


def flip1(x): return x.flip(-1) if random.random() < 0.5 else x


def mixup1(x, other, lam): return lam*x + (1 - lam)*other


def cutmix1(x, other, lam):
    x, ends = x.clone(), []
    for n in x.shape[-2:]:
        size, centre = int(n*(1 - lam)**0.5), random.randrange(n)
        ends.append((max(centre - size//2, 0), min(centre - size//2 + size, n)))
    (t, b), (l, r) = ends
    x[:, t:b, l:r] = other[:, t:b, l:r]
    return x


def loop(f, x): return torch.stack([f(o) for o in x])


def mixing_loop(f, alpha, x, y, classes):
    other, shares = torch.randperm(len(x)).tolist(), [random.betavariate(alpha, alpha) for _ in range(len(x))]
    onehot = F.one_hot(y, classes).float()
    new = torch.stack([f(o, x[j], s) for o, j, s in zip(x, other, shares)])
    return new, torch.stack([s*o + (1 - s)*onehot[j] for o, j, s in zip(onehot, other, shares)])


def main():
    args,device = parser(__doc__, rounds=15, bs=256, size=28, channels=1).parse_args(),default_device()
    x = torch.rand(args.bs, args.channels, args.size, args.size, device=device)
    y = torch.randint(10, (args.bs,), device=device)
    runs = {'rand_erase': (rand_erase, partial(loop, erase1)), 'rand_copy': (rand_copy, partial(loop, copy1)),
            'rand_crop': (rand_crop, partial(loop, crop1)), 'rand_flip': (rand_flip, partial(loop, flip1)),
            'mixup': (mixup, partial(mixing_loop, mixup1, 0.2)), 'cutmix': (cutmix, partial(mixing_loop, cutmix1, 1.))}
    rows = {}
    for name, (batch, image) in runs.items():
        data = (x, y, 10) if name in ('mixup', 'cutmix') else (x,)
        rows[name],rows[f'{name}, loop'] = partial(batch, *data),partial(image, *data)
    times = take_turns(rows, args.rounds, device)
    print(f'{args.bs} images of {args.channels}×{args.size}×{args.size}, {place(device)}, {args.rounds} rounds\n')
    print('| | whole batch, ms | loop over images, ms | loop ÷ whole batch (min … max) |\n| --- | --: | --: | --: |')
    for name in runs:
        ours,loops = (1e3*statistics.median(times[k]) for k in (name, f'{name}, loop'))
        print(f'| `{name}` | {ours:.2f} | {loops:.2f} | {spread(times, f"{name}, loop", name, 1)} |')


if __name__ == '__main__': main()
