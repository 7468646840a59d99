"""What a GPU does otherwise, here on the CPU: a flag masks the write and its count is read late, weights travel beside
the computation

The two operators behind the mask exist on the CPU too. They are told to be used there, demand what they demand on a
GPU, and every result is compared with the plain path, or with float64."""
import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastswa.averaging.snapshots as averaging
import fastswa.averaging.kernels as kernels
from fastswa.averaging.average import Average, update_all
from fastswa.averaging.rules import ema, equal, power
from helpers import floats

nan, inf = float('nan'), float('inf')
RULES = dict(equal=equal(), ema=ema(decay=0.7), half=ema(half_life=3), still=ema(decay=1),
             ratio=ema(decay=0.9, warmup='ratio'), warm=ema(decay=0.9, warmup='power'), gamma=power(gamma=2.5),
             sigma=power(sigma_rel=0.1), own=lambda n: 1/(n + 2))
BAD = [(), (0,), (0, 1), (0, 2, 3), (3,), (1, 2), (2, 6), (0, 7), (7,), tuple(range(8))]


def dense(t): return torch.empty_like(t, device='meta').stride() == t.stride()


class Lagging(kernels.DelayedFlags):
    "A device that is never done before it is waited for"
    waits = 0

    def ready(self): return False

    def read(self):
        type(self).waits += 1
        return super().read()


@pytest.fixture
def masked(monkeypatch):
    "Masks on the CPU, with the demands that CUDA's operators make, and a device that lags behind"
    fused = torch._fused_sgd_

    def strict(tensors, ends, *args, **kw):
        assert len({t.dtype for t in (*tensors, *ends)}) == 1, '_fused_sgd_ takes tensors of one dtype on a GPU'
        for a, e in zip(tensors, ends, strict=True):
            alike = dense(a) and dense(e) and a.stride() == e.stride()
            assert alike, '_fused_sgd_ takes tensors of one dense layout on a GPU'
        fused(tensors, ends, *args, **kw)
    monkeypatch.setattr(torch, '_fused_sgd_', strict)
    monkeypatch.setattr(averaging, 'can_mask', lambda tensors: all(t.is_floating_point() for t in tensors))
    monkeypatch.setattr(averaging, 'DelayedFlags', Lagging)
    Lagging.waits = 0


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2),
                         nn.Linear(200, 200, bias=False))               # loose


def walk(model, n=8, bad=(), value=nan):
    "Steps of a random walk; at those in `bad` one element is `value`"
    g = torch.Generator().manual_seed(1)
    for i in range(n):
        with torch.no_grad():
            for t in floats(model).values(): t += torch.randn(t.shape, generator=g).to(t)
            t = list(floats(model).values())[i % 3]
            spot = t[(0,)*t.ndim]
            kept = spot.clone()
            if i in bad: spot.fill_(value)
            yield i
            spot.copy_(kept)


def outcome(avg, warned):
    return dict(n=avg.n, skipped=avg.skipped, warned=len(warned),
                weights={k: v.clone() for k, v in avg.weights.items()} if avg.n else {})


