"What people install: what the packages need and hold, how they are cited, where notebooks open, types"
import json, re, runpy
from configparser import ConfigParser
from pathlib import Path

import yaml

root = Path(__file__).resolve().parents[1]
ini = ConfigParser(interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
REPOSITORY = re.search('^Repository = "(.*)"', (root/'pyproject.toml').read_text(encoding='utf-8'), re.M)[1]


def requirements(lines): return {re.match(r'[\w-]+', o)[0]: re.sub(r'^[\w-]+\s*', '', o) for o in lines}


def test_the_conda_recipe_needs_what_the_wheel_needs():
    "Wrong: a bound that was raised in settings.ini only"
    text = (root/'conda'/'meta.yaml').read_text(encoding='utf-8')
    pattern = re.search(r"regex_pattern='(.*?)'", text)[1]
    version = re.search(pattern, (root/'settings.ini').read_text(encoding='utf-8'))[1]
    assert version == cfg['version']      # what the recipe reads is the version and no other line
    text = re.sub(r'^\{%.*%\}$', '', text, flags=re.M)
    recipe = yaml.safe_load(re.sub(r'\{\{ *(\w+) *\}\}', r'\1', text))
    ours = requirements(cfg['requirements'].split())
    conda = {'torch': 'pytorch', 'matplotlib': 'matplotlib-base'}      # their names there
    ours = {conda.get(k, k): v for k, v in ours.items()} | dict(python='>=' + cfg['min_python'])
    assert requirements(recipe['requirements']['run']) == ours
    assert [o.replace(' ', '') for o in recipe['build']['entry_points']] == cfg['console_scripts'].split()
    assert recipe['about']['home'] == REPOSITORY and recipe['about']['license'] == cfg['license']


def test_every_extra_says_what_it_is_for():
    "In settings.ini, and in CONTRIBUTING for those who look there"
    lines = (root/'settings.ini').read_text(encoding='utf-8').splitlines()
    extras = [o.split('_requirements')[0] for o in lines if re.match(r'\w+_requirements', o)]
    text = (root/'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert [o for o in extras if f'`{o}`' not in text] == []


def test_citation():
    cff = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert cff['repository-code'] == REPOSITORY and cff['license'] == cfg['license']
    assert cff['authors'] == [dict(name=cfg['author'])]


def test_notebooks_that_are_read_open_in_colab():
    "Wrong: a link to another notebook, or one that opens where fastswa is missing"
    colab = runpy.run_path(str(root/'tools'/'colab.py'))
    for path in colab['notebooks']():
        cells = json.loads((root/path).read_text(encoding='utf-8'))['cells']
        code = next(c for c in cells if c['cell_type'] == 'code')
        assert colab['link'](path) in ''.join(cells[0]['source']).splitlines(), 'run `python tools/colab.py`'
        assert ''.join(code['source']) == colab['INSTALL'], 'run `python tools/colab.py`'


def test_typed():
    "Wrong: type checkers that take everything for Any; a client for `make types` that uses names that are gone"
    import typed_client
    assert typed_client.learner
    assert (root/'fastswa'/'py.typed').exists() and 'py.typed' in (root/'setup.py').read_text(encoding='utf-8')
