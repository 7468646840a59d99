"Schedule-Free optimizers: their average as a set of weights, without calls of their train() and eval()"
import copy
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn, optim

from fastswa.averaging.averages import Averages
from fastswa.averaging.schedule_free import ScheduleFree, is_schedule_free
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.steps import ClosureCB
from fastswa.callbacks.swa import EMACB
from fastswa.callbacks.swa_variants import ScheduleFreeCB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.training.events import Callback, CancelFitException
from helpers import Accumulate, At, AtEpoch, NoOptimizer, TiedNet, copied, data, learner, net, quick, same

sf = pytest.importorskip('schedulefree')


def wrapper(params, lr):
    "One that has the momentum itself, and the mode, which its state_dict forgets"
    return sf.ScheduleFreeWrapper(optim.SGD(params, lr), momentum=0.8)


def two_groups(params, lr):
    "Momentum 0.5 for the first parameter, 0.95 for the others"
    first, *others = params
    return sf.SGDScheduleFree([dict(params=[first], momentum=0.5), dict(params=others)], lr, momentum=0.95)


OPTS = dict(
    sgd=partial(sf.SGDScheduleFree, weight_decay=0.1, warmup_steps=5), adamw=sf.AdamWScheduleFree,
    loop=partial(sf.AdamWScheduleFree, betas=(0.7, 0.99), foreach=False), radam=sf.RAdamScheduleFree,
    paper=sf.AdamWScheduleFreePaper, wrapper=wrapper, two_groups=two_groups)


def opts(*names): return pytest.mark.parametrize('opt', [pytest.param(OPTS[k], id=k) for k in names or OPTS])


def sf_learner(*cbs, opt=OPTS['adamw'], lr=0.02, **kw):
    "A learner of 10 steps an epoch, with BatchNorm"
    return learner(*cbs, opt_func=opt, lr=lr, **kw)


def x_of(learn):
    "The average as its optimizer would make it, of a copy"
    learn = copy.deepcopy(learn)
    learn.restore()
    learn.opt.eval()
    return copied(dict(learn.model.named_parameters()))


class Eval(Callback):
    "What users of these optimizers are told to do, half of it"
    def before_epoch(self, learn):
        if not learn.training: learn.opt.eval()


def only(names, weights): return {k: weights[k] for k in names}


# --- the weights


@opts()
def test_the_average_is_that_of_the_optimizer(opt):
    "Bit for bit what its eval() makes of the model; steps are counted"
    cb = ScheduleFreeCB()
    learn = sf_learner(cb, BNUpdateCB(), opt=opt)
    learn.fit(2)
    x = x_of(learn)
    assert same(only(x, cb.average.weights), x)
    assert learn.weights == 'schedule_free' and same(only(x, learn.model.state_dict()), x)
    assert cb.average.n == learn.opt_steps == 20
    assert not same(only(x, learn.averages.weights('raw')), x)


def test_against_the_equations():
    "arXiv 2405.15682, eq. 2 to 4, in float64; wrong: y, or z, or a mean of the y"
    beta, lr = 0.8, 0.05
    cb = ScheduleFreeCB()
    learn = quick(cb, lr=lr, opt_func=partial(sf.SGDScheduleFree, momentum=beta))
    w = np.append(learn.model.weight.detach().double().numpy()[0], learn.model.bias.item())
    x, z = w.copy(), w.copy()
    t = 0
    for _ in range(3):
        for xb, yb in learn.dls.train:
            a = np.c_[xb.double().numpy(), np.ones(len(xb))]
            y = (1 - beta)*z + beta*x
            z = z - lr*2*a.T@(a@y - yb.double().numpy()[:, 0])/len(xb)
            t += 1
            x = x + (z - x)/t
    learn.fit(3)
    got = cb.average.weights
    np.testing.assert_allclose(np.append(got['weight'].numpy()[0], got['bias'].item()), x, rtol=1e-5, atol=1e-6)


