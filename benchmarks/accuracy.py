"""Test accuracy on Fashion-MNIST of the seed recipe and of a constant learning rate, with every set of weights: mean
over seeds, and spread.

    python benchmarks/accuracy.py [--seeds 5] [--out accuracy.json]

seed recipe: batch 256, Kaiming, GeneralRelu(leak 0.1, sub 0.4), BatchNorm, momentum 0.85, 3 epochs at 0.2, then 2 at
0.05.
constant: the same model for 5 epochs at 0.2. Averaging callbacks have their default arguments; the figures are the
last rows of the table.
"""
import json, statistics, time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn, optim
from torcheval.metrics import MulticlassAccuracy

from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.core import quiet
from fastswa.random_state import set_seed
from fastswa.data.loaders import DataLoaders
from fastswa.data.sources import fashion_mnist, toy_images
from fastswa.nets.init import init_weights
from fastswa.nets.layers import act_gr, get_model
from fastswa.training.learner import MomentumLearner, TrainLearner
from timing import parser


def callbacks(): return [MetricsCB(accuracy=MulticlassAccuracy()), EMACB(apply=False), SWACB(apply=False), BNUpdateCB()]


def seed_recipe(model, dls):
    "As the course does it: two learners, the second without the momentum of the first; averages of the second's run"
    for lr, n in ((0.2, 3), (0.05, 2)):
        learn = MomentumLearner(model, dls, F.cross_entropy, lr, callbacks(), mom=0.85)
        learn.fit(n)
    return learn


def constant(model, dls):
    learn = TrainLearner(model, dls, F.cross_entropy, 0.2, callbacks(), partial(optim.SGD, momentum=0.85))
    learn.fit(5)
    return learn


def main():
    options = parser(__doc__, seeds=5)
    options.add_argument('--out', help='a JSON file for the figures')
    options.add_argument('--toy', action='store_true', help='made-up images, where Fashion-MNIST is not at hand')
    args = options.parse_args()
    dls = DataLoaders.in_memory(toy_images() if args.toy else fashion_mnist(), 256, tfm=lambda x: (x - 0.286)/0.353)
    results = {}
    print('| recipe | weights | mean | s.d. | each seed |\n| --- | --- | --: | --: | --- |')
    for recipe in (seed_recipe, constant):
        runs,start = [],time.perf_counter()
        for seed in range(args.seeds):
            set_seed(seed)
            model = get_model(act_gr, norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=0.1))
            with quiet(): learn = recipe(model, dls)
            runs.append({r['weights']: r['accuracy'] for r in learn.history if r['train'] == 'eval'})
        for name in ('raw', 'ema', 'swa'):
            acc = [r[name] for r in runs]
            sd = statistics.stdev(acc) if len(acc) > 1 else 0.
            each = ' '.join(f'{a:.4f}' for a in acc)
            print(f'| {recipe.__name__} | {name} | {statistics.mean(acc):.4f} | {sd:.4f} | {each} |', flush=True)
        results[recipe.__name__] = dict(runs=runs, seconds=time.perf_counter() - start)
    if args.out:
        found = dict(torch=torch.__version__, seeds=args.seeds, results=results)
        Path(args.out).write_text(json.dumps(found, indent=1))


if __name__ == '__main__': main()
