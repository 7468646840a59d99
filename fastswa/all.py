"Every public name, for notebooks: `from fastswa.all import *`. Written by hand"
from fastswa.averaging import *
from fastswa.batches import def_device, default_device, map_tensors, to_cpu, to_device
from fastswa.callbacks import *
from fastswa.checkpoint import *
from fastswa.clock import Clock, Every, Time
from fastswa.compare import *
from fastswa.core import clean_ipython_hist, clean_mem, clean_tb, imports_without, quiet, unwrap
from fastswa.data import *
from fastswa.module_state import keep_modes
from fastswa.nets import *
from fastswa.plot import (get_grid, plot_func, plot_history, plot_losses, show_image, show_images, subplots, to_array,
    weight_styles)
from fastswa.random_state import get_rng_state, keep_rng, set_rng_state, set_seed
from fastswa.tables import Report, Table
from fastswa.training import *

with imports_without('.torch.jit.script'): from torcheval import metrics as _metrics  # a later import of it is silent

del imports_without
del gain, gradients, merge, sandbox, summary      # names that a notebook is likely to have for something of its own
