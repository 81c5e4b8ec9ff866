"""The base class of the objectives, and the terms that they report.

An objective estimates a bound for each datapoint from particles, and a surrogate that has the estimator's gradient.
"""

from __future__ import annotations

import abc
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_vmem._utils.checks import Count
from pyro_vmem.infer.doubly_reparameterised import doubly_reparameterised, through_values_only
from pyro_vmem.infer.global_latents import draw_with_globals, find_globals
from pyro_vmem.infer.particles import Particles, draw_particles
from pyro_vmem.infer.resampled_backward import resampled_particles
from pyro_vmem.infer.subsampling import SameData

__all__ = ["DifferentiableELBO", "ParticleELBO", "Terms", "log_mean_exp"]


class DifferentiableELBO(ELBO):
    """An objective that defines its loss and gradients by `differentiable_loss`."""

    @abc.abstractmethod
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss in nats, as a scalar tensor to call `backward` on."""

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Adds the gradient of the loss to every parameter's `.grad`, and returns the loss in nats."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss, in nats, without gradients."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()


@dataclass(repr=False, eq=False)
class ParticleELBO(DifferentiableELBO, abc.ABC):
    r"""An objective that is computed from particles, weighted per datapoint.

    A subclass defines :meth:`estimate`; everything else is shared. The objective works for any Pyro model whose
    observations and local latents are in one data plate. Plate subsampling scales the sum over datapoints,
    `poutine.scale` tempers the weights, and `poutine.mask` removes datapoints. Global latents (those outside of the
    plate, such as the components of a mixture) are drawn once for all particles. Their :math:`\log p(g) - \log q(g)` is
    added to the sum of the bounds. :class:`GlobalDraws_ELBO` draws them several times.

    Arguments:
        num_particles: The number :math:`K` of particles.
        backward: The number of particles per datapoint, drawn by their weights, that the gradient of the model uses.
            Default: all. Bound and expected gradient stay the same. A step takes less time and memory, and has more
            noise.
        vectorize_particles: Whether all particles are drawn in one pass.
        max_plate_nesting: The number of nested plates, as in `pyro.infer.ELBO`. Default: found by the first call.

    Attributes:
        discrete: How the guide's discrete sites get their gradient.
        least_particles: The least :math:`K` that the objective is defined for.
        weighted: Whether the gradient weights particles by their normalised weights, so that `backward` can be used.
        bias: The bias of the gradient in words, or `""` if it has none.
        global_latents: Whether it has a gradient for latents outside of the data plate.
        global_names: The names of these latents, known after the first call.
        dreg: Whether reparameterised latents get doubly reparameterised gradients; off unless a subclass offers it.
        module: The module that the objective itself trains or updates, such as a baseline; `None` for most.

    Raises:
        ValueError: If `num_particles` is less than `least_particles`, or `backward` is not at least 1 and less than
            `num_particles`, or is given where particles are not vectorized or not weighted.
    """

    discrete: ClassVar[str] = "score function"
    least_particles: ClassVar[int] = 1
    weighted: ClassVar[bool] = False
    bias: ClassVar[str] = ""
    global_latents: ClassVar[bool] = True
    dreg = False  # not annotated, so no argument until a subclass makes it one

    num_particles: Count = 4
    backward: Count | None = field(default=None, kw_only=True)
    vectorize_particles: bool = field(default=True, kw_only=True)
    max_plate_nesting: float = field(default=math.inf, kw_only=True)
    global_names: frozenset[str] = field(default=frozenset(), init=False)
    module: torch.nn.Module | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if (count := self.num_particles) < self.least_particles:
            raise ValueError(
                f"num_particles: {type(self).__name__} needs at least {self.least_particles}, got {count}. "
                "For one particle use Reinforce_ELBO(baseline='average') or pyro.infer.TraceGraph_ELBO."
            )
        if self.backward is not None:
            self._check_backward(self.backward)
        super().__init__(
            num_particles=count,
            vectorize_particles=self.vectorize_particles,
            max_plate_nesting=self.max_plate_nesting,
        )

    @property
    def decodes(self) -> int:
        """The number of decoder passes per datapoint."""
        return int(self.num_particles) + (self.backward or 0)

    @abc.abstractmethod
    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        """Computes the bound of each datapoint, and a surrogate whose gradient is the gradient estimate.

        Arguments:
            particles: The particles, `(K, B)`.

        Returns:
            The bound and the surrogate, each with shape `(B,)`.
        """

    def shares(self, particles: Particles) -> Tensor:
        """The weight of each particle in an average over the guide, `(K, B)`; 1 / K by default."""
        return torch.full_like(particles.log_likelihood, 1 / len(particles.log_likelihood))

    def terms(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Terms:
        """Computes the loss and its terms from one draw of particles; the arguments are those of `loss`."""
        particles = self._draw(model, guide, *args, **kwargs)
        bound, surrogate = self.estimate(particles)
        # The value is the bound's, the gradient the surrogate's.
        value = bound.detach() + surrogate - surrogate.detach()
        loss = -particles.scale * value.sum()
        if particles.of_globals is not None:
            loss = loss - particles.of_globals.surrogate(particles.scale * bound.detach().sum())
        return Terms(particles, self.shares(particles).detach(), bound.detach(), loss)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, minus the sum of the bounds in nats, as a scalar tensor to call `backward` on."""
        loss = self.terms(model, guide, *args, **kwargs).loss
        warn_if_nan(loss, "loss")
        return loss

    def _check_backward(self, backward: int) -> None:
        if not self.weighted:
            raise ValueError(
                f"backward: {type(self).__name__} does not weight its particles, so drawing some of them is the same "
                "as using fewer. Use backward=None, or VIMCO_ELBO, IWAE_ELBO or RWS_ELBO."
            )
        if backward >= self.num_particles:
            raise ValueError(
                f"backward: expected fewer than the {self.num_particles} particles, got {backward}. "
                "With backward=None the gradient is that of all."
            )
        if not self.vectorize_particles:
            raise ValueError(
                "backward: particles have to be vectorized. Pass vectorize_particles=True, or no backward."
            )

    def _draw(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Particles:
        resampled = self.backward is not None and torch.is_grad_enabled()
        if resampled or not self.global_names:
            # Most programs have no latents outside of the data plate, so they are looked for where it does not go well.
            try:
                return (resampled_particles if resampled else draw_particles)(self, model, guide, *args, **kwargs)
            except Exception:  # the program's own too: it may index what it takes for a vector, and not K of them
                if not (names := find_globals(model, guide, args, kwargs)):
                    raise
                if resampled:
                    raise ValueError(
                        f"backward: it does not support latents outside of the data plate, {sorted(names)}. Use none."
                    ) from None
                self.global_names = names
        return draw_with_globals(self, model, guide, *args, **kwargs)

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[Trace, Trace]]:
        same = SameData()
        yield from super()._get_traces(same(model), same(guide), args, kwargs)
        same.check()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """Runs the guide, then the model on its values. A subclass draws from another guide, or changes the traces."""
        if self.dreg:
            guide = doubly_reparameterised()(guide)
        traces: tuple[Trace, Trace] = get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)
        if self.dreg:
            through_values_only(traces[1])
        return traces

    def __repr__(self) -> str:
        """The arguments that are not at their defaults, the first of all always; and the bias, if there is one."""
        shown: list[str] = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            # The nesting is found by the first call, where it is not given.
            if not shown or (name != "max_plate_nesting" and value != parameter.default):
                shown.append(f"{name}={type(value).__name__ if isinstance(value, torch.nn.Module) else repr(value)}")
        return f"{type(self).__name__}({', '.join(shown)})" + (f"  # biased: {self.bias}" if self.bias else "")


@dataclass(frozen=True, eq=False)
class Terms:
    r"""The loss of a step and its terms, in nats.

    Attributes:
        particles: The particles that the loss was computed from.
        shares: The weight of each particle in an average over the guide, with shape `(K, B)`.
        bound: The multi-sample bound :math:`L` of each datapoint, with shape `(B,)`.
        loss: The loss, a scalar: minus the sum of the bounds and of the terms of global latents. Its gradient is the
            gradient estimate.

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
        r""":math:`KL(q \| p)` of each latent site, each `(B,)`: exact if categorical, else a mean over particles.

        An auxiliary site of the guide has no prior, so its entry is :math:`E \log q`.
        """
        p = self.particles
        sampled = {
            name: log_q - p.log_prior[name] if name in p.log_prior else log_q for name, log_q in p.log_guide.items()
        }
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
    r""":math:`\log \frac{1}{K} \sum_k \exp(v_k)` along a dim of values of any shape."""
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])
