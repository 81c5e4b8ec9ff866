"""Information, bound and evidence of any pair of Pyro programs, from draws of the guide.

It finds the sample sites of a program, and the dims of their datapoints.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Categorical
from tqdm.auto import tqdm

from pyro_vmem.diagnostics.weights import StratifiedWeights
from pyro_vmem.infer import IWAE_ELBO
from pyro_vmem.infer.particles import draw_particles

__all__: list[str] = []


class _Recorder(IWAE_ELBO):
    """Keeps the traces that its particles are made from."""

    def __init__(self, num_particles: int, max_plate_nesting: float = math.inf) -> None:
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting)
        self.traces: list[tuple[Trace, Trace]] = []

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        self.traces.append(super()._get_trace(model, guide, args, kwargs))
        return self.traces[-1]


def diagnose_program(
    model: Any,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    site: str | None,
    num_samples: int,
    max_decodes: int,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Computes the figures of :func:`diagnose` for a pair: values `(B,)` and `(B, S)` by name, and the settings."""
    start = time.perf_counter()
    probe = _Recorder(1)
    size = draw_particles(probe, model, guide, *args, **kwargs).log_likelihood.shape[1]
    if site is not None:
        _check_site(site, *map(sample_sites, probe.traces[0]))
    at_once = max(1, max_decodes // size)
    columns: dict[str, list[Tensor]] = {}
    bar = tqdm(range(0, num_samples, at_once), desc="drawing", unit="chunk", disable=not (progress and sys.stderr))
    for first in bar:
        recorder = _Recorder(min(at_once, num_samples - first), probe.max_plate_nesting)
        particles = draw_particles(recorder, model, guide, *args, **kwargs)
        row = {"log_weights": particles.log_weights, "reconstruction": particles.log_likelihood}
        # An auxiliary site of the guide has no prior: its entry belongs to the KL of the latent that it makes.
        row |= {f"kl_{name}": log_q - particles.log_prior.get(name, 0.0) for name, log_q in particles.log_guide.items()}
        # In closed form, where there is one, without the noise of the draws.
        row |= {f"kl_{name}": kl for name, kl in particles.kl.items()}
        if site is not None:
            row |= _address_figures(*recorder.traces[0], site, recorder.num_particles)
        for name, values in row.items():
            columns.setdefault(name, []).append(values)
    draws = {name: torch.cat(parts) for name, parts in columns.items()}
    log_weights = draws.pop("log_weights")
    estimate = StratifiedWeights.unstratified(log_weights).estimate.honest
    means = {name: values.mean(0) for name, values in draws.items()}
    if site is not None:
        means["information_gain"] = means.pop(f"kl_{site}")
        means["perplexity"] = means["address_entropy"].exp()
    if "address_guide" in means:
        means["top"] = means["address_guide"].argmax(-1)
        means["information_share"] = means["information_gain"] / math.log(means["address_guide"].shape[-1])
    means |= {
        "elbo": log_weights.mean(0),
        "elbo_se": log_weights.std(0) / math.sqrt(num_samples),
        "elbo_gap": estimate.log_evidence - log_weights.mean(0),
        **estimate.figures(),
    }
    names = [getattr(program, "__name__", type(program).__name__) for program in (model, guide)]
    facts = {
        "title": f"diagnostics of ({', '.join(names)})",
        "method": "sampled",
        "site": site or "",
        "decodes": log_weights.numel(),
        "seconds": time.perf_counter() - start,
    }
    return means, facts


def _address_figures(model_trace: Trace, guide_trace: Trace, site: str, num_particles: int) -> dict[str, Tensor]:
    """The entropy `(K, B)` of the guide's site and, if a datapoint has one address, its probabilities `(K, B, S)`."""
    guide_sites = sample_sites(guide_trace)
    dims, q = data_dims([*sample_sites(model_trace).values(), *guide_sites.values()]), guide_sites[site]["fn"]
    entropy = as_rows(q.entropy(), dims).sum(-1).reshape(num_particles, -1)
    probs = as_rows(q.probs, dims, 1).reshape(*entropy.shape, -1)
    return {"address_entropy": entropy} | ({"address_guide": probs} if probs.shape[-1] == q.probs.shape[-1] else {})


def _check_site(site: str, model_sites: dict[str, Any], guide_sites: dict[str, Any]) -> None:
    latents = [name for name, node in model_sites.items() if not node["is_observed"]]
    if site not in guide_sites or site not in latents:
        raise ValueError(
            f"site: guide and model have no latent site {site!r} in common; the guide has {sorted(guide_sites)}, the "
            f"model leaves {sorted(latents)} unobserved. Pass the name of a categorical one, or site=None."
        )
    for name, sites in (("guide", guide_sites), ("model", model_sites)):
        fn = sites[site]["fn"]
        if not isinstance(fn, Categorical):
            categorical = sorted(n for n in latents if isinstance(guide_sites[n]["fn"], Categorical))
            raise ValueError(
                f"site: {site!r} is a {type(fn).__name__} in the {name}; its information gain has a closed form only "
                f"for a Categorical. The guide's categorical sites: {categorical}. Pass one of them, or site=None."
            )


def sample_sites(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace by name, without those that draw a minibatch."""
    return {name: site for name, site in prune_subsample_sites(trace).nodes.items() if site["type"] == "sample"}


def data_dims(sites: Iterable[Any]) -> tuple[int, ...]:
    """The batch dims, negative and in order, of the plates that all sites share: particles and datapoints."""
    stacks = [{frame for frame in site["cond_indep_stack"] if frame.vectorized} for site in sites]
    return tuple(sorted(frame.dim for frame in set.intersection(*stacks)))


def as_rows(values: Tensor, dims: Sequence[int], event_dim: int = 0) -> Tensor:
    """Reshapes values `(*batch, *event)` to `(rows, columns)`, with some batch dims as rows and all else as columns.

    Example:
        >>> import torch
        >>> as_rows(torch.rand(3, 5, 2), [-1], event_dim=1).shape  # an inner plate of 3, a data plate of 5
        torch.Size([5, 6])
    """
    moved = values.movedim([dim - event_dim for dim in dims], list(range(len(dims))))
    return moved.reshape(math.prod(moved.shape[: len(dims)]), -1)
