"Evaluation leaves no trace: buffers and attributes of layers, learner and callbacks, generators, batches, workers"
import gc
import itertools
import random
import warnings
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, Subset
from torch.utils.data import RandomSampler, TensorDataset
from torch.utils.data import dataloader

from fastswa import random_state
from fastswa.averaging.average import Average
from fastswa.averaging.averages import Averages
from fastswa.averaging.batchnorm import update_bn
from fastswa.averaging.rules import equal
from fastswa.callbacks.basics import BatchTransformCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.progress import LogView, ProgressCB
from fastswa.callbacks.swa import EMACB, SWACB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.random_state import generators_in, get_rng_state, set_rng_state
from fastswa.core import plain
from fastswa.training.events import Callback, CancelFitException
from fastswa.training.learner import Learner, TrainCB, TrainLearner
from fastswa.training.sandbox import keep_learner, sandbox
from helpers import copied, end_workers, image_learner, reopened, same

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def loaders(train=None, n=32):
    if train is None: train = DataLoader(TensorDataset(X[:n], Y[:n]), 8, shuffle=True)
    return SimpleNamespace(train=train, valid=DataLoader(TensorDataset(X, Y), 16))


def run(*cbs, look=None, layer=nn.Identity, dls=None, cls=TrainLearner, fits=2):
    "The state after two fits, with a look between them; and that of the random numbers"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), layer(), nn.Linear(8, 1))
    learn = cls(model, dls() if dls else loaders(), F.mse_loss, 0.05, cbs)
    for i in range(fits):
        learn.fit(2)
        if look and i == 0: look(learn)
    learn.restore()
    return copied(learn.model.state_dict()) | dict(rng=torch.get_rng_state()), learn


def averaging():
    return EMACB(half_life='3ba'), SWACB(start='0ba', every='1ba', name='second'), BNUpdateCB(valid_batches=2)


# --- layers that write in a forward pass


class Peak(nn.Module):
    "An observer of quantisation, whose range moves in eval mode too"
    def __init__(self):
        super().__init__()
        self.register_buffer('peak', torch.ones(()))
    def forward(self, x):
        self.peak.lerp_(x.detach().abs().max(), 0.1)
        return x.clamp(-self.peak, self.peak)


class Replaced(nn.Module):
    "A hidden state as a buffer: none at first, then a new tensor each time"
    def __init__(self):
        super().__init__()
        self.register_buffer('hidden', None)
    def forward(self, x):
        before = 0 if self.hidden is None else self.hidden
        self.hidden = before + x.detach().mean(0)/10
        return x + self.hidden


class Hidden(nn.Module):
    "A hidden state that is no buffer, and is made at the first pass"
    def forward(self, x):
        self.hidden = getattr(self, 'hidden', 0) + x.detach().mean(0)/10
        return x + self.hidden


class Cooling(nn.Module):
    "A temperature that falls with the calls, as in Gumbel softmax; and a list in which it remembers them"
    def __init__(self):
        super().__init__()
        self.calls = []
    def forward(self, x):
        self.calls.append(len(x))
        return x*(1 + 1/len(self.calls))


class Codebook(nn.Module):
    "A codebook that follows its inputs, and an array of how often each code was used"
    def __init__(self):
        super().__init__()
        self.register_buffer('codes', torch.linspace(-1, 1, 5))
        self.used = np.zeros(5)
    def forward(self, x):
        nearest = (x.detach()[..., None] - self.codes).abs().argmin(-1)
        np.add.at(self.used, nearest.numpy().ravel(), 1)
        self.codes += 0.01*(nearest.flatten().bincount(minlength=5)/nearest.numel() - 0.2)
        return x + self.codes[nearest] + float(self.used[0])/1e4


class Spectral(nn.Module):
    "Spectral norm, whose power iteration goes on in train mode"
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    def forward(self, x): return self.layer(x)


class Shrinking(nn.Module):
    "A weight that shrinks with each use, behind autograd's back"
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
    def forward(self, x):
        self.weight.data *= 0.99
        return x*self.weight


class Nearing(nn.Module):
    "A codebook of parameters that moves towards its inputs, in train mode too"
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(8), requires_grad=False)
    def forward(self, x):
        with torch.no_grad(): self.codes.lerp_(x.mean(0), 0.1)
        return x + self.codes


LAYERS = Peak, Replaced, Hidden, Cooling, Codebook, Spectral, Shrinking, Nearing
LOOKS = dict(validate=lambda learn: learn.validate(), get_preds=lambda learn: learn.get_preds(),
             summary=lambda learn: learn.summary(), lr_find=lambda learn: learn.lr_find(show=False, max_steps=9),
             capture_preds=lambda learn: learn.capture_preds())


