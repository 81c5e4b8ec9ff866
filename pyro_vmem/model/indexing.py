"""The index of a memory: makes it, keeps its keys fresh during training, and measures how stale they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem.memory import AddressIndex, ExactIndex, FaissIndex, Memory, MilvusMemory, PackedMemory, recall
from pyro_vmem.model.vma import VMA
from pyro_vmem.parts import AddressGuide, KeyedGuide

__all__ = ["KeyRefresher", "Staleness", "add_templates", "index_memory", "staleness"]


def keyed(guide: AddressGuide) -> KeyedGuide:
    """The guide with keys, inside others such as :class:`IndexedGuide`; raises a `ValueError` if there is none."""
    inner: object = guide
    while not isinstance(inner, KeyedGuide):
        if not isinstance(inner, AddressGuide):
            raise ValueError(
                f"vma: its address guide, {guide!r}, has no keys to search. Use IndexedGuide(SimilarityGuide(...))."
            )
        inner = getattr(inner, "inner", None)
    return inner


@torch.no_grad()
def slot_keys(
    vma: VMA, memory: Memory, slots: Tensor | None = None, *, batch_size: Count = 1024, progress: bool = False
) -> Tensor:
    """The present keys `(n, E)` of slots `(n,)` or of all, computed in batches."""
    vma.check(memory, None)
    guide = keyed(vma.address_guide)
    slots = torch.arange(memory.num_slots, device=memory.device) if slots is None else slots
    batches = tqdm(slots.split(batch_size), desc="keys", unit="batch", disable=not (progress and sys.stderr))
    return torch.cat([guide.keys(vma.template_encoder(memory.read(some)).features) for some in batches])


def index_memory(
    vma: VMA,
    memory: Memory,
    kind: Literal["exact", "ivf", "hnsw"] = "exact",
    *,
    effort: Count | None = None,
    batch_size: Count = 1024,
    progress: bool = False,
) -> AddressIndex:
    """Makes an index of the keys of all slots and attaches it to the memory, as `memory.index`.

    Arguments:
        vma: The model, whose address guide is an :class:`IndexedGuide`.
        memory: The memory.
        kind: `"exact"`, or one of :class:`FaissIndex`: `"ivf"` for training, `"hnsw"` for a fixed memory. A
            :class:`~pyro_vmem.memory.MilvusMemory` keeps its own index and gets new keys.
        effort: See :class:`FaissIndex`.
        batch_size: How many templates are encoded at once.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the guide has no keys, or the memory does not fit the model.
        ImportError: If the kind needs faiss and faiss is not installed.

    Example:
        >>> from pyro_vmem import IndexedGuide, SimilarityGuide
        >>> vma = VMA.for_vectors(8, address_guide=IndexedGuide(SimilarityGuide(64), k=4))
        >>> memory = PackedMemory.pack((torch.rand(5000, 8) > 0.5).float())
        >>> index_memory(vma, memory)
        ExactIndex(5000 of 5000 slots, keys of 64)
        >>> with torch.no_grad():
        ...     vma.address_guide(vma.encode(memory), vma.encode_x(torch.rand(3, 8))).kept_values.shape
        torch.Size([3, 4])
    """
    if isinstance(memory, MilvusMemory):
        KeyRefresher(vma, memory).refresh(batch_size=batch_size, progress=progress)
        return memory.index
    keys = slot_keys(vma, memory, batch_size=batch_size, progress=progress)
    index = ExactIndex(keys) if kind == "exact" else FaissIndex(keys, kind, effort)
    if memory.mask is not None:
        index.remove((~memory.mask).nonzero().squeeze(-1))
    memory.index = index
    return index


def add_templates(
    vma: VMA, memory: PackedMemory, templates: Float[Tensor, "n ..."], labels: Integer[Tensor, " n"] | None = None
) -> Tensor:
    """Adds templates to a memory and their keys to its index. The next lookup finds them, without retraining.

    Arguments:
        memory: The memory, changed in place. `memory.remove(slots)` removes slots.
        templates: The templates, with shape `(n, *event)`.
        labels: Their classes, integers `(n,)`, if the memory has labels.

    Returns:
        Their slots, integers `(n,)`.

    Raises:
        ValueError: If they do not fit the memory.

    Example:
        >>> from pyro_vmem import IndexedGuide, SimilarityGuide
        >>> vma = VMA.for_vectors(8, address_guide=IndexedGuide(SimilarityGuide(64), k=4))
        >>> memory = PackedMemory.pack((torch.rand(5000, 8) > 0.5).float())
        >>> index = index_memory(vma, memory)
        >>> add_templates(vma, memory, torch.ones(2, 8)), len(index)
        (tensor([5000, 5001]), 5002)
    """
    # Keys of the packed values, because lookups read those.
    packed = PackedMemory.pack(templates, memory.bits).to(memory.device, memory.dtype)
    if memory.index is None:
        return memory.add(templates, labels)
    memory.index.check_model(vma, vma.fingerprint)
    memory.index.sign(vma, vma.fingerprint, whole=False)
    return memory.add(templates, labels, slot_keys(vma, packed))


@dataclass(frozen=True, eq=False)
class Staleness:
    r"""How stale the keys of an index are; :func:`staleness` returns it.

    Attributes:
        overlap: The share of the top k slots by fresh keys that are also in the top k by cached keys, `(B,)`.
        missed: The share of the probability of the top k by fresh keys that the top k by cached keys misses, `(B,)`.
        drift: The root mean square change of the keys, relative to their root mean square norm.
        num_slots: The number of slots compared.
    """

    overlap: Tensor
    missed: Tensor
    drift: float
    num_slots: int


@torch.no_grad()
def staleness(
    vma: VMA, memory: Memory, x: Tensor, k: Count = 8, *, sample: Count | None = 4096, seed: NonNegativeInt = 0
) -> Staleness:
    """Compares lookups by the cached keys of an index with lookups by fresh keys.

    Both searches are exact. :func:`pyro_vmem.memory.index.recall` measures what an approximate search misses.

    Arguments:
        memory: The memory, with an index.
        x: Targets to look up, with shape `(B, *event)`.
        k: The number of slots per lookup.
        sample: The number of slots, drawn at random, to encode again and search; None for all.
        seed: Seeds the draw of slots.

    Raises:
        ValueError: If the memory has no index, or memory or x do not fit the model.

    Example:
        >>> from pyro_vmem import IndexedGuide, SimilarityGuide
        >>> vma = VMA.for_vectors(8, address_guide=IndexedGuide(SimilarityGuide(64), k=4))
        >>> memory = PackedMemory.pack((torch.rand(5000, 8) > 0.5).float())
        >>> index = index_memory(vma, memory)
        >>> staleness(vma, memory, torch.rand(3, 8)).overlap
        tensor([1., 1., 1.])
    """
    index = _index_of(memory)
    vma.check(memory, x)
    slots = index.slots
    if sample is not None and sample < len(slots):
        drawn = torch.randperm(len(slots), generator=torch.Generator().manual_seed(seed))[:sample]
        slots = slots[drawn.to(slots.device)]
    fresh, cached = slot_keys(vma, memory, slots.to(memory.device)), index.keys_of(slots)
    queries = keyed(vma.address_guide).queries(vma.encode_x(x).features)
    by_fresh, by_cached = ExactIndex(fresh).search(queries, k), ExactIndex(cached.to(fresh)).search(queries, k)
    scores = (fresh[by_cached.slots] * queries.unsqueeze(-2)).sum(-1).masked_fill(by_cached.slots < 0, -torch.inf)
    # Rounding could make the share exceed one where both find the same.
    log_missing = (by_fresh.scores.logsumexp(-1) - scores.logsumexp(-1)).clamp(min=0)
    return Staleness(
        overlap=recall(by_cached, by_fresh),
        missed=1 - (-log_missing).exp(),
        drift=_drift(fresh, cached.to(fresh)),
        num_slots=len(slots),
    )


class KeyRefresher:
    """Keeps the keys of an index fresh in a training loop of your own: some slots per step, in turn.

    No key is older than `num_slots / slots_a_step` steps. :func:`pyro_vmem.fit` does this automatically.

    Raises:
        ValueError: If the memory has no index.

    Example:
        >>> from pyro_vmem import IndexedGuide, SimilarityGuide
        >>> vma = VMA.for_vectors(8, address_guide=IndexedGuide(SimilarityGuide(64), k=4))
        >>> memory = PackedMemory.pack((torch.rand(5000, 8) > 0.5).float())
        >>> index = index_memory(vma, memory)
        >>> refresher = KeyRefresher(vma, memory, slots_a_step=100)
        >>> refresher.step()  # after svi.step(...): how far those keys had moved
        0.0
    """

    def __init__(self, vma: VMA, memory: Memory, slots_a_step: Count = 256) -> None:
        _index_of(memory)
        self.vma, self.memory, self.slots_a_step = vma, memory, slots_a_step
        self.next_slot = 0

    def step(self) -> float:
        """Refreshes the next slots; returns their :attr:`Staleness.drift`."""
        index = _index_of(self.memory)
        count = min(self.slots_a_step, index.num_slots)
        slots = (torch.arange(count) + self.next_slot) % index.num_slots
        self.next_slot = int(slots[-1] + 1) % index.num_slots
        slots = slots[index.present.cpu()[slots]].to(self.memory.device)
        if not len(slots):
            return 0.0
        fresh, drift = self._fresh(index, slots)
        index.update(slots, fresh)
        return drift

    def refresh(self, *, batch_size: Count = 1024, progress: bool = False) -> float:
        """Refreshes all slots and rebuilds the index; returns their :attr:`Staleness.drift`."""
        index = _index_of(self.memory)
        fresh, drift = self._fresh(index, index.slots.to(self.memory.device), batch_size=batch_size, progress=progress)
        index.rebuild(fresh)
        index.sign(self.vma, self.vma.fingerprint)
        return drift

    def _fresh(self, index: AddressIndex, slots: Tensor, **how: Any) -> tuple[Tensor, float]:
        fresh = slot_keys(self.vma, self.memory, slots, **how)
        return fresh, _drift(fresh, index.keys_of(slots).to(fresh))


def _index_of(memory: Memory) -> AddressIndex:
    if memory.index is None:
        raise ValueError("memory: it has no index. Make one with index_memory(vma, memory).")
    return memory.index


def _drift(fresh: Tensor, cached: Tensor) -> float:
    return float((fresh - cached).norm() / fresh.norm())
