"""Takes the model's gradient of a few particles, resampled by their weights, in place of all K."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_vmem.infer.particles import PARTICLE_PLATE, Layout, Particles, model_terms, particles_of, samples
from pyro_vmem.infer.subsampling import SameData

__all__ = ["choose", "resampled_particles"]


def resampled_particles(elbo: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Particles:
    r"""Draws particles with the same values as :func:`draw_particles` does, and fewer gradients.

    The model is run on all K particles without gradients, and again on n of each datapoint, drawn by their normalised
    weights :math:`\tilde w_k`. Wherever :math:`\log p(x, h_k)` is used, its gradient is that of the second run times
    :math:`n_k / (n \tilde w_k)`, if the k-th was drawn :math:`n_k` times: a factor that is 1 in expectation. The
    :math:`\log q` of a latent that is differentiated through has the same factor, because along the latent's value the
    gradients of :math:`\log p` and :math:`\log q` cancel where the guide is good. Any other is kept whole. The two runs
    should be the same: dropout, say, would be drawn anew.

    Raises:
        ValueError: As of :func:`draw_particles`; if the guide runs the model itself.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        raise ValueError(
            f"backward: the guide, {type(poutine.unwrap(guide)).__name__}, runs the model itself, with all gradients. "
            "Use backward=None, or a guide that is a function of its own."
        )
    if elbo.global_names:
        raise ValueError("backward: not for programs with latents outside of the data plate. Use backward=None.")
    same = SameData()  # also for the run of the few
    [(run, drawn)] = elbo._get_traces(same(_without_gradients(model)), same(guide), args, kwargs)
    particles, latents = particles_of(run, drawn), samples(drawn)
    share = particles.log_weights.detach().softmax(0)
    chosen = choose(share, torch.rand_like(share[0]), elbo.backward)

    layout = Layout(samples(run), latents).with_particles(elbo.backward)
    few = pyro.plate(PARTICLE_PLATE, elbo.backward, dim=-int(elbo.max_plate_nesting))(same(model))
    again = poutine.trace(poutine.replay(few, trace=_only(chosen, drawn, layout))).get_trace(*args, **kwargs)
    again = prune_subsample_sites(again)
    again.compute_log_prob()
    log_prior, log_likelihood = model_terms(samples(again), layout)

    factor = 1 / (elbo.backward * share.gather(0, chosen))

    def from_chosen(values: Tensor, live: Tensor) -> Tensor:
        """Values `(K, B)` with the gradient of those of the chosen, `(n, B)`."""
        return values.detach().scatter_add(0, chosen, factor * (live - live.detach()))

    log_guide = {
        name: from_chosen(values, values.gather(0, chosen)) if latents[name]["value"].requires_grad else values
        for name, values in particles.log_guide.items()
    }
    return replace(
        particles,
        log_prior={name: from_chosen(values, log_prior[name]) for name, values in particles.log_prior.items()},
        log_likelihood=from_chosen(particles.log_likelihood, log_likelihood),
        log_guide=log_guide,
        arguments=(args, kwargs),
    )


def choose(share: Tensor, noise: Tensor, count: int) -> Tensor:
    r"""Draws particles by systematic resampling: :math:`n_k` is :math:`n \tilde w_k`, rounded up or down at random.

    The normalised weights `share` are `(K, B)`, and `noise` is uniform in [0, 1] for each datapoint, `(B,)`. Returns
    which are drawn, `(n, B)`; none of weight zero.

    Example:
        >>> choose(torch.tensor([[0.6], [0.0], [0.4]]), torch.tensor([0.5]), 2)
        tensor([[0],
                [2]])
    """
    edges = share.cumsum(0)
    places = (torch.arange(count, device=noise.device).unsqueeze(-1) + noise) / count
    # inside of the interval, also after rounding, so that no particle without weight is met at its ends
    rounding = torch.finfo(share.dtype).eps
    places = places.clamp(rounding, 1 - rounding)
    return (edges / edges[-1] <= places.unsqueeze(1)).sum(1)


def _without_gradients(model: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            value = model(*args, **kwargs)
        torch.clear_autocast_cache()  # or older versions of torch go on with weights that were cast without gradients
        return value

    return run


def _only(chosen: Tensor, drawn: Trace, layout: Layout) -> Trace:
    """What was drawn, of the chosen particles only."""
    trace = drawn.copy()
    for name, site in samples(drawn).items():
        if site["is_observed"]:  # a factor of the guide, which the model does not replay
            continue
        index = layout.of_value(chosen, site["fn"].event_dim)
        trace.nodes[name] = site | {"value": torch.take_along_dim(site["value"], index, 0)}
    return trace
