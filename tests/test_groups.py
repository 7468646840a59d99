"Parameter groups by name, and optimizer state that is saved and loaded by name"

import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn, optim

from fastswa.training.optim import LoadReport, load_opt_state, opt_state, param_groups
from fastswa.training.learner import TrainLearner
from types import SimpleNamespace
from helpers import reopened

class Net(nn.Module):
    def __init__(self, bypass=False, n_in=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_in, 4), nn.LayerNorm(4), nn.Tanh())
        self.tail = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        if bypass: self.bypass = nn.Linear(n_in, 2, bias=False)
    def forward(self, x): return self.head(self.tail(self.body(x))) + (self.bypass(x) if hasattr(self, 'bypass') else 0)

def net(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs)

def names(groups): return [g['param_names'] for g in groups]

# groups

PATTERNS = ['*', '*.bias', 'head.*', 'body.*', 'body.1.weight', '*weight', 'tail.?ias', '[bt]*']
OPTIONS = [dict(weight_decay=0), dict(lr_mult=10), dict(lr_mult=0.5, weight_decay=0.1), dict(betas=(0.8, 0.9)), {}]

@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from(OPTIONS)), st.booleans(), st.sampled_from([None, 0.5, 1.]), st.booleans())
def test_each_parameter_once(options, no_decay, layer_decay, lr):
    "Every parameter is in one group, whose options are those of its patterns, the later ones last; torch takes the groups"
    from fnmatch import fnmatchcase
    model = net()
    params = dict(model.named_parameters())
    groups = param_groups(model, options, no_decay=no_decay, layer_decay=layer_decay, lr=0.1 if lr else None)
    assert sorted(n for ns in names(groups) for n in ns) == sorted(params)
    for g in groups:
        assert [params[n] for n in g['param_names']] == g['params'] and g['name']     # compared by identity first
        for n, p in zip(g['param_names'], g['params']):
            assert p is params[n]
            want = {} if layer_decay is None else dict(lr_mult=layer_decay**dict(body=2, tail=1, head=0)[n.split('.')[0]])
            if no_decay and p.ndim < 2: want['weight_decay'] = 0
            for pat, o in options.items():
                if fnmatchcase(n, pat): want.update(o)
            if lr: want['lr'] = 0.1*want.get('lr_mult', 1)
            assert {k: v for k, v in g.items() if k not in ('name', 'params', 'param_names')} == want
    keys = [repr(sorted((k, v) for k, v in g.items() if k not in ('name', 'params', 'param_names'))) for g in groups]
    assert len(set(keys)) == len(keys)
    opt = optim.AdamW(groups, 0.1)
    assert sum(len(g['params']) for g in opt.param_groups) == len(params)

def test_norms_and_biases():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU(), nn.MultiheadAttention(2, 1), nn.Embedding(3, 2))
    decayed, free = names(param_groups(model, no_decay=True))
    assert decayed == ['0.weight', '3.in_proj_weight', '3.out_proj.weight', '4.weight']
    assert free == ['0.bias', '1.weight', '1.bias', '2.weight', '3.in_proj_bias', '3.out_proj.bias']
    assert param_groups(model, {'4.*': dict(weight_decay=0)}, no_decay=True)[1]['param_names'][-1] == '4.weight'

def test_tied_wrapped_frozen():
    model = net()
    model.tied = nn.Linear(4, 2)
    model.tied.weight = model.head.weight
    model.tail.requires_grad_(False)
    want = [n for n, _ in model.named_parameters()]
    model.head = torch.compile(model.head)                      # a compiled part does not change the names
    for m in model, torch.compile(model), nn.DataParallel(model):
        g, = param_groups(m)
        assert g['param_names'] == want and 'tied.weight' not in want and 'tail.weight' in want and 'head.weight' in want
        assert len({id(p) for p in g['params']}) == len(want)

def test_group_errors():
    with pytest.raises(ValueError, match=r"pattern 'boby.\*' matches no parameter; close are body"): param_groups(net(), {'boby.*': {}})
    with pytest.raises(ValueError, match="'xyz' matches no parameter; there are body.0.weight"): param_groups(net(), {'xyz': {}})
    with pytest.raises(TypeError, match='must be a dict'): param_groups(net(), {'*': 0.1})
    for bad in 0, 1.1, -1, float('nan'):
        with pytest.raises(ValueError, match=f'above 0 and at most 1; got {bad}'): param_groups(net(), layer_decay=bad)
    assert names(param_groups(nn.ReLU())) == []

