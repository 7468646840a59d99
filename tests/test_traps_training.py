"""What other training loops, and the tools around them, got wrong, one claim each, and what keeps us from it

Most of it was found in miniai, the small library of the fast.ai course, whose modules the headings name, and reproduced; where public issues
are named, users were bitten. The table says where each is tested: `here` is this file, what follows a notebook is text in one of its
cells, and `later` is what concerns a part that does not exist yet.

learner
 1  Two metrics of one class: the second takes the place of the first
        nbs/04_callbacks.ipynb: contains='two metrics are called Accuracy'
 2  A metric called loss displaces the loss in the table
        nbs/04_callbacks.ipynb: contains="cannot be called 'loss'"
 3  Metrics crash on batches and predictions that are dicts, or nested
        nbs/04_callbacks.ipynb: cbs=[DictSteps(), MetricsCB(accuracy=DictAccuracy()), DeviceCB('cpu')]
        tests/test_swa.py: test_dict_batches_and_two_inputs_reach_the_statistics
 4  The table in a terminal crashes on an epoch number, which is an int
        tests/test_progress.py: test_terminal
        tests/test_progress.py: test_log
 5  Callbacks put things of their own in place of the learner's, or of other callbacks', and leave them there
        tests/test_progress.py: test_nothing_of_the_learner_is_replaced
        here: test_05_nothing_of_the_learner_stays_replaced
 6  The plot of the losses takes it for granted that training and validation both run from epoch 0 on
        nbs/05_progress.ipynb: starts(log(learner(cb()), 2, train=False)
        here: test_06_the_plot_of_any_fit
 7  An error in before_fit is hidden by that of a cleanup, which misses what before_fit would have made
        nbs/02a_events.ipynb: test_fail(Runner([a, b, c]).fit, contains='the real error')
        here: test_07_the_error_in_before_fit_is_the_one_to_see
        here: test_07_callbacks_whose_own_before_fit_fails
 8  The learner goes on using the list of callbacks that it was given, so that list changes under its owner's hands
        here: test_08_the_list_of_callbacks_stays_the_callers
 9  Callbacks of one fit are removed by ==, so another one goes (fastai2#255); or they stay when the fit fails
        nbs/03_learner.ipynb: class SameCB(Callback):
        here: test_09_callbacks_of_one_fit_go_with_it
10  model.train() thaws the BatchNorm that the user froze (Lightning#2551, Lightning#18930)
        nbs/03_learner.ipynb: test_eq(cb.seen, [True, False, True])
        tests/test_learner.py: test_a_layer_frozen_by_a_callback_stays_frozen
        tests/test_learner.py: test_frozen_layers_keep_their_statistics_under_an_average
11  The model is left in eval mode
        tests/test_learner.py: test_a_layer_frozen_by_a_callback_stays_frozen
        here: test_11_modes_return_after_a_failure
12  The optimizer is made anew by every fit, even by one that only captures predictions: momentum is lost
        nbs/03_learner.ipynb: assert learn.opt.state[model.weight]['momentum_buffer'] is buf
        tests/test_learner.py: test_looking_between_two_fits_changes_nothing
        tests/test_learner.py: test_validation_only_needs_no_optimizer
13  Where no callback brings the steps, a fit trains nothing and says nothing
        nbs/03_learner.ipynb: contains='nothing provides predict'
14  Where two do, gradients are computed twice
        nbs/03_learner.ipynb: contains='provided more than once'
15  A misspelled event is never called
        nbs/02a_events.ipynb: did you mean before_fit?
16  Momentum in the gradients fails where a parameter got none
        tests/test_learner.py: test_momentum_learner_with_a_parameter_that_gets_no_gradient
17  Its gradients get into later fits of other learners
        tests/test_learner.py: test_another_learner_does_not_meet_the_momentum
        tests/test_learner.py: test_gradients_others_left_are_not_stepped_on
18  The learning-rate finder leaves weights, gradients, optimizer, rate and random state changed (fastai#3013, Lightning#6675)
        nbs/05a_finder.ipynb: trained(lambda learn: learn.lr_find(show=False)), trained(lambda learn: None)
        tests/test_sched.py: test_finder_leaves_no_trace
        here: test_18_a_search_leaves_no_trace_in_a_run_with
19  At the latest when it is interrupted
        nbs/05a_finder.ipynb: test_eq(trained(interrupted), trained(lambda learn: None))
        tests/test_sched.py: test_finder_leaves_no_trace
20  Its length is counted in epochs, which may be of one batch
        nbs/05a_finder.ipynb: one_batch = SimpleNamespace(train=[tuple(data)], valid=None)
        tests/test_sched.py: test_finder_stops_where_it_should
21  A schedule among the callbacks overrides the rates it tries
        here: test_21_a_search_uses_the_rates_it_tries
22  Callbacks that depend on each other share order 0, so the list decides
        nbs/07_train.ipynb: for order in list(permutations(range(5)))[7::11]
        here: test_22_the_order_in_the_list_does_not_matter

conv
23  to_device fails on nested dicts, None, numbers and named tuples
        nbs/00_core.ipynb: test_eq(type(res[3]), Point)
24  It makes generators of strings
        nbs/00_core.ipynb: test_eq(res[2], 'a string')
25  The device is the one there was at import
        here: test_25_the_device_is_asked_for_when_it_is_needed

activations
26  Setting a seed switches off the deterministic algorithms that were asked for elsewhere
        nbs/00_core.ipynb: determinism that was chosen elsewhere survives a seed
27  It reaches no loader
        nbs/02_data.ipynb: # governed by set_seed
        nbs/02_data.ipynb: test_eq(order(slow.train), first)
        tests/test_data.py: test_workers_are_seeded_and_differ
28  Hooks stay on the model after an exception, and after CancelFitException
        tests/test_hooks.py: test_hooks_go_whatever_ends_the_fit
        tests/test_hooks.py: test_ctrl_c_at_any_line
29  Whole activations go to the CPU in each batch, and stay there (course22p2#27)
        tests/test_hooks.py: test_no_activation_is_kept
        tests/test_hooks.py: test_a_reading_takes_little_memory
        tests/test_hooks.py: test_every
30  What is beyond 10 is not in the histogram
        tests/test_hooks.py: test_beyond_ten_is_counted
31  Whatever is below 0.25 counts as dead
        tests/test_hooks.py: test_the_threshold_for_dead

init
32  clean_ipython_hist does nothing once it is exported
        tests/test_core.py: test_clean_ipython_hist_lets_go_of_what_cells_returned
33  clean_tb does not know sys.last_exc
        nbs/00_core.ipynb: # Python 3.12 keeps the exception there too
34  GeneralRelu without a leak subtracts in place from what the backward pass of ReLU reads
        nbs/20_layers.ipynb: contains='inplace operation'
35  init_weights passes over linear layers
        nbs/22_init.ipynb: for m in (nn.Linear(400, 400), nn.Conv2d(16, 400, 5)
        tests/test_init.py: test_weights_by_the_gain
36  The gain knows the leak of GeneralRelu and not its sub
        tests/test_init.py: test_general_relu_in_closed_form
        tests/test_init.py: test_variance_stays_one_with_sub
37  conv looks at what makes the norm, where it means the norm, to decide about the bias
        tests/test_layers.py: test_bias_by_what_the_norm_is
38  LSUV: a layer without a bias is a TypeError
        tests/test_init.py: test_course_form_bounds_the_search
        tests/test_init.py: test_every_layer_has_unit_variance
39  LSUV: weights of zero become NaN
        tests/test_init.py: test_zero_weights_become_orthonormal
40  LSUV: behind a norm, or a dead ReLU, weights are divided until they are infinite
        tests/test_init.py: test_course_form_bounds_the_search
        tests/test_init.py: test_constant_batches_and_outputs
41  LSUV: dropout, and BatchNorm in training mode, get into what is measured, and this into the running statistics
        tests/test_init.py: test_every_layer_has_unit_variance
        nbs/21a_lsuv.ipynb: test_eq(list(net.buffers()), buffers)
42  LSUV: layers and activations are paired by zip, which residual blocks put out of step
        tests/test_init.py: test_every_layer_has_unit_variance
        nbs/21a_lsuv.ipynb: body.1.convs.0.0 body.1.convs.1.0 body.1.idconv.0
43  LSUV: nothing bounds the loop
        tests/test_init.py: test_not_reaching_the_goal_is_bounded_and_said
44  LSUV: values that are not finite, or Ctrl-C, leave weights half changed and hooks behind
        tests/test_init.py: test_failure_changes_no_bit
45  LSUV: linear layers are left out
        tests/test_init.py: test_every_layer_has_unit_variance

norms (notebook 11 of the course)
46  LayerNorm takes images only
        tests/test_layers.py: test_layernorm_of_an_int
47  Its variance is the unbiased one
        tests/test_layers.py: test_layernorm_of_an_int
        tests/test_layers.py: test_layernorm_of_a_tuple
48  Its weight and shift are single numbers
        nbs/19_norms.ipynb: test_eq([tuple(LayerNorm(s).weight.shape)
        tests/test_layers.py: test_layernorm_of_an_int
49  BatchNorm computes its statistics without gradients, which makes those of the input wrong
        nbs/19_norms.ipynb: assert along(input_grad(constant), xhat) > 0.1
        tests/test_layers.py: test_batchnorm_is_torchs
        tests/test_layers.py: test_batchnorm_gradcheck
50  It normalises by the unbiased variance
        tests/test_layers.py: test_biased_to_normalise_unbiased_to_run
51  One value per channel becomes NaN
        tests/test_layers.py: test_one_value_per_channel
52  update_bn does not know it
        tests/test_layers.py: test_update_bn_and_averages_know_it

sgd
53  ReduceLROnPlateau is a TypeError: it needs a metric, after the validation
        nbs/06_sched.ipynb: plateau = partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0
        tests/test_sched.py: test_plateau_watches_the_row_it_is_told
54  OneCycleLR runs past its end in a longer fit
        nbs/06_sched.ipynb: contains='total_steps=11, but the fit has 12 steps'
        tests/test_sched.py: test_one_list_of_callbacks_for_two_learners
55  Which rate is recorded depends on the order of the callbacks
        tests/test_loggers.py: test_rate_is_that_of_the_step
        here: test_55_the_recorded_rate_is_the_one_that_the_step_used

resnet, datasets, augment
56  The shortcut of a residual block has no norm
        nbs/20_layers.ipynb: # the shortcut has a norm too
57  Where it changes nothing it is a function, and no module
        nbs/20_layers.ipynb: test_eq(type(ResBlock(4, 4).idconv), nn.Identity)
58  A stride of 3 fails
        nbs/20_layers.ipynb: (4, 8, 3, 28)
        tests/test_layers.py: test_bias_by_what_the_norm_is
59  Of a dataset with one column, a batch is a bare tensor
        nbs/02_data.ipynb: # one column: a tuple of one, not a bare tensor
60  Five hooks get four axes
        tests/test_hooks.py: test_any_number_of_modules_fits
61  Whatever comes first in a dict of datasets is trained on
        nbs/02_data.ipynb: # by name, not by order
        tests/test_data.py: test_splits_and_batch_sizes
62  summary takes a step of SGD at rate 1
        nbs/04b_looks.ipynb: # nothing was trained
        tests/test_learner.py: test_looking_between_two_fits_changes_nothing
63  show_image_batch trains
        tests/test_learner.py: test_showing_a_batch_trains_nothing

accel
64  autocast outlives an exception
        nbs/06d_precision.ipynb: # it does not outlive the batch
        here: test_64_autocast_ends_with_the_batch
65  Model, optimizer and loaders are prepared again, and wrapped again, by each fit
        nbs/06c_fitting.ipynb: # not compiled again
        later: the same for accelerate and several processes

elsewhere
66  A resumed run sees again what it had seen, or goes another way (Lightning#19764, transformers#17032)
        tests/test_checkpoint.py: test_any_run_resumes_exactly
        tests/test_checkpoint.py: test_killed_at_twenty_random_moments
67  Its schedules are off by one (Lightning#1772)
        tests/test_sched.py: test_state_resumes_every_schedule
        tests/test_cycles.py: test_resume
68  A cancelled batch reaches the recorder all the same (fastai#4030)
        nbs/04_callbacks.ipynb: # four batches, one of them cancelled
        tests/test_learner.py: test_a_cancelled_batch_reaches_no_record
69  Ctrl-C is swallowed, or is the end of everything (Lightning#11924)
        tests/test_checkpoint.py: test_signals_leave_a_checkpoint
        tests/test_interrupts.py: test_ctrl_c_at_any_line_keeps_the_raw_weights
        here: test_69_ctrl_c_comes_out_when_all_is_tidy
70  In a notebook, a traceback keeps the GPU's memory (Lightning#3275)
        tests/test_learner.py: test_a_learner_that_failed_is_freed
        here: test_70_a_traceback_gives_way
71  The last window of accumulation, which is shorter, is divided by the length of the others (Lightning#19987)
        nbs/07_train.ipynb: for cb in (GradAccumCB(3), GradAccumCB(samples=18), GradAccumCB(samples=13)):
72  Gradients are clipped before the loss scale is taken off them (Lightning#9599)
        nbs/07_train.ipynb: # clipped before unscaling they would vanish
73  Metrics are those of one process, or the mean of the processes' means (Lightning#3023)
        later: training by several processes
74  The mean of the batches' means, where batches are not of one size
        nbs/02c_meter.ipynb: # the mean of the three means would be 4.67
        tests/test_loggers.py: test_losses_are_the_mean_over_samples
        here: test_74_rows_of_uneven_batches
75  A resumed run has forgotten the best score (skorch#267)
        tests/test_checkpoint.py: test_best_is_remembered
        tests/test_checkpoint.py: test_any_run_resumes_exactly
76  torch.compile's prefixes are in the files (Lightning#20233)
        nbs/06c_fitting.ipynb: # no `_orig_mod.`
        tests/test_checkpoint.py: test_compiled_prefixes_stay_out
"""
import copy
import gc
import random
import signal
import sys
import warnings
import weakref
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from fastswa.callbacks.augment import AugmentCB
from fastswa.data.transforms import RandFlip
from fastswa.callbacks.basics import BatchTransformCB, DeviceCB, RecorderCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.core import clean_mem, set_seed, to_device
from fastswa.callbacks.loggers import CSVLoggerCB
from fastswa.callbacks.schedule import OneCycleCB, WarmupStableDecayCB
from fastswa.data.loaders import collate_device
from fastswa.training.events import Callback, CancelBatchException, CancelFitException
from fastswa.callbacks.speed import ChannelsLastCB, CompileCB
from fastswa.callbacks.metrics import EarlyStoppingCB
from fastswa.callbacks.activations import ActivationStats, HooksCallback
from fastswa.nets.layers import get_model
from fastswa.nets.statistics import append_stats
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.loggers import LogCB
from fastswa.callbacks.augment import CutMixCB, MixUpCB
from fastswa.callbacks.speed import MixedPrecisionCB
from fastswa.callbacks.progress import ProgressCB
from fastswa.callbacks.schedule import BatchSchedCB, EpochSchedCB
from fastswa.callbacks.swa import BNUpdateCB
from fastswa.callbacks.swa import EMACB, LAWACB, PostHocEMACB, SWACB, SWAGCB, SwitchEMACB
from fastswa.callbacks.steps import ClosureCB, GradAccumCB, GradClipCB, NaNGuardCB
from fastswa.callbacks.progress import LogView, NotebookView, View


