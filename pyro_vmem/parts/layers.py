"""Layers of encoders and decoders. They act on trailing dims and use no batch statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vmem._utils.checks import Size
from pyro_vmem._utils.precision import full_precision

__all__ = [
    "Doubling",
    "Join",
    "Residual",
    "as_images",
    "check_image_shape",
    "conv3",
    "half_size",
    "in_patches",
    "mlp",
    "unit",
]


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

    def __init__(self, channels: Size) -> None:
        super().__init__()
        self.first, self.second = conv3(channels, channels), conv3(channels, channels)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return out


class Doubling(nn.Conv2d):
    """A 1x1 convolution with four outputs per channel, which become 2x2 pixels: twice the height and width.

    It equals `pixel_shuffle` of the convolution, which is slow with channels last. Here the weights are in an order
    that lets whole runs of channels be copied.

    Example:
        >>> double = Doubling(6, 3)
        >>> images = torch.rand(2, 6, 5, 4)
        >>> torch.allclose(double(images), F.pixel_shuffle(double._conv_forward(images, double.weight, double.bias), 2))
        True
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, 4 * outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        assert self.bias is not None
        weight = self.weight.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)
        bias = self.bias.unflatten(0, (-1, 4)).mT.flatten()
        pixels = F.conv2d(images, weight, bias).permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))
        return pixels.transpose(2, 3).flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)


class Join(nn.Module):
    """One linear layer on two concatenated vectors, computed as a sum of two layers.

    Leading dims broadcast, so each vector is multiplied once, not once per copy.
    """

    def __init__(self, first: int, second: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(first, outputs)
        self.second = nn.Linear(second, outputs, bias=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        out: Tensor = self.first(first) + self.second(second)
        return out


def unit(vectors: Tensor) -> Tensor:
    """Vectors `(*, F)` divided by their norm, in full precision."""
    return F.normalize(full_precision(vectors), dim=-1)


def as_images(x: Tensor) -> Tensor:
    """Leading dims folded into one, channels last in memory: `(*, C, H, W)` to `(N, C, H, W)`.

    Convolutions are faster in that layout on CPUs. The weights stay contiguous:
    Pyro's parameter store copies a parameter that is not, and would train the copy.
    """
    return x.reshape(-1, *x.shape[-3:]).contiguous(memory_format=torch.channels_last)


def half_size(size: Sequence[int]) -> tuple[int, int]:
    """Height and width halved, rounding up."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def in_patches(images: Tensor) -> Tensor:
    """Patches of 2x2 pixels as channels, channels last in memory: `(N, C, H, W)` to `(N, 4 C, H / 2, W / 2)`.

    Odd sizes are rounded up, with zeros.
    """
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        images = F.pad(images, (0, width % 2, 0, height % 2))
    # With one channel the layout is ambiguous; unless it is stated, all following layers use the slower one.
    return F.pixel_unshuffle(images, 2).contiguous(memory_format=torch.channels_last)


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """The image shape as `(C, H, W)`; raises a `ValueError` if it is none."""
    shape = tuple(int(n) for n in image_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"image_shape: expected (channels, height, width), got {shape}. For one channel write (1, height, width)."
        )
    return shape
