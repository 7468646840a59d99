"An average of one model: any rule, module and sequence of events; raw weights bit for bit, the average as in float64"
import copy
import math
import pickle
import threading
import warnings
from fnmatch import fnmatchcase
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn, optim
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from fastswa.averaging import kernels, tensors
from fastswa.averaging.average import Average, update_all
from fastswa.averaging.bema import BEMA
from fastswa.averaging.ensembles import LatestAverage
from fastswa.averaging.posthoc import PostHocEMA
from fastswa.averaging.rules import ema, equal, power
from fastswa.averaging.swad import SWAD
from fastswa.averaging.swag import SWAG
from fastswa.averaging.tensors import find_tensors
from helpers import CORE, TiedNet, copied, ctrl_c, floats, moments, net, one, same


rules = st.one_of(st.just(equal()), st.floats(0, 1).map(lambda d: ema(decay=d)),
                  st.floats(0.1, 50).map(lambda h: ema(half_life=h)),
                  st.sampled_from(['ratio', 'power']).map(lambda w: ema(decay=0.99, warmup=w)))
ops = st.lists(st.sampled_from(['step', 'update', 'apply', 'fail', 'reload', 'replace', 'nan']),
               min_size=5, max_size=30)


@settings(max_examples=60)
@given(rule=rules, ops=ops, norm=st.booleans(), tied=st.sampled_from([None, 'shared', 'transposed']),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_any_sequence(rule, ops, norm, tied, dtype):
    g = torch.Generator().manual_seed(0)
    net = TiedNet(norm, tied, dtype)
    avg, reference, n = Average(net, rule), {}, 0

    def update():
        nonlocal n
        avg.update()
        w = 1 if n == 0 else rule(n)
        for k, v in floats(net).items():
            v = v.double().numpy().copy()
            reference[k] = v if n == 0 else reference[k] + w*(v - reference[k])
        n += 1

    for op in ops:
        raw = copy.deepcopy(net.state_dict())
        if op == 'step': net.step(g)
        if op == 'update': update()
        if op == 'apply' and n:
            with avg.applied():
                for k, v in floats(net).items(): assert torch.equal(v, avg.weights[k].to(v.dtype))
        if op == 'fail' and n:
            with pytest.raises(KeyboardInterrupt), avg.applied(): raise KeyboardInterrupt
        if op == 'reload':
            state = copy.deepcopy(avg.state_dict())
            avg = Average(net, rule)
            avg.load_state_dict(state)
        if op == 'replace' and not tied: net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
        if op == 'nan':
            with torch.no_grad():
                kept = net.a.bias[0].item()
                net.a.bias[0] = float('nan')
                if avg.skipped: avg.update()
                else:
                    with pytest.warns(UserWarning, match='NaN'): avg.update()
                net.a.bias[0] = kept
        if op != 'step':
            for k, v in net.state_dict().items(): assert torch.equal(v, raw[k]), (op, k)
        assert avg.n == n
        for k, v in (avg.weights if n else {}).items():
            np.testing.assert_allclose(v.double().numpy(), reference[k], rtol=1e-4, atol=1e-4)


def test_a_model_that_was_swapped_into_another_dtype_and_back():
    net = nn.Linear(2, 2, dtype=torch.bfloat16)
    avg = Average(net)
    avg.update()
    raw = copy.deepcopy(net.state_dict())
    with avg.applied(): assert net.weight.dtype is torch.bfloat16
    assert all(torch.equal(v, raw[k]) for k, v in net.state_dict().items())


def test_legacy_weight_norm_can_be_copied():
    "deepcopy of the module fails there: it keeps a computed tensor as an attribute"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = nn.utils.weight_norm(nn.Linear(3, 2))
    net(torch.ones(1, 3))
    with pytest.raises(RuntimeError): copy.deepcopy(net)
    avg = Average(net, ema(decay=0.5))
    avg.update()
    with torch.no_grad(): net.weight_g *= 3
    avg.update()
    alone = avg.module()
    assert torch.allclose(alone.weight_g, net.weight_g*(2/3))      # (1 + 3)/2, where the raw one is 3


def test_a_compiled_model_goes_by_its_plain_names():
    "With _orig_mod. in front, nothing matches"
    def names(net):
        avg = Average(net)
        avg.update()
        return list(avg.weights)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain = names(net)
    assert names(torch.compile(net)) == plain
    net[0] = torch.compile(net[0])
    assert names(net) == plain


def test_an_average_made_before_the_model_moved():
    net = nn.Linear(2, 2)
    avg = Average(net)
    net.to('meta')
    net.to_empty(device='cpu')
    nn.init.ones_(net.weight), nn.init.zeros_(net.bias)
    avg.update()
    assert avg.weights['weight'].eq(1).all()


# --- tensors of every kind


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.half])
def test_averages_of_half_precision_are_kept_in_fp32(dtype):
    """500 snapshots of which the last 400 are 1: their mean is 0.8

    Kept in bf16 it would be 0.57 (the control), or stand still; loading keeps fp32, too (measured with torch, timm,
    torch-ema)"""
    model, control = one(dtype=dtype), torch.zeros((), dtype=dtype)
    model.other = nn.Parameter(torch.zeros(2))                             # mixed dtypes, on which others raise
    avg = Average(model)
    for i in range(500):
        nn.init.constant_(model.weight, float(i >= 100))
        if i == 333:
            state, avg = copy.deepcopy(avg.state_dict()), Average(model)
            avg.load_state_dict(state)
        avg.update()
        control += (model.weight.detach()[0, 0] - control)/(i + 1)
    assert avg.weights['weight'].dtype is torch.float32 and avg.weights['weight'].item() == pytest.approx(0.8, abs=1e-5)
    if dtype is torch.bfloat16: assert abs(control.item() - 0.8) > 0.2


