"""Figures of images: a grid, samples beside templates, completions beside targets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pyro_vmem._utils.checks import Count
from pyro_vmem.plots._image_rows import as_colours, draw_rows
from pyro_vmem.plots._style import AnyFigure, Array, as_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["completions", "images", "one_shot_generations"]

_GAP = (0.7, 0.7, 0.7)  # a thin line between images, also on a dark page
_HIDDEN = (0.62, 0.66, 0.72)  # neither ink nor paper


def images(ax: Axes, images: Array, columns: Count = 8) -> Axes:
    """Draws a grid of images with thin gaps, row by row.

    Arguments:
        images: `(N, C, H, W)` in [0, 1].
        columns: Images per row.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = images(Figure().subplots(), np.random.rand(10, 1, 28, 28), columns=5)
        >>> ax.images[0].get_array().shape  # with a gap of one pixel around each
        (59, 146, 4)
    """
    x = as_colours("images", images)
    count, height, width, _ = x.shape
    columns = min(columns, count)
    gap = max(1, round(width / 28))
    canvas = np.zeros((gap + math.ceil(count / columns) * (height + gap), gap + columns * (width + gap), 4))
    for index, image in enumerate(x):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height + 2 * gap, left : left + width + 2 * gap] = (*_GAP, 1)
        canvas[top + gap : top + gap + height, left + gap : left + gap + width, :3] = image
    ax.imshow(canvas, interpolation="none")
    ax.set_axis_off()
    return ax


def one_shot_generations(figure: AnyFigure, templates: Array, samples: Array) -> AnyFigure:
    r"""Draws framed templates, each beside its samples of :math:`p(x | z, m_a)`.

    Arguments:
        templates: `(R, C, H, W)`.
        samples: `(R, N, C, H, W)`.

    Raises:
        ValueError: If there are not as many rows of samples as templates.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure = one_shot_generations(Figure((4, 3)), np.random.rand(3, 1, 28, 28), np.random.rand(3, 5, 1, 28, 28))
        >>> len(figure.axes[0].images)
        18
    """
    if samples.ndim != 5 or len(samples) != len(templates):
        raise ValueError(
            f"samples: expected shape (R, N, C, H, W) with R = {len(templates)}, got {tuple(samples.shape)}."
        )
    rows = [as_colours("samples", row) for row in samples]
    return draw_rows(figure, {"template": as_colours("templates", templates)}, "samples", rows)


def completions(figure: AnyFigure, targets: Array, mask: Array, samples: Array) -> AnyFigure:
    r"""Draws framed targets, each beside its observed part and completions.

    Arguments:
        targets: The targets :math:`x`, `(R, C, H, W)`.
        mask: True where a value was observed; broadcasts with `targets`. Missing values are grey-blue.
        samples: Completions of `VMA.complete`, `(R, N, C, H, W)`.

    Raises:
        ValueError: If there are not as many rows of completions as targets, or `mask` does not broadcast.

    Example:
        >>> from matplotlib.figure import Figure
        >>> x = np.random.rand(3, 1, 28, 28)
        >>> upper = np.arange(28)[:, None] < 14
        >>> figure = completions(Figure((4, 3)), x, upper, np.random.rand(3, 5, 1, 28, 28))
        >>> [text.get_text() for text in figure.axes[0].texts], len(figure.axes[0].images)
        (['target', 'observed', 'filled in'], 21)
    """
    if samples.ndim != 5 or len(samples) != len(targets):
        raise ValueError(
            f"samples: expected shape (R, N, C, H, W) with R = {len(targets)}, got {tuple(samples.shape)}. "
            "Stack several calls of complete along dim 1."
        )
    try:
        observed = np.broadcast_to(as_numpy(mask) != 0, tuple(targets.shape)).transpose(0, 2, 3, 1)
    except ValueError:
        raise ValueError(
            f"mask: {tuple(mask.shape)} does not broadcast with targets {tuple(targets.shape)}. Give one like x."
        ) from None
    x = as_colours("targets", targets)
    shown = {"target": x, "observed": np.where(observed.all(-1, keepdims=True), x, _HIDDEN)}
    return draw_rows(figure, shown, "filled in", [as_colours("samples", row) for row in samples])
