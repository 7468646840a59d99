"""One training epoch of Fashion-MNIST with the seed convnet: what `ActivationStats` adds.

    python benchmarks/hooks.py [--rounds 9] [--bs 1024] [--toy]

The variants take turns in one process; each figure is the median over the rounds, each ratio the median of the ratios
round by round, with the smallest and the largest. `acts` are the four activations, `layers` the convolutions, norms
and activations, `all` every module, containers too. (`ActivationStats()` itself watches all modules but containers.)
An epoch ends when what was read is on the CPU and in a report. The target is 10 % of the epoch at the default
interval.
"""
import statistics
from functools import partial
from itertools import product

import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.activations import ActivationStats
from fastswa.callbacks.basics import DeviceCB
from fastswa.batches import default_device
from fastswa.random_state import set_seed
from fastswa.data.loaders import DataLoaders
from fastswa.data.sources import fashion_mnist, toy_images
from fastswa.nets.init import init_weights
from fastswa.nets.layers import GeneralRelu, act_gr, get_model
from fastswa.training.learner import TrainLearner
from timing import parser, place, spread, take_turns

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


def main():
    options = parser(__doc__, rounds=9, bs=1024)
    options.add_argument('--toy', action='store_true', help='20,000 made-up images, where Fashion-MNIST is not at hand')
    args = options.parse_args()
    device = default_device()
    dls = DataLoaders.in_memory(toy_images(20_000, 1000) if args.toy else fashion_mnist(), args.bs, device=device)
    kinds = dict(acts=acts, layers=layers, all=nn.Module)
    runs = {'without': Run(dls)}
    for (kind, classes), every, grads in product(kinds.items(), (default, 1), (False, True)):
        if every == default or kind == 'acts':
            name = f'{kind}, every={every}, grads' if grads else f'{kind}, every={every}'
            runs[name] = Run(dls, watch(classes, every=every, grads=grads))
    times = take_turns({name: run.epoch for name, run in runs.items()}, args.rounds, device)
    data = 'toy images' if args.toy else 'Fashion-MNIST'
    print(f'{data}, batch {args.bs}, {place(device)}, {args.rounds} rounds, the default is every={default}\n')
    print('| | modules | s per epoch | ÷ without (min … max) |\n| --- | --: | --: | --: |')
    for name, ts in times.items():
        n = len(runs[name].stats or ())
        print(f'| {name} | {n} | {statistics.median(ts):.3f} | {spread(times, name, "without")} |')


if __name__ == '__main__': main()