def test_counters_are_copied():
    "torch's `use_buffers` averages num_batches_tracked as an integer, which stops at 1 (measured)"
    model = nn.Sequential(nn.BatchNorm1d(1))
    avg, theirs = Average(model), AveragedModel(model, use_buffers=True)
    for _ in range(1000):
        model(torch.zeros(2, 1))
        avg.update()
        theirs.update_parameters(model)
    assert theirs.module[0].num_batches_tracked == 1 and '0.num_batches_tracked' not in avg.weights
    assert avg.module()[0].num_batches_tracked == 1000
    with avg.applied(): assert model[0].num_batches_tracked == 1000


def test_spectral_norm_vectors_are_copied():
    "The mean of unit vectors is shorter than 1, and the weights divided by it grow (miles-credit#394)"
    torch.manual_seed(0)
    for make in (parametrizations.spectral_norm, nn.utils.spectral_norm):
        model = make(nn.Linear(4, 4))
        avg, opt = Average(model), optim.SGD(model.parameters(), 1.)
        for _ in range(20):
            nn.init.normal_(dict(model.named_parameters())[next(k for k, _ in model.named_parameters() if 'orig' in k)])
            model(torch.randn(8, 4)).square().mean().backward()
            opt.step(), opt.zero_grad()
            avg.update()
        vectors = {k: v for k, v in model.state_dict().items() if k.endswith(('_u', '_v'))}
        assert vectors and not set(vectors) & set(avg.weights)
        alone = avg.module().state_dict()
        for k, v in vectors.items():
            assert torch.equal(alone[k], v) and v.norm().item() == pytest.approx(1, abs=1e-5)


def test_buffers_are_neither_stale_nor_shared():
    "Recalibrating a copy must not change the model (pytorch#84053, ignite)"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer('scale', torch.zeros(1))
    model = Net()
    avg = Average(model)
    avg.update()
    model.scale.fill_(3.)                                                  # after the update
    alone = avg.module()
    assert alone.scale == 3
    for t in (*alone.buffers(), *alone.parameters()): t.fill_(9)           # as recalibrating does
    assert model.scale == 3 and model.norm.running_mean.eq(0).all() and model.norm.num_batches_tracked == 0
    assert model.norm.weight.eq(1).all() and all(v.ne(9).all() for v in avg.weights.values())
    model.norm.running_mean.fill_(5)
    assert avg.weights['norm.running_mean'].eq(0).all()


def test_weights_tied_in_part_are_averaged_once():
    "A head that is some rows of the embedding, and its transpose: each number is averaged once (timm: twice, measured)"
    m = nn.Module()
    m.embed = nn.Embedding(5, 2)
    nn.init.zeros_(m.embed.weight)
    m.head, m.back = nn.Parameter(m.embed.weight.data[:3]), nn.Parameter(m.embed.weight.data.t())
    avg = Average(m, ema(decay=0.9))
    avg.update()
    nn.init.ones_(m.embed.weight)
    avg.update()
    for k, v in avg.weights.items(): torch.testing.assert_close(v, torch.full_like(v, 0.1), msg=k)
    for _ in range(2):                                                     # one swap undoes the other, in every row
        with avg.applied():
            for p in m.parameters(): torch.testing.assert_close(p.detach(), torch.full_like(p, 0.1))
        for p in m.parameters(): assert p.eq(1).all()


def test_weights_tied_and_with_gaps():
    "Two names for every second column, one of them transposed"
    m = nn.Module()
    m.w = nn.Parameter(torch.rand(4, 6)[:, ::2])
    m.t = nn.Parameter(m.w.data.t())
    avg = Average(m)
    avg.update()
    assert torch.equal(avg.weights['t'], avg.weights['w'].t()) and torch.equal(avg.weights['w'], m.w.detach())


def test_a_real_dtype_for_complex_weights():
    "It would drop the imaginary part, and the swap would write that into the model"
    model = nn.ParameterDict(dict(c=nn.Parameter(torch.full((2,), 1 + 2j)), r=nn.Parameter(torch.ones(2))))
    try: avg = Average(model, dtype=torch.float64)
    except (ValueError, TypeError): return
    avg.update()
    assert avg.weights['c'].dtype is torch.complex128
    assert torch.equal(avg.weights['c'], torch.full((2,), 1 + 2j, dtype=torch.complex128))


# --- snapshots


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_snapshots_that_are_not_finite_are_skipped(value):
    "Left out whole, counted, and said once; one NaN would poison the average for ever (ultralytics#24986)"
    model = nn.Sequential(one(), one())
    avg, good = Average(model), []
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for i in range(8):
            for m in model: nn.init.constant_(m.weight, float(i))
            if i in (0, 3, 4): nn.init.constant_(model[i % 2].weight, value)
            else: good.append(i)
            avg.update()
    assert (avg.n, avg.skipped, len(w)) == (5, 3, 1)
    for v in avg.weights.values(): assert v.item() == pytest.approx(np.mean(good))


def test_counts_are_ints():
    "A count on the GPU would be read at each update (pytorch#157705)"
    avg = Average(net())
    assert type(avg.update()) is type(avg.n) is type(avg.skipped) is type(avg.state_dict()['n']) is int