def data(n=56, bs=8, valid=20):
    "Images (N, 1, 6, 6) of three classes"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 6, 6, generator=g), torch.randint(3, (n,), generator=g)
    ds = TensorDataset(x + y.view(-1, 1, 1, 1), y)
    return SimpleNamespace(train=DataLoader(ds, bs, shuffle=True), valid=DataLoader(ds, valid))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3))


def learner(*cbs, cls=TrainLearner, lr=0.05, opt_func=partial(optim.SGD, momentum=0.9), dls=None, model=None):
    return cls(model or net(), dls or data(), F.cross_entropy, lr, cbs, opt_func)


def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Hits:
    "The share of right answers"
    def reset(self): self.n = self.right = 0
    def update(self, preds, targets): self.n, self.right = self.n + len(targets), self.right + (preds.argmax(1) == targets).sum().item()
    def compute(self): return self.right/self.n


class At(Callback):
    "Raise an exception at an event, in training or in validation"
    def __init__(self, event, exc, order=0, training=True):
        self.exc, self.order, self.training = exc, order, training
        setattr(self, event, self.go)
    def go(self, learn):
        if learn.training == self.training: raise self.exc


def one_cycle(): return BatchSchedCB(partial(lr_scheduler.OneCycleLR, max_lr=0.1))


