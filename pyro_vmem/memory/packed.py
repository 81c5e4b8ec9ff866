"""A memory of millions of templates: stored as bits or bytes, decoded and encoded as they are read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_vmem.memory.index import AddressIndex
from pyro_vmem.memory.memory import EncodedMemory, Memory, Template
from pyro_vmem.memory.packing import pack_templates, row_shape, unpack_templates, write_rows

__all__ = ["LazyMemory", "PackedMemory"]

SEARCHED_AT_ONCE = 1024  # templates that are encoded at once where features alone are kept
MOST_AT_ONCE = 1 << 28  # values that are decoded at once if somebody asks for all templates, 1 GB


class PackedMemory(Memory):
    r"""A memory whose templates are stored as bits (binary values) or bytes (grey levels), in RAM or in a file.

    A million 28x28 binary images are 98 MB instead of 3.1 GB. Reads decode only what is read; a file is mapped, so that
    a memory may be larger than the RAM. It is shared by the minibatch.

    `VMA.encode` encodes templates of such a memory as they are read. Parts that look at all slots refuse a large one;
    :class:`IndexedGuide` looks in its `index`, which :func:`index_memory` makes. :func:`add_templates` and
    :meth:`remove` change a memory between steps, without retraining.

    Arguments:
        packed: Integers of type uint8: `(S, ceil(N / 8))` for bits, `N` the number of values of a template, in the
            order of `numpy.packbits`; or `(S, *event)` for bytes.
        event_shape: The shape of one template.
        bits: 1 or 8 for each value; bytes are divided by 255.
        labels: The class of each slot, integers `(S,)`.
        mask: True where a slot is in use, `(S,)`.
        index: The keys of the slots.
        dtype: What templates are decoded to.
        device: Where they are decoded to. Default: where `packed` is.

    Raises:
        ValueError: If shapes or dtypes do not fit together, or no slot is in use.

    Example:
        >>> images = (torch.rand(1000, 1, 28, 28) > 0.5).float()
        >>> memory = PackedMemory.pack(images)
        >>> memory
        PackedMemory(1000 slots of (1, 28, 28), shared, 1 bit a value)
        >>> bool((memory.read(torch.tensor([3, 7])) == images[[3, 7]]).all()), memory.packed.shape
        (True, torch.Size([1000, 98]))
    """

    def __init__(
        self,
        packed: Tensor,
        event_shape: Sequence[int],
        bits: Literal[1, 8] = 1,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        index: AddressIndex | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if bits not in (1, 8):
            raise ValueError(f"bits: expected 1 or 8, got {bits!r}.")
        self.packed, self._event_shape, self.bits = packed, torch.Size(event_shape), bits
        self.added = packed[:0]  # beside what may be a file
        self.labels, self.mask, self.index = labels, mask, index
        self.per_datapoint = False
        self._dtype, self._device = dtype, torch.device(device) if device is not None else packed.device
        self._check()

    def _check(self) -> None:
        row = row_shape(self._event_shape, self.bits)
        if self.packed.dtype != torch.uint8 or tuple(self.packed.shape[1:]) != row or self.num_slots == 0:
            raise ValueError(
                f"packed: expected uint8 values (S, {', '.join(map(str, row))}) for {self.bits}-bit templates of shape "
                f"{tuple(self._event_shape)}, got {self.packed.dtype} {tuple(self.packed.shape)}. "
                "Make it with PackedMemory.pack(templates)."
            )
        for name, value in (("labels", self.labels), ("mask", self.mask)):
            if value is not None and value.shape != (self.num_slots,):
                raise ValueError(f"{name}: expected shape ({self.num_slots},), got {tuple(value.shape)}.")
        if self.labels is not None and (self.labels.is_floating_point() or self.labels.is_complex()):
            raise ValueError(f"labels: expected integers, got {self.labels.dtype}. Use `labels.long()`.")
        if self.mask is not None and (self.mask.dtype != torch.bool or not bool(self.mask.any())):
            raise ValueError("mask: expected dtype torch.bool and a slot in use. Use `mask.bool()`.")
        if self.index is not None and self.index.num_slots != self.num_slots:
            raise ValueError(f"index: it has {self.index.num_slots} slots, the memory {self.num_slots}. Make it anew.")

    @classmethod
    def pack(
        cls,
        templates: Tensor | Iterable[Tensor],
        bits: Literal[1, 8] = 1,
        labels: Tensor | None = None,
        path: str | Path | None = None,
    ) -> PackedMemory:
        """Packs templates, into a file if a path is given.

        Arguments:
            templates: The templates, `(S, *event)`, or some at a time, `(n, *event)` each; binary for 1 bit, in [0, 1]
                for 8 bits, which are rounded to 256 levels.
            bits: 1 or 8 for each value.
            labels: The class of each slot, integers `(S,)`.
            path: The file, in the `.npy` format; what is in it already is replaced. The memory is then mapped from it.

        Raises:
            ValueError: If templates do not have these values.

        Example:
            >>> PackedMemory.pack((torch.rand(100, 1, 8, 8) for _ in range(3)), bits=8)
            PackedMemory(300 slots of (1, 8, 8), shared, 8 bits a value)
        """
        batches = iter([templates] if isinstance(templates, Tensor) else templates)
        first = next(batches, None)
        if first is None or len(first) == 0:
            raise ValueError("templates: expected at least one, got none.")
        event_shape = first.shape[1:]

        def packed() -> Iterable[Tensor]:
            yield pack_templates(first, event_shape, bits)
            for batch in batches:
                yield pack_templates(batch, event_shape, bits)

        if path is None:
            return cls(torch.cat(list(packed())), event_shape, bits, labels, dtype=first.dtype)
        write_rows(Path(path), packed(), row_shape(event_shape, bits))
        return cls.open(path, event_shape, bits, labels)

    @classmethod
    def open(
        cls, path: str | Path, event_shape: Sequence[int], bits: Literal[1, 8] = 1, labels: Tensor | None = None
    ) -> PackedMemory:
        """Maps a file that :meth:`pack` wrote: templates are read from it as they are needed.

        Arguments:
            path: The file, in the `.npy` format.
            event_shape: The shape of one template.
            bits: 1 or 8 for each value.
            labels: The class of each slot, integers `(S,)`.

        Raises:
            ValueError: If it holds templates of another size.
        """
        # Read-only: a map that could be written to would have to fit into the RAM. Nothing here writes to it.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            packed = torch.from_numpy(np.load(path, mmap_mode="r", allow_pickle=False))
        return cls(packed, event_shape, bits, labels)

    @property
    def num_slots(self) -> int:
        """The number of slots :math:`S`, masked ones included."""
        return len(self.packed) + len(self.added)

    @property
    def batch_shape(self) -> torch.Size:
        """`()`: the memory is shared."""
        return torch.Size()

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one template."""
        return self._event_shape

    @property
    def device(self) -> torch.device:
        """Where templates are when they have been read."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """What templates are when they have been read."""
        return self._dtype

    @property
    def templates(self) -> Tensor:  # type: ignore[override]  # made of what is stored
        """All templates, decoded: `(S, *event)`.

        Raises:
            ValueError: If they are too many to be decoded at once.
        """
        self.refuse_all()
        return self.read(torch.arange(self.num_slots, device=self.device))

    def refuse_all(self) -> None:
        """Raises a `ValueError` if templates are too many for all `(S, *event)` to be looked at."""
        if self.num_slots * self.event_shape.numel() > MOST_AT_ONCE:
            gigabytes = 4e-9 * self.num_slots * self.event_shape.numel()
            raise ValueError(
                f"memory: what was asked for looks at all of its {self.num_slots:,} templates, {gigabytes:.1f} GB when "
                "decoded. Use parts that do not, IndexedGuide and UniformPrior, and memory.read(a) for some."
            )

    def encoded_by(self, encoder: Callable[[Tensor], Template]) -> LazyMemory:
        """This memory, whose templates are encoded as they are read."""
        return LazyMemory(self, encoder)

    def read(self, a: Tensor) -> Tensor:
        """Reads and decodes :math:`m_a`; as of :class:`Memory`."""
        at = a.flatten().to(self.packed.device)
        if at.device.type == "cpu" and bool(((at < 0) | (at >= self.num_slots)).any()):
            raise IndexError(f"a: expected addresses in 0..{self.num_slots - 1}, got {at.min()}..{at.max()}.")
        rows = self.packed.index_select(0, at.clamp(max=len(self.packed) - 1))
        if len(self.added):
            is_added = at >= len(self.packed)
            rows[is_added] = self.added[at[is_added] - len(self.packed)]
        values = unpack_templates(rows.to(self.device), self.event_shape, self.bits, self.dtype)
        return values.reshape(*a.shape, *self.event_shape)

    def add(self, templates: Tensor, labels: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """Appends templates; returns their slots, integers `(n,)`. :func:`add_templates` computes the keys.

        Arguments:
            templates: The templates, with shape `(n, *event)`; as of :meth:`pack`.
            labels: Their classes, integers `(n,)`, if the memory has labels.
            keys: Their keys `(n, E)`, if the memory has an index.

        Raises:
            ValueError: If the templates do not fit, or labels or keys are missing.
        """
        new = pack_templates(templates, self.event_shape, self.bits).to(self.packed.device)
        for name, value, here in (("labels", labels, self.labels), ("keys", keys, self.index)):
            if (value is None) != (here is None) or (value is not None and len(value) != len(new)):
                raise ValueError(
                    f"{name}: expected {'none, as the memory has' if here is None else f'{len(new)}, one a template'}, "
                    f"got {'none' if value is None else len(value)}."
                )
        if keys is not None:
            assert self.index is not None
            self.index.add(keys)  # which refuses keys that do not fit before anything is added
        slots = torch.arange(self.num_slots, self.num_slots + len(new), device=self.device)
        self.added = torch.cat([self.added, new])
        if labels is not None:
            assert self.labels is not None
            self.labels = torch.cat([self.labels, labels.to(self.labels)])
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(new))])
        return slots

    def remove(self, slots: Tensor) -> None:
        """Takes slots out of use; the others keep their numbers.

        Arguments:
            slots: Their numbers, integers `(n,)`.

        Raises:
            ValueError: If no slot would be left.
            IndexError: If one is not a slot.
        """
        mask = torch.ones(self.num_slots, dtype=torch.bool, device=self.device) if self.mask is None else self.mask
        mask = mask.index_fill(0, slots.to(mask.device), False)
        if not bool(mask.any()):
            raise ValueError("slots: no slot would be left in use. A memory needs at least one.")
        if self.index is not None:
            self.index.remove(slots)
        self.mask = mask

    def _map(self, fn: Any) -> PackedMemory:
        """Labels and mask mapped; what is stored stays where it is, and is decoded to the new place."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device), True)
        other = object.__new__(PackedMemory)
        other.__dict__ |= self.__dict__
        other.labels = None if self.labels is None else fn(self.labels, False)
        other.mask = None if self.mask is None else fn(self.mask, False)
        other._dtype, other._device = like.dtype, like.device
        return other

    def __repr__(self) -> str:
        indexed = f", {type(self.index).__name__}" if self.index is not None else ""
        return f"{super().__repr__()[:-1]}, {self.bits} bit{'s' * (self.bits > 1)} a value{indexed})"


