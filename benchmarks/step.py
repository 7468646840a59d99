"""One training step of the seed convnet: what the learner and its callbacks add to a bare loop.

    python benchmarks/step.py [--rounds 12] [--steps 59] [--bs 1024] [--device cpu] [--compile]

Batches lie on the device already. The loops take turns in one process, in an order that changes from round to round; a
figure is the median over the rounds, a ratio the median of the ratios to the bare loop of the same round. Targets:
`TrainLearner` with DeviceCB, MetricsCB, ProgressCB and EMACB at most 1.03 x the bare loop on the CPU, 1.10 x on an
H200, and there with a compiled step (--compile) at most 0.75 x.
"""
import contextlib, io, statistics
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import optim
from torcheval.metrics import MulticlassAccuracy

from fastswa.callbacks.basics import DeviceCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.progress import LogView, ProgressCB
from fastswa.callbacks.speed import ChannelsLastCB, CompileCB, MixedPrecisionCB
from fastswa.callbacks.steps import GradAccumCB, GradClipCB
from fastswa.callbacks.swa import EMACB
from fastswa.batches import default_device
from fastswa.random_state import set_seed
from fastswa.nets.init import init_weights
from fastswa.nets.layers import get_model
from fastswa.training.learner import TrainLearner
from timing import parser, place, ratio, take_turns

sgd = partial(optim.SGD, momentum=0.85)


def make_model(device):
    set_seed(0)
    return get_model().apply(init_weights).to(device)


def make_batches(steps, bs, device):
    "Batches of noise"
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(bs, 1, 28, 28, generator=g) for _ in range(steps)]
    labels = [torch.randint(10, (bs,), generator=g) for _ in range(steps)]
    return [(x.to(device), y.to(device)) for x, y in zip(images, labels)]


def bare_loop(model, batches):
    "The loop that everybody writes, with the sum of the losses kept on the device"
    opt = sgd(model.train().parameters(), lr=0.1)

    def run():
        total = torch.zeros((), device=batches[0][0].device)
        for xb, yb in batches:
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            total += loss.detach()
        return total.item()
    return run


def learner_loop(model, batches, *cbs):
    "A training epoch of a `TrainLearner`"
    learn = TrainLearner(model, SimpleNamespace(train=batches, valid=None), F.cross_entropy, 0.1, cbs, sgd)

    def run():
        with contextlib.redirect_stdout(io.StringIO()): learn.fit(1)
    return run


def usual_cbs(device):
    "The callbacks of nearly every fit, but for an average"
    return [DeviceCB(device), MetricsCB(accuracy=MulticlassAccuracy(device=device)), ProgressCB(view=LogView)]


def main():
    options = parser(__doc__, rounds=12, steps=59, bs=1024)
    options.add_argument('--device', default=default_device())
    options.add_argument('--compile', action='store_true', help='also with CompileCB, which takes a while to compile')
    args = options.parse_args()
    device = torch.device(args.device)
    batches = make_batches(args.steps, args.bs, device)

    def usual(*cbs): return learner_loop(make_model(device), batches, *usual_cbs(device), *cbs)

    loops = {
        'bare loop': bare_loop(make_model(device), batches),
        'TrainLearner': learner_loop(make_model(device), batches),
        'DeviceCB, MetricsCB, ProgressCB': usual(),
        ' with EMACB': usual(EMACB()),
        ' and GradClipCB': usual(EMACB(), GradClipCB(norm=1.)),
        ' and GradAccumCB(2)': usual(EMACB(), GradAccumCB(2)),
        ' and MixedPrecisionCB (bf16)': usual(EMACB(), MixedPrecisionCB()),
        ' and ChannelsLastCB': usual(EMACB(), ChannelsLastCB()),
    }
    if args.compile:
        mode = 'reduce-overhead' if device.type == 'cuda' else None
        loops[f' and CompileCB(mode={mode!r})'] = usual(EMACB(), CompileCB(mode))
    times = take_turns(loops, args.rounds, device, warmup=2)
    print(f'Seed convnet, batch {args.bs}, {place(device)}, {args.rounds} rounds of {args.steps} steps\n')
    print(f'{"":34}{"µs a step":>12}{"÷ bare":>9}')
    for name, ts in times.items():
        print(f'{name:34}{1e6*statistics.median(ts)/args.steps:12.0f}{ratio(times, name, "bare loop"):9.3f}')


if __name__ == '__main__': main()
