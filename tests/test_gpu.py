"""What can only be tested on a GPU: run with `pytest -m gpu tests/test_gpu.py`

`set_sync_debug_mode('error')` makes every operation that waits for the GPU an error, except waiting for an event, which
the check of the snapshot before needs with rules that depend on n. `test_kernels.py` has the same paths on the CPU."""
import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastswa.averaging.average import Average, update_all
from fastswa.averaging.rules import ema, equal, power
from fastswa.checkpoint.background import HostCopies
from helpers import floats

pytestmark = pytest.mark.gpu
RULES = dict(equal=equal(), ema=ema(decay=0.7), half=ema(half_life=3), ratio=ema(decay=0.9, warmup='ratio'),
             power=power(gamma=2.5))
nan, inf = float('nan'), float('inf')


def gpu_net(dtype=None, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 512), nn.Linear(512, 4))
    return model.to('cuda', dtype)


def walk(model, n=8, bad=(), value=nan):
    "Steps of a random walk; at those in `bad` one element is `value`. Nothing here waits for the GPU"
    for i in range(n):
        tensors = list(floats(model).values())                 # they may have been converted
        with torch.no_grad():
            for t in tensors: t += torch.randn_like(t)
        t = tensors[i % len(tensors)]
        spot = t[(0,)*t.ndim]
        kept = spot.clone()
        if i in bad: spot.fill_(value)
        yield i
        spot.copy_(kept)


def reference(model, rule, n, bad=(), value=nan):
    "The average of the same walk in float64, on the CPU"
    torch.manual_seed(1)
    avg, taken = {}, 0
    for i in walk(model, n, bad, value):
        if i in bad: continue
        w = 1 if taken == 0 else rule(taken)
        for k, v in floats(model).items():
            v = v.double().cpu().numpy()
            avg[k] = v if taken == 0 else avg[k] + w*(v - avg[k])
        taken += 1
    return avg, taken


def close(avg, expected, tol=1e-5):
    assert list(avg.weights) == list(expected)
    for k, v in avg.weights.items():
        np.testing.assert_allclose(v.double().cpu().numpy(), expected[k], rtol=tol, atol=tol)


@pytest.fixture
def no_waiting():
    "Inside `with no_waiting():` whatever waits for the GPU is an error"
    from contextlib import contextmanager

    @contextmanager
    def block():
        torch.cuda.synchronize()
        kept = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode('error')
        try: yield
        finally: torch.cuda.set_sync_debug_mode(kept)
    return block


def test_the_alarm_rings(no_waiting):
    with pytest.raises(RuntimeError), no_waiting(): torch.ones(1, device='cuda').item()


@pytest.mark.parametrize('options', [{}, dict(check_finite=False), dict(dtype=torch.float64),
                                     dict(dtype=torch.bfloat16), dict(include='3.*'), dict(device='cpu'),
                                     dict(device='cpu', check_finite=False)],
                         ids=str)
@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.half], ids=str)
@pytest.mark.parametrize('rule', RULES)
def test_updates_do_not_wait(rule, dtype, options, no_waiting):
    model = gpu_net(dtype)
    avg = Average(model, RULES[rule], **options)
    avg.update(), avg.update()                                 # memory is found, streams and events are made
    with no_waiting():
        for _ in walk(model, 5): avg.update()
    assert (avg.n, avg.skipped) == (7, 0)


@pytest.mark.parametrize('device', [None, 'cpu'])
def test_several_do_not_wait(device, no_waiting):
    model = gpu_net()
    avs = [Average(model, r, device=device) for r in RULES.values()] + [Average(model, check_finite=False)]
    update_all(avs), update_all(avs)
    with no_waiting():
        for _ in walk(model, 5): update_all(avs)
    assert [a.n for a in avs] == [7]*6


def test_another_module_does_not_wait(no_waiting):
    model, other = gpu_net(), gpu_net(seed=1)
    avg = Average(model, ema(decay=0.5))
    avg.update(), avg.update(other)
    with no_waiting():
        for _ in walk(other, 5): avg.update(other)
    assert avg.n == 7


def test_training_does_not_wait(no_waiting):
    "A whole step with an average beside it"
    model, avs = gpu_net(), []
    opt, x = torch.optim.SGD(model.parameters(), 1e-3, fused=True), torch.randn(16, 3, 10, 10, device='cuda')
    avs = [Average(model, ema(decay=0.9)), Average(model), Average(model, ema(decay=0.9), device='cpu')]
    def step():
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        update_all(avs)
    step(), step()
    with no_waiting():
        for _ in range(5): step()
    assert [a.n for a in avs] == [7]*3


