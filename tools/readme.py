"Writes README.md from nbs/index.ipynb: text as it is, code in fences with what it printed, `#| hide` cells left out."
import json, re
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def fence(text, lang=''): return f'```{lang}\n{text.strip()}\n```'

def printed(output):
    "The text of a cell's `output`, '' for pictures: those belong in nbs/images"
    return ''.join(output.get('text') or output.get('data', {}).get('text/plain', ''))

def in_order(outputs):
    "Displays first: without a browser prints are saved before displays, but a table stands above the line below it"
    return sorted(outputs, key=lambda o: ('display_data', 'stream', 'execute_result', 'error').index(o['output_type']))

def cell_md(cell):
    "The Markdown of one notebook cell; '' if it is hidden or empty"
    src = ''.join(cell['source'])
    hidden = re.search(r'^#\|\s*hide\b', src, re.M)
    src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
    if hidden or not src: return ''
    if cell['cell_type'] == 'code':
        out = '\n'.join(printed(o).strip('\n') for o in in_order(cell['outputs']))
        return '\n\n'.join([fence(src, 'python')] + ([fence(out)] if out.strip() else []))
    return re.sub(r'(\]\(|src=")(?!\w+:|#|/)', r'\1nbs/', src).replace('nbs/../', '')  # links start at the root

def render(nb=root/'nbs'/'index.ipynb'):
    "The README that belongs to notebook `nb`"
    cells = json.loads(Path(nb).read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(filter(None, map(cell_md, cells))) + '\n'

if __name__ == '__main__': (root/'README.md').write_text(render(), encoding='utf-8')
