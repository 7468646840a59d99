"""Writes nbs/guides/benchmarks.md, the page of the site, from the tables in benchmarks/results, for `make bench`."""
from pathlib import Path

root = Path(__file__).resolve().parents[1]
PARTS = dict(averaging='An update of an average', step='A training step', epoch='An epoch', data='Batches of images',
             checkpoint='A checkpoint', distributed='Two processes', fast='Accuracy with the fast preset', gpu='On a GPU',
             averages='Steps that averages save')
TEXT = """# Benchmarks

What fastswa costs beside plain PyTorch and other libraries. All rows of a table took turns in one process, and a ratio
is the median of the ratios round by round. `make bench` measures again and writes this page; `make bench-gpu` measures
a GPU, and `fastswa bench-averages` what averaging saves. The scripts in
[benchmarks](https://github.com/fastswa/fastswa/tree/main/benchmarks) say what each row is.
"""


def main():
    found = {title: root/'benchmarks'/'results'/f'{name}.md' for name, title in PARTS.items()}
    tables = [f'\n## {title}\n\n{file.read_text(encoding="utf-8")}' for title, file in found.items() if file.exists()]
    (root/'nbs'/'guides'/'benchmarks.md').write_text(TEXT + ''.join(tables), encoding='utf-8')


if __name__ == '__main__': main()
