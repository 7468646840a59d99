"Parameter groups by name, their options, and optimizer state that is saved and loaded by name"
import copy
import warnings
from collections import OrderedDict
from fnmatch import fnmatchcase
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn, optim
from torch.optim import lr_scheduler

from fastswa.callbacks.schedule import BatchSchedCB
from fastswa.callbacks.steps import ClosureCB
from fastswa.training.events import Callback
from fastswa.training.learner import MomentumLearner, TrainLearner
from fastswa.training.optim import KNOWN_OPTIONS, OptionChanges, group_options, param_groups
from fastswa.training.opt_steps import StepWatch
from fastswa.training.opt_state import load_opt_state, opt_state
from fastswa.training.learner_optim import make_opt, opt_fits, set_rates
import helpers
from helpers import copied, learner, linear, regression, reopened, same, state

class Net(nn.Module):
    def __init__(self, bypass=False, n_in=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_in, 4), nn.LayerNorm(4), nn.Tanh())
        self.tail = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        if bypass: self.bypass = nn.Linear(n_in, 2, bias=False)
    def forward(self, x): return self.head(self.tail(self.body(x))) + (self.bypass(x) if hasattr(self, 'bypass') else 0)

def net(**kwargs):
    torch.default_generator.manual_seed(0)
    return Net(**kwargs)

def names(groups): return [g['param_names'] for g in groups]

# groups

PATTERNS = ['*', '*.bias', 'head.*', 'body.*', 'body.1.weight', '*weight', 'tail.?ias', '[bt]*']
CHOICES = [dict(weight_decay=0), dict(lr_mult=10), dict(lr_mult=0.5, weight_decay=0.1), dict(betas=(0.8, 0.9)), {}]

@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from(CHOICES)), st.booleans(),
       st.sampled_from([None, 0.5, 1.]), st.booleans())
def test_each_parameter_once(options, no_decay, layer_decay, lr):
    "Every parameter is in one group, with the options of its patterns, the later ones last; torch takes the groups"
    model = net()
    params = dict(model.named_parameters())
    groups = param_groups(model, options, no_decay=no_decay, layer_decay=layer_decay, lr=0.1 if lr else None)
    assert sorted(n for ns in names(groups) for n in ns) == sorted(params)
    for g in groups:
        assert [params[n] for n in g['param_names']] == g['params'] and g['name']     # compared by identity first
        for n, p in zip(g['param_names'], g['params']):
            assert p is params[n]
            depth = dict(body=2, tail=1, head=0)[n.split('.')[0]]
            want = {} if layer_decay is None else dict(lr_mult=layer_decay**depth)
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
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU(), nn.MultiheadAttention(2, 1),
                          nn.Embedding(3, 2))
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
        assert g['param_names'] == want and 'tied.weight' not in want and {'tail.weight', 'head.weight'} <= {*want}
        assert len({id(p) for p in g['params']}) == len(want)

def test_group_errors():
    with pytest.raises(ValueError, match=r"pattern 'boby.\*' matches no parameter; close are body"):
        param_groups(net(), {'boby.*': {}})
    with pytest.raises(ValueError, match="'xyz' matches no parameter; there are body.0.weight"):
        param_groups(net(), {'xyz': {}})
    with pytest.raises(TypeError, match='must be a dict'): param_groups(net(), {'*': 0.1})
    for bad, good in dict(lr_mul='lr_mult', lrmult='lr_mult', weigth_decay='weight_decay', beta='betas',
                          momentun='momentum', LR='lr').items():
        with pytest.raises(ValueError, match=f"the option '{bad}', given for '\\*': did you mean '{good}'"):
            param_groups(net(), {'*': {bad: 1}})
    # options of other optimizers
    for own in 'd_coef k beta3 eps2 lr_max weight_decouple warmup_steps momentum_decay clip'.split():
        assert param_groups(net(), {'*': {own: 1}})[0][own] == 1
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
    for n, p in twin.named_parameters():
        p.group = dict(params=[p], lr=0.1 if 'head' in n else 0.01, weight_decay=0.1*(p.ndim > 1))
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
    adamw=lambda m: optim.AdamW(param_groups(m, {'head.*': dict(lr=np.float64(0.05))}, no_decay=True),
                                np.float64(0.01)),
    amsgrad=lambda m: optim.Adam(ps(m), torch.tensor(0.01), amsgrad=True),
    fused=lambda m: optim.AdamW(ps(m), 0.01, fused=True),
    named=lambda m: optim.AdamW(m.named_parameters(), 0.01),
    adagrad=lambda m: optim.Adagrad(ps(m), 0.1, lr_decay=0.1), adadelta=lambda m: optim.Adadelta(ps(m)),
    adamax=lambda m: optim.Adamax(ps(m)), asgd=lambda m: optim.ASGD(ps(m), 0.1, t0=2),
    nadam=lambda m: optim.NAdam(ps(m)),
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
    with warnings.catch_warnings():
        warnings.simplefilter('error')                            # all of it is loaded
        load_opt_state(second, new, state, strict=False)
    load_opt_state(second, new, state)
    second.load_state_dict(weights)
    trained(second, new, seed=1)
    for p, q in zip(whole.parameters(), second.parameters()): assert torch.equal(p, q)
    a, b = opt_state(first, trained(first, opt, seed=1)), opt_state(second, new)
    assert a['param_groups'] == b['param_groups'] and a['params'] == b['params'] and len(a['params']) == 8
    for i, s in a['state'].items():
        for k, v in s.items():
            for x, y in zip(*(o if isinstance(o, list) else [o] for o in (v, b['state'][i][k])), strict=True):
                assert torch.equal(x, y) and x.dtype == y.dtype if torch.is_tensor(x) else x == y, (i, k)

