"""What the benchmarks have in common: rows that take turns in one process, medians, and ratios round by round."""
import argparse, random, statistics, time

import torch


def parser(doc, **numbers):
    "A parser of arguments with the text of the script as its help, and an option for each whole number"
    res = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items(): res.add_argument(f'--{name}', type=int, default=default)
    return res


def wait(device):
    "Wait until the device is through"
    if torch.device(device).type == 'cuda': torch.cuda.synchronize()


def seconds(f, device, calls=1):
    "Seconds per call of `f`, the mean of so many calls"
    wait(device)
    start = time.perf_counter()
    for _ in range(calls): f()
    wait(device)
    return (time.perf_counter() - start)/calls


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
    on_gpu = torch.device(device).type == 'cuda'
    name = torch.cuda.get_device_name() if on_gpu else f'{torch.get_num_threads()} CPU threads'
    return f'{name}, torch {torch.__version__}'
