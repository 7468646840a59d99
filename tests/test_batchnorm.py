"`update_bn` on any layer, batch, wrapper and fault, against float64 NumPy; layers of others take part too"
import copy
import sys
import warnings
import weakref
from collections import UserDict, namedtuple
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn, optim
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from fastswa.averaging.average import Average
from fastswa.averaging.batchnorm import bn_layers, bn_state, update_bn
from fastswa.module_state import WithoutDropout
from fastswa.nets.norms import BatchNorm
from fastswa.training.events import Callback, CancelBatchException, CancelEpochException
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB
from helpers import CORE, ctrl_c, moments


def mlp(seed=0, **kw):
    torch.default_generator.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **kw), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2),
                         nn.BatchNorm1d(2, **kw))


def inputs(n=24, seed=0, shape=(3,), mean=1., std=2.):
    return torch.tensor(np.random.default_rng(seed).normal(mean, std, (n, *shape)), dtype=torch.float32)


def stats(x, axis=0):
    x = np.asarray(x.detach().cpu().double() if torch.is_tensor(x) else x)
    return x.mean(axis), x.var(axis, ddof=1)


def by_numpy(net, batches):
    "Both layers' statistics: each normalises by batch, dropout is off, and all their inputs count alike"
    w, b, v, c = [p.detach().double().numpy() for i in (0, 4) for p in (net[i].weight, net[i].bias)]
    firsts, seconds = [], []
    for x in batches:
        h = x.double().numpy() @ w.T + b
        firsts.append(h)
        h = (h - h.mean(0))/np.sqrt(h.var(0) + net[1].eps)
        h = h*net[1].weight.detach().double().numpy() + net[1].bias.detach().double().numpy()
        seconds.append(np.maximum(h, 0) @ v.T + c)
    return stats(np.concatenate(firsts)), stats(np.concatenate(seconds))


def assert_stats(layer, mean, var, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(layer.running_mean.detach().cpu().double().flatten(), mean, rtol=rtol, atol=atol)
    np.testing.assert_allclose(layer.running_var.detach().cpu().double().flatten(), var, rtol=rtol, atol=atol)


def assert_same(a, b):
    assert list(a) == list(b)
    for k in a: assert torch.equal(a[k], b[k]), k


def marked(net, seed=5):
    "Statistics and momenta of its own for each layer, so that one that was touched shows"
    g = torch.Generator().manual_seed(seed)
    for i, m in enumerate(bn_layers(net).values()):
        m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g))
        m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)
        m.num_batches_tracked.fill_(i + 7)
        m.momentum = (i + 1)/4
    return net


def momenta(net): return [m.momentum for m in bn_layers(net).values()]


def hooks(net): return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())


# --- the numbers


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=7), n_batches=st.none() | st.integers(1, 9),
       seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.float64]), ordered=st.booleans())
def test_any_cut_of_any_data(sizes, n_batches, seed, dtype, ordered):
    net, x = mlp(seed).to(dtype), inputs(sum(sizes), seed)
    if ordered: x = x.sort(0).values
    batches = x.to(dtype).split(sizes)
    update_bn(net, batches, n_batches=n_batches)
    for layer, (mean, var) in zip((net[1], net[5]), by_numpy(net, batches[:n_batches])):
        assert_stats(layer, mean, var, rtol=1e-4, atol=1e-5)
        assert layer.num_batches_tracked == min(len(sizes), n_batches or 99)


def test_unshuffled_data():
    "The mean of the batches' variances is below 1 here; the variance of all is 22"
    x = torch.arange(16.) - 7.5
    x = (x*(22/x.double().var())**0.5).float()[:, None]
    assert np.mean([b.numpy().var(ddof=1) for b in x.split(4)]) < 2
    m = nn.BatchNorm1d(1)
    update_bn(m, x.split(4))
    assert_stats(m, [0], [22], atol=1e-6)


@pytest.mark.parametrize('mean, std', [(1e4, 1e-2), (1e3, 1), (-1e6, 1e2), (0, 1e-12)])
def test_no_cancellation(mean, std):
    """In fp32 E[x²] - E[x]² would be off by more than the variance

    What is left is the rounding of a batch's mean, as running_mean is rounded."""
    rtol = 1e-5 + (np.spacing(np.float32(abs(mean)))/2/std)**2
    x = inputs(2048, shape=(3, 4), mean=mean, std=std)
    m = nn.BatchNorm1d(3)
    update_bn(m, x.split(100))
    expected = stats(x, (0, 2))
    assert_stats(m, *expected, rtol=rtol, atol=0 if mean else 1e-3*std)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    "A sum of these overflows fp16, and bf16 cannot count beyond 256"
    x = inputs(3000, shape=(2,), mean=100, std=5).to(dtype)
    m = nn.BatchNorm1d(2)
    update_bn(m, x.split(1000))
    assert_stats(m, *stats(x))


