"What a user sees at once, in a notebook or a shell: signatures, names, errors for arguments, what objects print as"
import builtins
import math
from functools import partial
from inspect import signature

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset

import fastswa.all
import helpers
from fastswa.averaging.rules import equal
from fastswa.callbacks.augment import AugmentCB
from fastswa.callbacks.basics import BatchTransformCB, SingleBatchCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.callbacks.schedule import BatchSchedCB
from fastswa.callbacks.steps import GradClipCB
from fastswa.callbacks.swa import AverageCB, EMACB, LAWACB, SWACB
from fastswa.callbacks.swa_variants import BEMACB, PostHocEMACB, SWADCB, SWAGCB, SwitchEMACB
from fastswa.checkpoint.checkpoint import CheckpointCB
from fastswa.data.loaders import DataLoaders
from fastswa.data.sources import toy_images
from fastswa.data.transforms import RandFlip
from fastswa.training.learner import Learner, TrainLearner
from helpers import Hits, in_new_process


@pytest.mark.parametrize('name', ['lr_find', 'save', 'load', 'export', 'summary', 'show_image_batch', 'capture_preds'])
def test_methods_of_other_rooms_show_their_signature(name):
    "Wrong: (*args, **kwargs)"
    method = getattr(Learner, name)
    first, *others = signature(method).parameters
    assert first == 'learn' and others != ['args', 'kwargs'] and method.__doc__
    assert [*signature(getattr(helpers.learner(), name)).parameters] == others


@pytest.mark.parametrize('make, says', [
    (lambda: EMACB(halflife='3ba'), 'EMACB has no argument halflife; did you mean half_life?'),
    (lambda: SWAGCB(ranks=3), 'SWAGCB has no argument ranks; did you mean rank?'),
    (lambda: SWACB(freq='1ep'), 'SWACB has no argument freq; there are start, every, swa_lr, '),
    (lambda: LAWACB(rule=equal()), 'LAWACB has no argument rule'),       # it has a rule of its own
    (lambda: SwitchEMACB(restart=True), 'SwitchEMACB has no argument restart')])
def test_an_argument_that_there_is_not(make, says):
    "Wrong: the base class takes the blame, or takes in silence what the signature does not show"
    with pytest.raises(TypeError) as e: make()
    assert says in str(e.value)


def test_signatures_show_every_argument():
    "Those of a base class too, and none that is not taken"
    for cls in AverageCB, EMACB, SWACB, LAWACB, SWAGCB, PostHocEMACB, SwitchEMACB, SWADCB, BEMACB:
        names = signature(cls).parameters
        assert {'name', 'apply', 'valid', 'include', 'device'} <= {*names} and 'kwargs' not in names
        cls(**{k: p.default for k, p in names.items()})


@pytest.mark.parametrize('cb, text', [
    (SingleBatchCB(), 'SingleBatchCB()'), (GradClipCB(norm=1.), 'GradClipCB(norm=1.0)'),
    (CheckpointCB('runs/a'), "CheckpointCB(path='runs/a')"),
    (AugmentCB(RandFlip()), 'AugmentCB(tfms=(RandFlip(p=0.5),))'),
    (MetricsCB(hits=Hits()), 'MetricsCB(hits)'), (BatchTransformCB(reversed), 'BatchTransformCB(tfm=reversed)'),
    (BatchSchedCB(partial(StepLR, step_size=list(range(99)))), 'BatchSchedCB(sched=partial)'),
    (SWACB('0.5dur'), "SWACB(equal(), start='0.5dur', every='0.01dur', name='swa')"),
    (LAWACB(3), "LAWACB(start='0ba', every='1ep', name='lawa')")])
def test_a_callback_prints_as_it_is_written(cb, text): assert repr(cb) == text


# --- learners, loaders, rows


def test_a_learner_prints_in_one_line():
    learn = helpers.learner(MetricsCB(hits=Hits()), EMACB())
    assert repr(learn) == ('TrainLearner(Sequential, 75 parameters, raw weights; '
                           'callbacks MetricsCB, EMACB; 0 epochs done)')
    learn.quiet = True
    learn.fit(2)
    learn.fit(1)
    assert repr(learn).endswith(', 75 parameters, ema weights; callbacks MetricsCB, EMACB; 3 epochs done)')
    lazy = nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(5))
    assert 'Sequential, 8 parameters, raw weights; callbacks none' in repr(TrainLearner(lazy))


