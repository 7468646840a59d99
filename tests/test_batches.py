"What a batch is: containers and objects of other libraries, moved, counted and split by one set of rules"
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field, fields
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import ChainDataset, DataLoader, DistributedSampler, IterableDataset, TensorDataset

import helpers
from fastswa.averaging.batchnorm import update_bn
from fastswa.callbacks.basics import DeviceCB
from fastswa.callbacks.early_stopping import EarlyStoppingCB
from fastswa.callbacks.metrics import FunctionMetric, MetricsCB
from fastswa.callbacks.progress import LogView, NotebookView, ProgressCB, TerminalView
from fastswa.callbacks.schedule import OneCycleCB
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.batches import batch_size, batch_targets, first_tensor, map_tensors, tensors_in, to_cpu, to_device
from fastswa.data.loaders import DataLoaders
from fastswa.random_state import set_epoch
from fastswa.training.events import Callback
from fastswa.training.learner import Learner, TrainCB, TrainLearner
from helpers import Hits, learner, linear, regression, reopened


@dataclass
class Output(OrderedDict):
    "Of the shape of a Hugging Face `ModelOutput`: a dict and a dataclass that keeps both alike and has no `update`"
    loss: torch.Tensor = None
    logits: torch.Tensor = None
    def __post_init__(self):
        for o in fields(self):
            if getattr(self, o.name) is not None: self[o.name] = getattr(self, o.name)
    def __setitem__(self, k, v):
        super().__setitem__(k, v)
        super().__setattr__(k, v)
    def update(self, *args, **kwargs): raise TypeError('no update')


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str = 'a'
    cached: object = field(default=None, init=False)


class Graphs:
    "An object of a library's own: moves itself in place, counts itself, knows its targets"
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.y)
    def to(self, device):
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


Point = namedtuple('Point', 'x y')
grad = torch.ones(4, 2, requires_grad=True)*2


@pytest.mark.parametrize('x', [
    Output(logits=grad), Sample(grad), SimpleNamespace(a=[grad]), Point(grad, None), {'deep': [(grad, 'id')]},
    torch.max(grad, 0), pack_sequence([grad, grad[:2]]), [Output(loss=grad.sum(), logits=grad)]],
    ids=lambda x: type(x).__name__)
def test_tensors_are_detached_in_any_container(x):
    "Wrong: a crash after training, another class, a field left out, or the container that went in changed"
    res = map_tensors(torch.Tensor.detach, x)
    assert type(res) is type(x) and res is not x
    assert not any(t.requires_grad for t in tensors_in(res)) and any(t.requires_grad for t in tensors_in(x))
    assert torch.equal(first_tensor(res), first_tensor(x))
    assert len(list(tensors_in(res))) == len(list(tensors_in(x)))


def test_a_model_output_stays_dict_and_dataclass():
    res = to_cpu(Output(logits=grad))
    assert res['logits'] is res.logits and not res.logits.requires_grad and list(res) == ['logits']


@pytest.mark.parametrize('x', [Graphs(torch.ones(3, 2), torch.ones(3)), pack_sequence([torch.ones(5, 3)]*3),
                               Sample(torch.ones(2)), [Graphs(torch.ones(3, 2), torch.ones(3))]],
                         ids=lambda x: type(x).__name__)
def test_objects_are_moved_by_their_own_rules(x):
    "Wrong: left where they are, or the loader's own object moved in place"
    def device(x):
        x = x[0] if isinstance(x, list) else x
        return getattr(x, 'data', getattr(x, 'x', None)).device.type
    assert device(to_device(x, 'meta')) == 'meta' and device(x) == 'cpu'


images = [torch.zeros(3, 5, 5)]*6
boxes = [dict(boxes=torch.zeros(2, 4), labels=torch.zeros(2))]*6


