"""Weights divided by FSDP2: averages of the parts without a word between processes, checkpoints that any number of
processes goes on from, bit for bit, files with whole weights"""
import errno
import os
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from fastswa.all import (
    Average, Averages, BNUpdateCB, Callback, CheckpointCB, DistributedCB, EMACB, GradClipCB, MetricsCB, NaNGuardCB,
    PostHocEMACB, SWACB, TrainLearner, ema, load_weights)
from fastswa.averaging.average import update_all
from fastswa.checkpoint import sharded
from fastswa.checkpoint.sharded import _as_part, load_torchtitan_checkpoint
from fastswa.files import flush
from helpers import check_case, end_ranks, errors_of, raises_on_all, run_cases, start_ranks

fsdp = pytest.importorskip('torch.distributed.fsdp')
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available() and hasattr(fsdp, 'fully_shard')),
                                reason='needs gloo and fully_shard')
LIMIT = 300 # seconds: only so that processes that wait for each other come to an end


def loaders(n=37, bs=4):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=g)
    ds = TensorDataset(F.one_hot(y, 3).float() + torch.randn(n, 3, generator=g)/2, y)
    order = torch.Generator().manual_seed(3)
    return SimpleNamespace(train=DataLoader(ds, bs, shuffle=True, generator=order), valid=DataLoader(ds, 5))


def net(norm=False):
    "Rows that no number of processes divides without a rest"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7) if norm else nn.Tanh(), nn.Linear(7, 3))


def accuracy(preds, targets): return (preds.argmax(1) == targets).float().mean()


def learner(*cbs, mode='fsdp', model=None, bs=4, n=37):
    cbs = [DistributedCB(mode, timeout=30), *cbs] if mode else [*cbs]
    return TrainLearner(net() if model is None else model, loaders(n, bs), F.cross_entropy, 0.01, cbs, optim.AdamW)


def whole(learn):
    "Weights, averages and optimizer with nothing divided, on every process"
    weights = learn.model.state_dict()
    def full(name, t):
        part = _as_part(t, weights.get(name))
        return (t if part is None else part.full_tensor()).detach().clone()
    res = {f'raw.{k}': full(k, v) for k, v in weights.items()}
    res |= {f'{name}.{k}': full(k, v) for name, a in learn.averages.items() if a.n for k, v in a.weights.items()}
    for k, p in learn.model.named_parameters():
        res |= {f'opt.{k}.{s}': full(k, torch.as_tensor(v)) for s, v in learn.opt.state[p].items()}
    return res


def same(a, b): assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []


# --- what runs in each of two processes


def as_one_process(folder):
    "Wrong: means over parts; weights that are not those of the main process; a file with half of them"
    two = learner(EMACB(decay=0.9, apply=False), MetricsCB(accuracy))
    if dist.get_rank() == 1:
        with torch.no_grad(): two.model[0].weight.fill_(0)     # the main process's count
    one = learner(EMACB(decay=0.9, apply=False), MetricsCB(accuracy), mode=None, bs=8)
    for learn in (two, one): learn.fit(2)
    a, b = whole(two), whole(one)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5)
    assert two.model[0].weight.to_local().shape[0] == (4, 3)[dist.get_rank()]
    for x, y in zip(one.history, two.history, strict=True):
        assert {k: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for k, v in x.items()} == y
    two.export(folder/'ema.safetensors', 'ema')
    dist.barrier()
    got = load_file(folder/'ema.safetensors')
    same(got, {k[4:]: v for k, v in a.items() if k.startswith('ema.')})


class Count(TorchDispatchMode):
    "Messages between processes, and how many elements they have"
    def __init__(self):
        super().__init__()
        self.sizes = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ('c10d', '_c10d_functional'):
            flat = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.sizes.append(sum(t.numel() for t in flat))
        return func(*args, **(kwargs or {}))


def messages_of_an_update():
    "None; with the check for NaN one number, however many averages there are"
    learn = learner()
    learn.fit(1)
    for check, expected in ((False, []), (True, [1])):
        averages = [Average(learn.model, ema(decay=d), check_finite=check) for d in (0.9, 0.99, 0.5)]
        for i in range(3):
            with Count() as count: update_all(averages)
            assert count.sizes == expected, (check, i, count.sizes)
    with Count() as count: dist.barrier()
    assert count.sizes                                         # it counts


