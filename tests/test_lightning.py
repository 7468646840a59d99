"Averages in Lightning's Trainer: the run as it would be without, figures of each average, checkpoints, resume, steps"
import copy
import importlib.metadata
import logging
import os
import pickle
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

L = pytest.importorskip('lightning.pytorch')
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchmetrics import Accuracy

from fastswa.averaging import Average, LatestAverage, ema, equal, load_lightning
from fastswa.data import DataLoaders, toy_images
from fastswa.integrations.lightning import AveragesCallback

for name in 'lightning.pytorch', 'lightning.fabric': logging.getLogger(name).setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings(
    'ignore:.*(num_workers|logging interval|LeafSpec|val_dataloader|isinstance.treespec|exists and is not empty)')


def points(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    return TensorDataset(F.one_hot(y, 3).float() + torch.randn(n, 3, generator=g)/2, y)

TRAIN,VALID = points(64),points(20, 1)      # 8 steps in an epoch; a last, smaller batch in a validation


class Model(L.LightningModule):
    "A perceptron that logs a loss, a metric object, and what it gathers itself in a validation"
    def __init__(self, norm=True, dropout=0.3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(),
                                 nn.Dropout(dropout), nn.Linear(8, 3))
        self.acc,self.losses = Accuracy('multiclass', num_classes=3),[]

    def forward(self, x): return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log('train_loss', loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        out = self(batch[0])
        loss = F.cross_entropy(out, batch[1])
        self.acc(out, batch[1])
        self.log('val_loss', loss, prog_bar=True)
        self.log_dict(dict(val_acc=self.acc))
        self.losses.append(loss.item())

    def on_validation_epoch_end(self):
        self.log('val_steps', float(len(self.losses)))
        self.losses.clear()

    test_step = validation_step
    def on_test_epoch_end(self): self.losses.clear()
    def predict_step(self, batch, batch_idx): return self(batch[0])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class Weights(L.Callback):
    "The weights after each batch"
    def __init__(self): self.seen = []
    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def trainer(*cbs, n=2, package=L, **kw):
    options = dict(max_epochs=n, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   enable_model_summary=False)
    return package.Trainer(callbacks=[*cbs], **options | kw)

def loaders(**kw):
    g = torch.Generator().manual_seed(1)
    return DataLoader(TRAIN, 8, shuffle=True, generator=g, **kw), DataLoader(VALID, 8, **kw)

def fit(*cbs, model=None, dls=None, ckpt_path=None, **kw):
    torch.manual_seed(0)
    if not isinstance(model, nn.Module): model = (model or Model)()
    t = trainer(*cbs, **kw)
    t.fit(model, *(dls or loaders()), ckpt_path=ckpt_path)
    return model,t

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))

def averaged(snapshots, decay, name):
    "By hand, in float64"
    mean = snapshots[0][name].double()
    for s in snapshots[1:]: mean = decay*mean + (1 - decay)*s[name].double()
    return mean


# --- a run


def test_the_run_is_the_same_bit_for_bit():
    "Wrong: a second reading of the loaders moves a generator; a metric or list of the module holds two validations"
    plain,before = fit(n=3)
    cb = AveragesCallback(ema=ema(0.9), swa=dict(start='0.5dur', every='1ep'))
    model,after = fit(cb, n=3)
    assert same(plain.state_dict(), model.state_dict())
    raw = {k: v for k, v in after.callback_metrics.items() if '/' not in k}
    assert raw == before.callback_metrics
    assert {*after.callback_metrics} == {*raw} | {f'{a}/{k}' for a in ('ema', 'swa') for k in raw if k != 'train_loss'}
    assert after.progress_bar_metrics.keys() == {'val_loss', 'ema/val_loss', 'swa/val_loss'}

