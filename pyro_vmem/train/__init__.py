"""Training: configuration, the trainer, checkpoints and the history of a run."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.train.callbacks import Callback, Checkpoints, Log, ProgressBar, RefreshKeys, StopAfter, Validation
from pyro_vmem.train.checkpoint import load_checkpoint, save_checkpoint
from pyro_vmem.train.config import TrainingConfig
from pyro_vmem.train.fit import fit
from pyro_vmem.train.history import FitResult
from pyro_vmem.train.schedules import Constant, LinearRise, Schedule, WarmupCosine
from pyro_vmem.train.trainer import Trainer
from pyro_vmem.train.validation import validate

__all__ = [
    "Callback",
    "Checkpoints",
    "Constant",
    "FitResult",
    "LinearRise",
    "Log",
    "ProgressBar",
    "RefreshKeys",
    "Schedule",
    "StopAfter",
    "Trainer",
    "TrainingConfig",
    "Validation",
    "WarmupCosine",
    "fit",
    "load_checkpoint",
    "save_checkpoint",
    "validate",
]
check_entries(globals())