def statistics_are_pooled():
    learn = learner(SWACB(start='0ep', every='1ba'), BNUpdateCB(), model=net(norm=True))
    learn.fit(1)
    x = loaders().train.dataset.tensors[0]
    w = whole(learn)
    h = F.linear(x.double(), w['swa.0.weight'].double(), w['swa.0.bias'].double())
    torch.testing.assert_close(learn.model[1].running_mean.double(), h.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(learn.model[1].running_var.double(), h.var(0), rtol=1e-5, atol=1e-6)


class BadGradient(Callback):
    "In one process"
    order = 0
    def after_backward(self, learn):
        if learn.iter == 1 and dist.get_rank() == 1: learn.model[0].weight.grad.to_local().fill_(float('nan'))


def bad_gradients_of_one():
    guard = NaNGuardCB()
    learn = learner(BadGradient(), guard, GradClipCB(1.))
    learn.fit(1)
    assert (guard.skipped, learn.opt_steps) == (1, 4)


def torchtitan(folder):
    from torch.distributed.checkpoint import save
    learn = learner()
    learn.fit(1)
    weights = learn.model.state_dict()
    save({f'ema_optimizer.state.{k}.ema_params': v*2 for k, v in weights.items()}, checkpoint_id=folder/'titan')
    average = Average(learn.model, ema(decay=0.9))
    load_torchtitan_checkpoint(average, folder/'titan', 9)
    assert average.n == 9
    for k, v in weights.items(): assert torch.equal(average.weights[k], v.to_local()*2)


def gathered_in_ones_own_loop(folder):
    "As recipe 6 of the site does it. Wrong: shards, the raw weights, or a copy of everything on each process"
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    divided, alone = net(norm=True), net(norm=True)
    for m in (divided[0], divided[2], divided): fsdp.fully_shard(m)
    for model in (divided, alone):
        opt, averages = optim.SGD(model.parameters(), 0.1), Averages(model, steps_per_epoch=8, n_epochs=1)
        averages.add('ema', ema(half_life='2ba'))
        for x, y in loaders().valid:
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            averages.step()
        with averages.using('ema'):
            if model is divided:
                state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
                if dist.get_rank() == 0: torch.save(state, folder/'ema.pt')
                else: assert state == {}
            else: torch.save(model.state_dict(), folder/f'alone-{dist.get_rank()}.pt')
    if dist.get_rank() == 0:
        got, want = torch.load(folder/'ema.pt'), torch.load(folder/'alone-0.pt')
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class Losses(Callback):
    "The loss of the validation is the best in the second epoch"
    def after_epoch(self, learn):
        if not learn.training: learn.history[-1]['loss'] = [2., 1., 3., 4.][learn.epoch]


def run(folder, *cbs, **kw):
    learn = learner(EMACB(decay=0.9, apply=False), Losses(), CheckpointCB(folder, keep=1, **kw), *cbs)
    learn.fit(4, valid='raw')
    return learn


def names(folder): return sorted(p.name for p in folder.iterdir())


def nothing_is_warned_of(folder):
    "Wrong: after a validation the gathered weights are taken for new ones, which the optimizer does not train"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner(CheckpointCB(folder/'run'), model=nn.Linear(3, 3)).fit(2)


def the_best_stays(folder):
    "Wrong: it goes when newer ones come; its name points to another, or to none"
    learn = run(folder/'run', best='loss')
    assert names(folder/'run') == ['best', 'step-00000010', 'step-00000020']
    learn.load(folder/'run'/'best')
    assert learn.opt_steps == 10
    ema = learn.averages['ema'].weights
    for k, v in load_weights(folder/'run'/'best', 'ema').items():      # each process alone
        torch.testing.assert_close(_as_part(ema[k], learn.model.state_dict()[k]).full_tensor(), v, rtol=0, atol=0)


class Later(Callback):
    "Let the threads wait until training is two steps further"
    order = 90
    def __init__(self): self.go, self.save = threading.Event(), dcp.save
    def __call__(self, *args, **kw): return self.go.wait(60) and self.save(*args, **kw)
    def before_batch(self, learn):
        if learn.training and (learn.epoch, learn.iter) == (1, 2): self.go.set()


def in_the_background(folder):
    "The same files. Wrong: parts of a later step; a step that waits for the disk, here for ever"
    dcp.save = later = Later()
    try: run(folder/'a', later, best='loss', background=True)
    finally: dcp.save = later.save
    run(folder/'b', best='loss')
    assert names(folder/'a') == names(folder/'b') and len(names(folder/'a')) == 3
    for name in names(folder/'a'):
        for weights in 'raw', 'ema': same(*(load_weights(folder/run/name, weights) for run in 'ab'))


def what_a_thread_could_not_write(folder):
    "The error of one process, on all"
    def full(path): raise OSError(errno.ENOSPC, 'No space left on device')
    if dist.get_rank() == 1: sharded.flush = full
    try:
        for background in False, True:
            raises_on_all(OSError, 'step-00000005 could not be written.* in process 1: .*No space left',
                          lambda: run(folder/f'{background}', background=background))
            assert names(folder/f'{background}') == []
    finally: sharded.flush = flush


def refused(folder):
    mine = dist.get_rank() == 1
    raises_on_all(ValueError, 'is another folder for process 1', lambda: run(folder/('mine' if mine else 'run')))
    run(folder/'saved')
    other = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 3))
    raises_on_all(ValueError, 'of another model', lambda: learner(model=other).fit(5, resume=folder/'saved'))
    raises_on_all(ValueError, 'of another model', lambda: learner(model=other).load(folder/'saved'))
    learn = learner(EMACB(decay=0.9, apply=False))
    learn.fit(1)
    raises_on_all(OSError, 'is there already', lambda: learn.save(folder/'saved'/'step-00000020'))
    if mine: learn.averages.remove('ema')
    raises_on_all(ValueError, 'differ in averages', lambda: learn.export(folder/'a.safetensors', 'ema'))
    posthoc = PostHocEMACB(folder=folder/'posthoc')
    raises_on_all(ValueError, 'leave folder out', lambda: learner(posthoc).fit(1))