STALE = dict(
    double=lambda m: m.double(), half=lambda m: m.half(),
    channels_last=lambda m: m.to(memory_format=torch.channels_last),
    assign=lambda m: m.load_state_dict(copied(m.state_dict()), assign=True),
    data=lambda m: setattr(m.conv.weight, 'data', m.conv.weight.data*2),
    transposed=lambda m: setattr(m.square.weight, 'data', m.square.weight.data.t()),
    moved=lambda m: m.to('meta').to_empty(device='cpu'),
    module=lambda m: setattr(m, 'square', nn.Linear(4, 4)),
    parameter=lambda m: setattr(m.norm, 'bias', nn.Parameter(torch.ones(3))),
    buffer=lambda m: setattr(m.norm, 'running_mean', torch.ones(3)),
    untied=lambda m: setattr(m, 'twin', nn.Linear(4, 4)),
    tied=lambda m: setattr(m, 'square', m.twin), frozen=lambda m: m.requires_grad_(False),
    shared=lambda m: m.share_memory())


@pytest.mark.parametrize('change', STALE)
@pytest.mark.parametrize('several', [False, True])
def test_tensors_exchanged_at_any_time(change, several):
    """Between the second and the third of six snapshots: none may come from tensors that the model no longer has

    A list of tensors that was prepared once goes stale, and the average stands still (measured)"""
    torch.manual_seed(0)
    m = nn.Module()
    m.conv, m.norm, m.square = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 4)
    m.twin = m.square
    avs, seen = [Average(m)] + [Average(m, ema(decay=0.5)) for _ in range(several)], []
    for i in range(6):
        if i == 2: STALE[change](m)
        with torch.no_grad():
            for t in (*m.parameters(), m.norm.running_mean, m.norm.running_var): t.copy_(torch.randn(t.shape))
        update_all(avs) if several else avs[0].update()
        seen.append({k: v.double().clone() for k, v in m.state_dict().items() if v.is_floating_point()})
    for k, v in avs[0].weights.items():
        if (change, k) == ('tied', 'square.weight') or (change, k) == ('tied', 'square.bias'): continue
        torch.testing.assert_close(v.double(), torch.stack([s[k] for s in seen]).mean(0), rtol=2e-3, atol=2e-3, msg=k)
    raw = copied(m.state_dict())
    with avs[0].applied(): assert not same(copied(m.state_dict()), raw)
    assert same(copied(m.state_dict()), raw)


def test_copies_of_an_average_follow_their_own_model():
    "deepcopy and pickle take the model along; together with the original, each has to be updated from its own"
    model = one()
    avg = Average(model)
    avg.update()
    for other in (copy.deepcopy(avg), pickle.loads(pickle.dumps(avg))):
        for v in (8., 4.):
            nn.init.constant_(other.source.weight, v)
            update_all([avg, other])
        assert other.weights['weight'].item() == 4 and avg.weights['weight'].item() == 0      # (0 + 8 + 4)/3


@pytest.mark.parametrize('rule', [equal(), ema(decay=0.5)])
def test_averages_made_under_inference_mode_stay_writable(rule):
    "Begun, loaded and swapped under it, an average can be updated, loaded into and swapped outside (ultralytics#22372)"
    model = net()
    avg = Average(model, rule)
    with torch.inference_mode():
        avg.update(), avg.update()
        with avg.applied(): pass
    state = copy.deepcopy(avg.state_dict())
    other = Average(model, rule)
    with torch.inference_mode(): other.load_state_dict(state)
    for a in (avg, other):
        assert not any(v.is_inference() for v in a.weights.values())
        for v in a.weights.values(): v.add_(0.)
        a.load_state_dict(state), a.update()
        with a.applied(): pass
        assert a.n == 3
    model.train()(torch.randn(4, 3)).sum().backward()


@pytest.mark.parametrize('steps', [0, -1, math.nan, math.inf, None, '2'])
@pytest.mark.parametrize('first', [False, True])
def test_steps_out_of_range(steps, first):
    "-1 moves the average away from the weights, 0 counts a snapshot that is not in it"
    model = one()
    avg = Average(model, ema(decay=0.5))
    if not first: avg.update()
    n = avg.n
    nn.init.constant_(model.weight, 1.)
    for update in (lambda: avg.update(steps=steps), lambda: update_all([avg], steps=[steps]),
                   lambda: avg.update(one(), steps=steps)):
        with pytest.raises((ValueError, TypeError)): update()
        assert avg.n == n and (first or avg.weights['weight'].item() == 0)


@pytest.mark.parametrize('steps', [[1], [1, 1, 1]])
def test_as_many_steps_as_averages(steps):
    "Too few of them would leave the last averages without this snapshot"
    avs = [Average(one()), Average(one())]
    with pytest.raises(ValueError): update_all(avs, steps=steps)
    assert [a.n for a in avs] == [0, 0]


@pytest.mark.parametrize('weight', [None, math.nan, 2, -0.1, torch.tensor(0.5), '0.5', 1j, math.inf])
@pytest.mark.parametrize('elsewhere', ['one model', 'another', 'another dtype', 'unchecked'])
def test_weights_out_of_range(weight, elsewhere):
    "What a rule gives is checked before anything moves, in all averages that are updated together"
    model, other = one(), one()
    options = {'another dtype': dict(dtype=torch.float64), 'unchecked': dict(check_finite=False)}
    kw = options.get(elsewhere, {})
    good, bad = Average(model), Average(other if elsewhere == 'another' else model, lambda n: weight, **kw)
    update_all([good, bad])
    nn.init.constant_(model.weight, 1.), nn.init.constant_(other.weight, 1.)
    for order in ([good, bad], [bad, good]):
        with pytest.raises(ValueError, match='must be a number between 0 and 1'): update_all(order)
        assert [a.n for a in order] == [1, 1] and all(a.weights['weight'].item() == 0 for a in order)


