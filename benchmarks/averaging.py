"""One update of an average, ours and others', on the weights of three models; what a swap, the memory and SWACB cost.

    pip install -e .[bench]      # timm, ema-pytorch and torch-ema: those that are missing are left out of the table
    python benchmarks/averaging.py [--device cpu|cuda] [--rounds 25] [--quick] [--write] [--cpu-time]

The models are the seed convnet, and on random weights the shapes of ResNet-50 and, where a GPU has room for it, of
ViT-L/16; fp32, nothing is trained. In each round every row has its turn, in an order that changes, and makes as many
calls between two looks at the clock as fill 30 ms (at least one); on a GPU the clock is read when all of them are
through. The table has the median over the rounds in microseconds and, as `÷ bare`, the median of the ratios round by
round.

bare     one `torch._foreach_lerp_` over tensors of exactly the shapes that our average holds, BatchNorm statistics
         among them; one flat `lerp_`: as if all of them were one tensor.
limit    12 bytes per parameter (two reads, one write) over the bandwidth of a `copy_` too large for any cache, which
         is a row of its own in the same rounds. It is no bound for weights that fit in a cache, nor on a CPU whose
         copy first reads what it overwrites.
ours     `ema(0.999)` unless it says `equal()`; the check for NaN and infinity is on by default. The four averages of a
         bank have a decay each, and take a snapshot by `update_all`, or one after the other.
others   decay 0.999, an update at every call, `foreach` wherever it can be chosen. `AveragedModel` needs
         `use_buffers=True` to average what all the others do; without it copies the buffers. timm and ema-pytorch
         average the buffers too, torch-ema parameters only.
swap     `with avg.applied(): pass`, in and out, beside three copies of the weights.
SWACB    the seconds within its methods per epoch, with the default arguments in a fit of 20 epochs. Four stand for
         them: three that wait and one that takes a snapshot every 0.2 epochs, with what happens once per fit divided
         by 20. Its row in the table of the fit, a validation of its own, is not counted.
target   an update of the target network of a small DQN, a perceptron of 17,000 weights, with its forward pass on 64
         states: the loop over parameters that people write by hand, an `Average` alone, and `Averages.step`.

At the end the targets, each with the figure that was measured. They are meant for two CPU cores and for an H200.
"""
import copy, gc, importlib.util, os, statistics, time, warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastswa.averaging.average import Average, update_all
from fastswa.averaging.averages import Averages
from fastswa.averaging.rules import ema, equal
from fastswa.averaging.tensors import find_tensors
from fastswa.nets.layers import get_model
from timing import parse, parser, place, ratio, report, seconds, take_turns

DECAY, BANK, BARE = 0.999, (0.9, 0.99, 0.999, 0.9999), 'bare _foreach_lerp_'
CHECKS = {'check off': False, 'check on': True}


# --- the weights

def convnet(): return get_model(norm=nn.BatchNorm2d)


def resnet50():
    "The parameters and statistics of a ResNet-50 in the order of its layers; there is no way through them"
    shapes, ni = [(3, 64, 7)], 64
    for nf, blocks in (64, 3), (128, 4), (256, 6), (512, 3):
        for i in range(blocks):
            shapes += [(ni, nf, 1), (nf, nf, 3), (nf, 4*nf, 1)] + [(ni, 4*nf, 1)]*(i == 0)
            ni = 4*nf
    convs = [(nn.Conv2d(*shape, bias=False), nn.BatchNorm2d(shape[1])) for shape in shapes]
    return nn.Sequential(*(m for pair in convs for m in pair), nn.Linear(ni, 1000))


def vit_l():
    "The same for a ViT-L/16 at 224 pixels"
    blocks = [nn.TransformerEncoderLayer(1024, 16, 4096) for _ in range(24)]
    tokens = nn.ParameterList([torch.zeros(1, 1, 1024), torch.zeros(1, 197, 1024)])
    return nn.Sequential(nn.Conv2d(3, 1024, 16), tokens, *blocks, nn.LayerNorm(1024), nn.Linear(1024, 1000))


# --- the rows: name → a function without arguments, which makes one update

def yardsticks(model):
    live = [d[k].detach() for d, k in find_tensors(model).values()]
    avg = [t.clone() for t in live]
    a, b = (torch.randn(sum(t.numel() for t in live), device=live[0].device) for _ in range(2))

    def copies():
        for _ in range(3): torch._foreach_copy_(avg, live)
    return {BARE: lambda: torch._foreach_lerp_(avg, live, 1 - DECAY), 'one flat lerp_': lambda: a.lerp_(b, 1 - DECAY),
            'three copies': copies}


def single(model, check):
    "One average"
    return Average(model, ema(DECAY), check_finite=check).update


