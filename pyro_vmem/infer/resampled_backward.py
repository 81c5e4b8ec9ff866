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
    r"""Draws particles like :func:`draw_particles`, with gradients through n of K particles only.

    The model is run on all K particles without gradients. It is run again with gradients on n particles per datapoint,
    drawn by their normalised weights :math:`\tilde w_k`. The gradient of :math:`\log p(x, h_k)` is that of the second
    run times :math:`n_k / (n \tilde w_k)`, where :math:`n_k` counts how often particle k was drawn. The expectation of
    this factor is 1. The :math:`\log q` of a latent that is differentiated through has the same factor, because along
    the latent's value the gradients of :math:`\log p` and :math:`\log q` cancel where the guide is good. All other
    terms keep their full gradient. The two runs should be equal. With dropout, for example, they would differ.

    Raises:
        ValueError: As in :func:`draw_particles`; also if the guide runs the model itself.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        raise ValueError(
            f"backward: the guide, {type(poutine.unwrap(guide)).__name__}, runs the model itself, with all gradients. "
            "Use backward=None, or a guide that is a function of its own."
        )
    if elbo.global_names:
        raise ValueError("backward: it does not support latents outside of the data plate. Use backward=None.")
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

    Arguments:
        share: The normalised weights :math:`\tilde w_k`, with shape `(K, B)`.
        noise: One number of each datapoint, uniform in [0, 1], with shape `(B,)`.
        count: The number n of particles that are drawn.

    Returns:
        The indices of the particles, with shape `(n, B)`; none has weight zero.

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
