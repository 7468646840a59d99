"Averages in any loop: when snapshots are taken, which weights a model holds and who may change that, states that go on"
import asyncio
import copy
import gc
import pickle
import warnings
import weakref
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.averaging.average import Average, update_all
from fastswa.averaging.averages import Averages
from fastswa.averaging.ensembles import LatestAverage
from fastswa.averaging.holding import held_weights, restore_raw
from fastswa.averaging.rules import ema, equal, power
from fastswa.callbacks.swa import AverageCB, EMACB, LAWACB, SWACB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.clock import Clock
from fastswa.module_state import keep_modes, keep_state
from fastswa.random_state import keep_rng, set_seed
from fastswa.training.events import Callback, CancelFitException, CancelStepException
from fastswa.training.learner import TrainLearner
from helpers import TiedNet, copied, data, learner, net, same, state

N = 10      # batches in an epoch of `data`


def loop(model, averages, n_epochs=3, every_second=False):
    "A training loop as anybody writes it"
    opt = optim.SGD(model.parameters(), 0.3, momentum=0.9)
    for _ in range(n_epochs):
        for i, (xb, yb) in enumerate(data().train):
            F.cross_entropy(model(xb), yb).backward()
            if every_second and i % 2 == 0:
                averages.step(stepped=False)
                continue
            opt.step()
            opt.zero_grad()
            averages.step()


def four(add):
    add('ema', ema(half_life='0.1dur'))
    add('steps', ema(0.9), every='3ba')
    add('swa', equal(), start='0.5dur', every='0.25ep')
    add('anytime', power(half_life=0.1), start='1ep')


@pytest.mark.parametrize('every_second', [False, True])
def test_a_raw_loop_and_a_learner_give_the_same_averages_bit_for_bit(every_second):
    class Skip(Callback):
        def after_backward(self, learn):
            if every_second and learn.iter % 2 == 0: raise CancelStepException
    model = net()
    averages = Averages(model, steps_per_epoch=N, n_epochs=3)
    four(averages.add)
    loop(model, averages, every_second=every_second)
    cbs = []
    four(lambda name, rule, **kw: cbs.append(AverageCB(rule, name=name, valid=False, **kw)))
    momentum = lambda params, lr: optim.SGD(params, lr, momentum=0.9)
    learn = TrainLearner(net(), data(), F.cross_entropy, 0.3, [*cbs, Skip()], momentum)
    learn.fit(3)
    assert same(copied(model.state_dict()), copied(learn.model.state_dict()))
    for name in averages:
        assert averages[name].n == learn.averages[name].n > 0
        assert same(averages[name].weights, learn.averages[name].weights), name


def test_position_is_in_batches_and_decay_in_steps():
    "Wrong: accumulation by two makes a half-life in `dur` twice as long, or lets SWA start too late (F5-TTS#631)"
    model = nn.Linear(1, 1, bias=False)
    averages = Averages(model, steps_per_epoch=20, n_epochs=1)
    averages.add('swa', equal(), start='0.5dur', every='0.1dur')
    averages.add('ema', ema(half_life='0.5dur'))
    seen, exact = [], None
    for i in range(20):
        nn.init.constant_(model.weight, float(i))
        stepped = i % 4 == 3
        averages.step(stepped=stepped)
        if not stepped: continue
        exact = float(i) if exact is None else 2**-0.4*exact + (1 - 2**-0.4)*i      # 4 of 10 batches to the half-life
        if i + 1 >= 10:
            seen.append(i)                                               # 0.1dur is below the 4 batches of a step
    assert averages['swa'].weights['weight'].item() == pytest.approx(np.mean(seen))
    assert averages['ema'].weights['weight'].item() == pytest.approx(exact, rel=1e-6)


# --- a loop that goes on beyond the length that it was said to have


def warnings_of(averages, batches, stepped=lambda i: True):
    "Which of so many further batches warn, and of what"
    found = []
    for i in range(1, batches + 1):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            averages.step(stepped=stepped(i))
        found += [(i, str(o.message)) for o in said]
    return found


def watched(*args, clock=None):
    averages = Averages(nn.Linear(1, 1), *args)
    averages.add('swa', equal(), start='2ba')
    if clock: averages.begin(clock=clock)
    return averages


