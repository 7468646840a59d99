"Any rule, any module, any sequence of steps, updates, swaps, saves and exceptions: raw weights bit for bit, the average as in float64"
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from fastswa.averaging.average import Average
from fastswa.averaging.rules import ema, equal


class Net(nn.Module):
    def __init__(self, norm, tied, dtype):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, dtype=dtype), nn.Linear(3, 3, bias=False, dtype=dtype)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.register_buffer('steps', torch.tensor(0))
        if tied == 'shared': self.b.weight = self.a.weight
        if tied == 'transposed': self.b.weight = nn.Parameter(self.a.weight.data.t())


rules = st.one_of(st.just(equal()), st.floats(0, 1).map(lambda d: ema(decay=d)), st.floats(0.1, 50).map(lambda h: ema(half_life=h)),
                  st.sampled_from(['ratio', 'power']).map(lambda w: ema(decay=0.99, warmup=w)))
ops = st.lists(st.sampled_from(['step', 'update', 'apply', 'fail', 'reload', 'replace', 'nan']), min_size=5, max_size=30)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(rule=rules, ops=ops, norm=st.booleans(), tied=st.sampled_from([None, 'shared', 'transposed']),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_any_sequence(rule, ops, norm, tied, dtype):
    g = torch.Generator().manual_seed(0)
    net = Net(norm, tied, dtype)
    avg, reference, n = Average(net, rule), {}, 0

    def floats(): return {k: v for k, v in net.state_dict().items() if v.is_floating_point()}

    def step():
        with torch.no_grad():
            for p in {p.data_ptr(): p for p in floats().values()}.values(): p += torch.randn(p.shape, generator=g).to(p)
            net.steps += 1

    def update():
        nonlocal n
        avg.update()
        w = 1 if n == 0 else rule(n)
        for k, v in floats().items():
            v = v.double().numpy()
            reference[k] = v if n == 0 else reference[k] + w*(v - reference[k])
        n += 1

    for op in ops:
        raw = copy.deepcopy(net.state_dict())
        if op == 'step': step()
        if op == 'update': update()
        if op == 'apply' and n:
            with avg.applied():
                for k, v in floats().items(): assert torch.equal(v, avg.weights[k].to(v.dtype))
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
    import warnings
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
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = list(Average(net)._chosen.index)
    assert list(Average(torch.compile(net))._chosen.index) == names       # with _orig_mod. in front, nothing matches
    net[0] = torch.compile(net[0])
    assert list(Average(net)._chosen.index) == names


def test_an_average_made_before_the_model_moved():
    net = nn.Linear(2, 2)
    avg = Average(net)
    net.to('meta')
    net.to_empty(device='cpu')
    nn.init.ones_(net.weight), nn.init.zeros_(net.bias)
    avg.update()
    assert avg.weights['weight'].eq(1).all()
