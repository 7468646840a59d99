"Tables of what others got wrong, as in test_traps: what is read from them, and what must be true of them"
import ast
import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


def places(table):
    "Number of the trap, file and name or text, for each line of a table"
    number = 0
    for line in table.splitlines():
        if m := re.match(r' ?(\d+)  \S', line): number = int(m[1])
        elif m := re.match(r' {8}(\S+): (.+)', line): yield number, m[1], m[2]


@cache
def cells(path): return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]


@cache
def functions(path): return {f.name for f in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(f, ast.FunctionDef)}


def check_table(table, here, n):
    "Traps 1 to `n` are all there, in order; every test that is named exists, and every numbered test of the file `here` is named"
    rows = list(places(table))
    assert list(dict.fromkeys(number for number, _, _ in rows)) == list(range(1, n + 1))
    for number, file, what in rows:
        if file == 'later': continue
        path = Path(here) if file == 'here' else ROOT/file
        found = any(what in c for c in cells(path)) if path.suffix == '.ipynb' else what in functions(path)
        assert found, f'{number}: {file} has no {what!r}'
    own = {what for _, file, what in rows if file == 'here'}
    assert own == {f for f in functions(Path(here)) if re.match(r'test_\d', f)}, 'the table does not name the tests of this file'