@opts('sgd', 'wrapper')
def test_the_run_is_that_of_a_plain_loop(opt):
    "Rows, statistics and an export leave the trained weights and the optimizer's state as they are, bit for bit"
    learn = sf_learner(ScheduleFreeCB(), BNUpdateCB(), opt=opt)
    learn.fit(2)
    model, dls = net(), data()
    plain = opt(model.parameters(), 0.02)
    plain.train()
    for xb, yb in [*dls.train]*2:
        F.cross_entropy(model(xb), yb).backward()
        plain.step()
        plain.zero_grad()
    learn.restore()
    assert same(learn.model.state_dict(), model.state_dict())
    for p, q in zip(learn.model.parameters(), model.parameters()):
        assert torch.equal(learn.opt.state[p]['z'], plain.state[q]['z'])


def test_half_precision_weights_have_an_average_in_single_precision():
    "Wrong: x rounded to bfloat16, as eval() leaves it"
    model = net(norm=False).bfloat16()
    opt = sf.SGDScheduleFree(model.parameters(), 0.1)
    opt.train()
    avg = ScheduleFree(model, opt)
    for xb, yb in data().train:
        F.cross_entropy(model(xb.bfloat16()).float(), yb).backward()
        opt.step()
    for k, p in model.named_parameters():
        y, z = p.detach().double(), opt.state[p]['z'].double()
        assert avg.weights[k].dtype == torch.float32
        torch.testing.assert_close(avg.weights[k].double(), y + (1 - 1/0.9)*(z - y), rtol=1e-6, atol=1e-7)
    assert any((w.bfloat16().float() != w).any() for w in avg.weights.values())


