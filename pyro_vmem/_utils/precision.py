"""The precision of networks, and full precision where it is needed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["autocast", "full_precision", "has_bfloat16", "no_autocast"]


def full_precision(values: Tensor) -> Tensor:
    """Converts half-precision outputs to float32, for densities; returns other tensors unchanged.

    Example:
        >>> full_precision(torch.zeros(1, dtype=torch.bfloat16)).dtype, full_precision(torch.zeros(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return values.float() if values.dtype.itemsize < 4 else values


def no_autocast(values: Tensor) -> torch.autocast:
    """A context without autocast on the device of `values`."""
    return torch.autocast(values.device.type, enabled=False)


class _Autocast(torch.autocast):
    """An autocast that keeps no rounded weights, also within another one.

    torch keeps them until it leaves the outermost: those of the caller's type would be taken here, and those of one
    training step in the next.
    """

    def __enter__(self) -> None:
        torch.clear_autocast_cache()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.clear_autocast_cache()


def autocast(device: torch.device, precision: Literal["auto", "bfloat16", "float32"]) -> torch.autocast:
    """A context in which networks run in a precision: `"auto"` is bfloat16 if the device multiplies it in hardware."""
    enabled = precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))
    return _Autocast(device.type, torch.bfloat16, enabled=enabled)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # torch has no public function for this.
    probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe() for probe in probes if probe is not None)
