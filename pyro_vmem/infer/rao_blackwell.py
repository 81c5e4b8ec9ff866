"""The evidence lower bound with the most probable addresses summed and the rest sampled."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vmem._utils.checks import check_count
from pyro_vmem.distributions import top_and_rest
from pyro_vmem.infer.elbo import ParticleELBO
from pyro_vmem.infer.particles import Particles, samples

__all__ = ["RaoBlackwell_ELBO"]


class RaoBlackwell_ELBO(ParticleELBO):
    r"""The evidence lower bound, the :math:`k` most probable values of one categorical site summed, the rest sampled.

    .. math:: L = \sum_{a \in T} q(a) f(a) + r\, f(a'), \qquad
        r = 1 - \sum_{a \in T} q(a), \quad a' \sim q(a \mid a \notin T), \quad f = \log p(x, h) - \log q(h)

    T are the k values of largest q for each datapoint. The value and its gradient are unbiased for the full guide, and
    the noise is scaled by what the guide leaves outside of T: once it knows where to look, there is hardly any. It
    costs k + 1 decodes a datapoint. Of a sparse guide, :class:`IndexedGuide` in a :class:`DefensiveGuide` or not, only
    what it names is looked at, so that slots may be millions. Other latents are reparameterised, or get score terms of
    their own.

    References:
        | Rao-Blackwellized Stochastic Gradients for Discrete Distributions (Liu, Regier, Tripuraneni, Jordan,
        | McAuliffe, 2019), section 4 | https://arxiv.org/abs/1810.04777

    Arguments:
        k: How many values are summed, at least 1.
        site: The name of the categorical site.
        max_plate_nesting: As in `pyro.infer.ELBO`.
        retain_graph: As in `pyro.infer.ELBO`.

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

    def __init__(
        self,
        k: int = 3,
        site: str = "a",
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
    ) -> None:
        self.k = check_count("k", k)
        super().__init__(self.k + 1, max_plate_nesting=max_plate_nesting, retain_graph=retain_graph)
        self.site = site

    def _get_vectorized_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        chosen = _TopAndRest(self.site, self.k, int(self.max_plate_nesting))(guide)
        traces: tuple[Trace, Trace] = super()._get_vectorized_trace(model, chosen, args, kwargs)
        if self.site not in traces[1].nodes:
            latents = [name for name, site in traces[1].nodes.items() if site["type"] == "sample"]
            raise ValueError(f"site: the guide has no sample site {self.site!r}; it has {latents}.")
        self._check_site(*traces)
        return traces

    def _check_site(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Refuses a site that is several for each datapoint, or counts where others do not."""
        summed = guide_trace.nodes[self.site]
        for name, site in {**samples(guide_trace), **samples(model_trace)}.items():
            for frame in summed["cond_indep_stack"]:
                if frame.vectorized and frame not in site["cond_indep_stack"]:
                    raise ValueError(
                        f"site: {self.site!r} is in plate {frame.name!r}, which {name!r} is not in, so that a "
                        "datapoint has several of it. Use pyro.infer.TraceEnum_ELBO, VIMCO_ELBO or "
                        "Reinforce_ELBO."
                    )
            if summed["mask"] is not None and not _same_mask(summed["mask"], site["mask"]):
                raise ValueError(
                    f"site: {self.site!r} is masked otherwise than {name!r}. Mask the whole of model and guide, or "
                    "only the observation; or sample, by VIMCO_ELBO or Reinforce_ELBO."
                )

    def shares(self, particles: Particles) -> Tensor:
        q_top = particles.score[self.site][:-1].exp()
        return torch.cat([q_top, (1.0 - q_top.sum(0, keepdim=True)).clamp(min=0.0)])

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        log_weights, q = particles.log_weights, self.shares(particles)
        bound = (q * log_weights).sum(0)
        others = {name: score for name, score in particles.score.items() if name != self.site}
        scores = sum((score for score in others.values()), torch.zeros_like(log_weights))
        # The sampled value's own score, against what the summed values say of the rest.
        signal = (log_weights[-1] - (q * log_weights)[:-1].sum(0) / q[:-1].sum(0)).detach()
        log_q_rest = particles.score[self.site][-1] - q[-1].clamp(min=torch.finfo(q.dtype).tiny).log()
        surrogate = bound + ((q * log_weights).detach() * scores).sum(0) + q[-1].detach() * signal * log_q_rest
        return bound, surrogate


def _same_mask(mask: Any, other: Any) -> bool:
    return other is mask or (other is not None and bool((torch.as_tensor(mask) == torch.as_tensor(other)).all()))


class _TopAndRest(Messenger):
    """Gives particle j the j-th most probable value of a site, and the last particle a draw from the others."""

    def __init__(self, site: str, k: int, max_plate_nesting: int) -> None:
        super().__init__()
        self.site, self.k, self.dims = site, k, max_plate_nesting

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != self.site or msg["is_observed"]:
            return
        fn = msg["fn"]
        if not isinstance(fn, torch.distributions.Categorical):
            raise ValueError(f"site: {self.site!r} is {type(fn).__name__}, expected a Categorical. Name one that is.")
        batch = fn.batch_shape[-(self.dims - 1) :] if self.dims > 1 else torch.Size()
        if batch.numel() < fn.batch_shape.numel():
            raise ValueError(
                f"site: {self.site!r} depends on another latent, so its most probable values differ between particles. "
                "Name the first categorical site of the guide."
            )
        slots = len(fn.enumerate_support())  # those that a truncated guide keeps
        if self.k >= slots:
            raise ValueError(
                f"k: expected fewer than the {slots} values of site {self.site!r}, got {self.k}. "
                "To sum all of them, use pyro.infer.TraceEnum_ELBO."
            )
        values = top_and_rest(fn, self.k)
        missing = self.dims - 1 - len(batch)
        msg["value"] = values.reshape(self.k + 1, *[1] * missing, *batch)
