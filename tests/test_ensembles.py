"LatestAverage, SWAG, PostHocEMA and soups: any sequence of events, against float64; the raw model is never touched"
import copy
import io
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastswa.averaging.average import Average, update_all
from fastswa.averaging.batchnorm import update_bn
from fastswa.averaging.ensembles import LatestAverage, greedy_soup, uniform_soup
from fastswa.averaging.posthoc import PostHocEMA, fit, power_profile
from fastswa.averaging.rules import equal, power
from fastswa.averaging.swag import SWAG
from helpers import CORE, TiedNet, ctrl_c, moments, floats, same


def walked(average, net, n):
    "Take `n` snapshots along a random walk; returns the weights at each, in float64"
    g, seen = torch.Generator().manual_seed(0), []
    for _ in range(n):
        net.step(g)
        average.update()
        seen.append({k: v.double().numpy().copy() for k, v in floats(net).items()})
    return seen


def of(seen, k): return np.stack([s[k] for s in seen])


kinds = {'latest': partial(LatestAverage, k=3), 'swag': partial(SWAG, rank=2), 'swag-diag': partial(SWAG, rank=0),
         'posthoc': partial(PostHocEMA, sigma_rels=(0.1, 0.2), every=2)}


def check(kind, avg, seen):
    for k, v in avg.weights.items():
        x = of(seen, k)
        if kind == 'latest': right = x[-3:].mean(0)
        elif kind == 'posthoc': right = np.einsum('i,i...->...', power_profile(0.1, len(x)), x)
        else: right = x.mean(0)
        np.testing.assert_allclose(v.double().numpy(), right, rtol=1e-4, atol=1e-4)
    if 'swag' in kind and len(seen) > 1:
        for k, v in avg.variance.items():
            np.testing.assert_allclose(v.double().numpy(), of(seen, k).var(0), rtol=1e-3, atol=1e-4)
        assert same(avg.sample(scale=0), avg.mean)
    if kind == 'posthoc' and len(avg.steps) > 1:
        for k, v in avg.reconstruct(0.2).items():
            if 'running' in k: continue
            right = np.einsum('i,i...->...', power_profile(0.2, len(seen)), of(seen, k))
            np.testing.assert_allclose(v.double().numpy(), right, rtol=1e-4, atol=1e-4)


ops = st.lists(st.sampled_from(['step', 'update', 'other', 'apply', 'fail', 'reload', 'replace', 'nan', 'look']),
               min_size=5, max_size=30)


@settings(max_examples=80)
@given(kind=st.sampled_from(list(kinds)), ops=ops, norm=st.booleans(),
       tied=st.sampled_from([None, 'shared', 'transposed']),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_any_sequence(kind, ops, norm, tied, dtype):
    g = torch.Generator().manual_seed(0)
    net, seen = TiedNet(norm, tied, dtype), []
    avg = kinds[kind](net)
    for op in ops:
        if op == 'step':
            net.step(g)
            continue
        raw, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        if op in ('update', 'other'):
            assert avg.update(copy.deepcopy(net) if op == 'other' else None) == len(seen) + 1
            seen.append({k: v.double().numpy().copy() for k, v in floats(net).items()})
        if op == 'apply' and seen:
            with avg.applied():
                for k, v in floats(net).items(): assert torch.equal(v, avg.weights[k].to(v.dtype))
                with pytest.raises(RuntimeError, match='outside of applied'): avg.update()
        if op == 'fail' and seen:
            with pytest.raises(KeyboardInterrupt), avg.applied(): raise KeyboardInterrupt
        if op == 'reload':
            state = copy.deepcopy(avg.state_dict())
            avg = kinds[kind](net)
            avg.load_state_dict(state)
        if op == 'replace' and not tied: net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
        if op == 'nan':
            with torch.no_grad():
                kept = net.a.bias[0].item()
                net.a.bias[0] = float('nan')
                with warnings.catch_warnings(record=True): avg.update()
                net.a.bias[0] = kept
        if op == 'look' and len(seen) > 1:
            def forward(m, b): return m.b(m.norm(b).to(dtype))
            if 'swag' in kind: avg.predict([torch.ones(2, 3)], n=1, forward=forward, bn_data=[torch.eye(3)])
            if kind == 'posthoc' and len(avg.steps) > 1:
                with pytest.raises(KeyboardInterrupt), avg.using(0.15): raise KeyboardInterrupt
        assert same(net.state_dict(), raw) and torch.equal(torch.get_rng_state(), rng), op
        assert avg.n == len(seen)
        if seen: check(kind, avg, seen)


@pytest.mark.parametrize('kind', kinds)
def test_what_is_kept_follows_the_module(kind):
    "Snapshots in the layout, order or dtype of tensors that the module no longer has would be mixed up or frozen"
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3))
    avg, g, seen = kinds[kind](net), torch.Generator().manual_seed(0), []
    for change in (lambda: None, net.double, lambda: net.to(memory_format=torch.channels_last),
                   lambda: None, net.float):
        change()
        for _ in range(2):
            with torch.no_grad():
                for p in net.parameters(): p += torch.randn(p.shape, generator=g)
            avg.update()
            seen.append({k: v.double().numpy().copy() for k, v in floats(net).items()})
        check(kind, avg, seen)
    net[0].weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match='0.weight is'): avg.update()