@pytest.mark.parametrize('what', ['half', 'several', 'converted'])
def test_ctrl_c_at_any_line_of_an_update(what):
    "The average has taken the snapshot, or it has not: no part of it has moved, and nothing is left uninitialised"
    start = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 200), nn.BatchNorm1d(200))
    if what == 'half': start.bfloat16()

    def fresh():
        net = copy.deepcopy(start)
        avgs = [Average(net, ema(decay=d)) for d in ((0.5, 0.9) if what == 'several' else (0.5,))]
        for a in avgs: a.update()
        if what == 'converted': net.double()
        with torch.no_grad():
            for p in net.parameters(): p += 1
        return avgs

    def update(avgs): update_all(avgs) if what == 'several' else avgs[0].update()

    files = 'fastswa/averaging/', *CORE
    before, after = fresh(), fresh()
    assert len(moments(partial(update, fresh()), files, last=files, alike=True)) > 60      # it sees the whole update
    lines = moments(partial(update, after), files, last=files)
    before, after = ([copied(a.weights) for a in avgs] for avgs in (before, after))
    for at in lines:
        got = fresh()
        with torch.enable_grad(): ctrl_c(partial(update, got), at)      # torch.no_grad's own end may be cut short
        for a, b, c in zip(got, before, after):
            expected = c if a.n == 2 else b
            for k, v in a.weights.items():
                if torch.equal(v, expected[k]): continue                # which is far cheaper
                torch.testing.assert_close(v, expected[k], msg=f'{at}: {k}, n = {a.n}')


# --- swapping


def test_a_state_saved_while_the_model_holds_the_average():
    """The state of an applied average is the average; what is loaded from it does not start from its own raw weights

    Elsewhere a resumed run takes the average for the raw weights (YOLOX#1318, yolov5#310)"""
    model = one()
    avg = Average(model)
    for v in (0., 4.):
        nn.init.constant_(model.weight, v)
        avg.update()
    with avg.applied(): state, raw = copy.deepcopy(avg.state_dict()), copied(model.state_dict())
    assert (state['n'], state['weights']['weight'].item(), raw['weight'].item(), model.weight.item()) == (2, 2., 2., 4.)
    other = Average(model)
    other.load_state_dict(state)
    nn.init.constant_(model.weight, 11.)
    other.update()
    assert (other.n, other.weights['weight'].item()) == (3, 5.)            # (0 + 4 + 11)/3


@pytest.mark.parametrize('where', range(1, 13))
def test_a_swap_that_fails_mixes_nothing(where, monkeypatch):
    """As where memory runs out half-way: neither the raw weights nor the average hold a part of the other

    Elsewhere raw weights never come back after an exception (keras SwapEMAWeights, diffusers#2321)"""
    from fastswa.averaging import holding
    model = net(norm=False)
    avg, real, calls = Average(model), holding.local, []
    avg.update()
    with torch.no_grad():
        for p in model.parameters(): p += 1
    avg.update()
    raw, weights = copied(model.state_dict()), copied(avg.weights)
    def local(t):                                            # 4 to keep the raw weights, 4 to swap, 4 to swap back
        calls.append(1)
        if len(calls) == where: raise torch.OutOfMemoryError('no memory')
        return real(t)
    monkeypatch.setattr(holding, 'local', local)
    with pytest.raises(torch.OutOfMemoryError), avg.applied(): pass
    monkeypatch.undo()
    assert holding.held_weights(model) == 'raw'
    assert same(copied(model.state_dict()), raw) and same(copied(avg.weights), weights)
    with avg.applied(): assert same(copied(model.state_dict()), weights)
    avg.update()


def test_a_weight_that_cannot_be_written():
    "One number, expanded: torch refuses to write to it. The swap fails, and leaves no trace (diffusers#2321)"
    m = nn.Linear(3, 4)
    m.scale = nn.Parameter(torch.ones(1).expand(5), requires_grad=False)
    m.last = nn.Parameter(torch.zeros(2))
    avg = Average(m)
    avg.update()
    with torch.no_grad():
        for p in (m.weight, m.bias, m.last): p += 1
    avg.update()
    raw, weights = copied(m.state_dict()), copied(avg.weights)
    for _ in range(2):
        with pytest.raises(RuntimeError, match='single memory location'), avg.applied(): pass
        assert same(copied(m.state_dict()), raw) and same(copied(avg.weights), weights)
    assert avg.update() == 3


CHANGES = dict(double=lambda m: m.double(), half=lambda m: m.half(),
               assign=lambda m: m.load_state_dict(copied(m.state_dict()), assign=True),
               data=lambda m: setattr(m.a.weight, 'data', m.a.weight.data.clone()),
               untied=lambda m: setattr(m.b, 'weight', nn.Parameter(m.b.weight.data.clone())),
               tied=lambda m: setattr(m.c, 'weight', m.a.weight))


