"compare: the same numbers in whatever order, side by side or interrupted; failures marked, bad input named"
import importlib.util
import json
import math
import os
import re
import signal
import time
from argparse import Namespace
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.swa import AverageCB, EMACB, SWACB
from fastswa.callbacks.swa_variants import PostHocEMACB, SWAGCB, SwitchEMACB
from fastswa.callbacks.teacher import TeacherCB
from fastswa.compare import runs
from fastswa.compare.descriptions import describe
from fastswa.compare.runs import compare
from fastswa.compare.statistics import paired_difference
from fastswa.core import quiet
from fastswa.random_state import set_seed
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner
from helpers import At, data, in_new_process, net
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


def ends_last(mark, kills, seed):
    """In the last seed wait, so that this process has sent all that it had finished; or, once the other one waits,
    kill this one"""
    if seed < 2: return slow(seed)
    if not kills: mark.touch()
    for _ in range(6000):
        if kills and mark.exists(): os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)


@pytest.fixture(scope='module')
def beside(tmp_path_factory):
    "What `found` is, in two processes, with two variants more, at whose last run one process is killed; its folder"
    folder = tmp_path_factory.mktemp('beside')
    ends = {name: partial(ends_last, folder/'waits', name == 'killed') for name in ('waits', 'killed')}
    with quiet(): return compare(make, VARIANTS | ends, 3, 2, folder/'out', n_jobs=2), folder/'out'


def test_side_by_side_changes_no_number(found, beside):
    "Functions of a test module, like those of a notebook, travel to other processes"
    assert [r for r in rows(beside[0]) if r['variant'] in found.variants] == rows(found)


def test_killed_process(beside):
    "What was finished stays. Wrong: an error for all"
    c, out = beside
    assert {*c.failures} == {('waits', 2), ('killed', 2)}
    assert all(o.startswith('a process was killed, perhaps for want of memory') for o in c.failures.values())
    assert c.scores()['killed'].notna().sum() == 2*2      # seeds, epochs
    assert {'killed-0.json', 'killed-1.json', 'raw-2.json'} < {o.name for o in out.iterdir()}
    assert not (out/'killed-2.json').exists()


def test_interrupted_and_continued(tmp_path, found, monkeypatch):
    "Finished runs are not run again, and the numbers are the same"
    def stops(seed):
        if seed == 2: raise KeyboardInterrupt
        set_seed(seed)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(runs, 'set_seed', stops)
        alone(out=tmp_path)
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
    (dict(make_learner=lambda seed: 3), RuntimeError, 'must make a learner when it is called with a seed; it made 3'),
    (dict(seeds=[0.5, 1.7]), ValueError, 'each of the seeds must be a whole number, 0 or more; got 0.5'),
    (dict(seeds=1.5), ValueError, 'seeds must be a whole number, 1 or more; got 1.5'),
    (dict(seeds=True), ValueError, 'seeds must be a whole number, 1 or more; got True'),
    (dict(seeds=[-1]), ValueError, 'each of the seeds must be a whole number, 0 or more; got -1'),
    (dict(n_jobs=0), ValueError, 'n_jobs must be a whole number, 1 or more; got 0'),
    (dict(n_jobs=-2), ValueError, 'n_jobs must be a whole number, 1 or more; got -2'),
    (dict(mode='maximum'), ValueError, "mode must be 'min', 'max' or None; got 'maximum'"),
    (dict(mode=''), ValueError, "mode must be 'min', 'max' or None; got ''"),
    (dict(variants=[('ema', EMACB())]), TypeError, r'variants must be a dict, such as dict\(ema=EMACB\(\)\)'),
    (dict(variants=None), TypeError, 'variants must be a dict'),
    (dict(variants=dict(s=SwitchEMACB())), ValueError, "'s' would change the run that it is to watch; got Swi"),
    (dict(variants=dict(s=SWACB(swa_lr=1e-3))), ValueError, "place a function that makes a learner from a seed"),
    (dict(variants=dict(s=SWAGCB(swa_lr=1e-3))), ValueError, "'s' would change the run .*; got SWAGCB"),
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


# --- an experiment is known by all that its functions name


def in_module(text, name='of_a_user'):
    "A module of the user's with this source"
    module = ModuleType(name)
    exec(text, vars(module))
    return module


def with_rate(lr): return lambda seed: make(seed, lr=lr)


def decorated(lr):
    def decorate(f):
        @wraps(f)
        def inner(seed): return f(seed, lr=lr)
        return inner
    return decorate