@pytest.mark.parametrize('kind', kinds)
def test_weights_that_are_no_longer_tied(kind):
    "What was kept of one tensor has to become that of two"
    net = TiedNet(tied='shared')
    avg, g = kinds[kind](net), torch.Generator().manual_seed(0)
    seen = walked(avg, net, 4)
    net.b.weight = nn.Parameter(net.b.weight.detach().clone())
    for _ in range(2):
        net.step(g)
        avg.update()
        seen.append({k: v.double().numpy().copy() for k, v in floats(net).items()})
        check(kind, avg, seen)
    assert not torch.equal(avg.weights['a.weight'], avg.weights['b.weight'])


@pytest.mark.parametrize('kind', kinds)
def test_reset_forgets_everything(kind):
    net = TiedNet()
    avg = kinds[kind](net)
    walked(avg, net, 5)
    avg.reset()
    assert avg.n == 0
    with pytest.raises(RuntimeError, match='empty'): avg.weights
    check(kind, avg, walked(avg, net, 4))


@pytest.mark.parametrize('kind', kinds)
def test_the_options_of_an_average(kind):
    "Another dtype, some of the weights; update_all; a state that goes through a file"
    net = TiedNet(norm=True)
    options = dict(dtype=torch.float64, exclude='norm*')
    avg = lambda: kinds[kind](net, **options)
    one, plain, g = avg(), Average(net, equal()), torch.Generator().manual_seed(0)
    for _ in range(5):
        net.step(g)
        update_all([plain, one], steps=3)
    assert (one.n, plain.n) == (5, 5)
    assert set(one.weights) == {'a.weight', 'a.bias', 'b.weight'}
    assert {v.dtype for v in one.weights.values()} == {torch.float64}
    two = avg()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    net.step(g)
    for a in (one, two): a.update()
    assert same(one.weights, two.weights)
    if 'swag' in kind: assert same(one.sample(generator=g.manual_seed(1)), two.sample(generator=g.manual_seed(1)))
    if kind == 'posthoc': assert same(one.reconstruct(0.15), two.reconstruct(0.15))


def test_latest_average_after_a_thousand_snapshots_is_the_mean_of_the_last():
    "A running sum drifts: here by the rounding of weights that were a million times larger"
    net = nn.Linear(2, 2)
    avg, g = LatestAverage(net, k=4), torch.Generator().manual_seed(0)
    last = []
    for i in range(1000):
        with torch.no_grad(): net.weight.copy_(torch.randn(2, 2, generator=g)*(1e6 if i < 990 else 1))
        avg.update()
        last.append(net.weight.detach().double().numpy().copy())
    np.testing.assert_allclose(avg.weights['weight'].numpy(), np.mean(last[-4:], 0), rtol=1e-5, atol=1e-6)
    assert avg.n == 1000


def test_weights_stay_the_same_tensors():
    "Somebody who looks at `weights` once sees later updates, as with any Average"
    net = nn.Linear(2, 2)
    for avg in (LatestAverage(net, k=2), SWAG(net, 2), PostHocEMA(net)):
        avg.update()
        before = avg.weights['weight'].data_ptr()
        for _ in range(3): avg.update()
        assert avg.weights['weight'].data_ptr() == before


