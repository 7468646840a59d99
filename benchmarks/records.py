"""Accuracy on Fashion-MNIST after 5, 20 and 50 epochs: how far our learner and callbacks get with a small network.

    python benchmarks/records.py [--lengths 5 20 50] [--seeds 5] [--limit 600] [--write]     # all of it, on a GPU
    python benchmarks/records.py --lengths 5 --rates 0.002 0.008 --seeds 2                   # on a CPU: an hour
    python benchmarks/records.py --lengths 1 --seeds 1 --toy                                 # to see that it runs

choose   The learning rate, and which weights are reported (raw, EMA or SWA), by the accuracy with flips on 5,000
         training images that are held out; `--trials` seeds from 100 on, which the runs do not use.
run      With what was chosen, `--seeds` seeds on all 60,000 training images. The 10,000 test images are predicted once
         per seed, after the last epoch; whatever else is computed of them beside the chosen weights chooses nothing.

One convolution of 24 channels, then three blocks of two 3×3 convolutions with 64, 256 and 256 channels, BatchNorm,
GELU and max pooling; 2 million weights, after airbench (arXiv 2404.00498). Images are shifted by up to 2 pixels and
flipped at random on the device, labels smoothed by 0.1; the rate rises over a fifth of the run and falls in a straight
line to zero. `fast_cbs` for the precision, the layout and, on a GPU, compiling. `flips`: the mean probability of an
image and of its mirror image.

Each finished run is a file in `--out`; called again, the script goes on from there. With `--limit`, it begins no run
after so many seconds.
"""
import json, statistics, time
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.augment import AugmentCB, log_mean_probs
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.schedule import BatchSchedCB
from fastswa.callbacks.speed import fast_cbs
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.compare.workloads import accuracy
from fastswa.batches import default_device
from fastswa.core import quiet
from fastswa.data.loaders import BatchLoader, DataLoaders
from fastswa.data.sources import fashion_mnist, toy_images
from fastswa.data.transforms import RandCrop, RandFlip
from fastswa.files import written
from fastswa.nets.init import init_weights
from fastswa.nets.layers import conv
from fastswa.random_state import set_seed
from fastswa.training.learner import TrainLearner
from timing import RESULTS, parse, parser, place

HELD_OUT = 5000
WEIGHTS = 'raw', 'ema', 'swa'
COURSE, TARGETS = {5: 0.934, 20: 0.943, 50: 0.949}, {5: 0.943, 20: 0.952, 50: 0.957}

adamw = partial(optim.AdamW, weight_decay=0.05)
nesterov = partial(optim.SGD, momentum=0.85, nesterov=True, weight_decay=1e-3)


def recipe(epochs):
    "Optimizer, batch size and the rates to choose from, for a run of this length"
    if epochs <= 10: return dict(opt=adamw, bs=256, rates=(2e-3, 4e-3, 8e-3))
    return dict(opt=nesterov, bs=512, rates=(0.25, 0.5, 1.))


# --- the data

@cache
def images(toy, device):
    "Training images and labels, test images and labels, on the device"
    dls = DataLoaders.in_memory(toy_images(500, 250) if toy else fashion_mnist(), 1, device=device)
    return *dls.train.dataset.tensors, *dls.valid.dataset.tensors


def normalise(xb): return (xb - 0.286)/0.353
def mirrored(xb): return normalise(xb).flip(-1)


