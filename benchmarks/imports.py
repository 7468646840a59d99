"""How long `import fastswa.all` takes, against `import torch, torcheval, datasets`: new processes, taking turns.

    python benchmarks/imports.py [rounds]
"""
import statistics, subprocess, sys, time


def seconds(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True)
    return time.perf_counter() - start


rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
codes = 'pass', 'import torch, torcheval.metrics, datasets', 'import fastswa.all', 'import fastswa'
times = {code: [] for code in codes}
for r in range(rounds + 1):
    for code in codes:
        t = seconds(code)
        if r: times[code].append(t)                # the first round fills the disk cache
empty = statistics.median(times['pass'])
base = [t - empty for t in times[codes[1]]]
for code in codes[1:]:
    net = [t - empty for t in times[code]]
    print(f'{code:45} {statistics.median(net):6.3f} s   {statistics.median(a/b for a, b in zip(net, base)):.2f} × the first')
