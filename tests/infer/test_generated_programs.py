"""Every objective on small random programs: each has its exact value and gradient, or is refused with a remedy.

`PYRO_VMEM_PROGRAMS=500 pytest tests/infer/test_generated_programs.py` looks at so many new programs of each objective.
"""

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from programs import CONTINUOUS, SIZES, Program, Runnable, Site, Sum, estimated, exact, nodes_for, programs
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)

from pyro_vmem.infer import (
    IWAE_ELBO,
    RELAX_ELBO,
    RWS_ELBO,
    VIMCO_ELBO,
    DisARM_ELBO,
    EnumGuard,
    ParticleELBO,
    RaoBlackwell_ELBO,
    Reinforce_ELBO,
    UnorderedSet_ELBO,
)
from pyro_vmem.infer.elbo import log_mean_exp
from pyro_vmem.infer.exhaustive import exhaustive_bound
from pyro_vmem.infer.relax import Surrogate

pytestmark = pytest.mark.usefixtures("float64")
MANY = int(os.environ.get("PYRO_VMEM_PROGRAMS", "0"))
SOME = settings(
    derandomize=not MANY,
    database=None,
    deadline=None,
    max_examples=MANY or 15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@dataclass(frozen=True)
class Case:
    """An objective, what it is in expectation, and which programs it may refuse, with which words."""

    make: Callable[[Program], ParticleELBO]
    num_particles: int
    exact: Callable[[Sum], Any]
    may_refuse: tuple[tuple[Callable[[Program], bool], str], ...] = ()


def on_a_path(p: Program) -> set[int]:
    """The latents that are reparameterised."""
    return {i for i, s in enumerate(p.sites) if s.kind in ("normal", "vector", "lognormal")}


def guide_depends_on_a_path(p: Program) -> bool:
    return any(on_a_path(p) & set(s.guided_by) for s in p.sites)


def discrete_depends_on_a_path(p: Program) -> bool:
    return any(on_a_path(p) & set(s.guided_by) for i, s in enumerate(p.sites) if i not in on_a_path(p))


def first_categorical(p: Program) -> int | None:
    return next((i for i in p.order if p.sites[i].kind == "categorical"), None)


def cannot_be_summed(p: Program) -> bool:
    """Rao-Blackwell's site has to be categorical, the guide's own, one for each datapoint, and masked as all is."""
    i = first_categorical(p)
    return (
        i is None
        or p.sites[i].inner
        or bool(p.sites[i].guided_by)
        or p.sites[i].auxiliary
        or (i == 0 and p.mask in ("site", "guide site", "distribution"))
        or (i == len(p.sites) - 1 and p.mask == "value")
    )


def several_enumerated(p: Program) -> bool:
    """Enumeration cannot have a site that depends on all of an inner plate."""
    return any(s.inner and s.kind not in CONTINUOUS for s in p.sites)


SEVERAL = (several_enumerated, "enumeration: .* depends on .* plate 'inner' has several.*VIMCO_ELBO")
SAMPLED = (lambda p: any(s.inner for s in p.sites), "enumeration: .* is sampled in plates .*VIMCO_ELBO")
# Pyro itself keeps no more than some dims apart, and says so.
CROWDED = (lambda p: len(p.sites) + sum(s.auxiliary for s in p.sites) > 2, "Enumeration dim conflict")
LOOPED = (lambda p: bool(p.loop), "")  # Pyro refuses what depends on the steps of a loop that declares it does not
PATH = (guide_depends_on_a_path, "dreg: the guide of .* Use dreg=False")
AWAKE = (discrete_depends_on_a_path, "pathwise: the guide of .* Use pathwise=False, or VIMCO_ELBO")
POINT = (lambda p: p.guide == "AutoDelta", "is a point that is learned.* Use pathwise=True, or VIMCO_ELBO")
NO_UNIFORM = (lambda p: any(s.kind == "scored" for s in p.sites), "defensive: .* Use defensive=0")
SUMMED = (cannot_be_summed, "(?s)site: .*(Name|VIMCO_ELBO|it has)")

UNPAIRED = (
    lambda p: not any(s.kind in ("bernoulli", "pair") and not s.guided_by for s in p.sites),
    "DisARM_ELBO pairs Bernoulli sites.*Use VIMCO_ELBO",
)
UNRELAXED = (lambda p: any(s.kind == "scored" for s in p.sites), "RELAX_ELBO relaxes")


def learned() -> Surrogate:
    """A control variate that is not zero."""
    control = Surrogate()
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter)
    return control


