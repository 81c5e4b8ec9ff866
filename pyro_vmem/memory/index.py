"""Search for the slots with the keys most similar to a query: exact, or approximate by faiss."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from pyro_vmem._utils.checks import Count
from pyro_vmem._utils.extras import require
from pyro_vmem.memory.growing import Growing

__all__ = ["AddressIndex", "ExactIndex", "FaissIndex", "Hits", "KeyTable", "recall"]

Kind = Literal["ivf", "hnsw"]

BLOCK = 1 << 22  # scores per block, 16 MB
FOLDED_SHARE = 0.05  # the share of new keys at which they are moved into the faiss index
FOLDED_LEAST = 4096
CODED_FROM = 1 << 20  # slots from which faiss keeps bytes for numbers, as it reads more than a processor can fetch
MOST_GROUPS = 64  # that a search visits by default


@dataclass(frozen=True, eq=False)
class Hits:
    r"""The slots that a search found for each query, best first.

    Attributes:
        scores: The inner products of query and key, with shape `(*, k)`; `-inf` where nothing was found.
        slots: The slots, integers `(*, k)`; -1 where nothing was found.

    Example:
        >>> Hits(torch.tensor([[2.0, 1.0]]), torch.tensor([[7, 3]])).slots.tolist()
        [[7, 3]]
    """

    scores: Tensor
    slots: Tensor

    def filled(self, num_slots: int) -> tuple[Tensor, Tensor | None]:
        """Slots `(*, k)` with others filled in where nothing was found, and where that is, `(*, k)`; None if nowhere.

        No row has a slot twice.
        """
        missing = self.slots < 0
        if not bool(missing.any()):
            return self.slots, None
        # At least k of the first 2 k slots were not found. A stable sort puts these first, in order.
        others = torch.arange(min(2 * missing.shape[-1], num_slots), device=missing.device)
        is_found = (others.unsqueeze(-1) == self.slots.unsqueeze(-2)).any(-1)
        free = is_found.to(torch.uint8).argsort(dim=-1, stable=True)
        return torch.where(missing, free.gather(-1, (missing.cumsum(-1) - 1).clamp(min=0)), self.slots), missing


def _merged(found: Sequence[Hits], k: int) -> Hits:
    """The best `k` hits of several searches in disjoint slots with the same queries."""
    scores, slots = torch.cat([h.scores for h in found], -1), torch.cat([h.slots for h in found], -1)
    best = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return Hits(best.values, slots.gather(-1, best.indices))


def recall(found: Hits, exact: Hits) -> Tensor:
    """The share `(*)` of the hits `(*, k)` of an exact search that a search for the same queries found.

    Example:
        >>> found, exact = (Hits(torch.zeros(3), torch.tensor(slots)) for slots in ([4, 2, 9], [2, 4, 5]))
        >>> recall(found, exact)
        tensor(0.6667)
    """
    wanted = exact.slots >= 0
    there = (exact.slots.unsqueeze(-1) == found.slots.unsqueeze(-2)).any(-1) & wanted
    return there.sum(-1) / wanted.sum(-1)


class AddressIndex(abc.ABC):
    r"""The keys of the slots of a memory. A search finds the :math:`k` keys with the largest inner product.

    The keys are copies without gradient. After the encoder has changed, :meth:`update` replaces them. Slots keep their
    numbers. New slots get the next numbers, and removed slots are never found again.

    Arguments:
        dim: The length :math:`E` of a key.
        dtype: The dtype of the keys.
        present: True where a slot can be found, `(S,)`, on the device of the search.
    """

    def __init__(self, dim: int, dtype: torch.dtype, present: Tensor) -> None:
        self.dim, self.dtype = dim, dtype
        self._present = Growing(present).with_room()
        self._count = int(present.sum())

    @property
    def present(self) -> Tensor:
        """True where a slot can be found, `(S,)`."""
        return self._present.values

    @property
    def num_slots(self) -> int:
        """The number of slots, removed ones included."""
        return len(self.present)

    def __len__(self) -> int:
        """The number of slots that can be found."""
        return self._count

    @property
    def slots(self) -> Tensor:
        """The slots that can be found, integers `(n,)`."""
        return self.present.nonzero().squeeze(-1)

    @abc.abstractmethod
    def keys_of(self, slots: Tensor) -> Tensor:
        """The keys `(n, E)` of slots, integers `(n,)`; raises an `IndexError` if one is not a slot."""

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> Hits:
        r"""The slots of the :math:`k` largest :math:`\langle q, key_s \rangle`.

        Arguments:
            queries: The queries :math:`q`, with shape `(*, E)`.
            k: The number of slots, at least 1.

        Returns:
            Scores and slots `(*, k)`, best first. If fewer slots exist or were found, the last ones have score `-inf`
            and slot -1.

        Raises:
            ValueError: If `k` is less than 1, or queries are not finite or have another length than the keys.
        """
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}.")
        if queries.shape[-1] != self.dim:
            raise ValueError(f"queries: expected shape (*, {self.dim}) as keys have, got {tuple(queries.shape)}.")
        flat = queries.detach().reshape(-1, self.dim).to(self.present.device, self.dtype)
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(
                "queries: found NaN or infinite values. Check the targets, and the weights of the encoder and guide."
            )
        found = self._search(flat, k)
        scores = flat.new_full((len(flat), k), -math.inf)
        slots = torch.full((len(flat), k), -1, device=flat.device)
        scores[:, : found.scores.shape[1]], slots[:, : found.slots.shape[1]] = found.scores, found.slots
        slots.masked_fill_(scores == -math.inf, -1)
        shape = (*queries.shape[:-1], k)
        return Hits(scores.reshape(shape).to(queries), slots.reshape(shape).to(queries.device))

    @abc.abstractmethod
    def _search(self, queries: Tensor, k: int) -> Hits:
        """Like :meth:`search`, for queries `(N, E)` with the dtype and device of the keys; may return fewer columns."""

    def add(self, keys: Tensor) -> Tensor:
        """Adds slots with finite keys `(n, E)`; returns their numbers, `(n,)`, which follow the existing ones."""
        self._append(checked_keys(keys, self.dim).to(self.present.device, self.dtype))
        return self._numbered(len(keys))

    def _numbered(self, count: int) -> Tensor:
        """Gives numbers to slots whose keys were added."""
        slots = torch.arange(self.num_slots, self.num_slots + count, device=self.present.device)
        self._present = self._present.append(self.present.new_ones(count))
        self._count += count
        return slots

    def remove(self, slots: Integer[Tensor, " n"]) -> None:
        """Removes slots, integers `(n,)`. They are never found again, and their numbers are not reused."""
        slots = self._in_range(slots).unique()
        self._count -= int(self.present[slots].sum())
        self.present[slots] = False

    def update(self, slots: Integer[Tensor, " n"], keys: Float[Tensor, "n E"]) -> None:
        """Replaces the keys of slots, integers `(n,)`, by finite ones `(n, E)`."""
        slots = self._in_range(slots)
        self._replace(slots, checked_keys(keys, self.dim).to(self.present.device, self.dtype))

    @abc.abstractmethod
    def _append(self, keys: Tensor) -> None:
        """Stores the keys of the slots that come next."""

    @abc.abstractmethod
    def _replace(self, slots: Tensor, keys: Tensor) -> None:
        """Stores other keys of slots."""

    def _in_range(self, slots: Tensor) -> Tensor:
        if bool(((slots < 0) | (slots >= self.num_slots)).any()):
            raise IndexError(f"slots: expected 0..{self.num_slots - 1}, got {slots.min()}..{slots.max()}.")
        return slots.to(self.present.device)

    def rebuild(self, keys: Tensor | None = None) -> None:
        """Rebuilds the search structure, with new keys `(n, E)` of :attr:`slots` or the present ones.

        Raises:
            ValueError: If the keys do not fit.
        """
        if keys is not None:
            if len(keys) != len(self):
                raise ValueError(f"keys: expected {len(self)}, one per slot, got {len(keys)}.")
            self._replace(self.slots, checked_keys(keys, self.dim).to(self.present.device, self.dtype))

    def check_model(self, model: object, fingerprint: Callable[[], str]) -> None:  # noqa: B027
        """Raises a `ValueError` if the keys are known to be of a model with another fingerprint."""

    def sign(self, model: object, fingerprint: Callable[[], str], whole: bool = True) -> None:  # noqa: B027
        """Notes, where keys outlast the process, that all, or those added next, are of this model."""

    def copy(self) -> Self:
        """A copy that shares no keys and no slots."""
        other = copy.copy(self)
        other._present = self._present.with_room()
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} of {self.num_slots} slots, keys of {self.dim})"


def checked_keys(keys: Tensor, dim: int | None = None) -> Tensor:
    """The keys without gradient; raises a `ValueError` unless they are finite and `(n, E)`, `E` as given."""
    expected = f"(n, {'E' if dim is None else dim})"
    if keys.dim() != 2 or not keys.is_floating_point() or (len(keys) == 0 if dim is None else keys.shape[1] != dim):
        raise ValueError(f"keys: expected floating-point numbers {expected}, got {keys.dtype} {tuple(keys.shape)}.")
    if not bool(torch.isfinite(keys).all()):
        raise ValueError("keys: found NaN or infinite values. Check the weights of the encoder and of the guide.")
    return keys.detach()


class KeyTable(AddressIndex):
    """An index whose keys are in one tensor of this process.

    Arguments:
        keys: One key per slot, with shape `(S, E)`.

    Raises:
        ValueError: If the keys are not a matrix of finite numbers.
    """

    def __init__(self, keys: Float[Tensor, "S E"]) -> None:
        self._keys = Growing(checked_keys(keys)).with_room()
        super().__init__(keys.shape[1], keys.dtype, torch.ones(len(keys), dtype=torch.bool, device=keys.device))

    @property
    def keys(self) -> Tensor:
        """The keys of all slots, `(S, E)`, removed ones included."""
        return self._keys.values

    def keys_of(self, slots: Tensor) -> Tensor:
        return self.keys[self._in_range(slots)]

    def _append(self, keys: Tensor) -> None:
        self._keys = self._keys.append(keys)

    def _replace(self, slots: Tensor, keys: Tensor) -> None:
        self.keys[slots] = keys

    def copy(self) -> Self:
        other = super().copy()
        other._keys = self._keys.with_room()
        return other


class ExactIndex(KeyTable):
    """Exact search over all keys, in blocks.

    Arguments:
        keys: One key per slot, with shape `(S, E)`; the search runs on their device, in their dtype.

    Example:
        >>> index = ExactIndex(torch.eye(4))
        >>> index.search(torch.tensor([0.1, 0.0, 0.9, 0.5]), 2).slots
        tensor([2, 3])
        >>> index.remove(torch.tensor([2]))
        >>> index.add(torch.tensor([[0.0, 0.0, 5.0, 0.0]])), index.search(torch.tensor([0.1, 0.0, 0.9, 0.5]), 2).slots
        (tensor([4]), tensor([4, 3]))
    """

    def _search(self, queries: Tensor, k: int) -> Hits:
        return _exact(queries, self.keys, self.present, k)


def _exact(queries: Tensor, keys: Tensor, present: Tensor, k: int) -> Hits:
    """The best keys, block by block, because all scores would take queries times slots of memory."""
    best: list[Hits] = []
    size = max(k, BLOCK // max(1, len(queries)))
    for start in range(0, len(keys), size):
        with torch.autocast(keys.device.type, enabled=False):  # small differences decide
            scores = queries @ keys[start : start + size].mT
        scores.masked_fill_(~present[start : start + size], -math.inf)
        top = scores.topk(min(k, scores.shape[1]), dim=-1)
        best = [_merged([*best, Hits(top.values, top.indices + start)], k)]
    return best[0]


class FaissIndex(KeyTable):
    """Approximate search by faiss on the CPU, which compares a small part of the keys.

    Slots are added, removed and updated in place, at a cost that does not grow with the memory. `"hnsw"` keeps updated
    keys aside and compares them one by one. When they are 5 % of all keys, it builds its graph again. From a million
    slots on, `"ivf"` searches rounded keys of 8 bits per number, and scores the slots that it finds by the exact keys.

    References:
        | The Faiss library (Douze et al., 2024) https://arxiv.org/abs/2401.08281
        | Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small World graphs
        | (Malkov, Yashunin, 2018) https://arxiv.org/abs/1603.09320

    Arguments:
        keys: One key per slot, with shape `(S, E)`.
        kind: `"ivf"` groups the keys around centres and searches the groups nearest to the query. `"hnsw"` walks a
            graph of similar keys. It takes longer to build and is faster per query.
        effort: The number of groups (`"ivf"`) or graph nodes (`"hnsw"`) that a search visits. A larger number has a
            higher recall. Default: two square roots of the number of groups, at most 64; 128 nodes.

    Raises:
        ImportError: If faiss is not installed.

    Example:
        >>> index = FaissIndex(torch.eye(64), effort=10)
        >>> index.search(torch.eye(64)[5], 1).slots
        tensor([5])
    """

    def __init__(self, keys: Float[Tensor, "S E"], kind: Kind = "ivf", effort: Count | None = None) -> None:
        self._faiss: Any = require("faiss", "faiss")
        super().__init__(keys.float().cpu())
        self.kind, self.effort = kind, effort
        self.rebuild()

    def copy(self) -> Self:
        other = super().copy()
        other.rebuild()
        return other

    def rebuild(self, keys: Tensor | None = None) -> None:
        super().rebuild(keys)
        faiss, table = self._faiss, self.keys.numpy()
        if self.kind == "hnsw":
            self._index = faiss.IndexHNSWFlat(self.dim, 32, faiss.METRIC_INNER_PRODUCT)
        else:
            # faiss wants at least 39 keys per group to learn the centres.
            groups = max(1, min(math.isqrt(len(table)), len(table) // 39))
            self._centres = faiss.IndexFlatIP(self.dim)
            of_keys = (self._centres, self.dim, groups)
            if len(table) < CODED_FROM:
                self._index = faiss.IndexIVFFlat(*of_keys, faiss.METRIC_INNER_PRODUCT)
            else:
                coded = faiss.ScalarQuantizer.QT_8bit
                self._index = faiss.IndexIVFScalarQuantizer(*of_keys, coded, faiss.METRIC_INNER_PRODUCT, False)
            self._index.cp.max_points_per_centroid = 64
            self._index.train(table)
            self._index.make_direct_map()  # where the key of a slot is, to replace it
        self._index.add(table)
        self._beside = torch.empty(0, dtype=torch.long)
        # One bit per slot that faiss may find. The selector points to these bytes, so a change of few slots changes few
        # bits. There is space for slots to come.
        self._bits = np.packbits(self.present.numpy(), bitorder="little")
        self._all_valid = bool(self.present.all())
        if (used := len(table) % 8) != 0:
            self._bits[-1] |= 0xFF << used & 0xFF
        self._make_room()

    def _make_room(self) -> None:
        room = np.full(len(self._bits) // 4 + 64, 0xFF, np.uint8)
        self._bits = np.concatenate([self._bits, room])
        self._selector = self._faiss.IDSelectorBitmap(self._bits)

    def _hide(self, slots: Tensor) -> None:
        """Keeps faiss from finding slots."""
        np.bitwise_and.at(self._bits, slots.numpy() >> 3, ~(1 << (slots.numpy() & 7)).astype(np.uint8))
        self._all_valid = False

    def _append(self, keys: Tensor) -> None:
        super()._append(keys)
        self._index.add(keys.numpy())
        if len(self.keys) > 8 * len(self._bits):
            self._make_room()

    def remove(self, slots: Integer[Tensor, " n"]) -> None:
        super().remove(slots)
        self._hide(slots.cpu())

    def update(self, slots: Integer[Tensor, " n"], keys: Float[Tensor, "n E"]) -> None:
        super().update(slots, keys)
        slots = slots.cpu().unique()
        if self.kind == "ivf":
            self._index.update_vectors(slots.numpy(), self.keys[slots].numpy())
            return
        self._hide(slots)
        self._beside = torch.cat([self._beside, slots]).unique()
        if len(self._beside) > max(FOLDED_LEAST, FOLDED_SHARE * self.num_slots):
            self.rebuild()

    def _search(self, queries: Tensor, k: int) -> Hits:
        scores, slots = self._index.search(queries.numpy(), k, params=self._parameters())
        found, beside = Hits(torch.from_numpy(scores), torch.from_numpy(slots)), self._beside
        if isinstance(self._index, self._faiss.IndexIVFScalarQuantizer):  # whose scores are those of rounded keys
            exact = (self.keys[found.slots.clamp(min=0)] @ queries.unsqueeze(-1)).squeeze(-1)
            order = exact.masked_fill(found.slots < 0, -math.inf).argsort(dim=-1, descending=True)
            found = Hits(exact.gather(-1, order), found.slots.gather(-1, order))
        found = Hits(found.scores.masked_fill(found.slots < 0, -math.inf), found.slots)
        if len(beside):
            updated = _exact(queries, self.keys[beside], self.present[beside], k)
            found = _merged([found, Hits(updated.scores, beside[updated.slots])], k)
        none = (found.scores == -math.inf).all(-1)
        if bool(none.any()):  # The graph search fails if most of its nodes were removed.
            every = _exact(queries[none], self.keys, self.present, k)
            found.scores[none, : every.scores.shape[1]] = every.scores
            found.slots[none, : every.slots.shape[1]] = every.slots
        return found

    def _parameters(self) -> Any:
        faiss, settings = self._faiss, {} if self._all_valid else {"sel": self._selector}
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=self.effort or 128, **settings)
        usual = min(math.ceil(2 * math.sqrt(self._index.nlist)), MOST_GROUPS)
        effort = min(self.effort or usual, self._index.nlist)
        return faiss.SearchParametersIVF(nprobe=effort, **settings)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.kind})"
