"""One training step of the seed convnet: what the learner and its callbacks add to a bare loop.

    python benchmarks/step.py [--rounds 12] [--steps 59] [--bs 1024] [--device cpu] [--compile]

Batches lie on the device already. The loops alternate in one process, in an order that turns from round to round; a figure is the median over
the rounds, a ratio the median of the ratios of single rounds to the bare loop of the same round. Targets: `TrainLearner` with DeviceCB,
MetricsCB, ProgressCB and EMACB at most 1.05 x the bare loop on the CPU, 1.10 x on an H200, and there with a compiled step (--compile) at most
0.75 x.
"""
import argparse, contextlib, io, statistics, time
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import optim
from torcheval.metrics import MulticlassAccuracy

from fastswa.callbacks.basics import DeviceCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.core import default_device, set_seed
from fastswa.callbacks.speed import ChannelsLastCB, CompileCB, MixedPrecisionCB
from fastswa.nets.init import init_weights
from fastswa.nets.layers import get_model
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.progress import LogView, ProgressCB
from fastswa.callbacks.swa import EMACB
from fastswa.callbacks.steps import GradAccumCB, GradClipCB


def net(device):
    set_seed(0)
    return get_model().apply(init_weights).to(device)


sgd = partial(optim.SGD, momentum=0.85)


def bare(batches, device):
    "The loop that everybody writes, with the sum of the losses kept on the device"
    model = net(device).train()
    opt = sgd(model.parameters(), lr=0.1)
    def run():
        total = torch.zeros((), device=device)
        for xb, yb in batches:
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            total += loss.detach()
        return total.item()
    return run


def with_learner(batches, device, *cbs):
    learn = TrainLearner(net(device), SimpleNamespace(train=batches, valid=None), F.cross_entropy, 0.1, cbs, sgd)
    def run():
        with contextlib.redirect_stdout(io.StringIO()): learn.fit(1)
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(rounds=12, steps=59, bs=1024).items(): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--device', default=default_device())
    parser.add_argument('--compile', action='store_true', help='also with CompileCB, which takes a while to compile')
    args = parser.parse_args()
    device,g = torch.device(args.device),torch.Generator().manual_seed(0)
    batches = [(torch.randn(args.bs, 1, 28, 28, generator=g).to(device), torch.randint(10, (args.bs,), generator=g).to(device)) for _ in range(args.steps)]
    usual = lambda: [DeviceCB(device), MetricsCB(accuracy=MulticlassAccuracy(device=device)), ProgressCB(view=LogView), EMACB()]
    loops = {'bare loop': bare(batches, device), 'TrainLearner': with_learner(batches, device),
             'DeviceCB, MetricsCB, ProgressCB': with_learner(batches, device, *usual()[:-1]), ' with EMACB': with_learner(batches, device, *usual()),
             ' and GradClipCB': with_learner(batches, device, *usual(), GradClipCB(norm=1.)), ' and GradAccumCB(2)': with_learner(batches, device, *usual(), GradAccumCB(2)),
             ' and MixedPrecisionCB (bf16)': with_learner(batches, device, *usual(), MixedPrecisionCB()), ' and ChannelsLastCB': with_learner(batches, device, *usual(), ChannelsLastCB())}
    if args.compile:
        mode = 'reduce-overhead' if device.type == 'cuda' else None
        loops[f' and CompileCB(mode={mode!r})'] = with_learner(batches, device, *usual(), CompileCB(mode))
    times = {name: [] for name in loops}
    for r in range(args.rounds + 2):
        names = list(loops)
        for name in names[r % len(names):] + names[:r % len(names)]:
            start = time.perf_counter()
            loops[name]()
            if device.type == 'cuda': torch.cuda.synchronize()
            if r > 1: times[name].append((time.perf_counter() - start)/args.steps)      # the first rounds warm up
    where = torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'
    print(f'Seed convnet, batch {args.bs}, {where}, torch {torch.__version__}, {args.rounds} rounds of {args.steps} steps\n')
    print(f'{"":34}{"us a step":>12}{"÷ bare":>9}')
    for name, ts in times.items():
        ratio = statistics.median(t/b for t, b in zip(ts, times['bare loop']))
        print(f'{name:34}{1e6*statistics.median(ts):12.0f}{ratio:9.3f}')


if __name__ == '__main__': main()
