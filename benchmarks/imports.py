"""How long `import fastswa.all` takes, against `import torch, torcheval, datasets`: new processes, taking turns.

    python benchmarks/imports.py [--rounds 7]
"""
import statistics, subprocess, sys

from timing import parser, ratio, take_turns

PEERS, NOTHING = 'import torch, torcheval.metrics, datasets', 'pass'


def process(code):
    def run(): subprocess.run([sys.executable, '-c', code], check=True)
    return run


def main():
    args = parser(__doc__, rounds=7).parse_args()
    codes = NOTHING, PEERS, 'import fastswa.all', 'import fastswa'
    rows = {code: process(code) for code in codes}
    times = take_turns(rows, args.rounds, 'cpu')      # which first fills the disk cache
    empty = statistics.median(times[NOTHING])
    net = {code: [t - empty for t in times[code]] for code in codes}
    for code in codes[1:]:
        print(f'{code:45} {statistics.median(net[code]):6.3f} s   {ratio(net, code, PEERS):.2f} × the first')


if __name__ == '__main__': main()