@pytest.mark.parametrize('tied', [None, 'shared', 'transposed'])
def test_frozen_and_tied_weights(tied):
    "Parameters without a state are in x as they are; tied ones move once"
    model = TiedNet(norm=True, tied=tied)
    model.a.bias.requires_grad_(False)
    opt = sf.AdamWScheduleFree(model.parameters(), 0.1)
    opt.train()
    avg = ScheduleFree(model, opt)
    for _ in range(3):
        model(torch.randn(8, 3)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    got = copied(avg.weights)
    opt.eval()
    assert same(got, only(got, model.state_dict()))


def test_the_part_that_is_asked_for():
    learn = sf_learner(ScheduleFreeCB(include='3.*', name='head', device='cpu', dtype=torch.float64), BNUpdateCB())
    learn.fit(1)
    got, x = learn.averages['head'].weights, x_of(learn)
    assert [*got] == ['3.weight', '3.bias'] and got['3.bias'].dtype == torch.float64
    torch.testing.assert_close(got['3.bias'].float(), x['3.bias'], rtol=1e-6, atol=1e-7)


# --- rows, BatchNorm, use


def test_statistics_of_x():
    """Those of BatchNorm in the row, in validate, module and export are of all training data at x, pooled in float64

    https://github.com/facebookresearch/schedule_free/issues/60: their way is an exponential mean over 50 batches."""
    learn = sf_learner(ScheduleFreeCB(), BNUpdateCB(valid_batches=None))
    learn.fit(2)
    x = x_of(learn)
    xs = torch.cat([xb for xb, _ in learn.dls.train]).double()
    inside = F.linear(xs, x['0.weight'].double(), x['0.bias'].double())
    stats = dict(mean=inside.mean(0), var=inside.var(0))
    bn = learn.module('schedule_free')[1]
    for k, v in stats.items():
        torch.testing.assert_close(getattr(bn, f'running_{k}').double(), v, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(getattr(learn.model[1], f'running_{k}').double(), v, rtol=1e-5, atol=1e-6)
    x = {k: v.double() for k, v in x.items()}
    xv, yv = learn.dls.valid.dataset.tensors
    h = F.batch_norm(F.linear(xv.double(), x['0.weight'], x['0.bias']), *stats.values(), x['1.weight'], x['1.bias'])
    loss = F.cross_entropy(F.linear(h.relu(), x['3.weight'], x['3.bias']), yv).item()
    assert learn.history[-1]['weights'] == 'schedule_free'
    assert learn.history[-1]['loss'] == pytest.approx(loss, rel=1e-5)
    assert learn.validate(weights='schedule_free')[0]['loss'] == pytest.approx(loss, rel=1e-5)


def test_without_statistics_there_is_a_warning():
    "And x has those that the model measured at y"
    cb = ScheduleFreeCB()
    learn = sf_learner(cb)
    with pytest.warns(UserWarning, match='add BNUpdateCB'): learn.fit(1)
    assert torch.equal(learn.model[1].running_mean, learn.averages.weights('raw')['1.running_mean'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)
        sf_learner(ScheduleFreeCB(), model=net(norm=False)).fit(1)


def test_no_row_before_the_first_step():
    "An epoch without a step, a validation before any fit"
    learn = sf_learner(ScheduleFreeCB(), Accumulate(12), BNUpdateCB())
    assert [r['weights'] for r in learn.validate()] == ['raw']
    learn.fit(1, train=False)
    learn.fit(2)
    assert [r['weights'] for r in learn.history] == ['raw', 'raw', 'raw', 'raw', 'raw']
    learn = sf_learner(ScheduleFreeCB(), BNUpdateCB())
    learn.fit(1, cbs=At('before_batch', CancelFitException()))
    with pytest.raises(RuntimeError, match='made no step yet'): learn.validate(weights='schedule_free')
    learn.fit(1)
    assert [r['weights'] for r in learn.validate()] == ['raw', 'schedule_free']


def test_applied_exported_followed(tmp_path):
    "What can be done with an average, and training goes on from the raw weights"
    cb = ScheduleFreeCB(name='x', apply=False)
    learn = sf_learner(cb, BNUpdateCB(), CheckpointCB(tmp_path/'run', best='x/loss'))
    learn.fit(2)
    x, raw = x_of(learn), copied(learn.model.state_dict())
    assert learn.weights == 'raw' and (tmp_path/'run'/'best.pt').exists()
    learn.export(tmp_path/'x.safetensors', 'x')
    assert same(only(x, load_file(tmp_path/'x.safetensors')), x)
    with learn.using('x'):
        assert same(copied(dict(learn.model.named_parameters())), x)
        assert same(only(x, learn.averages.weights('x')), x)      # wrong: computed from x as if it were y
        assert same(only(x, learn.averages.weights('raw')), only(x, raw))
        with torch.no_grad(): learn.model[0].weight.zero_()
    assert same(learn.model.state_dict(), raw)
    live = cb.average.live()
    learn.apply('x')
    learn.fit(1)
    assert same(copied(dict(live.named_parameters())), x_of(learn))
    other = net(seed=3)
    cb.average.copy_to(other)
    assert same(copied(dict(other.named_parameters())), x_of(learn))


# --- modes of the optimizer


@opts('sgd', 'adamw', 'wrapper')
def test_modes_need_no_thought(opt):
    "Users who call eval() between fits, or in a callback, have the run of those who do not, to rounding"
    ways = []
    for cbs in ((), (Eval(),)):
        learn = sf_learner(ScheduleFreeCB(apply=False), BNUpdateCB(), *cbs, opt=opt)
        learn.fit(1)
        if cbs: learn.opt.eval()
        learn.fit(2)
        ways.append(x_of(learn))
        assert same(only(ways[-1], learn.averages['schedule_free'].weights), ways[-1])
    for k in {*ways[0]} - {'0.bias'}:      # whose gradient, before BatchNorm, is rounding that AdamW enlarges
        torch.testing.assert_close(*(w[k] for w in ways), rtol=1e-3, atol=1e-4)


def test_looks_leave_the_optimizer_as_it_is():
    learn = sf_learner(ScheduleFreeCB(apply=False), BNUpdateCB())
    learn.fit(1)
    before, groups = copied(learn.model.state_dict()), [dict(g) for g in learn.opt.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.lr_find(max_steps=5, show=False)
        learn.validate()
        learn.get_preds(weights='schedule_free')
    assert same(learn.model.state_dict(), before)
    assert [{k: v for k, v in g.items() if k != 'params'} for g in learn.opt.param_groups] == [
        {k: v for k, v in g.items() if k != 'params'} for g in groups]


def test_a_warning_where_nobody_shows_the_average():
    learn = sf_learner()
    with pytest.warns(UserWarning, match=r'AdamWScheduleFree averages.*ScheduleFreeCB') as seen: learn.fit(2)
    assert len(seen) == 1 and learn.opt.param_groups[0]['train_mode']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, cbs=ScheduleFreeCB(), train=False)
        learner().fit(1)


def test_new_parameters_start_anew():
    "Wrong: the state of the old ones is kept by an optimizer whose counts are at 0 and which takes y for x"
    learn = sf_learner(ScheduleFreeCB(apply=False), BNUpdateCB())
    learn.fit(1)
    learn.model[3] = nn.Linear(8, 3)
    y = copied(dict(learn.model[0].named_parameters()))
    with pytest.warns(UserWarning, match='starts without momentum'):
        learn.fit(1, cbs=At('before_batch', CancelFitException()))
    assert same(y, copied(dict(learn.model[0].named_parameters())))
    learn.fit(1)
    x = x_of(learn)
    assert same(only(x, learn.averages['schedule_free'].weights), x) and learn.averages['schedule_free'].n == 10


# --- files


@opts('sgd', 'adamw', 'wrapper')
def test_resume(opt, tmp_path):
    "A run that was cut short in the midst of an epoch ends as if it had not been, bit for bit"
    def make(*cbs): return sf_learner(ScheduleFreeCB(), BNUpdateCB(), *cbs, opt=opt, dls=data(shuffle=True))
    class Stop(Callback):
        order = 99
        def after_batch(self, learn):
            if learn.training and learn.clock.batches == 14: raise CancelFitException
    torch.manual_seed(1)
    whole = make()
    whole.fit(3)
    torch.manual_seed(1)
    make(CheckpointCB(tmp_path, every='7ba'), Stop()).fit(3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = make(CheckpointCB(tmp_path, every='7ba'))
        again.fit(3, resume=tmp_path)
    for name in ('raw', 'schedule_free'): assert same(again.averages.weights(name), whole.averages.weights(name))
    assert again.history == whole.history
    assert again.averages['schedule_free'].n == 30


@opts('sgd', 'wrapper')
def test_resume_of_a_run_that_was_saved_in_eval_mode(opt, tmp_path):
    "Wrong: the first step finds the optimizer in eval mode, or a wrapper takes x for y"
    def make(): return sf_learner(ScheduleFreeCB(), BNUpdateCB(), Eval(), opt=opt)
    whole, part, again = make(), make(), make()
    whole.fit(2)
    part.fit(2, cbs=[CheckpointCB(tmp_path), AtEpoch(1)])
    again.fit(2, resume=tmp_path)
    part.fit(1, cbs=[CheckpointCB(tmp_path/'end')])
    more = make()
    with pytest.warns(UserWarning, match='of 1 epoch '): more.fit(2, resume=tmp_path/'end')
    assert same(again.averages.weights('raw'), whole.averages.weights('raw')) and again.history == whole.history
    assert more.opt_steps == 30
    x = x_of(more)
    assert same(only(x, more.averages.weights('schedule_free')), x)


def test_resume_of_a_second_fit(tmp_path):
    "Without a word about options, as what the optimizer counts in its groups is none; wrong: 'k was 10 and is 0'"
    def make(): return sf_learner(ScheduleFreeCB(), BNUpdateCB())
    learn, again = make(), make()
    learn.fit(1)
    learn.fit(2, cbs=[CheckpointCB(tmp_path), AtEpoch(1)])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again.fit(2, resume=tmp_path)
    assert again.averages['schedule_free'].n == again.opt_steps == 30
    x = x_of(again)
    assert same(only(x, again.averages['schedule_free'].weights), x)


@opts('sgd', 'wrapper')
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_load(opt, mode, tmp_path):
    """After a load there is x at once, and the next fit goes on from y, in whatever mode the optimizer was saved

    Wrong: a wrapper, whose state_dict has no mode, takes y for x and moves the weights"""
    def make(): return sf_learner(ScheduleFreeCB(apply=False), BNUpdateCB(), opt=opt)
    learn, again, bare = make(), make(), make()
    learn.fit(1)
    getattr(learn.opt, mode)()
    learn.save(tmp_path/'a.pt')
    x = x_of(learn)
    again.load(tmp_path/'a.pt')
    assert same(only(x, again.averages['schedule_free'].weights), x)
    bare.load(tmp_path/'a.pt', opt=False)      # without an optimizer's state: as it was saved
    assert same(only(x, bare.averages['schedule_free'].weights), x)
    assert bare.validate(weights='schedule_free') == again.validate(weights='schedule_free')
    for o in (learn, again): o.fit(1)
    assert same(again.model.state_dict(), learn.model.state_dict())
    bare.fit(1)
    x = x_of(bare)
    assert same(only(x, bare.averages['schedule_free'].weights), x) and bare.averages['schedule_free'].n == 10


def test_a_file_of_a_run_without_the_callback(tmp_path):
    "Wrong: x of the run before, which had made as many steps"
    first = sf_learner(opt=OPTS['sgd'])
    second = sf_learner(ScheduleFreeCB(apply=False), BNUpdateCB(), opt=OPTS['sgd'], lr=0.3)
    first.quiet = True      # about the callback that it lacks, too
    for o in (first, second): o.fit(1)
    first.save(tmp_path/'a.pt')
    old = copied(second.averages['schedule_free'].weights)
    second.load(tmp_path/'a.pt')
    x = x_of(first)
    assert same(only(x, second.averages['schedule_free'].weights), x) and not same(only(x, old), x)


def test_copies():
    "Of a learner, and of an average with its model: they follow their own optimizer"
    learn = sf_learner(ScheduleFreeCB(apply=False), BNUpdateCB())
    learn.fit(1)
    x = x_of(learn)
    other = copy.deepcopy(learn)
    other.fit(1)
    assert same(only(x, learn.averages['schedule_free'].weights), x)
    assert same(only(x, other.averages['schedule_free'].weights), x_of(other))
    average = pickle.loads(pickle.dumps(learn.averages['schedule_free']))
    assert same(only(x, average.weights), x)


def test_a_schedule_of_the_rate():
    "One cycle is of the rate alone; wrong: it moves the beta, and y is no longer where x and z say"
    cb, betas = ScheduleFreeCB(apply=False), set()
    class Betas(Callback):
        def after_step(self, learn): betas.add(learn.opt.param_groups[0]['betas'])
    learn = sf_learner(cb, BNUpdateCB(), Betas())
    learn.fit_one_cycle(2, 0.02)
    x = x_of(learn)
    assert same(only(x, cb.average.weights), x) and betas == {(0.9, 0.999)}


# --- other optimizers


def test_closures():
    "Between the steps the model holds x: both rows are of it, the average's with statistics that fit"
    learn = sf_learner(ScheduleFreeCB(apply=False), BNUpdateCB(), ClosureCB(), opt=sf.AdamWScheduleFreeClosure)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(2)
    x = copied(dict(learn.model.named_parameters()))
    assert same(only(x, learn.averages['schedule_free'].weights), x)
    assert learn.averages['schedule_free'].n == learn.opt_steps == 20
    bn = learn.module('schedule_free')[1]
    inside = learn.model[0](torch.cat([xb for xb, _ in learn.dls.train])).double()
    torch.testing.assert_close(bn.running_mean.double(), inside.mean(0).detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(learn.model[1].running_mean, bn.running_mean, rtol=1e-3)


def test_another_package():
    "One that counts its steps as `step`, and begins in train mode, as pytorch_optimizer does"
    class Other(sf.SGDScheduleFree):
        def __init__(self, *args):
            super().__init__(*args)
            for g in self.param_groups: g['train_mode'] = True
        def step(self, closure=None):
            for g in self.param_groups: g['k'] = g.pop('step', 0)
            super().step(closure)
            for g in self.param_groups: g['step'] = g.pop('k')
    learn = sf_learner(ScheduleFreeCB(apply=False), BNUpdateCB(), opt=Other)
    learn.fit(1)
    x = x_of(learn)
    assert same(only(x, learn.averages['schedule_free'].weights), x) and learn.averages['schedule_free'].n == 10


@pytest.mark.parametrize('opt', [optim.SGD, optim.AdamW, NoOptimizer])
def test_an_optimizer_that_averages_nothing(opt):
    "An error before training"
    learn = learner(ScheduleFreeCB(), opt_func=opt)
    before = copied(learn.model.state_dict())
    with pytest.raises(ValueError, match='is no Schedule-Free optimizer.*take one, such as schedulefree.AdamW'):
        learn.fit(1)
    assert same(learn.model.state_dict(), before) and not is_schedule_free(learn.opt)


def test_beside_other_averages():
    "First asked for while the model holds another average: from the raw weights; wrong: from what it holds"
    learn = sf_learner(EMACB(), ScheduleFreeCB(valid=False), BNUpdateCB())
    learn.fit(2)
    x = x_of(learn)
    learn.apply('ema')
    assert same(only(x, learn.averages.weights('schedule_free')), x)
    with learn.using('schedule_free'): assert same(copied(dict(learn.model.named_parameters())), x)
    assert [r['weights'] for r in learn.validate()] == ['raw', 'ema']


def test_a_module_that_follows():
    "At each step, whether or not anybody reads the average"
    model = net(norm=False)
    opt = sf.SGDScheduleFree(model.parameters(), 0.1)
    opt.train()
    averages, seen = Averages(model), None
    avg = averages.add('x', ScheduleFree(model, opt))
    for xb, yb in data().train:
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        averages.step()
        seen = seen or avg.live()
    got = copied(dict(seen.named_parameters()))
    opt.eval()
    assert same(got, copied(dict(model.named_parameters())))


def test_a_step_while_the_model_holds_x():
    "An error in a loop of one's own: the optimizer would take x for y"
    model = net(norm=False)
    opt = sf.SGDScheduleFree(model.parameters())
    opt.train()
    averages = Averages(model)
    averages.add('x', ScheduleFree(model, opt))
    for xb, yb in data().train:
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        averages.step()
    averages.apply('x')
    with pytest.raises(RuntimeError, match='after `averages.restore'): averages.step()


def test_bad_arguments():
    learn = sf_learner(ScheduleFreeCB(), opt=partial(sf.AdamWScheduleFree, betas=(0, 0.9)))
    with pytest.raises(ValueError, match='of 0'): learn.fit(1)
    with pytest.raises(TypeError, match='ScheduleFreeCB has no argument every'): ScheduleFreeCB(every='1ep')
    model = net()
    avg = ScheduleFree(model, sf.SGDScheduleFree(model.parameters()))
    with pytest.raises(RuntimeError, match='made no step yet'): avg.module()
    with pytest.raises(ValueError, match='its own model only'): avg.update(net())
