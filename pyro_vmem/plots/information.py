"""Figures of information in nats: the gain of lookups and the evidence under memories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vmem._utils.checks import PositiveInt
from pyro_vmem.plots._style import BLUE, ORANGE, Array, as_numpy, label_axes, legend_below, small_font, text_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["evidence_by_memory", "information_gain_against_slots", "information_gain_histogram"]


def information_gain_histogram(
    ax: Axes, gain: Array, num_slots: PositiveInt, num_classes: PositiveInt, exact: Array | None = None
) -> Axes:
    r"""Draws a histogram of the information gain of lookups, :math:`KL(q(a | M, x) \| p(a | M))`, in nats.

    Lines mark the gain that identifies the slot, :math:`\log |M|`, and the class, :math:`\log C`.

    Arguments:
        gain: The information gain of each datapoint, any shape, in nats.
        num_slots: The number of slots :math:`|M|`.
        num_classes: The number of classes :math:`C` in memory.
        exact: The gain of the exact posterior, drawn as an outline.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = information_gain_histogram(Figure().subplots(), 3 * np.random.rand(200), num_slots=20, num_classes=20)
        >>> [text.get_text() for text in ax.texts]
        ['log |M| = log C = 3.00']
    """
    guide = as_numpy(gain).ravel()
    columns = [guide] if exact is None else [guide, as_numpy(exact).ravel()]
    low, top = min(0.0, *(column.min() for column in columns)), max(column.max() for column in columns)
    # log |M| is the edge of a bin, because no gain is larger under a uniform prior.
    width = (max(0.1, math.log(num_slots)) - low) / 30
    bins = (low + width * np.arange(1 + max(30, math.ceil((top - low) / width - 1e-3)))).tolist()
    high = bins[-1]
    columns = [column.clip(max=high) for column in columns]
    ax.hist(columns[0], bins, color=BLUE, alpha=0.75, label=f"guide q(a | M, x), mean {guide.mean():.2f}")
    if exact is not None:
        label = f"exact p(a | x, M), mean {columns[1].mean():.2f}"
        ax.hist(columns[1], bins, histtype="step", color=ORANGE, linewidth=1.5, label=label)
    marks = [("log |M|", num_slots), ("log C", num_classes)]
    if num_slots == num_classes:
        marks = [("log |M| = log C", num_slots)]
    for row, (name, count) in enumerate(marks):
        position = math.log(count)
        ax.axvline(position, color=text_colour(), linestyle="-" if row else "--", linewidth=1.2)
        side = "right" if position > (low + high) / 2 else "left"
        above: dict[str, Any] = {"xytext": (0, 3 + 1.3 * small_font() * row), "textcoords": "offset points", "ha": side}
        at: dict[str, Any] = {"xy": (position, 1), "xycoords": ax.get_xaxis_transform(), "fontsize": small_font()}
        ax.annotate(f"{name} = {position:.2f}", **at, **above)
    ax.set_xlim(low, high + width)
    label_axes(ax, "information gain, nats per datapoint", "datapoints")
    ax.locator_params(axis="y", integer=True)
    legend_below(ax, columns=1)
    return ax


def information_gain_against_slots(
    ax: Axes,
    num_slots: Array | Sequence[int],
    gain: Array | Sequence[float],
    error: Array | Sequence[float] | None = None,
    exact: Array | Sequence[float] | None = None,
) -> Axes:
    r"""Draws the information gain against the size of memory, with its upper limit :math:`\log |M|`.

    Arguments:
        num_slots: The number of slots :math:`|M|` of each memory, `(N,)`, at least 1.
        gain: The mean information gain of the guide, `(N,)`, in nats.
        error: Its standard error, `(N,)`, drawn as bars.
        exact: The mean information gain of the exact posterior, `(N,)`, in nats.

    Raises:
        ValueError: If the lengths differ, or a memory has no slots.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = information_gain_against_slots(Figure().subplots(), [4, 16, 64], [1.3, 2.5, 3.6], error=[0.1] * 3)
        >>> ax.get_xscale(), [text.get_text() for text in ax.get_legend().get_texts()]
        ('log', ['log |M|', 'guide q(a | M, x)'])
    """
    slots = np.asarray(num_slots, dtype=float)
    columns = {"gain": gain, "error": error, "exact": exact}
    values = {name: np.asarray(column, dtype=float) for name, column in columns.items() if column is not None}
    for name, column in values.items():
        if column.shape != slots.shape or slots.ndim != 1:
            raise ValueError(f"{name}: expected one value for each of the memories {slots.shape}, got {column.shape}.")
    if slots.min(initial=1) < 1:
        raise ValueError(f"num_slots: expected at least 1, got {slots.min():g}.")
    order = np.argsort(slots)
    slots, values = slots[order], {name: column[order] for name, column in values.items()}
    ax.plot(slots, np.log(slots), "--", color=text_colour(), linewidth=1.2, label="log |M|")
    if exact is not None:
        style: dict[str, Any] = {"color": ORANGE, "markerfacecolor": "none", "linewidth": 1.5}
        ax.plot(slots, values["exact"], "s-", label="exact p(a | x, M)", **style)
    bars: dict[str, Any] = {"color": BLUE, "linewidth": 1.5, "capsize": 3}
    ax.errorbar(slots, values["gain"], values.get("error"), fmt="o-", label="guide q(a | M, x)", **bars)
    ax.set_xscale("log", base=2)
    ax.set_xticks(slots, [f"{slot:,.0f}" for slot in slots], minor=False)
    ax.minorticks_off()
    ax.set_ylim(bottom=min(0.0, *values["gain"]))
    label_axes(ax, "slots |M|", "information gain, nats per datapoint")
    legend_below(ax, columns=3)
    return ax


def evidence_by_memory(ax: Axes, evidence: Mapping[str, Array]) -> Axes:
    r"""Draws the mean evidence :math:`\log p(x | M)` of the same targets under several memories, with standard errors.

    Arguments:
        evidence: The evidence of each datapoint, `(B,)`, by the name of the memory. The first memory is the right one.
            Labels of the others show their difference to it.

    Raises:
        ValueError: If there is no memory.

    Example:
        >>> from matplotlib.figure import Figure
        >>> rows = {"right": np.array([-100.0, -90.0]), "wrong": np.array([-120.0, -112.0])}
        >>> [text.get_text() for text in evidence_by_memory(Figure().subplots(), rows).texts]
        ['−95.0 nats', '21.0 nats less']
    """
    if not evidence:
        raise ValueError("evidence: expected at least one memory, got none.")
    rows = {name: as_numpy(values).ravel() for name, values in evidence.items()}
    right = next(iter(rows.values()))
    for place, values in enumerate(rows.values()):
        mean = float(values.mean())
        colour = ORANGE if place else BLUE
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        ax.errorbar(mean, place, xerr=error, fmt="s" if place else "o", color=colour, capsize=3)
        ax.plot([float(right.mean()), mean], [place, place], color=colour, linewidth=1.5)
        less = float(right.mean()) - mean
        text = f"{abs(less):.1f} nats {'less' if less >= 0 else 'more'}" if place else f"{mean:.1f} nats"
        above: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        ax.annotate(text.replace("-", "\N{MINUS SIGN}"), (mean, place), fontsize=small_font(), **above)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.6)
    ax.margins(x=0.15)
    label_axes(ax, "log p(x | M), nats per datapoint", "")
    return ax