def test_a_layer_in_half_precision():
    x, m = inputs(64, shape=(2,)).bfloat16(), nn.BatchNorm1d(2, dtype=torch.bfloat16)
    update_bn(m, x.split(16))
    assert m.running_var.dtype is torch.bfloat16
    assert_stats(m, *stats(x), rtol=2**-8)
    was = bn_state(m := nn.BatchNorm1d(2, dtype=torch.float16))
    with pytest.raises(ValueError, match='BatchNorm1d.*too large for torch.float16'):
        update_bn(m, [inputs(8, shape=(2,), std=1e3).half()])
    assert_same(bn_state(m), was)


LAYERS = dict(
    bn1d_nc=(nn.BatchNorm1d(3), (3,)), bn1d_ncl=(nn.BatchNorm1d(3), (3, 5)), bn2d=(nn.BatchNorm2d(3), (3, 4, 5)),
    bn3d=(nn.BatchNorm3d(3), (3, 2, 4, 5)), sync=(nn.SyncBatchNorm(3), (3, 4)),
    plain=(nn.BatchNorm2d(3, affine=False), (3, 4, 4)),
    no_momentum=(nn.BatchNorm2d(3, momentum=None), (3, 4, 4)),
    in1d=(nn.InstanceNorm1d(3, track_running_stats=True), (3, 5)),
    in2d=(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 4, 5)),
    in3d=(nn.InstanceNorm3d(3, track_running_stats=True), (3, 2, 4, 5)))


@pytest.mark.parametrize('kind', LAYERS)
def test_every_layer_of_torch(kind):
    m, x = copy.deepcopy(LAYERS[kind][0]), inputs(11, shape=LAYERS[kind][1])
    update_bn(m, x.split((4, 4, 3)))
    space, e = tuple(range(2, x.ndim)), x.double().numpy()
    expected = (e.mean(space).mean(0), e.var(space, ddof=1).mean(0)) if kind.startswith('in') else stats(x, (0, *space))
    assert_stats(m, *expected)
    assert m.momentum == LAYERS[kind][0].momentum
    theirs = copy.deepcopy(LAYERS[kind][0])
    theirs.momentum = 1.
    theirs(x)
    if kind != 'no_momentum': assert_stats(m, *[b.double().numpy() for b in (theirs.running_mean, theirs.running_var)])


def test_instance_norm_of_single_samples_and_ragged_ones():
    "A sample may come without the batch axis, and samples may differ in size: each counts the same"
    samples, m = [inputs(1, i, (2, 3 + i))[0] for i in range(4)], nn.InstanceNorm1d(2, track_running_stats=True)
    update_bn(m, samples)
    assert_stats(m, *np.mean([stats(o, 1) for o in samples], axis=0))


def test_lazy_layers():
    m = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(), nn.LazyInstanceNorm1d(track_running_stats=True))
    x = inputs()
    with pytest.raises(ValueError, match='1 has no shape yet: run a batch'): update_bn(m, [x])
    m[:2](x), m[2](torch.randn(2, 3, 5))
    update_bn(m[:2], x.split(9))
    assert_stats(m[1], *stats(m[0](x)))
    update_bn(m[2], [torch.ones(2, 3, 5)])
    assert_stats(m[2], [1]*3, [0]*3)


def test_modules_without_statistics_are_left_out_and_nothing_is_run():
    class Frozen(nn.Module):          # as torchvision's FrozenBatchNorm2d: constants
        def __init__(self):
            super().__init__()
            for k in ('running_mean', 'running_var'): self.register_buffer(k, torch.ones(2))
    class Normaliser(nn.Module):      # a mean without a variance
        momentum = 0.1
        def __init__(self):
            super().__init__()
            self.register_buffer('running_mean', torch.ones(2))
        def reset_running_stats(self): pass
    def unread():
        raise AssertionError('a pass over the data for nothing')
        yield
    net = nn.Sequential(Frozen(), Normaliser(), nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm1d(2),
                        nn.BatchNorm1d(2, track_running_stats=False))
    assert bn_layers(net) == {} and bn_state(net) == {} and update_bn(net) == {}
    update_bn(net, unread())
    update_bn(nn.Sequential(net, nn.BatchNorm1d(2).eval()), unread())        # frozen


