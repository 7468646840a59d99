"Averages chosen after training: reconstructions against float64, at most so many snapshots, and `choose`"
import copy
import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from fastswa.averaging.average import Average
from fastswa.averaging.choice import choose
from fastswa.averaging.ensembles import latest
from fastswa.averaging.posthoc import PostHocEMA
from fastswa.averaging.rules import ema, equal
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.swa_variants import PostHocEMACB
from fastswa.random_state import get_rng_state
from helpers import Hits, copied, ctrl_c, data, learner, moments, net, same


def path(kind, steps=400):
    "Weights of a run in float64, (steps, 3): a random walk, noise about a way that slows down, a jump"
    g = np.random.default_rng(0)
    if kind == 'walk': return g.normal(size=(steps, 3)).cumsum(0)/10
    if kind == 'jump': return np.repeat(np.arange(steps) >= 0.8*steps, 3).reshape(steps, 3)*1.
    return 5*0.99**np.arange(steps)[:, None] + g.normal(size=(steps, 3))


def followed(values, **kwargs):
    "A layer that had these weights one after the other, and the `PostHocEMA` that saw them"
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    average = PostHocEMA(model, **{'every': len(values)//40, **kwargs})
    for v in values: put(model, v) or average.update()
    return model, average


@cache
def followed_path(kind):
    "`path(kind)` and what has followed it, for tests that only read"
    return path(kind), *followed(path(kind))


def put(model, v):
    with torch.no_grad(): model.weight.copy_(torch.as_tensor(v)[None])


def ema_of(values, half_life):
    "The definition, step by step"
    res, decay = values[0], 0.5**(1/half_life)
    for v in values[1:]: res = decay*res + (1 - decay)*v
    return res


def weight(average, *args): return average.reconstruct(*args)['weight'][0].numpy()


@pytest.mark.parametrize('kind', ['walk', 'noise', 'jump'])
@pytest.mark.parametrize('spacings', [1, 1.5, 2, 4, 8, 16])
def test_an_ema_of_any_half_life_above_the_spacing(kind, spacings):
    "Wrong: windows in which the first weights, a half-life's worth of them, are missing (3 % at a fifth of the run)"
    values, _, average = followed_path(kind)
    half_life = spacings*10
    right = ema_of(values, half_life)
    for rule in (ema(half_life=half_life), ema(half_life=f'{half_life/400}dur'), ema(2**(-1/half_life))):
        got = weight(average, rule)
        assert np.linalg.norm(got - right) < 0.005*np.linalg.norm(values - values.mean(0), axis=1).max(), rule
    assert average.residual(rule) < 0.01


@pytest.mark.parametrize('step', [100, 210, 400])
@pytest.mark.parametrize('rule', [ema(half_life=30, warmup='ratio'), equal(), lambda n: 2/(n + 2)])
def test_other_rules_and_earlier_steps(rule, step):
    values, _, average = followed_path('walk')
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    direct = Average(model, rule)
    for v in values[:step]: put(model, v) or direct.update()
    right = direct.weights['weight'][0].numpy()
    np.testing.assert_allclose(weight(average, rule, step), right, atol=0.01*np.abs(values).max())


@pytest.mark.parametrize('shape, falls', [('linear', lambda x: 1 - x), ('1-sqrt', lambda x: 1 - x**0.5),
                                          ('cosine', lambda x: (1 + np.cos(np.pi*x))/2)])
@pytest.mark.parametrize('k', [1, 4, 16, 39])
def test_a_merge_counts_stretches_as_the_rate_falls_in_them(shape, falls, k):
    "Wrong: stretches in reverse order, or those that were thinned out as long as the others"
    values, _, average = followed_path('walk')
    edges = np.array([0, *average.steps][-k - 1:])
    f = falls((edges - edges[0])/(edges[-1] - edges[0]))
    right = sum((a - b)*values[i:j].mean(0) for i, j, a, b in zip(edges, edges[1:], f, f[1:]))
    np.testing.assert_allclose(weight(average, latest(k, shape)), right, atol=0.01*np.abs(values).max())


def test_at_most_so_many_are_stored_and_evenly():
    "Wrong: the newest only, the oldest only, or twice the memory for a moment"
    model = nn.Linear(1, 1)
    for keep in (2, 3, 10, 40):
        average = PostHocEMA(model, every=3, keep=keep)
        for n in range(1, 700):
            average.update()
            assert len(average._stored) <= keep
            assert min(average._stored) == 1
        gaps = np.diff(average.steps[:-1])
        if keep >= 10: assert max(gaps) <= 2*min(gaps) and max(gaps) <= 4*699/keep, (keep, gaps)
    average = PostHocEMA(model, every=3, keep=None)
    for n in range(200): average.update()
    assert average.steps == [*range(3, 199, 3), 200]


@pytest.mark.parametrize('at', [55, 90, 119])
def test_a_folder_that_was_thinned_after_the_state_was_saved(tmp_path, at):
    "The run that goes on from the state ends as one in memory. Wrong: an error about the files that are gone"
    values = path('walk', 160)
    model, whole = followed(values, every=5, keep=12)
    part = PostHocEMA(model, every=5, keep=12, folder=tmp_path)
    for i, v in enumerate(values[:120], 1):
        put(model, v)
        part.update()
        if i == at: saved = copy.deepcopy(part.state_dict())
    for _ in range(2):                       # also if it is killed once more before a new state is saved
        part = PostHocEMA(model, every=5, keep=12, folder=tmp_path)
        part.load_state_dict(saved)
        for v in values[at:at + 20]: put(model, v) or part.update()
    for v in values[at + 20:]: put(model, v) or part.update()
    assert len([*tmp_path.iterdir()]) == len(part._stored) <= 12
    for rule in (ema(half_life=20), 0.1):
        assert abs(weight(part, rule) - weight(whole, rule)).max() < 0.01*np.abs(values).max()
    next(tmp_path.glob('*50.pt')).unlink()
    with pytest.raises(ValueError, match='snapshots are missing'):
        PostHocEMA(model, folder=tmp_path).load_state_dict(part.state_dict())


def truth(values, row, steps):
    "The weights of a candidate, by their definition"
    if row['average'] == 'raw': return values[-1]
    if row['average'] == 'ema': res = ema_of(values, row['half_life']*len(values))
    else: res = values[[0, *steps][-row['k'] - 1]:].mean(0)
    return row['blend']*res + (1 - row['blend'])*values[-1]


@pytest.mark.parametrize('row', [
    dict(average='raw'), dict(average='ema', half_life=0.05, blend=1.), dict(average='ema', half_life=0.2, blend=0.6),
    dict(average='ema', half_life=0.5, blend=1.5), dict(average='merge linear', k=8, blend=1.),
    dict(average='merge linear', k=16, blend=0.6)])
@pytest.mark.parametrize('mode', ['max', 'min'])
def test_the_best_is_the_one_that_it_is_known_to_be(row, mode):
    "A bowl whose lowest point is one of the candidates, in closed form"
    values, model, average = followed_path('noise')
    target = torch.as_tensor(truth(values, row, average.steps))
    def distance(m): return (m.weight[0] - target).square().sum()*(1 if mode == 'min' else -1)
    result = choose(average, distance, (0.05, 0.2, 0.5), merges=(8, 16), blends=(0.6, 1., 1.5), shapes=('linear',),
                    mode=mode)
    assert len(result.table) == 1 + 3*(3 + 2)
    assert {k: v for k, v in result.best.items() if k in row} == row
    for r in result.table:
        if r['residual'] is not None and r['residual'] > 0.01: continue
        right = (torch.as_tensor(truth(values, r, average.steps)) - target).square().sum().item()
        np.testing.assert_allclose(abs(r['score']), right, atol=0.02*values.std()**2, rtol=0.02)
    np.testing.assert_allclose(result.average.weights['weight'][0], target, atol=0.02*values.std())


def test_the_best_average_where_the_raw_weights_are_better():
    "Wrong: no half-life at all in what comes out, or an average that is not the best of the others"
    _, model, average = followed_path('noise')
    raw = model.weight[0].clone()
    def distance(m): return (m.weight[0] - raw).square().sum()
    args = dict(half_lives=(0.05, 0.2, 0.5), merges=(8,), shapes=('linear',), blends=(1.,), mode='min')
    both, without = choose(average, distance, **args), choose(average, distance, raw=False, **args)
    assert both.best['average'] == 'raw' and both.best['score'] == 0
    assert without.table == both.table[1:] and without.best == min(both.table[1:], key=lambda r: r['score'])
    with without.average.applied():
        assert distance(model).item() == pytest.approx(without.best['score'], rel=1e-5)


def watched_net(n=60, **kwargs):
    "A net with BatchNorm and dropout after `n` steps, its training batches, and what has watched it"
    model, batches = net(dropout=0.2), [*data(48).train]
    average, opt = PostHocEMA(model, every=2, **kwargs), torch.optim.SGD(model.parameters(), 0.3)
    for i in range(n):
        x, y = batches[i % len(batches)]
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        average.update()
    return model, batches, average


FEW = dict(half_lives=(0.05, 0.2), merges=(4,), shapes=('linear',)) # with the raw weights and two blends: 7 candidates


def loss(batches):
    def f(m): return sum(nn.functional.cross_entropy(m(x), y).item() for x, y in batches)
    return f


def test_statistics_fit_each_candidate():
    "Pooled over all batches by hand. Wrong: those of the raw weights, of the candidate before, or averaged ones"
    model, batches, average = watched_net()
    seen = []

    def check(m):
        assert not any(o.training for o in m.modules())
        x = torch.cat([x for x, _ in batches]).double()
        h = x@m[0].weight.double().T + m[0].bias.double()
        right = torch.allclose(m[1].running_mean.double(), h.mean(0), rtol=1e-4, atol=1e-5)
        right &= torch.allclose(m[1].running_var.double(), h.var(0), rtol=1e-4, atol=1e-5)
        seen.append(right)
        return -len(seen)*(len(seen) < 5) - 9*(len(seen) != 5)
    result = average.choose(check, half_lives=(0.05, 0.2, 0.5), merges=(4,), shapes=('linear',), bn_data=batches)
    assert seen == [False] + [True]*8                      # raw has those of its run
    assert result.best is result.table[4]                  # and what is kept is not what came last
    alone = result.average.module()
    x = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(alone[1].running_mean, alone[0](x).mean(0), rtol=1e-4, atol=1e-5)
    assert not alone.training and not any(p.requires_grad for p in alone.parameters())


@pytest.mark.parametrize('applied', [False, True])
@pytest.mark.parametrize('what', ['loss', 'raises', 'writes', 'train mode'])
def test_nothing_of_the_model_is_changed(applied, what):
    "Weights, buffers, modes and random state, whatever `evaluate` does, and also if the model holds an average"
    model, batches, average = watched_net()
    model.train()
    model[3].eval()

    def evaluate(m):
        torch.rand(3)
        if what == 'raises': raise FloatingPointError('the seventh digit')
        if what == 'writes':
            for t in m.state_dict().values(): t.mul_(2)
        if what == 'train mode': m.train()
        return loss(batches)(m)

    def look():
        modes = [m.training for m in model.modules()]
        before, rng = copied(model.state_dict()), get_rng_state()
        if what == 'raises':
            with pytest.raises(RuntimeError, match='no candidate has a score: FloatingPointError: the seventh digit'):
                average.choose(evaluate, bn_data=batches, **FEW)
        else: average.choose(evaluate, bn_data=batches, mode='min', **FEW)
        assert same(copied(model.state_dict()), before) and modes == [m.training for m in model.modules()]
        assert torch.equal(rng['torch'], get_rng_state()['torch']) and rng['python'] == get_rng_state()['python']
    if applied:
        with average.applied(): look()
    else: look()


def test_blends_are_with_the_raw_weights_also_where_the_model_holds_an_average():
    model, batches, average = watched_net()
    args = dict(half_lives=(0.1,), merges=(), blends=(0.3,), mode='min', bn_data=batches)
    alone = average.choose(loss(batches), **args)
    with average.applied(): again = average.choose(loss(batches), **args)
    assert [r['score'] for r in alone.table] == [r['score'] for r in again.table]


def test_one_value_is_as_good_as_a_list_and_a_generator():
    _, _, average = followed_path('noise')
    one = average.choose(lambda m: 0, half_lives=0.1, merges=4, shapes='linear', blends=0.5)
    lists = dict(half_lives=iter([0.1]), merges=iter([4]), shapes=['linear'], blends=iter([0.5]))
    same_one = average.choose(lambda m: 0, **lists)
    assert one.table == same_one.table and len(one.table) == 3


def test_weights_that_never_move_stay_as_they_are():
    "A frozen mask of infinities, whose blend with itself would be NaN"
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(3, 1, bias=False, dtype=torch.float64)
            self.mask = nn.Parameter(torch.tensor([0., -math.inf]), requires_grad=False)
    model = Masked()
    average = PostHocEMA(model, every=5)
    for v in path('noise', 100): put(model, v) or average.update()
    def mask(m): return float(m.mask.isnan().any()) - m.mask.isinf().sum()
    result = average.choose(mask, merges=(4,), blends=(0.3, 1., 2.))
    assert all(r['score'] == -1 for r in result.table)


@pytest.mark.parametrize('n', [1, 2, 6])
def test_ctrl_c_keeps_what_was_evaluated(n):
    model, batches, average = watched_net()
    before, scores = copied(model.state_dict()), []

    def evaluate(m):
        if len(scores) == n - 1: raise KeyboardInterrupt
        scores.append(loss(batches)(m))
        return scores[-1]
    if n == 1:
        with pytest.raises(KeyboardInterrupt): average.choose(evaluate, mode='min', bn_data=batches, **FEW)
    else:
        with pytest.warns(UserWarning, match=f'among {n - 1} of 7 candidates'):
            result = average.choose(evaluate, mode='min', bn_data=batches, **FEW)
        assert [r['score'] for r in result.table] == scores and result.best['score'] == min(scores)
        assert math.isclose(loss(batches)(result.average.module()), min(scores), rel_tol=1e-6)
    assert same(copied(model.state_dict()), before)


FILES = 'averaging/choice.py',


def test_ctrl_c_at_any_line():
    "The model is as before, and what is kept are the weights of the best row. Wrong: half of both"
    model, batches, average = watched_net()
    before = copied(model.state_dict())
    results = []

    def search():      # the highest loss: that of the average, which takes the place of the raw weights
        results.append(average.choose(loss(batches), half_lives=(0.1,), merges=(), blends=(1.,), mode='max',
                                      bn_data=batches[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        lines = moments(search, FILES, last=FILES)
        assert len(lines) > 40
        for at in lines:
            results.clear()
            ctrl_c(search, at)
            assert same(copied(model.state_dict()), before), at
            for r in results: assert math.isclose(loss(batches)(r.average.module()), r.best['score'], rel_tol=1e-6)


@pytest.mark.parametrize('bad', [float('nan'), ValueError('two\nlines'), 'no number', FloatingPointError()])
def test_a_candidate_without_a_score_has_a_note_and_others_go_on(bad):
    model, batches, average = watched_net()
    count = 0

    def evaluate(m):
        nonlocal count
        count += 1
        if count not in (1, 3): return -count
        if isinstance(bad, Exception): raise bad
        return bad
    result = average.choose(evaluate, half_lives=(0.1, 0.3), merges=(4,), blends=(1.,), bn_data=batches)
    notes = [r['note'] for r in result.table]
    assert [bool(n) for n in notes] == [True, False, True, False, False] and '\n' not in notes[0]
    assert [math.isnan(r['score']) for r in result.table] == [True, False, True, False, False]
    assert result.best is result.table[1]
    assert str(result.best['half_life']) in repr(result)
    result.plot()


def test_a_half_life_below_the_spacing_is_marked():
    _, _, average = followed_path('noise')
    result = average.choose(lambda m: 0, half_lives=(0.002, 0.005, 0.1), merges=())
    notes = {r['half_life']: r['note'] for r in result.table}
    assert notes[0.002] and notes[0.005] and not notes[0.1]


def test_what_is_wrong_is_said_before_anything_is_tried():
    model, batches, average = watched_net()
    def never(m): raise AssertionError
    for kwargs, text in [
            (dict(half_lives=(0.1, 0)), 'share of the updates, must be a number above 0 and at most 1; got 0'),
            (dict(half_lives=('0.1dur',)), "got '0.1dur'"), (dict(half_lives=(2,)), 'got 2'),
            (dict(merges=(31,)), 'a merge of 31 snapshots needs as many; there are 30'),
            (dict(merges=(0,)), 'got 0'), (dict(shapes=('sqrt',)), "got 'sqrt'"),
            (dict(bn_data=iter(batches)), 'give a list or loader; got a list_iterator'),
            (dict(blends=(-1,)), 'a blend must be a number above 0; got -1'), (dict(mode='low'), "got 'low'")]:
        with pytest.raises(ValueError, match=text): average.choose(never, **{'bn_data': batches, **kwargs})
    for n in (0, 1):
        young = PostHocEMA(model)
        for _ in range(n): young.update()
        with pytest.raises(RuntimeError, match='a reconstruction needs two snapshots or more'): young.choose(never)
    with pytest.warns(UserWarning, match='BatchNorm'), pytest.raises(RuntimeError): average.choose(never, **FEW)


def test_snapshots_of_another_model(tmp_path):
    followed(path('walk', 40), folder=tmp_path)
    with pytest.raises(ValueError, match='1.weight'):
        PostHocEMA(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1)), folder=tmp_path)
    with pytest.raises(ValueError, match='weight'): PostHocEMA(nn.Linear(4, 1, bias=False), folder=tmp_path)


# --- with a learner


def test_a_choice_by_a_column_of_the_table_changes_nothing():
    "Two fits with a choice between them are as two fits, bit for bit; the scores are those of `validate`"
    dls, held_out = data(shuffle=True), [*data(64).valid]
    def run(choosing):
        torch.manual_seed(1)
        cb = PostHocEMACB(apply=False)
        learn = learner(cb, BNUpdateCB(), MetricsCB(accuracy=Hits()), model=net(dropout=0.2), dls=data(shuffle=True))
        learn.quiet = True
        learn.fit(3)
        result = cb.choose(learn, held_out, 'accuracy', **FEW) if choosing else None
        if choosing:
            learn.averages.add('chosen', result.average, every=None)
            assert learn.validate('chosen', dl=held_out)[0]['accuracy'] == result.best['score']
            assert learn.validate('raw', dl=held_out)[0]['accuracy'] == result.table[0]['score']
            assert result.best['score'] == max(r['score'] for r in result.table)
        history = copy.deepcopy(learn.history)
        learn.fit(1)
        return history, learn.history, copied(learn.model.state_dict())
    (h, h2, w), (g, g2, v) = run(True), run(False)
    assert h == g and h2 == g2 and same(w, v)


def test_forty_are_stored_of_every_fit_and_of_several():
    cb = PostHocEMACB(apply=False)
    learn = learner(cb)
    learn.quiet = True
    for _ in range(2):
        learn.fit(8)
        assert len(cb.average._stored) == 40 and cb.average.steps[-1] == cb.average.n


@pytest.mark.parametrize('args, says', [
    ((0,), 'k must be a whole number, 1 or more; got 0'), ((-2, '1-sqrt'), 'got -2'), ((2.5,), 'got 2.5'),
    ((3, 'exp'), "shape must be 'linear', '1-sqrt' or 'cosine'; got 'exp'"), ((3, None), 'got None')])
def test_a_merge_that_cannot_be(args, says):
    "Wrong: ZeroDivisionError or KeyError, in the reconstruction"
    with pytest.raises(ValueError, match=says): latest(*args)


@pytest.mark.parametrize('write', [
    lambda p: p.write_bytes(b'garbage'), lambda p: p.write_bytes(b''), lambda p: torch.save([1, 2], p),
    lambda p: torch.save(nn.Linear(1, 1), p), lambda p: p.write_bytes(b'PK' + bytes(100))])
def test_a_file_among_the_snapshots_that_is_none(write, tmp_path):
    "Wrong: an error that does not say which file it is"
    write(tmp_path/'ema-00000007.pt')
    with pytest.raises(ValueError, match='ema-00000007.pt is damaged, or no snapshot of PostHocEMA: .'):
        PostHocEMA(nn.Linear(1, 1), folder=tmp_path)
