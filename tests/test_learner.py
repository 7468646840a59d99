"Promises of the learner that take more than a line to break: frozen layers, optimizers, leftovers, workers, looking"
import copy
import gc
import sys
import weakref
from collections import namedtuple
from functools import cache, partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.basics import BatchTransformCB, DeviceCB, RecorderCB, SingleBatchCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.random_state import set_seed
from fastswa.training.events import Callback, CancelBatchException, CancelEpochException, CancelFitException
from fastswa.training.learner import Learner, MomentumLearner, TrainCB, TrainLearner
from fastswa.training.sandbox import sandbox
from fastswa.callbacks.batchnorm import BNUpdateCB
import helpers
from fastswa.core import clean_mem
from fastswa.callbacks.activations import ActivationStats
from fastswa.callbacks.swa import EMACB, SWACB
from helpers import At, Hits, end_workers, image_data, image_learner, image_net, same, state


data = partial(helpers.data, 96, 16, shuffle=True)
net = partial(helpers.net, dropout=0.3)


def learner(*cbs, dls=None, **kw): return helpers.learner(*cbs, model=net(), dls=dls or data(), lr=0.1, **kw)


class Two:
    "Anything with step and zero_grad, and nothing else"
    def __init__(self, params, lr): self.params, self.lr, self.steps = list(params), lr, 0
    def step(self):
        self.steps += 1
        with torch.no_grad():
            for p in self.params: p -= self.lr*p.grad
    def zero_grad(self):
        for p in self.params: p.grad = None


def test_any_optimizer_with_step_and_zero_grad():
    cb = EMACB()
    learn = learner(cb, opt_func=Two)
    learn.fit(1)
    assert learn.opt.steps == learn.opt_steps == cb.average.n == 6


def test_a_layer_frozen_by_a_callback_stays_frozen():
    "model.train() at each epoch would thaw it"
    class Freeze(Callback):
        def before_fit(self, learn): learn.model[1].eval()
    learn = learner(Freeze())
    before = learn.model[1].running_mean.clone()
    learn.fit(2)
    assert torch.equal(learn.model[1].running_mean, before)
    assert learn.model[1].training                     # as it was before the fit


def test_frozen_layers_keep_their_statistics_under_an_average():
    "A validation leaves the model in eval mode, where no layer looks frozen"
    learn = learner(EMACB(), SWACB(start='0dur'), BNUpdateCB())
    learn.model[1].eval()
    learn.model[1].running_mean.fill_(5.)
    learn.fit(2)
    for name in ('raw', 'ema', 'swa'):
        with learn.using(name) as m: assert torch.equal(m[1].running_mean, torch.full((8,), 5.)), name


def test_gradients_others_left_are_not_stepped_on():
    a, b = learner(), learner()
    for p in a.model.parameters(): p.grad = torch.full_like(p, 1e3)
    for learn in (a, b):
        set_seed(1)
        learn.fit(1)
    assert same(state(a), state(b))


def test_another_learner_does_not_meet_the_momentum():
    learn = learner(cls=MomentumLearner)
    set_seed(1)
    learn.fit(1)
    assert all(p.grad is None for p in learn.model.parameters())
    model, dls = learn.model, learn.dls
    kept = state(learn)
    set_seed(2)
    TrainLearner(model, dls, F.cross_entropy, 0.1).fit(1)
    other = net()
    other.load_state_dict(kept)
    set_seed(2)
    TrainLearner(other, dls, F.cross_entropy, 0.1).fit(1)
    assert same(model.state_dict(), other.state_dict())


@cache
def two_fits(cls, look=None):
    "What is left after two fits, with a look at the learner between them"
    noise = BatchTransformCB(lambda b: (b[0] + torch.randn(3)/10, b[1]))
    learn = learner(noise, DeviceCB('cpu'), MetricsCB(), EMACB(apply=False), BNUpdateCB(), cls=cls,
                    opt_func=partial(optim.SGD, momentum=0.5))
    set_seed(3)
    learn.fit(1)
    if look: look(learn)
    learn.fit(1)
    return state(learn), torch.get_rng_state(), learn.history, learn.opt_steps


@pytest.mark.parametrize('look', [
    lambda learn: learn.validate(), lambda learn: learn.get_preds(), lambda learn: learn.capture_preds(inps=True),
    lambda learn: learn.summary(), lambda learn: learn.lr_find(max_steps=12, show=False),
    lambda learn: learn.validate('ema'), lambda learn: learn.get_preds('ema')],
    ids=['validate', 'preds', 'capture', 'summary', 'lr_find', 'validate ema', 'preds ema'])
