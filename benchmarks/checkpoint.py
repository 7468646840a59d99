"""A checkpoint of a model of 25 million weights with an EMA: how long a step waits for it.

    python benchmarks/checkpoint.py [--rounds 9] [--folder DIR] [--write]

The writers take turns in one process, and each writes a new file. Written at once, against `torch.save` of the
same tensors, with an fsync of file and folder on both sides; target: at most 1.3 x. In the background, what the
step waits for, against a copy of the same tensors (`clone`); target: at most 1.1 x. Ratios are medians, round
by round, with the smallest and the largest. Lightning's `save_checkpoint` writes the raw weights alone, half as much.
"""
import copy, logging, os, tempfile, warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn, optim

from fastswa.callbacks.swa import EMACB
from fastswa.checkpoint.archive import read_checkpoint, write_checkpoint
from fastswa.checkpoint.background import BackgroundWriter
from fastswa.checkpoint.resume import learner_state
from fastswa.core import quiet
from fastswa.training.learner import TrainLearner
from peers import Batches
from timing import parse, parser, report, seconds, table


def flush(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def saved(tensors, path):
    torch.save(tensors, path)
    flush(path)
    flush(path.parent)


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
    options = parser(__doc__, rounds=9)
    options.add_argument('--folder', default=None, help='where to write; a temporary folder by default')
    args = parse(options)
    learn = big_learner()
    model = learn.model
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder)/'a.pt'
        tensors = dict(raw=model.state_dict(), ema=learn.averages['ema'].weights)
        writer = BackgroundWriter()
        def in_background(): writer.start(lambda state: write_checkpoint(state, path), learner_state(learn))
        own = [v for d in tensors.values() for v in d.values()]
        there = [v.clone() for v in own]
        def copied(): return [v.clone() for v in own]
        def copied_there():
            for a, b in zip(there, own): a.copy_(b)
        rows = {
            'torch.save': lambda: torch.save(tensors, path),
            'torch.save, with fsync': lambda: saved(tensors, path),
            'learn.save': lambda: learn.save(path),
            'a copy': copied,
            'a copy, memory is there': copied_there,
            'learn.save in the background': in_background,
        }
        missing = []
        try: rows['Lightning, raw weights alone'] = lightning(copy.deepcopy(model), path)
        except ImportError as e: missing.append(str(e))
        times = {k: [] for k in rows}
        for r in range(args.rounds + 1):
            for k, f in rows.items():
                writer.wait()
                path.unlink(missing_ok=True)
                os.sync()
                t = seconds(f, 'cpu')
                if r: times[k].append(t)             # the first round warms up
        writer.wait()
        learn.save(path)
        reading = {'torch.load': lambda: torch.load(path, weights_only=True),
                   'read_checkpoint, with checksums': lambda: read_checkpoint(path)}
        for _ in range(args.rounds):
            for k, f in reading.items(): times.setdefault(k, []).append(seconds(f, 'cpu'))
        size = sum(p.numel() for p in model.parameters())
        title = f'A checkpoint of {size/1e6:.1f}M weights and an EMA, {path.stat().st_size/1e6:.0f} MB'
    lines = []
    for base, names in {'torch.save, with fsync': ['torch.save', 'learn.save', 'Lightning, raw weights alone'],
                        'a copy, memory is there': ['a copy', 'learn.save in the background'],
                        'torch.load': ['read_checkpoint, with checksums']}.items():
        lines += [*table({k: times[k] for k in (base, *names) if k in times}, base), '']
    report('checkpoint', title, lines[:-1], args, missing=missing)


if __name__ == '__main__': main()
