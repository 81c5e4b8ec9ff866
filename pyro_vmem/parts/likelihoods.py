"""Likelihoods p(x | z, m_a): a decoder and the distribution of an observation given its output."""

from __future__ import annotations

import abc
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vmem._utils.checks import Few, Positive, Several, Size
from pyro_vmem._utils.precision import full_precision
from pyro_vmem.distributions import CategoricalLevels, CausalBernoulli, CausalNetwork, DiscretisedLogistic
from pyro_vmem.memory import Template
from pyro_vmem.parts.decoders import Decoder
from pyro_vmem.parts.part import Part

__all__ = [
    "BernoulliDecoder",
    "CategoricalDecoder",
    "CausalBernoulliDecoder",
    "DiscretisedLogisticDecoder",
    "GaussianDecoder",
    "Likelihood",
]


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
        """Raises a `ValueError` if `x`, `(*, *event)`, holds values outside the support."""

    def draw(self, p_x: Any, mean: bool = False) -> Tensor:
        """Draws observations from a returned distribution, or their means, with shape `(*, *event)`."""
        drawn: Tensor = p_x.mean if mean else p_x.sample()
        return drawn

    def fill(self, p_x: Any, x: Tensor, known: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
        r"""Draws the missing values of observations.

        Arguments:
            p_x: A distribution that this likelihood returned.
            x: Observations, with shape `(B, *event)`; missing values are ignored.
            known: True where a value is known, with the shape of `x`.
            mean: Whether to fill in means instead of draws.

        Returns:
            The completed observations, with shape `(*, B, *event)`, and their log-weights, `(*, B)`. The mean weight
            estimates the probability of the known values.
        """
        event_dims = tuple(range(-len(self.event_shape), 0))
        log_known = (p_x.base_dist.log_prob(x) * known).sum(event_dims)
        return torch.where(known, x, self.draw(p_x, mean)), log_known


def _check_binary(part: Likelihood, x: Tensor) -> None:
    """Raises a `ValueError` if `x`, `(*, *event)`, holds another value than 0 and 1."""
    if not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(
            f"x: {type(part).__name__} expects binary values, 0 or 1, got values in [{x.min():.3g}, {x.max():.3g}]. "
            "Binarise them, `(x > 0.5).float()`, or use a GaussianDecoder."
        )


def _check_on_levels(part: Any, x: Tensor) -> None:
    """Raises a `ValueError` if a value of `x`, `(*, *event)`, is on no level."""
    n = part.num_levels
    levels = x * (n - 1)
    if not bool((((levels - levels.round()).abs() < 1e-3) & (x >= 0) & (x <= 1)).all()):
        raise ValueError(
            f"x: {type(part).__name__} expects {n} levels, 0, 1/{n - 1}, ..., 1, got others in "
            f"[{x.min():.3g}, {x.max():.3g}]. Round them, `({n - 1} * x).round() / {n - 1}`, or use a GaussianDecoder."
        )


class BernoulliDecoder(Likelihood):
    r"""Independent binary pixels: :math:`p(x | z, m_a) = \prod_i \mathrm{Bernoulli}(x_i; \sigma(d(z, m_a)_i))`.

    Arguments:
        network: The decoder :math:`d`, whose outputs are logits.

    Example:
        >>> from pyro_vmem.parts import MLPDecoder
        >>> p = BernoulliDecoder(MLPDecoder((1, 8, 8), latent_dim=4, num_features=16))
        >>> p(torch.randn(3, 4), Template(torch.rand(3, 1, 8, 8), torch.rand(3, 16))).event_shape
        torch.Size([1, 8, 8])
    """

    def forward(self, z: Tensor, template: Template) -> dist.Distribution:
        logits = full_precision(self.network(z, template))
        # `check` looks at observations once, where they enter the model.
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(len(self.event_shape))

    check = _check_binary


class CausalBernoulliDecoder(Likelihood):
    r"""An autoregressive likelihood of binary pixels:

    .. math:: p(x | z, m_a) = \prod_i \mathrm{Bernoulli}(x_i; \sigma(\ell_i(x_{<i}, z, m_a)))

    Each pixel depends on the pixels above it and to its left within `radius`. They carry local detail, such as the
    edges of strokes, so latent and template can carry the global form. The network on the pixels runs once per target,
    not once per particle. A decoder pass therefore costs little more than with :class:`BernoulliDecoder`. Draws are
    made pixel by pixel.

    References:
        | PixelVAE: A Latent Variable Model for Natural Images (Gulrajani et al., 2017) | https://arxiv.org/abs/1611.05013
        | Variational Lossy Autoencoder (Chen et al., 2017), section 3.2, on local windows
        | https://arxiv.org/abs/1611.02731

    Arguments:
        network: The decoder, with `context` output channels more than an image has.
        context: The number of features of the preceding pixels; each is multiplied with an output of the decoder.
        hidden: The width of the network on the preceding pixels.
        radius: How far the network sees to the left, to the right and above, in pixels.

    Raises:
        ValueError: If the outputs of the network are not images with more than `context` channels.

    Example:
        >>> from pyro_vmem.parts import ConvEncoder, WarpDecoder
        >>> p = CausalBernoulliDecoder(WarpDecoder((1, 12, 12), latent_dim=4, out_channels=9))
        >>> template = ConvEncoder((1, 12, 12))(torch.rand(3, 1, 12, 12))
        >>> p(torch.randn(5, 3, 4), template).sample().shape
        torch.Size([5, 3, 1, 12, 12])
    """

    def __init__(self, network: Decoder, context: Size = 8, hidden: Size = 64, radius: Few = 5) -> None:
        super().__init__(network)
        if len(network.event_shape) != 3 or network.event_shape[0] <= context:
            raise ValueError(
                f"network: expected images with more than context={context} channels, got outputs of shape "
                f"{network.event_shape}. Give the decoder out_channels: those of an image + {context}."
            )
        self.context = context
        self.past = CausalNetwork(network.event_shape[0] - context, context, hidden, radius)

    @property
    def event_shape(self) -> tuple[int, ...]:
        channels, *size = self.network.event_shape
        return (channels - self.context, *size)

    def forward(self, z: Tensor, template: Template) -> dist.Distribution:
        return CausalBernoulli(self.network(z, template), self.past, validate_args=False)

    def draw(self, p_x: Any, mean: bool = False) -> Tensor:
        """Draws images, `(*, C, H, W)`, or the mean of each pixel given a draw of the preceding ones."""
        drawn: Tensor = p_x.probs_given_draw() if mean else p_x.sample()
        return drawn

    def fill(self, p_x: Any, x: Tensor, known: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
        filled, log_known = p_x.fill(x.expand(p_x.batch_shape + p_x.event_shape), known)
        return torch.where(known, x, p_x.probs(filled)) if mean else filled, log_known

    check = _check_binary


class GaussianDecoder(Likelihood):
    r"""Independent Gaussian values with one learned scale: :math:`p(x | z, m_a) = N(d(z, m_a), \sigma^2 I)`.

    Arguments:
        network: The decoder :math:`d`, whose outputs are means.
        scale: The initial scale :math:`\sigma > 0`.
        learn_scale: Whether the scale is learned.

    Example:
        >>> from pyro_vmem.parts import MLPDecoder
        >>> p = GaussianDecoder(MLPDecoder((5,), latent_dim=4, num_features=16))
        >>> p(torch.randn(7, 3, 4), Template(torch.rand(3, 5), torch.rand(3, 16))).batch_shape
        torch.Size([7, 3])
    """

    def __init__(self, network: Decoder, scale: Positive = 1.0, learn_scale: bool = True) -> None:
        super().__init__(network)
        log_scale = torch.tensor(scale).log()
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    log_scale: Tensor

    @property
    def scale(self) -> Tensor:
        r"""The scale :math:`\sigma`, a scalar."""
        return self.log_scale.exp()

    def forward(self, z: Tensor, template: Template) -> dist.Distribution:
        loc = full_precision(self.network(z, template))
        return dist.Normal(loc, self.scale.to(loc.dtype)).to_event(len(self.event_shape))


class DiscretisedLogisticDecoder(Likelihood):
    r"""Independent grey levels: :math:`p(x | z, m_a) = \prod_i \mathrm{DL}_n(x_i; d(z, m_a)_i, s)`.

    A logistic density around the output of the decoder, with one learned scale, is integrated over the interval of
    each level. The result is a probability, so nats refer to the data as stored. Values are
    :math:`0, 1/(n-1), \ldots, 1`.

    References:
        | PixelCNN++ (Salimans, Karpathy, Chen, Kingma, 2017), equation 2 | https://arxiv.org/abs/1701.05517
        | Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), with one scale
        | https://arxiv.org/abs/1606.04934

    Arguments:
        network: The decoder :math:`d`, whose outputs are the centres.
        num_levels: The number :math:`n` of levels, at least 2.
        scale: The initial scale :math:`s > 0`.

    Example:
        >>> from pyro_vmem.parts import MLPDecoder
        >>> p = DiscretisedLogisticDecoder(MLPDecoder((1, 8, 8), latent_dim=4, num_features=16), num_levels=16)
        >>> x = p(torch.randn(3, 4), Template(torch.rand(3, 1, 8, 8), torch.rand(3, 16))).sample()
        >>> p.check(x)  # fits
        >>> p.check(x / 3)
        Traceback (most recent call last):
        ValueError: x: DiscretisedLogisticDecoder expects 16 levels, 0, 1/15, ..., 1, got others in [0, ...]...
    """

    def __init__(self, network: Decoder, num_levels: Several = 256, scale: Positive = 0.1) -> None:
        super().__init__(network)
        self.num_levels = num_levels
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    @property
    def scale(self) -> Tensor:
        r"""The scale :math:`s`, a scalar."""
        return self.log_scale.exp()

    def forward(self, z: Tensor, template: Template) -> dist.Distribution:
        loc = full_precision(self.network(z, template))
        p = DiscretisedLogistic(loc, self.scale.to(loc.dtype), self.num_levels, validate_args=False)
        return p.to_event(len(self.event_shape))

    check = _check_on_levels


class CategoricalDecoder(Likelihood):
    r"""Independent categorical levels: :math:`\prod_i \mathrm{Cat}(x_i; d(z, m_a)_{\cdot i})`.

    Levels have no order, so it also fits symbols and several modes. For many ordered levels
    :class:`DiscretisedLogisticDecoder` has fewer outputs. Values are :math:`0, 1/(n-1), \ldots, 1`.

    References:
        | Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016), section 2.2
        | https://arxiv.org/abs/1601.06759

    Arguments:
        network: The decoder :math:`d`, whose outputs are logits. The first dim is :math:`n` times that of an
            observation: `MLPDecoder((n * 5,))` for vectors of 5, `ConvDecoder((n * 3, 28, 28))` for images of 3
            channels.
        num_levels: The number :math:`n` of levels, at least 2.

    Raises:
        ValueError: If `num_levels` does not divide the outputs of the network.

    Example:
        >>> from pyro_vmem.parts import MLPDecoder
        >>> p = CategoricalDecoder(MLPDecoder((4 * 5,), latent_dim=2, num_features=16), num_levels=4)
        >>> p(torch.randn(3, 2), Template(torch.rand(3, 5), torch.rand(3, 16))).sample().shape
        torch.Size([3, 5])
    """

    def __init__(self, network: Decoder, num_levels: Several = 256) -> None:
        super().__init__(network)
        if network.event_shape[0] % num_levels:
            raise ValueError(
                f"network: expected {num_levels} outputs for each value, got outputs of shape {network.event_shape}. "
                f"Make its first dim {num_levels} times that of an observation."
            )
        self.num_levels = num_levels

    @property
    def event_shape(self) -> tuple[int, ...]:
        first, *rest = self.network.event_shape
        return (first // self.num_levels, *rest)

    def forward(self, z: Tensor, template: Template) -> dist.Distribution:
        dims = len(self.event_shape)
        outputs = full_precision(self.network(z, template)).unflatten(-dims, (self.num_levels, -1))
        return CategoricalLevels(outputs.movedim(-dims - 1, -1), validate_args=False).to_event(dims)

    check = _check_on_levels