@pytest.mark.parametrize('cls', [TrainLearner, MomentumLearner])
def test_looking_between_two_fits_changes_nothing(look, cls):
    (a, rng, hist, steps), (b, rng2, hist2, steps2) = two_fits(cls, look), two_fits(cls)
    assert same(a, b) and torch.equal(rng, rng2) and hist == hist2 and steps == steps2


def test_watching_with_persistent_workers_changes_nothing():
    "Workers draw random numbers of their own; a look that restarts them would change what they draw next"
    def run(*cbs):
        dls = data(num_workers=1, persistent_workers=True)
        learn = learner(*cbs, dls=dls)
        set_seed(4)
        learn.fit(2)
        learn.restore()
        end_workers(dls)
        return state(learn)
    assert same(run(), run(EMACB(), BNUpdateCB()))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")
def test_an_error_says_where_it_happened():
    dls = data()
    dls.train = [(torch.zeros(4, 3), torch.tensor([0, 1, 2, 7]))]
    with pytest.raises(IndexError) as e: learner(dls=dls).fit(1)         # label out of range
    assert '(4, 3) float32, (4,) int64' in e.value.__notes__[0] and 'training epoch 0' in e.value.__notes__[0]


@pytest.mark.parametrize('exc', [CancelFitException, CancelEpochException, CancelBatchException])
def test_a_cancelled_batch_reaches_no_record(exc):
    class Stop(Callback):
        def after_loss(self, learn):
            if learn.iter == 1 and learn.training: raise exc
    rec = RecorderCB(lr=lambda cb: cb.pg['lr'])
    learn = learner(rec, Stop(), MetricsCB())
    learn.fit(1, valid=False)
    steps = dict(CancelFitException=1, CancelEpochException=1, CancelBatchException=5)[exc.__name__]
    assert len(rec.recs['lr']) == steps
    assert len(learn.history) == (exc is CancelBatchException)


def test_a_learner_that_failed_is_freed():
    "A traceback or a cycle that holds the learner would hold its GPU memory too"
    class Fail(Callback):
        def after_batch(self, learn): raise ValueError
    learn = learner(Fail(), EMACB())
    try: learn.fit(1)
    except ValueError: pass
    ref = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert ref() is None


def test_validation_only_needs_no_optimizer():
    learn = learner(opt_func=None)
    learn.fit(1, train=False)
    assert not learn.has_opt and learn.history[0]['train'] == 'eval'
    learn.dls.valid = None
    with pytest.raises(ValueError, match='no validation loader'): learn.validate()


@pytest.mark.parametrize('method', ['fit', 'lr_find', 'summary', 'show_image_batch', 'validate', 'get_preds'])
@pytest.mark.parametrize('dls', [(0,), None, ['batches'], SimpleNamespace(train=None, valid=None)])
def test_a_learner_without_data(method, dls):
    "One sentence. Wrong: that a class of the library's own, or None, has no such attribute"
    learn = TrainLearner(net(), dls) if dls != (0,) else TrainLearner(net())
    words = r'learner has no data: its dls must have the loaders `train` and `valid`.*; got (tuple|NoneType|list)'
    if hasattr(dls, 'train'): words = 'there is no (training|validation) loader: dls.(train|valid) is None'
    with pytest.raises((TypeError, ValueError), match=words): getattr(learn, method)()


def test_batches_may_be_given_to_a_learner_without_data():
    learn, batches = TrainLearner(net(), loss_func=F.cross_entropy), [*data().valid]
    assert learn.validate(dl=batches) and len(learn.get_preds(dl=batches)[0]) == len(data().valid.dataset)


@pytest.mark.parametrize('kind', ['tensors', 'tuples', 'dicts'])
@pytest.mark.parametrize('cls', [TrainLearner, Learner])
def test_validation_on_batches_without_targets(cls, kind):
    "A row for each set of weights with empty loss and metrics, where predictions work too; a fit says what is missing"
    def only(x): return dict(tensors=x, tuples=(x,), dicts=dict(image=x))[kind]
    steps = [TrainCB()] if cls is Learner else []
    learn = cls(net(), data(), F.cross_entropy, 0.1, [MetricsCB(hits=Hits(), mean=lambda p, y: p.mean()),
                                                      EMACB(apply=False), *steps])
    learn.fit(1)
    xs = [only(x) for x, _ in data().valid]
    rows = learn.validate(dl=xs)
    assert [r['weights'] for r in rows] == ['raw', 'ema']
    assert all(r[k] is None for r in rows for k in ('loss', 'hits', 'mean'))
    assert torch.equal(learn.get_preds(dl=xs)[0], learn.get_preds(dl=[*data().valid])[0])
    both = learn.validate('raw', dl=[*data().valid, *xs])[0]
    assert {k: both[k] for k in ('loss', 'hits')} == {k: learn.validate('raw')[0][k] for k in ('loss', 'hits')}
    if cls is TrainLearner:
        learn.dls = SimpleNamespace(train=data().train, valid=xs)
        with pytest.raises(ValueError, match='the batch has no targets for the loss'): learn.fit(1)