class LazyMemory(EncodedMemory):
    r"""A shared memory whose templates are encoded as they are read, each once in a read.

    What was encoded last is kept, so that what the guide has read costs the model nothing; gradients flow through it. A
    part that looks at the features of all slots has all encoded, and what is read after is gathered from these; without
    gradient, as for a search, features alone are kept. It stands wherever an :class:`EncodedMemory` does.

    Arguments:
        memory: The memory, a :class:`PackedMemory` or any other that is shared.
        encoder: Makes the features of templates `(n, *event)`.

    Example:
        >>> from pyro_vmem.parts import MLPEncoder
        >>> memory = LazyMemory(PackedMemory.pack((torch.rand(1000, 8) > 0.5).float()), MLPEncoder((8,), 16))
        >>> memory.read(torch.tensor([[4, 0], [4, 4]])).features.shape  # encodes two templates
        torch.Size([2, 2, 16])
    """

    def __init__(self, memory: Memory, encoder: Callable[[Tensor], Template]) -> None:
        self.memory, self.encoder = memory, encoder
        self.labels, self.mask, self.index, self.per_datapoint = memory.labels, memory.mask, memory.index, False
        self._last: tuple[Tensor, Template, tuple[bool, bool]] | None = None

    @property
    def encoded(self) -> Template:  # type: ignore[override]  # made when asked for
        """All templates with their features; refused if they are too many."""
        last = self._usable()
        if last is None or len(last[0]) < self.num_slots:
            everything = torch.arange(self.num_slots, device=self.device)
            self._last = last = everything, self.encoder(self.memory.templates), self._context()
        return last[1]

    @property
    def features(self) -> Tensor:
        """One feature vector a slot, with shape `(S, F)`; refused if they are too many."""
        last = self._usable()
        if torch.is_grad_enabled() or (last is not None and len(last[0]) == self.num_slots):
            return self.encoded.features
        if isinstance(self.memory, PackedMemory):
            self.memory.refuse_all()
        batches = torch.arange(self.num_slots, device=self.device).split(SEARCHED_AT_ONCE)
        return torch.cat([self.encoder(self.memory.read(some)).features for some in batches])

    @property
    def templates(self) -> Tensor:  # type: ignore[override]  # as above
        """All templates `(S, *event)`; refused if they are too many."""
        return self.memory.templates

    @property
    def num_slots(self) -> int:
        """The number of slots :math:`S`, masked ones included."""
        return self.memory.num_slots

    @property
    def batch_shape(self) -> torch.Size:
        """`()`: the memory is shared."""
        return torch.Size()

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one template."""
        return self.memory.event_shape

    @property
    def device(self) -> torch.device:
        """Where templates are when they have been read."""
        return self.memory.device

    @property
    def dtype(self) -> torch.dtype:
        """What templates are when they have been read."""
        return self.memory.dtype

    def read(self, a: Tensor) -> Template:  # type: ignore[override]  # the same reading, with features
        r"""Reads, decodes and encodes :math:`m_a`; as of :class:`EncodedMemory`."""
        slots, template = self._encoded_at(a)
        return EncodedMemory.of_templates(template).read(torch.searchsorted(slots, a.contiguous()))

    def _encoded_at(self, a: Tensor) -> tuple[Tensor, Template]:
        """Slots in order that are those of `a` at least, and their templates."""
        last = self._usable()
        if last is not None:
            slots, template, _ = last
            at = torch.searchsorted(slots, a.contiguous()).clamp(max=len(slots) - 1)
            if bool((slots[at] == a).all()):
                return slots, template
        slots = a.unique()
        template = self.encoder(self.memory.read(slots))
        self._last = slots, template, self._context()
        return slots, template

    def _usable(self) -> tuple[Tensor, Template, tuple[bool, bool]] | None:
        """What was encoded last; not if that was in another precision, or without a gradient that is wanted now."""
        if self._last is None:
            return None
        (grad, half), (now_grad, now_half) = self._last[2], self._context()
        return self._last if half == now_half and (grad or not now_grad) else None

    def _context(self) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled(self.device.type)

    def _map(self, fn: Any) -> LazyMemory:
        return LazyMemory(self.memory._map(fn), self.encoder)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.memory!r})"
