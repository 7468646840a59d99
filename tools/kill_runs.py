"""Kill a training run with SIGKILL at random moments, resume it, and compare each bit with the run that nothing
stopped.

    python tools/kill_runs.py OUT [--kills 3000] [--seed 0] [--every 1ba]

A run trains a small network with AdamW, one cycle, dropout, shuffling, augmentation, EMA, SWA, post-hoc
snapshots in a folder and a CSV log, and writes a checkpoint after each batch; every second run writes them in
the background. Its process is killed somewhere within the time that a whole run takes, started again, killed,
later and later until it comes to its end. Then weights, averages, optimizer, history, random state, names of
files and log are compared. What was done is counted in OUT/kills.json, from which the script goes on when it
is started again. Exit status 1 if a bit differed; the folder of such a run stays.
"""
import argparse, json, multiprocessing, os, random, shutil, sys, threading, time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]/d) for d in ('.', 'tests')]

import torch
from tqdm import tqdm

import killed_run
from fastswa.callbacks.loggers import CSVLoggerCB
from fastswa.callbacks.swa_variants import PostHocEMACB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.core import quiet
from fastswa.files import written
from fastswa.random_state import set_seed

processes = multiprocessing.get_context('fork')      # so that each begins with everything imported


def train(folder, background, every):
    "Go on with the run in `folder`; returns its result"
    learn = killed_run.the_run()
    learn.dls = killed_run.Data(100)      # 4 batches
    learn.cbs += [PostHocEMACB(every='3ba', keep=6, folder=folder/'snapshots', apply=False),
                  CSVLoggerCB(folder/'log.csv')]
    checkpoints = CheckpointCB(folder/'run', every, keep=2, best='ema/loss', keep_best=2, background=background)
    set_seed(1)
    learn.fit(2, cbs=checkpoints, resume=folder/'run')
    log = [row.rpartition(',')[0] for row in (folder/'log.csv').read_text().splitlines()]      # without the time
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))
    return dict(killed_run.result(learn), log=log, files=files)


def train_and_send(pipe, *args):
    "In a new process"
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    pipe.send(train(*args))


def start(*args):
    here, there = processes.Pipe(duplex=False)
    p = processes.Process(target=train_and_send, args=(there, *args))
    p.start()
    there.close()
    return p, here


def result(p, pipe):
    "What a process sends, or None if it was killed before"
    try: return pipe.recv()
    except EOFError: return None
    finally: p.join()


def differing_bits(a, b):
    "In how many bits do two results differ? What is no bytes counts as one"
    n = 0
    for k in a.keys() | b.keys():
        x, y = a.get(k), b.get(k)
        if isinstance(x, bytes) and isinstance(y, bytes) and len(x) == len(y):
            n += sum((i ^ j).bit_count() for i, j in zip(x, y))
        else: n += x != y
    return n


def new_folder(path):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def killed_until_done(folder, whole, length, rnd, background, every, bar, most):
    "A run that is killed again and again; how often, and in how many bits its result differs"
    kills = 0
    while True:
        p, pipe = start(folder, background, every)
        if kills == most or pipe.poll(rnd.uniform(0, length*(1 + kills/8))):      # its end
            res = result(p, pipe)
            return kills, 1 if res is None else differing_bits(res, whole)
        p.kill()
        p.join()
        kills += 1
        bar.update()


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('out', type=Path, help='folder for the runs and the count')
    options.add_argument('--kills', type=int, default=3000, help='how many in all')
    options.add_argument('--seed', type=int, default=0)
    options.add_argument('--every', default='1ba', help='how often a checkpoint is written')
    args = options.parse_args()
    torch.set_num_threads(1)
    # tqdm's lock is shared by all processes, and one may be killed that holds it; its thread does not outlive a fork
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    args.out.mkdir(parents=True, exist_ok=True)
    count_file = args.out/'kills.json'
    count = dict(kills=0, runs=0, differing_bits=0, wrong_runs=[])
    if count_file.exists(): count |= json.loads(count_file.read_text())
    with tqdm(total=args.kills, initial=count['kills'], unit=' kills') as bar:
        with quiet(): train(new_folder(args.out/'imports'), False, args.every)      # what is imported on the way
        began = time.perf_counter()
        whole = result(*start(new_folder(args.out/'whole'), False, args.every))
        length = time.perf_counter() - began
        while count['kills'] < args.kills:
            i = count['runs']
            folder = new_folder(args.out/f'run-{i}')
            kills, bits = killed_until_done(folder, whole, length, random.Random(f'{args.seed}-{i}'), bool(i % 2),
                                            args.every, bar, args.kills - count['kills'])
            count['kills'] += kills
            count['runs'] += 1
            count['differing_bits'] += bits
            if bits: count['wrong_runs'].append(folder.name)
            else: shutil.rmtree(folder)
            with written(count_file) as f: f.write(json.dumps(count).encode())
            bar.set_postfix(runs=count['runs'], differing_bits=count['differing_bits'])
    print(f'{count["kills"]} kills in {count["runs"]} runs, {count["differing_bits"]} differing bits')
    sys.exit(count['differing_bits'] > 0)


if __name__ == '__main__': main()
