"""What an objective states, exactly: the sum over all values that the latents of a small program can have."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_vmem.infer.elbo import ParticleELBO, log_mean_exp
from pyro_vmem.infer.particles import particles_of, samples

__all__ = ["exhaustive_bound"]

MOST_DRAWS = 20_000  # combinations of K particles that are summed


def exhaustive_bound(elbo: ParticleELBO, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
    r"""The expectation of an objective's bound, summed over all values of all latents, as a function of the parameters.

    It is the multi-sample bound if the objective weights its particles, summed over all that K of them can be, and
    else the evidence lower bound. Its gradient is what that of an unbiased objective is in expectation. Latents of the
    model are discrete, one of each name for a datapoint. Bounds are in nats, `(B,)`.

    Raises:
        ValueError: If a latent's values cannot be gone through, or there are more than 20,000 combinations.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_vmem as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         on = pyro.sample("on", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(on, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("on", dist.Bernoulli(0.5))
        >>> exhaustive_bound(pv.infer.VIMCO_ELBO(2), model, guide, torch.tensor([0.5, 2.0]))
        tensor([-1.0439, -2.0398])
    """
    sizes: dict[str, int] = {}
    _run(model, guide, args, kwargs, {}, sizes)
    count = int(elbo.num_particles) if elbo.weighted else 1
    states = list(itertools.product(*map(range, sizes.values())))
    if len(states) ** count > MOST_DRAWS:
        raise ValueError(
            f"model: {len(states)} joint values of {list(sizes)} in {count} particles are more than {MOST_DRAWS:,} "
            "combinations. Take a smaller program or fewer particles."
        )
    rows = [_run(model, guide, args, kwargs, dict(zip(sizes, state, strict=True)), sizes) for state in states]
    log_w, log_q = (torch.stack(parts) for parts in zip(*rows, strict=True))  # (S, B) each
    draws = torch.tensor(list(itertools.product(range(len(states)), repeat=count)))
    return (log_q[draws].sum(1).exp() * log_mean_exp(log_w[draws], 1)).sum(0)


def _run(model: Any, guide: Any, args: Any, kwargs: Any, state: dict[str, int], sizes: dict[str, int]) -> Any:
    """log w and log q of one joint value that all datapoints have, each `(B,)`."""
    drawn = poutine.trace(_Given(state, sizes)(guide)).get_trace(*args, **kwargs)
    run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    drawn, run = prune_subsample_sites(drawn), prune_subsample_sites(run)
    drawn.compute_score_parts()
    run.compute_log_prob()
    particles = particles_of(run, drawn)
    elements = particles.log_likelihood.shape[1]
    for name, site in samples(drawn).items():
        if site["fn"].batch_shape.numel() > elements:
            raise ValueError(f"guide: a datapoint has several of site {name!r}, and its values cannot be gone through.")
    return particles.log_weights[0], sum(log_q[0] for log_q in particles.log_guide.values())


class _Given(Messenger):
    """Gives each latent its value by number, and notes how many there are."""

    def __init__(self, state: dict[str, int], sizes: dict[str, int]) -> None:
        super().__init__()
        self.state, self.sizes = state, sizes

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        try:
            support = msg["fn"].enumerate_support(expand=True)
        except NotImplementedError:
            raise ValueError(
                f"guide: the values of site {msg['name']!r}, {type(msg['fn']).__name__}, cannot be gone through. "
                "Take a program whose latents are Categorical, OneHotCategorical or Bernoulli."
            ) from None
        self.sizes[msg["name"]] = len(support)
        msg["value"] = support[self.state.get(msg["name"], 0)]
