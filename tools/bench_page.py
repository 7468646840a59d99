"""Writes nbs/guides/benchmarks.md, the page of the site, from the tables in benchmarks/results, for `make bench`."""
from pathlib import Path

root = Path(__file__).resolve().parents[1]
results,target = root/'benchmarks'/'results',root/'nbs'/'guides'/'benchmarks.md'
BENCH,GPU,FAST = '`make bench`','`make bench-gpu`, on a machine with CUDA','`python benchmarks/fast.py --write`'
PARTS = {'averaging': ('An update of an average', BENCH), 'step': ('A training step', BENCH),
         'epoch': ('An epoch', BENCH), 'data': ('Batches of images', BENCH), 'checkpoint': ('A checkpoint', BENCH),
         'distributed': ('Two processes', BENCH), 'fast': ('Accuracy with the fast preset', FAST),
         'gpu': ('On a GPU', GPU)}
TEXT = """# Benchmarks

> What fastswa costs beside plain PyTorch and other libraries

All rows of a table took turns, and a ratio is the median of the ratios round by round. Each table says on which
machine it was measured. `make bench` measures again and writes this page; the scripts in
[benchmarks](https://github.com/fastswa/fastswa/tree/main/benchmarks) say what each row is. Studies of their own:
[how many steps averaging saves](../experiments/bench_averages.ipynb), and
[how far a small network gets](../experiments/records.ipynb).
"""


def page(results=results):
    "The page: a section for each table, and at the end what has no table yet, and how to measure it"
    files = {title: results/f'{name}.md' for name, (title, _) in PARTS.items()}
    found = [f'## {title}\n\n{file.read_text(encoding="utf-8")}' for title, file in files.items() if file.exists()]
    left = [f'- {title}: {how}.\n' for title, how in PARTS.values() if not files[title].exists()]
    if left: found.append('## Not measured yet\n\n' + ''.join(left))
    return '\n'.join([TEXT, *found])


if __name__ == '__main__': target.write_text(page(), encoding='utf-8')
