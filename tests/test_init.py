"""Gains against closed forms and samples, Fixup against the paper's rules, and LSUV over many architectures: unit
variance or a reason, nothing else changed, everything back after a failure"""
import math
from functools import partial

import pytest, torch
import torch.nn.functional as F
from torch import nn

from fastswa.random_state import set_seed
from fastswa.nets.init import act_stats, fixup, gain, init_weights, zero_init_residual
from fastswa.nets.lsuv import lsuv, lsuv_init
from fastswa.nets.layers import GeneralRelu, ResBlock, act_gr, conv, get_model
from fastswa.nets.norms import BatchNorm, LayerNorm

def images(n=32): return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))
def vectors(n=128, d=20): return torch.randn(n, d, generator=torch.Generator().manual_seed(0))

class Twice(nn.Module):
    "One layer called twice, and a random number in the forward pass"
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(20, 20), nn.Linear(20, 5)
    def forward(self, x): return self.out(torch.tanh(self.a(torch.tanh(self.a(x)))) + torch.randn(5)[0])

class Tokens(nn.Module):
    "An embedding whose weight the head shares"
    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)
        self.head.weight = self.emb.weight
    def forward(self, x): return self.head(self.mid(self.emb(x)))

class PreAct(nn.Module):
    "Norm and activation before each convolution, an attention over channels, joined branches"
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, bias=False)
        self.a, self.b = [nn.Sequential(BatchNorm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False))
                          for _ in range(2)]
        self.squeeze, self.head = nn.Linear(8, 8), nn.Linear(16, 10)
    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(x)
        x = torch.cat([x*torch.sigmoid(self.squeeze(x.mean((2, 3))))[..., None, None], F.relu(self.b(x))], 1)
        return self.head(x.amax((2, 3)))

class Deconv(nn.Sequential):
    def __init__(self): super().__init__(conv(1, 4), nn.ConvTranspose2d(4, 1, 2, 2))

def mlp(*norm): return nn.Sequential(nn.Linear(20, 64), *norm, nn.ReLU(inplace=True), nn.Dropout(0.5),
                                     nn.Linear(64, 64, bias=False), nn.GELU(), nn.Linear(64, 10))
def resnet(norm): return nn.Sequential(conv(1, 8, norm=norm), ResBlock(8, 8, norm=norm), ResBlock(8, 16, 2, norm=norm),
                                       ResBlock(16, 16, 3, norm=norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                       nn.Linear(16, 10))
def zeros():
    m = get_model(act_gr)
    for p in m.parameters(): nn.init.zeros_(p)
    return m.cpu()

def with_fixup(m):
    fixup(m)
    return m

NETS = dict(
    relu=(lambda: get_model().cpu(), images()), general=(lambda: get_model(act_gr).cpu(), images()),
    batchnorm=(lambda: get_model(act_gr, norm=nn.BatchNorm2d).cpu(), images()), zeros=(zeros, images()),
    groupnorm=(lambda: get_model(norm=partial(nn.GroupNorm, 2)).cpu(), images()),
    resnet=(lambda: resnet(None), images()), resnet_bn=(lambda: resnet(nn.BatchNorm2d), images()),
    mlp=(mlp, vectors()), mlp_bn=(lambda: mlp(nn.BatchNorm1d(64)), vectors()),
    mlp_ln=(lambda: mlp(nn.LayerNorm(64)), vectors()),
    conv1d=(lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.SiLU(), nn.Conv1d(8, 8, 3, groups=4)),
            vectors(64, 60).view(64, 3, 20)),
    conv3d=(lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 2)),
            vectors(16, 216).view(16, 1, 6, 6, 6)),
    transformer=(lambda: nn.Sequential(nn.Linear(20, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)),
                 vectors(32, 100).view(32, 5, 20)),
    preact=(PreAct, images()), ours_bn=(lambda: resnet(BatchNorm), images()),
    ours_ln=(lambda: resnet(LayerNorm), images()),
    gains=(lambda: get_model(act_gr).cpu().apply(partial(init_weights, act=act_gr)), images()),
    fixed_up=(lambda: with_fixup(resnet(None)), images()), twice=(Twice, vectors()), deconv=(Deconv, images()),
    tokens=(Tokens, torch.arange(200).view(20, 10) % 50),
)
LEFT = dict(transformer={'1.self_attn.out_proj': 'not reached'}, tokens={'head': 'shares its weight with emb'})

