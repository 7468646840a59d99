"The `fastswa` command: what it prints, writes and refuses"
import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastswa.data.sources
from fastswa.cli import main
from fastswa.data.loaders import BatchLoader, DataLoaders
from fastswa.data.sources import toy_images
from helpers import in_new_process

FASTSWA = Path(sys.executable).with_name('fastswa')
FILES = ['curves.png', 'history.csv', 'weights.safetensors']
SMALL = '--data toy --epochs 4 --bs 64 --device cpu'


@pytest.fixture(autouse=True)
def small_toy(monkeypatch):
    "`--data toy` is 640 images here"
    monkeypatch.setattr(fastswa.data.sources, 'toy_images', lambda: toy_images(640, 256))


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'demo'
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fastswa.data.sources, 'toy_images', lambda: toy_images(640, 256))
        assert main(f'train {SMALL} --out {out}'.split()) == 0
    return out


def results(folder): return sorted(p.name for p in folder.iterdir() if p.is_file())


def test_files(demo):
    assert results(demo) == FILES          # and no temporary ones
    assert [p.name for p in (demo/'checkpoints').iterdir()] == ['step-00000040.pt']
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
    assert main(f'train {SMALL} --out {tmp_path}'.split()) == 0
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
    ('--device meta', 'auto, cpu'), ('--device hpu', 'auto, cpu'), ('--device 1', 'auto, cpu'),
    ('--device=', "got ''"),
    ('--averages swa,none', "or 'none'; got 'swa,none'"), ('--averages=', "or 'none'; got ''"),
    ('--momentum nan', 'got nan'), ('--bs 1.5', "'1.5'"), ('--lr 1e400', 'got inf'), ('--data=', 'no IDX files'),
    ('--out=', 'name of a folder'), ('--out /proc/none/x', 'written to'), ('--out /dev/null', 'a folder'),
    ('--resume --overwrite', 'not both'), ('--colour red', '--colour'), ('red', 'red')])