def banks(model):
    "Four averages, moved together or one after the other"
    def one_by_one(averages):
        for a in averages: a.update()

    rows = {}
    for how, check in CHECKS.items():
        bank = [Average(model, ema(d), check_finite=check) for d in BANK]
        rows[f'bank of 4, {how}'] = partial(update_all, bank)
        rows[f'4 singles, {how}'] = partial(one_by_one, bank)
    return rows


def swap(model):
    "The average put into the model, and taken out again"
    avg = Average(model, ema(DECAY))
    avg.update()

    def in_and_out():
        with avg.applied(): pass
    return in_and_out


def averaged_model(model, **kwargs):
    avg = AveragedModel(model, **kwargs)
    return lambda: avg.update_parameters(model)


def timm(model):
    found = importlib.util.find_spec('timm')
    if found is None: raise ImportError('timm is not installed')
    # By its file, which needs torch only: the package imports torchvision, and PyPI's build of that does not run with
    # a torch for CPUs.
    file = Path(found.submodule_search_locations[0])/'utils'/'model_ema.py'
    spec = importlib.util.spec_from_file_location('timm_model_ema', file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    avg = module.ModelEmaV3(model, decay=DECAY)
    return lambda: avg.update(model)


def ema_pytorch(model):
    from ema_pytorch import EMA
    return EMA(model, beta=DECAY, update_after_step=0, update_every=1, use_foreach=True).update


def torch_ema(model):
    from torch_ema import ExponentialMovingAverage
    return ExponentialMovingAverage(model.parameters(), DECAY).update


def others(model):
    "Their rows, and the names of those that are not installed"
    decay,missing = get_ema_multi_avg_fn(DECAY),[]
    rows = {'torch AveragedModel (SWA)': averaged_model(model),
            'torch AveragedModel, EMA': averaged_model(model, multi_avg_fn=decay, use_buffers=True),
            ' without use_buffers': averaged_model(model, multi_avg_fn=decay)}
    for name, make in ('timm ModelEmaV3', timm), ('ema-pytorch EMA', ema_pytorch), ('torch-ema', torch_ema):
        try: rows[name] = make(model)
        except ImportError: missing.append(name)
    return rows, missing


# --- memory

def storages():
    "Bytes of everything that tensors hold, by address"
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.layout is torch.strided]
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


def memory(model):
    "Bytes of an average, and with whatever else updates leave in memory, both as shares of the weights in fp32"
    gc.collect()
    before = storages()
    avg = Average(model, ema(DECAY))
    for _ in range(2): avg.update()
    weights = avg.weights.values()
    size = 4*sum(t.numel() for t in weights)
    own = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in weights)}
    return sum(own.values())/size, sum(n for at, n in storages().items() if at not in before)/size


def one_model(name, make, args):
    torch.manual_seed(0)
    model = make().to(args.device)
    n = sum(d[k].numel() for d, k in find_tensors(model).values())
    copies = memory(model)
    theirs, missing = others(model)
    size = 2**28 if args.device == 'cuda' else 2**26
    a, b = (torch.ones(size, device=args.device) for _ in range(2))
    rows = {'limit': lambda: a.copy_(b), **yardsticks(model),
            **{f'ours, {how}': single(model, check) for how, check in CHECKS.items()},
            'ours, equal()': Average(model, equal()).update, **banks(model), 'swap in and out': swap(model), **theirs}
    times = take_turns(rows, args.rounds, args.device, warmup=3, slot=args.slot)
    bandwidth = 8*size/statistics.median(times['limit'])
    times['limit'] = [t/(8*size)*12*n for t in times['limit']]
    print(f'{name}: {n:,} elements, copy at {bandwidth/1e9:.0f} GB/s', flush=True)
    return times, copies, missing


# --- a callback in an epoch

