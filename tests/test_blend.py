"Blends of the raw weights and an average: what they are, where they serve, that they stand still, how they are saved"
import copy
import math
import warnings

import pytest
import torch
from torch import nn

from fastswa.averaging.averages import Averages
from fastswa.averaging.ensembles import LatestAverage
from fastswa.averaging.rules import ema, equal
from fastswa.averaging.swag import SWAG
from fastswa.callbacks.swa import EMACB
from fastswa.checkpoint.checkpoint import CheckpointCB
from helpers import AtEpoch, TiedNet, copied, floats, learner, net, reopened, same


def walked(model=None, steps=7, **options):
    "A model after a random walk, and its averages, of which one is called 'ema'"
    model = TiedNet(norm=True) if model is None else model
    averages,g = Averages(model),torch.Generator().manual_seed(0)
    averages.add('ema', ema(0.8), **options)
    for _ in range(steps):
        with torch.no_grad():
            for t in {t.data_ptr(): t for t in floats(model).values()}.values():
                t += torch.rand(t.shape, generator=g, dtype=torch.float64).to(t)
        averages.step()
    return model, averages


def mixed(raw, average, lam): return (1 - lam)*raw.detach().double() + lam*average.detach().double()


@pytest.mark.parametrize('lam', [0.5, 0.1, 0.9, 1.25, -0.5, 1e-3, 0, 1])
def test_a_blend_in_float64(lam):
    "Wrong: lam and 1 - lam exchanged; a variance that extrapolation made negative"
    model,averages = walked()
    averages.blend('ema', lam, name='mix')
    for k, v in averages.weights('mix').items():
        share = min(max(lam, 0), 1) if 'running' in k else lam
        exact = mixed(averages.weights('raw')[k], averages.weights('ema')[k], share)
        torch.testing.assert_close(v.double(), exact, rtol=1e-6, atol=1e-6, msg=k)
    assert averages.weights('mix')['norm.running_var'].min() > 0


KINDS = dict(fp32=({}, {}), transposed=(dict(tied='transposed'), {}), fp64=(dict(dtype=torch.float64), {}),
             wide=({}, dict(dtype=torch.float64)), narrow=({}, dict(dtype=torch.bfloat16)),
             bf16=(dict(dtype=torch.bfloat16), {}), part=({}, dict(include=['a.*'])))


@pytest.mark.parametrize('kind', KINDS)
def test_both_ends_are_exact(kind):
    "Wrong: a blend that is narrower than the weights or the average, or in which -0. becomes 0."
    net_options,options = KINDS[kind]
    model,averages = walked(TiedNet(norm=True, **net_options), **options)
    with torch.no_grad(): model.a.bias[0] = -0.
    raw,average = averages.weights('raw'),averages.weights('ema')
    none,whole = averages.blend('ema', 0).weights,averages.blend('ema', 1).weights
    assert list(none) == list(whole) == list(average)
    for k in average:
        assert torch.equal(none[k].double(), raw[k].double()) and torch.equal(whole[k].double(), average[k].double()), k
    assert math.copysign(1, none['a.bias'][0]) == -1
    if 'b.weight' in none: assert none['b.weight'].shape == model.b.weight.shape


def test_what_cannot_move_is_taken_as_it_is():
    "Wrong: infinity minus infinity, as in a mask"
    model = nn.Sequential(nn.Linear(2, 2))
    model.mask = nn.Parameter(torch.tensor([0., -math.inf]), requires_grad=False)
    model,averages = walked(model)
    for lam in 0.5, 1.5: assert averages.blend('ema', lam).weights['mask'].tolist() == model.mask.tolist()
    model.requires_grad_(False)            # as for serving, when nothing tells a mask from the weights
    for lam in 0.5, 1.5: assert averages.blend('ema', lam).weights['mask'].tolist() == model.mask.tolist()


