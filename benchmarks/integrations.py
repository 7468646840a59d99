"What averages cost in other people's loops: CPU time of a step with an EMA and without, and of ours in it"
import statistics
import tempfile
import time

import torch

from fastswa.averaging import Averages, ema


def transformers(steps=30):
    "A function that trains a small GPT for some steps by the Trainer; with averages, and without"
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, utils
    from fastswa.integrations.transformers import AveragesCallback
    utils.logging.set_verbosity_error()
    ids = torch.randint(256, (8*steps, 64))
    data = [dict(input_ids=o, labels=o) for o in ids]
    def make(averaged):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2))
        args = TrainingArguments(tempfile.mkdtemp(), max_steps=steps, logging_strategy='no', save_strategy='no',
                                 report_to='none', disable_tqdm=True, use_cpu=True)
        cbs = [AveragesCallback(ema=ema(half_life='0.05dur'))] if averaged else []
        return Trainer(model, args, train_dataset=data, callbacks=cbs).train
    return make(True), make(False)


def accelerate(steps=30):
    "The same in a loop of accelerate, for a perceptron"
    from accelerate import Accelerator
    from fastswa.integrations.accelerate import track
    x = torch.randn(steps, 4096, 128)
    def make(averaged):
        accelerator = Accelerator(cpu=True)
        net = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        model, opt = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
        averages = Averages(model, steps, 1)
        if averaged: averages.add('ema', ema(half_life='0.05dur'))
        step = track(averages, accelerator, opt) if averaged else lambda: None
        def train():
            for xb in x:
                with accelerator.accumulate(model):
                    accelerator.backward(model(xb).square().mean())
                    opt.step()
                    opt.zero_grad()
                step()
        return train
    return make(True), make(False)


def lightning(steps=30):
    "The same by Lightning's Trainer, for a small convolutional net; validation is left out"
    import logging
    import lightning.pytorch as L
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
    def make(averaged):
        def train():
            cbs = [AveragesCallback(ema=ema(half_life='0.05dur'))] if averaged else []
            trainer = L.Trainer(max_epochs=1, accelerator='cpu', callbacks=cbs, logger=False, enable_progress_bar=False,
                                enable_checkpointing=False, enable_model_summary=False)
            trainer.fit(Net(), torch.utils.data.DataLoader(data, 128))
        return train
    return make(True), make(False)


def timed(f, found):
    "A function whose CPU time, in microseconds, is noted"
    def g(*args, **kwargs):
        start = time.thread_time_ns()
        try: return f(*args, **kwargs)
        finally: found.append((time.thread_time_ns() - start)/1e3)
    return g


def measure(name, make, steps=30, rounds=15):
    "Milliseconds of CPU time a step without; how many times as much with, median of rounds; microseconds of it in ours"
    runs, found, ours, step = make(steps), ([], []), [], Averages.step
    for run in runs: run()      # to warm up
    for i in range(rounds):
        for k in ((0, 1) if i % 2 else (1, 0)):
            start = time.process_time()
            runs[k]()
            found[k].append((time.process_time() - start)/steps*1e3)
    Averages.step = timed(step, ours)      # where it stands: behind the optimizer's step, which has filled the caches
    for _ in range(3): runs[0]()
    Averages.step = step
    ratio = statistics.median(a/b for a, b in zip(*found))
    plain, us = map(statistics.median, (found[1], ours))
    print(f'{name:14} {plain:6.2f} ms a step, with an EMA {ratio:.3f} times as much '
          f'({min(found[0])/min(found[1]):.3f} of the best rounds); {us:.0f} us of it in averages.step, '
          f'which makes {1 + us/plain/1e3:.4f}')


if __name__ == '__main__':
    torch.set_num_threads(1)
    for make in transformers, accelerate, lightning: measure(make.__name__, make)
