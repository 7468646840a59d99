"Models on the Hugging Face Hub: what is pushed comes back, the card is true, a push that fails loses nothing"
import json, os, re, subprocess, sys
from pathlib import Path

import pytest
from fastcore.basics import AttrDict

from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB
from fastswa.checkpoint.hub import load_from_hub
from fastswa.core import quiet
from helpers import learner, net


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    "What came of pushing to a hub and loading from it, in a process of its own"
    home, here = tmp_path_factory.mktemp('home'), tmp_path_factory.mktemp('here')
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
    env |= dict(HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
    out = subprocess.run([sys.executable, Path(__file__).with_name('model_hub.py')], env=env, cwd=here,
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return AttrDict(json.loads(out.stdout.splitlines()[-1]))


FILES = ['README.md', 'ema.safetensors', 'fastswa.json', 'raw.safetensors', 'swa.safetensors']


def test_each_set_of_weights_comes_back(hub):
    "Bit for bit, with BatchNorm statistics that fit; wrong: the raw ones', or those of the average that was held"
    assert hub.url == '/me/toy' and hub.files == FILES and not hub.private and hub.hidden
    assert hub.by_default and hub.wrapped and hub.without_fastswa and hub.again
    assert hub.by_name == dict(raw=True, ema=True, swa=True)


def test_pushing_leaves_nothing_behind(hub):
    assert hub.held == 'swa' and not hub.left


def test_the_card_has_the_scores_of_the_weights_that_were_pushed(hub):
    "Not those of the last epoch, whose statistics came from a few batches"
    rows = {r[0].strip('*'): r for r in re.findall(r'\| (\S+) \| `\S+\.safetensors` .*\| (\S+) \|', hub.card)}
    assert {k: v[1] for k, v in rows.items()} == {k: f'{v:.4f}' for k, v in hub.scores.items()}
    assert rows['ema'][0] == '**ema**'
    for said in ("load_from_hub('me/toy', model)", "hf_hub_download('me/toy', 'ema.safetensors')", 'BatchNorm1d(8',
                 'Points in three classes.', '2 epochs, 20 optimizer steps', 'EMACB, SWACB, BNUpdateCB'):
        assert said in hub.card
    assert hub.card.startswith('---\nlibrary_name: fastswa\n')


def test_the_lines_of_the_card_are_code(hub):
    for block in re.findall('```python\n(.*?)```', hub.card, re.S):
        compile(block, 'card', 'exec')
        assert len(block.splitlines()) == 3


@pytest.mark.parametrize('case, kind, said', [
    ('not_logged_in', 'PermissionError', 'hf auth login'), ('wrong_token', 'PermissionError', '401'),
    ('forbidden', 'PermissionError', '403'), ('closed', 'ConnectionError', 'does not answer'),
    ('fault', 'RuntimeError', 'a fault of a callback')])
def test_a_push_that_fails_keeps_the_files(hub, case, kind, said):
    "In a folder that the error names, with the command that pushes them"
    found = hub[case]
    assert found['said'][0] == kind and said in found['said'][1]
    assert len(found['left']) == 1 and f' {found["left"][0]}`' in found['said'][1]
    assert found['files'] == [FILES] if case != 'fault' else {*FILES} - {'README.md'} == {*found['files'][0]}


def test_without_a_network(hub):
    "The client's own retries wait for 23 seconds. What was downloaded before, and files that are left, can be loaded"
    assert hub.closed['seconds'] < 15
    assert hub.from_folder and hub.from_cache
    assert hub.not_cached['said'][0] == 'ConnectionError' and 'not downloaded before' in hub.not_cached['said'][1]


@pytest.mark.parametrize('case, kind, said', [
    ('not_ours', 'FileNotFoundError', 'no fastswa.json in me/other'), ('unknown', 'FileNotFoundError', 'me/none'),
    ('weights', 'ValueError', "'emma'"), ('model', 'ValueError', "'ema' of me/toy is of another model")])
def test_what_cannot_be_loaded(hub, case, kind, said):
    assert hub[case]['said'][0] == kind and said in hub[case]['said'][1]
    assert hub.untouched


class FakeComparison:
    metric = 'accuracy'
    def summary(self):
        import pandas as pd
        nan = float('nan')
        rows = dict(raw=[5, 0.9, 0.01, nan, nan, nan, ''], ema=[5, 0.91, 0.005, 0.01, 0.004, 0.016, 'better than raw'])
        return pd.DataFrame.from_dict(rows, orient='index', columns='seeds mean sd difference low high verdict'.split())
    def about(self): return 'accuracy after 2 epochs, 5 seeds'


def test_intervals_of_several_seeds(monkeypatch, tmp_path):
    "Wrong: a card that gives one run's scores as if they told which average is better"
    from fastswa.checkpoint.hub import model_card, write_model
    learn = learner(EMACB(), BNUpdateCB())
    with quiet(): learn.fit(1)
    card = model_card(learn, 'me/toy', write_model(learn, tmp_path, 'ema'), 'ema', FakeComparison())
    assert '| ema | 5 | 0.9100 | 0.0050 | +0.0100 [+0.0040, +0.0160] | better than raw |' in card
    assert '| raw | 5 | 0.9000 | 0.0100 |  |  |' in card and '5 seeds' in card


@pytest.mark.parametrize('text, said', [('{', 'damaged'), ('{}', 'not of version 1'), ('[]', 'not of version 1')])
def test_a_damaged_folder(tmp_path, text, said):
    (tmp_path/'fastswa.json').write_text(text)
    with pytest.raises(ValueError, match=said): load_from_hub(tmp_path, net())


def test_bad_arguments(monkeypatch, tmp_path):
    "Before anything is written"
    monkeypatch.chdir(tmp_path)
    learn = learner(EMACB())
    for repo in ('toy', 'a/b/c', 'me/a b', ''):
        with pytest.raises(ValueError, match="'user/name'"): learn.push_to_hub(repo)
    with pytest.raises(ValueError, match='there are raw'): learn.push_to_hub('me/toy', 'ema')
    with pytest.raises(TypeError, match='compare'): learn.push_to_hub('me/toy', comparison={})
    assert not [*tmp_path.iterdir()]


def test_a_model_that_holds_an_average_gets_what_it_loads(tmp_path):
    "Wrong: its raw weights come back later and replace what was loaded"
    from fastswa.averaging import held_weights, restore_raw
    from fastswa.checkpoint.hub import write_model
    learn = learner(EMACB(apply=False))
    with quiet(): learn.fit(1)
    write_model(learn, tmp_path, 'ema')
    learn.apply('ema')
    before = learn.averages.weights('ema')['0.weight'].clone()
    load_from_hub(tmp_path, learn.model)
    assert held_weights(learn.model) == 'raw'
    restore_raw(learn.model)
    assert (learn.model[0].weight == before).all()
