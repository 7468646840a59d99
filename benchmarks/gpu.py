"""What the library costs on a GPU: one command of at most 6 minutes, one table of ratios to bare PyTorch.

    python benchmarks/gpu.py [--rounds 15] [--limit 360] [--out gpu.json] [--write]
    python benchmarks/gpu.py --device cpu --quick      # to see that it runs, not to quote

Needs no network. In each part the rows take turns in one process, in an order that changes from round to round; a
figure is the median over the rounds, a ratio the median of the ratios to the bare row of the same round. At the end
`pytest -m gpu` runs for as long as is left of the limit; the exit status is 1 if a test fails or does not end in time,
or if a row of ours could not be measured.

update   one EMA update of the seed convnet, and of random weights in the shapes of ResNet-50 and ViT-L/16: ours with
         and without the check for NaN and infinity, torch's AveragedModel and, if it is installed, timm's ModelEmaV3;
         bare is one `torch._foreach_lerp_` over prepared lists of the same tensors.
step     one training step of the seed convnet: bare and ours, which is TrainLearner with DeviceCB, MetricsCB,
         ProgressCB and EMACB. Eager; compiled (`reduce-overhead`); captured: forward and backward pass in CUDA graphs
         (`make_graphed_callables`), and for comparison the whole bare step in one. All beside the eager bare loop, and
         ours beside bare in the same mode.
epoch    Fashion-MNIST, train and validate, from memory; toy images where the data is not at hand. `fast` is
         `fast_cbs()`. Other people's loops where they are installed.
data     a pass over the training images in batches on the GPU: from its memory, and by torch's DataLoader with a copy.
save     a checkpoint of 25 million weights and an EMA, beside `torch.save` of the same tensors and an fsync.
"""
import json, platform, statistics, subprocess, sys, tempfile, time, traceback
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import averaging, checkpoint, data, epoch, peers, step
from fastswa.callbacks.speed import CompileCB, fast_cbs
from fastswa.callbacks.swa import EMACB
from fastswa.data.loaders import DataLoaders
from fastswa.data.sources import fashion_mnist, toy_images
from timing import RESULTS, parse, parser, place, ratio, take_turns, wait

ROOT = Path(__file__).resolve().parents[1]
MODELS = {'convnet': averaging.convnet, 'ResNet-50': averaging.resnet50, 'ViT-L': averaging.vit_l}


class Report:
    "Rows of the table, and what could not be measured"
    def __init__(self,
        judge=True, # say whether ratios are within their limits?
    ):
        self.judge,self.failed = judge,False
        self.rows,self.missing = [],[]

    def add(self, part, times, base, per=1, limits=None):
        "A row for each name in `times`, in seconds per `per`; `limits` are the most that ratios may be"
        for name, ts in times.items():
            self.compare(part, times, name, base, (limits or {}).get(name), us=1e6*statistics.median(ts)/per)

    def compare(self, part, times, name, base, at_most=None, us=None):
        "The ratio of two of the rows that were measured together"
        found = ratio(times, name, base)
        if not self.judge: at_most = None
        self.rows.append(dict(part=part, name=name, us=us, base=base, ratio=found, at_most=at_most))

    def leave_out(self, what, why, failed=False):
        self.missing.append(f'{what}: {why}')
        self.failed |= failed

    def lines(self):
        "The table in Markdown, and what is not in it"
        yield '| part | row | µs | divided by | ratio | at most | |'
        yield '| --- | --- | --: | --- | --: | --: | --- |'
        for r in self.rows:
            us = '' if r['us'] is None else f'{r["us"]:.1f}'
            most = '' if r['at_most'] is None else f'{r["at_most"]:.2f}'
            verdict = '' if r['at_most'] is None else 'met' if r['ratio'] <= r['at_most'] else 'MISSED'
            yield f'| {r["part"]} | {r["name"]} | {us} | {r["base"]} | {r["ratio"]:.3f} | {most} | {verdict} |'
        yield ''
        for line in self.missing: yield f'not measured: {line}'


def try_rows(report, part, makers):
    "The rows that can be made and called; `makers` has a function for each, which returns the row"
    rows = {}
    for name, make in makers.items():
        try:
            row = make()
            row()
        except ImportError as e: report.leave_out(f'{part}, {name}', e)
        except Exception as e:
            traceback.print_exc()
            lines = str(e).splitlines() or ['']
            report.leave_out(f'{part}, {name}', f'{type(e).__name__}: {lines[0]}', failed=name.startswith('ours'))
        else: rows[name] = row
    return rows


# --- CUDA graphs

def warm_up(f):
    "Call `f` three times on another stream, as capturing asks for"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3): f()
    torch.cuda.current_stream().wait_stream(stream)


