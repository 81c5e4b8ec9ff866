"""Gaussian latent priors p(z | m_a) and latent guides q(z | x, m_a)."""

from __future__ import annotations

import abc
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vmem._utils.checks import Several, Size
from pyro_vmem._utils.precision import full_precision, no_autocast
from pyro_vmem.memory import Template
from pyro_vmem.parts.layers import Join, mlp
from pyro_vmem.parts.part import Part

__all__ = [
    "FullCovarianceGuide",
    "FullCovariancePrior",
    "FullPrecisionNormal",
    "GaussianGuide",
    "LatentGuide",
    "LatentPrior",
    "StandardPrior",
    "TemplatePrior",
]


class LatentPrior(Part):
    r"""A latent prior :math:`p(z | m_a)`.

    Attributes:
        latent_dim: The length :math:`D` of :math:`z`.
    """

    latent_dim: int

    @abc.abstractmethod
    def forward(self, template: Template) -> dist.Distribution:
        r"""
        Arguments:
            template: The template :math:`m_a`, with leading shape `(*)`.

        Returns:
            A distribution over :math:`z` with batch shape `(*)` and event shape `(D,)`.
        """


class LatentGuide(Part):
    r"""A latent guide :math:`q(z | x, m_a)`: how the target varies its template.

    Attributes:
        latent_dim: The length :math:`D` of :math:`z`.
    """

    latent_dim: int

    @abc.abstractmethod
    def forward(self, x: Template, template: Template) -> dist.Distribution:
        r"""
        Arguments:
            x: The target with its features; its leading shape broadcasts with the template's.
            template: The template :math:`m_a`, with leading shape `(*)`.

        Returns:
            A distribution over :math:`z` with batch shape `(*)` (broadcast) and event shape `(D,)`.
        """


class StandardPrior(LatentPrior):
    r"""The standard Gaussian for every template: :math:`p(z | m_a) = N(0, I)`.

    Arguments:
        latent_dim: The length :math:`D` of :math:`z`.

    Example:
        >>> StandardPrior(8)(Template(torch.rand(3, 4), torch.rand(3, 16)))
        Independent(Normal(loc: torch.Size([3, 8]), scale: torch.Size([3, 8])), 1)
    """

    def __init__(self, latent_dim: Size = 32) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, template: Template) -> dist.Distribution:
        loc = template.raw.new_zeros(*template.leading_shape, self.latent_dim)
        return dist.Normal(loc, torch.ones_like(loc)).to_event(1)


class TemplatePrior(LatentPrior):
    r"""A diagonal Gaussian given the template: :math:`N(\mu(m_a), \sigma(m_a)^2)`.

    It starts close to the standard Gaussian.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017), section 3
        | https://arxiv.org/abs/1709.07116

    Arguments:
        latent_dim: The length :math:`D` of :math:`z`.
        num_features: The length :math:`F` of a template's feature vector.
        hidden: The widths of the hidden layers.

    Example:
        >>> TemplatePrior(8, num_features=16)(Template(torch.rand(3, 4), torch.rand(3, 16))).event_shape
        torch.Size([8])
    """

    def __init__(self, latent_dim: Size = 32, num_features: Size = 128, hidden: tuple[Size, ...] = (128,)) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.network = mlp(num_features, *hidden, 2 * latent_dim)
        _shrink(self.network, 0.1)

    def forward(self, template: Template) -> dist.Distribution:
        return _gaussian(self.network(template.features))


class GaussianGuide(LatentGuide):
    r"""A diagonal Gaussian given target and template: :math:`q(z | x, m_a) = N(\mu(x, m_a), \sigma(x, m_a)^2)`.

    Arguments:
        latent_dim: The length :math:`D` of :math:`z`.
        num_features: The length :math:`F` of the feature vectors.
        hidden: The widths of the hidden layers, at least one.

    Raises:
        ValueError: If `hidden` is empty.

    Example:
        >>> q = GaussianGuide(8, num_features=16)
        >>> q(Template(torch.rand(3, 4), torch.rand(3, 16)), Template(torch.rand(5, 3, 4), torch.rand(5, 3, 16)))
        Independent(Normal(loc: torch.Size([5, 3, 8]), scale: torch.Size([5, 3, 8])), 1)
    """

    def __init__(self, latent_dim: Size = 32, num_features: Size = 128, hidden: tuple[Size, ...] = (256,)) -> None:
        super().__init__()
        if len(hidden) == 0:
            raise ValueError("hidden: expected at least one hidden width, got (). Try hidden=(256,).")
        self.latent_dim = latent_dim
        self.join = Join(num_features, num_features, hidden[0])
        self.network = nn.Sequential(nn.ReLU(), mlp(*hidden, 2 * latent_dim))
        _shrink(self.network, 0.1)

    def forward(self, x: Template, template: Template) -> dist.Distribution:
        return _gaussian(self.network(self.join(x.features, template.features)))


