"""Lookups: the guide over slots for each target, and its information gain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyro.distributions import Categorical
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vmem._utils.checks import Count, checked
from pyro_vmem._utils.extras import require
from pyro_vmem.distributions.sparse_categorical import SparseCategorical, top
from pyro_vmem.memory import EncodedMemory
from pyro_vmem.plots import lookups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Lookup", "lookup"]

_ROWS = 10  # targets that the table shows


@dataclass(frozen=True, repr=False, eq=False)
class Lookup:
    r"""The slots that a model looks up for targets: :math:`q(a | M, x)` beside :math:`p(a | M)`. It prints as a table.

    Attributes:
        q: The guide :math:`q(a | M, x)`, with batch shape `(B,)`.
        p: The prior :math:`p(a | M)`, with batch shape `()` or `(B,)`.
        gain: The information gain :math:`KL(q(a | M, x) \| p(a | M))` in nats, with shape `(B,)`.
        slots: The most probable slots of each target, best first, with shape `(B, k)`.
        probs: The probability of each of these under `q`, with shape `(B, k)`.
        labels: The class of each of these, with shape `(B, k)`, or `None` if the memory has no labels. A learned slot
            has class -1.
        memory: The encoded memory.
        x: The targets, with shape `(B, *event)`.
    """

    q: Categorical
    p: Categorical
    gain: Tensor
    slots: Tensor
    probs: Tensor
    labels: Tensor | None
    memory: EncodedMemory
    x: Tensor

    @checked
    def plot(
        self, figure: Figure | None = None, labels: Tensor | None = None, max_targets: Count = 8, max_slots: Count = 8
    ) -> Figure:
        """Draws targets beside their most probable templates; see :func:`pyro_vmem.plots.lookups`.

        Arguments:
            figure: An empty figure. Default: a new pyplot figure.
            labels: The class of each target, with shape `(B,)`. Slots of that class are marked as right.
            max_targets: How many targets to show.
            max_slots: How many slots to show per target.

        Raises:
            ValueError: If observations are not images, or there is one memory per datapoint.
            ImportError: If matplotlib is not installed.
        """
        if self.memory.per_datapoint:
            raise ValueError("memory: plot needs a memory that all targets share, got one per datapoint.")
        x, probs = self.x[:max_targets], self.q.probs[:max_targets]
        if figure is None:
            size = (1.5 + 0.7 * min(max_slots, self.memory.num_slots), 0.4 + 0.9 * len(x))
            figure = require("matplotlib.pyplot", "plots").figure(figsize=size)
        of_slots, of_targets = (None, None) if labels is None else (self.memory.labels, labels[:max_targets])
        return lookups(figure, x, self.memory.templates, probs, of_slots, of_targets, max_slots)

    def __repr__(self) -> str:
        num_slots = self.memory.num_slots
        lines = [
            f"Lookup({len(self.x)} targets in {num_slots:,} slots; information gain {self.gain.mean():.2f} nats on "
            f"average, log {num_slots:,} = {math.log(num_slots):.2f})",
            "target   gain   most probable slots",
        ]
        for row in range(min(len(self.x), _ROWS)):
            slots = (self._entry(row, place) for place in range(self.slots.shape[-1]))
            lines.append(f"{row:6}  {self.gain[row]:5.2f}   {'   '.join(slots)}")
        if len(self.x) > _ROWS:
            lines.append(f"   ... {len(self.x) - _ROWS} more")
        return "\n".join(lines)

    def _entry(self, row: int, place: int) -> str:
        label = "" if self.labels is None else f" (class {self.labels[row, place]})"
        return f"{self.slots[row, place]}{label} {self.probs[row, place]:.0%}"


def lookup(q: Categorical, p: Categorical, memory: EncodedMemory, x: Tensor, k: int) -> Lookup:
    """The lookup of targets x `(B, *event)` by an address guide and prior, with at most `k` slots per target."""
    num_named = q.kept_values.shape[-1] if isinstance(q, SparseCategorical) else memory.num_slots
    slots = top(q, min(k, num_named)).expand(len(x), -1)
    probs = q.log_prob(slots.mT).mT.exp()  # log_prob wants the values first, (k, B).
    labels = memory.labels
    if labels is not None:
        labels = labels.gather(-1, slots) if memory.per_datapoint else labels[slots]
    return Lookup(q, p, kl_divergence(q, p).expand(len(x)), slots, probs, labels, memory, x)
