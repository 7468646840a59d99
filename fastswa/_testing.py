"The environment the project's own tests run in. Written by hand, and light: it must be read before torch is."
import os
from pathlib import Path

def use_cached_data():
    "Point $FASTSWA_DATA, where it is not set, at the folder that `tools/get-data.sh` fills"
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')
    data = cache/'fastswa'/'fashion-mnist'
    if data.is_dir() and not os.environ.get('FASTSWA_DATA'): os.environ['FASTSWA_DATA'] = str(data)

def notebook_setup(cells):
    "What nbdev-test calls first (`test_setup` in pyproject.toml). It fills the cores with processes: one thread each"
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    use_cached_data()