class FullCovariancePrior(TemplatePrior):
    r"""A Gaussian with a full covariance given the template: :math:`N(\mu(m_a), \Sigma(m_a))`.

    The correlations differ from template to template. (The first layer of the decoder can already express fixed ones.)
    The covariance is given by the marginal scales of :class:`TemplatePrior` and a Cholesky factor of the correlations.
    A density costs :math:`O(D^2)`. The prior starts close to the standard Gaussian.

    The arguments are those of :class:`TemplatePrior`, with a `latent_dim` of at least 2.

    References:
        | Unconstrained Parametrizations for Variance-Covariance Matrices (Pinheiro, Bates, 1996)
        | https://doi.org/10.1007/BF00140873

    Example:
        >>> FullCovariancePrior(8, num_features=16)(Template(torch.rand(3, 4), torch.rand(3, 16))).scale_tril.shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, latent_dim: Several = 32, num_features: Size = 128, hidden: tuple[Size, ...] = (128,)) -> None:
        super().__init__(latent_dim, num_features, hidden)
        self.below = nn.Linear(num_features, latent_dim * (latent_dim - 1) // 2)  # the entries below the diagonal
        _shrink(self.below, 0.1)

    def forward(self, template: Template) -> dist.Distribution:
        return _correlated(super().forward(template), self.below(template.features))


class FullCovarianceGuide(GaussianGuide):
    r"""A Gaussian with a full covariance: :math:`q(z | x, m_a) = N(\mu(x, m_a), \Sigma(x, m_a))`.

    Use it where elements of :math:`z` are correlated in the posterior: a diagonal guide is then too narrow. In the
    linear-Gaussian model this guide contains the exact posterior. The covariance is given as in
    :class:`FullCovariancePrior`. The arguments are those of :class:`GaussianGuide`, with a `latent_dim` of at least 2.

    References:
        | An Introduction to Variational Autoencoders (Kingma, Welling, 2019), section 2.5.1, which has this guide
        | https://arxiv.org/abs/1906.02691

    Example:
        >>> q = FullCovarianceGuide(8, num_features=16)
        >>> q(Template(torch.rand(3, 4), torch.rand(3, 16)), Template(torch.rand(5, 3, 4), torch.rand(5, 3, 16)))
        FullPrecisionNormal(loc: torch.Size([5, 3, 8]), scale_tril: torch.Size([5, 3, 8, 8]))
    """

    def __init__(self, latent_dim: Several = 32, num_features: Size = 128, hidden: tuple[Size, ...] = (256,)) -> None:
        super().__init__(latent_dim, num_features, hidden)
        self.below = nn.Sequential(nn.ReLU(), nn.Linear(hidden[0], latent_dim * (latent_dim - 1) // 2))
        _shrink(self.below, 0.1)

    def forward(self, x: Template, template: Template) -> dist.Distribution:
        joined = self.join(x.features, template.features)
        return _correlated(_gaussian(self.network(joined)), self.below(joined))


class FullPrecisionNormal(dist.MultivariateNormal):
    """A multivariate Gaussian whose draws are not rounded to half precision under autocast."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        with no_autocast(self.loc):
            return super().rsample(torch.Size(sample_shape))


def _correlated(diagonal: Any, below: Tensor) -> dist.Distribution:
    """A Gaussian with the means and scales of a diagonal one, and correlations from `below`, `(*, D (D - 1) / 2)`."""
    loc, scale = diagonal.base_dist.loc, diagonal.base_dist.scale
    rows, columns = torch.tril_indices(loc.shape[-1], loc.shape[-1], -1, device=loc.device)
    factor = torch.diag_embed(torch.ones_like(loc))
    factor[..., rows, columns] = _bounded(full_precision(below))
    # Rows of length one, so that the scales are the marginal ones.
    factor = nn.functional.normalize(factor, dim=-1)
    return FullPrecisionNormal(loc, scale_tril=scale.unsqueeze(-1) * factor)


def _gaussian(outputs: Tensor) -> dist.Distribution:
    """The diagonal Gaussian of network outputs `(*, 2 D)`: means, and log-scales within +-5."""
    loc, log_scale = full_precision(outputs).chunk(2, dim=-1)
    return dist.Normal(loc, _bounded(log_scale).exp()).to_event(1)


def _bounded(values: Tensor) -> Tensor:
    """Values limited smoothly to +-5, unchanged near zero."""
    return 5.0 * torch.tanh(values / 5.0)


def _shrink(network: nn.Module, factor: float) -> None:
    """Scales down the last layer, so that training starts near the standard Gaussian."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(factor)
        last.bias.zero_()
