"""What a lookup says: where the guide of a model looks for each target, and what that is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Categorical
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vmem import plots
from pyro_vmem.distributions import top
from pyro_vmem.memory import Memory

__all__ = ["Lookup"]

_ROWS = 10  # how many targets the table shows


@dataclass(frozen=True, repr=False)
class Lookup:
    r"""Where a model looks for targets: :math:`q(a | M, x)` beside :math:`p(a | M)`. It prints as a table.

    Attributes:
        q: The guide :math:`q(a | M, x)`, with batch shape `(B,)`.
        p: The prior :math:`p(a | M)`, with batch shape `()` or `(B,)`.
        gain: The information gain :math:`KL(q(a | M, x) \| p(a | M))` in nats, with shape `(B,)`.
        slots: The most probable slots of each target, best first, with shape `(B, k)`.
        probs: The probability of each of these under `q`, with shape `(B, k)`.
        labels: The class of each of these, with shape `(B, k)`, if the memory has labels. A learned slot has class -1.
        memory: The memory that was looked up, encoded.
        x: The targets, with shape `(B, *event)`.
    """

    q: Categorical
    p: Categorical
    gain: Tensor
    slots: Tensor
    probs: Tensor
    labels: Tensor | None
    memory: Memory
    x: Tensor

    def plot(self, figure: Any = None, labels: Tensor | None = None, max_targets: int = 8, max_slots: int = 8) -> Any:
        """Draws targets beside the templates that were looked up for them; see :func:`pyro_vmem.plots.lookups`.

        Arguments:
            figure: An empty matplotlib figure. Default: a new one.
            labels: The class of each target, with shape `(B,)`; the slots of that class are marked as right.
            max_targets: How many targets to show.
            max_slots: How many slots to show per target.

        Returns:
            The figure.

        Raises:
            ValueError: If observations are not images, or each target has a memory of its own.
            ImportError: If matplotlib is not installed.
        """
        if self.memory.per_datapoint:
            raise ValueError("memory: lookups are drawn in one shared memory, got one memory per datapoint.")
        shown = slice(min(max_targets, len(self.x)))
        if figure is None:
            figure = plots.new_figure((1.0 + 0.9 * min(max_slots, self.memory.num_slots), 1.1 * len(self.x[shown])))
        right = None if labels is None else (self.memory.labels, labels[shown])
        return plots.lookups(
            figure, self.x[shown], self.memory.templates, self.q.probs[shown], *(right or (None, None)), max_slots
        )

    def __repr__(self) -> str:
        counts = f"{len(self.x)} targets in {self.memory.num_slots:,} slots"
        limit = f"log {self.memory.num_slots:,} = {math.log(self.memory.num_slots):.2f}"
        lines = [
            f"Lookup({counts}; mean information gain {self.gain.mean():.2f} nats, {limit})",
            " target   gain  slots",
        ]
        for row in range(min(len(self.x), _ROWS)):
            found = [self._entry(row, place) for place in range(self.slots.shape[-1])]
            lines.append(f"{row:>7}  {self.gain[row]:>5.2f}  {'  '.join(found)}")
        if len(self.x) > _ROWS:
            lines.append(f"    ... and {len(self.x) - _ROWS} more")
        return "\n".join(lines)

    def _entry(self, row: int, place: int) -> str:
        of_class = "" if self.labels is None else f" (class {self.labels[row, place]})"
        return f"{self.slots[row, place]}{of_class} {self.probs[row, place]:.1%}"