@pytest.mark.parametrize('change', CHANGES)
def test_a_model_that_was_changed_while_it_held_the_average(change):
    "The raw weights come back into whatever tensors the model has then, each into its own; the average is as before"
    m = nn.Module()
    m.a, m.b, m.c, m.d = (nn.Linear(2, 2, bias=False) for _ in range(4))
    m.b.weight, m.norm = m.a.weight, nn.BatchNorm1d(2)
    avg = Average(m)
    avg.update()
    with torch.no_grad():
        for p in m.parameters(): p += torch.rand(p.shape)
    avg.update()
    raw, weights = copied(m.state_dict()), copied(avg.weights)
    with avg.applied(): CHANGES[change](m)
    for k, v in m.state_dict().items():
        if (change, k) != ('tied', 'c.weight'): assert torch.equal(v, raw[k].to(v.dtype)), k
    for k, v in avg.weights.items():
        if (change, k) != ('tied', 'c.weight'):
            torch.testing.assert_close(v, weights[k].to(v.dtype), rtol=1e-6, atol=1e-7)


def test_an_average_that_is_applied_stops_all():
    "The others have not moved when the error comes"
    model, other = one(), one()
    a, b = Average(model), Average(other)
    update_all([a, b])
    with b.applied(), pytest.raises(RuntimeError, match='applied'): update_all([a, b])
    assert (a.n, b.n) == (1, 1)


def test_a_model_that_holds_an_average_is_not_averaged():
    "Otherwise the second average would take the first one for the weights"
    net = nn.Linear(2, 2)
    a, b = Average(net), Average(net)
    a.update(), b.update()
    with a.applied():
        with pytest.raises(RuntimeError, match='outside of applied'): b.update()
        with pytest.raises(RuntimeError, match='outside of applied'): update_all([b])
    b.update()
    assert b.n == 2


# --- models of every kind


def test_models_that_cannot_be_copied():
    "Only `module()` copies the model; averaging, swapping and saving do not (pytorch#28594)"
    model = net()
    model.lock = threading.Lock()
    model.register_forward_hook(lambda m, i, o: model.lock.locked())
    with pytest.raises(TypeError): copy.deepcopy(model)
    avg = Average(model)
    avg.update(), avg.update()
    with avg.applied(): pass
    Average(model).load_state_dict(avg.state_dict())
    avg.copy_to(net())


@pytest.mark.parametrize('kept', ['attribute', 'list', 'dict', 'buffer'])
def test_cached_activations(kept):
    "An output of the last pass, with its graph, which deepcopy refuses (pytorch#28594)"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            if kept == 'buffer': self.register_buffer('cache', None, persistent=False)
        def forward(self, x):
            h = self.layer(x)
            self.cache = dict(attribute=h, buffer=h, list=[h], dict=dict(h=h))[kept]
            return h
    model = Net()
    model(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match='deepcopy'): copy.deepcopy(model)
    avg = Average(model)
    avg.update()
    alone = avg.module()
    assert torch.equal(alone(torch.ones(1, 2)), model(torch.ones(1, 2)))


WRAPPERS = dict(compiled=torch.compile, parallel=nn.DataParallel, both=lambda m: nn.DataParallel(torch.compile(m)))


@pytest.mark.parametrize('wrap', WRAPPERS)
def test_wrapped_models(wrap):
    """Plain names, whichever of the two is wrapped; another architecture is an error that names what differs

    Elsewhere nothing matches behind `_orig_mod.` or `module.`, and nobody says so (senpai#2899)"""
    wrap, model = WRAPPERS[wrap], net()
    avg = Average(wrap(model))
    avg.update(), avg.update(model), avg.update(wrap(copy.deepcopy(model)))
    assert avg.n == 3 and set(avg.weights) < set(model.state_dict())
    assert same(copied(avg.weights), {k: v for k, v in copied(model.state_dict()).items() if k in avg.weights})
    Average(net()).load_state_dict(avg.state_dict())
    avg.copy_to(wrap(net()))
    other = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4))
    state = Average(other)
    state.update()
    for wrong in (lambda: avg.update(other), lambda: avg.copy_to(wrap(other)),
                  lambda: avg.load_state_dict(state.state_dict())):
        with pytest.raises(ValueError, match=r'3\.weight is missing'): wrong()
    assert avg.n == 3


@pytest.mark.parametrize('f, says', [
    (lambda: Average(nn.Linear(1, 1), dtype=torch.int64), 'dtype must be a floating-point'),
    (lambda: Average(nn.Linear(1, 1), dtype='float32'), "got 'float32'"),
    (lambda: Average(nn.Linear(1, 1), include=['weight', 'wieght']),
     "'wieght' matches no weights; there are weight, bias"),
    (lambda: Average(nn.Linear(1, 1), exclude='hed.*'), "'hed.*' matches no weights"),
    (lambda: Average(nn.Linear(1, 1)).update(5), 'takes a module; got 5'),
    (lambda: Average(nn.Linear(1, 1)).load_state_dict(nn.Linear(1, 1).state_dict()),
     'no state of an average.* n, skipped, rule, weights missing'),
    (lambda: Average(nn.Linear(1, 1)).load_state_dict(dict(n=-3, skipped=0, rule='equal()', weights={})),
     'n must be a whole number, 0 or more; got -3')])
def test_bad_input_is_named_at_once(f, says):
    with pytest.raises((ValueError, TypeError), match=says): f()


@pytest.mark.parametrize('option', ['include', 'exclude'])
def test_many_names_in_full_are_looked_up(option, monkeypatch):
    "Wrong: each is matched with the name of each tensor, a million times for a model of a thousand"
    model,tried = nn.Sequential(*[nn.Linear(1, 1) for _ in range(200)]),[]
    monkeypatch.setattr(tensors, 'fnmatchcase', lambda name, p: tried.append(p) or fnmatchcase(name, p))
    names = [*dict(model.named_parameters())]
    chosen = find_tensors(model, **{option: [*names[1:300], '1[5-9]?.weight']})
    right = {*names[1:300], *names[300::2]}
    assert {*chosen} == (right if option == 'include' else {*names} - right)
    assert len(tried) < 2000


