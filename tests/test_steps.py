"""Between the loss and the step: accumulation, mixed precision, clipping, guards, closures, alone and together"""
import contextlib, io, os
from functools import partial
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn, optim
from torch.optim import lr_scheduler

from fastswa.callbacks.basics import RecorderCB
from fastswa.training.sandbox import prepared_batches
from fastswa.training.events import Callback
from fastswa.callbacks.speed import CompileCB, MixedPrecisionCB
from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.training.events import CancelBatchException, CancelEpochException, CancelFitException
from fastswa.training.learner import Learner, MomentumLearner, TrainCB, TrainLearner
from fastswa.callbacks.schedule import BatchSchedCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB
from fastswa.callbacks.steps import ClosureCB, GradAccumCB, GradClipCB, NaNGuardCB
from helpers import image_learner, in_new_process


def data(sizes, dtype=torch.double, seed=0):
    g = torch.Generator().manual_seed(seed)
    x,y = torch.randn(sum(sizes), 3, generator=g, dtype=dtype),torch.randint(3, (sum(sizes),), generator=g)
    return list(zip(x.split(sizes), y.split(sizes)))


def net(dtype=torch.double):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def trained(batches, *cbs, n=1, dtype=torch.double, cls=TrainLearner, opt_func=partial(optim.SGD, momentum=0.9),
            lr=0.1):
    learn = cls(net(dtype), SimpleNamespace(train=batches, valid=batches[:1]), F.cross_entropy, lr, cbs, opt_func)
    learn.fit(n, valid=False)
    return learn


def vec(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4), st.booleans())
def test_accumulation_is_one_large_batch(sizes, k, by_samples):
    """Batches of any sizes, with a shorter window at the end (Lightning#19987)

    Wrong: each micro-batch counts the same, or the tail is divided by k"""
    batches = data(sizes)
    cb = GradAccumCB(samples=4*k) if by_samples else GradAccumCB(k)
    windows,now = [],[]
    for b in batches:
        now.append(b)
        if (sum(len(y) for _, y in now) >= 4*k) if by_samples else len(now) == k: windows,now = [*windows, now],[]
    large = [tuple(torch.cat(o) for o in zip(*w)) for w in [*windows, now] if w]
    small = trained(batches, cb, n=2)
    torch.testing.assert_close(vec(small), vec(trained(large, n=2)), rtol=1e-12, atol=1e-14)
    assert small.opt_steps == 2*len(large)


def test_schedule_and_ema_under_accumulation():
    "They move once a step, over as many steps as the fit has. Wrong: the schedule ends after a third, or never does"
    rates,ema = RecorderCB(lr=lambda cb: cb.pg['lr']),EMACB(decay=0.5, apply=False)
    sched = BatchSchedCB(partial(lr_scheduler.OneCycleLR, max_lr=0.1))
    learn = trained(data([4]*8), sched, GradAccumCB(3), rates, ema, n=2)
    opt = optim.SGD([torch.zeros(1, requires_grad=True)], 0.1, momentum=0.9)
    ref,steps = lr_scheduler.OneCycleLR(opt, 0.1, total_steps=6),[]
    for _ in range(6):
        steps.append(opt.param_groups[0]['lr'])
        opt.step()
        ref.step()
    assert rates.recs['lr'] == [steps[i] for i in (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5)]
    assert learn.opt_steps == ema.average.n == 6


class OverflowAt(Callback):
    "Gradients that are infinite in one batch, as an overflow of fp16 makes them"
    order = 26.5                                             # after the scale was put into the gradients' way
    def __init__(self, *batches): self.batches = batches
    def after_loss(self, learn):
        if learn.training and learn.iter in self.batches: learn.loss.register_hook(lambda g: g*float('inf'))


