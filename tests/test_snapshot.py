"What learner, callbacks, layers and data keep in helper objects is put back after a look, and nothing else"
import io
import threading
from argparse import Namespace
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from fastswa.callbacks.basics import BatchTransformCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.module_state import keep_state
from fastswa.training.events import Callback
from fastswa.training.essentials import LossMeter
from fastswa.training.learner import Learner, TrainCB, TrainLearner
from helpers import copied, same

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
T = TypeVar('T')


def loaders(train=None):
    if train is None: train = DataLoader(TensorDataset(X, Y), 8, shuffle=True)
    return SimpleNamespace(train=train, valid=DataLoader(TensorDataset(X, Y), 16))


def run(*cbs, cls=TrainLearner, layer=None, dls=None, look=None):
    "The state after three epochs, with a look between two fits"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), layer or nn.Identity(), nn.Linear(8, 1))
    learn = cls(model, dls or loaders(), F.mse_loss, 0.05, cbs)
    learn.fit(2)
    if look: look(learn)
    learn.fit(1)
    learn.restore()
    return copied(learn.model.state_dict()), learn


def averaging():
    return EMACB(half_life='3ba'), SWACB(start='0ba', every='1ba', name='second'), BNUpdateCB(valid_batches=2)


# --- counters of every kind: each has `tick()`, which counts and gives the number so far


class Attribute:
    n = 0
    def tick(self):
        self.n += 1
        return self.n


class Slots:
    __slots__ = '__n', 'later'
    def __init__(self): self.__n = 0
    def tick(self):
        self.__n += 1
        self.later = self.__n      # unset at first
        return self.later


class Both(Slots):
    "Slots, and attributes in a class that derives from it"
    def tick(self):
        self.last = super().tick()
        return self.last


@dataclass
class Data:
    seen: list = field(default_factory=list)
    def tick(self):
        self.seen.append(0)
        return len(self.seen)


@dataclass(frozen=True)
class Frozen:
    where: dict = field(default_factory=lambda: dict(n=torch.zeros(1)))
    def tick(self):
        self.where['n'] += 1
        return self.where['n'].item()


class Deep(Generic[T]):
    "Six levels down"
    def __init__(self): self.a = [dict(b=(SimpleNamespace(c=[deque([Attribute()])]),))]
    def tick(self): return self.a[0]['b'][0].c[0][0].tick()


class Closure:
    def __init__(self):
        n = 0
        def tick():
            nonlocal n
            n += 1
            return n
        self.tick = tick


class OfAFunction:
    def __init__(self):
        def tick():
            tick.n += 1
            return tick.n
        tick.n = 0
        self.tick = partial(tick)


class Default:
    def __init__(self):
        def tick(seen=[]):      # noqa: B006
            seen.append(1)
            return len(seen)
        self.tick = tick


class Bound:
    def __init__(self): self.tick = Attribute().tick


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(()))
        self.inner = nn.Sequential(nn.BatchNorm1d(2, momentum=None))
    def tick(self):
        self.n += 1
        self.inner.train()(torch.ones(2, 2))
        return (self.n + self.inner[0].num_batches_tracked).item()


class Recent(list):
    "A list that knows something beside"
    total = 0
    def tick(self):
        self.append(1)
        self.total += 1
        return len(self) + self.total
    def extend(self, items): raise RuntimeError('only one by one')


class Ordered(OrderedDict):
    def tick(self):
        self['n'] = self.get('n', 0) + 1
        self.move_to_end('first', last=self['n'] % 2 == 0)
        return self['n'] + 10*list(self).index('first')


class Metric:
    "A metric of torcheval, which is another's class"
    def __init__(self):
        from torcheval.metrics import Mean
        self.mean = Mean()
    def tick(self):
        self.mean.update(torch.tensor([1. + float(self.mean.weights)]))
        return self.mean.compute().item()


class Meter:
    "The library's own"
    def __init__(self): self.meter = LossMeter()
    def tick(self):
        self.meter.add(torch.tensor(1.), 1)
        return len(self.meter.sizes)


class Locked:
    def __init__(self): self.lock, self.n = threading.Lock(), 0
    def tick(self):
        with self.lock: self.n += 1
        return self.n


class Contained:
    "Counters in containers of the standard library"
    def __init__(self):
        self.all = (Counter(), defaultdict(int), UserDict(n=0), ChainMap({'n': 0}), Namespace(n=0), bytearray())
    def tick(self):
        counter, default, user, chained, space, bits = self.all
        for o in (counter, default, user, chained): o['n'] += 1
        space.n += 1
        bits.append(1)
        return counter['n'] + default['n'] + user['n'] + chained['n'] + space.n + len(bits)


class Objects:
    "An array of objects, and objects as keys"
    def __init__(self): self.table = {Attribute(): np.array([Attribute(), None], dtype=object)}
    def tick(self):
        (key, array), = self.table.items()
        return key.tick() + array[0].tick()


class Linked:
    "Through another object and back"
    def __init__(self): self.other = SimpleNamespace(back=self, n=0)
    def tick(self):
        self.other.n += 1
        return self.other.back.other.n


