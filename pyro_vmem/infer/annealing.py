"""Scales the log-probability of chosen sites, which gives KL(z) a weight that can rise during training."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger

__all__ = ["scale_sites"]


class scale_sites(Messenger):
    r"""Scales the log-probability of the named sites: :math:`\log p(z) \to \beta \log p(z)`.

    Around both model and guide it is the usual KL warm-up, :math:`\beta` from 0 to 1. Pyro's own `poutine.scale` scales
    every site in its context, the observation too.

    Arguments:
        scales: The factor :math:`\beta \ge 0` of each named site.

    Raises:
        ValueError: If a factor is negative.

    Example:
        >>> import pyro, torch
        >>> with pyro.poutine.trace() as traced, scale_sites({"z": 0.5}):
        ...     z = pyro.sample("z", pyro.distributions.Normal(torch.tensor(0.0), 1.0))
        >>> traced.trace.nodes["z"]["scale"]
        0.5
    """

    def __init__(self, scales: dict[str, float]) -> None:
        super().__init__()
        for name, scale in scales.items():
            if not scale >= 0:
                raise ValueError(f"scales: expected factors of at least 0, got {scale} for site {name!r}.")
        self.scales = scales

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.scales:
            msg["scale"] = msg["scale"] * self.scales[msg["name"]]
