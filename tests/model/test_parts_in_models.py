"""Every swappable part in a whole model: it trains under every objective and answers every question."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import ELBO, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem import VMA, Memory
from pyro_vmem.parts import FlatEncoder, MLPDecoder

X, D, S, B, LEVELS = 4, 3, 5, 3, 3
F = X  # the features are the observation: a small network's may all be zero

SWAPS: dict[str, Callable[[], dict[str, Any]]] = {
    "defaults": dict,
    "ContentPrior": lambda: {"address_prior": pv.ContentPrior(F, 8)},
    "ClassBalancedPrior": lambda: {"address_prior": pv.ClassBalancedPrior()},
    "TemperedPrior": lambda: {"address_prior": pv.TemperedPrior(pv.LearnedPrior(F), 2.0)},
    "PairwiseGuide": lambda: {"address_guide": pv.PairwiseGuide(F, 8)},
    "DefensiveGuide": lambda: {"address_guide": pv.DefensiveGuide(pv.SimilarityGuide(F), 0.1, pv.LearnedPrior(F))},
    "IndexedGuide": lambda: {"address_guide": pv.IndexedGuide(pv.SimilarityGuide(F), k=3)},
    "TruncatedGuide": lambda: {"address_guide": pv.TruncatedGuide(pv.PairwiseGuide(F, 8), k=3)},
    "FullCovariancePrior": lambda: {"latent_prior": pv.FullCovariancePrior(D, F, (8,))},
    "FullCovarianceGuide": lambda: {"latent_guide": pv.FullCovarianceGuide(D, F, (8,))},
    "DiscretisedLogisticDecoder": lambda: {
        "likelihood": pv.DiscretisedLogisticDecoder(MLPDecoder((X,), D, F, (8,)), LEVELS, 0.3)
    },
    "CategoricalDecoder": lambda: {"likelihood": pv.CategoricalDecoder(MLPDecoder((LEVELS * X,), D, F, (8,)), LEVELS)},
    "ExtraTemplates": lambda: {"templates": pv.ExtraTemplates(2, (X,))},
    "LearnedTemplates": lambda: {"templates": pv.LearnedTemplates(6, (X,))},
}
if importlib.util.find_spec("zuko") is not None:
    SWAPS |= {
        "FlowPrior": lambda: {"latent_prior": pv.FlowPrior(D, F, (8,))},
        "FlowGuide": lambda: {"latent_guide": pv.FlowGuide(D, F, (8,))},
    }
OBJECTIVES: dict[str, Callable[[], ELBO]] = {
    "VIMCO": lambda: pv.infer.VIMCO_ELBO(3),
    "RWS": lambda: pv.infer.RWS_ELBO(3),
    "VIMCO-dreg": lambda: pv.infer.VIMCO_ELBO(3, dreg=True),
    "IWAE": lambda: pv.infer.IWAE_ELBO(3),
    "Reinforce": lambda: pv.infer.Reinforce_ELBO(3),
    "RaoBlackwell": lambda: pv.infer.RaoBlackwell_ELBO(k=2),
    "TraceEnum": TraceEnum_ELBO,
}
EACH = pytest.mark.parametrize("name", SWAPS)
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-datapoint"])


def model_of(name: str) -> tuple[VMA, list[torch.nn.Module]]:
    """A small model with a part swapped in, and that part."""
    swaps = SWAPS[name]()
    return VMA.for_vectors(X, D, F, (8,), template_encoder=FlatEncoder((X,)), **swaps), list(swaps.values())


def memory_of(shared: bool = True) -> Memory:
    leading = (S,) if shared else (B, S)
    labels, mask = torch.tensor([7, 0, 7, 2, 0]), torch.tensor([True, True, True, False, True])
    return Memory(levels(*leading, X), labels.expand(leading), mask.expand(leading), per_datapoint=not shared)


def levels(*shape: int) -> Tensor:
    """Values that every likelihood here gives a probability to."""
    return torch.randint(LEVELS, shape).to(torch.get_default_dtype()) / (LEVELS - 1)


@EACH
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training(name: str, objective: str) -> None:
    vma, swapped = model_of(name)
    memory, x = memory_of(), levels(B, X)
    guide = config_enumerate(vma.guide, "parallel", expand=True) if objective == "TraceEnum" else vma.guide
    before = {name: p.detach().clone() for name, p in vma.named_parameters()}
    svi = SVI(vma.model, guide, Adam({"lr": 1e-2}), loss=OBJECTIVES[objective]())
    assert math.isfinite(svi.step(memory, x))
    parameters = {id(p) for part in swapped for p in part.parameters()}
    for parameter_name, parameter in vma.named_parameters():
        assert torch.isfinite(parameter).all(), parameter_name
        if id(parameter) in parameters:
            assert not torch.equal(before[parameter_name], parameter), parameter_name


@EACH
@SHARED
def test_the_sum_over_addresses_is_the_mean_of_samples_of_them(name: str, shared: bool, float64: None) -> None:
    """Enumerated and sampled addresses give one bound, in expectation: what an enumerated dim disturbs would tell."""
    vma, _ = model_of(name)
    memory, x = memory_of(shared), levels(B, X)
    guide = config_enumerate(vma.guide, "parallel", expand=True)

    def draws(elbo: ELBO, guide: Callable[..., None]) -> Tensor:
        return torch.tensor([elbo.loss(vma.model, guide, memory, x) for _ in range(5)])

    with torch.no_grad():
        summed = draws(TraceEnum_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1), guide)
        sampled = draws(Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1), vma.guide)
    error = (summed.var() / len(summed) + sampled.var() / len(sampled)).sqrt()
    assert (summed.mean() - sampled.mean()).abs() < 8 * error  # Student's t with few degrees of freedom


@EACH
@SHARED
def test_questions(name: str, shared: bool) -> None:
    vma, _ = model_of(name)
    memory, x = memory_of(shared), levels(B, X)
    classes = vma.encode(memory).labels.unique()
    assert vma.generate(memory, 2).shape == ((2, X) if shared or name == "LearnedTemplates" else (2, B, X))
    assert torch.isfinite(vma.generate(memory, 1, address=1, mean=True)).all()
    mask = torch.arange(X) < 2
    filled = vma.complete(memory, x, mask, num_particles=8, rounds=2)
    assert torch.equal(filled[:, :2], x[:, :2])
    vma.likelihood.check(filled)
    assert torch.isfinite(vma.complete(memory, x, mask, num_particles=8, mean=True)).all()
    probs = vma.classify(memory, x)
    assert probs.shape == (B, len(classes))
    torch.testing.assert_close(probs.sum(-1), torch.ones(B))
    drawn = Predictive(vma.model, num_samples=4)(memory)
    assert drawn["x"].shape[0] == 4


@EACH
def test_the_spec_builds_the_same_model(name: str) -> None:
    vma, _ = model_of(name)
    spec = json.loads(json.dumps(vma.spec()))
    again = pv.build(spec)
    assert again.spec() == vma.spec()
    assert repr(again) == repr(vma)
    again.load_state_dict(vma.state_dict())
    memory, x = memory_of(), levels(B, X)
    assert torch.equal(again.classify(memory, x), vma.classify(memory, x))


@EACH
def test_half_precision(name: str) -> None:
    vma, _ = model_of(name)
    memory, x = memory_of(), levels(B, X)
    elbo = pv.infer.VIMCO_ELBO(3, max_plate_nesting=1)
    losses = []
    for enabled in (False, True):
        pyro.set_rng_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = elbo.differentiable_loss(vma.model, vma.guide, memory, x)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.5)
    assert all(torch.isfinite(p.grad).all() for p in vma.parameters() if p.grad is not None)


@EACH
def test_evidence_and_diagnosis(name: str) -> None:
    vma, _ = model_of(name)
    memory, x = vma.encode(memory_of()), levels(B, X)
    evidence = pv.diagnostics.log_evidence(vma, memory, x, num_samples=20)
    assert torch.isfinite(torch.as_tensor(evidence)).all()
    result = pv.diagnostics.diagnose(vma, memory, x, num_samples=20, progress=False)
    assert result.sizes["datapoint"] == B
