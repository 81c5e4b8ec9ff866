"""What a user passes into a model, checked once where it enters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vmem.memory import Memory

__all__ = ["check_address", "check_memory", "check_targets", "check_weights"]


def check_memory(memory: Memory, event_shape: Sequence[int], dtype: torch.dtype | None) -> None:
    """Raises a `ValueError` if the memory does not go with a model.

    Arguments:
        memory: What was passed.
        event_shape: The shape of one observation of the model.
        dtype: The dtype of the model's weights, if it has any; under autocast it does not matter.

    Example:
        >>> check_memory(Memory(torch.rand(5, 3)), (3,), torch.float32)
        >>> check_memory(Memory(torch.rand(5, 3)), (4,), torch.float32)
        Traceback (most recent call last):
        ValueError: memory: its templates (5, 3) hold events of shape (3,), this model's are (4,).
    """
    expected = tuple(event_shape)
    if not isinstance(memory, Memory):
        raise ValueError(f"memory: expected a pyro_vmem.Memory, got {type(memory).__name__}. Use Memory(templates).")
    shape = (*memory.batch_shape, memory.num_slots, *memory.event_shape)
    if tuple(memory.event_shape) != expected:
        hint = ""
        if shape[2:] == expected and not memory.per_datapoint:
            hint = " For one memory per datapoint, `(B, S, *event)`, pass Memory(..., per_datapoint=True)."
        raise ValueError(
            f"memory: its templates {shape} hold events of shape {tuple(memory.event_shape)}, "
            f"this model's are {expected}.{hint}"
        )
    if dtype is not None and memory.dtype != dtype and not torch.is_autocast_enabled(memory.device.type):
        raise ValueError(
            f"memory: the dtype of its templates is {memory.dtype}, that of this model's weights {dtype}. "
            f"Convert one: `memory.to({dtype})`, or the model as any module."
        )


def check_targets(x: Tensor, memory: Memory) -> None:
    """Raises a `ValueError` if targets do not go with a memory.

    Arguments:
        x: The targets, with shape `(B, *event)`.
        memory: A memory that passed :func:`check_memory`.

    Example:
        >>> check_targets(torch.rand(3), Memory(torch.rand(5, 3)))
        Traceback (most recent call last):
        ValueError: x: expected shape (B, 3) to go with memory templates (5, 3), got (3,). One target alone is x[None].
    """
    event_shape, shape = memory.event_shape, (*memory.batch_shape, memory.num_slots, *memory.event_shape)
    if x.shape[1:] != event_shape or x.dim() != len(event_shape) + 1 or len(x) == 0:
        raise ValueError(
            f"x: expected shape (B, {', '.join(map(str, event_shape))}) to go with memory templates "
            f"{shape}, got {tuple(x.shape)}. One target alone is x[None]."
        )
    if x.dtype != memory.dtype:
        raise ValueError(
            f"x: its dtype {x.dtype} is not that of the memory's templates, {memory.dtype}. "
            f"Convert one: `x.to({memory.dtype})`."
        )
    if memory.per_datapoint and memory.batch_shape.numel() != len(x):
        raise ValueError(
            f"x: got {len(x)} targets, but one memory for each of {memory.batch_shape.numel()} datapoints, "
            f"templates {shape}. Give each target its memory, or all a shared one."
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x: found NaN or infinite values. Clean or drop those targets.")


def check_weights(module: nn.Module) -> None:
    """Raises a `ValueError` if a parameter is not finite: what is measured of such a model is no number, or no error.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.fill_(float("nan"))
        >>> check_weights(layer)
        Traceback (most recent call last):
        ValueError: vma: 'weight' holds values that are not finite. Build or load it again.
    """
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"vma: {name!r} holds values that are not finite. Build or load it again.")


def check_address(address: int, memory: Memory) -> None:
    """Raises a `ValueError` if the address is not that of a slot in use, in every datapoint's memory.

    Example:
        >>> check_address(5, Memory(torch.rand(5, 3)))
        Traceback (most recent call last):
        ValueError: address: expected a slot in use out of 0..4, got 5.
    """
    in_range = 0 <= address < memory.num_slots
    if not in_range or (memory.mask is not None and not bool(memory.mask[..., address].all())):
        raise ValueError(f"address: expected a slot in use out of 0..{memory.num_slots - 1}, got {address}.")