def test_it_stands_still_and_is_made_anew():
    "Wrong: a view that follows; a second one of the same name that is refused, or the first one again"
    model,averages = walked()
    first = copied(averages.blend('ema', 0.5).weights)
    with torch.no_grad(): model.a.weight += 1
    averages.step()
    assert same(copied(averages.weights('ema@0.5')), first) and averages['ema@0.5'].n == averages['ema'].n - 1
    averages.begin()
    assert same(copied(averages.weights('ema@0.5')), first)
    averages.blend('ema', 0.5)
    exact = mixed(model.a.weight, averages.weights('ema')['a.weight'], 0.5)
    torch.testing.assert_close(averages.weights('ema@0.5')['a.weight'].double(), exact)
    assert list(averages) == ['ema', 'ema@0.5']
    with pytest.raises(RuntimeError, match='stands still: averages.blend makes one'): averages.take('ema@0.5')


def test_the_raw_weights_are_those_behind_what_is_held():
    "Wrong: a blend of the average with itself, because the model holds it"
    model,averages = walked()
    free = copied(averages.blend('ema', 0.25).weights)
    averages.apply('ema')
    assert same(copied(averages.blend('ema', 0.25).weights), free)
    with averages.using('ema@0.25'): assert same(copied(averages.blend('ema', 0.25, name='other').weights), free)


def test_one_that_the_model_holds_is_made_anew_there_too():
    model,averages = walked()
    raw = copied(floats(model))
    averages.blend('ema', 0.5, name='mix')
    averages.apply('mix')
    new = averages.blend('ema', 2., name='mix')
    assert averages.held == 'mix' and torch.equal(model.a.weight, new.weights['a.weight'])
    averages.restore()
    assert same(copied(floats(model)), raw)


def test_statistics_fit_the_blend():
    "Wrong: those that a state has for another blend of the same name, or that were known of the one before"
    def tested(averages, name): return copied(averages.module(name, bn_data=list(xs)).state_dict())
    model,xs = net(),torch.randn(4, 16, 3, generator=torch.Generator().manual_seed(1))
    averages = walked(model)[1]
    averages.blend('ema', 0.25, name='mix')
    quarter = tested(averages, 'mix')
    again = net()
    other = Averages(again)
    other.add('ema', ema(0.8))
    again.load_state_dict(model.state_dict())
    other.load_state_dict(reopened(averages.state_dict()))
    other.blend('ema', 0.75, name='mix')
    averages.blend('ema', 0.75, name='mix')
    three = tested(averages, 'mix')
    for k in three: torch.testing.assert_close(tested(other, 'mix')[k], three[k], rtol=0, atol=0, msg=k)
    assert not torch.equal(three['1.running_mean'], quarter['1.running_mean'])


@pytest.mark.parametrize('make', [lambda m: LatestAverage(m, 3), lambda m: SWAG(m, rank=2)], ids=['latest', 'swag'])
def test_blends_of_other_averages_and_of_blends(make):
    model,averages = walked()
    averages.add('other', make(model))
    for _ in range(4): averages.step()
    averages.blend('other', 0.5)
    averages.blend('other@0.5', 0.5, name='quarter')
    exact = mixed(model.a.weight, averages.weights('other')['a.weight'], 0.25)
    torch.testing.assert_close(averages.weights('quarter')['a.weight'].double(), exact)


def test_saved_and_loaded():
    "Wrong: a state that cannot be loaded since nobody made the blends before; one that loses them"
    model,averages = walked(dtype=torch.float64, include=['a.*', 'norm*'])
    averages.blend('ema', 0.5)
    averages.blend('ema@0.5', 1.5, name='mix')
    state = reopened(averages.state_dict())
    new,other = walked(TiedNet(norm=True), steps=2, dtype=torch.float64, include=['a.*', 'norm*'])
    other.blend('ema', 0.1, name='mix')
    other.blend('ema', 0.1)
    other.load_state_dict(state)
    assert sorted(other) == ['ema', 'ema@0.1', 'ema@0.5', 'mix']      # what is only here stays
    for name in averages: assert same(copied(other.weights(name)), copied(averages.weights(name))), name
    assert repr(other['mix']) == repr(averages['mix'])
    copies = copy.deepcopy(averages)
    assert same(copied(copies.weights('mix')), copied(averages.weights('mix')))


