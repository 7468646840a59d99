"Averages in fastai's Learner, where fastai is installed"
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip('fastai')
from fastai.basics import DataLoader, DataLoaders, accuracy
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD

from fastswa.averaging import ema, equal
from fastswa.integrations.fastai import AveragesCallback


def points(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    return TensorDataset(F.one_hot(y, 3).float() + torch.randn(n, 3, generator=g)/2, y)

TRAIN,VALID = points(64),points(20, 1)

class Weights(Callback):
    def before_fit(self): self.seen = []
    def after_batch(self):
        if self.training: self.seen.append({k: v.clone() for k, v in self.model.state_dict().items()})

def fit(*cbs, n=2, norm=True, **kw):
    random.seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 3))
    dls = DataLoaders(DataLoader(TRAIN, 8, shuffle=True), DataLoader(VALID, 8))
    learn = Learner(dls, model, F.cross_entropy, opt_func=SGD, lr=0.2, metrics=accuracy, cbs=[*cbs], **kw)
    learn.logger = lambda row: None
    learn.fit(n)
    return learn

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_the_run_is_the_same_and_the_table_has_the_averages():
    cb = AveragesCallback(ema=ema(0.9), swa=dict(start='0.75dur'))
    learn,plain = fit(cb),fit()
    assert same(learn.model.state_dict(), plain.model.state_dict())
    assert [v[:3] for v in learn.recorder.values] == [v[:] for v in plain.recorder.values]
    kinds = ['valid_loss', 'accuracy']
    names = [f'{a}{k}' for a in ('', 'ema/', 'swa/') for k in kinds]
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', *names, 'time']
    first,last = learn.recorder.values
    assert first[5] != first[5] and cb.averages['swa'].n == 5 and cb.averages['ema'].n == 16
    with cb.averages.using('ema'): loss = F.cross_entropy(learn.model.eval()(VALID.tensors[0]), VALID.tensors[1])
    assert last[3] == pytest.approx(loss.item())

def test_against_a_sum_by_hand_and_the_end_of_a_fit():
    w,cb = Weights(),AveragesCallback(swa=equal(), apply='swa')
    learn = fit(cb, w)
    raw = w.seen[-1]
    mean = torch.stack([s['0.weight'].double() for s in w.seen]).mean(0).float()
    torch.testing.assert_close(learn.model[0].weight.data, mean)
    torch.testing.assert_close(learn.model[1].running_mean, learn.model[0](TRAIN.tensors[0]).mean(0))
    loss = F.cross_entropy(learn.model.eval()(VALID.tensors[0]), VALID.tensors[1]).item()
    assert learn.validate()[0] == pytest.approx(loss)      # wrong: of the raw weights, as if a fit had begun
    cb.averages.restore()
    assert same(learn.model.state_dict(), raw)

def test_accumulation_lr_find_and_trackers(tmp_path):
    cb = AveragesCallback(ema=ema(0.9))
    learn = fit(cb, GradientAccumulation(16), SaveModelCallback('ema/valid_loss'), path=tmp_path)
    assert cb.averages['ema'].n == 8 and (tmp_path/'models'/'model.pth').exists()
    before = {k: v.clone() for k, v in cb.averages['ema'].weights.items()}
    learn.get_preds()
    learn.lr_find(num_it=3, show_plot=False)
    assert cb.averages['ema'].n == 8 and same(cb.averages['ema'].weights, before)
