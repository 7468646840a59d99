"What pytorch_ema (torch-ema) tests of its `ExponentialMovingAverage`, asked of `Average`"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam

from fastswa.averaging.average import Average
from fastswa.averaging.rules import ema
from helpers import copied, one, reopened, same

DECAYS = [0.995, 0.9, 0., 1.]
WARMUPS = [None, 'ratio']


def filled(value, dtype=None):
    model = nn.Linear(10, 2, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize('decay', DECAYS[:2])
@pytest.mark.parametrize('warmup', WARMUPS)
@pytest.mark.parametrize('explicit', [False, True])
def test_the_average_has_the_lower_validation_loss(decay, warmup, explicit):
    "Where training fits noise; with the model named in each update or not. Afterwards the raw loss is as before"
    torch.manual_seed(0)
    x, y = torch.rand(2, 100, 10), torch.rand(2, 100).round().long()
    model = nn.Linear(10, 2)
    opt, average = Adam(model.parameters(), 1e-2), Average(model, ema(decay, warmup=warmup))
    average.update()
    for _ in range(20):
        opt.zero_grad()
        F.cross_entropy(model(x[0]), y[0]).backward()
        opt.step()
        average.update(*[model]*explicit)

    def loss(): return F.cross_entropy(model(x[1]), y[1]).item()
    raw = loss()
    with average.applied(): assert loss() < raw
    assert loss() == raw


@pytest.mark.parametrize('decay', DECAYS)
@pytest.mark.parametrize('warmup', WARMUPS)
@pytest.mark.parametrize('explicit', [False, True])
def test_the_raw_weights_come_back(decay, warmup, explicit):
    "Bit for bit, whatever was written to the model in the meantime"
    average = Average(model := nn.Linear(10, 2), ema(decay, warmup=warmup))
    before = copied(model.state_dict())
    average.update(*[model]*explicit)
    with average.applied(), torch.no_grad(): model.weight.uniform_(0, 1)
    assert same(copied(model.state_dict()), before)


@pytest.mark.parametrize('decay', DECAYS)
@pytest.mark.parametrize('explicit', [False, True])
def test_an_update_moves_the_average_and_not_the_model(decay, explicit):
    average = Average(model := filled(0.), ema(decay))
    average.update()
    nn.init.ones_(model.weight)
    average.update(*[model]*explicit)
    assert (model.weight == 1).all()
    average.copy_to()
    np.testing.assert_allclose(model.weight.detach().numpy(), 1 - decay, rtol=1e-6)


def test_a_snapshot_may_come_from_another_module():
    "And the average goes into the one that it was made for"
    average = Average(model := filled(0.), ema(0.9))
    average.update()
    average.update(filled(1.))
    average.copy_to()
    np.testing.assert_allclose(model.weight.detach().numpy(), 0.1, rtol=1e-6)


@pytest.mark.differs('an average begins with its first snapshot, not with weights that were never trained')
def test_before_the_first_update_there_is_no_average():
    "Theirs holds the initial weights from the start, and would copy them"
    average = Average(model := one(1.))
    with pytest.raises(RuntimeError, match='no snapshot yet'): average.copy_to()
    with pytest.raises(RuntimeError, match='no snapshot yet'), average.applied(): pass
    assert average.n == 0 and model.weight == 1


@pytest.mark.parametrize('explicit', [False, True])
@pytest.mark.parametrize('decay', [0.995])
@pytest.mark.parametrize('warmup', WARMUPS)
def test_a_state_goes_there_and_back(decay, warmup, explicit):
    "Weights and count go into the average of another model; what comes back is applied to the first"
    first, second = (Average(filled(v), rule := ema(decay, warmup=warmup)) for v in (0., 5.))
    first.update()
    second.load_state_dict(reopened(first.state_dict()))
    assert same(second.weights, first.weights) and second.n == 1
    nn.init.ones_(second.source.weight)
    second.update(*[second.source]*explicit)
    first.load_state_dict(second.state_dict())
    first.copy_to()
    assert (second.source.weight == 1).all()
    np.testing.assert_allclose(first.source.weight.detach().numpy(), rule(1), rtol=1e-5)


@pytest.mark.differs('the decay is what the program says that goes on, not the file: a warning tells the two apart')
def test_the_rule_stays_that_of_the_constructor():
    first, second = Average(one(), ema(0.995)), Average(one(), ema(0.))
    first.update()
    with pytest.warns(match=r'followed ema\(decay=0.995.*it follows ema\(decay=0.0'):
        second.load_state_dict(first.state_dict())
    assert second.rule == ema(0.)


def test_a_state_goes_into_an_average_of_another_precision():
    "The model keeps its own dtype, and gets the average rounded to it"
    a, b = Average(filled(0.1234567), ema(0.9)), Average(filled(9., torch.float16), ema(0.9))
    for o in a, b: o.update()
    b.load_state_dict(a.state_dict())
    for o in a, b: o.copy_to()
    assert (a.source.weight.dtype, b.source.weight.dtype) == (torch.float32, torch.float16)
    assert torch.equal(a.source.weight.half(), b.source.weight)


@pytest.mark.parametrize('spoil', [dict(weight=torch.zeros(3, 7)), {}])
def test_a_state_that_does_not_fit_never_reaches_the_model(spoil):
    "Another shape, or a tensor too few: ValueError when it is loaded (theirs at copy_to), and nothing has changed"
    average = Average(model := filled(1.), ema(0.9))
    average.update()
    before = copied(average.weights)
    state = dict(average.state_dict(), weights=spoil)
    with pytest.raises(ValueError, match='weight is'): average.load_state_dict(state)
    assert same(average.weights, before) and average.n == 1 and (model.weight == 1).all()


@pytest.mark.parametrize('decay', [-0.1, 1.1, float('nan')])
def test_a_decay_beyond_0_and_1_is_an_error(decay):
    with pytest.raises(ValueError, match='decay must be between 0 and 1'): ema(decay)


@pytest.mark.parametrize('n', [1, 5, 100])
def test_use_num_updates_is_the_ratio_warm_up(n):
    "decay = min(decay, (1 + n)/(10 + n)) after n updates, of which theirs counts the first as 1"
    np.testing.assert_allclose(ema(0.95, warmup='ratio')(n), 1 - min(0.95, (1 + n)/(10 + n)))


@pytest.mark.parametrize('convert', ['double', 'half', 'bfloat16'])
def test_the_average_follows_a_converted_model(convert):
    "ema.to(): it goes on with the values it had, in fp32 or wider. Wrong: the tensors of before, which no longer move"
    average = Average(model := filled(0.), ema(0.5))
    average.update()
    getattr(model, convert)()
    nn.init.ones_(model.weight)
    average.update()
    assert (average.weights['weight'] == 0.5).all()
    assert average.weights['weight'].dtype is (torch.float64 if convert == 'double' else torch.float32)


@pytest.mark.parametrize('trained', [0, 1])
def test_what_is_frozen_may_be_left_out(trained):
    "Theirs averages the parameters that require gradients"
    model = nn.Sequential(one(1.), one(2.))
    model[1 - trained].requires_grad_(False)
    average = Average(model, ema(0.5), include='trainable')
    average.update()
    assert list(average.weights) == [f'{trained}.weight']


def test_half_precision_weights_have_an_average_that_moves():
    "10,000 steps of decay 0.9999 towards 1 go 63 % of the way. Wrong: an average in bfloat16, which stands still"
    average = Average(model := one(0., torch.bfloat16), ema(0.9999))
    average.update()
    nn.init.ones_(model.weight)
    for _ in range(100): average.update(steps=100)
    np.testing.assert_allclose(average.weights['weight'].item(), 1 - 0.9999**10_000, rtol=1e-4)
