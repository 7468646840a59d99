"Two averages in a Lightning run on toy images: pip install fastswa[lightning]; python lightning_averages.py"
import lightning.pytorch as L
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from fastswa.averaging import ema
from fastswa.data import DataLoaders, toy_images
from fastswa.integrations.lightning import AveragesCallback


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x): return self.layers(x)

    def training_step(self, batch, batch_idx): return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log('accuracy', (self(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self): return optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


L.seed_everything(0)
images = DataLoaders.in_memory(toy_images(2000, 1000), 2000)
train,valid = (DataLoader(TensorDataset(*next(iter(dl))), 50) for dl in (images.train, images.valid))
cb = AveragesCallback(ema=ema(half_life='0.05dur'), swa=dict(start='0.75dur', every='0.01dur'), apply='ema')
trainer = L.Trainer(max_epochs=4, accelerator='cpu', callbacks=cb, logger=False, enable_checkpointing=False)
model = Net()
trainer.fit(model, train, valid)
for name in 'accuracy', 'ema/accuracy', 'swa/accuracy': print(f'{name:13} {trainer.callback_metrics[name]:.3f}')
trainer.test(model, valid)      # with the 'ema' weights, which the model now holds
exported = cb.averages['swa'].module()      # a model of its own, in eval mode
