"Data sets of images, their loaders, and functions on batches of images; a module is imported when it is needed"
from importlib import import_module

_NAMES = dict(
    loaders=['BatchLoader', 'DataLoaders', 'collate_device', 'collate_dict', 'get_dls', 'inplace'],
    sources=['fashion_mnist', 'load_data', 'mnist', 'toy_images'],
    transforms=['RandCopy', 'RandCrop', 'RandErase', 'RandFlip', 'cutmix', 'mixup', 'rand_copy', 'rand_crop',
                'rand_erase', 'rand_flip'])
__all__ = sorted(name for names in _NAMES.values() for name in names)

def __getattr__(name):      # `datasets` takes a second to import, which functions on batches do not need
    for module, names in _NAMES.items():
        if name in names: return getattr(import_module(f'.{module}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

def __dir__(): return __all__
