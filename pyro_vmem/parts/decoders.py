"""Decoders: networks from a latent and a template to the parameters of an observation's distribution."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vmem._utils.checks import Share, Size
from pyro_vmem._utils.precision import full_precision, no_autocast
from pyro_vmem.memory import Template
from pyro_vmem.parts.layers import (
    Doubling,
    Join,
    Residual,
    as_images,
    check_image_shape,
    conv3,
    half_size,
    in_patches,
    mlp,
)
from pyro_vmem.parts.part import Part

__all__ = ["ConvDecoder", "Decoder", "MLPDecoder", "WarpDecoder", "log_odds"]


class Decoder(Part):
    """A network from a latent and a template to an output, usually with the shape of an observation.

    Attributes:
        event_shape: The shape of the output.
        latent_dim: The length `D` of the latent.
    """

    event_shape: tuple[int, ...]
    latent_dim: int

    @abc.abstractmethod
    def forward(self, z: Tensor, template: Template) -> Tensor:
        """
        Arguments:
            z: The latent, with shape `(*, D)`.
            template: The template; its leading shape broadcasts with `(*)`.

        Returns:
            The output, with shape `(*, *event_shape)`.
        """


def log_odds(mean: Share) -> float:
    r"""The log-odds :math:`\log \frac{p}{1 - p}` of a mean :math:`p`: the initial output for binary pixels.

    Example:
        >>> log_odds(0.5)
        0.0
    """
    return math.log(mean / (1 - mean))


class MLPDecoder(Decoder):
    """A multilayer perceptron on the latent and the template's features.

    Arguments:
        event_shape: The shape of one observation.
        latent_dim: The length `D` of the latent.
        num_features: The length `F` of the template's feature vector.
        hidden: The widths of the hidden layers, at least one.
        level: The initial mean of every output, such as :func:`log_odds` of the mean of the data. Default: near zero.

    Raises:
        ValueError: If `hidden` is empty.

    Example:
        >>> decoder = MLPDecoder((8,), latent_dim=4, num_features=16)
        >>> decoder(torch.randn(5, 3, 4), Template(torch.rand(3, 8), torch.rand(3, 16))).shape
        torch.Size([5, 3, 8])
    """

    def __init__(
        self,
        event_shape: Sequence[Size],
        latent_dim: Size = 32,
        num_features: Size = 128,
        hidden: tuple[Size, ...] = (256,),
        level: float | None = None,
    ) -> None:
        super().__init__()
        if len(hidden) == 0:
            raise ValueError("hidden: expected at least one hidden width, got (). Try hidden=(256,).")
        self.event_shape = tuple(event_shape)
        self.latent_dim = latent_dim
        self.join = Join(latent_dim, num_features, hidden[0])
        layers = mlp(*hidden, math.prod(self.event_shape))
        self.network = nn.Sequential(nn.ReLU(), layers)
        last = layers[-1]
        assert isinstance(last, nn.Linear)
        _start_at(last.bias, level)

    def forward(self, z: Tensor, template: Template) -> Tensor:
        out: Tensor = self.network(self.join(z, template.features)).unflatten(-1, self.event_shape)
        return out


class ConvDecoder(Decoder):
    """A convolutional decoder that reads the features of the template: a vector, and maps as skip connections.

    It is the baseline for :class:`WarpDecoder`, the default.

    Arguments:
        image_shape: `(channels, height, width)`.
        latent_dim: The length `D` of the latent.
        num_features: The length `F` of the template's feature vector.
        map_channels: The channels of the template's maps, those at half and those at quarter resolution, as
            :class:`ConvEncoder` makes them; `None` for a decoder without skips.
        width: The channels at half resolution; twice as many below.
        out_channels: The channels of the output; by default those of an image.
        level: What every pixel starts around; see :class:`MLPDecoder`.

    Example:
        >>> from pyro_vmem.parts import ConvEncoder
        >>> template = ConvEncoder((1, 28, 28))(torch.rand(3, 1, 28, 28))
        >>> ConvDecoder((1, 28, 28), latent_dim=4)(torch.randn(5, 3, 4), template).shape
        torch.Size([5, 3, 1, 28, 28])
    """

    def __init__(
        self,
        image_shape: Sequence[Size],
        latent_dim: Size = 32,
        num_features: Size = 128,
        map_channels: tuple[Size, Size] | None = (32, 64),
        width: Size = 32,
        out_channels: Size | None = None,
        level: float | None = None,
    ) -> None:
        super().__init__()
        channels, *size = check_image_shape(image_shape)
        self.event_shape = (out_channels or channels, *size)
        self.latent_dim = latent_dim
        self.coarse = _Coarse(size, latent_dim, num_features, map_channels, width)
        self.fine = _Fine(size, channels, self.event_shape[0], 0, map_channels, width, level)

    def forward(self, z: Tensor, template: Template) -> Tensor:
        leading = torch.broadcast_shapes(z.shape[:-1], template.leading_shape)
        images = self.fine(self.coarse(z, template, leading), None, template, leading)
        return images.reshape(*leading, *self.event_shape)


class WarpDecoder(Decoder):
    r"""A convolutional decoder that also warps the template by a displacement field.

    The latent determines an affine map :math:`A` and a smooth field :math:`d` on a grid at quarter resolution. The
    template and two blurs of it are sampled at :math:`u + A u + d(u)`. A warped template is already a plausible
    drawing, so the memory is useful from the first steps on. `pyro-vmem train --data omniglot --steps 600 --out DIR`
    validates at a bound of -105.1 nats per image, and with `--decoder conv` at -111.5 (one seed).

    Arguments are those of :class:`ConvDecoder`.

    References:
        | Spatial Transformer Networks (Jaderberg et al., 2015) | https://arxiv.org/abs/1506.02025

    Example:
        >>> from pyro_vmem.parts import ConvEncoder
        >>> template = ConvEncoder((1, 28, 28))(torch.rand(3, 1, 28, 28))
        >>> WarpDecoder((1, 28, 28), latent_dim=4)(torch.randn(5, 3, 4), template).shape
        torch.Size([5, 3, 1, 28, 28])
    """

    def __init__(
        self,
        image_shape: Sequence[Size],
        latent_dim: Size = 32,
        num_features: Size = 128,
        map_channels: tuple[Size, Size] | None = (32, 64),
        width: Size = 32,
        out_channels: Size | None = None,
        level: float | None = None,
    ) -> None:
        super().__init__()
        channels, *size = check_image_shape(image_shape)
        self.event_shape = (out_channels or channels, *size)
        self.latent_dim = latent_dim
        views = 3 * channels  # the template and two blurs of it
        self.coarse = _Coarse(size, latent_dim, num_features, map_channels, width)
        self.affine = nn.Linear(2 * width, 6)
        self.field = conv3(2 * width, 2)
        self.fine = _Fine(size, channels, self.event_shape[0], 4 * views, map_channels, width, level)
        self.show = nn.Conv2d(views, self.event_shape[0], 1, bias=False)
        for name, values in zip(("down", "right", "pixels"), _coordinates(self.event_shape[1:]), strict=True):
            self.register_buffer(name, values, persistent=False)  # Constants of the sizes, so they are not saved.
        with torch.no_grad():
            # It starts by drawing the template itself ...
            self.show.weight.copy_(torch.eye(self.event_shape[0], channels).repeat(1, 3)[..., None, None])
            for layer in (self.affine, self.field):  # ... without a warp.
                layer.weight.mul_(0.1)
                assert layer.bias is not None
                layer.bias.zero_()

    down: Tensor
    right: Tensor
    pixels: Tensor

    def forward(self, z: Tensor, template: Template) -> Tensor:
        leading = torch.broadcast_shapes(z.shape[:-1], template.leading_shape)
        coarse = self.coarse(z, template, leading)
        hidden = F.relu(coarse)
        grid = self._grid(full_precision(self.affine(hidden.mean((-2, -1)))), full_precision(self.field(hidden)))
        views = _copies(as_images(template.map_unique(_views)), template.leading_shape, leading)
        warped = F.grid_sample(views, grid.to(views.dtype), align_corners=False)
        images = self.fine(coarse, in_patches(warped), template, leading) + _weighed(self.show.weight, warped)
        return images.reshape(*leading, *self.event_shape)

    def _grid(self, affine: Tensor, field: Tensor) -> Tensor:
        """The place in the template that each pixel of the output is read from: `(N, H, W, 2)`, in [-1, 1]."""
        with no_autocast(affine):  # Half precision would shift places by a part of a pixel.
            identity = torch.eye(2, 3, dtype=affine.dtype, device=affine.device)
            straight = (identity + affine.unflatten(-1, (2, 3))) @ self.pixels
            grid = straight.unflatten(-1, self.event_shape[1:]) + self.down @ (field @ self.right)
        return grid.permute(0, 2, 3, 1)


def _coordinates(size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices by which a warp is computed; six times as fast as `F.interpolate` and `F.affine_grid` at each step.

    Returns:
        Bilinear interpolation from a quarter of the size along the height, `(H, h)`, and along the width, `(w, W)`; and
        the coordinates x, y, 1 of each pixel in [-1, 1], `(3, H W)`.
    """
    small = half_size(half_size(size))
    down, right = (
        F.interpolate(torch.eye(few).unsqueeze(1), size=many, mode="linear", align_corners=False).squeeze(1)
        for few, many in zip(small, size, strict=True)
    )
    places = F.affine_grid(torch.eye(2, 3).unsqueeze(0), [1, 1, *size], align_corners=False).flatten(0, 2).mT
    return down.mT.contiguous(), right, torch.cat([places, torch.ones(1, places.shape[1])])