def test_a_rate_that_is_a_tensor_stays_that_tensor():
    "A compiled or captured step holds it"
    a, b = net(), net()
    opt, new = optim.Adam(a.parameters(), torch.tensor(0.01)), optim.Adam(b.parameters(), torch.tensor(0.5))
    rate = new.param_groups[0]['lr']
    load_opt_state(b, new, reopened(opt_state(a, opt)))
    assert new.param_groups[0]['lr'] is rate and rate == torch.tensor(0.01) and opt.param_groups[0]['lr'] is not rate
    load_opt_state(b, new, opt_state(a, optim.Adam(a.parameters(), 0.25)))
    assert new.param_groups[0]['lr'] is rate and rate == 0.25

def test_torch_loads_it_too():
    a, b = net(), net()
    opt, new = trained(a, OPTS['adamw'](a)), OPTS['adamw'](b)
    new.load_state_dict(reopened(opt_state(a, opt)))
    assert torch.equal(new.state[b.head.bias]['exp_avg'], opt.state[a.head.bias]['exp_avg'])

@pytest.mark.parametrize('saved, here, want', [(torch.bfloat16, torch.bfloat16, torch.float32),
                                              (torch.float32, torch.bfloat16, torch.bfloat16)])
def test_dtype_of_a_state_is_kept(saved, here, want):
    "Float32 momentum of half-precision weights stays so; that of float32 weights becomes half where the weights are"
    a, b = net().to(saved), net().to(here)
    opt, new = trained(a, OPTS['momentum'](a)), OPTS['momentum'](b)
    for s in opt.state.values(): s['momentum_buffer'] = s['momentum_buffer'].float() + 2**-20
    load_opt_state(b, new, reopened(opt_state(a, opt)))
    assert {s['momentum_buffer'].dtype for s in new.state.values()} == {want}
    assert torch.equal(mom(new, b.head.bias), mom(opt, a.head.bias).to(want))

def test_state_in_the_options_is_kept():
    "Prodigy, Schedule-Free: a count, a sum and a tensor in the group"
    def make(model):
        opt = optim.SGD(ps(model), 0.1)
        opt.param_groups[0].update(k=0, weight_sum=0., d=torch.tensor(1e-6))
        return opt
    a, b = net(), net()
    opt, new = make(a), make(b)
    d = new.param_groups[0]['d']
    opt.param_groups[0].update(k=7, weight_sum=np.float64(2.5), d=torch.tensor(0.5))
    load_opt_state(b, new, reopened(opt_state(a, opt)))
    assert [new.param_groups[0][k] for k in ('k', 'weight_sum', 'd')] == [7, 2.5, 0.5] and new.param_groups[0]['d'] is d

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
    load_opt_state(b, new, opt_state(a, opt), rename=rename)
    assert len(new.state) == 4 and new.param_groups[0]['lr'] == 0.01
    for fc in b.fc1, b.fc2:
        for k in 'weight', 'bias': assert torch.equal(mom(new, getattr(fc, k)), mom(opt, getattr(a.fc, k)))
    trained(b, new)                                               # each has a copy of its own
    b.fc2.requires_grad_(False)
    assert mom(new, b.fc1.weight).data_ptr() != mom(new, b.fc2.weight).data_ptr()

@pytest.mark.parametrize('rename', [None, {'bypass': None}, lambda n: None if n == 'bypass.weight' else n])
def test_new_layer(rename):
    a, b = net(), net(bypass=True)
    opt, new = trained(a, named(a)), trained(b, named(b, 0.5), seed=2)
    with pytest.raises(ValueError, match='does not fit: not saved: bypass.weight$'):
        load_opt_state(b, new, opt_state(a, opt), rename=rename)
    with pytest.warns(UserWarning, match='^8 of 9 parameters go on as saved; not saved: bypass.weight$'):
        load_opt_state(b, new, opt_state(a, opt), strict=False, rename=rename)
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
    load_opt_state(b, new, reopened(opt_state(a, opt)))
    assert len(new.state) == 4
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
    with pytest.warns(UserWarning, match=r'^7 of 8 .* go on as saved; body.0.weight was \(4, 3\) and is \(4, 5\)$'):
        load_opt_state(b, new, state, strict=False)
    assert b.body[0].weight not in new.state and len(new.state) == 7
    parts = optim.SGD(param_groups(a, {'head.*': dict(lr=0.2)}), 0.1, momentum=0.9)
    with pytest.raises(ValueError, match='no group here is this one that was saved: body.0.bias, body.0.weight, '):
        load_opt_state(a, parts, state)
    with pytest.warns(UserWarning, match='^8 of 8 .* no group here is this one'):
        load_opt_state(a, parts, state, strict=False)
    assert [g['lr'] for g in parts.param_groups] == [0.01, 0.01]
    assert torch.equal(mom(parts, a.head.bias), mom(opt, a.head.bias))