def outputs(model, xb):
    "What each layer gives, by hooks of our own: eval mode, norms by the batch"
    outs, layers = {}, {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    for n, m in layers.items():
        m.register_forward_hook(lambda m, i, o, n=n: outs.setdefault(n, []).append(o.detach().double().clone()))
    model.eval()
    for m in model.modules():
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, BatchNorm)): m.train()
    with torch.no_grad(): model(xb)
    return {n: torch.stack(o) for n, o in outs.items()}

@pytest.mark.parametrize('orthonormal', [False, True])
@pytest.mark.parametrize('name', NETS)
def test_every_layer_has_unit_variance(name, orthonormal):
    set_seed(0)
    make, xb = NETS[name]
    model = make()
    before = [b.clone() for b in model.buffers()], [m.training for m in model.modules()], torch.get_rng_state()
    report = lsuv(model, xb, orthonormal=orthonormal)
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.buffers()))
    assert before[1] == [m.training for m in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    if not orthonormal and name not in ('zeros', 'fixed_up'): assert torch.equal(before[2], torch.get_rng_state())
    left = LEFT.get(name, {})
    assert {r.name: r.note for r in report if r.note not in ('', 'no bias')} == left
    torch.set_rng_state(before[2]) if name == 'twice' and not orthonormal else None
    if name == 'twice' and orthonormal: return                      # its noise is another one by now
    outs = outputs(model, xb)
    for r in report:
        if r.name in left: continue
        o = outs[r.name]
        assert o.std(correction=0).item() == pytest.approx(1, abs=2e-3), r
        assert r.note == 'no bias' or o.mean().item() == pytest.approx(0, abs=2e-3), r
        assert r.steps <= 10 and (r.steps <= 2 or name == 'twice')

def test_orthonormal():
    set_seed(0)
    m = nn.Sequential(nn.Linear(20, 10, bias=False))
    w = m[0].weight
    lsuv(m, vectors(), orthonormal=True)
    gram = w @ w.T
    torch.testing.assert_close(gram/gram[0, 0], torch.eye(10), atol=1e-5, rtol=0)

def test_left_alone():
    set_seed(0)
    model = nn.Sequential(*[nn.Linear(20, 20) for _ in range(5)])
    nn.utils.parametrizations.weight_norm(model[2])
    model[0].requires_grad_(False)
    nn.init.zeros_(model[3].weight)
    model[4].weight = model[1].weight
    before = [p.detach().clone() for m in (model[0], model[2], model[3]) for p in m.parameters()]
    report = lsuv(model, vectors(), exclude='3')
    computed = 'its weight is computed from other parameters'
    assert [r.note for r in report] == ['frozen', '', computed, 'excluded', 'shares its weight with 1']
    after = [p for m in (model[0], model[2], model[3]) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert 'not reached' not in repr(report) and len(repr(report).splitlines()) == 6

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_zero_weights_become_orthonormal(dtype):
    "No scale makes zero a unit variance: dividing by it gave NaN. The QR decomposition knows no half precision"
    set_seed(0)
    m = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20)).to(dtype)
    for p in m.parameters(): nn.init.zeros_(p)
    report = lsuv(m, vectors().to(dtype), tol=0.02)
    assert [r.note for r in report] == ['', ''] and all(p.isfinite().all() for p in m.parameters())
    w = m[0].weight.float()
    torch.testing.assert_close(w @ w.T*w.shape[0]/w.square().sum(), torch.eye(20), atol=0.03, rtol=0)
    nn.init.zeros_(m[0].weight)
    lsuv_init(m, m[0], m[0], vectors().to(dtype), tol=0.02)
    assert m[0].weight.any()