def test_a_shared_layer_pools_all_that_it_gets():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = self.again = nn.BatchNorm1d(3)
        def forward(self, x): return self.again(self.bn(x)*3 + 1)
    net, x = Twice(), inputs()
    update_bn(net, x.split(10))
    firsts = [b.double().numpy() for b in x.split(10)]
    seconds = [(b - b.mean(0))/np.sqrt(b.var(0) + 1e-5)*3 + 1 for b in firsts]
    assert_stats(net.bn, *stats(np.concatenate([*firsts, *seconds])))
    assert net.bn.num_batches_tracked == 6 and list(bn_layers(net)) == ['bn']


def test_a_layer_that_gets_no_input_keeps_what_it_has():
    "Also where its statistics move all the same: another module normalises with them, or nothing of its input counts"
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.fused, self.padding = (nn.BatchNorm1d(3) for _ in range(4))
            self.padding.stats_input = lambda x: x[:0]
        def forward(self, x):
            x = F.batch_norm(self.padding(x), self.fused.running_mean, self.fused.running_var,
                             training=self.fused.training)
            return self.used(x*3)
    net, x = marked(Skips()), inputs()
    was = bn_state(net)
    update_bn(net, [x])
    now = bn_state(net)
    assert len(was) == 12 and all(torch.equal(now[k], was[k]) for k in was if not k.startswith('used'))
    assert_stats(net.used, [0]*3, [9*24/23]*3, rtol=1e-4, atol=1e-5)


def test_what_hooks_of_others_make_of_the_input_counts():
    m, x, seen = nn.BatchNorm1d(3), inputs(), []
    m.register_forward_pre_hook(lambda m, args: (args[0]*2,))
    m.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    update_bn(m, x.split(20))
    assert_stats(m, *stats(x*2))
    assert seen == [20, 4] and hooks(m) == 2


# --- frozen layers, modes, dropout, random numbers


class DropNorm(nn.BatchNorm1d):
    "With dropout as a part of it, as layers that fuse norm and activation have"
    def __init__(self, nf):
        super().__init__(nf)
        self.drop = nn.Dropout(0.5)
    def forward(self, x): return self.drop(super().forward(x))


