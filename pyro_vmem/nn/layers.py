"""Layers that encoders and decoders share; all act on trailing dims, none uses batch statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Join", "Residual", "as_images", "check_image_shape", "conv3", "half_size", "mlp"]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them.

    Example:
        >>> mlp(8, 16, 4)(torch.rand(5, 7, 8)).shape
        torch.Size([5, 7, 4])
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, or halves it (rounding up) with stride 2."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


class Residual(nn.Module):
    """`x + conv(relu(conv(relu(x))))`; the second convolution starts at zero, so the block starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = conv3(channels, channels), conv3(channels, channels)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return out


class Join(nn.Module):
    """One linear layer on two vectors together, applied to each apart and added.

    Leading dims broadcast, so what the second does not share with the first is computed once, not once a copy.
    """

    def __init__(self, first: int, second: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(first, outputs)
        self.second = nn.Linear(second, outputs, bias=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        out: Tensor = self.first(first) + self.second(second)
        return out


def half_size(size: Sequence[int]) -> tuple[int, int]:
    """Height and width halved, rounding up."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def as_images(x: Tensor) -> Tensor:
    """Leading dims folded into one, channels last in memory: `(*, C, H, W)` to `(N, C, H, W)`.

    Convolutions are faster in that layout on CPUs. The weights stay contiguous:
    Pyro's parameter store copies a parameter that is not, and would train the copy.
    """
    return x.reshape(-1, *x.shape[-3:]).contiguous(memory_format=torch.channels_last)


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """The image shape as `(C, H, W)`, or a `ValueError` that says what is wrong with it."""
    shape = tuple(int(n) for n in image_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"image_shape: expected (channels, height, width), got {shape}. For one channel write (1, height, width)."
        )
    return shape
