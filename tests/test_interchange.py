"Averages in and out: parity with torch, timm, torch-ema and ema-pytorch (these three optional); dicts averaged by hand"
import copy
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn, optim
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from fastswa.averaging.average import Average
from fastswa.averaging.rules import ema, equal, power
from fastswa.averaging.interchange import (avg_params, copy_params, from_averaged_model, load_ema_pytorch,
    load_timm_ema, load_torch_ema, save_safetensors, to_averaged_model, write_tensors)


class Net(nn.Module):
    "BatchNorm, a tied weight, a frozen one, and buffers that must not be averaged"
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.bn, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.last.weight
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer('steps', torch.tensor(0))

    def forward(self, x): return self.tied(self.last(self.bn(self.first(x)).relu())) + self.frozen


def plain_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def batches(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 4, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(n)]


def train(net, data, opt=None):
    "Steps of SGD over the batches, one at a time"
    opt = opt or optim.SGD(net.parameters(), 0.3)
    for xb, yb in data:
        opt.zero_grad()
        F.cross_entropy(net.train()(xb), yb).backward()
        opt.step()
        yield


def close(a, b, names=None, **kw):
    kw = kw or dict(rtol=1e-5, atol=1e-6)
    for k in names or b: torch.testing.assert_close(a[k].detach(), b[k].detach(), **kw, msg=lambda m: f'{k}: {m}')


def parameters(module): return {k: v.detach().clone() for k, v in module.named_parameters(remove_duplicate=False)}


# to and from torch

def test_the_swa_loop_of_the_torch_documentation():
    "swa_start, SWALR, update_bn: torch's loop, and ours beside it that is handed over for the last step of all"
    net, data, swa_start = plain_net(), batches(5), 4
    opt = optim.SGD(net.parameters(), 0.3)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(opt, T_max=12)
    swa_scheduler = SWALR(opt, swa_lr=0.05, anneal_epochs=3)
    theirs, ours = AveragedModel(net), Average(net, equal())
    for i in range(12):
        for _ in train(net, data, opt): pass
        if i > swa_start:
            theirs.update_parameters(net)
            ours.update()
            swa_scheduler.step()
        else: scheduler.step()
    alone = to_averaged_model(ours)
    assert alone.n_averaged == theirs.n_averaged == 7
    close(parameters(alone.module), parameters(theirs.module))
    for m in alone, theirs: update_bn(data, m)
    close(alone.module.state_dict(), theirs.module.state_dict())
    assert not alone.training and not alone.module.training


def test_the_ema_loop_of_the_torch_documentation():
    "get_ema_multi_avg_fn and use_buffers: BatchNorm's floats are as ours, its counter is the trap"
    net = plain_net()
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = Average(net, ema(decay=0.9))
    for _ in train(net, batches(40)):
        theirs.update_parameters(net)
        ours.update()
    close(ours.weights, theirs.module.state_dict(), list(ours.weights))
    assert theirs.module[1].num_batches_tracked < 40 == net[1].num_batches_tracked       # 1: halves are cut off
    alone = ours.module()
    assert alone[1].num_batches_tracked == 40


rules = {'equal': equal(), 'ema': ema(decay=0.8), 'power': power(3.), 'half_life': ema(half_life=4),
         'ratio': ema(decay=0.9, warmup='ratio'),
         'warmup': ema(decay=0.9, warmup='power'), 'callable': lambda n: 1/(n + 3)}


@pytest.mark.parametrize('use_buffers', [False, True])
@pytest.mark.parametrize('rule', rules.values(), ids=list(rules))
def test_handed_over_in_the_middle_and_back(rule, use_buffers):
    "Ours, torch's, ours again: as if never handed over; so is torch's average that ours takes over and returns"
    net = plain_net()
    stay, ours = Average(net, rule), Average(net, rule)
    for i, _ in enumerate(train(net, batches(12))):
        stay.update()
        if i == 4:
            theirs = to_averaged_model(ours)
            theirs.use_buffers = use_buffers
        if 4 <= i < 9: theirs.update_parameters(net)
        if i == 9:
            ours = Average(net, rule)
            from_averaged_model(ours, theirs)
            if not use_buffers: close(ours.weights, bn_then, ['1.running_mean', '1.running_var'])
        if not 4 <= i < 9: ours.update()
        bn_then = copy.deepcopy(net.state_dict())
    assert ours.n == stay.n == 12
    close(ours.weights, stay.weights, None if use_buffers else list(parameters(net)))


