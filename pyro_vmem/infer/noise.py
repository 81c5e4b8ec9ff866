"""A share of a minibatch, drawn with the same random numbers as if all of it were drawn."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["share_noise"]

# What takes as many random numbers as it has elements, whatever their values are.
_ELEMENTWISE = {"normal", "normal_", "rand", "randn", "rand_like", "randn_like", "uniform_", "exponential_"}
_ELEMENTWISE |= {"bernoulli", "bernoulli_", "cauchy_", "log_normal_"}


class share_noise(Messenger):
    r"""Lets a guide of some rows of a minibatch draw what it would draw for them in the whole minibatch.

    At each latent site random numbers are drawn for the whole minibatch, and those of the rows are used. Guides of
    the other rows, in other processes with the same random state, use the others; together they draw what one guide
    of the whole would draw, and their random states stay the same.

    The data plate is the rightmost batch dim, and whatever a distribution draws must have its batch dims first.

    Arguments:
        rows: Which rows these are.
        size: The size :math:`B` of the whole minibatch.
        sites: The names of the sites that are drawn so; by default all.

    Raises:
        ValueError: At a site that draws in another layout, or takes as many random numbers as it happens to need,
            as gamma distributions do.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def guide(loc):
        ...     with pyro.plate("data", len(loc)):
        ...         return pyro.sample("z", dist.Normal(loc, 1.0))
        >>> loc, state = torch.arange(5.0), torch.get_rng_state()
        >>> whole = guide(loc)
        >>> torch.set_rng_state(state)
        >>> bool((share_noise(slice(3, 5), 5)(guide)(loc[3:]) == whole[3:]).all())
        True
    """

    def __init__(self, rows: slice, size: int, sites: Collection[str] | None = None) -> None:
        super().__init__()
        self.rows, self.size, self.sites = rows, size, sites
        self._open: _Whole | None = None

    # As the innermost handler of a guide this sees a site first and last, whoever draws its value in between.

    def _pyro_sample(self, msg: Any) -> None:
        here = self.sites is None or msg["name"] in self.sites
        if here and not msg["is_observed"] and msg["value"] is None:
            self._open = _Whole(msg, self.rows, self.size)
            self._open.__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        self._close()

    def __exit__(self, *error: Any) -> Any:
        self._close()
        return super().__exit__(*error)

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


class _Whole(TorchDispatchMode):
    """Makes torch draw for all rows what it is asked to draw for some."""

    def __init__(self, msg: Any, rows: slice, size: int) -> None:
        super().__init__()
        self.msg, self.start, self.count, self.size = msg, rows.start, rows.stop - rows.start, size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in _ELEMENTWISE and name != "multinomial":
            self._refuse(f"torch's {name!r} takes as many random numbers as it happens to need")
        wide = [self._widen(arg, name) for arg in args]
        drawn = func(*wide, **kwargs)
        mine: Tensor = self._narrow(drawn, name)
        return args[0].copy_(mine) if name.endswith("_") else mine

    def _widen(self, value: Any, name: str) -> Any:
        """An argument for all rows; what stands in for other rows has no influence on these."""
        if isinstance(value, Tensor) and value.dim():
            index = (torch.arange(self.size, device=value.device) - self.start) % self.count
            if name == "multinomial":
                return self._rows(value, self.count).index_select(1, index).flatten(0, 1)
            return value.index_select(self._dim(value.shape), index)
        if isinstance(value, (list, tuple)):  # a shape
            dim = self._dim(value)
            return [*value[:dim], self.size, *value[dim + 1 :]]
        return value

    def _narrow(self, drawn: Tensor, name: str) -> Tensor:
        if name == "multinomial":
            return self._rows(drawn, self.size).narrow(1, self.start, self.count).flatten(0, 1)
        return drawn.narrow(len(self.msg["fn"].batch_shape) - 1, self.start, self.count)

    def _rows(self, table: Tensor, count: int) -> Tensor:
        """`(particles * rows, n)` as `(particles, rows, n)`."""
        if table.dim() != 2 or len(table) * self.count != math.prod(self.msg["fn"].batch_shape) * count:
            self._refuse(f"it draws from a table of shape {tuple(table.shape)}")
        return table.unflatten(0, (-1, count))

    def _dim(self, shape: Any) -> int:
        batch = tuple(self.msg["fn"].batch_shape)
        if not batch or batch[-1] != self.count or tuple(shape[: len(batch)]) != batch:
            self._refuse(
                f"it draws numbers in the shape {tuple(shape)}, where the batch shape {batch} was expected first"
            )
        return len(batch) - 1

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"guide: site {self.msg['name']!r}, a {type(self.msg['fn']).__name__}, cannot be shared between processes: "
            f"{why}. Draw it from a distribution made of normal, uniform or categorical noise, or train in one process."
        )
