"The public benchmark of averaging: the same table from its configuration alone, whatever stopped it; the test set once"
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from fastswa.compare import workloads
from fastswa.compare.benchmark import bench_averages, settings, steps_to
from fastswa.core import quiet
from fastswa.random_state import set_seed


@pytest.fixture(autouse=True)
def no_progress():
    with quiet(): yield


def tiny(*names, **changes):
    "The tiny configuration of some workloads"
    config = settings('tiny')
    return config | dict(workloads={name: config['workloads'][name] for name in names}) | changes


def csv(folder): return pd.read_csv(folder/'saved.csv')


def test_the_table_again_from_its_configuration_alone(tmp_path, monkeypatch):
    "With other seeds first, after a stop, and in a process whose random state is another. Wrong: other figures"
    config = tiny('text')
    del config['workloads']['text']['rates']['constant']      # for speed
    first = bench_averages(tmp_path/'a', config, n_jobs=1)
    assert json.loads((tmp_path/'a'/'config.json').read_text()) == config
    again = json.loads((tmp_path/'a'/'config.json').read_text()) | dict(seeds=[1, 0])
    torch.rand(7)
    real,calls = workloads.start,[]

    def stopped(w):
        calls.append(w)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(w)
    monkeypatch.setattr(workloads, 'start', stopped)
    with pytest.raises(KeyboardInterrupt): bench_averages(tmp_path/'b', again, n_jobs=1)
    monkeypatch.setattr(workloads, 'start', real)
    done = sorted(o.name for o in (tmp_path/'b'/'runs'/'text').iterdir())
    assert len(done) == 3      # two runs and what they are of: what was computed stays
    second = bench_averages(tmp_path/'b', again, n_jobs=1)
    columns = [c for c in first.table if first.table[c].dtype == float]
    np.testing.assert_allclose(second.table[columns], first.table[columns], rtol=1e-12)
    scores = [f.comparisons['text'].table.sort_values(['variant', 'seed', 'epoch'], ignore_index=True)
              for f in (first, second)]
    pd.testing.assert_frame_equal(*scores)
    pd.testing.assert_frame_equal(csv(tmp_path/'a'), csv(tmp_path/'b'))


@pytest.mark.slow
def test_processes_change_no_figure(tmp_path):
    "All workloads, in one process and in two"
    config = settings('tiny')
    a,b = (bench_averages(tmp_path/str(n), config, n_jobs=n) for n in (1, 2))
    pd.testing.assert_frame_equal(a.table, b.table)


def test_rates_are_chosen_on_data_of_their_own(tmp_path):
    "Wrong: those that tell the steps to the target, or test data"
    config = tiny('text', seeds=[0])
    w = config['workloads']['text']
    w['rates'] = dict(annealed=[0.004, 1e-6], constant=[1e-6, 0.004])
    found = bench_averages(tmp_path, config, n_jobs=1)
    assert found.rates['text']['chosen'] == dict(annealed=0.004, constant=0.004)
    set_seed(100)
    learn = workloads.make_learner(100, w | dict(every=w['steps']), 'annealed', 0.004, 'tune')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        set_seed(100)
        learn.fit(1)
    finally: torch.set_num_threads(threads)
    tried = found.rates['text']['tried']['annealed']
    assert tried[0.004] == pytest.approx(learn.history[-1]['loss'], rel=1e-3) and tried[1e-6] > tried[0.004]
    assert not any('test' in row for row in learn.history)
    about = json.loads((tmp_path/'about.json').read_text())
    assert about['rates']['text']['chosen'] == found.rates['text']['chosen']


def test_test_data_are_read_once_by_each_set_of_weights(tmp_path):
    "In one epoch, that of the annealed run's end. Wrong: a curve of test scores from which to choose"
    config = tiny('text', seeds=[0])
    config['workloads']['text']['rates'] = dict(annealed=[0.004])
    table = bench_averages(tmp_path, config, n_jobs=1).comparisons['text'].table
    assert (table.groupby(['seed', 'variant']).test.count() == 1).all()
    assert table[table.test.notna()].epoch.unique().tolist() == [3]      # 8 steps, a look after each 2


def test_parts_do_not_overlap():
    "Wrong: images for tuning or validation that are also trained on"
    parts = workloads.image_parts('toy')
    seen = [{x.numpy().tobytes() for x in xs} for xs, _ in parts.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))
    text = {k: bytes(v.tolist()) for k, v in workloads.text_parts().items()}
    assert text['valid'][:2000] not in text['train'] and text['test'][:2000] not in text['train']


def test_steps_to_a_target_by_hand():
    "Wrong: the look after the crossing, the last crossing, or a run that never gets there as one that does"
    assert steps_to([1., 0.8, 0.4, 0.9, 0.1], 0.5, 'min', 10) == pytest.approx(27.5)
    assert steps_to([0.1, 0.2], 0.5, 'max', 10) == float('inf')


@pytest.mark.parametrize('change,error', [
    (dict(seeds=[]), 'seeds must be a list'), (dict(extra=1), 'a configuration has seeds, tuning_seeds, workloads'),
    (dict(workloads={}), 'needs workloads'), (dict(workloads=dict(a=dict(kind='audio'))), "got 'audio'")])
def test_a_wrong_configuration_is_named_before_anything_is_written(tmp_path, change, error):
    with pytest.raises(ValueError, match=error): bench_averages(tmp_path/'new', tiny('text') | change)
    assert not (tmp_path/'new').exists()


def test_a_folder_of_another_benchmark_is_left_alone(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(tiny('text', seeds=[5])))
    with pytest.raises(ValueError, match='is of another benchmark'): bench_averages(tmp_path, tiny('text'))
    shutil.copy(tmp_path/'config.json', tmp_path/'notes.json')
    (tmp_path/'config.json').unlink()
    with pytest.raises(FileExistsError, match='something else'): bench_averages(tmp_path, tiny('text'))
    assert [o.name for o in tmp_path.iterdir()] == ['notes.json']