def test_groups_that_cannot_tell_keep_their_options():
    a, b = net(), net(bypass=True)
    opt = trained(a, optim.SGD(param_groups(a, {'head.*': dict(lr=0.2)}), 0.1, momentum=0.9))
    new = optim.SGD(param_groups(b, {'bypass.*': dict(lr=0.7)}), 0.5, momentum=0.9)
    with pytest.warns(UserWarning, match=r'groups that keep their own options: others, bypass.\*$'):
        load_opt_state(b, new, opt_state(a, opt), strict=False)
    assert [g['lr'] for g in new.param_groups] == [0.5, 0.7]
    swapped = optim.SGD(param_groups(a, {'head.*': dict(lr=9)})[::-1], 5, momentum=0.9)
    load_opt_state(a, swapped, opt_state(a, opt))                 # the same groups in another order
    assert [g['lr'] for g in swapped.param_groups] == [0.2, 0.1]

def test_lbfgs_holds_one_state_for_all():
    a, b, c = net(), net(bypass=True), net()
    state = opt_state(a, trained(a, optim.LBFGS(a.parameters())))
    new = optim.LBFGS(b.parameters())
    with pytest.raises(ValueError, match='not saved: bypass.weight'): load_opt_state(b, new, state)
    with pytest.warns(UserWarning, match='^0 of 9 parameters go on as saved; not saved: bypass.weight; '):
        load_opt_state(b, new, state, strict=False)
    assert not new.state
    trained(b, new)
    with pytest.raises(ValueError, match='for LBFGS the order counts'):
        load_opt_state(c, optim.LBFGS(ps(c)[::-1]), state)

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
        with pytest.raises(TypeError, match='with state_dict and load_state_dict is needed; got NoState'): f()
    load_opt_state(a, opt, opt_state(a, named(a)), load=False)     # it would fit, and is not loaded
    for p, v in before.items(): assert torch.equal(mom(opt, p), v)
    wide = nn.ModuleDict({c: nn.Linear(1, 1, bias=False) for c in 'abcdefghij'} | dict(head=a.head))
    with pytest.raises(ValueError, match='not saved: a.weight, b.weight, .* h.weight, …; saved, but not here'):
        load_opt_state(wide, named(wide), state)


# options that a schedule changes

class OwnState(optim.SGD):
    "Writes into its groups, as Prodigy (d), Schedule-Free (k), YellowFin (momentum) do"
    def __init__(self, params, lr):
        super().__init__(params, lr, momentum=0.9)
        for g in self.param_groups: g.update(k=0, d=torch.tensor(1.))
    def step(self, closure=None):
        for g in self.param_groups:
            g['k'] += 1
            g['d'] *= 2
            g['nesterov'] = True
        return super().step(closure)

SCHEDULES = dict(
    cycle=lambda o: lr_scheduler.OneCycleLR(o, 1., total_steps=10), steps=lambda o: lr_scheduler.StepLR(o, 3),
    cyclic=lambda o: lr_scheduler.CyclicLR(o, 0.1, 1., step_size_up=2),
    plateau=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    warm=lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]))

@pytest.mark.parametrize('rate', [float, torch.tensor])
@pytest.mark.parametrize('name', SCHEDULES)
def test_only_what_the_schedule_changed_is_put_back(name, rate):
    opt = OwnState([torch.ones(2, requires_grad=True)], rate(0.1))
    opt.add_param_group(dict(params=[torch.ones(3, requires_grad=True)], lr=rate(0.2), k=0, d=torch.tensor(1.)))
    rates, lone = [g['lr'] for g in opt.param_groups], OwnState([torch.ones(2, requires_grad=True)], rate(0.1))
    changes = OptionChanges(opt)
    with changes.recording(): sched = SCHEDULES[name](opt)
    for i in range(5):
        opt.step()
        lone.step()
        with changes.recording(): sched.step(*([i] if name == 'plateau' else []))
    for g, old in zip(opt.param_groups, (0.1, 0.2)): assert 'initial_lr' in g or name == 'plateau'
    assert any(float(g['lr']) != float(torch.tensor(v)) and g['lr'] != v for g, v in zip(opt.param_groups, (0.1, 0.2)))
    for _ in range(2):                                            # twice is as once
        changes.undo()
        assert group_options(opt) == [dict(group_options(lone)[0], lr=rate(v)) for v in (0.1, 0.2)]
    assert opt.param_groups[0]['nesterov'] and opt.param_groups[0]['k'] == 5 and opt.param_groups[0]['d'] == 32
    assert [len(g['params']) for g in opt.param_groups] == [1, 1]
    if rate is torch.tensor: assert all(g['lr'] is r for g, r in zip(opt.param_groups, rates))

