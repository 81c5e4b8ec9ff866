"""One self-contained HTML page of a run: what was measured, what it looks like, how to repeat it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from pyro_vmem import plots
from pyro_vmem._utils.files import write_atomically
from pyro_vmem.app import html as _html
from pyro_vmem.app.report_text import diagnostic_rows, problems, result_rows, speed_sentence, verdict

__all__ = ["Addresses", "Completion", "Generation", "Lookup", "Reliability", "Report", "write_report"]

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
        exact: The exact posterior's :math:`p(a | x, M)`, `(T, S)`.
    """

    targets: Array
    target_labels: Array
    templates: Array
    labels: Array
    probabilities: Array
    exact: Array | None = None


@dataclass(frozen=True, eq=False)
class Addresses:
    """The addresses of all targets of one memory.

    Attributes:
        probabilities: The guide's :math:`q(a | M, x)`, `(T, S)`.
        exact: The exact posterior's :math:`p(a | x, M)`, `(T, S)`.
        labels: The class of each slot, `(S,)`.
        target_labels: The class of each target, `(T,)`.
    """

    probabilities: Array
    exact: Array
    labels: Array
    target_labels: Array


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
class Completion:
    """Targets of which a part was observed, and the rest filled in.

    Attributes:
        targets: `(R, C, H, W)` in [0, 1].
        mask: True where observed; broadcasts with `targets`.
        samples: `(R, N, C, H, W)` in [0, 1].
    """

    targets: Array
    mask: Array
    samples: Array


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often a class probability is right, one value a bin, `(N,)`.

    Attributes:
        confidence: The mean probability of the most probable class.
        accuracy: The share that is right.
        count: The targets in the bin.
    """

    confidence: Array
    accuracy: Array
    count: Array


@dataclass(frozen=True, eq=False)
class Report:
    """What a page shows; a section without contents is left out.

    Attributes:
        title: The heading.
        facts: The settings by name: data, steps, seed, versions and so on.
        metrics: The items of `FewShotEvaluation.summary()`, with `steps` and `training_seconds` of the run.
        history: The rows of `FitResult.history`, in nats per datapoint.
        information_gain: The guide's, of each datapoint, in nats; any shape.
        information_gain_exact: The exact posterior's, likewise.
        num_slots: The slots :math:`|M|`.
        num_classes: The classes :math:`C` in memory.
        lookup: Targets and the memory they are looked up in.
        generation: Templates and samples given them.
        addresses: The addresses of all targets of one memory.
        completion: Targets of which a part was filled in.
        evidence: The evidence of the same targets, `(B,)`, under several memories by name, the right one first.
        reliability: Of the guide's class probabilities.
        khat: The Pareto tail index of each target's importance weights, any shape.
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
    addresses: Addresses | None = None
    completion: Completion | None = None
    evidence: Mapping[str, Array] = field(default_factory=dict)
    reliability: Reliability | None = None
    khat: Array | None = None
    command: str = ""
    noun: str = "character"


