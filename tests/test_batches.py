"What a batch is: containers and objects of other libraries, moved, counted and split by one set of rules"
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from fastswa.averaging.batchnorm import update_bn
from fastswa.callbacks.basics import DeviceCB
from fastswa.callbacks.swa import BNUpdateCB, EMACB
from fastswa.core import batch_size, batch_targets, first_tensor, map_tensors, tensors_in, to_cpu, to_device
from fastswa.data.loaders import DataLoaders
from fastswa.training.learner import Learner, TrainCB, TrainLearner
from helpers import learner, linear, regression


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
