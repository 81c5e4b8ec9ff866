"""Objectives that choose the values of one categorical site for all particles of a datapoint together."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vmem.infer.elbo import ParticleELBO
from pyro_vmem.infer.particles import Particles, samples

__all__ = ["OneSiteELBO"]


@dataclass(repr=False, eq=False)
class OneSiteELBO(ParticleELBO):
    """An objective whose particles have different values of one categorical site, and a weight each."""

    site = "a"  # an argument of each subclass
    backward: int | None = field(default=None, init=False)
    vectorize_particles: bool = field(default=True, init=False)

    @abc.abstractmethod
    def choose(self, fn: torch.distributions.Categorical) -> Tensor:
        """Chooses the values of all particles, `(K, *)`, from the guide's distribution with batch shape `(*)`.

        Raises:
            ValueError: If the site has fewer values than the objective needs.
        """

    def _get_vectorized_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        chosen = _Chosen(self, int(self.max_plate_nesting))(guide)
        traces: tuple[Trace, Trace] = super()._get_vectorized_trace(model, chosen, args, kwargs)
        if self.site not in traces[1].nodes:
            latents = [name for name, site in traces[1].nodes.items() if site["type"] == "sample"]
            raise ValueError(f"site: the guide has no sample site {self.site!r}; it has {latents}.")
        self._check_site(*traces)
        return traces

    def _check_site(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Refuses a site that is several for each datapoint, or counts where others do not."""
        chosen = guide_trace.nodes[self.site]
        for name, site in {**samples(guide_trace), **samples(model_trace)}.items():
            if name in self.global_names:
                continue
            for frame in chosen["cond_indep_stack"]:
                if frame.vectorized and frame not in site["cond_indep_stack"]:
                    raise ValueError(
                        f"site: {self.site!r} is in plate {frame.name!r}, which {name!r} is not in, so that a "
                        "datapoint has several of it. Use pyro.infer.TraceEnum_ELBO, VIMCO_ELBO or "
                        "Reinforce_ELBO."
                    )
            if chosen["mask"] is not None and not _same_mask(chosen["mask"], site["mask"]):
                raise ValueError(
                    f"site: {self.site!r} is masked otherwise than {name!r}. Mask the whole of model and guide, or "
                    "only the observation; or sample, by VIMCO_ELBO or Reinforce_ELBO."
                )

    def other_scores(self, particles: Particles) -> Tensor:
        r""":math:`\log q` of all other latents that are not reparameterised, together, with shape `(K, B)`."""
        others = (score for name, score in particles.score.items() if name != self.site)
        return sum(others, torch.zeros_like(particles.log_likelihood))


def _same_mask(mask: Any, other: Any) -> bool:
    return other is mask or (other is not None and bool((torch.as_tensor(mask) == torch.as_tensor(other)).all()))


class _Chosen(Messenger):
    """Gives each particle its value of the site. It runs within the plate of particles, so sees one distribution."""

    def __init__(self, elbo: OneSiteELBO, max_plate_nesting: int) -> None:
        super().__init__()
        self.elbo, self.dims = elbo, max_plate_nesting

    def _pyro_sample(self, msg: Any) -> None:
        name = self.elbo.site
        if msg["name"] != name or msg["is_observed"]:
            return
        fn = msg["fn"]
        if msg["value"] is not None:
            raise ValueError(f"site: {name!r} is outside of the data plate. Name a latent of each datapoint.")
        if not isinstance(fn, torch.distributions.Categorical):
            raise ValueError(
                f"site: {name!r} is {type(fn).__name__}, expected a Categorical. Name one that is, or use VIMCO_ELBO."
            )
        batch = fn.batch_shape[-(self.dims - 1) :] if self.dims > 1 else torch.Size()
        if batch.numel() < fn.batch_shape.numel():
            raise ValueError(
                f"site: {name!r} depends on another latent, so its most probable values differ between particles. "
                "Name the first categorical site of the guide, or use VIMCO_ELBO."
            )
        values = self.elbo.choose(fn)
        missing = self.dims - 1 - len(batch)
        msg["value"] = values.reshape(len(values), *[1] * missing, *batch)