def test_a_loop_beyond_its_length_is_told_once_in_each_run():
    "Wrong: silence, where SWA of the last quarter began in the first of ten epochs; a warning at every step"
    averages = watched(10, 2)
    (i, text), = warnings_of(averages, 50)
    assert i == 21 and 'batch 21 of a run that was announced as 20 ' in text and 'averages.begin(' in text
    averages.begin(10, 1)
    assert [i for i, _ in warnings_of(averages, 30)] == [11] and averages['swa'].n == 49 + 29


def test_the_warning_names_the_line_of_the_loop():
    averages = watched(1, 1)
    averages.step()
    with pytest.warns(UserWarning, match='batch 2 of') as said: averages.step()
    assert said[0].filename == __file__


@pytest.mark.parametrize('args', [(), (10,), (None, 2)])
def test_no_warning_where_the_length_is_not_known(args): assert warnings_of(watched(*args), 50) == []


def test_what_counts_as_the_length_of_a_run():
    "Batches, where gradients add up too; steps in a run that `max_steps` ends. Wrong: accumulation hides the end"
    every_second = dict(stepped=lambda i: i % 2 == 0)
    assert [i for i, _ in warnings_of(watched(10, 2), 50, **every_second)] == [21]
    (i, text), = warnings_of(watched(clock=Clock(10, None, 8)), 50, **every_second)
    assert i == 18 and 'step 9 of a run that was announced as 8 (max_steps)' in text
    assert warnings_of(watched(clock=Clock(10, 2, 25)), 20) == []


@pytest.mark.parametrize('n_epochs, expected', [(4, []), (2, [1]), (1, [1])])
def test_a_resumed_run_is_as_long_as_it_is_in_all(n_epochs, expected):
    "A state of 20 batches. Wrong: a warning in the rest of a run of 40; silence as it was never exactly at the end"
    first, rest = watched(10, 4), watched(10, n_epochs)
    assert warnings_of(first, 20) == []
    rest.load_state_dict(first.state_dict())
    assert [i for i, _ in warnings_of(rest, 20)] == expected


def test_a_learner_that_fits_again_is_not_warned():
    "Nor one whose clock is that of `max_steps`, or that is resumed by hand"
    learn = learner(EMACB(half_life='0.1dur', apply=False), SWACB(start='0.5dur', apply=False), BNUpdateCB())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)
        learn.fit(2)
        learn.fit(3, max_steps=7)


def fitted(*cbs, model=None, dls=None):
    learn = learner(*(cbs or [EMACB(0.8), BNUpdateCB()]), model=model, dls=dls)
    learn.fit(1)
    return learn


@pytest.mark.parametrize('of', [lambda model: model, lambda model: model[0], lambda model: nn.Sequential(*model[:2])],
                         ids=['whole', 'layer', 'part'])
def test_a_model_holds_what_it_holds_when_its_learner_is_gone(of):
    "Wrong: the model flips back to its raw weights in the midst of what uses it by then, as the learner is collected"
    def train():
        learn = fitted()
        learn.restore()
        raw = copied(of(learn.model).state_dict())
        learn.apply('ema')
        return of(learn.model), copied(of(learn.model).state_dict()), raw
    model, held, raw = train()
    gc.collect()
    assert held_weights(model) == 'ema' and same(copied(model.state_dict()), held)
    restore_raw(model)
    assert held_weights(model) == 'raw' and same(copied(model.state_dict()), raw)


CONTEXTS = dict(using=lambda learn: learn.averages.using('ema'), of_the_learner=lambda learn: learn.using('ema'),
                applied=lambda learn: learn.averages['ema'].applied(),
                stashed=lambda learn: learn.cbs[0].average.applied('cpu'))


def dropped(enter): enter()


def in_a_generator(enter):
    "Kept by one that nobody goes on with"
    def f():
        kept = enter()
        yield kept
    g = f()
    next(g)


def in_a_coroutine(enter):
    async def f():
        kept = enter()
        await asyncio.sleep(0)
        return kept
    c = f()
    c.send(None)


def in_a_cycle(enter):
    context = enter()
    context.me = context


def in_a_traceback(enter):
    def f():
        kept = enter()
        raise ValueError(kept)
    with pytest.raises(ValueError): f()