def test_a_schedule_of_an_unusual_option_and_two_schedules():
    opt = optim.SGD([torch.ones(2, requires_grad=True)], 0.1, weight_decay=0.5)
    first, second = OptionChanges(opt), OptionChanges(opt)
    def decay(key, value):
        opt.param_groups[0][key] = value
        raise KeyboardInterrupt                                   # what was written before it counts
    for changes, args in ((first, ('weight_decay', 0.4)), (second, ('weight_decay', 0.3)), (second, ('clip', 1.))):
        with pytest.raises(KeyboardInterrupt), changes.recording(): decay(*args)
    opt.param_groups[0]['lr'] = 9.                                # put back in any case
    second.undo()
    assert opt.param_groups[0]['weight_decay'] == 0.4 and 'clip' not in opt.param_groups[0]
    first.undo()
    assert group_options(opt) == group_options(optim.SGD([torch.ones(2)], 0.1, weight_decay=0.5))
    OptionChanges(object()).undo()                                # no options, nothing to do
    changes = OptionChanges(opt)
    opt.load_state_dict(opt.state_dict())                         # replaces the groups
    opt.param_groups[0]['lr'] = 9.
    changes.undo()
    assert opt.param_groups[0]['lr'] == 0.1

def test_after_a_load_what_is_set_from_outside_is_ones_own():
    "A file of the midst of a schedule: its rate and `initial_lr` stay out, the optimizer's own count comes in"
    a, b = net(), net()
    opt, new = trained(a, OwnState(ps(a), 0.5)), OwnState(ps(b), 0.1)
    lr_scheduler.OneCycleLR(opt, 1., total_steps=10)
    changes, before = OptionChanges(new, KNOWN_OPTIONS), group_options(new)[0]
    load_opt_state(b, new, reopened(opt_state(a, opt)))
    assert 'initial_lr' in new.param_groups[0]
    changes.undo()
    assert group_options(new) == [dict(before, k=3, d=torch.tensor(8.))]

# one optimizer per learner

def test_an_optimizer_of_the_model():
    model = net()
    with pytest.raises(ValueError, match="2 parameters that are not the model's: opt_func must use"):
        make_opt(lambda params, lr: optim.SGD([*params, *nn.Linear(1, 1).parameters()], lr), model, 0.1)
    part = make_opt(lambda params, lr: optim.SGD(model.head.parameters(), lr), model, 0.1)      # some of them will do
    whole, by_hand = make_opt(optim.SGD, model, 0.1), optim.SGD(ps(model), 0.1)
    other = make_opt(lambda params, lr: SimpleNamespace(step=list, zero_grad=list), model, 0.1)
    opts = [part, whole, by_hand, other, object()]
    twin_model, twin = copy.deepcopy((model, whole))
    assert all(opt_fits(o, ps(model)) for o in opts)
    assert opt_fits(twin, ps(twin_model)) and not opt_fits(twin, ps(model))
    for wrap in torch.compile, nn.DataParallel: assert opt_fits(whole, ps(wrap(model)))
    model.extra = nn.Linear(1, 1)
    assert [opt_fits(o, ps(model)) for o in opts] == [False, False, True, False, True]
    del model.extra
    model.head = nn.Linear(4, 2)
    assert [opt_fits(o, ps(model)) for o in opts] == [False, False, False, False, True]

class Slots:
    __slots__ = ()
    def step(self): pass
    def zero_grad(self): pass

def test_rates():
    "A group keeps the share of the rate that it has when first seen; what has no rate is left alone"
    model = nn.ParameterList([torch.ones(1) for _ in range(3)])
    def groups(params, lr):
        a, b, c = params
        return optim.SGD([dict(params=a), dict(params=b, lr=torch.tensor(lr/10)), dict(params=c, lr_mult=3)], lr)
    opt = make_opt(groups, model, 0.5)
    tensor = opt.param_groups[1]['lr']
    for lr in 0.5, 2., 0., 0.25:
        set_rates(opt, lr)
        assert [float(g['lr']) for g in opt.param_groups] == pytest.approx([lr, lr/10, lr*3])
        assert opt.param_groups[1]['lr'] is tensor
    set_rates(opt, None)
    assert opt.param_groups[0]['lr'] == 0.25
    class Relative(optim.Optimizer):
        def __init__(self, params, lr): super().__init__(params, dict(lr=None))
    for lr in 0.1, None:
        opt = make_opt(Relative, net(), lr)
        set_rates(opt, lr)
        assert opt.param_groups[0]['lr'] is None and 'lr_mult' not in opt.param_groups[0]
    set_rates(make_opt(lambda params, lr: Slots(), net(), 0.1), 0.1)

