"""Draws particles of a model and a guide, and sums their log-probabilities per datapoint.

The plates that all sample sites share are the data; what a site has in other plates is summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.poutine import Trace
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_vmem.infer.site_notes import OWN, PATH, RELAXED

__all__ = ["Globals", "Layout", "Particles", "draw_particles", "model_terms", "particles_of", "samples", "stacked"]

PARTICLE_PLATE = "num_particles_vectorized"  # the plate that pyro.infer.ELBO wraps around model and guide


@dataclass(frozen=True, eq=False)
class Globals:
    r"""What one draw g of the latents outside of the data plate adds to the bound, in nats.

    .. math:: L = \sum_b \log \frac{1}{K} \sum_k w_{bk}(g) + \log p(g) - \log q(g)

    Attributes:
        log_ratio: :math:`\log p(g) - \log q(g)`, a scalar.
        score: :math:`\log q` of what is not reparameterised in g, a scalar.
    """

    log_ratio: Tensor
    score: Tensor

    def surrogate(self, of_data: Tensor) -> Tensor:
        """The log-ratio, with the gradient that the whole bound gives what is not reparameterised.

        Arguments:
            of_data: The sum of the bounds of all datapoints, a scalar, without gradient.
        """
        return self.log_ratio + (of_data + self.log_ratio.detach()) * (self.score - self.score.detach())


@dataclass(frozen=True, eq=False)
class Particles:
    r""":math:`K` particles for each of :math:`B` datapoints: every tensor is `(K, B)`, in nats.

    A datapoint is one element of the plates that all sites share. Sums over other plates are taken.

    Attributes:
        log_prior: :math:`\log p` of each latent site.
        log_guide: :math:`\log q` of each site of the guide; of what it was drawn from, if that is not the guide itself.
            Auxiliary sites, such as the unconstrained values of Pyro's autoguides, are among them, and have no prior.
        log_likelihood: :math:`\log p` of all observed sites together.
        score: :math:`\log q` of each site that the objective does not differentiate through, unscaled.
        kl: :math:`KL(q \| p)` in closed form, of each categorical latent.
        scale: What the sum over datapoints is multiplied by: the size of the data over the size of the minibatch.
        relaxed: What a control variate adds to the score of each site that has one; see :mod:`pyro_vmem.infer.relax`.
        of_globals: What latents outside of the data plate add, if there are any.
        arguments: What model and guide were called with, positional and by keyword.
        paths: For each particle drawn on its own (one entry if they are vectorized), the values whose gradients can be
            weighted, and what shapes `(K, B)` to fit each; see :mod:`pyro_vmem.infer.doubly_reparameterised`.
    """

    log_prior: dict[str, Tensor]
    log_guide: dict[str, Tensor]
    log_likelihood: Tensor
    score: dict[str, Tensor]
    kl: dict[str, Tensor]
    scale: float
    relaxed: dict[str, list[Tensor]] = field(default_factory=dict)
    of_globals: Globals | None = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    paths: list[list[tuple[Any, Callable[[Tensor], Tensor], Tensor | float]]] = field(default_factory=list)

    @property
    def log_weights(self) -> Tensor:
        r""":math:`\log w_k = \log p(x, h_k) - \log q(h_k | x)`, with shape `(K, B)`."""
        log_weights = self.log_likelihood
        for log_prior in self.log_prior.values():
            log_weights = log_weights + log_prior
        for log_guide in self.log_guide.values():
            log_weights = log_weights - log_guide
        return log_weights

    def weight_paths(self, share: Tensor) -> None:
        r"""Makes the gradient through the particles' values doubly reparameterised, where it can be weighted.

        The gradient of the bound has a share :math:`\tilde w_k` of it already. With :math:`q(z)^\beta` in the weight,
        the direct gradient, :math:`-\beta \tilde w_k \nabla \log q(z_k)`, is in expectation
        :math:`-\beta (\tilde w_k - \tilde w_k^2)` times that through the value, which leaves a factor of
        :math:`1 - \beta + \beta \tilde w_k` for that.

        Arguments:
            share: The normalised weights :math:`\tilde w_k`, with shape `(K, B)`, without gradient.
        """
        for rows, paths in zip(share.split(len(share) // max(1, len(self.paths))), self.paths, strict=False):
            for path, shaped, power in paths:
                path.factor = 1 - power + power * shaped(rows)

    def score_sum(self, signal: Tensor) -> Tensor:
        r""":math:`\sum_k s_k \log q(h_k)` over the latents that are not reparameterised.

        Arguments:
            signal: The learning signal :math:`s_k`, with shape `(K, B)`, without gradient.

        Returns:
            The score terms, with shape `(B,)`; zero if all latents are reparameterised.
        """
        return sum(((signal * score).sum(0) for score in self.score.values()), torch.zeros_like(signal[0]))


def draw_particles(elbo: ELBO, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Particles:
    """Runs the guide and the model against it, as the settings of `elbo` say.

    Arguments:
        elbo: Gives the number of particles, and whether they are vectorized.
        model: A Pyro model whose sites all sit in one data plate, or in the same plates.
        guide: Its guide.
        args: Their arguments.
        kwargs: Their keyword arguments.

    Raises:
        ValueError: If a site is outside of the data plate, is enumerated, or sits in a subsampled inner plate; if a
            latent is missing in the guide, or observed there; if no observation varies along a data plate.
    """
    rows = [particles_of(*traces) for traces in elbo._get_traces(model, guide, args, kwargs)]
    return replace(stacked(rows), arguments=(args, kwargs))


def stacked(rows: list[Particles]) -> Particles:
    """All particles of those that were drawn one by one."""
    first = rows[0]
    if len(rows) == 1:
        return first

    def stack(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    return Particles(
        log_prior={name: stack(row.log_prior[name] for row in rows) for name in first.log_prior},
        log_guide={name: stack(row.log_guide[name] for row in rows) for name in first.log_guide},
        log_likelihood=stack(row.log_likelihood for row in rows),
        score={name: stack(row.score[name] for row in rows) for name in first.score},
        kl={name: stack(row.kl[name] for row in rows) for name in first.kl},
        scale=first.scale,
        relaxed={
            name: [stack(parts) for parts in zip(*(row.relaxed[name] for row in rows), strict=True)]
            for name in first.relaxed
        },
        paths=[path for row in rows for path in row.paths],
    )


def particles_of(model_trace: Trace, guide_trace: Trace) -> Particles:
    """The particles of one pair of traces: K of them if vectorized, else one."""
    guide_sites = samples(guide_trace)
    latents = {name: site for name, site in samples(model_trace).items() if not site["is_observed"]}
    _check_sites(latents, guide_sites)
    layout = Layout(model_trace, guide_trace)
    log_prior, log_likelihood = model_terms(model_trace, layout)
    return Particles(
        log_prior=log_prior,
        log_guide={name: layout.per_datapoint(site["log_prob"]) for name, site in guide_sites.items()},
        log_likelihood=log_likelihood,
        score={
            name: layout.per_datapoint(score, scaled=False)
            for name, site in guide_sites.items()
            if isinstance(
                score := site["score_parts"].score_function, Tensor
            )  # of what is reparameterised it is the number zero
        },
        kl={
            name: layout.per_datapoint(_closed_form(guide_sites[name], site), scaled=False)
            for name, site in latents.items()
            if _is_categorical(site["fn"]) and _is_categorical(guide_sites[name]["fn"])
        },
        scale=layout.scale,
        relaxed={
            name: [layout.per_datapoint(part, scaled=False) for part in site["infer"][RELAXED]]
            for name, site in guide_sites.items()
            if RELAXED in site["infer"]
        },
        paths=[
            [
                (site["infer"][PATH], partial(layout.of_value, event_dim=site["fn"].event_dim), _power(site, layout))
                for site in guide_sites.values()
                if PATH in site["infer"]
            ]
        ],
    )


def model_terms(trace: Trace, layout: Layout) -> tuple[dict[str, Tensor], Tensor]:
    r""":math:`\log p` of each latent site of a model, and that of all observed sites together, each `(K, B)`."""
    rows = {name: layout.per_datapoint(site["log_prob"]) for name, site in samples(trace).items()}
    observed = [name for name in rows if trace.nodes[name]["is_observed"]]
    log_prior = {name: values for name, values in rows.items() if name not in observed}
    zero = torch.zeros_like(next(iter(rows.values())))
    return log_prior, sum((rows[name] for name in observed), zero)


class Layout:
    """Which dims of a site's log-probability are particles and datapoints.

    Arguments:
        traces: Those of a model and its guide.

    Raises:
        ValueError: If the sites do not all sit in one data plate, a plate in it is subsampled, or no observation varies
            along it.
    """

    def __init__(self, *traces: Trace) -> None:
        sites = [site for trace in traces for site in samples(trace).values()]
        stacks = [{frame for frame in site["cond_indep_stack"] if frame.vectorized} for site in sites]
        shared = set.intersection(*stacks)
        data = sorted((f for f in shared if f.name != PARTICLE_PLATE), key=lambda f: f.dim)
        if not data:
            _refuse_loose(sites, stacks)
        for frame in {frame for site in sites for frame in site["cond_indep_stack"]} - shared:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"model and guide: plate {frame.name!r} inside the data plate is subsampled, so importance weights "
                    "of a datapoint are not known. Subsample the data plate only."
                )
        observed = [site for site in sites if site["is_observed"] and not site_is_factor(site)]
        for frame in data:
            if frame.size > 1 and observed and not any(_size_along(frame.dim, site) > 1 for site in observed):
                raise ValueError(
                    f"model: no observation varies along plate {frame.name!r}, so each would be counted {frame.size} "
                    "times. Take the programs out of that plate; to stand for more data, use pyro.poutine.scale; or "
                    "expand the observation, if it was made as often."
                )
        particles = [f.dim for f in shared if f.name == PARTICLE_PLATE]
        self.dims = particles + [f.dim for f in data]
        self.sizes = [1] * (not particles) + [f.size for f in sorted(shared, key=lambda f: f.dim)]
        # A plate scales every site in it by (size of the data) / (size of the minibatch). Inside of a logarithm of
        # weights that would be a temperature; it belongs on the sum over datapoints.
        self.scale = math.prod((f.full_size or f.size) / f.size for f in data)

    def with_particles(self, count: int) -> Layout:
        """The same of another number of particles."""
        other = copy(self)
        other.sizes = [count, *self.sizes[1:]]
        return other

    def per_datapoint(self, log_prob: Tensor, scaled: bool = True) -> Tensor:
        """Sums a log-probability over all other plates, and returns it as `(K, B)` without the plate's scale.

        Pyro scales log-probabilities, but not score functions, and not what is in closed form.
        """
        others = [dim for dim in range(-log_prob.dim(), 0) if dim not in self.dims]
        if others:
            log_prob = log_prob.sum(others)
        rows = log_prob.expand(self.sizes[-log_prob.dim() :] if log_prob.dim() else ()).expand(self.sizes)
        rows = rows.reshape(self.sizes[0], -1)
        return rows / self.scale if scaled and self.scale != 1.0 else rows

    def of_value(self, rows: Tensor, event_dim: int) -> Tensor:
        """The reverse: `(K, B)` in the shape that broadcasts with a site's value."""
        shape = [1] * -min(self.dims)
        for dim, size in zip(self.dims, self.sizes[-len(self.dims) :], strict=True):
            shape[dim] = size
        return rows.reshape(*shape, *[1] * event_dim)