def _weighed(weight: Tensor, images: Tensor) -> Tensor:
    """A 1x1 convolution `(C', C, 1, 1)` of `(N, C, H, W)`, faster where channels are few."""
    if len(weight) == 1:
        out = weight[:, :1] * images[:, :1]
        for channel in range(1, images.shape[1]):
            out = out + weight[:, channel, None] * images[:, channel, None]
        return out
    return F.linear(images.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)


def _views(template: Template) -> Tensor:
    """The template and two blurs of it, as channels of images."""
    sharp = as_images(template.raw)
    blurred = _blur(sharp, 3)
    views = torch.cat([sharp, blurred, _blur(blurred, 5)], dim=1)
    return views.reshape(*template.leading_shape, *views.shape[1:])


def _blur(images: Tensor, size: int) -> Tensor:
    """The mean over a square of `size` pixels around each pixel, zeros outside; five times as fast as pooling."""
    around = F.pad(images, (size // 2,) * 4)
    return around.unfold(-1, size, 1).sum(-1).unfold(-2, size, 1).sum(-1) / size**2


class _Coarse(nn.Module):
    """From latent and template to feature maps at quarter resolution."""

    def __init__(
        self, size: Sequence[int], latent_dim: int, num_features: int, maps: tuple[int, int] | None, width: int
    ) -> None:
        super().__init__()
        self.size = (2 * width, *half_size(half_size(size)))
        self.join = Join(latent_dim, num_features, 4 * width)
        self.spread = nn.Linear(4 * width, math.prod(self.size))
        self.skip = nn.Conv2d(maps[1], 2 * width, 1) if maps else None
        self.mix = Residual(2 * width)

    def forward(self, z: Tensor, template: Template, leading: torch.Size) -> Tensor:
        joined = F.relu(self.join(z, template.features)).expand(*leading, -1)
        # Channels last from the start: the outputs of the linear layer are in the order (height, width, channel).
        channels, height, width = self.size
        maps = self.spread(joined).reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        if self.skip is not None:
            maps = maps + _skip(self.skip, template, 1, leading)
        return self.mix(maps)


class _Fine(nn.Module):
    """From maps at quarter resolution, patches at half resolution and the template to images."""

    def __init__(
        self,
        image_size: Sequence[int],
        channels: int,
        out_channels: int,
        patches: int,
        map_channels: tuple[int, int] | None,
        width: int,
        level: float | None,
    ) -> None:
        super().__init__()
        self.size, self.at_half = image_size, half_size(image_size)
        self.up = Doubling(2 * width, width)
        self.look = conv3(patches, width) if patches else None
        self.skip = nn.Conv2d(map_channels[0], width, 1) if map_channels else None
        self.mix = Residual(width)
        self.out = conv3(width, out_channels * 4)
        assert self.out.bias is not None
        _start_at(self.out.bias[: 4 * channels], level)  # The other outputs are no image.

    def forward(self, coarse: Tensor, patches: Tensor | None, template: Template, leading: torch.Size) -> Tensor:
        maps = self.up(F.relu(coarse))[..., : self.at_half[0], : self.at_half[1]]
        if self.look is not None:
            maps = maps + self.look(patches)
        if self.skip is not None:
            maps = maps + _skip(self.skip, template, 0, leading)
        images = F.pixel_shuffle(self.out(F.relu(self.mix(maps))), 2)
        return images[..., : self.size[0], : self.size[1]]


def _start_at(bias: Tensor, level: float | None) -> None:
    if level is not None:
        nn.init.constant_(bias, level)


def _skip(layer: nn.Conv2d, template: Template, which: int, leading: torch.Size) -> Tensor:
    """Applies a 1x1 convolution to the maps of a template, once per template, and copies the result to `leading`."""

    def applied(template: Template) -> Tensor:
        # A linear layer of each pixel starts in a third of the time.
        pixels = F.linear(template.maps[which].movedim(-3, -1), layer.weight.flatten(1), layer.bias)
        return pixels.movedim(-1, -3)

    return _copies(as_images(template.map_unique(applied)), template.leading_shape, leading)


def _copies(images: Tensor, shape: torch.Size, leading: torch.Size) -> Tensor:
    """Images `(N, C, H, W)` of leading shape `shape`, broadcast to `leading` and folded again, channels last."""
    if shape == leading:
        return images
    # Copied in the order (height, width, channel), so that the layout needs no second copy.
    pixels = images.permute(0, 2, 3, 1).reshape(*shape, *images.shape[-2:], images.shape[1])
    pixels = pixels.expand(*leading, *pixels.shape[-3:]).reshape(-1, *pixels.shape[-3:])
    return pixels.permute(0, 3, 1, 2)
