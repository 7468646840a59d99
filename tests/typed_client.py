"""A program that uses the public names as people do, for a type checker to read: `make types`

It is not run. `assert_type` says what the checker has to find out; a line marked `ignore` has to be an error, and the
checker complains where it is none."""
from functools import partial
from pathlib import Path
from typing import assert_type

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from fastswa.averaging import (SWAG, Average, Averages, LatestAverage, PostHocEMA, copy_params, ema, equal,
    held_weights, load_timm_ema, power, save_safetensors, to_averaged_model, uniform_soup, update_bn)
from fastswa.callbacks import (BNUpdateCB, CSVLoggerCB, DeviceCB, EarlyStoppingCB, EMACB, GradAccumCB, GradClipCB,
    LAWACB, MetricsCB, MixedPrecisionCB, OneCycleCB, ProgressCB, SWACB, SWAGCB)
from fastswa.checkpoint import CheckpointCB, load_from_hub, load_weights, read_checkpoint
from fastswa.compare import Comparison, compare
from fastswa.core import quiet, unwrap
from fastswa.data import DataLoaders, fashion_mnist, toy_images
from fastswa.nets import act_gr, conv, get_model, init_weights, lsuv
from fastswa.random_state import set_seed
from fastswa.training import Callback, Learner, MomentumLearner, TrainCB, TrainLearner


def own_loop(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    averages = Averages(model, steps_per_epoch=len(batches), n_epochs=5)
    assert_type(averages.add('ema', ema(half_life='0.05dur')), Average)
    averages.add('swa', equal(), start='0.75dur', every='0.01dur', valid=False)
    averages.add('mine', lambda n: 1/(n + 1))
    averages.step()
    averages.step(stepped=False)
    with averages.using('ema', bn_data=batches) as held: held.eval()
    averages.apply('ema')
    assert_type(averages.held, str)
    averages.restore()
    assert_type(averages.module('swa'), nn.Module)
    averages.load_state_dict(averages.state_dict())
    averages.stepp()      # pyright: ignore
    averages.step(3, 4)      # pyright: ignore


def one_average(model: nn.Module) -> None:
    average = Average(model, ema(decay=0.99, warmup='ratio'), dtype=torch.float32, exclude=['*.bias'])
    assert_type(average.update(), int)
    with average.applied(): model.eval()
    assert_type(average.module(), nn.Module)
    update_bn(model, [torch.zeros(2, 3)], n_batches=1)
    assert_type(held_weights(model), str)
    several = [LatestAverage(model, 5), SWAG(model, rank=20), Average(model, power(sigma_rel=0.1)), PostHocEMA(model)]
    for a in several: a.update()
    save_safetensors(average, Path('ema.safetensors'))
    to_averaged_model(average).update_parameters(model)
    load_timm_ema(average, dict(state_dict_ema={}), n=10)
    uniform_soup([model.state_dict(), model.state_dict()])
    copy_params(model, copy_params(model))
    ema(decya=0.9)      # pyright: ignore
    Average('model')      # pyright: ignore


class GradNormCB(Callback):
    def before_fit(self, learn: Learner) -> None: self.norms: list[Tensor] = []
    def after_backward(self, learn: Learner) -> None:
        grads = [p.grad for p in learn.model.parameters() if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(grads))


def learner() -> None:
    set_seed(0)
    dls = DataLoaders.in_memory(toy_images(1000, 200), bs=256, device='cpu')
    DataLoaders.from_dd(fashion_mnist(), 64, num_workers=2)
    model = get_model(act_gr, norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=0.1))
    cbs = [DeviceCB(), MetricsCB(accuracy=lambda p, t: (p.argmax(1) == t).float().mean()), ProgressCB(), GradNormCB(),
           EMACB(half_life='200ba'), SWACB(start='0.75dur'), LAWACB(k=5), SWAGCB(), BNUpdateCB(), GradAccumCB(2),
           GradClipCB(1.), MixedPrecisionCB(torch.float16), OneCycleCB(0.1), CSVLoggerCB('log.csv'),
           CheckpointCB('runs/a', best='ema/accuracy'), EarlyStoppingCB('ema/accuracy', restore_best=True)]
    learn = TrainLearner(model, dls, F.cross_entropy, lr=0.2, cbs=cbs, opt_func=partial(optim.SGD, momentum=0.9))
    learn.fit(5, lr=0.1, resume='runs/a')
    learn.fit(max_steps=1000, cbs=EMACB(apply=True))
    learn.lr_find()
    learn.fit_one_cycle(1, lr_max=1e-3)
    learn.apply('ema')
    assert_type(learn.weights, str)
    with learn.using('raw'): preds, targets = learn.get_preds()
    for row in learn.validate('ema'): print(row['accuracy'])
    assert_type(learn.module('ema'), nn.Module)
    assert_type(learn.averages, Averages)
    learn.save('a.pt')
    learn.load(Path('a.pt'), opt=False)
    learn.export('ema.safetensors', 'ema')
    assert_type(learn.push_to_hub('me/toy', weights='ema', private=True), str | None)
    assert_type(load_from_hub('me/toy', model), nn.Module)
    model.load_state_dict(load_weights('runs/a', 'ema'))
    read_checkpoint('a.pt')
    lsuv(model, torch.zeros(8, 1, 28, 28))
    with quiet(): Learner(unwrap(model), dls, cbs=TrainCB()).fit()
    MomentumLearner(model, dls, mom=0.9)
    conv(1, 8, ks=5)
    learn.fit(epochs=5)      # pyright: ignore
    learn.fitt(5)      # pyright: ignore
    learn.push_to_hub()      # pyright: ignore


def several_seeds() -> None:
    def make(seed: int) -> Learner: return TrainLearner(nn.Linear(3, 1), cbs=[BNUpdateCB()])
    found = compare(make, dict(ema=EMACB(), swa=SWACB()), seeds=5, epochs=8)
    assert_type(found, Comparison)
    found.plot()
    found.summary()
