"Every public name, for notebooks: `from fastswa.all import *`. Written by hand"
from fastswa.averaging import *
from fastswa.callbacks import *
from fastswa.checkpoint import *
from fastswa.compare import *
from fastswa.core import (Clock, Every, Report, Table, Time, clean_ipython_hist, clean_mem, clean_tb, def_device,
    default_device, get_rng_state, keep_modes, keep_rng, map_tensors, quiet, set_rng_state, set_seed, to_cpu, to_device,
    unwrap)
from fastswa.data import *
from fastswa.nets import *
from fastswa.plot import (get_grid, plot_func, plot_history, plot_losses, show_image, show_images, subplots, to_array,
    weight_styles)
from fastswa.training import *

del gain, gradients, sandbox, summary      # names that a notebook is likely to have for something of its own
