"Averages in a loop of accelerate: steps that were taken, several optimizers, what save_state and load_state do"
import importlib
import os
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn, optim
from torch.utils.data import DataLoader

from fastswa.averaging.averages import Averages
from fastswa.averaging.rules import ema, equal

pytest.importorskip('accelerate')
from accelerate import Accelerator, debug_launcher, skip_first_batches
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration

import fastswa.integrations.accelerate as ours
from fastswa.integrations.accelerate import track


@pytest.fixture(autouse=True)
def fresh_state():
    "Of accelerate, which has one for each process: the precision of an Accelerator would be that of all later ones"
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def net(norm=False, dropout=0.1):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Dropout(dropout), nn.Linear(4, 1))


def batches(n=40): return DataLoader(torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), 4, shuffle=True)


class Run:
    "A loop as in the documentation of accelerate: 10 batches an epoch"
    def __init__(self, averaged=True, model=None, opt=partial(optim.SGD, lr=0.1, momentum=0.9), scaler=None, factor=1,
                 clip=False, **kw):
        order = DataLoaderConfiguration(use_seedable_sampler=True)
        self.accelerator = acc = Accelerator(cpu=True, dataloader_config=order, **kw)
        if scaler: acc.scaler = scaler
        self.factor, self.clip, self.plain = factor, clip, model or net()
        self.model, self.opt, self.dl = acc.prepare(self.plain, opt(self.plain.parameters()), batches())
        self.averages, self.noted, self.step = None, [], lambda: None
        if averaged:
            self.averages = Averages(self.model, len(self.dl), 2)
            self.averages.add('all', equal())
            self.averages.add('ema', ema(half_life='0.1dur'))
            self.averages.add('swa', equal(), start='0.5dur')
            self.averages.bn_data = self.dl
            self.step = track(self.averages, acc, self.opt)

    def __call__(self, start=0, stop=20, look=()):
        for epoch in range(start//10, 2):
            self.dl.set_epoch(epoch)
            skip = max(0, start - 10*epoch)
            for i, x in enumerate(skip_first_batches(self.dl, skip) if skip else self.dl, 10*epoch + skip):
                if i == stop: return self
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.factor*self.model.train()(x).pow(2).mean())
                    if self.clip and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.)
                    self.opt.step()
                    self.opt.zero_grad()
                self.step()
                self.noted.append(self.plain[0].weight.detach().clone())
                if i in look and self.averages:
                    with self.averages.using('ema', quick=True) as m: m.eval()(x)
        return self


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('norm', [False, True])
def test_no_bit_of_the_run_changes(norm):
    "Weights, buffers, random state, also where a look reads the prepared loader in the midst of an epoch"
    ends = []
    for averaged in False, True:
        torch.manual_seed(0)
        run = Run(averaged, net(norm), gradient_accumulation_steps=3)(look=[4, 9, 13])
        ends.append((run.model.state_dict(), torch.get_rng_state()))
    (a, ra), (b, rb) = ends
    assert same(a, b) and torch.equal(ra, rb)


@pytest.mark.parametrize('accumulate, steps', [(1, 20), (3, 8), (4, 6)])
def test_a_snapshot_for_each_step_not_for_each_batch(accumulate, steps):
    "By hand from weights noted after each batch; the end of an epoch is a step, too. Wrong: 20, the batches"
    run = Run(gradient_accumulation_steps=accumulate)()
    after = [w for a, w in zip([net()[0].weight, *run.noted], run.noted) if not torch.equal(a, w)]
    assert (run.averages['ema'].n, run.averages.clock.batches, len(after)) == (steps, 20, steps)
    mean = sum(w.double() for w in after)/steps
    torch.testing.assert_close(run.averages['all'].weights['0.weight'], mean, check_dtype=False)


@pytest.mark.parametrize('fused', [False, True])
def test_steps_that_mixed_precision_skips_do_not_count(fused):
    "Those that change no weight; accelerate says of a fused optimizer that it has stepped"
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**60, backoff_factor=2**-8)
    run = Run(opt=partial(optim.SGD, lr=1e-24, fused=fused), scaler=scaler, factor=1e22)()
    changed = sum(not torch.equal(a, w) for a, w in zip([net()[0].weight, *run.noted], run.noted))
    assert 0 < changed < 20 and run.averages['ema'].n == changed and run.averages.clock.batches == 20


@pytest.mark.parametrize('kw', [dict(mixed_precision='bf16'), dict(dynamo_backend='eager'),
                                dict(clip=True, gradient_accumulation_steps=3)], ids=['bf16', 'compiled', 'clipped'])
def test_other_ways_to_train(kw):
    "The run as without; the average by the names of the plain model"
    a, b = Run(False, **kw)(stop=6), Run(**kw)(stop=6, look=[3])
    assert same(a.plain.state_dict(), b.plain.state_dict()) and '0.weight' in b.averages['ema'].weights
    assert b.averages['ema'].n == (2 if 'clip' in kw else 6)