def test_a_loss_of_predictions_alone():
    "It has a value where there are no targets, in training and in validation"
    xs = [x for x, _ in data().valid]
    learn = Learner(net(), SimpleNamespace(train=xs, valid=xs), lambda preds: preds.square().mean(), 0.1, TrainCB())
    learn.fit(1)
    want = torch.cat([learn.model.eval()(x) for x in xs]).square().mean().item()
    assert learn.validate()[0]['loss'] == pytest.approx(want)


def test_a_single_batch_is_seen_by_all():
    seen = []
    class See(Callback):
        order = 50
        def after_batch(self, learn): seen.append(learn.iter)
    learner(SingleBatchCB(), See()).fit(3)
    assert seen == [0]


def test_momentum_learner_with_a_parameter_that_gets_no_gradient():
    learn = learner(cls=MomentumLearner)
    learn.model.unused = nn.Parameter(torch.zeros(3))
    learn.model.forward = lambda x: learn.model[4](learn.model[0](x))
    learn.fit(2)
    assert learn.opt_steps == 12


def test_showing_a_batch_trains_nothing(monkeypatch):
    import matplotlib
    matplotlib.use('agg')
    g = torch.Generator().manual_seed(0)
    dls = SimpleNamespace(train=[(torch.rand(4, 1, 8, 8, generator=g), torch.zeros(4).long())], valid=None)
    learn = TrainLearner(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), dls, F.cross_entropy, 0.1)
    before = state(learn)
    learn.show_image_batch(max_n=4)
    assert same(before, state(learn)) and not learn.has_opt and learn.batch is None


def test_an_error_before_backward_keeps_no_activations():
    """Wrong: `learn.preds` and `learn.loss` hold the graph of the batch, and with it the memory, until the next fit

    Lightning#3275"""
    kept = []
    class Fails(Callback):
        def after_loss(self, learn): raise ValueError('no more')
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda m, i, o: kept.append(weakref.ref(o)))
    dls = SimpleNamespace(train=[(torch.randn(4, 3), torch.randint(3, (4,)))], valid=None)
    learn = TrainLearner(model, dls, F.cross_entropy, 0.1, Fails())
    try: learn.fit(1)
    except ValueError: pass
    gc.collect()
    assert learn.loss is not None and kept[0]() is None


@pytest.mark.usefixtures('strict')
def test_the_list_of_callbacks_stays_the_callers():
    "Neither what a fit adds nor what the learner is given later gets into it, also while the fit lasts"
    given, extra, seen = [MetricsCB()], [DeviceCB('cpu')], []
    class Sees(Callback):
        def before_batch(self, learn): seen.append((len(given), len(extra), len(learn.cbs)))
    extra.append(Sees())
    learn = TrainLearner(image_net(), image_data(), F.cross_entropy, 0.05, given)
    learn.fit(1, cbs=extra)
    assert set(seen) == {(1, 2, 3)} and learn.cbs == given and learn.cbs is not given
    learn.cbs.append(extra[0])
    with sandbox(learn, [Sees()]): pass
    assert len(given) == 1 and len(learn.cbs) == 2


class Alike(Callback):
    "Equal to every other; fails at an event"
    def __init__(self, event=None, exc=None):
        if event: setattr(self, event, self.go)
        self.exc = exc
    def __eq__(self, other): return True
    __hash__ = None
    def before_epoch(self, learn): pass
    def go(self, learn): raise self.exc


@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('exc', [ZeroDivisionError(), KeyboardInterrupt(), CancelFitException()], ids=repr)
@pytest.mark.parametrize('event', [None, 'before_fit', 'before_epoch', 'after_backward', 'after_epoch', 'after_fit',
                                   'cleanup_fit'])
def test_callbacks_of_one_fit_go_with_it(event, exc):
    "By identity, not by == (fastai2#255), and whatever ends the fit"
    kept = [Alike(), Alike()]
    learn = image_learner(*kept)
    try: learn.fit(1, cbs=[Alike(event, exc), Alike()])
    except (ZeroDivisionError, KeyboardInterrupt): assert event
    except CancelFitException: assert event == 'cleanup_fit'
    assert len(learn.cbs) == 2 and all(a is b for a, b in zip(learn.cbs, kept))


@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('look', [lambda learn: learn.fit(1), lambda learn: learn.validate(),
                                  lambda learn: learn.get_preds(),
                                  lambda learn: learn.lr_find(max_steps=9, show=False)],
                         ids=['fit', 'validate', 'get_preds', 'lr_find'])