def test_dropout_within_a_layer_is_off_too_and_no_random_number_is_drawn():
    x = inputs()
    net = nn.Sequential(DropNorm(3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    update_bn(net, x.split(8))
    assert torch.equal(torch.get_rng_state(), state)
    normed = [(b - b.mean(0))/np.sqrt(b.var(0) + 1e-5) for b in x.double().numpy().reshape(3, 8, 3)]
    assert_stats(net[2], *stats(np.concatenate(normed)), atol=1e-5)
    assert all(m.training for m in net.modules())


def test_layers_that_merge_weights_in_eval_mode_have_them_apart_again():
    "As LoRA's do in their `train()`. Wrong: a flag that says train mode, and weights that are still merged"
    class Merging(nn.Linear):
        merged = False
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)
    net = nn.Sequential(Merging(3, 3), nn.BatchNorm1d(3))
    update_bn(net, [inputs()])
    assert net[0].training and not net[0].merged
    net.eval()
    update_bn(net, [inputs()])
    assert not net[0].training and net[0].merged


def test_frozen_layers_normalise_by_what_they_have():
    net, x = marked(mlp()), inputs()
    net[1].eval()
    was = bn_state(net[1])
    update_bn(net, x.split(7))
    assert_same(bn_state(net[1]), was)
    h = net[0](x).detach().double().numpy()
    h = (h - was['running_mean'].double().numpy())/np.sqrt(was['running_var'].double().numpy() + 1e-5)
    h = np.maximum(h, 0) @ net[4].weight.detach().double().numpy().T + net[4].bias.detach().double().numpy()
    assert_stats(net[5], *stats(h), rtol=1e-4)
    assert [m.training for m in net] == [True, False, True, True, True, True]


def test_eval_mode_of_the_whole_counts_whatever_wrapper_says():
    "A wrapper keeps a flag of its own, which does not follow the module inside"
    net, x = mlp().eval(), inputs()
    wrapper = nn.DataParallel(net)
    net.eval()
    assert wrapper.training
    update_bn(wrapper, [x])
    assert_stats(net[1], *stats(net[0](x)))
    assert wrapper.training and not any(m.training for m in net.modules())


def test_no_graph_is_kept_even_where_the_model_builds_one():
    class Token: pass
    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            alive.append(weakref.ref(ctx.token))
            return x.clone()
    class Stubborn(nn.Sequential):
        @torch.enable_grad()
        def forward(self, x):
            assert not any(r() for r in alive)
            return super().forward(Mark.apply(x.requires_grad_()))
    net, alive = Stubborn(*mlp()), []
    update_bn(net, inputs().split(8))
    assert len(alive) == 3
    assert not any(b.requires_grad for b in net.buffers()) and all(p.grad is None for p in net.parameters())


# --- batches


Pair = namedtuple('Pair', 'xb yb')


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
    def forward(self, inp, *, scale=1., labels=None): return self.bn(input=inp*scale)


@pytest.mark.parametrize('make', [
    lambda b: b, lambda b: (b, 'label'), lambda b: [b], lambda b: Pair(b, torch.zeros(len(b))), lambda b: {'inp': b},
    lambda b: {'labels': None, 'inp': b/2, 'scale': 2.}, lambda b: UserDict(inp=b)])
def test_forms_of_a_batch(make):
    net, x = ByName(), inputs()
    update_bn(net, map(make, x.split(10)))
    assert_stats(net.bn, *stats(x))


def test_nested_inputs_go_in_whole():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
        def forward(self, ab): return self.bn(ab['a'] + ab['b'][0])
    net, x = Two(), inputs()
    update_bn(net, [({'a': b, 'b': [b]}, 'label') for b in x.split(10)])
    assert_stats(net.bn, *stats(2*x))


def test_a_loader_and_a_generator():
    net, x = mlp(), inputs()
    update_bn(net, DataLoader(TensorDataset(x, x), 7))
    assert_stats(net[1], *stats(net[0](x)))
    update_bn(net, (o*2 for o in x.split(7)))
    assert_stats(net[1], *stats(net[0](x*2)))


def test_forward_gets_the_plain_module_and_the_batch_as_it_is():
    net, seen = mlp(), []
    batch = object()
    update_bn(nn.DataParallel(net), [batch],
              forward=lambda m, b: seen.append((m is net, b is batch, m(inputs()).requires_grad)))
    assert seen == [(True, True, False)]


@pytest.mark.parametrize('n', [1, 3])
def test_no_more_batches_are_drawn_than_asked_for(n):
    drawn = []
    def batches():
        for i, b in enumerate(inputs(50).split(10)):
            drawn.append(i)
            yield b
    update_bn(mlp(), batches(), n_batches=n)
    assert drawn == list(range(n))


# --- faults


class Fails(nn.Module):
    def __init__(self, exc, at): super().__init__(); self.exc, self.left = exc, at
    def forward(self, x):
        self.left -= 1
        if self.left < 0: raise self.exc
        return x


class Stop(BaseException): pass


@pytest.mark.parametrize('exc', [RuntimeError('x'), KeyboardInterrupt(), SystemExit(), Stop()])
@pytest.mark.parametrize('where', ['model', 'data', 'forward', 'stats_input'])
def test_whatever_is_raised_nothing_has_changed(exc, where):
    def batches(n=2):
        for i, b in enumerate(inputs().split(8)):
            if where == 'data' and i == n: raise exc
            yield b
    def forward(m, b):
        if where == 'forward' and m[1].num_batches_tracked > 8: raise exc
        return m(b)
    net = marked(nn.Sequential(*mlp(), Fails(exc, 1 if where == 'model' else 99)))
    net[5].eval()
    if where == 'stats_input': net[1].stats_input = Fails(exc, 1)
    was, before, modes = bn_state(net), momenta(net), [m.training for m in net.modules()]
    with pytest.raises(type(exc)): update_bn(net, batches(), forward=forward)
    assert_same(bn_state(net), was)
    assert (momenta(net), hooks(net), [m.training for m in net.modules()]) == (before, 0, modes)


@pytest.mark.parametrize('data, exc, says', [
    ([], ValueError, 'there is no data'), (iter(()), ValueError, 'there is no data'), (3, TypeError, 'iterable'),
    ([torch.full((8, 3), float('inf'))], ValueError, 'the inputs of 1 are not finite'),
    ([{'y': torch.ones(8, 3)}], TypeError, 'y'),
    ([torch.ones(1, 3)], ValueError, 'more than 1 value')])
def test_data_of_no_use(data, exc, says):
    net = marked(mlp())
    was, before = bn_state(net), momenta(net)
    with pytest.raises(exc, match=says): update_bn(net, data)
    assert_same(bn_state(net), was)
    assert momenta(net) == before


@pytest.mark.parametrize('args, kw, exc, says', [
    (('loader', 'model'), {}, TypeError, r'update_bn\(module, data\); got str'),
    (('model', ['x']), dict(n_batches=-1), ValueError, 'got -1'),
    (('model', ['x']), dict(momenta={}), ValueError, 'not both')])
def test_arguments(args, kw, exc, says):
    net = mlp()
    with pytest.raises(exc, match=says): update_bn(*(net if a == 'model' else a for a in args), **kw)


FILES = 'averaging/batchnorm.py', *CORE      # the code in whose lines Ctrl-C is pressed


def compiles():
    "Does torch.compile still compile?"
    import torch._dynamo
    return torch._dynamo.eval_frame._stance.stance == 'default'


@pytest.mark.parametrize('what', ['data', 'reset'])
def test_ctrl_c_at_any_line(what):
    "Either nothing has happened, or all of it; hooks and modes never stay"
    batches = inputs(16).split(8) if what == 'data' else None
    def fresh():
        net = marked(mlp())
        net[5].eval()
        return net, partial(update_bn, net, batches)
    net, call = fresh()
    was, before, modes = bn_state(net), momenta(net), [m.training for m in net.modules()]
    lines = moments(call, FILES, every=FILES)
    assert len(lines) > 60
    done = bn_state(net), momenta(net)
    for at in lines:
        net, call = fresh()
        assert ctrl_c(call, at), at
        untouched = momenta(net) == before and torch.equal(net[1].running_mean, was['1.running_mean'])
        assert_same(bn_state(net), was if untouched else done[0])
        assert momenta(net) in (before, done[1]) if what == 'data' else momenta(net) == before, at
        assert (hooks(net), [m.training for m in net.modules()]) == (0, modes), at
        assert compiles(), f'{at}: torch.compile is off for everybody'


# --- without data


def test_momenta_by_name():
    net = marked(mlp())
    kept = update_bn(net)
    assert kept == {'1': 0.25, '5': 0.5} and momenta(net) == [None, None]
    for b in inputs().split(8): net[1](net[0](b))
    assert_stats(net[1], *np.mean([stats(net[0](b)) for b in inputs().split(8)],
                                  axis=0))        # torch's mean of variances: batches of one size
    other = mlp(1)
    update_bn(other, momenta={'5': 0.7})
    assert momenta(other) == [0.1, 0.7]
    with pytest.raises(ValueError, match='called 2, bn'): update_bn(net, momenta={'1': 0.5, '2': 0.1, 'bn': 0.1})
    assert momenta(net) == [None, None]
    update_bn(net, momenta=kept)
    assert momenta(net) == [0.25, 0.5]


def test_reset_leaves_frozen_layers_and_instance_norm_alone():
    "InstanceNorm takes momentum None for 0: its statistics would stay at 0 and 1"
    net = marked(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)))
    net[1].eval()
    was = bn_state(net)
    assert update_bn(net) == {'0': 0.25} and momenta(net) == [None, 0.5, 0.75]
    now = bn_state(net)
    assert all(torch.equal(now[k], was[k]) for k in was if k[0] != '0')
    assert (now['0.running_mean'] == 0).all() and now['0.num_batches_tracked'] == 0


