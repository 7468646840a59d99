"What ema-pytorch's documentation promises of `EMA` and `PostHocEMA` (it has no tests), asked of our averages"
import numpy as np
import pytest
import torch
from torch import nn

from fastswa.averaging.average import Average
from fastswa.averaging.averages import Averages
from fastswa.averaging.posthoc import PostHocEMA
from fastswa.averaging.rules import ema, power
from fastswa.averaging.interchange import load_ema_pytorch
from fastswa.callbacks.swa_variants import SwitchEMACB
from helpers import Trail, copied, floats, net, one, quick, reopened, same


def steps(averages, n, start=0.):
    "`n` steps, in which the one weight of the model is the number of the step"
    model = averages.model
    for i in range(n):
        nn.init.constant_(model.weight, start + i)
        averages.step()


def test_the_average_starts_after_so_many_calls():
    "With the weights of that moment. Wrong: the weights before it are part of the average"
    averages = Averages(one())
    average = averages.add('ema', ema(0.5), start='5ba')
    steps(averages, 4)
    assert average.n == 0
    steps(averages, 3, 4)
    assert average.n == 3
    assert average.weights['weight'].item() == 0.5*(0.5*4 + 0.5*5) + 0.5*6


@pytest.mark.differs('until it starts there is no average, and no row that shows the raw weights under its name')
def test_before_it_starts_the_average_is_empty():
    "Theirs is a copy of the raw weights by then, and follows them"
    averages = Averages(one())
    averages.add('ema', ema(0.5), start='5ba')
    steps(averages, 4)
    assert averages.rows() == ['raw']
    with pytest.raises(RuntimeError, match='no snapshot yet'): averages.weights('ema')


def test_it_is_updated_every_so_many_calls():
    averages = Averages(one())
    average = averages.add('ema', lambda n: 0.5, every='10ba')
    steps(averages, 35)
    assert average.n == 3
    assert average.weights['weight'].item() == 0.5*(0.5*9 + 0.5*19) + 0.5*29


@pytest.mark.differs('a decay is per step whatever `every` is: an update after 10 steps leaves decay^10 of the average')
def test_the_horizon_does_not_depend_on_how_often_it_is_updated():
    "Theirs applies beta once in 10 steps, which makes the window ten times as long"
    averages = Averages(one())
    average = averages.add('ema', ema(0.9), every='10ba')
    steps(averages, 20)
    np.testing.assert_allclose(average.weights['weight'].item(), 0.9**10*9 + (1 - 0.9**10)*19, rtol=1e-6)


def test_the_decay_warms_up():
    "1 - (1 + n)^(-2/3), up to beta"
    rule = ema(0.99, warmup='power')
    np.testing.assert_allclose([1 - rule(n) for n in (1, 10, 100, 10_000)],
                               [min(0.99, 1 - (1 + n)**(-2/3)) for n in (1, 10, 100, 10_000)])


def test_other_warm_ups_are_functions():
    "inv_gamma=2, power=0.75, min_value=0.2"
    average = Average(model := one(), lambda n: 1 - max(0.2, 1 - (1 + n/2)**-0.75))
    for i in range(3):
        nn.init.constant_(model.weight, i)
        average.update()
    d1, d2 = (max(0.2, 1 - (1 + n/2)**-0.75) for n in (1, 2))
    np.testing.assert_allclose(average.weights['weight'].item(), d2*(1 - d1)*1 + (1 - d2)*2, rtol=1e-6)


def test_the_average_is_called_like_the_network():
    "The average gives other predictions than the network, without gradients, in eval mode; the network's stay"
    model = net(dropout=0.5)
    average = Average(model, ema(0.5))
    average.update()
    with torch.no_grad():
        for p in model.parameters(): p.add_(1)
    average.update()
    x = torch.randn(4, 3)
    averaged = average.module()
    assert not averaged.training and torch.equal(averaged(x), averaged(x)) and not averaged(x).requires_grad
    with average.applied(): expected = model.eval()(x)
    assert torch.equal(averaged(x), expected) and not torch.equal(model(x), expected)


