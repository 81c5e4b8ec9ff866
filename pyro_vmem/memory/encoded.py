"""The encoded memory: templates with the features that the parts of a model read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from jaxtyping import Integer
from torch import Tensor, nn

from pyro_vmem.memory.memory import Memory, gather

__all__ = ["EncodedMemory", "Template", "encoded_once"]

ENCODED_AT_ONCE = 1024  # templates per batch where only features are kept


class Template:
    r"""An observation with its features: a template :math:`m_a` or a target :math:`x`.

    All arguments have the same leading dims: (enumeration, particle, batch).

    Arguments:
        raw: The observation, with shape `(*, *event)`.
        features: One vector for the whole observation, with shape `(*, F)`.
        maps: Feature maps, from fine to coarse, each with shape `(*, C, H, W)`; empty if the observation is no image.

    Example:
        >>> template = Template(torch.rand(5, 1, 8, 8), torch.rand(5, 16))
        >>> template.leading_shape
        torch.Size([5])
    """

    def __init__(self, raw: Tensor, features: Tensor, maps: tuple[Tensor, ...] = ()) -> None:
        self.raw, self.features, self.maps = raw, features, maps
        # The leading dims. With provenance tracking, Pyro would turn a plain tuple into one of tensors.
        self.leading_shape = torch.Size(features.shape[:-1])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Template:
        """The template with `fn` applied to each tensor."""
        return Template(fn(self.raw), fn(self.features), tuple(fn(m) for m in self.maps))

    def map_unique(self, fn: Callable[[Template], Tensor]) -> Tensor:
        """Applies `fn` once per distinct template; it maps templates of leading shape `(*)` to `(*, C, H, W)`."""
        return fn(self)


class EncodedMemory(Memory):
    r"""A memory with the features of its templates, which the parts of a model read.

    `VMA.encode` makes it. It can be used wherever a :class:`Memory` can. Encode once per step, and use the result in
    guide and model.

    Given an encoder, it encodes templates when they are read. It keeps the last encodings while the weights of the
    encoder are unchanged, so the model reuses what the guide has read; gradients flow through them. A part that reads
    the features of all slots has all templates encoded. Without gradient, as in a search, only features are kept.

    Arguments:
        memory: The memory.
        encoded: The templates with their features, with leading shape `(S,)` or `(B, S)`. Or, for a shared memory, an
            encoder of templates `(n, *event)`.

    Attributes:
        memory: The memory.
        is_lazy: Whether templates are encoded when they are read.

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
        # Not checked again: these are the tensors of a checked memory.
        self._hold(memory.store, memory.labels, memory.mask, memory.index)
        self.memory = memory
        self.is_lazy = not isinstance(encoded, Template)
        self._source = encoded if isinstance(encoded, Template) else _Lazy(memory, encoded)

    @property
    def encoded(self) -> Template:
        """All templates with their features; raises a `ValueError` if they are too many to encode at once."""
        return self._source if isinstance(self._source, Template) else self._source.whole

    @property
    def features(self) -> Tensor:
        """One feature vector per slot, with shape `(S, F)` or `(B, S, F)`; raises a `ValueError` if too many."""
        return self._source.features

    def read(self, a: Integer[Tensor, "..."]) -> Template:  # type: ignore[override]  # the same reading, with features
        r"""Reads :math:`m_a` with its features, with leading shape `(*, B)`; see :meth:`Memory.read`."""
        table, places = (self._source, a) if isinstance(self._source, Template) else self._source.at(a)
        return _Read(table, places, self.per_datapoint)

    def of_datapoints(self, rows: slice | Tensor) -> EncodedMemory:
        """The memories of the datapoints `rows`, a slice or integers `(n,)`; a shared memory is returned unchanged."""
        if not self.per_datapoint:
            return self
        return self._map(lambda values: values[rows], lambda slots: slots[rows])

    @property
    def slots_in_use(self) -> Tensor:
        return self.memory.slots_in_use if self.mask is self.memory.mask else super().slots_in_use

    def _classes(self) -> Tensor:
        return self.memory._classes() if self.labels is self.memory.labels else super()._classes()

    def _map(self, values: Callable[[Tensor], Tensor], slots: Callable[[Tensor], Tensor]) -> Self:
        source = self._source  # The input of a lazy encoder has been moved already.
        return type(self)(
            self.memory._map(values, slots), source.map(values) if isinstance(source, Template) else source.encoder
        )


