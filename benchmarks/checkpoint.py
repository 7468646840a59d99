"""A checkpoint of a model of 25 million weights with an EMA: the time to write it, against `torch.save` of the same
tensors.

    python benchmarks/checkpoint.py [--rounds 7] [--folder DIR] [--write]

The writers take turns in one process. A checkpoint is also flushed to the disk, which `torch.save` alone leaves to the
system; the row `torch.save, flushed` does that too. Lightning's `save_checkpoint` writes the raw weights alone, half
as much. Target: at most 1.5 x `torch.save`.
"""
import copy, logging, os, tempfile, warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.swa import EMACB
from fastswa.checkpoint.archive import read_checkpoint
from fastswa.checkpoint.resume import learner_state
from fastswa.core import quiet
from fastswa.training.learner import TrainLearner
from peers import Batches
from timing import parse, parser, report, seconds, table


def flushed(state, path):
    torch.save(state, path)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def lightning(model, path):
    "A function that saves the model as Lightning's Trainer does"
    import lightning.pytorch as L
    for name in 'lightning.pytorch', 'lightning.fabric': logging.getLogger(name).setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, i): return self.model(batch[0]).square().mean()
        def configure_optimizers(self): return optim.SGD(self.parameters(), 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer = L.Trainer(max_steps=1, accelerator='cpu', logger=False, enable_progress_bar=False,
                            enable_checkpointing=False, enable_model_summary=False)
        trainer.fit(Module(), Batches([(torch.randn(2, 1020), 0)]))
    return lambda: trainer.save_checkpoint(path)


def big_learner(device='cpu'):
    "A learner of 25 million weights that has made a step, with an EMA"
    layers = [nn.Linear(1020, 1020), nn.LayerNorm(1020), nn.ReLU()]
    model = nn.Sequential(*(copy.deepcopy(o) for _ in range(24) for o in layers)).to(device)
    x = torch.randn(2, 1020, device=device)
    dls = SimpleNamespace(train=[(x, x)], valid=None)
    learn = TrainLearner(model, dls, F.mse_loss, 1e-4, EMACB(apply=False), optim.SGD)
    with quiet(): learn.fit(1)
    return learn


def main():
    options = parser(__doc__, rounds=7)
    options.add_argument('--folder', default=None, help='where to write; a temporary folder by default')
    args = parse(options)
    learn = big_learner()
    model = learn.model
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        ours,theirs = Path(folder)/'ours.pt',Path(folder)/'theirs.pt'
        tensors = dict(raw=model.state_dict(), ema=learn.averages['ema'].weights)
        writers = {
            'torch.save': lambda: torch.save(tensors, theirs),
            'torch.save, flushed': lambda: flushed(tensors, theirs),
            'learn.save': lambda: learn.save(ours),
            'learn.save, in memory': lambda: learner_state(learn),
        }
        missing = []
        try: writers['Lightning, raw weights alone'] = lightning(model, theirs)
        except ImportError as e: missing.append(str(e))
        times = {k: [] for k in writers}
        for r in range(args.rounds + 1):
            for k, f in writers.items():
                theirs.unlink(missing_ok=True)           # both write a new file
                os.sync()
                t = seconds(f, 'cpu')
                if r: times[k].append(t)             # the first round warms up
        reading = {'torch.load': lambda: torch.load(ours, weights_only=True),
                   'read_checkpoint, checksums too': lambda: read_checkpoint(ours)}
        for r in range(args.rounds):
            for k, f in reading.items(): times.setdefault(k, []).append(seconds(f, 'cpu'))
        size = sum(p.numel() for p in model.parameters())
        title = f'A checkpoint of {size/1e6:.1f}M weights and an EMA, {ours.stat().st_size/1e6:.0f} MB, by the clock'
        lines = [*table({k: ts for k, ts in times.items() if k not in reading}, 'torch.save'), '',
                 *table({k: times[k] for k in reading}, 'torch.load')]
        report('checkpoint', title, lines, args, missing=missing)


if __name__ == '__main__': main()
