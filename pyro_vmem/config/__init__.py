"""Builds models from specs, YAML files, checkpoints and names of trained models."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.config.build import build, load, save
from pyro_vmem.config.pretrained import from_pretrained, model_card, pretrained_names

__all__ = ["build", "from_pretrained", "load", "model_card", "pretrained_names", "save"]
check_entries(globals())