def eager(graph, inputs): return graph.forward


# each callback of the library, as a user would write it; those that need a folder get it
EVERY = dict(
    device=lambda tmp: DeviceCB('cpu'), transform=lambda tmp: BatchTransformCB(lambda b: b), metrics=lambda tmp: MetricsCB(hits=Hits()),
    recorder=lambda tmp: RecorderCB(lr=lambda cb: cb.pg['lr']), progress=lambda tmp: ProgressCB(view=LogView), batches=lambda tmp: one_cycle(),
    epochs=lambda tmp: EpochSchedCB(lr_scheduler.ReduceLROnPlateau), one_cycle=lambda tmp: OneCycleCB(), wsd=lambda tmp: WarmupStableDecayCB('1ba', '2ba'),
    ema=lambda tmp: EMACB(), swa=lambda tmp: SWACB('3ba', '1ba', swa_lr=0.01, anneal='3ba'), lawa=lambda tmp: LAWACB(2, '2ba'),
    swag=lambda tmp: SWAGCB(start='2ba', every='2ba'), post_hoc=lambda tmp: PostHocEMACB(every='3ba'), switch=lambda tmp: SwitchEMACB(decay=0.9, switch='3ba'),
    bn_update=lambda tmp: [EMACB(name='for bn'), BNUpdateCB()], hooks=lambda tmp: HooksCallback(append_stats), stats=lambda tmp: ActivationStats(every=2, grads=True),
    compiled=lambda tmp: CompileCB(backend=eager), channels_last=lambda tmp: ChannelsLastCB(), early=lambda tmp: EarlyStoppingCB(),
    bf16=lambda tmp: MixedPrecisionCB(), fp16=lambda tmp: MixedPrecisionCB('fp16'), accumulation=lambda tmp: GradAccumCB(2),
    clipping=lambda tmp: GradClipCB(norm=1.), guard=lambda tmp: NaNGuardCB(), closure=lambda tmp: ClosureCB(), mixup=lambda tmp: MixUpCB(3),
    cutmix=lambda tmp: CutMixCB(3), augment=lambda tmp: AugmentCB(RandFlip()), checkpoint=lambda tmp: CheckpointCB(tmp/'checkpoints', best='loss'),
    csv=lambda tmp: CSVLoggerCB(tmp/'log.csv'), log=lambda tmp: LogCB(SimpleNamespace(log=lambda d: None), '2ba'))