def entered(make):
    "A function that enters a new context and returns it"
    def enter():
        context = make()
        context.__enter__()
        return context
    return enter


@pytest.mark.parametrize('abandon', [dropped, in_a_generator, in_a_coroutine, in_a_cycle, in_a_traceback])
@pytest.mark.parametrize('make', CONTEXTS.values(), ids=CONTEXTS)
def test_a_context_that_is_dropped_changes_nothing(make, abandon):
    "Wrong: weights, modes and random state flip as it is collected, in the midst of what uses them by then"
    learn = fitted(EMACB(0.8, apply=False), BNUpdateCB(), dls=data(32))
    model, averages, raw = learn.model, learn.averages, state(learn)
    abandon(entered(lambda: make(learn)))
    model.eval()
    held, rng = state(learn), torch.get_rng_state()
    torch.rand(3)
    moved = torch.get_rng_state()
    gc.collect()
    assert held_weights(model) != 'raw' and same(state(learn), held) and not any(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), moved) and not torch.equal(rng, moved)
    for name, weights in (('raw', raw), ('ema', averages['ema'].weights)):
        with averages.using(name): assert all(torch.equal(p, weights[k]) for k, p in model.named_parameters())
        assert same(state(learn), held)
    restore_raw(model)
    assert averages.held == 'raw' and same(state(learn), raw)
    learn.fit(1)
    assert averages['ema'].n == 2*2


@pytest.mark.parametrize('leave', [lambda g: g.close(), lambda g: g.throw(KeyError), lambda g: next(g, None)])
def test_a_block_in_a_generator_is_left_with_it(leave):
    learn = fitted(EMACB(0.8, apply=False))
    raw = state(learn)
    def looks():
        with learn.using('ema') as model: yield copied(model.state_dict())
    g = looks()
    assert not same(next(g), raw)
    with suppress(KeyError): leave(g)
    assert learn.weights == 'raw' and same(state(learn), raw)


@pytest.mark.parametrize('keep', [keep_rng, lambda: keep_modes(LAYER), lambda: keep_state(LAYER)],
                         ids=['random state', 'modes', 'buffers'])
def test_what_only_keeps_something_is_dropped_without_a_trace_too(keep):
    LAYER.train()
    context = keep()
    context.__enter__()
    LAYER(torch.randn(4, 3))
    LAYER.eval()
    torch.rand(3)
    now = torch.get_rng_state(), LAYER.running_mean.clone()
    del context
    gc.collect()
    assert torch.equal(torch.get_rng_state(), now[0]) and torch.equal(LAYER.running_mean, now[1])
    assert not LAYER.training


LAYER = nn.BatchNorm1d(3)


def test_a_dropped_context_keeps_no_model_alive():
    learn = fitted(EMACB(0.8, apply=False))
    learn.using('ema').__enter__()
    gone = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert gone() is None


def test_a_cell_that_is_run_again_trains_from_the_raw_weights():
    "Wrong: 'an average is applied' without a way out, or a second run that silently starts from the average"
    model = net()
    first = fitted(model=model)
    raw = copied(first.averages.weights('raw'))
    second = learner(EMACB(0.8), BNUpdateCB(), model=model)
    class Start(Callback):
        order = 99
        def before_fit(self, learn): start.update(copied(learn.averages.weights('raw')), held=learn.weights)
    start = {}
    with pytest.warns(UserWarning, match="held its 'ema' weights: training starts from its raw ones"):
        second.fit(1, cbs=Start())
    assert start.pop('held') == 'raw' and same(start, raw)


class Wrapped(nn.Module):
    "A model in another one"
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x): return self.inner(x)


@pytest.mark.parametrize('wrap', [lambda m: m, nn.DataParallel, Wrapped, torch.compile,
                                  lambda m: nn.Sequential(*m)], ids=['same', 'parallel', 'outer', 'compiled', 'layers'])
