"""Small random Pyro programs, and their exact value and gradient by a sum over all states of all particles.

A state of a datapoint gives every latent a value: a discrete one each of its values, a continuous one the nodes of a
Gauss-Hermite quadrature, carried to the guide's location and scale. The sum is then differentiated by autograd alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from pyro_vmem.infer.annealing import scale_sites

ROWS = 2  # the datapoints of one copy of the data; copies are independent of one another
MOST_TUPLES = 20_000
SIZES = {
    "categorical": 3,
    "bernoulli": 2,
    "one-hot": 3,
    "pair": 4,
    "normal": 0,
    "vector": 0,
    "scored": 0,
    "lognormal": 0,
}
CONTINUOUS = ("normal", "vector", "scored", "lognormal")


@dataclass(frozen=True)
class Site:
    """A latent of a program.

    Attributes:
        kind: Its distribution; `"pair"` is two Bernoulli that are one site, `"scored"` a Normal without `rsample`,
            `"vector"` one with an event dim.
        parents: The sites that its prior depends on, by number.
        guided_by: The sites that its guide depends on.
        inner: Whether it is in the inner plate.
        auxiliary: Whether the guide draws it as an auxiliary site and a `Delta`.
    """

    kind: str
    parents: tuple[int, ...] = ()
    guided_by: tuple[int, ...] = ()
    inner: bool = False
    auxiliary: bool = False


@dataclass(frozen=True)
class Program:
    """A model and its guide, described.

    Attributes:
        sites: The latents, in the model's order.
        reverse: Whether the guide draws them in the reverse order.
        plates: The vectorized plates, from the right; the data plate is `"data"`.
        observed_inner: Whether there is an observation for each element of the inner plate, or one of all.
        mask: What a mask leaves a datapoint out of: `""`, `"all"`, `"observation"`, `"site"`, `"guide site"`,
            `"distribution"` (by its method, not by the handler), or `"value"`: the last site, by the first one's value.
        scale: What is scaled: `""`, `"all"`, `"site"`, `"nothing left"` (a site by zero), or each datapoint by its own
            (`"rows"`).
        subsample: Whether the data plate takes a random half of its datapoints.
        guide: `"written"`, `"AutoNormal"` or `"AutoDelta"`; the last two draw the continuous latents.
        loop: What the sites lie in: `""`, `"plate"` (a sequential one) or `"markov"`.
        deterministic: Whether model and guide note a `pyro.deterministic` of each latent.
    """

    sites: tuple[Site, ...]
    reverse: bool = False
    plates: tuple[str, ...] = ("data",)
    observed_inner: bool = False
    mask: str = ""
    scale: str = ""
    subsample: bool = False
    guide: str = "written"
    loop: str = ""
    deterministic: bool = False

    @property
    def order(self) -> list[int]:
        """The guide's order."""
        return list(range(len(self.sites)))[:: -1 if self.reverse else 1]

    def is_auto(self, number: int) -> bool:
        return self.guide != "written" and self.sites[number].kind in CONTINUOUS

    def num_states(self, nodes: int) -> int:
        each = [SIZES[s.kind] or (1 if self.guide == "AutoDelta" else nodes) for s in self.sites]
        return math.prod(n ** (2 if s.inner else 1) for n, s in zip(each, self.sites, strict=True))


