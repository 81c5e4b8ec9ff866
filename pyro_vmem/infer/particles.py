"""Draws particles of a model and a guide, and sums their log-probabilities per datapoint.

The plates that all sample sites share are the data; what a site has in other plates is summed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
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
from torch.distributions import Categorical

__all__ = ["Globals", "Layout", "Particles", "draw_particles", "model_terms", "particles_of", "samples", "stacked"]

# The notes that a proposal leaves at a guide's site, in its `infer` dict, the one place where Pyro lets a handler keep
# something beside a value.
# The PathWeight of a value: by which factor its gradient is multiplied on its way to the guide.
PATH = "pyro_vmem_path"
# The guide's own distribution, where the value was drawn from another one, such as a defensive mixture.
OWN = "pyro_vmem_own"
# What the gradient of a control variate adds to a site's score function, three numbers for each draw.
RELAXED = "pyro_vmem_relaxed"
# The distribution whose log-probability, up to its value, is a site's score function.
SCORE = "pyro_vmem_score"

PARTICLE_PLATE = "num_particles_vectorized"  # the plate that pyro.infer.ELBO wraps around model and guide


@dataclass(frozen=True, eq=False)
class Globals:
    r"""The terms of one draw g of the global latents in the bound L, in nats: its log-ratio, and its score.

    .. math:: L = \sum_b \log \frac{1}{K} \sum_k w_{bk}(g) + \log p(g) - \log q(g)

    Attributes:
        log_ratio: :math:`\log p(g) - \log q(g)`, a scalar.
        score: :math:`\log q` of the latents in g that are not reparameterised, a scalar.
    """

    log_ratio: Tensor
    score: Tensor

    def surrogate(self, of_data: Tensor) -> Tensor:
        """The log-ratio, a scalar, plus a score term whose learning signal is the bound of all data."""
        return self.log_ratio + (of_data + self.log_ratio.detach()) * (self.score - self.score.detach())


@dataclass(frozen=True, eq=False)
class Particles:
    r""":math:`K` particles for each of :math:`B` datapoints: every tensor is `(K, B)`, in nats.

    A datapoint is one element of the plates that all sites share. Sums over other plates are taken.

    Attributes:
        log_prior: :math:`\log p` of each latent site.
        log_guide: :math:`\log q` of each site of the guide, under the distribution that it was drawn from. It includes
            auxiliary sites without a prior, such as the unconstrained values of Pyro's autoguides.
        log_likelihood: :math:`\log p` of all observed sites together.
        score: :math:`\log q` of each site that the objective does not differentiate through, unscaled.
        kl: :math:`KL(q \| p)` in closed form, of each categorical latent.
        scale: The factor of the sum over datapoints: the size of the data divided by the size of the minibatch.
        relaxed: The terms of the control variate of each site that has one, `(K, 3, B)`; see
            :mod:`pyro_vmem.infer.relax`.
        of_globals: The terms of global latents, if there are any.
        arguments: The positional and keyword arguments of model and guide.
        paths: For each pass (one if particles are vectorized), the values whose gradients can be weighted, and
            functions that reshape `(K, B)` to fit them; see :mod:`pyro_vmem.infer.doubly_reparameterised`.
    """

    log_prior: dict[str, Tensor]
    log_guide: dict[str, Tensor]
    log_likelihood: Tensor
    score: dict[str, Tensor]
    kl: dict[str, Tensor]
    scale: float
    relaxed: dict[str, Tensor] = field(default_factory=dict)
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
        r"""Makes the gradient through the values of the latents doubly reparameterised.

        The gradient of the bound already has the factor :math:`\tilde w_k`, the normalised weight: `share`, `(K, B)`,
        without gradient. The weight contains :math:`q(z)^{-\beta}`, where :math:`\beta` is the weight on KL(z). The
        direct gradient, :math:`-\beta \tilde w_k \nabla \log q(z_k)`, is in expectation :math:`-\beta (\tilde w_k -
        \tilde w_k^2)` times the gradient through the value. So the gradient through the value gets the factor
        :math:`1 - \beta + \beta \tilde w_k`, and the direct one is left out.
        """
        for rows, paths in zip(share.split(len(share) // max(1, len(self.paths))), self.paths, strict=False):
            for path, shaped, power in paths:
                path.factor = 1 - power + power * shaped(rows)

    def score_sum(self, signal: Tensor) -> Tensor:
        r""":math:`\sum_k s_k \log q(h_k)` over the latents that are not reparameterised.

        The learning signal :math:`s_k` is `(K, B)` and has no gradient; the sum is `(B,)`.
        """
        total = torch.zeros_like(signal[0])
        for score in self.score.values():
            total = total + (signal * score).sum(0)
        return total


def draw_particles(elbo: ELBO, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Particles:
    """Runs the guide, then the model on its values, with the settings of `elbo`; returns the particles.

    Raises:
        ValueError: As in :class:`Layout`; also if a latent is enumerated, missing in the guide, or observed there.
    """
    rows = list(itertools.starmap(particles_of, elbo._get_traces(model, guide, args, kwargs)))
    return replace(stacked(rows), arguments=(args, kwargs))


def stacked(rows: list[Particles]) -> Particles:
    """Stacks particles that were drawn one by one."""
    first = rows[0]
    if len(rows) == 1:
        return first
    together: dict[str, Any] = {"paths": [path for row in rows for path in row.paths]}
    for term in ("log_prior", "log_guide", "score", "kl", "relaxed"):
        together[term] = {name: torch.cat([getattr(row, term)[name] for row in rows]) for name in getattr(first, term)}
    return replace(first, log_likelihood=torch.cat([row.log_likelihood for row in rows]), **together)


def particles_of(model_trace: Trace, guide_trace: Trace) -> Particles:
    """Makes particles of one pair of traces: K of them if vectorized, else one."""
    guide_sites, model_sites = samples(guide_trace), samples(model_trace)
    _check_sites(model_sites, guide_sites)
    layout = Layout(model_sites, guide_sites)
    log_prior, log_likelihood = model_terms(model_sites, layout)
    log_guide, score, kl, relaxed = {}, {}, {}, {}
    paths: list[tuple[Any, Callable[[Tensor], Tensor], Tensor | float]] = []
    for name, site in guide_sites.items():
        log_guide[name] = layout.per_datapoint(site["log_prob"])
        of_site = site["score_parts"].score_function
        if isinstance(of_site, Tensor):  # of what is reparameterised it is the number zero
            score[name] = layout.per_datapoint(of_site, scaled=False)
        own, prior = site["infer"].get(OWN, site["fn"]), model_sites.get(name)
        if isinstance(own, Categorical) and prior and isinstance(prior["fn"], Categorical):
            with torch.no_grad():  # it is told, and not trained
                in_full = scale_and_mask(torch.distributions.kl_divergence(own, prior["fn"]), mask=prior["mask"])
                kl[name] = layout.per_datapoint(in_full, scaled=False)
        if RELAXED in site["infer"]:
            parts = [layout.per_datapoint(part, scaled=False) for part in site["infer"][RELAXED]]
            relaxed[name] = torch.stack(parts, 1)
        if PATH in site["infer"]:
            shaped = partial(layout.of_value, event_dim=site["fn"].event_dim)
            paths.append((site["infer"][PATH], shaped, _power(site, layout)))
    return Particles(log_prior, log_guide, log_likelihood, score, kl, layout.scale, relaxed, paths=[paths])


def model_terms(sites: dict[str, Any], layout: Layout) -> tuple[dict[str, Tensor], Tensor]:
    r""":math:`\log p` of each latent site of a model, and that of all observed sites together, each `(K, B)`."""
    rows = {name: layout.per_datapoint(site["log_prob"]) for name, site in sites.items()}
    log_prior = {name: row for name, row in rows.items() if not sites[name]["is_observed"]}
    zero = torch.zeros_like(next(iter(rows.values())))
    return log_prior, sum((row for name, row in rows.items() if name not in log_prior), zero)


class Layout:
    """The dims of particles and datapoints in the log-probability of a site.

    Arguments:
        programs: The sample sites of a model and of its guide.

    Raises:
        ValueError: If the sites do not all sit in one data plate, a plate in it is subsampled, a site varies along a
            dim that is none of its plates, or no observation varies along the data plate.
    """

    def __init__(self, *programs: dict[str, Any]) -> None:
        sites = [site for program in programs for site in program.values()]
        # Told apart by dim and name: to compare frames themselves takes Pyro a tenth of a step.
        stacks = [{(frame.dim, frame.name): frame for frame in site["cond_indep_stack"]} for site in sites]
        shared = [plate for plate in set(stacks[0]).intersection(*stacks) if plate[0] is not None]
        plates = [stacks[0][plate] for plate in sorted(shared)]
        data = [frame for frame in plates if frame.name != PARTICLE_PLATE]
        _check_gaps(sites, stacks)
        if not data:
            _refuse_loose(sites)
        for stack in stacks:
            for plate, frame in stack.items():
                if plate not in shared and frame.full_size is not None and frame.full_size != frame.size:
                    raise ValueError(
                        f"model and guide: plate {frame.name!r} inside the data plate is subsampled, so importance "
                        "weights of a datapoint are not known. Subsample the data plate only."
                    )
        observed = [site for site in sites if site["is_observed"] and not site_is_factor(site)]
        shapes = [site["value"].shape[: site["value"].dim() - site["fn"].event_dim] for site in observed]
        for frame in data:
            if frame.size > 1 and shapes and not any(len(s) >= -frame.dim and s[frame.dim] > 1 for s in shapes):
                raise ValueError(
                    f"model: no observation varies along plate {frame.name!r}, so each would be counted {frame.size} "
                    "times. Take the programs out of that plate; to stand for more data, use pyro.poutine.scale; or "
                    "expand the observation, if it was made as often."
                )
        self.dims = [frame.dim for frame in plates]  # the plate of particles is the outermost, if there is one
        self.sizes = [1] * (plates == data) + [frame.size for frame in plates]
        # A plate scales every site in it by (size of the data) / (size of the minibatch). Inside of a logarithm of
        # weights that would be a temperature; it belongs on the sum over datapoints.
        self.scale = math.prod((frame.full_size or frame.size) / frame.size for frame in data)

    def with_particles(self, count: int) -> Layout:
        """Returns the layout with another number of particles."""
        other = copy(self)
        other.sizes = [count, *self.sizes[1:]]
        return other

    def per_datapoint(self, log_prob: Tensor, scaled: bool = True) -> Tensor:
        """Sums a log-probability over all other plates, and returns it as `(K, B)` without the plate's scale.

        Pyro scales log-probabilities, but not score functions or closed forms.
        """
        others = sorted({*range(-log_prob.dim(), 0)} - {*self.dims})
        if others:
            log_prob = log_prob.sum(others)
        rows = log_prob.expand(self.sizes[-log_prob.dim() :] if log_prob.dim() else ()).expand(self.sizes)
        rows = rows.reshape(self.sizes[0], -1)
        return rows / self.scale if scaled and self.scale != 1.0 else rows

    def of_value(self, rows: Tensor, event_dim: int) -> Tensor:
        """Reshapes `(K, B)` such that it broadcasts with the value of a site."""
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


def _check_gaps(sites: list[Any], stacks: list[dict[tuple[int | None, str], Any]]) -> None:
    """Refuses a site that varies along the dim of a plate that it is not in.

    A sum over an inner plate without `keepdim=True` moves the particles there. Each would be weighed with the
    densities of all others; Pyro checks no dim that lies between a site's plates.
    """
    plates = {dim for stack in stacks for dim, _ in stack if dim is not None}
    leftmost = min(plates, default=0)
    for site, stack in zip(sites, stacks, strict=True):
        shape = site["fn"].batch_shape
        for dim in range(max(leftmost, -len(shape)), 0):
            if shape[dim] > 1 and all(own != dim for own, _ in stack):
                raise ValueError(
                    f"site {site['name']!r}: it varies along dim {dim}, which is none of its plates. "
                    "Particles may be there: keep the dim of a plate that is summed over, as by sum(dim, keepdim=True)."
                )


def _power(site: Any, layout: Layout) -> Tensor | float:
    """To which power the density of a site is in its datapoint's weight, in a shape that broadcasts with the value."""
    power: Tensor | float = site["scale"] / layout.scale
    if site["mask"] is not None:
        power = power * site["mask"]
    if isinstance(power, Tensor):
        power = power.reshape(*power.shape, *[1] * site["fn"].event_dim)
    return power


def _check_sites(model_sites: dict[str, Any], guide_sites: dict[str, Any]) -> None:
    for name, site in model_sites.items():
        if site["is_observed"]:
            continue
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


def _refuse_loose(sites: list[Any]) -> NoReturn:
    loose = {
        site["name"]
        for site in sites
        if not any(frame.vectorized and frame.name != PARTICLE_PLATE for frame in site["cond_indep_stack"])
    }
    raise ValueError(
        "model and guide: expected all sample sites in one data plate, so that each datapoint has its own importance "
        f"weights; outside of any plate: {sorted(loose) or 'none, but they share no plate'}. Wrap the local latents "
        'and the observation in `with pyro.plate("data", len(x)):`. '
        "Of Pyro's autoguides AutoNormal, AutoDelta and AutoNormalMessenger draw each latent in its plate."
    )
