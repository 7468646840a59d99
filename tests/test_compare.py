"compare: the same numbers in whatever order, side by side or interrupted; failures marked, bad input named"
import json
import warnings

import pytest
import torch.nn.functional as F
from torch import nn

from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.compare.runs import Comparison, compare
from fastswa.compare.statistics import paired_difference
from fastswa.core import quiet
from fastswa.random_state import set_seed
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner
from helpers import At, data, net
from torcheval.metrics import MulticlassAccuracy


@pytest.fixture(autouse=True)
def no_progress():
    with quiet(): yield


def make(seed, *cbs, lr=0.3):
    return TrainLearner(net(seed), data(shuffle=True), F.cross_entropy, lr,
                        [MetricsCB(accuracy=MulticlassAccuracy()), BNUpdateCB(), *cbs])


def slow(seed): return make(seed, lr=0.01)


def fails_for_one(seed): return make(seed, *([At('after_loss', OSError('no disk'))] if seed == 1 else []))


VARIANTS = dict(ema=EMACB(half_life='3ba'), swa=SWACB(start='0.5dur', every='1ba'), slow=slow)


def rows(found): return found.table.drop(columns='error', errors='ignore').to_dict('records')


def alone(**kw): return compare(make, VARIANTS, **{**dict(seeds=3, epochs=2, n_jobs=1), **kw})


@pytest.fixture(scope='module')
def found():
    with quiet(): return alone()


def test_every_run_is_as_one_by_hand(found):
    "Wrong: an average that moves the run it watches, or a run that depends on those before it"
    for seed in range(3):
        set_seed(seed)
        learn = make(seed)
        set_seed(seed)
        learn.fit(2)
        want = [r['loss'] for r in learn.history if r['train'] == 'eval']
        assert found.table.query('variant == "raw" and seed == @seed').loss.tolist() == want


def test_order_of_seeds_changes_no_number(found):
    "Wrong: a generator that goes on from one run to the next. Rows come in the order asked for"
    other = alone(seeds=[2, 0, 1])
    assert other.seeds == [2, 0, 1]
    assert sorted(map(str, rows(other))) == sorted(map(str, rows(found)))


def test_side_by_side_changes_no_number(found):
    "Functions of a test module, like those of a notebook, travel to other processes"
    assert rows(alone(n_jobs=2)) == rows(found)


def test_interrupted_and_continued(tmp_path, found):
    "Finished runs are not run again, and the numbers are the same"
    def stops(seed):
        if seed == 2: raise KeyboardInterrupt
        return make(seed)
    stops.__wrapped__ = make      # its source, so that it is the same experiment
    with pytest.raises(KeyboardInterrupt): compare(stops, VARIANTS, 3, 2, tmp_path, n_jobs=1)
    before = {o.name: o.stat().st_mtime_ns for o in tmp_path.iterdir()}
    assert {'raw-0.json', 'raw-1.json', 'slow-0.json', 'slow-1.json'} <= {*before} and 'raw-2.json' not in before
    assert rows(alone(out=tmp_path)) == rows(found)
    assert {o.name: o.stat().st_mtime_ns for o in tmp_path.iterdir()}.items() >= before.items()


def test_further_seeds_join_a_folder(tmp_path, found):
    alone(seeds=1, out=tmp_path)
    assert rows(alone(out=tmp_path)) == rows(found)


@pytest.mark.parametrize('change,named', [
    (dict(epochs=3), 'epochs'), (dict(variants=dict(VARIANTS, ema=EMACB(decay=0.5))), 'variants'),
    (dict(make_learner=slow), 'variants'), (dict(variants=dict(ema=VARIANTS['ema'])), 'variants')])
def test_folder_of_another_experiment(tmp_path, change, named):
    asked = dict(make_learner=make, variants=VARIANTS, seeds=1, epochs=1, out=tmp_path, n_jobs=1)
    compare(**asked)
    before = sorted(o.read_text() for o in tmp_path.iterdir())
    with pytest.raises(ValueError, match=f'another experiment, which differs in {named}: give another folder'):
        compare(**asked | change)
    assert sorted(o.read_text() for o in tmp_path.iterdir()) == before


def test_folder_with_other_files(tmp_path):
    (tmp_path/'thesis.tex').write_text('…')
    with pytest.raises(FileExistsError, match='something else than a comparison'): alone(out=tmp_path)


def test_same_initial_weights_and_data_order():
    "A variant whose model draws more numbers at first sees the data in the same order. Wrong: another order"
    seen = {}
    class OrderCB(Callback):
        def __init__(self, name): self.name = name
        def before_batch(self, learn):
            if learn.training: seen.setdefault(self.name, []).append(learn.batch[0].sum().item())
    def draws_more(seed):
        nn.Linear(100, 100)
        return make(seed, OrderCB('other'))
    compare(lambda seed: make(seed, OrderCB('raw')), dict(other=draws_more), 2, 1, n_jobs=1)
    assert seen['raw'] == seen['other']