@dataclass
class Settings:
    lr: float = 0.3


class Recipe:
    "Makes learners when it is called"
    def __init__(self, lr): self.lr = lr
    def __call__(self, seed): return make(seed, lr=self.lr)


def of_globals(**names):
    "A function that names globals, which have these values"
    module = in_module('def helper(seed): return make(seed, VALUE)\ndef make_learner(seed): return helper(seed)')
    vars(module).update(names)
    return module.make_learner


def with_config(lr):
    module = in_module('def make_learner(seed): return make(seed, config.inner.LR)')
    module.config = in_module('import torch')
    module.config.inner = in_module(f'LR = {lr}\nOTHER = {lr + 1 if lr == 0.3 else lr}')
    return module.make_learner


def with_class(width):
    return in_module(f'class Base:\n    width = {width}\nclass Net(Base): pass\ndef make(seed): return Net()').make


def with_method(body):
    text = f'class Net:\n    @property\n    def out(self): return {body}'
    return in_module(f'{text}\ndef make(seed): return Net().out').make


EXPERIMENTS = dict(
    closure=with_rate, decorator=lambda v: decorated(v)(make), partial=lambda v: partial(make, lr=v),
    partial_of_config=lambda v: partial(make, config=Settings(v)), config=lambda v: of_globals(VALUE=Namespace(lr=v)),
    callable=Recipe, method=lambda v: Recipe(v).__call__, of_helper=lambda v: of_globals(VALUE=v),
    nested=lambda v: of_globals(VALUE=[dict(lr=(v,))]), module=with_config, class_attribute=with_class,
    changed_method=with_method, tensor=lambda v: of_globals(VALUE=torch.tensor([v])),
    loss=lambda v: of_globals(VALUE=nn.CrossEntropyLoss(label_smoothing=v)),
    net=lambda v: of_globals(VALUE=nn.Sequential(nn.Dropout(v))),
    data=lambda v: of_globals(VALUE=data(n=int(1000*v))),
    rule=lambda v: AverageCB(lambda n: v/(n + 1)),
    average=lambda v: EMACB(decay=v), posthoc=lambda v: PostHocEMACB((v/2,)),
    returned=lambda v: of_globals(VALUE=decorated(v)),
    dtype=lambda v: of_globals(VALUE={0.3: torch.half}.get(v)))


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_described_by_what_it_names(name):
    "Wrong: the source alone, by which another rate is the same experiment; or an address, by which none is the same"
    first, again, other = (describe(EXPERIMENTS[name](v)) for v in (0.3, 0.3, 0.1))
    assert first == again and first != other
    assert not re.search('0x[0-9a-f]{6}', first)


def test_own_names_do_not_end_the_description():
    "A function that calls itself, a list that holds itself, an object with itself as an attribute"
    module = in_module('def make_learner(seed): return make_learner(VALUE, OTHER)')
    module.VALUE,module.OTHER = [1],Recipe(0.3)
    module.VALUE.append(module.VALUE)
    module.OTHER.me = module.OTHER
    assert 'VALUE = [1, list]' in describe(module.make_learner)


