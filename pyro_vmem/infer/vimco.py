"""VIMCO: the multi-sample bound, with a leave-one-out baseline for discrete latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pyro_vmem.infer.elbo import ParticleELBO, log_mean_exp
from pyro_vmem.infer.particles import Particles

__all__ = ["VIMCO_ELBO"]


@dataclass(repr=False, eq=False)
class VIMCO_ELBO(ParticleELBO):
    r"""The multi-sample bound of each datapoint, with gradients for discrete latents too.

    .. math:: L = \log \frac{1}{K} \sum_k w_k, \qquad w_k = p(x, h_k) / q(h_k | x), \qquad h_k \sim q

    For a latent that is not reparameterised, the gradient of :math:`\log q(h_k)` has the weight :math:`L - L_{-k}`,
    where :math:`L_{-k}` is a bound from the other particles only:

    - arithmetic: :math:`\log \frac{1}{K - 1} \sum_{j \ne k} w_j`;
    - geometric: :math:`\log \frac{1}{K} (\sum_{j \ne k} w_j + \exp \frac{1}{K - 1} \sum_{j \ne k} \log w_j)`.

    Both are unbiased. Reparameterised latents get the pathwise gradient of :math:`L`. If all latents are
    reparameterised, this is the objective of the importance-weighted autoencoder. See :class:`ParticleELBO` for the
    supported models.

    With `dreg` the gradient of the bound reaches the guide of a reparameterised latent :math:`z` through its value
    only, as :math:`\sum_k \tilde w_k^2\, \partial_{z_k} \log w_k\, \nabla z_k`. The expectation is the same. The noise
    vanishes as the guide becomes exact. Weights that a conditional prior :math:`p(z | m_a)` shares with the guide still
    get the gradient of the bound through the prior.

    With `backward` = n the gradient of the bound, :math:`\sum_k \tilde w_k \nabla \log w_k`, uses n particles, drawn by
    their weights :math:`\tilde w_k`. Values and learning signals use all K. The model is run K times without gradients
    and n times with gradients, instead of K times with gradients.

    References:
        | Variational Inference for Monte Carlo Objectives (Mnih & Rezende, 2016), equations 6 to 10
        | https://arxiv.org/abs/1602.06725
        | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2019), equation 6
        | https://arxiv.org/abs/1810.04152
        | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2016), section 3, on one backward pass of K
        | https://arxiv.org/abs/1509.00519

    Arguments:
        num_particles: The number :math:`K \ge 2` of particles.
        baseline: `"arithmetic"` or `"geometric"`.
        dreg: Whether the gradient for reparameterised latents is doubly reparameterised.
        backward: The number of particles per datapoint that the gradient of the model uses; see :class:`ParticleELBO`.
        vectorize_particles: Whether all particles are drawn in one pass.
        max_plate_nesting: As in `pyro.infer.ELBO`.

    Raises:
        ValueError: If `num_particles` is less than 2 or `baseline` is neither of the two; with `dreg`, at the first
            loss, if a latent's guide depends on a reparameterised latent.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        ...         pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)
        >>> def guide(x):
        ...     logits = pyro.param("logits", torch.zeros(3))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("k", dist.Categorical(logits=logits))
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), VIMCO_ELBO(num_particles=4))
        >>> loss = svi.step(torch.tensor([0.1, 1.9]))
    """

    discrete: ClassVar[str] = "score function, leave-one-out baseline"
    least_particles: ClassVar[int] = 2
    weighted: ClassVar[bool] = True

    baseline: Literal["arithmetic", "geometric"] = "arithmetic"
    dreg: bool = False

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        log_weights = particles.log_weights
        particles.weight_paths(log_weights.detach().softmax(0))
        bound = log_mean_exp(log_weights)
        signal = (bound - leave_one_out(log_weights, self.baseline)).detach()
        return bound, bound + particles.score_sum(signal)


def leave_one_out(log_weights: Tensor, baseline: str) -> Tensor:
    r"""Computes the bound :math:`L_{-k}` from all particles but the k-th: log-weights `(K, B)` to bounds `(K, B)`."""
    # A masked logsumexp over K x K: the difference of two sums would lose all digits where one weight dominates.
    count = log_weights.shape[0]
    itself = torch.eye(count, dtype=torch.bool, device=log_weights.device).unsqueeze(-1)
    others = log_weights.unsqueeze(0).expand(count, -1, -1)  # entry (k, j): particle j, seen from k
    if baseline == "arithmetic":
        return others.masked_fill(itself, -math.inf).logsumexp(1) - math.log(count - 1)
    mean = others.masked_fill(itself, 0.0).sum(1, keepdim=True) / (count - 1)
    return torch.where(itself, mean, others).logsumexp(1) - math.log(count)
