"""Where others went wrong with averages of weights, one line each, and what keeps us from it

Named are public issues in which users were bitten; *measured* was reproduced with torch 2.13. The table says where each is tested;
`here` is this file, and what follows a notebook is text in one of its cells.

 1  Swapped before the first update, so an untrained copy is validated and saved (Lightning#21724)
        nbs/10_averaging.ipynb: test_fail(lambda: Average(net()).applied().__enter__(), contains='call update() first')
        here: test_01_no_swap_before_the_first_update
 2  A checkpoint that is taken while swapped holds only one of raw and average (nequip#590)
        here: test_02_raw_and_average_at_any_moment
 3  A resumed run takes the average for the raw weights (YOLOX#1318, yolov5#310)
        tests/test_swa.py: test_state_of_a_callback_in_a_new_process
        here: test_03_what_is_saved_while_the_model_holds_the_average
 4  Raw weights that never come back after an exception or Ctrl-C (keras SwapEMAWeights, diffusers#2321)
        tests/test_interrupts.py: test_ctrl_c_at_any_line_keeps_the_raw_weights
        nbs/10_averaging.ipynb: raise KeyboardInterrupt
        nbs/14_swa.ipynb: a fit that fails, or is interrupted, leaves the raw weights
        here: test_04_raw_weights_come_back
        here: test_04_a_weight_that_cannot_be_written
        here: test_04_a_model_that_was_changed_while_it_held_the_average
 5  An average kept in bf16 stands still, or is lost in loading (torch, timm, torch-ema; measured)
        nbs/10_averaging.ipynb: test_close(avg.weights['weight'].item(), 1 - 0.9999**10_000, eps=1e-3)
        here: test_05_averages_of_half_precision
 6  fp32 has a dead zone too, with a decay of 0.99999 (measured)
        here: test_06_every_k_steps_leaves_the_dead_zone
 7  Integer buffers are averaged: num_batches_tracked stays 1 (torch, measured)
        here: test_07_counters_are_copied
 8  Averaged spectral-norm vectors shrink (miles-credit#394)
        here: test_08_spectral_norm_vectors_are_copied
 9  Buffers are stale or aliased (pytorch#84053, ignite; measured)
        nbs/10_averaging.ipynb: # as recomputing the statistics does
        here: test_09_buffers_are_neither_stale_nor_shared
10  torch's update_bn averages variances, thaws, forgets, and more (measured)
        nbs/11_batchnorm.ipynb: Ten numbers, in batches of 4, 4 and 2, and far from shuffled
        nbs/11_batchnorm.ipynb: A frozen layer stays as it is
        nbs/11_batchnorm.ipynb: When something goes wrong, statistics and momenta are as before
        nbs/11_batchnorm.ipynb: # dropout is off
        nbs/11_batchnorm.ipynb: Batches may be tensors, tuples, dicts
11  Tied weights are updated twice (timm, measured)
        nbs/10_averaging.ipynb: # updated twice it would be 0.19
        here: test_11_tied_in_part
        here: test_11_tied_and_with_gaps
12  Updates counted per micro-batch (F5-TTS#631)
        nbs/13b_snapshots.ipynb: # not 20: micro-batches do not count
        here: test_12_accumulation
13  A step that mixed precision skipped is counted (pytorch#67590, accelerate#4243)
        here: test_13_a_step_that_the_scaler_skipped
14  One NaN poisons the average for ever (ultralytics#24986)
        nbs/10_averaging.ipynb: A snapshot with a NaN in it is left out
        tests/test_late.py: test_masked_as_at_once
        here: test_14_one_warning
15  deepcopy of the model fails (pytorch#28594)
        tests/test_averaging.py: test_legacy_weight_norm_can_be_copied
        here: test_15_models_that_cannot_be_copied
        here: test_15_cached_activations
16  _orig_mod. and module. prefixes: nothing matches, and nobody says so (senpai#2899)
        tests/test_averaging.py: test_a_compiled_model_goes_by_its_plain_names
        nbs/10_averaging.ipynb: contains='weight is (2, 1) instead of (1, 1)'
        here: test_16_wrapped_models
17  FSDP and DTensor (pytorch#82070, pytorch#149138, Lightning#21414, torchtitan#3985)
        tests/test_sharded.py: test_sharded
18  Averages made under inference_mode cannot be loaded into (ultralytics#22372)
        tests/test_swa.py: test_average_device_dtype_and_check
        here: test_18_inference_mode
19  Schedules: a start that is ignored, an `every` that changes the horizon (Lightning, ema-pytorch, OneTrainer#543)
        nbs/13b_snapshots.ipynb: # start is inclusive
        nbs/14_swa.ipynb: A half-life is the same span whatever `every` is
        tests/test_swa.py: test_rules
        here: test_19_steps_of_any_rule
20  Start bias; an average in train mode, or on the device of before
        nbs/10_averaging.ipynb: alone.training, any(p.requires_grad
        tests/test_averaging.py: test_an_average_made_before_the_model_moved
        here: test_20_the_start_counts_no_more_than_it_should
21  A counter on the GPU is read at each update (pytorch#157705)
        tests/test_late.py: test_a_constant_rule_never_waits
        tests/test_gpu.py: test_updates_do_not_wait
        here: test_21_the_count_is_an_int
22  Lists of tensors that were prepared once go stale (measured)
        nbs/10_averaging.ipynb: The module may be converted, or get other tensors, between updates
        nbs/09_tensors.ipynb: A selection is no longer current
        here: test_22_tensors_exchanged_at_any_time
        here: test_22_copies_of_an_average_follow_their_own_model
23  A decay of 0.999 on a short run averages over more than the run (measured)
        tests/test_swa.py: test_defaults_to_the_letter
        here: test_23_the_default_fits_a_short_run
24  Statistics recomputed for the average are written into it, or taken from batches as they were not trained on
        nbs/14_swa.ipynb: the average keeps its own running ones
        tests/test_swa.py: test_statistics_after_a_fit_with_callbacks_of_its_own
25  Looking changes the run; a second schedule starts from a stale initial_lr (measured)
        nbs/14_swa.ipynb: Watching changes no bit of the run
        tests/test_swa.py: test_generators_of_loaders_are_put_back
        tests/test_learner.py: test_looking_between_two_fits_changes_nothing
        tests/test_sched.py: test_one_list_of_callbacks_for_two_learners
26  Values out of range are taken
        nbs/09b_rules.ipynb: dict(decay=1.5), dict(decay=-0.1), dict(decay=float('nan'))
        nbs/14_swa.ipynb: (EMACB, dict(decay=1.5), '1.5')
        here: test_26_values_out_of_range
        here: test_26_steps_out_of_range
        here: test_26_weights_out_of_range
        here: test_26_as_many_steps_as_averages
        here: test_26_an_average_that_is_applied_stops_all
        here: test_26_a_real_dtype_for_complex_weights
"""
import copy
import math
import pickle
import re
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from fastswa.averaging.average import Average, update_all
from fastswa.training.events import Callback, CancelStepException
from fastswa.training.learner import TrainLearner
from fastswa.averaging.rules import ema, equal, power
from fastswa.callbacks.swa import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB


def data(n=160, bs=16):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=g)
    ds = TensorDataset(F.one_hot(y, 3).float() + torch.randn(n, 3, generator=g)/2, y)
    return SimpleNamespace(train=DataLoader(ds, bs), valid=DataLoader(ds, 2*bs))


def net(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 3))


def learner(*cbs, **kw): return TrainLearner(net(), data(), F.cross_entropy, 0.3, cbs, **kw)


def copied(tensors): return {k: v.detach().clone() for k, v in tensors.items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one(value=0., dtype=None):
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


class Trail(Callback):
    "The raw weights after each step"
    order = 99
    def before_fit(self, learn): self.seen = []
    def after_step(self, learn): self.seen.append(copied(learn.model.state_dict()))


def test_01_no_swap_before_the_first_update():
    "Not: a row, a prediction, or a model at the end, of weights that were never trained"
    trail, cb = Trail(), EMACB(start='100ep')
    learn = learner(cb, BNUpdateCB(), trail)
    with pytest.warns(UserWarning, match='starts after this fit'): learn.fit(2)
    assert cb.average.n == 0 and [r['weights'] for r in learn.history] == ['raw']*4
    assert learn.weights == 'raw' and torch.equal(learn.model[0].weight, trail.seen[-1]['0.weight'])
    for look in (learn.apply, learn.validate, learn.get_preds):
        with pytest.raises(RuntimeError, match=r'call update\(\) first'): look('ema')
        assert learn.weights == 'raw' and torch.equal(learn.model[0].weight, trail.seen[-1]['0.weight'])
    assert cb.state_dict()['weights'] == {}


def test_02_raw_and_average_at_any_moment():
    "At every moment of a row of the average both are to be had, each under its own name"
    class Save(Callback):
        order = 99
        def after_batch(self, learn):
            if learn.weights != 'ema': return
            kept = copied(learn.model.state_dict())
            with learn.using('raw'): raw = copied(learn.model.state_dict())
            assert same(copied(learn.model.state_dict()), kept)           # the row goes on with the average
            saved.append((raw, copy.deepcopy(learn.averages['ema'].state_dict())))
    saved, trail = [], Trail()
    learn = learner(EMACB(decay=0.8), trail, Save())
    learn.fit(2)
    assert len(saved) == 10
    for i, (raw, state) in enumerate(saved):
        n = 10*(i//5 + 1)
        avg = trail.seen[0]['0.weight'].double()
        for w in trail.seen[1:n]: avg = 0.8*avg + 0.2*w['0.weight'].double()
        assert same(raw, trail.seen[n - 1]) and state['n'] == n
        torch.testing.assert_close(state['weights']['0.weight'].double(), avg, rtol=1e-5, atol=1e-6)


def test_03_what_is_saved_while_the_model_holds_the_average():
    "The state of an applied average is the average; what is loaded from it does not start from its own raw weights"
    model = one()
    avg = Average(model)
    for v in (0., 4.):
        nn.init.constant_(model.weight, v)
        avg.update()
    with avg.applied(): state, raw = copy.deepcopy(avg.state_dict()), copied(model.state_dict())
    assert (state['n'], state['weights']['weight'].item(), raw['weight'].item(), model.weight.item()) == (2, 2., 2., 4.)
    other = Average(model)
    other.load_state_dict(state)
    nn.init.constant_(model.weight, 11.)
    other.update()
    assert (other.n, other.weights['weight'].item()) == (3, 5.)            # (0 + 4 + 11)/3


@pytest.mark.parametrize('where', range(1, 9))
def test_04_raw_weights_come_back(where, monkeypatch):
    "Not even if an exchange fails half-way, as where memory runs out: neither the raw weights nor the average are mixed up"
    import fastswa.averaging.average as averaging
    model = net(norm=False)
    avg, real, calls = Average(model), averaging.exchange, []
    avg.update()
    with torch.no_grad():
        for p in model.parameters(): p += 1
    avg.update()
    raw, weights = copied(model.state_dict()), copied(avg.weights)
    def exchange(a, b):
        calls.append(1)
        if len(calls) == where <= 4: raise torch.OutOfMemoryError('no memory')
        real(a, b)
        if len(calls) == where - 4: raise torch.OutOfMemoryError('no memory')
    monkeypatch.setattr(averaging, 'exchange', exchange)
    with pytest.raises(torch.OutOfMemoryError), avg.applied(): pass
    if where <= 4:                                                         # nothing of the failing one was exchanged
        assert same(copied(model.state_dict()), raw) and same(copied(avg.weights), weights)
        monkeypatch.undo()
        with avg.applied(): assert same(copied(model.state_dict()), weights)
        avg.update()


def test_04_a_weight_that_cannot_be_written():
    "One number, expanded: torch refuses to write to it. The swap fails, and leaves no trace"
    m = nn.Linear(3, 4)
    m.scale = nn.Parameter(torch.ones(1).expand(5), requires_grad=False)
    m.last = nn.Parameter(torch.zeros(2))
    avg = Average(m)
    avg.update()
    with torch.no_grad():
        for p in (m.weight, m.bias, m.last): p += 1
    avg.update()
    raw, weights = copied(m.state_dict()), copied(avg.weights)
    for _ in range(2):
        with pytest.raises(RuntimeError, match='single memory location'), avg.applied(): pass
        assert same(copied(m.state_dict()), raw) and same(copied(avg.weights), weights)
    assert avg.update() == 3


CHANGES = dict(double=lambda m: m.double(), half=lambda m: m.half(),
               assign=lambda m: m.load_state_dict(copied(m.state_dict()), assign=True),
               data=lambda m: setattr(m.a.weight, 'data', m.a.weight.data.clone()),
               untied=lambda m: setattr(m.b, 'weight', nn.Parameter(m.b.weight.data.clone())),
               tied=lambda m: setattr(m.c, 'weight', m.a.weight))


@pytest.mark.parametrize('change', CHANGES)
def test_04_a_model_that_was_changed_while_it_held_the_average(change):
    "The raw weights come back into whatever tensors the model has then, each into its own; the average is as before"
    m = nn.Module()
    m.a, m.b, m.c, m.d = (nn.Linear(2, 2, bias=False) for _ in range(4))
    m.b.weight, m.norm = m.a.weight, nn.BatchNorm1d(2)
    avg = Average(m)
    avg.update()
    with torch.no_grad():
        for p in m.parameters(): p += torch.rand(p.shape)
    avg.update()
    raw, weights = copied(m.state_dict()), copied(avg.weights)
    with avg.applied(): CHANGES[change](m)
    for k, v in m.state_dict().items():
        if (change, k) != ('tied', 'c.weight'): assert torch.equal(v, raw[k].to(v.dtype)), k
    for k, v in avg.weights.items():
        if (change, k) != ('tied', 'c.weight'): torch.testing.assert_close(v, weights[k].to(v.dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.half])
def test_05_averages_of_half_precision(dtype):
    "500 snapshots of which the last 400 are 1: their mean is 0.8, and 0.57 if kept in bf16 (the control); loading keeps fp32, too"
    model, control = one(dtype=dtype), torch.zeros((), dtype=dtype)
    model.other = nn.Parameter(torch.zeros(2))                             # mixed dtypes, on which others raise
    avg = Average(model)
    for i in range(500):
        nn.init.constant_(model.weight, float(i >= 100))
        if i == 333:
            state, avg = copy.deepcopy(avg.state_dict()), Average(model)
            avg.load_state_dict(state)
        avg.update()
        control += (model.weight.detach()[0, 0] - control)/(i + 1)
    assert avg.weights['weight'].dtype is torch.float32 and avg.weights['weight'].item() == pytest.approx(0.8, abs=1e-5)
    if dtype is torch.bfloat16: assert abs(control.item() - 0.8) > 0.2


def test_06_every_k_steps_leaves_the_dead_zone():
    "From 1 towards 1.005: in fp32 a step of 5e-8 is none. A hundred steps at once, with decay^100, go all of the way"
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


def test_07_counters_are_copied():
    "torch's `use_buffers` averages them as integers, which stops at 1"
    model = nn.Sequential(nn.BatchNorm1d(1))
    avg, theirs = Average(model), AveragedModel(model, use_buffers=True)
    for _ in range(1000):
        model(torch.zeros(2, 1))
        avg.update()
        theirs.update_parameters(model)
    assert theirs.module[0].num_batches_tracked == 1 and '0.num_batches_tracked' not in avg.weights
    assert avg.module()[0].num_batches_tracked == 1000
    with avg.applied(): assert model[0].num_batches_tracked == 1000


def test_08_spectral_norm_vectors_are_copied():
    "The mean of unit vectors is shorter than 1, and the weights divided by it grow"
    torch.manual_seed(0)
    for make in (parametrizations.spectral_norm, nn.utils.spectral_norm):
        model = make(nn.Linear(4, 4))
        avg, opt = Average(model), optim.SGD(model.parameters(), 1.)
        for _ in range(20):
            nn.init.normal_(dict(model.named_parameters())[next(k for k in avg._chosen.tensors if 'orig' in k)])
            model(torch.randn(8, 4)).square().mean().backward()
            opt.step(), opt.zero_grad()
            avg.update()
        vectors = {k: v for k, v in model.state_dict().items() if k.endswith(('_u', '_v'))}
        assert vectors and not set(vectors) & set(avg.weights)
        alone = avg.module().state_dict()
        for k, v in vectors.items():
            assert torch.equal(alone[k], v) and v.norm().item() == pytest.approx(1, abs=1e-5)


def test_09_buffers_are_neither_stale_nor_shared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer('scale', torch.zeros(1))
    model = Net()
    avg = Average(model)
    avg.update()
    model.scale.fill_(3.)                                                  # after the update
    alone = avg.module()
    assert alone.scale == 3
    for t in (*alone.buffers(), *alone.parameters()): t.fill_(9)           # as recalibrating does
    assert model.scale == 3 and model.norm.running_mean.eq(0).all() and model.norm.num_batches_tracked == 0
    assert model.norm.weight.eq(1).all() and all(v.ne(9).all() for v in avg.weights.values())
    model.norm.running_mean.fill_(5)
    assert avg.weights['norm.running_mean'].eq(0).all()


def test_11_tied_in_part():
    "A head that is some rows of the embedding, and its transpose: each number is averaged once"
    m = nn.Module()
    m.embed = nn.Embedding(5, 2)
    nn.init.zeros_(m.embed.weight)
    m.head, m.back = nn.Parameter(m.embed.weight.data[:3]), nn.Parameter(m.embed.weight.data.t())
    avg = Average(m, ema(decay=0.9))
    avg.update()
    nn.init.ones_(m.embed.weight)
    avg.update()
    for k, v in avg.weights.items(): torch.testing.assert_close(v, torch.full_like(v, 0.1), msg=k)
    for _ in range(2):                                                     # one swap undoes the other, in every row
        with avg.applied():
            for p in m.parameters(): torch.testing.assert_close(p.detach(), torch.full_like(p, 0.1))
        for p in m.parameters(): assert p.eq(1).all()


def test_11_tied_and_with_gaps():
    "Two names for every second column, one of them transposed"
    m = nn.Module()
    m.w = nn.Parameter(torch.rand(4, 6)[:, ::2])
    m.t = nn.Parameter(m.w.data.t())
    avg = Average(m)
    avg.update()
    assert torch.equal(avg.weights['t'], avg.weights['w'].t()) and torch.equal(avg.weights['w'], m.w.detach())


class Accumulate(Callback):
    "A step each `k` batches, for the sum of their gradients"
    def __init__(self, k): self.k = k
    def after_backward(self, learn):
        if (learn.iter + 1) % self.k: raise CancelStepException


def test_12_accumulation():
    "Five steps in ten batches: five updates, and the decay is per step"
    trail, e, s = Trail(), EMACB(decay=0.8, apply=False), SWACB(start='0ba', every='2ba', apply=False)
    learner(trail, e, s, Accumulate(2), BNUpdateCB()).fit(2)
    assert len(trail.seen) == 10 and (e.average.n, s.average.n) == (10, 5)
    avg = trail.seen[0]['0.weight'].double()
    for w in trail.seen[1:]: avg = 0.8*avg + 0.2*w['0.weight'].double()
    torch.testing.assert_close(e.average.weights['0.weight'].double(), avg, rtol=1e-5, atol=1e-6)
    mean = torch.stack([w['0.weight'].double() for w in trail.seen[1::2]]).mean(0)
    torch.testing.assert_close(s.average.weights['0.weight'].double(), mean, rtol=1e-5, atol=1e-6)


class Scaled(TrainLearner):
    "Mixed precision's scaler, with an overflow in some batches"
    overflow = ()
    def backward(self):
        self.scaler.scale(self.loss).backward()
        if self.iter in self.overflow: self.model[0].weight.grad[0, 0] = math.inf
    def step(self):
        self.scaler.step(self.opt)
        self.scaler.update()


def test_13_a_step_that_the_scaler_skipped():
    "No snapshot then, and no step of the half-life either"
    trail, cb = Trail(), EMACB(decay=0.8, every='3ba', apply=False)
    learn = Scaled(net(), data(), F.cross_entropy, 0.3, [trail, cb])
    learn.scaler, learn.overflow = torch.amp.GradScaler('cpu', init_scale=8.), (0, 3, 4)
    learn.fit(1)
    assert learn.scaler.get_scale() == 1. and learn.opt_steps == len(trail.seen) == 7      # halved three times
    avg = 0.8**3*trail.seen[2]['0.weight'].double() + (1 - 0.8**3)*trail.seen[5]['0.weight'].double()
    assert cb.average.n == 2
    torch.testing.assert_close(cb.average.weights['0.weight'].double(), avg, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_14_one_warning(value):
    "Left out whole, counted, and said once; what comes after counts as if it had not been"
    model = nn.Sequential(one(), one())
    avg, good = Average(model), []
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for i in range(8):
            for m in model: nn.init.constant_(m.weight, float(i))
            if i in (0, 3, 4): nn.init.constant_(model[i % 2].weight, value)
            else: good.append(i)
            avg.update()
    assert (avg.n, avg.skipped, len(w)) == (5, 3, 1)
    for v in avg.weights.values(): assert v.item() == pytest.approx(np.mean(good))


def test_15_models_that_cannot_be_copied():
    "Only `module()` copies the model; averaging, swapping and saving do not"
    model = net()
    model.lock = threading.Lock()
    model.register_forward_hook(lambda m, i, o: model.lock.locked())
    with pytest.raises(TypeError): copy.deepcopy(model)
    avg = Average(model)
    avg.update(), avg.update()
    with avg.applied(): pass
    Average(model).load_state_dict(avg.state_dict())
    avg.copy_to(net())


@pytest.mark.parametrize('kept', ['attribute', 'list', 'dict', 'buffer'])
def test_15_cached_activations(kept):
    "An output of the last pass, with its graph, which deepcopy refuses"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            if kept == 'buffer': self.register_buffer('cache', None, persistent=False)
        def forward(self, x):
            h = self.layer(x)
            self.cache = dict(attribute=h, buffer=h, list=[h], dict=dict(h=h))[kept]
            return h
    model = Net()
    model(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match='deepcopy'): copy.deepcopy(model)
    avg = Average(model)
    avg.update()
    alone = avg.module()
    assert torch.equal(alone(torch.ones(1, 2)), model(torch.ones(1, 2)))


WRAPPERS = dict(compiled=torch.compile, parallel=nn.DataParallel, both=lambda m: nn.DataParallel(torch.compile(m)))


@pytest.mark.parametrize('wrap', WRAPPERS)
def test_16_wrapped_models(wrap):
    "Plain names, whichever of the two is wrapped; another architecture is an error in every place, and names what differs"
    wrap, model = WRAPPERS[wrap], net()
    avg = Average(wrap(model))
    avg.update(), avg.update(model), avg.update(wrap(copy.deepcopy(model)))
    assert avg.n == 3 and set(avg.weights) < set(model.state_dict())
    assert same(copied(avg.weights), {k: v for k, v in copied(model.state_dict()).items() if k in avg.weights})
    Average(net()).load_state_dict(avg.state_dict())
    avg.copy_to(wrap(net()))
    other = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4))
    state = Average(other)
    state.update()
    for wrong in (lambda: avg.update(other), lambda: avg.copy_to(wrap(other)), lambda: avg.load_state_dict(state.state_dict())):
        with pytest.raises(ValueError, match=r'3\.weight is missing'): wrong()
    assert avg.n == 3


@pytest.mark.parametrize('rule', [equal(), ema(decay=0.5)])
def test_18_inference_mode(rule):
    "Begun, loaded and swapped under it, an average can be updated, loaded into and swapped outside"
    model = net()
    avg = Average(model, rule)
    with torch.inference_mode():
        avg.update(), avg.update()
        with avg.applied(): pass
    state = copy.deepcopy(avg.state_dict())
    other = Average(model, rule)
    with torch.inference_mode(): other.load_state_dict(state)
    for a in (avg, other):
        assert not any(v.is_inference() for v in a.weights.values())
        for v in a.weights.values(): v.add_(0.)
        a.load_state_dict(state), a.update()
        with a.applied(): pass
        assert a.n == 3
    model.train()(torch.randn(4, 3)).sum().backward()


@pytest.mark.parametrize('rule', [ema(decay=0.9), ema(half_life=3), equal(), power(gamma=2), ema(decay=0.99, warmup='ratio')], ids=str)
def test_19_steps_of_any_rule(rule):
    "Where the weights stand still, one update of `steps=3` leaves of the average what three updates leave"
    def after(*calls):
        model = one()
        avg = Average(model, rule)
        avg.update(), avg.update()
        nn.init.constant_(model.weight, 1.)
        for steps in calls: avg.update(steps=steps)
        return avg.weights['weight'].item()
    if getattr(rule, 'constant', False): assert after(3, 2) == pytest.approx(after(1, 1, 1, 1, 1), rel=1e-5)
    else: assert after(1) == pytest.approx(rule(2), rel=1e-6)


def test_20_the_start_counts_no_more_than_it_should():
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


def test_21_the_count_is_an_int():
    avg = Average(net())
    assert type(avg.update()) is type(avg.n) is type(avg.skipped) is type(avg.state_dict()['n']) is int


STALE = dict(
    double=lambda m: m.double(), half=lambda m: m.half(), channels_last=lambda m: m.to(memory_format=torch.channels_last),
    assign=lambda m: m.load_state_dict(copied(m.state_dict()), assign=True),
    data=lambda m: setattr(m.conv.weight, 'data', m.conv.weight.data*2),
    transposed=lambda m: setattr(m.square.weight, 'data', m.square.weight.data.t()), moved=lambda m: m.to('meta').to_empty(device='cpu'),
    module=lambda m: setattr(m, 'square', nn.Linear(4, 4)), parameter=lambda m: setattr(m.norm, 'bias', nn.Parameter(torch.ones(3))),
    buffer=lambda m: setattr(m.norm, 'running_mean', torch.ones(3)), untied=lambda m: setattr(m, 'twin', nn.Linear(4, 4)),
    tied=lambda m: setattr(m, 'square', m.twin), frozen=lambda m: m.requires_grad_(False), shared=lambda m: m.share_memory())


@pytest.mark.parametrize('change', STALE)
@pytest.mark.parametrize('several', [False, True])
def test_22_tensors_exchanged_at_any_time(change, several):
    "Between the second and the third of six snapshots: not one of them may come from tensors that the model no longer has"
    torch.manual_seed(0)
    m = nn.Module()
    m.conv, m.norm, m.square = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 4)
    m.twin = m.square
    avs, seen = [Average(m)] + [Average(m, ema(decay=0.5)) for _ in range(several)], []
    for i in range(6):
        if i == 2: STALE[change](m)
        with torch.no_grad():
            for t in (*m.parameters(), m.norm.running_mean, m.norm.running_var): t.copy_(torch.randn(t.shape))
        update_all(avs) if several else avs[0].update()
        seen.append({k: v.double().clone() for k, v in m.state_dict().items() if v.is_floating_point()})
    for k, v in avs[0].weights.items():
        if (change, k) == ('tied', 'square.weight') or (change, k) == ('tied', 'square.bias'): continue
        torch.testing.assert_close(v.double(), torch.stack([s[k] for s in seen]).mean(0), rtol=2e-3, atol=2e-3, msg=k)
    raw = copied(m.state_dict())
    with avs[0].applied(): assert not same(copied(m.state_dict()), raw)
    assert same(copied(m.state_dict()), raw)