def captured(f):
    "`f` as one CUDA graph"
    warm_up(f)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): f()
    return graph.replay


def graphed_model(device, batches):
    "The model with forward and backward pass in a CUDA graph each"
    return torch.cuda.make_graphed_callables(step.make_model(device).train(), (batches[0][0].clone(),))


def one_graph_loop(model, batches):
    "The bare loop with its whole step in one CUDA graph"
    x, y = (t.clone() for t in batches[0])
    opt = step.sgd(model.train().parameters(), lr=0.1)
    total = torch.zeros((), device=x.device)

    def one_step():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        total.add_(loss.detach())
    replay = captured(one_step)

    def run():
        total.zero_()
        for xb, yb in batches:
            x.copy_(xb)
            y.copy_(yb)
            replay()
        return total.item()
    return run


# --- the parts

def measure_update(report, args, name):
    model = MODELS[name]().to(args.device)
    bare = {k: f for k, f in averaging.yardsticks(model).items() if k != 'three copies'}
    makers = {k: (lambda f=f: f) for k, f in bare.items()}
    if args.device == 'cuda': makers[f'{averaging.BARE} in a CUDA graph'] = partial(captured, bare[averaging.BARE])
    for k, check in averaging.CHECKS.items(): makers[f'ours, {k}'] = partial(averaging.single, model, check)
    decay = get_ema_multi_avg_fn(averaging.DECAY)
    makers['torch AveragedModel, EMA'] = partial(averaging.averaged_model, model, multi_avg_fn=decay, use_buffers=True)
    makers['timm ModelEmaV3'] = partial(averaging.timm, model)
    rows = try_rows(report, f'update, {name}', makers)
    times = take_turns(rows, args.rounds, args.device, warmup=3, slot=args.slot)
    limits = {'ours, check off': 1.25, 'ours, check on': 1.7} if args.device == 'cuda' else {}
    report.add(f'update, {name}', times, averaging.BARE, limits=limits)
    for peer in 'torch AveragedModel, EMA', 'timm ModelEmaV3':
        if peer in times: report.compare(f'update, {name}', times, 'ours, check on', peer, 1)


def measure_step(report, args):
    device,mode = torch.device(args.device),'reduce-overhead'
    batches = step.make_batches(args.steps, args.bs, device)

    def model(): return step.make_model(device)
    def bare_loop(model): return step.bare_loop(model, batches)
    def our_loop(model, *cbs): return step.learner_loop(model, batches, *step.usual_cbs(device), EMACB(), *cbs)
    makers = {'bare, eager': lambda: bare_loop(model()), 'ours, eager': lambda: our_loop(model()),
              'bare, compiled': lambda: bare_loop(torch.compile(model(), mode=mode)),
              'ours, compiled': lambda: our_loop(model(), CompileCB(mode))}
    if args.device == 'cuda':
        makers['bare, captured'] = lambda: bare_loop(graphed_model(device, batches))
        makers['ours, captured'] = lambda: our_loop(graphed_model(device, batches))
        makers['bare, one graph'] = lambda: one_graph_loop(model(), batches)
    rows = try_rows(report, 'step', makers)
    times = take_turns(rows, args.rounds, device, warmup=2)
    limits = {'ours, eager': 1.1, 'ours, compiled': 0.75} if args.device == 'cuda' else {}
    report.add('step', times, 'bare, eager', per=args.steps, limits=limits)
    for how in 'compiled', 'captured':
        ours,bare = f'ours, {how}',f'bare, {how}'
        if {ours, bare} <= times.keys(): report.compare('step', times, ours, bare)


def epoch_data(quick):
    "The data, and the name of the part"
    if quick: return toy_images(2000, 500), 'epoch, toy images'
    try: return fashion_mnist(), 'epoch'
    except OSError as e:      # a FileNotFoundError, or what the hub says
        print(e)
        return toy_images(60_000, 10_000), 'epoch, toy images'


def measure_epoch(report, args):
    data,name = epoch_data(args.quick)
    dls = DataLoaders.in_memory(data, args.bs, device=args.device)
    makers = {'bare': lambda: epoch.Bare(dls, args.device).epoch,
              'bare + torch EMA': lambda: epoch.Bare(dls, args.device, averaged=True).epoch,
              'ours, no average': lambda: epoch.Ours(dls, args.device).epoch,
              'ours + EMACB, row off': lambda: epoch.Ours(dls, args.device, EMACB(valid=False)).epoch,
              'ours + EMACB': lambda: epoch.Ours(dls, args.device, EMACB()).epoch,
              'ours, fast': lambda: epoch.Ours(dls, args.device, *fast_cbs(args.device)).epoch}
    for peer, make in peers.LOOPS.items():
        makers[peer] = partial(make, epoch.make_model(args.device), dls, epoch.sgd, 0.2)
    times = take_turns(try_rows(report, name, makers), min(args.rounds, 9), args.device)
    report.add(name, times, 'bare', limits={'ours, no average': 1.05, 'ours + EMACB, row off': 1.05})
    if 'ours + EMACB' in times: report.compare(name, times, 'ours + EMACB', 'bare + torch EMA', 1.05)