def test_a_skipped_step_moves_neither_schedule_nor_average():
    "pytorch#67590, accelerate#4243. Wrong: the rate goes on, the decay is applied, the bad gradients stay"
    rates,ema = RecorderCB(lr=lambda cb: cb.pg['lr']),EMACB(decay=0.5, apply=False)
    amp,halved = MixedPrecisionCB('fp16', init_scale=4.),partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)
    batches = data([4]*6, torch.float)
    learn = trained(batches, amp, OverflowAt(1, 2), BatchSchedCB(halved), rates, ema, dtype=torch.float)
    np.testing.assert_allclose(rates.recs['lr'], [0.1, 0.05, 0.05, 0.05, 0.025, 0.0125])
    assert (learn.opt_steps, ema.average.n, amp.skipped, amp.scale) == (4, 4, 2, 1.)
    plain = trained([b for i, b in enumerate(batches) if i not in (1, 2)], MixedPrecisionCB('fp16', init_scale=4.),
                    BatchSchedCB(halved), dtype=torch.float)
    assert torch.equal(vec(learn), vec(plain))


def test_fp16_that_never_becomes_finite_ends():
    "Wrong: every step is skipped until the end of the fit, in silence"
    with pytest.raises(FloatingPointError, match='although the loss is scaled by'):
        trained(data([2]*40, torch.float), MixedPrecisionCB('fp16', init_scale=4.), OverflowAt(*range(40)),
                dtype=torch.float)


def test_unscale_clip_step():
    "The norm that is clipped is that of the true gradient (Lightning#9599). Wrong: a scale of 65536 clips everything"
    clip = GradClipCB(norm=100.)
    a = trained(data([8]*3, torch.float), clip, MixedPrecisionCB('fp16', init_scale=2.**16), dtype=torch.float)
    b = trained(data([8]*3, torch.float), MixedPrecisionCB('fp16', init_scale=2.**16), dtype=torch.float)
    assert torch.equal(vec(a), vec(b)) and 0 < clip.grad_norm < 10


@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
def test_autocast_as_by_hand(dtype):
    "The same weights as torch's own recipe"
    batches,amp_dtype = data([8]*5, torch.float),dict(bf16=torch.bfloat16, fp16=torch.float16)[dtype]
    learn = trained(batches, MixedPrecisionCB(dtype), dtype=torch.float)
    model = net(torch.float)
    opt,scaler = optim.SGD(model.parameters(), 0.1, momentum=0.9),torch.amp.GradScaler('cpu', enabled=dtype == 'fp16')
    for x, y in batches:
        with torch.autocast('cpu', amp_dtype): loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert torch.equal(vec(learn), torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_autocast_where_batches_are_prepared():
    "BatchNorm statistics of an average are those of half-precision activations, and autocast does not outlive the look"
    seen = []
    class Look(nn.Module):
        def forward(self, x):
            seen.append((torch.is_autocast_enabled('cpu'), self.training))
            return x
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), Look(), nn.Linear(5, 3))
    batches = data([8]*4, torch.float)
    learn = TrainLearner(model, SimpleNamespace(train=batches, valid=batches), F.cross_entropy, 0.1,
                         [MixedPrecisionCB(), EMACB(0.5), BNUpdateCB()])
    learn.fit(1)
    learn.get_preds('ema')
    learn.validate()
    assert {*seen} == {(True, True), (True, False)} and not torch.is_autocast_enabled('cpu')
    for batch in prepared_batches(learn, batches): break                           # left in the midst of it
    del batch
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('where', ['predict', 'loss', 'backward'])
def test_autocast_ends_with_an_error(where):
    class Fails(TrainLearner):
        def predict(self): super().predict(); self.fails('predict')
        def get_loss(self): super().get_loss(); self.fails('loss')
        def backward(self): super().backward(); self.fails('backward')
        def fails(self, here):
            if where == here: raise RuntimeError(here)
    with pytest.raises(RuntimeError, match=where):
        trained(data([4], torch.float), MixedPrecisionCB(), cls=Fails, dtype=torch.float)
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('exc', [ZeroDivisionError(), KeyboardInterrupt(), CancelFitException(),
                                 CancelBatchException()], ids=repr)
