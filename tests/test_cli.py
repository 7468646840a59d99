"The `fastswa` command: what it prints, writes and refuses"
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastswa.data.sources
from fastswa.cli import main
from fastswa.data.loaders import DataLoaders
from fastswa.data.sources import toy_images

FASTSWA = Path(sys.executable).with_name('fastswa')
FILES = ['curves.png', 'history.csv', 'weights.safetensors']


@pytest.fixture(autouse=True)
def small_toy(monkeypatch):
    "`--data toy` is 640 images here"
    monkeypatch.setattr(fastswa.data.sources, 'toy_images', lambda: toy_images(640, 256))


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'demo'
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fastswa.data.sources, 'toy_images', lambda: toy_images(640, 256))
        assert main(f'train --data toy --epochs 4 --bs 64 --device cpu --out {out}'.split()) == 0
    return out


def test_files(demo):
    assert sorted(p.name for p in demo.iterdir()) == FILES          # and no temporary ones
    rows = list(csv.DictReader(open(demo/'history.csv')))
    assert list(rows[0]) == ['accuracy', 'loss', 'epoch', 'train', 'weights']
    assert [r['weights'] for r in rows if r['epoch'] == '3' and r['train'] == 'eval'] == ['raw', 'swa', 'ema']
    with open(demo/'curves.png', 'rb') as f: assert f.read(8) == b'\x89PNG\r\n\x1a\n'
    with safe_open(demo/'weights.safetensors', 'pt') as f: assert '"lr": 0.2' in f.metadata()['settings']


def test_weights_are_those_of_the_table(demo):
    "Averaged weights saved with the BatchNorm statistics of the raw ones would score otherwise"
    from torch import nn
    from fastswa.nets.layers import act_gr, get_model
    saved, rows = load_file(demo/'weights.safetensors'), list(csv.DictReader(open(demo/'history.csv')))
    last = {r['weights']: float(r['accuracy']) for r in rows if r['train'] == 'eval' and r['epoch'] == '3'}
    dd = toy_images(640, 256)
    dls = DataLoaders.in_memory(dd, 64, device='cpu')
    x, y = dls.valid.dataset.tensors
    xs = dls.train.dataset.tensors[0].float()/255
    x = (x.float()/255 - xs.mean())/xs.std()
    for name, accuracy in last.items():
        model = get_model(act_gr, norm=nn.BatchNorm2d).cpu()
        model.load_state_dict({k.removeprefix(f'{name}/'): v for k, v in saved.items() if k.startswith(f'{name}/')})
        with torch.no_grad(): right = (model.eval()(x).argmax(1) == y).float().mean().item()
        # 640 images: all batches are in both
        assert right == pytest.approx(accuracy, abs=1e-6 if name == 'raw' else 0.02)


def test_same_seed_same_run(demo, tmp_path):
    assert main(f'train --data toy --epochs 4 --bs 64 --device cpu --out {tmp_path}'.split()) == 0
    assert (tmp_path/'history.csv').read_text() == (demo/'history.csv').read_text()


@pytest.mark.parametrize('options', [
    '--averages none', '--averages ema --sched onecycle', '--init lsuv --momentum 0', '--init default'])
def test_options(options, tmp_path, capsys):
    assert main(['train', *f'--data toy --epochs 1 --bs 64 --out {tmp_path} {options}'.split()]) == 0
    assert 'weights  accuracy' in capsys.readouterr().out


@pytest.mark.parametrize('options, says', [
    ('--data nonesuch', 'fashion_mnist, mnist, toy'), ('--epochs -1', '1 or more; got -1'), ('--epochs two', "'two'"),
    ('--lr 0', 'above 0'), ('--lr nan', 'above 0'), ('--sched cosine', "'constant' or 'onecycle'; got 'cosine'"),
    ('--averages swa,sma', "'swa', 'ema', 'swa,ema', 'ema,swa' or 'none'; got 'swa,sma'"),
    ('--averages ema,ema', "or 'none'; got 'ema,ema'"), ('--averages none,ema', "or 'none'; got 'none,ema'"),
    ('--init magic', "'kaiming', 'lsuv' or 'default'"), ('--bs 0', '1 or more; got 0'), ('--momentum 1', 'below 1'),
    ('--seed -1', '4294967295'), ('--device tpu9', 'auto, cpu'), ('--device cuda:99', 'auto, cpu'),
    ('--device meta', 'auto, cpu'),
    ('--out /proc/none/x', 'written to'), ('--colour red', '--colour')])
def test_wrong_values(options, says, tmp_path, capsys):
    "One line on stderr, exit status 2, nothing written"
    os.chdir(tmp_path)
    assert main(['train', *f'--data toy --epochs 1 {options}'.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith('fastswa: ') and err.count('\n') == 1 and says in err
    assert not any(p.is_file() for p in tmp_path.rglob('*'))


def test_diverging_run_writes_nothing(tmp_path, capsys):
    assert main(f'train --data toy --epochs 2 --bs 64 --lr 1e30 --out {tmp_path}'.split()) == 1
    assert 'stopped being finite at batch' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_the_others_as_they_were(demo, tmp_path, monkeypatch):
    for name in FILES: (tmp_path/name).write_text('from an earlier run')
    import matplotlib.pyplot as plt
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(plt, 'savefig', full)
    assert main(f'train --data toy --epochs 1 --bs 64 --out {tmp_path}'.split()) == 1
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: 'from an earlier run' for name in FILES}


def run(*args, **kw): return subprocess.run([FASTSWA, *args], capture_output=True, text=True, **kw)


def test_the_installed_command(tmp_path):
    page = run('--help')
    assert page.returncode == 0 and 'fastswa train' in page.stdout
    options = run('train', '--help').stdout
    for name in 'data epochs lr sched averages init seed device out'.split(): assert f'--{name}' in options
    wrong = run('trian')
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1 and "'trian'" in wrong.stderr
    missing = run('train', '--data', str(tmp_path))
    assert missing.returncode == 2 and 'IDX files' in missing.stderr and 'Traceback' not in missing.stderr


def test_python_m_is_the_command(tmp_path):
    page = subprocess.run([sys.executable, '-m', 'fastswa', '--help'], capture_output=True, text=True)
    assert page.returncode == 0 and page.stdout == run('--help').stdout
    wrong = subprocess.run([sys.executable, '-m', 'fastswa', 'trian'], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == run('trian').stderr


@pytest.mark.parametrize('missing', ['', "sys.modules['nbdev'] = None"])
def test_nbdev_test_says_what_to_install(missing, tmp_path):
    """As pip writes the command: with nbdev it takes nbdev's options, which a wrapper around its function would lose;
    without nbdev it prints one line, no traceback"""
    script = tmp_path/'nbdev_test'
    script.write_text(f'import sys\n{missing}\nfrom fastswa._testing import nbdev_test\n'
                      'if __name__ == "__main__": sys.exit(nbdev_test())\n')
    said = subprocess.run([sys.executable, script, '--help'], capture_output=True, text=True)
    if missing: assert said.returncode == 1 and 'pip install' in said.stderr and said.stderr.count('\n') == 1
    else: assert said.returncode == 0 and '--flags' in said.stdout