class Lookahead(optim.Optimizer):
    "As timm's: no `super().__init__()`, so that its own hooks never fire"
    def __init__(self, base):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, base.state
    def step(self, closure=None): return self.base.step(closure)

class Wrapper:
    "As accelerate's, while it accumulates: passes on every second call"
    def __init__(self, opt): self.optimizer, self.calls = opt, 0
    def step(self):
        self.calls += 1
        if self.calls % 2 == 0: self.optimizer.step()

class Delegates:
    "Has nothing of its own: `step`, hooks and groups are those of the optimizer inside"
    def __init__(self, opt): self.inner = opt
    def __getattr__(self, name): return getattr(self.__dict__['inner'], name)

class DelegatesFromSlot:
    "The same, and even its `__dict__` is that of the optimizer inside"
    __slots__ = 'inner',
    def __init__(self, opt): self.inner = opt
    def __getattr__(self, name): return getattr(object.__getattribute__(self, 'inner'), name)

class Accelerated(Wrapper):
    def zero_grad(self): self.optimizer.base.zero_grad()

class Parent(optim.Adam):
    def step(self, closure=None): return super().step(closure)

class Several:
    "As a wrapper of one optimizer for matrices and one for the rest, in a list"
    def __init__(self, opt): self.opts = [optim.SGD([p], 0.1) for g in opt.param_groups for p in g['params']]
    def step(self):
        for o in self.opts: o.step()

class Extragradient(optim.SGD):
    "Steps twice with the optimizer inside for one step of its own"
    def __init__(self, opt):
        super().__init__(opt.param_groups, 0.1)
        self.base = opt
    def step(self, closure=None):
        for _ in range(2): self.base.step()

class SAM(optim.Optimizer):
    "As davda54's: a loop may also call first_step and second_step, which is not `step`"
    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base_optimizer = base
        self.param_groups = base.param_groups
    def first_step(self): pass
    def second_step(self): self.base_optimizer.step()

class OwnStep(optim.Optimizer):
    "Updates itself, and its class has hooks that never fire: no `super().__init__()`"
    def __init__(self, base): self.base, self.param_groups = SimpleNamespace(opt=base), base.param_groups
    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g['params']: p.sub_(p.grad)

class GroupsOnly(OwnStep):
    "Makes an optimizer for its groups, whose `step` is never called"
    def __init__(self, base): self.base, self.param_groups = base, base.param_groups

class InBackward:
    "An optimizer for each parameter, which steps as soon as its gradient is there"
    def __init__(self, base):
        self.opts = {p: optim.SGD([p], 0.1) for g in base.param_groups for p in g['params']}
        for p in self.opts: p.register_post_accumulate_grad_hook(lambda p: self.opts[p].step())
    def step(self): pass

def replaced_step(base):
    def step(): base.param_groups[0]['params'][0].data.sub_(1.)      # without a version
    base.step = step
    return base

STEPS = dict(
    plain=(lambda o: o, 'step', [0, 1, 2, 3]), lookahead=(Lookahead, 'step', [0, 1, 2, 3]),
    accelerate=(Wrapper, 'step', [1, 3]), both=(lambda o: Wrapper(Lookahead(o)), 'step', [1, 3]),
    parent=(lambda o: Parent(o.param_groups), 'step', [0, 1, 2, 3]), several=(Several, 'step', [0, 1, 2, 3]),
    skipped_several=(lambda o: Wrapper(Several(o)), 'step', [1, 3]), twice=(Extragradient, 'step', [0, 1, 2, 3]),
    another_name=(SAM, 'second_step', [0, 1, 2, 3]), first_half=(SAM, 'first_step', []),
    no_hooks=(OwnStep, 'step', [0, 1, 2, 3]), other_hooks=(GroupsOnly, 'step', [0, 1, 2, 3]),
    replaced=(replaced_step, 'step', [0, 1, 2, 3]), in_backward=(InBackward, 'step', [0, 1, 2, 3]),
    not_torchs=(lambda o: SimpleNamespace(step=int), 'step', [0, 1, 2, 3]),
    slots=(lambda o: Slots(), 'step', [0, 1, 2, 3]), delegates=(Delegates, 'step', [0, 1, 2, 3]),
    delegates_some=(lambda o: Delegates(Wrapper(o)), 'step', [1, 3]),
    delegates_twice=(lambda o: Delegates(Delegates(Lookahead(o))), 'step', [0, 1, 2, 3]),
    delegates_from_slot=(DelegatesFromSlot, 'step', [0, 1, 2, 3]))


@pytest.mark.parametrize('name', STEPS)
def test_a_step_that_was_made_is_seen_once(name):
    "However the optimizer is made. Wrong: 0, since its hooks never fire, or 2, since those of two optimizers fire"
    wrap, call, want = STEPS[name]
    model = nn.Linear(2, 1)
    opt = wrap(optim.Adam(model.parameters(), 0.1))
    watch, made = StepWatch(opt), []
    for i in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.ones(1, 2)).sum().backward()
        if watch.made(getattr(opt, call), model): made.append(i)
        moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before))
        assert moved == (i in want) or name in ('not_torchs', 'slots')
    assert made == want
    watch.remove()
    model(torch.ones(1, 2)).sum().backward()
    getattr(opt, call)()
    assert not watch.told

