"An average in a loop of accelerate: gradients add up over four batches, and the state is saved and loaded with it"
import sys
import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastswa.averaging import Averages, ema, equal
from fastswa.integrations.accelerate import track

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
torch.manual_seed(0)
x = torch.randn(512, 10)
data = TensorDataset(x, x[:, :3].argmax(1))
loader = DataLoader(data, 16, shuffle=True)
model = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
accelerator = Accelerator(gradient_accumulation_steps=4)
model, opt, dl = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.3, momentum=0.9), loader)

averages = Averages(model, steps_per_epoch=len(dl), n_epochs=5)
averages.add('ema', ema(half_life='0.1dur'))
averages.add('swa', equal(), start='0.5dur')
averages.bn_data = dl
step = track(averages, accelerator, opt)
for epoch in range(5):
    for xb, yb in dl:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model.train()(xb), yb))
            opt.step()
            opt.zero_grad()
        step()                                 # counts this batch; a snapshot only if the optimizer took a step
    accelerator.save_state(folder)             # raw weights, optimizer and averages
    for name in averages.rows():
        with averages.using(name), torch.no_grad(): right = model.eval()(x.to(accelerator.device)).argmax(1).cpu()
        print(epoch, name, (right == data.tensors[1]).float().mean().item())
