"""Takes the model's gradient of a few particles, resampled by their weights, in place of all K.

The model runs without gradients for all particles, and once more with gradients for those that were resampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_vmem.infer.particles import PARTICLE_PLATE, Layout, Particles, model_terms, particles_of, samples

__all__ = ["check_guide", "choose", "resampled_particles"]


def resampled_particles(
    drawn: Trace,
    model: Any,
    num_particles: int,
    count: int,
    max_plate_nesting: int,
    check_drawn: Callable[[Trace], None],
    args: Any,
    kwargs: Any,
) -> Particles:
    r"""Draws particles with the same values as :func:`draw_particles` does, and fewer gradients.

    The model is run on all K particles without gradients. Of each datapoint, n particles are then drawn by their
    normalised weights :math:`\tilde w_k`, and the model is run on those again. Wherever :math:`\log p(x, h_k)` is
    used, its gradient is that of the second run times :math:`n_k / (n \tilde w_k)`, if the k-th was drawn :math:`n_k`
    times. That factor is 1 in expectation, so the gradient of whatever is made of the weights stays what it was; of the
    bound, :math:`\sum_k \tilde w_k \nabla \log p(x, h_k)` becomes the mean of :math:`\nabla \log p` over those drawn.

    The :math:`\log q` of a latent that is differentiated through has the same factor: along the latent's value, the
    gradients of :math:`\log p` and :math:`\log q` cancel where the guide is good. That of any other latent is kept
    whole, so what is directly its own is no noisier than before.

    The model is run twice, and should be the same both times: dropout, say, would be drawn anew.

    Arguments:
        drawn: The trace of the guide, with all K particles.
        model: A Pyro model.
        num_particles: The number K of particles.
        count: The number n of particles that are drawn, less than K.
        max_plate_nesting: The dim of the particles, counted from the right.
        check_drawn: What is called with the guide's trace when its log-probabilities are known.
        args: The model's arguments.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: As of :func:`draw_particles`.
    """

    def of_particles(number: int) -> Any:
        return pyro.plate(PARTICLE_PLATE, number, dim=-max_plate_nesting)(model)

    with torch.no_grad():
        model_trace = _replayed(of_particles(num_particles), drawn, args, kwargs)
    torch.clear_autocast_cache()  # older versions of torch would go on with the weights as cast here, without gradients
    guide_trace = prune_subsample_sites(drawn)
    guide_trace.compute_score_parts()
    if is_validation_enabled():
        _validate(model_trace, guide_trace, max_plate_nesting)
    check_drawn(guide_trace)
    particles, latents = particles_of(model_trace, guide_trace), samples(guide_trace)
    share = particles.log_weights.detach().softmax(0)
    chosen = choose(share, torch.rand_like(share[0]), count)

    layout = Layout(model_trace, guide_trace).with_particles(count)
    again = _replayed(of_particles(count), _only(chosen, drawn, layout), args, kwargs)
    log_prior, log_likelihood = model_terms(again, layout)

    factor = 1 / (count * share.gather(0, chosen))

    def from_chosen(values: Tensor, live: Tensor) -> Tensor:
        """Values `(K, B)` with the gradient of those of the chosen, `(n, B)`."""
        return values.scatter_add(0, chosen, factor * (live - live.detach()))

    return replace(
        particles,
        log_prior={name: from_chosen(values, log_prior[name]) for name, values in particles.log_prior.items()},
        log_likelihood=from_chosen(particles.log_likelihood, log_likelihood),
        log_guide={
            name: from_chosen(values.detach(), values.gather(0, chosen))
            if latents[name]["value"].requires_grad
            else values
            for name, values in particles.log_guide.items()
        },
        arguments=(args, kwargs),
    )


def check_guide(guide: Any) -> None:
    """Raises a `ValueError` for a guide that runs the model itself: it cannot run again for a few particles."""
    guide = poutine.unwrap(guide)
    if isinstance(guide, Messenger):
        raise ValueError(
            f"backward: the guide, {type(guide).__name__}, runs the model itself, with all gradients. "
            "Use backward=None, or a guide that is a function of its own."
        )


def choose(share: Tensor, noise: Tensor, count: int) -> Tensor:
    r"""Draws particles by systematic resampling: :math:`n_k` is :math:`n \tilde w_k`, rounded up or down at random.

    Arguments:
        share: The normalised weights :math:`\tilde w_k`, with shape `(K, B)`.
        noise: One number of each datapoint, uniform in [0, 1], with shape `(B,)`.
        count: The number n of particles that are drawn.

    Returns:
        Which, with shape `(n, B)`; none of weight zero.

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


def _replayed(model: Any, drawn: Trace, args: Any, kwargs: Any) -> Trace:
    """The model run on what was drawn, with its log-probabilities."""
    trace = prune_subsample_sites(poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs))
    trace.compute_log_prob()
    return trace


def _validate(model_trace: Trace, guide_trace: Trace, max_plate_nesting: int) -> None:
    """What Pyro checks of a model and its guide."""
    check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    for trace in (model_trace, guide_trace):
        for site in samples(trace).values():
            check_site_shape(site, max_plate_nesting)


def _only(chosen: Tensor, drawn: Trace, layout: Layout) -> Trace:
    """What was drawn, of the chosen particles only."""
    trace = drawn.copy()
    for name, site in samples(prune_subsample_sites(drawn)).items():
        if site["is_observed"]:  # a factor of the guide, which the model does not replay
            continue
        index = layout.of_value(chosen, site["fn"].event_dim)
        trace.nodes[name] = site | {"value": torch.take_along_dim(site["value"], index, 0)}
    return trace