def made(name, tmp): return cbs if isinstance(cbs := EVERY[name](tmp), list) else [cbs]


@pytest.fixture(autouse=True)
def strict():
    "A cleanup that fails says so in a warning"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', 'the model has BatchNorm')
        warnings.filterwarnings('ignore', '.*(torch.jit|lr_scheduler.step)')
        yield


def fit(learn, *args, **kwargs):
    learn.fit(*args, **kwargs)
    return learn


@cache
def a_plain_learner(): return fit(learner(), 1)


FIXED = 'model dls loss_func lr opt_func cbs weights quick quiet in_fit'.split()
ENDS = dict(well=None, error=At('after_backward', ZeroDivisionError(), 90), ctrl_c=At('after_batch', KeyboardInterrupt(), 90, training=False))


@pytest.mark.parametrize('ends', ENDS)
@pytest.mark.parametrize('name', EVERY)
def test_05_nothing_of_the_learner_stays_replaced(name, ends, tmp_path):
    "Neither an attribute nor a method, nor one of another callback, however the fit ends"
    rec = RecorderCB(loss=lambda cb: cb.learn.loss.item())
    cbs = [rec, *filter(None, [ENDS[ends]])]
    learn, plain = learner(*cbs), a_plain_learner()
    fixed, functions = {k: getattr(learn, k) for k in FIXED}, {k: v for cb in cbs for k, v in vars(cb).items() if callable(v)}
    if ends == 'well': learn.fit(1, cbs=made(name, tmp_path))
    else:
        with pytest.raises(type(ENDS[ends].exc)): learn.fit(1, cbs=made(name, tmp_path))
    learn.restore()
    for k, v in fixed.items(): assert getattr(learn, k) is v, k
    assert not [k for k in vars(learn) if not hasattr(plain, k)] and learn.epochs == range(1) and learn.error is None
    assert {k for k, v in vars(learn).items() if callable(v)} == {k for k, v in vars(plain).items() if callable(v)}
    assert functions == {k: v for cb in cbs for k, v in vars(cb).items() if callable(v)}
    for m in learn.model.modules():
        assert 'forward' not in vars(m) and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def test_06_the_plot_of_any_fit(monkeypatch):
    "Validation stands where it took place: without training, without validation, in a second fit, from a late average on"
    from matplotlib.figure import Figure
    monkeypatch.setattr('IPython.display.display', lambda *args, **kwargs: SimpleNamespace(update=lambda *args, **kwargs: None))
    cb, axes = ProgressCB(plot=True, view=NotebookView), Figure().subplots()
    def drawn(*cbs, n=2, fits=1, **kwargs):
        axes.clear()
        learn = learner(cb, *cbs)
        for _ in range(fits): learn.fit(n, **kwargs)
        return {line.get_label(): list(map(int, line.get_xdata())) for line in cb.plot_losses(axes).lines}
    train = list(range(1, 15))
    assert drawn() == drawn(fits=2) == dict(training=train, validation=[7, 14])
    cb.plot = False                                              # from here on only what is drawn in the end
    assert drawn(train=False, n=3) == dict(training=[], validation=[0]*3)
    assert drawn(valid=False) == dict(training=train)
    assert drawn(EMACB(start='8ba', apply=False)) == dict(training=train, raw=[7, 14], ema=[14])
    assert drawn(EMACB(apply=False), valid='raw') == dict(training=train, validation=[7, 14])


