"What fastai's notebooks test of callback.tracker, callback.hook and callback.fp16"
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torcheval.metrics import MeanSquaredError

from fastswa.callbacks.activations import ActivationStats, HooksCallback
from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.schedule import EpochSchedCB
from fastswa.callbacks.steps import GradClipCB, gradients
from fastswa.callbacks.speed import MixedPrecisionCB
from fastswa.callbacks.basics import RecorderCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.checkpoint.archive import read_checkpoint
from fastswa.nets.hooks import Hook, Hooks
from fastswa.training.events import Callback
from fastswa.training.learner import TrainCB, Learner, TrainLearner
from helpers import Losses, Scripted, Trail, copied, learner, linear, net, quick, regression, same

# --- tracker


def test_a_loss_that_blows_up_ends_the_fit():
    "And no bad loss is on record. fastai ends it in silence, here the error says which batch"
    learn = quick(recorder := RecorderCB(loss=lambda cb: cb.learn.loss.item()), lr=100)
    with pytest.raises(FloatingPointError, match='stopped being finite at batch'): learn.fit(30)
    assert len(recorder.recs['loss']) < 30*7 and np.isfinite(recorder.recs['loss']).all()


@pytest.mark.parametrize('min_delta, bests', [(0., [0.2, 0.1]), (0.15, [0.2, 0.2])])
def test_the_best_so_far(min_delta, bests):
    seen = []
    class Look(Callback):
        order = 95
        def after_epoch(self, learn):
            if not learn.training: seen.append(cb.best)
    quick(cb := EarlyStoppingCB(min_delta=min_delta), Losses([0.2, 0.1]), Look()).fit(2)
    assert seen == bests


@pytest.mark.parametrize('mode, best', [('max', 0.2), ('min', 0.1)])
def test_which_of_two_is_better_can_be_said(mode, best):
    "comp=np.less, np.greater"
    quick(MetricsCB(metric=Scripted([0.2, 0.1])), cb := EarlyStoppingCB('metric', mode=mode)).fit(2)
    assert cb.best == best


@pytest.mark.parametrize('fits, best', [(1, 0.1), (2, 0.5)])
def test_each_fit_has_its_own_best(fits, best):
    "reset_on_fit=True, fastai's default"
    learn = quick(losses := Losses([0.1, 0.3]), cb := EarlyStoppingCB())
    learn.fit(2)
    losses.values = [0.5, 0.7]
    if fits == 2: learn.fit(2)
    assert cb.best == best


def test_the_best_of_several_fits(tmp_path):
    "reset_on_fit=False: that of a checkpoint is of all fits of a learner"
    learn = quick(losses := Losses([0.1, 0.3]), cb := CheckpointCB(tmp_path, best='loss'))
    learn.fit(2)
    losses.values = [0.5, 0.7]
    learn.fit(2)
    assert cb.best == 0.1 and read_checkpoint(tmp_path/'best.pt')['opt_steps'] == 7


@pytest.mark.parametrize('cb', [EarlyStoppingCB, partial(CheckpointCB, best='loss')])
def test_nothing_is_tracked_while_a_rate_is_looked_for(cb, tmp_path):
    "lr_find: no best, no file"
    learn = quick(cb := cb(tmp_path) if cb is not EarlyStoppingCB else cb())
    learn.lr_find()
    assert cb.best is None and not list(tmp_path.iterdir())


def test_the_fit_ends_when_nothing_gets_better():
    "At a rate that moves nothing, after one epoch and two of patience; a validation afterwards gives the last row"
    learn = quick(EarlyStoppingCB(min_delta=0.1, patience=2), lr=1e-7)
    learn.fit(200)
    assert len(learn.history) == 6
    assert learn.validate()[-1]['loss'] == learn.history[-1]['loss']


@pytest.mark.parametrize('name, best', [('valid_loss', 0.1), ('error_rate', 0.1), ('accuracy', 0.2), ('mse', 0.1)])
def test_a_name_tells_which_way_is_good(name, best):
    "fastai: small for a name with `loss` or `error` in it, large for any other; here mse is an error too"
    quick(MetricsCB(**{name: Scripted([0.2, 0.1])}), cb := EarlyStoppingCB(name)).fit(2)
    assert cb.best == best


@pytest.mark.differs('a name that does not tell is asked about: fastai takes the largest as the best')
def test_a_name_that_does_not_tell_is_an_error():
    with pytest.raises(ValueError, match="'tst_metric' good.*give mode="):
        quick(MetricsCB(tst_metric=Scripted([0.2, 0.1])), EarlyStoppingCB('tst_metric')).fit(2)


