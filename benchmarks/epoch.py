"""One epoch of Fashion-MNIST, train and validate: a bare PyTorch loop, the learner with its usual callbacks, and per-image loading.

    python benchmarks/epoch.py [--rounds 9] [--bs 1024]

The variants alternate in one process; each figure is the median over the rounds, each ratio the median of the ratios round by round, with
the smallest and the largest. `bare` computes the mean validation loss and accuracy, as any loop has to, and reads them once. The last rows
load as the fast.ai course does: PNG images as the Hugging Face hub stores them, `with_transform` to a normalised tensor, image by image.
"""
import argparse, contextlib, io, statistics, time
from functools import partial

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim
from torcheval.metrics import MulticlassAccuracy

from fastswa.callbacks.basics import DeviceCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.core import default_device, set_seed
from fastswa.data.loaders import DataLoaders, inplace
from fastswa.nets.init import init_weights
from fastswa.nets.layers import act_gr, get_model
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.progress import ProgressCB
from fastswa.data.sources import fashion_mnist
from fastswa.callbacks.swa import EMACB


def model():
    set_seed(0)
    return get_model(act_gr, norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=0.1))


sgd = partial(optim.SGD, momentum=0.85)


class Bare:
    "The loop one would write by hand"
    def __init__(self, dls, averaged=False):
        self.dls, self.model = dls, model()
        self.opt = sgd(self.model.parameters(), 0.2)
        if averaged:
            ema = optim.swa_utils.get_ema_multi_avg_fn(0.999)
            self.ema = optim.swa_utils.AveragedModel(self.model, multi_avg_fn=ema, use_buffers=False)
        self.averaged = averaged

    def epoch(self):
        self.model.train()
        for xb, yb in self.dls.train:
            F.cross_entropy(self.model(xb), yb).backward()
            self.opt.step()
            self.opt.zero_grad()
            if self.averaged: self.ema.update_parameters(self.model)
        self.validate(self.model)
        if self.averaged: self.validate(self.ema)

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
    def __init__(self, dls, *cbs, layout=torch.contiguous_format):
        cbs = [DeviceCB(), MetricsCB(accuracy=MulticlassAccuracy()), ProgressCB(), *cbs]
        self.learn = TrainLearner(model().to(memory_format=layout), dls, F.cross_entropy, 0.2, cbs, sgd)

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


@inplace
def to_tensors(b):
    "Step by step what torchvision's `to_tensor` does with each image, and the normalisation of the course"
    def to_tensor(o):
        t = torch.from_numpy(np.array(o, np.uint8, copy=True))
        return t.view(o.size[1], o.size[0], len(o.getbands())).permute((2, 0, 1)).contiguous().to(torch.get_default_dtype()).div(255)
    b['image'] = [(to_tensor(o) - 0.28)/0.35 for o in b['image']]


def timed(f):
    start = time.perf_counter()
    f()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--bs', type=int, default=1024)
    args = parser.parse_args()
    dd, device = fashion_mnist(), default_device()
    dls = DataLoaders.in_memory(dd, args.bs, device=device)

    datasets.disable_progress_bars()
    png = as_png(dd).with_transform(to_tensors)
    slow = {f'as the course loads, {n} workers': DataLoaders.from_dd(png, args.bs, num_workers=n) for n in (0, 2)}
    runs = {'bare': Bare(dls), 'bare + torch EMA': Bare(dls, averaged=True), 'ours, no average': Ours(dls),
            'ours + EMACB, row off': Ours(dls, EMACB(valid=False)), 'ours + EMACB': Ours(dls, EMACB()),
            'ours + EMACB, model in channels_last': Ours(dls, EMACB(), layout=torch.channels_last),
            **{name: Ours(dl) for name, dl in slow.items()}}
    times = {name: [] for name in runs}
    for r in range(args.rounds + 1):
        for name, run in runs.items():
            if name in slow and r not in (1, 2, 3): continue
            t = timed(run.epoch)
            if r: times[name].append(t)             # the first round warms up
    where = torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    print(f'Fashion-MNIST, batch {args.bs}, {where}, torch {torch.__version__}, {args.rounds} rounds\n')
    print('| | s per epoch | ÷ bare (min … max) |\n| --- | --: | --: |')
    for name, ts in times.items():
        ratios = [t/b for t, b in zip(ts, times['bare'])]
        print(f'| {name} | {statistics.median(ts):.3f} | {statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f}) |')
    print()
    for ours in ('ours + EMACB', 'ours + EMACB, model in channels_last'):
        for name in slow: print(f'{ours} ÷ {name}: {statistics.median(times[ours])/statistics.median(times[name]):.3f}')


if __name__ == '__main__': main()