@pytest.mark.parametrize('order', [-100, 100])
@pytest.mark.parametrize('name', EVERY)
def test_07_the_error_in_before_fit_is_the_one_to_see(name, order, tmp_path):
    "No cleanup fails for want of what before_fit would have set (that would be a warning), and the next fit is as any"
    learn, cbs = learner(), made(name, tmp_path)
    with pytest.raises(ZeroDivisionError, match='the real error'): learn.fit(1, cbs=[*cbs, At('before_fit', ZeroDivisionError('the real error'), order)])
    assert not learn.in_fit and learn.opt_steps == 0
    if name in ('csv', 'checkpoint'): return
    learn.fit(1, cbs=cbs)
    assert learn.opt_steps == (4 if name == 'accumulation' else 7)


@pytest.mark.parametrize('make, exc', [
    (lambda tmp: HooksCallback(append_stats, lambda m: False), ValueError), (lambda tmp: BatchSchedCB(lambda opt: 1/0), ZeroDivisionError),
    (lambda tmp: EpochSchedCB(lambda opt: None), TypeError), (lambda tmp: CheckpointCB(tmp/'file'), OSError), (lambda tmp: CSVLoggerCB(tmp), OSError),
    (lambda tmp: WarmupStableDecayCB('5ba', '5ba'), ValueError), (lambda tmp: CompileCB(mode='quick'), Exception),
    (lambda tmp: [MetricsCB(a=Hits()), MetricsCB(a=Hits())], ValueError), (lambda tmp: [EMACB(), EMACB()], ValueError),
    (lambda tmp: [ClosureCB(), GradAccumCB(2)], ValueError)])
