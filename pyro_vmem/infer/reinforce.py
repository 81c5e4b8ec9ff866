"""The one-sample bound, with the score function and a baseline for discrete latents."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vmem.infer.base import ParticleELBO
from pyro_vmem.infer.particles import Particles

__all__ = ["Reinforce_ELBO"]


class Reinforce_ELBO(ParticleELBO):
    r"""The evidence lower bound of each datapoint, averaged over K particles, by the score function.

    .. math:: \nabla = \frac{1}{K} \sum_k \nabla \log w_k + (\log w_k - b_k) \nabla \log q(h_k)

    The baseline :math:`b_k` is the mean over the other particles (`"leave-one-out"`), or a running mean over all that
    came before (`"average"`, one number). Neither looks at its own particle, so both are unbiased. The average is kept
    on this object, is not shaped like a minibatch, and moves with each call that computes a loss with gradients.

    References:
        | Simple statistical gradient-following algorithms (Williams, 1992) | https://doi.org/10.1007/BF00992696
        | Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool et al., 2019) | https://openreview.net/forum?id=r1lgTGL5DE

    Arguments:
        num_particles: The number :math:`K` of particles; at least 2 for the leave-one-out baseline.
        baseline: `"leave-one-out"`, `"average"` or `"none"`.
        decay: How much of the running average a step keeps, in [0, 1).
        vectorize_particles: Whether all particles are drawn in one pass.
        max_plate_nesting: As in `pyro.infer.ELBO`.
        kwargs: Other arguments of `pyro.infer.ELBO`.

    Raises:
        ValueError: If `baseline` is none of the three, `decay` is out of range, or there are too few particles.

    Example:
        >>> import pyro_vmem as pv
        >>> vma = pv.VMA.for_vectors(5)
        >>> elbo = Reinforce_ELBO(4)
        >>> elbo.differentiable_loss(vma.model, vma.guide, pv.Memory(torch.randn(6, 5)), torch.randn(3, 5)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_particles: int = 4,
        baseline: Literal["leave-one-out", "average", "none"] = "leave-one-out",
        decay: float = 0.9,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        **kwargs: Any,
    ) -> None:
        if baseline not in ("leave-one-out", "average", "none"):
            raise ValueError(f"baseline: expected 'leave-one-out', 'average' or 'none', got {baseline!r}.")
        if baseline == "leave-one-out" and num_particles < 2:
            raise ValueError(
                f"num_particles: the leave-one-out baseline needs at least 2, got {num_particles}. "
                "For one particle use baseline='average'."
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}.")
        super().__init__(num_particles, vectorize_particles, max_plate_nesting, **kwargs)
        self.baseline = baseline
        self.decay = decay
        self._average: float | None = None

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        log_weights = particles.log_weights
        bound = log_weights.mean(0)
        signal = log_weights.detach()
        if self.baseline == "leave-one-out":
            count = len(signal)
            signal = (signal - signal.mean(0)) * count / (count - 1)  # the same as subtracting the others' mean
        elif self.baseline == "average":
            mean, before = float(signal.mean()), self._average
            signal = signal - (before or 0.0)  # nothing at first: this draw's own mean would be a bias
            if torch.is_grad_enabled():
                self._average = mean if before is None else self.decay * before + (1 - self.decay) * mean
        return bound, bound + particles.score_sum(signal / len(signal))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles}, baseline={self.baseline!r})"