@pytest.mark.parametrize('where', ['before_batch', 'after_predict', 'after_loss', 'after_batch', 'model', 'loss'])
def test_autocast_ends_with_the_batch(where, exc, training):
    "Whatever is raised between its beginning and its end, in a fit, in a look and in a search"
    class Fails(Callback):
        order, prepares, raised = 90, True, 0
        def before_fit(self, learn): pass      # else nothing would call it where it is called by model or loss
        def go(self, learn):
            if learn.training == training and learn.iter == 1 and not Fails.raised:
                Fails.raised = 1
                raise exc
    if '_' in where: setattr(Fails, where, Fails.go)
    for go in (lambda: learn.fit(1), lambda: learn.get_preds(), lambda: learn.lr_find(max_steps=4, show=False)):
        Fails.raised, learn = 0, image_learner(MixedPrecisionCB(), cb := Fails())
        if where == 'model': learn.model[4].register_forward_hook(lambda m, inp, out: cb.go(learn))
        if where == 'loss': learn.loss_func = lambda *args: cb.go(learn) or F.cross_entropy(*args)
        try: go()
        except (ZeroDivisionError, KeyboardInterrupt): assert Fails.raised
        assert not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()


class SAM(optim.Optimizer):
    "As davda54's: gradients are there; the closure is for the second evaluation, at other weights"
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))
        self.base = optim.SGD(self.param_groups, lr, momentum=0.9)
        self.param_groups = self.base.param_groups
    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]['params']:
            self.state[p]['e'] = e = 0.05*p.grad/p.grad.norm()
            p.data.add_(e)                                   # without a version that could be compared
    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]['params']: p.data.sub_(self.state[p]['e'])
        self.base.step()
    def step(self, closure):
        self.first_step()
        self.zero_grad()
        closure()
        self.second_step()


class KeepsGrads(SAM):
    "Leaves it to the closure to drop the first gradients"
    def step(self, closure):
        self.first_step()
        closure()
        self.second_step()


class TwoClosures(SAM):
    "Asks for the first gradients too"
    def step(self, closure):
        closure()
        self.first_step()
        closure()
        self.second_step()


class DropsFirst(TwoClosures):
    def step(self, closure):
        self.zero_grad()
        return super().step(closure)


class NamedOtherwise(optim.SGD):
    def step(self, objective): return super().step(objective)


@pytest.mark.parametrize('opt', [partial(optim.LBFGS, max_iter=2), SAM, TwoClosures, NamedOtherwise,
                                 lambda ps, lr: Passes(optim.LBFGS(ps, lr))])
def test_an_optimizer_that_needs_a_closure_asks_for_it(opt):
    "Wrong: TypeError about a missing argument of step(), or weights that have moved"
    learn = image_learner(opt_func=opt)
    before = [p.clone() for p in learn.model.parameters()]
    says = 'the step of .* needs its argument (closure|objective): add ClosureCB'
    with pytest.raises(TypeError, match=says): learn.fit(1)
    assert all(map(torch.equal, before, learn.model.parameters()))


class Passes:
    "A wrapper that calls the step of what is inside without anything"
    def __init__(self, opt): self.opt = opt
    def step(self): self.opt.step()
    def zero_grad(self): self.opt.zero_grad()


def test_other_type_errors_of_a_step_stay():
    class Broken(optim.SGD):
        def step(self, closure=None): len()
    with pytest.raises(TypeError, match=r'len\(\) takes exactly one argument'): image_learner(opt_func=Broken).fit(1)


class Inside(optim.Optimizer):
    "As accelerate's wrapper: hooks that never fire, and an optimizer that passes the closure on"
    def __init__(self, params, lr): self.optimizer = TwoClosures(params, lr)
    param_groups = property(lambda self: self.optimizer.param_groups)
    def zero_grad(self, set_to_none=True): self.optimizer.zero_grad()
    def step(self, closure=None): self.optimizer.step(closure)


