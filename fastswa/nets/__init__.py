"Layers, norms, initialisation and hooks, on plain modules"
from .hooks import Hook, Hooks
from .init import ActStats, act_stats, fixup, gain, init_weights, zero_init_residual
from .layers import GeneralRelu, ResBlock, act_gr, conv, get_model
from .lsuv import LSUVRow, lsuv, lsuv_init
from .norms import BatchNorm, LayerNorm
from .statistics import StatsHistory, append_stats, get_hist, get_min, hook_stats, tensor_stats

__all__ = [
    'ActStats', 'BatchNorm', 'GeneralRelu', 'Hook', 'Hooks', 'LSUVRow', 'LayerNorm', 'ResBlock', 'StatsHistory',
    'act_gr', 'act_stats', 'append_stats', 'conv', 'fixup', 'gain', 'get_hist', 'get_min', 'get_model', 'hook_stats',
    'init_weights', 'lsuv', 'lsuv_init', 'tensor_stats', 'zero_init_residual']
