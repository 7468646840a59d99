"""Two processes that train the seed convnet together: what the learner adds to a plain loop with DDP.

    python benchmarks/distributed.py [--rounds 12] [--steps 40] [--bs 256] [--write]

torchrun starts two processes on this machine, with one thread each and gloo between them. The loops take turns in
them, in an order that changes from round to round; a turn wraps the model in `DistributedDataParallel` and trains an
epoch. There is a table of the CPU time of both processes together, which other work on the machine hardly disturbs,
and one by the clock of the first. Target: `TrainLearner` with DistributedCB, MetricsCB and EMACB at most 1.03 x the
plain loop.
"""
import os, subprocess, sys, time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torcheval.metrics import MulticlassAccuracy

import timing
from fastswa.callbacks.distributed import DistributedCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.swa import EMACB
from step import bare_loop, learner_loop, make_batches, make_model
from timing import parser, report, table, take_turns


class ByTheClock:
    "A loop that also notes the seconds of each turn, which all processes begin together"
    def __init__(self, loop): self.loop, self.seconds = loop, []

    def __call__(self):
        dist.barrier()
        start = time.perf_counter()
        self.loop()
        self.seconds.append(time.perf_counter() - start)


def together(times):
    "The sum of the times of all processes"
    found = [None]*dist.get_world_size()
    dist.all_gather_object(found, times)
    return {name: [sum(ts) for ts in zip(*(f[name] for f in found))] for name in times}


def main():
    args = parser(__doc__, rounds=12, steps=40, bs=256).parse_args()
    if 'RANK' not in os.environ:
        torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
        sys.exit(subprocess.run([*torchrun, __file__, *sys.argv[1:]]).returncode)
    torch.set_num_threads(1)
    timing.clock = time.process_time
    cb = DistributedCB(timeout=600)
    batches = make_batches(2*args.steps, args.bs, 'cpu')      # of which the learner takes every second one
    own = batches[dist.get_rank()::2]
    usual = MetricsCB(accuracy=MulticlassAccuracy()), EMACB()
    loops = {
        'plain DDP': bare_loop(make_model('cpu'), own, DistributedDataParallel),      # the net has no buffers
        'TrainLearner, DistributedCB': learner_loop(make_model('cpu'), batches, cb),
        ' with MetricsCB and EMACB': learner_loop(make_model('cpu'), batches, cb, *usual),
    }
    loops = {name: ByTheClock(f) for name, f in loops.items()}
    times = together(take_turns(loops, args.rounds, 'cpu'))
    by_clock = {name: f.seconds[-args.rounds:] for name, f in loops.items()}
    if dist.get_rank(): return
    title = (f'A training step of the seed convnet in two processes with DDP, a batch of {args.bs} in each; '
             f'{args.steps} steps in a round')
    lines = ['CPU time of both processes:', '', *table(times, 'plain DDP', args.steps), '', 'By the clock:', '',
             *table(by_clock, 'plain DDP', args.steps)]
    report('distributed', title, lines, args, how='one thread in each process')


if __name__ == '__main__': main()