@st.composite
def programs(draw: Any, kinds: tuple[str, ...] = tuple(SIZES)) -> Program:
    """A strategy of programs of one to three latents."""
    plates = draw(
        st.sampled_from(
            [("data",)] * 3 + [("data", "inner"), ("inner", "data"), ("data", "outer"), ("data", "outer", "inner")]
        )
    )
    count = draw(st.integers(1, 3))
    reverse = draw(st.booleans()) and count > 1
    guide = draw(st.sampled_from(["written"] * 4 + ["AutoNormal", "AutoDelta"]))
    sites: list[Site] = []
    for i in range(count):
        kind = draw(st.sampled_from(kinds))
        if guide != "written" and kind in ("scored", "vector"):
            kind = "normal"
        before = [j for j in range(i) if draw(st.booleans())]
        sites.append(Site(kind, tuple(before), (), "inner" in plates and draw(st.booleans())))
    order = list(range(count))[:: -1 if reverse else 1]
    for place, i in enumerate(order):
        auto = guide != "written" and sites[i].kind in CONTINUOUS
        known = [j for j in order[:place] if guide == "written" or sites[j].kind not in CONTINUOUS]
        guided_by = () if auto else tuple(j for j in known if draw(st.booleans()))
        sites[i] = replace(sites[i], guided_by=guided_by, auxiliary=not auto and draw(st.integers(0, 5)) == 0)
    if all(s.kind not in CONTINUOUS for s in sites):
        guide = "written"
    subsample = draw(st.integers(0, 3)) == 0
    # If all lay in the inner plate, it would be one of the data; without a site in it, Pyro would not know of its dim.
    observed_inner = "inner" in plates and draw(st.booleans()) and not all(s.inner for s in sites)
    if not observed_inner and not any(s.inner for s in sites):
        plates = tuple(name for name in plates if name != "inner")
    masks = ["", "", "", "all", "observation", "site", "guide site", "distribution"]
    if count > 1 and not reverse and sites[0].kind not in CONTINUOUS:
        masks += ["value", "value"]  # of a continuous one it would be a jump, which no path follows
    return Program(
        tuple(sites),
        reverse,
        plates,
        observed_inner,
        draw(st.sampled_from(masks)),
        draw(st.sampled_from(["", "", "", "all", "site", "nothing left", "rows"])),
        subsample,
        guide,
        draw(st.sampled_from(["", "", "", "plate", "markov"])) if guide == "written" else "",
        draw(st.integers(0, 4)) == 0 and guide == "written",
    )