def test_a_learner_counts_steps_of_an_optimizer_that_is_replaced():
    "Wrong: those of the first only, or, where a second learner has the same optimizer, its steps too"
    class Replace(Callback):
        def before_epoch(self, learn):
            if learn.training and learn.epoch: learn.opt = Accelerated(Lookahead(learn.opt))
    a, b = learner(Replace()), learner()
    a.fit(2)
    assert a.opt_steps == 10 + 5
    b.model = a.model
    b.opt = a.opt.optimizer.base
    b.fit(1)
    assert (a.opt_steps, b.opt_steps) == (15, 10)

# the model changes

def momentum(params, lr): return optim.SGD(params, lr, momentum=0.9)

def test_a_replaced_head_keeps_the_momentum_of_the_body():
    "Wrong: all of it is lost, in silence"
    learn = learner(opt_func=momentum)
    learn.fit(1)
    body, old = learn.model[0].weight, learn.opt
    kept = mom(old, body).clone()
    learn.model[-1] = nn.Linear(8, 3)
    class Look(Callback):
        def before_epoch(self, learn): self.kept = mom(learn.opt, body).clone()
    with pytest.warns(UserWarning, match=r'other parameters than its optimizer \(2 are new\).*keeps the momentum'):
        learn.fit(1, valid=False, cbs=(look := Look()))
    assert learn.opt is not old and torch.equal(look.kept, kept) and len(learn.opt.state) == 6
    learn.opt_func = optim.Adam                   # another kind starts anew, and says so
    learn.model[-1] = nn.Linear(8, 3)
    with pytest.warns(UserWarning, match='starts without momentum'): learn.fit(1, valid=False)

def test_parameters_that_were_added_by_hand_keep_the_optimizer():
    "Wrong: a new optimizer, without the group that was added"
    learn = learner(opt_func=momentum)
    learn.fit(1)
    learn.model.append(new := nn.Linear(3, 3))
    learn.opt.add_param_group(dict(params=[*new.parameters()], lr=0.3))
    old, before = learn.opt, new.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)
    assert learn.opt is old and not torch.equal(new.weight, before)

@pytest.mark.parametrize('given', [False, True])
def test_parameters_that_come_during_a_fit(given):
    "They train from the next fit on, and this one says so. Wrong: silence. `given`: the optimizer is the user's own"
    class Grow(Callback):
        def before_batch(self, learn):
            if learn.training and (learn.epoch, learn.iter) == (0, 3) and len(learn.model) == 1:
                learn.model.append(nn.Linear(1, 1))
    learn = TrainLearner(nn.Sequential(linear()), regression(), lr=0.01, cbs=Grow(), opt_func=momentum)
    if given: learn.opt = momentum(learn.model.parameters(), 0.01)
    with pytest.warns(UserWarning, match='during the fit, which its optimizer does not train: 1.weight, 1.bias. Add'):
        learn.fit(2)
    before = learn.model[1].weight.detach().clone()
    with pytest.warns(UserWarning, match=r'\(2 are new\)'): learn.fit(1)
    assert not torch.equal(learn.model[1].weight, before)

