"What timm tests, and documents, of averages in its utilities and tasks, of checkpoints, freezing and statistics"
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW, SGD

from fastswa.averaging.average import Average
from fastswa.averaging.rules import ema
from fastswa.averaging.interchange import load_timm_ema
from fastswa.averaging.batchnorm import update_bn
from fastswa.callbacks.activations import ActivationStats, HooksCallback
from fastswa.callbacks.swa import EMACB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.checkpoint.archive import read_checkpoint
from fastswa.nets.hooks import Hooks
from fastswa.training.learner import TrainLearner
from fastswa.training.optim import param_groups
from helpers import Losses, copied, floats, image_data, image_net, learner, linear, net, one, quick, same, state

# --- ModelEmaV2, ModelEmaV3, tasks


def moved(model, by=0.25):
    with torch.no_grad():
        for p in model.parameters(): p.add_(by)
    return model


@pytest.mark.parametrize('decay', [0.0, 0.5, 0.9999])
def test_parameters_and_float_buffers_move_by_the_decay(decay):
    "As V3's lerp; integers are copied"
    average = Average(model := net(), ema(decay))
    average.update()
    old = copied(average.weights)
    moved(model)
    model[1].running_mean += 1
    model[1].num_batches_tracked += 7
    average.update()
    for k, new in floats(model).items(): assert torch.equal(average.weights[k], old[k].lerp(new, 1 - decay))
    assert average.module()[1].num_batches_tracked == 7


@pytest.mark.parametrize('n', [1, 10, 1000])
def test_the_decay_warms_up_by_a_power(n):
    np.testing.assert_allclose(1 - ema(0.9999, warmup='power')(n), min(0.9999, 1 - (1 + n)**(-2/3)))


def test_set_takes_the_weights_as_they_are():
    "V2's set(): an average that begins anew has them whole"
    average = Average(model := one(1.), ema(0.9))
    average.update()
    nn.init.constant_(model.weight, 5.)
    average.reset()
    average.update()
    assert average.weights['weight'] == 5 and average.n == 1


def test_buffers_can_be_excluded():
    "exclude_buffers: those of the model are used"
    average = Average(model := net(), ema(0.5), exclude=['*.running_mean', '*.running_var'])
    for _ in range(2):
        average.update()
        model[1].running_mean += 1
    assert torch.equal(average.module()[1].running_mean, model[1].running_mean)