def test_averages_and_their_figures_are_right():
    "Against sums in float64 and a copy of the model; batches of the validation are not of one size"
    w,cb = Weights(),AveragesCallback(ema=ema(0.8), swa=dict(rule=equal(), start='0.5dur', every='0.25dur'))
    model,t = fit(w, cb, model=Model(norm=False))
    for name, snapshots, decay in ('ema', w.seen, 0.8), ('swa', w.seen[7::4], None):
        assert cb.averages[name].n == len(snapshots)
        copy_ = copy.deepcopy(model).eval()
        for k, p in copy_.named_parameters():
            mean = torch.stack([s[k].double() for s in snapshots]).mean(0)
            p.data = (mean if decay is None else averaged(snapshots, decay, k)).float()
            torch.testing.assert_close(cb.averages[name].weights[k], p.data)
        out = copy_(VALID.tensors[0])
        torch.testing.assert_close(t.callback_metrics[f'{name}/val_loss'], F.cross_entropy(out, VALID.tensors[1]))
        acc = (out.argmax(1) == VALID.tensors[1]).float().mean()
        torch.testing.assert_close(t.callback_metrics[f'{name}/val_acc'], acc)
        assert t.callback_metrics[f'{name}/val_steps'] == 3      # wrong: 6 or 9, with those of other weights

def test_batchnorm_statistics_fit():
    "Those of all training inputs under the averaged weights. Wrong: the running mean of the raw run's"
    cb = AveragesCallback(ema=ema(0.9), apply='ema')
    model,t = fit(cb)
    x = model.net[0](TRAIN.tensors[0])
    torch.testing.assert_close(model.net[1].running_mean, x.mean(0))
    torch.testing.assert_close(model.net[1].running_var, x.var(0))
    assert t.validate(model, loaders()[1], verbose=False)[0]['val_loss'] == pytest.approx(
        t.callback_metrics['val_loss'].item())
    few = AveragesCallback(ema=ema(0.9), apply='ema', bn_batches=0)
    other,_ = fit(few)
    assert torch.equal(other.net[1].running_mean, few.averages['ema'].weights['net.1.running_mean'])

def test_batchnorm_statistics_are_those_of_the_loader_now():
    "Wrong: of the first epoch's loader, where each epoch makes its own, as for images that grow"
    class Grows(Model):
        epochs = 0
        def train_dataloader(self):
            self.epochs += 1
            return DataLoader(TensorDataset(self.epochs*TRAIN.tensors[0], TRAIN.tensors[1]), 8)
        def val_dataloader(self): return loaders()[1]
    model,cb = Grows(),AveragesCallback(ema=ema(0.9), apply='ema')
    trainer(cb, n=3, reload_dataloaders_every_n_epochs=1).fit(model)
    torch.testing.assert_close(model.net[1].running_mean, model.net[0](3*TRAIN.tensors[0]).mean(0))

def test_figures_reach_loggers(tmp_path):
    fit(AveragesCallback(ema=ema(0.9)), logger=CSVLogger(tmp_path))
    header,*rows = (next(tmp_path.rglob('metrics.csv'))).read_text().splitlines()
    assert {'val_loss', 'ema/val_loss', 'ema/val_acc'} < {*header.split(',')}
    # a row of the raw weights, and one of the average, for each epoch
    assert [[bool(v) for v in r.split(',')].count(True) for r in rows] == [5, 5]*2

def test_early_stopping_and_best_checkpoint_watch_an_average(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor='ema/val_loss', save_top_k=1)
    stop = EarlyStopping('ema/val_loss', patience=1, min_delta=10.)
    _,t = fit(stop, AveragesCallback(ema=ema(0.9)), best, n=9, enable_checkpointing=True)
    assert t.current_epoch == 2 and best.best_model_score == t.callback_metrics['ema/val_loss']

def test_several_loaders_and_per_step_logs():
    class Two(Model):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log('mean', batch[0].mean())
            self.log('step', 1., on_step=True, on_epoch=False)
            self.log('sum', 1., reduce_fx='sum')
    other = TensorDataset(VALID.tensors[0] + 1, VALID.tensors[1])
    train,valid = loaders()
    _,t = fit(AveragesCallback(ema=ema(0.9)), model=Two(), dls=(train, [valid, DataLoader(other, 3)]))
    m = t.callback_metrics
    for k in 'mean/dataloader_idx_0', 'mean/dataloader_idx_1', 'sum/dataloader_idx_0', 'sum/dataloader_idx_1':
        torch.testing.assert_close(m[f'ema/{k}'], m[k])
    assert 'ema/step' not in m and m['ema/sum/dataloader_idx_1'] == 7

