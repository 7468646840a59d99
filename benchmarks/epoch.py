"""One epoch of Fashion-MNIST, train and validate: a bare PyTorch loop, the learner with its usual callbacks, and
per-image loading.

    python benchmarks/epoch.py [--rounds 9] [--bs 1024] [--toy]

The variants take turns in one process; each figure is the median over the rounds, each ratio the median of the ratios
round by round, with the smallest and the largest. `bare` computes the mean validation loss and accuracy, as any loop
has to, and reads them once. The last rows load as the fast.ai course does: PNG images as the Hugging Face hub stores
them, `with_transform` to a normalised tensor, image by image.
"""
import contextlib, io, statistics
from functools import partial

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim
from torcheval.metrics import MulticlassAccuracy

from fastswa.callbacks.basics import DeviceCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.progress import ProgressCB
from fastswa.callbacks.swa import EMACB
from fastswa.batches import default_device
from fastswa.random_state import set_seed
from fastswa.data.loaders import DataLoaders, inplace
from fastswa.data.sources import fashion_mnist, toy_images
from fastswa.nets.init import init_weights
from fastswa.nets.layers import act_gr, get_model
from fastswa.training.learner import TrainLearner
from timing import parser, place, spread, take_turns

sgd = partial(optim.SGD, momentum=0.85)


def make_model(device):
    set_seed(0)
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
    def __init__(self, dls, device, *cbs, layout=torch.contiguous_format):
        usual = [DeviceCB(device), MetricsCB(accuracy=MulticlassAccuracy(device=device)), ProgressCB()]
        model = make_model(device).to(memory_format=layout)
        self.learn = TrainLearner(model, dls, F.cross_entropy, 0.2, [*usual, *cbs], sgd)

    def epoch(self):
        with contextlib.redirect_stdout(io.StringIO()): self.learn.fit(1)


def as_png(dd):
    "The same images, encoded as they are on the hub"
    def encode(batch):
        files = []
        for im in batch['image']:
            im.save(buffer := io.BytesIO(), format='PNG')
            files.append(dict(bytes=buffer.getvalue(), path=None))
        return dict(image=files)
    features, stored = dd['train'].features, dict(bytes=datasets.Value('binary'), path=datasets.Value('string'))
    plain = datasets.Features(image=stored, label=features['label'])
    return dd.map(encode, batched=True, features=plain, keep_in_memory=True).cast_column('image', features['image'])


def to_tensor(image):
    "Step by step what torchvision's `to_tensor` does with an image"
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
    pixels = pixels.view(image.size[1], image.size[0], len(image.getbands())).permute((2, 0, 1)).contiguous()
    return pixels.to(torch.get_default_dtype()).div(255)


@inplace
def normalised(b):
    "As the course does it"
    b['image'] = [(to_tensor(o) - 0.28)/0.35 for o in b['image']]


def main():
    options = parser(__doc__, rounds=9, bs=1024)
    options.add_argument('--toy', action='store_true', help='10,000 made-up images, where Fashion-MNIST is not at hand')
    args = options.parse_args()
    device = default_device()
    dd = toy_images() if args.toy else fashion_mnist()
    dls = DataLoaders.in_memory(dd, args.bs, device=device)

    datasets.disable_progress_bars()
    png = as_png(dd).with_transform(normalised)
    last = 'ours + EMACB, model in channels_last'
    runs = {'bare': Bare(dls, device), 'bare + torch EMA': Bare(dls, device, averaged=True),
            'ours, no average': Ours(dls, device), 'ours + EMACB, row off': Ours(dls, device, EMACB(valid=False)),
            'ours + EMACB': Ours(dls, device, EMACB()),
            last: Ours(dls, device, EMACB(), layout=torch.channels_last)}
    fast = {name: run.epoch for name, run in runs.items()}
    slow = {}
    for n in 0, 2:
        loaded = DataLoaders.from_dd(png, args.bs, num_workers=n)
        slow[f'as the course loads, {n} workers'] = Ours(loaded, device).epoch
    few = min(3, args.rounds)      # rounds with the slow rows, whose differences are large
    times = take_turns(fast | slow, few, device)
    rest = take_turns(fast, args.rounds - few, device)
    for name in fast: times[name] += rest[name]

    data = 'Toy images' if args.toy else 'Fashion-MNIST'
    print(f'{data}, batch {args.bs}, {place(device)}, {args.rounds} rounds\n')
    print('| | s per epoch | ÷ bare (min … max) |\n| --- | --: | --: |')
    for name, ts in times.items(): print(f'| {name} | {statistics.median(ts):.3f} | {spread(times, name, "bare")} |')
    print()
    for ours in 'ours + EMACB', last:
        for name in slow: print(f'{ours} ÷ {name}: {statistics.median(times[ours])/statistics.median(times[name]):.3f}')


if __name__ == '__main__': main()
