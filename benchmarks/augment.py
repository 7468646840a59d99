"""Augmentation of a batch: a loop over its images, and whole-batch operations.

    python benchmarks/augment.py [--rounds 15] [--bs 256] [--size 28] [--channels 1]

The variants alternate in one process, on the accelerator where there is one; each figure is the median over the rounds, each ratio the
median of the ratios round by round, with the smallest and the largest. The loop does the same to one image at a time, with numbers from
Python's `random`, as transforms of single images do.
"""
import argparse, random, statistics, time
from functools import partial

import torch
import torch.nn.functional as F

from fastswa.data.transforms import cutmix, mixup, rand_copy, rand_crop, rand_erase, rand_flip
from fastswa.core import default_device


def place(n, size): return (o := random.randint(0, n - size)), o + size


def erase1(x, pct=0.2, max_num=4):
    x, m, s, lo, hi = x.clone(), x.mean(), x.std(), x.min(), x.max()
    for _ in range(random.randint(0, max_num)):
        (t, b), (l, r) = (place(n, int(pct*n)) for n in x.shape[-2:])
        x[:, t:b, l:r] = (m + s*torch.randn_like(x[:, t:b, l:r])).clamp(lo, hi)
    return x


def copy1(x, pct=0.2, max_num=4):
    new = x.clone()
    for _ in range(random.randint(0, max_num)):
        (t, b), (l, r), (ft, fb), (fl, fr) = (place(n, int(pct*n)) for n in (*x.shape[-2:], *x.shape[-2:]))
        new[:, t:b, l:r] = x[:, ft:fb, fl:fr]
    return new


def crop1(x, pad=2):
    big = F.pad(x, (pad,)*4, mode='reflect')
    (t, b), (l, r) = (place(n + 2*pad, n) for n in x.shape[-2:])
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


def timed(f, *args):
    start = time.perf_counter()
    f(*args)
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, n in dict(rounds=15, bs=256, size=28, channels=1).items(): parser.add_argument(f'--{name}', type=int, default=n)
    args, device = parser.parse_args(), default_device()
    x = torch.rand(args.bs, args.channels, args.size, args.size, device=device)
    y = torch.randint(10, (args.bs,), device=device)
    runs = {'rand_erase': (rand_erase, partial(loop, erase1)), 'rand_copy': (rand_copy, partial(loop, copy1)),
            'rand_crop': (rand_crop, partial(loop, crop1)), 'rand_flip': (rand_flip, partial(loop, flip1)),
            'mixup': (mixup, partial(mixing_loop, mixup1, 0.2)), 'cutmix': (cutmix, partial(mixing_loop, cutmix1, 1.))}
    times = {name: [] for name in runs}
    for r in range(args.rounds + 1):
        for name, (ours, theirs) in runs.items():
            data = (x, y, 10) if name in ('mixup', 'cutmix') else (x,)
            t = timed(ours, *data), timed(theirs, *data)
            if r: times[name].append(t)             # the first round warms up
    where = torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    print(f'{args.bs} images of {args.channels}×{args.size}×{args.size}, {where}, torch {torch.__version__}, {args.rounds} rounds\n')
    print('| | whole batch, ms | loop over images, ms | loop ÷ whole batch (min … max) |\n| --- | --: | --: | --: |')
    for name, ts in times.items():
        ratios = [b/a for a, b in ts]
        a, b = (statistics.median(o)*1e3 for o in zip(*ts))
        print(f'| `{name}` | {a:.2f} | {b:.2f} | {statistics.median(ratios):.1f} ({min(ratios):.1f} … {max(ratios):.1f}) |')


if __name__ == '__main__': main()
