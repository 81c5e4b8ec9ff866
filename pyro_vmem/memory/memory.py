"""The memory: templates in slots, with labels, a mask and an index, over any store of templates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from pyro_vmem.memory.index import AddressIndex

__all__ = ["Memory", "Store", "TensorStore", "gather"]


class Store(Protocol):
    """The storage of templates: a tensor, packed bits or bytes, or your own database.

    Attributes:
        batch_shape: `()`, or `(B,)` for one memory per datapoint.
        event_shape: The shape of one template.
        dtype: The dtype of templates after reading.
        device: The device of templates after reading.
        is_decoded: Whether templates are stored decoded. If not, they are read and encoded only when needed.
    """

    batch_shape: torch.Size
    event_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    is_decoded: bool

    @property
    def num_slots(self) -> int:
        """The number of slots :math:`S`."""

    @property
    def templates(self) -> Tensor:
        """All templates, `(*batch_shape, S, *event)`; raises a `ValueError` if they are too many to decode at once."""

    def check_size(self) -> None:
        """Raises a `ValueError` if all templates `(S, *event)` are too many to decode at once."""

    def read(self, a: Tensor) -> Tensor:
        """The templates `(*, *event)` at addresses `(*)`; raises an `IndexError` if one is not a slot."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Store:
        """The same templates, with the device and dtype that `fn` gives a tensor."""


class TensorStore:
    """Templates in a tensor, `(S, *event)`, or `(B, S, *event)` for one memory per datapoint."""

    is_decoded = True

    def __init__(self, templates: Tensor, per_datapoint: bool) -> None:
        dims = 1 if per_datapoint else 0
        self.templates, self.batch_shape, self.num_slots = templates, templates.shape[:dims], templates.shape[dims]
        self.event_shape, self.dtype, self.device = templates.shape[dims + 1 :], templates.dtype, templates.device

    def check_size(self) -> None: ...

    def read(self, a: Tensor) -> Tensor:
        """Gathers templates at addresses `(*, B)`; see :func:`gather`."""
        return gather(self.templates, a, len(self.batch_shape) > 0)

    def map(self, fn: Callable[[Tensor], Tensor]) -> TensorStore:
        return TensorStore(fn(self.templates), len(self.batch_shape) > 0)


def gather(values: Tensor, a: Tensor, per_datapoint: bool) -> Tensor:
    """Gathers `values` `(S, *)` or `(B, S, *)` at addresses `a` `(*, B)`; raises an `IndexError` if one is no slot."""
    if per_datapoint:
        batch, num_slots = values.shape[:2]
        # Rows of all memories are adjacent below, so an address past the end would read another memory.
        # (On a GPU the check would force a synchronisation, so there the categorical is trusted.)
        if a.device.type == "cpu" and bool(((a < 0) | (a >= num_slots)).any()):
            raise IndexError(f"a: expected addresses in 0..{num_slots - 1}, got {a.min()}..{a.max()}.")
        offset = num_slots * torch.arange(batch, device=a.device)
        a = (a + offset).expand(torch.broadcast_shapes(a.shape, (batch,)))
        values = values.flatten(0, 1)
    # An embedding lookup of whole rows: the backward pass of advanced indexing is several times slower. Maps are
    # gathered channels last, the fastest layout for the convolutions around them.
    is_map = values.dim() == 4
    if is_map:
        values = values.permute(0, 2, 3, 1)
    rows = F.embedding(a, values.reshape(values.shape[0], -1)).reshape(*a.shape, *values.shape[1:])
    return rows.movedim(-1, -3) if is_map else rows


