"""Training: configuration, the trainer, checkpoints and the history of a run."""

from pyro_vmem.train.checkpoint import load_checkpoint, save_checkpoint
from pyro_vmem.train.config import TrainingConfig
from pyro_vmem.train.fit import FitResult, fit
from pyro_vmem.train.history import read_result
from pyro_vmem.train.schedules import Constant, LinearRise, Schedule, WarmupCosine
from pyro_vmem.train.validation import validate

__all__ = [
    "Constant",
    "FitResult",
    "LinearRise",
    "Schedule",
    "TrainingConfig",
    "WarmupCosine",
    "fit",
    "load_checkpoint",
    "read_result",
    "save_checkpoint",
    "validate",
]