CASES = (as_one_process, messages_of_an_update, statistics_are_pooled, bad_gradients_of_one, torchtitan,
         gathered_in_ones_own_loop, nothing_is_warned_of, the_best_stays, in_the_background,
         what_a_thread_could_not_write, refused)


def work(folder):
    warnings.simplefilter('ignore')
    DistributedCB('fsdp', timeout=30)
    run_cases(CASES, folder)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    end_ranks(start_ranks(2, work, folder, folder=folder), LIMIT)
    return folder


@pytest.mark.parametrize('case', [c.__name__ for c in CASES])
def test_in_two_processes(case, results): check_case(case, results, 2)


# --- from 4 processes to 2, to 1, to 3


class Loaded(Callback):
    "What a resumed fit begins with"
    state = None
    order = -5
    def before_batch(self, learn):
        if self.state is None: self.state = whole(learn)


def one_epoch_more(folder, n_epochs):
    warnings.simplefilter('ignore')
    loaded = Loaded()
    cbs = EMACB(decay=0.9, apply=False), SWACB(start='0ep', every='1ba', apply=False), MetricsCB(accuracy)
    learn = learner(*cbs, CheckpointCB(folder/'run', keep=2), loaded, model=net(norm=True), n=96)
    learn.fit(n_epochs, resume=folder/'run')
    if n_epochs > 1: same(loaded.state, torch.load(folder/f'{n_epochs - 1}.pt'))
    end = whole(learn)
    if not int(os.environ['RANK']): torch.save(end, folder/f'{n_epochs}.pt')


@pytest.mark.parametrize('sizes', [(2, 1), pytest.param((4, 2, 1, 3), marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(sizes, tmp_path):
    "Weights, both averages and the optimizer, bit for bit; 7 rows do not divide by 2, 3 or 4"
    for n_epochs, size in enumerate(sizes, 1):
        folder = tmp_path/f'{size}'
        codes = end_ranks(start_ranks(size, one_epoch_more, tmp_path, n_epochs, folder=folder), LIMIT)
        assert codes == [0]*size, errors_of(folder, size)
    saved = torch.load(tmp_path/f'{len(sizes)}.pt')
    assert len(saved) > 30 and not [p for p in (tmp_path/'run').iterdir() if p.name[0] == '.']
    learn = learner(EMACB(decay=0.9, apply=False), mode=None, model=net(norm=True))      # one that divides nothing
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.load(tmp_path/'run')
    for k, v in learn.averages['ema'].weights.items(): assert torch.equal(v, saved[f'ema.{k}'])
