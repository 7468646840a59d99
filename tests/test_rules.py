"Rules of averaging: what the newest snapshot counts, alone and together, against float64 and closed forms"
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from fastswa.averaging.average import Average, update_all
from fastswa.averaging.rules import ema, equal, power
from helpers import one


@pytest.mark.parametrize('rule', [power(gamma=2), power(sigma_rel=0.1), equal(), lambda n: 0.3])
def test_rules_together_and_alone(rule):
    "`update_all` and `update` against float64"
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    a, b, exact = Average(net, rule), Average(net, ema(decay=0.9)), None
    for n in range(12):
        with torch.no_grad(): net.weight += torch.randn(2, 3)
        update_all([a, b])
        w, new = 1. if n == 0 else rule(n), net.weight.detach().double().numpy()
        exact = new if exact is None else exact + w*(new - exact)
    np.testing.assert_allclose(a.weights['weight'], exact, rtol=1e-5, atol=1e-5)


def test_every_k_steps_leaves_the_dead_zone():
    "From 1 towards 1.005: in fp32 a step of 5e-8 is none. A hundred at once, with decay^100, go all the way (measured)"
    d, n = 0.99999, 20_000
    def after(steps):
        model = one(1.)
        avg = Average(model, ema(decay=d))
        avg.update()
        nn.init.constant_(model.weight, 1.005)
        for _ in range(n//steps): avg.update(steps=steps)
        return avg.weights['weight'].item() - 1
    exact = (float(np.float32(1.005)) - 1)*(1 - d**n)
    assert after(1) == 0                                                   # so it is, and this is why
    assert after(100) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize('rule', [ema(decay=0.9), ema(half_life=3), equal(), power(gamma=2),
                                  ema(decay=0.99, warmup='ratio')], ids=str)
def test_several_steps_at_once_by_any_rule(rule):
    """Where the weights stand still, one update of `steps=3` leaves of the average what three updates leave

    Elsewhere nobody can tell what `every` does to the horizon (ema-pytorch, OneTrainer#543)"""
    def after(*calls):
        model = one()
        avg = Average(model, rule)
        avg.update(), avg.update()
        nn.init.constant_(model.weight, 1.)
        for steps in calls: avg.update(steps=steps)
        return avg.weights['weight'].item()
    if getattr(rule, 'constant', False): assert after(3, 2) == pytest.approx(after(1, 1, 1, 1, 1), rel=1e-5)
    else: assert after(1) == pytest.approx(rule(2), rel=1e-6)


def test_the_start_counts_no_more_than_it_should():
    "The initial weights are no snapshot: with decay 0.9999 they would be 90 % of the average after 1000 updates"
    model = one(100.)
    avg = Average(model, ema(decay=0.9999))
    nn.init.constant_(model.weight, 1.)
    for _ in range(1000): avg.update()
    assert avg.weights['weight'].item() == 1
    warm = one(100.)
    avg = Average(warm, ema(decay=0.9999, warmup='ratio'))
    avg.update()
    nn.init.constant_(warm.weight, 1.)
    for _ in range(1000): avg.update()
    left = np.prod([min(0.9999, (1 + n)/(10 + n)) for n in range(1, 1001)])
    assert avg.weights['weight'].item() == pytest.approx(1 + 99*left, abs=1e-4)


@pytest.mark.parametrize('make, value', [
    (lambda v: ema(decay=v), 1.0001), (lambda v: ema(decay=v), -1e-9), (lambda v: ema(decay=v), math.nan),
    (lambda v: ema(decay=v), '0.9'),
    (lambda v: ema(half_life=v), 0), (lambda v: ema(half_life=v), -3), (lambda v: ema(half_life=v), math.inf),
    (lambda v: ema(half_life=v), math.nan), (lambda v: ema(half_life=v), '5'), (lambda v: ema(warmup=v), 'linear'),
    (lambda v: power(gamma=v), -1), (lambda v: power(gamma=v), 'x'),
    (lambda v: power(sigma_rel=v), 0.2887), (lambda v: power(sigma_rel=v), 0), (lambda v: power(sigma_rel=v), '0.1')])
def test_values_out_of_range(make, value):
    "Refused where they are given, and the message holds the value"
    with pytest.raises(ValueError, match=re.escape(str(value))): make(value)