def test_a_fit_does_not_wait(no_waiting):
    "The learner and its usual callbacks: loss and metrics stay on the GPU, the bar is drawn by time"
    from contextlib import ExitStack
    from types import SimpleNamespace
    from torcheval.metrics import MulticlassAccuracy
    from fastswa.callbacks.basics import DeviceCB
    from fastswa.callbacks.metrics import MetricsCB
    from fastswa.callbacks.schedule import OneCycleCB
    from fastswa.training.events import Callback
    from fastswa.training.learner import TrainLearner
    from fastswa.callbacks.loggers import LogCB
    from fastswa.callbacks.speed import MixedPrecisionCB
    from fastswa.callbacks.progress import ProgressCB, View
    from fastswa.callbacks.batchnorm import BNUpdateCB
    from fastswa.callbacks.swa import EMACB, SWACB
    from fastswa.callbacks.steps import GradAccumCB, GradClipCB

    class Alarm(Callback):
        "No waiting from the third batch to the last"
        order, stack = -99, ExitStack()
        def before_batch(self, learn):
            if learn.training and learn.iter == 2: self.stack.enter_context(no_waiting())
        def cleanup_batch(self, learn):
            if learn.iter == 29: self.stack.close()

    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(32, 8, generator=g).cuda(), torch.randint(4, (32,), generator=g).cuda()) for _ in range(30)]
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    silent = SimpleNamespace(log=lambda d: None)
    cbs = [Alarm(), DeviceCB('cuda'), MetricsCB(accuracy=MulticlassAccuracy(device='cuda')), ProgressCB(view=View),
           EMACB(), SWACB(), BNUpdateCB(), OneCycleCB(), GradAccumCB(2), GradClipCB(norm=1.),
           MixedPrecisionCB(), LogCB(silent, '100ba')]
    dls = SimpleNamespace(train=batches, valid=batches)
    learn = TrainLearner(model.cuda(), dls, nn.functional.cross_entropy, 1e-3, cbs, torch.optim.AdamW)
    try: learn.fit(2)
    finally: Alarm.stack.close()
    assert learn.opt_steps == 30


@pytest.mark.parametrize('device', [None, 'cpu', 'cuda'])
@pytest.mark.parametrize('bad', [(), (0,), (0, 1), (3,), (2, 3), (0, 4, 7), (7,)], ids=str)
@pytest.mark.parametrize('rule', RULES)
def test_parity_with_float64(rule, bad, device):
    model = gpu_net()
    start, avg = copy.deepcopy(model), Average(model, RULES[rule], device=device)
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for _ in walk(model, 8, bad): avg.update()
        assert (avg.n, avg.skipped, len(w)) == (8 - len(bad), len(bad), bool(bad))
    expected, _ = reference(start, RULES[rule], 8, bad)
    close(avg, expected)


@pytest.mark.parametrize('value', [nan, inf, -inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.half])
def test_masked_skip(dtype, value):
    "Not one element moves"
    model = gpu_net(dtype)
    avg = Average(model, ema(decay=0.5))
    for _ in walk(model, 3): avg.update()
    before = {k: v.clone() for k, v in avg.weights.items()}
    for _ in walk(model, 10, range(10), value):
        with warnings.catch_warnings(record=True): avg.update()
    assert (avg.n, avg.skipped) == (3, 10)
    for k, v in avg.weights.items(): assert torch.equal(v, before[k])


