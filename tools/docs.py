"""Builds the site in _docs/html from the notebooks and the pages in nbs/guides, without a network: `make docs`.

Below an exported cell stand the signature, docstring and parameters of what it defines, its source folded. Sphinx makes
HTML of the pages; `*.html.md`, `llms.txt` and `llms-full.txt` hold the same as plain text."""
import ast, functools, importlib, inspect, os, re, shutil, sys
from unittest.mock import patch

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from fastcore.docments import docments
from fastcore.nbio import mk_cell, read_nb, write_nb
from PIL import Image
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock

from pages import LINK, REPO, link, pages, problems, root
from readme import fence, in_order, printed

base = root/'_docs'
work, out = base/'source', base/'html'
GUIDES = ['start', 'averaging', 'recipes', 'callbacks', 'learner', 'init', 'promises', 'coming_from', 'loops',
          'cluster', 'benchmarks']
STUDIES = ['weight_averaging', 'bench_averages', 'anytime', 'inside_averages', 'posthoc', 'records', 'initializing',
           'ktorch_mnist']
HOUSE = ['averaging', 'callbacks', 'training', 'nets', 'data', 'checkpoint', 'integrations', 'compare']
CONF = dict(project='fastswa', html_title='fastswa', extensions=['myst_nb', 'sphinx_copybutton', 'docs'],
            html_theme='furo', html_static_path=[str(root/'tools'/'docs.css')], html_css_files=['docs.css'],
            html_favicon='favicon.svg', html_math_renderer='mathml', html_show_sphinx=False, html_copy_source=False,
            nb_execution_mode='off', nb_ipywidgets_js={}, nb_merge_streams=True, nb_code_prompt_show='Source',
            nb_code_prompt_hide='Source', myst_enable_extensions=['dollarmath'], myst_heading_anchors=4,
            html_show_copyright=False, add_module_names=False, toc_object_entries_show_parents='hide',
            suppress_warnings=['misc.highlighting_failure'])

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" fill="none" stroke-width="3">
<path d="M2 8l5 16 5-14 5 12 5-9 5 6 3-4" stroke="#999"/><path d="M2 8c6 9 14 8 28 7" stroke="#0072B2"/></svg>"""

# --- what a module defines

documented = {}       # name → full name of everything that a page describes

def value(v):
    "A default as one writes it"
    if isinstance(v, functools.partial): return f'partial({value(v.func)}, …)'
    return getattr(v, '__name__', None) or repr(v)

class Shown(str): __repr__ = str.__str__

def short(annotation):
    "An annotation without the modules that its names come from"
    if annotation is inspect.Parameter.empty: return ''
    return re.sub(r'\b([a-z_]\w*\.)+', '', inspect.formatannotation(annotation))

def params_of(obj):
    try: return [p for p in inspect.signature(obj).parameters.values() if p.name != 'self']
    except (TypeError, ValueError): return []

def signature(obj):
    "The call, as in `ema(decay=None, half_life=None, warmup=None)`"
    params = [p.replace(annotation=p.empty, default=p.default if p.default is p.empty else Shown(value(p.default)))
              for p in params_of(obj)]
    return str(inspect.Signature(params))

def table(obj):
    "The parameters that are described, as a Markdown table; '' if none is"
    try: about = docments(obj)
    except (TypeError, ValueError, AttributeError): return ''
    def row(p):
        cells = [p.name, short(p.annotation), '' if p.default is p.empty else value(p.default)]
        cells = [f'`{o}`' if o else '' for o in cells] + [' '.join((about.get(p.name) or '').split())]
        return '| ' + ' | '.join(o.replace('|', r'\|') for o in cells) + ' |'
    rows = [row(p) for p in params_of(obj) if about.get(p.name)]
    return '\n'.join(['| parameter | type | default | meaning |', '| --- | --- | --- | --- |', *rows]) if rows else ''

def source_url(obj):
    try: line = inspect.getsourcelines(inspect.unwrap(obj))[1]
    except (TypeError, OSError): return ''
    return f'[on GitHub]({REPO}{inspect.getmodule(inspect.unwrap(obj)).__name__.replace(".", "/")}.py#L{line})'

def members(obj):
    "The public methods and properties of a class that have a docstring"
    for n, o in vars(obj).items() if inspect.isclass(obj) else ():
        doc = inspect.getdoc(o.fget if isinstance(o, property) else getattr(obj, n))
        if n[0] != '_' and doc and (callable(getattr(obj, n)) or isinstance(o, property)): yield n, o

def symbol(name, obj, kind):
    "What the site, and what the plain text, says of a function, class, method or property"
    sig = '' if kind == 'property' else signature(obj)
    doc = inspect.getdoc(obj) or ''
    body = '\n\n'.join(filter(None, [doc, table(obj)]))
    module = '.'.join(inspect.getmodule(inspect.unwrap(getattr(obj, 'fget', obj))).__name__.split('.'))
    documented[name] = f'{module}.{name}'
    html = f'````{{py:{kind}}} {name}{sig}\n:module: {module}\n\n{body}\n\n{source_url(obj)}\n````'
    return html, f'### `{name}{sig}`\n\n{body}'

def described(cell, module):
    "Cells that describe what an exported cell defines"
    for node in ast.parse(cell.source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name[0] == '_': continue
        obj = getattr(module, node.name)
        texts = [symbol(node.name, obj, 'class' if inspect.isclass(obj) else 'function')]
        for n, o in members(obj):
            texts.append(symbol(f'{node.name}.{n}', o if isinstance(o, property) else getattr(obj, n),
                                'property' if isinstance(o, property) else 'method'))
        for html, plain in texts: yield mk_cell(html, 'markdown', metadata=dict(plain=plain))

# --- pages

def directives(source): return dict(re.findall(r'^#\| *(\w+):? *(.*)$', source, re.M))

def module_of(name):
    "A module of the library, also where what it adapts to is not installed"
    try: return importlib.import_module(f'fastswa.{name}')
    except ImportError:
        with mock([name.split('.')[-1]]), patch('importlib.metadata.version', return_value='99'):
            return importlib.import_module(f'fastswa.{name}')

def cells_of(file):
    "The cells of a page as the site shows them"
    if file.suffix == '.md':
        yield mk_cell(file.read_text(encoding='utf-8'), 'markdown')
        return
    module = None
    for cell in read_nb(file).cells:
        has, cell.source = directives(cell.source), re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if 'default_exp' in has: module = module_of(has['default_exp'])
        if not cell.source or {'hide', 'default_exp'} & {*has}: continue
        if cell.cell_type == 'code':
            exported = {'export', 'exporti', 'exports'} & {*has}
            if exported and not re.search(r'^(def|class|@|\w+ *=)', cell.source, re.M): continue      # only imports
            if 'export' in exported: yield from described(cell, module)
            tags = ['hide-input'] if exported else ['remove-input'] if has.get('echo') == 'false' else []
            cell.metadata,cell.outputs = dict(tags=tags),[o for o in in_order(cell.outputs) if not is_bar(o)]
        yield cell

def is_bar(output): return output.get('name') == 'stderr' and '%|' in ''.join(output['text'])

def linked(file, md):
    "Markdown with its links as the site has them"
    return LINK.sub(lambda m: m[1] + re.sub(rf'^{REPO}nbs(/images/)', r'\1', link(file, m[2])), md)

def crossed(md):
    "Markdown in which the library's names in backticks lead to what is said of them"
    def to(m):
        full = documented.get(re.sub(r'\(.*', '', m[2]))
        return f'{m[1]}{{py:obj}}`{m[2]} <{full}>`' if full else m[0]
    parts = re.split(r'(^#.*$|^[ \t]*(?:`{3,}|~{3,})(?:.|\n)*?^[ \t]*(?:`{3,}|~{3,})|\[[^\]]*\]\()', md, flags=re.M)
    return ''.join(p if i % 2 else re.sub(r'(^|[^`}])`([A-Za-z_][\w.]*(?:\([^`<>\\]*\))?)`(?!`)', to, p)
                   for i, p in enumerate(parts))

def plain(cells):
    "The cells of a page as Markdown without pictures and folded source"
    for o in cells:
        if o.cell_type == 'markdown': yield o.metadata.get('plain', o.source)
        elif 'hide-input' not in o.metadata.get('tags', ()):
            if 'remove-input' not in o.metadata.get('tags', ()): yield fence(o.source, 'python')
            text = '\n'.join(printed(p).strip('\n') for p in o.outputs)
            if text.strip(): yield fence(text)

def write_page(name, file, cells):
    "Put a page into the folder that Sphinx reads, and its text beside the site's"
    for o in cells:
        if o.cell_type == 'markdown': o.source = linked(file, o.source)
    here = os.path.dirname(name)
    text = re.sub(r'\]\(/([^)\s]+?)\.(?:ipynb|md)', lambda m: f'](' + os.path.relpath(m[1], here or '.') + '.html.md',
                  '\n\n'.join(plain(cells)))
    write(out/f'{name}.html.md', text + '\n')
    for o in cells:
        if o.cell_type == 'markdown': o.source = crossed(o.source)
    to = work/f'{name}{file.suffix}'
    if file.suffix == '.md': write(to, cells[0].source)
    else:
        nb = read_nb(file)
        nb.cells,nb.metadata.language_info = cells,dict(name='python', pygments_lexer='python')
        to.parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, to)

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def heading(name):
    "The title of a page and the sentence below it"
    text = (out/f'{name}.html.md').read_text(encoding='utf-8')
    return re.search(r'^# (.*)', text, re.M)[1], (re.search(r'^> (.*)', text, re.M) or ['', ''])[1]

def api_page():
    "Every public name, where it is described, and in one line what it is"
    yield '# API\n\n> Every public name, by package\n\n`from fastswa.all import *` brings all of them into a notebook.'
    for package in [o for o in HOUSE if o != 'integrations']:
        module = importlib.import_module(f'fastswa.{package}')
        yield f'## fastswa.{package}\n\n| name | |\n| --- | --- |\n' + '\n'.join(
            f'| `{n}` | {(inspect.getdoc(getattr(module, n)) or "").splitlines()[0].replace("|", chr(92) + "|")} |'
            for n in sorted(module.__all__, key=str.lower) if inspect.getdoc(getattr(module, n)))

def sections():
    "Heading → names of pages, in the order of the side bar"
    have = [n for n in pages() if n != 'index']
    def below(folder, first=()):
        names = [n for n in have if n.startswith(folder + '/')]
        return sorted(names, key=lambda n: [*first, n.split('/')[1]].index(n.split('/')[1]))
    res = {'Guides': below('guides', GUIDES), 'Studies': below('experiments', STUDIES), 'Reference': ['api']}
    others = {n.split('/')[0] for n in have if '/' in n} - {'guides', 'experiments', *HOUSE}
    res |= {f'fastswa.{o}': below(o) for o in [*HOUSE, *sorted(others)]}
    return res | {'Foundations': [n for n in have if '/' not in n and n not in ('contributing', 'changelog')],
                  'Project': ['contributing', 'changelog']}

def write_llms(parts):
    "llms.txt lists the pages; llms-full.txt holds all but the studies"
    lines = ['# fastswa', '> ' + heading('index')[1], 'How to do what: guides/recipes.html.md. Every public '
             'name: api.html.md. All pages but the studies in one file: llms-full.txt.']
    for part, names in parts.items():
        listed = ['- [{1}]({0}.html.md): {2}'.format(n, *heading(n)) for n in names]
        lines.append(f'## {part}\n\n' + '\n'.join(listed))
    write(out/'llms.txt', '\n\n'.join(lines) + '\n')
    names = ['index'] + [n for part, names in parts.items() if part not in ('Studies', 'Project') for n in names]
    pages = [f'<!-- page: {n}.html.md -->\n\n' + (out/f'{n}.html.md').read_text(encoding='utf-8') for n in names]
    write(out/'llms-full.txt', '\n\n'.join(pages))

def mathml(self, node, block=False):
    tex = node.astext()
    unknown = {r'\\frac(\d)(\d)': r'\\frac{\1}{\2}', r'\\dots': r'\\ldots', r'\\[Bb]ig+[lr]?(?![a-z])': ''}
    for k, v in unknown.items(): tex = re.sub(k, v, tex)
    self.body.append(tex2mathml(tex, as_block=block))
    raise nodes.SkipNode

def setup(app):
    "Formulas as MathML, which browsers show without a script"
    app.add_html_math_renderer('mathml', (mathml, None), (functools.partial(mathml, block=True), None))

def shrink(png):
    "A picture in 256 colours on white: a third of the bytes, and nobody sees it"
    im = Image.open(png).convert('RGBA')
    white = Image.new('RGBA', im.size, 'white')
    white.alpha_composite(im)
    white.convert('RGB').quantize(256, dither=Image.Dither.NONE).save(png, optimize=True)

def main():
    if found := problems(): sys.exit('\n'.join(found))
    shutil.rmtree(base, ignore_errors=True)
    cells = {name: [*cells_of(file)] for name, file in pages().items()}
    for name, file in pages().items(): write_page(name, file, cells[name])
    write(out/'api.html.md', '\n\n'.join(api_page()))
    write(work/'api.md', crossed('\n\n'.join(api_page())))
    shutil.copytree(root/'nbs'/'images', work/'images')
    write(work/'favicon.svg', ICON)
    parts = sections()
    write_llms(parts)
    nb = read_nb(work/'index.ipynb')
    for k, names in parts.items():
        toc = ['```{toctree}', ':hidden:', f':caption: {k}', '', *names, '```']
        if names: nb.cells.append(mk_cell('\n'.join(toc), 'markdown'))
    write_nb(nb, work/'index.ipynb')
    app = Sphinx(work, None, out, base/'doctrees', 'html', CONF, status=None, warningiserror=True)
    app.build()
    for o in (out/'_images').glob('*.png'): shrink(o)
    sys.exit(app.statuscode)

if __name__ == '__main__': main()
