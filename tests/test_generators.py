"Random generators are found wherever data, callbacks and layers keep them, and go on after a look as before it"
import functools
import itertools
import operator
import random
import sys
import threading
import types
import weakref
from collections import ChainMap, UserDict, deque
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastswa.callbacks.basics import BatchTransformCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.random_state import generators_in, get_rng_state, keep_rng, seed_generator, set_rng_state
from fastswa.core import plain
from fastswa.training.events import Callback, CancelFitException
from fastswa.training.learner import TrainLearner
from helpers import copied, reopened, same

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Holder: pass


class Mangled:
    __slots__ = ('__rng',)
    def __init__(self, rng): self.__rng = rng


class Secretive:
    "Attributes that only `object` can read"
    def __init__(self, rng): object.__setattr__(self, '_kept', {'rng': rng})
    def __getattribute__(self, name): raise AttributeError(name)


class OwnList(list): pass
class OwnDict(dict): pass


class Mixed(random.Random):
    "A generator that draws from another one"
    def random(self): return self.inner.random()


class Lazy:
    @functools.cached_property
    def rng(self): return self.make()


def with_attribute(o, rng, name='rng'):
    setattr(o, name, rng)
    return o


def of_the_metaclass(rng): return type('Meta', (type,), dict(rng=rng))('C', (), {})()


def property_of(rng): return type('C', (), dict(draw=property(lambda self: rng.normal())))()


def running(rng):
    def draws():
        inside = rng
        while True: yield inside.__class__
    res = draws()
    next(res)
    return res


def remembered(rng):
    "Only the cache of a function has it"
    made = [rng]
    get = functools.lru_cache(lambda i: made.pop())
    get(0)
    return get


def decorated(rng):
    def wrap(f):
        @functools.wraps(f)
        def inner(x): return f(x)
        return inner
    return wrap(wrap(lambda x: x + rng.normal()))


def cached(rng):
    lazy = Lazy()
    lazy.make = lambda: rng
    return lazy if lazy.rng is rng else None


def in_context(rng):
    var = ContextVar('var')
    var.set(rng)
    return var


def module(name, **names):
    sys.modules[name] = m = types.ModuleType(name)
    vars(m).update(names)
    return m


def imported_inside(rng):
    module('noise_of_mine', rng=rng)
    def draw():
        import noise_of_mine
        return noise_of_mine.rng.normal()
    return draw


def imported_from_inside(rng):
    module('other_noise_of_mine', rng=rng)
    def draw():
        from other_noise_of_mine import rng
        return rng.normal()
    return draw


def in_a_package(rng):
    package = module('package_of_mine', noise=module('package_of_mine.noise', rng=rng))
    return eval('lambda: package.noise.rng.normal()', dict(package=package))


def executed(rng):
    "A function whose module has no name"
    space = dict(rng=rng)
    exec('def draw(): return [rng.normal() for _ in range(2)]', space)
    return space['draw']


WEAK = []


def weakly(make):
    def f(rng):
        WEAK.append(with_attribute(Holder(), rng))
        return make(WEAK[-1])
    return f


