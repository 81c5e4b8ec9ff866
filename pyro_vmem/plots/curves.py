"""Learning curves: the terms of the objective against training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyro_vmem.plots._style import BLUE, GREEN, ORANGE, PURPLE, label_axes, legend_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["learning_curves"]

_TERMS = {
    "bound": ("bound", BLUE),
    "reconstruction": ("reconstruction", ORANGE),
    "kl_a": ("KL(a)", GREEN),
    "kl_z": ("KL(z)", PURPLE),
}


def learning_curves(ax: Axes, history: Sequence[Mapping[str, float]], columns: Sequence[str] | None = None) -> Axes:
    """Draws terms of the objective, in nats per datapoint, against training steps.

    Validation terms are dashed, with a mark at each validation.

    Arguments:
        history: Rows with `step` and some of the columns, as in `FitResult.history`; a row may lack a column.
        columns: `bound`, `reconstruction`, `kl_a`, `kl_z`, and the same with the prefix `val_`. Default: `bound`, and
            `val_bound` if the history has it.

    Raises:
        ValueError: If a column is not one of these, or no row has it.

    Example:
        >>> from matplotlib.figure import Figure
        >>> rows = [{"step": 500, "bound": -120.0, "val_bound": -130.0}, {"step": 1000, "bound": -100.0}]
        >>> ax = learning_curves(Figure().subplots(), rows)
        >>> [line.get_label() for line in ax.lines]
        ['bound', 'bound, validation']
    """
    if columns is None:
        validated = any("val_bound" in row for row in history)
        columns = ("bound", "val_bound") if validated else ("bound",)
    for column in columns:
        name = column.removeprefix("val_")
        points = [(row["step"], row[column]) for row in history if column in row]
        if name not in _TERMS or not points:
            present = [c for c in dict.fromkeys(c for row in history for c in row) if c.removeprefix("val_") in _TERMS]
            raise ValueError(f"columns: no term {column!r} in the history. Choose from {present}.")
        label, colour = _TERMS[name]
        held_out = column != name
        marker = "o" if held_out or len(points) <= 3 else ""  # too few points to see a line
        style: dict[str, Any] = {"marker": marker, "markersize": 3, "linestyle": "--" if held_out else "-"}
        name = label + ", validation" * held_out
        ax.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=1.5, **style)
    label_axes(ax, "step", "nats per datapoint")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.locator_params(axis="x", nbins=5, integer=True)
    legend_below(ax)
    return ax
