"""Search for slots: the same as by looking at every key, through additions, removals and updates."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from milvus_engine import index_of, needs_milvus
from torch import Tensor

import pyro_vmem.memory.index
from pyro_vmem.memory import AddressIndex, ExactIndex, FaissIndex, Hits, recall
from pyro_vmem.memory.index import _merged

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss is not installed: pip install '.[faiss]'"
)
# Each of these looks at all there is, so that it finds what looking at every key finds; a new index is one line here.
EXACT: dict[str, Callable[[Tensor], AddressIndex]] = {
    "exact": ExactIndex,
    "ivf": lambda keys: FaissIndex(keys, "ivf", effort=10_000),
    "hnsw": lambda keys: FaissIndex(keys, "hnsw", effort=10_000),
    "milvus": index_of,
}
NEEDS = {"ivf": [needs_faiss], "hnsw": [needs_faiss], "milvus": [needs_milvus]}
INDICES = [pytest.param(make, id=name, marks=NEEDS.get(name, [])) for name, make in EXACT.items()]
APPROXIMATE = [pytest.param(kind, marks=needs_faiss) for kind in ("ivf", "hnsw")]


def keys_and_queries(slots: int = 300, dim: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(slots, dim), torch.randn(5, dim)


def by_looking_at_all(keys: Tensor, present: Tensor, queries: Tensor, k: int) -> Hits:
    scores = (queries @ keys.mT).masked_fill(~present, -torch.inf)
    best = scores.topk(k)
    return Hits(best.values, best.indices)


def assert_same(found: Hits, expected: Hits) -> None:
    assert torch.equal(found.slots, expected.slots)
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("make", INDICES)
@pytest.mark.parametrize("leading", [(), (7,), (3, 1, 4)])
def test_search_finds_what_looking_at_all_finds(make: Callable[[Tensor], AddressIndex], leading: tuple[int]) -> None:
    keys, _ = keys_and_queries()
    queries = torch.randn(*leading, 8)
    found = make(keys).search(queries, 6)
    assert found.slots.shape == found.scores.shape == (*leading, 6)
    assert_same(found, by_looking_at_all(keys, torch.ones(300, dtype=torch.bool), queries, 6))


@pytest.mark.parametrize("make", INDICES)
@pytest.mark.parametrize("folded_from", [0, 4096], ids=["moved in", "beside"])
def test_slots_come_and_go(
    make: Callable[[Tensor], AddressIndex], folded_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyro_vmem.memory.index, "FOLDED_LEAST", folded_from)
    keys, queries = keys_and_queries()
    index, present = make(keys), torch.ones(300, dtype=torch.bool)
    for turn in range(4):
        gone = torch.randperm(len(keys))[:20]
        index.remove(gone)
        present[gone] = False
        moved = torch.randperm(len(keys))[:30]
        keys[moved] = 1.5 * torch.randn(30, 8)
        index.update(moved, keys[moved])
        more = torch.randn(10, 8) + 0.1 * turn
        assert index.add(more).tolist() == list(range(len(keys), len(keys) + 10))
        keys, present = torch.cat([keys, more]), torch.cat([present, torch.ones(10, dtype=torch.bool)])
        assert_same(index.search(queries, 9), by_looking_at_all(keys, present, queries, 9))
    assert (index.num_slots, len(index)) == (340, int(present.sum()))
    index.rebuild()
    assert_same(index.search(queries, 9), by_looking_at_all(keys, present, queries, 9))


@pytest.mark.parametrize("make", INDICES)
def test_what_is_not_there_is_not_found(make: Callable[[Tensor], AddressIndex]) -> None:
    index = make(torch.eye(6, 8))
    index.remove(torch.tensor([1, 4]))
    found = index.search(torch.randn(3, 8), 10)
    assert found.slots.shape == (3, 10)
    assert all(set(row[:4]) == {0, 2, 3, 5} and row[4:] == [-1] * 6 for row in found.slots.tolist())
    assert bool((found.scores[:, 4:] == -torch.inf).all())


def test_blocks_of_keys_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = keys_and_queries()
    whole = ExactIndex(keys).search(queries, 4)
    monkeypatch.setattr(pyro_vmem.memory.index, "BLOCK", 35)  # 7 keys at a time
    assert_same(ExactIndex(keys).search(queries, 4), whole)


def test_shards_merge_to_the_whole() -> None:
    keys, queries = keys_and_queries()
    parts = []
    for start, end in ((0, 2), (2, 150), (150, 300)):
        found = ExactIndex(keys[start:end]).search(queries, 5)
        parts.append(Hits(found.scores, torch.where(found.slots < 0, -1, found.slots + start)))
    assert_same(_merged(parts, 5), ExactIndex(keys).search(queries, 5))


def test_an_index_keeps_its_own_keys_without_gradient() -> None:
    keys, queries = keys_and_queries()
    keys.requires_grad_()
    index, before = ExactIndex(keys), ExactIndex(keys.detach().clone()).search(queries, 3)
    with torch.no_grad():
        keys.zero_()
    found = index.search(queries.requires_grad_(), 3)
    assert_same(found, before)
    assert not found.scores.requires_grad


def test_search_is_in_the_precision_of_the_keys() -> None:
    index = ExactIndex(torch.randn(50, 8, dtype=torch.float64))
    assert index.search(torch.randn(8, dtype=torch.float64), 2).scores.dtype == torch.float64


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_approximate_search_finds_most(kind: str) -> None:
    # Around 50 centres, as embeddings are, and so wide that one part is not enough.
    keys = torch.randn(50, 16).repeat(100, 1) + torch.randn(5000, 16)
    queries = keys[::250] + 0.1 * torch.randn(20, 16)
    exact = ExactIndex(keys).search(queries, 10)
    found = recall(FaissIndex(keys, kind).search(queries, 10), exact).mean()  # type: ignore[arg-type]
    least = recall(FaissIndex(keys, kind, effort=1).search(queries, 10), exact).mean()  # type: ignore[arg-type]
    assert found > 0.9
    assert least < found


@needs_faiss
def test_keys_that_are_rounded_are_scored_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyro_vmem.memory.index, "CODED_FROM", 0)
    keys, queries = keys_and_queries()
    index = FaissIndex(keys, effort=10_000)
    more = torch.randn(40, 8)
    index.add(more[:20])
    index.update(torch.arange(20), more[20:])
    index.remove(torch.arange(50, 60))
    keys = torch.cat([torch.cat([more[20:], keys[20:]]), more[:20]])
    present = torch.ones(320, dtype=torch.bool)
    present[50:60] = False
    found, expected = index.search(queries, 9), by_looking_at_all(keys, present, queries, 9)
    assert float(recall(found, expected).mean()) > 0.9  # where a rounded key is as similar as another
    torch.testing.assert_close(found.scores, (queries.unsqueeze(1) * keys[found.slots]).sum(-1))
    assert bool((found.scores.diff(dim=-1) <= 0).all())


def test_recall_counts_what_was_found() -> None:
    exact = Hits(torch.zeros(2, 3), torch.tensor([[1, 2, 3], [4, 5, -1]]))
    found = Hits(torch.zeros(2, 3), torch.tensor([[3, 1, 9], [9, -1, -1]]))
    assert recall(found, exact).tolist() == pytest.approx([2 / 3, 0])


WRONG = {
    "keys that are integers": (
        lambda: ExactIndex(torch.ones(3, 2, dtype=torch.long)),
        r"keys: expected a tensor of dtype Float and shape \(S E\), got .*torch\.int64.*Use keys\.float\(\)",
    ),
    "keys that are a vector": (
        lambda: ExactIndex(torch.rand(3)),
        r"keys: expected a tensor of dtype Float and shape \(S E\), got .*\(3,\)",
    ),
    "keys that are not finite": (lambda: ExactIndex(torch.full((2, 2), torch.nan)), "keys: found NaN"),
    "queries of another length": (lambda: ExactIndex(torch.rand(3, 2)).search(torch.rand(3), 1), r"queries: .*\(\*, 2"),
    "no hits": (lambda: ExactIndex(torch.rand(3, 2)).search(torch.rand(2), 0), "k: expected at least 1"),
    "keys added of another length": (lambda: ExactIndex(torch.rand(3, 2)).add(torch.rand(1, 3)), r"keys: .*\(n, 2\)"),
    "a kind there is not": (
        lambda: FaissIndex(torch.rand(3, 2), "ivfpq"),
        r"kind: expected 'ivf' or 'hnsw', got 'ivfpq'",
    ),  # type: ignore[arg-type]
    "no effort": (
        lambda: FaissIndex(torch.rand(3, 2), "ivf", effort=0),
        r"effort: expected a whole number in \[1, 10,000,000\] or None, got 0",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str) -> None:
    call, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("method", ["remove", "update"])
def test_a_slot_that_is_not_there_is_refused(method: str) -> None:
    arguments = [torch.tensor([3])] + [torch.rand(1, 2)] * (method == "update")
    with pytest.raises(IndexError, match=r"slots: expected 0\.\.2, got 3"):
        getattr(ExactIndex(torch.rand(3, 2)), method)(*arguments)


@needs_faiss
def test_repr() -> None:
    index = FaissIndex(torch.rand(40, 2), "ivf")
    index.remove(torch.tensor([0]))
    assert repr(index) == "FaissIndex(39 of 40 slots, keys of 2, ivf)"
    assert repr(ExactIndex(torch.rand(3, 2))) == "ExactIndex(3 of 3 slots, keys of 2)"
