"Averages in a Hugging Face Trainer: the run beside them, metrics, checkpoints, the best model; adapters of PEFT"
import gc
import importlib
import os
import runpy
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from fastswa.averaging.rules import ema, equal
from fastswa.core import unwrap

transformers = pytest.importorskip('transformers')
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import fastswa.integrations.transformers as ours
from fastswa.integrations.common import Adapter
from fastswa.integrations.transformers import AveragesCallback

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope='module')
def little_garbage():
    "Each run of Trainer begins with a collection, of which all that is imported by now need not be part: 0.2 s"
    gc.freeze()
    yield
    gc.unfreeze()


def text(n=40):
    "`n` short random texts, which a language model learns to tell apart a little"
    ids = torch.randint(32, (n, 8), generator=torch.Generator().manual_seed(0))
    return [dict(input_ids=i, labels=i) for i in ids]


def gpt(width=16, dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=width, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).to(dtype)


class NormNet(nn.Module):
    "Linear, BatchNorm, dropout, linear, as Trainer takes it: it gives its loss"
    def __init__(self, factor=1, width=8):
        super().__init__()
        self.factor = factor
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 3)

    def forward(self, x, labels):
        logits = self.last(F.dropout(self.norm(self.first(x)), 0.1, self.training))
        return dict(loss=self.factor*F.cross_entropy(logits, labels), logits=logits)


def vectors(n=40):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=g)
    return [dict(x=F.one_hot(c, 3) + torch.randn(3, generator=g)/2, labels=c) for c in y]


def callback(**kw):
    "EMA from the beginning, and SWA of the second half"
    averages = dict(ema=ema(half_life='0.1dur'), swa=dict(rule=equal(), start='0.5dur', every='0.01dur'))
    return AveragesCallback(**averages | kw)


def trainer(folder, cb=None, model=None, data=None, valid=None, more=(), metrics=None, cls=Trainer, **kw):
    "10 steps an epoch for 2 epochs, evaluated every 5 steps and saved every 7"
    args = dict(per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.01, eval_strategy='steps',
                eval_steps=5, save_strategy='steps', save_steps=7, logging_steps=5, report_to='none', use_cpu=True,
                disable_tqdm=True)
    data = data or (text() if isinstance(model, transformers.PreTrainedModel) or hasattr(model, 'peft_config') else
                    vectors())
    model = model or NormNet()
    res = cls(model, TrainingArguments(str(folder), **args | kw), train_dataset=data, eval_dataset=valid or data[:8],
              callbacks=[Quiet(), *more, *([cb] if cb else [])], compute_metrics=metrics)
    res.remove_callback(transformers.PrinterCallback)
    return res


class Quiet(TrainerCallback): pass


class At(TrainerCallback):
    "Do something at an event of a step"
    def __init__(self, event, step, f):
        def go(args, state, control, **kw):
            if state.global_step == step: f(control)
        setattr(self, event, go)


def stop(control): control.should_training_stop = True


def copies(module): return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(t): return [(o['step'], o['loss']) for o in t.state.log_history if 'loss' in o]


def logged(t, key): return {o['step']: o[key] for o in t.state.log_history if key in o}


nets = {'gpt': (gpt, text), 'batchnorm': (NormNet, vectors)}


# the run beside them

@pytest.mark.parametrize('net', nets)
def test_no_bit_of_the_run_changes(net, tmp_path):
    "Weights, buffers, losses, momenta, random state. Wrong: evaluations, or reading the training data, draw numbers"
    model, data = nets[net]
    ends = []
    for cb in None, callback():
        t = trainer(tmp_path/str(cb is None), cb, model(), data(), save_strategy='no')
        t.train()
        ends.append((copies(t.model), losses(t), t.optimizer.state_dict()['state'], torch.get_rng_state()))
    (a, la, oa, ra), (b, lb, ob, rb) = ends
    assert same(a, b) and la == lb and torch.equal(ra, rb) and all(same(oa[k], ob[k]) for k in oa)


