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

__all__ = ["Generation", "Lookup", "Report", "verdict", "write_report"]

Array = Tensor | NDArray[Any]

_IGNORED_SHARE = 0.05  # of log C: below it the guide tells no classes apart
_LEAST_WORTH = 1.0  # nats
_ERRORS = 3.0  # standard errors above zero

# Beyond these a page gets longer, not clearer.
_MAX_ROWS, _MAX_COLUMNS = 8, 6

# Rows of the table: the key of the metric, its name and what it means.
_NATS = (
    ("nll", "NLL", "Negative log-likelihood, lower is better; an upper bound, from $samples samples of z a slot."),
    ("nll_wrong_memory", "NLL, wrong memory", "The same pictures, with as many templates of other classes."),
    ("memory_worth_nats", "Worth of the memory", "What right templates save over wrong ones; at 0 they are not used."),
)
_GAINS = (
    (
        "information_gain",
        "Information gain",
        "KL from the prior p(a | M) to the guide q(a | M, x). At 0 the guide ignores the picture; "
        "log C = $ceiling nats tell the class.",
    ),
    (
        "information_gain_exact",
        "Information gain, exact",
        "The same for p(a | x, M): what the model itself could tell.",
    ),
)
_HITS = (
    ("hit_rate", "Hit rate", "How often the class that the guide finds most probable is right."),
    ("hit_rate_exact", "Hit rate, exact", "The same for p(a | x, M)."),
)


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


def verdict(metrics: Mapping[str, float], noun: str = "character") -> str:
    r"""Says in a sentence what the numbers mean, also when they are bad.

    The guide is said to ignore the picture if its information gain is under 5 % of :math:`\log C`, and the memory not
    to be used if it is worth less than 1 nat, or is not 3 standard errors above 0.

    Arguments:
        metrics: The items of `FewShotEvaluation.summary()`; information in nats.
        noun: What a class is.

    Returns:
        A sentence or two.

    Example:
        >>> metrics = {"n_way": 20, "k_shot": 1, "chance": 0.05, "hit_rate": 0.71, "hit_rate_se": 0.02}
        >>> metrics |= {"information_gain": 2.4, "memory_worth_nats": 17.2, "memory_worth_nats_se": 0.5}
        >>> print(verdict(metrics))
        With 20 unseen characters in memory, the right one is found 71 % of the time (chance 5 %); the lookup gains
        2.4 of 3.0 nats, and the memory is worth 17.2 nats a picture.
    """
    ways, shots = round(metrics["n_way"]), round(metrics["k_shot"])
    worth, error = metrics["memory_worth_nats"], metrics["memory_worth_nats_se"]
    gain, ceiling = metrics["information_gain"], math.log(ways)
    used = f"the memory is worth {worth:.1f} nats a picture"
    unused = ""
    if worth < _LEAST_WORTH:
        degree = "hardly" if worth > _ERRORS * error else "not"
        unused = (
            f"The memory is {degree} used: right templates are worth {_signed(worth)} nats a picture over wrong ones."
        )
    elif math.isnan(error):
        unused = f"The memory seems worth {worth:.1f} nats a picture, but one episode gives no standard error."
    elif worth < _ERRORS * error:
        unused = (
            f"The memory is not shown to be used: it is worth {worth:.1f} ± {error:.1f} nats a picture, less than "
            f"{_ERRORS:.0f} standard errors above 0."
        )
    if ways == 1:
        return f"With one unseen {noun} in memory there is no class to look up. " + (unused or f"{_capital(used)}.")
    examples = f", {shots} examples each" if shots > 1 else ""
    found = f"the right one is found {_percent(metrics['hit_rate'])} of the time (chance {_percent(metrics['chance'])})"
    if metrics["hit_rate"] - metrics["chance"] < _ERRORS * metrics["hit_rate_se"]:
        found += ", which is not clearly better than guessing"
    lead = f"With {ways} unseen {noun}s in memory{examples}, {found}"
    gains = f"gains {gain:.1f} of {ceiling:.1f} nats"
    if shots > 1:
        gains = f"gains {gain:.1f} nats, where {ceiling:.1f} tell the class and {math.log(ways * shots):.1f} the slot"
    if gain < _IGNORED_SHARE * ceiling:
        ignores = f"The guide ignores the picture it is given: its lookup gains {gain:.2f} of {ceiling:.1f} nats."
        return f"{ignores} {lead}. {unused or _capital(used) + '.'}"
    return f"{lead}; the lookup {gains}. {unused}" if unused else f"{lead}; the lookup {gains}, and {used}."


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
        for name, value, meaning in _results(report.metrics)
    )
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>\n" for name, value in report.facts.items())
    metrics = report.metrics
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


def _results(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each row of the table."""
    names = [key for key, _, _ in _NATS + _GAINS + _HITS]
    counts = ["n_way", "k_shot", "chance", "num_samples", "num_episodes", "num_targets", "seconds", "steps"]
    missing = [name for name in [*names, *(f"{name}_se" for name in names), *counts] if name not in metrics]
    if missing:
        raise ValueError(f"metrics: {missing} are missing. Give summary() with the run's seconds and steps.")
    ceiling, chance = math.log(metrics["n_way"]), _percent(metrics["chance"])

    def measured(key: str, digits: int, scale: float = 1.0) -> str:
        value, error = scale * metrics[key], scale * metrics[f"{key}_se"]
        return _signed(value, digits) + ("" if math.isnan(error) else f" ± {error:.{digits}f}")

    values = {key: f"{measured(key, 1)} nats" for key, _, _ in _NATS}
    for key, _, _ in _GAINS:
        share = f"\n{_percent(metrics[key] / ceiling)} of log C" if ceiling > 0 else ""
        values[key] = f"{measured(key, 2)} nats\n{_signed(metrics[key] / math.log(2), 2)} bits{share}"
    values |= {key: f"{measured(key, 1, 100)} %\nchance {chance}" for key, _, _ in _HITS}
    words = {"samples": f"{metrics['num_samples']:.0f}", "ceiling": f"{ceiling:.2f}"}
    return [(name, values[key], Template(text).substitute(words)) for key, name, text in _NATS + _GAINS + _HITS]


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
        "Each row: one unseen template, framed, and new pictures that the model draws from it alone.",
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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _percent(share: float) -> str:
    return f"{_signed(100 * share, 0)} %"


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


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
