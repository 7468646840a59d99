"Each callback of the library, as a user would write it: nothing stays replaced, errors come through, any order will do"
import random
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from fastswa.callbacks.augment import AugmentCB
from fastswa.data.transforms import RandFlip
from fastswa.callbacks.basics import BatchTransformCB, DeviceCB, RecorderCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.random_state import set_seed
from fastswa.callbacks.loggers import CSVLoggerCB
from fastswa.callbacks.schedule import OneCycleCB, WarmupStableDecayCB
from fastswa.training.events import Callback
from fastswa.callbacks.speed import ChannelsLastCB, CompileCB
from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.activations import ActivationStats
from fastswa.nets.statistics import append_stats
from fastswa.callbacks.activations import HooksCallback
from fastswa.callbacks.loggers import LogCB
from fastswa.callbacks.augment import CutMixCB, MixUpCB
from fastswa.callbacks.speed import MixedPrecisionCB
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.progress import ProgressCB
from fastswa.callbacks.schedule import BatchSchedCB, EpochSchedCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa_variants import BEMACB, PostHocEMACB, SWADCB, SWAGCB, SwitchEMACB
from fastswa.callbacks.swa import EMACB, LAWACB, SWACB
from fastswa.callbacks.steps import ClosureCB, GradAccumCB, GradClipCB, NaNGuardCB
from fastswa.callbacks.progress import LogView, View
from helpers import At, Hits, image_learner as learner, same, state

pytestmark = pytest.mark.usefixtures('strict')


def one_cycle(): return BatchSchedCB(partial(lr_scheduler.OneCycleLR, max_lr=0.1))


def eager(graph, inputs): return graph.forward


# each callback of the library, as a user would write it; those that need a folder get it
EVERY = dict(
    device=lambda tmp: DeviceCB('cpu'), transform=lambda tmp: BatchTransformCB(lambda b: b),
    metrics=lambda tmp: MetricsCB(hits=Hits()),
    recorder=lambda tmp: RecorderCB(lr=lambda cb: cb.pg['lr']), progress=lambda tmp: ProgressCB(view=LogView),
    batches=lambda tmp: one_cycle(),
    epochs=lambda tmp: EpochSchedCB(lr_scheduler.ReduceLROnPlateau), one_cycle=lambda tmp: OneCycleCB(),
    wsd=lambda tmp: WarmupStableDecayCB('1ba', '2ba'),
    ema=lambda tmp: EMACB(), swa=lambda tmp: SWACB('3ba', '1ba', swa_lr=0.01, anneal='3ba'),
    lawa=lambda tmp: LAWACB(2, '2ba', shape='1-sqrt'), swad=lambda tmp: SWADCB(1, 2), bema=lambda tmp: BEMACB(),
    swag=lambda tmp: SWAGCB(start='2ba', every='2ba'), post_hoc=lambda tmp: PostHocEMACB(every='3ba'),
    switch=lambda tmp: SwitchEMACB(decay=0.9, switch='3ba'),
    bn_update=lambda tmp: [EMACB(name='for bn'), BNUpdateCB()], hooks=lambda tmp: HooksCallback(append_stats),
    stats=lambda tmp: ActivationStats(every=2, grads=True),
    compiled=lambda tmp: CompileCB(backend=eager), channels_last=lambda tmp: ChannelsLastCB(),
    early=lambda tmp: EarlyStoppingCB(),
    bf16=lambda tmp: MixedPrecisionCB(), fp16=lambda tmp: MixedPrecisionCB('fp16'),
    accumulation=lambda tmp: GradAccumCB(2),
    clipping=lambda tmp: GradClipCB(norm=1.), guard=lambda tmp: NaNGuardCB(), closure=lambda tmp: ClosureCB(),
    mixup=lambda tmp: MixUpCB(3),
    cutmix=lambda tmp: CutMixCB(3), augment=lambda tmp: AugmentCB(RandFlip()),
    checkpoint=lambda tmp: CheckpointCB(tmp/'checkpoints', best='loss'),
    csv=lambda tmp: CSVLoggerCB(tmp/'log.csv'), log=lambda tmp: LogCB(SimpleNamespace(log=lambda d: None), '2ba'))


def made(name, tmp): return cbs if isinstance(cbs := EVERY[name](tmp), list) else [cbs]


@cache
def a_plain_learner():
    learn = learner()
    learn.fit(1)
    return learn


FIXED = 'model dls loss_func lr opt_func cbs own_cbs weights quiet in_fit'.split()
ENDS = dict(well=None, error=At('after_backward', ZeroDivisionError(), 90),
            ctrl_c=At('after_batch', KeyboardInterrupt(), 90, training=False))