def test_a_reset_that_fails_is_taken_back():
    net = marked(mlp())
    was, before = bn_state(net), momenta(net)
    def fail(): raise RuntimeError('no')
    net[5].reset_running_stats = fail
    with pytest.raises(RuntimeError, match='no'): update_bn(net)
    assert_same(bn_state(net), was)
    assert momenta(net) == before


def test_momentum_none_goes_on_from_the_recomputed():
    "After 3 batches the fourth counts a quarter"
    m, x = nn.BatchNorm1d(3, momentum=None), inputs(32)
    update_bn(m, x[:24].split(8))
    mean = m.running_mean.double().numpy()
    m(x[24:])
    np.testing.assert_allclose(m.running_mean, mean*3/4 + x[24:].double().numpy().mean(0)/4, rtol=1e-5)


# --- wrappers, compiled models, checkpointing, inference mode


@pytest.mark.parametrize('reentrant', [True, False])
def test_gradient_checkpointing_counts_each_input_once(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
        def forward(self, x): return checkpoint(self.net, x, use_reentrant=reentrant)
    m, x = Checkpointed(), inputs()
    m(x.requires_grad_()).sum().backward()
    x = x.detach()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')          # reentrant: that no input requires a gradient
        update_bn(m, x.split(8))
    for layer, expected in zip((m.net[1], m.net[5]), by_numpy(m.net, x.split(8))):
        assert_stats(layer, *expected, rtol=1e-4, atol=1e-5)
        assert layer.num_batches_tracked == 3


@pytest.mark.parametrize('what', ['whole', 'by forward', 'part', 'layer', 'in place'])
def test_compiled_models_are_not_compiled_anew(what):
    compiled = []
    def backend(graph, example):
        compiled.append(graph)
        return graph.forward
    torch.compiler.reset()
    net, x = mlp(), inputs(32)
    run, names, kw = net, ['1', '5'], {}
    if what in ('whole', 'by forward'): run = torch.compile(net, backend=backend)
    if what == 'by forward': kw = dict(forward=lambda m, b: m(b))
    if what == 'part': run, names = nn.Sequential(torch.compile(net, backend=backend)), ['0.1', '0.5']
    if what == 'layer': net[1] = torch.compile(net[1], backend=backend)
    if what == 'in place': net.compile(backend=backend)
    run(x[:8])
    n = len(compiled)
    update_bn(run, x.split(8), **kw)
    layers = bn_layers(run)
    assert list(layers) == names
    plain = mlp()
    for layer, expected in zip(layers.values(), by_numpy(plain, x.split(8))):
        assert_stats(layer, *expected, rtol=1e-4, atol=1e-5)
    run(x[:8])
    assert len(compiled) == n and (n or what == 'in place')
    torch.compiler.reset()


def test_wrapped_models():
    x = inputs()
    expected = by_numpy(mlp(), x.split(8))
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (nn.DataParallel, nn.parallel.DistributedDataParallel):
            net = mlp()
            wrapped = wrap(net)
            update_bn(wrapped, x.split(8))
            for layer, e in zip((net[1], net[5]), expected): assert_stats(layer, *e, rtol=1e-4, atol=1e-5)
            assert list(bn_layers(wrapped)) == ['1', '5'] and update_bn(wrapped) == {'1': 0.1, '5': 0.1}
    finally: torch.distributed.destroy_process_group()


def test_under_inference_mode_the_model_can_be_trained_afterwards():
    net, x = mlp(), inputs()
    with torch.inference_mode(): update_bn(net, x.split(8))
    for layer, e in zip((net[1], net[5]), by_numpy(net, x.split(8))): assert_stats(layer, *e, rtol=1e-4, atol=1e-5)
    net(x).sum().backward()
    update_bn(net, [x])
    assert not any(b.is_inference() for b in net.buffers())


# --- layers of others


class OwnNorm(nn.Module):
    "The least that takes part: no class of torch's, no counter, buffers of another shape, channels last"
    def __init__(self, nf):
        super().__init__()
        self.momentum, self.resets = 0.1, 0
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        self.register_buffer('running_mean', torch.zeros(1, 1, nf))
        self.register_buffer('running_var', torch.ones(1, 1, nf))

    def reset_running_stats(self):
        self.running_mean, self.running_var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
        self.resets += 1

    def stats_input(self, x): return x.movedim(-1, 1)

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, (0, 1), keepdim=True, correction=0)
            n = x.numel()/x.shape[-1]
            w = 0.5 if self.momentum is None else self.momentum
            self.running_mean = self.running_mean.lerp(mean.detach(), w)         # other tensors each time
            self.running_var = self.running_var.lerp(var.detach()*n/(n - 1), w)
        return (x - mean)/(var + 1e-5).sqrt()*self.weight + self.bias


