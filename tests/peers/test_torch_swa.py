"What torch tests of its `swa_utils` and `SWALR`, asked of `Average`, `update_bn` and `SWACB`"
import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, swa_utils
from torch.optim.lr_scheduler import MultiplicativeLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from fastswa.averaging.average import Average
from fastswa.averaging.rules import ema, equal
from fastswa.averaging.batchnorm import update_bn
from fastswa.callbacks.schedule import EpochSchedCB
from fastswa.callbacks.basics import RecorderCB
from fastswa.callbacks.swa import SWACB
from fastswa.training.learner import TrainLearner
from fastswa.training.optim import param_groups
from helpers import copied, floats, one, reopened, same

DECAY = 0.9
THEIRS = dict(ema=partial(swa_utils.AveragedModel, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY)),
              swa=swa_utils.AveragedModel)
RULES = dict(ema=ema(DECAY), swa=equal())


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.BatchNorm2d(5, momentum=0.3), nn.Conv2d(5, 2, 3),
                         nn.Linear(5, 10))


def walk(model, *averages, n=10):
    "The states of a random walk; after each step every average takes a snapshot"
    torch.manual_seed(1)
    res = []
    for _ in range(n):
        for t in floats(model).values(): t.add_(torch.randn_like(t))
        for a in averages: a(model)
        res.append(copied(floats(model)))
    return res