@pytest.mark.parametrize('ends', ENDS)
@pytest.mark.parametrize('name', EVERY)
def test_nothing_of_the_learner_stays_replaced(name, ends, tmp_path):
    "Neither an attribute nor a method, nor one of another callback, however the fit ends"
    rec = RecorderCB(loss=lambda cb: cb.learn.loss.item())
    cbs = [rec, *filter(None, [ENDS[ends]])]
    learn, plain = learner(*cbs), a_plain_learner()
    fixed = {k: getattr(learn, k) for k in FIXED}
    functions = {k: v for cb in cbs for k, v in vars(cb).items() if callable(v)}
    if ends == 'well': learn.fit(1, cbs=made(name, tmp_path))
    else:
        with pytest.raises(type(ENDS[ends].exc)): learn.fit(1, cbs=made(name, tmp_path))
    learn.restore()
    for k, v in fixed.items(): assert getattr(learn, k) is v, k
    assert not [k for k in vars(learn) if not hasattr(plain, k)] and learn.epochs == range(1) and learn.error is None
    assert {k for k, v in vars(learn).items() if callable(v)} == {k for k, v in vars(plain).items() if callable(v)}
    assert functions == {k: v for cb in cbs for k, v in vars(cb).items() if callable(v)}
    for m in learn.model.modules():
        assert 'forward' not in vars(m)
        assert not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


@pytest.mark.parametrize('order', [-100, 100])
@pytest.mark.parametrize('name', EVERY)
def test_the_error_in_before_fit_is_the_one_to_see(name, order, tmp_path):
    "No cleanup fails for want of what before_fit would have set (that would be a warning), and the next fit is as any"
    learn, cbs = learner(), made(name, tmp_path)
    with pytest.raises(ZeroDivisionError, match='the real error'):
        learn.fit(1, cbs=[*cbs, At('before_fit', ZeroDivisionError('the real error'), order)])
    assert not learn.in_fit and learn.opt_steps == 0
    if name in ('csv', 'checkpoint'): return
    learn.fit(1, cbs=cbs)
    assert learn.opt_steps == (4 if name == 'accumulation' else 7)


@pytest.mark.parametrize('make, exc', [
    (lambda tmp: BatchSchedCB(lambda opt: 1/0), ZeroDivisionError),
    (lambda tmp: EpochSchedCB(lambda opt: None), TypeError), (lambda tmp: CheckpointCB(tmp/'file'), OSError),
    (lambda tmp: CSVLoggerCB(tmp), OSError),
    (lambda tmp: WarmupStableDecayCB('5ba', '5ba'), ValueError), (lambda tmp: CompileCB(mode='quick'), Exception),
    (lambda tmp: [MetricsCB(a=Hits()), MetricsCB(a=Hits())], ValueError), (lambda tmp: [EMACB(), EMACB()], ValueError),
    (lambda tmp: [ClosureCB(), GradAccumCB(2)], ValueError)])
def test_callbacks_whose_own_before_fit_fails(make, exc, tmp_path):
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


@pytest.mark.parametrize('name', EVERY)
def test_a_search_leaves_no_trace_in_a_run_with(name, tmp_path):
    "Each callback: between two fits, the second goes on as if nobody had searched, with the same averages"
    def run(search, folder):
        learn = learner(*made(name, folder))
        set_seed(1)
        learn.fit(1)
        if search: learn.lr_find(max_steps=9, show=False)
        if name == 'checkpoint': learn.cbs[0].path = folder/'more'
        averages = [{k: v.clone() for k, v in a.weights.items()}
                    for a in learn.averages.values() if hasattr(a, 'weights')]
        learn.fit(1)
        learn.restore()
        return state(learn), averages, learn.history, learn.opt_steps
    (a, *rest_a), (b, *rest_b) = run(True, tmp_path/'a'), run(False, tmp_path/'b')
    assert same(a, b) and all(map(same, rest_a[0], rest_b[0])) and rest_a[1:] == rest_b[1:]