def test_the_best_model_is_there_after_the_fit():
    "SaveModelCallback, which loads it at the end"
    learn = quick(Losses([2., 1., 3., 4.]), EarlyStoppingCB(patience=None, restore_best=True), trail := Trail())
    learn.fit(4)
    assert torch.equal(learn.model.weight, trail.seen[13]['weight']) and learn.weights == 'best'


def files(folder): return sorted(p.name for p in folder.iterdir())


def named(*steps): return [f'step-{s:08}.pt' for s in steps]


@pytest.mark.parametrize('every, left', [('1dur', (28,)), ('1ep', (7, 14, 21, 28)), ('2ep', (14, 28))])
def test_files_of_each_epoch_of_each_second_and_of_the_end(every, left, tmp_path):
    "every_epoch, at_end"
    quick(CheckpointCB(tmp_path, every, keep=None)).fit(4)
    assert files(tmp_path) == named(*left)


@pytest.mark.parametrize('lr, floor, end', [(1e-3, 0., 1e-4), (5e-4, 1e-4, 1e-4)])
def test_the_rate_falls_on_a_plateau(lr, floor, end):
    "By `factor`, not below `min_lr`, after two epochs that are no better"
    rates = RecorderCB(lr=lambda cb: cb.pg['lr'])
    sched = partial(ReduceLROnPlateau, factor=0.1, patience=1, threshold=0.1, threshold_mode='abs', min_lr=floor)
    learn = quick(EpochSchedCB(sched), Losses([1.]*6), rates, lr=lr)
    learn.fit(4)
    lrs = rates.recs['lr'][::7]
    np.testing.assert_allclose(lrs, [lr, lr, lr, end])


@pytest.mark.differs('a fit leaves the rate as it found it: the next one begins at its own, not where a schedule ended')
def test_the_rate_is_put_back_after_a_plateau():
    learn = quick(EpochSchedCB(partial(ReduceLROnPlateau, factor=0.1, patience=0)), Losses([1.]*4), lr=1e-3)
    learn.fit(4)
    assert learn.opt.param_groups[0]['lr'] == 1e-3


def test_saving_and_the_rate_come_before_the_end(tmp_path):
    "The epoch that ends the fit is in the file, and the rate has fallen by then"
    learn = quick(EarlyStoppingCB(patience=2), CheckpointCB(tmp_path), Losses([1.]*6),
                  EpochSchedCB(partial(ReduceLROnPlateau, factor=0.1, patience=1, threshold=0.)))
    learn.fit(6)
    saved = read_checkpoint(tmp_path/named(21)[0])
    now = next(cb['state']['now'] for cb in saved['callbacks'] if cb['state'].get('now'))
    assert len(saved['history']) == 6 and now['_last_lr'] == pytest.approx([0.01])


# --- hook


def store(hook, module, inp, outp): hook.stored = outp.detach()


def test_a_hook_sees_what_a_layer_puts_out():
    "Layer, input and output; what it stores has no history"
    model, x, seen = nn.Linear(5, 3), torch.randn(4, 5), []
    hook = Hook(model, lambda *args: seen.append(args))
    y = model(x)
    (h, m, inp, outp), = seen
    assert h is hook and m is model and inp[0] is x and outp is y
    hook.f = store
    y = model(x)
    assert torch.equal(hook.stored, y) and not hook.stored.requires_grad


def test_a_hook_that_is_removed_sees_nothing():
    seen = []
    hook = Hook(model := linear(), lambda *args: seen.append(1))
    model(torch.randn(2, 3))
    for _ in range(2): hook.remove()
    model(torch.randn(2, 3))
    assert seen == [1]


@pytest.mark.parametrize('error', [False, True])
def test_hooks_in_a_with_block_are_removed_after_it(error):
    "Also where it ends with an error"
    layers = [nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 3)]
    model, x = nn.Sequential(*layers), torch.randn(4, 5)
    try:
        with Hooks(layers, store) as hooks:
            y = model(x)
            expected = [layers[0](x), F.relu(layers[0](x)), y]
            model(x)
            if error: raise ZeroDivisionError
    except ZeroDivisionError: pass
    assert all(torch.equal(h.stored, e) for h, e in zip(hooks, expected))
    assert not any(m._forward_hooks for m in layers)


def test_hooks_of_a_sequential_are_those_of_its_layers():
    model = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 3))
    with Hooks(model, store) as hooks: y = model(torch.randn(4, 5))
    assert len(hooks) == 3 and torch.equal(hooks[2].stored, y)


