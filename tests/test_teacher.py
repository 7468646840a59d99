"The teacher of a learner: which weights it has when, what it is beside the model, further fits and resumed ones"
import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.averaging.average import Average
from fastswa.averaging.averages import Averages
from fastswa.averaging.rules import scheduled_ema
from fastswa.callbacks.activations import HooksCallback
from fastswa.callbacks.swa import AverageCB, EMACB
from fastswa.callbacks.teacher import TeacherCB
from fastswa.checkpoint.archive import newest
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.nets.norms import BatchNorm
from fastswa.training.events import Callback, CancelStepException
from fastswa.training.learner import TrainLearner
from helpers import Trail, copied, data, learner, linear, net, regression, same, state


class Follow(Callback):
    "The loss pulls the model towards its teacher, as in Mean Teacher; `outputs` are the teacher's in training"
    def __init__(self, weight=1.): self.weight,self.outputs = weight,[]
    def after_loss(self, learn):
        preds = learn.teacher(learn.batch[0])
        if not learn.training: return
        self.outputs.append(preds)
        learn.loss = learn.loss + self.weight*F.mse_loss(learn.preds, preds)


class Seen(Callback):
    "The teacher's first weight after each batch of training"
    order = 98
    def before_fit(self, learn): self.weights = [learn.teacher[0].weight.double().numpy().copy()]
    def after_batch(self, learn):
        if learn.training: self.weights.append(learn.teacher[0].weight.double().numpy().copy())


def decay_at(share, schedule, decay=0.6, end=0.95):
    if schedule == 'constant': return decay
    if schedule == 'linear': return decay*(1 - share) + end*share
    return end - (end - decay)*(math.cos(math.pi*share) + 1)/2


class SkipSteps(Callback):
    "No step in some batches, as where mixed precision skips it"
    def __init__(self, batches=()): self.batches = batches
    def after_backward(self, learn):
        if learn.epoch*10 + learn.iter in self.batches: raise CancelStepException


@pytest.mark.parametrize('how', ['each', 'skipped', 'accumulated', 'every third', 'max_steps'])
@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'constant'])
def test_the_whole_run_in_float64(schedule, how):
    "Wrong: a ramp by the number of updates, which accumulation and skipped steps delay; an update without a step"
    skipped = {'skipped': (0, 3, 4, 17, 29), 'accumulated': [i for i in range(30) if i % 2 == 0]}.get(how, ())
    seen,trail = Seen(),Trail()
    teacher = TeacherCB(0.6, 0.95, schedule, every='3ba' if how == 'every third' else '1ba')
    learn = learner(teacher, seen, trail, SkipSteps(skipped))
    exact = [learn.model[0].weight.detach().double().numpy().copy()]
    total = 25 if how == 'max_steps' else 30
    learn.fit(**(dict(max_steps=25) if how == 'max_steps' else dict(n_epochs=3)))
    taken = iter(trail.weights)
    for i in range(total):
        now = exact[-1]
        if i not in skipped:
            theta = next(taken)
            k = 3 if how == 'every third' else 1
            if (i + 1) % k == 0:
                left = decay_at(i/total, schedule)**k
                now = left*now + (1 - left)*theta
        exact.append(now)
    assert len(seen.weights) == len(exact) == total + 1
    for i, (a, b) in enumerate(zip(seen.weights, exact)): assert abs(a - b).max() < 1e-6, i


def test_a_loop_of_ones_own_has_the_same_teacher():
    learn = learner(TeacherCB(0.6, 0.95))
    learn.fit(3)
    model = net()
    averages = Averages(model, steps_per_epoch=10, n_epochs=3)
    averages.add('teacher', scheduled_ema(0.6, 0.95))
    averages.take('teacher')
    teacher,opt = averages['teacher'].live(),optim.SGD(model.parameters(), 0.3)
    for _ in range(3):
        for xb, yb in data().train:
            F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
            averages.step()
    assert same(copied(teacher.state_dict()), copied(learn.teacher.state_dict()))


def test_it_is_a_copy_of_the_model_before_the_first_update():
    "Wrong: no teacher for the first batch; one that is not the model; a first update that copies the stepped weights"
    follow,model = Follow(),net(norm=False)
    first = copy.deepcopy(model)
    learn = learner(TeacherCB(), follow, model=model)
    learn.fit(1)
    xb = next(iter(learn.dls.train))[0]
    assert torch.equal(follow.outputs[0], first(xb)) and not torch.equal(follow.outputs[1], first(xb))