@pytest.mark.parametrize('batch, n', [
    ((images, torch.zeros(6)), 6),                              # images in a list, labels in a tensor
    ((tuple(images), tuple(boxes)), 6),                         # detection
    ((images[:1], boxes[:1]), 1),                               # its last batch
    (dict(pixel_values=images, labels=boxes), 6),
    ([dict(image=i, **b) for i, b in zip(images, boxes)], 6),   # a list of samples, as the data set gives them
    ([(i, b) for i, b in zip(images, boxes)], 6),
    (dict(step=torch.tensor(3), x=torch.zeros(5, 2)), 5),       # a scalar first
    (dict(id=['a', 'b'], path='f', x=torch.zeros(2, 3)), 2),    # texts first
    (((torch.zeros(4, 3), torch.zeros(4, 2)), torch.zeros(4)), 4),      # two inputs
    ((dict(a=torch.zeros(4, 3), b=torch.zeros(4)), dict(y=torch.zeros(4))), 4),
    ((pack_sequence([torch.ones(5, 3), torch.ones(4, 3), torch.ones(2, 3)]), torch.zeros(11)), 3),
    (Graphs(torch.ones(9, 2), torch.ones(3)), 3),               # 3 graphs of 9 nodes
    (Sample(torch.ones(7, 2)), 7), (SimpleNamespace(scale=2., x=torch.ones(7, 2)), 7),
    (Point(torch.ones(7, 2), images), 7), ((np.zeros((5, 2)), np.zeros(5)), 5), ([], 1), ('text', 1)],
    ids=lambda b: type(b).__name__)
def test_the_number_of_samples(batch, n):
    "Wrong: 3, the channels of an image, for a batch of 6"
    assert batch_size(batch) == n


class ListLearner(TrainLearner):
    "The mean of each image, times a weight"
    def predict(self): self.preds = torch.stack([x.mean() for x in self.batch[0]])*self.model.weight.squeeze()


def test_rows_count_the_images_of_a_list():
    "A batch of 6 images of loss 36 and one of a single image of loss 1; wrong: 18.5, each batch counting 3"
    dls = [([torch.full((3, 5, 5), 6.)]*6, torch.zeros(6)), ([torch.full((3, 4, 4), 1.)], torch.zeros(1))]
    learn = ListLearner(nn.Linear(1, 1, bias=False), SimpleNamespace(train=dls, valid=dls), F.mse_loss)
    nn.init.ones_(learn.model.weight)
    assert learn.validate()[0]['loss'] == pytest.approx((6*36 + 1)/7)


class Weighed(list):
    "Batches whose loader knows how many samples they stand for"
    def n_samples(self, batch): return int(batch[0].sum())


def test_the_loader_may_say_how_many_samples():
    "Batches of 2 rows that stand for 1 and 3 samples; wrong: the mean of the two losses"
    zeros = torch.zeros(2, 1)
    batches = Weighed([(torch.tensor([[1.], [0.]]), zeros), (torch.tensor([[3.], [0.]]), zeros)])
    learn = TrainLearner(nn.Linear(1, 1, bias=False), SimpleNamespace(train=None, valid=batches), F.mse_loss)
    nn.init.ones_(learn.model.weight)
    assert learn.validate()[0]['loss'] == pytest.approx((1*0.5 + 3*4.5)/4)


class ImageList(nn.Module):
    "The mean of each image of a list, normalised over the batch"
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
    def forward(self, images): return self.norm(torch.stack([x.mean()[None] for x in images]))


class BareLists(TrainLearner):
    "For batches that are bare lists of images"
    def predict(self): self.preds = self.model(self.batch)
    def get_loss(self): self.loss = self.preds.square().mean()


class Counted(list):
    "Batches of which the loader knows the samples"
    def n_samples(self, batch): return len(batch)


class NoTargets(MetricsCB):
    def targets(self, learn): return None


@pytest.mark.parametrize('bare', [False, True])
def test_images_of_many_sizes_without_targets(bare):
    """As `(images,)` nothing more is needed; as a bare list, a `predict` of one's own and `n_samples` of the loader

    Loss, metrics, statistics and predictions count each image once. Wrong: each batch counts the rows of an image."""
    g = torch.Generator().manual_seed(0)
    sizes = [(4, 5), (7, 3), (2, 9), (6, 6), (3, 3)]
    images = [torch.randn(3, h, w, generator=g) + i for i, (h, w) in enumerate(sizes)]
    lists = [images[:3], images[3:]]
    batches = Counted(lists) if bare else [(o,) for o in lists]
    cls = BareLists if bare else type('Own', (TrainLearner,), dict(get_loss=BareLists.get_loss))
    metric = NoTargets(first=FunctionMetric(lambda preds, y: preds[0, 0]))
    cbs = [metric, EMACB(apply=False), BNUpdateCB()]
    learn = cls(ImageList(), SimpleNamespace(train=batches, valid=batches), lr=0.1, cbs=cbs)
    learn.fit(1, lr=1e-9)
    means = torch.stack([x.mean() for x in images])
    ema = learn.module('ema').norm
    assert torch.allclose(ema.running_mean, means.mean()) and torch.allclose(ema.running_var, means.var())
    row, = learn.validate('ema')
    normed = (means - ema.running_mean)/(ema.running_var + ema.eps).sqrt()
    assert row['loss'] == pytest.approx(normed.square().mean().item(), rel=1e-4)
    assert row['first'] == pytest.approx((3*normed[0] + 2*normed[3]).item()/5, rel=1e-4)
    preds, _ = learn.get_preds('ema')
    assert torch.allclose(preds[:, 0], normed, rtol=1e-4) and 'ImageList' in repr(learn) and learn.summary()


