"""One training epoch of Fashion-MNIST with the seed convnet: what `ActivationStats` adds.

    python benchmarks/hooks.py [--rounds 9] [--bs 1024] [--toy]

The variants alternate in one process; each figure is the median over the rounds, the ratio is that of the medians, with the smallest and the
largest of a single round. `acts` are the four activations, `layers` the convolutions, norms and activations, `all` every module, containers
too. (`ActivationStats()` itself watches all modules but containers.) An epoch ends when what was read is on the CPU and in a report. The
target is 10 % of the epoch at the default interval.
"""
import argparse, statistics, time
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.basics import DeviceCB
from fastswa.core import default_device, set_seed
from fastswa.data.loaders import DataLoaders
from fastswa.callbacks.activations import ActivationStats
from fastswa.nets.init import init_weights
from fastswa.nets.layers import GeneralRelu, act_gr, get_model
from fastswa.training.learner import TrainLearner
from fastswa.data.sources import fashion_mnist, toy_images

acts, layers = GeneralRelu, (GeneralRelu, nn.Conv2d, nn.BatchNorm2d)
default = ActivationStats().every


def watch(kinds, **kwargs): return ActivationStats(lambda m: isinstance(m, kinds), **kwargs)


class Run:
    "A learner of its own for each variant; all start from the same weights"
    def __init__(self, dls, stats=None):
        set_seed(0)
        model = get_model(act_gr, norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=0.1))
        self.stats = stats
        cbs = [DeviceCB(), stats] if stats else DeviceCB()
        self.learn = TrainLearner(model, dls, F.cross_entropy, 0.1, cbs, partial(optim.SGD, momentum=0.85))

    def epoch(self):
        self.learn.fit(1, valid=False)
        if self.stats: self.stats.report()


def timed(f):
    start = time.perf_counter()
    f()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--bs', type=int, default=1024)
    parser.add_argument('--toy', action='store_true', help='20,000 made-up images, where Fashion-MNIST is not at hand')
    args = parser.parse_args()
    device = default_device()
    dls = DataLoaders.in_memory(toy_images(20_000, 1000) if args.toy else fashion_mnist(), args.bs, device=device)
    kinds = dict(acts=acts, layers=layers, all=nn.Module)
    runs = {'without': Run(dls)}
    for (kind, classes), every, grads in product(kinds.items(), (default, 1), (False, True)):
        if every == default or kind == 'acts':
            runs[f'{kind}, every={every}' + ', grads'*grads] = Run(dls, watch(classes, every=every, grads=grads))
    times = {name: [] for name in runs}
    for r in range(args.rounds + 1):
        names = list(runs)
        for name in names[r % len(names):] + names[:r % len(names)]:
            t = timed(runs[name].epoch)
            if r: times[name].append(t)             # the first round warms up
    where = torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    data = 'toy images' if args.toy else 'Fashion-MNIST'
    print(f'{data}, batch {args.bs}, {where}, torch {torch.__version__}, {args.rounds} rounds, the default is every={default}\n')
    print('| | modules | s per epoch | ÷ without (min … max) |\n| --- | --: | --: | --: |')
    base = times['without']
    for name, ts in times.items():
        n, ratios = len(runs[name].stats or ()), [t/b for t, b in zip(ts, base)]
        ratio = statistics.median(ts)/statistics.median(base)
        print(f'| {name} | {n} | {statistics.median(ts):.3f} | {ratio:.3f} ({min(ratios):.3f} … {max(ratios):.3f}) |')


if __name__ == '__main__': main()