def test_a_hook_reads_gradients():
    "hook_outputs(grad=True): of the output, by a hook on the tensor"
    layers = [nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 3)]
    model, x, grads = nn.Sequential(*layers), torch.randn(4, 5), {}
    def note(hook, module, inp, outp): outp.register_hook(lambda g: grads.__setitem__(module, g))
    with Hooks(layers, note):
        y = model(x)
        y.square().mean().backward()
    expected = (2*y/y.numel()).detach()
    torch.testing.assert_close(grads[layers[2]], expected)
    expected = expected @ layers[2].weight.detach()
    torch.testing.assert_close(grads[layers[1]], expected)
    torch.testing.assert_close(grads[layers[0]], expected*(layers[0](x) > 0))


def test_a_hook_may_replace_the_output():
    model = linear()
    with Hooks([model], lambda hook, module, inp, outp: outp*0): assert (model(torch.randn(2, 3)) == 0).all()
    assert (model(torch.randn(2, 3)) != 0).any()


def test_sizes_of_activations():
    "model_sizes"
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, padding=1))
    with Hooks(model, lambda h, m, i, o: setattr(h, 'shape', [*o.shape])) as hooks: model(torch.randn(1, 3, 64, 64))
    assert [h.shape for h in hooks] == [[1, 16, 64, 64], [1, 32, 32, 32], [1, 32, 32, 32]]


def test_a_callback_with_hooks_sees_the_predictions():
    "In each training batch, with nothing left on the model after the fit"
    class Check(HooksCallback):
        checked = 0
        def after_batch(self, learn):
            if not learn.training: return
            assert torch.equal([*self][-1].stored, learn.preds.detach())
            self.checked += 1
    learn = learner(cb := Check(store))
    learn.fit(1)
    assert cb.checked == 10 and not any(m._forward_hooks for m in learn.model.modules())


@pytest.mark.parametrize('on_train, on_valid, n', [(True, False, 10), (False, True, 5), (True, True, 15)])
def test_hooks_in_training_and_validation(on_train, on_valid, n):
    "On the modules that are named, in the batches that are asked for"
    model, calls = net(), []
    cb = HooksCallback(lambda h, m, i, o: calls.append(m), mods=[model[0]], on_train=on_train, on_valid=on_valid)
    learner(cb, model=model).fit(1)
    assert calls == [model[0]]*n


@pytest.mark.parametrize('every, n', [(1, 20), (3, 7), (7, 3)])
def test_hooks_in_every_so_many_batches(every, n):
    "Over the epochs, and none is there in the others"
    there, calls = [], []
    class Count(Callback):
        order = 99
        def after_predict(self, learn):
            if learn.training: there.append(bool(learn.model[2]._forward_hooks))
    learner(HooksCallback(lambda *args: calls.append(1), lambda m: isinstance(m, nn.ReLU), every=every), Count()).fit(2)
    assert len(calls) == n and there == [i % every == 0 for i in range(20)]


def test_hooks_go_with_an_error():
    "remove_end, also where the fit fails"
    class Fail(Callback):
        def after_loss(self, learn): raise ZeroDivisionError
    learn = learner(HooksCallback(store), Fail())
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    assert not any(m._forward_hooks for m in learn.model.modules())


@pytest.mark.parametrize('patience, min_delta, epochs', [(1, 0.1, 2), (2, 0.1, 3), (3, 0.1, 4), (2, 0., 10)])
def test_a_metric_ends_the_fit(patience, min_delta, epochs):
    "The mean squared error as a metric, at a rate that moves nothing to speak of"
    cbs = MetricsCB(MeanSquaredError()), EarlyStoppingCB('MeanSquaredError', patience, min_delta)
    learn = quick(*cbs, lr=1e-4)
    learn.fit(10)
    assert len(learn.history) == 2*epochs


def test_a_function_is_a_metric():
    "metrics=F.mse_loss, watched by its name: the mean over the samples, here that of the loss"
    learn = quick(MetricsCB(F.mse_loss), EarlyStoppingCB('mse_loss', patience=2, min_delta=0.1), lr=1e-7)
    learn.fit(200)
    assert len(learn.history) == 6
    assert all(r['mse_loss'] == pytest.approx(r['loss']) for r in learn.history)