@pytest.mark.parametrize('name', ['equal', 'ema'])
def test_torch_handed_to_us_in_the_middle_and_back(name):
    kw = {} if name == 'equal' else dict(multi_avg_fn=get_ema_multi_avg_fn(0.8))
    net = plain_net()
    stay, theirs, ours = AveragedModel(net, **kw), AveragedModel(net, **kw), Average(net, rules[name])
    for i, _ in enumerate(train(net, batches(12))):
        stay.update_parameters(net)
        if i == 4: from_averaged_model(ours, theirs)
        if 4 <= i < 9: ours.update()
        if i == 9: theirs = to_averaged_model(ours)
        if not 4 <= i < 9: theirs.update_parameters(net)
    assert theirs.n_averaged == stay.n_averaged == 12
    assert (theirs.multi_avg_fn is None) == (stay.multi_avg_fn is None) and theirs.avg_fn is None
    close(theirs.state_dict(), stay.state_dict())


def test_it_stands_alone():
    net = Net()
    ours = Average(net)
    ours.update()
    theirs, was = to_averaged_model(ours), copy.deepcopy(ours.weights)
    own = {v.untyped_storage().data_ptr() for v in [*net.state_dict().values(), *ours.weights.values()]}
    assert not any(v.untyped_storage().data_ptr() in own for v in theirs.state_dict().values())
    for p in theirs.parameters(): p.detach().zero_()
    close(ours.weights, was)
    assert theirs.module.tied.weight is theirs.module.last.weight


def test_half_precision_keeps_its_fp32_average_in_torch_too():
    "torch's own average of these weights, 1 and 2 in turns, would be rounded at each step"
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    ours = stay = None
    for rule in equal(), ema(decay=0.999):
        stay, ours = Average(net, rule), Average(net, rule)
        for i in range(400):
            nn.init.constant_(net.weight, 1 + i % 2)
            stay.update()
            if i < 100: ours.update()
            if i == 99: theirs = to_averaged_model(ours)
            if i >= 100: theirs.update_parameters(net)
        assert theirs.module.weight.dtype is torch.float32
        from_averaged_model(ours, theirs)
        close(ours.weights, stay.weights)


def test_compiled_and_wrapped_models_inside():
    net = plain_net()
    for wrapped in torch.compile(net), nn.DataParallel(net), torch.compile(nn.DataParallel(net)):
        theirs = AveragedModel(net)
        theirs.update_parameters(net)
        theirs.module = copy.deepcopy(wrapped)
        ours = Average(net)
        from_averaged_model(ours, theirs)
        close(ours.weights, net.state_dict(), list(ours.weights))
        assert ours.n == 1
        from_averaged_model(ours, torch.compile(theirs))
    ours = Average(torch.compile(net))
    from_averaged_model(ours, theirs)
    assert list(to_averaged_model(ours).module.state_dict()) == list(net.state_dict())


def test_torch_before_its_first_update_is_an_empty_average():
    "Its module is an untrained copy then, and no average"
    ours = Average(plain_net())
    ours.update()
    from_averaged_model(ours, AveragedModel(plain_net(1)))
    assert ours.n == 0
    with pytest.raises(RuntimeError, match='update'): ours.weights