def test_it_is_in_eval_mode_without_gradients_and_apart():
    follow,model = Follow(),net(dropout=0.5)
    learn = learner(TeacherCB(), follow, model=model)
    learn.fit(1)
    teacher = learn.teacher
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters()) and not any(o.requires_grad for o in follow.outputs)
    ours = {id(p) for p in [*learn.model.parameters(), *learn.model.buffers()]}
    assert not ours & {id(p) for p in [*teacher.parameters(), *teacher.buffers()]}
    assert len(learn.opt.param_groups[0]['params']) == len([*model.parameters()])
    weights = learn.averages.weights('teacher')
    assert teacher[0].weight.data_ptr() == weights['0.weight'].data_ptr()      # no second copy


def test_the_run_is_the_same_but_for_what_the_loss_makes_of_it():
    "Wrong: a teacher, its forward passes or its rows that draw random numbers or change statistics of the model"
    def run(*cbs, valid=True):
        learn = learner(*cbs, model=net(dropout=0.3), dls=data(shuffle=True))
        torch.manual_seed(1)
        learn.fit(2, valid=valid)
        return state(learn)
    bare = run()
    for bn in 'average', 'model', 'batch':
        for on in True, False: assert same(run(TeacherCB(batchnorm=bn, valid=on), Follow(0.)), bare), (bn, on)
    assert same(run(TeacherCB(), valid=False), run(valid=False))
    assert not same(run(TeacherCB(0.5), Follow(1.)), bare)


@pytest.mark.parametrize('when, batchnorm', [('7ba', 'average'), ('10ba', 'model'), ('13ba', 'batch')])
def test_resumed_bit_for_bit(tmp_path, when, batchnorm):
    "Wrong: a ramp that begins anew, a teacher that is the model of the moment or of the beginning"
    def run(*cbs, **kw):
        learn = learner(TeacherCB(0.6, 0.95, batchnorm=batchnorm), Follow(), *cbs, dls=data(shuffle=True))
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            learn.fit(3, **kw)
        return learn
    class Stop(Callback):
        order = 99
        def after_batch(self, learn):
            if learn.training and learn.opt_steps == int(when[:-2]) + 2: raise ZeroDivisionError
    whole = run()
    with pytest.raises(ZeroDivisionError): run(CheckpointCB(tmp_path/'run', every=when), Stop())
    again = run(CheckpointCB(tmp_path/'run', every=when), resume=tmp_path/'run')
    assert same(state(again), state(whole)) and again.history == whole.history
    assert same(copied(again.teacher.state_dict()), copied(whole.teacher.state_dict()))
    assert again.averages['teacher'].n == whole.averages['teacher'].n == 31


def test_loaded_into_another_learner(tmp_path):
    "Wrong: after a load the teacher is what it was, or a copy of the model; a file with the teacher as the raw weights"
    learn = learner(TeacherCB(0.6), Follow())
    learn.fit(1)
    learn.save(tmp_path/'run.pt')
    saved = newest(tmp_path/'run.pt')[1]
    assert [*saved['weights']] == ['raw'] and same(saved['weights']['raw'], state(learn))
    other = learner(TeacherCB(0.6), Follow())
    other.load(tmp_path/'run.pt')
    assert same(copied(other.teacher.state_dict()), copied(learn.teacher.state_dict()))
    assert same(state(other), state(learn)) and other.validate() == learn.validate()
    before = other.teacher
    other.averages.load_state_dict(learn.averages.state_dict())
    assert torch.equal(before[0].weight, learn.teacher[0].weight)
    learn.fit(1)
    other.fit(1)
    assert same(copied(other.teacher.state_dict()), copied(learn.teacher.state_dict()))


def test_it_goes_on_in_the_next_fit_with_a_ramp_of_its_own():
    seen,trail = Seen(),Trail()
    learn = learner(TeacherCB(0.6, 0.95), seen, trail)
    learn.fit(1)
    at,kept = seen.weights[-1],learn.teacher
    learn.fit(1)
    assert (seen.weights[0] == at).all()
    for i, theta in enumerate(trail.weights):
        left = decay_at(i/10, 'cosine')
        at = left*at + (1 - left)*theta
    assert abs(at - seen.weights[-1]).max() < 1e-6
    assert torch.equal(kept[0].weight, learn.teacher[0].weight)      # who kept it has no stale one


def test_restart_begins_with_the_model_of_each_fit():
    seen = Seen()
    learn = learner(TeacherCB(0.6, restart=True), seen)
    for _ in range(2):
        now = learn.model[0].weight.detach().double().numpy().copy()
        learn.fit(1)
        assert (seen.weights[0] == now).all()