def summed(p: Program) -> str:
    return f"h{first_categorical(p) or 0}"


CASES = {
    "vimco-2": Case(lambda p: VIMCO_ELBO(2), 2, lambda s: s.bound(2)),
    "vimco-3-geometric": Case(lambda p: VIMCO_ELBO(3, "geometric"), 3, lambda s: s.bound(3)),
    "vimco-2-looped": Case(lambda p: VIMCO_ELBO(2, vectorize_particles=False), 2, lambda s: s.bound(2)),
    "vimco-2-backward": Case(lambda p: VIMCO_ELBO(2, backward=1), 2, lambda s: s.bound(2)),
    "vimco-3-backward-2": Case(lambda p: VIMCO_ELBO(3, backward=2), 3, lambda s: s.bound(3)),
    "vimco-2-dreg": Case(lambda p: VIMCO_ELBO(2, dreg=True), 2, lambda s: s.bound(2), (PATH,)),
    "vimco-2-dreg-looped": Case(
        lambda p: VIMCO_ELBO(2, dreg=True, vectorize_particles=False), 2, lambda s: s.bound(2), (PATH,)
    ),
    "vimco-2-dreg-backward": Case(lambda p: VIMCO_ELBO(2, dreg=True, backward=1), 2, lambda s: s.bound(2), (PATH,)),
    "iwae-1": Case(lambda p: IWAE_ELBO(1), 1, lambda s: s.bound(1)),
    "iwae-2": Case(lambda p: IWAE_ELBO(2), 2, lambda s: s.bound(2)),
    "iwae-1-dreg": Case(lambda p: IWAE_ELBO(1, dreg=True), 1, lambda s: s.bound(1), (PATH,)),
    "rws-2": Case(lambda p: RWS_ELBO(2), 2, lambda s: s.wake(2), (POINT,)),
    "rws-3-looped": Case(lambda p: RWS_ELBO(3, vectorize_particles=False), 3, lambda s: s.wake(3), (POINT,)),
    "rws-2-backward": Case(lambda p: RWS_ELBO(2, backward=1), 2, lambda s: s.wake(2), (POINT,)),
    "rws-2-pathwise": Case(lambda p: RWS_ELBO(2, pathwise=True), 2, lambda s: s.wake(2, True), (AWAKE,)),
    "rws-2-pathwise-dreg": Case(
        lambda p: RWS_ELBO(2, pathwise=True, dreg=True), 2, lambda s: s.wake(2, True), (AWAKE, PATH)
    ),
    "rws-2-pathwise-backward": Case(
        lambda p: RWS_ELBO(2, pathwise=True, backward=1), 2, lambda s: s.wake(2, True), (AWAKE,)
    ),
    "rws-2-defensive": Case(
        lambda p: RWS_ELBO(2, defensive=0.3), 2, lambda s: s.wake(2, defensive=0.3), (POINT, NO_UNIFORM)
    ),
    "rws-2-defensive-pathwise": Case(
        lambda p: RWS_ELBO(2, pathwise=True, defensive=0.3), 2, lambda s: s.wake(2, True, 0.3), (AWAKE, NO_UNIFORM)
    ),
    "reinforce-2": Case(lambda p: Reinforce_ELBO(2), 1, lambda s: s.elbo()),
    "reinforce-1-average": Case(lambda p: Reinforce_ELBO(1, "average"), 1, lambda s: s.elbo()),
    "reinforce-2-looped": Case(lambda p: Reinforce_ELBO(2, "none", vectorize_particles=False), 1, lambda s: s.elbo()),
    "rao-blackwell-1": Case(lambda p: RaoBlackwell_ELBO(1, site=summed(p)), 1, lambda s: s.elbo(), (SUMMED,)),
    "enumerate": Case(lambda p: EnumGuard(), 1, lambda s: s.elbo(), (SEVERAL, SAMPLED, LOOPED, CROWDED)),
    "rao-blackwell-2": Case(lambda p: RaoBlackwell_ELBO(2, site=summed(p)), 1, lambda s: s.elbo(), (SUMMED,)),
    "unordered-set-2": Case(lambda p: UnorderedSet_ELBO(2, site=summed(p)), 1, lambda s: s.elbo(), (SUMMED,)),
    "disarm-2": Case(lambda p: DisARM_ELBO(2), 1, lambda s: s.elbo(), (UNPAIRED,)),
    "relax-1": Case(lambda p: RELAX_ELBO(1, learned()), 1, lambda s: s.elbo(), (UNRELAXED,)),
    "relax-2-looped": Case(
        lambda p: RELAX_ELBO(2, learned(), vectorize_particles=False), 1, lambda s: s.elbo(), (UNRELAXED,)
    ),
}