def in_two_processes(folder):
    AcceleratorState._reset_state(True)
    run = Run(model=net(norm=True))(look=[3])
    ours = torch.cat([run.averages['ema'].weights[k].flatten() for k, _ in run.plain.named_parameters()])
    one, other = run.accelerator.gather(ours).view(2, -1)
    assert (run.accelerator.num_processes, len(run.dl), run.averages['ema'].n) == (2, 5, 10) and torch.equal(one, other)
    run.averages.apply('ema')
    run.accelerator.save_state(folder)
    run.accelerator.wait_for_everyone()
    run.accelerator.load_state(folder)
    assert run.averages.held == 'raw' and run.averages['ema'].n == 10


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_two_processes(tmp_path):
    "DDP: 5 batches an epoch for each; the same average in both"
    debug_launcher(in_two_processes, (str(tmp_path),), 2)
    assert (tmp_path/'custom_checkpoint_0.pkl').exists()


def test_several_optimizers_that_take_turns():
    "One model, two optimizers: a snapshot after a step of either; two models: after a step of its own only"
    acc = Accelerator(cpu=True)
    a, b, free = net(), net(), nn.Linear(1, 1)
    opts = acc.prepare(*(optim.SGD(o.parameters(), 0.1) for o in (a[0], a[3], b, free)))
    both, other = Averages(a), Averages(b)
    for o in both, other: o.add('swa', equal())
    steps = track(both, acc, *opts[:2]), track(other, acc, opts[2])
    x = torch.ones(2, 3)
    for i in range(12):
        acc.backward(a(x).sum() + b(x).sum() + free(x[:, :1]).sum())
        if i % 4 == 0: opts[0].step()
        if i % 6 == 0: opts[1].step()
        if i % 3 == 0: opts[2].step()
        opts[3].step()
        for step in steps: step()
    assert (both['swa'].n, other['swa'].n) == (4, 4)      # 0 4 6 8, and 0 3 6 9


def test_resumed_in_the_midst_of_an_epoch_as_if_never_interrupted(tmp_path):
    def new(): return Run(model=net(dropout=0), gradient_accumulation_steps=3)
    whole, rest = new()(), new()
    new()(stop=13).accelerator.save_state(str(tmp_path))
    rest.accelerator.load_state(str(tmp_path))
    rest(start=13)
    assert same(whole.model.state_dict(), rest.model.state_dict())
    for name in whole.averages: assert same(whole.averages[name].weights, rest.averages[name].weights)
    assert [a.n for a in whole.averages.values()] == [a.n for a in rest.averages.values()]


@pytest.mark.parametrize('norm', [False, True])
def test_saved_and_loaded_while_an_average_is_held(norm, tmp_path):
    "The file has the raw weights and buffers; what the model holds after loading are those. Wrong: the average as both"
    run = Run(model=net(norm))()
    raw = {k: t.clone() for k, t in run.model.state_dict().items()}
    run.averages.apply('swa')
    run.accelerator.save_state(str(tmp_path))
    assert run.averages.held == 'swa' and same(load_file(tmp_path/'model.safetensors'), raw)
    run.accelerator.load_state(str(tmp_path))
    assert run.averages.held == 'raw' and same(run.model.state_dict(), raw) and run.averages['swa'].n == 11
    if norm: assert run.averages.bn_data is run.dl.base_dataloader


def test_averages_of_a_part_of_what_was_prepared(tmp_path):
    "Wrong: saved while the part holds its average, the whole has that in place of its raw weights"
    run = Run(False)()
    part = Averages(run.plain[3])
    part.add('swa', equal())
    part.step()
    step = track(part, run.accelerator, run.opt)
    run.accelerator.backward(run.model(torch.ones(4, 3)).sum())
    run.opt.step()
    step()
    raw = {k: t.clone() for k, t in run.model.state_dict().items()}
    part.apply('swa')
    assert not torch.equal(run.plain[3].weight, raw['3.weight'])
    run.accelerator.save_state(str(tmp_path))
    assert part.held == 'swa' and same(load_file(tmp_path/'model.safetensors'), raw)


def test_errors(tmp_path, monkeypatch):
    run = Run()
    with pytest.raises(ValueError, match='tracked already'): track(run.averages, run.accelerator, run.opt)
    with pytest.raises(TypeError, match='accelerator.prepare returned; got SGD'):
        track(Averages(run.model), run.accelerator, optim.SGD(run.model.parameters(), 0.1))
    with pytest.raises(TypeError, match='got none'): track(Averages(run.model), run.accelerator)
    with pytest.raises(ValueError, match='n_epochs'): Averages(run.model, 10).add('swa', equal(), start='0.5dur')
    run().accelerator.save_state(str(tmp_path))
    with pytest.raises(RuntimeError, match='Error.* in loading'):      # torch's own
        Run(model=nn.Sequential(nn.Linear(3, 1))).accelerator.load_state(str(tmp_path))
    other = Run()
    other.averages.remove('swa')
    other.averages.add('lawa', equal())
    with pytest.raises(ValueError, match='swa only in the state, lawa only here'):
        other.accelerator.load_state(str(tmp_path))
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.30.0')
    with pytest.raises(ImportError, match='accelerate 1.0 or newer'): importlib.reload(ours)


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['', str(tmp_path)])
    example = Path(__file__).resolve().parents[1]/'examples'/'accelerate_averages.py'
    run = runpy.run_path(str(example))
    assert run['averages']['ema'].n == 40 and (tmp_path/'custom_checkpoint_0.pkl').exists()
    assert len(capsys.readouterr().out.splitlines()) == 13      # swa begins in the third of five epochs
