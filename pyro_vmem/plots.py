"""Figures of a run: functions of arrays and rows that draw on the Axes or Figure they are given.

Arrays are torch tensors or NumPy arrays. Images are `(C, H, W)` in [0, 1], with one channel (1 is ink, drawn dark) or
three (drawn as they are). Colours are told apart by colour-blind readers, on a light background of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    AnyFigure = TypeVar("AnyFigure", bound=FigureBase)

__all__ = ["images", "information_gain_histogram", "learning_curves", "lookup", "lookups", "one_shot_generations"]

Array = Tensor | NDArray[Any]

PAPER, TEXT, LINE, TRACK = "#ffffff", "#222222", "#9a9a9a", "#e4e4e4"
BLUE, GREEN, ORANGE, PURPLE = "#0072b2", "#009e73", "#d55e00", "#aa4499"

_TERMS = {
    "bound": ("bound", BLUE),
    "reconstruction": ("reconstruction", ORANGE),
    "kl_a": ("KL(a)", GREEN),
    "kl_z": ("KL(z)", PURPLE),
}

# A sheet of images, in units of an image's width.
_STEP = 1.14  # from one image to the next
_MARGIN = 0.12
_SPLIT = 1.6  # from the first column to the second
_FONT = 0.27


def learning_curves(
    ax: Axes, history: Sequence[Mapping[str, float]], columns: Sequence[str] = ("bound", "val_bound")
) -> Axes:
    """Draws terms of the objective, in nats per datapoint, against training steps.

    Validation terms are dashed, with a mark at each validation.

    Arguments:
        ax: Where to draw.
        history: Rows with `step` and some of the columns, as in `FitResult.history`; a row may lack a column.
        columns: `bound`, `reconstruction`, `kl_a`, `kl_z`, and the same after `val_`.

    Returns:
        The Axes.

    Raises:
        ValueError: If a column is not one of these, or no row has it.

    Example:
        >>> from matplotlib.figure import Figure
        >>> rows = [{"step": 500, "bound": -120.0, "val_bound": -130.0}, {"step": 1000, "bound": -100.0}]
        >>> ax = learning_curves(Figure().subplots(), rows)
        >>> [line.get_label() for line in ax.lines]
        ['bound', 'bound, validation']
    """
    for column in columns:
        name = column.removeprefix("val_")
        points = [(row["step"], row[column]) for row in history if column in row]
        if name not in _TERMS or not points:
            present = [c for c in dict.fromkeys(c for row in history for c in row) if c.removeprefix("val_") in _TERMS]
            raise ValueError(f"columns: no term {column!r} in the history. Choose from {present}.")
        label, colour = _TERMS[name]
        held_out = column != name
        marker = "o" if held_out or len(points) <= 3 else ""  # too few points to see a line
        style: dict[str, Any] = {
            "linestyle": "--" if held_out else "-",
            "marker": marker,
            "markersize": 3,
            "linewidth": 1.5,
        }
        ax.plot(*zip(*points, strict=True), color=colour, label=label + ", validation" * held_out, **style)
    _tidy(ax, "step", "nats per datapoint")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.locator_params(axis="x", nbins=5, integer=True)
    _legend_below(ax)
    return ax


def images(ax: Axes, images: Array, columns: int = 8) -> Axes:
    """Draws a grid of images with thin gaps, row by row.

    Arguments:
        ax: Where to draw.
        images: `(N, C, H, W)` in [0, 1].
        columns: Images a row.

    Returns:
        The Axes.

    Raises:
        ValueError: If these are no images, or `columns` is less than 1.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = images(Figure().subplots(), torch.rand(10, 1, 28, 28), columns=5)
        >>> ax.images[0].get_array().shape  # with a gap of one pixel around each
        (59, 146, 4)
    """
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}.")
    pixels = _pixels("images", images)
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    gap = max(1, round(width / 28))
    canvas = np.zeros((gap + math.ceil(count / columns) * (height + gap), gap + columns * (width + gap), 4))
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height + 2 * gap, left : left + width + 2 * gap] = (0.8, 0.8, 0.8, 1)
        canvas[top + gap : top + gap + height, left + gap : left + gap + width, :3] = image
    ax.imshow(canvas, interpolation="none")
    ax.set_axis_off()
    ax.figure.set_facecolor(PAPER)
    return ax


def lookup(
    figure: AnyFigure, target: Array, templates: Array, probabilities: Array, correct: Array, max_slots: int = 8
) -> AnyFigure:
    r"""Draws a target beside the templates that :math:`q(a | M, x)` looks up, the most probable first.

    Below each template is its probability; a tick and a green frame mark those of the target's class. If none of these
    is among the most probable, the best of them takes the last place, after an ellipsis.

    Arguments:
        figure: An empty figure or subfigure; text is scaled to its size.
        target: The target :math:`x`, `(C, H, W)`.
        templates: The templates :math:`m_1, ..., m_S`, `(S, C, H, W)`.
        probabilities: :math:`q(a | M, x)`, `(S,)`.
        correct: Whether each template is of the target's class, `(S,)`.
        max_slots: How many templates to show.

    Returns:
        The figure.

    Raises:
        ValueError: If the shapes do not agree, or `max_slots` is less than 1.

    Example:
        >>> from matplotlib.figure import Figure
        >>> q = torch.tensor([0.05, 0.93, 0.02])
        >>> correct = torch.tensor([False, True, False])
        >>> figure = lookup(Figure((5, 2)), torch.rand(1, 28, 28), torch.rand(3, 1, 28, 28), q, correct)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['target', 'looked up, most probable first', 'right class', '93 %', '5 %', '2 %']
    """
    labels = _numbers(correct).astype(bool).astype(np.int64)
    return lookups(figure, target[None], templates, probabilities[None], labels, np.ones(1), max_slots)


def lookups(
    figure: AnyFigure,
    targets: Array,
    templates: Array,
    probabilities: Array,
    labels: Array,
    target_labels: Array,
    max_slots: int = 8,
) -> AnyFigure:
    """Draws several lookups in one memory, a row each; see :func:`lookup`.

    Arguments:
        figure: An empty figure or subfigure.
        targets: `(T, C, H, W)`.
        templates: `(S, C, H, W)`.
        probabilities: `(T, S)`.
        labels: The class of each template, `(S,)`.
        target_labels: The class of each target, `(T,)`.
        max_slots: How many templates to show.

    Returns:
        The figure.

    Raises:
        ValueError: If the shapes do not agree, or `max_slots` is less than 1.

    Example:
        >>> from matplotlib.figure import Figure
        >>> x, m, q = torch.rand(2, 1, 28, 28), torch.rand(20, 1, 28, 28), torch.rand(2, 20).softmax(-1)
        >>> figure = lookups(Figure((5, 4)), x, m, q, torch.arange(20), torch.tensor([3, 7]), max_slots=4)
        >>> len(figure.axes[0].images)
        10
    """
    if max_slots < 1:
        raise ValueError(f"max_slots: expected at least 1, got {max_slots}.")
    x, m, q = _pixels("targets", targets), _pixels("templates", templates), _numbers(probabilities)
    if q.shape != (len(x), len(m)) or len(labels) != len(m) or len(target_labels) != len(x):
        raise ValueError(
            f"probabilities: expected shape {(len(x), len(m))} with a label for each target and template, got "
            f"{q.shape} with {len(target_labels)} and {len(labels)} labels."
        )
    correct = _numbers(target_labels)[:, None] == _numbers(labels)
    slots, height = min(max_slots, len(m)), x.shape[1] / x.shape[2]
    row_height = height + 0.72
    width = _SPLIT + max(slots * _STEP, 5.0)
    ax, font = _sheet(figure, width, 0.5 + len(x) * row_height + 0.4)
    ax.text(0.5, 0.3, "target", ha="center", fontsize=font, color=TEXT)
    ax.text(_SPLIT, 0.3, "looked up, most probable first", fontsize=font, color=TEXT)
    bottom = 0.5 + len(x) * row_height
    _tick(ax, _SPLIT + 0.15, bottom + 0.13, font)
    ax.text(_SPLIT + 0.4, bottom + 0.22, "right class", fontsize=font, color=TEXT)
    for row in range(len(x)):
        top = 0.5 + row * row_height
        _picture(ax, 0, top, x[row])
        order = np.argsort(-q[row], kind="stable")
        shown = order[:slots]
        if correct[row].any() and not correct[row, shown].any():
            best = order[correct[row, order]][0]
            shown = np.append(shown[:-1], best)
            if slots > 1:
                dots = _SPLIT + (slots - 1) * _STEP - (_STEP - 1) / 2
                ax.plot([dots] * 3, top + height * np.array([0.35, 0.5, 0.65]), ".", color=TEXT, markersize=font / 4)
        left = _SPLIT + _STEP * np.arange(len(shown))
        colours = [GREEN if right else BLUE for right in correct[row, shown]]
        bars: dict[str, Any] = {"height": 0.12, "left": left, "align": "edge"}
        ax.barh([top + height + 0.1] * len(shown), 1, color=TRACK, **bars)
        ax.barh([top + height + 0.1] * len(shown), q[row, shown], color=colours, **bars)
        for slot, start in zip(shown, left, strict=True):
            _picture(ax, start, top, m[slot], frame=GREEN if correct[row, slot] else None, line=font / 4)
            if correct[row, slot]:
                _tick(ax, start + 0.9, top + 0.1, font)
            text = _percent(q[row, slot])
            ax.text(start + 0.5, top + height + 0.27, text, ha="center", va="top", fontsize=font, color=TEXT)
    return figure


def information_gain_histogram(
    ax: Axes, gain: Array, num_slots: int, num_classes: int, exact: Array | None = None
) -> Axes:
    r"""Draws how much, in nats, each lookup tells: :math:`KL(q(a|M,x) \| p(a|M))`.

    Lines mark what it takes to tell the slot, :math:`\log |M|`, and the class, :math:`\log C`.

    Arguments:
        ax: Where to draw.
        gain: The information gain of each datapoint, any shape, in nats.
        num_slots: The slots :math:`|M|`.
        num_classes: The classes :math:`C` in memory.
        exact: The same by the exact posterior, drawn as an outline.

    Returns:
        The Axes.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = information_gain_histogram(Figure().subplots(), 3 * torch.rand(200), num_slots=20, num_classes=20)
        >>> [text.get_text() for text in ax.texts]
        ['log |M| = log C = 3.00']
    """
    guide = _numbers(gain).ravel()
    columns = [guide] if exact is None else [guide, _numbers(exact).ravel()]
    low, top = min(0.0, *(column.min() for column in columns)), max(column.max() for column in columns)
    # log |M| is the edge of a bin: under a uniform prior no gain is larger, so no bar should reach over it.
    width = (max(0.1, math.log(num_slots)) - low) / 30
    bins = (low + width * np.arange(1 + max(30, math.ceil((top - low) / width - 1e-3)))).tolist()
    high = bins[-1]
    columns = [column.clip(max=high) for column in columns]
    ax.hist(columns[0], bins, color=BLUE, alpha=0.75, label=f"guide q(a|M,x), mean {guide.mean():.2f}")
    if exact is not None:
        label = f"exact p(a|x,M), mean {columns[1].mean():.2f}"
        ax.hist(columns[1], bins, histtype="step", color=ORANGE, linewidth=1.5, label=label)
    marks = [("log |M|", num_slots), ("log C", num_classes)]
    if num_slots == num_classes:
        marks = [("log |M| = log C", num_slots)]
    for row, (name, count) in enumerate(marks):
        position = math.log(count)
        ax.axvline(position, color=TEXT, linestyle="-" if row else "--", linewidth=1.2)
        side = "right" if position > (low + high) / 2 else "left"
        place: dict[str, Any] = {
            "xy": (position, 1),
            "xycoords": ax.get_xaxis_transform(),
            "textcoords": "offset points",
        }
        ax.annotate(f"{name} = {position:.2f}", xytext=(0, 3 + 12 * row), ha=side, fontsize=9, color=TEXT, **place)
    ax.set_xlim(low, high + width)
    _tidy(ax, "information gain, nats per datapoint", "datapoints")
    ax.locator_params(axis="y", integer=True)
    _legend_below(ax, columns=1)
    return ax


def one_shot_generations(figure: AnyFigure, templates: Array, samples: Array) -> AnyFigure:
    r"""Draws templates, framed, each with samples of :math:`p(x | z, m_a)` beside it.

    Arguments:
        figure: An empty figure or subfigure; text is scaled to its size.
        templates: `(R, C, H, W)`.
        samples: `(R, N, C, H, W)`.

    Returns:
        The figure.

    Raises:
        ValueError: If there are not as many rows of samples as templates.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure = one_shot_generations(Figure((4, 3)), torch.rand(3, 1, 28, 28), torch.rand(3, 5, 1, 28, 28))
        >>> len(figure.axes[0].images)
        18
    """
    if samples.ndim != 5 or len(samples) != len(templates):
        raise ValueError(
            f"samples: expected shape (R, N, C, H, W) with R = {len(templates)}, got {tuple(samples.shape)}."
        )
    m, rows = _pixels("templates", templates), [_pixels("samples", row) for row in samples]
    step = m.shape[1] / m.shape[2] + _STEP - 1
    ax, font = _sheet(figure, _SPLIT + max(len(rows[0]) * _STEP, 3.0), 0.5 + len(m) * step)
    ax.text(0.5, 0.3, "template", ha="center", fontsize=font, color=TEXT)
    ax.text(_SPLIT, 0.3, "samples", fontsize=font, color=TEXT)
    for row, (template, drawn) in enumerate(zip(m, rows, strict=True)):
        _picture(ax, 0, 0.5 + row * step, template, frame=BLUE, line=font / 4)
        for column, image in enumerate(drawn):
            _picture(ax, _SPLIT + column * _STEP, 0.5 + row * step, image)
    return figure


def _numbers(values: Array) -> NDArray[np.float64]:
    return torch.as_tensor(values).detach().cpu().double().numpy()


def _pixels(name: str, images: Array) -> NDArray[np.float64]:
    """Images `(N, C, H, W)` as colours `(N, H, W, 3)`; one channel is ink on white paper."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name}: expected images (N, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}.")
    pixels = _numbers(images).clip(0, 1).transpose(0, 2, 3, 1)
    return np.repeat(1 - pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


def _percent(probability: float) -> str:
    if 0.995 <= probability < 1 - 1e-6:
        return ">99 %"
    return "<1 %" if 0 < probability < 0.005 else f"{probability:.0%}".replace("%", " %")


def _sheet(figure: Any, width: float, height: float) -> tuple[Axes, float]:
    """An Axes over the whole figure, with y downwards and equal units, and the font size that suits it in points."""
    width, height = width + 2 * _MARGIN, height + 2 * _MARGIN
    figure.set_facecolor(PAPER)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-_MARGIN, width - _MARGIN), ylim=(height - _MARGIN, -_MARGIN), aspect="equal")
    ax.set_axis_off()
    points = min(figure.bbox.width / width, figure.bbox.height / height) * 72 / figure.dpi
    return ax, min(_FONT * points, 12.0)


