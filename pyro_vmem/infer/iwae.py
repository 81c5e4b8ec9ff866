"""The importance-weighted bound, with the score term that discrete latents need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pyro_vmem.infer.elbo import ParticleELBO, log_mean_exp
from pyro_vmem.infer.particles import Particles

__all__ = ["IWAE_ELBO"]


@dataclass(repr=False, eq=False)
class IWAE_ELBO(ParticleELBO):
    r"""The importance-weighted bound of each datapoint, with the plain score term for discrete latents.

    .. math:: L = \log \frac{1}{K} \sum_k w_k, \qquad
        \nabla L = \sum_k \tilde w_k \nabla \log w_k + L \sum_k \nabla \log q(h_k)

    `pyro.infer.RenyiELBO(alpha=0)` has the same value without the last term, so a discrete guide site gets no gradient
    from it. Here such a site is trained, but with a large variance: the whole bound is the learning signal of each
    particle. The baseline of :class:`VIMCO_ELBO` removes most of this variance.

    With `dreg` the gradient reaches the guide of reparameterised latents through their values only, as in
    :class:`VIMCO_ELBO`. With one particle this is "sticking the landing".

    With `backward` = 1 the gradient of the model uses one particle, drawn by its weight, as the authors suggest.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016), equation 8 | https://arxiv.org/abs/1509.00519
        | Variational Inference for Monte Carlo Objectives (Mnih & Rezende, 2016), equation 5 | https://arxiv.org/abs/1602.06725

    Arguments:
        num_particles: The number :math:`K \ge 1` of particles.
        dreg: Whether the gradient for reparameterised latents is doubly reparameterised.
        backward: The number of particles per datapoint that the gradient of the model uses; see :class:`ParticleELBO`.
        vectorize_particles: Whether all particles are drawn in one pass.
        max_plate_nesting: As in `pyro.infer.ELBO`.

    Example:
        >>> import torch, pyro_vmem as pv
        >>> vma, memory = pv.VMA.for_vectors(5), pv.Memory(torch.randn(6, 5))
        >>> IWAE_ELBO(8).differentiable_loss(vma.model, vma.guide, memory, torch.randn(3, 5)).shape
        torch.Size([])
    """

    weighted: ClassVar[bool] = True

    dreg: bool = False

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        log_weights = particles.log_weights
        particles.weight_paths(log_weights.detach().softmax(0))
        bound = log_mean_exp(log_weights)
        return bound, bound + particles.score_sum(bound.detach().expand_as(particles.log_likelihood))
