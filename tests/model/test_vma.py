"""VMA: what its model and guide are to Pyro, what a user asks of it, and what it refuses."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.inspect import get_dependencies
from pyro.optim import Adam
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem import VMA, EncodedMemory, LearnedPrior, Memory, SimilarityGuide, StandardPrior, UniformPrior
from pyro_vmem.diagnostics import log_evidence
from pyro_vmem.infer import VIMCO_ELBO
from pyro_vmem.parts import ConvDecoder, FlatEncoder, MLPEncoder, WarpDecoder

S, B, K, D = 5, 3, 4, 2
EVENTS = {"vectors": (4,), "images": (1, 6, 5)}
KINDS = pytest.mark.parametrize("kind", EVENTS)
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-datapoint"])


def model_of(kind: str, **parts: Any) -> VMA:
    if kind == "images":
        return VMA.for_images(EVENTS[kind], latent_dim=D, num_features=6, width=4, **parts)
    return VMA.for_vectors(4, latent_dim=D, num_features=6, hidden=(8,), **parts)


def memory_of(kind: str, shared: bool = True, labels: bool = False, mask: bool = False) -> Memory:
    leading = (S,) if shared else (B, S)
    in_use = torch.tensor([True, True, False, True, False]).expand(leading) if mask else None
    classes = torch.tensor([0, 0, 2, 2, 7]).expand(leading) if labels else None
    return Memory(torch.rand(*leading, *EVENTS[kind]), classes, in_use, per_datapoint=not shared)


def targets(kind: str, batch: int = B) -> Tensor:
    return torch.rand(batch, *EVENTS[kind]).round()


def weights(vma: VMA) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in vma.named_parameters()}


def assert_same(before: dict[str, Tensor], vma: VMA) -> None:
    for name, parameter in vma.named_parameters():
        assert torch.equal(before[name], parameter), name


def sample_sites(trace: Any) -> dict[str, Any]:
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    return {
        name: site for name, site in sites.items() if not isinstance(site["fn"], poutine.subsample_messenger._Subsample)
    }


def traces(vma: VMA, memory: Memory, x: Tensor | None, guide: Any = None) -> tuple[Any, Any]:
    guide_trace = poutine.trace(guide or vma.guide).get_trace(memory, x)
    model_trace = poutine.trace(poutine.replay(vma.model, trace=guide_trace)).get_trace(memory, x)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
    return model_trace, guide_trace


# The Pyro programs


@KINDS
@SHARED
def test_sites(kind: str, shared: bool) -> None:
    vma, memory, x = model_of(kind), memory_of(kind, shared), targets(kind)
    model, guide = traces(vma, memory, x)
    assert set(sample_sites(model)) == {"a", "z", "x"}
    assert set(sample_sites(guide)) == {"a", "z"}
    for trace in (model, guide):
        assert trace.nodes["a"]["value"].shape == (B,)
        assert trace.nodes["z"]["value"].shape == (B, D)
        for site in sample_sites(trace).values():
            assert site["log_prob"].shape == (B,)
            assert site["scale"] == 1.0
            (frame,) = site["cond_indep_stack"]
            assert (frame.name, frame.dim, frame.size) == ("data", -1, B)
    assert model.nodes["x"]["is_observed"]
    assert model.nodes["x"]["value"] is x
    assert not model.nodes["z"]["is_observed"]


@KINDS
@SHARED
def test_sites_with_particles(kind: str, shared: bool) -> None:
    vma, memory, x = model_of(kind), memory_of(kind, shared), targets(kind)

    def particles(fn: Callable[..., Any]) -> Callable[..., Any]:
        def vectorized(*args: Any) -> Any:
            with pyro.plate("particles", K, dim=-2):
                return fn(*args)

        return vectorized

    guide = poutine.trace(particles(vma.guide)).get_trace(memory, x)
    model = poutine.trace(poutine.replay(particles(vma.model), trace=guide)).get_trace(memory, x)
    assert guide.nodes["a"]["value"].shape == (K, B)
    assert guide.nodes["z"]["value"].shape == (K, B, D)
    model.compute_log_prob()
    assert {site["log_prob"].shape for site in sample_sites(model).values()} == {(K, B)}


@KINDS
@SHARED
@pytest.mark.parametrize("particles", [False, True])
def test_sites_with_enumeration(kind: str, shared: bool, particles: bool) -> None:
    """The sum over addresses in a trace is the sum over addresses, one at a time."""
    vma, memory, x = model_of(kind), memory_of(kind, shared), targets(kind)
    guide = config_enumerate(vma.guide, "parallel")
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=K if particles else 1, vectorize_particles=particles)
    seen = {}
    assert torch.isfinite(elbo.differentiable_loss(vma.model, guide, memory, x))
    for model_trace, guide_trace in elbo._get_traces(vma.model, guide, (memory, x), {}):
        seen = {name: (site["value"].shape, site["log_prob"].shape) for name, site in sample_sites(model_trace).items()}
        assert guide_trace.nodes["a"]["infer"]["enumerate"] == "parallel"
    outer = (K,) if particles else ()
    assert seen["a"][0] == (S, *(1 for _ in outer), 1)
    assert seen["z"][0] == (S, *outer, B, D)
    assert seen["x"][1] == (S, *outer, B)


@KINDS
@SHARED
def test_without_targets_the_guide_is_the_prior(kind: str, shared: bool) -> None:
    vma, memory = model_of(kind), memory_of(kind, shared)
    batch = 1 if shared else B
    model, guide = traces(vma, memory, None)
    assert model.nodes["x"]["value"].shape == (batch, *EVENTS[kind])
    assert not model.nodes["x"]["is_observed"]
    for name in ("a", "z"):
        torch.testing.assert_close(model.nodes[name]["log_prob"], guide.nodes[name]["log_prob"])


def test_the_model_returns_the_observation() -> None:
    vma, memory, x = model_of("vectors"), memory_of("vectors"), targets("vectors")
    assert vma.model(memory, x) is x
    assert vma.guide(memory, x) is None
    assert vma.model(memory).shape == (1, 4)


@KINDS
def test_log_probabilities_are_those_of_the_parts(kind: str) -> None:
    vma, memory, x = model_of(kind), memory_of(kind), targets(kind)
    model, guide = traces(vma, memory, x)
    a, z = guide.nodes["a"]["value"], guide.nodes["z"]["value"]
    encoded, target = vma.encode(memory), vma.encode_x(x)
    template = encoded.read(a)
    expected = {
        "a": torch.full((B,), -math.log(S)),
        "z": vma.latent_prior(template).log_prob(z),
        "x": vma.likelihood(z, template).log_prob(x),
    }
    for name, log_prob in expected.items():
        torch.testing.assert_close(model.nodes[name]["log_prob"], log_prob)
    torch.testing.assert_close(guide.nodes["a"]["log_prob"], vma.address_guide(encoded, target).log_prob(a))
    torch.testing.assert_close(guide.nodes["z"]["log_prob"], vma.latent_guide(target, template).log_prob(z))


@KINDS
@SHARED
def test_dependencies(kind: str, shared: bool) -> None:
    """What pyro.render_model draws. (It needs graphviz, which may be absent; this is where it reads the graph from.)"""
    vma, memory, x = model_of(kind), memory_of(kind, shared), targets(kind)
    expected = {
        "prior_dependencies": {
            "a": {"a": set()},
            "z": {"z": set(), "a": set()},
            "x": {"x": set(), "a": set(), "z": set()},
        },
        "posterior_dependencies": {"a": {"a": set(), "z": set(), "x": set()}, "z": {"z": set(), "x": set()}},
    }
    assert get_dependencies(vma.model, (memory, x)) == expected
    guide = {"a": {"a": set()}, "z": {"z": set(), "a": set()}}
    assert get_dependencies(vma.guide, (memory, x))["prior_dependencies"] == guide


@KINDS
@SHARED
@pytest.mark.parametrize("parallel", [True, False])
def test_predictive(kind: str, shared: bool, parallel: bool) -> None:
    vma, memory = model_of(kind), memory_of(kind, shared)
    batch, event = 1 if shared else B, EVENTS[kind]
    drawn = Predictive(vma.model, num_samples=7, parallel=parallel)(memory)
    shapes = {name: tuple(value.shape) for name, value in drawn.items()}
    assert shapes == {"a": (7, batch), "z": (7, batch, D), "x": (7, batch, *event)}
    x = targets(kind)
    posterior = Predictive(vma.model, guide=vma.guide, num_samples=7, parallel=parallel)(memory, x)
    assert posterior["z"].shape == (7, B, D)
    again = Predictive(vma.model, posterior_samples={n: posterior[n] for n in "az"}, parallel=parallel)(memory, x)
    assert again["x"].shape == (7, B, *event)


@KINDS
@SHARED
def test_condition_and_block(kind: str, shared: bool) -> None:
    vma, memory, x = model_of(kind), memory_of(kind, shared), targets(kind)
    a = torch.tensor([4, 0, 2])
    conditioned = poutine.trace(poutine.condition(vma.model, data={"a": a})).get_trace(memory, x)
    assert conditioned.nodes["a"]["is_observed"]
    assert torch.equal(conditioned.nodes["a"]["value"], a)
    z = conditioned.nodes["z"]
    expected = vma.latent_prior(vma.encode(memory).read(a))
    torch.testing.assert_close(z["fn"].base_dist.loc, expected.base_dist.loc)
    blocked = poutine.trace(poutine.block(vma.model, hide=["z"])).get_trace(memory, x)
    assert set(sample_sites(blocked)) == {"a", "x"}


@KINDS
@SHARED
@pytest.mark.parametrize("mask", [False, True], ids=["", "masked"])
def test_stock_objectives_take_steps(kind: str, shared: bool, mask: bool) -> None:
    memory, x = memory_of(kind, shared, mask=mask), targets(kind)
    objectives: list[tuple[Any, Any]] = [
        (Trace_ELBO(), None),
        (Trace_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1), None),
        (TraceGraph_ELBO(), None),
        (TraceEnum_ELBO(max_plate_nesting=1), "parallel"),
        (VIMCO_ELBO(num_particles=K), None),
    ]
    for index, (elbo, strategy) in enumerate(objectives):
        vma = model_of(kind, name=f"vma{index}")
        guide = config_enumerate(vma.guide, strategy) if strategy else vma.guide
        before = weights(vma)
        loss = SVI(vma.model, guide, Adam({"lr": 1e-2}), loss=elbo).step(memory, x)
        assert math.isfinite(loss)
        if not isinstance(elbo, VIMCO_ELBO):
            moved = {name for name, parameter in vma.named_parameters() if not torch.equal(before[name], parameter)}
            assert any(name.startswith("address_guide") for name in moved)
            assert any(name.startswith("likelihood") for name in moved)
        assert all(torch.isfinite(parameter).all() for parameter in vma.parameters())


@KINDS
@SHARED
def test_renyi_evaluates(kind: str, shared: bool) -> None:
    vma, memory, x = model_of(kind), memory_of(kind, shared), targets(kind)
    elbo = RenyiELBO(alpha=0.0, num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        assert math.isfinite(elbo.loss(vma.model, vma.guide, memory, x))


@KINDS
@SHARED
@pytest.mark.parametrize("objective", [Trace_ELBO, VIMCO_ELBO])
def test_encoding_first_gives_the_same_step(kind: str, shared: bool, objective: Any) -> None:
    memory, x = memory_of(kind, shared), targets(kind)
    elbo = objective(num_particles=K, max_plate_nesting=1, vectorize_particles=True)
    first = model_of(kind)
    steps, after = [], []
    for encode in (False, True):
        vma = model_of(kind, name=f"encoded-{encode}")
        vma.load_state_dict(first.state_dict())
        svi = SVI(vma.model, vma.guide, Adam({"lr": 1e-2}), loss=elbo)
        pyro.set_rng_seed(1)
        steps.append(svi.step(vma.encode(memory) if encode else memory, x))
        after.append(weights(vma))
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)
    assert any(not torch.equal(after[0][name], value) for name, value in weights(first).items())
    for name in after[0]:  # gradients flow through the encoded memory
        torch.testing.assert_close(after[0][name], after[1][name], rtol=1e-3, atol=2e-4)


@KINDS
@SHARED
def test_encode_is_idempotent(kind: str, shared: bool) -> None:
    vma, memory = model_of(kind), memory_of(kind, shared, labels=True, mask=True)
    encoded = vma.encode(memory)
    assert isinstance(encoded, EncodedMemory)
    assert vma.encode(encoded) is encoded
    assert encoded.templates is memory.templates
    assert encoded.labels is memory.labels
    assert encoded.mask is memory.mask
    assert encoded.per_datapoint == memory.per_datapoint
    features = vma.template_encoder(memory.templates).features
    assert torch.equal(encoded.features, features)


@KINDS
def test_one_memory_each_equals_the_shared_one(kind: str) -> None:
    vma, shared, x = model_of(kind), memory_of(kind), targets(kind)
    each = Memory(shared.templates.expand(B, *shared.templates.shape).contiguous(), per_datapoint=True)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    losses = []
    for memory in (shared, each):
        pyro.set_rng_seed(2)
        losses.append(elbo.loss(vma.model, config_enumerate(vma.guide, "parallel"), memory, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@KINDS
def test_masked_slots_are_never_read(kind: str) -> None:
    vma, memory, x = model_of(kind), memory_of(kind, mask=True, labels=True), targets(kind)
    unused = set((~memory.mask).nonzero().flatten().tolist())
    for fn in (vma.model, vma.guide):
        drawn = [poutine.trace(fn).get_trace(memory, x).nodes["a"]["value"] for _ in range(40)]
        assert not unused & set(torch.cat(drawn).tolist())
    assert (vma.classify(memory, x)[:, 2] == 0).all()  # class 7 has only the last slot


# What a user asks of it


@KINDS
@SHARED
def test_generate(kind: str, shared: bool) -> None:
    vma, memory, event = model_of(kind), memory_of(kind, shared, mask=True), EVENTS[kind]
    batch = () if shared else (B,)
    assert vma.generate(memory).shape == (1, *batch, *event)
    for kwargs in ({}, {"address": 3}, {"mean": True}, {"address": 0, "mean": True}):
        drawn = []
        for _ in range(2):
            pyro.set_rng_seed(3)
            drawn.append(vma.generate(memory, 6, **kwargs))
        assert drawn[0].shape == (6, *batch, *event)
        assert torch.equal(*drawn)
        assert not drawn[0].requires_grad
    assert not torch.equal(drawn[0], vma.generate(memory, 6, **kwargs))
    if kind == "images":
        assert set(vma.generate(memory, 6).unique().tolist()) <= {0.0, 1.0}
        assert len(vma.generate(memory, 6, mean=True).unique()) > 2


def test_generate_reads_the_given_address() -> None:
    vma = model_of("vectors")
    templates = torch.randn(S, 4)
    memory, other = Memory(templates), Memory(templates + 10 * (torch.arange(S) != 2)[:, None])
    drawn = []
    for one in (memory, other):
        pyro.set_rng_seed(0)
        drawn.append(vma.generate(one, 6, address=2))
    torch.testing.assert_close(*drawn)


@KINDS
@SHARED
def test_complete(kind: str, shared: bool) -> None:
    vma, memory, x = model_of(kind), memory_of(kind, shared), targets(kind)
    mask = torch.rand_like(x) < 0.5
    for kwargs in ({}, {"mean": True}, {"num_particles": 1, "rounds": 1}):
        filled = []
        for _ in range(2):
            pyro.set_rng_seed(4)
            filled.append(vma.complete(memory, x, mask, **kwargs))
        assert filled[0].shape == x.shape
        assert torch.equal(filled[0][mask], x[mask])
        assert torch.equal(*filled)
        assert not filled[0].requires_grad
    everything = torch.ones_like(mask)
    assert torch.equal(vma.complete(memory, x, everything), x)
    row = torch.zeros(EVENTS[kind][-1], dtype=torch.bool)
    row[0] = True
    assert torch.equal(vma.complete(memory, x, row)[..., 0], x[..., 0])  # a mask broadcasts


@KINDS
def test_complete_ignores_what_was_not_observed(kind: str) -> None:
    vma, memory, x = model_of(kind), memory_of(kind), targets(kind)
    mask = torch.rand_like(x) < 0.5
    filled = []
    for junk in (0.0, float("nan"), 1e9):
        pyro.set_rng_seed(5)
        filled.append(vma.complete(memory, torch.where(mask, x, junk), mask))
    assert torch.isfinite(filled[0]).all()
    assert torch.equal(filled[0], filled[1])
    assert torch.equal(filled[0], filled[2])


def test_complete_finds_the_slot_that_explains_what_was_observed() -> None:
    """Slots far apart, a decoder that copies the template: only one slot fits the observed half."""

    class Copy(FlatEncoder):
        pass

    vma = VMA.for_vectors(4, latent_dim=D, num_features=4, hidden=(8,), template_encoder=Copy((4,)))
    network = vma.likelihood.network
    with torch.no_grad():
        vma.likelihood.log_scale.fill_(math.log(0.1))
        for layer in (network.join.first, network.join.second, network.network[1][0]):
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
        network.join.second.weight[:4] = torch.eye(4)
        network.network[1][0].weight[:, :4] = torch.eye(4)
        vma.address_guide.embed_memory.weight.zero_()  # an address guide that knows nothing
    memory = Memory(torch.tensor([[0.0, 0.0, 9.0, 0.0], [3.0, 3.0, 0.0, 9.0], [6.0, 6.0, 5.0, 5.0]]))
    x = memory.templates.clone()
    mask = torch.tensor([True, True, False, False])
    filled = vma.complete(memory, x, mask, num_particles=200)
    torch.testing.assert_close(filled, x, atol=0.6, rtol=0)


@KINDS
@SHARED
def test_classify(kind: str, shared: bool) -> None:
    vma, memory, x = model_of(kind), memory_of(kind, shared, labels=True), targets(kind)
    probs = vma.classify(memory, x)
    assert probs.shape == (B, 3)
    torch.testing.assert_close(probs.sum(-1), torch.ones(B))
    slots = vma.address_guide(vma.encode(memory), vma.encode_x(x)).probs
    torch.testing.assert_close(probs, torch.stack([slots[:, :2].sum(-1), slots[:, 2:4].sum(-1), slots[:, 4]], -1))
    assert not probs.requires_grad


@KINDS
@SHARED
def test_asking_leaves_the_parameters_alone(kind: str, shared: bool) -> None:
    vma, memory, x = model_of(kind), memory_of(kind, shared, labels=True), targets(kind)
    svi = SVI(vma.model, vma.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(memory, x)  # gradients and momentum are there to do harm
    before = weights(vma)
    svi.evaluate_loss(memory, x)
    vma.generate(memory, 3)
    vma.complete(memory, x, torch.rand_like(x) < 0.5, num_particles=4)
    vma.classify(memory, x)
    log_evidence(vma, memory, x, num_samples=2)
    Predictive(vma.model, num_samples=2)(memory)
    assert_same(before, vma)


# Side by side


def test_two_models_with_names_of_their_own_share_nothing() -> None:
    memory, x = memory_of("vectors"), targets("vectors")
    first, second = model_of("vectors", name="first"), model_of("vectors", name="second")
    one = SVI(first.model, first.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO())
    two = SVI(second.model, second.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO())
    two.step(memory, x)
    before, other = weights(second), weights(first)
    one.step(memory, x)
    assert_same(before, second)
    assert any(not torch.equal(other[name], parameter) for name, parameter in first.named_parameters())
    names = set(pyro.get_param_store().keys())
    assert {name.split("$$$")[0] for name in names} == {"first", "second"}
    assert len(names) == 2 * len(before)


def test_building_and_encoding_touch_no_parameter_store() -> None:
    vma, memory, x = model_of("vectors"), memory_of("vectors", labels=True), targets("vectors")
    vma.encode(memory)
    vma.classify(memory, x)
    vma.generate(memory, 2)
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("program", ["model", "guide"])
def test_the_parameters_of_another_model_that_exists_are_refused(program: str) -> None:
    memory, x = memory_of("vectors"), targets("vectors")
    first, second = model_of("vectors"), model_of("vectors")
    getattr(first, program)(memory, x)
    before = weights(second)
    with pytest.raises(RuntimeError, match=r"under the name 'vma'.*pyro.clear_param_store\(\).*name='vma2'"):
        getattr(second, program)(memory, x)
    assert_same(before, second)
    pyro.clear_param_store()
    getattr(second, program)(memory, x)


@pytest.mark.parametrize("hidden", [(8,), (9,), (8, 8)])
def test_a_cell_of_a_notebook_can_be_run_twice(hidden: tuple[int, ...]) -> None:
    memory, x = memory_of("vectors"), targets("vectors")
    for widths in ((8,), hidden):
        vma = VMA.for_vectors(4, latent_dim=D, num_features=6, hidden=widths)
        svi = SVI(vma.model, vma.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO())
        for _ in range(2):
            before = weights(vma)
            svi.step(memory, x)
            assert any(not torch.equal(before[name], parameter) for name, parameter in vma.named_parameters())
        store = pyro.get_param_store()
        assert set(store) == {f"vma$$${name}" for name, _ in vma.named_parameters()}
        assert all(store[f"vma$$${name}"] is parameter for name, parameter in vma.named_parameters())


def test_a_model_in_a_circle_of_references_gives_way() -> None:
    memory, x = memory_of("vectors"), targets("vectors")
    first = model_of("vectors")
    first.model(memory, x)
    circle: list[Any] = [first]
    circle.append(circle)
    del first, circle
    model_of("vectors").model(memory, x)


def test_what_two_models_share_stays_while_one_of_them_exists() -> None:
    memory, x = memory_of("vectors"), targets("vectors")
    first = model_of("vectors")
    first.model(memory, x)
    second = first.replace(address_guide=SimilarityGuide(6, embed_dim=5))
    with pytest.raises(RuntimeError, match="already holds another module's parameters"):
        second.model(memory, x)
    del first
    second.model(memory, x)  # the guide that is no more has given way
    with pytest.raises(RuntimeError, match="already holds another module's parameters"):
        model_of("vectors").model(memory, x)


def test_a_stored_state_is_restored(tmp_path: Path) -> None:
    memory, x = memory_of("vectors"), targets("vectors")
    first, second = model_of("vectors"), model_of("vectors")
    first.model(memory, x)
    store = pyro.get_param_store()
    store.save(str(tmp_path / "store"))
    store.clear()
    store.load(str(tmp_path / "store"))
    second.model(memory, x)
    assert_same(weights(first), second)
    assert all(store[f"vma$$${name}"] is parameter for name, parameter in second.named_parameters())


def test_a_stored_state_of_other_widths_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    memory, x = memory_of("vectors"), targets("vectors")
    store = pyro.get_param_store()
    VMA.for_vectors(4, latent_dim=D, num_features=6, hidden=(9,)).model(memory, x)
    store.save(str(tmp_path / "store"))
    store.clear()
    store.load(str(tmp_path / "store"))
    vma = VMA.for_vectors(4, latent_dim=D, num_features=6, hidden=(8,))
    before = weights(vma)
    with pytest.raises(RuntimeError, match="already holds another module's parameters"):
        vma.model(memory, x)
    assert_same(before, vma)


def test_a_trained_model_is_pickled_and_trained_on() -> None:
    vma, memory, x = model_of("images"), memory_of("images"), targets("images")
    svi = SVI(vma.model, vma.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO())
    svi.step(memory, x)
    assert_same(weights(vma), other := pickle.loads(pickle.dumps(vma)))
    assert repr(other) == repr(vma)
    before = weights(vma)
    svi.step(memory, x)
    assert any(not torch.equal(before[name], parameter) for name, parameter in vma.named_parameters())


def test_a_parameter_that_is_not_contiguous_is_refused() -> None:
    vma, memory, x = model_of("images"), memory_of("images"), targets("images")
    vma.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"is not contiguous in memory \(channels_last\?\).*Make it contiguous"):
        vma.model(memory, x)


def test_what_is_registered_is_what_is_trained() -> None:
    vma, memory, x = model_of("images"), memory_of("images"), targets("images")
    vma.model(memory, x)
    store = pyro.get_param_store()
    for name, parameter in vma.named_parameters():
        assert store[f"vma$$${name}"] is parameter


def test_parameters_that_the_guide_hides_are_trained_by_the_model() -> None:
    vma, memory, x = model_of("vectors"), memory_of("vectors"), targets("vectors")
    before = weights(vma)
    hidden = poutine.block(vma.guide, hide_types=["param"])
    SVI(vma.model, hidden, Adam({"lr": 1e-2}), loss=VIMCO_ELBO(2, max_plate_nesting=1)).step(memory, x)
    assert not any(torch.equal(before[name], value) for name, value in vma.named_parameters())


@pytest.mark.parametrize(
    ("objective", "times"), [(VIMCO_ELBO(2, max_plate_nesting=1), 1), (Trace_ELBO(max_plate_nesting=1), 2)]
)
def test_a_loss_checks_its_input_once(objective: Any, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vma, memory, x = model_of("vectors"), memory_of("vectors"), targets("vectors")
    checked: list[Tensor | None] = []
    monkeypatch.setattr(vma, "check", lambda memory, x: checked.append(x))
    for step in (1, 2):
        objective.loss(vma.model, vma.guide, memory, x)
        assert len(checked) == step * times  # Pyro's own objectives do not say where a loss begins
    with pyro.validation_enabled(False):
        objective.loss(vma.model, vma.guide, memory, x)
    assert len(checked) == 2 * times


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it
def test_a_compiled_model_takes_the_same_step() -> None:
    vma, memory, x = model_of("images"), memory_of("images"), targets("images")
    found = []
    for compiled in (False, True):
        if compiled:
            vma.compile(backend="aot_eager")  # the graphs that other backends compile, run one operation at a time
        vma.zero_grad()
        pyro.set_rng_seed(0)
        loss = VIMCO_ELBO(2, max_plate_nesting=1).loss_and_grads(vma.model, vma.guide, vma.encode(memory), x)
        found.append((loss, {name: p.grad.clone() for name, p in vma.named_parameters() if p.grad is not None}))
    parts = [part for part in vma.modules() if part._compiled_call_impl is not None]
    assert {type(part) for part in parts} == {type(vma.template_encoder), WarpDecoder}
    (loss, gradient), (compiled_loss, compiled_gradient) = found
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(compiled_gradient, gradient)
    with torch.no_grad():
        assert vma.reconstruct(memory, x).shape == x.shape
    copied = pickle.loads(pickle.dumps(vma))  # which is not compiled
    assert not any(part._compiled_call_impl for part in copied.modules())


def test_frozen_weights_stay_frozen() -> None:
    vma, memory, x = model_of("images"), memory_of("images"), targets("images")
    vma.template_encoder.requires_grad_(False)
    before = weights(vma)
    svi = SVI(vma.model, vma.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO())
    for _ in range(2):
        svi.step(memory, x)
    assert not any(p.requires_grad for p in vma.template_encoder.parameters())
    for name, parameter in vma.template_encoder.named_parameters():
        assert torch.equal(before[f"template_encoder.{name}"], parameter)
        assert f"vma$$$template_encoder.{name}" not in pyro.get_param_store()
    assert not torch.equal(before["address_guide.embed_memory.weight"], vma.address_guide.embed_memory.weight)


def test_encoders_of_its_own_for_targets() -> None:
    vma = model_of("vectors", x_encoder=MLPEncoder((4,), 6, (3,)))
    memory, x = memory_of("vectors"), targets("vectors")
    assert torch.equal(vma.encode_x(x).features, vma.x_encoder(x).features)
    SVI(vma.model, vma.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO()).step(memory, x)
    assert "vma$$$x_encoder.network.0.0.weight" in pyro.get_param_store()
    plain = model_of("vectors")
    assert torch.equal(plain.encode_x(x).features, plain.template_encoder(x).features)


# What it refuses


def nan_in(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[3] = float("nan")
    return x


def refusals(kind: str) -> list[tuple[Any, Any, str]]:
    memory, each, x, event = memory_of(kind), memory_of(kind, shared=False), targets(kind), EVENTS[kind]
    shown = ", ".join(map(str, event))
    wrong = (1, 5, 5) if kind == "images" else (3,)
    return [
        (memory.templates, x, r"memory: expected Memory, got .* Use Memory\(templates\)"),
        (Memory(torch.rand(S, *wrong)), x, r"memory: its templates .* hold events of shape"),
        (Memory(torch.rand(B, S, *event)), x, r"pass Memory\(..., per_datapoint=True\)"),
        (memory.to(torch.float64), x.double(), r"memory: the dtype .* torch.float64.* torch.float32.*memory.to\("),
        (memory, x[0], rf"x: expected shape \(B, {shown}.*One target alone is x\[None\]"),
        (memory, torch.rand(B, *wrong), rf"x: expected shape \(B, {shown}"),
        (memory, x[None], rf"x: expected shape \(B, {shown}"),
        (memory, x[:0], rf"x: expected shape \(B, {shown}.*got \(0, "),
        (memory, x.double(), r"x: its dtype torch.float64 is not that of the memory's templates, torch.float32"),
        (memory, x.long(), r"x: (its dtype|expected .* got a tensor of) torch.int64"),
        (each, targets(kind, B + 1), rf"x: got {B + 1} targets, but one memory for each of {B} datapoints"),
        (memory, nan_in(x), r"x: found NaN or infinite"),
        (memory, x / 0, r"x: found NaN or infinite"),
    ]


@KINDS
@pytest.mark.parametrize("index", range(13))
def test_what_does_not_fit_is_refused(kind: str, index: int) -> None:
    vma = model_of(kind)
    memory, x, message = refusals(kind)[index]
    before = weights(vma)
    svi = SVI(vma.model, vma.guide, Adam({"lr": 1.0}), loss=Trace_ELBO())
    for fn in (vma.check, vma.model, vma.guide, svi.step):
        with pytest.raises(ValueError, match=message):
            fn(memory, x)
    assert_same(before, vma)


def test_every_refusal_is_tried() -> None:
    assert len(refusals("vectors")) == len(refusals("images")) == 13


def test_binary_likelihoods_refuse_grey() -> None:
    vma, memory = model_of("images"), memory_of("images")
    with pytest.raises(ValueError, match=r"BernoulliDecoder expects binary values"):
        vma.model(memory, torch.rand(B, 1, 6, 5))


def test_half_precision_data_goes_with_autocast() -> None:
    vma, memory, x = model_of("images"), memory_of("images").to(torch.bfloat16), targets("images").bfloat16()
    with pytest.raises(ValueError, match=r"memory: the dtype"):
        vma.check(memory, x)
    with torch.autocast("cpu", torch.bfloat16):
        vma.check(memory, x)


@pytest.mark.parametrize("address", [2, 4, S, 99])
def test_generate_refuses_an_address_that_is_no_slot_in_use(address: int) -> None:
    for shared in (True, False):
        with pytest.raises(ValueError, match=rf"address: expected a slot in use out of 0..4, got {address}"):
            model_of("vectors").generate(memory_of("vectors", shared, mask=True), address=address)


def test_questions_with_wrong_arguments_are_refused() -> None:
    vma, memory, x = model_of("vectors"), memory_of("vectors"), targets("vectors")
    with pytest.raises(ValueError, match=r"n: expected a whole number in .*, got 0"):
        vma.generate(memory, 0)
    with pytest.raises(ValueError, match=r"memory: classify needs labels.*Memory\(templates, labels\)"):
        vma.classify(memory, x)
    with pytest.raises(ValueError, match=r"mask: expected a tensor of dtype Bool .* got .* torch.float32"):
        vma.complete(memory, x, torch.ones_like(x))
    with pytest.raises(ValueError, match=r"mask: \(5,\) does not broadcast with x \(3, 4\)"):
        vma.complete(memory, x, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="x: expected shape"):
        vma.complete(memory, x[:, :3], torch.ones(3, dtype=torch.bool))
    for name in ("num_particles", "rounds"):
        with pytest.raises(ValueError, match=rf"{name}: expected a whole number in .*, got 0"):
            vma.complete(memory, x, torch.ones(4, dtype=torch.bool), **{name: 0})


def test_parts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"template_encoder: .*\(5,\), the likelihood makes \(4,\)"):
        model_of("vectors", template_encoder=MLPEncoder((5,), 6))
    with pytest.raises(ValueError, match=r"x_encoder: .*\(5,\), the likelihood makes \(4,\)"):
        model_of("vectors", x_encoder=MLPEncoder((5,), 6))
    with pytest.raises(ValueError, match=r"latent_guide: its latent_dim is 2, the latent_prior's is 3"):
        model_of("vectors", latent_prior=StandardPrior(3))


# How it is made and shown


def test_for_images_takes_either_decoder() -> None:
    assert isinstance(model_of("images").likelihood.network, WarpDecoder)
    assert isinstance(model_of("images", decoder="conv").likelihood.network, ConvDecoder)
    with pytest.raises(ValueError, match=r"decoder: expected 'warp' or 'conv', got 'wrap'"):
        model_of("images", decoder="wrap")


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 1, 1), (3, 7, 5)])
@pytest.mark.parametrize("decoder", ["warp", "conv"])
def test_for_images_takes_any_size(shape: tuple[int, int, int], decoder: Any) -> None:
    vma = VMA.for_images(shape, D, 6, 4, decoder)
    memory, x = Memory(torch.rand(S, *shape)), torch.rand(B, *shape).round()
    assert math.isfinite(SVI(vma.model, vma.guide, Adam({}), loss=Trace_ELBO()).step(memory, x))
    assert (vma.event_shape, vma.latent_dim) == (shape, D)


@KINDS
def test_presets_take_any_part_in_place_of_theirs(kind: str) -> None:
    own = {"address_prior": LearnedPrior(6), "address_guide": SimilarityGuide(6, 3), "latent_prior": StandardPrior(D)}
    vma = model_of(kind, **own, name="mine")
    assert all(getattr(vma, name) is part for name, part in own.items())
    assert vma.name == "mine"
    assert isinstance(model_of(kind).address_prior, UniformPrior)


def test_without_an_encoder_the_template_is_its_own_features() -> None:
    vma = VMA(
        pv.UniformPrior(),
        pv.TemplatePrior(2, num_features=4),
        pv.GaussianDecoder(pv.parts.MLPDecoder((4,), 2, 4)),
        pv.SimilarityGuide(4),
        pv.GaussianGuide(2, num_features=4),
    )
    assert vma.encode_x(torch.rand(B, 4)).features.shape == (B, 4)


def test_repr_shows_parts_and_sizes() -> None:
    vma = model_of("images")
    text = repr(vma)
    total = sum(p.numel() for p in vma.parameters())
    assert text.startswith(f"VMA('vma': x (1, 6, 5), z (2,), {total:,} parameters\n")
    rows = text.splitlines()[1:-1]
    roles = ["p(a | M)", "p(z | m_a)", "p(x | z,m_a)", "q(a | M,x)", "q(z | x,m_a)", "features of m", "features of x"]
    starts = [row for row in rows if row[2:15].strip()]  # a long part goes on in further rows
    assert [row[2:15].strip() for row in starts] == roles
    shared = sum(p.numel() for p in vma.address_guide.parameters())
    assert repr(vma.address_guide) in starts[3]
    assert starts[3].endswith(f" {shared:,}")
    assert "as those of m" in starts[6]
    assert sum(int(row.split()[-1].replace(",", "")) for row in starts) == total
    assert {len(row) for row in starts} == {87}
    assert all(len(row) <= 88 for row in text.splitlines())


def test_the_likelihood_is_a_pyro_distribution() -> None:
    vma = model_of("images")
    p = vma.likelihood(torch.randn(B, D), vma.encode(memory_of("images")).read(torch.zeros(B, dtype=torch.long)))
    assert isinstance(p, dist.Distribution)