def run(make, bad=(), value=nan, n=8, at=lambda i, avg: None):
    "What an average has become after a walk"
    model = net()
    avg = make(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        for i in walk(model, n, bad, value):
            avg.update()
            at(i, avg)
        return outcome(avg, warned)


def assert_alike(a, b):
    assert {k: v for k, v in a.items() if k != 'weights'} == {k: v for k, v in b.items() if k != 'weights'}
    assert list(a['weights']) == list(b['weights'])
    for k, v in a['weights'].items(): torch.testing.assert_close(v, b['weights'][k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('bad', BAD, ids=str)
@pytest.mark.parametrize('rule', RULES)
def test_masked_as_at_once(rule, bad, request):
    "Not: a bad snapshot counted, a good one after it weighed as if the bad one had counted, a bad first one kept"
    expected = run(lambda m: Average(m, RULES[rule]), bad)
    request.getfixturevalue('masked')
    assert_alike(run(lambda m: Average(m, RULES[rule]), bad), expected)


@pytest.mark.parametrize('value', [nan, inf, -inf])
@pytest.mark.parametrize('ready', [False, True])
def test_equal_is_the_mean_of_the_good_ones(value, ready, masked, monkeypatch):
    monkeypatch.setattr(Lagging, 'ready', lambda self: ready)
    bad, model, seen = (0, 1, 4, 5, 7), net(), []
    avg = Average(model)
    for i in walk(model, 9, bad, value):
        with warnings.catch_warnings(record=True): avg.update()
        if i not in bad: seen.append({k: v.double().numpy().copy() for k, v in floats(model).items()})
    assert (avg.n, avg.skipped) == (4, 5)
    for k, v in avg.weights.items():
        np.testing.assert_allclose(v, np.mean([s[k] for s in seen], axis=0), rtol=1e-5, atol=1e-6)


def test_a_constant_rule_never_waits(masked, monkeypatch):
    "After the first two snapshots not one number is asked of the device: no `.item()`, no truth value, no wait"
    model = net()
    avg, other = Average(model, ema(decay=0.9)), Average(model, ema(half_life=4))
    update_all([avg, other]), update_all([avg, other])
    Lagging.waits = 0

    def asked(self, *args): raise AssertionError('asked the device for a number')
    with monkeypatch.context() as m:
        for name in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__'):
            m.setattr(torch.Tensor, name, asked)
        for _ in walk_quietly(model): update_all([avg, other])
        for _ in walk_quietly(model): avg.update()
    assert Lagging.waits == 0 and (avg.n, other.n) == (10, 6)


def walk_quietly(model, n=4):
    g = torch.Generator().manual_seed(2)
    for i in range(n):
        with torch.no_grad():
            for p in model.parameters(): p += torch.randn(p.shape, generator=g)
        yield i


def test_a_look_between_updates_reads_what_is_late(masked):
    "n, weights, the state and the swap wait for the checks: a bad newest snapshot is in none of them"
    for look in (lambda a: a.n, lambda a: a.skipped, lambda a: a.weights, lambda a: a.state_dict()['n'],
                 lambda a: a.module(), lambda a: entered(a)):
        for bad in BAD[1:]:
            def at(i, avg, bad=bad, look=look):
                if any(j not in bad for j in range(i + 1)): look(avg)
                assert avg.n == sum(j not in bad for j in range(i + 1))
            run(lambda m: Average(m, ema(decay=0.7)), bad, at=at)


@pytest.mark.parametrize('rule', RULES)
def test_saved_in_the_middle(rule, masked):
    "Not: pending checks of the average before it counted against the one that was loaded"
    def reload(i, avg):
        if i in (0, 3, 4):
            state = copy.deepcopy(avg.state_dict())
            avg.update()                                  # one more that is forgotten, its check not read
            avg.load_state_dict(state)
    make = lambda m: Average(m, RULES[rule])
    assert_alike(run(make, (3, 4), at=reload), run(make, (3, 4)) | dict(warned=1))


def test_reset_forgets_what_is_late(masked):
    model = net()
    avg = Average(model, ema(decay=0.5))
    for _ in walk(model, 3, (1, 2)): avg.update()
    avg.reset()
    assert (avg.n, avg.skipped) == (0, 0)
    for _ in walk(model, 2): avg.update()
    assert (avg.n, avg.skipped) == (2, 0)


def test_several_at_once(masked):
    "One flag for all of them, each with a count of its own"
    def each(together):
        model = net()
        avs = [Average(model, r) for r in RULES.values()]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter('always')
            for i in walk(model, 8, (0, 3, 4)):
                use = avs if i % 2 else avs[::2]          # they do not all begin at once
                if together: update_all(use)
                else: [a.update() for a in use]
            return [outcome(a, ()) for a in avs]          # together they warn once
    for a, b in zip(each(True), each(False)): assert_alike(a, b)


def test_a_rule_that_fails_late(masked):
    def rule(n): return 0.5 if n < 2 else 1/0
    model = net()
    good, failing = Average(model, ema(decay=0.5)), Average(model, rule)
    for _ in walk(model, 2): update_all([good, failing])
    before = copy.deepcopy(good.weights)
    for _ in walk(model, 1):
        with pytest.raises(ZeroDivisionError): update_all([good, failing])
    assert (good.n, failing.n) == (2, 2)
    for k, v in good.weights.items(): assert torch.equal(v, before[k])


@pytest.mark.parametrize('dtype', [None, torch.float64, torch.float16])
def test_dtypes_mixed_in_one_model(dtype, masked):
    "CUDA's operator takes one dtype in a call and raises otherwise"
    def make(d): return nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(d))
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.half, torch.float32
    model = nn.ParameterDict({f'p{i}': make(d) for i, d in enumerate(dtypes)})
    avg, ref = Average(model, dtype=dtype), {}
    for i in range(4):
        with torch.no_grad():
            for p in model.values(): p += (i + 1)/4
        avg.update()
        for k, p in model.items(): ref[k] = ref.get(k, 0) + p.detach().double()/4
    tol = 2e-3 if dtype is torch.float16 else 1e-6
    for k, v in avg.weights.items(): torch.testing.assert_close(v.double(), ref[k], atol=tol, rtol=tol)


def gap():
    return nn.ParameterDict(dict(w=nn.Parameter(torch.zeros(4, 6)[:, ::2]), v=nn.Parameter(torch.zeros(2, 3).t())))


def test_a_weight_with_gaps(masked):
    "A column slice: on the CPU the operator reads the gaps as values, on a GPU it raises"
    model = gap()
    avg = Average(model)
    for v in (1., 2., 6.):
        with torch.no_grad():
            for i, p in enumerate(model.values()): p.copy_(torch.arange(p.numel()).view(p.shape)*v + i)
        avg.update()
    for i, (k, v) in enumerate(avg.weights.items()):
        torch.testing.assert_close(v, torch.arange(v.numel(), dtype=v.dtype).view(v.shape)*3 + i)


def test_a_snapshot_of_another_layout(masked):
    "update(module) from a copy in channels_last"
    model = nn.Conv2d(3, 4, 3)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    nn.init.normal_(other.weight)
    avg = Average(model)
    avg.update(), avg.update(other)
    torch.testing.assert_close(avg.weights['weight'], (model.weight + other.weight).detach()/2)


def test_an_empty_weight(masked):
    "A shard of a small tensor may have no elements; the norm of none is an error"
    model = nn.ParameterDict(dict(none=nn.Parameter(torch.zeros(0, 3)), big=nn.Parameter(torch.zeros(2**16))))
    for m in (model, nn.ParameterDict(dict(none=model.none))):
        avg = Average(m)
        avg.update(), avg.update()
        assert avg.n == 2


def test_values_beyond_fp32(masked):
    "1e100 in float64 is finite"
    model = nn.Linear(2, 2).double()
    nn.init.constant_(model.weight, 1e100)
    avg = Average(model)
    avg.update(), avg.update()
    assert (avg.n, avg.skipped) == (2, 0)


def test_begun_under_inference_mode(masked):
    "The counts, too, must be writable later"
    model = net()
    avg = Average(model, ema(decay=0.5))
    with torch.inference_mode(): avg.update()
    avg.update(), avg.update()
    assert avg.n == 3


def test_converted_while_checks_are_late(masked):
    model = net()
    avg = Average(model, ema(decay=0.5))
    for i in walk(model, 6, (0, 2, 4)):
        if i == 3: model.double()
        if i == 5: model.half()
        with warnings.catch_warnings(record=True): avg.update()
    assert (avg.n, avg.skipped) == (3, 3)
    assert all(v.isfinite().all() for v in avg.weights.values())


def test_a_weight_of_one_copies(masked):
    "decay 0 is the newest snapshot, to the last bit"
    model = net()
    avg = Average(model, ema(decay=0))
    for i in walk_quietly(model):
        with torch.no_grad(): model[0].weight.div_(10**(3*i))
        avg.update()
    for k, v in avg.weights.items(): torch.testing.assert_close(v, floats(model)[k], rtol=1e-6, atol=1e-7)


def test_masking_leaves_versions_alone(masked):
    "A learner tells by the versions whether somebody changed the weights; and the backward pass would fail"
    model = net()
    avg = Average(model, ema(decay=0.5))
    avg.update()
    versions, loss = [p._version for p in model.parameters()], model[3](torch.ones(1, 200)).sum()
    avg.update(), avg.update()
    assert [p._version for p in model.parameters()] == versions
    loss.backward()


@pytest.mark.parametrize('default', [torch.float64, torch.bfloat16])
def test_the_flags_do_not_follow_the_default_dtype(default):
    "A gradient scaler's operator takes fp32 alone, and a bf16 counter stops at 256"
    kept = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        flag = kernels.bad_flag([torch.tensor([1., float('nan')], dtype=torch.float32)])
        late = kernels.DelayedFlags('cpu')
        for _ in range(300): late.add(flag)
    finally: torch.set_default_dtype(kept)
    assert late.read() == 300


# --- weights on their way to the host


def entered(avg):
    with avg.applied(): pass


class FakeCopy:
    "Holds copies until they are fetched"
    sent = 0

    def __init__(self, tensors): self.spec = [(t.shape, t.dtype) for t in tensors]

    def start(self, tensors):
        assert [(t.shape, t.dtype) for t in tensors] == self.spec, 'the host has memory for other tensors'
        self.cargo = [t.clone() for t in tensors]
        type(self).sent += 1

    def wait(self): return self.cargo


class Far(Average):
    "An average whose weights always come by ferry"
    def update(self, module=None, steps=1):
        if module is not None: return super().update(module, steps)
        self._ready()
        self._send(steps)
        return self._taken


@pytest.fixture
def ferry(monkeypatch):
    monkeypatch.setattr(averaging, 'PinnedCopy', FakeCopy)
    FakeCopy.sent = 0


@pytest.mark.parametrize('bad', BAD, ids=str)
@pytest.mark.parametrize('rule', RULES)
def test_by_ferry_as_at_once(rule, bad, ferry):
    "Not: the snapshot under way forgotten, taken twice, or overtaken by the next weights"
    assert_alike(run(lambda m: Far(m, RULES[rule]), bad), run(lambda m: Average(m, RULES[rule]), bad))
    assert FakeCopy.sent == 8


@pytest.mark.parametrize('look', [
    lambda a: a.n, lambda a: a.weights, lambda a: a.state_dict(), lambda a: a.module(), lambda a: a.copy_to(net()),
    lambda a: a.load_state_dict(copy.deepcopy(a.state_dict())), lambda a: entered(a)])
def test_looks_wait_for_the_ferry(look, ferry):
    def at(i, avg):
        look(avg)
        assert avg.n == i + 1
    assert_alike(run(lambda m: Far(m, equal()), at=at), run(lambda m: Average(m, equal())))


def test_reset_and_load_forget_what_is_under_way(ferry):
    model = net()
    avg, other = Far(model), Average(model)
    other.update()
    for _ in walk(model, 1): avg.update()
    avg.load_state_dict(other.state_dict())
    assert avg.n == 1
    for k, v in avg.weights.items(): assert torch.equal(v, other.weights[k])
    avg.update(), avg.reset()
    assert avg.n == 0


@pytest.mark.parametrize('change', [lambda m: m.double(), lambda m: m.half(),
                                    lambda m: m.to(memory_format=torch.channels_last),
                                    lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True)],
                         ids=['double', 'half', 'channels_last', 'assign'])
@pytest.mark.parametrize('mixed', [False, True])
def test_converted_while_weights_are_under_way(change, mixed, ferry):
    "The host's memory was made for the tensors of before"
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.Linear(200, 200))
    def result(cls):
        model = build()
        if mixed: model[0].bfloat16(), model[3].bfloat16()
        avg = cls(model, ema(decay=0.5))
        for i in walk(model, 4):
            if i == 2: change(model)
            avg.update()
        return {k: v.clone() for k, v in avg.weights.items()}
    a, b = result(Far), result(Average)
    for k, v in a.items(): torch.testing.assert_close(v, b[k])


def test_another_module_after_the_ferry(ferry):
    def result(cls):
        model, other = net(), net()
        avg = cls(model, equal())
        for i, _ in zip(walk(model, 6), walk_quietly(other, 6)): avg.update(other if i % 2 else None)
        return avg.weights
    a, b = result(Far), result(Average)
    for k, v in a.items(): torch.testing.assert_close(v, b[k])


@pytest.mark.parametrize('how', ['masked', 'ferry'])
def test_a_copy_takes_nothing_that_is_under_way(how, request):
    "Events and streams can be neither copied nor pickled: what is late is read first"
    request.getfixturevalue(how)
    model, lock = net(), threading.Lock()
    avg = (Far if how == 'ferry' else Average)(model, ema(decay=0.5))
    for _ in walk(model, 3, (2,)):
        with warnings.catch_warnings(record=True): avg.update()
    for part in (avg._flags, avg._host_copy):
        if part: part.event = lock
    with warnings.catch_warnings(record=True): others = copy.deepcopy(avg), pickle.loads(pickle.dumps(avg))
    for other in others:
        assert (other.n, other.skipped) == (avg.n, avg.skipped) == (2, 1)
        other.update()
        assert (other.n, avg.n) == (3, 2)