def write_report(path: str | Path, report: Report) -> Path:
    """Writes a page that needs nothing but itself: no script, no request; figures are drawn into it.

    Its first lines say what is wrong, if anything is: see :func:`pyro_vmem.app.report_text.verdict`.

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
        ...     metrics=result.summary() | {"training_seconds": 0.0, "steps": 0},
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
    metrics = report.metrics
    needed = ("training_seconds", "steps", "num_targets", "num_episodes", "evaluation_seconds", "decodes_per_second")
    if missing := [name for name in needed if name not in metrics]:
        raise ValueError(f"metrics: {missing} are missing. Give summary() with the run's training_seconds and steps.")
    several = metrics["num_episodes"] > 1
    steps, seconds = metrics["steps"], metrics["training_seconds"]
    trained = f"Trained for {steps:,.0f} steps in {seconds:,.0f} s." if steps else "Not trained here."
    measured = (
        f"{trained} Measured on {metrics['num_targets']:,.0f} pictures in {metrics['num_episodes']:,.0f} "
        f"episode{'s' * several} of classes "
        f"that were not trained on{'; ± is one standard error over episodes' * several}."
    )
    head = ("Quantity", "Per picture")
    sections = {
        "Results": _html.table(result_rows(metrics), head),
        "What the guide looks up": _lookups(report.lookup) + _heat_maps(report.addresses),
        "What the model draws from one example": _generations(report.generation),
        "What the model fills in": _completions(report.completion),
        "Information gain": _gain(report),
        "What the memory contributes": _evidence(report.evidence),
        "How far the numbers can be trusted": _trust(report) + _html.table(diagnostic_rows(metrics), head),
        "Training": _curves(report.history),
        "Settings": _html.definitions(report.facts),
        "How to repeat it": _html.preformatted(report.command) if report.command else "",
    }
    return _html.page(
        report.title,
        verdict(metrics, report.noun),
        [measured, speed_sentence(metrics)],
        {name: body for name, body in sections.items() if body},
        wrong=bool(problems(metrics)),
    )


def _lookups(lookup: Lookup) -> str:
    rows = slice(_MAX_ROWS)
    targets, q, classes = lookup.targets[rows], lookup.probabilities[rows], lookup.target_labels[rows]
    exact = None if lookup.exact is None else lookup.exact[rows]

    def draw(figure: Any) -> None:
        plots.lookups(figure, targets, lookup.templates, q, lookup.labels, classes, _MAX_COLUMNS, exact)

    first = sum(bool(lookup.labels[int(row.argmax())] == label) for row, label in zip(q, classes, strict=True))
    second = "" if exact is None else " The second bar is the exact posterior p(a | x, M)."
    return _html.drawing(
        (4.4, 12.0),
        draw,
        f"{len(targets)} target pictures, each beside the templates that the guide finds most probable. "
        f"For {first} of {len(targets)} the first template is of the right class.",
        f"Each row: a picture that the model has not seen, and the templates its guide looks up among "
        f"{len(lookup.templates)}, with their probability q(a | M, x).{second} After an ellipsis: the right one, "
        "further down.",
        crop=True,
    )


def _heat_maps(addresses: Addresses | None) -> str:
    if addresses is None:
        return ""
    size = f"{len(addresses.target_labels)} targets and {len(addresses.labels)} slots"

    def panel(values: Array, name: str, caption: str) -> str:
        def draw(figure: Any) -> None:
            plots.address_heat_map(figure.subplots(), values, addresses.labels, addresses.target_labels, name)

        alt = f"Heat map of {name} for {size}, both sorted by class; the right slots are framed."
        return _html.drawing((4.0, 3.3), draw, alt, caption)

    guide = "The guide, one memory: bright inside of the frames is right. A bright column is always looked up."
    exact = "The exact posterior: what the model itself holds to be the source of each picture."
    panels = panel(addresses.probabilities, "q(a | M, x)", guide), panel(addresses.exact, "p(a | x, M)", exact)
    return _html.pair(panels)


def _generations(generation: Generation) -> str:
    templates, samples = generation.templates[:_MAX_ROWS], generation.samples[:_MAX_ROWS, :_MAX_COLUMNS]
    return _html.drawing(
        (4.4, 12.0),
        lambda figure: plots.one_shot_generations(figure, templates, samples),
        f"{len(templates)} framed templates, each beside {samples.shape[1]} pictures that the model draws from it.",
        "Each row: one unseen template, framed, and what the model draws from it alone: a new z, and the mean picture "
        "p(x | z, m_a) that it decodes to.",
        crop=True,
    )


def _completions(completion: Completion | None) -> str:
    if completion is None:
        return ""
    rows = slice(_MAX_ROWS)
    targets, samples = completion.targets[rows], completion.samples[rows, : _MAX_COLUMNS - 1]
    return _html.drawing(
        (4.4, 12.0),
        lambda figure: plots.completions(figure, targets, completion.mask, samples),
        f"{len(targets)} targets, the part of each that was observed, and {samples.shape[1]} completions.",
        "Each row: an unseen picture, framed, the part of it that the model is shown, and what it fills in with the "
        "memory at hand.",
        crop=True,
    )


def _gain(report: Report) -> str:
    guide, exact = report.information_gain, report.information_gain_exact
    slots, classes = report.num_slots, report.num_classes
    return _html.drawing(
        (4.4, 3.3),
        lambda figure: plots.information_gain_histogram(figure.subplots(), guide, slots, classes, exact),
        f"Histogram of the information gain of {math.prod(guide.shape):,} datapoints: mean {float(guide.mean()):.2f} "
        f"nats by the guide and {float(exact.mean()):.2f} by the exact posterior, with lines at log |M| = "
        f"{math.log(slots):.2f} and log C = {math.log(classes):.2f}.",
        "How much each lookup tells. Bars at 0: the guide ignores the picture. Bars at log C: it settles on one class.",
    )


def _evidence(evidence: Mapping[str, Array]) -> str:
    if not evidence:
        return ""
    # A memory that the model has never seen the like of loses so much that nothing else could be read.
    drawn = {name: values for name, values in evidence.items() if name != "blank"}
    means = {name: float(values.mean()) for name, values in evidence.items()}
    caption = (
        "The same pictures under the right memory and under others: of other classes (wrong), of the same ink without "
        "structure (shuffled). Bars are one standard error over pictures."
    )
    if "blank" in evidence:
        loss = next(iter(means.values())) - means["blank"]
        caption += f" A blank memory, which the model may never have seen, loses {loss:,.0f} nats."
    return _html.drawing(
        (4.4, 1.2 + 0.45 * len(drawn)),
        lambda figure: plots.evidence_by_memory(figure.subplots(), drawn),
        "Evidence in nats per datapoint by memory: " + ", ".join(f"{n} {mean:.1f}" for n, mean in means.items()) + ".",
        caption,
    )


def _trust(report: Report) -> str:
    panels = []
    if report.reliability is not None:
        curve = report.reliability
        panels.append(
            _html.drawing(
                (4.0, 3.9),
                lambda figure: plots.reliability_diagram(
                    figure.subplots(), curve.confidence, curve.accuracy, curve.count
                ),
                f"Reliability diagram: calibration error {report.metrics.get('calibration_error', math.nan):.3f}.",
                "How often the guide's most probable class is right, against how sure it is. Below the diagonal it is "
                "too sure.",
            )
        )
    if report.khat is not None:
        khat, high = report.khat, int((report.khat > 0.7).sum())
        panels.append(
            _html.drawing(
                (4.0, 3.9),
                lambda figure: plots.khat_scatter(figure.subplots(), khat),
                f"Pareto k-hat of {math.prod(khat.shape):,} datapoints; {high} are above 0.7.",
                "The weights of draws from the whole guide, address and latent. Above the line, it misses a part of "
                "the posterior.",
            )
        )
    return _html.pair(panels) if panels else ""


def _curves(history: Sequence[Mapping[str, float]]) -> str:
    present = {name for row in history for name in row}
    panels = []
    for names, meaning in (
        (("bound", "reconstruction"), "The bound that training raises, and the part of it that rebuilds the picture."),
        (("kl_a", "kl_z"), "What is paid for the address a and for the latent z."),
    ):
        columns = [column for name in names for column in (name, f"val_{name}") if column in present]
        if columns:
            last = {c: next(row[c] for row in reversed(history) if c in row) for c in columns}
            ends = ", ".join(f"{column} {value:.1f}" for column, value in last.items())
            alt = f"Learning curves in nats per datapoint; at the end {ends}."
            caption = f"{meaning} Dashed: on classes that are not trained on."
            panels.append(_html.drawing((4.0, 3.3), _curve(history, columns), alt, caption))
    return _html.pair(panels) if panels else "<p>No terms were recorded.</p>\n"


def _curve(history: Sequence[Mapping[str, float]], columns: Sequence[str]) -> Any:
    return lambda figure: plots.learning_curves(figure.subplots(), history, columns)
