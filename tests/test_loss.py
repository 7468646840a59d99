"The loss's own parameters, however the loss uses them: trained, moved, saved; what it only compares by is left alone"
from functools import partial, wraps
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.basics import DeviceCB
from fastswa.checkpoint.archive import read_checkpoint
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.core import quiet
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner
from fastswa.training.parameters import loss_modules, loss_tensors
from helpers import AtEpoch, data, learner, net, same, state


class Margin(nn.Module):
    "Cross entropy at a learned temperature, with learned offsets of the classes, and a count of its calls"
    def __init__(self):
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.tensor(1.)), nn.Parameter(torch.zeros(3))
        self.register_buffer('calls', torch.tensor(0))

    def forward(self, preds, y):
        self.calls += self.training
        return F.cross_entropy(preds*self.scale + self.offset, y)

    def by_name(self, preds, y): return self(preds, y)


class Terms:
    "A plain object that is called, or whose method is"
    def __init__(self, crit): self.crit, self.unused = crit, nn.Linear(2, 2)
    def __call__(self, preds, y): return self.total(preds, y)
    def total(self, preds, y): return self.crit(preds, y)


def in_closure(crit):
    def loss(preds, y): return crit(preds, y)
    return loss


def decorated(f):
    @wraps(f)
    def g(*args): return f(*args)
    return g


def helped(crit):
    def helper(preds, y): return crit(preds, y)
    return lambda preds, y: helper(preds, y)


def later(crit): return lambda preds, y: sum(c(preds, y) for c in crit)


def weighed(preds, y, crit, terms): return sum(w*t(preds, y) for w, t in terms) + crit(preds, y)


GLOBAL = Margin()
def by_global(preds, y): return GLOBAL(preds, y)


FORMS = dict(
    itself=lambda c: (c, ''), method=lambda c: (c.by_name, ''), closure=lambda c: (in_closure(c), 'crit.'),
    function=lambda c: (lambda p, y: c(p, y), 'c.'), method_in_closure=lambda c: (lambda p, y: c.by_name(p, y), 'c.'),
    default=lambda c: (lambda p, y, crit=c: crit(p, y), 'crit.'),
    keyword=lambda c: (partial(weighed, crit=c, terms=[]), 'crit.'),
    argument=lambda c: (partial(lambda crit, p, y: crit(p, y), c), '0.'),
    list=lambda c: (later([c]), 'crit.0.'), pairs=lambda c: (partial(weighed, crit=F.cross_entropy, terms=[(1., c)]),
                                                           'terms.0.1.'),
    object=lambda c: (Terms(c), 'crit.'), method_of_object=lambda c: (Terms(c).total, 'crit.'),
    object_in_closure=lambda c: (in_closure(Terms(c)), 'crit.crit.'),
    attribute=lambda c: ((lambda cfg: lambda p, y: cfg.losses['main'](p, y))(SimpleNamespace(losses=dict(main=c))),
                         'cfg.losses.main.'),
    decorated=lambda c: (decorated(in_closure(c)), 'crit.'), helper=lambda c: (helped(c), 'helper.crit.'),
    partial_of_function=lambda c: (partial(in_closure(c)), 'crit.'))


@pytest.mark.parametrize('form', FORMS)
def test_parameters_of_the_loss_are_trained_and_named(form):
    "As in a loop of one's own, once each. Wrong: they stay as they were, without a word"
    terms = form == 'pairs'      # cross entropy is added there
    crit, model, want, theirs = Margin(), net(), Margin(), net()
    loss, path = FORMS[form](crit)
    TrainLearner(model, data(), loss, 0.1).fit(1, valid=False)
    opt = optim.SGD([*theirs.parameters(), *want.parameters()], 0.1)
    for x, y in data().train:
        preds = theirs(x)
        (want(preds, y) + F.cross_entropy(preds, y)*terms).backward()
        opt.step()
        opt.zero_grad()
    assert same(model.state_dict(), theirs.state_dict()) and same(crit.state_dict(), want.state_dict())
    assert crit.scale != 1
    learn = TrainLearner(model, data(), loss)
    assert [*loss_tensors(learn)] == [f'loss_func.{path}{k}' for k in ('scale', 'offset')]
    assert [*loss_tensors(learn, 'buffers')] == [f'loss_func.{path}calls']


