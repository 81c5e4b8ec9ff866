"""The terms of an objective, per datapoint, from the same particles as its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vmem.infer.particles import Particles

__all__ = ["Terms"]


@dataclass(frozen=True, eq=False)
class Terms:
    r"""What a step's loss is made of, in nats.

    Attributes:
        particles: The particles that the loss was computed from.
        shares: What each particle counts in an average over the guide, with shape `(K, B)`.
        bound: The multi-sample bound :math:`L` of each datapoint, with shape `(B,)`.
        loss: The loss, a scalar: minus the sum of the bounds. Its gradient is the estimator's.

    Example:
        >>> import pyro_vmem as pv
        >>> vma = pv.VMA.for_vectors(5)
        >>> x = torch.randn(3, 5)
        >>> terms = pv.infer.VIMCO_ELBO(num_particles=4).terms(vma.model, vma.guide, pv.Memory(torch.randn(6, 5)), x)
        >>> bool(torch.isclose(-terms.bound.sum(), terms.loss))
        True
        >>> sorted(terms.kl), terms.kl["a"].shape
        (['a', 'z'], torch.Size([3]))
    """

    particles: Particles
    shares: Tensor
    bound: Tensor
    loss: Tensor

    @property
    def reconstruction(self) -> Tensor:
        r""":math:`E_q \log p(x | z, m_a)`, averaged over particles, in nats, with shape `(B,)`."""
        return self._mean(self.particles.log_likelihood)

    @property
    def kl(self) -> dict[str, Tensor]:
        r""":math:`KL(q \| p)` of each latent site, each `(B,)`: closed form if categorical, else over particles."""
        p = self.particles
        sampled = {name: p.log_guide[name] - p.log_prior[name] for name in p.log_guide}
        return {name: self._mean(kl) for name, kl in (sampled | p.kl).items()}

    @property
    def elbo(self) -> Tensor:
        """The one-sample bound, reconstruction minus all log-ratios, averaged over particles, in nats: `(B,)`."""
        return self._mean(self.particles.log_weights)

    def _mean(self, values: Tensor) -> Tensor:
        return (self.shares * values.detach()).sum(0)

    @property
    def ess(self) -> Tensor:
        """The effective sample size of the importance weights, in [1, K], with shape `(B,)`."""
        log_weights = self.particles.log_weights.detach()
        return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    r""":math:`\log \frac{1}{K} \sum_k \exp(v_k)` along a dim."""
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])
