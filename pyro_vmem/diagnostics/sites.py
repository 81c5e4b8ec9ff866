"""Sites of Pyro programs: which there are, and which of their dims are datapoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

__all__ = ["as_rows", "data_dims", "sample_sites"]


def sample_sites(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace by name, without those that draw a minibatch."""
    return {name: site for name, site in prune_subsample_sites(trace).nodes.items() if site["type"] == "sample"}


def data_dims(sites: Iterable[Any]) -> tuple[int, ...]:
    """The batch dims, negative and in order, of the plates that all sites share: particles and datapoints."""
    stacks = [{frame for frame in site["cond_indep_stack"] if frame.vectorized} for site in sites]
    return tuple(sorted(frame.dim for frame in set.intersection(*stacks)))


def as_rows(values: Tensor, dims: Sequence[int], event_dim: int = 0) -> Tensor:
    """Values with some batch dims as rows and all other dims as columns.

    Arguments:
        values: Of shape `(*batch, *event)`.
        dims: The batch dims that become rows, as of :func:`data_dims`.
        event_dim: How many dims of `values` are the event's.

    Returns:
        Values of shape `(rows, columns)`.

    Example:
        >>> import torch
        >>> as_rows(torch.rand(3, 5, 2), [-1], event_dim=1).shape  # an inner plate of 3, a data plate of 5
        torch.Size([5, 6])
    """
    moved = values.movedim([dim - event_dim for dim in dims], list(range(len(dims))))
    return moved.reshape(math.prod(moved.shape[: len(dims)]), -1)