def test_an_average_is_that_of_a_loop_by_hand(tmp_path):
    "From weights noted at each step"
    noted = []
    note = SimpleNamespace(model=NormNet())
    cb = AveragesCallback(ema=ema(half_life=3), swa=dict(rule=equal(), start='10ba', every='5ba'))
    class Note(TrainerCallback):
        def on_step_end(self, *args, **kw): noted.append(copies(note.model))
    trainer(tmp_path, cb, note.model, more=[Note()], eval_strategy='no', save_strategy='no').train()
    by_hand = noted[0]['last.weight'].double()
    for w in noted[1:]: by_hand = by_hand.lerp(w['last.weight'].double(), 1 - 0.5**(1/3))
    torch.testing.assert_close(cb.averages['ema'].weights['last.weight'].double(), by_hand, rtol=1e-5, atol=1e-6)
    swa = sum(noted[i - 1]['last.weight'].double() for i in (10, 15, 20))/3
    torch.testing.assert_close(cb.averages['swa'].weights['last.weight'].double(), swa, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('accumulate', [2, 3])
def test_a_snapshot_for_each_step_not_for_each_batch(accumulate, tmp_path):
    "The last step of an epoch of 10 batches may have fewer. Wrong: 20, the batches"
    cb = callback()
    t = trainer(tmp_path, cb, gradient_accumulation_steps=accumulate, eval_strategy='no', save_strategy='no')
    t.train()
    assert cb.averages['ema'].n == t.state.global_step == -(-10//accumulate)*2
    assert (cb.averages.clock.batches, cb.averages['swa'].n) == (20, t.state.global_step//2 + 1)


@pytest.mark.parametrize('optim', ['adamw_torch', 'adamw_torch_fused'])
def test_steps_that_mixed_precision_skips_do_not_count(optim, tmp_path):
    """A loss scale that overflows at first, so that it is lowered. Of a fused optimizer, which is the default,
    accelerate's `optimizer_step_was_skipped` says that it has stepped"""
    cb, scales = callback(swa=equal()), [2.**60]
    class Note(TrainerCallback):
        def on_step_end(self, *args, **kw): scales.append(t.accelerator.scaler.get_scale())
    t = trainer(tmp_path, cb, NormNet(1e22), vectors(), more=[Note()], eval_strategy='no', save_strategy='no',
                max_grad_norm=0, optim=optim)
    t.accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=scales[0], backoff_factor=2**-8)
    t.train()
    skipped = sum(b < a for a, b in zip(scales, scales[1:]))
    assert 0 < skipped < 20 and cb.averages['swa'].n == 20 - skipped and cb.averages.clock.batches == 20


def test_time_is_measured_in_steps_where_the_data_has_no_length(tmp_path):
    "`dur` is `max_steps`, the last pass is cut short; without these Trainer itself raises an error"
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(vectors(12))      # 3 batches: several passes
    cb = callback(lawa=dict(rule=equal(), every='1ep'))
    trainer(tmp_path, cb, data=Stream(), valid=vectors(8), max_steps=10, save_strategy='no').train()
    assert (cb.averages['ema'].n, cb.averages['swa'].n, cb.averages['lawa'].n) == (10, 6, 4)
    with pytest.raises(ValueError, match='max_steps'):
        trainer(tmp_path, callback(), data=Stream(), valid=vectors(8))


@pytest.mark.parametrize('kw', [dict(max_steps=13), dict(num_train_epochs=1.3)], ids=['steps', 'epochs'])
def test_a_run_that_ends_within_an_epoch(kw, tmp_path):
    "Half of 13 steps, not of 2 epochs"
    cb = callback()
    trainer(tmp_path, cb, eval_strategy='no', save_strategy='no', **kw).train()
    assert (cb.averages['ema'].n, cb.averages['swa'].n) == (13, 7)


@pytest.mark.parametrize('kw', [dict(bf16=True, gradient_accumulation_steps=2), dict(torch_compile_backend='eager'),
                                dict(weights=torch.bfloat16, max_grad_norm=0.1)], ids=['autocast', 'compiled', 'bf16'])
def test_other_ways_to_train(kw, tmp_path):
    "The run as without; averages are fp32, by the names of the plain model"
    kw = dict(max_steps=4, eval_steps=4, save_strategy='no') | kw
    dtype, cb, ends = kw.pop('weights', torch.float32), AveragesCallback(ema=ema(half_life=2)), []
    for c in None, cb:
        t = trainer(tmp_path, c, NormNet().to(dtype), [dict(o, x=o['x'].to(dtype)) for o in vectors()], **kw)
        t.train()
        ends.append(copies(unwrap(t.model)))
    assert same(*ends) and cb.averages['ema'].n == 4 and 'eval_ema_loss' in t.state.log_history[-2]
    assert cb.averages['ema'].weights['first.weight'].dtype == torch.float32


def in_two_processes(folder):
    AcceleratorState._reset_state(True)
    cb = callback(apply='ema')
    t = trainer(folder, cb, NormNet(), vectors(), save_steps=5, ddp_backend='gloo')
    t.train()
    ours = torch.cat([cb.averages['ema'].weights[k].flatten() for k, _ in cb.averages.model.named_parameters()])
    one, other = t.accelerator.gather(ours).view(2, -1)
    assert t.args.world_size == 2 and torch.equal(one, other) and cb.averages.held == 'ema'
    assert (cb.averages['ema'].n, cb.averages['swa'].n) == (10, 6) and [*logged(t, 'eval_ema_loss')] == [5, 10]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_two_processes(tmp_path):
    "DDP: 5 batches an epoch for each; the same average in both, one file"
    debug_launcher(in_two_processes, (tmp_path,), 2)
    saved = torch.load(tmp_path/'checkpoint-10'/'averages.pt', weights_only=True)
    assert saved['averages']['ema']['average']['n'] == 10


# metrics

def accuracy(p): return dict(accuracy=(p.predictions.argmax(-1) == p.label_ids).mean())


def test_metrics_are_what_evaluate_gives_under_their_names(tmp_path):
    "`evaluate(metric_key_prefix='eval_ema')` while the model holds that average, at the last step"
    cb = callback()
    t = trainer(tmp_path, cb, NormNet(), vectors(), metrics=accuracy, save_strategy='no')
    t.train()
    assert list(logged(t, 'eval_ema_loss')) == [5, 10, 15, 20] and list(logged(t, 'eval_swa_loss')) == [10, 15, 20]
    for name in 'ema', 'swa':
        with cb.averages.using(name): found = t.evaluate(metric_key_prefix=f'eval_{name}')
        for k in f'eval_{name}_loss', f'eval_{name}_accuracy': assert logged(t, k)[20] == pytest.approx(found[k])
    assert not any(k.startswith('eval_ema') for k in t.evaluate())      # after training, what the model holds


def test_what_evaluate_is_told_applies_to_averages(tmp_path):
    "Outputs to be ignored in compute_metrics"
    class More(NormNet):
        def forward(self, x, labels): return dict(super().forward(x, labels), huge=torch.ones(len(x)))
    seen = []
    def metrics(p):
        seen.append(type(p.predictions))
        return {}
    t = trainer(tmp_path, callback(), More(), vectors(), metrics=metrics, max_steps=5, save_strategy='no')
    t.train(ignore_keys_for_eval=['huge'])
    assert len(seen) == 3 and not any(issubclass(o, tuple) for o in seen)


def test_several_evaluation_sets_and_those_of_other_callbacks(tmp_path):
    cb = AveragesCallback(ema=ema(half_life=3))
    class Also(TrainerCallback):
        def on_epoch_end(self, *args, **kw): t.evaluate(vectors(4), metric_key_prefix='test')
    t = trainer(tmp_path, cb, valid=dict(easy=vectors(4), hard=vectors(8)[4:]), more=[Also()], max_steps=10,
                save_strategy='no')
    t.train()
    wanted = {f'{head}_{name}loss' for head, sets in (('eval', ('easy_', 'hard_')), ('test', ('',)))
              for which in ('', 'ema_') for name in (which + o for o in sets)}
    found = {k for o in t.state.log_history for k in o if k.endswith('_loss')} - {'train_loss'}
    assert found == wanted


def test_batchnorm_statistics_fit(tmp_path):
    "The mean of the averaged first layer's outputs over the training data, in closed form"
    cb = AveragesCallback(swa=dict(rule=equal(), start='0.2dur'), apply='swa')
    t = trainer(tmp_path, cb, NormNet(), vectors(), save_strategy='no')
    t.train()
    x = torch.stack([o['x'] for o in vectors()]).double()
    assert cb.averages.held == 'swa'
    w, b = (p.detach().double() for p in (t.model.first.weight, t.model.first.bias))
    torch.testing.assert_close(t.model.norm.running_mean.double(), x.mean(0) @ w.T + b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(t.model.norm.running_var.double(), (x @ w.T).var(0), rtol=1e-4, atol=1e-5)


# checkpoints

@pytest.mark.parametrize('net', nets)
def test_resumed_in_the_midst_of_an_epoch_as_if_never_interrupted(net, tmp_path):
    "Raw weights, averages, losses and metrics, bit for bit, in a new process's place: new trainer, new callback"
    model, data = nets[net]
    whole, resumed = callback(), callback()
    a = trainer(tmp_path/'a', whole, model(), data())
    a.train()
    trainer(tmp_path/'b', callback(), model(), data(), more=[At('on_step_end', 14, stop)]).train()
    b = trainer(tmp_path/'b', resumed, model(), data())
    torch.rand(5)
    b.train(resume_from_checkpoint=True)
    assert b.state.global_step == 20 and same(copies(a.model), copies(b.model))
    for name in 'ema', 'swa':
        assert same(whole.averages[name].weights, resumed.averages[name].weights)
        assert whole.averages[name].n == resumed.averages[name].n
        assert logged(a, f'eval_{name}_loss') == logged(b, f'eval_{name}_loss')


def test_a_checkpoint_holds_raw_weights_and_averages_and_goes_as_a_whole(tmp_path):
    "Wrong: the average as the checkpoint's model"
    plain = trainer(tmp_path/'plain')
    plain.train()
    cb = callback()
    trainer(tmp_path/'ours', cb, save_total_limit=1).train()
    assert [o.name for o in (tmp_path/'ours').iterdir()] == ['checkpoint-20']
    files = {o.name for o in (tmp_path/'ours'/'checkpoint-20').iterdir()}
    assert files == {o.name for o in (tmp_path/'plain'/'checkpoint-20').iterdir()} | {'averages.pt'}
    a, b = (load_file(tmp_path/o/'checkpoint-20'/'model.safetensors') for o in ('plain', 'ours'))
    assert same(a, b)
    saved = torch.load(tmp_path/'ours'/'checkpoint-20'/'averages.pt', weights_only=True)['averages']
    assert same(saved['ema']['average']['weights'], cb.averages['ema'].weights)


def test_a_checkpoint_saved_while_an_average_is_held_holds_the_raw_weights(tmp_path):
    "Somebody applies it at an evaluation, and restores at the next step"
    cb = AveragesCallback(ema=ema(half_life=3))
    more = [At('on_evaluate', 7, lambda _: cb.averages.apply('ema')),
            At('on_step_begin', 7, lambda _: cb.averages.restore())]
    trainer(tmp_path/'ours', cb, more=more, eval_steps=7).train()
    trainer(tmp_path/'plain', eval_steps=7).train()
    a, b = (load_file(tmp_path/o/'checkpoint-7'/'model.safetensors') for o in ('plain', 'ours'))
    assert same(a, b)
    resumed = AveragesCallback(ema=ema(half_life=3))
    t = trainer(tmp_path/'ours', resumed, eval_steps=7)
    t.train(resume_from_checkpoint=str(tmp_path/'ours'/'checkpoint-7'))
    assert same(cb.averages['ema'].weights, resumed.averages['ema'].weights)


def test_resuming_from_elsewhere(tmp_path):
    "Wrong: the averages of the run that happens to lie in the output folder. A checkpoint without averages is told of"
    first, second = callback(), callback()
    trainer(tmp_path/'a', first).train()
    trainer(tmp_path/'b', callback(), learning_rate=0.02).train()
    there = tmp_path/'a'/'checkpoint-14'
    trainer(tmp_path/'b', second).train(resume_from_checkpoint=str(there))
    assert same(first.averages['swa'].weights, second.averages['swa'].weights)
    (there/'averages.pt').unlink()
    third = callback()
    with pytest.warns(UserWarning, match=r'begin anew: .*checkpoint-14 has no averages.pt'):
        trainer(tmp_path/'c', third).train(resume_from_checkpoint=str(there))
    # shares of the 6 steps that are left; wrong: half of the whole run, which is never reached
    assert (third.averages['ema'].n, third.averages['swa'].n) == (6, 4)


def test_averages_of_other_names_or_another_model_are_not_taken_up(tmp_path):
    trainer(tmp_path, callback()).train()
    there = str(tmp_path/'checkpoint-14')
    with pytest.raises(ValueError, match='lawa only here'):
        trainer(tmp_path, callback(lawa=equal())).train(resume_from_checkpoint=there)
    with pytest.raises(RuntimeError, match='size mismatch'):      # Trainer's own
        trainer(tmp_path, callback(), NormNet(width=9)).train(resume_from_checkpoint=there)


# the best model, and what is held at the end

best = dict(load_best_model_at_end=True, save_steps=5, learning_rate=0.3)


@pytest.mark.parametrize('metric', ['eval_ema_loss', 'ema_loss'])
def test_the_best_average_is_held_at_the_end(metric, tmp_path):
    "As it was at that step, and saved by save_pretrained. Wrong: the raw weights of that step; the newest average"
    cb = callback()
    t = trainer(tmp_path/'run', cb, gpt(), metric_for_best_model=metric, **best)
    t.train()
    found = logged(t, 'eval_ema_loss')
    step = min(found, key=found.get)
    assert step < 20 and t.state.best_global_step == step and t.state.best_metric == found[step]
    assert cb.averages.held == 'ema' and t.evaluate()['eval_loss'] == pytest.approx(found[step])
    there = tmp_path/'run'/f'checkpoint-{step}'
    saved = torch.load(there/'averages.pt', weights_only=True)['averages']['ema']['average']['weights']
    t.save_model(str(tmp_path/'out'))
    out = GPT2LMHeadModel.from_pretrained(tmp_path/'out').state_dict()
    assert all(torch.equal(out[k], saved[k]) for k in saved)
    assert same(dict(cb.averages.weights('raw')), GPT2LMHeadModel.from_pretrained(there).state_dict())


@pytest.mark.parametrize('first', [True, False])
def test_early_stopping_by_an_average(first, tmp_path):
    "Each evaluation counts once, whoever was added first. Wrong: patience halved; stopping disabled with a warning"
    t = trainer(tmp_path, None, metric_for_best_model='eval_ema_loss',
                more=[EarlyStoppingCallback(2)] if first else [], **best | dict(num_train_epochs=6))
    t.add_callback(callback())
    if not first: t.add_callback(EarlyStoppingCallback(2))
    t.train()
    found = logged(t, 'eval_ema_loss')
    steps = [*found]
    low = min(found, key=found.get)
    assert steps[-1] < 60 and steps.index(low) == len(steps) - 3


def test_a_metric_of_an_average_that_has_not_begun(tmp_path):
    "Until then it stands for the raw weights. Wrong: a KeyError at the first evaluation"
    cb = callback()
    t = trainer(tmp_path, cb, metric_for_best_model='eval_swa_loss', **best)
    t.train()
    step, found = t.state.best_global_step, logged(t, 'eval_loss') | logged(t, 'eval_swa_loss')
    assert found[step] == min(found.values()) == t.state.best_metric
    assert cb.averages.held == ('swa' if step >= 10 else 'raw')


def test_apply_holds_and_the_next_run_starts_from_the_raw_weights(tmp_path):
    cb = callback(apply='swa')
    t = trainer(tmp_path, cb, save_strategy='no')
    t.train()
    raw = {k: v.clone() for k, v in cb.averages.weights('raw').items()}
    assert cb.averages.held == 'swa'
    plain = trainer(tmp_path, save_strategy='no')
    plain.train()
    assert same(raw, {k: v for k, v in copies(plain.model).items() if k in raw})
    for o in plain, t:
        torch.manual_seed(1)
        o.train()
    assert same({k: v for k, v in cb.averages.weights('raw').items()}, {k: copies(plain.model)[k] for k in raw})


def test_a_run_after_one_that_an_exception_ended(tmp_path):
    "Wrong: two that note each step of the optimizer, one of them for ever"
    cb, fails = callback(), At('on_step_end', 3, lambda _: 1/0)
    t = trainer(tmp_path, cb, more=[fails], eval_strategy='no', save_strategy='no')
    with pytest.raises(ZeroDivisionError): t.train()
    first = weakref.ref(cb.steps)
    t.remove_callback(fails)
    t.train()
    gc.collect()
    assert cb.averages.clock.batches == 20 and cb.averages['ema'].n == 23 and first() is None


# what is wrong is said before training

def test_errors(tmp_path, monkeypatch):
    t = trainer(tmp_path, callback(), more=[callback()])
    with pytest.raises(ValueError, match='two AveragesCallbacks'): t.train()
    with pytest.raises(ValueError, match="'swa'; got 'sma'"): callback(apply='sma')
    class Sharded(TrainerCallback):
        def on_train_begin(self, *args, **kw): t.is_fsdp_enabled = True
    t = trainer(tmp_path, callback(), more=[Sharded()])
    with pytest.raises(ValueError, match='spread over processes'): t.train()
    assert t.state.global_step == 0
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '4.30.0')
    with pytest.raises(ImportError, match='transformers 5.0 or newer'): importlib.reload(ours)


# PEFT

@pytest.fixture
def lora():
    peft = pytest.importorskip('peft')
    def make(dtype=torch.float32, width=16):
        config = peft.LoraConfig(r=4, target_modules=['c_attn'], fan_in_fan_out=True, task_type='CAUSAL_LM')
        model = peft.get_peft_model(gpt(width, dtype), config)
        torch.manual_seed(0)
        for k, p in model.named_parameters():
            if 'lora_B' in k: nn.init.normal_(p, std=0.1)
        return model
    return SimpleNamespace(make=make, peft=peft)


def trained(model): return {k for k, p in model.named_parameters() if p.requires_grad}


def test_only_what_is_trained_is_averaged(lora, tmp_path):
    "Unless the user asks for more (diffusers#9998). Wrong: a copy of the whole model"
    model, cb = lora.make(), AveragesCallback(ema=ema(half_life=3), all=dict(include='*'))
    trainer(tmp_path, cb, model, max_steps=2, eval_strategy='no', save_strategy='no').train()
    assert set(cb.averages['ema'].weights) == trained(model) < set(cb.averages['all'].weights)


def test_memory_for_averages_of_adapters(lora):
    """1.05 of the adapters in fp32. While an average is held their own weights are kept aside too; in a look, which
    puts back whatever a forward pass writes to, also small frozen ones (norms, biases) and the generator's state"""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512)).bfloat16()
    model = lora.peft.get_peft_model(base, lora.peft.LoraConfig(r=8, target_modules=['0']))
    fp32 = 4*sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = fp32      # PEFT makes adapters fp32 beside half-precision weights
    frozen = [p for p in model.parameters() if not p.requires_grad and p.ndim == 1]
    small = sum(p.nbytes for p in frozen) + torch.get_rng_state().nbytes
    adapter, before = Adapter(None, None, dict(ema=ema(half_life=3))), live_bytes()
    adapter.attach(model)
    adapter.begin(1, 1)
    adapter.averages.step()
    assert live_bytes() - before <= 1.05*fp32
    with adapter.averages.using('ema'): assert live_bytes() - before <= 1.05*fp32 + own + small
    adapter.averages.apply('ema')
    assert live_bytes() - before <= 1.05*fp32 + own
    adapter.averages.restore()
    assert live_bytes() - before <= 1.05*fp32