def test_22_copies_of_an_average_follow_their_own_model():
    "deepcopy and pickle take the model along; together with the original, each has to be updated from its own"
    model = one()
    avg = Average(model)
    avg.update()
    for other in (copy.deepcopy(avg), pickle.loads(pickle.dumps(avg))):
        for v in (8., 4.):
            nn.init.constant_(other.source.weight, v)
            update_all([avg, other])
        assert other.weights['weight'].item() == 4 and avg.weights['weight'].item() == 0      # (0 + 8 + 4)/3


def test_23_the_default_fits_a_short_run():
    "From 10 to about 0 in 100 steps: a decay of 0.999 is still far away, the default is where the raw weight is"
    x = torch.linspace(-1, 1, 400).view(-1, 1)
    dls = SimpleNamespace(train=DataLoader(TensorDataset(x, torch.zeros_like(x)), 8, shuffle=True), valid=None)
    model = one(10.)
    default, usual = EMACB(apply=False), EMACB(decay=0.999, name='usual', apply=False)
    TrainLearner(model, dls, lr=0.1, cbs=[default, usual]).fit(2)
    far = [abs(w) for w in (model.weight.item(), default.average.weights['weight'].item(), usual.average.weights['weight'].item())]
    assert far[0] < far[1] < 0.3 and far[2] > 5


