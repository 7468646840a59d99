"What an average costs in memory: one fp32 copy of the weights it holds, and the largest tensor once more for the swap"
import pytest
import torch
from torch import nn

from fastswa.averaging.average import Average, update_all
from fastswa.averaging.interchange import save_safetensors
from fastswa.averaging.rules import ema
from helpers import floats, memory

SLACK = 32*1024      # bytes: scalars, and the padding of allocations


def large_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256), nn.BatchNorm1d(256),
                         *(nn.Linear(256, 256) for _ in range(4)))


def fp32_bytes(model): return 4*sum(t.numel() for t in floats(model).values())


def small_bytes(model): return 4*sum(t.numel() for t in floats(model).values() if t.numel() <= 2**15)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_an_average_costs_one_fp32_copy(dtype):
    "A copied module would cost the gradients' buffers too, an average made through temporaries twice as much"
    model = large_net().to(dtype)
    avg = Average(model, ema(decay=0.9))
    top, kept = memory(avg.update)
    # the buffer for the small tensors stays too
    assert fp32_bytes(model) <= kept <= top <= fp32_bytes(model) + small_bytes(model) + SLACK
    top, kept = memory(avg.update)
    piece = 0 if dtype is torch.float32 else 4*2**20       # half precision is widened piece by piece
    assert kept <= SLACK and top <= piece + SLACK


def test_the_buffer_is_bounded():
    "Thousands of small tensors: 8 MB of them, of which 4 MB pass through the buffer"
    model = nn.ParameterList([nn.Parameter(torch.zeros(1000)) for _ in range(2000)])
    avg = Average(model)
    top, _ = memory(avg.update)
    assert top <= 8_000_000 + 4*2**20 + 64*2000      # allocations are rounded up to 64 bytes


def test_swapping_takes_one_copy_of_the_weights():
    "The raw ones, which are kept aside"
    model = large_net()
    avg = Average(model)
    avg.update()
    def swap():
        with avg.applied(): pass
    top, kept = memory(swap)
    assert kept <= SLACK and top <= fp32_bytes(model) + SLACK


def test_another_dtype_takes_one_stash_of_the_raw_weights():
    model = large_net().to(torch.bfloat16)
    avg = Average(model)
    avg.update()
    def swap():
        with avg.applied(): pass
    top, kept = memory(swap)
    assert kept <= SLACK and top <= fp32_bytes(model)/2 + SLACK


def test_several_averages_take_no_more_than_each_alone():
    model = large_net()
    averages = [Average(model, ema(decay=d)) for d in (0.9, 0.99, 0.999)]
    update_all(averages)
    top, kept = memory(lambda: update_all(averages))
    assert kept <= SLACK and top <= small_bytes(model) + SLACK


def not_contiguous():
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    for m in net: m.weight = nn.Parameter(m.weight.detach().T)
    return net


@pytest.mark.parametrize('make, copied', [(large_net, 0), (not_contiguous, 4*256*256)])
def test_a_file_is_written_without_a_copy_of_the_weights(make, copied, tmp_path):
    "Only of what is not contiguous, one tensor at a time"
    avg = Average(make())
    avg.update()

    def save():
        torch.zeros(1)                                         # one event at least, where nothing is copied
        save_safetensors(avg, tmp_path/'w.safetensors')
    top, kept = memory(save)
    assert kept <= SLACK and top <= copied + SLACK
