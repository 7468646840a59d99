"Ctrl-C at any line of a fit that watches averages: the raw weights are never lost, and the learner stays usable"
import signal
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.training.learner import TrainLearner
from fastswa.callbacks.swa import BNUpdateCB
from fastswa.callbacks.swa import EMACB

FILES = 'fastswa/averaging/', 'fastswa/training/', 'fastswa/callbacks/', 'fastswa/core.py', '/contextlib.py'      # the code in whose lines Ctrl-C is pressed


def data(n_train=4):
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, generator=g), torch.randint(2, (8,), generator=g)) for _ in range(4)]
    return SimpleNamespace(train=batches[:n_train], valid=batches[:2])


def learner(*cbs, n_train=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    return TrainLearner(model, data(n_train), F.cross_entropy, 0.1, cbs, partial(optim.SGD, momentum=0.9))


def watched(): return learner(EMACB(half_life='2ba', apply=False), BNUpdateCB(valid_batches=2))


def state(model): return [t.clone() for t in model.parameters()], [t.clone() for t in model.buffers()]


def same(a, b): return all(map(torch.equal, a, b))


def is_of_the_run(now, run):
    "Parameters of some step, and the statistics of that step or, within the next one, of its forward pass"
    return any(same(now[0], p) and (same(now[1], b) or same(now[1], after[1])) for (p, b), after in zip(run, [*run[1:], run[-1]]))


def fit_with_ctrl_c(learn, at=None):
    "Fit, with Ctrl-C at the line number `at` of those that run in FILES; returns how many ran"
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not any(o in frame.f_code.co_filename for o in FILES): return None
        if event == 'line':
            count += 1
            if count == at: signal.raise_signal(signal.SIGINT)
        return trace
    sys.settrace(trace)
    try: learn.fit(1)
    except KeyboardInterrupt: pass
    finally: sys.settrace(None)
    return count


@pytest.fixture(scope='module')
def raw_run():
    "The weights of a run without averages, before the first step and after each"
    states = [state(learner().model)]
    for n in range(1, 5):
        learn = learner(n_train=n)
        learn.fit(1, valid=False)
        states.append(state(learn.model))
    return states


def test_ctrl_c_at_any_line_keeps_the_raw_weights(raw_run):
    "An exchange that can be cut in two, or a restore that can be missed, leaves the model with weights of no step of the run"
    total = fit_with_ctrl_c(watched())
    assert total > 500
    for at in range(1, total + 1, 7):
        learn = watched()
        fit_with_ctrl_c(learn, at)
        assert learn.weights == 'raw', f'line {at} of {total}'
        assert is_of_the_run(state(learn.model), raw_run), f'line {at} of {total}'
        learn.fit(1)