class Memory:
    r"""A memory :math:`M = (m_1, \ldots, m_S)`: one template per slot.

    The whole minibatch shares one memory, or each datapoint has its own.

    Arguments:
        templates: The templates, with shape `(S, *event)` if shared, or `(B, S, *event)` if one per datapoint; or a
            :class:`Store` of shared ones.
        labels: The class of each slot, integers with shape `(S,)` or `(B, S)`. Only evaluation uses them.
        mask: True where a slot is in use, with shape `(S,)` or `(B, S)`. Other slots are never read.
        per_datapoint: Whether the templates are `(B, S, *event)`. Default: decided by the number of dims of `labels`
            or `mask`; without these, the memory is shared.
        index: The keys of the slots of a shared memory, for :class:`IndexedGuide`.

    Raises:
        ValueError: If shapes or dtypes do not fit together, a template is not finite, or no slot is in use.

    Attributes:
        event_shape: The shape of one template.
        batch_shape: `(B,)` for one memory per datapoint, `()` for a shared one.
        dtype: The dtype of templates when they have been read.
        device: The device of templates when they have been read.

    Example:
        >>> memory = Memory(torch.rand(5, 1, 8, 8), labels=torch.tensor([0, 0, 1, 1, 2]))
        >>> memory
        Memory(5 slots of (1, 8, 8), shared, 3 classes)
        >>> memory.read(torch.tensor([[4, 0, 0], [1, 2, 3]])).shape
        torch.Size([2, 3, 1, 8, 8])
    """

    def __init__(
        self,
        templates: Float[Tensor, "..."] | Store,
        labels: Integer[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        per_datapoint: bool | None = None,
        index: AddressIndex | None = None,
    ) -> None:
        if per_datapoint is None:
            guide = labels if labels is not None else mask
            per_datapoint = guide is not None and guide.dim() == 2
        if isinstance(templates, Tensor):
            if templates.dim() <= 1 + per_datapoint or templates.numel() == 0:
                raise ValueError(
                    f"templates: expected shape {'(B, S, *event)' if per_datapoint else '(S, *event)'} with at least "
                    f"one slot, got {tuple(templates.shape)}. A scalar event needs a trailing dim of size 1."
                )
            if not bool(torch.isfinite(templates).all()):
                raise ValueError(
                    "templates: found NaN or infinite values. Clean them, or mask those slots and set them to 0"
                )
            templates = TensorStore(templates, per_datapoint)
        self._hold(templates, labels, mask, index)
        self._check()

    def _hold(self, store: Store, labels: Tensor | None, mask: Tensor | None, index: AddressIndex | None) -> None:
        self.store, self.labels, self.mask, self.index = store, labels, mask, index
        self._sorted: tuple[Tensor, int | None, Tensor] | None = None
        self.batch_shape, self.per_datapoint = store.batch_shape, len(store.batch_shape) > 0
        self.event_shape, self.dtype, self.device = store.event_shape, store.dtype, store.device

    def _check(self) -> None:
        slots = torch.Size([*self.batch_shape, self.num_slots])
        for name, value in (("labels", self.labels), ("mask", self.mask)):
            if value is not None and value.shape != slots:
                raise ValueError(
                    f"{name}: expected shape {tuple(slots)}, one entry per slot of templates "
                    f"{(*slots, *self.event_shape)}, got {tuple(value.shape)}. For one memory per datapoint pass "
                    "per_datapoint=True."
                )
        if self.mask is not None and not bool(self.mask.any(-1).all()):
            raise ValueError("mask: no slot is in use. A memory needs at least one; add a blank template.")
        if self.index is not None and (self.per_datapoint or self.index.num_slots != self.num_slots):
            raise ValueError(
                f"index: it has {self.index.num_slots} slots, the memory {tuple(slots)}. Make it with index_memory."
            )

    @property
    def templates(self) -> Tensor:
        """All templates, `(S, *event)` or `(B, S, *event)`; raises a `ValueError` if too many to decode at once."""
        return self.store.templates

    @property
    def num_slots(self) -> int:
        """The number of slots :math:`S`, masked ones included."""
        return self.store.num_slots

    @property
    def slots_in_use(self) -> Tensor:
        """The number of unmasked slots, with shape `batch_shape`; integers."""
        if self.mask is None:
            return torch.full(self.batch_shape, self.num_slots, device=self.device)
        return self.mask.sum(-1)

    def read(self, a: Integer[Tensor, "..."]) -> Tensor:
        r"""Reads :math:`m_a`.

        Arguments:
            a: The addresses, with shape `(*, B)` (or `(*, 1)` for one address for the whole batch); integers.

        Returns:
            The templates at those addresses, with shape `(*, B, *event)`.

        Raises:
            IndexError: If an address is not a slot.
        """
        return self.store.read(a)

    def by_class(self, probs: Float[Tensor, "..."], slots: Integer[Tensor, "..."] | None = None) -> Tensor:
        r"""Adds up the probabilities of the slots of each class: :math:`\sum_{a: c_a = c} p_a`.

        Arguments:
            probs: Probabilities of the slots, with shape `(*, B, S)`, or of some, `(*, B, k)`.
            slots: The slots of these probabilities, integers `(*, B, k)`. Default: all.

        Returns:
            Probabilities of the classes, `(*, B, C)`. The columns are the sorted classes, `labels.unique()`.

        Raises:
            ValueError: If the memory has no labels, or the probabilities are not one per slot.
        """
        if self.labels is None:
            raise ValueError("labels: by_class needs them, got none. Make the memory with Memory(templates, labels).")
        labels, classes = self.labels, self._classes()
        if probs.shape[-1:] != (slots if slots is not None else labels).shape[-1:]:
            raise ValueError(f"probs: expected one per slot in the last dim, got shape {tuple(probs.shape)}.")
        if slots is not None:
            labels = labels[slots] if not self.per_datapoint else labels.expand(*slots.shape[:-1], -1).gather(-1, slots)
        index = torch.searchsorted(classes, labels.contiguous())
        sums = probs.new_zeros(*probs.shape[:-1], len(classes))
        return sums.scatter_add(-1, index.expand_as(probs), probs)

    def _classes(self) -> Tensor:
        """The classes in memory, sorted once per labels."""
        assert self.labels is not None
        if not self._knows_classes():
            self._remember(self.labels.unique())
        assert self._sorted is not None
        return self._sorted[2]

    def _knows_classes(self) -> bool:
        return self._sorted is not None and self._sorted[0] is self.labels and self._sorted[1] == self._version()

    def _remember(self, classes: Tensor) -> None:
        assert self.labels is not None
        self._sorted = self.labels, self._version(), classes

    def _version(self) -> int | None:
        """A count of the writes to the labels, which inference tensors lack."""
        return None if self.labels is None or self.labels.is_inference() else self.labels._version

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves templates, labels and mask to a device, templates also to a dtype; takes the arguments of `Tensor.to`.

        Like `Tensor.to`, it returns the same object if nothing changes. A copy shares the index until one of the two
        adds or removes a slot.
        """
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        moved = probe.to(*args, **kwargs)
        if moved is probe:
            return self
        non_blocking = kwargs.get("non_blocking", False)
        # Labels and mask keep their dtype: bfloat16 cannot represent class 257.
        return self._map(
            lambda values: values.to(*args, **kwargs), lambda slots: slots.to(moved.device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Self:
        """Copies every tensor to page-locked memory, for `torch.utils.data.DataLoader(pin_memory=True)`."""
        return self._map(lambda values: values.pin_memory(), lambda slots: slots.pin_memory())

    def _map(self, values: Callable[[Tensor], Tensor], slots: Callable[[Tensor], Tensor]) -> Self:
        """A copy with `values` applied to templates, and `slots` to labels and mask."""
        other = copy.copy(self)
        labels, mask = (None if tensor is None else slots(tensor) for tensor in (self.labels, self.mask))
        other._hold(self.store.map(values), labels, mask, self.index)
        return other

    if not TYPE_CHECKING:  # Otherwise type checkers would accept any attribute.

        def __getattr__(self, name: str) -> Any:
            hint = " Encode it, `vma.encode(memory)`." if name in ("features", "encoded", "is_lazy") else ""
            raise AttributeError(f"memory: a {type(self).__name__} has no {name!r}.{hint}")

    def __len__(self) -> int:
        return self.num_slots

    def __repr__(self) -> str:
        kind = f"one for each of {self.batch_shape.numel()} datapoints" if self.per_datapoint else "shared"
        parts = [f"{self.num_slots} slots of {tuple(self.event_shape)}", kind]
        if self.labels is not None:
            parts.append(f"{len(self._classes())} classes")
        if self.mask is not None:
            parts.append(f"{int(self.mask.sum())} of {self.mask.numel()} in use")
        return f"{type(self).__name__}({', '.join(parts)})"