@cache
def by_hand(layer):
    "The same run as `run()`, as a loop: two epochs, twice"
    torch.manual_seed(0)
    model, dls = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), layer(), nn.Linear(8, 1)), loaders()
    opt = optim.SGD(model.parameters(), 0.05)
    for _ in range(4):
        model.train()
        for x, y in dls.train:
            F.mse_loss(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        with torch.no_grad():
            for x, y in dls.valid: model(x)
    return copied(model.state_dict()) | dict(rng=torch.get_rng_state())


@pytest.mark.parametrize('layer', LAYERS)
def test_rows_of_averages_and_their_statistics_leave_layers_alone(layer):
    "Wrong: an observer, a hidden state or a counter that has seen the batches of a row or of a pass for BatchNorm"
    res, learn = run(*averaging(), layer=layer)
    assert same(res, by_hand(layer)) and [r['weights'] for r in learn.history[1:4]] == ['raw', 'ema', 'second']


@pytest.mark.parametrize('look', LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize('layer', [Peak, Hidden, Cooling, Shrinking, Nearing])
def test_looks_by_hand_leave_layers_alone(layer, look): assert same(run(look=look, layer=layer)[0], by_hand(layer))


@pytest.mark.parametrize('layer', [Peak, Shrinking, Nearing])
def test_a_look_at_an_applied_average_leaves_the_raw_run_alone(layer):
    def look(learn):
        learn.apply('ema')
        learn.validate()
        learn.get_preds('raw')
        learn.lr_find(show=False, max_steps=5)
    assert same(run(*averaging(), look=look, layer=layer)[0], by_hand(layer))


@pytest.mark.parametrize('how', ['applied', 'using', 'alone'])
@pytest.mark.parametrize('layer', LAYERS)
def test_statistics_recomputed_by_hand(how, layer):
    "`update_bn` writes the statistics and nothing else; around it, everything is put back"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), layer(), nn.BatchNorm1d(8))
    model(X)
    averages = Averages(model)
    avg = averages.add('mean', equal())
    avg.update()
    before = copied(model.state_dict())
    attributes = {k: v for k, v in vars(model[1]).items() if k in ('calls', 'hidden')}
    if how == 'alone': update_bn(model, [X])
    else:
        with avg.applied() if how == 'applied' else averages.using('mean'): update_bn(model, [X])
    after = copied(model.state_dict())
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == ({'2.running_mean', '2.running_var'} if how == 'alone' else set())
    assert {k: v for k, v in vars(model[1]).items() if k in ('calls', 'hidden')} == attributes


# --- generators


class Noisy(Dataset):
    "Samples with noise from a function"
    def __init__(self, noise): self.noise = noise
    def __len__(self): return 32
    def __getitem__(self, i): return X[i] + torch.as_tensor(self.noise(), dtype=torch.float), Y[i]


class Slotted:
    __slots__ = ('rng',)
    def __init__(self): self.rng = np.random.default_rng(5)
    def __call__(self): return self.rng.normal(size=4)


class OfTheClass:
    rng = np.random.RandomState(3)
    def __call__(self): return self.rng.normal(size=4)


class Steps(IterableDataset):
    def __init__(self): self.rng = random.Random(2)
    def __iter__(self): return ((x + self.rng.random(), y) for x, y in zip(X, Y))


class OwnOrder(Sampler):
    def __init__(self): self.rng = np.random.default_rng(np.random.Philox(4))
    def __iter__(self): return iter(self.rng.permutation(32).tolist())
    def __len__(self): return 32


def jittered(scale, samples, g):
    xs, ys = map(torch.stack, zip(*samples))
    return xs + scale*torch.randn(xs.shape, generator=g), ys


GLOBAL = np.random.default_rng(6)


def from_global(): return GLOBAL.normal(size=4)


def closure():
    rng = random.Random(1)
    return lambda: [rng.gauss(0, 1) for _ in range(4)]


def over(noise): return DataLoader(Noisy(noise), 8)


SEEN = dict(
    numpy=lambda: over(partial(np.random.default_rng(0).normal, size=4)),
    bound=lambda: over(np.random.RandomState(0).standard_normal),
    closure=lambda: over(closure()), slots=lambda: over(Slotted()), of_the_class=lambda: over(OfTheClass()),
    of_the_notebook=lambda: over(from_global),
    subset=lambda: DataLoader(Subset(Noisy(closure()), range(0, 32, 2)), 8),
    concat=lambda: DataLoader(ConcatDataset([Subset(Noisy(Slotted()), range(8)), Noisy(closure())]), 8),
    iterable=lambda: DataLoader(Steps(), 8), sampler=lambda: DataLoader(TensorDataset(X, Y), 8, sampler=OwnOrder()),
    batch_sampler=lambda: DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(
        RandomSampler(X, generator=torch.Generator().manual_seed(1)), 8, False)),
    collate=lambda: DataLoader(TensorDataset(X, Y), 8, collate_fn=lambda b: jittered(0.1, b, g=collating)))
