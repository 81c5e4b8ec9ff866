"""Every objective on small random programs: each has its exact value and gradient, or is refused with a remedy.

`PYRO_VMEM_PROGRAMS=500 pytest tests/infer/test_generated_programs.py` looks at so many new programs of each objective.
"""

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from programs import CONTINUOUS, Program, Sum, estimated, exact, nodes_for, programs

from pyro_vmem.infer import IWAE_ELBO, RWS_ELBO, VIMCO_ELBO, ParticleELBO, RaoBlackwell_ELBO, Reinforce_ELBO

pytestmark = pytest.mark.usefixtures("float64")
MANY = int(os.environ.get("PYRO_VMEM_PROGRAMS", "0"))
SOME = settings(
    derandomize=not MANY,
    database=None,
    deadline=None,
    max_examples=MANY or 25,
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
    return {i for i, s in enumerate(p.sites) if s.kind in ("normal", "lognormal")}


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
        or (i == 0 and p.mask in ("site", "guide site"))
    )


PATH = (guide_depends_on_a_path, "dreg: the guide of .* Use dreg=False")
AWAKE = (discrete_depends_on_a_path, "pathwise: the guide of .* Use pathwise=False, or VIMCO_ELBO")
POINT = (lambda p: p.guide == "AutoDelta", "is a point that is learned.* Use pathwise=True, or VIMCO_ELBO")
NO_UNIFORM = (lambda p: any(s.kind == "scored" for s in p.sites), "defensive: .* Use defensive=0")
SUMMED = (cannot_be_summed, "(?s)site: .*(Name|VIMCO_ELBO|it has)")


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
    "rao-blackwell-2": Case(lambda p: RaoBlackwell_ELBO(2, site=summed(p)), 1, lambda s: s.elbo(), (SUMMED,)),
}


@pytest.mark.parametrize("name", CASES)
@SOME
@given(data=st.data())
def test_a_program_is_right_or_refused(name, data):
    case = CASES[name]
    program = data.draw(programs())
    seed = data.draw(st.integers(0, 1000))
    check(case, program, seed)


def check(case, program, seed, copies=2000):
    nodes = nodes_for(program, case.num_particles)
    assume(nodes is not None)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found non-auxiliary vars|.*was initialized|.*plate should")
        try:
            found = estimated(case.make(program), program, seed, copies)
        except ValueError as error:
            assert any(may(program) and re.search(words, str(error)) for may, words in case.may_refuse), error
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
    rows = {"value": (found[0], right[0], coarser and coarser[0])}
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
