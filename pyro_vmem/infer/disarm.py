"""The evidence lower bound with antithetic pairs for Bernoulli sites."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vmem.infer.elbo import ParticleELBO
from pyro_vmem.infer.particles import SCORE, Particles, samples

__all__ = ["DisARM_ELBO"]


@dataclass(repr=False, eq=False)
class DisARM_ELBO(ParticleELBO):
    r"""The evidence lower bound of each datapoint, from pairs of particles whose Bernoulli sites are antithetic.

    .. math:: b = 1[u < \sigma(\alpha)], \quad \tilde b = 1[1 - u < \sigma(\alpha)], \quad
        \nabla_\alpha = \tfrac{1}{2} (f(b) - f(\tilde b)) (b - \tilde b)\, \sigma(|\alpha|)

    with :math:`f = \log p(x, h) - \log q(h)` and :math:`\alpha` the logits. It is unbiased, and its variance is at most
    that of two independent draws with leave-one-out baselines. It applies to Bernoulli sites of any shape whose guide
    depends on no other latent. Other latents that are not reparameterised have the leave-one-out score function of
    :class:`Reinforce_ELBO`.

    References:
        | DisARM: An Antithetic Gradient Estimator for Binary Latent Variables (Dong, Mnih & Tucker, 2020), equation 8
        | https://arxiv.org/abs/2006.10680

    Arguments:
        num_particles: The number K of particles, even: K / 2 pairs.
        max_plate_nesting: As in `pyro.infer.ELBO`.

    Raises:
        ValueError: If `num_particles` is odd; at the first loss, if no Bernoulli site is of this kind.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         on = pyro.sample("on", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(on, 1.0), obs=x)
        >>> def guide(x):
        ...     logit = pyro.param("logit", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("on", dist.Bernoulli(logits=logit))
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), DisARM_ELBO(4))
        >>> loss = svi.step(torch.tensor([0.1, 1.9]))
    """

    discrete: ClassVar[str] = "antithetic pairs of Bernoulli sites, else score function"
    least_particles: ClassVar[int] = 2

    backward: int | None = field(default=None, init=False)
    vectorize_particles: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_particles % 2:
            raise ValueError(
                f"num_particles: expected an even number, for particles in pairs, got {self.num_particles}."
            )
        self._paired: set[str] = set()

    def _get_vectorized_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        paired = _Antithetic(int(self.num_particles) // 2, int(self.max_plate_nesting))(guide)
        traces: tuple[Trace, Trace] = super()._get_vectorized_trace(model, paired, args, kwargs)
        return traces

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        traces = super()._get_trace(model, guide, args, kwargs)
        paired = [site for site in samples(traces[1]).values() if SCORE in site["infer"]]
        if not paired:
            raise ValueError(
                "guide: DisARM_ELBO pairs Bernoulli sites whose guide depends on no other latent, and there is none. "
                "Use VIMCO_ELBO or Reinforce_ELBO; for a categorical site, UnorderedSet_ELBO or RaoBlackwell_ELBO."
            )
        for site in paired:
            site["score_parts"] = site["score_parts"]._replace(
                score_function=site["infer"][SCORE].log_prob(site["value"])
            )
        self._paired = {site["name"] for site in paired}
        return traces

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        f = particles.log_weights
        bound, count, signal = f.mean(0), len(f), f.detach()
        own, twin = signal.chunk(2)
        # The mean over pairs of half the difference; each of a pair has it with its own sign.
        of_pairs = torch.cat([own - twin, twin - own]) / (2 * (count // 2))
        alone = (signal - signal.mean(0)) / (count - 1)  # as of Reinforce_ELBO
        scores = ((of_pairs if name in self._paired else alone) * score for name, score in particles.score.items())
        return bound, bound + sum(scores, torch.zeros_like(f)).sum(0)


class _Antithetic(Messenger):
    """Draws pairs of particles by the same noise, once as it is and once mirrored."""

    def __init__(self, pairs: int, max_plate_nesting: int) -> None:
        super().__init__()
        self.pairs, self.dims = pairs, max_plate_nesting

    def _pyro_sample(self, msg: Any) -> None:
        fn, inner = msg["fn"], msg["fn"]
        if msg["is_observed"] or msg["value"] is not None or len(fn.batch_shape) >= self.dims:
            return
        while isinstance(inner, torch.distributions.Independent):
            inner = inner.base_dist
        if not isinstance(inner, torch.distributions.Bernoulli):
            return
        noise = torch.rand(self.pairs, *[1] * (self.dims - 1 - len(fn.batch_shape)), *inner.probs.shape).to(inner.probs)
        msg["value"] = (torch.cat([noise, 1 - noise]) < inner.probs).to(inner.probs)
        # Where the two of a pair agree, their scores cancel; where not, each logit has its factor.
        logits = inner.logits
        factor = torch.sigmoid(logits.detach().abs())
        scaled = logits.detach() + factor * (logits - logits.detach())
        score = dist.Bernoulli(logits=scaled)
        msg["infer"] = {**msg["infer"], SCORE: score.to_event(fn.event_dim) if fn.event_dim else score}