collating = torch.Generator()


def seeded(make):
    "The loaders of a run, with the generators that live as long as the process as at first"
    collating.manual_seed(0)
    GLOBAL.bit_generator.state = np.random.default_rng(6).bit_generator.state
    OfTheClass.rng.seed(3)
    return loaders(make())


@pytest.mark.parametrize('make', SEEN.values(), ids=SEEN)
def test_generators_are_found_and_put_back(make):
    "Wherever they are kept, and no warning: each row and each pass for BatchNorm draws, and the run goes on as without"
    plain, _ = run(dls=partial(seeded, make))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        res, _ = run(*averaging(), dls=partial(seeded, make), look=lambda learn: learn.validate())
    assert same(res, plain)


@pytest.mark.parametrize('make', [SEEN['numpy'], SEEN['sampler'], SEEN['closure']])
def test_a_look_in_the_midst_of_an_epoch(make):
    "The loader that is looked at is the one that is being read"
    class Look(Callback):
        def after_batch(self, learn):
            if learn.training and learn.iter == 1: learn.lr_find(show=False, max_steps=3)
    assert same(run(dls=partial(seeded, make))[0], run(Look(), dls=partial(seeded, make))[0])


@pytest.mark.parametrize('rng', [np.random.default_rng(0), np.random.Generator(np.random.MT19937(0)),
                                 np.random.Generator(np.random.SFC64(0)), np.random.Philox(0),
                                 np.random.RandomState(0), random.Random(0), torch.Generator().manual_seed(0)])
def test_states_go_through_a_file(rng):
    "Numbers of 128 bits and unsigned words among them, read with weights_only=True"
    def draw():
        if isinstance(rng, torch.Generator): return torch.rand((), generator=rng).item()
        if isinstance(rng, np.random.Philox): return rng.random_raw()
        return rng.normal() if hasattr(rng, 'normal') else rng.gauss(0, 1)
    draw()
    saved = reopened(plain(get_rng_state([rng])))
    expected = [draw() for _ in range(5)]
    set_rng_state(saved, [rng])
    assert [draw() for _ in range(5)] == expected


@pytest.mark.parametrize('cb', [
    lambda: BatchTransformCB(lambda b, rng=random.Random(0): (b[0] + rng.random(), b[1])),
    lambda: BatchTransformCB(partial(lambda b, rng: (b[0] + rng.normal(), b[1]), rng=np.random.default_rng(0)))])
def test_generators_of_callbacks(cb): assert same(run(cb())[0], run(*averaging(), cb())[0])


def tape():
    "Noise that cannot be wound back"
    values = np.random.default_rng(0).normal(size=(9999, 4)).tolist()
    return iter(values).__next__


def test_noise_that_cannot_be_put_back_is_warned_of_once():
    "The data is another when it is read again. In a plain run nothing is said, and nothing is read twice"
    reads = []
    class Hidden(Noisy):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)
    def dls(): return loaders(DataLoader(Hidden(tape()), 8))
    with pytest.warns(UserWarning, match='Hidden gives other batches when it is read again') as told:
        run(*averaging(), dls=dls, fits=1)
    assert len(told) == 1
    reads.clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run(dls=dls, fits=1)
    assert len(reads) == 64


class Halves(Noisy):
    "Samples with noise in a part of the data only, as the augmented half of joined data sets"
    def __getitem__(self, i): return super().__getitem__(i) if i > 20 else (X[i], Y[i])


@pytest.mark.parametrize('cls', [Noisy, Halves])
def test_such_noise_in_validation_data(cls):
    "Wrong: only the first batch is read again"
    def dls():
        res = loaders()
        res.valid = DataLoader(cls(tape()), 8)
        return res
    with pytest.warns(UserWarning, match=f'{cls.__name__} gives other batches'): run(EMACB(), dls=dls, fits=1)


class Jitter:
    def __init__(self): self.noise = tape()
    def __call__(self, x): return x + torch.tensor(self.noise())


class Transformed(Dataset):
    def __init__(self, transform): self.transform = transform
    def __len__(self): return 32
    def __getitem__(self, i): return self.transform(X[i]), Y[i]


def images():
    "Samples that are arrays, and collated with noise"
    noise = tape()
    def collate(samples): return tuple(torch.stack([*map(torch.as_tensor, o)]) + noise()[0] for o in zip(*samples))
    return DataLoader([(x.numpy(), y.numpy()) for x, y in zip(X, Y)], 8, collate_fn=collate)


