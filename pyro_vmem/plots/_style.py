"""Colours, text and axes of all figures, legible on white and on dark pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vmem._utils.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

__all__: list[str] = []

Array = Tensor | NDArray[Any]
AnyFigure = TypeVar("AnyFigure", bound="FigureBase")

# Mid-tones of Okabe and Ito, distinct for colour-blind readers, with contrast of 3:1 against white and near-black.
BLUE, GREEN, ORANGE, PURPLE = "#1f7fc0", "#009e73", "#d55e00", "#b8529f"
LINE = "#8c8c8c"
EMPTY_BAR = ("#808080", 0.25)  # the empty part of a bar: transparent grey, for any background
MID_TONE = "#7c7c7c"  # text: 4.2:1 against white, 4.1:1 against near-black

ON_ANY_PAGE: dict[str, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), MID_TONE),
}
"""Settings for one picture that goes on white and on dark pages: `with matplotlib.rc_context(ON_ANY_PAGE): ...`."""


def as_numpy(values: Array) -> NDArray[np.float64]:
    """Converts a tensor or an array to float64 on the CPU."""
    return torch.as_tensor(values).detach().cpu().double().numpy()


def text_colour() -> str:
    """The text colour of the current matplotlib settings, also for frames and rules beside text."""
    colour: str = require("matplotlib", "plots").rcParams["text.color"]
    return colour


def small_font() -> float:
    """The font size of ticks and legends: 0.9 times that of the caller."""
    size: float = require("matplotlib", "plots").rcParams["font.size"]
    return 0.9 * size


def label_axes(ax: Axes, xlabel: str, ylabel: str) -> None:
    """Labels both axes in the colours of the caller, and removes the top and right spines."""
    settings = require("matplotlib", "plots").rcParams
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    # Ticks are made when they are drawn, perhaps under other settings.
    for axis in ("x", "y"):
        colour, label = settings[f"{axis}tick.color"], settings[f"{axis}tick.labelcolor"]
        ax.tick_params(
            axis=axis, labelsize=small_font(), color=colour, labelcolor=colour if label == "inherit" else label
        )
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: Axes, columns: int = 2) -> None:
    """Puts the legend below the Axes, off the data."""
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.2, "frameon": False}
    ax.legend(ncols=columns, fontsize=small_font(), handlelength=1.7, columnspacing=1.0, **below)
