"""An epoch in other people's loops, for the benchmarks: train, and validate with mean loss and accuracy.

Each function takes a model, loaders and a partial of a torch optimizer, and returns a function without arguments that
makes one epoch. ImportError where the package is missing: `pip install -e .[bench]` brings all but fastai, which needs
a torchvision that fits the torch at hand.
"""
import logging, warnings

import torch
import torch.nn.functional as F


class Batches:
    "A loader of which only its batches are seen: Lightning takes a list for several loaders"
    def __init__(self, dl): self.dl = dl
    def __len__(self): return len(self.dl)
    def __iter__(self): return iter(self.dl)


def ignite(model, dls, opt_func, lr):
    from ignite.engine import create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Accuracy, Loss
    trainer = create_supervised_trainer(model, opt_func(model.parameters(), lr), F.cross_entropy)
    metrics = dict(accuracy=Accuracy(), loss=Loss(F.cross_entropy))
    evaluator = create_supervised_evaluator(model, metrics)

    def epoch():
        trainer.run(dls.train, max_epochs=1)
        if dls.valid is not None: evaluator.run(dls.valid)
    return epoch


def lightning(model, dls, opt_func, lr):
    import lightning.pytorch as L
    for name in 'lightning.pytorch', 'lightning.fabric': logging.getLogger(name).setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, i): return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, i):
            preds = self.model(batch[0])
            found = dict(loss=F.cross_entropy(preds, batch[1]), accuracy=(preds.argmax(1) == batch[1]).float().mean())
            self.log_dict(found, batch_size=len(batch[1]))

        def configure_optimizers(self): return opt_func(self.parameters(), lr)
    module = Module()

    def epoch():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')      # of loaders that are not torch's, and of few workers
            trainer = L.Trainer(max_epochs=1, accelerator='auto', devices=1, logger=False, enable_progress_bar=False,
                                enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
                                limit_val_batches=1. if dls.valid is not None else 0)
            trainer.fit(module, Batches(dls.train), dls.valid and Batches(dls.valid))
    return epoch


def fastai(model, dls, opt_func, lr):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper

    def opt(params, lr): return OptimWrapper(params, opt_func, lr=lr)
    learn = Learner(DataLoaders(dls.train, dls.valid), model, F.cross_entropy, opt, lr, metrics=accuracy)

    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return epoch


def skorch(model, dls, opt_func, lr):
    "Images as floats in a TensorDataset, read one by one by torch's own loader, as skorch does"
    from skorch import NeuralNetClassifier
    from skorch.helper import predefined_split
    from torch.utils.data import TensorDataset

    def floats(dl):
        x,y = dl.dataset.tensors
        return TensorDataset(x.float().div(255) if dl.tfm is None else dl.tfm(x.float().div(255)), y)
    train,valid = floats(dls.train),floats(dls.valid)
    options = {f'optimizer__{k}': v for k, v in opt_func.keywords.items()}
    net = NeuralNetClassifier(model, criterion=torch.nn.CrossEntropyLoss, optimizer=opt_func.func, lr=lr, max_epochs=1,
                              batch_size=dls.train.batch_size, iterator_train__shuffle=True,
                              train_split=predefined_split(valid), verbose=0, device=str(train.tensors[0].device),
                              **options)
    net.initialize()
    return lambda: net.partial_fit(train, None)


LOOPS = {'ignite': ignite, 'Lightning': lightning, 'skorch': skorch, 'fastai': fastai}


def epochs(make_model, dls, opt_func, lr, names=tuple(LOOPS)):
    "name → function that makes an epoch, of the packages that are installed; and a line for each that is not"
    rows,missing = {},[]
    for name in names:
        try: rows[name] = LOOPS[name](make_model(), dls, opt_func, lr)
        except Exception as e: missing.append(f'{name}: {(str(e).splitlines() or [type(e).__name__])[0]}')
    return rows, missing
