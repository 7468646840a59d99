"Data sets of images, their loaders, and functions on batches of images"
from .loaders import BatchLoader, DataLoaders, collate_device, collate_dict, get_dls, inplace
from .sources import fashion_mnist, load_data, mnist, toy_images
from .transforms import (
    RandCopy, RandCrop, RandErase, RandFlip, cutmix, mixup, rand_copy, rand_crop, rand_erase, rand_flip)

__all__ = [
    'BatchLoader', 'DataLoaders', 'RandCopy', 'RandCrop', 'RandErase', 'RandFlip', 'collate_device', 'collate_dict',
    'cutmix', 'fashion_mnist', 'get_dls', 'inplace', 'load_data', 'mixup', 'mnist', 'rand_copy', 'rand_crop',
    'rand_erase', 'rand_flip', 'toy_images']
