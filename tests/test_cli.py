"The `fastswa` command: what it prints, writes and refuses"
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import fastswa.compare.runs
import fastswa.data.sources
from fastswa.callbacks.speed import fast_cbs
from fastswa.callbacks.swa import EMACB
from fastswa.cli import main
from fastswa.cli.recipe import Normalize
from fastswa.compare.benchmark import settings
from fastswa.data.loaders import DataLoaders
from fastswa.data.sources import toy_images
from fastswa.nets.layers import act_gr, get_model
from helpers import in_new_process, quick

FASTSWA = Path(sys.executable).with_name('fastswa')
FILES = ['curves.png', 'history.csv', 'settings.json', 'weights.safetensors']
SMALL = '--data toy --epochs 4 --bs 64 --device cpu'


savefig = Figure.savefig


def few_toys(monkeypatch):
    "`--data toy` is 640 images"
    monkeypatch.setattr(fastswa.data.sources, 'toy_images', lambda: toy_images(640, 256))


@pytest.fixture(autouse=True)
def small_toy(monkeypatch):
    "And each picture is drawn in one test, by `savefig`; elsewhere a file stands for it"
    few_toys(monkeypatch)
    monkeypatch.setattr(Figure, 'savefig', lambda self, f, **kw: f.write(b'a picture'))


def json_of(command):
    "What a command with --json prints on stdout, which has to be one line, and on stderr"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        assert main([*command.split(), '--json']) == 0
    assert out.getvalue().count('\n') == 1
    return json.loads(out.getvalue(), parse_constant=pytest.fail), err.getvalue()      # NaN is no JSON


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
    "The JSON and the text that a small run of `fastswa train` printed"
    with pytest.MonkeyPatch.context() as m:
        few_toys(m)
        return json_of(f'train {SMALL} --out {tmp_path_factory.mktemp("run")/"demo"}')


@pytest.fixture
def demo(printed): return Path(printed[0]['out'])


def results(folder): return sorted(p.name for p in folder.iterdir() if p.is_file())


def rows_of(file): return [*csv.DictReader(open(file))]


# --- train


def test_files(demo):
    assert results(demo) == FILES          # and no temporary ones
    assert [p.name for p in (demo/'checkpoints').iterdir()] == ['step-00000040.pt']
    rows = rows_of(demo/'history.csv')
    assert list(rows[0]) == ['accuracy', 'loss', 'epoch', 'train', 'weights']
    assert [r['weights'] for r in rows if r['epoch'] == '3' and r['train'] == 'eval'] == ['raw', 'swa', 'ema']
    with open(demo/'curves.png', 'rb') as f: assert f.read(8) == b'\x89PNG\r\n\x1a\n'
    settings = json.loads((demo/'settings.json').read_text())
    assert settings['command'] == 'train' and settings['settings']['lr'] == 0.2
    with safe_open(demo/'weights.safetensors', 'pt') as f:
        assert json.loads(f.metadata()['settings']) == settings['settings']


def test_what_train_prints(printed, demo):
    "The line of JSON says what the table says, and the last lines what may come next"
    result, text = printed
    assert {*result['results']} == {'raw', 'swa', 'ema'}
    last = {r['weights']: float(r['accuracy']) for r in rows_of(demo/'history.csv')
            if r['train'] == 'eval' and r['epoch'] == '3'}
    assert {name: r['accuracy'] for name, r in result['results'].items()} == last
    assert 'weights  accuracy' in text and all(f'{v:.4f}' in text for v in last.values())
    best = max(last, key=last.get)
    assert f'fastswa export {demo} --weights {best}' in text.split('Next:')[1]


def score(model):
    "How many of the test images a model for images from 0 to 1 gets right, as a share"
    x, y = DataLoaders.in_memory(toy_images(640, 256), 64, device='cpu').valid.dataset.tensors
    with torch.no_grad(): return (model(x.float()/255).argmax(1) == y).float().mean().item()


def convnet(state):
    "The convnet of the command with some weights, for images from 0 to 1"
    model = get_model(act_gr, norm=nn.BatchNorm2d).cpu()
    model.load_state_dict(state)
    images = DataLoaders.in_memory(toy_images(640, 256), 64, device='cpu').train.dataset.tensors[0]
    return nn.Sequential(Normalize(images), model.eval())


