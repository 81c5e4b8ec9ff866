"""Normalising flows as latent prior p(z | m_a) and latent guide q(z | x, m_a), by zuko."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import AffineTransform, Transform

from pyro_vmem._utils.checks import Few, Several, Size
from pyro_vmem._utils.extras import require
from pyro_vmem._utils.precision import full_precision, no_autocast
from pyro_vmem.memory import Template
from pyro_vmem.parts.latents import GaussianGuide, TemplatePrior
from pyro_vmem.parts.layers import Join

__all__ = ["FlowGuide", "FlowPrior"]

BINS = 8  # of a spline, as in zuko


class FlowPrior(TemplatePrior):
    r"""A flow on a Gaussian given the template: :math:`z = \mu(m_a) + \sigma(m_a)\, f(\epsilon; m_a)`.

    :math:`\epsilon` is standard Gaussian noise, and :math:`f` is a stack of coupling layers of rational-quadratic
    splines. Unlike a Gaussian it can have curved or several modes. It starts close to the standard Gaussian. It needs
    zuko: `pip install '.[flows]'` in the clone.

    References:
        | Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019) | https://arxiv.org/abs/1906.04032

    Arguments:
        transforms: The number of coupling layers; each moves half of the values, given the others. The other arguments
            are those of :class:`TemplatePrior`, with a `latent_dim` of at least 2; all networks have its `hidden`.

    Raises:
        ImportError: If zuko is not installed.

    Example:
        >>> p = FlowPrior(8, num_features=16)(Template(torch.rand(3, 4), torch.rand(3, 16)))
        >>> p.log_prob(p.rsample()).shape
        torch.Size([3])
    """

    def __init__(
        self, latent_dim: Several = 32, num_features: Size = 128, hidden: tuple[Size, ...] = (128,), transforms: Few = 2
    ) -> None:
        super().__init__(latent_dim, num_features, hidden)
        self.flow = _Flow(latent_dim, num_features, hidden, transforms)

    def forward(self, template: Template) -> dist.Distribution:
        return self.flow(super().forward(template), template.features)


class FlowGuide(GaussianGuide):
    r"""A flow on a Gaussian given target and template.

    .. math:: z = \mu(x, m_a) + \sigma(x, m_a)\, f(\epsilon; x, m_a), \qquad \epsilon \sim N(0, I)

    The flow is that of :class:`FlowPrior`. It starts close to the :class:`GaussianGuide`. Draws are reparameterised.
    Arguments and errors are those of both.

    References:
        | Variational Inference with Normalizing Flows (Rezende, Mohamed, 2015) | https://arxiv.org/abs/1505.05770

    Example:
        >>> q = FlowGuide(8, num_features=16)
        >>> template = Template(torch.rand(5, 3, 4), torch.rand(5, 3, 16))
        >>> q(Template(torch.rand(3, 4), torch.rand(3, 16)), template).rsample().shape
        torch.Size([5, 3, 8])
    """

    def __init__(
        self, latent_dim: Several = 32, num_features: Size = 128, hidden: tuple[Size, ...] = (256,), transforms: Few = 2
    ) -> None:
        super().__init__(latent_dim, num_features, hidden)
        self.context = Join(num_features, num_features, hidden[0])
        self.flow = _Flow(latent_dim, hidden[0], hidden, transforms)

    def forward(self, x: Template, template: Template) -> dist.Distribution:
        context = self.context(x.features, template.features).relu()
        return self.flow(super().forward(x, template), context)


class _Flow(nn.Module):
    """Coupling layers between standard noise and the mean and scale of a diagonal Gaussian."""

    def __init__(self, latent_dim: int, context: int, hidden: tuple[int, ...], transforms: int) -> None:
        super().__init__()
        zuko = _zuko()
        self.layers = nn.ModuleList()
        for index in range(transforms):
            layer = zuko.flows.GeneralCouplingTransform(
                latent_dim,
                context,
                mask=torch.arange(latent_dim) % 2 == index % 2,
                univariate=zuko.transforms.MonotonicRQSTransform,
                shapes=[(BINS,), (BINS,), (BINS - 1,)],
                hidden_features=hidden,
            )
            last = layer.hyper[-1]
            with torch.no_grad():
                last.weight.mul_(0.1)
                last.bias.zero_()  # equal bins with slopes of one: the identity
            layer.hyper = _Bounded(layer.hyper)
            self.layers.append(layer)

    def forward(self, normal: Any, context: Tensor) -> dist.Distribution:
        loc, scale = normal.base_dist.loc, normal.base_dist.scale
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(scale)).to_event(1)
        context = full_precision(context)
        layers: list[Transform] = [*(layer(context) for layer in self.layers), AffineTransform(loc, scale, event_dim=1)]
        for layer in layers:
            Transform.__init__(layer, cache_size=1)  # The density of a draw needs no inversion.
        return dist.TransformedDistribution(noise, layers)


class _Bounded(nn.Module):
    """A network with outputs within +-5, as of log-scales: more extreme splines cannot be inverted.

    It runs in full precision, also under autocast.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x):
            return 5.0 * torch.tanh(self.network(x) / 5.0)


def _zuko() -> Any:
    """The package zuko. Its import turns off the argument validation of torch for the whole process; this undoes it."""
    before = Distribution._validate_args
    try:
        return require("zuko", "flows")
    finally:
        Distribution.set_default_validate_args(before)