def test_07_callbacks_whose_own_before_fit_fails(make, exc, tmp_path):
    "Theirs is the error to see; what was begun before is cleaned up"
    (tmp_path/'file').write_text('')
    seen = []
    class Sees(Callback):
        order = -50
        def cleanup_fit(self, learn): seen.append(learn.error)
    learn = learner(Sees())
    with pytest.raises(exc) as e: learn.fit(1, cbs=make(tmp_path))
    assert seen == [e.value] and learn.opt_steps == 0
    learn.fit(1)
    assert learn.opt_steps == 7


def test_08_the_list_of_callbacks_stays_the_callers():
    "Neither what a fit adds nor what the learner is given later gets into it, also while the fit lasts"
    given, extra, seen = [MetricsCB()], [DeviceCB('cpu')], []
    class Sees(Callback):
        def before_batch(self, learn): seen.append((len(given), len(extra), len(learn.cbs)))
    extra.append(Sees())
    learn = TrainLearner(net(), data(), F.cross_entropy, 0.05, given)
    learn.fit(1, cbs=extra)
    assert set(seen) == {(1, 2, 3)} and learn.cbs == given and learn.cbs is not given
    learn.cbs.append(extra[0])
    with learn.aside([Sees()]): pass
    assert len(given) == 1 and len(learn.cbs) == 2


class Alike(Callback):
    "Equal to every other; fails at an event"
    def __init__(self, event=None, exc=None):
        if event: setattr(self, event, self.go)
        self.exc = exc
    def __eq__(self, other): return True
    __hash__ = None
    def go(self, learn): raise self.exc


@pytest.mark.parametrize('exc', [ZeroDivisionError(), KeyboardInterrupt(), CancelFitException()], ids=repr)
@pytest.mark.parametrize('event', [None, 'before_fit', 'before_epoch', 'after_backward', 'after_epoch', 'after_fit', 'cleanup_fit'])
def test_09_callbacks_of_one_fit_go_with_it(event, exc):
    "By identity, and whatever ends the fit"
    kept = [Alike(), Alike()]
    learn = learner(*kept)
    try: learn.fit(1, cbs=[Alike(event, exc), Alike()])
    except (ZeroDivisionError, KeyboardInterrupt): assert event
    except CancelFitException: assert event == 'cleanup_fit'
    assert len(learn.cbs) == 2 and all(a is b for a, b in zip(learn.cbs, kept))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('look', [lambda learn: learn.fit(1), lambda learn: learn.validate(), lambda learn: learn.get_preds(),
                                  lambda learn: learn.lr_find(max_steps=9, show=False)], ids=['fit', 'validate', 'get_preds', 'lr_find'])
def test_11_modes_return_after_a_failure(look, training):
    "Also where it is the validation that fails, or the model was wholly in eval mode"
    class Fails(Callback):
        role = 'prepares'
        def before_batch(self, learn):
            if learn.iter == 1: raise ZeroDivisionError
    for failing in ([], [Fails()]):
        learn = learner(*failing)
        learn.model.train(training)
        learn.model[3].eval()
        modes = [m.training for m in learn.model.modules()]
        try: look(learn)
        except ZeroDivisionError: assert failing
        else: assert not failing
        assert modes == [m.training for m in learn.model.modules()]


@pytest.mark.parametrize('name', EVERY)
def test_18_a_search_leaves_no_trace_in_a_run_with(name, tmp_path):
    "Each callback: between two fits, the second goes on as if nobody had searched, with the same averages"
    def run(search, folder):
        learn = learner(*made(name, folder))
        set_seed(1)
        learn.fit(1)
        if search: learn.lr_find(max_steps=9, show=False)
        if name == 'checkpoint': learn.cbs[0].path = folder/'more'
        averages = [{k: v.clone() for k, v in a.weights.items()} for a in learn.averages.values() if hasattr(a, 'weights')]
        learn.fit(1)
        learn.restore()
        return state(learn), averages, learn.history, learn.opt_steps
    (a, *rest_a), (b, *rest_b) = run(True, tmp_path/'a'), run(False, tmp_path/'b')
    assert same(a, b) and all(map(same, rest_a[0], rest_b[0])) and rest_a[1:] == rest_b[1:]