def swa_share(device):
    "The time in SWACB's methods as a share of an epoch, train and validate, without it"
    from fastswa.data.loaders import DataLoaders      # the rest of this script needs torch only
    from fastswa.data.sources import fashion_mnist
    from fastswa.training.learner import TrainLearner
    from fastswa.callbacks.swa import SWACB

    def clocked(f, epochs):
        def _f(learn):
            start = time.perf_counter()
            f(learn)
            spent.append((time.perf_counter() - start)/epochs)
        return _f
    dls, spent = DataLoaders.in_memory(fashion_mnist(), 1024, device=device), []
    swa = SWACB(every='0.2ep', valid=False, apply=False)
    for event, epochs in ('before_fit', 20), ('after_step', 4), ('cleanup_fit', 20):
        setattr(swa, event, clocked(getattr(swa, event), epochs))
    bare, averaged = (TrainLearner(convnet().to(device), dls, F.cross_entropy, 0.1, cbs) for cbs in ([], [swa]))
    bare.fit(1)                              # warms up
    epoch = statistics.median(seconds(partial(bare.fit, 1), device) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')      # that nothing recomputes the statistics of BatchNorm
        averaged.fit(4)
    return sum(spent)/epoch, swa.average.n/4


# --- a target network

BY_HAND = 'mul_ and add_ by hand'


def target_network(args):
    "An update of the target network of a DQN and its forward pass: three ways, which take turns"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    model, x = model.to(args.device), torch.randn(64, 4, device=args.device)
    copied, avg, averages = copy.deepcopy(model), Average(model, ema(DECAY)), Averages(model)
    avg.update()
    averages.add('target', ema(DECAY))
    averages.take('target')

    @torch.no_grad()
    def by_hand():
        for p, tp in zip(model.parameters(), copied.parameters()): tp.data.mul_(DECAY).add_(p.data, alpha=1 - DECAY)
        return copied(x)

    @torch.no_grad()
    def with_forward(update, live):
        update()
        return live(x)
    rows = {BY_HAND: by_hand, 'Average.update': partial(with_forward, avg.update, avg.live()),
            'Averages.step': partial(with_forward, averages.step, averages['target'].live())}
    return take_turns(rows, args.rounds, args.device, warmup=3, slot=args.slot)


# --- what is printed

def table(results):
    "Lines of Markdown: microseconds of each row, and its ratio to the bare update, for each model"
    yield f'| | {" | ".join(f"{name}, µs | ÷ bare" for name in results)} |'
    yield '| --- |' + ' --: |'*2*len(results)
    for row in next(iter(results.values())):
        cells = [f'{statistics.median(t[row])*1e6:,.1f} | {ratio(t, row, BARE):.2f}' for t in results.values()]
        yield f'| {row.strip()} | {" | ".join(cells)} |'


def targets(results, copies, device):
    "What is aimed at, the figure measured, and the most it may be"
    for name, t in results.items():
        off, on = (1.25, 1.7) if device == 'cuda' else (1.35 if name == 'convnet' else 1.05, 1.8)
        yield f'{name}: check off ÷ bare', ratio(t, 'ours, check off', BARE), off
        yield f'{name}: check on ÷ bare', ratio(t, 'ours, check on', BARE), on
        for how in 'check off', 'check on':
            yield f'{name}: bank of 4 ÷ 4 singles, {how}', ratio(t, f'bank of 4, {how}', f'4 singles, {how}'), 1
        if device == 'cuda' and name == 'ResNet-50':
            yield f'{name}: check off ÷ limit (moonshot)', ratio(t, 'ours, check off', 'limit'), 1.2
        yield f'{name}: the average ÷ its weights in fp32, bytes', copies[name][0], 1


def main():
    options = parser(__doc__, rounds=25)
    options.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    options.add_argument('--quick', action='store_true', help='3 short rounds: to see that it runs, not to quote')
    args = parse(options)
    args.slot = 0.03
    if args.quick: args.rounds, args.slot = 3, 0.003
    if args.device == 'cpu' and not args.cpu_time: torch.set_num_threads(min(2, os.cpu_count()))
    print(f'One update of an average, {place(args.device)}, {args.rounds} rounds\n')

    models = {'convnet': convnet, 'ResNet-50': resnet50}
    if args.device == 'cuda':
        if torch.cuda.mem_get_info()[0] > 40*2**30: models['ViT-L'] = vit_l      # some 25 copies of its 1.2 GB
        else: print('ViT-L: left out, it needs 40 GB of free memory on the GPU')
    results, copies = {}, {}
    for name, make in models.items(): results[name], copies[name], missing = one_model(name, make, args)
    print()
    report('averaging', 'One update of an average', table(results), args, args.device, missing)

    print()
    for name, t in results.items():
        swapped = ratio(t, 'swap in and out', 'three copies')
        own,with_rest = copies[name]
        print(f'{name}: swap in and out ÷ three copies {swapped:.2f}; memory in copies of the weights in fp32: '
              f'the average {own:.3f}, with what updates leave {with_rest:.3f}')
    aims = list(targets(results, copies, args.device))
    times = target_network(args)
    print('target network: ' + ', '.join(f'{name} {statistics.median(t)*1e6:.1f} µs' for name, t in times.items()))
    aims += [(f'target network: {name} ÷ by hand', ratio(times, name, BY_HAND), 1.5)
             for name in times if name != BY_HAND]
    try: share, snapshots = swa_share(args.device)
    except (ImportError, FileNotFoundError) as e: print(f'\nSWACB: not measured: {e}')
    else:
        print(f'\nSWACB: {snapshots:.2f} snapshots per epoch of Fashion-MNIST')
        aims.append(('SWACB ÷ an epoch of Fashion-MNIST, %', 100*share, 0.1))

    width = max(len(what) for what, _, _ in aims)
    print(f'\n{"target":{width}}{"at most":>10}{"measured":>10}')
    for what, figure, most in aims:
        verdict = 'met' if figure <= most else 'MISSED'
        print(f'{what:{width}}{most:10.2f}{figure:10.3f}  {verdict}')


if __name__ == '__main__': main()
