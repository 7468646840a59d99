import gc
import os
import random
import signal
import warnings

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')            # side by side, and for the processes they start

import hypothesis
import numpy as np
import pytest
import torch

# A shell that runs pytest in the background lets it ignore Ctrl-C, and with it the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, however slow the machine is
hypothesis.settings.register_profile('fastswa', deadline=None, derandomize=True,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile('fastswa')
torch.set_num_threads(min(2, torch.get_num_threads()))  # the models here are too small to use more


def pytest_collection_finish(session):
    "The garbage collector need not go through what was imported: with all libraries that is 0.3 s each time"
    import torch._dynamo      # as the first optimizer does
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    on_gpu = item.get_closest_marker('gpu')
    if on_gpu and not torch.cuda.is_available(): pytest.skip('needs a CUDA device')
    # Whatever ran before: a test must not depend on it. `torch.manual_seed` takes a millisecond: it notes the stack
    # three times, for devices that are not there.
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if on_gpu: torch.cuda.manual_seed_all(0)


@pytest.fixture(scope='session')
def fmnist():
    "The real Fashion-MNIST; where there is none, the test is skipped"
    from fastswa.data.sources import fashion_mnist
    try: return fashion_mnist()
    except FileNotFoundError as e: pytest.skip(str(e))


@pytest.fixture
def strict():
    "Warnings are errors: a cleanup that fails says so in one"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', 'the model has BatchNorm')
        warnings.filterwarnings('ignore', '.*(torch.jit|lr_scheduler.step)')
        yield