class RatesSGD(optim.SGD):
    "Writes down the rate of each step"
    def step(self, closure=None):
        self.rates.append(self.param_groups[0]['lr'])
        return super().step(closure)


@pytest.mark.parametrize('name', ['batches', 'epochs', 'one_cycle', 'wsd', 'swa'])
def test_21_a_search_uses_the_rates_it_tries(name, tmp_path):
    "Those of the steps themselves: what the finder writes down stays the same when a schedule sets others"
    RatesSGD.rates = []
    learn = learner(*made(name, tmp_path), opt_func=RatesSGD)
    found = learn.lr_find(max_steps=20, show=False)
    assert RatesSGD.rates == pytest.approx([1e-5*1.3**i for i in range(len(RatesSGD.rates))]) and len(RatesSGD.rates) >= 19
    assert found.lrs[:len(RatesSGD.rates)] == pytest.approx(RatesSGD.rates)


def test_22_the_order_in_the_list_does_not_matter(tmp_path):
    "Callbacks that depend on each other each have their own order: the same run, rows, records, logs and averages, bit for bit"
    def run(shuffle, folder):
        rec, stats, logs = RecorderCB(lr=lambda cb: cb.pg['lr'], loss=lambda cb: cb.learn.loss.item()), ActivationStats(every=3, grads=True), []
        cbs = [DeviceCB('cpu'), AugmentCB(RandFlip()), MixUpCB(3), ChannelsLastCB(), MetricsCB(hits=Hits()), rec, stats, GradAccumCB(2), MixedPrecisionCB(),
               NaNGuardCB(), GradClipCB(norm=0.3), OneCycleCB(), EarlyStoppingCB('ema/hits'), EMACB(decay=0.8), SWACB('3ba', '2ba', apply=False), BNUpdateCB(),
               ProgressCB(view=View), LogCB(SimpleNamespace(log=logs.append), '2ba'), CheckpointCB(folder, best='ema/hits')]
        shuffle(cbs)
        learn = learner(*cbs)
        set_seed(1)
        learn.fit(2)
        averages = {f'{k} {n}': v for k, a in learn.averages.items() for n, v in a.weights.items()}
        tensors = {**state(learn), **averages, 'lrs': torch.tensor(rec.recs['lr']), 'losses': torch.tensor(rec.recs['loss']),
                   'stats': torch.stack([h.stats.means for h in stats]), 'grads': torch.stack([h.grads.stds for h in stats])}
        return tensors, *(sorted(map(str, o)) for o in (learn.history, logs)), learn.weights, sorted(p.name for p in folder.iterdir())
    first = run(lambda cbs: None, tmp_path/'0')
    for i, shuffle in enumerate([list.reverse, *(random.Random(k).shuffle for k in range(4))]):
        tensors, *rest = run(shuffle, tmp_path/f'{i + 1}')
        assert same(tensors, first[0]) and rest == list(first[1:])


def test_25_the_device_is_asked_for_when_it_is_needed(monkeypatch):
    "An accelerator that comes, or goes, after the import"
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda *args: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda *args: torch.device('meta'))
    x = torch.ones(2)
    got = [to_device(x), to_device([x])[0], collate_device([x]), next(get_model().parameters()), torch.empty(0, device=DeviceCB().device)]
    assert {t.device.type for t in got} == {'meta'}
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda *args: False)
    assert to_device(x).device.type == DeviceCB().device == 'cpu'


@pytest.mark.parametrize('order', [-50, 20, 35, 99])
def test_55_the_recorded_rate_is_the_one_that_the_step_used(order):
    "Wherever the recorder stands, in the list and by its order"
    class Steps(TrainLearner):
        def step(self):
            used.append([self.opt.param_groups[0][k] for k in ('lr', 'momentum')])
            super().step()
    for i in range(3):
        rec, used = RecorderCB(lr=lambda cb: cb.pg['lr'], mom=lambda cb: cb.learn.opt.param_groups[0]['momentum']), []
        rec.order = order
        cbs = [one_cycle(), EMACB()]
        cbs.insert(i, rec)
        fit(learner(*cbs, cls=Steps), 2)
        assert list(zip(rec.recs['lr'], rec.recs['mom'])) == [tuple(o) for o in used] and len({lr for lr, _ in used}) == 14


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('exc', [ZeroDivisionError(), KeyboardInterrupt(), CancelFitException(), CancelBatchException()], ids=repr)
@pytest.mark.parametrize('where', ['before_batch', 'after_predict', 'after_loss', 'after_batch', 'model', 'loss'])
def test_64_autocast_ends_with_the_batch(where, exc, training):
    "Whatever is raised between its beginning and its end, in a fit, in a look and in a search"
    class Fails(Callback):
        order, role, raised = 90, 'prepares', 0
        def go(self, learn):
            if learn.training == training and learn.iter == 1 and not Fails.raised:
                Fails.raised = 1
                raise exc
    if '_' in where: setattr(Fails, where, Fails.go)
    for go in (lambda: learn.fit(1), lambda: learn.get_preds(), lambda: learn.lr_find(max_steps=4, show=False)):
        Fails.raised, learn = 0, learner(MixedPrecisionCB(), cb := Fails())
        if where == 'model': learn.model[4].register_forward_hook(lambda m, inp, out: cb.go(learn))
        if where == 'loss': learn.loss_func = lambda *args: cb.go(learn) or F.cross_entropy(*args)
        try: go()
        except (ZeroDivisionError, KeyboardInterrupt): assert Fails.raised
        assert not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()


