"""Does the fast preset cost accuracy? The same runs in fp32 and with `fast_cbs()`, seed by seed.

    python benchmarks/fast.py [--seeds 5] [--epochs 5] [--bs 1024] [--jobs 1] [--out DIR] [--toy] [--write]

The convnet with BatchNorm on Fashion-MNIST, at a constant rate, with EMACB. What the preset saves is a row of epoch.py.
"""
from functools import cache, partial

import torch.nn.functional as F

import epoch
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.speed import fast_cbs
from fastswa.callbacks.swa import EMACB
from fastswa.compare.runs import compare
from fastswa.compare.workloads import accuracy
from fastswa.data.loaders import DataLoaders
from fastswa.data.sources import fashion_mnist, toy_images
from fastswa.training.learner import TrainLearner
from timing import RESULTS, parse, parser


@cache
def loaders(toy, bs): return DataLoaders.in_memory(toy_images() if toy else fashion_mnist(), bs)


def learner(seed, toy, bs, fast):
    dls = loaders(toy, bs)
    device = dls.train.dataset.tensors[0].device
    cbs = [MetricsCB(accuracy=accuracy), BNUpdateCB(), EMACB(apply=False), *(fast_cbs(device) if fast else ())]
    return TrainLearner(epoch.make_model(device, seed), dls, F.cross_entropy, 0.4, cbs, epoch.sgd)


def main():
    options = parser(__doc__, seeds=5, epochs=5, bs=1024, jobs=1)
    options.add_argument('--out', help='a folder for finished runs, to go on from')
    options.add_argument('--toy', action='store_true', help='10,000 made-up images, where Fashion-MNIST is not at hand')
    args = parse(options)
    make = partial(learner, toy=args.toy, bs=args.bs)
    found = compare(partial(make, fast=False), dict(fast=partial(make, fast=True)), args.seeds, args.epochs, args.out,
                    'accuracy', n_jobs=args.jobs)
    print(found)
    if args.write: (RESULTS/'fast.md').write_text(f'```\n{found}\n```\n', encoding='utf-8')


if __name__ == '__main__': main()
