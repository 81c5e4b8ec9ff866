"""Figures of calibration: reliability diagrams, ranks and k-hat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_vmem._utils.checks import Count, Several
from pyro_vmem.plots._style import (
    BLUE,
    EMPTY_BAR,
    ORANGE,
    AnyFigure,
    Array,
    as_numpy,
    label_axes,
    legend_below,
    small_font,
    text_colour,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["khat_scatter", "reliability_diagram", "sbc_histograms"]

_LEAST, _MOST = -0.5, 4.0  # the range of k-hat; values outside are drawn on its edge
_LIMIT = 0.7  # of k-hat; above it the mean of the weights is unreliable
_BAND = 0.99


def khat_scatter(ax: Axes, khat: Array) -> Axes:
    r"""Draws the Pareto tail index :math:`\hat k` of the importance weights of each datapoint, with a line at 0.7.

    Above the line the mean of the weights is unreliable. Values outside the range are drawn on its edge. The legend
    counts those that could not be estimated (NaN).

    Arguments:
        khat: :math:`\hat k` of each datapoint, any shape; see `pyro_vmem.diagnostics.pareto_k`.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = khat_scatter(Figure().subplots(), np.array([0.1, 0.4, 0.9, np.inf, np.nan]))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['2 to be trusted', '2 above 0.7', '1 not estimated']
    """
    k = as_numpy(khat).ravel()
    top = float(np.clip(k[np.isfinite(k)].max(initial=0.0), 1.5, _MOST))
    place, height = np.arange(len(k)), k.clip(_LEAST, top)
    good, bad = k <= _LIMIT, k > _LIMIT
    style: dict[str, Any] = {"linewidths": 1.0, "s": 18}
    trusted, above = f"{good.sum():,} to be trusted", f"{bad.sum():,} above {_LIMIT:g}"
    ax.scatter(place[good], height[good], marker="o", facecolors="none", edgecolors=BLUE, label=trusted, **style)
    ax.scatter(place[bad], height[bad], marker="x", color=ORANGE, label=above, **style)
    if missing := int(np.isnan(k).sum()):
        ax.plot([], [], " ", label=f"{missing:,} not estimated")
    ax.axhline(_LIMIT, color=text_colour(), linestyle="--", linewidth=1.2)
    ax.set_ylim(min(height[np.isfinite(height)].min(initial=0.0), 0.0) - 0.1, top + 0.1)
    ax.margins(x=0.02)
    label_axes(ax, "datapoint", "Pareto k-hat of the weights")
    ax.locator_params(axis="x", integer=True)
    legend_below(ax, columns=3)
    return ax


def reliability_diagram(ax: Axes, confidence: Array, accuracy: Array, count: Array, name: str = "q(a | M, x)") -> Axes:
    """Draws accuracy against confidence; calibrated probabilities lie on the diagonal.

    Each point is a bin, with an area proportional to its number of datapoints and a line to the diagonal.

    Arguments:
        confidence: The mean probability of the most probable class in each bin, `(N,)`; empty bins are ignored.
        accuracy: The share of right classes in each bin, `(N,)`.
        count: The number of datapoints in each bin, `(N,)`.
        name: The label of the axis of probabilities.

    Raises:
        ValueError: If the lengths differ, or all bins are empty.

    Example:
        >>> from matplotlib.figure import Figure
        >>> columns = np.array([0.4, 0.9]), np.array([0.5, 0.8]), np.array([10, 30])
        >>> reliability_diagram(Figure().subplots(), *columns).get_legend().get_texts()[1].get_text()
        'calibration error 0.10'
    """
    x, y, n = as_numpy(confidence), as_numpy(accuracy), as_numpy(count)
    if x.shape != y.shape or x.shape != n.shape or x.ndim != 1 or not n.sum() > 0:
        raise ValueError(
            f"count: expected one value per bin, not all 0, as confidence {x.shape} and accuracy {y.shape} have, got "
            f"{n.shape} with a sum of {n.sum():g}."
        )
    x, y, n = (column[n > 0] for column in (x, y, n))
    share = n / n.sum()
    ax.plot([0, 1], [0, 1], "--", color=text_colour(), linewidth=1.2, label="calibrated")
    ax.vlines(x, np.minimum(x, y), np.maximum(x, y), color=ORANGE, linewidth=1.5)
    label = f"calibration error {float((share * abs(x - y)).sum()):.2f}"
    ax.scatter(x, y, s=20 + 300 * share, color=BLUE, alpha=0.8, linewidths=0, label=label, zorder=3)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    label_axes(ax, f"largest class probability by {name}", "accuracy")
    legend_below(ax)
    for handle in ax.get_legend().legend_handles[1:]:  # type: ignore[union-attr]  # there is one now
        handle.set_sizes([30])  # type: ignore[union-attr]  # of the scatter
    return ax


def sbc_histograms(figure: AnyFigure, ranks: Mapping[str, Array], num_draws: Count, bins: Several = 20) -> AnyFigure:
    """Draws the ranks of simulation-based calibration, one panel per quantity; flat if the posterior is right.

    Bars that rise at both ends mean that the posterior is too narrow, bars that rise in the middle that it is too wide,
    a slope that it is shifted. The band holds 99 % of the counts of uniform ranks.

    References:
        | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018)
        | https://arxiv.org/abs/1804.06788

    Arguments:
        ranks: The rank of the true value among `num_draws` posterior draws, 0 to `num_draws`, any shape, by quantity.
        num_draws: The number of draws of each rank.
        bins: The largest number of bars per panel.

    Raises:
        ValueError: If there is no quantity, or a rank is out of range.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ranks = {"z[0]": np.arange(200) % 20, "z[1]": np.zeros(200)}
        >>> figure = sbc_histograms(Figure((6, 3)), ranks, num_draws=19)
        >>> [ax.get_title() for ax in figure.axes]
        ['z[0]', 'z[1]']
    """
    if not ranks:
        raise ValueError("ranks: expected at least one quantity, got none.")
    columns = min(4, len(ranks))
    rows = math.ceil(len(ranks) / columns)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    edges = np.round(np.linspace(0, num_draws + 1, min(bins, num_draws + 1) + 1)) - 0.5  # whole ranks
    widths = np.diff(edges)
    shares = widths / (num_draws + 1)
    for index, (ax, (name, values)) in enumerate(zip(panels.flat, ranks.items(), strict=False)):
        rank = as_numpy(values).ravel()
        if len(rank) == 0 or rank.min() < 0 or rank.max() > num_draws:
            raise ValueError(f"ranks: expected 0 to num_draws = {num_draws} for {name!r}, got others, or none.")
        low, high = np.transpose([_binomial_band(len(rank), share) for share in shares])
        ax.bar(edges[:-1], high - low, widths, bottom=low, align="edge", color=EMPTY_BAR, linewidth=0)
        ax.stairs(
            len(rank) * shares, edges, baseline=None, color=text_colour(), linestyle="--", linewidth=1.0, zorder=3
        )
        ax.hist(rank, edges.tolist(), color=BLUE, alpha=0.8, rwidth=0.85)
        ax.set_title(name, fontsize=small_font())
        ax.set_xlim(edges[0], edges[-1])
        bottom_row = index // columns == (len(ranks) - 1) // columns or index + columns >= len(ranks)
        label_axes(
            ax, f"rank among {num_draws:,} draws" if bottom_row else "", "" if index % columns else "simulations"
        )
        ax.locator_params(axis="y", integer=True)
    for ax in panels.flat[len(ranks) :]:
        ax.set_axis_off()
    return figure


def _binomial_band(total: int, probability: float) -> tuple[float, float]:
    """The central 99 % of a binomial count."""
    log_probs = torch.distributions.Binomial(total, torch.tensor(probability).double()).log_prob(
        torch.arange(total + 1.0).double()
    )
    cumulative = log_probs.exp().cumsum(0)
    low, high = torch.searchsorted(cumulative, torch.tensor([(1 - _BAND) / 2, (1 + _BAND) / 2]).double()).tolist()
    return low - 0.5, high + 0.5
