"The pages of the site: titles, links and names are right, and their code runs"
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
import bench_page
import pages

MARKDOWN = {k: v for k, v in pages.pages().items() if v.suffix == '.md' and k.startswith('guides/')}

def test_every_page_has_a_title_links_that_lead_somewhere_and_names_that_exist(): assert pages.problems() == []

@pytest.mark.parametrize('name', MARKDOWN)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(MARKDOWN[name])

def wrong(tmp_path, monkeypatch, text):
    "What `problems` says of a page of this text"
    page = tmp_path/'page.md'
    page.write_text(text)
    monkeypatch.setattr(pages, 'root', tmp_path)
    return pages.page_problems(page)

@pytest.mark.parametrize('text, want', {
    'no title\n': 'page.md:1: no title',
    '# T\n\nSee [there](gone.md).\n': 'page.md:3: the link gone.md leads nowhere',
    '# T\n\nSee [there](https://github.com/fastswa/fastswa/blob/main/gone.py).\n': 'page.md:3: the link https',
    '# T\n\n\n`EMACBB(0.9)` is new.\n': 'page.md:4: unknown name `EMACBB(0.9)`',
    '# T\n\n`learn.no_such_thing`\n': 'page.md:3: unknown name `learn.no_such_thing`'}.items())
def test_what_is_wrong_is_named_with_file_and_line(text, want, tmp_path, monkeypatch):
    pages.known_names()                        # before there is another root
    found, = wrong(tmp_path, monkeypatch, text)
    assert found.startswith(want)

def test_what_is_right_is_left_alone(tmp_path, monkeypatch):
    pages.known_names()
    text = ('# T\n\n`EMACB()` and `torch.optim.SGD` and `--out` in [torch](https://pytorch.org), `mine`:\n\n'
            '```python\nmine = 1\n```\n\n```q\nnot[a](link.md) and `noname`\n```\n')
    assert wrong(tmp_path, monkeypatch, text) == []

def test_an_error_in_code_names_page_and_line(tmp_path):
    "Blocks share a namespace; those for elsewhere are not run"
    page = tmp_path/'page.md'
    page.write_text('# T\n\n```python\na = 1\n```\n\n```python elsewhere\nimport q\n```\n\n'
                    '```python\na += 1\na/0\n```\n')
    with pytest.raises(ZeroDivisionError) as e: pages.run(page)
    assert (e.traceback[-1].path, e.traceback[-1].lineno + 1) == (page, 13)

def test_the_page_of_benchmarks_holds_every_table_and_says_which_are_missing(tmp_path):
    "Wrong: a table that was measured anew, and a page that shows the old one; a table that is not there, in silence"
    assert bench_page.target.read_text(encoding='utf-8') == bench_page.page(), 'run `python tools/bench_page.py`'
    (tmp_path/'gpu.md').write_text('NVIDIA H100, 15 rounds.\n\n| | µs |\n| --- | --: |\n| ours | 1.0 |\n')
    text = bench_page.page(tmp_path)
    assert '## On a GPU\n\nNVIDIA H100, 15 rounds.\n\n| | µs |' in text
    assert '- A checkpoint: `make bench`.' in text and 'On a GPU:' not in text
