"""Latents outside of the data plate: one draw for all particles, whose density stays outside of the logarithms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_factor
from torch import Tensor

from pyro_vmem.infer.doubly_reparameterised import is_delta
from pyro_vmem.infer.particles import PARTICLE_PLATE, Globals, Particles, draw_particles, particles_of, samples, stacked

__all__ = ["draw_with_globals", "find_globals", "global_names", "globals_of", "only"]


def draw_with_globals(elbo: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Particles:
    """Draws particles of programs that have global latents, `elbo.global_names`, outside of the data plate.

    Raises:
        ValueError: As in :func:`draw_particles`; also if the objective has no gradient for global latents, or a plate
            around them is subsampled.
    """
    if not elbo.global_latents:
        names, elbo.global_names = sorted(elbo.global_names), frozenset()
        raise ValueError(
            f"guide: {type(elbo).__name__} has no gradient for latents outside of the data plate: {names}. "
            "Use VIMCO_ELBO, IWAE_ELBO, Reinforce_ELBO or RaoBlackwell_ELBO."
        )
    traces = list(elbo._get_traces(model, _DrawnOnce(elbo.global_names)(guide), args, kwargs))
    found = global_names(*traces[0])
    if found != elbo.global_names:  # the programs are others than before
        elbo.global_names = found
        draw = draw_with_globals if found else draw_particles
        return draw(elbo, model, guide, *args, **kwargs)
    rows = [particles_of(*(only(trace, found, False) for trace in pair)) for pair in traces]
    of_globals = globals_of(*(only(trace, found, True) for trace in traces[0]))
    return replace(stacked(rows), arguments=(args, kwargs), of_globals=of_globals)


def global_names(model_trace: Trace, guide_trace: Trace) -> frozenset[str]:
    """Returns the names of the sites outside of the plates that all observations share; none if they share no plate.

    Returns none as well if one joint draw gives all local latents, as in `AutoDiagonalNormal`.
    """
    sites = [*samples(guide_trace).values(), *samples(model_trace).values()]
    plates = {site["name"]: _plates(site) for site in sites}
    observed = [plates[site["name"]] for site in sites if site["is_observed"] and not site_is_factor(site)]
    data = frozenset.intersection(*filter(None, observed)) if any(observed) else frozenset()
    names = frozenset(name for name, own in plates.items() if data and not own & data)
    local = [site for name, site in samples(guide_trace).items() if name not in names]
    auxiliary = [name for name in names if name not in model_trace.nodes]
    return frozenset() if auxiliary and local and all(map(is_delta, local)) else names


class _DrawnOnce(Messenger):
    """Draws the named sites before a plate of particles makes K of them, and once for all runs."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = names
        self._drawn: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and msg["value"] is None:
            if msg["name"] not in self._drawn:
                self._drawn[msg["name"]] = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["value"] = self._drawn[msg["name"]]


def _plates(site: Any) -> frozenset[str]:
    return frozenset(f.name for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLE_PLATE)


def find_globals(model: Any, guide: Any, args: Any, kwargs: Any) -> frozenset[str]:
    """The names of the global sites, by running the programs once; parameters and random state stay as they are."""
    if isinstance(poutine.unwrap(guide), Messenger):
        return frozenset()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), poutine.block():
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    return global_names(prune_subsample_sites(run), prune_subsample_sites(drawn))


def only(trace: Trace, names: Iterable[str], inside: bool) -> Trace:
    """A trace with only the named sites, or without them."""
    kept = trace.copy()
    for name in [name for name in trace.nodes if (name in names) != inside]:
        kept.remove_node(name)
    return kept


def globals_of(model_trace: Trace, guide_trace: Trace) -> Globals:
    """Computes the terms that one draw of the global latents adds to the bound, from their own traces.

    Raises:
        ValueError: If a plate around them is subsampled, or the guide lacks one of them.
    """
    of_model, of_guide = samples(model_trace), samples(guide_trace)
    for site in [*of_model.values(), *of_guide.values()]:
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"model and guide: plate {frame.name!r} outside of the data plate is subsampled. Subsample "
                    "the data plate only."
                )
    missing = [n for n, site in of_model.items() if n not in of_guide and not site["is_observed"]]
    if missing:
        raise ValueError(f"guide: it has no sample site {missing[0]!r}, which the model leaves unobserved. Add one.")
    log_q = [_total(site, site["log_prob"]) for site in of_guide.values()]
    scores = [_total(site, site["score_parts"].score_function) for site in of_guide.values()]
    log_p = [_total(site, site["log_prob"]) for site in of_model.values()]
    zero = torch.zeros_like((log_p + log_q)[0])
    return Globals(log_ratio=sum(log_p, zero) - sum(log_q, zero), score=sum(scores, zero))


def _total(site: Any, values: Any) -> Any:
    """The sum over a site, which all particles have the same of."""
    if not isinstance(values, Tensor):
        return values  # the score of what is reparameterised: the number zero
    copies = 1
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLE_PLATE and values.dim() >= -frame.dim:
            copies = values.shape[frame.dim]
    return values.sum() / copies