def _same(batches, change, cls, **kw):
    torch.manual_seed(0)
    train, valid = ([change(x, y) for x, y in o] for o in (batches.train, batches.valid))
    dls = SimpleNamespace(train=train, valid=valid)
    steps = [TrainCB()] if cls is Learner else []
    model = nn.Sequential(linear(), nn.BatchNorm1d(1))
    learn = cls(Wrapped(model), dls, F.mse_loss, 0.1, [DeviceCB('cpu'), EMACB(apply=False), BNUpdateCB(), *steps])
    learn.fit(2)
    return learn.history


class Wrapped(nn.Module):
    "Takes a tensor, or an object that has it as `x`"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return self.model(x if torch.is_tensor(x) else x.x)


@pytest.mark.parametrize('cls', [TrainLearner, Learner])
@pytest.mark.parametrize('change', [
    lambda x, y: dict(image=x, label=y), lambda x, y: dict(label=y, image=x, id=['a']*len(x)), Point, Graphs,
    lambda x, y: SimpleNamespace(x=x, y=y)], ids=['dict', 'dict of three', 'namedtuple', 'object', 'namespace'])
def test_a_fit_takes_any_batch(change, cls):
    "Inputs and targets by name, or as the attributes of an object; wrong: KeyError(0), or another history"
    assert _same(regression(), change, cls) == _same(regression(), lambda x, y: (x, y), cls)


def test_dict_batches_of_from_dd():
    import datasets
    ds = datasets.Dataset.from_dict(dict(x=[[float(i), 1., 2.] for i in range(8)], label=[i % 3 for i in range(8)]))
    dd = datasets.DatasetDict(train=ds.with_format('torch'), test=ds.with_format('torch'))
    def run(as_tuple):
        torch.manual_seed(0)
        learn = learner(dls=DataLoaders.from_dd(dd, 4, as_tuple=as_tuple, shuffle=False), lr=0.1)
        learn.fit(1)
        return learn.history, learn.get_preds()[1].tolist()
    assert run(False) == run(True)


def test_a_dict_that_does_not_name_its_targets():
    learn = learner(dls=SimpleNamespace(train=[dict(x=torch.ones(4, 3), answer=torch.ones(4).long())], valid=None))
    with pytest.raises(KeyError, match='which of x, answer are the targets'): learn.fit(1)
    assert batch_targets(dict(x=torch.ones(2, 3))) == [] == batch_targets(torch.ones(2))


def test_statistics_of_packed_sequences_and_objects():
    "By `update_bn` itself, without a learner; wrong: the first field of the packed sequence, or a sample of a batch"
    class OnPacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
        def forward(self, p): return self.norm(p.data if hasattr(p, 'data') and not torch.is_tensor(p) else p.x)
    x = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    for batches in ([pack_sequence([x[:5], x[5:9]]), pack_sequence([x[9:]])], [Graphs(x[:4], x[:4]), Graphs(x[4:], x)]):
        model = OnPacked()
        update_bn(model, batches)
        assert torch.allclose(model.norm.running_mean, x.mean(0), atol=1e-6)
        assert torch.allclose(model.norm.running_var, x.var(0), atol=1e-6)


# --- predictions


def preds_of(model, batches, **kw):
    learn = TrainLearner(model, SimpleNamespace(train=None, valid=batches), F.mse_loss)
    learn.get_loss = lambda: None
    return learn.get_preds(**kw)


class Gives(nn.Module):
    "Gives what a function makes of its input"
    def __init__(self, f):
        super().__init__()
        self.f, self.w = f, nn.Parameter(torch.ones(()))
    def forward(self, x): return self.f(x)