@pytest.mark.parametrize('every', [1, 4])
def test_gradients_of_the_predictions_in_a_fit(every):
    "2(p - y)/n of the mean squared error"
    class Check(ActivationStats):
        seen = 0
        def after_batch(self, learn):
            if not learn.training or learn.iter % every: return
            expected = 2*(learn.preds - learn.batch[1])/learn.preds.numel()
            assert [*self][-1].grads.means[-1].item() == pytest.approx(expected.mean().item(), abs=1e-7)
            self.seen += 1
    quick(cb := Check(every=every, grads=True)).fit(1)
    assert cb.seen == math.ceil(7/every)


@pytest.mark.parametrize('every', [1, 4])
def test_statistics_of_activations(every):
    "Mean and standard deviation (over n, where fastai has n - 1), batch by batch, of what the layer put out"
    outputs = []
    class Outputs(HooksCallback):
        def __init__(self): super().__init__(lambda h, m, i, o: outputs.append(o.detach().double()), every=every,
                                             mod_filter=lambda m: isinstance(m, nn.ReLU))
    learn = learner(Outputs(), stats := ActivationStats(lambda m: isinstance(m, nn.ReLU), every=every))
    learn.fit(1)
    h, = stats
    np.testing.assert_allclose(h.stats.means, [o.mean() for o in outputs], rtol=1e-5)
    np.testing.assert_allclose(h.stats.stds, [o.std(correction=0) for o in outputs], rtol=1e-5)
    assert len(outputs) == math.ceil(10/every)


def test_statistics_of_a_recurrent_layer():
    "Whose output is a nested tuple: of its first tensor (fastai: of each)"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)
        def forward(self, x): return self.head(self.rnn(x[:, None])[0][:, -1])
    learn = TrainLearner(Net(), regression(), F.mse_loss, 0.1, stats := ActivationStats(every=1))
    learn.fit(1)
    assert [r.batches for r in stats.report()] == [7, 7]


@pytest.mark.parametrize('module, n', [
    (nn.Linear(10, 32), 10*32 + 32), (nn.Linear(10, 32, bias=False), 10*32), (nn.BatchNorm1d(10), 20),
    (nn.Linear(10, 5, bias=False), 50)])
def test_parameters_are_counted(module, n):
    learn = TrainLearner(nn.Sequential(nn.Linear(3, 10), module), regression(), F.mse_loss)
    assert learn.summary().splitlines()[3].split('|')[5] == f'{n:,}'


def test_a_summary_has_each_layer_and_the_total():
    "Its shapes for one sample; the totals that fastai's has; and it neither trains nor moves statistics"
    model = nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.BatchNorm1d(50), nn.Linear(50, 1))
    before = copied(model.state_dict())
    rows = [l.strip('|').split('|') for l in TrainLearner(model, regression(), F.mse_loss).summary().splitlines()[2:]]
    assert [r[1] for r in rows[:-1]] == ['Linear', 'ReLU', 'BatchNorm1d', 'Linear']
    assert [r[3] for r in rows[:-1]] == ['(1, 50)']*3 + ['(1, 1)']
    assert rows[-1][0] == 'total' and rows[-1][4] == str(200 + 100 + 51)
    assert same(copied(model.state_dict()), before)


def test_a_summary_of_a_model_with_two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.seq = nn.Linear(6, 1)
        def forward(self, a, b): return self.seq(torch.cat([a, b], 1))
    dls = regression()
    dls.train = [(x, x, y) for x, y in dls.train]
    learn = Learner(Two(), dls, F.mse_loss, cbs=TrainCB(n_inp=2))
    assert '(1, 6)|(1, 1)|7' in learn.summary()


def test_a_summary_of_a_model_with_two_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 6)
        def forward(self, x): return x, self.lin(x)
    assert '|(1, 3)|(1, 6)|24|' in TrainLearner(Two(), regression(), F.mse_loss).summary()


# --- fp16


class Dtypes(Callback):
    "Of layers' outputs, parameters, predictions and loss in a batch of training"
    order = 99
    def after_loss(self, learn):
        if not learn.training: return
        self.params = {p.dtype for p in learn.model.parameters()}
        self.preds, self.loss = learn.preds.dtype, learn.loss.dtype


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_layers_run_in_half_precision_and_weights_statistics_and_loss_do_not(dtype):
    "The weights stay in fp32, which fastai keeps as a second copy"
    outs = {}
    hooks = HooksCallback(lambda h, m, i, o: outs.__setitem__(type(m).__name__, o.dtype))
    learn = learner(MixedPrecisionCB(dtype), hooks, seen := Dtypes())
    learn.fit(1)
    assert outs['Linear'] is dtype and learn.model[1].running_mean.dtype is torch.float32
    assert seen.params == {torch.float32} and seen.preds is seen.loss is torch.float32


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_parameters_in_half_precision_are_an_error(dtype):
    "convert_network is not needed"
    with pytest.raises(ValueError, match='keeps the weights in fp32'):
        learner(MixedPrecisionCB(dtype), model=net(norm=False).to(dtype)).fit(1)