def test_another_architecture_is_refused_by_name():
    ours = Average(plain_net())
    ours.update()
    was = copy.deepcopy(ours.weights)
    other = AveragedModel(nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.ReLU(), nn.Linear(6, 3), nn.Linear(1, 1)))
    with pytest.raises(ValueError) as e: from_averaged_model(ours, other)
    for text in '1.weight is missing', '4.bias is not in the model', '0.weight is (5, 4) instead of (6, 4)':
        assert text in str(e.value)
    close(ours.weights, was)
    assert ours.n == 1


def test_the_methods_of_an_average_are_these_functions():
    average = Average(net := plain_net())
    average.update()
    theirs = average.to_averaged_model()
    theirs.update_parameters(net)
    average.from_averaged_model(theirs)
    assert isinstance(theirs, AveragedModel) and average.n == 2


def test_a_part_of_the_weights():
    net = plain_net()
    part, theirs = Average(net, include='3.*'), AveragedModel(net)
    theirs.update_parameters(plain_net(1))
    from_averaged_model(part, theirs)
    assert list(part.weights) == ['3.weight', '3.bias']
    close(part.weights, plain_net(1).state_dict(), ['3.weight', '3.bias'])
    with pytest.raises(ValueError, match='leaves out: 0.weight, 0.bias, 1.weight, 1.bias'): to_averaged_model(part)


# other libraries, in the form in which they save

def other_state(): return Net(5).state_dict()


def averaged_names(average):
    return [k for k in average.source.state_dict() if k.split('.')[-1] not in ('steps', 'num_batches_tracked')]


def test_timm_by_hand():
    checkpoint = dict(epoch=3, arch='net', state_dict=Net().state_dict(), optimizer={}, version=2,
                      state_dict_ema=other_state(), metric=0.9)
    for state in (checkpoint, other_state(), {f'module.{k}': v for k, v in other_state().items()},
                  {f'module.module._orig_mod.{k}': v for k, v in other_state().items()}):
        average = Average(Net(), ema(decay=0.99))
        load_timm_ema(average, state)
        close(average.weights, other_state(), averaged_names(average), rtol=0, atol=0)
        assert average.n == 1
    load_timm_ema(average, state, n=500)
    assert average.n == 500


def test_a_model_with_a_part_called_module():
    "A prefix that belongs to the model must not be taken off"
    def model(seed):
        m = nn.Module()
        torch.manual_seed(seed)
        m.module = nn.Linear(2, 2)
        return m
    for prefix in '', 'module.':
        average = Average(model(0), ema(decay=0.9))
        load_timm_ema(average, {prefix + k: v for k, v in model(1).state_dict().items()})
        close(average.weights, model(1).state_dict())


@pytest.mark.parametrize('load, state, match', [
    (load_timm_ema, dict(state_dict={}, epoch=1), "no 'state_dict_ema'"),
    (load_timm_ema, dict(state_dict_ema={'first.weight': torch.ones(6, 4)}), 'first.bias is missing'),
    (load_timm_ema, dict(state_dict_ema=other_state() | {'head.weight': torch.ones(1)}),
     'head.weight is not in the model'),
    (load_timm_ema, dict(state_dict_ema=other_state() | {'bn.running_var': torch.ones(5)}),
     r'bn.running_var is \(5,\) instead of \(6,\)'),
    (load_torch_ema, dict(shadow_params=[torch.ones(1)], num_updates=3),
     'has 1 tensors; the model has 6 parameters, 5 of which'),
    (load_torch_ema, dict(shadow_params=[torch.ones(4)]*6, num_updates=3),
     r'first.weight is \(4,\) instead of \(6, 4\)'),
    (load_ema_pytorch, dict(shadow_params=[]), "no names that begin with 'ema_model.'"),
    (load_ema_pytorch, {'ema_model.x': torch.ones(1), 'initted': torch.tensor(True), 'step': torch.tensor(3)},
     'frozen is missing')])
def test_what_does_not_fit_is_refused_and_changes_nothing(load, state, match):
    average = Average(Net(), ema(decay=0.9))
    average.update()
    was = copy.deepcopy(average.weights)
    with pytest.raises(ValueError, match=match): load(average, state)
    close(average.weights, was, rtol=0, atol=0)
    assert average.n == 1


