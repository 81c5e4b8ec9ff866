"""The one-sample bound, with the score function and a baseline for discrete latents."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_vmem._utils.checks import Fraction
from pyro_vmem._utils.param_store import register_unnamed
from pyro_vmem.infer.elbo import ParticleELBO
from pyro_vmem.infer.particles import Particles

__all__ = ["Reinforce_ELBO"]


@dataclass(repr=False, eq=False)
class Reinforce_ELBO(ParticleELBO):
    r"""The evidence lower bound of each datapoint, averaged over K particles, with the score-function gradient.

    .. math:: \nabla = \frac{1}{K} \sum_k \nabla \log w_k + (\log w_k - b_k) \nabla \log q(h_k)

    No baseline :math:`b_k` depends on particle k, so all are unbiased:

    - `"leave-one-out"`: the mean over the other particles;
    - `"average"`: a running mean over all that came before, one number. It does not depend on the minibatch's size,
      and moves with each call that computes a loss with gradients;
    - a `torch.nn.Module`: called as the model is, it returns one number for each datapoint, with shape `(B,)`, and
      learns to predict :math:`\log w` by squared error. `SVI` and `fit` train it with the rest; its parameters in the
      store begin with `"baseline"`;
    - `"none"`.

    The average or the network is in `module`.

    References:
        | Simple statistical gradient-following algorithms (Williams, 1992) | https://doi.org/10.1007/BF00992696
        | Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool et al., 2019) | https://openreview.net/forum?id=r1lgTGL5DE

    Arguments:
        num_particles: The number :math:`K` of particles; at least 2 for the leave-one-out baseline.
        baseline: `"leave-one-out"`, `"average"`, `"none"` or a network.
        decay: The factor of the old running average in each step, in [0, 1).
        vectorize_particles: Whether all particles are drawn in one pass.
        max_plate_nesting: As in `pyro.infer.ELBO`.

    Raises:
        ValueError: If `baseline` is none of these, `decay` is out of range, or there are too few particles.

    Example:
        >>> import pyro_vmem as pv
        >>> vma = pv.VMA.for_vectors(5)
        >>> elbo = Reinforce_ELBO(4)
        >>> elbo.differentiable_loss(vma.model, vma.guide, pv.Memory(torch.randn(6, 5)), torch.randn(3, 5)).shape
        torch.Size([])
    """

    baseline: Literal["leave-one-out", "average", "none"] | nn.Module = "leave-one-out"
    decay: Fraction = 0.9
    backward: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.baseline == "leave-one-out" and self.num_particles < 2:
            raise ValueError(
                f"num_particles: the leave-one-out baseline needs at least 2, got {self.num_particles}. "
                "For one particle use baseline='average'."
            )
        super().__post_init__()
        if isinstance(self.baseline, nn.Module):
            self.module = self.baseline
        elif self.baseline == "average":
            self.module = _RunningMean(self.decay)

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        log_weights = particles.log_weights
        bound, surrogate, signal = log_weights.mean(0), log_weights.mean(0), log_weights.detach()
        if self.baseline == "leave-one-out":
            count = len(signal)
            signal = (signal - signal.mean(0)) * count / (count - 1)  # the same as subtracting the others' mean
        elif isinstance(self.module, _RunningMean):
            signal = self.module.subtract(signal)
        elif self.module is not None:
            predicted = self._predict(self.module, particles)
            surrogate = surrogate - 0.5 * (signal - predicted).square().mean(0)
            signal = signal - predicted.detach()
        return bound, surrogate + particles.score_sum(signal / len(signal))

    def _predict(self, network: nn.Module, particles: Particles) -> Tensor:
        register_unnamed("baseline", network)
        arguments, keywords = particles.arguments
        predicted: Tensor = network(*arguments, **keywords)
        batch = particles.log_likelihood.shape[1:]
        if predicted.shape != batch:
            raise ValueError(
                f"baseline: expected a network that returns one number for each datapoint, {tuple(batch)}, "
                f"got {tuple(predicted.shape)}."
            )
        return predicted


class _RunningMean(nn.Module):
    """The mean of all signals so far, the latest the most; a buffer, so that it is saved where a model is."""

    mean: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.tensor(math.nan))

    def subtract(self, signal: Tensor) -> Tensor:
        """The signal less the mean of those before; nothing at first, as its own mean would be a bias."""
        now, before = signal.mean().to(self.mean), self.mean
        centred = signal - before.nan_to_num(0.0).to(signal)
        if torch.is_grad_enabled():
            self.mean = torch.where(before.isnan(), now, self.decay * before + (1 - self.decay) * now)
        return centred
