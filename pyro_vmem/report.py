"""One self-contained HTML page of a run: what was measured, what it looks like, how to repeat it."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from pyro_vmem import plots
from pyro_vmem._extras import require
from pyro_vmem._files import write_atomically
from pyro_vmem.results import result_rows, verdict

__all__ = ["Generation", "Lookup", "Report", "write_report"]

Array = Tensor | NDArray[Any]

# Beyond these a page gets longer, not clearer.
_MAX_ROWS, _MAX_COLUMNS = 8, 6


@dataclass(frozen=True, eq=False)
class Lookup:
    """Lookups of some targets in one memory.

    Attributes:
        targets: The targets, `(T, C, H, W)` in [0, 1].
        target_labels: The class of each, `(T,)`.
        templates: The templates in memory, `(S, C, H, W)`.
        labels: The class of each, `(S,)`.
        probabilities: The guide's :math:`q(a | M, x)`, `(T, S)`.
    """

    targets: Array
    target_labels: Array
    templates: Array
    labels: Array
    probabilities: Array


@dataclass(frozen=True, eq=False)
class Generation:
    """Samples of :math:`p(x | m_a)`, given one template each.

    Attributes:
        templates: `(R, C, H, W)` in [0, 1].
        samples: `(R, N, C, H, W)` in [0, 1].
    """

    templates: Array
    samples: Array


@dataclass(frozen=True, eq=False)
class Report:
    """What a page shows.

    Attributes:
        title: The heading.
        facts: The settings by name: data, steps, seed, versions and so on.
        metrics: The items of `FewShotEvaluation.summary()`, with the run's `seconds` and `steps`.
        history: The rows of `FitResult.history`, in nats per datapoint.
        information_gain: The guide's, of each datapoint, in nats; any shape.
        information_gain_exact: The exact posterior's, likewise.
        num_slots: The slots :math:`|M|`.
        num_classes: The classes :math:`C` in memory.
        lookup: Targets and the memory they are looked up in.
        generation: Templates and samples given them.
        command: The command that repeats the run, if there is one.
        noun: What a class is, in plain words.
    """

    title: str
    facts: Mapping[str, str]
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]]
    information_gain: Array
    information_gain_exact: Array
    num_slots: int
    num_classes: int
    lookup: Lookup
    generation: Generation
    command: str = ""
    noun: str = "character"


def write_report(path: str | Path, report: Report) -> Path:
    """Writes a page that needs nothing but itself: no script, no request; figures are drawn into it.

    Arguments:
        path: The HTML file; folders are made, and a file that is there is replaced, once the page is whole.
        report: What to show; images in [0, 1], information in nats.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If metrics are missing, or shapes do not agree.

    Example:
        >>> import tempfile, pyro_vmem as pv
        >>> sampler = pv.data.EpisodeSampler(pv.data.glyphs(size=12, drawings=12), n_way=5, k_shot=1, n_query=1)
        >>> vma = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> result = pv.diagnostics.evaluate(vma, sampler, num_episodes=2, num_samples=2, progress=False)
        >>> memory, x, labels = sampler[0].memory, sampler[0].x, sampler[0].labels
        >>> q = vma.address_guide(vma.encode(memory), vma.encode_x(x)).probs
        >>> report = Report(
        ...     title="An untrained model",
        ...     facts={"data": "glyphs", "seed": "0"},
        ...     metrics=result.summary() | {"seconds": 0.0, "steps": 0},
        ...     history=[],
        ...     information_gain=result.information_gain,
        ...     information_gain_exact=result.information_gain_exact,
        ...     num_slots=5,
        ...     num_classes=5,
        ...     lookup=Lookup(x, labels, memory.templates, memory.labels, q),
        ...     generation=Generation(memory.templates[:1], vma.generate(memory, 3, address=0)[None]),
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
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}<small>{_text(meaning)}</small></th><td>{_text(value)}</td></tr>\n'
        for name, value, meaning in result_rows(report.metrics)
    )
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>\n" for name, value in report.facts.items())
    metrics = report.metrics
    if missing := [name for name in ("seconds", "steps", "num_targets", "num_episodes") if name not in metrics]:
        raise ValueError(f"metrics: {missing} are missing. Give summary() with the run's seconds and steps.")
    measured = (
        f"The run took {metrics['seconds']:,.0f} s, with {metrics['steps']:,.0f} training steps. Measured on "
        f"{metrics['num_targets']:,.0f} pictures in {metrics['num_episodes']:,.0f} episodes of classes that were not "
        "trained on; ± is one standard error over episodes."
    )
    sections = {
        "Results": f"<table>\n{_TABLE_HEAD}<tbody>\n{rows}</tbody>\n</table>\n",
        "What the guide looks up": _lookups(report.lookup),
        "What the model draws from one example": _generations(report.generation),
        "Information gain": _gain(report),
        "Training": _curves(report.history),
        "Settings": f"<dl>\n{facts}</dl>\n",
    }
    if report.command:
        sections["How to repeat it"] = f'<pre tabindex="0"><code>{_text(report.command)}</code></pre>\n'
    return _PAGE.substitute(
        title=_text(report.title),
        style=_STYLE,
        verdict=_text(verdict(metrics, report.noun)),
        measured=_text(measured),
        sections="".join(f"<section>\n<h2>{name}</h2>\n{body}</section>\n" for name, body in sections.items()),
    )