def test_constant_batches_and_outputs():
    set_seed(0)
    m = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20, bias=False), nn.Linear(20, 20))
    before = [p.detach().clone() for p in m.parameters()]
    for xb in torch.zeros(8, 20), torch.full((1, 20), 0.3):
        with pytest.raises(ValueError, match='the batch is constant: every value in it is 0'): lsuv(m, xb)
        with pytest.raises(ValueError, match='the batch is constant'): lsuv_init(m, m[0], m[0], xb)
    assert all(torch.equal(a, b) for a, b in zip(before, m.parameters()))
    report = lsuv(m, vectors()[:1].expand(8, 20))                       # one sample again and again
    assert {r.note for r in report} == {'the same for every sample'} and all(abs(r.std - 1) < 1e-3 for r in report)
    with torch.no_grad(): m[0].bias -= 100                              # dead: nothing gets through the ReLU
    report = lsuv(m, vectors(), exclude='0')
    assert [r.note for r in report] == ['excluded', 'the output is constant', 'the same for every sample']
    for shape in (0, 20), (8, 0), (0, 1, 28, 28):
        with pytest.raises(ValueError, match='the batch holds no samples'): lsuv(m, torch.zeros(shape))

def test_frozen_bias_and_lazy_layers():
    set_seed(0)
    m = nn.Sequential(nn.Linear(20, 20))
    m[0].bias.requires_grad_(False).fill_(0.3)
    row = lsuv(m, vectors())[0]
    assert m[0].bias.eq(0.3).all() and row.note == 'no bias' and abs(row.std - 1) < 1e-3
    with pytest.raises(ValueError, match='uninitialized parameter'): lsuv(nn.Sequential(nn.LazyLinear(3)), vectors())

def test_not_reaching_the_goal_is_bounded_and_said():
    class Hits(nn.Linear):
        "Its output has standard deviation 2 whatever the weights are"
        calls = 0
        def forward(self, x):
            Hits.calls += 1
            return F.layer_norm(super().forward(x), (20,))*2
    set_seed(0)
    report = lsuv(nn.Sequential(Hits(20, 20)), vectors(), max_iter=4)
    assert report[0].note == 'not within 0.001' and report[0].steps == 4 and Hits.calls == 6

class Explodes(nn.Module):
    def __init__(self, factor): super().__init__(); self.factor = factor
    def forward(self, x):
        torch.rand(1)
        if self.factor is None: raise KeyboardInterrupt
        return x*self.factor

@pytest.mark.parametrize('factor, exc',
                         [(float('nan'), ValueError), (float('inf'), ValueError), (None, KeyboardInterrupt)])
def test_failure_changes_no_bit(factor, exc):
    set_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 20), Explodes(factor), nn.Linear(20, 5))
    nn.init.zeros_(model[2].weight)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(exc, match="^4 gives values that are not finite" if exc is ValueError else None):
        lsuv(model, vectors())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training and not any(m._forward_hooks for m in model.modules())

def test_frozen_batchnorm_stays_frozen():
    "In eval mode inside a model in train mode it normalises by its statistics, as it will in training"
    set_seed(0)
    def net(): return nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 20))
    frozen = net()
    frozen[1].running_var.fill_(100.)
    frozen[1].eval()
    lsuv(frozen, vectors())
    h = frozen[1](frozen[0](vectors()))
    assert h.std() < 0.2 and frozen[2](h).std(correction=0).item() == pytest.approx(1, abs=2e-3)
    wholly = net().eval()                                           # all of it in eval mode: not frozen
    wholly[1].running_var.fill_(100.)
    lsuv(wholly, vectors())
    assert not wholly.training and wholly[1].num_batches_tracked == 0
    assert wholly.train()(vectors()).std(correction=0).item() == pytest.approx(1, abs=2e-3)

def test_batches_of_all_kinds():
    set_seed(0)
    xb = vectors()
    want = lsuv(m := nn.Linear(20, 5), xb)
    assert [r.name for r in want] == [''] and m(xb).std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert lsuv(nn.Linear(20, 5), (xb, torch.zeros(128)))[0].std == pytest.approx(1, abs=1e-3)
    class Named(nn.Linear):
        def forward(self, inputs): return super().forward(inputs)
    assert lsuv(Named(20, 5), dict(inputs=xb))[0].std == pytest.approx(1, abs=1e-3)
    assert lsuv(torch.compile(nn.Sequential(nn.Linear(20, 5)), backend='eager'), xb)[0].name == '0'
    half = nn.Linear(20, 5).bfloat16()
    row = lsuv(half, xb.bfloat16())[0]
    assert abs(row.std - 1) < 0.02 and (row.note == '' or 'not within' in row.note)

@pytest.mark.gpu
def test_batch_on_another_device():
    model = get_model(act_gr).cuda()
    assert all(abs(r.std - 1) < 1e-3 for r in lsuv(model, images().cpu()))

