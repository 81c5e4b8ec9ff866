"""The memory of a model: templates in slots, and how they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vmem.memory.index import AddressIndex

__all__ = ["EncodedMemory", "Memory", "Template"]


@dataclass(frozen=True, eq=False)
class Template:
    r"""An observation beside its features: a slot's template :math:`m_a`, or a target :math:`x` seen the same way.

    Leading dims are (enumeration, particle, batch); they are the same for all fields.

    Attributes:
        raw: The observation itself, with shape `(*, *event)`.
        features: One vector for the whole observation, with shape `(*, F)`.
        maps: Feature maps, fine to coarse, each with shape `(*, C, H, W)`; empty where there is no image.

    Example:
        >>> template = Template(torch.rand(5, 1, 8, 8), torch.rand(5, 16))
        >>> template.leading_shape
        torch.Size([5])
    """

    raw: Tensor
    features: Tensor
    maps: tuple[Tensor, ...] = ()

    @property
    def leading_shape(self) -> torch.Size:
        """The dims that are not the event's."""
        return torch.Size(self.features.shape[:-1])  # a tuple, of tensors whose provenance Pyro follows

    def of_each(self, fn: Callable[[Template], Tensor]) -> Tensor:
        """What `fn` makes of these templates, at no more work than there are different ones.

        Arguments:
            fn: From a template of any leading shape `(*)` to images `(*, C, H, W)`, each from one template alone.

        Returns:
            The images, `(*, C, H, W)`.
        """
        return fn(self)


