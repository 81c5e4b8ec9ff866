"""The evidence lower bound with the gradient of relaxed draws in place of discrete ones, which is biased."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vmem._utils.checks import Positive
from pyro_vmem.infer.elbo import ParticleELBO
from pyro_vmem.infer.particles import Particles

__all__ = ["StraightThrough_ELBO"]


@dataclass(repr=False, eq=False)
class StraightThrough_ELBO(ParticleELBO):
    r"""The evidence lower bound of each datapoint; discrete sites have the gradient of their relaxation.

    A site is drawn as one-hot b, the largest element of :math:`z = \alpha + \mathrm{Gumbel}`, and has the gradient of
    :math:`\mathrm{softmax}(z / \lambda)`. The value of the bound is unbiased. Its gradient is biased, because the model
    is differentiated between the discrete values. The variance is small. It applies to OneHotCategorical and Bernoulli
    sites. The value of a Categorical is an index, which has no gradient.

    References:
        | Categorical Reparameterization with Gumbel-Softmax (Jang, Gu & Poole, 2017), section 2.2
        | https://arxiv.org/abs/1611.01144

    Arguments:
        num_particles: The number :math:`K \ge 1` of particles.
        temperature: The temperature :math:`\lambda`.
        vectorize_particles, max_plate_nesting: As of :class:`ParticleELBO`.

    Raises:
        ValueError: If the temperature is not positive; at the first loss, if a site of another kind is not
            reparameterised.

    Example:
        >>> StraightThrough_ELBO(4)
        StraightThrough_ELBO(num_particles=4)  # biased: that of a relaxation, as if values could lie between
    """

    discrete: ClassVar[str] = "gradient of a relaxation"
    bias: ClassVar[str] = "that of a relaxation, as if values could lie between"

    temperature: Positive = 1.0
    backward: int | None = field(default=None, init=False)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        return super()._get_trace(model, _StraightThrough(self.temperature)(guide), args, kwargs)

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        bound = particles.log_weights.mean(0)
        return bound, bound


class _StraightThrough(Messenger):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, msg: Any) -> None:
        inner = discrete_of(msg)
        if inner is None:
            return
        if isinstance(inner, torch.distributions.Categorical) or (log_q := log_probs_of(inner)) is None:
            raise ValueError(
                f"guide: StraightThrough_ELBO needs values that the model computes with; {msg['name']!r} is a "
                f"{type(inner).__name__}. Make it a OneHotCategorical or Bernoulli, or use VIMCO_ELBO or RELAX_ELBO."
            )
        z = log_q - torch.empty_like(log_q).exponential_().log()
        soft = (z / self.temperature).softmax(-1)
        if isinstance(inner, torch.distributions.Bernoulli):
            soft = soft[..., 1]
        msg["value"] = value_of(inner, z.argmax(-1)) + (soft - soft.detach())  # in this order exactly zero or one


def discrete_of(msg: Any) -> Any:
    """The distribution of a site's elements, without Independent; `None` if nothing is drawn or the site is
    reparameterised."""
    fn = msg["fn"]
    if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg) or fn.has_rsample:
        return None
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def log_probs_of(fn: Any) -> Tensor | None:
    """The log-probabilities of all values, `(*, S)`; `None` if the distribution has no such table."""
    if isinstance(fn, torch.distributions.Bernoulli):
        return torch.nn.functional.logsigmoid(torch.stack([-fn.logits, fn.logits], -1))
    if isinstance(fn, torch.distributions.Categorical | torch.distributions.OneHotCategorical):
        return fn.logits
    return None


def value_of(fn: Any, index: Tensor) -> Tensor:
    """The value of a discrete distribution at an index into its table."""
    if isinstance(fn, torch.distributions.Bernoulli):
        return index.to(fn.logits)
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return torch.nn.functional.one_hot(index, fn.logits.shape[-1]).to(fn.logits)
    return index