class Pair(NamedTuple):
    a: Attribute
    b: int
    def tick(self): return self.a.tick()


class Made:
    "The helper is there from the first batch on"
    helper = None
    def tick(self):
        if self.helper is None: self.helper = Attribute()
        return self.helper.tick()


COUNTERS = (Attribute, Slots, Both, Data, Frozen, Deep, Closure, OfAFunction, Default, Bound, Net, Recent,
            lambda: Ordered(first=0, n=0), Metric, Meter, Locked, Contained, Objects, Linked,
            lambda: Pair(Attribute(), 0), Made)


class Every:
    "One of each"
    def __init__(self): self.all = [make() for make in COUNTERS]
    def ticks(self): return {type(o).__name__: o.tick() for o in self.all}
    def tick(self): return sum(self.ticks().values())/50


class HelpedCB(TrainCB):
    "A weight in the loss that grows with the batches"
    def __init__(self, helper):
        super().__init__()
        self.helper = helper
    def get_loss(self, learn):
        super().get_loss(learn)
        learn.loss = learn.loss + self.helper.tick()/100*learn.preds.square().mean()


class RampCB(Callback):
    "Its role is not said"
    def __init__(self, helper): self.helper = helper
    def before_batch(self, learn): learn.batch = learn.batch[0]*(1 + self.helper.tick()/100), learn.batch[1]


class Layer(nn.Module):
    def __init__(self, helper):
        super().__init__()
        self.helper = helper
    def forward(self, x): return x*(1 + self.helper.tick()/100)


def looks(learn):
    learn.validate()
    learn.get_preds()
    learn.lr_find(show=False, max_steps=3)


def test_of_a_callback_that_steps():
    "The counts differ by name where one is not put back"
    plain, learn = run(HelpedCB(Every()), cls=Learner)
    res, other = run(HelpedCB(Every()), *averaging(), cls=Learner, look=looks)
    assert learn.cbs[0].helper.ticks() == other.cbs[0].helper.ticks() and same(res, plain)


def test_of_a_callback_that_prepares():
    plain, learn = run(RampCB(Every()))
    res, other = run(RampCB(Every()), *averaging(), look=looks)
    assert learn.cbs[0].helper.ticks() == other.cbs[0].helper.ticks() and same(res, plain)


@pytest.mark.parametrize('cbs', [(), averaging()], ids=['looks', 'averages too'])
def test_of_a_layer(cbs):
    plain, learn = run(layer=Layer(Every()))
    res, other = run(*cbs, layer=Layer(Every()), look=looks)
    assert learn.model[2].helper.ticks() == other.model[2].helper.ticks() and same(res, plain)


# --- what is seen of a row, and what stays


class DivergenceCB(TrainCB):
    "A mean over the batches of an epoch, in a list, a meter and a metric, as a column of the table"
    def __init__(self):
        super().__init__()
        self.kept, self.rows = Metric(), []
    def before_epoch(self, learn):
        self.values, self.meter = [], LossMeter()
        self.kept.mean.reset()
    def get_loss(self, learn):
        super().get_loss(learn)
        value = learn.preds.detach().square().mean()
        self.values.append(value.item())
        self.meter.add(value, len(learn.preds))
        self.kept.mean.update(value)
    def after_epoch(self, learn):
        means = sum(self.values)/len(self.values), self.meter.compute(), self.kept.mean.compute().item()
        self.rows.append(learn.weights)
        learn.history[-1]['means'] = means


def test_what_the_batches_of_a_row_left_is_seen_when_it_ends():
    "Wrong: the figures of the row before, for those of the averages"
    cb = DivergenceCB()
    learn = Learner(nn.Linear(4, 1), loaders(), F.mse_loss, 0.05, [cb, EMACB(half_life='3ba')])
    learn.fit(2)
    for row in learn.history[-2:]:
        with learn.using(row['weights']), torch.no_grad(): expected = learn.model(X).square().mean().item()
        assert row['means'] == pytest.approx([expected]*3, rel=1e-5)
    assert cb.rows == ['raw', 'raw', 'ema']*2


class Stats(TrainLearner):
    "Figures of the learner's own, which another callback shows"
    def get_loss(self):
        super().get_loss()
        self.sums.append(self.preds.detach().sum().item())


class ShowCB(Callback):
    def before_epoch(self, learn): learn.sums = []
    def after_epoch(self, learn): learn.history[-1]['sum'] = sum(learn.sums)


def test_figures_of_a_learner_that_a_callback_shows():
    learn = Stats(nn.Linear(4, 1), loaders(), F.mse_loss, 0.05, [ShowCB(), EMACB(half_life='3ba')])
    learn.fit(1)
    for row in learn.history[-2:]:
        with learn.using(row['weights']), torch.no_grad():
            assert row['sum'] == pytest.approx(learn.model(X).sum().item(), rel=1e-4)