def test_course_form_bounds_the_search():
    "conv, then BatchNorm, then the activation: no weights change its scale, and dividing on and on made them infinite"
    set_seed(0)
    model = get_model(act_gr, norm=nn.BatchNorm2d).cpu()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match='0.0 cannot give 0.2 an output'):
        lsuv_init(model, model[0][2], model[0][0], images())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match='m_in must have a weight of its own; got GeneralRelu'):
        lsuv_init(model, model[0][0], model[0][2], images())
    unused = nn.ModuleDict(dict(used=nn.Linear(20, 20), unused=nn.Linear(20, 20)))
    unused.forward = lambda x: unused['used'](x)
    with pytest.raises(ValueError, match='unused gives no output for this batch'):
        lsuv_init(unused, unused['unused'], unused['used'], vectors())
    with pytest.raises(ValueError, match='unused cannot give used an output'):
        lsuv_init(unused, unused['used'], unused['unused'], vectors())
    no_bias = nn.Sequential(nn.Linear(20, 20, bias=False), GeneralRelu(0.1))
    row = lsuv_init(no_bias, no_bias[1], no_bias[0], vectors())
    assert row.note == 'no bias' and abs(row.std - 1) < 1e-3

@pytest.mark.parametrize('layer', [nn.Conv1d(4, 64, 5), nn.Conv2d(4, 64, 5), nn.Conv3d(4, 64, 3), nn.Linear(100, 400)])
@pytest.mark.parametrize('leaky', [0., 0.1])
def test_kaiming(layer, leaky):
    set_seed(0)
    layer.apply(partial(init_weights, leaky=leaky))
    want = (2/(1 + leaky**2)/layer.weight[0].numel())**0.5
    assert layer.weight.std().item() == pytest.approx(want, rel=0.06)

# --- gains

def Phi(x): return (1 + math.erf(x/2**0.5))/2
def phi(x): return math.exp(-x*x/2)/(2*math.pi)**0.5

def piece(a, c, lo, hi):
    "Mean and mean square of a·z + c over lo < z < hi, for a standard normal z"
    p = Phi(hi) - Phi(lo)
    m1 = phi(lo) - phi(hi)
    m2 = p + (lo*phi(lo) if abs(lo) < 50 else 0) - (hi*phi(hi) if abs(hi) < 50 else 0)
    return a*m1 + c*p, a*a*m2 + 2*a*c*m1 + c*c*p

@pytest.mark.parametrize('leak, sub, maxv',
                         [(0, 0, 9), (0.1, 0.4, 9), (0.1, 0.4, 1), (0.3, -0.5, 2), (0.1, 0.4, 0.), (-0.2, 0, 0.5),
                          (0, 1.2, 0.3)])
def test_general_relu_in_closed_form(leak, sub, maxv):
    "Three pieces: the leak, the slope 1, and what `maxv` cuts off (of the result, after `sub`)"
    cut = maxv + sub
    parts = [piece(leak, -sub, -99, 0), piece(1, -sub, 0, cut), piece(0, maxv, cut, 99)]
    if leak < 0: parts[0] = [a + b for a, b in zip(piece(leak, -sub, cut/leak, 0), piece(0, maxv, -99, cut/leak))]
    mean, square = map(sum, zip(*parts))
    s = act_stats(GeneralRelu(leak, sub, maxv))
    assert (s.mean, s.square, s.std) == pytest.approx((mean, square, (square - mean**2)**0.5), abs=1e-7)
    assert gain(GeneralRelu(leak, sub, maxv)) == pytest.approx(square**-0.5, rel=1e-6)

ACTS = dict(gr=act_gr, cut=GeneralRelu(0.1, 0.4, 1.), relu=nn.ReLU(inplace=True), gelu=nn.GELU, silu=F.silu,
            tanh=nn.Tanh(), sigmoid=torch.sigmoid, elu=nn.ELU,
            prelu=nn.PReLU(), hard=nn.Hardswish, step=lambda x: (x > 0.3).to(x.dtype),
            leaky=partial(F.leaky_relu, negative_slope=0.2))

