"""The memory layout in which convolutions are fast."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_images"]


def as_images(x: Tensor) -> Tensor:
    """Leading dims folded into one, channels last in memory: `(*, C, H, W)` to `(N, C, H, W)`.

    Convolutions are faster in that layout on CPUs. The weights stay contiguous:
    Pyro's parameter store copies a parameter that is not, and would train the copy.
    """
    return x.reshape(-1, *x.shape[-3:]).contiguous(memory_format=torch.channels_last)
