"""The pages of the site: which they are, where their links lead, what is wrong with them, and their code, to be run.

`problems()` lists what is wrong as `file:line: what`: a page without a title, a link that leads nowhere, a name in
backticks that does not exist. `run(file)` executes the Python of a Markdown page; a block that begins with
```` ```python elsewhere ```` needs another machine or library, and is not run."""
import ast, builtins, importlib, json, re, sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

root = Path(__file__).resolve().parents[1]
REPO, SITE = 'https://github.com/fastswa/fastswa/blob/main/', 'https://fastswa.github.io/fastswa/'

# --- which pages there are

def page_name(file):
    "`averaging/rules` for nbs/averaging/00_rules.ipynb"
    if file.parent == root: return file.stem.lower()
    return re.sub(r'(^|/)\d+_', r'\1', file.relative_to(root/'nbs').with_suffix('').as_posix())

@cache
def pages():
    "Name → file of every page: the notebooks, nbs/guides/*.md, CONTRIBUTING and CHANGELOG"
    files = [*(root/'nbs').rglob('*.ipynb'), *(root/'nbs'/'guides').glob('*.md')]
    files = [o for o in files if not any(p[0] in '._' for p in o.relative_to(root).parts)]
    return {page_name(o): o for o in [*sorted(files), root/'CONTRIBUTING.md', root/'CHANGELOG.md']}

def read(file):
    "The Markdown and the code of a page"
    text = file.read_text(encoding='utf-8')
    if file.suffix == '.md': return text, '\n'.join(code for _, code in blocks(text, 'python(?: elsewhere)?'))
    cells = [(o['cell_type'], ''.join(o['source'])) for o in json.loads(text)['cells']]
    return tuple('\n\n'.join(s for k, s in cells if k == kind) for kind in ('markdown', 'code'))

# --- links

def link(file, target):
    "Where a link in `file` leads on the site, '/page' or a URL; None if nowhere"
    to,_,anchor = target.partition('#')
    anchor = anchor and f'#{anchor}'
    if to.startswith(SITE):
        name = to.removeprefix(SITE).removesuffix('.html') or 'index'
        to = pages()[name].relative_to(root).as_posix() if name in pages() else name
        file = root/'README.md'
    elif to.startswith(REPO): file,to = root/'README.md',to.removeprefix(REPO)
    elif not to or re.match(r'\w+:', to): return target
    path = (file.parent/unquote(to)).resolve()
    if path in pages().values() or path == root/'nbs'/'api.md': return f'/{page_name(path)}{path.suffix}{anchor}'
    if not path.exists(): return
    return REPO + path.relative_to(root).as_posix() + anchor

LINK = re.compile(r'(\]\(\s*<?|(?:src|href)=")([^)\s>"]+)')

def prose(text):
    "Markdown without its blocks of code"
    return re.sub(r'^([ \t]*)(`{3,}|~{3,}).*?^\1\2`*', '', text, flags=re.S | re.M)

# --- names

def identifiers(code):
    "The names in some Python: of definitions, variables, arguments, attributes, and words of its short strings"
    for o in ast.walk(ast.parse(code)):
        for k in ('name', 'id', 'attr', 'arg', 'asname', 'module'):
            if isinstance(v := getattr(o, k, None), str): yield from v.split('.')
        if isinstance(o, ast.Constant) and isinstance(o.value, str) and len(o.value) < 60:
            yield from re.findall(r'\w+', o.value)

@cache
def known_names():
    "What prose may name: the library and its tests, PyTorch, NumPy, Python, files, and the words in tools/words.txt"
    import torch, torch.distributed.checkpoint, torch.distributed.fsdp, torch.optim.swa_utils, torch.utils.data
    wanted = r'torch(\.(nn|optim|amp|utils\.data|distributed).*)?$'
    modules = [v for k, v in [*sys.modules.items()] if re.match(wanted, k)]
    names = {n for m in [*modules, builtins, importlib.import_module('numpy')] for n in dir(m)}
    names |= {n for c in (torch.Tensor, torch.nn.Module, torch.optim.Optimizer, torch.Generator, str, list, dict, Path)
              for n in dir(c)} | set(sys.stdlib_module_names)
    files = [o for d in ('fastswa', 'tests', 'benchmarks', 'examples', 'tools') for o in (root/d).rglob('*.py')]
    for o in files:
        if o.name != 'test_docs.py': names |= {*identifiers(o.read_text(encoding='utf-8'))}
    names |= {w for o in [*files, *pages().values()] for p in o.relative_to(root).parts for w in re.findall(r'\w+', p)}
    names |= {re.sub(r'^\d+_', '', o.stem) for o in pages().values()}
    for o in ('settings.ini', 'pyproject.toml', 'tools/words.txt'): names |= {*re.findall(r'\w+', (root/o).read_text())}
    return names

def unknown_names(text, code):
    "Names and calls in backticks that neither `known_names` nor the page's own code has"
    spans = re.findall(r'(?<!`)`([^`\n]+)`(?!`)', prose(text))
    matches = [re.fullmatch(r'((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)(\(.*\))?', s) for s in dict.fromkeys(spans)]
    known = known_names() | {*re.findall(r'\w+', code)}
    return [m[0] for m in matches if m and not {*m[1].split('.')} <= known]

# --- what is wrong

def line_of(file, text):
    "The line of `file` in which `text` stands; in a notebook, as JSON writes it"
    if file.suffix == '.ipynb': text = json.dumps(text, ensure_ascii=False)[1:-1]
    lines = file.read_text(encoding='utf-8').splitlines()
    return next((i for i, l in enumerate(lines, 1) if text in l), 1)

def page_problems(file):
    text,code = read(file)
    found = [] if re.match(r'\s*# \S', text) else [('', 'no title: the page has to begin with `# `')]
    targets = [t for _, t in LINK.findall(re.sub(r'`[^`\n]*`', '', prose(text)))]
    found += [(t, f'the link {t} leads nowhere') for t in targets if link(file, t) is None]
    if file.suffix == '.ipynb':
        found += [(code.splitlines()[0], 'no test runs this: make it a cell, or ```python elsewhere')
                  for _, code in blocks(text)]
    if file.name != 'CHANGELOG.md':                       # which may name what is gone
        found += [(f'`{s}`', f'unknown name `{s}`') for s in unknown_names(text, code)]
    return [f'{file.relative_to(root)}:{line_of(file, at)}: {what}' for at, what in found]

def problems(): return [o for file in pages().values() for o in page_problems(file)]

# --- the code of Markdown pages

def blocks(text, info='python'):
    "Line number and code of each block of Python that is to be run"
    for m in re.finditer(rf'^( *)```{info}[ \t]*\n(.*?)^\1```', text, re.S | re.M):
        yield text[:m.start(2)].count('\n') + 1, re.sub(f'^{m[1]}', '', m[2], flags=re.M)

def run(file, env=None):
    "Execute the Python of a Markdown page in order, in one namespace; a traceback names the page and the line"
    env = {'__name__': '__main__'} if env is None else env
    for line, code in blocks(file.read_text(encoding='utf-8')):
        exec(compile('\n'*(line - 1) + code, str(file), 'exec'), env)
    return env

if __name__ == '__main__':
    found = problems()
    print(*found, sep='\n')
    sys.exit(bool(found))