def test_sanity_check_and_barebones_show_no_averages():
    class Seen(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.sanity_checking: self.at_check = {*trainer.callback_metrics}
    seen,cb = Seen(),AveragesCallback(ema=ema(0.9))
    model,t = fit(seen, cb, num_sanity_val_steps=2)
    assert not any(k.startswith('ema') for k in seen.at_check)
    t.fit_loop.max_epochs = 3
    t.fit(model, *loaders())      # goes on: the average has snapshots at the sanity check of this run
    assert not any(k.startswith('ema') for k in seen.at_check) and cb.averages['ema'].n == 24

def test_loaders_that_cannot_be_read_twice_are_named():
    class Once(IterableDataset):
        def __iter__(self): return iter(self.rest)
    once = Once()
    once.rest = iter([*VALID]*2)
    with pytest.raises(MisconfigurationException, match="3 batches, and 2 when its loaders .* again for 'ema'"):
        fit(AveragesCallback(ema=ema(0.9)), dls=(loaders()[0], DataLoader(once, 8)), limit_val_batches=3,
            num_sanity_val_steps=0)

def test_loaders_in_memory():
    "Wrong: an AttributeError, since Lightning asks what has a sampler for its batch_sampler"
    images,cb = DataLoaders.in_memory(toy_images(40, 20), 8),AveragesCallback(ema=ema(0.9))
    class Images(Model):
        def __init__(self):
            super().__init__(norm=False)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
            self.acc = Accuracy('multiclass', num_classes=10)
    _,t = fit(cb, model=Images, dls=(images.train, images.valid), n=1)
    assert cb.averages['ema'].n == 5 and 'ema/val_loss' in t.callback_metrics

def test_persistent_workers_go_on():
    "Wrong: BatchNorm statistics read the training loader with the workers of the epoch, which ends then"
    options = dict(num_workers=1, persistent_workers=True)
    model,_ = fit(AveragesCallback(ema=ema(0.9)), dls=loaders(**options), val_check_interval=4, n=1)
    assert same(model.state_dict(), fit(dls=loaders(**options), val_check_interval=4, n=1)[0].state_dict())


# --- steps


def test_batches_without_a_step_do_not_count():
    "Accumulation over 3 of 8 batches makes 3 steps an epoch"
    w,cb = Weights(),AveragesCallback(ema=ema(0.8))
    fit(w, cb, accumulate_grad_batches=3)
    assert cb.averages['ema'].n == 6 and cb.averages.clock.batches == 16
    steps = [w.seen[i] for i in (2, 5, 7, 10, 13, 15)]
    mean = cb.averages['ema'].weights['net.0.weight'].double()
    torch.testing.assert_close(mean, averaged(steps, 0.8, 'net.0.weight'))

@pytest.mark.parametrize('fused', [False, True])
def test_steps_that_mixed_precision_skips_do_not_count(fused):
    """fp16 autocast on the CPU, by the plugin that precision='16-mixed' makes on a GPU. Lightning's global_step counts
    them; a fused optimizer skips on the device"""
    class Overflows(Model):
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, fused=fused)
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss*float('inf') if batch_idx in (2, 3) else loss
    scaled = MixedPrecision('16-mixed', 'cpu', scaler=torch.amp.GradScaler('cpu', init_scale=4.))
    cb = AveragesCallback(ema=ema(0.9))
    _,t = fit(cb, model=Overflows(), plugins=[scaled], n=1)
    assert t.global_step == 8 and (cb.averages['ema'].n, cb.averages['ema'].skipped) == (6, 0)