@pytest.mark.parametrize('name, make, cb', [
    ('Transformed or Jitter', lambda: DataLoader(Transformed(Jitter()), 8), None),
    ('Transformed or Jitter', lambda: DataLoader(Subset(Transformed(Jitter()), range(16)), 8), None),
    ('collate', images, None),
    ('BatchTransformCB', None, lambda noise: BatchTransformCB(lambda b: (b[0] + torch.tensor(noise()), b[1])))])
def test_the_warning_names_whose_noise_it_is(name, make, cb):
    cbs = () if cb is None else (cb(tape()),)
    with pytest.warns(UserWarning, match=f'^{name} gives other batches') as told:
        run(*averaging(), *cbs, dls=lambda: loaders(make and make()), fits=1)
    assert len(told) == (2 if cb else 1)      # a callback makes something of validation data, too


def test_data_with_missing_values_is_no_random_data():
    x = X.clone()
    x[0, 0] = float('nan')
    loss = lambda preds, y: preds.nan_to_num().square().mean()
    batches = [(x[:8], Y[:8]), (x[8:], Y[8:])]
    learn = TrainLearner(nn.Linear(4, 1), SimpleNamespace(train=batches, valid=batches), loss, 0., EMACB(
        check_finite=False))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)


def test_the_walk_ends():
    "Through circles, and in data of millions of samples"
    a, b = SimpleNamespace(), SimpleNamespace()
    a.b, b.a, b.rng = b, a, random.Random(0)
    a.samples = [object()]*3_000_000
    assert generators_in(a) == [b.rng]
    assert generators_in(itertools.count(), torch, random, np.random, lambda: random.random() + np.random.rand()) == []


# --- what learner and callbacks remember


class Anneals(TrainLearner):
    "A weight in the loss that rises with the batches: counted, in a list and in a tensor"
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.seen, self.calls, self.beta = 0, [], torch.zeros(())
    def predict(self):
        super().predict()
        self.seen += 1
        self.calls.append(len(self.preds))
        self.beta += 0.01
    def get_loss(self):
        super().get_loss()
        self.loss = self.loss + (self.seen + len(self.calls))/100*self.beta*self.preds.square().mean()


class AnnealsCB(TrainCB):
    seen = 0
    def get_loss(self, learn):
        super().get_loss(learn)
        self.seen += 1
        learn.loss = learn.loss + self.seen/100*learn.preds.square().mean()


class RampCB(Callback):
    "Noise that grows with the batches"
    role, scale = 'prepares', None
    def before_batch(self, learn):
        self.scale = 0.01 + (self.scale or 0)
        learn.batch = learn.batch[0]*(1 + self.scale), learn.batch[1]


@cache
def counted(make, *averages, look=None):
    cbs, cls = make()
    return run(*cbs, *averages, cls=cls, look=look)


@pytest.mark.parametrize('make', [lambda: ((), Anneals), lambda: ((AnnealsCB(),), Learner),
                                  lambda: ((RampCB(),), TrainLearner)])
@pytest.mark.parametrize('look', [None, *LOOKS.values()], ids=['none', *LOOKS])
def test_counters_of_learner_and_callbacks(make, look):
    (plain, learn), (res, other) = counted(make), counted(make, *averaging(), look=look)
    assert same(res, plain)
    if type(learn) is Anneals:
        assert (learn.seen, learn.calls, learn.beta) == (other.seen, other.calls, other.beta)


def test_what_callbacks_make_of_a_row_stays():
    "Only what the batches wrote is undone, not what was found out about the row"
    class Best(Callback):
        def __init__(self): self.rows = []
        def after_epoch(self, learn):
            self.rows.append(learn.weights)
            if learn.weights == 'ema': learn.ema_loss = learn.history[-1]['loss']
    best = Best()
    _, learn = run(EMACB(), best, fits=1)
    assert learn.ema_loss == learn.history[-1]['loss'] and best.rows == ['raw', 'raw', 'ema']*2


# --- batches as the model gets them


class NoisifyCB(TrainCB):
    "As the course's DDPMCB: no role, the batch becomes ((noised, t), noise)"
    def before_batch(self, learn):
        x, _ = learn.batch
        t, noise = torch.rand(len(x), 1), torch.randn(x.shape)
        learn.batch = (x*(1 - t) + 5*t*noise, t), noise
    def predict(self, learn): learn.preds = learn.model(*learn.batch[0])


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.lin = nn.BatchNorm1d(4), nn.Linear(5, 4)
    def forward(self, x, t): return self.lin(torch.cat([self.bn(x), t], 1))


def denoising(*cbs):
    torch.manual_seed(0)
    learn = Learner(Denoiser(), loaders(), F.mse_loss, 0.05, [NoisifyCB(), *cbs])
    learn.fit(2)
    return learn