class Memory:
    r"""A memory :math:`M = (m_1, \ldots, m_S)`: one template to a slot.

    A memory is read, never written. It is shared by the whole minibatch, or there is one for each datapoint.

    Arguments:
        templates: The templates, with shape `(S, *event)` if shared, or `(B, S, *event)` if one per datapoint.
        labels: The class of each slot, with shape `(S,)` or `(B, S)`; integers. Only evaluation looks at them.
        mask: True where a slot is in use, with shape `(S,)` or `(B, S)`. A slot that is not in use is never read.
        per_datapoint: Whether the templates are `(B, S, *event)`. If not given, the number of dims of `labels` or
            `mask` tells; if those are not given either, the memory is taken to be shared.

    Raises:
        ValueError: If shapes or dtypes do not fit together, a template is not finite, or no slot is in use.

    Example:
        >>> memory = Memory(torch.rand(5, 1, 8, 8), labels=torch.tensor([0, 0, 1, 1, 2]))
        >>> memory
        Memory(5 slots of (1, 8, 8), shared, 3 classes)
        >>> memory.read(torch.tensor([[4, 0, 0], [1, 2, 3]])).shape
        torch.Size([2, 3, 1, 8, 8])
    """

    index: AddressIndex | None = None  # for what is too large to look through

    def __init__(
        self,
        templates: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        per_datapoint: bool | None = None,
    ) -> None:
        if per_datapoint is None:
            guide = labels if labels is not None else mask
            per_datapoint = guide is not None and guide.dim() == 2
        self.templates = templates
        self.labels = labels
        self.mask = mask
        self.per_datapoint = per_datapoint
        self._check()

    def _check(self) -> None:
        templates, slot_dims = self.templates, 2 if self.per_datapoint else 1
        layout = "(B, S, *event)" if self.per_datapoint else "(S, *event)"
        if not templates.is_floating_point():
            raise ValueError(
                f"templates: expected floating-point values, got {templates.dtype}. "
                "Convert them: images in 0..255 become `images / 255`."
            )
        if templates.dim() <= slot_dims or templates.numel() == 0:
            raise ValueError(
                f"templates: expected shape {layout} with at least one slot, got {tuple(templates.shape)}. "
                "A scalar event needs a trailing dim of size 1."
            )
        slots = templates.shape[:slot_dims]
        for name, value in (("labels", self.labels), ("mask", self.mask)):
            if value is not None and value.shape != slots:
                raise ValueError(
                    f"{name}: expected shape {tuple(slots)}, one entry a slot of templates {tuple(templates.shape)}, "
                    f"got {tuple(value.shape)}. For one memory per datapoint pass per_datapoint=True."
                )
        if self.labels is not None and (self.labels.is_floating_point() or self.labels.is_complex()):
            raise ValueError(f"labels: expected integers, got {self.labels.dtype}. Use `labels.long()`.")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"mask: expected dtype torch.bool, got {self.mask.dtype}. Use `mask.bool()`.")
        if self.mask is not None and not bool(self.mask.any(-1).all()):
            raise ValueError("mask: no slot is in use. A memory needs at least one; add a blank template.")
        if not bool(torch.isfinite(templates).all()):
            raise ValueError(
                "templates: found NaN or infinite values. Clean them, or mask those slots and set them to 0"
            )

    @property
    def device(self) -> torch.device:
        """Where templates are when they have been read."""
        return self.templates.device

    @property
    def dtype(self) -> torch.dtype:
        """What templates are when they have been read."""
        return self.templates.dtype

    @property
    def num_slots(self) -> int:
        """The number of slots :math:`S`, masked ones included."""
        return self.templates.shape[1 if self.per_datapoint else 0]

    @property
    def batch_shape(self) -> torch.Size:
        """`(B,)` for one memory per datapoint, `()` for a shared one."""
        return self.templates.shape[: 1 if self.per_datapoint else 0]

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one template."""
        return self.templates.shape[2 if self.per_datapoint else 1 :]

    @property
    def slots_in_use(self) -> Tensor:
        """The number of unmasked slots, with shape `batch_shape`; integers."""
        if self.mask is None:
            return torch.full(self.batch_shape, self.num_slots, device=self.device)
        return self.mask.sum(-1)

    def encoded_by(self, encoder: Callable[[Tensor], Template]) -> EncodedMemory:
        """This memory with the features of its templates."""
        return EncodedMemory(self, encoder(self.templates))

    def read(self, a: Tensor) -> Tensor:
        r"""Reads :math:`m_a`.

        Arguments:
            a: The addresses, with shape `(*, B)` (or `(*, 1)` for one address for the whole batch); integers.

        Returns:
            The templates at those addresses, with shape `(*, B, *event)`.

        Raises:
            IndexError: If an address is not a slot.
        """
        return self._gather(self.templates, a)

    def _gather(self, values: Tensor, a: Tensor) -> Tensor:
        """Gathers `values` `(S, ...)` or `(B, S, ...)` at the addresses `a`."""
        if self.per_datapoint:
            batch = values.shape[0]
            # Rows of all memories lie side by side below, so an address past the end would read a neighbour's slot.
            # (Elsewhere than on the CPU, looking would make the device wait; there a categorical is trusted.)
            if a.device.type == "cpu" and bool(((a < 0) | (a >= self.num_slots)).any()):
                raise IndexError(f"a: expected addresses in 0..{self.num_slots - 1}, got {a.min()}..{a.max()}.")
            offset = self.num_slots * torch.arange(batch, device=a.device)
            a = (a + offset).expand(torch.broadcast_shapes(a.shape, (batch,)))
            values = values.flatten(0, 1)
        # An embedding lookup of whole rows: the backward pass of advanced indexing is several times slower. Maps are
        # looked up channels last, the layout in which the convolutions around them are fastest.
        is_map = values.dim() == 4
        if is_map:
            values = values.permute(0, 2, 3, 1)
        rows = F.embedding(a, values.reshape(values.shape[0], -1)).reshape(*a.shape, *values.shape[1:])
        return rows.movedim(-1, -3) if is_map else rows

    def by_class(self, probs: Tensor, slots: Tensor | None = None) -> Tensor:
        r"""Adds up the probabilities of the slots of each class: :math:`\sum_{a: c_a = c} p_a`.

        Arguments:
            probs: Probabilities of the slots, with shape `(*, B, S)`, or of some, `(*, B, k)`.
            slots: Which, if not all: integers `(*, B, k)`.

        Returns:
            Probabilities of the classes, `(*, B, C)`; the columns are `labels.unique()`, in that order.

        Raises:
            ValueError: If the memory has no labels.
        """
        if self.labels is None:
            raise ValueError("labels: by_class needs them, got none. Make the memory with Memory(templates, labels).")
        classes, index = self.labels.unique(return_inverse=True)
        if slots is not None:
            index = index[slots] if not self.per_datapoint else index.expand(*slots.shape[:-1], -1).gather(-1, slots)
        sums = probs.new_zeros(*probs.shape[:-1], len(classes))
        return sums.scatter_add(-1, index.expand_as(probs), probs)

    def to(self, *args: Any, **kwargs: Any) -> Memory:
        """Moves templates, labels and mask to a device, templates also to a dtype; arguments as of `Tensor.to`."""
        return self._map(lambda tensor, is_value: _to(tensor, is_value, *args, **kwargs))

    def pin_memory(self) -> Memory:
        """Copies every tensor to page-locked memory, as `torch.utils.data.DataLoader(pin_memory=True)` asks."""
        return self._map(lambda tensor, _: tensor.pin_memory())

    def _map(self, fn: Any) -> Memory:
        labels = None if self.labels is None else fn(self.labels, False)
        mask = None if self.mask is None else fn(self.mask, False)
        return Memory(fn(self.templates, True), labels, mask, per_datapoint=self.per_datapoint)

    def __len__(self) -> int:
        return self.num_slots

    def __repr__(self) -> str:
        kind = f"one for each of {self.templates.shape[0]} datapoints" if self.per_datapoint else "shared"
        parts = [f"{self.num_slots} slots of {tuple(self.event_shape)}", kind]
        if self.labels is not None:
            parts.append(f"{self.labels.unique().numel()} classes")
        if self.mask is not None:
            parts.append(f"{int(self.mask.sum())} of {self.mask.numel()} in use")
        return f"{type(self).__name__}({', '.join(parts)})"


class EncodedMemory(Memory):
    r"""A memory whose templates have been through the template encoder: what the parts of a model read.

    Made by `VMA.encode`; it stands wherever a :class:`Memory` does. Encoding once and using the result in guide and
    model is what makes a step cheap.

    Arguments:
        memory: The memory that was encoded.
        encoded: Its templates with their features; leading shape `(S,)` or `(B, S)`.

    Example:
        >>> memory = Memory(torch.rand(5, 8))
        >>> encoded = EncodedMemory(memory, Template(memory.templates, torch.rand(5, 16)))
        >>> encoded.read(torch.tensor([4, 0])).features.shape
        torch.Size([2, 16])
    """

    def __init__(self, memory: Memory, encoded: Template) -> None:
        # No second check: the tensors are those of a memory that passed it.
        self.templates, self.labels, self.mask = memory.templates, memory.labels, memory.mask
        self.per_datapoint = memory.per_datapoint
        self.encoded = encoded

    @classmethod
    def of_templates(cls, encoded: Template) -> EncodedMemory:
        """A shared memory of templates `(S,)` that have been encoded, without labels."""
        memory = object.__new__(EncodedMemory)
        memory.templates, memory.labels, memory.mask = encoded.raw, None, None
        memory.per_datapoint, memory.encoded = False, encoded
        return memory

    @property
    def features(self) -> Tensor:
        """One feature vector a slot, with shape `(S, F)` or `(B, S, F)`."""
        return self.encoded.features

    def read(self, a: Tensor) -> Template:  # type: ignore[override]  # the same reading, with features
        r"""Reads :math:`m_a` with its features.

        Arguments:
            a: The addresses, with shape `(*, B)` (or `(*, 1)` for one address for the whole batch); integers.

        Returns:
            The templates at those addresses, with leading shape `(*, B)`.
        """
        return _Read(self, a)

    def of_datapoints(self, rows: slice) -> EncodedMemory:
        """The memories of some of the datapoints; a shared memory as it is."""
        if not self.per_datapoint:
            return self
        return self._map(lambda tensor, _: tensor[rows])

    def _map(self, fn: Any) -> EncodedMemory:
        encoded = dataclasses.replace(
            self.encoded,
            raw=fn(self.encoded.raw, True),
            features=fn(self.encoded.features, True),
            maps=tuple(fn(m, True) for m in self.encoded.maps),
        )
        return EncodedMemory(super()._map(fn), encoded)


class _Read(Template):
    """Templates at addresses; of what is not looked at, nothing is copied."""

    def __init__(self, memory: EncodedMemory, a: Tensor) -> None:
        self.__dict__.update(memory=memory, a=a, features=memory._gather(memory.encoded.features, a))

    memory: EncodedMemory
    a: Tensor

    # Not kept: what was read without gradients is not what is asked for with them.

    @property
    def raw(self) -> Tensor:
        return self.memory._gather(self.memory.templates, self.a)

    @property
    def maps(self) -> tuple[Tensor, ...]:
        return tuple(self.memory._gather(m, self.a) for m in self.memory.encoded.maps)

    def of_each(self, fn: Callable[[Template], Tensor]) -> Tensor:
        encoded = self.memory.encoded
        if encoded.leading_shape.numel() > self.leading_shape.numel():
            return fn(self)
        if not torch.is_grad_enabled():  # views would say that they need gradients all the same, and mislead who asks
            encoded = Template(encoded.raw, encoded.features.detach(), tuple(m.detach() for m in encoded.maps))
        return self.memory._gather(fn(encoded), self.a)


def _to(tensor: Tensor, is_value: bool, *args: Any, **kwargs: Any) -> Tensor:
    if is_value:
        return tensor.to(*args, **kwargs)
    # Labels and mask keep their dtype: a class of 257 would not survive the way through bfloat16.
    device = torch.empty(0, device=tensor.device).to(*args, **kwargs).device
    return tensor.to(device, non_blocking=kwargs.get("non_blocking", False))