def test_a_loaded_one_lies_where_its_average_is_kept():
    "Wrong: on the model's device, though the average is kept elsewhere, as where a GPU is full"
    model,averages = walked(nn.Linear(2, 1))
    averages.blend('ema', 0.5)
    averages.blend('ema@0.5', 0.5, name='mix')
    other = Averages(nn.Linear(2, 1))
    other.add('ema', ema(0.8), device='meta')
    other.load_state_dict(averages.state_dict())
    assert {t.device.type for name in other for t in other.weights(name).values()} == {'meta'}


def test_in_a_learner(tmp_path):
    "Rows, predictions, a module, a file, a checkpoint; the next fit begins from the raw weights and without it"
    learn = learner(EMACB(0.9, valid=False, apply=False))
    learn.fit(2)
    learn.averages.blend('ema', 0.5)
    assert [row['weights'] for row in learn.validate()] == ['raw', 'ema@0.5']
    raw,average = learn.averages.weights('raw'),learn.averages.weights('ema')
    by_hand = net()
    by_hand.load_state_dict(dict(learn.model.state_dict(), **{k: torch.lerp(raw[k], average[k], 0.5) for k in average}))
    xb = torch.cat([x for x, _ in learn.dls.valid])
    torch.testing.assert_close(learn.get_preds(weights='ema@0.5')[0], by_hand.eval()(xb))
    torch.testing.assert_close(learn.module('ema@0.5')(xb), by_hand(xb))
    learn.export(tmp_path/'blend.safetensors', weights='ema@0.5')
    learn.save(tmp_path/'run.pt')
    other = learner(EMACB(0.9, valid=False, apply=False))
    other.load(tmp_path/'run.pt')
    assert same(copied(other.averages.weights('ema@0.5')), copied(learn.averages.weights('ema@0.5')))
    learn.apply('ema@0.5')
    learn.fit(1)
    assert list(learn.averages) == ['ema'] and learn.weights == 'raw'


def test_made_in_a_fit_it_survives_a_resumed_run(tmp_path):
    "Wrong: the checkpoint cannot be resumed, as no callback makes the blend before it is loaded"
    class Blending(AtEpoch):
        def __init__(self): super().__init__(1, lambda learn: learn.averages.blend('ema', 0.5, name='mix'))
    def run(**kw):
        learn = learner(Blending(), EMACB(0.9), CheckpointCB(tmp_path/'run', keep=None))
        learn.fit(4, **kw)
        return learn
    whole = run()
    for p in sorted((tmp_path/'run').glob('*.pt'))[-2:]: p.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = run(resume=tmp_path/'run')
    assert same(copied(again.averages.weights('mix')), copied(whole.averages.weights('mix')))
    assert again.history == whole.history and any(row['weights'] == 'mix' for row in whole.history)


@pytest.mark.parametrize('lam', [math.nan, math.inf, '0.5', None, True])
def test_what_is_no_number(lam):
    with pytest.raises(ValueError, match=f'lam must be a number; got {lam!r}'): walked()[1].blend('ema', lam)


def test_bad_names_and_empty_averages():
    averages = walked()[1]
    averages.add('swa', equal())
    with pytest.raises(RuntimeError, match='empty'): averages.blend('swa', 0.5)
    with pytest.raises(ValueError, match="no weights called 'emma'; there are raw, ema"): averages.blend('emma', 0.5)
    for f in averages.take, averages.remove, lambda name: averages.blend(name, 0.5):
        with pytest.raises(ValueError, match="'raw' are the model's own weights and no average; there are ema, swa"):
            f('raw')
    for name in 'ema', 'swa':
        with pytest.raises(ValueError, match='two averages are called'): averages.blend('ema', 0.5, name=name)
    with pytest.raises(ValueError, match="an average needs a name without '/'"): averages.blend('ema', 0.5, name='a/b')
    assert list(averages) == ['ema', 'swa']