def test_a_callback_that_replaces_the_batch_without_saying_so():
    "Statistics are those of the noised inputs, whose variance is about 9; of the clean ones it is 1"
    learn = denoising(EMACB(), BNUpdateCB())
    assert learn.weights == 'ema' and (learn.model.bn.running_var > 4).all()
    assert '|lin|Linear|(1, 5)|(1, 4)|' in learn.summary()
    learn.restore()
    assert same(copied(learn.model.state_dict()), copied(denoising().model.state_dict()))


# --- the forward of training


class TopK(nn.Module):
    "A head that sees a sample in training and all in evaluation, as region proposals are"
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
    def forward(self, x): return self.bn(x.topk(4, dim=0)[0] if self.training else x)


def test_statistics_are_those_of_the_training_path():
    "torch's update_bn, whose mean of batch means is exact where batches are of one size"
    m, theirs = TopK().train(), TopK().train()
    batches = [torch.randn(100, 3, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    update_bn(m, batches)
    optim.swa_utils.update_bn(batches, theirs)
    torch.testing.assert_close(m.bn.running_mean, theirs.bn.running_mean)
    assert (m.bn.running_mean > 1.5).all()


class WithTargets(nn.Module):
    "Losses in training, predictions in evaluation; targets are needed for the former"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    def forward(self, x, y=None): return dict(mse=F.mse_loss(self.net(x), y)) if self.training else self.net(x)


class Detects(TrainLearner):
    def predict(self):
        if self.training: self.loss = sum(self.model(*self.batch).values())
        else: self.preds = self.model(self.batch[0])
    def get_loss(self):
        if not self.training: super().get_loss()


def test_losses_in_training_and_predictions_in_evaluation():
    torch.manual_seed(0)
    learn = Detects(WithTargets(), loaders(), F.mse_loss, 0.05, [EMACB(), BNUpdateCB()])
    learn.fit(1)
    bn, x = learn.model.net[1], learn.model.net[0](X).detach().double()
    torch.testing.assert_close(bn.running_mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bn.running_var.double(), x.var(0), rtol=1e-5, atol=1e-6)


def test_models_that_need_targets_in_training():
    "By default a model gets the first element of a tuple; the error says how it gets all of them"
    model = WithTargets()
    with pytest.raises(Exception) as e: update_bn(model, [(X, Y)])
    if hasattr(e.value, 'add_note'): assert 'forward=lambda m, b: m(*b) gives it all' in e.value.__notes__[0]
    update_bn(model, [(X, Y)], forward=lambda m, b: m(*b))
    torch.testing.assert_close(model.net[1].running_mean, model.net[0](X).mean(0))


class Attends(nn.Module):
    "Dropout that is no layer: a number of torch's attention and recurrent layers, and one of the module itself"
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.5
        self.attention = nn.MultiheadAttention(4, 1, dropout=0.5, batch_first=True)
        self.rnn = nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.bn = nn.BatchNorm1d(4)
    def forward(self, x):
        x = F.dropout(x[:, None], self.drop_prob, self.training)
        return self.bn(self.rnn(self.attention(x, x, x)[0])[0][:, 0])


def test_dropout_that_is_a_number_is_off():
    torch.manual_seed(0)
    model = Attends()
    rng = torch.get_rng_state()
    update_bn(model, [X])
    assert torch.equal(torch.get_rng_state(), rng)
    assert (model.drop_prob, model.attention.dropout, model.rnn.dropout) == (0.5, 0.5, 0.5)
    x, seen = X[:, None], []
    model.bn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.eval()(X)
    torch.testing.assert_close(model.bn.running_mean, seen[0].mean(0), rtol=1e-4, atol=1e-5)


def test_frozen_layers_stay_frozen_after_a_load(tmp_path):
    "In a learner that has not trained yet, too"
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model[1].eval()
        return TrainLearner(model, loaders(), F.mse_loss, 0.05, [EMACB(decay=0.9, apply=False), BNUpdateCB()])
    learn = make()
    learn.fit(1)
    learn.save(tmp_path/'a.pt')
    other = make()
    other.load(tmp_path/'a.pt')
    other.averages['ema'].update()          # so that what was saved fits no more
    other.apply('ema')
    assert torch.equal(other.model[1].running_mean, torch.zeros(4)) and not other.model[1].training
    assert (other.model[3].running_mean != 0).all()


# --- layers that derive something when the mode changes


class Merges(nn.Linear):
    "As LoRA: the product is added to the weight in `train(False)`, and taken out of it in `train(True)`"
    def __init__(self):
        super().__init__(8, 8)
        self.weight.requires_grad_(False)
        self.merged, self.a, self.b = False, nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2)/4)
    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data.add_(self.b @ self.a, alpha=-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)
    def forward(self, x): return super().forward(x) + (0 if self.merged else x @ self.a.T @ self.b.T)