def test_the_count_is_needed_where_the_rule_asks_for_it():
    "equal() with n = 1 would forget half of the loaded average at the next update"
    for rule in equal(), power(3.), ema(decay=0.9, warmup='ratio'), ema(decay=0.9, warmup='power'):
        with pytest.raises(ValueError, match='give n='): load_timm_ema(Average(Net(), rule), other_state())
    average = Average(net := Net(), equal())
    load_timm_ema(average, other_state(), n=9)
    average.update()
    expected = 0.9*other_state()['first.weight'] + 0.1*net.first.weight.detach()
    np.testing.assert_allclose(average.weights['first.weight'], expected, rtol=1e-5)


def test_half_precision_states_become_fp32():
    state = {k: v.half() if v.is_floating_point() else v for k, v in other_state().items()}
    average = Average(Net(), ema(decay=0.9))
    load_timm_ema(average, state)
    assert {v.dtype for v in average.weights.values()} == {torch.float32}


def test_torch_ema_of_the_trained_parameters_only():
    "As torch-ema before 0.3 kept them; the frozen one and the statistics come from the model"
    net, old = Net(), Net(5)
    shadow = [p.detach() for p in old.parameters() if p.requires_grad]
    average = Average(net, ema(decay=0.9))
    load_torch_ema(average, dict(decay=0.9, num_updates=None, shadow_params=shadow, collected_params=None))
    own = ['frozen', 'bn.running_mean', 'bn.running_var']
    close(average.weights, net.state_dict(), own, rtol=0, atol=0)
    close(average.weights, old.state_dict(), [k for k in averaged_names(average) if k not in own], rtol=0, atol=0)
    assert average.n == 1


# the libraries themselves

def timm_emas():
    "timm's module of averages without importing timm, which wants a torchvision that fits"
    spec = importlib.util.find_spec('timm')
    if spec is None: pytest.skip('timm is not installed')
    path = Path(spec.submodule_search_locations[0])/'utils'/'model_ema.py'
    spec = importlib.util.spec_from_file_location('timm_model_ema', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('version', ['ModelEmaV2', 'ModelEmaV3'])
def test_timm_goes_on_here(version):
    net = plain_net()
    theirs, data = getattr(timm_emas(), version)(net, decay=0.9), batches(10)
    stay = Average(net, ema(decay=0.9))
    stay.update()                                    # timm begins with a copy
    for i, _ in enumerate(train(net, data)):
        stay.update()
        if i < 5: theirs.update(net)
        if i == 4: load_timm_ema(ours := Average(net, ema(decay=0.9)), copy.deepcopy(theirs.state_dict()))
        if i >= 5: ours.update()
    close(ours.weights, stay.weights)


@pytest.mark.parametrize('use_num_updates', [True, False])
def test_torch_ema_goes_on_here(use_num_updates):
    torch_ema = pytest.importorskip('torch_ema')
    net, rule = plain_net(), ema(decay=0.7, warmup='ratio' if use_num_updates else None)
    theirs = torch_ema.ExponentialMovingAverage(net.parameters(), 0.7, use_num_updates)
    for i, _ in enumerate(train(net, batches(30))):
        theirs.update()
        if i == 6:
            ours = Average(net, rule)
            load_torch_ema(ours, copy.deepcopy(theirs.state_dict()))
            assert ours.n == (8 if use_num_updates else 1)
        if i > 6: ours.update()
    close(ours.weights, dict(zip(dict(net.named_parameters()), theirs.shadow_params)))


@pytest.mark.parametrize('every, after', [(1, 0), (3, 5), (10, 100)])
def test_ema_pytorch_goes_on_here(every, after):
    "With an update at each step the warm-up goes on, too; its decay forgets `update_every`, so else a constant does"
    ema_pytorch = pytest.importorskip('ema_pytorch')
    net = plain_net()
    beta = 0.9 if every == 1 else 1e-6          # the smallest decay: reached at once
    theirs = ema_pytorch.EMA(net, beta=beta, update_every=every, update_after_step=after)
    rule = ema(decay=0.9, warmup='power') if every == 1 else ema(decay=beta)
    until, snapshots = after + 7*every, 0
    for i, _ in enumerate(train(net, batches(until + 12*every))):
        theirs.update()
        if i < until: continue
        if i == until:
            ours = Average(net, rule)
            load_ema_pytorch(ours, copy.deepcopy(theirs.state_dict()), update_every=every, update_after_step=after)
            assert ours.n == 1 + sum(s % every == 0 and s > after for s in range(1, i + 1))
        elif i % every == 0: ours.update()
    close(ours.weights, theirs.ema_model.state_dict(), list(ours.weights))
    from_start = Average(net, rule)
    load_ema_pytorch(from_start, ema_pytorch.EMA(plain_net()).state_dict())
    assert from_start.n == 0


# dicts averaged by hand

@settings(max_examples=30)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), n=st.integers(1, 40), empty=st.booleans())
def test_the_running_mean_is_the_mean(dtype, n, empty):
    net, seen = Net().to(dtype), []
    g = torch.Generator().manual_seed(n)
    params = {} if empty else copy_params(net)
    if not empty: seen.append(copy_params(net))
    for _ in range(n):
        with torch.no_grad():
            for p in net.parameters(): p += torch.randn(p.shape, generator=g).to(p)
        seen.append(copy_params(net))
        assert avg_params(net, params) == len(seen)
    assert params.pop('.n') == len(seen) and type(len(seen)) is int
    for k, v in params.items():
        np.testing.assert_allclose(v.double(), np.mean([s[k].double().numpy() for s in seen], 0), rtol=1e-4, atol=1e-5)
        assert v.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert all(copy_params(net, params).values())
    close(dict(net.named_parameters()), {k: v.to(dtype) for k, v in params.items() if k != 'tied.weight'}, rtol=0,
          atol=0)