@pytest.mark.parametrize("name", CASES)
@SOME
@given(data=st.data())
def test_a_program_is_right_or_refused(name, data):
    case = CASES[name]
    program = data.draw(programs())
    seed = data.draw(st.integers(0, 1000))
    assume(nodes_for(program, case.num_particles) is not None)
    check(case, program, seed)


@SOME
@given(data=st.data())
def test_two_exact_sums_agree(data):
    """That of the package, on the program itself, and that of these tests, on its description: with gradients."""
    kinds = tuple(kind for kind in SIZES if kind not in ("scored", "lognormal"))
    program = replace(data.draw(programs(kinds)), guide="written", subsample=False)
    program = replace(program, sites=tuple(replace(site, auxiliary=False) for site in program.sites))
    elbo = data.draw(st.sampled_from([VIMCO_ELBO(2), Reinforce_ELBO(2)]))
    assume((nodes := nodes_for(program, elbo.num_particles)) is not None)
    total = Sum(program, 0, nodes)
    expected = exact(total, total.bound(2) if elbo.weighted else total.elbo())
    run = Runnable(program, 1, 0)
    bound = exhaustive_bound(elbo, *run.model_and_guide(), nodes=nodes)
    torch.testing.assert_close(bound.detach(), expected[0])
    for (name, leaf), g in zip(
        run.leaves.items(), torch.autograd.grad(-bound, list(run.leaves.values()), allow_unused=True), strict=True
    ):
        torch.testing.assert_close((torch.zeros_like(leaf) if g is None else g)[0], expected[1][name], msg=name)


FOUND = [
    ("rws-2", Program((Site("categorical"),), mask="site")),
    ("rws-2-pathwise", Program((Site("pair", inner=True),), plates=("data", "inner"), mask="guide site")),
    ("vimco-2-dreg", Program((Site("vector"),), mask="distribution")),
    ("rao-blackwell-1", Program((Site("categorical"), Site("categorical", parents=(0,))), loop="plate")),
    ("enumerate", Program((Site("bernoulli", inner=True),), plates=("data", "inner"))),
    ("enumerate", Program((Site("pair", inner=True), Site("categorical")), plates=("data", "inner"))),
]


@pytest.mark.parametrize(("name", "program"), FOUND, ids=[name for name, _ in FOUND])
def test_what_was_found_is_mended(name, program):
    check(CASES[name], program, 0)


class WithoutScores(IWAE_ELBO):
    """What `pyro.infer.RenyiELBO` does: discrete latents get no gradient."""

    def estimate(self, particles):
        bound = log_mean_exp(particles.log_weights)
        return bound, bound


def test_a_wrong_gradient_is_found():
    wrong = Case(lambda p: WithoutScores(2), 2, lambda s: s.bound(2))
    check(wrong, Program((Site("normal"),)), 0)
    with pytest.raises(AssertionError, match="guide 0"):
        check(wrong, Program((Site("bernoulli"),)), 0)