# --- whole teachers, live modules


class Normalised(nn.Module):
    "A linear layer behind running statistics of its own, with a codebook, a counter and BatchNorm"
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.frozen = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        for name, t in dict(mean=torch.zeros(3), codes=torch.zeros(2, 3), seen=torch.tensor(0)).items():
            self.register_buffer(name, t)

    def forward(self, x): return self.frozen(self.norm(self.a(x - self.mean)))

    def move(self, generator):
        "All of it moves"
        with torch.no_grad():
            for t in floats(self).values(): t += torch.rand(t.shape, generator=generator)
            self.seen += 1


def walked(n=3, **kw):
    "A model after some updates of its average"
    torch.manual_seed(0)
    model, g = Normalised(), torch.Generator().manual_seed(0)
    avg = Average(model, ema(decay=0.5), **kw)
    for _ in range(n):
        model.move(g)
        avg.update()
    return model, avg, g


@pytest.mark.parametrize('held', [False, True])
def test_a_teacher_is_whole(held):
    "Wrong: normalisers and codebooks stay as the teacher was made, and it goes stale"
    model, avg, g = walked()
    teacher = Normalised()
    expected = avg.module().state_dict()
    if held:
        other = Average(model)
        other.update()
        with other.applied():
            model.mean.fill_(7.)                                           # of a look, not the model's own
            avg.copy_to(teacher)
    else: avg.copy_to(teacher)
    assert same(copied(teacher.state_dict()), copied(expected))
    assert torch.equal(teacher.mean, model.mean) and teacher.seen == 3


def test_a_teacher_without_a_part():
    "As in BYOL, whose target has no predictor: what the average leaves out need not be there, and is left alone"
    model, avg, _ = walked(exclude=['frozen.*'])
    target = Normalised()
    del target.frozen, target.codes
    target.mean = torch.zeros(1)
    avg.copy_to(target)
    assert torch.equal(target.a.weight, avg.weights['a.weight']) and torch.equal(target.mean, model.mean)


@pytest.mark.parametrize('include, names', [(['*', 'codes'], {'codes'}), (['codes', 'mean'], {'codes', 'mean'})])
def test_chosen_buffers_are_averaged(include, names):
    model, avg, g = walked(1, include=include)
    first = model.codes.clone()
    model.move(g)
    avg.update()
    torch.testing.assert_close(avg.weights['codes'], (first + model.codes)/2)
    assert {k for k in avg.weights if k in ('codes', 'mean', 'seen')} == names
    with avg.applied(): assert torch.equal(model.codes, avg.weights['codes'])
    with pytest.raises(ValueError, match="'seen' names integer buffers"): Average(model, include=['*', 'seen'])


@pytest.mark.parametrize('change', dict(
    nothing=lambda m, a: None, loads=lambda m, a: a.load_state_dict(copy.deepcopy(a.state_dict())),
    begins_anew=lambda m, a: a.reset(), double=lambda m, a: m.double(), channels=lambda m, a: m.share_memory(),
    assigns=lambda m, a: m.load_state_dict(copied(m.state_dict()), assign=True),
    buffer=lambda m, a: setattr(m, 'mean', torch.ones(3)), grows=lambda m, a: setattr(m, 'codes', torch.ones(5, 3)),
    looks=lambda m, a: a.applied().__enter__() and None).items(), ids=lambda o: o[0])
def test_a_live_module_follows(change):
    """It is what `module()` gives after each update, whatever happened between

    Wrong: it stands still, or looks show in it"""
    model, avg, g = walked()
    live = avg.live()
    if change[0] == 'looks':
        before = copied(live.state_dict())
        with avg.applied(), torch.no_grad():
            for t in (*model.parameters(), *model.buffers()): t.add_(1)
            assert same(copied(live.state_dict()), before)
    else: change[1](model, avg)
    for _ in range(3):
        model.move(g)
        avg.update()
        expected = avg.module().state_dict()
        for k, v in live.state_dict().items(): torch.testing.assert_close(v, expected[k].to(v), msg=k, rtol=0, atol=0)
    assert live.a.weight.data_ptr() == avg.weights['a.weight'].data_ptr()
    assert not live.training and not any(p.requires_grad for p in live.parameters())
    x = torch.rand(4, 3)
    if change[0] != 'double': assert torch.equal(live(x), avg.module()(x))


def test_a_live_module_is_the_averages_alone():
    "What is done to it in train mode moves neither the average's statistics nor the model; a copy of it stands still"
    model, avg, g = walked()
    live = avg.live()
    still, kept = copy.deepcopy(live), pickle.loads(pickle.dumps(avg))
    weights, raw = copied(avg.weights), copied(model.state_dict())
    live.train()(torch.rand(4, 3))
    assert same(copied(avg.weights), weights) and same(copied(model.state_dict()), raw)
    before = copied(still.state_dict())
    model.move(g)
    avg.update()
    assert same(copied(still.state_dict()), before) and not same(copied(live.state_dict()), before)
    kept.update()
    del live
    avg.update()
    assert len(avg._lives) == 0


def test_a_live_module_in_the_dtype_of_the_average():
    "Half-precision weights have an average in fp32, and so is what shares its storage, as a whole"
    model = net().to(torch.bfloat16)
    avg = Average(model)
    avg.update()
    live = avg.live()
    assert {t.dtype for t in floats(live).values()} == {torch.float32}
    live(torch.randn(4, 3))


