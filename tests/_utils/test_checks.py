"""Arguments are checked by their annotations, and what can be converted is."""

from __future__ import annotations

import pickle
from typing import Literal

import numpy as np
import pyro
import pytest
import torch
from jaxtyping import Bool, Float, Int
from pyro.infer import SVI
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem._utils import checks
from pyro_vmem._utils.checks import Count, NonNegativeInt, Positive, Probability, checked


@checked
def entry(
    x: Float[Tensor, "B F"],
    labels: Int[Tensor, " B"] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
    k: Count = 1,
    seed: NonNegativeInt = 0,
    scale: Positive = 1.0,
    share: Probability = 0.5,
    sizes: tuple[int, ...] = (1,),
    kind: Literal["a", "b"] = "a",
    memory: pv.Memory | None = None,
) -> tuple[Tensor, int]:
    return x, k


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.long()}, r"^x: expected a tensor of dtype Float and shape \(B F\), got .*int64.* Use x\.float\(\)"),
        ({"x": X[0]}, r"^x: expected .* shape \(B F\), got a tensor of torch.float32 with shape \(3,\)"),
        ({"labels": torch.arange(3)}, r"^labels: .* or None, got .* shape \(3,\), where x has shape \(2, 3\)"),
        ({"labels": torch.ones(2)}, r"^labels: expected a tensor of dtype Int .* Use labels\.long\(\)"),
        ({"x": X.to("meta")}, r"^x: .* got a meta tensor"),
        ({"x": X.to_sparse()}, r"^x: .* got a sparse tensor .* Use x\.to_dense\(\)"),
        ({"x": None}, r"^x: expected a tensor .*, got None\. See help\(entry\)"),
        ({"k": 2.5}, r"^k: expected a whole number in \[1, 10,000,000\], got 2\.5"),
        ({"k": True}, r"^k: .* got True"),
        ({"k": 10**12}, r"^k: .* got 1000000000000"),
        ({"seed": -1}, r"^seed: expected a whole number of at least 0, got -1"),
        ({"scale": float("inf")}, r"^scale: expected a positive number, got inf"),
        ({"scale": float("nan")}, r"^scale: expected a positive number, got nan"),
        ({"share": 1.5}, r"^share: expected a number in \[0, 1\], got 1\.5"),
        ({"sizes": (1, 2, 3, "a")}, r"^sizes: expected tuple\[a whole number, ...\], got \(1, 2, 3, 'a'\)"),
        ({"kind": "c"}, r"^kind: expected 'a' or 'b', got 'c'"),
        ({"memory": pv.Memory}, r"^memory: expected pv.Memory .*, got the class Memory\. Write Memory\(\.\.\.\)"),
        ({"memory": X}, r"^memory: expected pv.Memory or None, got a tensor"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry(**({"x": X} | arguments))


def test_arrays_lists_and_numbers_of_numpy_are_taken() -> None:
    for x in (X.numpy(), X.double().numpy(), X.tolist()):
        taken, k = entry(x, labels=[0, 1], mask=np.array([True]), k=np.int64(3))
        assert torch.equal(taken, X)
        assert type(k) is int
        assert k == 3


def test_python_says_what_is_missing_or_too_much() -> None:
    with pytest.raises(TypeError, match=r"entry\(\) missing 1 required positional argument: 'x'"):
        entry()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'xs'"):
        entry(X, xs=1)  # type: ignore[call-arg]


def test_nothing_is_checked_without_validation() -> None:
    with pyro.validation_enabled(False):
        assert entry("anything", k=-1) == ("anything", -1)  # type: ignore[arg-type]


def test_checked_functions_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(pv.diagnostics.hit_rate)) is pv.diagnostics.hit_rate


def test_a_part_of_ones_own_is_checked() -> None:
    class Own(pv.UniformPrior):
        def __init__(self, sharpness: Positive = 1.0) -> None:
            super().__init__()

    with pytest.raises(ValueError, match=r"^sharpness: expected a positive number, got 0"):
        Own(0.0)


def models() -> dict[str, pv.VMA]:
    def learned(share: float = 0.1) -> dict[str, pv.Part]:
        guide = pv.DefensiveGuide(pv.TruncatedGuide(pv.SimilarityGuide(), k=2), share)
        return {
            "address_guide": guide,
            "templates": pv.ExtraTemplates(2, (1, 8, 8)),
            "address_prior": pv.ContentPrior(),
        }

    indexed = pv.IndexedGuide(pv.SimilarityGuide(), k=2)
    return {
        "plain": pv.VMA.for_images((1, 8, 8), width=4),
        "causal pixels, learned slots": pv.VMA.for_images((1, 8, 8), width=4, pixels="causal", **learned()),
        "an index": pv.VMA.for_images((1, 8, 8), width=4, decoder="conv", address_guide=indexed),
        "soft attention": pv.model.SoftAttentionVAE.like(pv.VMA.for_images((1, 8, 8), width=4)),
    }


@pytest.mark.parametrize("name", ["plain", "causal pixels, learned slots", "an index", "soft attention"])
def test_nothing_is_checked_within_a_training_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[object] = []
    fits = checks._fits
    vma = models()[name]
    memory = pv.Memory((torch.rand(5, 1, 8, 8) > 0.5).float(), labels=[0, 1, 2, 3, 4])
    if name == "an index":
        pv.model.index_memory(vma, memory)
    steps = [
        pv.Trainer(vma, objective, pv.TrainingConfig(steps=9)).step
        for objective in ("rws", pv.infer.RaoBlackwell_ELBO(1))
    ]
    svi = SVI(vma.model, vma.guide, pyro.optim.Adam({}), pv.infer.VIMCO_ELBO(4, backward=1))
    episode = pv.data.Episode(memory, memory.templates[:2])
    for step in steps:
        step(episode)  # the first of a run checks the program
    monkeypatch.setattr(checks, "_fits", lambda value, hint: looked_at.append(value) or fits(value, hint))
    for step in steps:
        step(episode)
    svi.step(memory, episode.x)
    assert looked_at == []
    pv.Memory(memory.templates)
    assert looked_at


def test_methods_take_arrays_and_lists_and_name_what_is_wrong() -> None:
    vma, array = pv.VMA.for_vectors(3), np.random.rand(2, 3)  # of float64
    memory = pv.Memory(torch.rand(4, 3))
    assert vma.encode_x(array).features.shape == (2, 64)
    assert vma.model(memory, array).shape == (2, 3)
    assert memory.read([0, 3]).shape == (2, 3)
    assert pv.diagnostics.diagnose(vma, memory, array, num_samples=2, per_slot=1).sizes["datapoint"] == 2
    assert np.isfinite(pv.infer.VIMCO_ELBO(2).loss(vma.model, vma.guide, memory, array))
    packed = pv.PackedMemory.pack(torch.ones(4, 3))
    packed.remove([1])
    for wrong, ask in (("slots", packed.remove), ("a", memory.read), ("x", vma.encode_x)):
        with pytest.raises(ValueError, match=f"^{wrong}: expected"):
            ask("none")
