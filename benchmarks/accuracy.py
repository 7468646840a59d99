"""Test accuracy on Fashion-MNIST of the seed recipe and of a constant learning rate, with every set of weights: mean over seeds, and spread.

    python benchmarks/accuracy.py [--seeds 5] [--out accuracy.json]

seed recipe: batch 256, Kaiming, GeneralRelu(leak 0.1, sub 0.4), BatchNorm, momentum 0.85, 3 epochs at 0.2, then 2 at 0.05.
constant: the same model for 5 epochs at 0.2. Averaging callbacks have their default arguments; the figures are the last rows of the table.
"""
import argparse, json, statistics, time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn, optim
from torcheval.metrics import MulticlassAccuracy

from fastswa.callbacks.metrics import MetricsCB
from fastswa.core import set_seed
from fastswa.data.loaders import DataLoaders
from fastswa.nets.init import init_weights
from fastswa.nets.layers import act_gr, get_model
from fastswa.training.learner import MomentumLearner, TrainLearner
from fastswa.data.sources import fashion_mnist
from fastswa.callbacks.swa import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB


class Quiet(MetricsCB):
    "Metrics without a table"
    shows_rows = True


def averages(): return [EMACB(apply=False), SWACB(apply=False), BNUpdateCB()]


def seed_recipe(model, dls):
    "As the course does it: two learners, the second without the momentum of the first, and averages over the second's run"
    for lr, n in ((0.2, 3), (0.05, 2)):
        learn = MomentumLearner(model, dls, F.cross_entropy, lr, [Quiet(accuracy=MulticlassAccuracy()), *averages()], mom=0.85)
        learn.fit(n)
    return learn


def constant(model, dls):
    cbs = [Quiet(accuracy=MulticlassAccuracy()), *averages()]
    learn = TrainLearner(model, dls, F.cross_entropy, 0.2, cbs, partial(optim.SGD, momentum=0.85))
    learn.fit(5)
    return learn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--out')
    args = parser.parse_args()
    dls = DataLoaders.in_memory(fashion_mnist(), 256, tfm=lambda x: (x - 0.286)/0.353)
    results = {}
    print('| recipe | weights | mean | s.d. | each seed |\n| --- | --- | --: | --: | --- |')
    for recipe in (seed_recipe, constant):
        runs, start = [], time.perf_counter()
        for seed in range(args.seeds):
            set_seed(seed)
            learn = recipe(get_model(act_gr, norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=0.1)), dls)
            runs.append({r['weights']: r['accuracy'] for r in learn.history if r['train'] == 'eval'})
        for name in ('raw', 'ema', 'swa'):
            acc = [r[name] for r in runs]
            spread = statistics.stdev(acc) if len(acc) > 1 else 0.
            each = ' '.join(f'{a:.4f}' for a in acc)
            print(f'| {recipe.__name__} | {name} | {statistics.mean(acc):.4f} | {spread:.4f} | {each} |', flush=True)
        results[recipe.__name__] = dict(runs=runs, seconds=time.perf_counter() - start)
    if args.out:
        with open(args.out, 'w') as f: json.dump(dict(torch=torch.__version__, seeds=args.seeds, results=results), f, indent=1)


if __name__ == '__main__': main()
