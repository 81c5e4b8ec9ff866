"""The likelihood p(x | z, m_a): a decoder network and the distribution of an observation around its output."""

from __future__ import annotations

import abc
import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vmem.memory import Template
from pyro_vmem.nn import Decoder
from pyro_vmem.part import Part
from pyro_vmem.precision import full_precision

__all__ = ["BernoulliDecoder", "GaussianDecoder", "Likelihood"]


class Likelihood(Part):
    r"""A likelihood :math:`p(x | z, m_a)`.

    Arguments:
        network: The decoder whose output gives the parameters.
    """

    def __init__(self, network: Decoder) -> None:
        super().__init__()
        self.network = network

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one observation."""
        return self.network.event_shape

    @abc.abstractmethod
    def forward(self, z: Tensor, template: Template) -> dist.Distribution:
        r"""
        Arguments:
            z: The latent, with shape `(*, D)`.
            template: The template :math:`m_a`; its leading shape broadcasts with `(*)`.

        Returns:
            A distribution with batch shape `(*)` and the event shape of one observation.
        """

    def check(self, x: Tensor) -> None:
        """Raises a `ValueError` if `x` holds values that this likelihood gives no probability to."""


class BernoulliDecoder(Likelihood):
    r"""Independent binary pixels: :math:`p(x | z, m_a) = \prod_i \mathrm{Bernoulli}(x_i; \sigma(d(z, m_a)_i))`.

    Arguments:
        network: The decoder :math:`d`, whose outputs are logits.
        mean: The mean of a pixel to start from, in (0, 1); the share of ink in the data, so that training
            need not begin by finding it.

    Raises:
        ValueError: If `mean` is not between 0 and 1.

    Example:
        >>> from pyro_vmem.nn import MLPDecoder
        >>> p = BernoulliDecoder(MLPDecoder((1, 8, 8), latent_dim=4, num_features=16))
        >>> p(torch.randn(3, 4), Template(torch.rand(3, 1, 8, 8), torch.rand(3, 16))).event_shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, network: Decoder, mean: float = 0.5) -> None:
        super().__init__(network)
        if not 0 < mean < 1:
            raise ValueError(f"mean: expected a number between 0 and 1, got {mean}.")
        network.shift_output(math.log(mean / (1 - mean)))

    def forward(self, z: Tensor, template: Template) -> dist.Distribution:
        logits = full_precision(self.network(z, template))
        # The observation is checked once, where it enters: see `check`.
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(len(self.event_shape))

    def check(self, x: Tensor) -> None:
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError(
                f"x: BernoulliDecoder expects binary values, 0 or 1, got values in [{x.min():.3g}, {x.max():.3g}]. "
                "Binarise them, `(x > 0.5).float()`, or use a GaussianDecoder."
            )


class GaussianDecoder(Likelihood):
    r"""Independent Gaussian values with one learned scale: :math:`p(x | z, m_a) = N(d(z, m_a), \sigma^2 I)`.

    Arguments:
        network: The decoder :math:`d`, whose outputs are means.
        scale: The scale :math:`\sigma > 0` to start from.
        learn_scale: Whether the scale is learned.

    Raises:
        ValueError: If `scale` is not positive.

    Example:
        >>> from pyro_vmem.nn import MLPDecoder
        >>> p = GaussianDecoder(MLPDecoder((5,), latent_dim=4, num_features=16))
        >>> p(torch.randn(7, 3, 4), Template(torch.rand(3, 5), torch.rand(3, 16))).batch_shape
        torch.Size([7, 3])
    """

    def __init__(self, network: Decoder, scale: float = 1.0, learn_scale: bool = True) -> None:
        super().__init__(network)
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale}.")
        log_scale = torch.tensor(scale).log()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    log_scale: Tensor

    @property
    def scale(self) -> Tensor:
        r"""The scale :math:`\sigma`."""
        return self.log_scale.exp()

    def forward(self, z: Tensor, template: Template) -> dist.Distribution:
        loc = full_precision(self.network(z, template))
        return dist.Normal(loc, self.scale.to(loc.dtype)).to_event(len(self.event_shape))
