"""One epoch of Fashion-MNIST, train and validate: a bare PyTorch loop, the learner with its usual callbacks, and
others'; the fast preset.

    python benchmarks/epoch.py [--rounds 9] [--bs 1024] [--toy] [--compile] [--write] [--cpu-time]

The variants take turns in one process; each figure is the median over the rounds, each ratio the median of the ratios
round by round, with the smallest and the largest. `bare` computes the mean validation loss and accuracy, as any loop
has to, and reads them once. `fast` is `fast_cbs()`; with --compile there is a row with `CompileCB` too, whose compiling
is not counted. Other people's loops have the same model and loaders, but for skorch, which reads image by image.
"""
import contextlib, io
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn, optim
from torcheval.metrics import MulticlassAccuracy

from fastswa.callbacks.basics import DeviceCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.progress import ProgressCB
from fastswa.callbacks.speed import CompileCB, fast_cbs
from fastswa.callbacks.swa import EMACB
from fastswa.batches import default_device
from fastswa.random_state import set_seed
from fastswa.data.loaders import DataLoaders
from fastswa.data.sources import fashion_mnist, toy_images
from fastswa.nets.init import init_weights
from fastswa.nets.layers import act_gr, get_model
from fastswa.training.learner import TrainLearner
from peers import epochs
from timing import parse, parser, report, table, take_turns

sgd = partial(optim.SGD, momentum=0.85)


def make_model(device, seed=0):
    set_seed(seed)
    return get_model(act_gr, norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=0.1)).to(device)


class Bare:
    "The loop one would write by hand"
    def __init__(self, dls, device, averaged=False):
        self.dls,self.model = dls,make_model(device)
        self.opt = sgd(self.model.parameters(), 0.2)
        self.ema = None
        if averaged:
            decay = optim.swa_utils.get_ema_multi_avg_fn(0.999)
            self.ema = optim.swa_utils.AveragedModel(self.model, multi_avg_fn=decay)

    def epoch(self):
        self.model.train()
        for xb, yb in self.dls.train:
            F.cross_entropy(self.model(xb), yb).backward()
            self.opt.step()
            self.opt.zero_grad()
            if self.ema is not None: self.ema.update_parameters(self.model)
        self.validate(self.model)
        if self.ema is not None: self.validate(self.ema)

    def validate(self, model):
        model.eval()
        loss = right = n = 0
        with torch.no_grad():
            for xb, yb in self.dls.valid:
                preds = model(xb)
                loss += F.cross_entropy(preds, yb)*len(yb)
                right += (preds.argmax(1) == yb).sum()
                n += len(yb)
        return (loss/n).item(), (right/n).item()


class Ours:
    "A fit of one epoch of the learner"
    def __init__(self, dls, device, *cbs):
        usual = [DeviceCB(device), MetricsCB(accuracy=MulticlassAccuracy(device=device)), ProgressCB()]
        self.learn = TrainLearner(make_model(device), dls, F.cross_entropy, 0.2, [*usual, *cbs], sgd)

    def epoch(self):
        with contextlib.redirect_stdout(io.StringIO()): self.learn.fit(1)


def main():
    options = parser(__doc__, rounds=9, bs=1024)
    options.add_argument('--toy', action='store_true', help='10,000 made-up images, where Fashion-MNIST is not at hand')
    options.add_argument('--compile', action='store_true', help='also with CompileCB, which takes a while to compile')
    args = parse(options)
    device = default_device()
    dls = DataLoaders.in_memory(toy_images() if args.toy else fashion_mnist(), args.bs, device=device)
    runs = {'bare': Bare(dls, device), 'bare + torch EMA': Bare(dls, device, averaged=True),
            'ours, no average': Ours(dls, device), 'ours + EMACB, row off': Ours(dls, device, EMACB(valid=False)),
            'ours + EMACB': Ours(dls, device, EMACB()), 'ours, fast': Ours(dls, device, *fast_cbs(device)),
            'ours, fast + EMACB': Ours(dls, device, *fast_cbs(device), EMACB())}
    if args.compile: runs['ours, fast, compiled'] = Ours(dls, device, *fast_cbs(device), CompileCB())
    theirs,missing = epochs(lambda: make_model(device), dls, sgd, 0.2)
    times = take_turns({name: run.epoch for name, run in runs.items()} | theirs, args.rounds, device)
    data = 'toy images' if args.toy else 'Fashion-MNIST'
    title = f'An epoch of {data}, train and validate, batch {args.bs}'
    report('epoch', title, table(times, 'bare'), args, device, missing)


if __name__ == '__main__': main()
