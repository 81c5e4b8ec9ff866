"""What all figures have in common: colours, text and axes that can be read on a white page as on a dark one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vmem._utils.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BLUE",
    "GREEN",
    "LINE",
    "MID_TONE",
    "ON_ANY_PAGE",
    "ORANGE",
    "PURPLE",
    "Array",
    "legend_below",
    "numbers",
    "small",
    "text_colour",
    "tidy",
    "track",
]

Array = Tensor | NDArray[Any]

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


def numbers(values: Array) -> NDArray[np.float64]:
    """Any array as float64 on the CPU."""
    return torch.as_tensor(values).detach().cpu().double().numpy()


def text_colour() -> str:
    """The caller's colour of text, which lines that are read as text take too."""
    colour: str = require("matplotlib", "plots").rcParams["text.color"]
    return colour


def small() -> float:
    """The size of text that stands back: nine tenths of the caller's."""
    size: float = require("matplotlib", "plots").rcParams["font.size"]
    return 0.9 * size


def track() -> tuple[str, float]:
    """The colour of what is empty: a shade of any page."""
    return ("#808080", 0.25)


def tidy(ax: Axes, xlabel: str, ylabel: str) -> None:
    """Labels, and two spines of four; colours are the caller's."""
    settings = require("matplotlib", "plots").rcParams
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    # Ticks are made when they are drawn, maybe under other settings than those of now.
    for axis in ("x", "y"):
        colour, label = settings[f"{axis}tick.color"], settings[f"{axis}tick.labelcolor"]
        ax.tick_params(axis=axis, labelsize=small(), color=colour, labelcolor=colour if label == "inherit" else label)
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: Axes, columns: int = 2) -> None:
    """A legend that covers no data."""
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.2, "frameon": False}
    ax.legend(ncols=columns, fontsize=small(), handlelength=1.7, columnspacing=1.0, **below)
