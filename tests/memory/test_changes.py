"""Memories and indexes that change: nothing is copied, all or nothing is done, and copies are left alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem.memory import AddressIndex, ExactIndex, FaissIndex, Hits
from pyro_vmem.memory.growing import Growing
from pyro_vmem.parts import MLPEncoder

S = 20
KINDS = ["exact"] + ["ivf", "hnsw"] * (importlib.util.find_spec("faiss") is not None)


def binary(*shape: int) -> Tensor:
    return (torch.rand(*shape) > 0.5).float()


def packed(labels: torch.dtype | None = torch.uint8) -> pv.PackedMemory:
    """A packed memory with an index, and labels."""
    memory = pv.PackedMemory.pack(binary(S, 6), labels=None if labels is None else torch.arange(S).to(labels))
    memory.index = ExactIndex(torch.randn(S, 3))
    return memory


def state(memory: pv.PackedMemory) -> list[Any]:
    """All that a change could touch."""
    index = memory.index
    assert index is not None
    values = [memory.templates, memory.labels, memory.mask, index.keys, index.present]
    return [memory.num_slots, len(index), *(None if v is None else v.clone() for v in values)]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b for a, b in zip(one, other, strict=True)
    )


# What was encoded goes with the weights it was encoded with


def test_what_was_encoded_as_it_was_read_is_encoded_again_when_the_weights_have_changed() -> None:
    encoder, a = MLPEncoder((6,), 4), torch.tensor([3, 1])
    memory = pv.EncodedMemory(pv.PackedMemory.pack(binary(S, 6)), encoder)
    before, all_before = memory.read(a).features, memory.features
    with torch.no_grad():
        [*encoder.parameters()][-1].add_(1.0)  # one of them is enough
    fresh = encoder(memory.memory.templates).features
    assert not torch.equal(before, fresh[a])
    assert not torch.equal(all_before, fresh)
    torch.testing.assert_close(memory.read(a).features, fresh[a])
    torch.testing.assert_close(memory.features, fresh)


def test_an_optimizers_step_is_a_change_of_the_weights() -> None:
    encoder, a = MLPEncoder((6,), 4), torch.tensor([3, 1])
    memory = pv.EncodedMemory(pv.PackedMemory.pack(binary(S, 6)), encoder)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.1, fused=True)
    memory.read(a).features.sum().backward()
    optimizer.step()
    torch.testing.assert_close(memory.read(a).features, encoder(memory.memory.read(a)).features)


# Growing


def test_rows_that_are_there_are_not_copied() -> None:
    rows = Growing(torch.zeros(1000, 3)).with_room()
    places = set()
    for _ in range(100):
        rows = rows.append(torch.ones(1, 3))
        places.add(rows.values.data_ptr())
    assert len(places) == 1
    assert rows.values.sum() == 300


def test_one_that_was_appended_to_twice_gives_two() -> None:
    first = Growing(torch.zeros(2, 1)).with_room()
    second, third = first.append(torch.ones(1, 1)), first.append(torch.full((1, 1), 5.0))
    assert [rows.values.flatten().tolist() for rows in (first, second, third)] == [[0, 0], [0, 0, 1], [0, 0, 5]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_more_or_less_copies_no_keys(kind: Any) -> None:
    index: AddressIndex = (
        ExactIndex(torch.randn(5000, 4)) if kind == "exact" else FaissIndex(torch.randn(5000, 4), kind)
    )
    place = index.keys.data_ptr()
    for _ in range(20):
        index.remove(index.add(torch.randn(1, 4))[:0])
    index.remove(torch.tensor([4, 9]))
    assert index.keys.data_ptr() == place
    assert (index.num_slots, len(index)) == (5020, 5018)


# All or nothing

NEW = binary(2, 6)
REFUSED: dict[str, tuple[Callable[[pv.PackedMemory], Any], type[Exception], str]] = {
    "labels of a column": (lambda m: m.add(NEW, torch.ones(2, 1).byte(), torch.randn(2, 3)), ValueError, r"\(2, 1\)"),
    "labels that are floats": (lambda m: m.add(NEW, torch.ones(2), torch.randn(2, 3)), ValueError, "labels: .*float32"),
    "a label too large": (
        lambda m: m.add(NEW, torch.tensor([3, 300]), torch.randn(2, 3)),
        ValueError,
        r"labels: 3\.\.300 do not fit into the memory's labels, torch.uint8",
    ),
    "a label below": (lambda m: m.add(NEW, torch.tensor([3, -1]), torch.randn(2, 3)), ValueError, "do not fit"),
    "keys of another length": (lambda m: m.add(NEW, torch.ones(2).byte(), torch.randn(2, 4)), ValueError, "keys: "),
    "keys that are NaN": (lambda m: m.add(NEW, torch.ones(2).byte(), torch.full((2, 3), torch.nan)), ValueError, "NaN"),
    "templates of another shape": (lambda m: m.add(binary(2, 5), torch.ones(2).byte()), ValueError, "templates: "),
    "a slot before the first": (lambda m: m.remove(torch.tensor([-1])), IndexError, r"slots: expected 0\.\.19, got -1"),
    "a slot past the last": (lambda m: m.remove(torch.tensor([3, S])), IndexError, r"slots: expected 0\.\.19"),
    "all slots": (lambda m: m.remove(torch.arange(S)), ValueError, "no slot would be left"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_changes_nothing(what: str) -> None:
    call, error, message = REFUSED[what]
    memory = packed()
    before = state(memory)
    with pytest.raises(error, match=message):
        call(memory)
    assert same(before, state(memory))


@pytest.mark.parametrize("first", ["the copy", "the original"])
def test_a_copy_and_its_original_have_their_own_slots(first: str) -> None:
    original = packed()
    copy = original.to(torch.float64)
    changed, other = (copy, original) if first == "the copy" else (original, copy)
    before = state(other)
    changed.add(NEW.to(changed.dtype), torch.tensor([1, 2]), torch.randn(2, 3))
    changed.remove(torch.tensor([0, S]))
    assert same(before, state(other))
    assert changed.index is not None
    assert (changed.num_slots, changed.index.num_slots, len(changed.index)) == (S + 2, S + 2, S)
    other.add(1 - NEW.to(other.dtype), torch.tensor([5, 6]), torch.randn(2, 3))  # which overwrites nothing
    assert torch.equal(changed.read(torch.tensor([S, S + 1])), NEW.to(changed.dtype))
    assert changed.labels is not None
    assert changed.labels[S:].tolist() == [1, 2]


# Searches that find less than was asked for


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_that_is_no_number_is_refused(kind: Any) -> None:
    index: AddressIndex = ExactIndex(torch.randn(50, 4)) if kind == "exact" else FaissIndex(torch.randn(50, 4), kind)
    with pytest.raises(ValueError, match="queries: found NaN"):
        index.search(torch.tensor([0.0, torch.nan, 0.0, 0.0]), 2)


def test_what_was_not_found_is_filled_with_other_slots() -> None:
    hits = Hits(torch.zeros(3, 3), torch.tensor([[5, -1, -1], [1, 0, -1], [2, 3, 4]]))
    slots, missing = hits.filled(6)
    assert missing is not None
    assert slots.tolist() == [[5, 0, 1], [1, 0, 2], [2, 3, 4]]
    assert missing.tolist() == [[False, True, True], [False, False, True], [False] * 3]


@pytest.mark.parametrize("slots", [4, 40])
def test_an_indexed_guide_gives_no_probability_to_what_was_not_found(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a truncated guide over the slots that were found."""
    vma = pv.VMA.for_vectors(6, address_guide=pv.IndexedGuide(pv.SimilarityGuide(64), k=8))
    memory, x = pv.PackedMemory.pack(binary(slots, 6)), torch.rand(3, 6)
    index = pv.model.index_memory(vma, memory)
    found = torch.tensor([[1, 3, -1], [0, -1, -1], [2, 1, 0]])
    k = min(8, slots)
    padded = torch.nn.functional.pad(found, (0, k - 3), value=-1)
    monkeypatch.setattr(index, "search", lambda _, asked: Hits(torch.zeros(3, asked), padded))
    encoded, target = vma.encode(memory), vma.encode_x(x)
    q = vma.address_guide(encoded, target)
    assert q.kept_values.shape == (3, k)
    assert all(len(set(row)) == k for row in q.kept_values.tolist())
    scores = vma.address_guide.inner(encoded, target).logits
    for row, (own, probs) in enumerate(zip(found, q.probs, strict=True)):
        own = own[own >= 0]
        expected = torch.zeros(slots).index_put((own,), scores[row, own].softmax(0))
        torch.testing.assert_close(probs, expected)
    assert bool((probs[q.sample((100,))] >= 0).all())
    elbo = pv.infer.VIMCO_ELBO(4, max_plate_nesting=1)
    assert torch.isfinite(torch.tensor(elbo.loss(vma.model, vma.guide, encoded, x)))


@pytest.mark.parametrize("kind", KINDS)
def test_after_most_slots_were_removed_the_guide_finds_those_that_are_left(kind: Any) -> None:
    vma = pv.VMA.for_vectors(6, address_guide=pv.IndexedGuide(pv.SimilarityGuide(64), k=8))
    memory = pv.PackedMemory.pack(binary(3000, 6))
    pv.model.index_memory(vma, memory, kind)
    memory.remove(torch.arange(2995))
    q = vma.address_guide(vma.encode(memory), vma.encode_x(torch.rand(40, 6)))
    assert q.kept_values.shape == (40, 5)
    assert bool((q.probs[:, :2995] == 0).all())
    torch.testing.assert_close(q.probs.sum(-1), torch.ones(40))