@pytest.mark.parametrize('form', ['global', 'parameter', 'uncertainty'])
def test_globals_and_bare_parameters(form):
    weights = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    losses = dict(
        parameter=lambda p, y: F.cross_entropy(p*(1 + weights[0]), y),
        uncertainty=lambda p, y: sum((-w).exp()*F.cross_entropy(p, y) + w for w in weights))
    learn = learner()
    learn.loss_func = by_global if form == 'global' else losses[form]
    own = loss_tensors(learn)
    before = {k: v.detach().clone() for k, v in own.items()}
    learn.fit(1)
    assert [*own] == (['loss_func.GLOBAL.scale', 'loss_func.GLOBAL.offset'] if form == 'global' else
                      ['loss_func.weights.0.0', 'loss_func.weights.1.0'])
    assert not torch.equal(own[[*own][0]], before[[*own][0]])


def test_what_is_none_of_the_loss():
    """The model, which a penalty reads; a teacher in eval mode; another learner's model; what an object has beside

    Wrong: weights trained twice, a teacher that learns from its pupil, and is put into train mode."""
    teacher, other, model = net(1).eval(), learner(model=net(2)), net()
    aside = SimpleNamespace(critic=net(3), weight=0.5)
    def loss(preds, y):
        x = torch.ones(len(y), 3)
        kept = teacher(x) + other.model.eval()(x).detach()
        return F.cross_entropy(preds, y) + model[0].weight.square().sum() + aside.weight*(preds - kept).square().mean()
    learn = learner(model=model)
    learn.loss_func = loss
    before = state(SimpleNamespace(model=teacher))
    assert loss_modules(learn) == {}
    modes = []
    class Modes(Callback):
        def before_batch(self, learn): modes.append(teacher.training)
    learn.fit(1, cbs=Modes())
    assert same(teacher.state_dict(), before) and not any(modes) and not loss_tensors(learn)
    held = [p for g in learn.opt.param_groups for p in g['params']]
    assert len(held) == len({*held}) == len([*model.parameters()])


def test_modes_and_device_of_a_loss_behind_a_function():
    "Train mode in training, eval mode in validation and train mode again; moved where the model is"
    crit, seen = Margin(), []
    crit.to = lambda device: seen.append(device)
    learn = learner(DeviceCB('cpu'))
    learn.loss_func = lambda preds, y: crit(preds, y)
    class Modes(Callback):
        def after_loss(self, learn): seen.append((learn.training, crit.training, len(loss_modules(learn))))
    learn.fit(1, cbs=Modes())
    assert seen[0] == 'cpu' and {*seen[1:]} == {(True, True, 1), (False, False, 1)} and crit.training
    calls = int(crit.calls)
    learn.validate()
    learn.get_preds()
    assert crit.calls == calls == 10


@pytest.mark.parametrize('form', ['function', 'object', 'pairs'])
def test_resume_with_a_loss_behind_a_function(form, tmp_path):
    "Bit for bit; also a checkpoint that is written in a validation, while the loss is in eval mode"
    def make(): return learner(opt_func=partial(optim.SGD, momentum=0.9), lr=0.1)
    def fit(crit, *cbs, **kw):
        learn = make()
        learn.loss_func = FORMS[form](crit)[0]
        with quiet(): learn.fit(3, cbs=cbs, **kw)
        return learn
    class Saves(Callback):
        order, role = 95, 'watches'
        def after_epoch(self, learn):
            if not learn.training: learn.save(tmp_path/'validation.pt')
    crits = [Margin() for _ in range(3)]
    whole = fit(crits[0])
    fit(crits[1], CheckpointCB(tmp_path/'run'), AtEpoch(2), Saves())
    rest = fit(crits[2], resume=tmp_path/'run')
    assert same(state(rest), state(whole)) and same(crits[2].state_dict(), crits[0].state_dict())
    names = [*read_checkpoint(tmp_path/'validation.pt')['loss']]
    assert [n.rpartition('.')[2] for n in names] == ['scale', 'offset', 'calls']