@pytest.mark.parametrize('make, value', [
    (lambda v: ema(decay=v), 1.0001), (lambda v: ema(decay=v), -1e-9), (lambda v: ema(decay=v), math.nan), (lambda v: ema(decay=v), '0.9'),
    (lambda v: ema(half_life=v), 0), (lambda v: ema(half_life=v), -3), (lambda v: ema(half_life=v), math.inf),
    (lambda v: ema(half_life=v), math.nan),
    (lambda v: ema(half_life=v), '5'), (lambda v: ema(warmup=v), 'linear'), (lambda v: power(gamma=v), -1), (lambda v: power(gamma=v), 'x'),
    (lambda v: power(sigma_rel=v), 0.2887), (lambda v: power(sigma_rel=v), 0), (lambda v: power(sigma_rel=v), '0.1'),
    (lambda v: EMACB(decay=v), 1.5), (lambda v: EMACB(half_life=v), '0ba'), (lambda v: EMACB(every=v), '-1ba'),
    (lambda v: EMACB(start=v), '2dur'),
    (lambda v: SWACB(every=v), '0ep'), (lambda v: SWACB(swa_lr=v), 0), (lambda v: BNUpdateCB(n_batches=v), 0)])
def test_26_values_out_of_range(make, value):
    "Refused where they are given, and the message holds the value"
    with pytest.raises(ValueError, match=re.escape(str(value))): make(value)


