"""Templates as bits or bytes, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pack_templates", "row_shape", "unpack_templates", "write_rows"]

WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)  # of the bits of a byte, as `numpy.packbits` has them


def pack_templates(templates: Tensor, event_shape: Sequence[int], bits: int) -> Tensor:
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


def unpack_templates(rows: Tensor, event_shape: Sequence[int], bits: int, dtype: torch.dtype) -> Tensor:
    """The reverse: uint8 rows as templates `(n, *event)`."""
    if bits == 8:
        return rows.to(dtype) / 255
    values = (rows.unsqueeze(-1) & rows.new_tensor(WEIGHTS)) != 0
    return values.flatten(1)[:, : math.prod(event_shape)].to(dtype).unflatten(1, tuple(event_shape))


def row_shape(event_shape: Sequence[int], bits: int) -> tuple[int, ...]:
    """The shape of one template as it is stored."""
    return (-(-math.prod(event_shape) // 8),) if bits == 1 else tuple(event_shape)


def write_rows(path: Path, batches: Iterable[Tensor], row: tuple[int, ...]) -> None:
    """Writes rows some at a time as one `.npy` file, whose header says how many there are when all are written."""
    part, rows = path.with_name(path.name + ".part"), 0
    with part.open("wb") as file:
        for final in (False, True):
            file.seek(0)
            # numpy leaves room in the header for the first dim to grow
            header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *row)}
            np.lib.format.write_array_header_1_0(file, header)
            if not final:
                for batch in batches:
                    file.write(batch.cpu().numpy().tobytes())
                    rows += len(batch)
    part.replace(path)
