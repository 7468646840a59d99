"What diffusers tests of its `EMAModel`, asked of `Average`"
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastswa.averaging.average import Average
from fastswa.averaging.averages import Averages
from fastswa.averaging.rules import ema
from fastswa.averaging.interchange import save_safetensors
from helpers import copied, floats, reopened, same

DECAY = 0.9999


def unet():
    "Convolutions, GroupNorm, an embedding of time: what a diffusion model is made of; no parameter is zero"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))
    return train(model)


def train(model):
    "A step that changes every weight much"
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) + p*torch.randn_like(p))
    return model


def test_updates_are_counted():
    average = Average(unet(), ema(DECAY))
    average.update()
    assert average.n == 1
    for _ in range(2): average.update()
    assert average.n == 3


def test_the_average_stays_where_the_weights_stay():
    "However often it is updated. Wrong: rounding moves it away"
    average = Average(model := unet(), ema(DECAY))
    for _ in range(5): average.update()
    assert same(average.weights, copied(model.state_dict()))


def test_the_average_is_not_the_weights_once_they_move():
    average = Average(unet(), ema(DECAY))
    average.update()
    for _ in range(5):
        train(average.source)
        average.update()
        assert not any(torch.allclose(t, p) for t, p in zip(average.weights.values(), average.source.parameters()))


def test_two_updates_give_two_averages():
    average = Average(unet(), ema(DECAY))
    average.update()
    seen = []
    for _ in range(2):
        train(average.source)
        average.update()
        seen.append(copied(average.weights))
    assert not any(torch.equal(a, b) for a, b in zip(*map(dict.values, seen)))


def test_a_decay_of_0_keeps_nothing_of_the_average():
    "Each update leaves it at the newest weights"
    average = Average(model := unet(), ema(0.))
    for _ in range(2):
        average.update(train(model))
        assert same(average.weights, copied(model.state_dict()))


def test_the_file_of_an_average_gives_the_same_outputs(tmp_path):
    "As a model of its own, read without this library"
    average = Average(model := unet(), ema(0.9))
    for _ in range(3): average.update(train(model))
    save_safetensors(average, tmp_path/'ema.safetensors')
    other = unet()
    other.load_state_dict(load_file(tmp_path/'ema.safetensors'))
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(other(x), average.module()(x)) and not torch.allclose(other(x), model(x))


@pytest.mark.differs('an average without a snapshot is not saved: untrained weights under the name of an average')
def test_there_is_nothing_to_save_before_an_update(tmp_path):
    with pytest.raises(RuntimeError, match='no snapshot yet'): save_safetensors(Average(unet()), tmp_path/'ema')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('warmup', [None, 'ratio', 'power'])
def test_one_call_for_all_tensors_equals_a_loop_over_them(warmup):
    "Their test of foreach: against an average that is worked out tensor by tensor in float64"
    average = Average(model := unet(), rule := ema(0.9, warmup=warmup))
    mean = None
    for n in range(6):
        average.update(train(model))
        now = {k: v.double().numpy() for k, v in floats(model).items()}
        mean = now if mean is None else {k: mean[k] + rule(n)*(now[k] - mean[k]) for k in now}
    for k, t in average.weights.items(): np.testing.assert_allclose(t.numpy(), mean[k], rtol=1e-4, atol=1e-5)


def test_store_copy_to_restore():
    "As their training scripts validate: the weights of training come back bit for bit, and a second time is a no-op"
    averages = Averages(model := unet())
    averages.add('ema', ema(0.5))
    for _ in range(2):
        train(model)
        averages.step()
    before = copied(model.state_dict())
    averages.apply('ema')
    assert same(copied(model.state_dict()), copied(averages.weights('ema')))
    for _ in range(2): averages.restore()
    assert same(copied(model.state_dict()), before)


def test_frozen_parameters_stay_those_of_the_model():
    "Theirs copies them. Wrong: the average of equal values is off by rounding"
    model = unet()
    model[0].requires_grad_(False)
    average = Average(model, ema(DECAY))
    for _ in range(10): average.update()
    assert torch.equal(average.weights['0.weight'], model[0].weight)


@pytest.mark.parametrize('decay', [0., 0.5, 0.9, 0.9999, 1.])
def test_each_decay_against_a_loop(decay):
    "One update of all tensors, each by its own expression"
    average = Average(model := unet(), ema(decay))
    average.update()
    old = copied(average.weights)
    average.update(train(model))
    for k, new in floats(model).items():
        torch.testing.assert_close(average.weights[k], decay*old[k] + (1 - decay)*new, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('lowest', [0.2, 0.5])
def test_a_least_decay_is_part_of_the_rule(lowest):
    "min_decay: the inverse-gamma warm-up that begins with more"
    def rule(n): return 1 - min(0.999, max(lowest, 1 - (1 + n)**(-2/3)))
    average, mean = Average(model := nn.Linear(1, 1, bias=False), rule), None
    for n in range(6):
        nn.init.constant_(model.weight, n)
        average.update()
        mean = float(n) if n == 0 else mean + rule(n)*(n - mean)
    np.testing.assert_allclose(average.weights['weight'].item(), mean, rtol=1e-6)


@pytest.mark.parametrize('start', [0, 4])
def test_the_power_warm_up_of_the_training_scripts(start):
    "use_ema_warmup, update_after_step: 1 - (1 + n)^(-2/3) from the start on"
    averages = Averages(model := nn.Linear(1, 1, bias=False))
    average = averages.add('ema', ema(DECAY, warmup='power'), start=f'{start}ba')
    mean, n = None, 0
    for step in range(1, 9):
        nn.init.constant_(model.weight, step)
        averages.step()
        if step < start: continue
        mean, n = (float(step) if mean is None else mean + (1 + n)**(-2/3)*(step - mean)), n + 1
    assert average.n == n
    np.testing.assert_allclose(average.weights['weight'].item(), mean, rtol=1e-5)


def test_the_average_goes_on_from_its_state():
    "save_pretrained and from_pretrained keep optimization_step"
    a, b = (Average(unet(), ema(0.9, warmup='ratio')) for _ in range(2))
    for _ in range(3): a.update(train(a.source))
    b.load_state_dict(reopened(a.state_dict()))
    b.source.load_state_dict(a.source.state_dict())
    for o in a, b: o.update()
    assert a.n == b.n == 4 and same(a.weights, b.weights)