@pytest.mark.parametrize('opt_func, first', [
    (SAM, True), (KeepsGrads, True), (TwoClosures, False), (DropsFirst, True), (Inside, False),
    (partial(optim.LBFGS, max_iter=3), False)])
def test_closures_as_in_a_loop_by_hand(opt_func, first):
    """`first`: the loop has gradients before it calls `step`

    Wrong: the evaluation at the weights before the step serves as that at other weights: SAM climbs the loss"""
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3)).double()
    batches,losses = data([8]*4),[]
    learn = TrainLearner(model(), SimpleNamespace(train=batches), F.cross_entropy, 0.1, [ClosureCB()], opt_func)
    torch.manual_seed(1)
    learn.fit(2, valid=False)
    m = model()
    opt = opt_func(m.parameters(), 0.1)
    torch.manual_seed(1)
    for x, y in 2*batches:
        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(m(x), y)
            loss.backward()
            losses.append(loss.item())
            return loss
        n = len(losses)
        if first: closure()
        with torch.enable_grad(): opt.step(torch.enable_grad()(closure))
        opt.zero_grad()
        del losses[n + 1:]
    for a, b in zip(learn.model.state_dict().values(), m.state_dict().values()): assert torch.equal(a, b)
    assert learn.opt_steps == 8
    np.testing.assert_allclose([r['loss'] for r in learn.history], np.reshape(losses, (2, 4)).mean(1))


def test_an_optimizer_whose_step_takes_no_closure():
    "Wrong: a TypeError of torch's in the first batch"
    class Bare(optim.SGD):
        def step(self): super().step()
    with pytest.raises(TypeError, match='the step of Bare takes no closure: leave ClosureCB out'):
        trained(data([4]), ClosureCB(), opt_func=lambda ps, lr: Bare(ps, lr))


class Words(nn.Module):
    "Sparse gradients in one layer, dense ones in another"
    def __init__(self, sparse=True, **kw):
        super().__init__()
        torch.manual_seed(0)
        self.e,self.l = nn.Embedding(20, 4, sparse=sparse, **kw),nn.Linear(4, 1)
    def forward(self, x): return self.l(self.e(x).mean(1))


def words(sparse, *cbs, loss=F.mse_loss, n=6, **kw):
    "A learner of batches in which words come twice"
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randint(20, (3, 5), generator=g), torch.randn(3, 1, generator=g)*10) for _ in range(n)]
    learn = TrainLearner(Words(sparse, **kw), SimpleNamespace(train=batches, valid=batches), loss, 0.1, cbs)
    learn.fit(2, valid=False)
    return learn


@pytest.mark.parametrize('cbs', [
    lambda: [GradClipCB(norm=0.5), NaNGuardCB()], lambda: [GradClipCB(value=0.01)],
    lambda: [GradClipCB(norm=0.1, norm_type=float('inf')), GradAccumCB(4), EMACB(0.5, apply=False)]])
def test_sparse_gradients_as_dense_ones(cbs):
    "Wrong: NotImplementedError of a torch kernel in the first batch, or words that come twice count as two"
    a,b = words(True, *(mine := cbs())),words(False, *(other := cbs()))
    torch.testing.assert_close(vec(a), vec(b))
    if mine[0].norm: torch.testing.assert_close(mine[0].grad_norm, other[0].grad_norm)
    if 'ema' in a.averages:
        torch.testing.assert_close(dict(a.averages['ema'].weights), dict(b.averages['ema'].weights))


def test_a_sparse_gradient_that_is_not_finite():
    def spoil(preds, y):
        if len(seen) in (1, 4): preds.register_hook(lambda g: g*float('inf'))
        seen.append(1)
        return F.mse_loss(preds, y)
    seen,guard = [],NaNGuardCB()
    learn = words(True, guard, loss=spoil)
    assert guard.skipped == 2 and learn.opt_steps == 10 and vec(learn).isfinite().all()
    seen,n = [],NaNGuardCB(0)
    with pytest.raises(FloatingPointError, match='the gradient of e.weight, l.weight, l.bias was not finite'):
        words(True, n, loss=spoil)