def test_one_callback_for_several_learners_in_turn():
    "Wrong: the teacher of one learner is that of another, or moves with it"
    cb = TeacherCB(0.6)
    a,b = learner(cb, Follow()),learner(cb, Follow(), model=net(seed=1))
    a.fit(1)
    of_a = copied(a.teacher.state_dict())
    b.fit(1)
    alone = learner(TeacherCB(0.6), Follow(), model=net(seed=1))
    alone.fit(1)
    assert same(copied(a.teacher.state_dict()), of_a)
    assert same(copied(b.teacher.state_dict()), copied(alone.teacher.state_dict()))


def test_a_deep_copy_goes_its_own_way():
    learn = learner(TeacherCB(0.6), Follow())
    learn.fit(1)
    other = copy.deepcopy(learn)
    assert same(copied(other.teacher.state_dict()), copied(learn.teacher.state_dict()))
    before = copied(learn.teacher.state_dict())
    other.fit(1)
    assert same(copied(learn.teacher.state_dict()), before)
    learn.fit(1)
    assert same(copied(other.teacher.state_dict()), copied(learn.teacher.state_dict()))


def test_beside_an_ema():
    "Wrong: two averages of the same weights that disturb each other; a teacher that the model holds after the fit"
    learn = learner(TeacherCB(0.6), EMACB(0.9), Follow())
    learn.fit(2)
    alone = learner(EMACB(0.9), AverageCB(name='other'), TeacherCB(0.6), Follow())
    alone.fit(2)
    assert [row['weights'] for row in learn.validate()] == ['raw', 'teacher', 'ema'] and learn.weights == 'raw'
    for name in 'teacher', 'ema':
        assert same(copied(learn.averages.weights(name)), copied(alone.averages.weights(name)))
    learn.apply('teacher')
    assert torch.equal(learn.model[0].weight, learn.teacher[0].weight)
    only = learner(TeacherCB(0.6))
    only.fit(1)
    assert only.weights == 'raw'


@pytest.mark.parametrize('norm', [nn.BatchNorm1d, lambda n: nn.BatchNorm1d(n, momentum=None), BatchNorm])
@pytest.mark.parametrize('batchnorm', ['average', 'model', 'batch'])
def test_its_batchnorm(batchnorm, norm):
    "Wrong: statistics of the model where the average's are wanted, or the other way; its passes write into the average"
    model = net()
    model[1] = norm(8)
    class Check(Callback):
        order = 97
        def after_step(self, learn): self.mean = learn.model[1].running_mean.clone()
        def after_predict(self, learn):
            t,x = learn.teacher[1],torch.randn(32, 8, generator=torch.Generator().manual_seed(learn.iter))
            before = copied(dict(t.named_buffers()))
            out = t(x)
            for k in ('running_mean', 'running_var'): assert torch.equal(before[k], getattr(t, k)), k
            if learn.training and learn.opt_steps > 1:      # the model has just changed its own, in this batch
                latest = torch.equal(t.running_mean, self.mean)
                assert latest == (batchnorm == 'model')
            by_batch = abs(out.mean(0) - t.bias).max() < 1e-5
            assert by_batch == (batchnorm == 'batch' and learn.training)
    learn = learner(TeacherCB(0.5, batchnorm=batchnorm), Check(), model=model)
    with torch.no_grad(): model[1].running_mean += 3
    for valid in False, True:
        learn.fit(1, valid=valid)
        assert not learn.teacher[1].training


def test_a_frozen_batchnorm_stays_frozen_in_the_teacher():
    model = net()
    model[1].eval()
    modes = []
    class Modes(Callback):
        def after_predict(self, learn): modes.append(learn.teacher[1].training)
    learner(TeacherCB(batchnorm='batch'), Modes(), model=model).fit(1)
    assert modes and not any(modes)


def test_what_is_left_out_follows_the_model():
    learn = learner(TeacherCB(0.9, include=['0.*'], exclude='*.bias'))
    learn.fit(1)
    assert torch.equal(learn.teacher[3].weight, learn.model[3].weight)
    assert not torch.equal(learn.teacher[0].weight, learn.model[0].weight)
    assert torch.equal(learn.teacher[0].bias, learn.model[0].bias)


