"""Figures of addresses: the slots that the guide looks up for each target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_vmem._utils.checks import Count
from pyro_vmem.plots._image_rows import SPLIT, STEP, as_colours, draw_image, draw_tick, image_canvas
from pyro_vmem.plots._style import (
    BLUE,
    EMPTY_BAR,
    GREEN,
    LINE,
    ORANGE,
    AnyFigure,
    Array,
    as_numpy,
    label_axes,
    small_font,
    text_colour,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["address_heat_map", "lookups"]

_BAR = 0.14  # in image widths, with the gap below it


def lookups(
    figure: AnyFigure,
    targets: Array,
    templates: Array,
    probabilities: Array,
    labels: Array | None = None,
    target_labels: Array | None = None,
    max_slots: Count = 8,
    exact: Array | None = None,
) -> AnyFigure:
    r"""Draws targets, one per row, beside the most probable templates under :math:`q(a | M, x)`, best first.

    The probability stands below each template. A tick and a green frame mark templates of the class of the target. If
    none of these is among the most probable, the best of them takes the last place, after an ellipsis.

    Arguments:
        targets: The targets :math:`x`, `(T, C, H, W)`.
        templates: The templates :math:`m_1, ..., m_S`, `(S, C, H, W)`.
        probabilities: :math:`q(a | M, x)`, `(T, S)`.
        labels: The class of each template, `(S,)`. Without classes, no template is marked as right.
        target_labels: The class of each target, `(T,)`.
        max_slots: How many templates to show.
        exact: The exact posterior :math:`p(a | x, M)`, `(T, S)`, drawn as a second bar.

    Raises:
        ValueError: If the shapes do not agree.

    Example:
        >>> from matplotlib.figure import Figure
        >>> x, m, q = np.random.rand(2, 1, 28, 28), np.random.rand(20, 1, 28, 28), np.full((2, 20), 0.05)
        >>> figure = lookups(Figure((5, 4)), x, m, q, np.arange(20), np.array([3, 7]), max_slots=4)
        >>> len(figure.axes[0].images)
        10
    """
    x, m, q = as_colours("targets", targets), as_colours("templates", templates), as_numpy(probabilities)
    right: NDArray[np.bool_] = np.zeros((len(x), len(m)), dtype=bool)
    if labels is not None and target_labels is not None:
        right = as_numpy(target_labels)[:, None] == as_numpy(labels)
    if q.shape != (len(x), len(m)) or right.shape != q.shape:
        raise ValueError(
            f"probabilities: expected shape {(len(x), len(m))} with a label for each target and template, got "
            f"{q.shape} with {right.shape[0]} and {right.shape[1]} labels."
        )
    second = None if exact is None else as_numpy(exact)
    if second is not None and second.shape != q.shape:
        raise ValueError(
            f"exact: expected shape {q.shape} as probabilities, got {second.shape}. Give one row per target."
        )
    slots, height = min(max_slots, len(m)), x.shape[1] / x.shape[2]
    below = height + 0.1 + (0.0 if second is None else _BAR)  # where the text below the bars begins
    row_height = below + 0.62
    bottom = 0.5 + len(x) * row_height
    ax, font = image_canvas(figure, SPLIT + max(slots * STEP, 5.0), bottom + 0.4)
    ax.text(0.5, 0.3, "target", ha="center", fontsize=font)
    ax.text(SPLIT, 0.3, "looked up, most probable first", fontsize=font)
    if labels is not None:
        draw_tick(ax, SPLIT + 0.15, bottom + 0.13, font)
        ax.text(SPLIT + 0.4, bottom + 0.22, "right class", fontsize=font)
    bars: dict[str, Any] = {"height": _BAR - 0.02, "align": "edge"}
    if second is not None:
        for start, name, colour in ((2.1, "guide", BLUE), (3.7, "exact", ORANGE)):
            ax.barh(bottom + 0.07, 0.4, color=colour, left=SPLIT + start, **bars)
            ax.text(SPLIT + start + 0.5, bottom + 0.22, name, fontsize=font)
    for row in range(len(x)):
        top = 0.5 + row * row_height
        draw_image(ax, 0, top, x[row])
        shown, skipped = _most_probable(q[row], right[row], slots)
        if skipped:
            dots = SPLIT + (slots - 1) * STEP - (STEP - 1) / 2
            places = top + height * np.array([0.35, 0.5, 0.65])
            ax.plot([dots] * 3, places, ".", color=text_colour(), markersize=font / 4)
        left = SPLIT + STEP * np.arange(len(shown))
        colours = [GREEN if is_right else BLUE for is_right in right[row, shown]]
        levels = [(q[row, shown], colours)] + ([] if second is None else [(second[row, shown], [ORANGE] * len(shown))])
        for level, (values, fills) in enumerate(levels):
            places = [top + height + 0.1 + level * _BAR] * len(shown)
            ax.barh(places, 1, color=EMPTY_BAR, left=left, **bars)
            ax.barh(places, values, color=fills, left=left, **bars)
        for slot, start in zip(shown, left, strict=True):
            draw_image(ax, start, top, m[slot], frame=GREEN if right[row, slot] else None, line=font / 4)
            if right[row, slot]:
                draw_tick(ax, start + 0.9, top + 0.1, font)
            text = _percent(q[row, slot])
            ax.text(start + 0.5, top + below + 0.17, text, ha="center", va="top", fontsize=font)
    return figure


def address_heat_map(
    ax: Axes, probabilities: Array, labels: Array, target_labels: Array, name: str = "q(a | M, x)"
) -> Axes:
    r"""Draws the probability of every slot for every target, sorted by class, with the right slots framed.

    A good guide is bright inside the frames. A bright column is a slot that is looked up for every target.

    Arguments:
        ax: The Axes to draw on; the colour bar takes a part of it.
        probabilities: :math:`q(a | M, x)` or the exact posterior, `(T, S)`.
        labels: The class of each slot, `(S,)`.
        target_labels: The class of each target, `(T,)`.
        name: The label of the colour bar.

    Raises:
        ValueError: If the shapes do not agree.

    Example:
        >>> from matplotlib.figure import Figure
        >>> q = np.array([[0.1, 0.9], [0.7, 0.3]])
        >>> ax = address_heat_map(Figure().subplots(), q, labels=np.array([4, 2]), target_labels=np.array([2, 4]))
        >>> ax.images[0].get_array().tolist()  # class 2 comes first
        [[0.9, 0.1], [0.3, 0.7]]
    """
    q, of_slot, of_target = as_numpy(probabilities), as_numpy(labels), as_numpy(target_labels)
    if q.shape != (len(of_target), len(of_slot)):
        raise ValueError(
            f"probabilities: expected shape {(len(of_target), len(of_slot))}, one row per target and one column per "
            f"slot, got {q.shape}. Give a label for each."
        )
    rows, columns = np.argsort(of_target, kind="stable"), np.argsort(of_slot, kind="stable")
    drawn = ax.imshow(q[rows][:, columns], cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for value in np.intersect1d(of_target, of_slot):
        top, bottom = np.flatnonzero(of_target[rows] == value)[[0, -1]] + [0, 1]
        left, right = np.flatnonzero(of_slot[columns] == value)[[0, -1]] + [0, 1]
        corners = np.array([[left, right, right, left, left], [top, top, bottom, bottom, top]]) - 0.5
        ax.plot(*corners, color=ORANGE, linewidth=1.0, solid_joinstyle="miter")
    label_axes(ax, f"{len(of_slot):,} slots, by class", f"{len(of_target):,} targets, by class")
    ax.set(xticks=[], yticks=[], xlim=(-0.5, len(of_slot) - 0.5), ylim=(len(of_target) - 0.5, -0.5))
    ax.spines[["left", "bottom"]].set_visible(False)
    bar = ax.figure.colorbar(drawn, ax=ax)
    bar.set_label(name)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=small_font(), color=LINE, labelcolor=text_colour())
    return ax


def _most_probable(q: NDArray[Any], correct: NDArray[Any], count: int) -> tuple[NDArray[Any], bool]:
    """The slots to show, and whether the last one is there only because its class is right."""
    order = np.argsort(-q, kind="stable")
    shown = order[:count]
    if not correct.any() or correct[shown].any():
        return shown, False
    best = order[correct[order]][0]
    return np.append(shown[:-1], best), count > 1


def _percent(probability: float) -> str:
    if 0.995 <= probability < 1 - 1e-6:
        return ">99 %"
    return "<1 %" if 0 < probability < 0.005 else f"{probability:.0%}".replace("%", " %")
