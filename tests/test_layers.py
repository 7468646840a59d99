"Norms equal torch's to the last digit of float64; `update_bn` and averages know them; and what they do for `conv`"
import copy
import io
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fastswa.averaging.average import Average
from fastswa.averaging.batchnorm import bn_layers, update_bn
from fastswa.random_state import set_seed
from fastswa.nets.layers import GeneralRelu, ResBlock, act_gr, conv, get_model
from fastswa.nets.norms import BatchNorm, LayerNorm

SHAPES = (6, 4), (5, 4, 3), (3, 4, 5, 2), (3, 4, 2, 3, 2)
THEIRS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def data(*shape, seed=0, dtype=torch.float64, mean=3., std=2.):
    return torch.tensor(np.random.default_rng(seed).normal(mean, std, shape), dtype=dtype)


def redrawn(m, seed=0):
    "Parameters and running statistics that are not 0 and 1"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in [*m.parameters(), *m.buffers()]:
            if t.is_floating_point(): t.copy_(torch.rand(t.shape, generator=g, dtype=torch.float64) + 0.5)
    return m


def assert_same_step(ours, theirs, x, **tol):
    "Outputs, gradients of input and parameters, and buffers"
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ya, yb = ours(a), theirs(b)
    assert ya.dtype is yb.dtype and ya.stride() == yb.stride()
    assert_close(ya, yb, **tol)
    up = data(*yb.shape, seed=9, dtype=yb.dtype)
    for m in ours, theirs: m.zero_grad()
    ya.backward(up), yb.backward(up)
    assert_close(a.grad, b.grad, **tol)
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad, msg=lambda s: f'{n}: {s}', **tol)
    for (n, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert_close(p, q, msg=lambda s: f'{n}: {s}', **tol)


# --- BatchNorm


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('momentum', [0.1, None, 0., 1.])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_batchnorm_is_torchs(shape, momentum, affine):
    kw, tol = dict(momentum=momentum, affine=affine, eps=1e-3), dict(rtol=1e-10, atol=1e-12)
    theirs = redrawn(THEIRS[len(shape)](shape[1], **kw)).double()
    ours = BatchNorm(shape[1], **kw).double()
    ours.load_state_dict(theirs.state_dict())
    for step in range(3): assert_same_step(ours, theirs, data(*shape, seed=step), **tol)
    assert ours.num_batches_tracked == 3
    for m in ours, theirs: m.eval()
    assert_same_step(ours, theirs, data(*shape, seed=7), **tol)
    theirs.load_state_dict(ours.state_dict())
    for m in ours, theirs: m.train().reset_running_stats()
    assert_same_step(ours, theirs, data(*shape, seed=8), **tol)


def test_biased_to_normalise_unbiased_to_run():
    "On 2 values the two variances are a factor 2 apart"
    m, x = BatchNorm(1, mom=1., eps=1e-12).double(), torch.tensor([[1.], [3.]], dtype=torch.double)
    assert_close(m(x).detach(), x.new_tensor([[-1.], [1.]]))
    assert (m.running_mean.item(), m.running_var.item()) == (2, 2)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_batchnorm_gradcheck(shape):
    x = data(*shape).requires_grad_()
    for m in (redrawn(BatchNorm(4).double()), redrawn(BatchNorm(4).double()).eval()):
        torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(m, dict(weight=w, bias=b), x),
                                 (x, m.weight, m.bias))
    torch.autograd.gradgradcheck(BatchNorm(4).double(), data(4, 4).requires_grad_())


def test_one_value_per_channel():
    "An error as torch's, and nothing counted; NaN otherwise. In eval mode there is no need for more"
    for ours, theirs, x in ((BatchNorm(4), nn.BatchNorm1d(4), torch.ones(1, 4)),
                            (BatchNorm(4), nn.BatchNorm2d(4), torch.ones(1, 4, 1, 1))):
        message = 'Expected more than 1 value per channel when training, got input size'
        for m in ours, theirs:
            with pytest.raises(ValueError, match=message): m(x)
        assert ours.num_batches_tracked == 0 and ours.running_var.eq(1).all()
        assert_close(ours.eval()(x), theirs.eval()(x))
    assert BatchNorm(4)(torch.ones(1, 4, 1, 2)).isfinite().all()
    with pytest.raises(ValueError, match='more than 1 value'): BatchNorm(4)(torch.ones(0, 4))
    assert BatchNorm(4).eval()(torch.ones(0, 4)).shape == (0, 4)