PLACES = dict(
    a_set=lambda r: {r}, a_frozenset=lambda r: [frozenset([r])], a_key=lambda r: {r: 1}, a_deque=lambda r: deque([[r]]),
    a_chain_of_maps=lambda r: ChainMap({}, dict(a=r)), a_dict_of_python=lambda r: UserDict(a=r),
    a_read_only_dict=lambda r: types.MappingProxyType(dict(a=r)), an_array=lambda r: np.array([None, r], dtype=object),
    a_list_with_attributes=lambda r: with_attribute(OwnList(), r), of_a_dict=lambda r: with_attribute(OwnDict(a=1), r),
    a_map=lambda r: map(lambda i: r.normal(), itertools.count()),
    called=lambda r: iter(lambda: r.normal(), None).__next__,
    chained=lambda r: itertools.chain([1], zip(map(lambda i: r.normal(), range(3)))),
    running=running, not_yet_running=lambda r: (r.normal() for _ in range(3)),
    methodcaller=lambda r: partial(operator.methodcaller('normal'), r),
    partial_of_partial=lambda r: partial(partial(max, r), 1),
    mangled=Mangled, secretive=Secretive, remembered=remembered, decorated=decorated, cached=cached,
    in_context=in_context, of_the_metaclass=of_the_metaclass, of_a_property=property_of,
    of_the_thread=lambda r: with_attribute(threading.local(), r),
    in_a_generator=lambda r: with_attribute(Mixed(0), r, 'inner'),
    weak=weakly(weakref.ref), weak_proxy=weakly(weakref.proxy),
    weak_dict=weakly(lambda h: weakref.WeakValueDictionary(a=h)),
    weak_set=weakly(lambda h: weakref.WeakSet([h])),
    imported_inside=imported_inside, imported_from_inside=imported_from_inside, in_a_package=in_a_package,
    executed=executed,
    late_in_a_list=lambda r: [SimpleNamespace() for _ in range(1500)] + [r],
    beside_a_long_list=lambda r: [[SimpleNamespace(i=[i]) for i in range(5000)], [[[[r]]]]])


@pytest.mark.parametrize('place', PLACES)
def test_found(place):
    for rng in (np.random.default_rng(0), random.Random(0)):
        held = PLACES[place](rng)
        assert any(o is rng for o in generators_in(SimpleNamespace(a=SimpleNamespace(b=held))))


def test_not_of_others():
    "Neither those of the process, which are put back anyway, nor whatever a namespace or a library holds"
    def draw(): return random.random() + np.random.rand() + np.random.default_rng().normal() + torch.rand(()).item()
    hidden = np.random.default_rng(0)
    namespace = dict(__builtins__={}, rng=hidden)
    frames = sys.exc_info
    try: raise ValueError
    except ValueError as e: error = e
    gone = weakref.proxy(Holder())
    assert generators_in(draw, namespace, frames, error, gone, [random.SystemRandom()], torch, np, print) == []


# --- runs


def run(*cbs, dls=None, layer=None, look=False, cls=TrainLearner):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), layer or nn.Identity(), nn.Linear(8, 1))
    train, valid = dls or (DataLoader(TensorDataset(X, Y), 8, shuffle=True), DataLoader(TensorDataset(X, Y), 16))
    learn = cls(model, SimpleNamespace(train=train, valid=valid), F.mse_loss, 0.05, cbs)
    if look: learn.validate()
    learn.fit(2)
    if look: learn.lr_find(show=False, max_steps=3)
    learn.fit(1)
    learn.restore()
    return copied(learn.model.state_dict())


def averaging():
    return EMACB(half_life='3ba'), SWACB(start='0ba', every='1ba', name='second'), BNUpdateCB(valid_batches=2)


class MadeLate(Dataset):
    "The generator is made at the first sample, which may be in a look"
    def __len__(self): return 32
    def __getitem__(self, i):
        if not hasattr(self, 'rng'): self.rng = np.random.default_rng(0)
        return X[i] + self.rng.normal(), Y[i]


class Spawning(Dataset):
    "Each sample has a generator of its own"
    def __init__(self, seeds): self.seeds = seeds
    def __len__(self): return 32
    def __getitem__(self, i):
        child, = self.seeds.spawn(1)
        return X[i] + np.random.default_rng(child).normal(), Y[i]


@pytest.mark.parametrize('make', [
    MadeLate, lambda: Spawning(np.random.SeedSequence(3)), lambda: Spawning(np.random.default_rng(3))],
    ids=['made_late', 'seeds', 'spawned'])
@pytest.mark.filterwarnings('error')
def test_of_data(make):
    def dls(): return DataLoader(make(), 8, shuffle=True), DataLoader(make(), 16)
    assert same(run(*averaging(), dls=dls(), look=True), run(dls=dls()))


class DropsWithItsOwn(nn.Module):
    "A layer with a generator, which draws in eval mode too"
    def __init__(self):
        super().__init__()
        self.draw = map(lambda _: torch.rand(8, generator=self.g), itertools.count())
        self.g = torch.Generator().manual_seed(3)
    def forward(self, x): return x*(next(self.draw) > 0.2)


