"What an average costs in memory: one fp32 copy of the weights it holds, and the largest tensor once more while it is swapped in"
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastswa.averaging.average import Average, update_all
from fastswa.averaging.rules import ema

SLACK = 32*1024      # bytes: scalars, and the padding of allocations


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256), nn.BatchNorm1d(256), *(nn.Linear(256, 256) for _ in range(4)))


def fp32_bytes(model): return 4*sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())


def held(f):
    "Bytes that torch held at most during `f`, and after it, beyond those before"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    events = sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns())
    now = top = 0
    for e in events:
        now += e.nbytes()
        top = max(top, now)
    assert events
    return top, now


def small_bytes(model): return 4*sum(t.numel() for t in model.state_dict().values() if t.is_floating_point() and t.numel() <= 2**15)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_an_average_costs_one_fp32_copy(dtype):
    "A copied module would cost the gradients' buffers too, an average made through temporaries twice as much"
    model = net().to(dtype)
    avg = Average(model, ema(decay=0.9))
    top, kept = held(avg.update)
    assert fp32_bytes(model) <= kept <= top <= fp32_bytes(model) + small_bytes(model) + SLACK      # the buffer for the small tensors stays too
    top, kept = held(avg.update)
    piece = 0 if dtype is torch.float32 else 4*2**20       # half precision is widened piece by piece
    assert kept <= SLACK and top <= piece + SLACK


def test_the_buffer_is_bounded():
    "Thousands of small tensors: 8 MB of them, of which 4 MB pass through the buffer"
    model = nn.ParameterList([nn.Parameter(torch.zeros(1000)) for _ in range(2000)])
    avg = Average(model)
    top, _ = held(avg.update)
    assert top <= 8_000_000 + 4*2**20 + 64*2000      # allocations are rounded up to 64 bytes


def test_swapping_takes_the_largest_tensor_once_more():
    model = net()
    avg = Average(model)
    avg.update()
    def swap():
        with avg.applied(): pass
    top, kept = held(swap)
    assert kept <= SLACK and top <= 4*512*512 + SLACK


def test_another_dtype_takes_one_stash_of_the_raw_weights():
    model = net().to(torch.bfloat16)
    avg = Average(model)
    avg.update()
    def swap():
        with avg.applied(): pass
    top, kept = held(swap)
    assert kept <= SLACK and top <= fp32_bytes(model)/2 + SLACK


def test_several_averages_take_no_more_than_each_alone():
    model = net()
    averages = [Average(model, ema(decay=d)) for d in (0.9, 0.99, 0.999)]
    update_all(averages)
    top, kept = held(lambda: update_all(averages))
    assert kept <= SLACK and top <= small_bytes(model) + SLACK