def test_tied_weights_stay_tied_in_a_live_module():
    model = TiedNet(tied='shared')
    avg = Average(model)
    avg.update()
    live = avg.live()
    assert live.a.weight is live.b.weight


class Merges(nn.Linear):
    "As LoRA does, it adds something to its weight in eval(), and takes it away in train()"
    merged = False
    def train(self, mode=True):
        if self.merged == mode: self.weight.data += -1 if mode else 1
        self.merged = not mode
        return super().train(mode)


def test_layers_that_merge_in_eval():
    "A live module would write that into the average; a copy has it right, whatever the model's mode"
    model = Merges(2, 2)
    avg = Average(model)
    avg.update()
    for mode in (True, False):
        model.train(mode)
        torch.testing.assert_close(avg.module().weight, avg.weights['weight'] + 1)
    with pytest.raises(RuntimeError, match='changes weight in eval'): avg.live()


def test_a_loss_of_the_model_and_of_its_average():
    "Wrong: 'modified by an inplace operation', at the backward pass of a student whose teacher was its own average"
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    avg = Average(model)
    avg.update()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(0.5)
    teacher = avg.module()
    (model(x) - teacher(x)).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    student = model(x)
    with avg.applied(), torch.no_grad(): target = model(x)
    (student - target).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected))
    with avg.applied(): inside = model(x)
    with pytest.raises(RuntimeError, match='inplace'): inside.sum().backward()      # not: gradients of other weights


def test_autocast_casts_the_weights_of_a_look_anew():
    "Wrong: within one autocast block, the average's predictions are those of the raw weights"
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    avg = Average(model)
    avg.update()
    nn.init.zeros_(model.weight)
    with torch.autocast('cpu', torch.bfloat16):
        raw = model(x)
        with avg.applied(): averaged = model(x)
        again = model(x)
    assert torch.equal(raw, again) and not torch.allclose(raw, averaged)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(averaged, avg.module()(x))


# --- weights that cannot move, or have no values


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.mask = nn.Parameter(torch.tensor([0., -math.inf]), requires_grad=False)


KINDS = dict(average=lambda m: Average(m, ema(decay=0.5)), unchecked=lambda m: Average(m, check_finite=False),
             latest=lambda m: LatestAverage(m, 2), swag=lambda m: SWAG(m, 2), posthoc=PostHocEMA, bema=BEMA, swad=SWAD)


@pytest.mark.parametrize('kind', KINDS)
def test_a_mask_of_minus_infinity_among_the_parameters(kind):
    "Wrong: no snapshot ever; or the mask becomes NaN, since the difference of infinities is none"
    model, mask = Masked(), torch.tensor([0., -math.inf])
    avg, seen = KINDS[kind](model), []
    for i in range(4):
        nn.init.constant_(model.layer.weight, float(i))
        if kind in ('average', 'swag'): update_all([avg])
        else: avg.update()
        if kind == 'swad': avg.step(1.)
        if kind == 'posthoc': avg.store()
    assert (avg.n, avg.skipped) == (4, 0) and torch.equal(avg.weights['mask'], mask)
    assert avg.weights['layer.weight'].isfinite().all() and avg.weights['layer.weight'][0, 0] > 0
    if kind == 'swag': assert torch.equal(avg.sample()['mask'], mask)
    if kind == 'posthoc': assert torch.equal(avg.reconstruct(0.08)['mask'], mask)
    with avg.applied(): assert torch.equal(model.mask, mask)


def test_what_is_frozen_and_not_finite_later():
    "Frozen weights that become infinite are skipped once, then taken as they are; trained again, they are checked"
    model = Masked()
    model.mask.data.zero_()
    avg = Average(model)
    avg.update()
    model.mask.data[1] = -math.inf
    with pytest.warns(UserWarning, match='NaN or infinity'): avg.update()
    avg.update()
    assert (avg.n, avg.skipped) == (2, 1) and avg.weights['mask'][1] == -math.inf
    model.mask.requires_grad_(True)
    avg.update()
    assert (avg.n, avg.skipped) == (2, 2)
    model.mask.data.fill_(1.)
    model.layer.weight.data.fill_(math.nan)
    avg.update()
    assert (avg.n, avg.skipped) == (2, 3)
    model.layer.weight.data.zero_()
    for i in range(2):
        avg.update()
        assert (avg.n, avg.skipped) == (3 + i, 3) and torch.equal(avg.weights['mask'], torch.ones(2))


def test_snapshots_loaded_into_a_frozen_model_are_checked():
    "Nothing in it is trained, so being frozen says nothing. Wrong: a diverged checkpoint as the first snapshot"
    model = one().requires_grad_(False)
    avg = Average(model)
    for value in (math.nan, 1., math.inf, 3.):
        model.load_state_dict(dict(weight=torch.full((1, 1), value)))
        with warnings.catch_warnings(record=True): avg.update()
    assert (avg.n, avg.skipped) == (2, 2) and avg.weights['weight'].item() == 2


def test_frozen_weights_that_somebody_moves_are_averaged():
    "As the momentum encoder of MoCo is, by hand"
    model = one(1.).requires_grad_(False)
    avg = Average(model)
    avg.update()
    nn.init.constant_(model.weight, 3.)
    avg.update()
    assert avg.weights['weight'].item() == 2


class Quantised(torch.Tensor):
    "A number beside its scale, as torchao keeps weights"
    @staticmethod
    def __new__(cls, data): return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)
    def __init__(self, data): self.numbers = data
    def __tensor_flatten__(self): return ['numbers'], None
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default: return cls(args[0].numbers)
        raise NotImplementedError(func)