def test_of_a_layer(): assert same(run(*averaging(), layer=DropsWithItsOwn(), look=True), run(layer=DropsWithItsOwn()))


class MixCB(Callback):
    "Its generators are those of a class, of an iterator, and of a weak dict"
    role = 'prepares'
    def __init__(self):
        self.kept = random.Random(1)
        type(self).rng = np.random.default_rng(0)
        self.weak = weakref.WeakValueDictionary(r=self.kept)
        self.more = map(torch.Generator.initial_seed, iter(lambda g=torch.Generator(): g, None))
    def before_batch(self, learn):
        learn.batch = learn.batch[0]*self.rng.uniform(0.9, 1.1) + self.weak['r'].gauss(0, 0.1), learn.batch[1]


def test_of_a_callback(): assert same(run(*averaging(), MixCB(), look=True), run(MixCB()))


def test_shared_with_the_notebook():
    "A look has not happened, for whoever draws from it"
    rng = np.random.default_rng(0)
    cb = BatchTransformCB(lambda b: (b[0] + rng.normal(), b[1]))
    learn = TrainLearner(nn.Linear(4, 1), SimpleNamespace(train=[(X, Y)], valid=[(X, Y)]), F.mse_loss, 0.05, cb)
    learn.validate()
    assert rng.normal() == np.random.default_rng(0).normal()


def test_what_a_generator_has_spawned_is_saved():
    "The next one that it spawns after a resume is not one that there was"
    rng, seeds = np.random.default_rng(2**100), np.random.SeedSequence([1, 2], spawn_key=(3,))
    rng.spawn(2)
    seeds.spawn(1)
    saved = reopened(plain(get_rng_state([rng, seeds])))
    expected = rng.spawn(1)[0].normal(), seeds.spawn(1)[0].spawn_key
    with keep_rng(rng, seeds): rng.spawn(5)
    set_rng_state(saved, [rng, seeds])
    assert (rng.spawn(1)[0].normal(), seeds.spawn(1)[0].spawn_key) == expected


class Streamed:
    "A loader that shuffles by a generator of each pass"
    epochs = 0
    def __len__(self): return 4
    def __iter__(self):
        g = torch.Generator().manual_seed(torch.empty((), dtype=torch.int64).random_().item())
        for part in torch.randperm(32, generator=g).split(8): yield X[part], Y[part]


class StopAt(Callback):
    order = 99
    def __init__(self, *at): self.at = at
    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.iter) == self.at: raise CancelFitException


@pytest.mark.parametrize('make', [Streamed, lambda: DataLoader(TensorDataset(X, Y), 8, shuffle=True)],
                         ids=['streamed', 'DataLoader'])
def test_resumed_twice_within_an_epoch(make, tmp_path):
    "The generator of the pass that is being read is not one of the loader's: a file has those of any other run"
    def fit(*cbs, **kw):
        torch.manual_seed(0)
        learn = TrainLearner(nn.Linear(4, 1), SimpleNamespace(train=make(), valid=None), F.mse_loss, 0.05, cbs)
        learn.fit(2, **kw)
        return copied(learn.model.state_dict())
    whole = fit()
    saved = CheckpointCB(tmp_path/'a', every='1ba')
    fit(StopAt(1, 0), saved)
    fit(StopAt(1, 2), saved, resume=tmp_path/'a')
    assert same(fit(resume=tmp_path/'a'), whole)


@pytest.mark.parametrize('rng, other', [
    (np.random.default_rng(0), np.random.default_rng(1)), (np.random.RandomState(0), np.random.RandomState(1)),
    (np.random.Generator(np.random.MT19937(0)), np.random.Generator(np.random.MT19937(1))),
    (random.Random(0), random.Random(1)), (np.random.Philox(0), np.random.Philox(1))])
def test_seeded_anew(rng, other):
    for g in (rng, other): seed_generator(g, 5)
    draw = next(n for n in ('normal', 'gauss', 'random_raw') if hasattr(rng, n))
    args = (0, 1) if draw == 'gauss' else ()
    assert getattr(rng, draw)(*args) == getattr(other, draw)(*args)