def test_a_training_step_of_none_does_not_count():
    class Skips(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None
    cb = AveragesCallback(ema=ema(0.9))
    fit(cb, model=Skips(), n=1)
    assert cb.averages['ema'].n == 4

def test_manual_optimization_with_two_optimizers():
    "A batch in which both step makes one step; times in shares of a run of max_steps, which counts each, are right"
    class Manual(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.net[0], self.net[4])]
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            for o in self.optimizers(): o.zero_grad()
            self.manual_backward(loss)
            if batch_idx % 2:
                for o in self.optimizers(): o.step()
    cb = AveragesCallback(ema=ema(0.9), swa=dict(start='0.5dur'), apply='ema')
    model,t = fit(cb, model=Manual(), n=None, max_steps=16)
    assert (t.global_step, cb.averages['ema'].n, cb.averages['swa'].n) == (16, 8, 5)
    torch.testing.assert_close(model.net[1].running_mean, model.net[0](TRAIN.tensors[0]).mean(0))

@pytest.mark.parametrize('ends', [dict(max_steps=24), dict(n=2)], ids=['by steps', 'by epochs'])
def test_optimizers_that_step_at_different_rates(ends):
    """One at each batch, one at every second: 3 of Lightning's steps for 2 batches, so 16 batches in 24 steps

    Wrong: 24 steps are taken for 12 batches, so that SWA begins too early and the last quarter lies beyond the run"""
    class Alternating(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.net[0], self.net[4])]
        def training_step(self, batch, batch_idx):
            one,other = self.optimizers()
            for o in one, other: o.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            one.step()
            if batch_idx % 2: other.step()
    cb = AveragesCallback(ema=ema(0.9), swa=dict(start='0.5dur'), last=dict(start='1dur'))
    _,t = fit(cb, model=Alternating(), **dict(n=None) | ends)
    assert (t.global_step, cb.averages['ema'].n, cb.averages['swa'].n, cb.averages['last'].n) == (24, 16, 9, 1)

@pytest.mark.parametrize('options', [
    dict(precision='bf16-mixed'), dict(precision='bf16-true'), dict(gradient_clip_val=0.1, accumulate_grad_batches=2)])
def test_other_ways_to_train(options):
    "The run as without; the average of half-precision weights is fp32"
    dls = loaders()
    cb = AveragesCallback(ema=ema(0.9))
    model,t = fit(cb, n=1, model=partial(Model, norm=False), dls=dls, **options)
    plain,_ = fit(n=1, model=partial(Model, norm=False), **options)
    assert same(plain.state_dict(), model.state_dict()) and 'ema/val_loss' in t.callback_metrics
    assert cb.averages['ema'].weights['net.0.weight'].dtype == torch.float32

def test_a_compiled_network():
    "Wrong: it computes with the raw weights, or names begin with _orig_mod"
    class Compiled(Model):
        def __init__(self):
            super().__init__(norm=False)
            self.net = torch.compile(self.net, backend='eager')
    cb = AveragesCallback(ema=ema(0.9))
    model,t = fit(cb, n=1, model=Compiled)
    assert 'net.0.weight' in cb.averages['ema'].weights
    with cb.averages.using('ema'): loss = F.cross_entropy(model.eval().net(VALID.tensors[0]), VALID.tensors[1])
    torch.testing.assert_close(t.callback_metrics['ema/val_loss'], loss)


class BothAlike(L.Callback):
    "By how much the averages of two processes differ, for the process that started them"
    def on_train_end(self, trainer, pl_module):
        ours = next(cb for cb in trainer.callbacks if isinstance(cb, AveragesCallback)).averages['ema']
        names = [k for k, _ in pl_module.named_parameters()]
        one,other = trainer.strategy.all_gather(torch.cat([ours.weights[k].flatten() for k in names]))
        trainer.callback_metrics.update(n=torch.tensor(ours.n), apart=(one - other).abs().max())

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
@pytest.mark.filterwarnings('ignore:.*(sync_dist|multi-threaded|all_gather is deprecated)')
def test_two_processes():
    "DDP: the run as without, the same average in both, figures of all of the validation"
    two = dict(strategy='ddp_fork', devices=2, n=1)
    _,plain = fit(**two)
    _,t = fit(BothAlike(), AveragesCallback(ema=ema(0.9), apply='ema'), **two)
    m = t.callback_metrics
    assert {k: m[k] for k in plain.callback_metrics} == plain.callback_metrics
    assert (m['n'], m['apart']) == (4, 0) and m['ema/val_acc']*20 == round((m['ema/val_acc']*20).item())


