"""Reweighted wake-sleep, weighted per datapoint."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pyro_vmem.infer.base import ParticleELBO
from pyro_vmem.infer.particles import Particles
from pyro_vmem.infer.terms import log_mean_exp

__all__ = ["RWS_ELBO"]


class RWS_ELBO(ParticleELBO):
    r"""Reweighted wake-sleep: the model follows the importance-weighted bound, the guide the posterior.

    .. math:: \nabla_\theta = \sum_k \tilde w_k \nabla \log p(x, h_k), \qquad
        \nabla_\phi = \sum_k \tilde w_k \nabla \log q(h_k | x)

    The first is the gradient of :math:`L = \log \frac{1}{K} \sum_k w_k` with respect to the model, exactly in
    expectation; the second (the wake phase of the guide) is a self-normalised estimate of that of
    :math:`-KL(p(h | x) \| q(h | x))`, off by :math:`O(1/K)`. No latent is differentiated through, discrete or not, and
    no score function is needed, so it learns where the signal of :class:`VIMCO_ELBO` is weak. Weights are per
    datapoint; `pyro.infer.ReweightedWakeSleep` forms one weight for the whole minibatch.

    References:
        | Reweighted Wake-Sleep (Bornschein & Bengio, 2015), equations 5 and 8 | https://arxiv.org/abs/1406.2751
        | Revisiting Reweighted Wake-Sleep (Le et al., 2019) | https://arxiv.org/abs/1805.10469

    Arguments:
        num_particles: The number :math:`K \ge 2` of particles.
        vectorize_particles: Whether all particles are drawn in one pass.
        max_plate_nesting: As in `pyro.infer.ELBO`.
        kwargs: Other arguments of `pyro.infer.ELBO`.

    Raises:
        ValueError: If `num_particles` is less than 2: a single particle has weight one, whatever it is.

    Example:
        >>> import torch, pyro_vmem as pv
        >>> vma = pv.VMA.for_vectors(5)
        >>> terms = RWS_ELBO(8).terms(vma.model, vma.guide, pv.Memory(torch.randn(6, 5)), torch.randn(3, 5))
        >>> terms.bound.shape
        torch.Size([3])
    """

    least_particles: ClassVar[int] = 2
    bias: ClassVar[str] = "guide: self-normalised, O(1/K)"
    detach_samples: ClassVar[bool] = True

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        log_weights = particles.log_weights
        share = log_weights.detach().softmax(0)
        log_joint = particles.log_likelihood + sum(particles.log_prior.values())
        log_guide = sum(particles.log_guide.values())
        return log_mean_exp(log_weights), (share * (log_joint + log_guide)).sum(0)