@pytest.mark.parametrize('steps', [0, -1, math.nan, math.inf, None, '2'])
@pytest.mark.parametrize('first', [False, True])
def test_26_steps_out_of_range(steps, first):
    "-1 moves the average away from the weights, 0 counts a snapshot that is not in it"
    model = one()
    avg = Average(model, ema(decay=0.5))
    if not first: avg.update()
    n = avg.n
    nn.init.constant_(model.weight, 1.)
    for update in (lambda: avg.update(steps=steps), lambda: update_all([avg], steps=[steps]), lambda: avg.update(one(), steps=steps)):
        with pytest.raises((ValueError, TypeError)): update()
        assert avg.n == n and (first or avg.weights['weight'].item() == 0)


@pytest.mark.parametrize('steps', [[1], [1, 1, 1]])
def test_26_as_many_steps_as_averages(steps):
    "Too few of them would leave the last averages without this snapshot"
    avs = [Average(one()), Average(one())]
    with pytest.raises(ValueError): update_all(avs, steps=steps)
    assert [a.n for a in avs] == [0, 0]


@pytest.mark.parametrize('weight', [None, math.nan, 2, -0.1, torch.tensor(0.5), '0.5', 1j, math.inf])
@pytest.mark.parametrize('elsewhere', ['one model', 'another', 'another dtype', 'unchecked'])
def test_26_weights_out_of_range(weight, elsewhere):
    "What a rule gives is checked before anything moves, in all averages that are updated together"
    model, other = one(), one()
    kw = dict(dtype=torch.float64) if elsewhere == 'another dtype' else dict(check_finite=False) if elsewhere == 'unchecked' else {}
    good, bad = Average(model), Average(other if elsewhere == 'another' else model, lambda n: weight, **kw)
    update_all([good, bad])
    nn.init.constant_(model.weight, 1.), nn.init.constant_(other.weight, 1.)
    for order in ([good, bad], [bad, good]):
        with pytest.raises(ValueError, match='must be a number between 0 and 1'): update_all(order)
        assert [a.n for a in order] == [1, 1] and all(a.weights['weight'].item() == 0 for a in order)


def test_26_an_average_that_is_applied_stops_all():
    "The others have not moved when the error comes"
    model, other = one(), one()
    a, b = Average(model), Average(other)
    update_all([a, b])
    with b.applied(), pytest.raises(RuntimeError, match='applied'): update_all([a, b])
    assert (a.n, b.n) == (1, 1)


def test_26_a_real_dtype_for_complex_weights():
    "It would drop the imaginary part, and the swap would write that into the model"
    model = nn.ParameterDict(dict(c=nn.Parameter(torch.full((2,), 1 + 2j)), r=nn.Parameter(torch.ones(2))))
    try: avg = Average(model, dtype=torch.float64)
    except (ValueError, TypeError): return
    avg.update()
    assert avg.weights['c'].dtype is torch.complex128 and torch.equal(avg.weights['c'], torch.full((2,), 1 + 2j, dtype=torch.complex128))