def test_variant_against_itself(found):
    "Exactly no difference, with an interval of width 0. Wrong: NaN, from a spread of 0"
    row = compare(make, dict(again=make), 3, 1, n_jobs=1).summary().loc['again']
    assert (row.difference, row.low, row.high, row.verdict) == (0, 0, 0, 'the same as raw in every seed')


def test_one_failing_seed_is_marked():
    "The other seeds and variants go on; what that run had measured stays in the table"
    found = compare(make, dict(ema=EMACB(), fragile=fails_for_one), 3, 2, n_jobs=1)
    assert found.failures == {('fragile', 1): 'OSError: no disk'}
    summary = found.summary()
    assert summary.seeds.to_dict() == dict(raw=3, ema=3, fragile=2)
    assert summary.loc['fragile', 'verdict'].endswith('(1 of 3 seeds failed)')
    assert 'failed' not in summary.loc['ema', 'verdict']
    assert found.table.query('variant == "fragile" and seed == 1').error.tolist() == ['OSError: no disk']
    assert 'fragile, seed 1, failed: OSError: no disk' in repr(found)


def test_failing_baseline():
    def broken(seed): return make(seed, At('after_loss', OSError('no disk')))
    with pytest.raises(RuntimeError, match='baseline failed in every seed; in seed 0: OSError: no disk'):
        compare(broken, {}, 2, 1, n_jobs=1)


def test_one_seed_says_that_it_has_no_interval():
    row = alone(seeds=1).summary().loc['ema']
    assert row.verdict == 'one seed: no interval' and row.low == -float('inf') and row.high == float('inf')


def test_averages_of_another_run_have_its_name():
    "A variant with averages of its own: a row for each, under the name of the variant"
    found = compare(make, dict(slow=lambda seed: make(seed, EMACB(), lr=0.01)), 2, 1, n_jobs=1)
    assert found.variants == ['raw', 'slow', 'slow/ema']


def test_variants_in_the_order_given(found): assert found.variants == ['raw', 'ema', 'swa', 'slow']


def test_callbacks_of_the_caller_stay_untouched():
    "Each seed has a copy. Wrong: an average that goes on from seed to seed"
    cb = EMACB()
    found = compare(make, dict(other_name=cb), 2, 1, n_jobs=1)
    assert (cb.name, cb.average) == ('ema', None) and found.variants == ['raw', 'other_name']


@pytest.mark.parametrize('kw,error,text', [
    (dict(seeds=0), ValueError, 'seeds must be a whole number, 1 or more'), (dict(seeds=[]), ValueError, 'needs seeds'),
    (dict(seeds=[1, 1]), ValueError, 'each seed must be another'), (dict(epochs=0), ValueError, 'epochs must be'),
    (dict(variants=dict(raw=EMACB())), ValueError, "other than 'raw'"),
    (dict(variants={'a/b': EMACB()}), ValueError, "without '/'"),
    (dict(variants=dict(ema=EMACB)), TypeError, r'EMACB\(\), or a function'),
    (dict(variants=dict(m=MetricsCB())), TypeError, "variant 'm' must be an averaging callback"),
    (dict(make_learner=lambda seed: 3), TypeError, 'must make a learner when it is called with a seed; it made 3'),
    (dict(metric='auc'), ValueError, "metric must be 'accuracy' or 'loss'")])
def test_bad_input(kw, error, text):
    asked = dict(make_learner=make, variants=VARIANTS, seeds=1, epochs=1, n_jobs=1)
    with pytest.raises(error, match=text): compare(**asked | kw)


def test_results_name_machine_and_configuration(tmp_path, found):
    assert 'torch' in repr(found) and '160 training and 160 validation samples' in repr(found)
    alone(seeds=1, out=tmp_path)
    described = json.loads((tmp_path/'experiment.json').read_text())
    assert 'lr=0.01' in described['variants']['slow'] and 'half_life' in described['variants']['ema']


def test_picture(found):
    "A line and a band for each variant; for each variant but raw a dot for each seed"
    curves, dots = found.plot()
    assert [o.get_label() for o in curves.lines] == ['raw', 'ema', 'swa', 'slow']
    assert sum(len(o.get_xdata()) == 3 for o in dots.lines) == 3


def test_scores_by_hand(found):
    scores = found.scores('loss')
    row = found.table.query('variant == "ema" and seed == 1 and epoch == 0')
    assert scores.loc[(1, 0), 'ema'] == row.loss.item()


def test_values_may_be_series_of_any_index():
    "Wrong: the first value is looked up by its label"
    import pandas as pd
    a, b = pd.Series([1., 2., 4.], index=[7, 8, 9]), pd.Series([0., 2., 3.], index=[7, 8, 9])
    assert paired_difference(a, b) == paired_difference(a.to_list(), b.to_list())