def check(case, program, seed, copies=1000):
    nodes = nodes_for(program, case.num_particles)
    assert nodes is not None, "too many states to sum"
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            "Found non-auxiliary vars|at (model|guide) site|TraceEnum_ELBO found no|.*was initialized|.*plate should",
        )
        try:
            found = estimated(case.make(program), program, seed, copies)
        except (ValueError, AssertionError) as error:  # some of Pyro's own errors are assertions
            if not any(may(program) and re.search(words, str(error)) for may, words in case.may_refuse):
                raise
            return
        right = exact(total := Sum(program, seed, nodes), case.exact(total))
        if not furthest(found, right, 4.0):
            return
        # Of many numbers some are four standard errors off by chance; not so of more samples, drawn anew.
        found = estimated(case.make(program), program, seed, 8 * copies)
        coarser = exact(total := Sum(program, seed, nodes - 2), case.exact(total))
    assert not (off := furthest(found, right, 5.0, coarser)), off


def furthest(found, right, z, coarser=None):
    """What is more than z standard errors off, and by how much; the error of the quadrature is allowed for."""
    off = []
    rows = {} if found[0] is None else {"value": (found[0], right[0], coarser and coarser[0])}
    rows |= {name: (found[1][name], right[1][name], coarser and coarser[1][name]) for name in right[1]}
    assert rows.keys() - {"value"} == found[1].keys()
    for name, (samples, truth, other) in rows.items():
        error = samples.std(0) / len(samples) ** 0.5
        slack = 1e-8 + (0.0 if other is None else 3 * (other - truth).abs())
        score = ((samples.mean(0) - truth).abs() - slack) / (error + 1e-9)
        if not float(score.max()) <= z:
            at = score.argmax()
            off.append(
                (name, int(at), float(samples.mean(0).flatten()[at]), float(truth.flatten()[at]), float(score.max()))
            )
    return off


def local(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def one_by_one(x, given=False):
    for i in pyro.plate("data", len(x)):
        k = pyro.sample(f"k{i}", dist.Bernoulli(0.4))
        if not given:
            pyro.sample(f"x{i}", dist.Normal(k, 1.0), obs=x[i])


def some_steps(x, given=False):
    with pyro.plate("data", len(x), dim=-1):
        for i in pyro.plate("steps", 3, subsample=torch.tensor([0, 2])):
            k = pyro.sample(f"k{i}", dist.Bernoulli(0.4))
            if not given:
                pyro.sample(f"x{i}", dist.Normal(k, 1.0), obs=x)


def one_more_step(x, given=False):
    with pyro.plate("data", len(x), dim=-1):
        for i in pyro.markov(range(2 + (not given))):
            k = pyro.sample(f"k{i}", dist.Bernoulli(0.4))
        if not given:
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)


REFUSED = {
    "AutoDiagonalNormal": (local, AutoDiagonalNormal(local), "expected all sample sites in one data plate.*AutoNormal"),
    "AutoMultivariateNormal": (local, AutoMultivariateNormal(local), "expected all sample sites.*AutoNormal"),
    "AutoLowRankMultivariateNormal": (local, AutoLowRankMultivariateNormal(local), "expected all.*AutoNormal"),
    "AutoIAFNormal": (local, AutoIAFNormal(local), "expected all sample sites.*AutoNormal"),
    "a loop over the data": (one_by_one, partial(one_by_one, given=True), r"(?s)data plate.*with pyro\.plate\("),
    "some of the steps": (
        some_steps,
        partial(some_steps, given=True),
        "'steps' inside the data plate is subsampled",
    ),
    "as many as the guide has": (one_more_step, partial(one_more_step, given=True), "no sample site 'k2'.*Add one"),
}


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("elbo", [VIMCO_ELBO(2), IWAE_ELBO(2, vectorize_particles=False), RWS_ELBO(2)], ids=repr)
def test_what_is_not_one_data_plate_is_refused(name, elbo):
    model, guide, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        elbo.loss(model, guide, torch.tensor([0.4, -1.1, 0.9]))