def test_an_option_that_no_optimizer_knows():
    "Wrong: torch takes it, and it means nothing"
    model = net()
    def groups(key): return lambda ps, lr: optim.SGD(param_groups(model, {'head.*': {key: 10}}), lr)
    with pytest.raises(ValueError, match="option 'lr_mul', given for 'head.*': did you mean 'lr_mult'"):
        make_opt(groups('lr_mul'), model, 0.1)
    with pytest.warns(UserWarning, match="SGD has no option 'lr_scale'.*lr_mult"):
        make_opt(groups('lr_scale'), model, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for key in 'lr_mult', 'momentum': make_opt(groups(key), model, 0.1)
        make_opt(lambda ps, lr: OwnState(ps, lr), model, 0.1)          # writes options of its own

# freezing

def with_groups(cls=TrainLearner, **kw):
    "Three groups: linear, BatchNorm, linear"
    model = helpers.net()
    options = {'1.*': dict(lr_mult=1.5), '3.*': dict(lr_mult=2)}
    def three(ps, lr): return optim.SGD(param_groups(model, options), lr, **kw)
    return learner(model=model, cls=cls, opt_func=three)

@pytest.mark.parametrize('n, train_bn', [(0, True), (1, True), (2, True), (-1, False), (2, False), (-3, False)])
def test_frozen_groups(n, train_bn):
    "As a loop in which `requires_grad` is False for them. Wrong: weight decay or momentum moves them all the same"
    learn, ref = with_groups(momentum=0.9, weight_decay=0.1), with_groups(momentum=0.9, weight_decay=0.1)
    for o in (learn, ref): o.fit(1)               # there is momentum already
    learn.freeze_to(n, train_bn=train_bn)
    learn.fit(1)
    first = n % 3
    modules = [ref.model[0], ref.model[1], ref.model[3]]
    for i, m in enumerate(modules): m.requires_grad_(i >= first or (train_bn and i == 1))
    if first == 2 and not train_bn: ref.model[1].eval()
    for x, y in ref.dls.train:
        ref.opt.zero_grad()
        F.cross_entropy(ref.model(x), y).backward()
        ref.opt.step()
    assert same(state(learn), state(ref))
    assert learn.model[1].training == (train_bn or first < 2)
    learn.unfreeze()
    assert learn.model[1].training and all(p.requires_grad for p in learn.model.parameters())
    before = state(learn)
    learn.fit(1)
    assert not any(torch.equal(v, before[k]) for k, v in state(learn).items())

def test_frozen_weights_keep_still_under_momentum_in_the_gradients():
    "Wrong: the gradients that MomentumLearner kept are stepped on"
    learn = with_groups(MomentumLearner)
    learn.fit(1)
    learn.freeze()
    before = state(learn)
    learn.fit(1)
    moved = {k.split('.')[0] for k, v in state(learn).items() if not torch.equal(v, before[k])}
    assert moved == {'1', '3'} and all(p.requires_grad for p in learn.model[1].parameters())

def test_frozen_by_hand_stays_so():
    "Statistics that the user froze, with weights that train, and a new head after the optimizer was made"
    learn = with_groups()
    learn.fit(1)
    learn.model[1].eval()
    for freeze in (learn.freeze, learn.unfreeze):
        freeze()
        assert not learn.model[1].training
    learn.model[3] = nn.Linear(8, 3)
    with pytest.warns(UserWarning, match='2 are new'): learn.freeze()
    assert [p.requires_grad for p in learn.model.parameters()] == [False, False, True, True, True, True]

def test_freezing_needs_groups():
    learn = learner()
    with pytest.raises(ValueError, match=r'several parameter groups: param_groups\(\) in opt_func'): learn.freeze()
    for n in (1, -2):
        with pytest.raises(ValueError, match=f'has 1 parameter groups; there is no group {n}'): learn.freeze_to(n)

# a loss with parameters

class Scaled(nn.Module):
    "Uncertainty weighting: a parameter, a buffer that counts, and, if asked, the model"
    def __init__(self, model=None):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(()))
        self.register_buffer('calls', torch.zeros(()))
        self.model = model
    def forward(self, preds, y):
        if self.training: self.calls += 1
        return F.mse_loss(preds, y)*torch.exp(-self.s) + self.s
    def method(self, preds, y): return self(preds, y)

LOSSES = dict(module=lambda m: Scaled(), partial=lambda m: partial(Scaled()), method=lambda m: Scaled().method,
              holds_the_model=lambda m: Scaled(m))

lbfgs = partial(optim.LBFGS, max_iter=4)

def loss_of(f): return getattr(f := getattr(f, 'func', f), '__self__', f)

@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('opt_func', [momentum, lbfgs, lambda ps, lr: optim.Adam([dict(params=ps[:1]),
                                                                                  dict(params=ps[1:])], lr)])
def test_the_parameters_of_a_loss_train(name, opt_func):
    "As in a loop that gives both to the optimizer. Wrong: its gradient piles up, and it never moves"
    cbs = [ClosureCB()] if opt_func is lbfgs else []
    learn = TrainLearner(model := linear(), regression(), LOSSES[name](model), 0.01, cbs, opt_func)
    learn.fit(2)
    m, loss = linear(), Scaled()
    opt = opt_func([*m.parameters(), *loss.parameters()], 0.01)
    for x, y in 2*regression().train:
        def closure():
            opt.zero_grad()
            (res := loss(m(x), y)).backward()
            return res
        closure()
        opt.step(closure if cbs else None)
    mine = loss_of(learn.loss_func)
    assert torch.equal(mine.s, loss.s) and loss.s != 0 and same(state(learn), copied(m.state_dict()))
    assert mine.training


def test_a_loss_that_the_optimizer_leaves_out():
    "It gets a group of its own, at the rate of the fit; where that cannot be, an error before training"
    def head(ps, lr): return optim.SGD(param_groups(model), lr)
    model, loss = linear(), Scaled()
    learn = TrainLearner(model, regression(), loss, 0.01, opt_func=head)
    learn.fit(1)
    assert [g['name'] for g in learn.opt.param_groups] == ['others', 'loss_func'] and loss.s != 0
    learn.fit(1, lr=0.)
    assert [g['lr'] for g in learn.opt.param_groups] == [0, 0]
    def lbfgs(ps, lr): return optim.LBFGS(model.parameters(), lr)
    learn = TrainLearner(model, regression(), loss, 0.01, ClosureCB(), lbfgs)
    with pytest.raises(ValueError, match='leaves out 1 parameters of the loss function: give the optimizer all'):
        learn.fit(1)
    loss.requires_grad_(False)                    # then there is nothing to train
    learn.fit(1)

