"Gives the index and the studies a link that opens them in Colab, and a cell that installs fastswa there."
import json, re
from pathlib import Path

root = Path(__file__).resolve().parents[1]
repository = re.search('^Repository = "(.*)"', (root/'pyproject.toml').read_text(encoding='utf-8'), re.M)[1]

INSTALL = f'''#| hide
import importlib.util, subprocess, sys
if importlib.util.find_spec('fastswa') is None:      # in Colab, say
    package = 'fastswa[compare] @ git+{repository}'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', package], check=True)'''

def notebooks():
    "Paths from the root of the repository"
    studies = sorted(o.name for o in (root/'nbs'/'experiments').glob('[!.]*.ipynb'))
    return ['nbs/index.ipynb', *(f'nbs/experiments/{o}' for o in studies)]

def link(path):
    place = repository.replace('github.com', 'colab.research.google.com/github')
    return f'[Open in Colab]({place}/blob/main/{path})'

def lines(text): return text.splitlines(keepends=True)

def give(path):
    "Put link and cell into a notebook that has none; the first cell is its title and a summary behind `>`"
    file = root/path
    nb = json.loads(file.read_text(encoding='utf-8'))
    cells = nb['cells']
    title = ''.join(cells[0]['source'])
    if link(path) not in title:
        head, rest = re.match(r'(# .*\n\n>.*)((?s:.*))', title).groups()
        cells[0]['source'] = lines(f'{head}\n\n{link(path)}{rest}')
    first = next(i for i, c in enumerate(cells) if c['cell_type'] == 'code')
    if ''.join(cells[first]['source']) != INSTALL:
        cells.insert(first, dict(cell_type='code', execution_count=None, id='c01ab000', metadata={}, outputs=[],
                                 source=lines(INSTALL)))
    file.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')

if __name__ == '__main__':
    for path in notebooks(): give(path)