def loaders(part, toy, device, bs):
    "A loader to train on, and two of the images to predict: as they are, and mirrored"
    x, y, *test = images(toy, device)
    n = min(HELD_OUT, len(x)//5)
    train,rest = ((x, y), test) if part == 'test' else ((x[n:], y[n:]), (x[:n], y[:n]))
    views = [BatchLoader(*rest, 1000, f) for f in (normalise, mirrored)]
    return BatchLoader(*train, bs, normalise, shuffle=True), views


# --- the network and one run

def block(ni, nf):
    def half(ni, *pool): return [conv(ni, nf, stride=1, act=None), *pool, nn.BatchNorm2d(nf), nn.GELU()]
    return [*half(ni, nn.MaxPool2d(2)), *half(nf)]


def make_net():
    net = nn.Sequential(conv(1, 24, stride=1, act=nn.GELU), *block(24, 64), *block(64, 256), *block(256, 256),
                        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    return net.apply(partial(init_weights, act=nn.GELU))


def triangle(opt, total_steps):
    return optim.lr_scheduler.LambdaLR(opt, lambda i: min(5*(i + 1), 1.25*(total_steps - i))/total_steps)


def run(epochs, rate, seed, part, toy, device):
    "Train, and predict the held-out images or the test images with each set of weights; returns what is kept of it"
    made = recipe(epochs)
    set_seed(seed)
    train,views = loaders(part, toy, device, made['bs'])
    cbs = [AugmentCB(RandCrop(2), RandFlip()), BatchSchedCB(triangle), BNUpdateCB(100), EMACB(apply=False),
           SWACB(apply=False), *fast_cbs(device, epochs*len(train.dataset))]
    learn = TrainLearner(make_net().to(device), DataLoaders(train), partial(F.cross_entropy, label_smoothing=0.1), rate,
                         cbs, made['opt'])
    start = time.perf_counter()
    learn.fit(epochs, valid=False)
    found = dict(epochs=epochs, rate=rate, seed=seed, part=part, seconds=time.perf_counter() - start, scores={})
    for weights in WEIGHTS:
        with learn.using(weights): (preds, targets),(others, _) = (learn.get_preds(dl=dl) for dl in views)
        flips = log_mean_probs(torch.stack([preds, others]))
        found['scores'][weights] = dict(plain=accuracy(preds, targets).item(), flips=accuracy(flips, targets).item())
    return found | dict(machine=place(device))


def kept(folder, name, *args):
    "A finished run from its file, or else a new one"
    file = folder/f'{name}.json'
    if not file.exists():
        with quiet(): found = run(*args)
        with written(file) as f: f.write(json.dumps(found, indent=1).encode())
    return json.loads(file.read_text())


# --- what is chosen, and what comes of it

def choose(found):
    "Rate and weights with the highest mean accuracy with flips; of equals the first"
    means = {}
    for r in found:
        for weights, scores in r['scores'].items(): means.setdefault((r['rate'], weights), []).append(scores['flips'])
    return max(means, key=lambda k: statistics.mean(means[k]))


def spread(values):
    values = [100*v for v in values]
    sd = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{sd}'


def lines(tried, found):
    "A table in Markdown: a row for each length"
    columns = ('epochs', 'rate, weights, as chosen', 'test, %', 'with flips', 'the others, with flips', 'course',
               'goal', 'seeds', 'minutes a run')
    yield f'| {" | ".join(columns)} |'
    yield '| --: | --- | --: | --: | --- | --: | --: | --: | --: |'
    for epochs, runs in found.items():
        rate,weights = choose(tried[epochs])
        def column(weights, view): return spread([r['scores'][weights][view] for r in runs])
        others = ', '.join(f'{w} {column(w, "flips")}' for w in WEIGHTS if w != weights)
        minutes = statistics.mean(r['seconds'] for r in runs)/60
        course,goal = (f'{100*table[epochs]:.1f}' if epochs in table else '' for table in (COURSE, TARGETS))
        yield (f'| {epochs} | {rate:g}, {weights} | {column(weights, "plain")} | {column(weights, "flips")} | {others} '
               f'| {course} | {goal} | {len(runs)} | {minutes:.1f} |')
    yield ''
    for epochs, runs in tried.items():
        n = len({r['seed'] for r in runs})
        said = ', '.join(f'{r["rate"]:g} {w} {100*r["scores"][w]["flips"]:.2f}' for r in runs for w in WEIGHTS)
        yield f'Held out, {epochs} epochs, {n} seed{"s"*(n > 1)}, accuracy with flips: {said}.'
    yield f'On {next(iter(found.values()))[0]["machine"]}.'


def main():
    options = parser(__doc__, seeds=5, trials=1, limit=0)
    options.add_argument('--lengths', type=int, nargs='+', default=[5, 20, 50], help='epochs of the runs')
    options.add_argument('--rates', type=float, nargs='+', help='choose from these, not those of recipe()')
    options.add_argument('--only', type=int, nargs='+', help='just these seeds, to share the work among processes')
    options.add_argument('--device', default=default_device())
    options.add_argument('--out', type=Path, default=Path('runs/records'), help='a folder for finished runs')
    options.add_argument('--toy', action='store_true', help='1,000 made-up images, to see that it runs')
    args = parse(options)
    args.out.mkdir(parents=True, exist_ok=True)
    start,tried,found = time.monotonic(),{},{}
    def get(epochs, rate, seed, part):
        if args.limit and time.monotonic() - start > args.limit: return None
        return kept(args.out, f'{part}-{epochs}-{rate:g}-{seed}', epochs, rate, seed, part, args.toy, args.device)
    for epochs in args.lengths:
        rates,trials = args.rates or recipe(epochs)['rates'],range(100, 100 + args.trials)
        runs = [get(epochs, rate, seed, 'held-out') for rate in rates for seed in trials]
        tried[epochs] = [r for r in runs if r]
        if None in runs: break
        rate,weights = choose(tried[epochs])
        print(f'{epochs} epochs: rate {rate:g}, {weights}')
        seeds = args.only or range(args.seeds)
        found[epochs] = [r for seed in seeds if (r := get(epochs, rate, seed, 'test'))]
    text = '\n'.join(lines(tried, {k: v for k, v in found.items() if v}))
    print(text)
    if args.write: (RESULTS/'records.md').write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__': main()
