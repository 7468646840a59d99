"The training loop, its events, its optimizer, and trying things out without a trace"
from .essentials import LossMeter
from .events import (
    Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CallbackRunner,
    Stage, run_cbs, with_cbs)
from .learner import Learner, MomentumLearner, TrainCB, TrainLearner
from .opt_state import load_opt_state, opt_state
from .optim import OptionChanges, group_options, param_groups, set_option
from .sandbox import keep_learner, prepared_batches, sandbox

__all__ = [
    'Callback', 'CallbackRunner', 'CancelBatchException', 'CancelEpochException', 'CancelFitException',
    'CancelStepException', 'Learner', 'LossMeter', 'MomentumLearner', 'OptionChanges', 'Stage', 'TrainCB',
    'TrainLearner', 'group_options', 'keep_learner', 'load_opt_state', 'opt_state', 'param_groups',
    'prepared_batches', 'run_cbs', 'sandbox', 'set_option', 'with_cbs']
