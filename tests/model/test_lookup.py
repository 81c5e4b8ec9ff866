"""A lookup says what guide and prior say, for dense and sparse guides, shared memories and one per datapoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import pyro_vmem as pv


def test_a_lookup_is_the_guide_beside_the_prior() -> None:
    vma = pv.VMA.for_vectors(5)
    memory, x = pv.Memory(torch.randn(7, 5), labels=torch.arange(7) + 10), torch.randn(3, 5)
    found = vma.lookup(memory, x, k=2)
    with torch.no_grad():
        q = vma.address_guide(vma.encode(memory), vma.encode_x(x)).probs
    best = q.topk(2)
    assert torch.equal(found.slots, best.indices)
    torch.testing.assert_close(found.probs, best.values)
    torch.testing.assert_close(found.gain, (q * (7 * q).log()).sum(-1))
    assert found.labels is not None
    assert torch.equal(found.labels, found.slots + 10)


def test_a_sparse_guide_names_no_more_slots_than_it_keeps() -> None:
    vma = pv.VMA.for_vectors(5, address_guide=pv.TruncatedGuide(pv.SimilarityGuide(64), k=2))
    memory, x = pv.Memory(torch.randn(7, 5)), torch.randn(4, 5)
    found = vma.lookup(memory, x, k=5)
    assert found.slots.shape == (4, 2)
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(4))
    # KL of a distribution on k slots to the uniform one: log S less its entropy
    torch.testing.assert_close(found.gain, math.log(7) - found.q.entropy())


def test_one_memory_per_datapoint() -> None:
    vma = pv.VMA.for_vectors(5)
    labels = torch.arange(12).reshape(3, 4)
    memory, x = pv.Memory(torch.randn(3, 4, 5), labels=labels), torch.randn(3, 5)
    found = vma.lookup(memory, x)
    assert found.labels is not None
    assert torch.equal(found.labels, found.slots + 4 * torch.arange(3).unsqueeze(-1))
    with pytest.raises(ValueError, match="memory: plot needs"):
        found.plot(Figure())


def test_it_prints_as_a_table() -> None:
    vma = pv.VMA.for_vectors(5)
    memory = pv.Memory(torch.randn(4, 5), labels=torch.arange(4))
    lines = repr(vma.lookup(memory, torch.randn(12, 5), k=1)).splitlines()
    assert lines[0].startswith("Lookup(12 targets in 4 slots; information gain ")
    assert lines[0].endswith("log 4 = 1.39)")
    assert len(lines) == 2 + 10 + 1
    assert lines[-1].endswith("2 more")


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_plot_marks_the_right_slots_only_where_classes_are_given(with_labels: bool) -> None:
    vma = pv.VMA.for_images((1, 8, 8), latent_dim=2, num_features=8, width=4)
    memory = pv.Memory(torch.rand(4, 1, 8, 8).round(), labels=torch.arange(4))
    found = vma.lookup(memory, torch.rand(3, 1, 8, 8).round())
    figure = found.plot(Figure(), labels=torch.arange(3) if with_labels else None, max_targets=2)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert ("right class" in texts) == with_labels
    assert len(figure.axes[0].images) == 2 * 5


def test_posterior_predictive_of_the_reference_is_the_known_mixture() -> None:
    """Under an exact guide, the mean of x' given x is known for each slot: sum_a p(a | x) E[x' | x, a]."""
    generator = torch.Generator().manual_seed(0)
    model = pv.LinearGaussianMemory(dim=3, latent_dim=2, generator=generator).double()
    vma = model.vma(exact=True)
    memory = pv.Memory(torch.randn(4, 3, generator=generator, dtype=torch.double))
    x = torch.randn(2, 3, generator=generator, dtype=torch.double)
    torch.manual_seed(1)
    drawn = vma.posterior_predictive(memory, x, n=20_000, mean=True)
    with torch.no_grad():
        encoded = vma.encode(memory)
        q = vma.lookup(memory, x).q.probs
        each = []
        for slot in range(4):
            template = encoded.read(torch.full((2,), slot))
            z = model.latent_posterior(x, template.raw).mean
            each.append(vma.likelihood(z, template).mean)
    expected = (q.mT.unsqueeze(-1) * torch.stack(each)).sum(0)
    error = (drawn.mean(0) - expected) / (drawn.std(0) / 20_000**0.5)
    assert error.abs().max() < 4.5
    assert vma.reconstruct(memory, x).shape == x.shape


@pytest.mark.parametrize(("call", "name"), [("lookup", "k"), ("posterior_predictive", "n")])
def test_counts_below_one_are_refused(call: str, name: str) -> None:
    vma = pv.VMA.for_vectors(5)
    with pytest.raises(ValueError, match=rf"^{name}: "):
        getattr(vma, call)(pv.Memory(torch.randn(4, 5)), torch.randn(2, 5), **{name: 0})


def test_a_model_of_any_loop_is_saved_and_loaded(tmp_path: Path) -> None:
    vma = pv.VMA.for_vectors(5, address_guide=pv.PairwiseGuide(64))
    vma.save(tmp_path / "mine.safetensors")
    loaded = pv.load(tmp_path / "mine.safetensors")
    assert repr(loaded) == repr(vma)
    assert all(torch.equal(a, b) for a, b in zip(vma.parameters(), loaded.parameters(), strict=True))