# --- checkpoints


def test_a_checkpoint_holds_raw_weights_and_averages(tmp_path):
    "Lightning#20545: one of them was missing, or they could not be loaded"
    w,cb = Weights(),AveragesCallback(ema=ema(0.9), swa=dict(start='0.5dur'))
    model,t = fit(cb, w, ModelCheckpoint(tmp_path, filename='last'), enable_checkpointing=True)
    path,raw = tmp_path/'last.ckpt',w.seen[-1]
    assert same(torch.load(path)['state_dict'], raw) and same(Model.load_from_checkpoint(path).state_dict(), raw)
    fresh,other = AveragesCallback(ema=ema(0.9), swa=dict(start='0.5dur'), apply='swa'),Model()
    rows = trainer(fresh).test(other, loaders()[1], ckpt_path=path, verbose=False)
    for name in 'ema', 'swa': assert same(fresh.averages[name].weights, cb.averages[name].weights)
    assert fresh.averages.held == 'swa'
    assert rows[0]['val_loss'] == pytest.approx(t.callback_metrics['swa/val_loss'].item())
    assert same(fresh.averages.weights('raw'), {k: raw[k] for k in fresh.averages.weights('raw')})

@pytest.mark.parametrize('how', ['applied', 'in a look', 'at the end'])
def test_a_checkpoint_made_while_an_average_is_held(tmp_path, how):
    "Wrong: the average as the raw weights (nequip#590), of which a resumed run would train on"
    w,cb = Weights(),AveragesCallback(ema=ema(0.9), apply='ema' if how == 'at the end' else None)
    model,t = fit(cb, w)
    path = tmp_path/'held.ckpt'
    if how == 'in a look':
        with cb.averages.using('ema'): t.save_checkpoint(path)
    else:
        if how == 'applied': cb.averages.apply('ema')
        held = {k: v.clone() for k, v in model.state_dict().items()}
        t.save_checkpoint(path)
        assert same(held, model.state_dict()) and cb.averages.held == 'ema'
    assert same(torch.load(path)['state_dict'], w.seen[-1])

@pytest.mark.parametrize('at', [5, 8, 11])
def test_exact_resume(tmp_path, at):
    "Also in the midst of an epoch, with a half-life and a start that depend on the length of the run"
    class ByNumber(Model):      # Lightning does not wind loaders forward
        def training_step(self, batch, batch_idx):
            return super().training_step([t[batch_idx::8] for t in TRAIN.tensors], batch_idx)
    def cb(): return AveragesCallback(ema=ema(half_life='0.2dur'), swa=dict(start='0.25dur', every='3ba'),
                                      lawa=dict(rule=LatestAverage, k=2, every='0.25ep'), apply='ema')
    def go(*cbs, **kw): return fit(*cbs, model=ByNumber(dropout=0.), **kw)
    whole = cb()
    saver = ModelCheckpoint(tmp_path, filename='{step}', every_n_train_steps=at, save_top_k=-1)
    model,t = go(whole, saver, enable_checkpointing=True)
    rest = cb()
    resumed,t2 = go(rest, ckpt_path=tmp_path/f'step={at}.ckpt')
    assert same(model.state_dict(), resumed.state_dict()) and t.global_step == t2.global_step == 16
    for name in 'ema', 'swa', 'lawa':
        assert rest.averages[name].n == whole.averages[name].n > 0
        assert same(rest.averages[name].weights, whole.averages[name].weights)

def test_a_file_of_other_averages_or_another_model(tmp_path):
    path = tmp_path/'a.ckpt'
    fit(AveragesCallback(ema=ema(0.9)))[1].save_checkpoint(path)
    with pytest.raises(MisconfigurationException, match='ema only in the state, swa only here'):
        fit(AveragesCallback(swa=equal()), ckpt_path=path, n=3)
    class Other(Model):
        strict_loading = False
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Linear(8, 3, bias=False)
        def load_state_dict(self, *args, **kw): return None
    with pytest.raises(MisconfigurationException, match='net.4.bias'):
        trainer(AveragesCallback(ema=ema(0.9))).test(Other(), loaders()[1], ckpt_path=path)