def test_a_live_module_follows_the_average():
    "`ema(x)` at any time, without an update of its own"
    average = Average(model := net(norm=False), ema(0.5))
    average.update()
    live, x = average.live(), torch.randn(4, 3)
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters(): p.add_(1)
        average.update()
        assert torch.equal(live(x), average.module()(x)) and not torch.equal(live(x), model(x))
    assert not live.training and not live(x).requires_grad


def test_it_is_saved_and_goes_on_where_it_was():
    "With the step at which its warm-up was. Wrong: a warm-up that starts anew and forgets what was averaged"
    a, b = (Average(one(), ema(0.99, warmup='power')) for _ in range(2))
    for i in range(20):
        nn.init.constant_(a.source.weight, i)
        a.update()
    b.load_state_dict(reopened(a.state_dict()))
    for o in a, b:
        nn.init.constant_(o.source.weight, 100.)
        o.update()
    assert a.n == b.n == 21 and same(a.weights, b.weights)


def test_their_state_can_be_taken_up():
    model = net()
    state = {f'ema_model.{k}': v + 1 for k, v in model.state_dict().items()}
    average = Average(model, ema(0.99))
    load_ema_pytorch(average, dict(state, initted=torch.tensor([True]), step=torch.tensor([141])))
    assert average.n == 5      # begun at 100, and moved in calls 110, 120, 130, 140
    assert all(torch.equal(average.weights[k], state[f'ema_model.{k}']) for k in average.weights)


@pytest.mark.parametrize('exclude', ['0.*', ['0.weight', '1.*']])
def test_names_can_be_left_out(exclude):
    "ignore_names, param_or_buffer_names_no_ema: the average has the network's own there"
    model = net()
    average = Average(model, ema(0.5), exclude=exclude)
    average.update()
    with torch.no_grad():
        for p in model.parameters(): p.add_(1)
    average.update()
    averaged = average.module()
    assert torch.equal(averaged[0].weight, model[0].weight) and '0.weight' not in average.weights
    assert not torch.equal(averaged[4 - 1].weight, model[3].weight)


def test_integers_are_the_networks_own():
    model = net()
    average = Average(model, ema(0.5))
    for _ in range(4):
        model[1].num_batches_tracked += 1
        average.update()
    assert average.module()[1].num_batches_tracked == 4


def test_a_lazy_network_is_averaged_once_it_has_shapes():
    "Theirs needs a second one by hand, as it cannot be copied. Before its first batch: an error that says so"
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(ValueError, match='run a batch through'): Average(model)
    model(torch.randn(2, 5))
    average = Average(model)
    average.update()
    assert same(average.weights, copied(floats(model)))


@pytest.mark.parametrize('sigma_rel', [0.07, 0.15, 0.25])
@pytest.mark.parametrize('folder', [False, True])
def test_an_average_of_another_length_is_made_afterwards(sigma_rel, folder, tmp_path):
    "From checkpoints of two lengths, near what that average would have been; compared with one that was followed"
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    posthoc = PostHocEMA(model, (0.05, 0.28), every=20, folder=tmp_path/'checkpoints' if folder else None)
    direct = Average(model, power(sigma_rel=sigma_rel))
    for _ in range(400):
        with torch.no_grad(): model.weight += torch.randn(4, 4)/10
        posthoc.update()
        direct.update()
    made = posthoc.reconstruct(sigma_rel)
    spread = (direct.weights['weight'] - model.weight).abs().max()
    assert (made['weight'] - direct.weights['weight']).abs().max() < 0.05*spread


def test_the_network_is_switched_to_the_average():
    "Switch EMA, every so many steps. Wrong: training goes on from the raw weights"
    seen, trail = [], Trail()
    cb = SwitchEMACB(decay=0.9, switch='1ep')
    learn = quick(cb, trail)
    taken = cb.taken
    def note(learn):
        before = copied(learn.model.state_dict())
        taken(learn)
        if not same(copied(learn.model.state_dict()), before): seen.append(learn.opt_steps)
    cb.taken = note
    learn.fit(3)
    assert seen == [7, 14, 21]


def test_the_network_is_switched_by_hand():
    average = Average(model := one(), ema(0.5))
    for v in (0., 4.):
        nn.init.constant_(model.weight, v)
        average.update()
    average.copy_to()
    assert model.weight == 2 and average.weights['weight'] == 2