class Text(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.lin, self.norm, self.head = nn.Linear(3, 4), OwnNorm(4), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.norm(self.lin(x)).mean(1))


def test_a_layer_of_ones_own():
    net, x = Text(), inputs(20, shape=(5, 3))
    update_bn(net, x.split((8, 8, 4)))
    assert_stats(net.norm, *stats(net.lin(x), (0, 1)), rtol=1e-4)
    assert net.norm.running_mean.shape == (1, 1, 4) and net.norm.resets == 0
    was = bn_state(net)
    with pytest.raises(ValueError): update_bn(net, [x, x*float('nan')])
    assert_same(bn_state(net), was)
    assert update_bn(net) == {'norm': 0.1} and net.norm.resets == 1 and net.norm.momentum is None


def test_its_statistics_are_averaged():
    net = Text()
    avg = Average(net)
    for v in (1., 3.):
        net.norm.running_mean.fill_(v)
        avg.update()
    assert avg.weights['norm.running_mean'].eq(2).all() and 'norm.running_var' in avg.weights
    with avg.applied():
        assert net.norm.running_mean.eq(2).all()
        update_bn(net, [inputs(8, shape=(5, 3))])
        assert not net.norm.running_mean.eq(2).any()
    assert net.norm.running_mean.eq(3).all() and avg.weights['norm.running_mean'].eq(2).all()


def test_counters_of_layers_of_others_come_back():
    "InstanceNorm is no BatchNorm to torch's class tree"
    net = nn.Sequential(nn.Conv1d(2, 2, 1), nn.InstanceNorm1d(2, track_running_stats=True))
    avg = Average(net)
    avg.update()
    with avg.applied(): update_bn(net, inputs(8, shape=(2, 5)).split(2))
    assert net[1].num_batches_tracked == 0 and net[1].running_mean.eq(0).all()


