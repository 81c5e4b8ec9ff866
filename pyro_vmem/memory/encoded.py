"""What the parts of a model read: a memory whose templates have been through the template encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from pyro_vmem.memory.memory import Memory, gather

__all__ = ["EncodedMemory", "Template"]

ENCODED_AT_ONCE = 1024  # templates that are encoded together where features alone are kept


class Template:
    r"""An observation beside its features: a slot's template :math:`m_a`, or a target :math:`x` seen the same way.

    Leading dims are (enumeration, particle, batch); they are the same for all three.

    Arguments:
        raw: The observation itself, with shape `(*, *event)`.
        features: One vector for the whole observation, with shape `(*, F)`.
        maps: Feature maps, fine to coarse, each with shape `(*, C, H, W)`; empty where there is no image.

    Example:
        >>> template = Template(torch.rand(5, 1, 8, 8), torch.rand(5, 16))
        >>> template.leading_shape
        torch.Size([5])
    """

    def __init__(self, raw: Tensor, features: Tensor, maps: tuple[Tensor, ...] = ()) -> None:
        self._raw, self.features, self._maps = raw, features, maps
        # The dims that are not the event's; a plain tuple would be one of tensors where Pyro follows provenance.
        self.leading_shape = torch.Size(features.shape[:-1])

    @property
    def raw(self) -> Tensor:
        """The observation itself, with shape `(*, *event)`."""
        return self._raw

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Feature maps, fine to coarse, each with shape `(*, C, H, W)`."""
        return self._maps

    def map(self, fn: Callable[[Tensor], Tensor]) -> Template:
        """The template of which each tensor has been through `fn`."""
        return Template(fn(self.raw), fn(self.features), tuple(fn(m) for m in self.maps))

    def map_unique(self, fn: Callable[[Template], Tensor]) -> Tensor:
        """Applies `fn` once per different template, and gives each place the result of its template.

        Arguments:
            fn: From a template of any leading shape `(*)` to images `(*, C, H, W)`, each from one template alone.

        Returns:
            The images, `(*, C, H, W)`.
        """
        return fn(self)


class EncodedMemory(Memory):
    r"""A memory whose templates have been through the template encoder: what the parts of a model read.

    Made by `VMA.encode`; it stands wherever a :class:`Memory` does. Encoding once and using the result in guide and
    model is what makes a step cheap.

    Given the encoder, it encodes templates as they are read, each once per read. What it encoded last is kept while the
    weights of the encoder are the same, so that the model reads at no cost what the guide has read; gradients flow
    through it. A part that looks at the features of all slots has all encoded, and later reads are gathered from these;
    without gradient, as for a search, features alone are kept.

    Arguments:
        memory: The memory.
        encoded: Its templates with their features, with leading shape `(S,)` or `(B, S)`; or, for a shared memory, the
            encoder that makes them of templates `(n, *event)`.

    Attributes:
        memory: The memory.
        is_lazy: Whether templates are encoded as they are read.

    Example:
        >>> memory = Memory(torch.rand(5, 8))
        >>> encoded = EncodedMemory(memory, Template(memory.templates, torch.rand(5, 16)))
        >>> encoded.read(torch.tensor([4, 0])).features.shape
        torch.Size([2, 16])
        >>> from pyro_vmem import PackedMemory
        >>> from pyro_vmem.parts import MLPEncoder
        >>> lazy = EncodedMemory(PackedMemory.pack((torch.rand(1000, 8) > 0.5).float()), MLPEncoder((8,), 16))
        >>> lazy.read(torch.tensor([[4, 0], [4, 4]])).features.shape  # encodes two templates
        torch.Size([2, 2, 16])
    """

    def __init__(self, memory: Memory, encoded: Template | Callable[[Tensor], Template]) -> None:
        # Not checked again: the tensors are those of a memory that was.
        self._hold(memory.store, memory.labels, memory.mask, memory.index)
        self.memory = memory
        self.is_lazy = not isinstance(encoded, Template)
        self._source = encoded if isinstance(encoded, Template) else _Lazy(memory, encoded)

    @property
    def encoded(self) -> Template:
        """All templates with their features; a `ValueError` if they are too many to be encoded at once."""
        return self._source if isinstance(self._source, Template) else self._source.whole

    @property
    def features(self) -> Tensor:
        """One feature vector per slot, with shape `(S, F)` or `(B, S, F)`; a `ValueError` if they are too many."""
        return self._source.features

    def read(self, a: Tensor) -> Template:  # type: ignore[override]  # the same reading, with features
        r"""Reads :math:`m_a` with its features.

        Arguments:
            a: The addresses, with shape `(*, B)` (or `(*, 1)` for one address for the whole batch); integers.

        Returns:
            The templates at those addresses, with leading shape `(*, B)`.

        Raises:
            IndexError: If an address is not a slot.
        """
        table, places = (self._source, a) if isinstance(self._source, Template) else self._source.at(a)
        return _Read(table, places, self.per_datapoint)

    def map_encoded(self, fn: Callable[[Template], Template]) -> Self:
        """The memory whose templates, with their features, go through `fn` when they have been encoded."""
        source = self._source
        return type(self)(self.memory, fn(source) if isinstance(source, Template) else _Composed(source.encoder, fn))

    def of_datapoints(self, rows: slice | Tensor) -> EncodedMemory:
        """The memories of some datapoints, `rows` a slice or integers `(n,)`; a shared memory as it is."""
        if not self.per_datapoint:
            return self
        return self._map(lambda values: values[rows], lambda slots: slots[rows])

    def _classes(self) -> tuple[Tensor, Tensor]:
        return self.memory._classes() if self.labels is self.memory.labels else super()._classes()

    def _map(self, values: Callable[[Tensor], Tensor], slots: Callable[[Tensor], Tensor]) -> Self:
        source = self._source  # of one that is encoded as it is read, what the encoder is given has been moved
        return type(self)(
            self.memory._map(values, slots), source.map(values) if isinstance(source, Template) else source.encoder
        )


