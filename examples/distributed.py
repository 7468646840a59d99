"One script for one process or many; the commands are in the guide From a laptop to a cluster"
import argparse

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from fastswa.callbacks import DistributedCB, EMACB, MetricsCB
from fastswa.checkpoint import CheckpointCB
from fastswa.data import DataLoaders
from fastswa.training import TrainLearner

parser = argparse.ArgumentParser()
parser.add_argument('--mode', default='ddp')
parser.add_argument('--epochs', type=int, default=3)
parser.add_argument('--folder', default='runs/distributed')
args = parser.parse_args()

distributed = DistributedCB(args.mode)         # meets the other processes, if there are any
torch.manual_seed(0)
x = torch.randn(2048, 10)
data = TensorDataset(x, x[:, :3].argmax(1))
dls = DataLoaders(DataLoader(data, 32, shuffle=True), DataLoader(data, 64))
model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3))
def accuracy(preds, targets): return (preds.argmax(1) == targets).float().mean()

cbs = [distributed, EMACB(), MetricsCB(accuracy), CheckpointCB(args.folder)]
learn = TrainLearner(model, dls, F.cross_entropy, 0.01, cbs, optim.AdamW)
learn.fit(args.epochs, resume=args.folder)
learn.export(f'{args.folder}/ema.safetensors', 'ema')