def test_the_same_as_an_average():
    net = plain_net()
    average, params = Average(net), {}
    for _ in train(net, batches(6)):
        average.update()
        avg_params(net, params)
    assert average.n == params['.n']
    close(average.weights, params, [k for k in params if k != '.n'])


def test_copies_are_copies_and_the_way_back_is_exact():
    for dtype in torch.float32, torch.bfloat16:
        net = Net().to(dtype)
        was, params = copy.deepcopy(net.state_dict()), copy_params(net)
        assert {v.dtype for v in params.values()} == {torch.float32}
        assert not any(v.requires_grad for v in params.values()) and list(params) == [k for k in was if k in params]
        with torch.no_grad():
            for p in net.parameters(): p.fill_(7)
        assert copy_params(net, params) == dict.fromkeys(params, True)
        assert all(torch.equal(v, was[k]) for k, v in net.state_dict().items())
        assert net.first.weight.requires_grad and not net.frozen.requires_grad and net.first.weight.grad is None


@pytest.mark.parametrize('value', [3, 3., torch.tensor(3), torch.full((1,), 3.), torch.full((4,), 3),
                                   torch.full((6, 1), 3., dtype=torch.float64)])
def test_whatever_expands_can_be_copied(value):
    net = Net()
    was = net.first.bias.detach().clone()
    answer = copy_params(net, {'first.weight': value, 'nobody': 1, '.n': 5})
    assert [k for k, v in answer.items() if v] == ['first.weight'] and set(answer) == set(copy_params(net))
    assert net.first.weight.eq(3).all() and torch.equal(net.first.bias, was)


@pytest.mark.parametrize('value', [torch.ones(6), torch.ones(4, 6), torch.ones(1, 6, 4), torch.ones(0, 4),
                                   torch.ones(2, 4)])