x7 = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
sevens = [(x, x.mean((1, 2))) for x in x7.split((2, 2, 3))]


def test_predictions_of_different_lengths_are_a_list():
    "Wrong: an error after the whole pass"
    preds, targets = preds_of(Gives(lambda x: x), [(x7[:2], x7[:2]), (x7[2:, :4], x7[2:, :4])])
    assert [p.shape for p in preds] == [(2, 5, 3), (5, 4, 3)] and torch.equal(preds[1], targets[1])


def test_scalars_among_predictions_are_stacked():
    preds, _ = preds_of(Gives(lambda x: dict(logits=x, penalty=x.mean())), sevens)
    assert torch.equal(preds['logits'], x7)
    assert torch.allclose(preds['penalty'], torch.stack([x.mean() for x, _ in sevens]))
    assert preds_of(Gives(lambda x: x.mean()), sevens)[0].shape == (3,)


def test_lists_of_samples_follow_one_another():
    "As detection gives them, a dict for each image; wrong: the n-th images of all batches put together, others dropped"
    def boxes(x): return [dict(boxes=o[:i + 1]) for i, o in enumerate(x)]
    preds, _ = preds_of(Gives(boxes), sevens)
    assert [len(p['boxes']) for p in preds] == [1, 2, 1, 2, 1, 2, 3]
    names = [(x, [f'{i}' for i in range(len(x))]) for x, _ in sevens]
    assert preds_of(Gives(lambda x: x), names)[1] == ['0', '1', '0', '1', '0', '1', '2']


@pytest.mark.parametrize('cut', [(2, 2, 3), (2, 2, 2, 1)], ids=str)
def test_several_outputs_stay_so(cut):
    "Also two outputs of batches of two; a named tuple keeps its names"
    batches = [(x, x) for x in x7[:sum(cut)].split(cut)]
    preds, _ = preds_of(Gives(lambda x: (x, x*2)), batches)
    assert type(preds) is tuple and torch.equal(preds[1], x7*2)
    preds, _ = preds_of(Gives(lambda x: Point(x, x*2)), batches)
    assert type(preds) is Point and torch.equal(preds.y, x7*2)


@pytest.mark.parametrize('cls', [TrainLearner, Learner])
@pytest.mark.parametrize('change', [lambda x, y: x, lambda x, y: (x,), lambda x, y: dict(x=x)],
                         ids=['tensor', 'tuple', 'dict'])
def test_predictions_need_no_targets(cls, change):
    "Nor a validation loader; metrics and loss are empty. Wrong: an error of the loss"
    batches = regression()
    learn = cls(linear(), SimpleNamespace(train=batches.train), F.mse_loss, 0.1,
                [MetricsCB(hits=Hits())] + [TrainCB()]*(cls is Learner))
    preds, targets = learn.get_preds(dl=[change(x, y) for x, y in batches.valid])
    assert targets is None and torch.equal(preds, learn.model(torch.cat([x for x, y in batches.valid])).detach())
    with pytest.raises(ValueError, match='no validation loader'): learn.get_preds()
    (row,) = learn.validate(dl=[change(x, y) for x, y in batches.valid])
    if cls is TrainLearner: assert row['loss'] is None and row['hits'] is None


def test_predictions_by_an_average_for_other_batches():
    batches = regression()
    learn = TrainLearner(linear(), SimpleNamespace(train=batches.train), F.mse_loss, 0.1, EMACB(apply=False))
    learn.fit(1)
    preds, targets = learn.get_preds('ema', dl=(b for b in batches.valid))
    with learn.using('ema') as m: assert torch.equal(preds, m(torch.cat([x for x, y in batches.valid])).detach())
    rows = learn.validate(dl=(b for b in batches.valid))      # an iterator, for two rows
    assert [r['weights'] for r in rows] == ['raw', 'ema']
    assert rows[1]['loss'] == pytest.approx(F.mse_loss(preds, targets).item())
    for samples in (TensorDataset(torch.ones(4, 3), torch.ones(4, 1)), torch.ones(4, 3)):
        with pytest.raises(TypeError, match='gives batches.*gives samples'): learn.get_preds(dl=samples)


class Answers(MetricsCB):
    def targets(self, learn): return learn.batch['answer']