def test_loaders_print_how_much_they_hold():
    class Stream(IterableDataset):
        def __iter__(self): return iter(range(5))
    dls = DataLoaders.in_memory(toy_images(40, 20), 16, device='cpu')
    assert repr(dls) == 'DataLoaders(train: 3 batches, 40 samples; valid: 1 batch, 20 samples)'
    assert repr(dls.train) == 'BatchLoader(40 images (1, 28, 28) on cpu, bs=16, shuffled)'
    assert repr(DataLoaders([1, 2])) == 'DataLoaders(train: 2 batches; valid: none)'
    assert repr(DataLoaders(DataLoader(Stream()), iter([1]))) == 'DataLoaders(train: DataLoader; valid: 1 batch)'


def test_validation_is_a_table_and_a_list_of_dicts():
    learn = helpers.learner(MetricsCB(hits=Hits()), EMACB())
    learn.quiet = True
    learn.fit(1)
    rows = learn.validate()
    assert isinstance(rows, list) and [r['weights'] for r in rows] == ['raw', 'ema'] and type(rows[0]) is dict
    header, *lines = repr(rows).splitlines()
    assert header.split() == ['hits', 'loss', 'epoch', 'train', 'weights'] and len(lines) == 2
    assert lines[1].split() == [f'{rows[1]["hits"]:.4g}', f'{rows[1]["loss"]:.4g}', '0', 'eval', 'ema']
    assert rows._repr_html_().count('<tr>') == 3


# --- what importing says


def test_large_libraries_are_imported_when_they_are_needed_and_without_a_warning():
    """Wrong: a second for the library `datasets` in each process that trains on something else, or one for TensorBoard
    where a run only may write to it; without ipywidgets, tqdm's warning, in red, of a bar that nothing here shows"""
    in_new_process("""
        import sys, types, warnings
        import fastswa.all as f
        f.TensorBoardCB('runs')
        large = {'datasets', 'huggingface_hub', 'matplotlib', 'pandas', 'pyarrow', 'scipy', 'tensorboard', 'tqdm.auto'}
        assert not large & {*sys.modules}, large & {*sys.modules}
        kernel = types.SimpleNamespace(config=dict(IPKernelApp={}), kernel=None)      # what tqdm asks for
        sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: kernel)
        sys.modules['ipykernel.zmqshell'] = types.SimpleNamespace()
        sys.modules['ipywidgets'] = None
        with warnings.catch_warnings(record=True) as seen: f.DataLoaders.in_memory(f.toy_images(4, 4), 2, device='cpu')
        assert 'tqdm.auto' in sys.modules
        assert not [w for w in seen if 'IProgress' in str(w.message)]""")


def test_names_for_notebooks():
    "Only public ones, and none that a notebook is likely to have for its own: the import would overwrite it"
    names = {n for n in vars(fastswa.all) if not n.startswith('_')}
    packages = [getattr(fastswa, o) for o in ('averaging', 'callbacks', 'checkpoint', 'data', 'nets', 'training')]
    listed = {n for o in packages for n in o.__all__}
    assert {n for n in listed - names} == {'gain', 'gradients', 'merge', 'sandbox', 'summary'}
    own = {*dir(builtins), *vars(math), *vars(torch.nn), *'''
        acc accuracy average args avg batch batch_size best bs cb cbs cfg check config criterion data dataset df
        dl dls ds epoch epochs export fig gain grad gradients history i images init inp inputs k labels learn
        learner load log loss losses lr mean mean_std merge metrics model module n names net newest norm opt optimizer
        out outputs path plain plt preds probs read reading result results rows run runs sandbox save scheduler
        score seed state std step steps style summary t table targets test tfm tfms times train trainer
        transform update valid validate version weights x xb xs y yb ys STEPS VERSION'''.split()}
    # layers that stand for torch's, as the course calls them
    assert {n for n in names if n in own} == {'LayerNorm'}