def test_a_row_that_is_cancelled_is_undone_too():
    from fastswa.training.events import CancelEpochException
    class Cancel(Callback):
        order = 90
        def after_batch(self, learn):
            if learn.weights != 'raw': raise CancelEpochException
    plain, _ = run(HelpedCB(Attribute()), cls=Learner)
    res, learn = run(HelpedCB(Attribute()), *averaging(), Cancel(), cls=Learner)
    assert same(res, plain) and {r['weights'] for r in learn.history} == {'raw'}


# --- data


class Counted(Dataset):
    "Samples that change with how many were read"
    def __init__(self, helper): self.helper = helper
    def __len__(self): return 32
    def __getitem__(self, i): return X[i]*(1 + self.helper.tick()/100), Y[i]


class EachTimeAnother(Sampler):
    "The order depends on how often it was asked for"
    times = 0
    def __len__(self): return 32
    def __iter__(self):
        self.times += 1
        return iter(torch.randperm(32, generator=torch.Generator().manual_seed(self.times)).tolist())


DATA = dict(data_set=lambda: DataLoader(Counted(Attribute()), 8), slots=lambda: DataLoader(Counted(Slots()), 8),
            sampler=lambda: DataLoader(TensorDataset(X, Y), 8, sampler=EachTimeAnother()),
            subset=lambda: DataLoader(torch.utils.data.Subset(Counted(Closure()), range(16)), 8),
            joined=lambda: DataLoader(Counted(Data()) + Counted(Metric()), 8))


@pytest.mark.parametrize('make', DATA.values(), ids=DATA)
@pytest.mark.filterwarnings('error')
def test_state_of_data(make):
    "No warning either, since it is the same when it is read again"
    def dls():
        res = loaders(make())
        res.valid = make()
        return res
    assert same(run(*averaging(), dls=dls(), look=looks)[0], run(dls=dls())[0])


# --- what is left alone


class File:
    "What it wrote stays written: so does the count of lines"
    def __init__(self): self.file, self.lines = io.StringIO(), 0
    def tick(self):
        self.file.write('x')
        self.lines += 1


class Fetching:
    def __init__(self): self.thread, self.n = threading.Thread(), 0
    def tick(self): self.n += 1


class Bar:
    "A class of a library: as tqdm's, whose count is on the screen already"
    n = 0
    def tick(self): self.n += 1


class OwnBar(Bar): pass


Bar.__module__ = 'tqdm.std'


@pytest.mark.parametrize('make, n', [(File, 'lines'), (Fetching, 'n'), (Bar, 'n'), (OwnBar, 'n')])
def test_what_acts_on_something_outside_is_left_alone(make, n):
    o = SimpleNamespace(helper=make())
    with keep_state(o): o.helper.tick()
    assert getattr(o.helper, n) == 1


def test_objects_stay_the_same_ones():
    "Others may hold them: nothing is replaced by a copy, and what did not change is not written to"
    class Strict(list):
        def clear(self): raise RuntimeError
    o = SimpleNamespace(data=Data(), net=Net(), rows=Strict([1]), t=torch.zeros(2))
    held, version = (o.data, o.data.seen, o.net.n, o.rows), o.t._version
    with keep_state(o):
        o.data.tick()
        o.data, o.rows = Data(), []
    assert all(a is b for a, b in zip((o.data, o.data.seen, o.net.n, o.rows), held))
    assert (o.data.seen, o.rows, o.t._version) == ([], [1], version)


def test_much_data_is_not_copied():
    "The content of large tensors, of the rest of a long list, and of many tensors of a data set, is left alone"
    big, many, long = torch.zeros(2**20 + 1), [torch.zeros(2**16) for _ in range(20)], [[] for _ in range(3000)]
    o, data = SimpleNamespace(big=big, long=long), Counted(SimpleNamespace(many=many, n=0))
    with keep_state(o, also=[data]):
        for t in (big, *many): t += 1
        for r in long: r.append(1)
        long.append(0)
        data.helper.n += 1
    assert big.sum() > 0 and 0 < sum(t[0] == 0 for t in many) <= 4 and data.helper.n == 0
    assert len(long) == 3000 and long[-1] == [1] and long[0] == []


def test_state_is_undone_whatever_is_raised():
    o = SimpleNamespace(helper=Slots())
    with pytest.raises(KeyError), keep_state(o):
        o.helper.tick()
        raise KeyError
    assert o.helper.tick() == 1 and not hasattr(Slots(), 'later')


def test_the_transform_of_a_batch_counts():
    helper = Closure()
    def tfm(b): return b[0]*(1 + helper.tick()/100), b[1]
    plain, _ = run(BatchTransformCB(lambda b, h=Closure(): (b[0]*(1 + h.tick()/100), b[1])))
    assert same(run(BatchTransformCB(tfm), *averaging(), look=looks)[0], plain)


def test_odd_values():
    "Scripted modules, whose buffers are no dict; nested and expanded tensors"
    scripted = torch.jit.script(nn.BatchNorm1d(2))
    nested = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    with keep_state(scripted, SimpleNamespace(a=nested, b=torch.ones(1).expand(4))): scripted(torch.randn(4, 2))
    assert (scripted.running_mean == 0).all()