def test_modes_of_a_loss():
    "Eval in validation; a teacher in it that is in eval mode, and a loss that is, stay so"
    loss = Scaled(nn.Sequential(nn.Dropout()).eval())
    learn = TrainLearner(linear(), regression(), loss, 0.01)
    learn.fit(2)
    assert loss.calls == 2*7 and loss.training and not loss.model.training and not loss.model[0].training
    loss.eval()
    learn.fit(1)
    learn.validate()
    assert loss.calls == 2*7 and not loss.training

def test_looking_leaves_the_loss_as_it_was():
    "Wrong: a search for the rate trains it"
    loss = Scaled()
    learn = TrainLearner(linear(), regression(), loss, 0.01)
    learn.fit(1)
    before = copied(loss.state_dict())
    learn.lr_find(show=False, max_steps=5)
    learn.validate()
    assert same(copied(loss.state_dict()), before) and loss.s.grad is None


def test_a_search_takes_the_options_and_not_the_state_in_the_groups():
    "Wrong: the search goes on with the count of a long run, or moves the tensor that the run's optimizer keeps there"
    class Late(optim.SGD):
        seen = []
        def step(self, closure=None):
            g = self.param_groups[0]
            g['sum'] = g['sum'].add_(1.) if 'sum' in g else torch.ones(())
            Late.seen.append((g['sum'].item(), g['momentum']))
            return super().step(closure)
    learn = TrainLearner(linear(), regression(), lr=0.01, opt_func=Late)
    learn.fit(1)
    learn.opt.param_groups[0]['momentum'] = 0.5
    Late.seen.clear()
    learn.lr_find(show=False, max_steps=4)
    assert Late.seen == [(1, 0.5), (2, 0.5), (3, 0.5)] and learn.opt.param_groups[0]['sum'] == 7


class OwnUpdate:
    "A wrapper that has a torch optimizer for its groups, and moves the weights itself"
    def __init__(self, base): self.base = base
    param_groups = property(lambda self: self.base.param_groups)

    @torch.no_grad()
    def step(self):
        for g in self.base.param_groups:
            for p in g['params']: p.add_(p.grad, alpha=-g['lr'])

    def zero_grad(self): self.base.zero_grad()


def test_steps_at_a_rate_of_0_count():
    "A warm-up from 0 moves nothing at first. Wrong: no step counts, so the schedule never moves on, and nothing trains"
    warm = BatchSchedCB(lambda o: lr_scheduler.LambdaLR(o.base, lambda step: min(1, step/4)))
    learn = learner(warm, opt_func=lambda params, lr: OwnUpdate(optim.SGD(params, lr)))
    before = learn.model[0].weight.detach().clone()
    learn.fit(1)
    assert learn.opt_steps == 10 and not torch.equal(learn.model[0].weight, before)


@pytest.mark.parametrize('opt_func, says', [
    (lambda ps, lr: None, 'opt_func must return an optimizer, .*step and zero_grad; it returned None$'),
    (lambda ps, lr: optim.AdamW, 'it returned the class AdamW$'),
    (lambda ps, lr: 3, 'it returned int, without step and zero_grad'),
    (lambda ps, lr: SimpleNamespace(step=print), 'it returned SimpleNamespace, without zero_grad'),
    (lambda ps, lr: [optim.SGD(ps, lr)], 'it returned list, without step and zero_grad'),
    (None, r'opt_func must make an optimizer .*partial\(optim.AdamW, weight_decay=0.1\) do; got None'),
    (optim.SGD([torch.zeros(1)], 0.1), 'as optim.SGD or .*; got SGD')])
def test_what_opt_func_returns_is_no_optimizer(opt_func, says):
    "Wrong: AttributeError in the first batch, after callbacks have begun"
    begun = []
    class Begins(Callback):
        def before_batch(self, learn): begun.append(learn.iter)
    with pytest.raises(TypeError, match=says): learner(Begins(), opt_func=opt_func).fit(1)
    assert not begun


@pytest.mark.parametrize('wrap', [Delegates, DelegatesFromSlot])
def test_a_learner_with_a_wrapper_that_has_no_step_of_its_own(wrap):
    "Wrong: AttributeError, since its class has no `step`"
    learn, plain = learner(opt_func=lambda params, lr: wrap(momentum(params, lr))), learner(opt_func=momentum)
    for each in learn, plain: each.fit(1)
    assert learn.opt_steps == plain.opt_steps == 10
    for a, b in zip(learn.model.parameters(), plain.model.parameters()): assert torch.equal(a, b)


def test_no_learning_rate():
    "Wrong: what fails in the optimizer, a comparison with None"
    for opt_func in optim.SGD, optim.AdamW:
        with pytest.raises(TypeError, match='lr=None: give the learner or the fit a learning rate'):
            make_opt(opt_func, net(), None)
    with pytest.raises(TypeError, match='lr=None'): learner(lr=None).fit(1)
    def broken(params, lr): return len(lr)
    with pytest.raises(TypeError, match='has no len'): make_opt(broken, net(), 0.1)