@pytest.mark.parametrize('make', [BatchNorm, LayerNorm])
def test_constant_batch(make):
    m, x = make(4), torch.full((5, 4, 3), 1e4, requires_grad=True)
    y = m(x)
    y.square().sum().backward()
    assert y.abs().max() < 1e-2 and all(t.isfinite().all() for t in (x.grad, *m.state_dict().values()))


def test_mean_far_from_zero():
    "E[x²] - E[x]² in fp32 would lose the variance altogether"
    x = data(512, 4, mean=1e4, std=0.1)
    ours = BatchNorm(4, mom=1., eps=0.)
    ours(x.float())
    assert_close(ours.running_var.double(), x.float().double().var(0), rtol=1e-3, atol=0)
    assert_close(LayerNorm(512)(x.T.float()[None, ..., None].transpose(1, 2)).std(correction=0).item(), 1., rtol=1e-3,
                 atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    "Squares of these overflow fp16; the sums of bf16 stand still at 256"
    x = data(600, 4, 3, dtype=dtype, mean=100, std=300)
    up = partial(assert_close, rtol=2**-7, atol=2**-7)
    for ours, theirs in ((BatchNorm(4), nn.BatchNorm1d(4)), (LayerNorm(4), nn.GroupNorm(1, 4)),
                         (LayerNorm((4, 3)), nn.LayerNorm((4, 3)))):
        up(ours(x), theirs(x))
        for a, b in zip(ours.buffers(), theirs.buffers()): assert_close(a, b, rtol=1e-4, atol=1e-4)
    halves = BatchNorm(4).to(dtype), nn.BatchNorm1d(4).to(dtype)
    up(*(m(x) for m in halves))
    assert halves[0].running_var.dtype is dtype
    up(*(m.running_var for m in halves))
    up(*(m.eval()(x) for m in halves))


def test_copies_files_and_wrong_inputs():
    m = redrawn(BatchNorm(4))
    buf = io.BytesIO()
    torch.save(m, buf)
    buf.seek(0)
    for o in copy.deepcopy(m), torch.load(buf, weights_only=False):
        for k, v in m.state_dict().items(): assert torch.equal(v, o.state_dict()[k])
    for wrong in torch.ones(4), torch.ones(3, 5), torch.ones(3, 1, 4):
        with pytest.raises(ValueError, match=r'the input must be \(N, 4\)'): m(wrong)
    with pytest.raises(ValueError, match='nf must be a whole number'): BatchNorm((4,))
    assert BatchNorm(4, 0.2, 1e-3).momentum == 0.2 and BatchNorm(4, 0.2, 1e-3).eps == 1e-3
    x = torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last)
    for o in m, LayerNorm(4): assert o(x).is_contiguous(memory_format=torch.channels_last)


# --- LayerNorm


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_layernorm_of_an_int(shape):
    "Over all but the first axis, affine per channel: torch's GroupNorm of one group"
    ours, theirs = redrawn(LayerNorm(4, eps=1e-3).double()), nn.GroupNorm(1, 4, eps=1e-3).double()
    theirs.load_state_dict(ours.state_dict())
    assert_same_step(ours, theirs, data(*shape), rtol=1e-10, atol=1e-12)
    assert_same_step(LayerNorm(4, elementwise_affine=False), nn.GroupNorm(1, 4, affine=False), data(*shape),
                     rtol=1e-10, atol=1e-12)
    plain = nn.LayerNorm(shape[1:], elementwise_affine=False)
    assert_close(LayerNorm(4).double()(data(*shape)), plain(data(*shape)), rtol=1e-10, atol=1e-12)
    torch.autograd.gradcheck(ours, data(*shape).requires_grad_())


