"LSUV over many architectures: unit variance or a reason, nothing else changed, everything back after a failure"
from functools import partial

import pytest, torch
import torch.nn.functional as F
from torch import nn

from fastswa.core import set_seed
from fastswa.init import init_weights, lsuv, lsuv_init
from fastswa.layers import GeneralRelu, ResBlock, act_gr, conv, get_model

def images(n=64): return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))
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

class Deconv(nn.Sequential):
    def __init__(self): super().__init__(conv(1, 4), nn.ConvTranspose2d(4, 1, 2, 2))

def mlp(*norm): return nn.Sequential(nn.Linear(20, 64), *norm, nn.ReLU(inplace=True), nn.Dropout(0.5),
                                     nn.Linear(64, 64, bias=False), nn.GELU(), nn.Linear(64, 10))
def resnet(norm): return nn.Sequential(conv(1, 8, norm=norm), ResBlock(8, 8, norm=norm), ResBlock(8, 16, 2, norm=norm),
                                       ResBlock(16, 16, 3, norm=norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
def zeros():
    m = get_model(act_gr)
    for p in m.parameters(): nn.init.zeros_(p)
    return m.cpu()

NETS = dict(
    relu=(lambda: get_model().cpu(), images()), general=(lambda: get_model(act_gr).cpu(), images()),
    batchnorm=(lambda: get_model(act_gr, norm=nn.BatchNorm2d).cpu(), images()), zeros=(zeros, images()),
    groupnorm=(lambda: get_model(norm=partial(nn.GroupNorm, 2)).cpu(), images()),
    resnet=(lambda: resnet(None), images()), resnet_bn=(lambda: resnet(nn.BatchNorm2d), images()),
    mlp=(mlp, vectors()), mlp_bn=(lambda: mlp(nn.BatchNorm1d(64)), vectors()), mlp_ln=(lambda: mlp(nn.LayerNorm(64)), vectors()),
    conv1d=(lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.SiLU(), nn.Conv1d(8, 8, 3, groups=4)), vectors(64, 60).view(64, 3, 20)),
    conv3d=(lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 2)), vectors(16, 216).view(16, 1, 6, 6, 6)),
    transformer=(lambda: nn.Sequential(nn.Linear(20, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)),
                 vectors(32, 100).view(32, 5, 20)),
    twice=(Twice, vectors()), deconv=(Deconv, images()), tokens=(Tokens, torch.arange(200).view(20, 10) % 50),
)
LEFT = dict(transformer={'1.self_attn.out_proj': 'not reached'}, tokens={'head': 'shares its weight with emb'})

def outputs(model, xb):
    "What each layer gives, by hooks of our own: eval mode, norms by the batch"
    outs, layers = {}, {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    for n, m in layers.items():
        m.register_forward_hook(lambda m, i, o, n=n: outs.setdefault(n, []).append(o.detach().double().clone()))
    model.eval()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.train()
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
    if not orthonormal and name != 'zeros': assert torch.equal(before[2], torch.get_rng_state())
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
    assert all(torch.equal(a, b) for a, b in zip(before, [p for m in (model[0], model[2], model[3]) for p in m.parameters()]))
    assert 'not reached' not in repr(report) and len(repr(report).splitlines()) == 6

def test_zero_weights_become_orthonormal_and_constant_outputs_are_reported():
    set_seed(0)
    m = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    nn.init.zeros_(m[0].weight)
    report = lsuv(m, torch.zeros(8, 20))
    assert report[0].note == '' and m[0].weight.any()               # its bias varies over the channels
    for p in m.parameters(): nn.init.zeros_(p)
    report = lsuv(m, torch.zeros(8, 20))
    assert [r.note for r in report] == ['the output is constant']*2
    assert all(p.isfinite().all() for p in m.parameters())

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

@pytest.mark.parametrize('factor, exc', [(float('nan'), ValueError), (float('inf'), ValueError), (None, KeyboardInterrupt)])
def test_failure_changes_no_bit(factor, exc):
    set_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 20), Explodes(factor), nn.Linear(20, 5))
    nn.init.zeros_(model[2].weight)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(exc, match="^4 gives values that are not finite" if exc is ValueError else None): lsuv(model, vectors())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
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
    lsuv(wholly, vectors())
    assert not wholly.training and wholly[1].num_batches_tracked == 0

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
    with pytest.raises(ValueError, match='0.0 cannot give 0.2 an output'): lsuv_init(model, model[0][2], model[0][0], images())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
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
