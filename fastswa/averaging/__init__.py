"Averages of the weights of a model, for any training loop"
from .average import Average, update_all
from .averages import Averages
from .batchnorm import bn_layers, bn_state, load_bn_state, update_bn
from .bema import BEMA
from .choice import Choice
from .ensembles import (
    LatestAverage, Snapshot, Soup, decay_weights, greedy_soup, merge, model_stock, uniform_soup)
from .holding import held_weights, keep_held, restore_raw
from .interchange import (
    avg_params, copy_params, from_averaged_model, load_composer_ema, load_diffusers_ema, load_ema_pytorch,
    load_lightning, load_timm_ema, load_torch_ema, load_torchtitan_ema, save_safetensors, to_averaged_model)
from .posthoc import PostHocEMA, power_profile
from .rules import ema, equal, power, scale_decay, scheduled_ema
from .schedule_free import ScheduleFree
from .swad import SWAD
from .swag import SWAG
from .tensors import find_tensors, stat_buffers

__all__ = [
    'Average', 'Averages', 'BEMA', 'Choice', 'LatestAverage', 'PostHocEMA', 'SWAD', 'SWAG', 'ScheduleFree', 'Snapshot',
    'Soup', 'avg_params', 'bn_layers', 'bn_state', 'copy_params', 'decay_weights', 'ema', 'equal', 'find_tensors',
    'from_averaged_model', 'greedy_soup', 'held_weights', 'keep_held', 'load_bn_state', 'load_composer_ema',
    'load_diffusers_ema', 'load_ema_pytorch', 'load_lightning', 'load_timm_ema', 'load_torch_ema',
    'load_torchtitan_ema', 'merge', 'model_stock', 'power', 'power_profile', 'restore_raw', 'save_safetensors',
    'scale_decay', 'scheduled_ema', 'stat_buffers', 'to_averaged_model', 'uniform_soup', 'update_all', 'update_bn']