def test_adapters_are_saved_as_peft_does_it_and_stay_trainable(lora, tmp_path):
    """In its own form, with the average in them (diffusers#9998: users had to write that themselves). Wrong: a further
    adapter for the average, which stays trainable, and enters the optimizer and the gradients' norm (TRL#5990)"""
    model, cb = lora.make(), AveragesCallback(ema=ema(half_life=3))
    needed = trained(model)
    t = trainer(tmp_path/'run', cb, model)
    t.train()
    raw = {k: p.clone() for k, p in model.named_parameters() if p.requires_grad}
    with cb.averages.using('ema'):
        assert trained(model) == needed
        model.save_pretrained(tmp_path/'out')
    assert trained(model) == needed == {k for k in raw if torch.equal(raw[k], dict(model.named_parameters())[k])}
    assert sum(len(g['params']) for g in t.optimizer.param_groups) == len(needed)
    assert not any(w.requires_grad for w in cb.averages['ema'].weights.values())
    out = lora.peft.PeftModel.from_pretrained(gpt(), tmp_path/'out')
    found = dict(out.named_parameters())
    assert all(torch.equal(found[k], w) for k, w in cb.averages['ema'].weights.items())
    files = {o.name for o in (tmp_path/'run'/'checkpoint-20').iterdir()}
    assert {'adapter_model.safetensors', 'averages.pt'} <= files