def test_a_window_of_sparse_gradients_is_saved(tmp_path):
    "In the midst of it. Wrong: the file cannot be written, or read"
    class Save(Callback):
        order = 99
        def after_batch(self, learn):
            if learn.iter == 3: learn.save(tmp_path/f'{learn.epoch}.pt')
    def go(**kwargs):
        learn = TrainLearner(Words(), SimpleNamespace(train=batches), F.mse_loss, 0.1, [GradAccumCB(3), Save()])
        learn.fit(2, valid=False, **kwargs)
        return vec(learn)
    batches = [(torch.arange(6).view(2, 3) + i, torch.ones(2, 1)) for i in range(5)]
    whole = go()
    for epoch in 0, 1: assert torch.equal(go(resume=tmp_path/f'{epoch}.pt'), whole)


class Writes(nn.Module):
    "Buffers that a forward pass replaces by others, fills, and changes"
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(3))
        self.register_buffer('last', None)
        self.register_buffer('calls', torch.zeros(()))
    def forward(self, x):
        self.mean = 0.9*self.mean + 0.1*x.detach().mean(0)
        self.last = x.detach()[0]
        self.calls += 1
        return x - self.mean


def test_a_skipped_batch_leaves_what_a_forward_pass_writes():
    "Wrong: `mean` is NaN for ever, since the guard put the values back into a tensor that is not the buffer any more"
    def run(bad):
        batches = data([4]*6, torch.float)
        for i in bad: batches.insert(i, (batches[0][0]*torch.nan, batches[0][1]))
        learn = TrainLearner(nn.Sequential(Writes(), net(torch.float)), SimpleNamespace(train=batches), F.cross_entropy,
                             0.1, NaNGuardCB())
        learn.fit(1, valid=False)
        return learn.model.state_dict()
    for a, b in ((run([0, 3]), run([])),): assert [*a] == [*b] and all(torch.equal(a[k], b[k]) for k in a)


def test_a_skipped_batch_leaves_the_weights_of_an_embedding():
    "`max_norm` shrinks them in the forward pass. Wrong: those of words in the bad batch are shrunk"
    class Bad(Callback):
        def after_predict(self, learn): learn.preds = learn.preds*float('nan')
    start = vec(SimpleNamespace(model=Words(max_norm=0.5)))
    for sparse in True, False:
        learn = words(sparse, Bad(), NaNGuardCB(99), max_norm=0.5)
        assert learn.opt_steps == 0 and torch.equal(vec(learn), start)