def measure_data(report, args):
    found,name = epoch_data(args.quick)
    dls = DataLoaders.in_memory(found, args.bs, device=args.device)
    x,y = (t.cpu() for t in dls.train.dataset.tensors)
    theirs = DataLoader(TensorDataset(x.float().div(255), y), args.bs, shuffle=True, pin_memory=args.device == 'cuda')

    def copied():
        for xb, yb in theirs: xb.to(args.device, non_blocking=True),yb.to(args.device, non_blocking=True)
    rows = {'ours, in memory': data.one_pass(dls.train), 'DataLoader, copied': copied}
    report.add(name.replace('epoch', 'data'), take_turns(rows, min(args.rounds, 5), args.device), 'DataLoader, copied')


def measure_save(report, args):
    learn = checkpoint.big_learner(args.device)
    tensors = dict(raw=learn.model.state_dict(), ema=learn.averages['ema'].weights)
    with tempfile.TemporaryDirectory() as folder:
        base = 'torch.save, with fsync'
        rows = {base: partial(checkpoint.saved, tensors, Path(folder)/'theirs.pt'),
                'ours, learn.save': partial(learn.save, f'{folder}/ours.pt')}
        report.add('save', take_turns(rows, min(args.rounds, 5), args.device), base)


def run_tests(report, left):
    "`pytest -m gpu`, for as long as is left; without a GPU the tests are only collected"
    command = [sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', '-p', 'no:cacheprovider', 'tests']
    if not torch.cuda.is_available(): command.append('--collect-only')
    try: result = subprocess.run(command, cwd=ROOT, timeout=max(left, 1), capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return report.leave_out('pytest -m gpu', f'had not ended after {left:.0f} s', failed=True)
    lines = result.stdout.strip().splitlines() or [result.stderr.strip()]
    if result.returncode: print(result.stdout, result.stderr)
    report.failed |= result.returncode != 0
    print(f'pytest -m gpu: {lines[-1]}', flush=True)


def main():
    options = parser(__doc__, rounds=15, steps=59, bs=1024, limit=360)
    options.add_argument('--device', choices=['cpu', 'cuda'], default='cuda')
    options.add_argument('--quick', action='store_true', help='2 short rounds: to see that it runs, not to quote')
    options.add_argument('--out', help='a JSON file for the figures')
    args = parse(options)
    if args.device == 'cuda' and not torch.cuda.is_available():
        options.error('there is no CUDA device; `--device cpu --quick` shows that the script runs')
    start,args.slot = time.perf_counter(),0.03
    if args.quick: args.rounds,args.slot,args.steps,args.bs = 2,0.002,3,128
    print(f'{place(args.device)}, Python {platform.python_version()}, {args.rounds} rounds', flush=True)

    parts = {f'update, {name}': partial(measure_update, name=name) for name in MODELS}
    if args.device == 'cpu': del parts['update, ViT-L']      # 10 GB, and seconds for each row
    parts |= {'step': measure_step, 'epoch': measure_epoch, 'data': measure_data, 'save': measure_save}
    report = Report(judge=not args.quick)
    for name, part in parts.items():
        left = args.limit - (time.perf_counter() - start)
        if left < 90:      # the tests need some
            report.leave_out(name, 'no time was left')
            continue
        try: part(report, args)
        except Exception as e:
            traceback.print_exc()
            report.leave_out(name, f'{type(e).__name__}: {e}', failed=True)
        wait(args.device)
        if args.device == 'cuda': torch.cuda.empty_cache()
        print(f'{name}: measured after {time.perf_counter() - start:.0f} s', flush=True)
    run_tests(report, args.limit - (time.perf_counter() - start) - 5)
    text = '\n'.join([f'{place(args.device)}, {args.rounds} rounds.', '', *report.lines()])
    print(f'\n{text}\n{time.perf_counter() - start:.0f} s in all')
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS/'gpu.md').write_text(f'{text}\n', encoding='utf-8')
    if args.out:
        found = dict(place=place(args.device), rows=report.rows, missing=report.missing)
        Path(args.out).write_text(json.dumps(found, indent=1))
    sys.exit(report.failed)


if __name__ == '__main__': main()