@settings(max_examples=40)
@given(values=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=30), offset=st.sampled_from([0., 1., 1e3, 1e6]))
def test_variance_is_never_negative(values, offset):
    "The mean of the squares less the square of the mean is"
    net = nn.Linear(1, 1, bias=False)
    swag, seen = SWAG(net, rank=2), []
    for v in values:
        nn.init.constant_(net.weight, offset + v)
        swag.update()
        seen.append(net.weight.item())
    got, right = swag.variance['weight'].item(), np.var(seen)
    assert got >= 0
    np.testing.assert_allclose(got, right, rtol=0.2, atol=(2e-7*max(offset, 1))**2*10)
    assert torch.isfinite(swag.sample(1.)['weight'])


def test_tied_weights_are_sampled_once():
    net = TiedNet(tied='transposed')
    swag = SWAG(net, rank=3)
    walked(swag, net, 5)
    sample = swag.sample()
    assert torch.equal(sample['b.weight'], sample['a.weight'].t())
    assert sample['b.weight'].data_ptr() == sample['a.weight'].data_ptr()
    assert not torch.equal(sample['a.weight'], swag.mean['a.weight'])
    sample['a.weight'].zero_()
    assert swag.mean['a.weight'].abs().sum() > 0                                 # a copy, not the mean itself


def test_complex_weights_have_the_variance_of_both_parts():
    "The square of a complex deviation is not its size"
    net = nn.Module()
    net.w = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    swag, g, seen = SWAG(net, rank=0), torch.Generator().manual_seed(0), []
    for _ in range(20):
        with torch.no_grad(): net.w.copy_(torch.randn(1, dtype=torch.complex64, generator=g)*(1 + 2j))
        swag.update()
        seen.append(net.w.item())
    np.testing.assert_allclose(swag.variance['w'].real.item(), np.var(seen),
                               rtol=1e-4)      # numpy's of complex numbers
    drawn = [swag.sample(1., g)['w'].item() for _ in range(2000)]
    np.testing.assert_allclose(np.var(drawn), np.var(seen), rtol=0.1)


def test_a_sample_depends_on_its_generator_alone():
    net = TiedNet()
    swag = SWAG(net, rank=3)
    walked(swag, net, 5)
    g, state = torch.Generator().manual_seed(3), torch.get_rng_state()
    one = swag.sample(generator=g)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert same(one, swag.sample())
    assert not same(one, swag.sample())


class Counting(nn.Module):
    "Changes a buffer in each forward pass, and replaces another"
    def __init__(self):
        super().__init__()
        self.lin, self.out, self.drop = nn.Linear(3, 4), nn.Linear(4, 2), nn.Dropout()
        self.bn, self.frozen = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.register_buffer('calls', torch.tensor(0.))
        self.register_buffer('last', torch.tensor(0.))
        self.frozen.eval()

    def forward(self, x):
        self.calls += 1
        self.last = x.mean()
        return self.out(self.drop(self.frozen(self.bn(self.lin(x)))))


def counting():
    torch.manual_seed(0)
    net = Counting()
    swag, g = SWAG(net, rank=2), torch.Generator().manual_seed(0)
    for _ in range(4):
        with torch.no_grad():
            for p in net.parameters(): p += torch.randn(p.shape, generator=g)/5
        swag.update()
    return net, swag


def everything(net, *generators):
    "What must not change: contents and identities of all tensors, modes, random state"
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return ([(k, id(t), t.clone()) for k, t in tensors], [m.training for m in net.modules()],
            [o.get_state() for o in (torch.default_generator, *generators)])


def unchanged(a, b):
    return (all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a[0], b[0], strict=True)) and a[1] == b[1]
            and all(map(torch.equal, a[2], b[2])))


def test_predict_leaves_no_trace_and_frozen_layers_alone():
    net, swag = counting()
    g = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(20, 3))
    loader, train = (DataLoader(data, 4, shuffle=True, generator=o) for o in (g, None))
    before, stats = everything(net, g), []
    net.frozen.register_forward_hook(lambda m, i, o: stats.append(m.running_mean.clone()))
    got = swag.predict(loader, n=3, bn_data=train)
    assert unchanged(before, everything(net, g))
    assert got.shape == (20, 2)
    assert all(torch.equal(s, torch.zeros(4)) for s in stats)                    # its own, which is frozen
    net.out.register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): swag.predict(loader, n=3, bn_data=train)
    assert unchanged(before, everything(net, g))