def test_several_agree_with_one_by_one():
    model = gpu_net()
    together, alone = [Average(model, r) for r in RULES.values()], [Average(model, r) for r in RULES.values()]
    for _ in walk(model, 8, (0, 3)):
        with warnings.catch_warnings(record=True):
            update_all(together)
            for a in alone: a.update()
    for a, b in zip(together, alone):
        assert (a.n, a.skipped) == (b.n, b.skipped) == (6, 2)
        for k, v in a.weights.items(): torch.testing.assert_close(v, b.weights[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype', [None, torch.float64])
def test_dtypes_mixed_in_one_model(dtype):
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.half, torch.float32
    model = nn.ParameterDict({f'p{i}': nn.Parameter(torch.ones(3, 2, device='cuda', dtype=d))
                              for i, d in enumerate(dtypes)})
    avg = Average(model, dtype=dtype)
    for v in (1., 2., 6.):
        with torch.no_grad():
            for p in model.values(): p.fill_(v)
        avg.update()
    for v in avg.weights.values():
        assert torch.allclose(v.double(), torch.full((3, 2), 3., dtype=torch.float64, device='cuda'))


def test_layouts():
    "A weight with gaps, an empty one, one in channels_last, and a snapshot in another layout than the average's"
    tensors = dict(gap=torch.ones(4, 6)[:, ::2], none=torch.ones(0, 3), conv=torch.ones(4, 3, 2, 2),
                   one=torch.tensor(1.), large=torch.ones(300, 3, 9, 9))
    model = nn.ParameterDict({k: nn.Parameter(t) for k, t in tensors.items()}).cuda()
    model.gap.data = torch.ones(4, 6, device='cuda')[:, ::2]
    avg, other = Average(model), copy.deepcopy(model)
    for k in ('conv', 'large'): other[k].data = other[k].data.to(memory_format=torch.channels_last)
    for i, v in enumerate((1., 2., 6., 3.)):
        m = other if i % 2 else model
        with torch.no_grad():
            for p in m.values(): p.copy_(torch.arange(p.numel(), device='cuda').view(p.shape)*v)
        avg.update(m)
    for v in avg.weights.values():
        torch.testing.assert_close(v, torch.arange(v.numel(), device='cuda').view(v.shape)*3.)


def test_a_snapshot_from_another_device():
    model = gpu_net()
    other, avg = copy.deepcopy(model).cpu(), Average(model)
    avg.update(), avg.update(other), avg.update(other)
    host = Average(other)                                      # and the other way round
    host.update(), host.update(model), host.update(model)
    for a in (avg, host):
        assert a.n == 3
        for k, v in a.weights.items(): torch.testing.assert_close(v.cpu(), floats(other)[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('device', [None, 'cpu'])
def test_moved_and_converted(device):
    model = gpu_net()
    avg, seen = Average(model, device=device), []
    for i in walk(model, 8, (2, 5)):
        if i == 3: model.double()
        if i == 6: model.float()
        with warnings.catch_warnings(record=True): avg.update()
        if i not in (2, 5): seen.append(model[3].weight.detach().double().cpu().numpy().copy())
    model.cpu()
    avg.update()
    seen.append(model[3].weight.detach().double().numpy().copy())
    model.cuda()
    avg.update()
    assert (avg.n, avg.skipped) == (8, 2)
    np.testing.assert_allclose(avg.weights['3.weight'].cpu(), np.mean([*seen, seen[-1]], axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('device', [None, 'cpu'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_swap(dtype, device):
    model = gpu_net(dtype)
    avg = Average(model, device=device)
    for _ in walk(model, 4): avg.update()
    raw, weights = copy.deepcopy(model.state_dict()), {k: v.clone() for k, v in avg.weights.items()}
    with pytest.raises(KeyboardInterrupt), avg.applied():
        for k, v in floats(model).items(): assert torch.equal(v, weights[k].to(v))
        raise KeyboardInterrupt
    for k, v in model.state_dict().items(): assert torch.equal(v, raw[k])
    for k, v in avg.weights.items(): assert torch.equal(v, weights[k])


def test_begun_under_inference_mode():
    model = gpu_net()
    avs = [Average(model, ema(decay=0.5)), Average(model, ema(decay=0.5), device='cpu')]
    with torch.inference_mode(): update_all(avs)
    update_all(avs), update_all(avs)
    assert [a.n for a in avs] == [3, 3]


@pytest.mark.parametrize('device', [None, 'cpu'])
def test_copied_with_checks_under_way(device):
    "Events and streams cannot be copied; an average can"
    model = gpu_net()
    avg = Average(model, ema(decay=0.5), device=device)
    avg.update(), avg.update()
    other = copy.deepcopy(avg)
    other.update()
    assert (avg.n, other.n) == (2, 3) and other.source is not model


def test_weights_may_change_right_after_the_update():
    "What travels to the host is what the weights were, however busy the GPU is"
    model, seen = gpu_net(), []
    avg = Average(model, device='cpu')
    for i in range(20):
        with torch.no_grad():
            for p in model.parameters(): p.fill_(float(i))
            model[1].running_mean.fill_(float(i))
        torch.cuda._sleep(2_000_000)
        avg.update()
        seen.append(i)
        with torch.no_grad():
            for p in model.parameters(): p.fill_(-1e6)
    for k, v in avg.weights.items():
        if k != '1.running_var': np.testing.assert_allclose(v, np.mean(seen), rtol=1e-5)


def test_copies_of_a_state_on_the_host():
    "For checkpoints in the background: in pinned memory that is used again, and there when the call returns"
    copies, t = HostCopies(), torch.randn(1000, 1000, device='cuda')
    state = dict(a=t, b=[t.T, t[5:, ::2]], c=torch.ones(3, device='cuda', dtype=torch.bfloat16), d=torch.arange(3))
    first = copies(state)
    before = {k: copy.deepcopy(v) for k, v in state.items()}
    t += 1
    assert first['a'].is_pinned() and not first['d'].is_pinned() and first['b'][0].data_ptr() == first['a'].data_ptr()
    assert torch.equal(first['a'], before['a'].cpu()) and torch.equal(first['b'][1], before['b'][1].cpu())
    assert torch.equal(first['c'].float(), torch.ones(3))
    place = first['a'].data_ptr()
    second = copies(state)
    assert second['a'].data_ptr() == place and torch.equal(second['a'], t.cpu())
