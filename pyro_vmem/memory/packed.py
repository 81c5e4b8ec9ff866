"""A memory of millions of templates, stored as bits or bytes, in RAM or in a file."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor

from pyro_vmem._utils.checks import Size, checked, device_named
from pyro_vmem.memory.growing import Growing
from pyro_vmem.memory.index import AddressIndex
from pyro_vmem.memory.memory import Memory, Store

__all__ = ["PackedMemory", "PackedStore"]

MOST_AT_ONCE = 1 << 28  # the most values decoded at once, 1 GB
WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)  # of the bits of a byte, as `numpy.packbits` has them


class PackedStore(Store):
    """Templates as bits (binary values) or bytes (grey levels), decoded on reading.

    The arguments are those of :class:`PackedMemory`.

    Raises:
        ValueError: If `packed` does not have the shape and dtype of packed templates.
    """

    batch_shape = torch.Size()
    is_decoded = False

    def __init__(
        self,
        packed: UInt8[Tensor, "S ..."],
        event_shape: Sequence[Size],
        bits: Literal[1, 8] = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.packed, self.event_shape, self.bits, self.dtype = packed, torch.Size(event_shape), bits, dtype
        self.device = device_named(device) if device is not None else packed.device
        self.added = Growing(packed[:0])  # rows added to what may be a file
        row = self.row_shape
        if tuple(packed.shape[1:]) != row or len(packed) == 0:
            raise ValueError(
                f"packed: expected uint8 values (S, {', '.join(map(str, row))}) for {bits}-bit templates of shape "
                f"{tuple(self.event_shape)}, got {packed.dtype} {tuple(packed.shape)}. "
                "Make it with PackedMemory.pack(templates)."
            )

    @property
    def num_slots(self) -> int:
        return len(self.packed) + len(self.added.values)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one packed template."""
        return (-(-self.event_shape.numel() // 8),) if self.bits == 1 else tuple(self.event_shape)

    @property
    def templates(self) -> Tensor:
        self.check_size()
        return self.read(torch.arange(self.num_slots, device=self.device))

    def check_size(self) -> None:
        if self.num_slots * self.event_shape.numel() > MOST_AT_ONCE:
            gigabytes = 4e-9 * self.num_slots * self.event_shape.numel()
            raise ValueError(
                f"memory: this would decode all {self.num_slots:,} templates, {gigabytes:.1f} GB. Use parts that read "
                "few slots, IndexedGuide and UniformPrior, or read some templates by memory.read(a)."
            )

    def read(self, a: Tensor) -> Tensor:
        at = a.flatten().to(self.packed.device)
        if at.device.type == "cpu" and bool(((at < 0) | (at >= self.num_slots)).any()):
            raise IndexError(f"a: expected addresses in 0..{self.num_slots - 1}, got {at.min()}..{at.max()}.")
        values = _unpack(self._rows(at).to(self.device), self.event_shape, self.bits, self.dtype)
        return values.reshape(*a.shape, *self.event_shape)

    def _rows(self, at: Tensor) -> Tensor:
        """The templates at slots `(n,)` as they are stored, `(n, *row_shape)`."""
        rows, added = self.packed.index_select(0, at.clamp(max=len(self.packed) - 1)), self.added.values
        if len(added):
            is_added = at >= len(self.packed)
            rows[is_added] = added[at[is_added] - len(self.packed)]
        return rows

    def append(self, rows: Tensor) -> PackedStore:
        """The store with packed templates `(n, *row_shape)` appended; existing ones are not copied."""
        other = copy.copy(self)
        other.added = self.added.append(rows)
        return other

    def map(self, fn: Callable[[Tensor], Tensor]) -> PackedStore:
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        other = copy.copy(self)
        other.dtype, other.device = like.dtype, like.device
        return other


class PackedMemory(Memory):
    r"""A memory whose templates are stored as bits (binary values) or bytes (grey levels), in RAM or in a file.

    A million 28x28 binary images take 98 MB instead of 3.1 GB. A read decodes only the templates read. A file is
    memory-mapped, so memory may be larger than RAM. The whole minibatch shares the memory.

    The templates are encoded when they are read. Parts that need all slots refuse a large memory. :class:`IndexedGuide`
    searches its `index`, which :func:`index_memory` makes. :func:`add_templates` and :meth:`remove` change the memory
    between steps, without retraining.

    Arguments:
        packed: Integers of type uint8: `(S, ceil(N / 8))` for bits, in the order of `numpy.packbits`, where `N` is the
            number of values of a template; or `(S, *event)` for bytes.
        event_shape: The shape of one template.
        bits: Bits per value, 1 or 8; bytes are divided by 255.
        labels: The class of each slot, integers `(S,)`.
        mask: True where a slot is in use, `(S,)`.
        index: The keys of the slots.
        dtype: The dtype of decoded templates.
        device: The device of decoded templates. Default: that of `packed`.

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

    store: PackedStore

    def __init__(
        self,
        packed: UInt8[Tensor, "S ..."],
        event_shape: Sequence[Size],
        bits: Literal[1, 8] = 1,
        labels: Integer[Tensor, " S"] | None = None,
        mask: Bool[Tensor, " S"] | None = None,
        index: AddressIndex | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(PackedStore(packed, event_shape, bits, dtype, device), labels, mask, index=index)
        self._begin()

    def _begin(self) -> None:
        self._grown_labels = None if self.labels is None else Growing(self.labels)
        self._grown_mask: Growing | None = None
        self._in_use, self._shares_index = 0, False

    @classmethod
    def pack(
        cls,
        templates: Tensor | Iterable[Tensor],
        bits: Literal[1, 8] = 1,
        labels: Tensor | None = None,
        path: str | Path | None = None,
    ) -> PackedMemory:
        """Packs templates into RAM, or into a file if a path is given.

        Arguments:
            templates: The templates, `(S, *event)`, or batches of them, `(n, *event)`. For 1 bit they are binary. For 8
                bits they are in [0, 1] and are rounded to 256 levels.
            bits: Bits per value, 1 or 8.
            labels: The class of each slot, integers `(S,)`.
            path: The file, in the `.npy` format. An existing file is replaced. The memory is then mapped from it.

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
            yield _pack(first, event_shape, bits)
            for batch in batches:
                yield _pack(batch, event_shape, bits)

        if path is None:
            return cls(torch.cat(list(packed())), event_shape, bits, labels, dtype=first.dtype)
        _write_rows(Path(path), packed())
        return cls.open(path, event_shape, bits, labels)

    @classmethod
    def open(
        cls, path: str | Path, event_shape: Sequence[int], bits: Literal[1, 8] = 1, labels: Tensor | None = None
    ) -> PackedMemory:
        """Memory-maps a `.npy` file of :meth:`pack`; arguments, shapes and errors are those of the class.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        # Read-only: a writable map would have to fit into RAM.
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: there is no file {str(path)!r}. Make it with PackedMemory.pack(..., path).")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            packed = torch.from_numpy(np.load(path, mmap_mode="r", allow_pickle=False))
        return cls(packed, event_shape, bits, labels)

    @property
    def packed(self) -> Tensor:
        """The packed templates, with shape `(S, bytes)`, without added ones."""
        return self.store.packed

    @property
    def bits(self) -> Literal[1, 8]:
        """The number of bits per value."""
        return self.store.bits

    @checked
    def add(
        self,
        templates: Float[Tensor, "n ..."],
        labels: Integer[Tensor, " n"] | None = None,
        keys: Float[Tensor, "n E"] | None = None,
    ) -> Tensor:
        """Appends templates; returns their slots, integers `(n,)`. :func:`add_templates` computes the keys.

        After an error nothing is changed. Existing templates are not copied.

        Arguments:
            templates: The templates, with shape `(n, *event)`; see :meth:`pack`.
            labels: Their classes, integers `(n,)`, if the memory has labels.
            keys: Their keys `(n, E)`, if the memory has an index.

        Raises:
            ValueError: If the templates do not fit, or labels or keys are missing.
        """
        rows = _pack(templates, self.event_shape, self.bits).to(self.packed.device)
        for name, value, here in (("labels", labels, self.labels), ("keys", keys, self.index)):
            if (value is None) != (here is None):
                expected, got = ("none, as the memory has", "some") if here is None else ("one a template", "none")
                raise ValueError(f"{name}: expected {expected}, got {got}.")
        if labels is not None:
            labels = self._new_labels(labels)
        slots = torch.arange(self.num_slots, self.num_slots + len(rows), device=self.device)
        self.store = self._stored(rows, labels, keys)  # raises if keys do not fit; all else has been checked
        if labels is not None:
            assert self._grown_labels is not None
            classes = self._classes() if self._knows_classes() else None
            self._grown_labels = self._grown_labels.append(labels)
            self.labels = self._grown_labels.values
            if classes is not None:  # without sorting all labels again
                self._remember(torch.cat([classes, labels]).unique())
        if self.mask is not None:
            self._grown_mask = self._own_mask().append(self.mask.new_ones(len(rows)))
            self.mask, self._in_use = self._grown_mask.values, self._in_use + len(rows)
        return slots

    def _stored(self, rows: Tensor, labels: Tensor | None, keys: Tensor | None) -> PackedStore:
        """Stores new rows and their keys; returns the store that has them. If it raises, nothing has changed."""
        if keys is not None:
            self._own_index().add(keys)
        return self.store.append(rows)

    def remove(self, slots: Integer[Tensor, " n"]) -> None:
        """Removes slots, integers `(n,)`; the others keep their numbers.

        Raises:
            ValueError: If no slot would remain.
            IndexError: If one is not a slot.
        """
        if bool(((slots < 0) | (slots >= self.num_slots)).any()):
            raise IndexError(f"slots: expected 0..{self.num_slots - 1}, got {slots.min()}..{slots.max()}.")
        mask, slots = self._own_mask().values, slots.to(self.device).unique()
        left = self._in_use - int(mask[slots].sum())
        if not left:
            raise ValueError("slots: no slot would be left in use. A memory needs at least one.")
        if self.index is not None:
            self._own_index().remove(slots)
        mask[slots] = False
        self.mask, self._in_use = mask, left

    @property
    def slots_in_use(self) -> Tensor:
        known = self.mask is not None and self._grown_mask is not None and self._grown_mask.values is self.mask
        return torch.tensor(self._in_use, device=self.device) if known else super().slots_in_use

    def _own_mask(self) -> Growing:
        """The mask as one that can be written to: a copy, the first time and after a copy of this memory by `to`."""
        if self._grown_mask is None or self._grown_mask.values is not self.mask:
            ones = torch.ones(self.num_slots, dtype=torch.bool, device=self.device)
            self._grown_mask = Growing(ones if self.mask is None else self.mask).with_room()
            self._in_use = int(self._grown_mask.values.sum())
        return self._grown_mask

    def _new_labels(self, labels: Tensor) -> Tensor:
        """Labels with the dtype and device of the present ones; raises a `ValueError` if the dtype cannot hold them."""
        assert self.labels is not None
        converted = labels.to(self.labels)
        if not bool((converted == labels.to(converted.device)).all()):
            raise ValueError(
                f"labels: {labels.min()}..{labels.max()} do not fit into the memory's labels, {self.labels.dtype}. "
                "Make the memory with labels of a larger dtype, `labels.long()`."
            )
        return converted

    def _own_index(self) -> AddressIndex:
        """The index, copied if a copy of this memory by `to` shares it."""
        assert self.index is not None
        if self._shares_index:
            self.index, self._shares_index = self.index.copy(), False
        return self.index

    def _map(self, values: Callable[[Tensor], Tensor], slots: Callable[[Tensor], Tensor]) -> Self:
        # Copied only when slots come or go, not each time that an episode moves.
        self._shares_index, self._grown_mask = self.index is not None, None
        other = super()._map(values, slots)
        other._grown_labels = None if other.labels is None else Growing(other.labels)
        return other

    def __repr__(self) -> str:
        indexed = f", {type(self.index).__name__}" if self.index is not None else ""
        return f"{super().__repr__()[:-1]}, {self.bits} bit{'s' * (self.bits > 1)} a value{indexed})"


def _pack(templates: Tensor, event_shape: Sequence[int], bits: int) -> Tensor:
    """Templates `(n, *event)` as uint8 rows."""
    if tuple(templates.shape[1:]) != tuple(event_shape) or not templates.is_floating_point():
        raise ValueError(
            f"templates: expected floating-point values (n, {', '.join(map(str, event_shape))}), got "
            f"{templates.dtype} {tuple(templates.shape)}."
        )
    if bits == 1:
        if not bool(((templates == 0) | (templates == 1)).all()):
            raise ValueError("templates: expected binary values, 0 or 1, for bits=1. Use bits=8 for values in [0, 1].")
        flat = templates.flatten(1).to(torch.uint8)
        flat = F.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
        return (flat * flat.new_tensor(WEIGHTS)).sum(-1).to(torch.uint8)
    if not bool(((templates >= 0) & (templates <= 1)).all()):
        raise ValueError("templates: expected values in [0, 1] for bits=8. Scale them, or use a Memory.")
    return (255 * templates).round().to(torch.uint8)


def _unpack(rows: Tensor, event_shape: Sequence[int], bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `_pack`: uint8 rows as templates `(n, *event)`."""
    if bits == 8:
        return rows.to(dtype) / 255
    values = (rows.unsqueeze(-1) & rows.new_tensor(WEIGHTS)) != 0
    return values.flatten(1)[:, : math.prod(event_shape)].to(dtype).unflatten(1, tuple(event_shape))


def _write_rows(path: Path, batches: Iterable[Tensor]) -> None:
    """Writes batches of rows to one `.npy` file; the header gets the number of rows at the end."""
    part, rows = path.with_name(path.name + ".part"), 0
    batches = iter(batches)
    first = next(batches)
    with part.open("wb") as file:
        for final in (False, True):
            file.seek(0)
            # numpy leaves space in the header for a larger first dim
            header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *first.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
            if not final:
                for batch in itertools.chain([first], batches):
                    file.write(batch.cpu().numpy().tobytes())
                    rows += len(batch)
    part.replace(path)
