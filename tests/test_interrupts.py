"Ctrl-C at any line of a fit that watches averages: the raw weights are never lost, and the learner stays usable"
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.metrics import MetricsCB
from fastswa.training.events import Callback
from fastswa.training.learner import TrainLearner
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB
from helpers import CORE, Hits, ctrl_c, image_learner, moments

# the code in whose lines Ctrl-C is pressed
FILES = 'fastswa/averaging/', 'fastswa/training/', 'fastswa/callbacks/', *CORE, '/contextlib.py'


def data(n_train=2):
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, generator=g), torch.randint(2, (8,), generator=g)) for _ in range(2)]
    return SimpleNamespace(train=batches[:n_train], valid=batches[:1])


def learner(*cbs, n_train=2):
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    return TrainLearner(model, data(n_train), F.cross_entropy, 0.1, cbs, partial(optim.SGD, momentum=0.9))


def watched(): return learner(EMACB(half_life='2ba', apply=False), BNUpdateCB(valid_batches=1))


def state(model): return [t.clone() for t in model.parameters()], [t.clone() for t in model.buffers()]


def same(a, b): return all(map(torch.equal, a, b))


def is_of_the_run(now, run):
    """Parameters of some step, and the statistics of that step or, within the next one, of its forward pass

    In that torch counts the batch first, and moves mean and variance then."""
    return any(same(now[0], p) and any(same(now[1], o) for o in (b, after[1], [*b[:2], after[1][2]]))
               for (p, b), after in zip(run, [*run[1:], run[-1]]))


@pytest.fixture(scope='module')
def raw_run():
    "The weights of a run without averages, before the first step and after each"
    states = [state(learner().model)]
    for n in range(1, 3):
        learn = learner(n_train=n)
        learn.fit(1, valid=False)
        states.append(state(learn.model))
    return states


def test_ctrl_c_at_any_line_keeps_the_raw_weights(raw_run):
    "An exchange that can be cut in two, or a restore that can be missed, leaves weights of no step of the run"
    lines = moments(partial(watched().fit, 1), FILES, last=('averaging/', 'contextlib.py'))
    assert len(lines) > 500
    for at in lines:
        learn = watched()
        ctrl_c(partial(learn.fit, 1), at)
        assert learn.weights == 'raw', at
        assert is_of_the_run(state(learn.model), raw_run), at
        learn.dls = data(n_train=1)
        learn.fit(1, valid=False)


LOOKS = dict(fit=(lambda learn: learn.fit(1), (True, False)), validate=(lambda learn: learn.validate(), (False,)),
             get_preds=(lambda learn: learn.get_preds(), (False,)),
             lr_find=(lambda learn: learn.lr_find(max_steps=9, show=False), (True,)))
EVENTS = ('before_fit', 'before_epoch', 'before_batch', 'after_predict', 'after_batch', 'after_epoch', 'cleanup_epoch',
          'after_fit')


@pytest.mark.usefixtures('strict')
@pytest.mark.parametrize('name, event, training', [
    (name, event, training) for name, (_, passes) in LOOKS.items() for event in EVENTS for training in passes
    if name != 'lr_find' or event not in ('after_epoch', 'after_fit')])              # which ends before
def test_ctrl_c_comes_out_when_all_is_tidy(name, event, training):
    "Neither swallowed, so that a script goes on to its next line, nor fatal: the learner trains on (Lightning#11924)"
    class Tidies(Callback):
        order = -50
        def before_fit(self, learn): seen.append('begun')
        def cleanup_fit(self, learn): seen.append(type(learn.error))
    class Press(Callback):
        order, armed, role = 90, True, 'prepares'
        def go(self, learn):
            if Press.armed and (event.endswith('fit') or learn.training == training): signal.raise_signal(signal.SIGINT)
    setattr(Press, event, Press.go)
    learn, seen = image_learner(Tidies(), EMACB(apply=False), Press(), MetricsCB(hits=Hits())), []
    modes = [m.training for m in learn.model.modules()]
    with pytest.raises(KeyboardInterrupt): LOOKS[name][0](learn)
    # what only looks leaves out what only watches
    assert seen == (['begun', KeyboardInterrupt] if name == 'fit' else [])
    assert learn.weights == 'raw' and not learn.in_fit and learn.error is None and torch.is_grad_enabled()
    assert modes == [m.training for m in learn.model.modules()]
    Press.armed, steps = False, learn.opt_steps
    learn.fit(1)
    assert learn.opt_steps == steps + 7 and [r['train'] for r in learn.history[-3:]] == ['train', 'eval', 'eval']