def test_a_learner_without_averages_trains_from_the_raw_weights(wrap):
    "Wrong: it silently trains from an average that another learner, perhaps long gone, has left in the model"
    model = net()
    raw = copied(fitted(model=model).averages.weights('raw'))
    other = learner(model=wrap(model))
    class Start(Callback):
        def before_batch(self, learn):
            start.update(copied(model.state_dict()))
            raise CancelFitException
    start = {}
    with pytest.warns(UserWarning, match="held its 'ema' weights: training starts from its raw ones"):
        other.fit(1, cbs=Start())
    assert held_weights(model) == 'raw' and all(torch.equal(start[k], v) for k, v in raw.items())


def test_making_averages_of_a_model_changes_nothing():
    learn = fitted()
    held = copied(learn.model.state_dict())
    other = Averages(learn.model)
    assert other.held == 'ema' and same(copied(learn.model.state_dict()), held)
    with pytest.raises(RuntimeError, match=r'restore_raw\(model\)'):
        other.add('mine', equal())
        other.step()
    other.restore()
    other.step()
    assert other['mine'].n == 1 and learn.weights == 'raw'


@pytest.mark.parametrize('copier', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
@pytest.mark.filterwarnings('ignore:.*weights_only')
def test_a_copy_of_a_learner_that_holds_its_average(copier):
    "It holds the same, has raw weights of its own, and trains on as the first would"
    def momentum(params, lr): return optim.SGD(params, lr, momentum=0.9)
    learn = TrainLearner(net(), data(), F.cross_entropy, 0.3, [EMACB(0.8), BNUpdateCB()], optim.SGD)
    learn.fit(1)
    twin = copier(learn)
    assert twin.weights == 'ema' and twin.averages['ema'] is twin.cbs[0].average
    twin.restore()
    assert learn.weights == 'ema' and twin.weights == 'raw'
    assert same(copied(twin.averages.weights('raw')), copied(learn.averages.weights('raw')))
    for o in (learn, twin):
        set_seed(1)
        o.fit(1)
        o.restore()
    assert learn.opt_steps == twin.opt_steps == 2*N and learn.averages['ema'].n == twin.averages['ema'].n == 2*N
    assert same(copied(learn.model.state_dict()), copied(twin.model.state_dict()))


def trains(model):
    model(torch.randn(4, 3)).sum().backward()
    optim.SGD(model.parameters(), 0.1).step()


def adds(model):
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()): t.add_(1)


@pytest.mark.parametrize('write', dict(
    adds=adds, trains=trains, data=lambda m: setattr(m[0].weight, 'data', torch.zeros(8, 3)),
    parameter=lambda m: setattr(m[0], 'weight', nn.Parameter(torch.zeros(8, 3))),
    resets=lambda m: m[0].reset_parameters(),
    loads=lambda m: m.load_state_dict(net(5).state_dict()),
    assigns=lambda m: m.load_state_dict(net(5).state_dict(), assign=True)).items(), ids=lambda o: o[0])
@pytest.mark.parametrize('how', ['using', 'applied'])
def test_writing_inside_a_look_changes_neither_set_of_weights(write, how):
    "Wrong: what is written to weights or buffers goes into the average, or stays in the model"
    model = net()
    averages = Averages(model)
    averages.add('ema', ema(0.5))
    loop(model, averages, 1)
    raw, average = copied(model.state_dict()), copied(averages['ema'].weights)
    with averages.using('ema') if how == 'using' else averages['ema'].applied():
        write[1](model)
        model(torch.randn(4, 3))
    assert same(copied(model.state_dict()), raw) and same(copied(averages['ema'].weights), average)


def test_keep_makes_the_average_the_weights_to_train_on():
    learn = fitted()
    held = copied(learn.model.state_dict())
    learn.averages.keep()
    assert learn.weights == 'raw' and same(copied(learn.model.state_dict()), held)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, valid=False)


def test_apply_from_one_average_to_another_and_back():
    learn = fitted(EMACB(0.8), SWACB(start='0.5dur'), LAWACB(every='2ba'), BNUpdateCB())
    raw = copied(learn.model.state_dict())
    for name in ('ema', 'swa', 'lawa'):
        learn.apply(name)
        assert learn.weights == held_weights(learn.model) == name
        expected = learn.averages[name].weights
        assert all(torch.equal(p, expected[k]) for k, p in learn.model.named_parameters())
    learn.apply('raw')
    assert learn.weights == 'raw' and same(copied(learn.model.state_dict()), raw)


