"""The graphical model of a Pyro program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vmem._utils.extras import require
from pyro_vmem.plots._style import EMPTY_BAR, LINE, text_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["graphical_model"]

_RADIUS, _MARGIN = 0.25, 0.2  # the radius of a site, and its distance to the frame of its plate; sites are one apart


def graphical_model(ax: Axes, relations: Mapping[str, Any], arguments: Sequence[str] = ()) -> Axes:
    """Draws the sites of a Pyro program as circles, arrows from parents to children, and plates as frames.

    Observed sites are grey. Sites without parents are on top, and a site is below all of its parents.

    Arguments:
        relations: The result of `pyro.infer.inspect.get_model_relations(program, args)`.
        arguments: Names of the arguments of the program, drawn as squares with an arrow to every site.

    Raises:
        ValueError: If the program has no site.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from matplotlib.figure import Figure
        >>> from pyro.infer.inspect import get_model_relations
        >>> def model(x):
        ...     with pyro.plate("data", 3):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> ax = graphical_model(Figure().subplots(), get_model_relations(model, (torch.zeros(3),)), ["x"])
        >>> [text.get_text() for text in ax.texts][:4]
        ['data', 'z', 'x', 'x']
    """
    patches = require("matplotlib.patches", "plots")
    if not (parents := relations.get("sample_sample")):
        raise ValueError("relations: the program has no site. Give what get_model_relations(program, args) returns.")
    places = _places(parents)
    for plate, sites in relations["plate_sample"].items():
        corners = np.array([places[name] for name in sites])
        low, high = corners.min(0) - _RADIUS - _MARGIN, corners.max(0) + _RADIUS + _MARGIN
        ax.add_patch(patches.Rectangle(low, *(high - low), fill=False, edgecolor=LINE))
        ax.text(high[0] - 0.05, low[1] + 0.05, plate, ha="right", va="bottom", color=text_colour())
    for name, place in places.items():
        shade = EMPTY_BAR if name in relations["observed"] else "none"
        ax.add_patch(patches.Circle(place, _RADIUS, facecolor=shade, edgecolor=text_colour()))
        ax.text(*place, name, ha="center", va="center", style="italic", color=text_colour())
    # Arguments stand in a column on the left, from the top down.
    left, highest = min(x for x, _ in places.values()) - 1.2, max(y for _, y in places.values())
    squares = {name: (left, highest - row) for row, name in enumerate(arguments)}
    for name, place in squares.items():
        corner = (place[0] - _RADIUS, place[1] - _RADIUS)
        ax.add_patch(patches.Rectangle(corner, 2 * _RADIUS, 2 * _RADIUS, facecolor="none", edgecolor=LINE))
        ax.text(*place, name, ha="center", va="center", style="italic", color=text_colour())
    arrows = [(places[parent], places[child], text_colour()) for child, of in parents.items() for parent in of]
    arrows += [(square, place, LINE) for square in squares.values() for place in places.values()]
    for start, end, colour in arrows:
        away = 1.2 * _RADIUS * (np.subtract(end, start) / np.hypot(*np.subtract(end, start)))
        style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", end - away, start + away, arrowprops=style)
    ax.set(aspect="equal")
    ax.autoscale_view()
    ax.set_axis_off()
    return ax


def _places(parents: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, float]]:
    """The position of each site: one row per generation, alternating to the right."""
    depth: dict[str, int] = {}
    for name, of in parents.items():  # Pyro lists parents before their children
        depth[name] = 1 + max((depth[parent] for parent in of), default=-1)
    rows = [[name for name in depth if depth[name] == row] for row in range(1 + max(depth.values()))]
    # Shifted by half a column, a site does not cover the arrow from its grandparent to its child.
    return {
        name: (column + 0.8 * (row % 2), float(len(rows) - 1 - row))
        for row, names in enumerate(rows)
        for column, name in enumerate(names)
    }
