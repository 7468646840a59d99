"""What averages cost in a Lightning Trainer: CPU time of a fit with an EMA at each step and an SWA, over one without.

Both take turns in one process, on a small convolutional net of some 10 ms a step. Validation is left out: it takes as
much time again for each average.
"""
import logging, statistics, time, warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning.pytorch as L
from fastswa.averaging import ema
from fastswa.integrations.lightning import AveragesCallback
from timing import parser, place


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
            nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx): return F.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(steps, batch, *cbs):
    "CPU seconds for each step"
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(steps*batch, 1, 28, 28), torch.randint(10, (steps*batch,)))
    loader = DataLoader(data, batch)
    trainer = L.Trainer(max_epochs=1, accelerator='cpu', callbacks=[*cbs], logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)
    start = time.process_time()
    trainer.fit(Net(), loader)
    return (time.process_time() - start)/steps


def main():
    args = parser(__doc__, steps=60, rounds=8, batch=128).parse_args()
    warnings.filterwarnings('ignore')
    for name in 'lightning.pytorch', 'lightning.fabric': logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    def averages(): return AveragesCallback(ema=ema(half_life='0.05dur'), swa=dict(start='0.75dur', every='0.01dur'))
    found = []
    for i in range(args.rounds + 1):      # the first one allocates, and does not count
        turns = [('without', ()), ('with', (averages(),))]
        found.append({name: fit(args.steps, args.batch, *cbs) for name, cbs in turns[::(-1)**i]})
    found = found[1:]
    base = min(r['without'] for r in found)
    by_round = sorted(r['with']/r['without'] for r in found)
    print(f'{place("cpu")}: {args.rounds} rounds of {args.steps} steps')
    print(f'a step without averages: {1000*base:.2f} ms of CPU time')
    print(f'with averages: {min(r["with"] for r in found)/base:.3f} times that, best of all; '
          f'round by round {statistics.median(by_round):.3f} ({by_round[0]:.3f} … {by_round[-1]:.3f})')


if __name__ == '__main__': main()
