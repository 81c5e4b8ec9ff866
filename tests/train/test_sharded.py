"""A memory divided between two processes finds, reads and explains as an undivided one does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import together
from small_run import blobs, small_vma

import pyro_vmem as pv
from pyro_vmem.memory import AddressIndex, ExactIndex, FaissIndex, PackedMemory
from pyro_vmem.model import index_memory
from pyro_vmem.model.indexing import slot_keys
from pyro_vmem.train.distributed import Ranks
from pyro_vmem.train.sharded import ShardedIndex, ShardedMemory

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")

KINDS: dict[str, Callable[[torch.Tensor], AddressIndex]] = {
    "exact": ExactIndex,
    "flat": lambda keys: FaissIndex(keys, "flat"),
}


def shard(values: torch.Tensor, rank: int) -> torch.Tensor:
    return values[rank::2]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_find_what_one_finds(kind: str) -> None:
    if kind == "flat":
        pytest.importorskip("faiss")
    keys, new = torch.randn(31, 5), torch.randn(4, 5)
    queries = [torch.randn(3, 5), torch.randn(2, 4, 5)]  # of each process its own

    def work(rank: int) -> None:
        whole, divided = KINDS[kind](keys), ShardedIndex(shard(keys, rank), KINDS[kind])
        assert len(divided.shard) == (16, 15)[rank]

        def compare(k: int = 6) -> None:
            assert (len(divided), divided.num_slots) == (len(whole), whole.num_slots)
            expected, found = whole.search(queries[rank], k), divided.search(queries[rank], k)
            assert torch.equal(found.slots, expected.slots)
            torch.testing.assert_close(found.scores, expected.scores)

        compare()
        assert torch.equal(divided.add(new), whole.add(new))
        compare()
        for index in (whole, divided):
            index.remove(torch.tensor([3, 4, 4, 32]))
            index.update(torch.tensor([0, 1, 33]), 3 * new[:3])
        compare()
        compare(40)  # more than there are
        with pytest.raises(IndexError, match=r"slots: expected 0..34"):
            divided.remove(torch.tensor([35]))
        divided.rebuild()
        compare()

    together(work)


def test_a_divided_memory_explains_targets_as_a_whole_one_does(tmp_path: Path) -> None:
    templates, x = blobs(classes=9).images[:37].float() / 255, blobs(classes=9).images[40:45].float() / 255
    vma = small_vma()
    vma = vma.replace(address_guide=pv.IndexedGuide(vma.address_guide, k=4))
    whole = PackedMemory.pack(templates)
    index_memory(vma, whole)
    target = vma.encode_x(x)
    with torch.no_grad():
        expected = vma.address_guide(vma.encode(whole), target)

    def work(rank: int) -> None:
        ranks = Ranks(rank, 2)
        part = PackedMemory.pack(shard(templates, rank))
        memory = ShardedMemory(part, torch.arange(37) % 9, ShardedIndex(slot_keys(vma, part), ranks=ranks))
        wanted = torch.tensor([[36, 0, 5], [2, 2, 1]]) if rank else torch.tensor([7])
        assert torch.equal(memory.read(wanted), templates[wanted])
        rows = ranks.rows(5)
        with torch.no_grad():
            found = vma.address_guide(vma.encode(memory), vma.encode_x(x[rows]))
        assert torch.equal(found.kept_values, expected.kept_values[rows])
        torch.testing.assert_close(found.kept_logits, expected.kept_logits[rows], rtol=1e-4, atol=1e-5)
        best = expected.kept_values[:, 0]
        memory.remove(best)
        with torch.no_grad():
            found = vma.address_guide(vma.encode(memory), vma.encode_x(x[rows]))
        assert not torch.isin(found.kept_values, best).any()
        assert vma.classify(memory.to(torch.float32), x[rows]).shape == (len(x[rows]), 9)

    together(work)


def test_shares_that_are_not_every_other_slot_are_refused() -> None:
    def work(rank: int) -> None:
        with pytest.raises(
            ValueError, match=r"shards: 5 slots are expected as \[3, 2\] in the 2 processes, got \[1, 4\]"
        ):
            ShardedIndex(torch.randn(4 if rank else 1, 3))
        part = PackedMemory.pack(torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"labels: expected shape \(4,\), got \(2,\)"):
            ShardedMemory(part, torch.tensor([0, 1]))
        memory = ShardedMemory(part)
        with pytest.raises(IndexError, match=r"a: expected addresses in 0..3"):
            memory.read(torch.tensor([4]))
        with pytest.raises(ValueError, match="memory: templates of a sharded memory stay"):
            memory.add(torch.zeros(1, 3))
        with pytest.raises(ValueError, match="memory: a sharded memory without an index"):
            memory.remove(torch.tensor([0]))

    together(work)
