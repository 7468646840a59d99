"""What averages cost in other people's loops: a run of a trainer with an EMA and without.

    OMP_NUM_THREADS=1 python benchmarks/integrations.py [--steps 100] [--rounds 15]

CPU time of whole runs that take turns in one process. A run is all that the trainer does, and of ours all that comes
once, too: making the averages, looking the weights up, the first snapshot. That is a few ms, spread over the 100 steps
of a run, of about 10 ms on a quiet machine; training has thousands of them. There is no validation, and so there are no
BatchNorm statistics to compute. Target: 1.01.

A trainer calls a callback several times in a step whether it does anything or not, which the row of an empty callback
shows; Lightning has an EMA of its own to compare with. `Averages.step` is timed where it stands, behind an optimizer's
step and the next batch, which have filled the caches of the core: it takes several times as long there as in a loop of
its own.
"""
import statistics
import tempfile
import time
import warnings

import torch

from fastswa.averaging import Averages, ema
from timing import parse, parser, place, ratio, spread, take_turns

EMA = dict(ema=ema(half_life='0.05dur'))


def transformers(steps):
    "Runs of the Trainer, for a small GPT"
    from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers import utils
    from fastswa.integrations.transformers import AveragesCallback
    utils.logging.set_verbosity_error()
    ids = torch.randint(256, (8*steps, 64))
    data = [dict(input_ids=o, labels=o) for o in ids]
    def make(cb=None):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2))
        args = TrainingArguments(tempfile.mkdtemp(), max_steps=steps, logging_strategy='no', save_strategy='no',
                                 report_to='none', disable_tqdm=True, use_cpu=True)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[cb] if cb else [])
        trainer.pop_callback(PrinterCallback)
        return trainer.train
    class Empty(TrainerCallback): pass
    return {'without': make(), 'with an empty callback': make(Empty()), 'with an EMA': make(AveragesCallback(**EMA))}


def accelerate(steps):
    "Runs of a loop of accelerate, for a perceptron"
    from accelerate import Accelerator
    from fastswa.integrations.accelerate import track
    x = torch.randn(steps, 4096, 128)
    def make(averaged=False):
        accelerator = Accelerator(cpu=True)
        net = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        model, opt = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
        averages, after = Averages(model), lambda: None
        if averaged:
            averages.add('ema', EMA['ema'], now=False)
            after = track(averages, accelerator, opt)
        def train():
            averages.begin(steps, 1)
            for xb in x:
                with accelerator.accumulate(model):
                    accelerator.backward(model(xb).square().mean())
                    opt.step()
                    opt.zero_grad()
                after()
        return train
    return {'without': make(), 'with an EMA': make(True)}


def lightning(steps):
    "Runs of Lightning's Trainer, for a small convolutional net"
    import logging
    import lightning.pytorch as L
    from lightning.pytorch.callbacks import EMAWeightAveraging
    from torch import nn
    from fastswa.integrations.lightning import AveragesCallback
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                                     nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
                                     nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.01, 0.9)
    data = torch.utils.data.TensorDataset(torch.randn(128*steps, 1, 28, 28), torch.randint(10, (128*steps,)))
    def make(*kinds):
        def train():
            trainer = L.Trainer(max_epochs=1, accelerator='cpu', callbacks=[kind() for kind in kinds], logger=False,
                                enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
            trainer.fit(Net(), torch.utils.data.DataLoader(data, 128))
        return train
    return {'without': make(), 'with an empty callback': make(L.Callback), 'with its own EMA': make(EMAWeightAveraging),
            'with an EMA': make(lambda: AveragesCallback(**EMA))}


def timed(f, found):
    "A function whose CPU time, in microseconds, is noted"
    def g(*args, **kwargs):
        start = time.thread_time_ns()
        try: return f(*args, **kwargs)
        finally: found.append((time.thread_time_ns() - start)/1e3)
    return g


def measure(make, steps, rounds):
    "Lines of text: a step of the trainer without averages, the others by it, and `Averages.step` in it"
    rows, ours, step = make(steps), [], Averages.step
    times = take_turns(rows, rounds, 'cpu')
    Averages.step = timed(step, ours)
    for _ in range(3): rows['with an EMA']()
    Averages.step = step
    plain, us = statistics.median(times['without'])/steps*1e3, statistics.median(ours)
    yield f'{make.__name__}: {plain:.2f} ms a step'
    for name in rows:
        if name != 'without': yield f'  {name:24} {spread(times, name, "without", 4)}'
    if 'with an empty callback' in rows:
        yield f'  {"an EMA ÷ an empty callback":24} {ratio(times, "with an EMA", "with an empty callback"):.4f}'
    yield f'  averages.step            {us:.0f} µs, which makes {1 + us/plain/1e3:.4f}'


if __name__ == '__main__':
    options = parser(__doc__, steps=100, rounds=15)
    options.set_defaults(cpu_time=True)
    args = parse(options)
    warnings.simplefilter('ignore')
    print(place('cpu'))
    for make in lightning, accelerate, transformers:
        for line in measure(make, args.steps, args.rounds): print(line, flush=True)
