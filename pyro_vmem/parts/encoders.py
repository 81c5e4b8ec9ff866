"""Encoders: networks from an observation to a feature vector, and for images also to feature maps."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

from torch import Tensor, nn

from pyro_vmem._utils.checks import Size
from pyro_vmem.memory import Template
from pyro_vmem.parts.layers import Residual, as_images, check_image_shape, conv3, half_size, in_patches, mlp
from pyro_vmem.parts.part import Part

__all__ = ["ConvEncoder", "Encoder", "FlatEncoder", "MLPEncoder"]


class Encoder(Part):
    """A network from observations to features.

    Attributes:
        event_shape: The shape of one observation.
        num_features: The length `F` of its feature vector.
        map_channels: The channels of its feature maps, from fine to coarse; empty if there are none.
    """

    event_shape: tuple[int, ...]
    num_features: int
    map_channels: tuple[int, ...] = ()

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Template:
        """
        Arguments:
            x: Observations, with shape `(*, *event_shape)`.

        Returns:
            The observations with their features, with leading shape `(*)`.
        """


class FlatEncoder(Encoder):
    """Returns the flattened observation as its feature vector, without a network.

    Arguments:
        event_shape: The shape of one observation.

    Example:
        >>> import torch
        >>> FlatEncoder((2, 3))(torch.rand(5, 2, 3)).features.shape
        torch.Size([5, 6])
    """

    def __init__(self, event_shape: Sequence[Size]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_features = math.prod(self.event_shape)

    def forward(self, x: Tensor) -> Template:
        return Template(x, x.flatten(-len(self.event_shape)))


class MLPEncoder(Encoder):
    """A multilayer perceptron on the flattened observation.

    Arguments:
        event_shape: The shape of one observation.
        num_features: The length `F` of its feature vector.
        hidden: The widths of the hidden layers.

    Example:
        >>> import torch
        >>> MLPEncoder((8,), num_features=16)(torch.rand(5, 7, 8)).features.shape
        torch.Size([5, 7, 16])
    """

    def __init__(
        self, event_shape: Sequence[Size], num_features: Size = 128, hidden: tuple[Size, ...] = (256,)
    ) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_features = num_features
        self.network = nn.Sequential(mlp(math.prod(self.event_shape), *hidden, num_features), nn.ReLU())

    def forward(self, x: Tensor) -> Template:
        return Template(x, self.network(x.flatten(-len(self.event_shape))))


class ConvEncoder(Encoder):
    """A convolutional encoder for images of any size, with feature maps at half and quarter resolution.

    It starts from 2x2 patches, because layers at full resolution would cost more than all others together.

    Arguments:
        image_shape: `(channels, height, width)`.
        num_features: The length `F` of the feature vector.
        width: The channels at half resolution; twice as many below.

    Example:
        >>> import torch
        >>> template = ConvEncoder((1, 28, 28))(torch.rand(5, 1, 28, 28))
        >>> template.features.shape, [tuple(m.shape) for m in template.maps]
        (torch.Size([5, 128]), [(5, 32, 14, 14), (5, 64, 7, 7)])
    """

    def __init__(self, image_shape: Sequence[Size], num_features: Size = 128, width: Size = 32) -> None:
        super().__init__()
        channels, *size = check_image_shape(image_shape)
        self.event_shape = (channels, *size)
        self.num_features = num_features
        self.map_channels = (width, 2 * width)
        eighth = half_size(half_size(half_size(size)))
        self.fine = nn.Sequential(conv3(4 * channels, width), Residual(width), nn.ReLU())
        self.coarse = nn.Sequential(conv3(width, 2 * width, stride=2), Residual(2 * width), nn.ReLU())
        self.coarsest = nn.Sequential(conv3(2 * width, 2 * width, stride=2), nn.ReLU(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(2 * width * math.prod(eighth), num_features), nn.ReLU())

    def forward(self, x: Tensor) -> Template:
        leading, images = x.shape[:-3], as_images(x)
        fine = self.fine(in_patches(images))
        coarse = self.coarse(fine)
        features = self.head(self.coarsest(coarse))
        maps = (fine.reshape(*leading, *fine.shape[1:]), coarse.reshape(*leading, *coarse.shape[1:]))
        return Template(x, features.reshape(*leading, -1), maps)
