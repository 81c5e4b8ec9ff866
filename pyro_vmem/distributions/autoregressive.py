"""An autoregressive distribution of binary images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vmem._utils.precision import full_precision
from pyro_vmem.distributions.causal_network import CausalNetwork

__all__ = ["CausalBernoulli"]


class CausalBernoulli(TorchDistribution):
    r"""Autoregressive binary pixels, by rows: :math:`p(x) = \prod_i \mathrm{Bernoulli}(x_i; \sigma(\ell_i(x_{<i})))`.

    A density is computed for all pixels at once. A draw is made pixel by pixel.

    References:
        | Pixel Recurrent Neural Networks (van den Oord, Kalchbrenner, Kavukcuoglu, 2016) | https://arxiv.org/abs/1601.06759
        | PixelVAE: A Latent Variable Model for Natural Images (Gulrajani et al., 2017) | https://arxiv.org/abs/1611.05013

    Arguments:
        output: The output of a decoder, with shape `(*, C + context, H, W)`.
        network: The network on the preceding pixels.

    Example:
        >>> p = CausalBernoulli(torch.zeros(5, 9, 4, 4), CausalNetwork(channels=1, context=8))
        >>> x = p.sample()
        >>> x.shape, p.log_prob(x).shape
        (torch.Size([5, 1, 4, 4]), torch.Size([5]))
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, output: Tensor, network: CausalNetwork, validate_args: bool | None = None) -> None:
        self.output, self.network = output, network
        event_shape = torch.Size([network.channels, *output.shape[-2:]])
        super().__init__(output.shape[:-3], event_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Images of zeros and ones."""
        return constraints.independent(constraints.boolean, 3)

    def expand(self, batch_shape: Any, _instance: Any = None) -> CausalBernoulli:
        return CausalBernoulli(self.output.expand(*batch_shape, *self.output.shape[-3:]), self.network, False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits = self.logits(value)
        targets = value.to(logits.dtype).expand_as(logits)
        return -F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum((-3, -2, -1))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # as torch has it
        shape = self._extended_shape(sample_shape)
        unknown = torch.zeros(self.event_shape, dtype=torch.bool, device=self.output.device)
        drawn, _ = self.fill(self.output.new_zeros(shape, dtype=full_precision(self.output).dtype), unknown)
        return drawn

    @torch.no_grad()
    def probs_given_draw(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # as torch has it
        """The probability of each pixel given a draw of the preceding ones, with shape `(*, C, H, W)`.

        It is random, with the right expectation. The mean has no closed form, so there is no `mean`.
        """
        return self.probs(self.sample(torch.Size(sample_shape)))

    @torch.no_grad()
    def probs(self, x: Tensor) -> Tensor:
        """The probability of each pixel given the preceding ones in `x`, with shape `(*, C, H, W)`."""
        return self.logits(x).sigmoid()

    def logits(self, x: Tensor) -> Tensor:
        """The log-odds of each pixel given the preceding ones in `x`, with shape `(*, C, H, W)`."""
        return full_precision(self.network.logits(self.output, self.network(x)))

    @torch.no_grad()
    def fill(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        r"""Draws the missing pixels in order, each given the preceding ones, known or drawn.

        Arguments:
            x: Images, with shape `(*, C, H, W)`; the leading shape ends in the batch shape of this distribution.
            known: True where a pixel of `x` is known; broadcasts with `x`.

        Returns:
            The completed images and their log-weights :math:`\log \prod_{i\ \mathrm{known}} p(x_i | x_{<i})`. The mean
            weight estimates the probability of the known pixels.
        """
        _, height, width = self.event_shape
        radius, network = self.network.radius, self.network
        maps = self.output.shape[-3:]
        output = self.output.expand(*x.shape[:-3], *maps).reshape(-1, *maps)
        images, known = x.reshape(-1, *self.event_shape), known.expand_as(x).reshape(-1, *self.event_shape)
        canvas = network.pad(torch.where(known, images, torch.zeros_like(images)))
        log_known = full_precision(output).new_zeros(len(images))
        for row in range(height):
            for column in range(width):
                window = canvas[..., row : row + radius + 1, column : column + 2 * radius + 1].flatten(1)
                past = network.of_windows(window)[..., None, None]
                here = output[..., row : row + 1, column : column + 1]
                logits = full_precision(network.logits(here, past))[..., 0, 0]
                pixel, given = images[..., row, column], known[..., row, column]
                drawn = torch.where(given, pixel, torch.bernoulli(logits.sigmoid()).to(pixel.dtype))
                log_pixel = -F.binary_cross_entropy_with_logits(logits, drawn.to(logits.dtype), reduction="none")
                log_known += (log_pixel * given).sum(-1)
                canvas[..., row + radius, column + radius] = drawn
        filled = canvas[..., radius:, radius : radius + width]
        return filled.reshape(x.shape), log_known.reshape(x.shape[:-3])