def test_wrong_values(options, says, tmp_path, capsys):
    "One line on stderr, exit status 2, nothing written"
    os.chdir(tmp_path)
    assert main(['train', *f'--data toy --epochs 1 {options}'.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith('fastswa: ') and err.count('\n') == 1 and says in err
    assert not any(p.is_file() for p in tmp_path.rglob('*'))


def test_diverging_run_writes_nothing(tmp_path, capsys):
    "And is told the option of the command, not a method of Python"
    assert main(f'train --data toy --epochs 2 --bs 64 --lr 1e30 --out {tmp_path}'.split()) == 1
    err = capsys.readouterr().err
    assert 'stopped being finite at batch' in err and 'try a lower --lr than 1e+30' in err and 'learn.' not in err
    assert not any(p.is_file() for p in tmp_path.rglob('*'))


def test_too_little_memory(tmp_path, capsys, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')
    monkeypatch.setattr(torch.nn.functional, 'cross_entropy', full)
    assert main(f'train {SMALL} --out {tmp_path}'.split()) == 1
    assert capsys.readouterr().err == 'fastswa: the memory of cpu is full: try a lower --bs than 64\n'


# --- a folder that holds a run


def test_a_run_is_not_overwritten_unasked(demo, tmp_path, capsys):
    before = {p: p.read_bytes() for p in demo.iterdir() if p.is_file()}
    assert main(f'train {SMALL} --out {demo}'.split()) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and all(o in err for o in (str(demo), '--resume', '--overwrite', '--out'))
    assert {p: p.read_bytes() for p in demo.iterdir() if p.is_file()} == before
    (tmp_path/'curves.png').write_text('mine')      # results alone: there is nothing to go on from
    for options in '', '--resume':
        assert main(f'train {SMALL} {options} --out {tmp_path}'.split()) == 2
        err = capsys.readouterr().err
        assert 'curves.png of an earlier run, but no checkpoint: --overwrite' in err and 'resume' not in err
    assert (tmp_path/'curves.png').read_text() == 'mine'


@pytest.fixture
def interrupted(tmp_path, monkeypatch, capsys):
    "The folder of a run in whose second epoch Ctrl-C was pressed"
    def press_in_the_second(self, x, y, part):
        seen.append(len(part))
        if sum(seen) > 900: signal.raise_signal(signal.SIGINT)
        return batch(self, x, y, part)
    batch, seen = BatchLoader._batch, []
    with monkeypatch.context() as m:
        m.setattr(BatchLoader, '_batch', press_in_the_second)
        assert main(f'train {SMALL} --averages none --out {tmp_path}'.split()) == 130
    assert 'interrupted; with --resume it goes on' in capsys.readouterr().err
    assert results(tmp_path) == [] and len([*tmp_path.glob('checkpoints/*.pt')]) == 1
    return tmp_path


def test_resume_gives_the_run_that_was_never_stopped(interrupted, tmp_path_factory):
    never = tmp_path_factory.mktemp('never')
    assert main(f'train {SMALL} --averages none --out {never}'.split()) == 0
    assert main(f'train {SMALL} --averages none --resume --out {interrupted}'.split()) == 0
    assert (interrupted/'history.csv').read_text() == (never/'history.csv').read_text()
    assert results(interrupted) == FILES


@pytest.mark.parametrize('options, says', [
    ('--averages none --lr 0.1', '--lr was 0.2 and is 0.1'), ('', '--averages was none and is swa,ema'),
    ('--averages none --init lsuv --seed 1', '--init was kaiming and is lsuv; --seed was 0 and is 1'),
    ('--averages none --data mnist', '--data was toy and is mnist')])
def test_resume_refuses_other_options(interrupted, capsys, options, says):
    "Wrong: what was saved wins, in silence"
    assert main(f'train {SMALL} --resume --out {interrupted} {options}'.split()) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1


def test_resume_of_a_finished_run_and_more_epochs(demo, tmp_path, capsys):
    shutil.copytree(demo, tmp_path/'run')
    assert main(f'train {SMALL} --resume --out {tmp_path}/run'.split()) == 0
    assert 'nothing is left to train' in capsys.readouterr().out
    assert (tmp_path/'run'/'history.csv').read_text() == (demo/'history.csv').read_text()
    assert main(f'train {SMALL} --epochs 5 --resume --out {tmp_path}/run'.split()) == 0
    rows = [*csv.DictReader(open(tmp_path/'run'/'history.csv'))]
    assert [r['epoch'] for r in rows if r['train'] == 'train'] == list('01234')


@pytest.mark.parametrize('epochs', [1, 3])
def test_resume_with_fewer_epochs_than_are_done(demo, tmp_path, capsys, epochs):
    "Wrong: an argument that the command does not have, `n_epochs`"
    shutil.copytree(demo, tmp_path/'run')
    assert main(f'train {SMALL} --epochs {epochs} --resume --out {tmp_path}/run'.split()) == 2
    err = capsys.readouterr().err
    assert f'it must be 4 or more; got {epochs}' in err and '--epochs' in err and 'n_epochs' not in err


def test_overwrite_begins_a_new_run(interrupted, capsys):
    assert main(f'train {SMALL} --epochs 1 --overwrite --out {interrupted}'.split()) == 0
    assert results(interrupted) == FILES
    assert [p.name for p in (interrupted/'checkpoints').iterdir()] == ['step-00000010.pt']
    assert 'resuming' not in capsys.readouterr().out


def test_a_file_that_cannot_be_written_leaves_the_others_as_they_were(demo, tmp_path, monkeypatch):
    for name in FILES: (tmp_path/name).write_text('from an earlier run')
    import matplotlib.pyplot as plt
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(plt, 'savefig', full)
    assert main(f'train --data toy --epochs 1 --bs 64 --overwrite --out {tmp_path}'.split()) == 1
    assert results(tmp_path) == FILES
    assert {(tmp_path/name).read_text() for name in FILES} == {'from an earlier run'}


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


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'latin-1'])
def test_help_in_any_encoding(encoding):
    "As under LC_ALL=C or in a console of Windows; and the error about a name that the encoding does not have"
    env = dict(os.environ, PYTHONIOENCODING=encoding, PYTHONUTF8='0')
    page = run('train', '--help', env=env)
    assert page.returncode == 0 and page.stdout == run('train', '--help', env=dict(os.environ)).stdout
    wrong = run('train', '--sched', 'Kosinus-Fläche…', env=env, errors='replace')
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1 and "got 'Kosinus-Fl" in wrong.stderr


def test_help_through_a_pipe_that_closes():
    "Wrong: a traceback when Python flushes at its end"
    p = subprocess.Popen([FASTSWA, 'train', '--help'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    assert 'Traceback' not in p.stderr.read() and p.wait() in (0, 1)


def test_no_warnings_about_the_functions_of_torcheval(tmp_path):
    "As torch 2.14 gives them: one for each of thirty functions"
    out = in_new_process(f"""
        import contextlib, io, warnings, torch
        def script(f, *args, **kwargs):
            warnings.warn('`torch.jit.script` is deprecated', FutureWarning, stacklevel=len(f.__name__) % 3 + 1)
            return f
        torch.jit.script = script
        import fastswa.data.sources as sources
        from fastswa.cli import main
        toy, sources.toy_images = sources.toy_images, lambda: toy(64, 32)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            status = main('train --data toy --epochs 1 --averages none --device cpu --out {tmp_path}'.split())
        print(repr((status, err.getvalue())))""")
    assert out.splitlines()[-1] == "(0, '')"


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