@pytest.mark.parametrize('name', ACTS)
def test_stats_by_sampling(name):
    act, n = ACTS[name], 1_000_000
    s = act_stats(act)
    f = act() if isinstance(act, type) or act is act_gr else act
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float32, requires_grad=True)
    y = f(x*1).double()
    slope = torch.autograd.grad(y.sum(), x)[0].double() if y.requires_grad else torch.zeros(n)
    y = y.detach()
    for got, sample in ((s.mean, y), (s.square, y**2), (s.slope, slope**2), (s.std**2, (y - y.mean())**2)):
        assert abs(got - sample.mean().item()) <= 5*sample.std().item()/n**0.5 + 1e-6
    assert s.std**2 <= s.slope + 1e-6 or name == 'step'                      # Poincaré's inequality for a Gaussian

def test_published_gains():
    "1/std, sampled, for weights without a mean: NFNet's table (arXiv 2102.06171)"
    for act, want in ((nn.GELU, 1.7015), (nn.ReLU, 1.7140), (nn.ReLU6, 1.7131), (nn.SiLU, 1.7881),
                      (nn.Softplus, 1.9203), (nn.ELU, 1.2716), (nn.Tanh, 1.5939)):
        assert 1/act_stats(act).std == pytest.approx(want, rel=5e-3)

def test_an_activation_is_not_touched():
    m = nn.PReLU()
    act_stats(m)
    assert m.training and m.weight.dtype is torch.float32 and m.weight.grad is None
    assert act_stats(nn.RReLU(0.1, 0.3)) == act_stats(nn.LeakyReLU(0.2))
    assert act_stats(nn.Dropout(0.5)).std == pytest.approx(1)
    with torch.no_grad(): assert gain(nn.ReLU()) == pytest.approx(2**0.5)
    for wrong in nn.GLU(), nn.Softmax(0), torch.sum, lambda x: x.cumsum(0):
        with pytest.raises(ValueError, match='does not work element by element'): act_stats(wrong)
    for wrong in torch.log, lambda x: torch.exp(x**2):
        with pytest.raises(ValueError, match='no finite moments'): act_stats(wrong)

@pytest.mark.parametrize('layer',
                         [nn.Conv1d(4, 64, 5), nn.Conv2d(4, 64, 5), nn.Conv3d(4, 64, 3, groups=2), nn.Linear(100, 400)])
@pytest.mark.parametrize('act', [act_gr, GeneralRelu(0.1, 1.), nn.GELU(), torch.tanh])
def test_weights_by_the_gain(layer, act):
    set_seed(0)
    bias = layer.bias.detach().clone()
    layer.apply(partial(init_weights, act=act))
    want = act_stats(act).square**-0.5/layer.weight[0].numel()**0.5
    assert layer.weight.std().item() == pytest.approx(want, rel=0.06) and torch.equal(layer.bias, bias)

@pytest.mark.parametrize('sub', [0., 0.4, 0.8])
def test_variance_stays_one_with_sub(sub):
    "The leak alone would make it 0.75 in one layer for sub=0.4; the activation's variance 1.8 for sub=0.8"
    set_seed(0)
    act, ratios = GeneralRelu(0.1, sub), []
    for _ in range(20):
        lin = nn.Linear(500, 500, bias=False)
        init_weights(lin, act=act)
        with torch.no_grad(): ratios.append(lin(act(torch.randn(100, 500))).var().item())
    assert sum(ratios)/20 == pytest.approx(1, abs=0.03)

# --- residual networks without norms

def residual(n, norm=None, act=nn.ReLU):
    return nn.Sequential(conv(1, 8, norm=norm), *[ResBlock(8, 8, act=act, norm=norm) for _ in range(n)],
                         ResBlock(8, 16, 2, act=act, norm=norm),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

class Mlp(nn.Module):
    "Residual branches of three layers, under no name that we know"
    def __init__(self, n=5, width=300):
        super().__init__()
        self.head = nn.Linear(width, 4)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(3)) for _ in range(n))
        self.stem = nn.Linear(20, width)
    def forward(self, x):
        x = self.stem(x)
        for a, b, c in self.blocks: x = F.relu(x + c(F.relu(b(F.relu(a(x))))))
        return self.head(x)