def _picture(
    ax: Axes, left: float, top: float, image: NDArray[np.float64], frame: str | None = None, line: float = 0.6
) -> None:
    bottom = top + image.shape[0] / image.shape[1]
    # Without interpolation a vector file holds the pixels themselves.
    ax.imshow(image, interpolation="none", extent=(left, left + 1, bottom, top), aspect="equal")
    corners = ([left, left + 1, left + 1, left, left], [top, top, bottom, bottom, top])
    style: dict[str, Any] = {"color": frame or LINE, "linewidth": line if frame else 0.6, "clip_on": False}
    ax.plot(*corners, solid_joinstyle="miter", solid_capstyle="projecting", **style)


def _tick(ax: Axes, x: float, y: float, font: float) -> None:
    """A tick on a green disc, drawn by lines, since a font may lack the character."""
    ax.plot([x], [y], "o", color=GREEN, markersize=font, markeredgecolor=PAPER, markeredgewidth=font / 10)
    ax.plot([x - 0.08, x - 0.02, x + 0.09], [y, y + 0.06, y - 0.07], color=PAPER, linewidth=font / 8)


def _tidy(ax: Axes, xlabel: str, ylabel: str) -> None:
    ax.figure.set_facecolor(PAPER)
    ax.set_facecolor(PAPER)
    ax.set_xlabel(xlabel, fontsize=10, color=TEXT)
    ax.set_ylabel(ylabel, fontsize=10, color=TEXT)
    ax.tick_params(labelsize=9, labelcolor=TEXT, color=LINE)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(LINE)


def _legend_below(ax: Axes, columns: int = 2) -> None:
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.2, "frameon": False}
    ax.legend(ncols=columns, fontsize=9, labelcolor=TEXT, handlelength=1.7, columnspacing=1.0, **below)