def test_a_callback_that_was_not_there_before(tmp_path):
    "It begins with the rest of the run. Wrong: shares of a run that is half over are those of the whole"
    path = tmp_path/'a.ckpt'
    fit()[1].save_checkpoint(path)
    cb = AveragesCallback(swa=dict(start='0.5dur'))
    fit(cb, ckpt_path=path, n=4)
    assert cb.averages['swa'].n == 9


# --- the end of a run


def test_the_chosen_average_is_tested_predicted_with_and_exported():
    cb = AveragesCallback(ema=ema(0.9), swa=equal(), apply='swa')
    model,t = fit(cb)
    module = cb.averages['swa'].module()
    x = VALID.tensors[0]
    assert cb.averages.held == 'swa' and not module.training
    predicted = torch.cat(t.predict(model, DataLoader(TensorDataset(x), 8)))
    torch.testing.assert_close(predicted, cb.averages.module('swa')(x))
    assert t.test(model, loaders()[1], verbose=False)[0]['val_loss'] == pytest.approx(
        F.cross_entropy(predicted, VALID.tensors[1]).item())
    with cb.averages.using('ema'): t.test(model, loaders()[1], verbose=False)
    assert cb.averages.held == 'swa'
    cb.averages.restore()
    assert same(model.state_dict(), fit()[0].state_dict())

def test_a_second_fit_goes_on_from_the_raw_weights():
    cb = AveragesCallback(ema=ema(0.9), apply='ema')
    model,t = fit(cb, n=1)
    t.fit_loop.max_epochs = 2
    t.fit(model, *loaders())
    cb.averages.restore()
    plain,p = fit(n=1)
    p.fit_loop.max_epochs = 2
    p.fit(plain, *loaders())
    assert same(model.state_dict(), plain.state_dict()) and cb.averages['ema'].n == 16

def test_nothing_is_applied_before_the_first_update():
    "Lightning#21724: the model held an untrained copy"
    cb = AveragesCallback(swa=dict(start='1ep', every='3ep'), apply='swa')
    with pytest.warns(UserWarning, match="'swa' has no snapshot: the model holds its raw weights"): model,t = fit(cb)
    assert same(model.state_dict(), fit()[0].state_dict()) and not any('swa' in k for k in t.logged_metrics)

def test_a_metric_of_an_average_that_has_not_begun(tmp_path):
    "For callbacks it stands for the raw weights until then. Wrong: ModelCheckpoint and EarlyStopping raise an error"
    best,seen = ModelCheckpoint(tmp_path, monitor='swa/val_loss', save_top_k=-1, filename='{epoch}'),[]
    class Note(L.Callback):
        def on_validation_end(self, trainer, pl_module): seen.append(dict(trainer.callback_metrics))
    cb = AveragesCallback(swa=dict(start='2ep', every='1ba'))
    train,valid = loaders()
    other = DataLoader(VALID, 5)
    fit(EarlyStopping('swa/val_loss', patience=9), Note(), cb, best, n=3, enable_checkpointing=True)
    a,b,c = ([m[k].item() for k in ('val_loss', 'swa/val_loss')] for m in seen[1:])
    assert a[0] == a[1] and b[0] != b[1] and c[0] != c[1] and len(best.best_k_models) == 3
    _,t = fit(cb, dls=(train, [valid, other]), n=1)
    assert t.callback_metrics['swa/val_loss/dataloader_idx_1'] == t.callback_metrics['val_loss/dataloader_idx_1']

def test_an_exception_leaves_the_raw_weights():
    class Fails(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module): raise KeyError('no')
    cb = AveragesCallback(ema=ema(0.9), apply='ema')
    model = Model()
    with pytest.raises(KeyError): fit(cb, Fails(), model=model)
    assert cb.averages.held == 'raw'
    class FailsIn(Model):
        def validation_step(self, batch, batch_idx):
            if cb.averages is not None and cb.averages.held == 'ema': raise KeyError('no')
    model = FailsIn()
    with pytest.raises(KeyError): fit(cb, model=model)
    assert cb.averages.held == 'raw' and 'log' not in vars(model)


# --- what is refused, and other models