def test_a_hard_update_of_a_target_network():
    "decay=0 copies: at the 5th, the 10th … step, and not between"
    seen,trail = Seen(),Trail()
    learner(TeacherCB(0, schedule='constant', every='5ba'), seen, trail).fit(2)
    for i in range(1, 21):
        now = seen.weights[0] if i < 5 else trail.weights[i//5*5 - 1]
        assert (seen.weights[i] == now).all(), i


def test_hooks_on_the_model_do_not_see_the_teacher():
    calls = []
    hooks = HooksCallback(lambda hook, mod, inp, outp: calls.append(mod), mod_filter=lambda m: isinstance(m, nn.Linear))
    learn = learner(hooks, TeacherCB(), Follow())
    learn.fit(1, valid=False)
    assert len(calls) == 20 and not any(m in calls for m in learn.teacher.modules())


@pytest.mark.parametrize('first', ['lr_find', 'validate', 'get_preds', 'fit'])
def test_there_is_one_where_something_is_tried_out_before_the_first_fit(first):
    "Wrong: an AttributeError in the user's loss; a trace of what was tried out"
    learn,bare = (learner(TeacherCB(0.6), Follow()) for _ in range(2))
    if first == 'lr_find': learn.lr_find(show=False)
    elif first == 'fit': learn.fit(1, train=False)
    else: getattr(learn, first)()
    if first != 'fit': assert not hasattr(learn, 'teacher')
    with torch.no_grad():
        for m in (learn.model, bare.model): m[0].weight *= 2
    torch.manual_seed(1)
    learn.fit(1)
    torch.manual_seed(1)
    bare.fit(1)
    assert same(state(learn), state(bare))
    assert same(copied(learn.teacher.state_dict()), copied(bare.teacher.state_dict()))


def test_trying_something_out_leaves_the_teacher_alone():
    learn = learner(TeacherCB(0.6), Follow())
    learn.fit(1)
    teacher,before = learn.teacher,copied(learn.teacher.state_dict())
    learn.lr_find(show=False)
    learn.validate()
    assert learn.teacher is teacher and same(copied(teacher.state_dict()), before)


def test_a_loader_without_length():
    "Wrong: an error in the midst of training, or a decay that never changes"
    class Stream:
        def __iter__(self): return iter(regression().train)
    def stream(*cbs): return TrainLearner(linear(), SimpleNamespace(train=Stream(), valid=None), F.mse_loss, 0.1, cbs)
    for schedule in 'cosine', 'linear':
        learn = stream(TeacherCB(schedule=schedule))
        with pytest.raises(ValueError, match='whose length is not known: give the loader a length'): learn.fit(1)
        assert learn.opt_steps == 0
    stream(TeacherCB(schedule='constant')).fit(1)
    learn = stream(TeacherCB(0., 1., 'linear'))
    learn.fit(max_steps=4)
    assert learn.averages['teacher'].rule(1) == pytest.approx(1 - 3/4)
    for averages in Averages(linear()), Averages(linear(), steps_per_epoch=5):
        with pytest.raises(ValueError, match='steps_per_epoch and n_epochs'): averages.add('t', scheduled_ema())


BAD = [(dict(decay=1.5), 'decay must be a number from 0 to 1; got 1.5'), (dict(decay=-0.1), 'decay .* got -0.1'),
       (dict(decay=None), 'decay .* got None'), (dict(decay='1ep'), "decay .* got '1ep'"),
       (dict(end=2), 'end must be a number from 0 to 1; got 2'), (dict(end=math.nan), 'end .* got nan'),
       (dict(end=7, schedule='constant'), 'end .* got 7'),
       (dict(schedule='cos'), "schedule must be 'cosine', 'linear' or 'constant'; got 'cos'"),
       (dict(batchnorm='own'), "batchnorm must be 'average', 'model' or 'batch'; got 'own'"),
       (dict(every='2'), 'every must be a number with a unit')]


@pytest.mark.parametrize('kwargs, message', BAD)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message): TeacherCB(**kwargs)


def test_what_cannot_be():
    with pytest.raises(TypeError, match='TeacherCB has no argument start'): TeacherCB(start='1ep')
    with pytest.raises(ValueError, match='a learner has one teacher, but there are two'):
        learner(TeacherCB(), TeacherCB(name='other')).fit(1)
    model = net()
    with torch.no_grad(): model[0].weight[0] = math.nan
    with pytest.warns(UserWarning, match='NaN'), pytest.raises(ValueError, match='there is no teacher: the weights'):
        learner(TeacherCB(), model=model).fit(1)
    with pytest.raises(RuntimeError, match='`Averages` says so'):
        average = Average(linear(), scheduled_ema())
        for _ in range(2): average.update()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_teacher_of_a_model_in_half_precision(dtype):
    "The ways that the docs of `live` name. Wrong: a dtype error that nothing explains"
    assert 'x.float()' in Average.live.__doc__ and 'dtype=torch.bfloat16' in Average.live.__doc__
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype), torch.randn(5, 3).to(dtype)
    average = Average(model)
    average.update()
    teacher = average.live()
    want = copy.deepcopy(model).float()(x.float())
    torch.testing.assert_close(teacher(x.float()), want)
    with torch.autocast('cpu', dtype): got = teacher(x)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
    average = Average(model, dtype=dtype)
    average.update()
    torch.testing.assert_close(average.live()(x), model(x))