@pytest.mark.parametrize('kind', RULES)
def test_the_average_is_the_weighted_mean_of_its_snapshots(kind):
    "Wrong: a first snapshot with the weight of the others, a decay that is off by one update"
    average = Average(model := conv_net(), RULES[kind])
    states = walk(model, average.update)
    n = len(states)
    shares = [1/n]*n if kind == 'swa' else [DECAY**(n - 1 - i)*(1 - DECAY if i else 1) for i in range(n)]
    assert average.n == n
    for name, t in average.weights.items():
        mean = sum(share*s[name].double().numpy() for share, s in zip(shares, states))
        np.testing.assert_allclose(t.numpy(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', RULES)
def test_parameters_are_those_of_averaged_model(kind):
    "On the same snapshots: bit for bit by a constant decay; torch divides for SWA where this one multiplies"
    ours, theirs = Average(model := conv_net(), RULES[kind]), THEIRS[kind](conv_net())
    walk(model, ours.update, theirs.update_parameters)
    tol = dict(rtol=0, atol=0) if kind == 'ema' else dict(rtol=1e-6, atol=1e-7)
    for k, p in theirs.module.named_parameters(): torch.testing.assert_close(ours.weights[k], p.detach(), **tol)


def test_the_average_lies_on_the_device_that_it_is_given():
    "Wrong: the average follows the model there. (Two devices: tests that need a GPU)"
    average = Average(conv_net(), device='cpu')
    average.update()
    assert {t.device.type for t in average.weights.values()} == {'cpu'}


@pytest.mark.parametrize('kind', RULES)
def test_a_second_average_takes_the_state_of_the_first(kind):
    "Weights and count; it goes on alike. Wrong: a count that begins anew, so that SWA weighs what comes too much"
    first, second = (Average(model := conv_net(), RULES[kind]) for _ in range(2))
    walk(first.source, first.update)
    second.load_state_dict(reopened(first.state_dict()))
    assert second.n == first.n and same(second.weights, first.weights)
    first.update(model)
    second.update()
    assert same(second.weights, first.weights)


@pytest.mark.parametrize('kind', RULES)
def test_an_average_can_be_pickled(kind):
    "With its count, its rule and its weights"
    average = Average(conv_net(), RULES[kind])
    walk(average.source, average.update)
    again = pickle.loads(pickle.dumps(average))
    assert again.n == average.n and again.rule == average.rule and same(again.weights, average.weights)


@pytest.mark.parametrize('rule', [ema(DECAY), lambda n: 1 - DECAY])
def test_float_buffers_are_averaged_with_the_weights(rule):
    "As torch with use_buffers=True, by a rule of ours as by any function"
    average = Average(model := conv_net(), rule)
    mean = None
    for s in walk(model, average.update):
        mean = s if mean is None else {k: DECAY*mean[k] + (1 - DECAY)*v for k, v in s.items()}
    assert list(average.weights) == list(mean)
    for k, t in average.weights.items(): torch.testing.assert_close(t, mean[k])


def test_buffers_are_those_of_the_model_if_they_are_left_out():
    "use_buffers=False. By default statistics of BatchNorm are averaged here, as those of the raw weights fit them ill"
    average, theirs = Average(model := conv_net(), ema(DECAY), exclude='*.running_*'), THEIRS['ema'](conv_net())
    walk(model, average.update, theirs.update_parameters)
    for ours, t, raw in zip(average.module().buffers(), theirs.module.buffers(), model.buffers()):
        assert torch.equal(ours, t) and torch.equal(ours, raw)


@pytest.mark.parametrize('kind', RULES)
def test_a_state_goes_to_torchs_averaged_model_and_back(kind):
    "And each goes on as the other"
    ours = Average(model := conv_net(), RULES[kind])
    walk(model, ours.update)
    theirs = THEIRS[kind](conv_net())
    theirs.load_state_dict(ours.to_averaged_model().state_dict())
    back = Average(model, RULES[kind])
    back.from_averaged_model(theirs)
    walk(model, ours.update, back.update, theirs.update_parameters, n=3)
    assert ours.n == back.n == theirs.n_averaged == 13 and same(ours.weights, back.weights)
    for k, p in theirs.module.named_parameters():
        torch.testing.assert_close(ours.weights[k], p.detach(), rtol=1e-5, atol=1e-6)


# --- update_bn


class Normed(nn.Module):
    "A layer, and BatchNorm of what it puts out"
    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.bn = layer, norm
    def forward(self, x): return self.bn(self.layer(x))


def normed(kind):
    torch.manual_seed(0)
    if kind == 'dense': return Normed(nn.Linear(5, 20), nn.BatchNorm1d(20)), torch.rand(100, 5)
    return Normed(nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10, momentum=0.3)), torch.rand(100, 3, 5, 5)


def exact_statistics(model, x):
    "Mean and unbiased variance of each channel over all samples and places, in float64"
    z = model.layer(x).detach().double()
    z = z.transpose(0, 1).flatten(1).numpy()
    return z.mean(1), z.var(1, ddof=1)


def has_statistics(model, mean, var):
    np.testing.assert_allclose(model.bn.running_mean.numpy(), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.bn.running_var.numpy(), var, rtol=1e-4)


@pytest.mark.parametrize('kind', ['dense', 'conv'])
@pytest.mark.parametrize('targets', [False, True])
@pytest.mark.parametrize('train', [False, True])
def test_update_bn_gives_the_statistics_of_all_the_data(kind, targets, train):
    "From batches with and without targets, twice alike, and the mode stays. Torch: the variance to 0.1; here exact"
    model, x = normed(kind)
    model.train(train)
    batches = DataLoader(TensorDataset(x, torch.rand(100)) if targets else TensorDataset(x), 5, shuffle=True)
    for _ in range(2):
        update_bn(model, batches)
        has_statistics(model, *exact_statistics(model, x))
    assert model.training == train


@pytest.mark.parametrize('kind', ['dense', 'conv'])
def test_update_bn_after_the_buffers_were_replaced(kind):
    "Wrong: statistics written into tensors that the layer no longer has"
    model, x = normed(kind)
    update_bn(model, [x])
    model.bn.running_mean, model.bn.running_var = torch.zeros_like(model.bn.running_mean), model.bn.running_var + 1
    update_bn(model, x.split(30))
    has_statistics(model, *exact_statistics(model, x))


@pytest.mark.parametrize('momentum', [0.3, None])
def test_update_bn_keeps_momentum_and_eval_mode(momentum):
    model, x = normed('conv')
    model.bn.momentum = momentum
    update_bn(model.eval(), x.split(5))
    assert model.bn.momentum == momentum and not model.training and not model.bn.training


# --- SWALR

EPOCHS, START, LR = 15, 5, 0.05


def rates(swa_lr, anneal, factor=1., mults=(1.,)):
    "The rate of each group in each epoch under `SWACB`, on top of a schedule by epochs"
    model = nn.ModuleList(one() for _ in mults)
    x = torch.ones(1, 1)
    dls = SimpleNamespace(train=[(x, x)])
    model.forward = lambda x: sum(m(x) for m in model)
    recorder = RecorderCB(lrs=lambda cb: [g['lr'] for g in cb.learn.opt.param_groups])
    schedule = EpochSchedCB(partial(MultiplicativeLR, lr_lambda=lambda _: factor))
    groups = param_groups(model, {f'{i}.*': dict(lr_mult=m) for i, m in enumerate(mults)})
    learn = TrainLearner(model, dls, F.mse_loss, LR, [recorder, schedule,
                         SWACB(f'{START}ep', '1ep', swa_lr=swa_lr, anneal=anneal)], lambda params, lr: SGD(groups, lr))
    learn.fit(EPOCHS, valid=False)
    return np.array(recorder.recs['lrs'])


def torchs_rates(swa_lr, anneal, factor=1., mults=(1.,)):
    "The same with SWALR, which takes the place of the schedule from epoch `START` on"
    opt = SGD([dict(params=[torch.zeros(1)], lr=LR*m) for m in mults])
    schedule, res = MultiplicativeLR(opt, lambda _: factor), []
    for epoch in range(EPOCHS):
        if epoch == START: schedule = swa_utils.SWALR(opt, swa_lr, anneal)
        res.append([g['lr'] for g in opt.param_groups])
        opt.step()
        schedule.step()
    return np.array(res)


@pytest.mark.parametrize('factor', [1., 0.9])
@pytest.mark.parametrize('anneal', [1, 5, 30])
def test_the_rate_goes_to_swa_lr_along_a_cosine(anneal, factor):
    "From what the schedule has reached. Wrong: the schedule goes on below it, an end one epoch off"
    np.testing.assert_allclose(rates(0.01, f'{anneal}ep', factor), torchs_rates(0.01, anneal, factor), rtol=1e-9)


def test_the_rate_is_swa_lr_at_once_without_annealing():
    np.testing.assert_allclose(rates(0.01, '0ep')[:, 0], [LR]*START + [0.01]*(EPOCHS - START))


def test_each_group_goes_to_its_rate():
    "torch takes a list; here `swa_lr` is multiplied for a group as its rate is"
    np.testing.assert_allclose(rates(0.01, '5ep', 0.9, (1., 10.)), torchs_rates([0.01, 0.1], 5, 0.9, (1., 10.)))


@pytest.mark.parametrize('strategy', ['cos', 'linear'])
@pytest.mark.parametrize('factor', [1., 0.9])
def test_torchs_own_schedule_serves_as_well(strategy, factor):
    "SWALR itself, after another schedule: the way to a linear descent, which swa_lr does not have"
    def sched(opt):
        before = MultiplicativeLR(opt, lambda _: factor)
        return SequentialLR(opt, [before, swa_utils.SWALR(opt, 0.01, 5, strategy)], [START])
    recorder, x = RecorderCB(lr=lambda cb: cb.pg['lr']), torch.ones(1, 1)
    learn = TrainLearner(one(), SimpleNamespace(train=[(x, x)]), F.mse_loss, LR, [recorder, EpochSchedCB(sched)])
    learn.fit(EPOCHS, valid=False)
    opt = SGD([torch.zeros(1)], LR)
    theirs, lrs = sched(opt), []
    for _ in range(EPOCHS):
        lrs.append(opt.param_groups[0]['lr'])
        opt.step()
        theirs.step()
    np.testing.assert_allclose(recorder.recs['lr'], lrs)


@pytest.mark.parametrize('wrong', [dict(swa_lr=-1.), dict(swa_lr=0.1, anneal='-1ep'), dict(swa_lr=0.1, anneal=5),
                                   dict(swa_lr=[0.1, 0.2])])
def test_what_is_no_rate_or_time_is_an_error(wrong):
    "When it is given, with its name"
    with pytest.raises((TypeError, ValueError), match='anneal|swa_lr'): SWACB(**wrong)