def test_a_step_is_rate_times_gradient():
    "The gradient without the scale. Compared with the one before the scale is taken away, as it came back"
    class Check(Callback):
        order, role, n = 99, 'steps', 0
        def after_backward(self, learn):
            self.old = [p.detach().clone() for p in learn.model.parameters()]
            self.grads = [g.clone() for g in gradients(learn)]
        def after_step(self, learn):
            self.n += 1
            for p, old, g in zip(learn.model.parameters(), self.old, self.grads):
                torch.testing.assert_close(p, old - 0.1*g)
    learn = quick(MixedPrecisionCB('fp16', init_scale=1024.), check := Check())
    learn.fit(1)
    assert check.n == 7


def test_the_scaled_gradient_is_the_gradient_times_the_scale():
    class Seen(Callback):
        order, role = -99, 'steps'
        def before_fit(self, learn): self.grads = []
        def after_backward(self, learn): self.grads.append([g.clone() for g in gradients(learn)])
    runs = []
    for scale in 1., 1024.:
        learn = quick(MixedPrecisionCB('fp16', init_scale=scale), seen := Seen())
        learn.fit(1)
        runs.append(seen.grads[0])
    for a, b in zip(*runs): torch.testing.assert_close(a*1024, b, rtol=1e-2, atol=1.)


@pytest.mark.parametrize('scale', [512., 2.**10])
def test_a_scale_that_fits_stays(scale):
    "dynamic=False"
    learn = quick(cb := MixedPrecisionCB('fp16', init_scale=scale))
    learn.fit(3)
    assert cb.scale == scale and cb.skipped == 0


def test_a_scale_that_overflows_is_halved_and_the_step_skipped():
    "From 2^24 on, until it fits; a skipped step is none, and weights and counts know nothing of it"
    learn = quick(cb := MixedPrecisionCB('fp16', init_scale=2.**24))
    learn.fit(3)
    assert 1 < cb.scale < 2**24 and cb.scale == 2.**24/2**cb.skipped
    assert cb.skipped >= 1 and learn.opt_steps == 21 - cb.skipped


def test_a_scale_that_has_fitted_for_long_is_doubled():
    "scale_wait"
    learn = quick(cb := MixedPrecisionCB('fp16', init_scale=64., growth_interval=5))
    learn.fit(2)
    assert cb.scale == 64.*2**(14//5)


def test_the_loss_on_record_is_not_scaled():
    half, full = quick(MixedPrecisionCB('fp16', init_scale=512.)), quick()
    for o in half, full: o.fit(1)
    assert half.history[0]['loss'] == pytest.approx(full.history[0]['loss'], rel=0.02)


def test_gradients_are_clipped_without_the_scale():
    "clip: the norm is that of the true gradient"
    norms = []
    class Norms(Callback):
        order, role = 99, 'steps'
        def after_backward(self, learn): norms.append(nn.utils.get_total_norm(gradients(learn)).item())
    learn = quick(GradClipCB(norm=0.1), MixedPrecisionCB('fp16', init_scale=1024.), Norms())
    learn.fit(1)
    assert len(norms) == 7 and max(norms) <= 0.1001 and norms[0] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize('dtype', ['fp16', 'bf16'])
def test_the_model_does_train(dtype):
    "And is as it was afterwards: its forward pass outside of the fit is in fp32"
    learn = quick(MixedPrecisionCB(dtype), opt_func=partial(SGD, momentum=0.))
    learn.fit(3)
    losses = [r['loss'] for r in learn.history if r['train'] == 'eval']
    assert losses[-1] < losses[0] and learn.model(torch.randn(2, 3)).dtype is torch.float32


def test_the_scale_goes_on_in_a_resumed_run(tmp_path):
    a, b = (quick(MixedPrecisionCB('fp16', init_scale=2.**24)) for _ in range(2))
    a.fit(2)
    a.save(tmp_path/'a.pt')
    b.load(tmp_path/'a.pt')
    b.fit(1)
    assert b.cbs[0].scale == a.cbs[0].scale and b.cbs[0].skipped == a.cbs[0].skipped