def test_predict_takes_a_shuffled_loader_in_one_order():
    "A loader that is gone through for each sample gives another order each time, and the mean mixes rows"
    net = TiedNet()
    swag = SWAG(net, rank=2)
    walked(swag, net, 4)
    x = torch.arange(30.).view(10, 3)
    loader = DataLoader(TensorDataset(x), 3, shuffle=True, generator=torch.Generator().manual_seed(1))
    seen = torch.cat([b[0] for b in loader])
    loader.generator.manual_seed(1)
    kw = dict(n=4, activation=nn.Identity())
    torch.testing.assert_close(swag.predict(loader, generator=torch.Generator().manual_seed(2), **kw),
                               swag.predict([seen], generator=torch.Generator().manual_seed(2), **kw))


def test_predict_in_other_ways():
    "Dicts, a generator of batches, half precision, activations; the mean of probabilities is a probability"
    class ByName(nn.Linear):
        def forward(self, *, x): return super().forward(x)
    net = ByName(3, 2).bfloat16()
    swag, g = SWAG(net, rank=2), torch.Generator().manual_seed(0)
    for _ in range(4):
        with torch.no_grad(): net.weight += torch.randn(2, 3, generator=g)
        swag.update()
    x = torch.randn(7, 3).bfloat16()*30
    p = swag.predict(({'x': b} for b in x.split(3)), n=7)
    assert (p.dtype, p.shape) == (torch.float32, (7, 2))
    assert p.max() <= 1
    torch.testing.assert_close(p.sum(1), torch.ones(7))
    same = swag.predict([x], n=2, scale=0, forward=lambda m, b: m(x=b), activation=nn.Identity())
    with swag.applied(): torch.testing.assert_close(same, net(x=x).detach().float())


FILES = 'fastswa/averaging/', *CORE, '/contextlib.py'      # the code in whose lines Ctrl-C is pressed


def test_ctrl_c_at_any_line_of_predict():
    "A restore that can be missed leaves a sample in the model, which is then trained on"
    net, swag = counting()
    data = [torch.randn(8, 3)]
    before = everything(net)
    def predict(): swag.predict([torch.ones(4, 3)], n=2, bn_data=data)
    lines = moments(predict, FILES, last=FILES)
    assert len(lines) > 300 and unchanged(before, everything(net))
    for at in lines:
        ctrl_c(predict, at)
        assert unchanged(before, everything(net)), at


def test_fit_agrees_with_every_step_of_the_run():
    "Any steps, any exponents: the small problem is the whole one"
    rng = np.random.default_rng(0)
    for _ in range(20):
        steps = sorted(rng.choice(np.arange(2, 300), rng.integers(1, 8), replace=False).tolist())
        stored, wanted = rng.uniform(0.03, 0.28, 3)[:rng.integers(1, 4)], rng.uniform(0.02, 0.28)
        n = steps[-1]
        P = np.stack([np.pad(power_profile(s, t), (0, n - t)) for t in steps for s in stored], 1)
        p = power_profile(wanted, n)
        c, residual = fit(steps, [power(sigma_rel=s).exponent for s in stored], power(sigma_rel=wanted).exponent)
        np.testing.assert_allclose(c.sum(), 1, rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(P@c.ravel() - p)/np.linalg.norm(p), residual, rtol=1e-5, atol=1e-9)
        D = P[:, :-1] - P[:, -1:]      # nothing along these can make it smaller
        assert np.abs(D.T@(P@c.ravel() - p)).sum() <= 1e-7*np.linalg.norm(p)*np.linalg.norm(P), (steps, stored, wanted)


def test_posthoc_of_a_million_steps_is_finite_and_sums_to_one():
    "Powers of a million overflow, and those of their reciprocal vanish"
    for stored in ((0.05, 0.1), (0.002, 0.28)):
        c, residual = fit([10**4*i for i in range(1, 101)], [power(sigma_rel=s).exponent for s in stored],
                          power(sigma_rel=0.07).exponent)
        assert np.isfinite(c).all() and 0 < residual < 1
        np.testing.assert_allclose(c.sum(), 1, rtol=1e-8)


