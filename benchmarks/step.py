"""One training step of the seed convnet: what the learner and its callbacks add to a bare loop.

    python benchmarks/step.py [--rounds 12] [--steps 59] [--bs 1024] [--device cpu] [--compile] [--write] [--cpu-time]

Batches lie on the device already. The loops take turns in one process, in an order that changes from round to round; a
figure is the median over the rounds, a ratio the median of the ratios to the bare loop of the same round. Targets:
`TrainLearner` with DeviceCB, MetricsCB, ProgressCB and EMACB at most 1.03 x the bare loop on the CPU, 1.10 x on an
H200, and there with a compiled step (--compile) at most 0.75 x. Other people's loops that are installed train the same
model on the same batches; they keep a mean loss, or less.
"""
import contextlib, io
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from fastcore.basics import noop
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
from peers import epochs
from timing import parse, parser, report, table, take_turns

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


def bare_loop(model, batches, wrap=noop):
    "The loop that everybody writes, with the sum of the losses kept on the device; each turn wraps the model anew"
    opt = sgd(model.train().parameters(), lr=0.1)

    def run():
        net, total = wrap(model), torch.zeros((), device=batches[0][0].device)
        for xb, yb in batches:
            loss = F.cross_entropy(net(xb), yb)
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
    args = parse(options)
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
    dls = SimpleNamespace(train=batches, valid=None)
    theirs,missing = epochs(lambda: make_model(device), dls, sgd, 0.1, ('ignite', 'Lightning', 'fastai'))
    times = take_turns(loops | theirs, args.rounds, device, warmup=2)
    title = f'A training step of the seed convnet on a batch of {args.bs}; {args.steps} steps in a round'
    report('step', title, table(times, 'bare loop', args.steps), args, device, missing)


if __name__ == '__main__': main()