class _Read(Template):
    """Templates at addresses of a table; of what is not looked at, nothing is copied.

    Raw templates and maps are gathered anew each time: read without gradients, they are not what is asked for with.
    """

    def __init__(self, table: Template, a: Tensor, per_datapoint: bool) -> None:
        self._table, self._a, self._per_datapoint = table, a, per_datapoint
        self.features = gather(table.features, a, per_datapoint)
        self.leading_shape = torch.Size(self.features.shape[:-1])

    @property
    def raw(self) -> Tensor:
        return gather(self._table.raw, self._a, self._per_datapoint)

    @property
    def maps(self) -> tuple[Tensor, ...]:
        return tuple(gather(m, self._a, self._per_datapoint) for m in self._table.maps)

    def map_unique(self, fn: Callable[[Template], Tensor]) -> Tensor:
        # Before copies are made, while templates of the table are fewer than those read: a decoder's skips and blurs
        # are of templates alone, and K particles of B targets read the same few.
        table = self._table
        if table.leading_shape.numel() > self.leading_shape.numel():
            return fn(self)
        if not torch.is_grad_enabled():  # views would say that they need gradients all the same, and mislead who asks
            table = table.map(Tensor.detach)
        return gather(fn(table), self._a, self._per_datapoint)


class _Kept(NamedTuple):
    """What was encoded last: slots in order, their templates, and how they were encoded."""

    slots: Tensor
    table: Template
    with_gradient: bool
    precision: bool
    weights: list[Tensor]


class _Lazy:
    """Templates of a shared memory that are encoded as they are read."""

    def __init__(self, memory: Memory, encoder: Callable[[Tensor], Template]) -> None:
        self.memory, self.encoder = memory, encoder
        self._kept: _Kept | None = None

    @property
    def whole(self) -> Template:
        kept = self._usable()
        if kept is None or len(kept.slots) < self.memory.num_slots:
            kept = self._keep(torch.arange(self.memory.num_slots, device=self.memory.device), self.memory.templates)
        return kept.table

    @property
    def features(self) -> Tensor:
        kept = self._usable()
        if torch.is_grad_enabled() or (kept is not None and len(kept.slots) == self.memory.num_slots):
            return self.whole.features
        self.memory.store.check_size()
        batches = torch.arange(self.memory.num_slots, device=self.memory.device).split(ENCODED_AT_ONCE)
        return torch.cat([self.encoder(self.memory.read(some)).features for some in batches])

    def at(self, a: Tensor) -> tuple[Template, Tensor]:
        """A table of templates that has those at the addresses `a`, and their places in it."""
        kept, a = self._usable(), a.contiguous()
        if kept is not None:
            places = torch.searchsorted(kept.slots, a).clamp(max=len(kept.slots) - 1)
            if bool((kept.slots[places] == a).all()):
                return kept.table, places
        slots = a.unique()
        kept = self._keep(slots, self.memory.read(slots))
        return kept.table, torch.searchsorted(kept.slots, a)

    def _keep(self, slots: Tensor, templates: Tensor) -> _Kept:
        weights = [weight.detach().clone() for weight in self._weights()]
        self._kept = _Kept(slots, self.encoder(templates), torch.is_grad_enabled(), self._precision(), weights)
        return self._kept

    def _usable(self) -> _Kept | None:
        """What was encoded last, unless it lacks a gradient that is wanted now, or the encoder is another by now."""
        kept = self._kept
        if kept is None or (torch.is_grad_enabled() and not kept.with_gradient) or kept.precision != self._precision():
            return None
        # Looked at one by one: torch counts the writes to a tensor, but not those of a fused optimizer.
        return kept if all(map(torch.equal, kept.weights, self._weights())) else None

    def _weights(self) -> list[Tensor]:
        return list(self.encoder.parameters()) if isinstance(self.encoder, nn.Module) else []

    def _precision(self) -> bool:
        return torch.is_autocast_enabled(self.memory.device.type)


class _Composed(nn.Module):
    """An encoder, and what its output goes through; it has the encoder's weights."""

    def __init__(self, encoder: Callable[[Tensor], Template], fn: Callable[[Template], Template]) -> None:
        super().__init__()
        self.encoder, self.fn = encoder, fn

    def forward(self, x: Tensor) -> Template:
        return self.fn(self.encoder(x))