@pytest.mark.parametrize('kw', [{}, dict(bias=False), dict(elementwise_affine=False), dict(eps=0.1)], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_layernorm_of_a_tuple(shape, kw):
    for n in range(1, len(shape)):
        ours, theirs = redrawn(LayerNorm(shape[-n:], **kw).double()), nn.LayerNorm(shape[-n:], **kw).double()
        theirs.load_state_dict(ours.state_dict())
        assert_same_step(ours, theirs, data(*shape), rtol=1e-10, atol=1e-12)
        torch.autograd.gradcheck(ours, data(2, *shape[1:]).requires_grad_())
    assert LayerNorm(list(shape)).normalized_shape == shape == LayerNorm(torch.Size(shape)).normalized_shape


def test_layernorm_wrong_inputs():
    for m, x in ((LayerNorm(4), torch.ones(3, 5, 4)), (LayerNorm(4), torch.ones(4)),
                 (LayerNorm((3, 4)), torch.ones(2, 4, 3)), (LayerNorm((3, 4)), torch.ones(4))):
        with pytest.raises(ValueError, match=r'the input must be \('): m(x)
    for wrong in 0, -1, (), (3, 0), (2.5,):
        with pytest.raises(ValueError, match='must be a whole number, 1 or more'): LayerNorm(wrong)


# --- what others make of them


def nets():
    return [nn.Sequential(conv(1, 4, norm=n), conv(4, 3, norm=n), nn.Flatten(), nn.Linear(12, 5), LayerNorm(5))
            for n in (BatchNorm, nn.BatchNorm2d)]


def test_update_bn_and_averages_know_it():
    ours, theirs = nets()
    theirs.load_state_dict(ours.state_dict())
    batches = data(22, 1, 8, 8, dtype=torch.float32).split((8, 8, 6))
    assert list(bn_layers(ours)) == list(bn_layers(theirs)) == ['0.1', '1.1']       # a LayerNorm keeps no statistics
    for m in ours, theirs: update_bn(m, batches)
    for (k, v), w in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert_close(v, w, rtol=1e-5, atol=1e-6, msg=k)
    assert ours[0][1].num_batches_tracked == 3 and ours[0][1].momentum == 0.1
    assert_close(ours[0][1].running_var, torch.cat([ours[0][0](b) for b in batches]).var((0, 2, 3)), rtol=1e-5,
                 atol=1e-6)
    avg = Average(ours)
    for _ in range(2):
        avg.update()
        ours(batches[0])
    assert avg.n == 2 and '0.1.running_mean' in avg.weights
    assert not torch.equal(avg.weights['0.1.running_mean'], ours[0][1].running_mean)
    for m in ours, theirs:                                                          # by hand: reset, follow, put back
        momenta = update_bn(m)
        assert momenta == {'0.1': 0.1, '1.1': 0.1} and m[0][1].running_mean.eq(0).all()
        for b in batches: m(b)
        update_bn(m, momenta=momenta)
    for k in '0.1.running_mean', '1.1.running_var':
        assert_close(ours.state_dict()[k], theirs.state_dict()[k], rtol=1e-5, atol=1e-6)


def test_training_with_ours_is_training_with_torchs():
    ours, theirs = nets()
    theirs.load_state_dict(ours.state_dict())
    x, y = data(32, 1, 8, 8, dtype=torch.float32), torch.arange(32) % 5
    for m in ours, theirs:
        opt = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            opt.zero_grad()
            F.cross_entropy(m(x), y).backward()
            opt.step()
    for (k, v), w in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert_close(v, w, rtol=1e-3, atol=1e-4, msg=k)


class RMS(nn.Module):
    "A norm with a weight and no shift"
    def __init__(self, nf):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(nf))
    def forward(self, x): return F.normalize(x, dim=1)*self.weight[:, None, None]


@pytest.mark.parametrize('norm, bias', [
    (None, True), (BatchNorm, False), (partial(BatchNorm, affine=False), True), (LayerNorm, False),
    (partial(LayerNorm, bias=False), True),
    (partial(LayerNorm, elementwise_affine=False), True), (nn.BatchNorm2d, False),
    (partial(nn.BatchNorm2d, affine=False), True),
    (partial(nn.GroupNorm, 2), False), (partial(nn.GroupNorm, 2, affine=False), True), (nn.InstanceNorm2d, True),
    (partial(nn.InstanceNorm2d, affine=True), False), (RMS, True),
    (lambda nf: nn.Sequential(RMS(nf), nn.BatchNorm2d(nf)), False)])
def test_bias_by_what_the_norm_is(norm, bias):
    "A class, a partial of one or a function makes it; looking at these and not at the norm, a bias was always there"
    assert (conv(1, 4, norm=norm)[0].bias is not None) == bias
    block = ResBlock(2, 4, 2, norm=norm, bias=None)
    assert all((m.bias is not None) == bias for m in block.modules() if isinstance(m, nn.Conv2d))
    assert (conv(1, 4, norm=norm, bias=not bias)[0].bias is None) == bias
    for o in conv(1, 4, norm=norm), ResBlock(1, 4, 3, norm=norm): assert o(torch.rand(2, 1, 9, 9)).isfinite().all()


@pytest.mark.parametrize('norm', [None, BatchNorm, LayerNorm, nn.InstanceNorm2d, partial(nn.GroupNorm, 4)])
@pytest.mark.parametrize('act', [nn.ReLU, act_gr, GeneralRelu, None])
def test_seed_model_learns(act, norm):
    set_seed(0)
    model = get_model(act, [1, 8, 16], norm).cpu()
    x = torch.rand(40, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > x.mean()).long()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8*losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
