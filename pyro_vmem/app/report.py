"""The report of a run: one self-contained HTML page of figures, numbers and settings.

It is made from arrays; its words and style are in `report.html.j2`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from pyro_vmem import plots
from pyro_vmem._utils.extras import require
from pyro_vmem._utils.files import write_atomically
from pyro_vmem.app.report_text import diagnostic_rows, problems, result_rows, speed_sentence, unreliable, verdict

__all__: list[str] = []

Array = Tensor | NDArray[Any]
Arguments = Mapping[str, Any]
Context = dict[str, Any]

# Beyond these a page gets longer, not clearer.
_MAX_ROWS, _MAX_COLUMNS = 8, 6

# Inches; small, so that the text of a figure can be read on a phone.
_SHEET, _HISTOGRAM, _PANEL, _SQUARE = (4.4, 12.0), (4.4, 3.3), (4.0, 3.3), (4.0, 3.9)

_INK = "svg { --ink: #3d444d; } @media (prefers-color-scheme: dark) { svg { --ink: #c4c9cf; } }"


@dataclass(frozen=True, eq=False)
class Report:
    """The contents of a page; a section without contents is left out.

    Arrays by name are the arguments of the function of :mod:`pyro_vmem.plots` that draws them. Images are in [0, 1],
    information is in nats.
    """

    title: str
    facts: Mapping[str, str]  # the settings by name
    metrics: Mapping[str, float]  # FewShotEvaluation.summary(), with `steps` and `training_seconds` of the run
    history: Sequence[Mapping[str, float]]  # FitResult.history
    information_gain: Arguments  # of information_gain_histogram, with `exact`
    lookup: Arguments  # of lookups: some targets and the memory
    generation: Arguments  # of one_shot_generations
    addresses: Arguments | None = None  # of address_heat_map, with the `exact` posterior of the same shape
    completion: Arguments | None = None  # of completions
    evidence: Mapping[str, Array] = field(default_factory=dict)  # of evidence_by_memory; the right memory comes first
    reliability: Arguments | None = None  # of reliability_diagram
    khat: Array | None = None  # of khat_scatter
    command: str = ""  # the command that repeats the run


def write_report(path: Path, report: Report) -> Path:
    """Writes a page that needs nothing but itself, whole or not at all: no script, no request."""
    page = _page(report)  # before anything is opened: a figure may fail
    with write_atomically(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def _page(report: Report) -> str:
    metrics = report.metrics
    needed = ("training_seconds", "steps", "num_targets", "num_episodes", "evaluation_seconds", "decodes_per_second")
    if missing := [name for name in needed if name not in metrics]:
        raise ValueError(f"metrics: {missing} are missing. Give summary() with the run's training_seconds and steps.")
    jinja2 = require("jinja2", "cli")
    # A missing name is an error, not an empty place on the page.
    settings = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True, **settings)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    page: str = template.render(
        title=report.title,
        verdict=verdict(metrics),
        wrong=bool(problems(metrics)),
        unreliable=unreliable(metrics),
        speed=speed_sentence(metrics),
        metrics=metrics,
        results=result_rows(metrics),
        diagnostics=diagnostic_rows(metrics),
        lookup=_lookups(report.lookup),
        addresses=report.addresses and _heat_maps(**report.addresses),
        generation=_rows_of_pictures(plots.one_shot_generations, report.generation, "templates", _MAX_COLUMNS),
        completion=report.completion
        and _rows_of_pictures(plots.completions, report.completion, "targets", _MAX_COLUMNS - 1),
        gain=_gain(**report.information_gain),
        evidence=_evidence(report.evidence),
        reliability=report.reliability and _on_axes(_SQUARE, plots.reliability_diagram, **report.reliability),
        khat=None if report.khat is None else _khat(report.khat),
        curves=_curves(report.history),
        facts=report.facts,
        command=report.command,
    )
    return page


def _lookups(lookup: Arguments) -> Context:
    by_target = ("targets", "target_labels", "probabilities", "exact")
    cut = {name: values[:_MAX_ROWS] for name, values in lookup.items() if name in by_target and values is not None}
    shown = {**lookup, "max_slots": _MAX_COLUMNS, **cut}
    drawing = _drawing(_SHEET, lambda figure: plots.lookups(figure, **shown), crop=True)
    first = zip(cut["probabilities"], cut["target_labels"], strict=True)
    return {
        "drawing": drawing,
        "rows": len(shown["targets"]),
        "right": sum(bool(shown["labels"][int(q.argmax())] == label) for q, label in first),
        "slots": len(shown["templates"]),
        "has_exact": shown.get("exact") is not None,
    }


def _heat_maps(probabilities: Array, exact: Array, labels: Array, target_labels: Array) -> Context:
    def panel(values: Array, name: str) -> str:
        return _on_axes(_PANEL, partial(plots.address_heat_map, name=name), values, labels, target_labels)

    return {
        "guide": panel(probabilities, "q(a | M, x)"),
        "exact": panel(exact, "p(a | x, M)"),
        "targets": len(target_labels),
        "slots": len(labels),
    }


def _rows_of_pictures(plot: Callable[..., Any], arguments: Arguments, first: str, columns: int) -> Context:
    pictures, samples = arguments[first][:_MAX_ROWS], arguments["samples"][:_MAX_ROWS, :columns]
    shown = {**arguments, first: pictures, "samples": samples}
    drawing = _drawing(_SHEET, lambda figure: plot(figure, **shown), crop=True)
    return {"drawing": drawing, "rows": len(pictures), "columns": samples.shape[1]}


def _gain(gain: Array, exact: Array, num_slots: int, num_classes: int) -> Context:
    return {
        "drawing": _on_axes(_HISTOGRAM, plots.information_gain_histogram, gain, num_slots, num_classes, exact),
        "count": math.prod(gain.shape),
        "guide": float(gain.mean()),
        "exact": float(exact.mean()),
        "log_slots": math.log(num_slots),
        "log_classes": math.log(num_classes),
    }


def _evidence(evidence: Mapping[str, Array]) -> Context | None:
    if not evidence:
        return None
    # A blank memory loses so much that no other bar could be read beside it.
    drawn = {name: values for name, values in evidence.items() if name != "blank"}
    means = {name: float(values.mean()) for name, values in evidence.items()}
    return {
        "drawing": _on_axes((4.4, 1.2 + 0.45 * len(drawn)), plots.evidence_by_memory, drawn),
        "means": means,
        "blank_loss": next(iter(means.values())) - means["blank"] if "blank" in means else None,
    }


def _khat(khat: Array) -> Context:
    drawing = _on_axes(_SQUARE, plots.khat_scatter, khat)
    return {"drawing": drawing, "count": math.prod(khat.shape), "high": int((khat > 0.7).sum())}


def _curves(history: Sequence[Mapping[str, float]]) -> list[Context]:
    present = {name for row in history for name in row}
    curves = []
    for terms in (("bound", "reconstruction"), ("kl_a", "kl_z")):
        columns = [column for name in terms for column in (name, f"val_{name}") if column in present]
        if columns:
            drawing = _on_axes(_PANEL, plots.learning_curves, history, columns)
            last = {c: next(row[c] for row in reversed(history) if c in row) for c in columns}
            curves.append({"terms": terms, "drawing": drawing, "last": last})
    return curves


def _on_axes(size: tuple[float, float], plot: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """A drawing by a function of an Axes."""
    return _drawing(size, lambda figure: plot(figure.subplots(), *args, **kwargs))


def _drawing(size: tuple[float, float], draw: Callable[[Any], object], crop: bool = False) -> str:
    """A figure as a data URI, in the colour of the page's text; `crop` cuts off its empty margins."""
    with require("matplotlib", "plots").rc_context(plots.ON_ANY_PAGE):
        figure = require("matplotlib.figure", "plots").Figure(size, layout=None if crop else "constrained")
        draw(figure)
        file = io.BytesIO()
        tight: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.05} if crop else {}
        figure.savefig(file, format="svg", metadata={"Date": None}, **tight)
    # The colour of the page's text replaces the mid-tone, which stays where styles are not understood.
    svg, tone = file.getvalue().decode(), plots.ON_ANY_PAGE["text.color"]
    start = svg.index(">", svg.index("<svg")) + 1
    svg = f"{svg[:start]}\n<style>{_INK}</style>{svg[start:].replace(f': {tone}', f': var(--ink, {tone})')}"
    # As images of their own, because matplotlib gives the same ids in every SVG.
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode('ascii')}"
