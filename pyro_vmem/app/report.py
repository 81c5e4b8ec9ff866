"""The report of a run: one self-contained HTML page of figures, numbers and settings.

It needs arrays only, so a page of your own results can be written too; its words and style are in `report.html.j2`.
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
from pyro_vmem.app.report_text import diagnostic_rows, problems, result_rows, speed_sentence, verdict

__all__ = ["Report", "write_report"]

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
    """What a page shows; a section without contents is left out.

    Arrays by name are the arguments of the function of :mod:`pyro_vmem.plots` that draws them. Images are in [0, 1],
    information is in nats.

    Attributes:
        title: The heading.
        facts: The settings by name: data, steps, seed, versions and so on.
        metrics: The items of `FewShotEvaluation.summary()`, with `steps` and `training_seconds` of the run.
        history: The rows of `FitResult.history`, in nats per datapoint.
        information_gain: For :func:`~pyro_vmem.plots.information_gain_histogram`; `exact` is needed.
        lookup: For :func:`~pyro_vmem.plots.lookups`: some targets and the memory they are looked up in.
        generation: For :func:`~pyro_vmem.plots.one_shot_generations`.
        addresses: For :func:`~pyro_vmem.plots.address_heat_map`, with the `exact` posterior of the same shape: the
            addresses of all targets of one memory.
        completion: For :func:`~pyro_vmem.plots.completions`.
        evidence: For :func:`~pyro_vmem.plots.evidence_by_memory`; the right memory comes first.
        reliability: For :func:`~pyro_vmem.plots.reliability_diagram`: the guide's class probabilities.
        khat: For :func:`~pyro_vmem.plots.khat_scatter`, any shape.
        command: The command that repeats the run, if there is one.
        noun: What a class is, in plain words.
    """

    title: str
    facts: Mapping[str, str]
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]]
    information_gain: Arguments
    lookup: Arguments
    generation: Arguments
    addresses: Arguments | None = None
    completion: Arguments | None = None
    evidence: Mapping[str, Array] = field(default_factory=dict)
    reliability: Arguments | None = None
    khat: Array | None = None
    command: str = ""
    noun: str = "character"


def write_report(path: str | Path, report: Report) -> Path:
    """Writes a page that needs nothing but itself: no script, no request; figures are drawn into it.

    Its first lines say what is wrong, if anything is: see :func:`pyro_vmem.app.report_text.verdict`.

    Arguments:
        path: The HTML file. Folders are made, and an existing file is replaced once the page is whole.
        report: What to show.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib or jinja2 is not installed.
        ValueError: If metrics are missing, or shapes do not agree.

    Example:
        >>> import tempfile, pyro_vmem as pv
        >>> sampler = pv.data.EpisodeSampler(pv.data.glyphs(size=12, drawings=12), n_way=5, k_shot=1, n_query=1)
        >>> vma = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> result = pv.diagnostics.evaluate(vma, sampler, num_episodes=2, num_samples=2, progress=False)
        >>> memory, x, labels = sampler[0].memory, sampler[0].x, sampler[0].labels
        >>> q = vma.address_guide(vma.encode(memory), vma.encode_x(x)).probs
        >>> gain = {"gain": result.information_gain, "exact": result.information_gain_exact}
        >>> report = Report(
        ...     title="An untrained model",
        ...     facts={"data": "glyphs", "seed": "0"},
        ...     metrics=result.summary() | {"training_seconds": 0.0, "steps": 0},
        ...     history=[],
        ...     information_gain=gain | {"num_slots": 5, "num_classes": 5},
        ...     lookup={"targets": x, "target_labels": labels, "templates": memory.templates, "labels": memory.labels}
        ...     | {"probabilities": q},
        ...     generation={"templates": memory.templates[:1], "samples": vma.generate(memory, 3, address=0)[None]},
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_report(f"{folder}/report.html", report).read_text(encoding="utf-8")
        >>> page[:15]
        '<!DOCTYPE html>'
    """
    page = _page(report)  # before anything is opened: a figure may fail
    with write_atomically(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return Path(path)


def _page(report: Report) -> str:
    metrics = report.metrics
    needed = ("training_seconds", "steps", "num_targets", "num_episodes", "evaluation_seconds", "decodes_per_second")
    if missing := [name for name in needed if name not in metrics]:
        raise ValueError(f"metrics: {missing} are missing. Give summary() with the run's training_seconds and steps.")
    jinja2 = require("jinja2", "cli")
    # A name that the template needs and does not get is an error, not an empty place on the page.
    settings = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True, **settings)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    page: str = template.render(
        title=report.title,
        verdict=verdict(metrics, report.noun),
        wrong=bool(problems(metrics)),
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
        reliability=report.reliability and _reliability(report.reliability, metrics),
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
    # A blank memory, unlike all that the model has seen, loses so much that no other bar could be read beside it.
    drawn = {name: values for name, values in evidence.items() if name != "blank"}
    means = {name: float(values.mean()) for name, values in evidence.items()}
    return {
        "drawing": _on_axes((4.4, 1.2 + 0.45 * len(drawn)), plots.evidence_by_memory, drawn),
        "means": means,
        "blank_loss": next(iter(means.values())) - means["blank"] if "blank" in means else None,
    }


def _reliability(arguments: Arguments, metrics: Mapping[str, float]) -> Context:
    drawing = _on_axes(_SQUARE, plots.reliability_diagram, **arguments)
    return {"drawing": drawing, "error": metrics.get("calibration_error", math.nan)}


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
    """A drawing by a function whose first argument is an Axes."""
    return _drawing(size, lambda figure: plot(figure.subplots(), *args, **kwargs))


def _drawing(size: tuple[float, float], draw: Callable[[Any], object], crop: bool = False) -> str:
    """A figure as a data URI, its text and lines in the colour of the page's text; `crop` cuts it to what is drawn."""
    with require("matplotlib", "plots").rc_context(plots.ON_ANY_PAGE):
        figure = require("matplotlib.figure", "plots").Figure(size, layout=None if crop else "constrained")
        draw(figure)
        file = io.BytesIO()
        tight: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.05} if crop else {}
        figure.savefig(file, format="svg", metadata={"Date": None}, **tight)
    # matplotlib numbers the ids of each SVG alike: as an image of its own, one drawing cannot use another's.
    data = base64.b64encode(_following_the_page(file.getvalue().decode()).encode())
    return f"data:image/svg+xml;base64,{data.decode('ascii')}"


def _following_the_page(svg: str) -> str:
    """Replaces the mid-tone of text by the page's colour; where styles are not understood it stays a mid-tone."""
    tone: str = plots.ON_ANY_PAGE["text.color"]
    start = svg.index(">", svg.index("<svg")) + 1
    body = svg[start:].replace(f": {tone}", f": var(--ink, {tone})")
    return f"{svg[:start]}\n<style>{_INK}</style>{body}"