def saved(demo, name):
    "One set of weights of a run, from the file that has all of them"
    return {k.removeprefix(f'{name}/'): v for k, v in load_file(demo/'weights.safetensors').items()
            if k.startswith(f'{name}/')}


def test_weights_are_those_of_the_table(printed, demo):
    "Averaged weights saved with the BatchNorm statistics of the raw ones would score otherwise"
    for name, result in printed[0]['results'].items():
        # 640 images: all batches are in both
        tolerance = 1e-6 if name == 'raw' else 0.02
        assert score(convnet(saved(demo, name))) == pytest.approx(result['accuracy'], abs=tolerance)


def test_same_seed_same_run(demo, tmp_path):
    assert main(f'train {SMALL} --out {tmp_path}'.split()) == 0
    assert (tmp_path/'history.csv').read_text() == (demo/'history.csv').read_text()


@pytest.mark.parametrize('options', [
    '--averages none', '--averages ema --sched onecycle', '--init lsuv --momentum 0 --averages lawa',
    '--init default --fast'])
def test_options(options, tmp_path, capsys):
    assert main(['train', *f'--data toy --epochs 1 --bs 64 --out {tmp_path} {options}'.split()]) == 0
    assert 'weights  accuracy' in capsys.readouterr().out


@pytest.mark.parametrize('options, says', [
    ('--data nonesuch', 'fashion_mnist, mnist, toy'), ('--epochs -1', '1 or more; got -1'), ('--epochs two', "'two'"),
    ('--lr 0', 'above 0'), ('--lr nan', 'above 0'), ('--sched cosine', "'constant' or 'onecycle'; got 'cosine'"),
    ('--averages swa,sma', "swa, ema, lawa, with commas between them, or none; got 'swa,sma'"),
    ('--averages ema,ema', "got 'ema,ema'"), ('--averages none,ema', "got 'none,ema'"),
    ('--init magic', "'kaiming', 'lsuv' or 'default'"), ('--bs 0', '1 or more; got 0'), ('--momentum 1', 'below 1'),
    ('--seed -1', '4294967295'), ('--device tpu9', 'auto, cpu'), ('--device cuda:99', 'auto, cpu'),
    ('--device meta', 'auto, cpu'), ('--device hpu', 'auto, cpu'), ('--device 1', 'auto, cpu'),
    ('--device=', "got ''"), ('--averages=', "got ''"),
    ('--momentum nan', 'got nan'), ('--bs 1.5', "'1.5'"), ('--lr 1e400', 'got inf'), ('--data=', 'no IDX files'),
    ('--out=', 'name of a folder'), ('--out /proc/none/x', 'written to'), ('--out /dev/null', 'a folder'),
    ('--resume --overwrite', 'not both'), ('--colour red', '--colour red; fastswa train takes --data --epochs'),
    ('red', 'red'), ('--epoch 3', '--epoch 3; fastswa train takes'), ('--epochs', 'expected one argument')])
