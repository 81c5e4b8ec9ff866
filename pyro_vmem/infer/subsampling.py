"""Keeps a subsampled plate on the same datapoints in every run of model and guide that makes up one loss."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["MasksByHandler", "SameSubsample"]


class MasksByHandler(Messenger):
    """Turns a mask of a distribution, `fn.mask(...)`, into one of its site, as `poutine.mask` makes it.

    Pyro masks the score function of such a distribution too, though what depends on the value may be left in; and what
    asks for the kind of a distribution, or for its mask, should not have to look inside.
    """

    def _pyro_sample(self, msg: Any) -> None:
        while isinstance(msg["fn"], MaskedDistribution):
            mask = msg["fn"]._mask
            msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask
            msg["fn"] = msg["fn"].base_dist


class SameSubsample(Messenger):
    """Gives each plate the indices that it had in the first run, and counts where it is made.

    Without it particles that are drawn one by one would each be of other datapoints, and `poutine.replay` would put
    the guide's indices in place of those that a model was explicitly given, without a word.

    Raises:
        ValueError: If a plate is given other indices than it had before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self._indices: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._subsampled: dict[str, set[int]] = {}  # the runs in which each subsampled plate was made

    def __enter__(self) -> Any:
        self.runs += 1
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            return
        name, fn, known = msg["name"], msg["fn"], self._indices.get(msg["name"])
        if known is None:
            known = self._indices[name] = msg["value"] if msg["value"] is not None else fn.sample()
            self._sizes[name] = fn.size
        elif fn.size != self._sizes[name]:
            raise ValueError(
                f"model and guide: plate {name!r} has size {self._sizes[name]} in one and {fn.size} in the other. Give "
                "both the same."
            )
        elif msg["value"] is not None and not torch.equal(torch.as_tensor(msg["value"]), torch.as_tensor(known)):
            raise ValueError(
                f"model and guide: plate {name!r} has other indices in one than in the other, so that latents would be "
                "those of other datapoints. Give both the same `subsample`, or only `subsample_size`."
            )
        msg["value"] = known
        if len(known) < fn.size:
            self._subsampled.setdefault(name, set()).add(self.runs)

    def check(self) -> None:
        """Raises a `ValueError` for a subsampled plate that only some of the runs made themselves."""
        for name, runs in self._subsampled.items():
            if len(runs) < self.runs:
                raise ValueError(
                    f"model and guide: the subsampled plate {name!r} is made in one of them only, so that the other "
                    "may have other datapoints. Make it in both, by pyro.plate with the same name and sizes."
                )