@dataclass
class Runnable:
    """A program for a number of copies of the data, whose parameters each copy has for itself.

    That way one pass gives as many independent estimates of value and gradient as there are copies. The sum over all
    states runs the same distributions, with states on the left and one copy.
    """

    program: Program
    copies: int
    seed: int
    nodes: int = 7
    leaves: dict[str, Tensor] = field(default_factory=dict)
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        p = self.program
        self.generator = torch.Generator().manual_seed(self.seed)
        self.dims = {name: -1 - i for i, name in enumerate(p.plates)}
        self.sizes = {"data": ROWS * self.copies, "outer": 2, "inner": 2}
        self.rows = torch.arange(self.sizes["data"])
        for number, site in enumerate(p.sites):
            size = 3 if site.kind in CONTINUOUS else 2 * SIZES[site.kind] if site.kind != "pair" else 4
            self._leaf(f"model {number}", size)
            if not p.is_auto(number):
                self._leaf(f"guide {number}", size)
        self._leaf("observed", len(p.sites) + 1)
        shape = [self.sizes[name] if name != "data" else ROWS for name in reversed(p.plates)]
        at = len(shape) + self.dims["data"]
        x = torch.randn(shape, generator=self.generator)
        self.x = torch.cat([x] * self.copies, at)
        even = torch.arange(self.sizes["data"]) % ROWS == 0
        self.keep = even.reshape(-1, *[1] * (-self.dims["data"] - 1))
        self.weight = torch.where(self.keep, 0.7, 1.2)

    def _leaf(self, name: str, size: int) -> None:
        value = 0.6 * torch.randn(size, generator=self.generator)
        self.leaves[name] = value.expand(self.copies, size).clone().requires_grad_()

    # --- the distributions, shared by the program and the sum over all states ---

    def at_rows(self, leaf: Tensor) -> Tensor:
        """A parameter `(copies, n)` of each datapoint, with the data plate's dim in its place."""
        of_rows = leaf.unsqueeze(1).expand(-1, ROWS, -1).reshape(self.sizes["data"], -1)[self.rows]
        return of_rows.reshape(-1, *[1] * (-self.dims["data"] - 1), leaf.shape[-1])

    def seen(self, inner: bool) -> Tensor:
        """The observations, averaged over the inner plate if one is needed for each datapoint."""
        x = self.x.index_select(self.dims["data"], self.rows)
        return x if inner or "inner" not in self.dims else x.mean(self.dims["inner"], keepdim=True)

    def inputs(self, parents: tuple[int, ...], values: dict[int, Tensor], inner: bool) -> Tensor:
        total = torch.zeros(())
        for number in parents:
            total = total + self.number(number, values, inner)
        return total

    def number(self, number: int, values: dict[int, Tensor], inner: bool) -> Tensor:
        """A latent's value as one number, averaged over the inner plate for what lies outside of it."""
        site, value = self.program.sites[number], values[number]
        if site.kind == "categorical":
            value = torch.tensor([-1.0, 0.2, 1.3])[value.long()]
        elif site.kind == "one-hot":
            value = (value * torch.tensor([-1.0, 0.2, 1.3])).sum(-1)
        elif site.kind == "pair":
            value = (value * torch.tensor([-1.0, 0.8])).sum(-1)
        elif site.kind == "vector":
            value = value[..., 0]
        elif site.kind == "lognormal":
            value = value.log()
        return value.mean(self.dims["inner"], keepdim=True) if site.inner and not inner else value

    def prior(self, number: int, values: dict[int, Tensor]) -> Any:
        site = self.program.sites[number]
        return self.make(site, self.leaves[f"model {number}"], self.inputs(site.parents, values, site.inner))

    def approximation(self, number: int, values: dict[int, Tensor]) -> Any:
        site = self.program.sites[number]
        given = self.inputs(site.guided_by, values, site.inner) + 0.5 * self.seen(site.inner)
        return self.make(site, self.leaves[f"guide {number}"], given)

    def make(self, site: Site, leaf: Tensor, given: Tensor) -> Any:
        weights = self.at_rows(leaf)
        if site.kind in CONTINUOUS:
            loc, scale = weights[..., 0] + weights[..., 1] * given, (0.5 * weights[..., 2] - 0.4).exp()
            if site.kind == "vector":
                loc, scale = torch.broadcast_tensors(loc, scale)
                return dist.Normal(loc.unsqueeze(-1), scale.unsqueeze(-1)).to_event(1)
            made = {"normal": dist.Normal, "scored": NonreparameterizedNormal, "lognormal": dist.LogNormal}[site.kind]
            return made(*torch.broadcast_tensors(loc, scale))
        bias, slope = weights.chunk(2, -1)
        logits = bias + slope * given.unsqueeze(-1)
        if site.kind == "categorical":
            return dist.Categorical(logits=logits)
        if site.kind == "bernoulli":
            return dist.Bernoulli(logits=logits[..., 0])
        return (
            dist.OneHotCategorical(logits=logits)
            if site.kind == "one-hot"
            else dist.Bernoulli(logits=logits).to_event(1)
        )

    def likelihood(self, values: dict[int, Tensor]) -> Any:
        inner = self.program.observed_inner
        weights = self.at_rows(self.leaves["observed"])
        mean = weights[..., 0]
        for number in values:
            mean = mean + weights[..., number + 1] * self.number(number, values, inner)
        return dist.Normal(mean, 0.8)

    # --- the program in Pyro ---

    def make_plates(self) -> dict[str, Any]:
        """The vectorized plates of one run, the outermost first."""
        size = self.sizes["data"] // 2 if self.program.subsample else None
        self.plates = {
            name: pyro.plate(name, self.sizes[name], subsample_size=size if name == "data" else None, dim=dim)
            for name, dim in reversed(self.dims.items())
        }
        return self.plates

    @contextlib.contextmanager
    def in_plates(self) -> Iterator[None]:
        p = self.program
        with contextlib.ExitStack() as stack:
            if "outer" in self.dims:
                stack.enter_context(self.plates["outer"])
            self.rows = stack.enter_context(self.plates["data"])
            if p.mask == "all":
                stack.enter_context(poutine.mask(mask=self.keep[self.rows]))
            if p.scale in ("all", "rows"):
                stack.enter_context(poutine.scale(scale=0.6 if p.scale == "all" else self.weight[self.rows]))
            yield

    def steps(self, order: list[int]) -> Any:
        loop = self.program.loop
        return (
            map(
                order.__getitem__,
                pyro.plate("steps", len(order)) if loop == "plate" else pyro.markov(range(len(order))),
            )
            if loop
            else order
        )

    def place(self, number: int, in_guide: bool, values: dict[int, Tensor]) -> Any:
        """The inner plate and the mask of one site."""
        stack, site = contextlib.ExitStack(), self.program.sites[number]
        if site.inner:
            stack.enter_context(self.plates["inner"])
        if number == 0 and (self.program.mask == "site" or (self.program.mask == "guide site" and in_guide)):
            stack.enter_context(poutine.mask(mask=self.keep[self.rows]))
        if self.program.mask == "value" and number == len(self.program.sites) - 1:
            stack.enter_context(poutine.mask(mask=self.number(0, values, site.inner) > 0))
        return stack

    def masked(self, number: int, fn: Any) -> Any:
        return fn.mask(self.keep[self.rows]) if self.program.mask == "distribution" and number == 0 else fn

    def _model(self) -> None:
        values: dict[int, Tensor] = {}
        self.make_plates()
        with self.in_plates():
            for number in self.steps(list(range(len(self.program.sites)))):
                with self.place(number, False, values):
                    values[number] = pyro.sample(f"h{number}", self.masked(number, self.prior(number, values)))
                    self._note(number, values)
            with contextlib.ExitStack() as stack:
                if self.program.observed_inner:
                    stack.enter_context(self.plates["inner"])
                if self.program.mask == "observation":
                    stack.enter_context(poutine.mask(mask=self.keep[self.rows]))
                pyro.sample("x", self.likelihood(values), obs=self.seen(self.program.observed_inner))

    def _guide(self) -> None:
        self.make_plates()
        values: dict[int, Tensor] = {}
        with self.in_plates():
            for number in self.steps([i for i in self.program.order if not self.program.is_auto(i)]):
                with self.place(number, True, values):
                    values[number] = self._draw(number, self.approximation(number, values))
                    self._note(number, values)

    def _draw(self, number: int, fn: Any) -> Tensor:
        site = self.program.sites[number]
        if not site.auxiliary:
            return pyro.sample(f"h{number}", self.masked(number, fn))
        log = site.kind == "lognormal"
        base = self.masked(number, fn.base_dist if log else fn)
        drawn = pyro.sample(f"h{number}_aux", base, infer={"is_auxiliary": True})
        point = dist.Delta(drawn.exp(), log_density=-drawn) if log else dist.Delta(drawn, event_dim=fn.event_dim)
        return pyro.sample(f"h{number}", self.masked(number, point))

    def _note(self, number: int, values: dict[int, Tensor]) -> None:
        if self.program.deterministic:
            pyro.deterministic(f"noted{number}", 2 * self.number(number, values, True))

    def model_and_guide(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The model and its guide; after this all parameters are in `leaves`."""
        p, model, guide = self.program, self._model, self._guide
        pyro.clear_param_store()  # autoguides would find their parameters of another number of copies
        if p.guide != "written":
            hidden = [f"h{i}" for i in range(len(p.sites)) if not p.is_auto(i)]
            kind = AutoDelta if p.guide == "AutoDelta" else lambda m, **kw: AutoNormal(m, init_scale=0.6, **kw)
            auto = kind(poutine.block(model, hide=[*hidden, "x"]), init_loc_fn=_initial)

            if hidden:
                auto.create_plates = lambda: list(self.plates.values())

                def guide() -> None:  # both parts are in the same plates
                    self._guide()
                    auto()
            else:
                guide = auto
            guide()
            found = {name.removesuffix("_unconstrained").replace("1.", ""): v for name, v in auto.named_parameters()}
            self.leaves |= {f"auto {name}": value for name, value in found.items()}
        if p.scale in ("site", "nothing left"):
            scales = dict.fromkeys(("h0", "h0_unconstrained", "h0_aux"), 0.4 if p.scale == "site" else 0.0)
            model, guide = scale_sites(scales)(model), scale_sites(scales)(guide)
        return model, guide


def _initial(site: Any) -> Tensor:
    return torch.full(site["fn"].shape(), 0.4)


def nodes_for(program: Program, num_particles: int) -> int | None:
    """The most quadrature nodes that the sum over all states of all particles can have; `None` if too few."""
    for nodes in (16, 12, 10, 8):
        if program.num_states(nodes) ** num_particles <= MOST_TUPLES:
            return nodes
    return None


@dataclass
class States:
    """What the sum over states is made of: each `(S, R)`, for S states and R datapoints."""

    log_prior: dict[int, Tensor]
    log_likelihood: Tensor
    log_guide: dict[int, Tensor]  # masked and scaled
    own: dict[int, Tensor]  # of the guide itself, masked and unscaled
    log_drawn: dict[int, Tensor]  # of what it was drawn from, masked and scaled
    log_probability: Tensor  # of the state

    @property
    def log_joint(self) -> Tensor:
        return sum(self.log_prior.values(), self.log_likelihood)

    @property
    def log_weights(self) -> Tensor:
        return self.log_joint - sum(self.log_drawn.values())


class Sum:
    """The exact value and gradient of an objective on a program."""

    def __init__(self, program: Program, seed: int, nodes: int) -> None:
        self.run = Runnable(replace(program, subsample=False), 1, seed)
        self.run.model_and_guide()
        self.program, self.nodes = program, nodes
        shape = [{"data": ROWS}.get(name, 2) for name in reversed(program.plates)]
        self.shape = torch.Size(shape)

    def states(self, held: Callable[[int], bool] = lambda number: False, defensive: float = 0.0) -> States:
        """All states.

        Arguments:
            held: Of which continuous latents the value is held fixed.
            defensive: The share of the uniform distribution that discrete latents are drawn from.
        """
        run, p = self.run, self.program
        values: dict[int, Tensor] = {}
        log_probability = torch.zeros(1, *self._batch(False))
        for number in p.order:
            site = p.sites[number]
            outcomes, log_weight = self._outcomes(number, values, len(log_probability))
            elements = 2 if site.inner else 1
            picks = list(itertools.product(range(len(outcomes)), repeat=elements))
            dim = run.dims["inner"] - (outcomes.dim() - 2 - len(self.shape)) if site.inner else 0
            value = torch.stack(
                [
                    torch.cat([outcomes[i].narrow(dim, e, 1) for e, i in enumerate(pick)], dim)
                    if site.inner
                    else outcomes[pick[0]]
                    for pick in picks
                ]
            ).flatten(0, 1)
            values = {i: _tiled(v, len(picks)) for i, v in values.items()}
            values[number] = value.detach() if site.kind in CONTINUOUS and held(number) else value
            log_probability = _tiled(log_probability, len(picks))
            if site.kind in CONTINUOUS:
                of_pick = torch.tensor([sum(float(log_weight[i]) for i in pick) for pick in picks])
                more = of_pick.repeat_interleave(len(log_probability) // len(picks)).reshape(-1, *[1] * len(self.shape))
            else:
                more = self._summed(
                    _mixed(run.approximation(number, values), defensive).log_prob(values[number]), number
                )
            log_probability = log_probability + more
        count = len(log_probability)

        def terms(log_prob: Tensor, number: int | None, in_guide: bool, scaled: bool = True) -> Tensor:
            log_prob = log_prob.expand(
                count, *self._batch(p.observed_inner if number is None else p.sites[number].inner)
            )
            log_prob = torch.where(self._mask(number, in_guide, values), log_prob, torch.zeros(()))
            log_prob = log_prob * (self._scale(number, in_guide) if scaled else 1.0)
            return self._summed(log_prob, number).reshape(count, -1)

        own = {i: self._guide(i, values, values[i]) for i in p.order}
        drawn = {
            i: own[i]
            if p.sites[i].kind in CONTINUOUS
            else _mixed(run.approximation(i, values), defensive).log_prob(values[i])
            for i in p.order
        }
        return States(
            {i: terms(run.prior(i, values).log_prob(values[i]), i, False) for i in p.order},
            terms(run.likelihood(values).log_prob(run.seen(p.observed_inner)), None, False),
            {i: terms(own[i], i, True) for i in p.order},
            {i: terms(own[i], i, True, scaled=False) for i in p.order},
            {i: terms(drawn[i], i, True) for i in p.order},
            log_probability.reshape(count, -1),
        )

    def _batch(self, inner: bool) -> torch.Size:
        shape = list(self.shape)
        if "inner" in self.run.dims and not inner:
            shape[self.run.dims["inner"]] = 1
        return torch.Size(shape)

    def _summed(self, log_prob: Tensor, number: int | None) -> Tensor:
        inner = self.program.observed_inner if number is None else self.program.sites[number].inner
        return log_prob.sum(self.run.dims["inner"], keepdim=True) if inner else log_prob

    def _mask(self, number: int | None, in_guide: bool, values: dict[int, Tensor]) -> Tensor:
        """Where a site counts; `number` is `None` for the observation."""
        kind, everywhere = self.program.mask, torch.tensor(True)
        if in_guide and number is not None and self.program.is_auto(number):
            return everywhere  # the masks are in the model and in the guide that is written
        if kind == "value" and number == len(self.program.sites) - 1:
            return self.run.number(0, values, self.program.sites[number].inner) > 0
        first = kind in ("site", "distribution") or (kind == "guide site" and in_guide)
        here = kind == "all" or (kind == "observation" and number is None) or (first and number == 0)
        return self.run.keep if here else everywhere

    def _scale(self, number: int | None, in_guide: bool) -> Tensor | float:
        kind = self.program.scale
        if kind in ("all", "rows"):
            if in_guide and number is not None and self.program.is_auto(number):
                return 1.0
            return 0.6 if kind == "all" else self.run.weight
        return {"site": 0.4, "nothing left": 0.0}.get(kind, 1.0) if number == 0 else 1.0

    def _auto(self, number: int) -> Any:
        """The distribution that Pyro's autoguide has for a continuous latent, or its value if that is a point."""
        leaves, log = self.run.leaves, self.program.sites[number].kind == "lognormal"
        if self.program.guide == "AutoDelta":
            value = leaves[f"auto h{number}"]
            return value.exp() if log else value
        scale = torch.nn.functional.softplus(leaves[f"auto scales.h{number}"])
        return (dist.LogNormal if log else dist.Normal)(leaves[f"auto locs.h{number}"], scale)

    def _guide(self, number: int, values: dict[int, Tensor], value: Tensor) -> Tensor:
        if not self.program.is_auto(number):
            return self.run.approximation(number, values).log_prob(value)
        fn = self._auto(number)
        return torch.zeros(value.shape) if isinstance(fn, Tensor) else fn.log_prob(value)

    def _outcomes(self, number: int, values: dict[int, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """The values of one element of a latent, `(n, S, *batch, *event)`, and the log-weights of nodes, `(n,)`."""
        site, batch = self.program.sites[number], (count, *self._batch(self.program.sites[number].inner))
        if site.kind in CONTINUOUS:
            fn = self._auto(number) if self.program.is_auto(number) else self.run.approximation(number, values)
            if isinstance(fn, Tensor):
                return fn.expand(1, *batch), torch.zeros(1)
            places, weights = np.polynomial.hermite_e.hermegauss(self.nodes)
            base = fn.base_dist if site.kind in ("lognormal", "vector") else fn
            batch += (1,) * fn.event_dim
            shaped = torch.tensor(places).reshape(-1, *[1] * len(batch))
            value = (base.loc + base.scale * shaped).expand(-1, *batch)
            return value.exp() if site.kind == "lognormal" else value, torch.tensor(weights / weights.sum()).log()
        support = {
            "categorical": torch.arange(3),
            "bernoulli": torch.arange(2.0),
            "one-hot": torch.eye(3),
            "pair": torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]),
        }[site.kind]
        event = support.shape[1:]
        return support.reshape(-1, *[1] * len(batch), *event).expand(-1, *batch, *event), torch.zeros(len(support))

    # --- expectations ---

    def bound(self, num_particles: int, defensive: float = 0.0) -> tuple[Tensor, Tensor]:
        """E log (1/K) sum_k w_k, summed over datapoints, twice: as value and as what has the gradient."""
        states = self.states(defensive=defensive)
        value = _expected(num_particles, states.log_weights, states.log_probability)
        return value, value

    def elbo(self) -> tuple[Tensor, Tensor]:
        states = self.states()
        value = (states.log_probability.exp() * states.log_weights).sum()
        return value, value

    def wake(self, num_particles: int, pathwise: bool = False, defensive: float = 0.0) -> tuple[Tensor, Tensor]:
        """The bound, and what has the gradient of wake-sleep: values are held fixed, but for those of paths."""
        of_path = [
            i for i, s in enumerate(self.program.sites) if pathwise and s.kind in ("normal", "vector", "lognormal")
        ]
        states = self.states(lambda i: i not in of_path, defensive)
        log_w = states.log_joint - sum(
            (v if i in of_path else v.detach() for i, v in states.log_drawn.items()), torch.zeros(())
        )
        awake = sum((own for i, own in states.own.items() if i not in of_path), torch.zeros_like(log_w))
        index = _tuples(len(log_w), num_particles)
        probability = states.log_probability.detach()[index].sum(0).exp()
        share = log_w.detach()[index].softmax(0)
        bound = log_w[index].logsumexp(0) - math.log(num_particles)
        surrogate = (probability * (bound + (share * awake[index]).sum(0))).sum()
        return (probability * bound).sum(), surrogate


def _tiled(values: Tensor, count: int) -> Tensor:
    return values.repeat(count, *[1] * (values.dim() - 1))


def _tuples(states: int, num_particles: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(states)] * num_particles).reshape(-1, num_particles).T


