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
from fastswa.callbacks.metrics import EarlyStoppingCB
from fastswa.training.events import CancelBatchException, CancelEpochException, CancelFitException
from fastswa.training.learner import Learner, MomentumLearner, TrainCB, TrainLearner
from fastswa.callbacks.schedule import BatchSchedCB
from fastswa.callbacks.swa import BNUpdateCB
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
    """200 epochs with the usual callbacks: the process is no larger than after 20

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
        batches = list(zip(x.split(16), y.split(16)))
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
        dls = SimpleNamespace(train=batches, valid=batches)
        learn = TrainLearner(model, dls, F.cross_entropy, 0.01, opt_func=optim.AdamW, cbs=cbs)
        with contextlib.redirect_stdout(io.StringIO()): learn.fit(200)
        print(sizes[19], sizes[199])
    '''
    before, after = map(int, in_new_process(script, {**os.environ, 'OMP_NUM_THREADS': '1'}).split())
    assert after < 1.02*before, f'{before/1e6:.1f} MB after 20 epochs, {after/1e6:.1f} MB after 200'
