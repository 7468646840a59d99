"The environment the notebooks' tests run in. Written by hand, and light: it must be read before torch is."
import os

def notebook_setup(cells):
    "What nbdev-test calls first (`test_setup` in pyproject.toml). It fills the cores with processes: one thread each"
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    os.environ.setdefault('FASTSWA_REDUCED', '1')      # the experiments run on little data; `FASTSWA_REDUCED= nbdev-test` runs them whole