class Caches(nn.Linear):
    "The weight it uses in eval mode is computed when it gets there"
    cached = None
    def __init__(self): super().__init__(8, 8)
    def train(self, mode=True):
        self.cached = None if mode else self.weight.detach().tanh()
        return super().train(mode)
    def forward(self, x): return F.linear(x, self.weight.tanh() if self.cached is None else self.cached, self.bias)


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('layer', [Merges, Caches])
def test_rows_of_averages_of_layers_that_derive(layer, frozen):
    "The row is that of a plain model with the average's weights, whatever the mode, and where the layer is frozen"
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), layer(), nn.Linear(8, 1))
    model = make()
    if frozen: model[1].eval()
    cb = EMACB(decay=0.8, apply=False)
    learn = TrainLearner(model, loaders(), F.mse_loss, 0.05, cb)
    learn.fit(3)
    plain = make()
    plain.load_state_dict(cb.average.weights)
    with torch.no_grad(): assert learn.history[-1]['loss'] == pytest.approx(F.mse_loss(plain(X), Y).item(), rel=1e-5)
    assert [m.training for m in model.modules()] == [True, True, not frozen, True]
    for mode in (True, False):
        model.train(mode)
        before = copied(model.state_dict())
        learn.apply('ema')
        with torch.no_grad(): torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)
        learn.restore()
        for k, v in model.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=1e-6, atol=1e-6)


# --- workers


def test_workers_of_evaluation_live_as_long_as_the_fit(monkeypatch):
    "Three epochs start as many pools of workers as two; after the fit, only the run's own are alive"
    started = []
    class Counted(dataloader._MultiProcessingDataLoaderIter):
        def __init__(self, loader):
            started.append(loader)
            super().__init__(loader)
    monkeypatch.setattr(dataloader, '_MultiProcessingDataLoaderIter', Counted)
    def dls(): return SimpleNamespace(**{k: DataLoader(TensorDataset(X, Y), 8, shuffle=k == 'train', num_workers=1,
                                                       persistent_workers=True) for k in ('train', 'valid')})
    def fit(n, *cbs):
        torch.manual_seed(0)
        started.clear()
        learn = TrainLearner(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), dls(), F.mse_loss,
                             0.05, cbs)
        learn.fit(n)
        learn.restore()
        alive = [dl for dl in started if dl._iterator is not None]
        assert {id(dl) for dl in alive} == {id(learn.dls.train), id(learn.dls.valid)}
        end_workers(learn.dls)
        return len(started), copied(learn.model.state_dict())
    plain, weights = fit(3)
    assert plain == 2
    n, averaged = fit(3, EMACB(), BNUpdateCB())
    assert n == fit(2, EMACB(), BNUpdateCB())[0] <= 5 and same(averaged, weights)


@pytest.mark.parametrize('silent, quiet', [(False, False), (False, True), (True, False)])
def test_a_long_pass_shows_how_far_it_is(silent, quiet, monkeypatch):
    "A bar over its batches when an average is applied, in a terminal or a notebook; not in a log, not if quiet"
    import tqdm
    from fastswa.callbacks.progress import LogView, TerminalView
    monkeypatch.setattr('fastswa.callbacks.batchnorm.find_view', LogView if silent else TerminalView)
    bars = []
    def bar(batches, desc, total, *, delay, disable, **kw):
        bars.append((desc, total, disable))
        assert delay > 0          # short passes show nothing
        return batches
    monkeypatch.setattr(tqdm, 'tqdm', bar)
    _, learn = run(EMACB(), BNUpdateCB(n_batches=3), fits=1)
    bars.clear()
    learn.quiet = quiet
    learn.averages['ema'].load_state_dict(learn.averages['ema'].state_dict())
    learn.apply('ema')
    assert bars == [('BatchNorm statistics', 3, silent or quiet)]


def test_a_look_from_a_loop_over_what_the_learner_keeps():
    "A dict that is put back while it is iterated over would end the loop with an error"
    class Sweeps(TrainLearner):
        def sweep(self): return [self.validate(dl=dl)[0]['loss'] for dl in self.others.values()]
    learn = Sweeps(nn.Linear(4, 1), loaders(), F.mse_loss)
    learn.others = dict(a=[(X, Y)], b=[(X, Y*2)])
    expected = [F.mse_loss(learn.model(X), y).item() for y in (Y, Y*2)]
    assert learn.sweep() == pytest.approx(expected) and list(learn.others) == ['a', 'b']