LOOKS = dict(fit=(lambda learn: learn.fit(1), (True, False)), validate=(lambda learn: learn.validate(), (False,)),
             get_preds=(lambda learn: learn.get_preds(), (False,)), lr_find=(lambda learn: learn.lr_find(max_steps=9, show=False), (True,)))
EVENTS = 'before_fit', 'before_epoch', 'before_batch', 'after_predict', 'after_batch', 'after_epoch', 'cleanup_epoch', 'after_fit'


@pytest.mark.parametrize('name, event, training', [
    (name, event, training) for name, (_, passes) in LOOKS.items() for event in EVENTS for training in passes
    if name != 'lr_find' or event not in ('after_epoch', 'after_fit')])              # which ends before
def test_69_ctrl_c_comes_out_when_all_is_tidy(name, event, training):
    "Neither swallowed, so that a script goes on to its next line, nor fatal: the learner trains on"
    class Tidies(Callback):
        order = -50
        def before_fit(self, learn): seen.append('begun')
        def cleanup_fit(self, learn): seen.append(type(learn.error))
    class Press(Callback):
        order, armed, role = 90, True, 'measures'
        def go(self, learn):
            if Press.armed and (event.endswith('fit') or learn.training == training): signal.raise_signal(signal.SIGINT)
    setattr(Press, event, Press.go)
    learn, seen = learner(Tidies(), EMACB(apply=False), Press(), MetricsCB(hits=Hits())), []
    modes = [m.training for m in learn.model.modules()]
    with pytest.raises(KeyboardInterrupt): LOOKS[name][0](learn)
    assert seen == (['begun', KeyboardInterrupt] if name == 'fit' else [])               # what only looks leaves out what only watches
    assert learn.weights == 'raw' and not learn.in_fit and learn.error is None and torch.is_grad_enabled()
    assert modes == [m.training for m in learn.model.modules()]
    Press.armed, steps = False, learn.opt_steps
    learn.fit(1)
    assert learn.opt_steps == steps + 7 and [r['train'] for r in learn.history[-3:]] == ['train', 'eval', 'eval']


def test_70_a_traceback_gives_way():
    "A notebook holds the last exception, that its frames, these the model, the batch and all activations: clean_mem lets go of them"
    outs = []
    learn = learner(EMACB(), ActivationStats(every=1, grads=True), At('after_backward', ZeroDivisionError(), 90))
    learn.model[0].register_forward_hook(lambda m, i, o: outs.append(weakref.ref(o)))
    refs = [weakref.ref(o) for o in (learn, learn.model)]
    try: learn.fit(1)
    except ZeroDivisionError as e: sys.last_exc, sys.last_value, sys.last_traceback, sys.last_type = e, e, e.__traceback__, type(e)
    del learn
    gc.collect()
    assert all(r() is not None for r in refs)                    # or there would be nothing to let go of
    clean_mem()
    assert outs and not [r for r in refs + outs if r() is not None]


def test_74_rows_of_uneven_batches():
    "Batches of 8, 8, … and 4, of 20, 20 and 16: each sample counts the same, for every set of weights; and for dicts"
    def exact(model):
        with torch.no_grad(): preds = model.double()(x.double())
        model.float()
        return F.cross_entropy(preds, y).item(), (preds.argmax(1) == y).double().mean().item()
    dls = data(60, 8, 22)
    x, y = dls.valid.dataset.tensors
    learn = learner(MetricsCB(hits=Hits()), EMACB(decay=0.5, apply=False), dls=dls)
    learn.fit(1)
    for row in learn.history[1:]:
        with learn.using(row['weights']) as m: loss, hits = exact(copy.deepcopy(m).eval())
        assert (row['loss'], row['hits']) == (pytest.approx(loss, rel=1e-5), pytest.approx(hits))
    still = learner(dls=data(60, 8), model=nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), lr=0.)
    still.fit(1, valid=False)
    assert still.history[0]['loss'] == pytest.approx(exact(still.model)[0], rel=1e-5)
