"""Objectives by name: what they declare, which is chosen, and what is refused before the first step."""

from typing import get_args

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
)

import pyro_vmem as pv
from pyro_vmem import infer
from pyro_vmem.infer import (
    IWAE_ELBO,
    RELAX_ELBO,
    RWS_ELBO,
    VIMCO_ELBO,
    DisARM_ELBO,
    EnumGuard,
    GlobalDraws_ELBO,
    ParticleELBO,
    RaoBlackwell_ELBO,
    Reinforce_ELBO,
    StraightThrough_ELBO,
    UnorderedSet_ELBO,
    check_objective,
)
from pyro_vmem.infer.by_name import Objective, named_objective

OURS = [
    VIMCO_ELBO(4, max_plate_nesting=1),
    IWAE_ELBO(4, max_plate_nesting=1),
    RWS_ELBO(4, max_plate_nesting=1),
    Reinforce_ELBO(4, max_plate_nesting=1),
    RaoBlackwell_ELBO(3, max_plate_nesting=1),
    UnorderedSet_ELBO(4, max_plate_nesting=1),
    RELAX_ELBO(4, max_plate_nesting=1),
]
FOR_BINARY = {DisARM_ELBO, StraightThrough_ELBO}  # which refuse an address


def case(batch=3):
    return pv.VMA.for_vectors(5), pv.Memory(torch.randn(6, 5)), torch.randn(batch, 5)


@pytest.mark.parametrize("elbo", OURS, ids=lambda elbo: type(elbo).__name__)
def test_decodes_are_counted_as_declared(elbo):
    """The number of latents decoded for each datapoint is what the class says."""
    vma, memory, x = case()
    counted = []
    forward = vma.likelihood.forward
    vma.likelihood.forward = lambda z, template: counted.append(z.shape[:-1].numel()) or forward(z, template)
    elbo.loss(vma.model, vma.guide, memory, x)
    assert sum(counted) == elbo.decodes * len(x)


def test_every_objective_declares():
    listed = {getattr(infer, name) for name in infer.__all__ if name.endswith("_ELBO")}
    assert {type(elbo) for elbo in OURS} | FOR_BINARY == listed - {GlobalDraws_ELBO, ParticleELBO}
    for elbo in OURS:
        assert elbo.discrete
        with pytest.raises(ValueError, match=r"num_particles|k: expected"):
            type(elbo)(elbo.least_particles - 1 - isinstance(elbo, RaoBlackwell_ELBO))
    assert [type(elbo).__name__ for elbo in OURS if elbo.bias] == ["RWS_ELBO"]


def enumerated(vma):
    return config_enumerate(vma.guide, "parallel", expand=True)


@pytest.mark.parametrize("elbo", [*OURS, Trace_ELBO(), TraceGraph_ELBO()], ids=lambda elbo: type(elbo).__name__)
def test_what_trains_a_discrete_guide_is_let_through(elbo):
    vma, memory, x = case()
    check_objective(elbo, vma.model, vma.guide, memory, x)
    check_objective(TraceEnum_ELBO(), vma.model, enumerated(vma), memory, x)


@pytest.mark.parametrize(
    ("elbo", "match"),
    [
        (RenyiELBO(alpha=0.0, num_particles=4), r"RenyiELBO gives the guide's discrete sites \['a'\] no gradient"),
        (ReweightedWakeSleep(num_particles=4), "forms one weight for all 3 datapoints. Use RWS_ELBO"),
        (TraceEnum_ELBO(), r"would sample the guide's discrete sites \['a'\]"),
        (EnumGuard(), "EnumGuard would sample"),
    ],
    ids=["renyi", "rws", "enum", "guard"],
)
def test_what_would_silently_not_train_it_is_refused(elbo, match):
    vma, memory, x = case()
    state, names = torch.get_rng_state(), set(pyro.get_param_store())
    with pytest.raises(ValueError, match=f"objective: .*{match}"):
        check_objective(elbo, vma.model, vma.guide, memory, x)
    assert torch.equal(state, torch.get_rng_state())
    assert set(pyro.get_param_store()) == names


def test_continuous_guides_may_use_renyi_and_one_datapoint_wake_sleep():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    check_objective(RenyiELBO(alpha=0.0, num_particles=4), model, guide, torch.zeros(3))
    check_objective(TraceEnum_ELBO(), model, guide, torch.zeros(3))
    vma, memory, x = case(batch=1)
    check_objective(ReweightedWakeSleep(num_particles=4), vma.model, vma.guide, memory, x)


def test_auto_is_no_objective_of_its_own():
    with pytest.raises(ValueError, match="objective: 'auto' depends on the model; pass what choose"):
        named_objective("auto")


@pytest.mark.parametrize("name", [name for name in get_args(Objective) if name != "auto"])
def test_names_stand_for_four_decodes(name):
    elbo = named_objective(name)
    assert elbo.max_plate_nesting == 1 + (elbo.num_particles > 1)
    assert isinstance(elbo, EnumGuard) if name == "enumerate" else elbo.decodes == 4