def test_a_generator_that_a_callback_makes_when_the_fit_begins(tmp_path):
    "A resumed run goes on with its state"
    class Noise(Callback):
        role = 'prepares'
        def before_fit(self, learn): self.rng = np.random.default_rng(0)
        def before_batch(self, learn): learn.batch = learn.batch[0] + self.rng.normal(), learn.batch[1]
    class Stop(Callback):
        order = 99
        def after_batch(self, learn):
            if learn.training and (learn.epoch, learn.iter) == (1, 1): raise CancelFitException
    def fit(**kw):
        torch.manual_seed(0)
        learn = TrainLearner(nn.Linear(4, 1), loaders(), F.mse_loss, 0.05, Noise())
        learn.fit(2, **kw)
        return copied(learn.model.state_dict())
    whole = fit()
    fit(cbs=[Stop(), CheckpointCB(tmp_path)])
    assert same(fit(resume=tmp_path), whole)


# --- embeddings that renormalise their rows whenever these are looked up


class Looked(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        kind = nn.EmbeddingBag if how == 'bag' else nn.Embedding
        self.table = kind(5, 4, max_norm=None if how == 'function' else 1.)
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 1)
    def forward(self, i):
        if self.how == 'function': x = F.embedding(i, self.table.weight, max_norm=1.)
        else: x = self.table(i[:, None] if self.how == 'bag' else i)
        return self.out(self.norm(x))


def unnormalised(how):
    "A learner whose model has rows that are too long, as after a step"
    torch.manual_seed(0)
    i = torch.arange(20) % 5
    model, batch = Looked(how), (i, i[:, None].float())
    learn = TrainLearner(model, SimpleNamespace(train=[batch], valid=[batch]), F.mse_loss, 0.05)
    learn.averages.add('other', equal(), exclude='table.*')
    learn.averages.add('all', equal(), now=True)
    learn.averages.bn_data = [i]
    nn.init.constant_(model.table.weight, 3.)
    learn.averages.step()
    return learn, i


def look_inside(learn, name):
    with learn.using(name) as model: model.eval()(torch.arange(5))


RENORMS = LOOKS | dict(
    raw=lambda learn: look_inside(learn, 'raw'), average=lambda learn: look_inside(learn, 'all'),
    left_out=lambda learn: look_inside(learn, 'other'), module=lambda learn: learn.module('all'))


@pytest.mark.parametrize('how', ['layer', 'bag', 'function'])
@pytest.mark.parametrize('look', [v for k, v in RENORMS.items() if k != 'capture_preds'],
                         ids=[k for k in RENORMS if k != 'capture_preds'])
def test_a_look_leaves_weights_alone_that_a_forward_pass_renormalises(look, how):
    learn, _ = unnormalised(how)
    before = copied(learn.model.state_dict())
    look(learn)
    assert same(copied(learn.model.state_dict()), before)


@pytest.mark.parametrize('how', ['layer', 'bag'])
def test_an_applied_average_is_not_taken_for_other_weights_when_it_is_used(how):
    "Wrong: a forward pass by hand counts as loading weights, so that the raw ones are dropped"
    learn, i = unnormalised(how)
    raw = copied(learn.model.state_dict())
    learn.apply('all')
    learn.model.eval()(i)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.restore()
    assert same(copied(learn.model.state_dict()), raw) and learn.averages['all'].n == 1


def test_statistics_are_recomputed_without_renormalising_for_good():
    learn, i = unnormalised('function')
    weight = learn.model.table.weight.detach().clone()
    update_bn(learn.model, [i])
    assert torch.equal(learn.model.table.weight, weight)


@pytest.mark.parametrize('how', ['layer', 'bag'])
def test_a_live_module_does_not_renormalise_its_average(how):
    learn, i = unnormalised(how)
    average = learn.averages['all']
    live, weights = average.live(), copied(average.weights)
    live(i)
    assert same(copied(average.weights), weights)
    nn.init.constant_(learn.model.table.weight, 1.)
    learn.averages.step()
    assert torch.equal(live.table.weight, average.weights['table.weight'])


# --- a context ends where its block is left


CONTEXTS = dict(keep=keep_learner, row=partial(keep_learner, row=True), sandbox=sandbox,
                training=partial(sandbox, train=True))


@pytest.mark.parametrize('make', CONTEXTS.values(), ids=CONTEXTS)
def test_a_sandbox_that_is_dropped_changes_nothing(make):
    "Wrong: loaders, weights and random state flip as it is collected, in the midst of what uses them by then"
    learn = TrainLearner(nn.Linear(4, 1), loaders(), nn.MSELoss(), 0.05)
    learn.fit(1)
    context = make(learn)
    context.__enter__()
    dls, cbs = learn.dls, learn.cbs
    with torch.no_grad(): learn.model.weight.fill_(7.)
    torch.rand(3)
    now = torch.get_rng_state()
    del context
    gc.collect()
    assert learn.dls is dls and learn.cbs is cbs and learn.model.weight.eq(7).all()
    assert torch.equal(torch.get_rng_state(), now)


