"""Whether the weights of a model are numbers, asked before anything is measured of it."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["check_weights"]


def check_weights(module: nn.Module) -> None:
    """Raises a `ValueError` if a parameter is not finite: what is measured of such a model is no number, or no error.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.fill_(float("nan"))
        >>> check_weights(layer)
        Traceback (most recent call last):
        ValueError: vma: 'weight' holds values that are not finite. Build or load it again.
    """
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"vma: {name!r} holds values that are not finite. Build or load it again.")
