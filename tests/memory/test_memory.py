"""Memory: reading equals a loop over indices, and what does not fit is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_vmem import EncodedMemory, Memory, Template

B, S = 7, 5
LEADING = [(), (1,), (B,), (3, B), (3, 1), (3, 1, B), (2, 3, 1)]
EVENTS = [(4,), (2, 3), (1, 4, 5), (3, 1, 1), (2, 1, 4, 5)]
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-datapoint"])


def slots(shared: bool, *trailing: int) -> Tensor:
    return torch.randn(*(() if shared else (B,)), S, *trailing)


def loop(values: Tensor, a: Tensor, shared: bool) -> Tensor:
    """Reads `values` at `a`, one address at a time."""
    if not shared:
        a = a.expand(torch.broadcast_shapes(a.shape, (B,)))
    event = values.shape[1:] if shared else values.shape[2:]
    out = torch.empty(*a.shape, *event, dtype=values.dtype)
    for index in itertools.product(*map(range, a.shape)):
        row = values if shared else values[index[-1]]
        out[index] = row[int(a[index])]
    return out


def encoded(shared: bool, event: tuple[int, ...] = (1, 4, 5), **kwargs: Any) -> EncodedMemory:
    memory = Memory(slots(shared, *event), per_datapoint=not shared, **kwargs)
    maps = (slots(shared, 2, 2, 3), slots(shared, 4, 1, 2))
    return EncodedMemory(memory, Template(memory.templates, slots(shared, 6), maps))


@SHARED
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("leading", LEADING)
def test_read_equals_a_loop(leading: tuple[int, ...], event: tuple[int, ...], shared: bool) -> None:
    memory, a = Memory(slots(shared, *event), per_datapoint=not shared), torch.randint(S, leading)
    out = memory.read(a)
    assert out.shape[: out.dim() - len(event)] == (a.shape if shared else torch.broadcast_shapes(a.shape, (B,)))
    assert torch.equal(out, loop(memory.templates, a, shared))


@SHARED
@pytest.mark.parametrize("leading", LEADING)
def test_encoded_read_equals_a_loop_in_every_field(leading: tuple[int, ...], shared: bool) -> None:
    memory, a = encoded(shared), torch.randint(S, leading)
    template = memory.read(a)
    assert isinstance(template, Template)
    assert torch.equal(template.raw, loop(memory.templates, a, shared))
    assert torch.equal(template.features, loop(memory.features, a, shared))
    assert len(template.maps) == 2
    for read, stored in zip(template.maps, memory.encoded.maps, strict=True):
        assert torch.equal(read, loop(stored, a, shared))
    assert template.leading_shape == (a.shape if shared else torch.broadcast_shapes(a.shape, (B,)))


@SHARED
@pytest.mark.parametrize("leading", LEADING)
def test_what_is_made_map_unique_template_is_made_once_a_slot_or_once_a_read(
    leading: tuple[int, ...], shared: bool
) -> None:
    """Whichever is less work, and the same with its gradient."""
    memory, a = encoded(shared), torch.randint(S, leading)
    template, encoder = memory.read(a), torch.nn.Conv2d(2, 3, 1)
    seen: list[int] = []

    def made(template: Template) -> Tensor:
        seen.append(template.leading_shape.numel())
        out: Tensor = encoder(template.maps[0].reshape(-1, *template.maps[0].shape[-3:]))
        return out.reshape(*template.leading_shape, *out.shape[1:])

    ours = template.map_unique(made)
    reads, slots = template.leading_shape.numel(), memory.features.shape[:-1].numel()
    assert seen == [min(reads, slots)]
    plain = made(Template(template.raw, template.features, template.maps))
    torch.testing.assert_close(ours, plain)
    weights = torch.randn_like(plain)
    grads = [torch.autograd.grad((out * weights).sum(), encoder.weight, retain_graph=True)[0] for out in (ours, plain)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        assert not template.map_unique(made).requires_grad
    assert template.map_unique(made).requires_grad  # nothing was kept


@SHARED
@pytest.mark.parametrize("event", EVENTS)
def test_gradient_through_read_is_that_of_indexing(event: tuple[int, ...], shared: bool) -> None:
    ours, plain = (slots(shared, *event).requires_grad_() for _ in range(2))
    with torch.no_grad():
        plain.copy_(ours)
    a = torch.randint(S, (3, B))
    weights = torch.randn(3, B, *event)
    (Memory(ours, per_datapoint=not shared).read(a) * weights).sum().backward()
    ((plain[a] if shared else plain[torch.arange(B), a]) * weights).sum().backward()
    assert ours.grad is not None
    assert ours.grad.abs().sum() > 0
    torch.testing.assert_close(ours.grad, plain.grad)


def test_maps_are_read_channels_last() -> None:
    images = Memory(torch.randn(S, 3, 4, 5)).read(torch.randint(S, (B,)))
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("address", [S, -1])
def test_an_address_outside_of_a_shared_memory_raises(address: int) -> None:
    with pytest.raises(IndexError):
        Memory(slots(True, 4)).read(torch.tensor([address]))


def test_one_datum_to_a_layout() -> None:
    shared, each = Memory(torch.rand(S, 2, 3)), Memory(torch.rand(B, S, 2, 3), per_datapoint=True)
    assert (shared.num_slots, len(shared), shared.batch_shape, shared.event_shape) == (S, S, (), (2, 3))
    assert (each.num_slots, len(each), each.batch_shape, each.event_shape) == (S, S, (B,), (2, 3))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, False),
        ({"labels": torch.zeros(B, dtype=torch.long)}, False),
        ({"mask": torch.ones(B, dtype=torch.bool)}, False),
        ({"labels": torch.zeros(B, S, dtype=torch.long)}, True),
        ({"mask": torch.ones(B, S, dtype=torch.bool)}, True),
        ({"per_datapoint": True}, True),
        ({"per_datapoint": False}, False),
    ],
)
def test_per_datapoint_is_inferred_from_labels_or_mask(kwargs: dict[str, Any], expected: bool) -> None:
    assert Memory(torch.rand(B, S, 4), **kwargs).per_datapoint is expected


def test_slots_in_use() -> None:
    assert Memory(torch.rand(S, 2)).slots_in_use.tolist() == S
    assert Memory(torch.rand(B, S, 2), per_datapoint=True).slots_in_use.tolist() == [S] * B
    mask = torch.arange(S).expand(3, S) <= torch.tensor([[0], [2], [4]])
    assert Memory(torch.rand(3, S, 2), mask=mask).slots_in_use.tolist() == [1, 3, 5]
    assert Memory(torch.rand(S, 2), mask=mask[1]).slots_in_use.tolist() == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_moves_values_and_keeps_labels_and_mask(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 257, 2049, 70_001, 16_777_217])  # not one of them fits all half precisions
    mask = torch.tensor([True, False, True, True, True])
    memory = encoded(True, labels=labels, mask=mask)
    moved = memory.to("cpu", dtype)
    assert isinstance(moved, EncodedMemory)
    assert {t.dtype for t in (moved.templates, moved.features, *moved.encoded.maps, moved.encoded.raw)} == {dtype}
    assert moved.labels is not None
    assert torch.equal(moved.labels, labels)
    assert moved.labels.dtype == labels.dtype
    assert moved.mask is not None
    assert torch.equal(moved.mask, mask)
    plain = Memory(memory.templates, labels, mask).to(dtype=dtype)
    assert type(plain) is Memory
    assert torch.equal(plain.labels, labels)
    assert plain.templates.dtype == dtype


def test_labels_move_to_the_device_whichever_way_it_is_named() -> None:
    meta, memory = torch.device("meta"), Memory(torch.rand(3, 2), torch.arange(3), torch.ones(3, dtype=torch.bool))
    for args, kwargs in [((meta,), {}), ((), {"device": meta}), (("meta", torch.float64), {"non_blocking": True})]:
        moved = memory.to(*args, **kwargs)
        assert moved.labels is not None
        assert moved.mask is not None
        assert (moved.labels.device, moved.labels.dtype, moved.mask.device) == (meta, torch.int64, meta)
        assert (moved.device, moved.templates.device) == (meta, meta)
    assert memory.to("cpu") is memory


def test_of_datapoints_takes_rows_of_everything() -> None:
    labels = torch.randint(3, (B, S))
    memory = encoded(False, labels=labels)
    some = memory.of_datapoints(slice(2, 5))
    assert some.per_datapoint
    assert torch.equal(some.templates, memory.templates[2:5])
    assert torch.equal(some.features, memory.features[2:5])
    assert torch.equal(some.encoded.maps[1], memory.encoded.maps[1][2:5])
    assert torch.equal(some.labels, labels[2:5])
    shared = encoded(True)
    assert shared.of_datapoints(slice(2, 5)) is shared


def test_repr() -> None:
    assert repr(Memory(torch.rand(5, 1, 8, 8))) == "Memory(5 slots of (1, 8, 8), shared)"
    labels, mask = torch.tensor([[0, 1, 1], [2, 2, 0]]), torch.tensor([[True, True, False], [True, True, True]])
    expected = "Memory(3 slots of (4,), one for each of 2 datapoints, 3 classes, 5 of 6 in use)"
    assert repr(Memory(torch.rand(2, 3, 4), labels, mask)) == expected
    assert repr(encoded(True)) == "EncodedMemory(5 slots of (1, 4, 5), shared)"


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (torch.zeros(5, 4, dtype=torch.uint8),),
            {},
            r"templates: expected a tensor of dtype Float .*, got .*torch\.uint8.*Use templates / 255",
        ),
        ((torch.zeros(5),), {}, r"templates: expected shape \(S, \*event\).*got \(5,\).*trailing dim of size 1"),
        ((torch.zeros(0, 4),), {}, r"at least one slot, got \(0, 4\)"),
        ((torch.zeros(5, 4),), {"per_datapoint": True}, r"expected shape \(B, S, \*event\).*got \(5, 4\)"),
        ((torch.zeros(5, 4), torch.zeros(4, dtype=torch.long)), {}, r"labels: expected shape \(5,\).*got \(4,\)"),
        (
            (torch.zeros(2, 5, 4), torch.zeros(5, dtype=torch.long)),
            {},
            r"labels: expected shape \(2,\).*per_datapoint=True",
        ),
        (
            (torch.zeros(5, 4), torch.zeros(5)),
            {},
            r"labels: expected a tensor of dtype Integer and shape .*, got .*torch\.float32.*Use labels\.long\(\)",
        ),
        ((torch.zeros(5, 4), None, torch.ones(3, dtype=torch.bool)), {}, r"mask: expected shape \(5,\).*got \(3,\)"),
        (
            (torch.zeros(5, 4), None, torch.ones(5)),
            {},
            r"mask: expected a tensor of dtype Bool and shape \(\.\.\.\) .*, got .*torch\.float32.*Use mask\.bool\(\)",
        ),
        ((torch.zeros(5, 4), None, torch.zeros(5, dtype=torch.bool)), {}, r"mask: no slot is in use"),
        (
            (torch.zeros(2, 3, 4), None, torch.tensor([[True] * 3, [False] * 3])),
            {},
            r"mask: no slot is in use.*blank template",
        ),
        ((torch.tensor([[0.0], [float("nan")]]),), {}, r"templates: found NaN or infinite"),
        ((torch.tensor([[0.0], [float("inf")]]),), {}, r"templates: found NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_refused(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Memory(*args, **kwargs)


@pytest.mark.parametrize("per_datapoint", [False, True])
@pytest.mark.parametrize("address", [-1, 4])
def test_an_address_that_is_no_slot_is_refused(per_datapoint, address):
    templates = torch.rand(3, 4, 5) if per_datapoint else torch.rand(4, 5)
    memory = Memory(templates, per_datapoint=per_datapoint)
    with pytest.raises(IndexError):
        memory.read(torch.tensor([0, address, 1]))


@pytest.mark.parametrize("per_datapoint", [False, True])
def test_slots_add_up_by_class(per_datapoint):
    labels = torch.tensor([[7, 9, 7, 2], [9, 9, 2, 7]]) if per_datapoint else torch.tensor([7, 9, 7, 2])
    templates = torch.rand(*labels.shape, 5)
    memory = Memory(templates, labels)
    probs = torch.rand(3, 2, 4).softmax(-1)
    found = memory.by_class(probs)
    for b in range(2):
        of_slot = labels[b] if per_datapoint else labels
        for c, label in enumerate((2, 7, 9)):
            torch.testing.assert_close(found[:, b, c], probs[:, b, of_slot == label].sum(-1))
    with pytest.raises(ValueError, match="labels: by_class needs them"):
        Memory(templates, per_datapoint=per_datapoint).by_class(probs)
