"""The Gaussian latent: priors p(z | m_a) and guides q(z | x, m_a)."""

from __future__ import annotations

import abc

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vmem.memory import Template
from pyro_vmem.nn.layers import Join, mlp
from pyro_vmem.part import Part
from pyro_vmem.precision import full_precision

__all__ = ["GaussianGuide", "LatentGuide", "LatentPrior", "StandardPrior", "TemplatePrior"]


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
    r"""A latent guide :math:`q(z | x, m_a)`: the recogniser of how the target varies its template.

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
    r"""The standard Gaussian, whatever the template: :math:`p(z | m_a) = N(0, I)`.

    Arguments:
        latent_dim: The length :math:`D` of :math:`z`.

    Example:
        >>> StandardPrior(8)(Template(torch.rand(3, 4), torch.rand(3, 16)))
        Independent(Normal(loc: torch.Size([3, 8]), scale: torch.Size([3, 8])), 1)
    """

    def __init__(self, latent_dim: int = 32) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, template: Template) -> dist.Distribution:
        loc = template.raw.new_zeros(*template.leading_shape, self.latent_dim)
        return dist.Normal(loc, torch.ones_like(loc)).to_event(1)


class TemplatePrior(LatentPrior):
    r"""A diagonal Gaussian whose mean and scale are read off the template: :math:`N(\mu(m_a), \sigma(m_a)^2)`.

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

    def __init__(self, latent_dim: int = 32, num_features: int = 128, hidden: tuple[int, ...] = (128,)) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.network = mlp(num_features, *hidden, 2 * latent_dim)
        _shrink(self.network, 0.1)

    def forward(self, template: Template) -> dist.Distribution:
        return _gaussian(self.network(template.features))


class GaussianGuide(LatentGuide):
    r"""A diagonal Gaussian computed from target and template: :math:`q(z | x, m_a) = N(\mu(x, m_a), \sigma(x, m_a)^2)`.

    Arguments:
        latent_dim: The length :math:`D` of :math:`z`.
        num_features: The length :math:`F` of a feature vector, of templates as of targets.
        hidden: The widths of the hidden layers, at least one.

    Raises:
        ValueError: If `hidden` is empty.

    Example:
        >>> q = GaussianGuide(8, num_features=16)
        >>> q(Template(torch.rand(3, 4), torch.rand(3, 16)), Template(torch.rand(5, 3, 4), torch.rand(5, 3, 16)))
        Independent(Normal(loc: torch.Size([5, 3, 8]), scale: torch.Size([5, 3, 8])), 1)
    """

    def __init__(self, latent_dim: int = 32, num_features: int = 128, hidden: tuple[int, ...] = (256,)) -> None:
        super().__init__()
        if len(hidden) == 0:
            raise ValueError("hidden: expected at least one hidden width, got (). Try hidden=(256,).")
        self.latent_dim = latent_dim
        self.join = Join(num_features, num_features, hidden[0])
        self.network = nn.Sequential(nn.ReLU(), mlp(*hidden, 2 * latent_dim))
        _shrink(self.network, 0.1)

    def forward(self, x: Template, template: Template) -> dist.Distribution:
        return _gaussian(self.network(self.join(x.features, template.features)))


def _gaussian(outputs: Tensor) -> dist.Distribution:
    """The diagonal Gaussian of network outputs `(*, 2 D)`: means, and log-scales held within exp(+-5)."""
    loc, log_scale = full_precision(outputs).chunk(2, dim=-1)
    return dist.Normal(loc, (5.0 * torch.tanh(log_scale / 5.0)).exp()).to_event(1)


def _shrink(network: nn.Module, factor: float) -> None:
    """Scales down the last layer, so that training starts near the standard Gaussian."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(factor)
        last.bias.zero_()
