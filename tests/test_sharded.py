"Two processes on the CPU: each averages its shard of weights, both skip what is bad for one; DDP has plain names"
import copy
import datetime
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastswa.averaging.average import Average, update_all
from fastswa.averaging.rules import ema
from fastswa.averaging.schedule_free import ScheduleFree
from helpers import check_case, end_ranks, run_cases, start_ranks

fsdp = pytest.importorskip('torch.distributed.fsdp')
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available() and hasattr(fsdp, 'fully_shard')),
                                reason='needs gloo and fully_shard')
LIMIT = 300 # seconds: only so that processes that wait for each other come to an end


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def sharded():
    model = net()
    for m in (model[0], model[3]): fsdp.fully_shard(m)
    return fsdp.fully_shard(model)


def step(model, opt, i):
    g = torch.Generator().manual_seed(10*i + dist.get_rank())
    model(torch.randn(8, 4, generator=g)).square().sum().backward()
    opt.step(), opt.zero_grad()


def whole(model):
    "The full weights, in float64"
    state = {k: v.full_tensor() if hasattr(v, 'full_tensor') else v for k, v in model.state_dict().items()}
    return {k: v.detach().double().clone() for k, v in state.items() if v.is_floating_point()}


def shard_of(full, t):
    if not hasattr(t, 'device_mesh'): return full
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(full, t.device_mesh, t.placements).to_local()


def trained(n=4, model=None, rule=None):
    "A sharded model after some steps, its average, and the average of the full weights in float64"
    model = sharded() if model is None else model
    opt = torch.optim.SGD(model.parameters(), 0.1)
    avg, ref = (Average(model) if rule is None else Average(model, rule)), {}
    for i in range(n):
        step(model, opt, i)
        assert avg.update() == i + 1
        for k, v in whole(model).items(): ref[k] = v if i == 0 else ref[k] + (avg.rule(i))*(v - ref[k])
    return model, avg, ref


X = torch.linspace(-1, 1, 20).view(5, 4)


def outputs(model):
    with torch.no_grad(): return model.eval()(X)


def plain(weights):
    model = net()
    model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    return model


def shards():
    "The average of the shard is the shard of the average, and no more than that is held"
    for rule in (None, ema(decay=0.5)):
        model, avg, ref = trained(rule=rule)
        for k, t in model.state_dict().items():
            if k in ref: torch.testing.assert_close(avg.weights[k].double(), shard_of(ref[k], t), rtol=1e-5, atol=1e-6)
        whole_model = Average(net())
        whole_model.update()
        assert list(avg.weights) == list(whole_model.weights)
        assert avg.weights['0.weight'].shape == (3, 4)


def swapped():
    "Inside, the whole model computes with the average; afterwards with its own weights, bit for bit"
    model, avg, ref = trained()
    raw = whole(model)
    before = outputs(model)                                    # the root stays gathered after it
    with avg.applied():
        torch.testing.assert_close(outputs(model), outputs(plain(ref)))
    assert all(torch.equal(v, raw[k]) for k, v in whole(model).items())
    assert torch.equal(outputs(model), before)
    model.train()
    step(model, torch.optim.SGD(model.parameters(), 0.1), 9)   # and it goes on
    avg.update()
    assert avg.n == 5


def evaluated_in_between():
    "A forward pass without a backward pass leaves the root's weights gathered"
    model, avg, ref = trained()
    raw = whole(model)
    outputs(model)
    avg.update()
    for k, t in model.state_dict().items():
        if k in ref:
            expected = shard_of((4*ref[k] + raw[k])/5, t)
            torch.testing.assert_close(avg.weights[k].double(), expected, rtol=1e-5, atol=1e-6)


def interrupted():
    model, avg, _ = trained()
    raw = whole(model)
    try:
        with avg.applied():
            outputs(model)
            raise KeyboardInterrupt
    except KeyboardInterrupt: pass
    assert all(torch.equal(v, raw[k]) for k, v in whole(model).items())


def bad_on_one():
    "Skipped where the NaN is, and where it is not"
    import fastswa.averaging.snapshots as averaging
    real = averaging.can_mask
    for masks in (real, lambda tensors: True):                 # decided at once, and by a flag that is reduced
        averaging.can_mask = masks
        model, avg, ref = trained(rule=ema(decay=0.5))
        before = copy.deepcopy(avg.weights)
        with torch.no_grad():
            if dist.get_rank() == 1: model[0].weight.to_local()[0, 0] = float('nan')
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            avg.update()
            assert (avg.n, avg.skipped, len(w)) == (4, 1, 1)
        assert all(torch.equal(v, before[k]) for k, v in avg.weights.items())
        averaging.can_mask = real


def several():
    model = sharded()
    opt, avs = torch.optim.SGD(model.parameters(), 0.1), [Average(model), Average(model, ema(decay=0.5))]
    alone = [copy_of(a) for a in avs]
    for i in range(3):
        step(model, opt, i)
        update_all(avs)
        for a in alone: a.update()
    for a, b in zip(avs, alone):
        assert a.n == b.n == 3 and all(torch.equal(v, b.weights[k]) for k, v in a.weights.items())


def copy_of(avg): return Average(avg.source, avg.rule)


def saved():
    model, avg, _ = trained()
    other = Average(model)
    other.load_state_dict(copy.deepcopy(avg.state_dict()))
    avg.update(), other.update()
    assert other.n == 5 and all(torch.equal(v, other.weights[k]) for k, v in avg.weights.items())


def an_empty_shard():
    "Two processes, one row: the second has none of it"
    torch.manual_seed(0)
    model = fsdp.fully_shard(nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3)))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    avg = Average(model)
    for i in range(2):
        step(model, opt, i)
        avg.update()
    assert avg.weights['0.weight'].shape == (1 - dist.get_rank(), 4)
    with avg.applied(): pass


def in_ddp():
    "Plain names, and the same average everywhere"
    model = nn.parallel.DistributedDataParallel(net())
    opt, avg = torch.optim.SGD(model.parameters(), 0.1), Average(model)
    for i in range(3):
        step(model, opt, i)
        avg.update()
    assert set(avg.weights) <= set(net().state_dict())
    for k, v in avg.weights.items():
        if 'running' in k: continue                            # each process has statistics of its own batches
        first = v.clone()
        dist.broadcast(first, 0)
        assert torch.equal(v, first), k


def schedule_free():
    "The point that the optimizer averages, as its own eval() makes it of the shards"
    sf = pytest.importorskip('schedulefree')
    model = sharded()
    opt = sf.SGDScheduleFree(model.parameters(), 0.1)
    opt.train()
    avg = ScheduleFree(model, opt)
    for i in range(4): step(model, opt, i)
    outputs(model)                                             # the root stays gathered after it
    model.train()
    got = {k: v.clone() for k, v in avg.weights.items()}
    raw = whole(model)
    with avg.applied(): inside = outputs(model)
    assert all(torch.equal(v, raw[k]) for k, v in whole(model).items())
    opt.eval()
    for k, p in model.named_parameters(): assert torch.equal(got[k], p.to_local()), k
    assert torch.equal(outputs(model), inside)


CASES = (shards, swapped, evaluated_in_between, interrupted, bad_on_one, several, saved, an_empty_shard, in_ddp,
         schedule_free)


def work(folder):
    dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=LIMIT/2))
    run_cases(CASES, folder)
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    end_ranks(start_ranks(2, work, folder, folder=folder), LIMIT)
    return folder


@pytest.mark.parametrize('case', [c.__name__ for c in CASES])
def test_sharded(case, results): check_case(case, results, 2)