def test_a_part_of_a_model_whose_whole_is_held():
    "Wrong: its average becomes the average of the average; overlap is of tensors, not of modules"
    model = net()
    part, whole = Average(model[0]), Average(model)
    for a in (part, whole): a.update()
    with whole.applied():
        with pytest.raises(RuntimeError, match='outside of applied'): part.update()
    elsewhere = Average(model[4] if len(model) > 4 else model[-1])
    with part.applied():
        elsewhere.update()
        with pytest.raises(RuntimeError, match='outside of applied'): whole.update()
    assert (part.n, elsewhere.n, whole.n) == (1, 1, 1)


def test_learners_on_parts_of_one_model():
    "The other one goes on while this one's part holds its average; one that shares a layer starts from the raw weights"
    model = net(norm=False)
    first = fitted(EMACB(0.5, name='first'), model=nn.Sequential(*model[:2], nn.Linear(8, 3)))
    last = learner(EMACB(0.5, name='last'), model=nn.Sequential(nn.Linear(3, 8), *model[2:]))
    last.fit(1)
    assert [held_weights(m) for m in (model[0], model[-1])] == ['first', 'last']
    raw = [learn.averages.weights('raw')[k].clone() for learn, k in ((first, '0.weight'), (last, '2.weight'))]
    with pytest.raises(RuntimeError, match='outside of applied'): Average(model).update()
    whole = learner(EMACB(0.5, name='whole'), model=model)
    with pytest.warns(UserWarning, match='training starts from its raw ones'): whole.fit(0)
    assert (first.weights, last.weights) == ('raw', 'raw')
    assert torch.equal(model[0].weight, raw[0]) and torch.equal(model[-1].weight, raw[1])


def test_a_part_that_shares_its_weights_with_one_that_is_held():
    tied = TiedNet(tied='shared')
    a, b = Average(tied.a), Average(tied.b)
    a.update()
    with a.applied():
        assert held_weights(tied.b) == 'average'
        with pytest.raises(RuntimeError, match='outside of applied'): b.update()


def tracked(module, name, value):
    "Averages of a module, with one that is constant"
    averages = Averages(module)
    averages.add(name, equal())
    with torch.no_grad():
        raw = copied(module.state_dict())
        for t in module.parameters(): t.fill_(value)
        averages.step()
        module.load_state_dict(raw)
    return averages


def test_looks_at_parts_of_a_model_that_is_held():
    """Each part holds what was put there last, and afterwards what it held before

    Wrong: the end of one look at a part ends that at another part, or at the whole"""
    model = net(norm=False)
    raw = copied(model.state_dict())
    whole, first, last = tracked(model, 'whole', 1.), tracked(model[0], 'first', 2.), tracked(model[-1], 'last', 3.)
    def holds(): return [(held_weights(m), m.bias[0].item()) for m in (model[0], model[-1])]
    whole.apply('whole')
    with first.using('first'):
        with last.using('last'): assert holds() == [('first', 2.), ('last', 3.)]
        assert holds() == [('first', 2.), ('whole', 1.)]
        assert torch.equal(first.weights('raw')['bias'], raw['0.bias'])
    assert holds() == [('whole', 1.)]*2 and whole.held == 'whole'
    restore_raw(model[0])
    assert same(copied(model.state_dict()), raw) and {whole.held, first.held, last.held} == {'raw'}


def test_a_module_of_a_set_of_weights_stands_alone():
    learn = fitted(EMACB(0.8, apply=False), BNUpdateCB())
    alone, x = learn.module('ema'), torch.randn(5, 3)
    with learn.using('ema') as m:
        m.eval()
        expected = m(x)
    learn.fit(1, valid=False)
    assert not alone.training and held_weights(alone) == 'raw' and torch.equal(alone(x), expected)


def test_averages_that_are_due_together_read_the_weights_once(monkeypatch):
    from fastswa.averaging import snapshots
    moved, real = [], snapshots._move
    def counted(averages, *args):
        moved.append(len(averages))
        return real(averages, *args)
    monkeypatch.setattr(snapshots, '_move', counted)
    model = net()
    averages = Averages(model)
    for name, every in (('a', '1ba'), ('b', '2ba'), ('c', '1ba')): averages.add(name, ema(0.9), every=every)
    for _ in range(4): averages.step()
    assert moved == [2, 3, 2, 3]