def test_the_parameters_of_a_loss_are_clipped_guarded_and_accumulated():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.zeros((), dtype=torch.double))
        def forward(self, preds, y): return F.cross_entropy(preds*self.s.exp(), y)
    def run(batches, *cbs):
        learn = TrainLearner(net(), SimpleNamespace(train=batches), Loss(), 0.1, cbs)
        learn.fit(1, valid=False)
        return torch.cat([vec(learn), learn.loss_func.s.detach()[None]])
    batches = data([4]*6)
    large = [tuple(torch.cat(o) for o in zip(*batches[i:i + 3])) for i in (0, 3)]
    torch.testing.assert_close(run(batches, GradAccumCB(3)), run(large), rtol=1e-12, atol=1e-14)
    clip = GradClipCB(norm=1e-3)
    start = torch.cat([vec(SimpleNamespace(model=net())), torch.zeros(1)])
    assert (run(batches[:1], clip) - start).norm().item() == pytest.approx(1e-4, rel=1e-3)
    bad = [(batches[0][0]*float('nan'), batches[0][1]), *batches]
    assert torch.equal(run(bad, NaNGuardCB()), run(batches))


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 4))
def test_accumulation_weighed_by_tokens_is_one_large_batch(lengths, k):
    """The loss is the mean over tokens that are not padding; every batch has 2 sequences

    Wrong: each batch counts by its sequences, so that a token in a short one counts more (transformers#34191)"""
    g = torch.Generator().manual_seed(0)
    batches = []
    for n in lengths:
        y = torch.randint(3, (2, 9), generator=g)
        y[0, n:] = y[1, 1:] = -100
        batches.append((torch.randn(2, 9, 3, generator=g, dtype=torch.double), y))
    def loss(preds, y): return F.cross_entropy(preds.flatten(0, 1), y.flatten(), ignore_index=-100)
    def run(batches, *cbs):
        learn = TrainLearner(net(), SimpleNamespace(train=batches), loss, 0.1, cbs, partial(optim.SGD, momentum=0.9))
        learn.fit(2, valid=False)
        return vec(learn)
    large = [tuple(torch.cat(o) for o in zip(*batches[i:i + k])) for i in range(0, len(batches), k)]
    got = run(batches, GradAccumCB(k, weight=lambda batch: (batch[1] != -100).sum()))
    torch.testing.assert_close(got, run(large), rtol=1e-12, atol=1e-14)


def test_a_batch_must_count_for_something():
    with pytest.raises(ValueError, match='weight must be a number above 0; got 0.0'):
        trained(data([4]), GradAccumCB(2, weight=lambda batch: 0))
    for wrong in None, 'many', torch.ones(2), {}:
        with pytest.raises(ValueError, match='weight must be a number above 0; got '):
            trained(data([4]), GradAccumCB(2, weight=lambda batch: wrong))


def everything():
    return [MixedPrecisionCB('fp16'), GradAccumCB(samples=7), GradClipCB(value=0.05), NaNGuardCB(),
            BatchSchedCB(partial(lr_scheduler.StepLR, step_size=2))]


@pytest.mark.parametrize('order', [*permutations(range(5))][3::17])
@pytest.mark.parametrize('cls, more', [(TrainLearner, []), (Learner, [TrainCB()])])
def test_the_order_in_the_list_does_not_matter(order, cls, more):
    batches,cbs = data([3, 4, 2, 5, 1], torch.float),everything()
    learn = trained(batches, *more, *(cbs[i] for i in order), cls=cls, n=2, dtype=torch.float)
    assert torch.equal(vec(learn), vec(trained(batches, *everything(), n=2, dtype=torch.float)))


@pytest.mark.parametrize('cbs, words', [
    ([ClosureCB(), MixedPrecisionCB()], 'ClosureCB does not go with MixedPrecisionCB'),
    ([ClosureCB(), GradClipCB(norm=1.), NaNGuardCB()], 'ClosureCB does not go with GradClipCB, NaNGuardCB'),
])
def test_combinations_that_cannot_work(cbs, words):
    with pytest.raises(ValueError, match=words): trained(data([4], torch.float), *cbs, dtype=torch.float)


@pytest.mark.parametrize('cb', [GradAccumCB(2), MixedPrecisionCB('fp16'), ClosureCB()])
def test_momentum_in_the_gradients_is_refused(cb):
    with pytest.raises(ValueError, match=f'{type(cb).__name__} does not go with MomentumLearner'):
        trained(data([4], torch.float), cb, cls=MomentumLearner, opt_func=optim.SGD, dtype=torch.float)


def test_an_epoch_cut_short_leaves_no_gradients():
    "Wrong: half a window of the cancelled epoch goes into the first step of the next"
    class Cut(Callback):
        def after_batch(self, learn):
            if learn.training and learn.epoch == 0 and learn.iter == 3: raise CancelEpochException
    batches = data([4]*6)
    learn = trained(batches, GradAccumCB(3), Cut(), n=2, opt_func=optim.SGD)
    ref = trained(batches[:3], GradAccumCB(3), opt_func=optim.SGD)
    ref.dls = SimpleNamespace(train=batches, valid=None)
    ref.fit(1)
    torch.testing.assert_close(vec(learn), vec(ref), rtol=0, atol=0)