def test_posthoc_folder_of_a_run_that_was_taken_up_again(tmp_path):
    "A snapshot of the part that was given up, among those of the run that went on, is of other weights"
    net = TiedNet()
    first = PostHocEMA(net, every=5, folder=tmp_path)
    walked(first, net, 12)
    saved = copy.deepcopy(first.state_dict())
    g = torch.Generator().manual_seed(1)
    for _ in range(10):
        net.step(g)
        first.update()
    assert first.steps == [5, 10, 15, 20, 22]
    again = PostHocEMA(net, every=7, folder=tmp_path)
    again.load_state_dict(saved)
    assert again.steps == [5, 10, 12]
    for _ in range(2):
        net.step(g)
        again.update()
    assert again.steps == [5, 10, 14]
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f'ema-{n:08}.pt' for n in (1, 5, 10, 14)]
    (tmp_path/'ema-00000005.pt').unlink()
    with pytest.raises(ValueError, match='ema-00000005.pt'):
        PostHocEMA(net, every=7, folder=tmp_path).load_state_dict(saved)


def test_posthoc_snapshots_are_copies_on_the_cpu_with_ties(tmp_path):
    net = TiedNet(tied='transposed')
    for folder in (None, tmp_path):
        avg = PostHocEMA(net, every=4, folder=folder)
        walked(avg, net, 9)
        then = avg.reconstruct(0.15, step=8)
        walked(avg, net, 3)
        assert same(then, avg.reconstruct(0.15, step=8))
        new = avg.reconstruct(0.15)
        assert torch.equal(new['b.weight'], new['a.weight'].t())
        assert new['b.weight'].data_ptr() == new['a.weight'].data_ptr()


def test_posthoc_variances_are_not_negative():
    "A combination with negative coefficients of shrinking variances is, and its square root NaN"
    net, seen = TiedNet(norm=True), np.array([1.]*17 + [1e-3]*3)
    avg = PostHocEMA(net, every=5)
    for v in seen:
        net.norm.running_var.fill_(v)
        avg.update()
    c, _ = fit(avg.steps, [power(sigma_rel=s).exponent for s in avg.sigma_rels], power(sigma_rel=0.01).exponent)
    variances = np.array([[power_profile(s, n) @ seen[:n] for s in avg.sigma_rels] for n in avg.steps])
    assert (c*variances).sum() < 0
    assert (avg.reconstruct(0.01)['norm.running_var'] > 0).all()


def test_posthoc_snapshots_that_are_not_finite():
    "They do not count, and none is stored twice or at a step that it is not"
    net = nn.Linear(1, 1, bias=False)
    avg = PostHocEMA(net, every=2)
    for v in (1., 2., float('nan'), 3., float('inf'), 4.):
        nn.init.constant_(net.weight, v)
        with warnings.catch_warnings(record=True): avg.update()
    assert (avg.n, avg.skipped, avg.steps) == (4, 2, [2, 4])
    right = power_profile(0.1, 4) @ [1, 2, 3, 4]
    np.testing.assert_allclose(avg.reconstruct(0.1)['weight'].item(), right, rtol=1e-6)


def test_greedy_soup_takes_all_that_do_no_harm():
    states = [{'w': torch.tensor([float(v)]), 'n': torch.tensor(v)} for v in range(4)]
    soup = greedy_soup(iter(states), lambda s: 1)
    assert soup.used == [0, 1, 2, 3] and soup.scores == [1]*4 and soup.score == 1
    assert same(soup.weights, uniform_soup(states)) and soup.weights['n'] == 0
    with pytest.raises(ValueError, match='soup of states'):
        greedy_soup(states, lambda s: 1 if s['w'] % 1 == 0 else float('nan'))


def test_soups_of_half_precision_do_not_round_on_the_way():
    "fp16 sums of 3000 models would stop growing"
    states = ({'w': torch.full((2,), 1.0009765625, dtype=torch.float16)} for _ in range(3000))
    assert torch.equal(uniform_soup(states)['w'], torch.full((2,), 1.0009765625, dtype=torch.float16))


def test_a_soup_with_its_statistics_recomputed():
    "`evaluate` may put the soup into a model and recompute: the states stay as they are"
    def model(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(16, 3)
    m, states = model(0), [model(s).state_dict() for s in range(3)]
    before = copy.deepcopy(states)

    @torch.no_grad()
    def evaluate(state):
        m.load_state_dict(state)
        update_bn(m, [x])
        return -m.eval()(x).square().mean()
    soup = greedy_soup(states, evaluate)
    assert all(map(same, before, states))
    assert soup.score >= max(soup.scores) and evaluate(soup.weights) == soup.score
