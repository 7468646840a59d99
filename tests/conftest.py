import os
from pathlib import Path

import pytest, torch
from fastswa._testing import use_cached_data

use_cached_data()
torch.set_num_threads(min(2, torch.get_num_threads()))  # the models here are too small to use more

@pytest.fixture(scope='session')
def fmnist_path():
    "The folder of Fashion-MNIST's IDX files; where there is none, the test is skipped"
    for parent in filter(None, [os.environ.get('FASTSWA_DATA'), '/usr/share/datasets']):
        for path in Path(parent), Path(parent)/'fashion-mnist':
            if (path/'t10k-labels-idx1-ubyte.gz').exists(): return path
    pytest.skip('no Fashion-MNIST here: run `make data`, or set $FASTSWA_DATA')
