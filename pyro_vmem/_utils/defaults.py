"""torch's default device and dtype, which a user may have set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["usual_defaults"]


@contextmanager
def usual_defaults(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Makes the CPU the default device in a block or function, which names any other device explicitly.

    Arguments:
        dtype: The default dtype there; by default that of the caller.

    Example:
        >>> torch.set_default_device("meta")
        >>> with usual_defaults():
        ...     torch.zeros(1)
        tensor([0.])
        >>> torch.set_default_device(None)
    """
    before = torch.get_default_dtype()
    # Only where there is another one: such a block makes every call of torch in it slower.
    with contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        if dtype is not None:
            torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            if dtype is not None:
                torch.set_default_dtype(before)
