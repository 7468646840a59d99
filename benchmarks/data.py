"""One pass over the training images of Fashion-MNIST in batches: ours in memory, torch's loader, and per-image loading.

    python benchmarks/data.py [--rounds 7] [--bs 1024] [--toy] [--write] [--cpu-time]

A batch is float32 from 0 to 1, (N, 1, 28, 28), in a new order. `DataLoader` is torch's with a TensorDataset of floats,
one image after the other, as skorch, fastai, Lightning and ignite get it from most programs; `in batches` gives it a
BatchSampler, so that it indexes whole batches. The last rows load as the fast.ai course does: PNG images as the Hugging
Face hub stores them, `with_transform` to a tensor, on a part of the images; their time is scaled up.
"""
import io

import datasets
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from fastswa.data.loaders import DataLoaders, inplace
from fastswa.data.sources import fashion_mnist, toy_images
from timing import parse, parser, report, table, take_turns


def as_png(ds):
    "The same images, encoded as they are on the hub"
    def encode(batch):
        files = []
        for im in batch['image']:
            im.save(buffer := io.BytesIO(), format='PNG')
            files.append(dict(bytes=buffer.getvalue(), path=None))
        return dict(image=files)
    features, stored = ds.features, dict(bytes=datasets.Value('binary'), path=datasets.Value('string'))
    plain = datasets.Features(image=stored, label=features['label'])
    return ds.map(encode, batched=True, features=plain, keep_in_memory=True).cast_column('image', features['image'])


def to_tensor(image):
    "Step by step what torchvision's `to_tensor` does with an image"
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
    pixels = pixels.view(image.size[1], image.size[0], len(image.getbands())).permute((2, 0, 1)).contiguous()
    return pixels.to(torch.get_default_dtype()).div(255)


@inplace
def normalised(b):
    "As the course does it"
    b['image'] = [(to_tensor(o) - 0.28)/0.35 for o in b['image']]


def one_pass(dl):
    def run():
        for _ in dl: pass
    return run


def main():
    options = parser(__doc__, rounds=7, bs=1024)
    options.add_argument('--toy', action='store_true', help='10,000 made-up images, where Fashion-MNIST is not at hand')
    args = parse(options)
    dd = toy_images() if args.toy else fashion_mnist()
    ours = DataLoaders.in_memory(dd, args.bs, device='cpu')
    x,y = ours.train.dataset.tensors
    floats = TensorDataset(x.float().div(255), y)
    in_batches = BatchSampler(RandomSampler(floats), args.bs, drop_last=False)
    rows = {'ours, in memory': one_pass(ours.train), 'DataLoader': one_pass(DataLoader(floats, args.bs, shuffle=True)),
            'DataLoader, in batches': one_pass(DataLoader(floats, sampler=in_batches, batch_size=None))}
    datasets.disable_progress_bars()
    part = datasets.DatasetDict({k: as_png(ds.select(range(min(len(ds), 4096)))) for k, ds in dd.items()})
    part = part.with_transform(normalised)
    for n in (0,) if args.cpu_time else (0, 2):      # CPU time does not see what workers do
        dl = DataLoaders.from_dd(part, args.bs, num_workers=n).train
        rows[f'as the course loads, {n} workers'] = one_pass(dl)
    times = take_turns(rows, args.rounds, 'cpu')
    scale = len(x)/len(part['train'])
    times = {name: [t*scale for t in ts] if 'course' in name else ts for name, ts in times.items()}
    report('data', f'A pass over {len(x):,} images in batches of {args.bs}', table(times, 'ours, in memory'), args)


if __name__ == '__main__': main()