def test_callbacks_know_it():
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 5, 3, generator=g) + 1, torch.randint(2, (8,), generator=g)) for _ in range(6)]
    learn = TrainLearner(Text(), SimpleNamespace(train=batches, valid=batches[:2]), F.cross_entropy, 0.3,
                         [EMACB(), BNUpdateCB()],
                         partial(optim.SGD, momentum=0.9))
    learn.fit(1)
    x = torch.cat([x for x, _ in batches])
    assert_stats(learn.model.norm, *stats(learn.model.lin(x), (0, 1)), rtol=1e-4)
    own = learn.averages['ema'].weights['norm.running_mean'].clone()
    learn.restore()
    assert torch.equal(learn.averages['ema'].weights['norm.running_mean'], own)
    with pytest.warns(UserWarning, match='add BNUpdateCB'):
        TrainLearner(Text(), learn.dls, F.cross_entropy, 0.3, SWACB(start='0ba')).fit(1)


# --- a GPU


@pytest.mark.gpu
def test_on_a_gpu():
    "Sums are taken in fp32 there; a layer without parameters still says where the batches go"
    for mean, std, rtol in ((1, 2, 1e-5), (1e3, 0.1, 1e-3)):
        m, x = nn.BatchNorm2d(3, affine=False).cuda(), inputs(512, shape=(3, 9, 9), mean=mean, std=std)
        update_bn(m, x.split(100))
        assert_stats(m, *stats(x, (0, 2, 3)), rtol=rtol)


@pytest.mark.parametrize('sizes', [(4, 4, 1), (1, 1, 1, 6), (1, 5)], ids=str)
@pytest.mark.parametrize('ndim', [2, 3, 4])
def test_batches_of_a_single_sample_count_too(sizes, ndim):
    """BatchNorm refuses one value per channel in train mode; normalised by batch, it gives the layer's bias

    Wrong: ValueError, for a last batch of one sample, or its layers' running statistics in it"""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[ndim]
    x = inputs(sum(sizes), shape=(3, *[1]*(ndim - 2)))
    torch.manual_seed(0)
    net = nn.Sequential(kind(3), BatchNorm(3))
    nn.init.normal_(net[0].weight)
    nn.init.normal_(net[0].bias)
    firsts = [o.double().numpy() for o in x.reshape(len(x), 3).split(sizes)]
    w, b = (p.detach().double().numpy() for p in (net[0].weight, net[0].bias))
    seconds = [(h - h.mean(0))/np.sqrt(h.var(0) + net[0].eps)*w + b for h in firsts]
    for module in (net, nn.Sequential(Named(net[0]), net[1])):      # its input by position, or by name
        net[0].reset_running_stats()
        update_bn(module, x.split(sizes))
        assert_stats(net[0], *stats(np.concatenate(firsts)))
        assert_stats(net[1], *stats(np.concatenate(seconds)))
    assert net[0](x[:4]).shape == x[:4].shape


class Named(nn.Module):
    "Calls a layer with its input by name"
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x): return self.layer(input=x)


class SkipSingle(Callback):
    "Leave out batches of one sample"
    role = 'prepares'
    def before_batch(self, learn):
        if len(learn.batch[0]) == 1: raise CancelBatchException


def with_single(*cbs):
    "A learner with a batch of one sample, and its batches"
    train = [(o, o.sum(1, keepdim=True)) for o in inputs(13).split((4, 4, 1, 4))]
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    return TrainLearner(model, SimpleNamespace(train=train, valid=train[:1]), F.mse_loss, 0.01, cbs), train


def test_a_batch_that_a_callback_cancels_is_left_out_of_the_statistics():
    "Wrong: CancelBatchException out of `fit`, at the first row of an average, or the batch counted"
    learn, train = with_single(SkipSingle(), EMACB(), BNUpdateCB())
    learn.fit(2)
    assert learn.opt_steps == 6 and learn.weights == 'ema'
    assert_stats(learn.model[0], *stats(torch.cat([x for x, _ in train if len(x) > 1])))
    assert '|(1, 3)|' in learn.summary()
    train.insert(0, train.pop(2))
    assert '|(1, 3)|' in learn.summary() and len(learn.get_preds(dl=train)[0]) == 12
    assert learn.validate('raw', dl=train) == learn.validate('raw', dl=train[1:])


def test_a_batch_that_is_cancelled_in_predict_leaves_a_look_too():
    class Half(TrainLearner):
        def predict(self):
            if len(self.batch[0]) == 1: raise CancelBatchException
            super().predict()
    learn, train = with_single(EMACB(), BNUpdateCB())
    learn = Half(learn.model, learn.dls, F.mse_loss, 0.01, learn.cbs)
    learn.fit(1)
    assert_stats(learn.model[0], *stats(torch.cat([x for x, _ in train if len(x) > 1])))


