"""What an objective states, exactly: the sum over all values that the latents of a small program can have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Dirichlet, Independent, Normal

from pyro_vmem._utils.random_state import forked
from pyro_vmem.infer.elbo import log_mean_exp
from pyro_vmem.infer.global_latents import global_names, globals_of, only
from pyro_vmem.infer.particles import PARTICLE_PLATE, Layout, particles_of, samples
from pyro_vmem.infer.subsampling import SameData

__all__ = ["exhaustive_bound"]

MOST_DRAWS = 2_000_000  # combinations of K particles that are summed
MOST_RUNS = 2_000  # of the program, one for each joint value of what is outside of the data plate


def exhaustive_bound(elbo: Any, model: Any, guide: Any, *args: Any, nodes: int = 8, **kwargs: Any) -> Tensor:
    r"""Computes the exact expectation of an objective's bound by a sum over all values of all latents.

    For an objective with weighted particles this is the multi-sample bound, summed over all combinations of K
    particles. For the others it is the evidence lower bound. The gradient of an unbiased objective has the gradient of
    this function as its expectation. Continuous latents are summed over the nodes of a quadrature: Gauss-Hermite for a
    Normal, Gauss-Legendre with twice as many nodes for a Dirichlet over two values.

    Arguments:
        model: A Pyro model with few and small latents, of each datapoint or outside of the data plate.
        guide: Its guide.
        args: Their arguments.
        nodes: The number of quadrature nodes per continuous value.
        kwargs: Their keyword arguments.

    Returns:
        The bound of all datapoints together in nats, a scalar.

    Raises:
        ValueError: If the values of a latent cannot be listed, or there are too many.

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
        tensor(-3.0837)
    """
    own = getattr(elbo, "local", elbo)  # several draws of what is outside of the data plate have the same mean
    count = int(own.num_particles) if getattr(own, "weighted", False) else 1
    unmarked: Any = {"enumerate": None}  # all values are listed here, not by Pyro
    model, guide = (poutine.infer_config(fn, lambda site: unmarked) for fn in (model, guide))
    guide = SameData()(guide)  # a mask of a distribution becomes one of its site
    with torch.no_grad(), forked(*args, *kwargs.values()), pyro.get_param_store().scope():
        run, drawn = _traces(model, guide, args, kwargs)
    outside = global_names(run, drawn)
    data = Layout(*(samples(only(trace, outside, False)) for trace in (run, drawn))).dims
    latents = samples(drawn)
    of_data, of_globals = (
        _states(
            {n: site["fn"] for n, site in latents.items() if (n in outside) is shared}, [] if shared else data, nodes
        )
        for shared in (False, True)
    )
    size, runs = (len(next(iter(table.values()))) if table else 1 for table in (of_data, of_globals))
    if size**count > MOST_DRAWS or runs > MOST_RUNS:
        raise ValueError(
            f"model: {size:,} joint values of the latents of a datapoint in {count} particles are more than "
            f"{MOST_DRAWS:,} combinations, or {runs:,} of those outside of the data plate more than {MOST_RUNS:,}. "
            "Take a smaller program, fewer particles or fewer nodes."
        )
    tuples = torch.cartesian_prod(*[torch.arange(size)] * count).reshape(-1, count)
    nesting = max(
        -frame.dim for site in samples(run).values() for frame in site["cond_indep_stack"] if frame.vectorized
    )
    plate = pyro.plate(PARTICLE_PLATE, size, dim=-1 - nesting)  # all states of a datapoint at once
    total = torch.zeros(())
    for i in range(runs):
        given = _Given(of_data, {name: rows[i] for name, rows in of_globals.items()}, nesting, nodes)
        run, drawn = _traces(plate(model), plate(given(guide)), args, kwargs)
        pair = only(run, outside, False), only(drawn, outside, False)
        particles, layout = particles_of(*pair), Layout(*map(samples, pair))
        zero = torch.zeros_like(particles.log_likelihood)
        log_q = sum((layout.per_datapoint(given.log_probability[n], scaled=False) for n in of_data), zero)
        bound = (log_q[tuples].sum(1).exp() * log_mean_exp(particles.log_weights[tuples], 1)).sum() * particles.scale
        if of_globals:
            bound = bound + globals_of(only(run, outside, True), only(drawn, outside, True)).log_ratio
        shared = sum((given.log_probability[name].sum() for name in of_globals), torch.zeros(()))
        total = total + shared.exp() * bound
    return total


def _traces(model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
    """Model and guide, run once, with their densities."""
    drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    drawn, run = prune_subsample_sites(drawn), prune_subsample_sites(run)
    drawn.compute_score_parts()
    run.compute_log_prob()
    return run, drawn


def _states(latents: dict[str, Any], data: list[int], nodes: int) -> dict[str, Tensor]:
    """All joint values of some latents: of each the numbers of its outcomes, `(S, *)`, of size 1 along the data."""
    shapes, columns = {}, []
    for name, fn in latents.items():
        base, event = _base(fn)
        shape = list(base.batch_shape)
        for dim in data:
            if -dim <= len(fn.batch_shape):
                shape[dim - event] = 1
        shapes[name] = shape
        columns += [torch.arange(_num_outcomes(name, base, nodes))] * math.prod(shape)
    if not columns:
        return {}
    if math.prod(map(len, columns)) > MOST_DRAWS:
        raise ValueError(f"model: {list(latents)} have more than {MOST_DRAWS:,} joint values. Take a smaller program.")
    table = torch.cartesian_prod(*columns).reshape(-1, len(columns))
    parts = table.split([math.prod(shape) for shape in shapes.values()], -1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _base(fn: Any) -> tuple[Any, int]:
    """A distribution whose events are single, and how many of its batch dims are those of an event."""
    base, event = fn, 0
    while isinstance(base, Independent):
        base, event = base.base_dist, event + base.reinterpreted_batch_ndims
    return base, event


def _num_outcomes(name: str, base: Any, nodes: int) -> int:
    if isinstance(base, Delta):
        return 1
    if isinstance(base, Normal):
        return nodes
    if isinstance(base, Dirichlet) and base.event_shape == (2,):
        return 2 * nodes
    if not base.has_enumerate_support:
        raise ValueError(
            f"guide: the values of site {name!r}, {type(base).__name__}, cannot be listed. Take a program whose "
            "latents are Categorical, OneHotCategorical, Bernoulli, Normal, or a Dirichlet over two."
        )
    return len(base.enumerate_support(expand=False))


class _Given(Messenger):
    """Gives each latent its value by number, and notes the probability of that."""

    def __init__(self, of_data: dict[str, Tensor], of_globals: dict[str, Tensor], nesting: int, nodes: int) -> None:
        super().__init__()
        # The numbers of each latent of the data, (S, *), and of each outside of its plate, in one state; the plates
        # inside of that of all states.
        self.of_data, self.of_globals, self.nesting, self.nodes = of_data, of_globals, nesting, nodes
        self.log_probability: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        name, (base, event) = msg["name"], _base(msg["fn"])
        index = self.of_globals.get(name)
        if index is None:
            index = self.of_data[name]
            index = index.reshape(len(index), *[1] * (self.nesting + event + 1 - index.dim()), *index.shape[1:])
        if isinstance(base, Delta):
            value, log_probability = base.v, base.v.new_zeros(base.batch_shape)
        elif isinstance(base, Normal):
            places, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(self.nodes))
            value = base.loc + base.scale * places.to(base.loc)[index]
            log_probability = (weights / weights.sum()).log().to(value)[index].expand(value.shape)
        elif isinstance(base, Dirichlet):
            rule = np.polynomial.legendre.leggauss(2 * self.nodes)
            places, weights = (torch.tensor(part / 2).to(base.concentration) for part in rule)
            value = torch.stack([0.5 + places, 0.5 - places], -1)[index]
            log_probability = base.log_prob(value) + weights.log()[index]
        else:
            support = base.enumerate_support(expand=False)
            value = support.reshape(len(support), *base.event_shape)[index]
            log_probability = base.log_prob(value)
        msg["value"] = value.expand(log_probability.shape + base.event_shape)
        self.log_probability[name] = log_probability.sum(list(range(-event, 0))) if event else log_probability