def _lookups(lookup: Lookup) -> str:
    figure = _figure(4.4, 12.0)
    targets, q, classes = (v[:_MAX_ROWS] for v in (lookup.targets, lookup.probabilities, lookup.target_labels))
    plots.lookups(figure, targets, lookup.templates, q, lookup.labels, classes, _MAX_COLUMNS)
    first = sum(bool(lookup.labels[int(row.argmax())] == label) for row, label in zip(q, classes, strict=True))
    return _html_figure(
        figure,
        f"{len(targets)} target pictures, each beside the templates that the guide finds most probable. "
        f"For {first} of {len(targets)} the first template is of the right class.",
        f"Each row: a picture that the model has not seen, and the templates its guide looks up among "
        f"{len(lookup.templates)}, with their probability q(a | M, x). After an ellipsis: the right one, further down.",
        crop=True,
    )


def _generations(generation: Generation) -> str:
    figure = _figure(4.4, 12.0)
    templates, samples = generation.templates[:_MAX_ROWS], generation.samples[:_MAX_ROWS, :_MAX_COLUMNS]
    plots.one_shot_generations(figure, templates, samples)
    return _html_figure(
        figure,
        f"{len(templates)} framed templates, each beside {samples.shape[1]} pictures that the model draws from it.",
        "Each row: one unseen template, framed, and what the model draws from it alone: a new z, and the mean picture "
        "p(x | z, m_a) that it decodes to.",
        crop=True,
    )


def _gain(report: Report) -> str:
    figure = _figure(4.4, 3.3)
    guide, exact = report.information_gain, report.information_gain_exact
    plots.information_gain_histogram(figure.subplots(), guide, report.num_slots, report.num_classes, exact)
    return _html_figure(
        figure,
        f"Histogram of the information gain of {math.prod(guide.shape):,} datapoints: mean {float(guide.mean()):.2f} "
        f"nats by the guide and {float(exact.mean()):.2f} by the exact posterior, with lines at log |M| = "
        f"{math.log(report.num_slots):.2f} and log C = {math.log(report.num_classes):.2f}.",
        "How much each lookup tells. Bars at 0: the guide ignores the picture. Bars at log C: it settles on one class.",
    )


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    present = {name for row in history for name in row}
    panels = []
    for names, meaning in (
        (("bound", "reconstruction"), "The bound that training raises, and the part of it that rebuilds the picture."),
        (("kl_a", "kl_z"), "What is paid for the address a and for the latent z."),
    ):
        columns = [column for name in names for column in (name, f"val_{name}") if column in present]
        if columns:
            figure = _figure(4.0, 3.3)
            plots.learning_curves(figure.subplots(), history, columns)
            last = {c: next(row[c] for row in reversed(history) if c in row) for c in columns}
            ends = ", ".join(f"{column} {value:.1f}" for column, value in last.items())
            alt = f"Learning curves in nats per datapoint; at the end {ends}."
            panels.append(_html_figure(figure, alt, f"{meaning} Dashed: on classes that are not trained on."))
    return '<div class="pair">' + "".join(panels) + "</div>\n" if panels else "<p>No terms were recorded.</p>\n"


def _figure(width: float, height: float) -> Any:
    """A figure in inches, apart from pyplot; small, so that its text can be read on a phone."""
    return require("matplotlib.figure", "plots").Figure((width, height))


def _html_figure(figure: Any, alt: str, caption: str, crop: bool = False) -> str:
    # An image of its own keeps the ids of one drawing from those of the next.
    if not crop:
        figure.set_layout_engine("constrained")
    file = io.BytesIO()
    tight: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.05} if crop else {}
    figure.savefig(file, format="svg", metadata={"Date": None}, **tight)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<figure>\n<img alt="{_text(alt)}" src="data:image/svg+xml;base64,{data}">\n'
        f"<figcaption>{_text(caption)}</figcaption>\n</figure>\n"
    )


def _text(text: str) -> str:
    return html.escape(str(text))


_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --text: #1f2328; --soft: #57606a; --rule: #d5d5cf; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --text: #e6e6e3; --soft: #a8b0b8; --rule: #3a4048; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 48rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
.verdict { font-size: 1.2rem; line-height: 1.45; border-left: 4px solid var(--mark); padding-left: .9rem; margin: 0; }
.soft, figcaption, small { color: var(--soft); font-size: .875rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .5rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; text-align: left; }
th { font-weight: 600; }
small { display: block; font-weight: 400; }
td, thead th + th { white-space: pre; text-align: right; padding-left: 1rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; max-width: 34rem; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--rule); border-radius: 8px; }
figcaption { margin-top: .5rem; }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid var(--rule); border-radius: .5rem; }
"""

_TABLE_HEAD = '<thead><tr><th scope="col">Quantity</th><th scope="col">Per picture</th></tr></thead>\n'

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p class="verdict">$verdict</p>
<p class="soft">$measured</p>
</header>
$sections</main>
</body>
</html>
""")