@pytest.mark.slow
def test_really_compiled():
    "By inductor: the same run within rounding, plain names"
    batches = data([8]*4, torch.float)
    learn = trained(batches, CompileCB(), EMACB(0.5, apply=False), dtype=torch.float)
    torch.testing.assert_close(vec(learn), vec(trained(batches, dtype=torch.float)), rtol=1e-4, atol=1e-5)
    assert [*learn.averages['ema'].weights] == [*net().state_dict()]


def test_early_stopping_leaves_averages_and_rows_whole():
    "The epoch in which it is decided has all its rows, and the model holds the average"
    stop = EarlyStoppingCB('ema/loss', patience=1, min_delta=10.)
    batches = data([8]*3, torch.float)
    learn = TrainLearner(net(torch.float), SimpleNamespace(train=batches, valid=batches), F.cross_entropy, 0.1,
                         [EMACB(0.5), stop])
    with contextlib.redirect_stdout(io.StringIO()) as out: learn.fit(20)
    assert [(r['train'], r['weights']) for r in learn.history] == [('train', 'raw'), ('eval', 'raw'), ('eval', 'ema')]*2
    assert learn.weights == 'ema' and 'early stopping: ema/loss has not been better than' in out.getvalue()


def test_memory_does_not_grow():
    """100 epochs with the usual callbacks: the process is no larger than after 20

    Wrong: losses, graphs, files or figures that stay"""
    script = '''
        import contextlib, io, torch, torch.nn.functional as F
        from types import SimpleNamespace
        from torch import nn, optim
        from torcheval.metrics import MulticlassAccuracy
        from fastswa.callbacks.basics import DeviceCB
        from fastswa.callbacks.metrics import MetricsCB
        from fastswa.checkpoint.checkpoint import CheckpointCB
        from fastswa.training.learner import TrainLearner
        from fastswa.callbacks.loggers import LogCB
        from fastswa.callbacks.speed import MixedPrecisionCB
        from fastswa.callbacks.progress import ProgressCB
        from fastswa.callbacks.swa import BNUpdateCB
        from fastswa.callbacks.swa import EMACB, SWACB
        from fastswa.callbacks.steps import GradAccumCB, GradClipCB
        import tempfile
        torch.set_num_threads(1)
        x,y = torch.randn(64, 1, 8, 8),torch.randint(4, (64,))
        batches = list(zip(x.split(32), y.split(32)))
        model = nn.Sequential(nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64*36, 4))
        sizes = []
        class Size(DeviceCB):
            order = 99
            def before_batch(self, learn): pass
            def after_epoch(self, learn):
                if learn.training: sizes.append(int(open('/proc/self/statm').read().split()[1])*4096)
        class Null:
            def log(self, d): pass
        cbs = [DeviceCB('cpu'), MetricsCB(accuracy=MulticlassAccuracy()), ProgressCB(), EMACB(), SWACB(), BNUpdateCB(),
               Size('cpu'), GradAccumCB(2), GradClipCB(norm=1.), MixedPrecisionCB(), LogCB(Null()),
               CheckpointCB(tempfile.mkdtemp(), '10ep', 1)]
        dls = SimpleNamespace(train=batches, valid=batches[:1])
        learn = TrainLearner(model, dls, F.cross_entropy, 0.01, opt_func=optim.AdamW, cbs=cbs)
        with contextlib.redirect_stdout(io.StringIO()): learn.fit(100)
        print(sizes[19], sizes[99])
    '''
    before, after = map(int, in_new_process(script, {**os.environ, 'OMP_NUM_THREADS': '1'}).split())
    assert after < 1.009*before, f'{before/1e6:.1f} MB after 20 epochs, {after/1e6:.1f} MB after 100'
