"""Distributions of values on evenly spaced levels in [0, 1], such as the grey levels of an image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from pyro_vmem._utils.checks import Several

__all__ = ["CategoricalLevels", "DiscretisedLogistic"]


class DiscretisedLogistic(TorchDistribution):
    r"""A logistic variable rounded to the nearest of :math:`n` levels :math:`0, 1/(n-1), \ldots, 1`.

    .. math:: p(x) = \sigma\left(\frac{x + h - \mu}{s}\right) - \sigma\left(\frac{x - h - \mu}{s}\right), \qquad
        h = \frac{1}{2 (n - 1)}

    The first and the last level take the tails. The difference is computed as a product,
    :math:`\sigma(a) - \sigma(b) = \sigma(a)\, \sigma(-b)\, (1 - e^{b - a})`, so no probability is rounded to zero.

    References:
        | PixelCNN++ (Salimans, Karpathy, Chen, Kingma, 2017), equation 2 | https://arxiv.org/abs/1701.05517

    Arguments:
        loc: The location :math:`\mu`.
        scale: The scale :math:`s > 0`.
        num_levels: The number :math:`n` of levels, at least 2.

    Example:
        >>> p = DiscretisedLogistic(torch.tensor(0.5), torch.tensor(0.1), num_levels=3)
        >>> p.log_prob(torch.tensor([0.0, 0.5, 1.0])).exp()
        tensor([0.0759, 0.8483, 0.0759])
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.unit_interval

    def __init__(
        self,
        loc: Float[Tensor, "*#batch"],
        scale: Float[Tensor, "*#batch"],
        num_levels: Several = 256,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.num_levels = num_levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretisedLogistic:
        return DiscretisedLogistic(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.num_levels, False)

    def log_prob(self, value: Tensor) -> Tensor:
        half = 0.5 / (self.num_levels - 1)
        first, last = value < half, value > 1 - half
        below = F.logsigmoid((value + half - self.loc) / self.scale)
        above = F.logsigmoid((self.loc - value + half) / self.scale)
        between = (-torch.expm1(-2 * half / self.scale)).log()
        zero = torch.zeros_like(below)
        # The last level has no upper edge, the first no lower one.
        return below.where(~last, zero) + above.where(~first, zero) + between.where(~first & ~last, zero)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            drawn = self.loc + self.scale * torch.logit(uniform, eps=torch.finfo(uniform.dtype).tiny)
            return (drawn.clamp(0, 1) * (self.num_levels - 1)).round() / (self.num_levels - 1)

    @property
    def mean(self) -> Tensor:
        """The mean, by the sum of the probabilities to reach each level; in the shape of a draw."""
        n = self.num_levels
        reached = torch.zeros_like(self.loc)
        for level in range(1, n):  # in turn: all at once would take n times the memory
            reached = reached + torch.sigmoid((self.loc - (level - 0.5) / (n - 1)) / self.scale)
        return reached / (n - 1)


class CategoricalLevels(TorchDistribution):
    r"""A categorical distribution over :math:`n` levels :math:`0, 1/(n-1), \ldots, 1`.

    Arguments:
        logits: Unnormalised log-probabilities, with shape `(*, n)`.

    Example:
        >>> p = CategoricalLevels(torch.tensor([0.0, 0.0, -100.0]))
        >>> p.log_prob(torch.tensor([0.0, 0.5])).exp(), p.mean
        (tensor([0.5000, 0.5000]), tensor(0.2500))
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012
    support = constraints.unit_interval

    def __init__(self, logits: Float[Tensor, "... L"], validate_args: bool | None = None) -> None:
        self.logits = logits.log_softmax(-1)
        self.num_levels = logits.shape[-1]
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> CategoricalLevels:
        return CategoricalLevels(self.logits.expand(*batch_shape, -1), False)

    def log_prob(self, value: Tensor) -> Tensor:
        level = (value * (self.num_levels - 1)).round().long()
        shape = torch.broadcast_shapes(level.shape, self.batch_shape)
        log_probs = self.logits.expand(*shape, -1)
        return log_probs.gather(-1, level.expand(shape).unsqueeze(-1)).squeeze(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        drawn = torch.distributions.Categorical(logits=self.logits).sample(torch.Size(sample_shape))
        return drawn.to(self.logits.dtype) / (self.num_levels - 1)

    @property
    def mean(self) -> Tensor:
        """The mean, in the shape of a draw."""
        levels = torch.linspace(0, 1, self.num_levels, dtype=self.logits.dtype, device=self.logits.device)
        return (self.logits.exp() * levels).sum(-1)
