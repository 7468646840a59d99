"""What the benchmarks have in common: rows that take turns in one process, medians, ratios round by round, tables."""
import argparse, os, platform, random, statistics, time
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent/'results'
clock = time.perf_counter      # or that of `--cpu-time`


def parser(doc, **numbers):
    "A parser of arguments with the text of the script as its help, and an option for each whole number"
    res = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items(): res.add_argument(f'--{name}', type=int, default=default)
    res.add_argument('--write', action='store_true', help='write the table to benchmarks/results, too')
    res.add_argument('--cpu-time', action='store_true', help='CPU time of one thread, where the machine has other work')
    return res


def parse(options):
    "The arguments; from now on the clock is the one that they ask for"
    global clock
    args = options.parse_args()
    if args.cpu_time:
        clock = time.process_time
        torch.set_num_threads(1)
    return args


def wait(device):
    "Wait until the device is through"
    if torch.device(device).type == 'cuda': torch.cuda.synchronize()


def seconds(f, device, calls=1):
    "Seconds per call of `f`, the mean of so many calls"
    wait(device)
    start = clock()
    for _ in range(calls): f()
    wait(device)
    return (clock() - start)/calls


def take_turns(rows, rounds, device, warmup=1, slot=0):
    "name → seconds per call, round by round; in its turn a row makes as many calls as fill `slot` seconds, or one"
    for f in rows.values(): seconds(f, device, warmup)      # the first calls allocate, copy and look things up
    calls = dict.fromkeys(rows, 1)
    if slot:
        for name, f in rows.items(): calls[name] = max(1, round(slot/seconds(f, device, warmup)))
    times, order = {name: [] for name in rows}, random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(rows), len(rows)):      # no row always follows the same other
            times[name].append(seconds(rows[name], device, calls[name]))
    return times


def ratios(times, name, base):
    "The ratio of two rows, round by round, as far as both go"
    return [a/b for a, b in zip(times[name], times[base])]


def ratio(times, name, base): return statistics.median(ratios(times, name, base))


def spread(times, name, base, digits=3):
    "Median, smallest and largest ratio of two rows as text"
    found = ratios(times, name, base)
    return f'{statistics.median(found):.{digits}f} ({min(found):.{digits}f} … {max(found):.{digits}f})'


def place(device):
    "On what this runs, in words"
    if torch.device(device).type == 'cuda': return f'{torch.cuda.get_device_name()}, torch {torch.__version__}'
    known = getattr(torch.cpu, 'get_capabilities', dict)()      # not in torch 2.6
    name = known.get('cpu_name') or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f'{name}, {threads} CPU thread{"" if threads == 1 else "s"}, torch {torch.__version__}'


def table(times, base, per=1):
    "Lines of Markdown: the time of each row, for one of `per`, and its ratio to the base"
    unit,scale = ('µs', 1e6/per) if statistics.median(times[base])/per < 0.01 else ('ms', 1e3/per)
    yield f'| | {unit} | ÷ {base.strip()} (min … max) |'
    yield '| --- | --: | --: |'
    for name, ts in times.items():
        yield f'| {name.strip()} | {scale*statistics.median(ts):,.1f} | {spread(times, name, base)} |'


def report(name, title, lines, args, device='cpu', missing=(), how=None):
    "Print a table, with where it comes from; with `--write` it goes to benchmarks/results/NAME.md as well"
    how = how or ('CPU time of one thread' if args.cpu_time else 'time by the clock')
    load = f'; load {os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else ''
    text = [f'{title}.', f'{place(device)}; {how}, medians of {args.rounds} rounds in which all rows take turns{load}.']
    text += ['', *lines]
    if missing: text += ['', f'Not measured: {"; ".join(missing)}.']
    print('\n'.join(text), flush=True)
    if not args.write: return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS/f'{name}.md').write_text('\n'.join(text) + '\n', encoding='utf-8')