def _expected(num_particles: int, log_weights: Tensor, log_probability: Tensor) -> Tensor:
    index = _tuples(len(log_weights), num_particles)
    bound = log_weights[index].logsumexp(0) - math.log(num_particles)
    return (log_probability[index].sum(0).exp() * bound).sum()


def _mixed(fn: Any, share: float) -> Any:
    """A mixture of a discrete distribution and the uniform one."""
    if not share:
        return fn
    if isinstance(fn, torch.distributions.Independent):
        return dist.Bernoulli(0.5 * share + (1 - share) * fn.base_dist.probs).to_event(1)
    if isinstance(fn, torch.distributions.Bernoulli):
        return dist.Bernoulli(0.5 * share + (1 - share) * fn.probs)
    return type(fn)(probs=share / fn.probs.shape[-1] + (1 - share) * fn.probs)


def by_copy(run: Runnable, name: str, gradient: Tensor) -> Tensor:
    """The gradient of a parameter as one row for each copy of the data."""
    if not name.startswith("auto"):
        return gradient
    return gradient.movedim(run.dims["data"], 0).reshape(run.copies, -1)


def estimated(elbo: Any, program: Program, seed: int, copies: int) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Independent estimates of the value and of each parameter's gradient, one for each copy of the data.

    Pyro's enumeration does not tell the value of each datapoint.
    """
    run = Runnable(program, copies, seed)
    model, guide = run.model_and_guide()
    if isinstance(elbo, TraceEnum_ELBO):
        loss = elbo.differentiable_loss(model, config_enumerate(guide, "parallel", expand=True))
        return None, _gradients(run, loss)
    terms = elbo.terms(model, guide)
    torch.testing.assert_close(terms.loss, -terms.particles.scale * terms.bound.sum())
    bound = terms.particles.scale * terms.bound.reshape(-1, len(run.rows)).sum(0)
    value = torch.zeros(copies).index_add(0, run.rows // ROWS, bound)
    return value, _gradients(run, terms.loss)


def _gradients(run: Runnable, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(run.leaves.values()), allow_unused=True)
    return {
        name: by_copy(run, name, torch.zeros_like(leaf) if g is None else g)
        for (name, leaf), g in zip(run.leaves.items(), found, strict=True)
    }


def exact(total: Sum, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The exact value and gradient of an objective, a pair of a value and of what has the gradient."""
    gradients = _gradients(total.run, -pair[1])
    return pair[0].detach(), {name: rows[0] for name, rows in gradients.items()}
