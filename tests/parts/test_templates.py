"""Learned slots: they are parameters, they are read like given ones, and they are trained."""

from __future__ import annotations

import copy

import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

import pyro_vmem as pv
from pyro_vmem import VMA, ExtraTemplates, LearnedTemplates, Memory
from pyro_vmem.train import load_checkpoint

X, S, B, K = 4, 5, 3, 2
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-datapoint"])
LABELS, MASK = torch.tensor([0, 3, 3, 1, 1]), torch.tensor([True, True, False, True, False])


def given(shared: bool = True, labels: bool = True, mask: bool = True) -> Memory:
    leading = (S,) if shared else (B, S)
    return Memory(
        torch.rand(*leading, X),
        LABELS.expand(leading) if labels else None,
        MASK.expand(leading) if mask else None,
        per_datapoint=not shared,
    )


def vma_with(templates: pv.Templates | None) -> VMA:
    return VMA.for_vectors(X, latent_dim=2, num_features=6, hidden=(8,), templates=templates)


@SHARED
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_extra_slots_come_after_the_given_ones(shared: bool, labels: bool, mask: bool) -> None:
    part, memory = ExtraTemplates(K, (X,)), given(shared, labels, mask)
    both = part(memory)
    leading = () if shared else (B,)
    assert (both.num_slots, both.batch_shape, both.per_datapoint) == (S + K, leading, not shared)
    assert torch.equal(both.templates[..., :S, :], memory.templates)
    assert torch.equal(both.templates[..., S:, :], part.values.expand(*leading, K, X))
    if labels:
        assert torch.equal(both.labels, torch.cat([LABELS, torch.tensor([-1, -1])]).expand(*leading, -1))
    if mask:
        assert torch.equal(both.mask, torch.cat([MASK, torch.tensor([True, True])]).expand(*leading, -1))
    assert (both.labels is None, both.mask is None) == (not labels, not mask)


@SHARED
def test_a_learned_memory_is_the_same_whatever_is_given(shared: bool) -> None:
    part, memory = LearnedTemplates(K, (X,)), given(shared)
    learned = part(memory)
    assert learned.templates is part.values
    assert not learned.per_datapoint
    assert learned.mask is None
    assert torch.equal(learned.labels, torch.tensor([-1, -1]))
    assert part(given(labels=False)).labels is None


def test_learned_slots_are_read_as_if_they_were_given(float64: None) -> None:
    """A model with learned slots is the model without them, given them."""
    for name, part in (("learned", LearnedTemplates(K, (X,))), ("extra", ExtraTemplates(K, (X,)))):
        vma, memory, x = vma_with(part).replace(name=name), given(), torch.rand(B, X)
        plain, whole = vma.replace(templates=None, name=f"{name}-plain"), part(memory)
        assert torch.equal(vma.classify(memory, x), plain.classify(whole, x))
        bounds = []
        for model, m in ((vma, memory), (plain, whole), (vma, vma.encode(memory))):
            torch.manual_seed(0)
            bounds.append(pv.infer.VIMCO_ELBO(3, max_plate_nesting=1).loss(model.model, model.guide, m, x))
        assert bounds[0] == bounds[1] == bounds[2]
        torch.manual_seed(0)
        drawn = vma.generate(memory, 4)
        torch.manual_seed(0)
        assert torch.equal(drawn, plain.generate(whole, 4))


@SHARED
def test_a_learned_slot_can_be_read_by_its_address(shared: bool) -> None:
    vma, memory = vma_with(ExtraTemplates(K, (X,))), given(shared)
    drawn = vma.generate(memory, 3, address=S + K - 1)
    assert drawn.shape == ((3, X) if shared else (3, B, X))
    with pytest.raises(ValueError, match=r"address: expected a slot in use out of 0\.\.6, got 7"):
        vma.generate(memory, 3, address=S + K)


@pytest.mark.parametrize("part", [LearnedTemplates, ExtraTemplates])
def test_they_are_trained(part: type[pv.Templates]) -> None:
    """Where no given template is of use, the learned ones move to where the data is."""
    vma = vma_with(part(K, (X,)))
    memory, x = Memory(torch.zeros(1, X)), torch.cat([torch.full((20, X), 3.0), torch.full((20, X), -3.0)])
    before = vma.templates.values.detach().clone()
    svi = SVI(vma.model, vma.guide, Adam({"lr": 1e-2}), loss=pv.infer.VIMCO_ELBO(4))
    losses = [svi.step(memory, x) / len(x) for _ in range(60)]
    assert (vma.templates.values - before).abs().min() > 1e-3
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    step = svi.step(vma.encode(memory), x) / len(x)  # gradients flow through what was encoded before
    assert step < losses[0] - 1


def test_the_trainer_trains_and_keeps_them(tmp_path) -> None:
    train, _ = pv.data.glyphs(size=12, drawings=12).split(seed=0)
    vma = VMA.for_images((1, 12, 12), latent_dim=4, width=4, templates=ExtraTemplates(K, (1, 12, 12)))
    before = copy.deepcopy(vma.templates.values)
    episodes = pv.data.EpisodeSampler(train, n_way=4, k_shot=1, n_query=1)
    pv.fit(vma, episodes, steps=2, out=tmp_path, validation=episodes, validate_every=1, progress=False)
    assert not torch.equal(vma.templates.values, before)
    again = pv.load(tmp_path)
    assert again.spec() == vma.spec()
    assert "templates.values" in load_checkpoint(tmp_path / "best.safetensors")[0]
    assert torch.equal(again.templates.values, vma.templates.values)


def test_the_shape_is_checked() -> None:
    with pytest.raises(
        ValueError, match=r"templates: it is for observations of shape \(5,\), the likelihood makes \(4,\)"
    ):
        vma_with(ExtraTemplates(K, (5,)))


def test_repr_shows_them_if_there_are_any() -> None:
    assert "slots of M    ExtraTemplates(num_slots=2, event_shape=(4,))" in repr(vma_with(ExtraTemplates(K, (X,))))
    assert "slots of M" not in repr(vma_with(None))


def test_a_class_with_the_label_of_learned_slots_is_refused() -> None:
    memory = Memory(torch.rand(3, X), labels=torch.tensor([-1, 0, 1]))
    with pytest.raises(ValueError, match=r"^memory: a slot has the label -1, .* Number its classes from 0 on\."):
        vma_with(ExtraTemplates(K, (X,))).classify(memory, torch.rand(2, X))
    assert vma_with(None).classify(memory, torch.rand(2, X)).shape == (2, 3)