def test_what_is_refused_before_training():
    with pytest.raises(RuntimeError, match='more than one stateful callback'):
        trainer(AveragesCallback(ema=ema(0.9)), AveragesCallback(swa=equal()))
    cb = AveragesCallback(ema=ema(0.9))
    with pytest.raises(RuntimeError, match='more than one stateful callback'): trainer(cb, cb)
    with pytest.raises(ValueError, match="apply must be 'ema'; got 'swa'"): AveragesCallback(ema=ema(0.9), apply='swa')
    with pytest.raises(TypeError, match="got name='ema'"): AveragesCallback(name='ema', ema=ema(0.9))
    sharded = SimpleNamespace(strategy=L.strategies.FSDPStrategy(), callbacks=[cb])
    with pytest.raises(MisconfigurationException, match='does not support FSDPStrategy'): cb.setup(sharded, None, 'fit')

def test_a_callback_can_be_copied():
    "Processes that are spawned get a pickled one. Wrong: its class, made for the packages at hand, has no name"
    for cb in pickle.loads(pickle.dumps(AveragesCallback(ema=ema(0.9)))), copy.deepcopy(AveragesCallback(ema=ema(0.9))):
        assert isinstance(cb, L.Callback)
        fit(cb, n=1)
        assert cb.averages['ema'].n == 8

@pytest.mark.parametrize('when', [dict(start='0.5dur'), dict(rule=ema(half_life='0.1dur'))])
def test_shares_of_a_run_without_length(when):
    model,w = Model(),Weights()
    with pytest.raises(MisconfigurationException, match='needs'):
        fit(w, AveragesCallback(a=when), model=model, max_steps=-1, n=-1)
    assert w.seen == []

def test_a_run_of_steps_without_a_length_of_the_loader():
    class Endless(IterableDataset):
        def __iter__(self):
            while True: yield from TRAIN
    cb = AveragesCallback(swa=dict(start='0.5dur'), ema=ema(half_life='0.1dur'), apply='ema')
    model,_ = fit(cb, dls=(DataLoader(Endless(), 8), loaders()[1]), n=None, max_steps=8, val_check_interval=4)
    assert cb.averages['swa'].n == 5
    torch.testing.assert_close(model.net[1].running_mean, model.net[0](TRAIN.tensors[0]).mean(0))

def test_a_model_that_is_configured_late():
    "Lightning#21414: the average was of the layers that were there before"
    class Late(Model):
        def __init__(self):
            super().__init__()
            self.net = None
        def configure_model(self):
            if self.net is None: self.net = Model().net
    cb = AveragesCallback(ema=ema(0.9))
    model,t = fit(cb, model=Late())
    assert cb.averages['ema'].weights.keys() >= {k for k, _ in model.named_parameters()}
    assert 'ema/val_loss' in t.callback_metrics

def test_a_lightning_that_is_too_old(monkeypatch):
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '2.4.9')
    with pytest.raises(ImportError, match='needs lightning 2.5 or newer; this is 2.4.9'): AveragesCallback(ema=ema(0.9))

def test_the_other_package():
    "The trainer decides; wrong: its package does not know the callback"
    P = pytest.importorskip('pytorch_lightning')
    class Old(P.LightningModule):
        forward,validation_step = Model.forward,Model.validation_step
        training_step,configure_optimizers = Model.training_step,Model.configure_optimizers
        def __init__(self):
            super().__init__()
            other = Model()
            self.net,self.acc,self.losses = other.net,other.acc,[]
    cb = AveragesCallback(ema=ema(0.9), apply='ema')
    assert isinstance(cb, P.Callback) and isinstance(cb, L.Callback) and isinstance(cb, AveragesCallback)
    _,t = fit(cb, model=Old(), package=P)
    assert 'ema/val_acc' in t.callback_metrics and cb.averages.held == 'ema'
    with pytest.raises(P.utilities.exceptions.MisconfigurationException):
        fit(AveragesCallback(a=dict(start='0.5dur')), model=Old(), package=P, max_steps=-1, n=-1)


# --- Lightning's own averages