def test_an_epoch_that_a_preparing_callback_ends_ends_there_for_the_statistics():
    class Ends(Callback):
        role = 'prepares'
        def before_batch(self, learn):
            if len(learn.batch[0]) == 1: raise CancelEpochException
    learn, train = with_single(Ends(), EMACB(), BNUpdateCB())
    learn.fit(1)
    assert_stats(learn.model[0], *stats(torch.cat([x for x, _ in train[:2]])))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")
def test_training_on_a_single_sample_says_what_to_do():
    with pytest.raises(ValueError, match='more than 1 value per channel') as e: with_single()[0].fit(1)
    assert 'drop_last=True' in e.value.__notes__[-1] and 'CancelBatchException' in e.value.__notes__[-1]


# --- dropout that is no dropout layer


class Calls(nn.Module):
    "A function of the inputs and of whether the layer is in train mode"
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, x): return self.f(x, self.training)


class Sequences(nn.Module):
    "The last outputs of a recurrent net for sequences of three times the input"
    def __init__(self, kind, packed=False):
        super().__init__()
        self.net, self.packed = kind(6, 6, 2, dropout=0.5, batch_first=True), packed
    def forward(self, x):
        seq = x[:, None].expand(-1, 3, -1)
        if not self.packed: return self.net(seq)[0][:, -1]
        packed = nn.utils.rnn.pack_padded_sequence(seq, [3]*len(x), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.net(packed)[0], batch_first=True)[0][:, -1]


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
    def forward(self, x): return self.net(x[None], x[None], x[None])[0][0]


def attention(x, training):
    q = x[None, None]
    return F.scaled_dot_product_attention(q, q, q, None, 0.5 if training else 0.)[0, 0]


RANDOM = dict(
    function=lambda: Calls(lambda x, t: F.dropout(x, 0.4, t)),
    keywords=lambda: Calls(lambda x, t: F.dropout(input=x, training=t, p=0.4)),
    builtin=lambda: Calls(lambda x, t: torch.dropout(x, 0.4, t)),
    alpha=lambda: Calls(lambda x, t: F.alpha_dropout(x, 0.4, t)),
    channels=lambda: Calls(lambda x, t: F.dropout1d(x[..., None], 0.4, t)[..., 0]),
    attention=lambda: Calls(attention), multihead=Attends, feature_alpha=nn.FeatureAlphaDropout,
    rrelu=nn.RReLU, rrelu_in_place=lambda: nn.RReLU(inplace=True), lstm=lambda: Sequences(nn.LSTM),
    gru=lambda: Sequences(nn.GRU), rnn=lambda: Sequences(nn.RNN), packed=lambda: Sequences(nn.LSTM, packed=True))


@pytest.mark.parametrize('make', RANDOM.values(), ids=RANDOM)
def test_dropout_that_is_no_layer_is_off_and_draws_nothing(make):
    "Wrong: statistics of noise that the averaged model does not have when it is used"
    torch.manual_seed(0)
    model, x = nn.Sequential(make(), nn.BatchNorm1d(6)), torch.randn(40, 6)
    model[0].eval()
    with torch.no_grad(): seen = model[0](x.clone()).double()
    model.train()
    rng = torch.get_rng_state()
    update_bn(model, [x.clone()])
    assert torch.equal(torch.get_rng_state(), rng) and all(m.training for m in model.modules())
    torch.testing.assert_close(model[1].running_mean.double(), seen.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model[1].running_var.double(), seen.var(0), atol=1e-5, rtol=1e-4)


def test_what_prepares_the_batches_keeps_its_dropout():
    "Wrong: batches for the statistics are augmented less than those of training"
    model = nn.Sequential(nn.BatchNorm1d(3))
    update_bn(model, (F.dropout(torch.ones(100, 3), 0.5) for _ in range(3)))
    assert (model[0].running_var > 0.5).all()


def test_ctrl_c_does_not_leave_dropout_off():
    "Wrong: the training that follows is without dropout, or an error of torch's takes the place of KeyboardInterrupt"
    model = nn.Sequential(nn.Linear(3, 3), Calls(lambda x, t: F.dropout(x, 0.5, t)), nn.BatchNorm1d(3))
    call = partial(update_bn, model, [torch.ones(5, 3)])
    for at in moments(call, ['/contextlib.py'], every=['/contextlib.py']):
        assert ctrl_c(call, at)
        assert not F.dropout(torch.ones(100)).all(), at


def test_a_mode_that_came_back_after_ctrl_c_is_taken_off():
    "Torch puts it back when the traceback goes. Wrong: each Ctrl-C leaves one on"
    for _ in range(3): WithoutDropout().__enter__().on = False
    update_bn(nn.BatchNorm1d(2), [torch.randn(4, 2)])
    assert torch.overrides._len_torch_function_stack() == 0