def holding_weights(weight):
    model = nn.Module()
    model.scaled, model.layer = nn.Parameter(weight, requires_grad=False), nn.Linear(2, 2)
    return model


@pytest.mark.parametrize('weight', [Quantised(torch.zeros(2, dtype=torch.int8)), torch.zeros(2).to(torch.float8_e4m3fn),
                                    torch.zeros(2).to(torch.float8_e5m2)], ids=['subclass', 'e4m3', 'e5m2'])
def test_quantised_weights(weight):
    "A sentence that names them and the ways out, instead of torch's internals"
    model = holding_weights(weight)
    says = 'without their scales: scaled.*before it is quantised.*exclude='
    with pytest.raises(ValueError, match=says): Average(model)
    avg = Average(model, exclude='scaled')
    avg.update()
    with avg.applied(): pass
    assert list(avg.weights) == ['layer.weight', 'layer.bias']


@pytest.mark.parametrize('make', [Average, lambda m: LatestAverage(m, 2)])
def test_weights_without_values(make):
    avg = make(nn.Linear(2, 2, device='meta'))
    with pytest.raises(RuntimeError, match=r'on the meta device.*to_empty\(\)'): avg.update()
    assert avg.n == 0
    avg.source.to_empty(device='cpu')
    nn.init.ones_(avg.source.weight), nn.init.ones_(avg.source.bias)
    assert avg.update() == 1


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('make', [torch.jit.script, lambda m: torch.jit.trace(m.eval(), torch.ones(1, 2)),
                                  lambda m: nn.Sequential(torch.jit.script(m))], ids=['script', 'trace', 'inside'])
def test_scripted_modules(make):
    model = make(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r'scripted or traced.*script average.module\(\)'): Average(model)
    avg = Average(nn.Linear(2, 2))
    avg.update()
    assert torch.equal(torch.jit.script(avg.module())(torch.ones(1, 2)), avg.module()(torch.ones(1, 2)))


# --- another architecture, other threads


def replaced(m): m.b = nn.Linear(3, 7, bias=False)
def added(m): m.new = nn.Parameter(torch.zeros(2))
def registered(m): m.a.register_parameter('extra', nn.Parameter(torch.zeros(2)))
def removed(m): del m.b
def parametrised(m): parametrizations.weight_norm(m.a)


@pytest.mark.parametrize('change', [replaced, added, registered, removed, parametrised])
def test_a_changed_architecture_is_found_at_the_next_update_and_has_a_way_on(change):
    "Wrong: a parameter that was added is silently left out; an error that does not say what to do"
    model = TiedNet()
    avg = Average(model)
    avg.update()
    change(model)
    says = r'weights that were averaged: .*call reset\(\) on the average'
    for _ in range(2):
        with pytest.raises(ValueError, match=says): avg.update()
    avg.reset()
    assert avg.update() == 1 and list(avg.weights) == list(find_tensors(model))


def test_another_thread_reads_a_whole_set(monkeypatch):
    "One that serves during training comes when half of the tensors have moved. Wrong: a mixture, or an IndexError"
    model = nn.Sequential(*(nn.Linear(400, 400, bias=False) for _ in range(3)))
    def fill(value):
        for m in model: nn.init.constant_(m.weight, value)
    avg, found, readers, real = Average(model, ema(decay=0.5)), [], [], kernels._lerp
    def serve(): found.append((avg.module().state_dict(), [v.shape for v in avg.weights.values()]))
    def lerp(*args):
        real(*args)
        readers.append(threading.Thread(target=serve))
        readers[-1].start()
        readers[-1].join(0.05)
    fill(0.)
    avg.update()
    monkeypatch.setattr(kernels, '_lerp', lerp)
    fill(1.)
    avg.update()
    fill(2.)
    model.double()
    avg.update()
    for r in readers: r.join()
    assert len(found) == len(readers) > 3
    for weights, shapes in found:
        assert len({v.unique().item() for v in weights.values()}) == 1 and shapes == [(400, 400)]*3


def test_module_leaves_the_model_alone(monkeypatch):
    "Another thread may train it meanwhile. Wrong: it holds the average for a moment, and a step is taken from there"
    model, avg, _ = walked()
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    avg.module(), avg.live()
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions


def test_averages_print_in_a_line():
    model = one()
    avg = Average(model, ema(decay=0.9))
    avg.update()
    model.weight.data.fill_(math.nan)
    with pytest.warns(UserWarning): avg.update()
    assert repr(avg) == 'Average of a Linear: ema(decay=0.9), 1 snapshot, 1 skipped'
    assert repr(LatestAverage(one(), 3)) == "LatestAverage of a Linear: latest(k=3, shape='linear'), 0 snapshots"
    assert repr(SWAG(one())) == 'SWAG of a Linear: equal(), 0 snapshots'
    assert repr(PostHocEMA(one())) == 'PostHocEMA of a Linear: power(sigma_rel=0.05), 0 snapshots'
    assert [repr(r) for r in (ema(half_life='0.05dur', warmup='ratio'), power(gamma=2))] == [
        "ema(half_life='0.05dur', warmup='ratio')", 'power(gamma=2)']


@pytest.mark.parametrize('kw', [dict(include='1.num_batches_tracked'), dict(include=['0.*', '*tracked']),
                                dict(exclude='*.num_batches_tracked')], ids=str)
def test_patterns_that_name_integer_buffers_say_what_becomes_of_them(kw):
    with pytest.raises(ValueError, match='integer buffers, which are taken from the model as they are and never'):
        Average(net(), **kw)