@pytest.mark.parametrize('theirs', ['WeightAveraging', 'EMAWeightAveraging', 'StochasticWeightAveraging'])
def test_their_checkpoints_load_into_an_average(tmp_path, theirs):
    "Wrong: the raw weights, or a count from which the next update weighs too much"
    cls = getattr(L.callbacks, theirs)
    cb = cls(0.05, swa_epoch_start=1, annealing_epochs=1) if theirs.startswith('Stoch') else cls()
    saver = ModelCheckpoint(tmp_path, filename='{epoch}', save_top_k=-1)
    model,_ = fit(cb, saver, model=partial(Model, norm=False), n=3, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path/'epoch=2.ckpt')
    average = Average(model, equal())
    load_lightning(average, checkpoint)
    assert average.n == (3 if theirs.startswith('Stoch') else 24)
    assert same(average.weights, model.state_dict())      # theirs at the end
    before = {k: v.clone() for k, v in average.weights.items()}
    with torch.no_grad(): model.net[0].weight.add_(1.)
    average.update()
    moved = average.weights['net.0.weight'] - before['net.0.weight']
    torch.testing.assert_close(moved, torch.full_like(moved, 1/average.n))


def theirs(model=partial(Model, norm=False), more=(), **kw):
    "A run with their average: model, trainer, callback, weights after each batch"
    cb,w = L.callbacks.EMAWeightAveraging(**kw.pop('options', dict(decay=0.9))),Weights()
    model,t = fit(w, cb, *more, model=model, **kw)
    return model,t,cb,w.seen

def test_what_the_table_of_features_says_of_their_averages(tmp_path):
    "One validation, of the average, by the raw names; in a file it is the `state_dict`; raw weights go in the end"
    model,t,cb,seen = theirs(more=[saver := ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    by_hand = averaged(seen, 0.9, 'net.0.weight')
    torch.testing.assert_close(model.net[0].weight.double(), by_hand, check_dtype=False)
    loss = F.cross_entropy(model.eval()(VALID.tensors[0]), VALID.tensors[1])
    torch.testing.assert_close(t.callback_metrics['val_loss'], loss)
    assert not any('/' in k for k in t.callback_metrics)
    file = torch.load(saver.best_model_path)
    assert same(file['state_dict'], model.state_dict()) and same(file['current_model_state'], seen[-1])
    with pytest.raises(RuntimeError, match='more than one stateful callback'): trainer(cb, type(cb)())

def test_before_their_first_update_the_initial_weights_are_validated():
    torch.manual_seed(0)
    model = Model(norm=False)
    loss = F.cross_entropy(copy.deepcopy(model).eval()(VALID.tensors[0]), VALID.tensors[1])
    _,t,*_ = theirs(model=model, options=dict(update_starting_at_step=99))
    torch.testing.assert_close(t.callback_metrics['val_loss'], loss)

def test_their_average_counts_skipped_steps_and_has_statistics_that_do_not_fit():
    class Overflows(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss*float('inf') if batch_idx in (2, 3) else loss
    scaled = MixedPrecision('16-mixed', 'cpu', scaler=torch.amp.GradScaler('cpu', init_scale=4.))
    *_,cb,seen = theirs(model=Overflows, plugins=[scaled], n=1)
    assert cb._average_model.n_averaged == 8 > len({tuple(w['net.0.bias'].tolist()) for w in seen})
    model,*_ = theirs(model=Model)
    assert not torch.allclose(model.net[1].running_mean, model.net[0](TRAIN.tensors[0]).mean(0), atol=1e-3)

def test_the_example_runs(capsys, monkeypatch):
    monkeypatch.setenv('PL_GLOBAL_SEED', '0')      # it sets this itself
    path = Path(__file__).parents[1]/'examples'/'lightning_averages.py'
    assert len(path.read_text(encoding='utf-8').splitlines()) <= 40
    ran = runpy.run_path(str(path))
    figures = dict(l.split() for l in capsys.readouterr().out.splitlines() if l.startswith(('accuracy', 'ema', 'swa')))
    assert float(figures['ema/accuracy']) > float(figures['accuracy'])
    assert ran['cb'].averages.held == 'ema' and not ran['exported'].training