def test_modes_return_after_a_failure(look, training):
    "Also where it is the validation that fails, or the model was wholly in eval mode"
    class Fails(Callback):
        prepares = True
        def before_batch(self, learn):
            if learn.iter == 1: raise ZeroDivisionError
    for failing in ([], [Fails()]):
        learn = image_learner(*failing)
        learn.model.train(training)
        learn.model[3].eval()
        modes = [m.training for m in learn.model.modules()]
        try: look(learn)
        except ZeroDivisionError: assert failing
        else: assert not failing
        assert modes == [m.training for m in learn.model.modules()]


@pytest.mark.usefixtures('strict')
def test_a_traceback_gives_way():
    """clean_mem lets go of what the last exception holds: its frames, these the model, the batch and all activations

    In a notebook such a traceback keeps the GPU's memory (Lightning#3275)"""
    outs = []
    learn = image_learner(EMACB(), ActivationStats(every=1, grads=True), At('after_backward', ZeroDivisionError(), 90))
    learn.model[0].register_forward_hook(lambda m, i, o: outs.append(weakref.ref(o)))
    refs = [weakref.ref(o) for o in (learn, learn.model)]
    try: learn.fit(1)
    except ZeroDivisionError as e:
        sys.last_exc, sys.last_value, sys.last_traceback, sys.last_type = e, e, e.__traceback__, type(e)
    del learn
    gc.collect()
    assert all(r() is not None for r in refs)                    # or there would be nothing to let go of
    clean_mem()
    assert outs and not [r for r in refs + outs if r() is not None]


@pytest.mark.usefixtures('strict')
def test_rows_of_uneven_batches():
    """Batches of 8, 8, … and 4, of 20, 20 and 16: each sample counts the same, for every set of weights

    Wrong: the mean of the batches' means"""
    def exact(model):
        with torch.no_grad(): preds = model.double()(x.double())
        model.float()
        return F.cross_entropy(preds, y).item(), (preds.argmax(1) == y).double().mean().item()
    dls = image_data(60, 8, 22)
    x, y = dls.valid.dataset.tensors
    learn = image_learner(MetricsCB(hits=Hits()), EMACB(decay=0.5, apply=False), dls=dls)
    learn.fit(1)
    for row in learn.history[1:]:
        with learn.using(row['weights']) as m: loss, hits = exact(copy.deepcopy(m).eval())
        assert (row['loss'], row['hits']) == (pytest.approx(loss, rel=1e-5), pytest.approx(hits))
    still = image_learner(dls=image_data(60, 8), model=nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), lr=0.)
    still.fit(1, valid=False)
    assert still.history[0]['loss'] == pytest.approx(exact(still.model)[0], rel=1e-5)


def _as_class(dls): return type('Loaders', (), dict(train=dls.train, valid=dls.valid))
def _as_tuple(dls): return namedtuple('Loaders', 'train valid')(dls.train, dls.valid)


def _as_module(dls):
    module = ModuleType('loaders')
    module.train, module.valid = dls.train, dls.valid
    return module


class _Made:
    "Loaders that are properties, without a place for anything else"
    __slots__ = ('_made',)
    def __init__(self, dls): self._made = dls
    train, valid = property(lambda self: self._made.train), property(lambda self: self._made.valid)


@cache
def watched_with_workers(kind):
    "The table of a fit whose loaders are given as `kind` makes them, and what another loader gives"
    plain = data(num_workers=1, persistent_workers=True)
    learn = learner(EMACB(apply=False), BNUpdateCB(), dls=kind(plain))
    set_seed(4)
    learn.fit(1)
    other = learn.validate(dl=list(plain.valid)[:1])
    learn.get_preds(dl=list(plain.valid)[:1])
    assert learn.dls.train is plain.train and learn.dls.valid is plain.valid
    end_workers(plain)
    return learn.history, other


def _as_they_are(dls): return dls


@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('kind', [_as_class, _as_tuple, _as_module, _Made])
def test_the_loaders_are_never_written_to(kind):
    """They may be a class, a named tuple, a module, properties; also where workers persist, and with another loader

    Wrong: TypeError or AttributeError at the first row of an average, or loaders exchanged for good"""
    assert watched_with_workers(kind) == watched_with_workers(_as_they_are)


@pytest.mark.parametrize('name', ['begin_epoch', 'training_step', 'epoch_ended', 'on_batch', 'run'])
def test_a_callback_that_nothing_would_call(name):
    "A method of any other name than an event's. Wrong: the fit runs, and the callback never does"
    cb = type('Lost', (Callback,), {name: lambda self, learn: None})()
    with pytest.raises(ValueError, match='Lost has no method named after an event, so that nothing would call it'):
        learner(cb).fit(1)
