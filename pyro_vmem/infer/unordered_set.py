"""The evidence lower bound from values of one categorical site that are drawn without replacement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vmem.infer.one_site import OneSiteELBO
from pyro_vmem.infer.particles import Particles

__all__ = ["UnorderedSet_ELBO"]

MOST_PARTICLES = 10  # the subsets of the values, 2^K, are all visited


@dataclass(repr=False, eq=False)
class UnorderedSet_ELBO(OneSiteELBO):
    r"""The evidence lower bound of each datapoint, from K different values of one categorical site.

    .. math:: L = \sum_{a \in S} q(a) R(S, a) f(a), \qquad
        R(S, a) = \frac{p^{D \setminus a}(S \setminus a)}{p(S)}, \qquad f = \log p(x, h) - \log q(h)

    S is a set of K values, drawn from q without replacement. :math:`p(S)` is the probability of the set in any order,
    and :math:`p^{D \setminus a}` is the same without the value a. No value takes two decoder passes, so the variance is
    lower than with K independent draws. If K is the number of values, it is zero. The other values of the set give the
    baseline. Other latents are reparameterised or have score terms.

    References:
        | Estimating Gradients for Discrete Random Variables by Sampling without Replacement (Kool, van Hoof & Welling,
        | 2020), equations 9 and 17 | https://arxiv.org/abs/2002.06043

    Arguments:
        num_particles: The number K of values, from 2 to 10, and no more than the site has.
        site: The name of the categorical site.
        max_plate_nesting: As in `pyro.infer.ELBO`.

    Raises:
        ValueError: If `num_particles` is out of range; at the first loss, if the site has fewer values, or cannot be
            chosen for all particles together, as of :class:`RaoBlackwell_ELBO`.

    Example:
        >>> import pyro_vmem as pv
        >>> vma = pv.VMA.for_vectors(5)
        >>> elbo = pv.infer.UnorderedSet_ELBO(4)
        >>> elbo.differentiable_loss(vma.model, vma.guide, pv.Memory(torch.randn(6, 5)), torch.randn(3, 5)).shape
        torch.Size([])
    """

    discrete: ClassVar[str] = "K different values, leave-one-out baseline"
    least_particles: ClassVar[int] = 2

    site: str = "a"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_particles > MOST_PARTICLES:
            raise ValueError(
                f"num_particles: expected at most {MOST_PARTICLES}, because all subsets are visited, got "
                f"{self.num_particles}. For more use RaoBlackwell_ELBO or VIMCO_ELBO."
            )

    def choose(self, fn: torch.distributions.Categorical) -> Tensor:
        slots = len(fn.enumerate_support())  # those that a truncated guide keeps
        if self.num_particles > slots:
            raise ValueError(
                f"num_particles: expected no more than the {slots} values of site {self.site!r}, got "
                f"{self.num_particles}. To sum all of them, use pyro.infer.TraceEnum_ELBO."
            )
        # The largest of the log-probabilities with Gumbel noise are draws without replacement.
        noise = -torch.empty_like(fn.logits).exponential_().log()
        return (fn.logits.detach() + noise).topk(self.num_particles, -1).indices.movedim(-1, 0)

    def shares(self, particles: Particles) -> Tensor:
        log_q = particles.score[self.site].detach()
        return (log_q + leave_out(log_orders(log_q))[0]).softmax(0)  # they sum to one, but for rounding

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        f, log_q = particles.log_weights, particles.score[self.site]
        share, signal = self.shares(particles), f.detach()
        # What the set lets expect from the point of view of each of its values, (K, K, B) summed over the second.
        beside = leave_out(log_orders(log_q.detach()))[1]
        baseline = ((log_q.detach() + beside).exp() * signal).sum(1)
        scores = signal * self.other_scores(particles) + (signal - baseline) * log_q
        return (share * f).sum(0), (share * (f + scores)).sum(0)


def log_orders(log_q: Tensor) -> dict[int, Tensor]:
    """Computes the log-probability `(B,)` that each subset of the drawn values follows after the others.

    Bit k of a subset's key says whether the k-th value, of log-probability `log_q[k]`, is in it.
    """
    # Over all orders, by the first value of each: A(T) = sum over t in T of q_t / (1 - q(S without T)) A(T without t).
    count, q = len(log_q), log_q.exp()
    outside = (1.0 - q.sum(0)).clamp(min=torch.finfo(q.dtype).tiny)
    orders = {0: torch.zeros_like(log_q[0])}
    for subset in range(1, 2**count):
        members = [k for k in range(count) if subset >> k & 1]
        first = torch.stack([log_q[k] + orders[subset - (1 << k)] for k in members])
        orders[subset] = first.logsumexp(0) - (outside + q[members].sum(0)).log()
    return orders


def leave_out(orders: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    r""":math:`\log R(S, s)`, `(K, B)`, and :math:`\log R^{D \setminus s}(S, t)` at `(s, t)`, `(K, K, B)`; zero at s."""
    everything = max(orders)
    bits = [1 << k for k in range(everything.bit_length())]
    first = torch.stack([orders[everything - s] - orders[everything] for s in bits])
    second = [
        [orders[everything - s - t] - orders[everything - s] if s != t else torch.zeros_like(orders[0]) for t in bits]
        for s in bits
    ]
    return first, torch.stack([torch.stack(row) for row in second])