def test_adapters_resumed_and_the_best_held(lora, tmp_path):
    whole, resumed = callback(), callback()
    trainer(tmp_path/'a', whole, lora.make()).train()
    trainer(tmp_path/'b', callback(), lora.make(), more=[At('on_step_end', 14, stop)]).train()
    trainer(tmp_path/'b', resumed, lora.make()).train(resume_from_checkpoint=True)
    for name in 'ema', 'swa': assert same(whole.averages[name].weights, resumed.averages[name].weights)
    cb = callback()
    t = trainer(tmp_path/'c', cb, lora.make(), metric_for_best_model='eval_ema_loss', **best)
    t.train()
    assert cb.averages.held == 'ema' and trained(t.model) == trained(lora.make())
    assert t.evaluate()['eval_loss'] == pytest.approx(t.state.best_metric)


def test_a_second_adapter(lora, tmp_path):
    "Frozen, it changes nothing; trained by the next run, it is what is averaged. Wrong: the first one, which stays"
    model, cb = lora.make(), AveragesCallback(ema=ema(half_life=3))
    config = model.peft_config['default']
    add = At('on_step_end', 5, lambda _: model.add_adapter('other', config))
    t = trainer(tmp_path, cb, model, more=[add], max_steps=10, eval_strategy='no', save_strategy='no')
    t.train()
    assert cb.averages['ema'].n == 10 and not any('other' in k for k in cb.averages['ema'].weights)
    with pytest.raises(ValueError, match='already exists'): model.add_adapter('other', config)      # PEFT's own
    t.remove_callback(add)
    model.set_adapter('other')
    t.optimizer = None
    t.train()
    assert all('other' in k for k in cb.averages['ema'].weights) and cb.averages['ema'].n == 10


# examples

@pytest.mark.parametrize('name', ['transformers', 'peft'])
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip(name)
    monkeypatch.setattr('sys.argv', ['', str(tmp_path)])
    runpy.run_path(str(Path(__file__).resolve().parents[1]/'examples'/f'{name}_averages.py'))
    said = {'transformers': "holds its 'ema' weights", 'peft': '4 tensors are averaged'}[name]
    assert said in capsys.readouterr().out


def live_bytes():
    "Of all tensors there are, each storage once"
    gc.collect()
    with warnings.catch_warnings():      # some objects warn when they are looked at
        warnings.simplefilter('ignore')
        objects = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and not o.is_meta]
    found = [o.untyped_storage() for o in objects]
    return sum({o.data_ptr(): o.nbytes() for o in found}.values())