def test_where_the_targets_are_is_said_once():
    "An overridden `MetricsCB.targets` counts for predictions too, also behind another MetricsCB"
    class OnDicts(TrainLearner):
        def get_loss(self): self.loss = F.mse_loss(self.preds, self.batch['answer'])
    batches = [dict(x=x, answer=y) for x, y in regression().valid]
    learn = OnDicts(linear(), SimpleNamespace(train=batches, valid=batches), None, 0.1, [MetricsCB(), Answers()])
    assert torch.equal(learn.get_preds()[1], torch.cat([b['answer'] for b in batches]))


# --- epochs


class Sees(Callback):
    "The inputs of each epoch"
    def before_fit(self, learn): self.seen = {}
    def before_batch(self, learn):
        if learn.training: self.seen.setdefault(learn.epoch, []).append(learn.batch[0][:, 0].tolist())


class Streamed(IterableDataset):
    "Gives its samples in an order that the epoch decides"
    epoch = 0
    def set_epoch(self, epoch): self.epoch = epoch
    def __iter__(self):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return ((torch.full((3,), float(i)), torch.ones(1)) for i in order)


class InBatches(list):
    "A batch sampler that counts epochs"
    epoch = None
    def set_epoch(self, epoch): self.epoch = epoch


def distributed():
    ds = TensorDataset(torch.arange(8.)[:, None].repeat(1, 3), torch.ones(8, 1))
    return DataLoader(ds, 4, sampler=DistributedSampler(ds, 1, 0))


@pytest.mark.parametrize('make', [distributed, lambda: DataLoader(Streamed(), 4),
                                  lambda: DataLoader(ChainDataset([Streamed()]), 4)],
                         ids=['DistributedSampler', 'streamed', 'chained'])
def test_each_epoch_has_an_order_of_its_own(make, tmp_path):
    "As in torch's loop with `set_epoch`, and in a resumed fit; wrong: the same order each epoch"
    def by_hand(dl):
        for epoch in range(3):
            for part in (dl.sampler, *getattr(dl.dataset, 'datasets', [dl.dataset])):
                if hasattr(part, 'set_epoch'): part.set_epoch(epoch)
            yield [x[:, 0].tolist() for x, _ in dl]
    def run(n_epochs, **kw):
        sees = Sees()
        TrainLearner(linear(), SimpleNamespace(train=make()), F.mse_loss, 0.1, [sees, CheckpointCB(tmp_path)]).fit(
            n_epochs, **kw)
        return [sees.seen[i] for i in sees.seen]
    want = list(by_hand(make()))
    assert want[0] != want[1]
    assert run(2) == want[:2]
    assert run(3, resume=tmp_path) == want[2:]


def test_batch_samplers_are_told_too():
    batches = InBatches([[0, 1], [2, 3]])
    ds = TensorDataset(torch.ones(4, 3), torch.ones(4, 1))
    TrainLearner(linear(), SimpleNamespace(train=DataLoader(ds, batch_sampler=batches)), F.mse_loss).fit(3)
    assert batches.epoch == 2


# --- no loss, no batches, no validation


class NoEvalLoss(TrainLearner):
    "As detection models do: a loss in training, predictions in validation"
    def get_loss(self):
        if self.training: super().get_loss()


@pytest.mark.parametrize('view', [LogView, TerminalView, NotebookView])
def test_a_validation_without_a_loss_has_an_empty_cell(view, capsys):
    "Wrong: NaN, or the last training loss, by which `best=` and early stopping would go"
    learn = learner(EMACB(), MetricsCB(hits=Hits()), ProgressCB(plot=True, view=view), cls=NoEvalLoss)
    learn.fit(2)
    assert [r['loss'] is None for r in learn.history] == [False, True, True]*2 and learn.history[1]['hits'] > 0
    with pytest.raises(ValueError, match="'loss' has to be a number.*epoch 0 it is empty"):
        learner(EarlyStoppingCB(), cls=NoEvalLoss).fit(2)


@pytest.mark.parametrize('which', ['train', 'valid'])
def test_a_loader_of_length_0_is_found_before_training(which):
    "Wrong: 'has no length' by a schedule, or after an epoch of training"
    dls = helpers.data()
    setattr(dls, which, DataLoader(dls.train.dataset, 999, drop_last=True))
    learn = learner(OneCycleCB(), dls=dls)
    with pytest.raises(ValueError, match='loader has length 0: there are fewer samples'): learn.fit(1)
    assert learn.opt_steps == 0