def samples(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace, without those of `pyro.deterministic`, which have no density."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not (site["infer"] or {}).get("_deterministic")
    }


def _power(site: Any, layout: Layout) -> Tensor | float:
    """To which power the density of a site is in its datapoint's weight, in a shape that broadcasts with the value."""
    power: Tensor | float = site["scale"] / layout.scale
    if site["mask"] is not None:
        power = power * site["mask"]
    if isinstance(power, Tensor):
        power = power.reshape(*power.shape, *[1] * site["fn"].event_dim)
    return power


def _closed_form(guide_site: Any, site: Any) -> Tensor:
    own = guide_site["infer"].get(OWN, guide_site["fn"])
    kl: Tensor = scale_and_mask(torch.distributions.kl_divergence(own, site["fn"]), mask=site["mask"])
    return kl


def _is_categorical(fn: Any) -> bool:
    return isinstance(fn, torch.distributions.Categorical)


def _size_along(dim: int, site: Any) -> int:
    """How many observations there are along a plate."""
    shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return int(shape[dim]) if len(shape) >= -dim else 1


def _check_sites(latents: dict[str, Any], guide_sites: dict[str, Any]) -> None:
    for name, site in latents.items():
        if name not in guide_sites:
            raise ValueError(f"guide: it has no sample site {name!r}, which the model leaves unobserved. Add one.")
        if site["infer"].get("_enumerate_dim") is not None or guide_sites[name]["infer"].get("enumerate"):
            raise ValueError(
                f"guide: site {name!r} is marked for enumeration, but this objective samples. Remove config_enumerate, "
                "or sum the site out with pyro.infer.TraceEnum_ELBO."
            )
    for name, site in guide_sites.items():
        if site["is_observed"] and not site_is_factor(site):
            raise ValueError(
                f"guide: site {name!r} is observed in it, and its density is no part of any bound. Hide it: "
                f"pyro.poutine.block(guide, hide=[{name!r}])."
            )


def _refuse_loose(sites: list[Any], stacks: list[set[Any]]) -> NoReturn:
    loose = [
        site["name"] for site, stack in zip(sites, stacks, strict=True) if all(f.name == PARTICLE_PLATE for f in stack)
    ]
    raise ValueError(
        "model and guide: expected all sample sites in one data plate, so that each datapoint has its own importance "
        f"weights; outside of any plate: {sorted(set(loose)) or 'none, but they share no plate'}. Wrap the local "
        'latents and the observation in `with pyro.plate("data", len(x)):`; global latents need a guide of their own. '
        "Of Pyro's autoguides AutoNormal, AutoDelta and AutoNormalMessenger draw each latent in its plate."
    )
