"""The command line, experiments in folders, and their report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_vmem.app.settings import Evaluation, Settings

if TYPE_CHECKING:
    from pyro_vmem.app.experiment import Experiment

__all__ = ["Evaluation", "Experiment", "Settings"]


def __getattr__(name: str) -> Any:
    """Imports `Experiment` when it is asked for, so that the command line starts without torch."""
    if name != "Experiment":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pyro_vmem.app.experiment"), name)