def test_wrong_values(options, says, tmp_path, capsys):
    "One line on stderr, exit status 2, nothing written"
    os.chdir(tmp_path)
    assert main(['train', *f'--data toy --epochs 1 {options}'.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith('fastswa: ') and err.count('\n') == 1 and says in err
    assert not any(p.is_file() for p in tmp_path.rglob('*'))


def test_data_that_is_not_there(tmp_path, capsys):
    assert main(['train', '--data', str(tmp_path), '--out', str(tmp_path/'run')]) == 2
    assert 'IDX files' in capsys.readouterr().err


def test_diverging_run(tmp_path, capsys):
    "Is told the option of the command, not a method of Python; the next try needs no --overwrite"
    small = f'train --data toy --epochs 1 --bs 64 --averages none --out {tmp_path}'
    assert main(f'{small} --lr 1e30'.split()) == 1
    err = capsys.readouterr().err
    assert 'stopped being finite at batch' in err and 'try a lower --lr than 1e+30' in err and 'learn.' not in err
    assert results(tmp_path) == ['settings.json']
    assert main(small.split()) == 0


def test_too_little_memory(tmp_path, capsys, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')
    monkeypatch.setattr(torch.nn.functional, 'cross_entropy', full)
    assert main(f'train {SMALL} --out {tmp_path}'.split()) == 1
    assert capsys.readouterr().err == 'fastswa: the memory of cpu is full: try a lower --bs than 64\n'


@pytest.mark.parametrize('images, compiled', [(300_000, False), (100_000_000, True)])
def test_fast_compiles_where_it_pays(images, compiled, monkeypatch):
    "Wrong: a compiler at work for longer than the run"
    monkeypatch.setattr(shutil, 'which', lambda name: '/usr/bin/c++')
    assert ('CompileCB' in [type(cb).__name__ for cb in fast_cbs('cpu', images)]) == compiled
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(avx512_bf16=False), raising=False)
    assert [type(cb).__name__ for cb in fast_cbs('cpu', images)] == ['ChannelsLastCB']      # bf16 would be emulated
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(avx512_bf16=True))
    assert [type(cb).__name__ for cb in fast_cbs('cpu', images)] == ['ChannelsLastCB', 'MixedPrecisionCB']


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
        assert 'curves.png of an earlier run, but not its settings: --overwrite' in err and 'resume' not in err
    assert (tmp_path/'curves.png').read_text() == 'mine'


@pytest.mark.parametrize('command', ['compare', 'lr-find'])
def test_the_folder_of_another_command(demo, command, capsys):
    assert main([command, '--data', 'toy', '--out', str(demo)]) == 2
    err = capsys.readouterr().err
    assert f'{demo} holds a run of fastswa train: --overwrite replaces it, or --out' in err and 'resume' not in err
    assert results(demo) == FILES


def test_a_run_is_not_trained_over(demo, capsys):
    "Wrong: the files of the first run are gone"
    assert main(f'train --data toy --out {demo}'.split()) == 2
    assert f'{demo} holds an earlier run: --resume goes on with it' in capsys.readouterr().err
    assert results(demo) == FILES


@pytest.fixture
def interrupted(tmp_path, monkeypatch, capsys):
    "The folder of a run in whose second epoch Ctrl-C was pressed"
    def press_in_the_second(self, x):
        seen.append(len(x))
        if sum(seen) > 1100: signal.raise_signal(signal.SIGINT)
        return forward(self, x)
    forward, seen = Normalize.forward, []
    with monkeypatch.context() as m:
        m.setattr(Normalize, 'forward', press_in_the_second)
        assert main(f'train {SMALL} --averages none --out {tmp_path}'.split()) == 130
    assert f'is kept, and goes on with: fastswa train --resume --out {tmp_path}' in capsys.readouterr().err
    assert results(tmp_path) == ['settings.json'] and len([*tmp_path.glob('checkpoints/*.pt')]) == 1
    return tmp_path


def test_resume_gives_the_run_that_was_never_stopped(interrupted, tmp_path_factory):
    never = tmp_path_factory.mktemp('never')
    assert main(f'train {SMALL} --averages none --out {never}'.split()) == 0
    assert main(f'train --resume --out {interrupted}'.split()) == 0      # as the line after Ctrl-C says
    assert (interrupted/'history.csv').read_text() == (never/'history.csv').read_text()
    assert results(interrupted) == FILES


def test_resume_refuses_other_options(demo, capsys):
    "Wrong: what was saved wins, in silence"
    for options, says in [('--lr 0.1', '--lr was 0.2 and is 0.1'), ('--fast', '--fast was False and is True'),
                          ('--averages none', '--averages was swa,ema and is none'),
                          ('--init lsuv --seed 1', '--init was kaiming and is lsuv; --seed was 0 and is 1')]:
        assert main(f'train --resume --out {demo} {options}'.split()) == 2
        err = capsys.readouterr().err
        assert says in err and err.count('\n') == 1


def test_resume_of_a_finished_run_and_more_epochs(demo, tmp_path, capsys):
    shutil.copytree(demo, tmp_path/'run')
    assert main(f'train {SMALL} --resume --out {tmp_path}/run'.split()) == 0
    assert 'nothing is left to train' in capsys.readouterr().out
    assert (tmp_path/'run'/'history.csv').read_text() == (demo/'history.csv').read_text()
    assert main(f'train --epochs 5 --resume --out {tmp_path}/run'.split()) == 0
    assert [r['epoch'] for r in rows_of(tmp_path/'run'/'history.csv') if r['train'] == 'train'] == list('01234')


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


def test_overwrite_leaves_the_files_of_others(demo, tmp_path):
    "And removes all of an earlier run, so that no folder holds parts of two"
    shutil.copytree(demo, tmp_path/'run')
    (tmp_path/'run'/'notes.txt').write_text('mine')
    assert main(f'lr-find --data toy --overwrite --out {tmp_path}/run'.split()) == 0
    assert results(tmp_path/'run') == ['lr.csv', 'lr.png', 'notes.txt', 'settings.json']
    assert [*(tmp_path/'run'/'checkpoints').iterdir()] == []


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    "None of the three is there, and what was trained is not lost"
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(Figure, 'savefig', full)
        assert main(f'train --data toy --epochs 1 --bs 64 --out {tmp_path}'.split()) == 1
    assert results(tmp_path) == ['settings.json'] and 'No space left' in capsys.readouterr().err
    assert main(f'train --resume --out {tmp_path}'.split()) == 0
    assert results(tmp_path) == FILES


# --- bench-averages


def test_bench_averages_from_a_configuration(tmp_path, capsys):
    "Wrong: other rows than the configuration has, or a second run that computes again what is there"
    config = settings('tiny')
    config['workloads'] = dict(text=config['workloads']['text'])
    config['workloads']['text']['rates'] = dict(annealed=[0.004])
    (tmp_path/'a.json').write_text(json.dumps(config))
    command = f'bench-averages --config {tmp_path}/a.json --jobs 1 --out {tmp_path}/out'
    result,text = json_of(command)
    names = [name.split('/')[2] for name in result['results']]
    assert names == ['raw', 'ema', 'ema_10', 'swa', 'lawa', 'merge'] and 'AlgoPerf' in text
    done = {o: o.stat().st_mtime_ns for o in (tmp_path/'out'/'runs'/'text').iterdir()}
    assert json_of(command)[0] == result
    assert {o: o.stat().st_mtime_ns for o in done} == done
    assert main(f'bench-averages --data toy --out {tmp_path}/out'.split()) == 2
    assert main(f'{command} --quick'.split()) == 2
    assert 'is of another benchmark' in (err := capsys.readouterr().err) and 'in place of --quick' in err


# --- lr-find


def test_lr_find(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Figure, 'savefig', savefig)
    result, text = json_of(f'lr-find --data toy --bs 64 --out {tmp_path}')
    rows = rows_of(tmp_path/'lr.csv')
    lrs, losses = ([float(r[k]) for r in rows] for k in ('lr', 'loss'))
    assert 20 < len(lrs) and lrs[0] < result['suggestion'] < lrs[losses.index(min(losses))]
    assert f"fastswa train --data toy --bs 64 --lr {result['suggestion']:.2g}" in text
    assert results(tmp_path) == ['lr.csv', 'lr.png', 'settings.json']
    assert main(f'lr-find --data toy --out {tmp_path}'.split()) == 2
    err = capsys.readouterr().err
    assert '--overwrite' in err and 'resume' not in err


# --- export


def test_export(printed, demo, tmp_path, capsys):
    "Each format has the weights of the table, with the statistics that train wrote; no file is replaced unasked"
    want, files = saved(demo, 'ema'), {}
    for kind in 'safetensors', 'state-dict', 'torch-export':
        result, _ = json_of(f'export {demo} --weights ema --format {kind} --out {tmp_path}/{kind}')
        assert result['weights'] == 'ema'
        files[kind] = result['file']
    for state in load_file(files['safetensors']), torch.load(files['state-dict'], weights_only=True):
        assert state.keys() == want.keys() and all(torch.equal(state[k], want[k]) for k in want)
    program = torch.export.load(files['torch-export']).module()
    assert score(program) == pytest.approx(score(convnet(want)), abs=1e-3)
    before = Path(files['state-dict']).read_bytes()
    assert main(['export', str(demo), '--out', files['state-dict']]) == 2
    assert '--overwrite' in capsys.readouterr().err and Path(files['state-dict']).read_bytes() == before


def test_export_raw_beside_the_run(demo, tmp_path):
    shutil.copytree(demo, tmp_path/'run')
    assert json_of(f'export {tmp_path}/run')[0]['file'] == f'{tmp_path}/run/raw.safetensors'
    state, want = load_file(tmp_path/'run'/'raw.safetensors'), saved(demo, 'raw')
    assert state.keys() == want.keys() and all(torch.equal(state[k], want[k]) for k in want)


def test_export_of_a_learner_of_ones_own(tmp_path, capsys):
    learn = quick(EMACB(decay=0.5))
    learn.quiet = True
    learn.fit(1)
    learn.save(tmp_path/'mine.pt')
    assert main(f'export {tmp_path}/mine.pt --weights ema'.split()) == 0
    assert torch.equal(load_file(tmp_path/'ema.safetensors')['weight'], learn.averages['ema'].weights['weight'])
    assert main(f'export {tmp_path}/mine.pt --format torch-export'.split()) == 2
    assert 'only runs of fastswa train' in capsys.readouterr().err


def test_export_refuses(demo, tmp_path, capsys):
    for options, says in [
            (f'{demo} --weights lawa', "--weights must be 'raw', 'swa' or 'ema'; got 'lawa'"),
            (f'{demo} --format onnx', "'safetensors', 'state-dict' or 'torch-export'; got 'onnx'"),
            (f'{tmp_path}/none', 'there is no run or checkpoint'), (f'{tmp_path}', 'there is no checkpoint in'),
            (f'{demo}/history.csv', 'no checkpoint'), ('', 'RUN')]:
        assert main(['export', *options.split()]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count('\n') == 1 and results(tmp_path) == []


# --- compare

COMPARE = 'compare --data toy --epochs 2 --bs 64 --device cpu --averages ema'


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    "A comparison of one seed, then of one more: the folder, the JSON and the text"
    out = tmp_path_factory.mktemp('compared')
    with pytest.MonkeyPatch.context() as m:
        few_toys(m)
        assert main([*COMPARE.split(), '--seeds', '1', '--jobs', '1', '--out', str(out)]) == 0
        first = (out/'runs'/'raw-0.json').stat().st_mtime_ns
        result, text = json_of(f'compare --resume --seeds 2 --jobs 1 --out {out}')
        assert (out/'runs'/'raw-0.json').stat().st_mtime_ns == first      # not run again
    return out, result, text


def test_compare(compared):
    out, result, text = compared
    assert results(out) == ['comparison.csv', 'comparison.png', 'settings.json', 'summary.csv']
    last = {(r['variant'], r['seed']): float(r['accuracy']) for r in rows_of(out/'comparison.csv') if r['epoch'] == '1'}
    assert sorted(last) == [('ema', '0'), ('ema', '1'), ('raw', '0'), ('raw', '1')]
    difference = sum(last['ema', s] - last['raw', s] for s in '01')/2
    assert result['results']['ema']['difference'] == pytest.approx(difference)
    assert f'{100*difference:+.2f} points' in text and 'ema: ' in text and result['seeds'] == [0, 1]
    assert result['results']['raw']['difference'] is None


def test_compare_trains_as_train_does(compared, tmp_path):
    "The same seed gives the same accuracies: what the one command compares is what the other trains"
    rows = [r for r in rows_of(compared[0]/'comparison.csv') if r['seed'] == '1']
    small = '--data toy --epochs 2 --bs 64 --device cpu --averages ema --seed 1'
    assert main(f'train {small} --out {tmp_path}'.split()) == 0
    for name in 'raw', 'ema':
        trained = [r['accuracy'] for r in rows_of(tmp_path/'history.csv')
                   if (r['train'], r['weights']) == ('eval', name)]
        assert [r['accuracy'] for r in rows if r['variant'] == name] == trained


def test_compare_refuses(compared, capsys):
    out = compared[0]
    for options, says in [('', '--resume goes on'), ('--resume --lr 0.1', '--lr was 0.2 and is 0.1'),
                          ('--averages none', 'swa, ema, lawa'), ('--seeds 0', '--seeds must be'),
                          ('--jobs 0', '--jobs must be')]:
        assert main(f'{COMPARE} --out {out} {options}'.split()) == 2
        assert says in capsys.readouterr().err
    assert main(f'compare --data nonesuch --out {out}/other'.split()) == 2      # before any run
    assert not (out/'other'/'runs').exists()


def test_compare_says_which_rate_was_too_high(tmp_path, capsys):
    assert main(f'{COMPARE} --lr 1e30 --seeds 1 --jobs 1 --out {tmp_path}'.split()) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith('fastswa: the baseline failed in every seed') and 'ry a lower --lr than 1e+30' in err


def test_ctrl_c_in_a_comparison(tmp_path, monkeypatch, capsys):
    "The runs that are finished stay"
    def stop(name, make, watchers, seed, epochs):
        if seed == 1: raise KeyboardInterrupt
        return run(name, make, watchers, seed, epochs)
    run = fastswa.compare.runs.run
    monkeypatch.setattr(fastswa.compare.runs, 'run', stop)
    assert main(f'{COMPARE} --seeds 2 --jobs 1 --out {tmp_path}'.split()) == 130
    assert f'goes on with: fastswa compare --resume --out {tmp_path}' in capsys.readouterr().err
    assert (tmp_path/'runs'/'raw-0.json').exists()


# --- pages, and the command as it is installed


@pytest.mark.parametrize('columns', [49, 80])
@pytest.mark.parametrize('page', ['', 'train', 'compare', 'bench-averages', 'lr-find', 'export'])
def test_pages_fit_the_terminal(page, columns, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', str(columns))
    assert main([*page.split(), '--help']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert columns/2 < max(map(len, lines)) < columns and lines[0].startswith('usage: fastswa')


def run(*args, **kw): return subprocess.run([FASTSWA, *args], capture_output=True, text=True, **kw)


def test_the_installed_command():
    page = run('--help')
    assert page.returncode == 0 and 'fastswa train' in page.stdout
    options = run('train', '--help').stdout
    for name in 'data epochs lr sched averages init seed device fast out resume overwrite json'.split():
        assert f'--{name} ' in options
    wrong = run('trian')
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1 and "'trian'" in wrong.stderr


def test_python_m_is_the_command():
    page = subprocess.run([sys.executable, '-m', 'fastswa', '--help'], capture_output=True, text=True)
    assert page.returncode == 0 and page.stdout == run('--help').stdout


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'latin-1'])
def test_help_in_any_encoding(encoding):
    "As under LC_ALL=C or in a console of Windows; and the error about a name that the encoding does not have"
    env = dict(os.environ, PYTHONIOENCODING=encoding, PYTHONUTF8='0')
    page = run('train', '--help', env=env)
    assert page.returncode == 0 and page.stdout == run('train', '--help', env=dict(os.environ)).stdout
    wrong = run('Kosinus-Fläche…', env=env, errors='replace')
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1 and "no command 'Kosinus-Fl" in wrong.stderr


def test_help_through_a_pipe_that_closes():
    "Wrong: a traceback, or a line about an ignored exception, when Python flushes at its end"
    p = subprocess.Popen([FASTSWA, 'train', '--help'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    assert p.stderr.read() == '' and p.wait() in (0, 1)


def test_no_torch_for_a_page_and_no_warnings_about_torcheval(tmp_path):
    "The one loads in seconds; of the other, torch 2.14 gives one for each of thirty functions"
    out = in_new_process(f"""
        import contextlib, io, sys, warnings
        from fastswa.cli import main
        with contextlib.redirect_stdout(io.StringIO()): main(['train', '--help'])
        assert 'torch' not in sys.modules
        import torch
        def script(f, *args, **kwargs):
            warnings.warn('`torch.jit.script` is deprecated', FutureWarning, stacklevel=len(f.__name__) % 3 + 1)
            return f
        torch.jit.script = script
        from matplotlib.figure import Figure
        Figure.savefig = lambda self, f, **kw: f.write(b'a picture')
        import fastswa.data.sources as sources
        toy, sources.toy_images = sources.toy_images, lambda: toy(64, 32)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            status = main('train --data toy --epochs 1 --averages none --device cpu --out {tmp_path}'.split())
        print(repr((status, err.getvalue())))""")
    assert out.splitlines()[-1] == "(0, '')"


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
