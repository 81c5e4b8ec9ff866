"""The evidence lower bound with the most probable addresses summed and the rest sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vmem._utils.checks import Count
from pyro_vmem.distributions.sparse_categorical import top_and_rest
from pyro_vmem.infer.one_site import OneSiteELBO
from pyro_vmem.infer.particles import Particles

__all__ = ["RaoBlackwell_ELBO"]


@dataclass(repr=False, eq=False)
class RaoBlackwell_ELBO(OneSiteELBO):
    r"""The evidence lower bound, with the :math:`k` most probable values of one site summed and the rest sampled.

    .. math:: L = \sum_{a \in T} q(a) f(a) + r\, f(a'), \qquad
        r = 1 - \sum_{a \in T} q(a), \quad a' \sim q(a \mid a \notin T), \quad f = \log p(x, h) - \log q(h)

    T are the k values of largest q for each datapoint. Value and gradient are unbiased for the full guide. The noise is
    proportional to the probability outside of T, so a confident guide has little. It costs k + 1 decoder passes per
    datapoint. A sparse guide, such as :class:`IndexedGuide`, may have millions of slots: only the slots that it found
    are considered. Other latents are reparameterised or have score terms.

    References:
        | Rao-Blackwellized Stochastic Gradients for Discrete Distributions (Liu, Regier, Tripuraneni, Jordan,
        | McAuliffe, 2019), section 4 | https://arxiv.org/abs/1810.04777

    Arguments:
        k: How many values are summed, at least 1.
        site: The name of the categorical site.
        max_plate_nesting: As in `pyro.infer.ELBO`.

    Raises:
        ValueError: If `k` is less than 1; at the first loss, if there is no such site, it is not categorical, it
            depends on another latent, it is in a plate inside the data plate, or it is masked on its own.

    Example:
        >>> import pyro_vmem as pv
        >>> vma = pv.VMA.for_vectors(5)
        >>> elbo = RaoBlackwell_ELBO(k=3)
        >>> elbo.differentiable_loss(vma.model, vma.guide, pv.Memory(torch.randn(6, 5)), torch.randn(3, 5)).shape
        torch.Size([])
    """

    discrete: ClassVar[str] = "k values summed, the rest by the score function"
    least_particles: ClassVar[int] = 2

    k: Count = 3
    site: str = "a"
    num_particles: int = field(default=4, init=False)

    def __post_init__(self) -> None:
        self.num_particles = self.k + 1
        super().__post_init__()

    def choose(self, fn: torch.distributions.Categorical) -> Tensor:
        slots = len(fn.enumerate_support())  # those that a truncated guide keeps
        if self.k >= slots:
            raise ValueError(
                f"k: expected fewer than the {slots} values of site {self.site!r}, got {self.k}. "
                "To sum all of them, use pyro.infer.TraceEnum_ELBO."
            )
        return top_and_rest(fn, self.k)

    def shares(self, particles: Particles) -> Tensor:
        q_top = particles.score[self.site][:-1].exp()
        return torch.cat([q_top, (1.0 - q_top.sum(0, keepdim=True)).clamp(min=0.0)])

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        log_weights, q = particles.log_weights, self.shares(particles)
        bound = (q * log_weights).sum(0)
        scores = self.other_scores(particles)
        # The sampled value's own score, against what the summed values say of the rest.
        signal = (log_weights[-1] - (q * log_weights)[:-1].sum(0) / q[:-1].sum(0)).detach()
        log_q_rest = particles.score[self.site][-1] - q[-1].clamp(min=torch.finfo(q.dtype).tiny).log()
        surrogate = bound + ((q * log_weights).detach() * scores).sum(0) + q[-1].detach() * signal * log_q_rest
        return bound, surrogate
