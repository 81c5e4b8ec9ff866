"""Completion: draws of what is not seen given what is, where that distribution is known, and where slots are alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem.memory.packed import PackedStore

X, D, SLOTS, DRAWS = 4, 2, 5, 3000


def conditional(
    model: pv.LinearGaussianMemory, memory: pv.Memory, x: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The slots' probabilities given what is known, and mean and second moment of what is not, by linear algebra."""
    t = memory.templates
    mean = model.latent_mean(t) @ model.loading.mT + t @ model.skip.mT + model.offset
    scaled = model.loading * model.latent_log_scale.exp()
    covariance = scaled @ scaled.mT + (2 * model.log_noise).exp() * torch.eye(X)
    oo, mo = covariance[known][:, known], covariance[~known][:, known]
    seen = torch.distributions.MultivariateNormal(mean[:, known], oo)
    slots = seen.log_prob(x[known]).softmax(0)
    means = mean[:, ~known] + (x[known] - mean[:, known]) @ torch.linalg.solve(oo, mo.mT)
    left = covariance[~known][:, ~known] - mo @ torch.linalg.solve(oo, mo.mT)
    second = means.unsqueeze(-1) * means.unsqueeze(-2) + left
    return slots, slots @ means, (slots[:, None, None] * second).sum(0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("packed", [False, True])
def test_draws_have_the_known_conditional_distribution(packed: bool) -> None:
    model = pv.LinearGaussianMemory(X, D, noise=0.4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    templates = (torch.rand(SLOTS, X, generator=torch.Generator().manual_seed(2)) > 0.5).double()
    memory = pv.PackedMemory.pack(templates) if packed else pv.Memory(templates)
    known = torch.tensor([True, False, True, False])
    x = model.offset + model.skip.sum(-1) / 2
    slots, mean, second = conditional(model, memory, x, known)
    assert slots.max() < 0.9  # more than one slot explains what is seen
    drawn = model.vma(exact=True).complete(memory, x.expand(DRAWS, X), known, num_particles=100)[:, ~known]
    products = drawn.unsqueeze(-1) * drawn.unsqueeze(-2)
    for found, exact in ((drawn, mean), (products, second)):
        error = found.std(0) / DRAWS**0.5
        assert bool(((found.mean(0) - exact).abs() < 5 * error + 0.02).all())


def copying() -> pv.VMA:
    """A model whose decoder copies the template, with a guide that is sure of the wrong slot for blank targets."""
    model = pv.LinearGaussianMemory(X, D, noise=0.1)
    with torch.no_grad():
        model.loading.zero_()
        model.offset.zero_()
        model.skip.copy_(torch.eye(X))
    guide = pv.SimilarityGuide(X, temperature=0.01)
    return model.vma(address_guide=guide).requires_grad_(False)


def test_slots_that_explain_it_equally_well_are_drawn_equally_often() -> None:
    memory = pv.Memory(torch.tensor([[1.0, 0, 3, 3], [1, 0, -3, -3], [0, 1, 9, 9]]))
    x, known = torch.tensor([1.0, 0, 0, 0]).expand(400, X), torch.tensor([True, True, False, False])
    drawn = copying().complete(memory, x, known)[:, 2:].mean(-1)
    first, second = ((drawn - value).abs() < 0.5 for value in (3, -3))
    assert bool((first | second).all())
    assert 140 < int(first.sum()) < 260  # six standard deviations around the half


def test_a_million_packed_templates_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = pv.IndexedGuide(pv.SimilarityGuide(8, 4), k=8)
    vma = pv.VMA.for_vectors(8, num_features=8, hidden=(8,), address_guide=guide)
    memory = pv.PackedMemory.pack((torch.rand(50_000, 8) > 0.5).float())
    memory.index = pv.memory.ExactIndex(torch.randn(50_000, 4))
    read, counts = PackedStore.read, [0]

    def counted(store: PackedStore, a: Tensor) -> Tensor:
        counts.append(a.numel())
        return read(store, a)

    monkeypatch.setattr(PackedStore, "read", counted)
    filled = vma.complete(memory, torch.rand(3, 8), torch.rand(3, 8) > 0.5)
    assert filled.shape == (3, 8)
    assert 0 < sum(counts) < 1000