@pytest.mark.parametrize('norm', [nn.BatchNorm1d(8), nn.LayerNorm(8)], ids=['buffers', 'none'])
@pytest.mark.parametrize('inside', ['error', 'restore', 'apply', 'both'])
@pytest.mark.parametrize('held', ['raw', 'ema'])
def test_a_sandbox_that_trains_puts_weights_back_whatever_was_called_inside(held, inside, norm):
    "Wrong: the raw weights that it keeps are let go of by what restores raw weights, so that the next fit trains them"
    torch.manual_seed(0)
    learn = TrainLearner(nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 1)), loaders(), nn.MSELoss(), 0.05,
                         EMACB(half_life='3ba', apply=False))
    learn.fit(1)
    raw = copied(learn.model.state_dict())
    if held == 'ema': learn.apply('ema')
    was = copied(learn.model.state_dict())
    with sandbox(learn, train=True):
        assert learn.weights == 'raw' and same(learn.model.state_dict(), raw)
        if inside in ('error', 'both'):
            with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stops())
        if inside in ('apply', 'both'):
            learn.averages.add('swa', equal()).update()
            learn.apply('swa')
        if inside != 'error': learn.restore()
        learn.fit(1)
        assert not same(learn.model.state_dict(), raw)
    assert learn.weights == held and same(learn.model.state_dict(), was)
    learn.restore()
    assert same(learn.model.state_dict(), raw)


class Stops(Callback):
    def after_step(self, learn): raise KeyboardInterrupt


class Prototypes(nn.Module):
    "A loss with parameters that it trains, and writes to in its forward pass, in eval mode too"
    def __init__(self, how):
        super().__init__()
        self.scale, self.how = nn.Parameter(torch.ones(1)), how

    def forward(self, preds, y):
        with torch.no_grad():
            if self.how == 'in place': self.scale.mul_(0.9)
            elif self.how == 'data': self.scale.data = self.scale*0.9 + 0.01*preds.mean()
            else: self.scale = nn.Parameter(self.scale*0.9, requires_grad=self.training)
        return F.mse_loss(preds*self.scale, y)


@pytest.mark.parametrize('look', [look for name, look in LOOKS.items() if name != 'summary'],
                         ids=[name for name in LOOKS if name != 'summary'])
@pytest.mark.parametrize('how', ['in place', 'data', 'replaced'])
@pytest.mark.parametrize('behind', [False, True])
@pytest.mark.filterwarnings('ignore:the model got parameters')
def test_parameters_of_a_loss_that_writes_to_them(look, how, behind):
    "Wrong: a prototype that has seen the batches of a look, whose loss is the next training's"
    crit = Prototypes(how)
    learn = TrainLearner(nn.Linear(4, 1), loaders(), (lambda p, y: crit(p, y)) if behind else crit, 0.05)
    scale, was = crit.scale, crit.scale.detach().clone()
    look(learn)
    assert crit.scale is scale and torch.equal(scale, was)
    learn.get_preds()
    learn.fit(1, valid=False)
    assert crit.scale < was


@pytest.mark.parametrize('how', ['in place', 'data'])
def test_rows_of_averages_leave_the_parameters_of_a_loss_alone(how):
    "Wrong: averages and their rows change the raw run by what the loss remembers"
    def fit(*cbs):
        torch.manual_seed(0)
        crit = Prototypes(how)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        learn = TrainLearner(model, loaders(), crit, 0.05, cbs)
        learn.fit(2)
        learn.restore()
        return copied(learn.model.state_dict()) | dict(scale=crit.scale.detach().clone())
    assert same(fit(), fit(*averaging()))


def test_an_epoch_looks_for_generators_in_as_much_as_any_other(monkeypatch, tmp_path, capsys):
    "Wrong: going through the rows of all epochs before, in the history, the table and the state for a checkpoint"
    found, looked_into, parts = [], [], random_state._parts
    monkeypatch.setattr(random_state, '_parts', lambda o: looked_into.append(type(o)) or parts(o))
    class Count(Callback):
        role = 'watches'
        def before_epoch(self, learn):
            if not learn.training: return
            found.append(len(looked_into))
            looked_into.clear()
    learn = image_learner(Count(), EMACB(), BNUpdateCB(), MetricsCB(), ProgressCB(view=LogView), CheckpointCB(tmp_path))
    learn.fit(12)
    assert found[5] == found[11] > 100
