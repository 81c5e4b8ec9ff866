"""A memory divided between processes: each searches and reads its own slots, and the best of all are merged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vmem.memory import AddressIndex, ExactIndex, Hits, PackedMemory
from pyro_vmem.memory.index import merge_hits
from pyro_vmem.train.distributed import Ranks

__all__ = ["ShardedIndex", "ShardedMemory"]


class ShardedIndex(AddressIndex):
    r"""An index of which each process holds a share: slot s is the process's of number :math:`s \bmod n`.

    Each process searches its share for the queries of all; scores and slots of the best k are gathered, and merged. All
    processes must call a method together; their queries may differ, in number too, and what they add, remove or update
    is the same. Alone, it is the index it is made of.

    Arguments:
        keys: The keys of this process's slots, with shape `(S_r, E)`: of all slots, `keys[ranks.index :: ranks.count]`.
        make: Makes the index of a share: :class:`ExactIndex`, or `lambda keys: FaissIndex(keys, "ivf")`.
        ranks: The processes. Default: those of the process group that there is.

    Raises:
        ValueError: If the keys are not a matrix of finite numbers, or the shares are not as even as can be.

    Example:
        >>> index = ShardedIndex(torch.eye(4))
        >>> index.search(torch.tensor([0.1, 0.0, 0.9, 0.5]), 2).slots
        tensor([2, 3])
    """

    def __init__(
        self, keys: Tensor, make: Callable[[Tensor], AddressIndex] = ExactIndex, ranks: Ranks | None = None
    ) -> None:
        self.ranks = Ranks.join(keys.device) if ranks is None else ranks
        self.shard = make(keys)
        self._total = _total(self.shard.num_slots, self.ranks)
        self._present = self._total

    @property
    def keys(self) -> Tensor:  # type: ignore[override]  # of this process's slots
        """The keys of this process's slots, with shape `(S_r, E)`."""
        return self.shard.keys

    @property
    def present(self) -> Tensor:  # type: ignore[override]  # as above
        """Which of this process's slots can be found, with shape `(S_r,)`."""
        return self.shard.present

    @property
    def num_slots(self) -> int:
        """Slots of all processes that have a number, removed ones included."""
        return self._total

    def __len__(self) -> int:
        """Slots of all processes that can be found."""
        return self._present

    def _search(self, queries: Tensor, k: int) -> Hits:
        asked = self.ranks.gather(queries)
        found = self.shard.search(torch.cat(asked), k)
        slots = torch.where(found.slots < 0, -1, found.slots * self.ranks.count + self.ranks.index)
        start = sum(len(some) for some in asked[: self.ranks.index])
        mine = slice(start, start + len(queries))
        everyone = zip(self.ranks.gather(found.scores), self.ranks.gather(slots), strict=True)
        return merge_hits([Hits(scores[mine], there[mine]) for scores, there in everyone], k)

    def add(self, keys: Tensor) -> Tensor:
        """As of :class:`AddressIndex`; all processes add the same keys `(n, E)`, and each keeps its own."""
        slots = torch.arange(self._total, self._total + len(keys), device=self.keys.device)
        self.shard.add(self._checked(keys, self.dim)[self._mine(slots)])
        self._total += len(keys)
        self._present += len(keys)
        return slots

    def remove(self, slots: Tensor) -> None:
        """As of :class:`AddressIndex`; all processes remove the same slots `(n,)`."""
        slots = self._in_range(slots).unique()
        places = slots[self._mine(slots)] // self.ranks.count
        gone = int(self.present[places].sum())
        self.shard.remove(places)
        self._present -= int(self.ranks.add_up(torch.tensor(float(gone))))

    def update(self, slots: Tensor, keys: Tensor) -> None:
        """As of :class:`AddressIndex`; all processes update the same slots `(n,)`, by keys `(n, E)`."""
        mine = self._mine(self._in_range(slots))
        self.shard.update(slots.to(mine.device)[mine] // self.ranks.count, self._checked(keys, self.dim)[mine])

    def rebuild(self, keys: Tensor | None = None) -> None:
        """Builds what each process's search needs anew, from new keys of all slots, `(S, E)`, if they are given."""
        self.shard.rebuild(None if keys is None else keys[self.ranks.index :: self.ranks.count])

    @property
    def slots(self) -> Tensor:
        """The slots of all processes that can be found, integers `(n,)`."""
        found = torch.zeros(self._total, device=self.keys.device)
        found[self.ranks.index :: self.ranks.count] = self.present.to(found)
        return self.ranks.add_up(found).nonzero().squeeze(-1)

    def keys_of(self, slots: Tensor) -> Tensor:
        """The keys `(n, E)` of slots, integers `(n,)`, whoever has them; all processes ask for the same."""
        slots = self._in_range(slots)
        mine, keys = self._mine(slots), self.keys.new_zeros(len(slots), self.dim)
        keys[mine] = self.keys[slots[mine] // self.ranks.count]
        return self.ranks.add_up(keys)

    def _mine(self, slots: Tensor) -> Tensor:
        return slots.to(self.keys.device) % self.ranks.count == self.ranks.index

    def __repr__(self) -> str:
        where = f"process {self.ranks.index} of {self.ranks.count}"
        return f"{type(self).__name__}({len(self)} of {self.num_slots} slots, {where}: {self.shard!r})"


class ShardedMemory(PackedMemory):
    r"""A memory of which each process stores a share: slot s is the process's of number :math:`s \bmod n`.

    What is read is sent by the processes that have it, so all must read at the same time, each what it wants. That is
    how :class:`IndexedGuide` reads; a guide that draws slots beside those that were found, such as a
    :class:`DefensiveGuide`, reads as it happens to, and would wait for others.

    Arguments:
        shard: The templates of this process's slots: of all, `templates[ranks.index :: ranks.count]`.
        labels: The class of each slot of all processes, integers `(S,)`.
        index: A :class:`ShardedIndex` of the same slots.
        ranks: The processes. Default: those of the process group that there is.

    Raises:
        ValueError: If the shares are not as even as can be, or labels or index are not of as many slots.

    Example:
        >>> images = (torch.rand(10, 1, 8, 8) > 0.5).float()
        >>> memory = ShardedMemory(PackedMemory.pack(images))
        >>> bool((memory.read(torch.tensor([3, 7])) == images[[3, 7]]).all())
        True
    """

    def __init__(
        self,
        shard: PackedMemory,
        labels: Tensor | None = None,
        index: ShardedIndex | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.__dict__ |= shard.__dict__
        self.shard, self.labels, self.mask, self.index = shard, labels, None, index
        self.ranks = Ranks.join(shard.device) if ranks is None else ranks
        self._total = _total(shard.num_slots, self.ranks)
        self._check()

    @property
    def num_slots(self) -> int:
        """The number of slots of all processes."""
        return self._total

    def read(self, a: Tensor) -> Tensor:
        """Reads and decodes :math:`m_a`, whoever has it: `(*, *event)` for addresses `(*)`, as of :class:`Memory`."""
        asked = self.ranks.gather(a.flatten())
        at = torch.cat(asked)
        if at.device.type == "cpu" and bool(((at < 0) | (at >= self.num_slots)).any()):
            raise IndexError(f"a: expected addresses in 0..{self.num_slots - 1}, got {at.min()}..{at.max()}.")
        mine = at % self.ranks.count == self.ranks.index
        values = torch.zeros(len(at), *self.event_shape, dtype=self.dtype, device=self.device)
        values[mine] = self.shard.read(at[mine] // self.ranks.count)
        start = sum(len(some) for some in asked[: self.ranks.index])
        return self.ranks.add_up(values)[start : start + a.numel()].reshape(*a.shape, *self.event_shape)

    def add(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused, for templates `(n, *event)` as of :class:`PackedMemory`: a share is changed by itself.

        Raises:
            ValueError: Always.
        """
        raise ValueError("memory: templates of a sharded memory stay. Add to each process's share, and make it anew.")

    def remove(self, slots: Tensor) -> None:
        """Takes slots, integers `(n,)`, out of the index, so that they are not found any more.

        Raises:
            ValueError: If there is no index.
        """
        if self.index is None:
            raise ValueError(
                "memory: a sharded memory without an index cannot leave slots out. Make one, ShardedIndex."
            )
        self.index.remove(slots)

    def _map(self, fn: Any) -> ShardedMemory:
        labels = None if self.labels is None else fn(self.labels, False)
        index = self.index if isinstance(self.index, ShardedIndex) else None
        return ShardedMemory(self.shard._map(fn), labels, index, self.ranks)


def _total(mine: int, ranks: Ranks) -> int:
    """How many slots there are, if each process has those that are its."""
    sizes = torch.cat(ranks.gather(torch.tensor([mine])))
    total = int(sizes.sum())
    expected = [math.ceil((total - rank) / ranks.count) for rank in range(ranks.count)]
    if sizes.tolist() != expected:
        raise ValueError(
            f"shards: {total} slots are expected as {expected} in the {ranks.count} processes, got {sizes.tolist()}. "
            "Give each process every n-th slot: `[ranks.index :: ranks.count]`."
        )
    return total