def test_the_average_is_another_model_in_eval_mode():
    average = Average(model := net(dropout=0.5), ema(0.9))
    average.update()
    averaged = average.module()
    assert not any(m.training for m in averaged.modules()) and model.training
    assert not {p.data_ptr() for p in averaged.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_an_average_of_a_compiled_model_follows_it():
    "Its names are those of the plain model, and what it gives is the weights of now with decay 0"
    model = torch.compile(net(norm=False), backend='eager')
    x = torch.randn(2, 3)
    average = Average(model, ema(0.))
    average.update()
    before = average.module()(x)
    moved(model)
    average.update()
    assert not torch.allclose(average.module()(x), before) and torch.equal(average.module()(x), model(x).detach())
    assert list(average.weights) == list(floats(net(norm=False)))


def test_a_compiled_learner_loads_a_plain_file(tmp_path):
    "And the other way round: no name has the prefix of torch.compile"
    plain, compiled = quick(), quick()
    compiled.model = torch.compile(compiled.model, backend='eager')
    moved(plain.model)
    plain.save(tmp_path/'plain.pt')
    compiled.load(tmp_path/'plain.pt')
    compiled.save(tmp_path/'compiled.pt')
    assert same(read_checkpoint(tmp_path/'compiled.pt')['weights']['raw'], copied(plain.model.state_dict()))


def test_a_compiled_average_follows_it():
    "compile_ema: what is compiled is a live module of the average"
    average = Average(model := net(norm=False), ema(0.))
    average.update()
    live, x = torch.compile(average.live(), backend='eager'), torch.randn(2, 3)
    before = live(x)
    moved(model)
    average.update()
    assert not torch.allclose(live(x), before) and torch.allclose(live(x), model(x).detach())


@pytest.mark.parametrize('wrap', [lambda m: m, nn.DataParallel, partial(torch.compile, backend='eager')])
def test_their_checkpoint_is_taken_up(wrap):
    "`state_dict_ema` of plain and wrapped models"
    average = Average(net(), ema(0.9))
    theirs = moved(wrap(net()))
    load_timm_ema(average, dict(state_dict={}, state_dict_ema=theirs.state_dict()))
    assert all(torch.equal(t, p) for t, p in zip(average.weights.values(), floats(theirs).values()))


def test_a_checkpoint_without_an_average_is_an_error():
    "ModelEma warns and goes on from the weights of the model"
    with pytest.raises(ValueError, match='without an average'):
        load_timm_ema(Average(net(), ema(0.9)), dict(state_dict=net().state_dict()))


def test_a_checkpoint_holds_weights_and_average(tmp_path):
    "Each under its own name, whatever the model holds; a new learner takes up both"
    learn = quick(EMACB(decay=0.5))
    learn.fit(1)
    raw, average = copied(learn.averages.weights('raw')), copied(learn.averages.weights('ema'))
    learn.save(tmp_path/'a.pt')
    saved = read_checkpoint(tmp_path/'a.pt')
    assert same(saved['weights']['raw'], raw)
    new = quick(EMACB(decay=0.5))
    new.load(tmp_path/'a.pt')
    assert same(state(new), raw) and same(copied(new.averages.weights('ema')), average)


class Projected(nn.Module):
    "A loss with a layer of its own, as in distillation: the distance of what a layer makes of the predictions"
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.projection = nn.Linear(1, 1)
    def forward(self, preds, targets): return F.mse_loss(self.projection(preds), targets)


def test_the_layers_of_a_loss_are_saved_beside_the_model(tmp_path):
    "They train, are not among the model's weights or its average's, and come back"
    a, b = (TrainLearner(linear(), quick().dls, Projected(seed), 0.1, EMACB(decay=0.5)) for seed in (0, 1))
    before = copied(a.loss_func.state_dict())
    a.fit(1)
    a.save(tmp_path/'a.pt')
    b.load(tmp_path/'a.pt')
    saved = read_checkpoint(tmp_path/'a.pt')
    assert not any('projection' in k for k in [*saved['weights']['raw'], *a.averages['ema'].weights])
    assert not same(copied(a.loss_func.state_dict()), before)
    assert same(copied(b.loss_func.state_dict()), copied(a.loss_func.state_dict()))


@pytest.mark.parametrize('epoch', [1, 2])
def test_the_epoch_after_the_saved_one_comes_next(epoch, tmp_path):
    "resume_checkpoint returns epoch + 1"
    learn = quick(CheckpointCB(tmp_path, keep=None))
    learn.fit(3)
    rest = quick()
    rest.fit(3, resume=tmp_path/f'step-{7*epoch:08}.pt')
    assert rest.opt_steps == 21 and same(state(rest), state(learn))
    assert [r['epoch'] for r in rest.history if r['train'] == 'train'] == [0, 1, 2]


# --- CheckpointSaver


def names(folder): return sorted(p.name for p in folder.iterdir())


def test_without_a_metric_the_newest_stay(tmp_path):
    quick(CheckpointCB(tmp_path, keep=2)).fit(3)
    assert names(tmp_path) == ['step-00000014.pt', 'step-00000021.pt']


@pytest.mark.parametrize('mode, losses', [('max', [0.9, 0.8, 0.7]), ('min', [0.1, 0.2, 0.3])])
def test_newer_ones_do_not_displace_the_best(tmp_path, mode, losses):
    quick(Losses(losses), cb := CheckpointCB(tmp_path, keep=1, best='loss', mode=mode)).fit(3)
    assert names(tmp_path) == ['best.pt', 'step-00000021.pt']
    assert (cb.best, cb.best_epoch, read_checkpoint(tmp_path/'best.pt')['opt_steps']) == (losses[0], 0, 7)


def test_the_best_are_kept_by_rank_beside_the_newest(tmp_path):
    "max_history=2, of each kind"
    for mode, losses in ('max', [0.9, 0.8, 0.7]), ('min', [0.1, 0.2, 0.3]):
        quick(Losses(losses), CheckpointCB(tmp_path/mode, keep=1, best='loss', mode=mode, keep_best=2)).fit(3)
        assert names(tmp_path/mode) == ['best-00000007.pt', 'best-00000014.pt', 'best.pt', 'step-00000021.pt']


# --- freezing


def frozen_part(model, *prefixes):
    "Freeze parameters as in any PyTorch program, and normalisation by its mode"
    for name, m in model.named_modules():
        if name.startswith(prefixes):
            m.eval()
            for p in m.parameters(recurse=False): p.requires_grad_(False)
    return model


@pytest.mark.parametrize('prefixes', [('0', '1'), ('1',), ('3',)])
def test_frozen_layers_stay_as_they_are(prefixes):
    "Weights and statistics of BatchNorm, over a fit with an average; the others train"
    learn = learner(EMACB(decay=0.5), model=frozen_part(net(), *prefixes))
    before = state(learn)
    learn.fit(1)
    for k, t in learn.averages.weights('raw').items(): assert torch.equal(t, before[k]) == k.startswith(prefixes), k


def by_layers(model):
    "A learner whose optimizer has two groups: the first layers, and the last"
    groups = param_groups(model, {'[01].*': dict(lr_mult=0.5)})
    return learner(model=model, opt_func=lambda params, lr: SGD(groups, lr))


@pytest.mark.parametrize('train_bn', [False, True])
def test_groups_are_frozen_and_unfrozen(train_bn):
    "freeze(model, ['layer1']), with its BatchNorm or without, and unfreeze(); fastai's freeze_to is spelled alike"
    learn = by_layers(net())
    learn.freeze_to(1, train_bn=train_bn)
    assert not learn.model[0].weight.requires_grad and learn.model[3].weight.requires_grad
    before = state(learn)
    learn.fit(1)
    stayed = {k for k, t in floats(learn.model).items() if torch.equal(t, before[k])}
    norm = {k for k in floats(learn.model) if k.startswith('1.')}
    assert stayed == {'0.weight', '0.bias', *(() if train_bn else norm)}
    learn.unfreeze()
    before = state(learn)
    learn.fit(1)
    moved = {k for k, t in floats(learn.model).items() if not torch.equal(t, before[k])}
    # the gradient of a bias before BatchNorm is rounding, or nothing
    assert moved | {'0.bias'} == {*floats(learn.model)}


@pytest.mark.parametrize('n', [2, -3])
def test_a_group_that_there_is_not_is_an_error(n):
    with pytest.raises(ValueError, match=f'2 parameter groups; there is no group {n}'): by_layers(net()).freeze_to(n)
    with pytest.raises(ValueError, match='several parameter groups'): learner().freeze()


def test_frozen_statistics_are_not_recomputed():
    "FrozenBatchNorm2d. Torch's update_bn resets them"
    model = frozen_part(net().train(), '1')
    before = copied(model[1].state_dict())
    update_bn(model, [torch.randn(8, 3) + 5])
    assert same(copied(model[1].state_dict()), before)


def test_what_was_frozen_trains_once_it_is_not():
    learn = learner(model=frozen_part(net(), '0', '1'))
    learn.fit(1)
    before = state(learn)
    learn.model.train().requires_grad_(True)
    learn.fit(1)
    assert not any(torch.equal(before[k], t) for k, t in floats(learn.model).items())


# --- statistics of activations


def test_a_hook_on_chosen_layers():
    "extract_spp_stats: mean of squares and variance of each channel, of the layers that a filter selects"
    seen = []
    def note(hook, module, inp, outp):
        seen.append((outp.detach().square().mean().item(), outp.detach().var([0, 2, 3]).mean().item()))
    learn = TrainLearner(image_net(), image_data(), F.cross_entropy, 0.05,
                         HooksCallback(note, lambda m: isinstance(m, nn.Conv2d)))
    learn.fit(1)
    assert len(seen) == 7 and all(np.isfinite(seen).ravel())


def test_hooks_on_no_layer_are_an_error():
    "Theirs: as many functions as places"
    with pytest.raises(ValueError, match='no modules'): Hooks([], print)
    with pytest.warns(UserWarning, match='selects no module of the model, so nothing is watched; there are'):
        quick(HooksCallback(print, lambda m: isinstance(m, nn.Conv2d))).fit(1)


def test_statistics_of_activations_are_numbers():
    learn = TrainLearner(image_net(), image_data(), F.cross_entropy, 0.05, stats := ActivationStats(every=1))
    learn.fit(1)
    rows = stats.report()
    assert all(r.batches == 7 and np.isfinite([r.mean, r.std, r.dead]).all() for r in rows)


# --- optimizer groups


def test_norms_and_biases_have_no_weight_decay():
    "Their create_optimizer_v2"
    model = net()
    opt = AdamW(param_groups(model, no_decay=True), weight_decay=0.2)
    decay = {n: g['weight_decay'] for g in opt.param_groups for n in g['param_names']}
    assert decay == {n: 0.2 if p.ndim > 1 else 0. for n, p in model.named_parameters()}


def test_every_parameter_is_in_one_group():
    "Of a layer on top of the model too, such as a projection for distillation"
    model = nn.ModuleDict(dict(student=net(), projection=nn.Linear(3, 5)))
    groups = param_groups(model, {'projection.*': dict(lr_mult=10.)}, no_decay=True)
    placed = [p for g in groups for p in g['params']]
    assert sorted(map(id, placed)) == sorted(map(id, model.parameters()))
    assert SGD(groups, 0.1)