def test_fixup_is_the_papers():
    "L^(-1/(2m-2)) on all layers of a branch but the last, which is zero, as the classifier is; Kaiming's elsewhere"
    set_seed(0)
    m = Mlp(5)
    zero = fixup(m, m.blocks, head=m.head)
    assert zero == [*(f'blocks.{i}.2' for i in range(5)), 'head'] and not m(vectors()).any()
    for a, b, c in m.blocks:
        for lin in a, b: assert lin.weight.std().item() == pytest.approx((2/300)**0.5*5**-0.25, rel=0.02)
        assert not c.weight.any()
    assert m.stem.weight.std().item() == pytest.approx((2/20)**0.5, rel=0.03)
    assert not any(p.any() for n, p in m.named_parameters() if n.endswith('bias'))
    m = residual(8)
    fixup(torch.compile(m, backend='eager'), act=nn.ReLU())
    for b in m[1:10]:
        conv1 = b.convs[0][0].weight
        assert conv1.std().item() == pytest.approx((2/72)**0.5*9**-0.5, rel=0.1) and not b.convs[1][0].weight.any()
    assert m[9].idconv[0].weight.std().item() == pytest.approx((2/8)**0.5, rel=0.15)
    one = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
    fixup(one, [one[:1]])                                               # a branch of one layer: nothing to scale
    assert not one[0].weight.any()
    fixup(m := Mlp(2), m.blocks, head=m.head, act=act_gr)
    assert m.stem.weight.std().item() == pytest.approx(gain(act_gr)/20**0.5, rel=0.03)

def test_fixup_bounds_the_update():
    "The change of the output in one step on the branches does not grow with depth; without the scale it grows like L"
    def change(n, scaled, seed):
        set_seed(seed)
        m, x = Mlp(n, 100), vectors(32)
        fixup(m, m.blocks, head=m.head)
        torch.manual_seed(99)
        nn.init.normal_(m.stem.weight, std=0.2), nn.init.normal_(m.head.weight, std=0.05)
        if not scaled:
            for a, b, _ in m.blocks: init_weights(a), init_weights(b)
        y = m(x)
        y.square().mean().backward()
        torch.optim.SGD([p for p in m.blocks.parameters() if p.ndim > 1], 1e-4).step()
        return (m(x) - y).std().item()
    def growth(scaled): return sum(change(24, scaled, s) for s in range(3))/sum(change(3, scaled, s) for s in range(3))
    assert growth(True) == pytest.approx(1, abs=0.3)
    assert growth(False) > 5

@pytest.mark.parametrize('norm',
                         [None, nn.BatchNorm2d, BatchNorm, LayerNorm, partial(nn.GroupNorm, 2),
                          partial(nn.InstanceNorm2d, affine=True)])
def test_blocks_begin_as_their_shortcut(norm):
    set_seed(0)
    m, other = residual(6, norm), residual(1, norm)
    for o in m, other:
        for p in o.parameters(): nn.init.normal_(p)
    names = zero_init_residual(m)
    assert names == [f'{i}.convs.1.{0 if norm is None else 1}' for i in range(1, 8)]
    zero_init_residual(other)
    other[0].load_state_dict(m[0].state_dict())
    h = m[0](images())
    assert torch.equal(m[1:7](h), h) and torch.equal(other[1](h), h)    # whatever the depth
    m(images()).square().sum().backward()
    zeros = [m.get_submodule(n).weight.grad for n in names]
    assert all(g.isfinite().all() and g.any() for g in zeros)           # and they learn

def test_what_residual_inits_refuse():
    for f in fixup, zero_init_residual:
        with pytest.raises(ValueError, match='Sequential has no ResBlock: give its branches'):
            f(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match='branch 1 has no layer'): f(m := Mlp(), [m.blocks[0], [nn.ReLU()]])
    with pytest.raises(ValueError, match='use zero_init_residual'): fixup(residual(2, LayerNorm))
    with pytest.raises(ValueError, match='give head, the classification layer'):
        fixup(nn.Sequential(conv(1, 8), ResBlock(8, 16)))
    with pytest.raises(ValueError, match='give head'): fixup(m := Mlp(), m.blocks, head=m.blocks[4][2])
    for norm in partial(BatchNorm, affine=False), nn.InstanceNorm2d:
        m = residual(2, norm)
        before = [p.detach().clone() for p in m.parameters()]
        with pytest.raises(ValueError, match='1.convs.1.1 has no weight of its own that could be zero'):
            zero_init_residual(m)
        assert all(torch.equal(a, b) for a, b in zip(before, m.parameters()))