def test_bad_input():
    averages = Averages(net(), steps_per_epoch=10, n_epochs=2)
    with pytest.raises(TypeError, match='averages are of a module'): Averages([1])
    with pytest.raises(ValueError, match='every must be above 0'): averages.add('a', equal(), every='0ba')
    with pytest.raises(ValueError, match='phase must be'): averages.add('a', equal(), phase='end')
    with pytest.raises(TypeError, match='must be called with n'): averages.add('a', 0.99)
    with pytest.raises(ValueError, match="no weights called 'a'"): averages.remove('a')
    with pytest.raises(ValueError, match="no weights called 'a'"): averages.apply('a')
    assert list(averages) == [] and averages.held == 'raw'
    averages.add('a', LatestAverage(averages.model, 2))
    with pytest.raises(RuntimeError, match='no snapshot yet'): averages.module('a')
    assert averages.held == 'raw'


@pytest.mark.parametrize('shape', [(3,), (2, 3), ()])
def test_a_buffer_made_by_expand(shape):
    "Its elements share their memory, and copying into it is an error in torch. Wrong: the average stays in the model"
    model = net()
    model.register_buffer('scale', torch.ones(()).expand(shape))
    before = copied(model.state_dict())
    learn = learner(EMACB(0.8), BNUpdateCB(), model=model)
    learn.fit(2)
    learn.restore()
    with learn.averages.using('ema'): model.scale = torch.zeros(shape)
    assert held_weights(model) == 'raw' and torch.equal(model.scale, before['scale'])
    restore_raw(model)


@pytest.mark.parametrize('of, dtype', [(torch.float32, torch.float16), (torch.float64, torch.float32)])
def test_a_snapshot_too_large_for_the_dtype_of_the_average(of, dtype):
    "It is skipped, by all of them. Wrong: infinite for good where it is the first, or comes together with a first one"
    model = nn.Linear(3, 3, dtype=of)
    weight = model.weight.detach().clone()
    def set_weight(w): model.weight.data.copy_(torch.as_tensor(w).expand(3, 3))
    alone, together, new = (Average(model, ema(decay=0.5), dtype=dtype) for _ in range(3))
    latest = LatestAverage(model, 2, dtype=dtype)
    for avg in (alone, together, latest): avg.update()
    set_weight(10*torch.finfo(dtype).max)
    with pytest.warns(UserWarning, match='NaN or infinity'):
        alone.update()
        latest.update()
        update_all([together, new])
    set_weight(weight)
    update_all([together, new])
    assert (together.n, together.skipped, new.n, new.skipped) == (2, 1, 1, 1)
    assert (alone.n, alone.skipped, latest.n, latest.skipped) == (1, 1, 1, 1)
    for avg in (alone, together, new, latest): torch.testing.assert_close(avg.weights['weight'], weight.to(dtype))


@pytest.mark.parametrize('norm', [False, True])
def test_a_module_while_another_thread_trains(norm):
    "Wrong: the model holds the average for a moment, in which the other thread takes a step"
    learn = fitted(EMACB(0.8, apply=False), BNUpdateCB(), model=net(norm=norm))
    with learn.using('ema') as m: expected = copied(m.state_dict())
    tensors = [*learn.model.parameters(), *learn.model.buffers()]
    versions = [t._version for t in tensors]
    alone = learn.averages.module('ema')
    assert [t._version for t in tensors] == versions and same(copied(alone.state_dict()), expected)


def test_snapshots_by_hand():
    "every=None: at each take(), in a raw loop too"
    model = nn.Linear(1, 1, bias=False)
    averages = Averages(model, steps_per_epoch=10, n_epochs=1)
    averages.add('swa', equal(), every=None)
    for i in range(10):
        nn.init.constant_(model.weight, float(i))
        averages.step()
        if i in (3, 8): averages.take('swa')
    assert averages['swa'].n == 2 and averages['swa'].weights['weight'].item() == 5.5
    with pytest.raises(ValueError, match="no weights called 'ema'"): averages.take('ema')
    state = averages.state_dict()
    other = Averages(model)
    other.add('swa', equal(), every=None)
    other.load_state_dict(state)
    assert other['swa'].n == 2