def test_the_order_in_the_list_does_not_matter(tmp_path):
    "Callbacks that depend on each other each have their own order: the same run, rows, logs and averages, bit for bit"
    def run(shuffle, folder):
        rec = RecorderCB(lr=lambda cb: cb.pg['lr'], loss=lambda cb: cb.learn.loss.item())
        stats, logs = ActivationStats(every=3, grads=True), []
        cbs = [DeviceCB('cpu'), AugmentCB(RandFlip()), MixUpCB(3), ChannelsLastCB(), MetricsCB(hits=Hits()), rec, stats,
               GradAccumCB(2), MixedPrecisionCB(), NaNGuardCB(), GradClipCB(norm=0.3), OneCycleCB(),
               EarlyStoppingCB('ema/hits'), EMACB(decay=0.8), SWACB('3ba', '2ba', apply=False), BNUpdateCB(),
               ProgressCB(view=View), LogCB(SimpleNamespace(log=logs.append), '2ba'),
               CheckpointCB(folder, best='ema/hits')]
        shuffle(cbs)
        learn = learner(*cbs)
        set_seed(1)
        learn.fit(2)
        averages = {f'{k} {n}': v for k, a in learn.averages.items() for n, v in a.weights.items()}
        tensors = {**state(learn), **averages,
                   'lrs': torch.tensor(rec.recs['lr']), 'losses': torch.tensor(rec.recs['loss']),
                   'stats': torch.stack([h.stats.means for h in stats]),
                   'grads': torch.stack([h.grads.stds for h in stats])}
        return (dict(sorted(tensors.items())), *(sorted(map(str, o)) for o in (learn.history, logs)), learn.weights,
                sorted(p.name for p in folder.iterdir()))
    first = run(lambda cbs: None, tmp_path/'0')
    for i, shuffle in enumerate([list.reverse, *(random.Random(k).shuffle for k in range(4))]):
        tensors, *rest = run(shuffle, tmp_path/f'{i + 1}')
        assert same(tensors, first[0]) and rest == list(first[1:])


@pytest.mark.parametrize('given', [lambda loss: loss, partial, lambda loss: loss.forward])
def test_class_weights_move_with_the_model(given):
    "Wrong: they stay on the CPU, and the first batch fails"
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    learn = learner(DeviceCB('meta'))
    learn.loss_func = given(loss)
    learn.fit(0)
    assert loss.weight.is_meta and all(t.is_meta for t in learn.model.state_dict().values())


class Volumes(nn.Module):
    "Convolutions of two and of three dimensions, forwards and transposed, and one of a single dimension"
    def __init__(self):
        super().__init__()
        self.image, self.volume = nn.Conv2d(2, 4, 3, padding=1), nn.Conv3d(1, 3, 3, padding=1)
        self.up, self.line = nn.ConvTranspose3d(3, 2, 2), nn.Conv1d(2, 2, 1)
        self.register_buffer('mean', torch.zeros(1, 2, 1, 1))
    def forward(self, x):
        x = self.up(self.volume(self.image(x - self.mean)[:, None]))
        return self.line(x.mean((2, 3))).mean(2)


class Video(nn.Module):
    "Frames one by one through a convolution of two dimensions: a view of (N, T, C, H, W) as (N*T, C, H, W)"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
    def forward(self, x): return self.conv(x.view(-1, *x.shape[2:])).mean((1, 2, 3)).view(len(x), -1)


@pytest.mark.parametrize('make, shape, out', [(Volumes, (4, 2, 8, 8), 2), (Video, (4, 5, 2, 8, 8), 5)])
def test_channels_last_gives_each_layer_its_format(make, shape, out):
    "torch's `to(memory_format=)` fails for weights of five dimensions; a video for layers of two has to stay as it is"
    torch.manual_seed(0)
    batches = [(torch.randn(shape), torch.randn(4, out)) for _ in range(3)]
    def trained(*cbs):
        torch.manual_seed(1)
        learn = TrainLearner(make(), SimpleNamespace(train=batches, valid=batches), F.mse_loss, 0.1, cbs)
        learn.fit(2)
        return learn.model
    model, plain = trained(ChannelsLastCB()), trained()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for (name, t), p in zip(model.state_dict().items(), plain.state_dict().values()):
        assert t.is_contiguous(memory_format=formats.get(t.ndim, torch.contiguous_format)), name
        torch.testing.assert_close(t, p, rtol=1e-4, atol=1e-5, check_stride=False)


def test_channels_last_holds_from_the_first_layer_on():
    "Wrong: the weight of one channel, whose strides fit any layout, leaves its layer, often the largest, as it was"
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,)))]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    TrainLearner(model, SimpleNamespace(train=batches, valid=None), F.cross_entropy, 0.1, ChannelsLastCB()).fit(1)
    torchs = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
    assert model[0].weight.stride() == torchs.weight.stride()
    assert model[0](batches[0][0]).is_contiguous(memory_format=torch.channels_last)