def test_a_learner_honours_the_groups():
    "Rates, and no decay where there should be none, in two fits of different rates; equal to groups written by hand"
    data = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(3)]
    model, twin = net(), net()
    f = lambda ps, lr: optim.SGD(param_groups(model, {'head.*': dict(lr_mult=10)}, no_decay=True), lr, weight_decay=0.1)
    learn = TrainLearner(model, SimpleNamespace(train=data, valid=None), lr=0.01, opt_func=f)
    learn.fit(1)
    learn.fit(1, lr=0.001)
    assert [g['lr'] for g in learn.opt.param_groups] == pytest.approx([0.001, 0.001, 0.01, 0.01])
    for n, p in twin.named_parameters(): p.group = dict(params=[p], lr=0.1 if 'head' in n else 0.01, weight_decay=0.1*(p.ndim > 1))
    opt = optim.SGD([p.group for p in twin.parameters()])
    for epoch in range(2):
        for xb, yb in data:
            opt.zero_grad()
            nn.functional.mse_loss(twin(xb), yb).backward()
            opt.step()
        for g in opt.param_groups: g['lr'] /= 10
    for p, q in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(p, q)

# state by name

def trained(model, opt, n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(8, 3, generator=g).to(next(model.parameters()))
        def closure():
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss
        opt.step(closure)
    return opt

ps = lambda m: list(m.parameters())
OPTS = dict(
    sgd=lambda m: optim.SGD(ps(m), 0.1), momentum=lambda m: optim.SGD(ps(m), 0.1, momentum=0.9, nesterov=True),
    adamw=lambda m: optim.AdamW(param_groups(m, {'head.*': dict(lr=np.float64(0.05))}, no_decay=True), np.float64(0.01)),
    amsgrad=lambda m: optim.Adam(ps(m), torch.tensor(0.01), amsgrad=True), fused=lambda m: optim.AdamW(ps(m), 0.01, fused=True),
    named=lambda m: optim.AdamW(m.named_parameters(), 0.01),
    adagrad=lambda m: optim.Adagrad(ps(m), 0.1, lr_decay=0.1), adadelta=lambda m: optim.Adadelta(ps(m)),
    adamax=lambda m: optim.Adamax(ps(m)), asgd=lambda m: optim.ASGD(ps(m), 0.1, t0=2), nadam=lambda m: optim.NAdam(ps(m)),
    radam=lambda m: optim.RAdam(ps(m)), rmsprop=lambda m: optim.RMSprop(ps(m), momentum=0.9, centered=True),
    rprop=lambda m: optim.Rprop(ps(m)), lbfgs=lambda m: optim.LBFGS(ps(m), 0.1, max_iter=3),
    wolfe=lambda m: optim.LBFGS(ps(m), line_search_fn='strong_wolfe', history_size=3),
)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', OPTS)
def test_goes_on_bit_for_bit(name, dtype):
    "Saved to a file after 3 of 6 steps, opened with weights_only, and continued by a new model and optimizer"
    if name in ('lbfgs', 'wolfe') and dtype == torch.bfloat16: pytest.skip('diverges')
    whole, first, second = net().to(dtype), net().to(dtype), net().to(dtype)
    opt = trained(whole, OPTS[name](whole))
    trained(whole, opt, seed=1)
    opt = trained(first, OPTS[name](first))
    weights, state = reopened((first.state_dict(), opt_state(first, opt)))
    for p in second.parameters(): nn.init.normal_(p)
    new = OPTS[name](second)
    for g in new.param_groups: g['lr'] = g['lr']*3                # what was saved counts
    report = load_opt_state(second, new, state)
    assert len(report.matched) == 8 and not (report.anew or report.left or report.shapes or report.kept)
    second.load_state_dict(weights)
    trained(second, new, seed=1)
    for p, q in zip(whole.parameters(), second.parameters()): assert torch.equal(p, q)
    a, b = opt_state(first, trained(first, opt, seed=1)), opt_state(second, new)
    assert a['groups'] == b['groups'] and a['params'] == b['params']
    for n, s in a['state'].items():
        for k, v in s.items():
            for x, y in zip(*(o if isinstance(o, list) else [o] for o in (v, b['state'][n][k])), strict=True):
                assert torch.equal(x, y) and x.dtype == y.dtype if torch.is_tensor(x) else x == y, (n, k)

def test_a_rate_that_is_a_tensor_stays_that_tensor():
    "A compiled or captured step holds it"
    a, b = net(), net()
    opt, new = optim.Adam(a.parameters(), torch.tensor(0.01)), optim.Adam(b.parameters(), torch.tensor(0.5))
    rate = new.param_groups[0]['lr']
    load_opt_state(b, new, reopened(opt_state(a, opt)))
    assert new.param_groups[0]['lr'] is rate and rate == torch.tensor(0.01) and opt.param_groups[0]['lr'] is not rate
    load_opt_state(b, new, opt_state(a, optim.Adam(a.parameters(), 0.25)))
    assert new.param_groups[0]['lr'] is rate and rate == 0.25

def test_loading_shares_no_tensor():
    a, b = net(), net()
    opt, new = trained(a, OPTS['momentum'](a)), OPTS['momentum'](b)
    load_opt_state(b, new, opt_state(a, opt))
    before = opt.state[a.head.bias]['momentum_buffer'].clone()
    trained(b, new)
    assert torch.equal(opt.state[a.head.bias]['momentum_buffer'], before)

def mom(opt, p): return opt.state[p]['momentum_buffer']

# the three examples of torch.optim's documentation, with its own models

class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
    def forward(self, x): return self.fc(x)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(3, 4)
    def forward(self, x): return (self.fc1(x) + self.fc2(x))/2

named = lambda m, lr=0.01: optim.SGD(m.named_parameters(), lr=lr, momentum=0.9)

@pytest.mark.parametrize('rename', [{'fc1': 'fc', 'fc2': 'fc'}, lambda n: 'fc' + n[3:],
                                    {f'fc{i}.{k}': f'fc.{k}' for i in (1, 2) for k in ('weight', 'bias')}])
def test_layer_doubled(rename):
    a, b = One(), Two()
    opt, new = trained(a, named(a)), named(b, 0.5)
    report = load_opt_state(b, new, opt_state(a, opt), rename=rename)
    assert report.matched == ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias'] and new.param_groups[0]['lr'] == 0.01
    for fc in b.fc1, b.fc2:
        for k in 'weight', 'bias': assert torch.equal(mom(new, getattr(fc, k)), mom(opt, getattr(a.fc, k)))
    trained(b, new)                                               # each has a copy of its own
    b.fc2.requires_grad_(False)
    assert mom(new, b.fc1.weight).data_ptr() != mom(new, b.fc2.weight).data_ptr()

@pytest.mark.parametrize('rename', [None, {'bypass': None}, lambda n: None if n == 'bypass.weight' else n])
def test_new_layer(rename):
    a, b = net(), net(bypass=True)
    opt, new = trained(a, named(a)), trained(b, named(b, 0.5), seed=2)
    with pytest.raises(ValueError, match='does not fit: not saved: bypass.weight$'): load_opt_state(b, new, opt_state(a, opt), rename=rename)
    report = load_opt_state(b, new, opt_state(a, opt), strict=False, rename=rename)
    assert report.anew == ['bypass.weight'] and len(report.matched) == 8
    assert repr(report) == '8 of 9 parameters go on as saved; anew: bypass.weight'
    assert b.bypass.weight not in new.state and new.param_groups[0]['lr'] == 0.01
    for n, p in a.named_parameters(): assert torch.equal(mom(new, dict(b.named_parameters())[n]), mom(opt, p))

def test_another_order():
    "Both layers are square, so that a load by position would succeed, and be wrong"
    def sized(order):
        torch.manual_seed(0)
        model = nn.Module()
        for k in order: setattr(model, k, nn.Linear(3, 3))
        model.forward = lambda x: model.a(x)*2 + model.b(x)
        return model
    a, b = sized('ab'), sized('ba')
    opt, new = trained(a, named(a)), named(b)
    for x, y in ((b.a, a.a), (b.b, a.b)): x.load_state_dict(y.state_dict())
    report = load_opt_state(b, new, reopened(opt_state(a, opt)))
    assert sorted(report.matched) == sorted(n for n, _ in a.named_parameters())
    for k in 'ab': assert torch.equal(mom(new, getattr(b, k).weight), mom(opt, getattr(a, k).weight))
    assert not torch.equal(mom(new, b.a.weight), mom(new, b.b.weight))
    trained(a, opt, seed=1); trained(b, new, seed=1)
    for k in 'ab': assert torch.equal(getattr(a, k).weight, getattr(b, k).weight)

def test_another_shape_and_other_groups():
    a, b = net(), net(n_in=5)
    opt, new = trained(a, named(a)), named(b)
    state = opt_state(a, opt)
    with pytest.raises(ValueError, match=r'body.0.weight was \(4, 3\) and is \(4, 5\)'): load_opt_state(b, new, state)
    assert not new.state                                          # nothing was changed
    report = load_opt_state(b, new, state, strict=False)
    assert report.shapes == ['body.0.weight'] and b.body[0].weight not in new.state and len(report.matched) == 7
    parts = optim.SGD(param_groups(a, {'head.*': dict(lr=0.2)}), 0.1, momentum=0.9)
    with pytest.raises(ValueError, match='no group here is this one that was saved: body.0.bias, body.0.weight, '): load_opt_state(a, parts, state)
    load_opt_state(a, parts, state, strict=False)
    assert [g['lr'] for g in parts.param_groups] == [0.01, 0.01] and torch.equal(mom(parts, a.head.bias), mom(opt, a.head.bias))

def test_groups_that_cannot_tell_keep_their_options():
    a, b = net(), net(bypass=True)
    opt = trained(a, optim.SGD(param_groups(a, {'head.*': dict(lr=0.2)}), 0.1, momentum=0.9))
    new = optim.SGD(param_groups(b, {'bypass.*': dict(lr=0.7)}), 0.5, momentum=0.9)
    report = load_opt_state(b, new, opt_state(a, opt), strict=False)
    assert [g['lr'] for g in new.param_groups] == [0.5, 0.7] and report.kept == [0, 1]     # one of two groups, one new
    swapped = optim.SGD(param_groups(a, {'head.*': dict(lr=9)})[::-1], 5, momentum=0.9)
    load_opt_state(a, swapped, opt_state(a, opt))                 # the same groups in another order
    assert [g['lr'] for g in swapped.param_groups] == [0.2, 0.1]

def test_lbfgs_holds_one_state_for_all():
    a, b, c = net(), net(bypass=True), net()
    state = opt_state(a, trained(a, optim.LBFGS(a.parameters())))
    new = optim.LBFGS(b.parameters())
    with pytest.raises(ValueError, match='not saved: bypass.weight'): load_opt_state(b, new, state)
    report = load_opt_state(b, new, state, strict=False)
    assert not report.matched and len(report.anew) == 9 and len(report.left) == 8
    trained(b, new)
    with pytest.raises(ValueError, match='for LBFGS the order counts'): load_opt_state(c, optim.LBFGS(ps(c)[::-1]), state)

def test_state_errors():
    a = net()
    opt = trained(a, named(a))
    state, before = opt_state(a, opt), {p: s['momentum_buffer'].clone() for p, s in opt.state.items()}
    for other, match in ((optim.Adam(ps(a)), 'saved from SGD, here is Adam'),):
        for strict in True, False:
            with pytest.raises(ValueError, match=match): load_opt_state(a, other, state, strict)
    for bad in opt.state_dict(), {}, None, [1]:
        with pytest.raises(ValueError, match='no state from opt_state'): load_opt_state(a, opt, bad)
    with pytest.raises(ValueError, match="rename: the name 'hed' matches no parameter; close are head"):
        load_opt_state(a, opt, state, rename={'hed': 'head'})
    with pytest.raises(ValueError, match='saved, but not here: tail.weight, tail.bias'):
        b = nn.ModuleDict(dict(body=a.body, head=a.head))
        load_opt_state(b, named(b), state)
    with pytest.raises(ValueError, match=r'not in the model, of the shapes \(4, 3\)'): opt_state(nn.Linear(1, 1), opt)
    class NoState:
        def __init__(self, params, lr): pass
        def step(self): pass
        def zero_grad(self): pass
    for f in (lambda: opt_state(a, NoState(ps(a), 1)), lambda: load_opt_state(a, NoState(ps(a), 1), state)):
        with pytest.raises(TypeError, match='state_dict, load_state_dict and param_groups is needed; got NoState'): f()
    for p, v in before.items(): assert torch.equal(mom(opt, p), v)
    assert repr(LoadReport(matched=['a'], left=list('bcdefgh'))) == '1 of 1 parameters go on as saved; left over: b, c, d, e, f, g, …'
