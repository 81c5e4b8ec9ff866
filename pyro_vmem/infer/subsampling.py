"""Keeps all runs of model and guide that make up one loss on the same datapoints."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vmem._utils.param_store import ONE_LOSS

__all__ = ["SameData"]


class SameData(Messenger):
    """Gives each plate the indices of the first run, and turns masks of distributions into masks of sites.

    Otherwise each particle that is drawn on its own would have other datapoints. `poutine.replay` would also replace
    indices that the model was given explicitly. Masks are moved because Pyro would also mask the score function, which
    terms that depend on the value need in full.

    Raises:
        ValueError: If a plate is given other indices than in the first run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self._first: dict[str, tuple[int, Tensor]] = {}  # the size and the indices of each plate
        self._subsampled: dict[str, set[int]] = {}  # the runs in which each subsampled plate was made
        self._done: set[Hashable] = set()

    def __enter__(self) -> Any:
        self.runs += 1
        self._outer = ONE_LOSS.set(self._done)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> Any:
        ONE_LOSS.reset(self._outer)
        return super().__exit__(*raised)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._keep_indices(msg)
        while isinstance(msg["fn"], MaskedDistribution):
            mask = msg["fn"]._mask
            if mask is False and msg["is_observed"]:
                break  # what is observed may have no density at all
            msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask
            msg["fn"] = msg["fn"].base_dist

    def _keep_indices(self, msg: Any) -> None:
        name, fn, given = msg["name"], msg["fn"], msg["value"]
        if name not in self._first:
            self._first[name] = fn.size, fn.sample() if given is None else given
        size, indices = self._first[name]
        if fn.size != size:
            raise ValueError(
                f"model and guide: plate {name!r} has size {size} in one and {fn.size} in the other. Give both the "
                "same."
            )
        if given is not None and not torch.equal(torch.as_tensor(given), torch.as_tensor(indices)):
            raise ValueError(
                f"model and guide: plate {name!r} has other indices in one than in the other, so that latents would be "
                "those of other datapoints. Give both the same `subsample`, or only `subsample_size`."
            )
        msg["value"] = indices
        if len(indices) < size:
            self._subsampled.setdefault(name, set()).add(self.runs)

    def check(self) -> None:
        """Raises a `ValueError` for a subsampled plate that only some of the runs made themselves."""
        for name, runs in self._subsampled.items():
            if len(runs) < self.runs:
                raise ValueError(
                    f"model and guide: the subsampled plate {name!r} is made in one of them only, so that the other "
                    "may have other datapoints. Make it in both, by pyro.plate with the same name and sizes."
                )
