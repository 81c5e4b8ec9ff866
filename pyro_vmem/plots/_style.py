"""Colours, text and axes that all figures share, legible on a white page and on a dark one."""

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

__all__ = [
    "BLUE",
    "GREEN",
    "LINE",
    "MID_TONE",
    "ON_ANY_PAGE",
    "ORANGE",
    "PURPLE",
    "Array",
    "as_numpy",
    "empty_bar_colour",
    "label_axes",
    "legend_below",
    "small_font",
    "text_colour",
]

Array = Tensor | NDArray[Any]
AnyFigure = TypeVar("AnyFigure", bound="FigureBase")

# Mid-tones of Okabe and Ito: told apart by colour-blind readers, and at least 3:1 against white and near-black alike.
BLUE, GREEN, ORANGE, PURPLE = "#1f7fc0", "#009e73", "#d55e00", "#b8529f"
LINE = "#8c8c8c"
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
    """The caller's colour of text; lines that belong to the text have it too."""
    colour: str = require("matplotlib", "plots").rcParams["text.color"]
    return colour


def small_font() -> float:
    """The font size of ticks and legends: nine tenths of the caller's."""
    size: float = require("matplotlib", "plots").rcParams["font.size"]
    return 0.9 * size


def empty_bar_colour() -> tuple[str, float]:
    """The colour of the empty part of a bar: grey with an alpha, so that it is a shade of any background."""
    return ("#808080", 0.25)


def label_axes(ax: Axes, xlabel: str, ylabel: str) -> None:
    """Labels both axes and removes the top and right spines; colours are the caller's."""
    settings = require("matplotlib", "plots").rcParams
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    # Ticks are made when they are drawn, maybe under other settings than those of now.
    for axis in ("x", "y"):
        colour, label = settings[f"{axis}tick.color"], settings[f"{axis}tick.labelcolor"]
        ax.tick_params(
            axis=axis, labelsize=small_font(), color=colour, labelcolor=colour if label == "inherit" else label
        )
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: Axes, columns: int = 2) -> None:
    """Puts the legend below the Axes, where it covers no data."""
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.2, "frameon": False}
    ax.legend(ncols=columns, fontsize=small_font(), handlelength=1.7, columnspacing=1.0, **below)
