"""A device of pretence: computes on the CPU, but is another device, and refuses to compute with tensors of the CPU.

What would fail on a GPU because a tensor was made in the wrong place fails here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

# A device that every torch knows, and that nobody computes on.
DEVICE = torch.device("meta")

MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class There(torch.Tensor):
    """A tensor on the device of pretence."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        super().__init__()

    def tolist(self) -> Any:
        """Plain numbers, as of any device."""
        return self.inner.tolist()

    def new_tensor(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A tensor of numbers, on the same device."""
        return There(self.inner.new_tensor(*args, **kwargs))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """While this is entered, there is such a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of torch, where its arguments are."""
    if func is torch.ops.prim.device.default:
        return DEVICE
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = any(isinstance(tensor, There) for tensor in tensors)
    here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.dim()]
    if there and here and func not in MOVES:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {DEVICE} and {here[0].device}")
    wanted = kwargs.get("device")
    if wanted is not None:
        there = torch.device(wanted).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], There)

    def unwrap(value: Any) -> Any:
        return value.inner if isinstance(value, There) else value

    def wrap(value: Any) -> Any:
        return There(value) if isinstance(value, torch.Tensor) else value

    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if not there:
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map(wrap, out))