def test_what_does_not_expand_is_refused_before_anything_is_written(value):
    net = Net()
    was = copy.deepcopy(net.state_dict())
    params = dict(copy_params(net), **{'frozen': 9, 'first.weight': value})
    with pytest.raises(ValueError, match='first.weight is') as e: copy_params(net, params)
    assert str(tuple(value.shape)) in str(e.value) and '(6, 4)' in str(e.value)
    assert all(torch.equal(v, was[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize('change, match', [
    (lambda p: p.pop('bn.bias'), 'bn.bias is missing'), (lambda p: p.update(frozen=2), 'frozen is 2 instead of'),
    (lambda p: p.update(frozen=torch.ones(5)), r'frozen is \(5,\) instead of \(6,\)'),
    (lambda p: p.update(frozen=torch.tensor(1.)), r'frozen is \(\) instead of \(6,\)'),
    (lambda p: p.update({'.n': 0}), "'.n' must count"), (lambda p: p.update({'.n': -3}), "'.n' must count")])
def test_a_dict_that_does_not_fit_is_refused_before_anything_is_averaged(change, match):
    net, params = Net(), copy_params(Net(3))
    change(params)
    was = copy.deepcopy(params)
    with pytest.raises(ValueError, match=match): avg_params(net, params)
    assert list(params) == list(was)
    assert all(torch.equal(v, was[k]) if torch.is_tensor(v) else v == was[k] for k, v in params.items())


def test_live_tensors_are_no_mean():
    "A state_dict holds the parameters themselves: their mean would be the newest weights for ever"
    net = Net()
    for params in net.state_dict(), dict(net.named_parameters(remove_duplicate=False)):
        with pytest.raises(ValueError, match="module's own tensors, not copies"): avg_params(net, params)
        assert '.n' not in params


def test_not_finite_weights_are_left_out_of_the_mean():
    net, params = Net(), {}
    avg_params(net, params)
    was = copy.deepcopy(params)
    for bad in float('nan'), float('inf'):
        with torch.no_grad(): net.frozen[2] = bad
        with pytest.warns(UserWarning, match='left out'): assert avg_params(net, params) == 1
        close(params, was, [k for k in was if k != '.n'], rtol=0, atol=0)
    with pytest.warns(UserWarning, match='left out'): assert avg_params(net, fresh := {}) == 0
    assert fresh == {}


def test_a_mean_in_half_precision_is_widened():
    "In bfloat16 a mean of hundreds of snapshots stands still"
    net = nn.Linear(3, 2).bfloat16()
    params = {k: v.clone() for k, v in net.state_dict().items()}
    for i in range(600):
        with torch.no_grad():
            for p in net.parameters(): p.fill_(1 + (i >= 300))
        avg_params(net, params)
    assert params['weight'].dtype is torch.float32
    expected = (copy_params(nn.Linear(3, 2))['weight']*0 + 900)/601
    assert (params['weight'] - expected).abs().max() < 2/601


def test_a_mean_that_was_saved_goes_on(tmp_path):
    "The count may come back as a tensor; tied weights as two tensors"
    net, params = Net(), {}
    for _ in train(net, [(x, y) for x, y in batches(5)]): avg_params(net, params)
    torch.save(params, tmp_path/'mean.pt')
    loaded = {k: torch.tensor(v) if k == '.n' else v.clone() for k, v in torch.load(tmp_path/'mean.pt').items()}
    for _ in train(net, batches(3, 1)): assert avg_params(net, params) == avg_params(net, loaded)
    assert loaded['.n'] == 8 and type(loaded['.n']) is int
    close(loaded, params, [k for k in params if k != '.n'])


def test_names_are_those_of_the_plain_model():
    net = plain_net()
    for wrapped in torch.compile(net), nn.DataParallel(net):
        params = copy_params(wrapped)
        assert list(params) == list(dict(net.named_parameters()))
        assert avg_params(wrapped, params) == 2 and all(copy_params(wrapped, params).values())
    net[0] = torch.compile(net[0])
    assert list(copy_params(net)) == list(params)[:-1]


def test_made_in_inference_mode_averaged_outside():
    net = plain_net()
    with torch.inference_mode(): params = copy_params(net)
    assert avg_params(net, params) == 2


def test_tied_values_must_agree():
    net, value = Net(), torch.randn(6, 6)
    assert copy_params(net, {'last.weight': value, 'tied.weight': value.double()})['tied.weight']
    assert torch.equal(net.last.weight, value)
    with pytest.raises(ValueError, match='last.weight and tied.weight'):
        copy_params(net, {'last.weight': value, 'tied.weight': 0})
    assert torch.equal(net.last.weight, value)


# files

def test_the_file_loads_strictly_into_tied_channels_last_compiled_and_half_models(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.conv = Net(), nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
            self.half, self.bn = nn.Linear(2, 2).half(), nn.BatchNorm2d(4)
            self.to(memory_format=torch.channels_last)
    odd, path = Odd(), tmp_path/'ema.safetensors'
    average = Average(torch.compile(odd), ema(decay=0.5))
    average.update()
    with torch.no_grad():
        for p in odd.parameters(): p += 1
        odd.net.steps += 3
    average.update()
    save_safetensors(average, str(path))
    fresh, loaded = Odd(), load_file(path)
    fresh.load_state_dict(loaded)
    with average.applied(): expected = copy.deepcopy(odd.state_dict())
    close(fresh.state_dict(), expected)
    assert fresh.net.steps == 3 and loaded['half.weight'].dtype is torch.float32
    assert all(v.is_contiguous() for v in loaded.values())


def test_while_applied_the_file_is_the_same(tmp_path):
    net = plain_net()
    average = Average(net)
    for _ in train(net, batches(3)): average.update()
    save_safetensors(average, tmp_path/'a')
    with average.applied(): save_safetensors(average, tmp_path/'b')
    a, b = (load_file(tmp_path/name) for name in 'ab')
    assert list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())
    assert not torch.equal(a['0.weight'], net[0].weight)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64,
                                   torch.uint16, torch.float8_e4m3fn])
def test_the_bytes_are_those_of_the_library(dtype):
    "Scalars, empty ones and names beyond ASCII too"
    tensors = {k: torch.arange(6).reshape(shape).to(dtype) for k, shape in dict(b=(2, 3), a=(6,), ä=(1, 6)).items()}
    tensors |= dict(scalar=torch.ones(()).to(dtype), empty=torch.zeros(0, 2).to(dtype))
    f = io.BytesIO()
    write_tensors(tensors, f, {})
    assert f.getvalue() == safetensors.torch.save(tensors, dict(format='pt'))      # of several it mixes the order


def test_dtypes_side_by_side(tmp_path):
    "Each at a place that its element size divides"
    tensors = dict(a=torch.arange(3, dtype=torch.uint8), b=torch.randn(2), c=torch.arange(2), d=torch.ones(3).half())
    with open(tmp_path/'a', 'wb') as f: write_tensors(tensors, f, {})
    found = load_file(tmp_path/'a')
    assert found.keys() == tensors.keys() and all(torch.equal(v, found[k]) for k, v in tensors.items())
    with pytest.raises(TypeError, match='z is torch.complex128, which a safetensors file cannot hold'):
        write_tensors(dict(z=torch.zeros(1, dtype=torch.complex128)), io.BytesIO(), {})


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    average = Average(plain_net())
    average.update()
    save_safetensors(average, tmp_path/'a.safetensors')
    was = (tmp_path/'a.safetensors').read_bytes()
    def fails(state, f, metadata):
        f.write(b'half a file')
        raise KeyboardInterrupt
    monkeypatch.setattr('fastswa.averaging.interchange.write_tensors', fails)
    with pytest.raises(KeyboardInterrupt): save_safetensors(average, tmp_path/'a.safetensors')
    assert [(o.name, o.read_bytes()) for o in tmp_path.iterdir()] == [('a.safetensors', was)]