def test_described_alike_in_another_process(tmp_path):
    "Wrong: an address, or the order of a set of strings"
    file = tmp_path/'of_a_user.py'
    file.write_text('import torch\nfrom fastswa.callbacks.swa import AverageCB\nNAMES = {*"abcdef"}\n'
                    'class Net(torch.nn.Module):\n    def forward(self, x): return x in NAMES\n'
                    'cb,net = AverageCB(lambda n: 1/(n + 1)),Net()\n'
                    'def make(seed, f=lambda x: x in {"a", "b"} and Net()):\n'
                    '    return f, cb, net, torch.optim.SGD, object()\n')
    spec = importlib.util.spec_from_file_location('of_a_user', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import of_a_user
        from fastswa.compare.descriptions import describe
        print(describe(of_a_user.make))"""
    assert in_new_process(code, dict(os.environ, PYTHONHASHSEED='7')) == describe(module.make) + '\n'


def test_other_values_are_another_experiment(tmp_path):
    "Wrong: the old losses, under the name of a new rate"
    compare(of_globals(VALUE=0.3, make=lambda seed, lr: make(seed, lr=lr)), {}, 1, 1, tmp_path, n_jobs=1)
    with pytest.raises(ValueError, match='another experiment, which differs in variants: give another folder'):
        compare(of_globals(VALUE=1e-4, make=lambda seed, lr: make(seed, lr=lr)), {}, 1, 1, tmp_path, n_jobs=1)


# --- scores that are missing, and runs of another length


def scored(*scores, name='accuracy'):
    "Runs of which each seed has the given score"
    class ScoreCB(Callback):
        order = MetricsCB.order
        def after_epoch(self, learn):
            if not learn.training: learn.history[-1][name] = scores[torch.initial_seed() % len(scores)]
    return lambda seed: TrainLearner(net(seed), data(n=32), F.cross_entropy, 0.1, [ScoreCB()])


def two(raw, other, seeds=3, epochs=1, **kw): return compare(raw, dict(other=other), seeds, epochs, n_jobs=1, **kw)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(bad):
    "Wrong: 'the same as raw in every seed', or an error for all variants"
    c = two(scored(0.5), scored(0.5, bad, 0.5))
    row = c.summary().loc['other']
    assert row.verdict == 'the same as raw in every seed (accuracy not finite in 1 of 3 seeds)' and row.seeds == 2
    assert c.differences()['other'].isna().tolist() == [False, True, False]
    assert len(c.plot()) == 2
    summary = two(scored(0.5, bad, 0.5), scored(0.6)).summary()
    assert summary.loc['raw', 'verdict'] == '(accuracy not finite in 1 of 3 seeds)'
    assert summary.loc['other', 'verdict'].endswith('(compared in 2: raw has no score in the others)')
    assert two(scored(0.5), scored(bad)).summary().loc['other', 'verdict'] == (
        'no scores (accuracy not finite in 3 of 3 seeds)')


def test_last_score_not_finite():
    "Wrong: the epoch before, which is finite"
    c = two(scored(0.5), scored(0.5), epochs=2)
    c.table.loc[(c.table.variant == 'other') & (c.table.epoch == 1), 'accuracy'] = math.nan
    assert c.summary().loc['other', 'seeds'] == 0 and c.summary(epoch=0).loc['other', 'seeds'] == 3


@pytest.mark.parametrize('scores,name', [([95., 97.], 'accuracy'), ([0.5, 1.5], 'acceleration'), ([-0.1, 0.2], 'acc')])
def test_only_shares_have_a_sampling_error(scores, name):
    summary = two(scored(*scores, name=name), scored(0.5, name=name)).summary()
    assert 'sampling error' not in summary and summary.loc['raw', 'seeds'] == 3


def stops_early(seed):
    "Ends after two epochs of more: the loss never falls by a million"
    return make(seed, EarlyStoppingCB('loss', patience=1, min_delta=1e6))


def test_runs_that_end_early():
    "The last row of each run, and its length in words. Wrong: no scores, without a reason"
    c = two(make, stops_early, seeds=2, epochs=4)
    last = c.table.query('variant == "other"').groupby('seed').tail(1)
    length = last.epoch.iloc[0] + 1
    assert length < 4
    assert f'ended after {length} of 4 epochs' in c.summary().loc['other', 'verdict']
    assert c.summary().loc['other', 'mean'] == last.accuracy.mean()
    raw = c.table.query('variant == "raw" and epoch == 3').accuracy.to_numpy()
    assert c.differences()['other'].tolist() == (last.accuracy.to_numpy() - raw).tolist()
    assert c.summary(epoch=3).loc['other', 'verdict'] == 'no scores'


def test_baseline_that_ends_early():
    "Wrong: an error that the last epoch is none"
    c = compare(stops_early, dict(ema=EMACB()), 2, 4, n_jobs=1)
    summary = c.summary()
    assert summary.verdict.str.contains(r'ended after \d of 4 epochs').all() and (summary.seeds == 2).all()
    assert 'ended after' in repr(c) and len(c.plot()) == 2


def test_average_that_never_begins():
    with pytest.warns(UserWarning, match='take no snapshot'):
        c = compare(make, dict(late=EMACB(start='9ep')), 2, 1, n_jobs=1)
    assert c.summary().loc['late', 'verdict'] == 'no scores: it never began' and c.variants == ['raw', 'late']
    assert len(c.plot()) == 2


def test_teacher_only_watches():
    c = compare(make, dict(teacher=TeacherCB()), 1, 1, n_jobs=1)
    assert c.scores('loss')['raw'].tolist() == compare(make, {}, 1, 1, n_jobs=1).scores('loss')['raw'].tolist()


# --- failures


def test_misspelled_metric_ends_after_the_first_run(tmp_path):
    "Wrong: all runs are trained first"
    with pytest.raises(ValueError, match="metric must be 'accuracy' or 'loss'; got 'acc'"):
        alone(metric='acc', out=tmp_path)
    assert [o.name for o in tmp_path.iterdir() if o.name != 'experiment.json'] == ['raw-0.json']
    before = (tmp_path/'raw-0.json').stat().st_mtime_ns
    with pytest.raises(ValueError, match="got 'f1'"): alone(metric='f1', out=tmp_path)
    assert len([*tmp_path.iterdir()]) == 2 and (tmp_path/'raw-0.json').stat().st_mtime_ns == before


def none_for_one(seed): return None if seed == 1 else make(seed)


def test_no_learner_for_one_seed():
    c = two(make, none_for_one)
    error = "TypeError: 'other' must make a learner when it is called with a seed; it made None"
    assert c.failures == {('other', 1): error}
    assert c.summary().loc['other', 'verdict'].endswith('(1 of 3 seeds failed)')
    summary = two(none_for_one, make).summary()
    assert summary.loc['raw', 'verdict'] == '(1 of 3 seeds failed)'
    assert summary.loc['other', 'verdict'].endswith('(compared in 2: raw has no score in the others)')
    assert summary.loc['other', 'seeds'] == 3


@pytest.mark.parametrize('text', ['', '{"rows": [', '[]', '3', '{"rows": []}', '{"error": null}'])
def test_damaged_result(tmp_path, text):
    asked = dict(make_learner=make, variants={}, seeds=1, epochs=1, out=tmp_path, n_jobs=1)
    compare(**asked)
    before = (tmp_path/'raw-0.json').read_text()
    (tmp_path/'raw-0.json').write_text(text)
    with pytest.raises(ValueError, match='raw-0.json is damaged: remove it, and its run is run again'): compare(**asked)
    (tmp_path/'raw-0.json').unlink()
    compare(**asked)
    assert (tmp_path/'raw-0.json').read_text() == before
    (tmp_path/'experiment.json').write_text(text)
    with pytest.raises(ValueError, match='experiment.json is damaged: give another folder, or remove'): compare(**asked)


def fails_while_full(seed):
    if seed == 1 and Path(os.environ['FULL_DISK']).exists(): raise OSError('no disk')
    return make(seed)


def test_failed_run_is_tried_again(tmp_path, monkeypatch):
    "Once what was wrong is mended. Wrong: the failure stays for ever"
    full = tmp_path/'full'
    monkeypatch.setenv('FULL_DISK', str(full))
    full.touch()
    assert two(make, fails_while_full, 2, out=tmp_path/'out').failures
    finished = (tmp_path/'out'/'other-0.json').stat().st_mtime_ns
    full.unlink()
    again = two(make, fails_while_full, 2, out=tmp_path/'out')
    assert not again.failures and again.summary().loc['other', 'verdict'] == 'the same as raw in every seed'
    assert (tmp_path/'out'/'other-0.json').stat().st_mtime_ns == finished


def test_snapshots_of_each_seed_have_their_folder(tmp_path):
    "Wrong: the second seed finds the snapshots of the first, and fails"
    cb = PostHocEMACB(every='0.5dur', folder=tmp_path)
    assert not compare(make, dict(posthoc=cb), 2, 1, n_jobs=1).failures
    assert {o.name for o in tmp_path.iterdir()} == {'posthoc-0', 'posthoc-1'} and cb.folder == tmp_path
    assert all(any(o.iterdir()) for o in tmp_path.iterdir())


def test_baseline_without_validation():
    def unvalidated(seed):
        learn = make(seed)
        learn.dls.valid = None
        return learn
    with pytest.raises(RuntimeError, match='needs a validation loader'): compare(unvalidated, {}, 1, 1, n_jobs=1)


def test_about_names_data_and_counts():
    about = compare(make, {}, 1, 1, n_jobs=1).about()
    assert 'accuracy after 1 epoch, 1 seed; WholeBatches: 160 training and 160 validation samples' in about


def test_all_cores():
    assert rows(compare(make, {}, 1, 1, n_jobs=-1)) == rows(compare(make, {}, 1, 1, n_jobs=1))


def test_values_may_be_series_of_any_index():
    "Wrong: the first value is looked up by its label"
    import pandas as pd
    a, b = pd.Series([1., 2., 4.], index=[7, 8, 9]), pd.Series([0., 2., 3.], index=[7, 8, 9])
    assert paired_difference(a, b) == paired_difference(a.to_list(), b.to_list())
