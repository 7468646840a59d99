"The worked examples in CONTRIBUTING: their code runs as it stands there, in the notebooks that they name"
import json, re, sys, textwrap, types
from inspect import signature
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
text = (root/'CONTRIBUTING.md').read_text(encoding='utf-8')


def blocks(head):
    "The blocks of Python below a heading"
    section = re.split('^## ', text, flags=re.M)
    section = next(o for o in section if o.startswith(f'{head}\n'))
    return [textwrap.dedent(o) for o in re.findall(r'^ *```python\n(.*?)^ *```', section, re.S | re.M)]


def run_in(notebook, wanted, code):
    "Run code after those cells of a notebook that hold imports or one of the wanted texts"
    cells = json.loads((root/'nbs'/notebook).read_text(encoding='utf-8'))['cells']
    known = dict(__name__='__main__')
    for c in cells:
        source = ''.join(c['source'])
        imports = re.search('^(import|from) ', source, re.M) and not re.search('^(def|class|[a-z]+ =)', source, re.M)
        if c['cell_type'] == 'code' and (imports or any(o in source for o in wanted)): exec(source, known)
    for block in code: exec(block, known)
    return known


def test_add_a_rule():
    rule = run_in('averaging/00_rules.ipynb', ['#| export', 'def shares'], blocks('Add a rule'))['ramp']()
    assert [rule(n) for n in range(3)] == [1, 2/3, 1/2]      # the first is copied


def test_add_a_callback():
    known = run_in('callbacks/00_basics.ipynb', ['def linear'], blocks('Add a callback'))
    assert known['cb'].norms


def test_add_a_benchmark(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(root/'benchmarks'))
    monkeypatch.setattr(sys, 'argv', ['export.py', '--rounds', '1', '--width', '20'])
    code, = blocks('Add a benchmark')
    known = dict(__name__='export', __doc__=re.match('"""(.*?)"""', code, re.S)[1])
    exec(code, known)
    known['main']()
    assert '| export | ' in capsys.readouterr().out


def test_add_an_adapter(monkeypatch):
    "With an Ignite of a few lines: the one that is installed is for those who follow the text"
    class Engine:
        def __init__(self, process): self.process, self.handlers = process, []
        def add_event_handler(self, event, f): self.handlers.append((event, f))
        def fire(self, event):
            for at, f in self.handlers:
                if at == event: f(*[self][:len(signature(f).parameters)])
        def run(self, data, max_epochs):
            self.state = types.SimpleNamespace(dataloader=data, epoch_length=len(data), max_epochs=max_epochs)
            self.fire('STARTED')
            for _ in range(max_epochs):
                for batch in data:
                    self.process(self, batch)
                    self.fire('ITERATION_COMPLETED')
                self.fire('EPOCH_COMPLETED')
            self.fire('COMPLETED')
    names = 'STARTED', 'ITERATION_COMPLETED', 'EPOCH_COMPLETED', 'COMPLETED'
    engine = types.ModuleType('ignite.engine')
    engine.Engine, engine.Events = Engine, types.SimpleNamespace(**{o: o for o in names})
    monkeypatch.setitem(sys.modules, 'ignite', types.ModuleType('ignite'))
    monkeypatch.setitem(sys.modules, 'ignite.engine', engine)
    known = {}
    for block in blocks('Add an adapter'): exec(block, known)
    assert known['handler'].averages.held == 'swa' and known['handler'].averages['swa'].n == 9


@pytest.mark.parametrize('head', ['rule', 'callback', 'benchmark'])
def test_lines_are_short_enough_to_be_copied(head):
    assert [o for block in blocks(f'Add a {head}') for o in block.splitlines() if len(o) > 120] == []