def test_fits_without_validation():
    "`valid` may be None, or missing; an error only where a validation is asked for"
    for dls in (SimpleNamespace(train=regression().train), SimpleNamespace(train=regression().train, valid=None)):
        learn = TrainLearner(linear(), dls, F.mse_loss, 0.1, EMACB())
        learn.fit(2)
        assert [r['train'] for r in learn.history] == ['train']*2
        with pytest.raises(ValueError, match='no validation loader'): learn.validate()
        assert len(learn.validate(dl=regression().valid)) == 2


# --- functions as metrics


def f1(preds, targets):
    "Of class 1; it does not add up over batches"
    hits = ((preds.argmax(1) == 1) & (targets == 1)).sum()
    return 2*hits/((preds.argmax(1) == 1).sum() + (targets == 1).sum())


def test_functions_as_metrics():
    "Batches of 32, 32, 32, 4: a mean over samples, and what is called once an epoch; wrong: the mean of four values"
    def err(preds, targets): return (preds.argmax(1) != targets).float().mean()
    dls = helpers.data(100)
    learn = learner(MetricsCB(err, partial(F.cross_entropy, label_smoothing=0.1), number=lambda p, y: len(y),
                              f1=FunctionMetric(f1, over='epoch'), by_batch=FunctionMetric(f1)), dls=dls)
    learn.fit(1)
    row, (preds, y) = learn.history[-1], learn.get_preds()
    assert row['err'] == pytest.approx(err(preds, y).item()) and row['f1'] == pytest.approx(f1(preds, y).item())
    assert row['cross_entropy'] == pytest.approx(F.cross_entropy(preds, y, label_smoothing=0.1).item(), rel=1e-5)
    assert row['number'] == pytest.approx((3*32*32 + 4*4)/100) and row['by_batch'] != pytest.approx(row['f1'])
    with pytest.raises(ValueError, match='must return a number; got a tensor of shape .32,'):
        learner(MetricsCB(err=FunctionMetric(lambda p, y: p.argmax(1), over='batches')), dls=dls).validate()


@pytest.mark.parametrize('over', ['batches', 'epoch'])
def test_a_function_goes_on_within_an_epoch(over):
    torch.manual_seed(0)
    batches = [(torch.randn(n, 3), torch.randint(3, (n,))) for n in (5, 7, 2)]
    whole, part, rest = (FunctionMetric(F.cross_entropy, over) for _ in range(3))
    for b in batches: whole.update(*b)
    part.update(*batches[0])
    rest.load_state_dict(reopened(part.state_dict()))
    for b in batches[1:]: rest.update(*b)
    want = F.cross_entropy(*(torch.cat(o) for o in zip(*batches))).item()
    assert rest.compute().item() == whole.compute().item() == pytest.approx(want)


@pytest.mark.parametrize('result, said', [
    ({'a': 1.}, "{'a': 1.0}, a dict"), (None, 'None, a NoneType'), ('good', "'good', a str"),
    (object, 'object, a type'),
    (1j, 'a complex tensor'), (torch.ones(1, dtype=torch.complex64), 'a complex tensor')])
def test_a_metric_that_gives_no_number(result, said):
    "Wrong: torch's error about a dtype, which names no metric, or the real part of a complex number"
    def score(preds, targets): return result
    with pytest.raises(TypeError, match='score must return a number, or a tensor with one element; got ') as e:
        FunctionMetric(score).update(torch.ones(2), torch.ones(2))
    assert said in str(e.value)


def test_what_a_metric_may_give():
    for one in 2, 2., np.float32(2), np.array([2]), [2.], torch.tensor(2), torch.full((1, 1), 2.):
        metric = FunctionMetric(lambda preds, targets: one)
        metric.update(torch.ones(2), torch.ones(2))
        assert float(metric.compute()) == 2


@pytest.mark.parametrize('name', ['loader', 'dl'])
def test_the_epoch_passes_through_a_wrapper_of_a_loader(name):
    "Wrong: the sampler inside is never told, so that each epoch has the same order"
    class Wrapped:
        def __init__(self, dl): setattr(self, name, dl)
        def __iter__(self): return iter(getattr(self, name))
    sampler = SimpleNamespace(epoch=None)
    sampler.set_epoch = partial(setattr, sampler, 'epoch')
    set_epoch(Wrapped(Wrapped(SimpleNamespace(sampler=sampler))), 3)
    assert sampler.epoch == 3
