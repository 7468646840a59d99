"What a run can have beside the loop"
from .activations import ActivationStats, HooksCallback, StatsRow, is_leaf
from .augment import AugmentCB, CutMixCB, MixUpCB, TTA, log_mean_probs, tta, tta_views
from .basics import BatchTransformCB, DeviceCB, HasLearnCB, RecorderCB, SingleBatchCB
from .batchnorm import BNUpdateCB
from .distributed import AccelerateCB, DistributedCB
from .early_stopping import EarlyStoppingCB
from .finder import LRFinderCB, LRFound, lr_find, suggest_lr
from .inspection import CapturePreds, capture_preds, show_image_batch, summary
from .loggers import CSVLoggerCB, LogCB, TensorBoardCB
from .metrics import FunctionMetric, MetricsCB
from .progress import LogView, NotebookView, ProgressCB, TerminalView, View
from .schedule import BaseSchedCB, BatchSchedCB, EpochSchedCB, OneCycleCB, WarmupStableDecayCB, sched_rates
from .speed import ChannelsLastCB, CompileCB, MixedPrecision, MixedPrecisionCB, fast_cbs
from .steps import ClosureCB, GradAccumCB, GradClipCB, NaNGuardCB, gradients
from .swa import AverageCB, EMACB, LAWACB, SWACB
from .swa_variants import BEMACB, PostHocEMACB, SWADCB, SWAGCB, ScheduleFreeCB, SwitchEMACB
from .teacher import TeacherCB
from .watched import Watched

__all__ = [
    'AccelerateCB', 'ActivationStats', 'AugmentCB', 'AverageCB', 'BEMACB', 'BNUpdateCB', 'BaseSchedCB',
    'BatchSchedCB', 'BatchTransformCB', 'CSVLoggerCB', 'CapturePreds', 'ChannelsLastCB', 'ClosureCB', 'CompileCB',
    'CutMixCB', 'DeviceCB', 'DistributedCB', 'EMACB', 'EarlyStoppingCB', 'EpochSchedCB', 'FunctionMetric',
    'GradAccumCB', 'GradClipCB', 'HasLearnCB', 'HooksCallback', 'LAWACB', 'LRFinderCB', 'LRFound', 'LogCB',
    'LogView', 'MetricsCB', 'MixUpCB', 'MixedPrecision', 'MixedPrecisionCB', 'NaNGuardCB', 'NotebookView',
    'OneCycleCB', 'PostHocEMACB', 'ProgressCB', 'RecorderCB', 'SWACB', 'SWADCB', 'SWAGCB', 'ScheduleFreeCB',
    'SingleBatchCB', 'StatsRow', 'SwitchEMACB', 'TTA', 'TeacherCB', 'TensorBoardCB', 'TerminalView', 'View',
    'WarmupStableDecayCB', 'Watched', 'capture_preds', 'fast_cbs', 'gradients', 'is_leaf', 'log_mean_probs',
    'lr_find', 'sched_rates', 'show_image_batch', 'suggest_lr', 'summary', 'tta', 'tta_views']