@contextmanager
def encoded_once(memory: EncodedMemory) -> Iterator[EncodedMemory]:
    """Yields a memory whose encoder has one backward pass, however many backward passes read the memory.

    Pyro's own objectives may have one backward pass per particle, each of which frees its graph. Here gradients are
    accumulated at the encodings. When the block ends, they are backpropagated through the encoder once. The result is
    the same gradient for any objective.
    """
    ends: list[tuple[Tensor, Tensor]] = []

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        ends.append((tensor, tensor.detach().requires_grad_()))
        return ends[-1][1]

    source = memory._source
    cut_source = source.map(cut) if isinstance(source, Template) else _Composed(source.encoder, lambda t: t.map(cut))
    yield type(memory)(memory.memory, cut_source)
    reached = [(tensor, end.grad) for tensor, end in ends if end.grad is not None]
    if reached:
        tensors, gradients = zip(*reached, strict=True)
        torch.autograd.backward(tensors, gradients)


class _Read(Template):
    """Templates at addresses of a table, gathered when they are used.

    Raw templates and maps are gathered at each use, because a result without gradients does not serve a use with them.
    """

    def __init__(self, table: Template, a: Tensor, per_datapoint: bool) -> None:
        self._table, self._a, self._per_datapoint = table, a, per_datapoint
        self.features = gather(table.features, a, per_datapoint)
        self.leading_shape = torch.Size(self.features.shape[:-1])

    @property
    def raw(self) -> Tensor:  # type: ignore[override]  # read only
        return gather(self._table.raw, self._a, self._per_datapoint)

    @property
    def maps(self) -> tuple[Tensor, ...]:  # type: ignore[override]  # read only
        return tuple(gather(m, self._a, self._per_datapoint) for m in self._table.maps)

    def map_unique(self, fn: Callable[[Template], Tensor]) -> Tensor:
        # `fn` runs before the copies if the table is smaller than the read: K particles of B targets read the same
        # few templates, and skips and blurs of a decoder depend on the template only.
        table = self._table
        if table.leading_shape.numel() > self.leading_shape.numel():
            return fn(self)
        if not torch.is_grad_enabled():  # Views would report that they need gradients.
            table = table.map(Tensor.detach)
        return gather(fn(table), self._a, self._per_datapoint)


class _Kept(NamedTuple):
    """The last encodings: sorted slots, their templates, and how they were encoded."""

    slots: Tensor
    table: Template
    with_gradient: bool
    precision: bool
    weights: list[Tensor]


class _Lazy:
    """Templates of a shared memory that are encoded when they are read."""

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
        """A table with the templates at addresses `a`, and their indices in it."""
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
        """The last encodings, unless they lack a gradient needed now or the encoder has changed."""
        kept = self._kept
        if kept is None or (torch.is_grad_enabled() and not kept.with_gradient) or kept.precision != self._precision():
            return None
        # Compared by value: the version counter of torch misses the writes of a fused optimizer.
        return kept if all(map(torch.equal, kept.weights, self._weights())) else None

    def _weights(self) -> list[Tensor]:
        return list(self.encoder.parameters()) if isinstance(self.encoder, nn.Module) else []

    def _precision(self) -> bool:
        return torch.is_autocast_enabled(self.memory.device.type)


class _Composed(nn.Module):
    """An encoder followed by a function; it has the weights of the encoder."""

    def __init__(self, encoder: Callable[[Tensor], Template], fn: Callable[[Template], Template]) -> None:
        super().__init__()
        self.encoder, self.fn = encoder, fn

    def forward(self, x: Tensor) -> Template:
        return self.fn(self.encoder(x))
