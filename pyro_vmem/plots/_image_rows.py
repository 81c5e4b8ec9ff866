"""Rows of images on one Axes, with text that scales with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_vmem.plots._style import BLUE, GREEN, LINE, AnyFigure, Array, as_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__: list[str] = []

# In units of an image's width.
STEP = 1.14  # from one image to the next
SPLIT = 1.6  # from the first column to the second
_MARGIN = 0.12
_FONT = 0.27


def as_colours(name: str, images: Array) -> NDArray[np.float64]:
    """Converts images `(N, C, H, W)` to colours `(N, H, W, 3)`; one channel is ink on white paper."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{name}: expected images (N, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}. "
            "One image alone is image[None]."
        )
    values = as_numpy(images).clip(0, 1).transpose(0, 2, 3, 1)
    return np.repeat(1 - values, 3, -1) if values.shape[-1] == 1 else values


def image_canvas(figure: Any, width: float, height: float) -> tuple[Axes, float]:
    """Makes an Axes over the whole figure for rows of images; returns it and the font size in points.

    The unit of the Axes is the width of an image, and y points downwards.
    """
    width, height = width + 2 * _MARGIN, height + 2 * _MARGIN
    ax: Axes = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-_MARGIN, width - _MARGIN), ylim=(height - _MARGIN, -_MARGIN), aspect="equal")
    ax.set_axis_off()
    points = min(figure.bbox.width / width, figure.bbox.height / height) * 72 / figure.dpi
    return ax, min(_FONT * points, 12.0)


def draw_image(
    ax: Axes, left: float, top: float, image: NDArray[np.float64], frame: str | None = None, line: float = 0.6
) -> None:
    """Draws one image, one unit wide, in a thin grey frame or a given one."""
    bottom = top + image.shape[0] / image.shape[1]
    # Without interpolation a vector file holds the exact pixels.
    ax.imshow(image, interpolation="none", extent=(left, left + 1, bottom, top), aspect="equal")
    corners = ([left, left + 1, left + 1, left, left], [top, top, bottom, bottom, top])
    style: dict[str, Any] = {"color": frame or LINE, "linewidth": line if frame else 0.6, "clip_on": False}
    ax.plot(*corners, solid_joinstyle="miter", solid_capstyle="projecting", **style)


def draw_rows(
    figure: AnyFigure, columns: dict[str, NDArray[np.float64]], name: str, samples: list[NDArray[np.float64]]
) -> AnyFigure:
    """Draws rows of images: a framed one, one for each titled column, then samples under a common title."""
    height = next(iter(columns.values())).shape[1] / samples[0].shape[2]
    left, step = len(columns) * SPLIT, height + STEP - 1
    ax, font = image_canvas(figure, left + max(len(samples[0]) * STEP, 3.0), 0.5 + len(samples) * step)
    for place, title in enumerate(columns):
        ax.text(place * SPLIT + 0.5, 0.3, title, ha="center", fontsize=font)
    ax.text(left, 0.3, name, fontsize=font)
    for row, drawn in enumerate(samples):
        top = 0.5 + row * step
        for place, images in enumerate(columns.values()):
            draw_image(ax, place * SPLIT, top, images[row], frame=None if place else BLUE, line=font / 4)
        for place, image in enumerate(drawn):
            draw_image(ax, left + place * STEP, top, image)
    return figure


def draw_tick(ax: Axes, x: float, y: float, font: float) -> None:
    """Draws a tick on a green disc, by lines, because a font may lack the character."""
    ax.plot([x], [y], "o", color=GREEN, markersize=font, markeredgecolor="white", markeredgewidth=font / 10)
    ax.plot([x - 0.08, x - 0.02, x + 0.09], [y, y + 0.06, y - 0.07], color="white", linewidth=font / 8)
