"""The command line, experiments in folders, and their report."""

from pyro_vmem.app.experiment import Evaluation, Experiment

__all__ = [
    "Evaluation",
    "Experiment",
]
