"""Makes docs/results.md and its figures of what `python -m benchmarks.reproduce` wrote to results/.

python -m benchmarks.tables
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command
from benchmarks.figures import (
    NAMES,
    Row,
    ideal_line,
    ours_first,
    plot_breakdown,
    plot_few_shot,
    plot_recall,
    plot_scaling,
)
from benchmarks.published import ACCURACY, CURVES, LIKELIHOODS, Published
from benchmarks.recipes import read
from benchmarks.reproduce import array_name, figure
from pyro_vmem._utils.files import write_atomically
from pyro_vmem.app import Experiment
from pyro_vmem.data import PROTOCOLS

Result = dict[str, Any]

ORDER = (  # of the findings
    *("baselines", "scaling", "baselines-causal", "lookup", "classification"),
    *("zholus", "gmn-distinct-causal", "gmn", "vma-45-5", "gmn-distinct-shots", "gmn-distinct-long", "breakdown"),
    *("mnist-recall", "mnist-learned"),
)
METHODS = {
    "sampled": "addresses and latents sampled from the guide",
    "exact-address": "addresses summed exactly, latents sampled",
    "top-k": "the most probable addresses summed, others sampled",
}
TERMS = {"KL(a)": "kl_a", "KL(z)": "kl_z", "reconstruction": "reconstruction"}
CLASSIFIED = ("classification", "lookup")  # tables whose figure is the share of targets whose class is found
PICTURED = "omniglot28"
PACKAGED = Path("docs/benchmarks/packaged.json")
INTRO = (Path(__file__).parent / "findings.md").read_text()


def main(results: str = "results", out: str = "docs/results.md", figures: str = "docs/results") -> dict[str, Any]:
    """Writes the page.

    Args:
        results: The folder of results.
        out: The page.
        figures: The folder of its figures.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(Path(results).glob("*.json"))}
    order = [name for name in (*ORDER, *(n for n in found if n not in ORDER)) if name in found and found[name]["rows"]]
    page, rows = Path(out).parent, []
    parts = [INTRO, drawn_by_a_model(Path(figures), page), of_packaged_models(), "## Tables\n"]
    for name in order:
        parts.append(section(name, found[name], Path(results), Path(figures), page))
        rows += [{"table": name, **row} for row in best(found[name]["rows"])]
    parts.append(published({name: found[name]["recipe"]["title"] for name in order}))
    with write_atomically(out) as aside:
        aside.write_text("\n".join(part for part in parts if part))
    return {"out": out, "rows": rows}


def best(rows: Iterable[Row]) -> list[Row]:
    """Of each cell the row with the most targets, and of these the one with the most samples."""
    chosen: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: (row["num_targets"], row["num_samples"])):
        chosen[row["model"], row["n_classes"], row["shots"], row["method"]] = row
    return list(chosen.values())


def section(name: str, result: Result, results: Path, figures: Path, page: Path) -> str:
    """A table's heading, facts, tables and figure."""
    title, rows = result["recipe"]["title"], best(result["rows"])
    curves, protocol = result["recipe"]["per_class"], result["recipe"]["protocol"]
    settings = result["recipe"]["experiment"]
    text, drawn = [f"### {title}", facts(result, rows)], {}
    if name in CLASSIFIED:
        text.append(classification(rows))
    elif settings["templates"] is not None and settings["recall"]:
        text += [learned(rows), *pictures(name, ["slots"], figures, page)]
    elif not curves:
        same = [row for row in LIKELIHOODS if row.protocol == protocol and settings["data"] in PROTOCOLS]
        methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
        text += [few_shot(rows, method, same if method == methods[0] else []) for method in methods]
        # targets that share a memory are no pairs
        text += [breakdown(rows), paired(rows, results / f"{name}.npz")]
        drawn[name] = plot_few_shot(rows, protocol, LIKELIHOODS if settings["data"] in PROTOCOLS else [])
    if curves and name not in CLASSIFIED and len({row["n_classes"] for row in rows}) > 1:
        text.append(scaling(name, rows, results / f"{name}.npz"))
        if name == "mnist-recall":
            of_run = (result["runs"]["vma"]["history"], settings["n_way"])
            drawn[name] = plot_recall(rows, *of_run)
        else:
            drawn[name] = plot_scaling(rows, name)
    if curves and name not in CLASSIFIED and len({row["shots"] // row["n_classes"] for row in rows}) > 2:
        text.append(by_examples(rows))
        drawn[f"{name}-by-examples"] = plot_breakdown(rows)
    for stem, figure_ in drawn.items():
        path = figures / f"{stem}.png"
        with write_atomically(path) as aside:
            figure_.savefig(aside, format="png", dpi=120)
        text.append(_image(title, path, page))
    return "\n\n".join(part for part in text if part) + "\n"


def drawn_by_a_model(figures: Path, page: Path) -> str:
    """The pictures of the packaged model."""
    kinds = ["lookups", "draws", "completions"]
    found = pictures(PICTURED, kinds, figures, page)
    said = f"The packaged model `{PICTURED}` makes these pictures of unseen characters. None of them is selected."
    how = f"`python -m benchmarks.pictures {PICTURED}` draws them."
    return "\n\n".join(["## Pictures", f"{said} {how}", *found]) + "\n"


def of_packaged_models() -> str:
    """What the packaged models are worth, and how to measure it again."""
    if not PACKAGED.exists():
        return ""
    result = json.loads(PACKAGED.read_text())
    judge = f"{100 * result['recogniser']['accuracy']:.1f} ± {100 * result['recogniser']['standard_error']:.1f} %"
    said = (
        f"Memory holds one drawing of each of 20 unseen characters. Each slot has {result['samples']} samples of z. A "
        "one-shot trial has 20 characters of one evaluation alphabet, drawn at random; the trials of the published "
        "challenge are others. A recogniser that was trained on its own judges draws. It is right for "
        f"{judge} of real drawings in 20-way 1-shot episodes. The commands are `python -m benchmarks.recogniser --out "
        "FILE` and `python -m benchmarks.packaged FILE --episodes 10 --samples 20 --json`."
    )
    return "\n\n".join(["## Packaged models", said, worth(result["rows"])]) + "\n"


def worth(rows: list[Row]) -> str:
    """Likelihood, lookup, one-shot classification and draws of packaged models, a column each."""

    def line(what: str, name: str, within: str | None = None, scale: float = 1.0, unit: str = "") -> str:
        found = [row if within is None else row[within] for row in rows]
        return _line([what, *(f"{scale * r[name]:.2f} ± {scale * r[f'{name}_se']:.2f}{unit}" for r in found)])

    lines = _head(["", *(f"`{row['model']}`" for row in rows)])
    lines += [
        line("NLL, nats", "nll"),
        line("a right memory is worth, nats", "memory_worth_nats"),
        line("KL(a), at most log 20 = 3.00 nats", "information_gain"),
        line("KL(z), nats", "kl_z"),
        line("accuracy of the guide", "hit_rate", None, 100, " %"),
        line("accuracy of the exact posterior", "hit_rate_exact", None, 100, " %"),
    ]
    scores = {"guide": "the guide", "evidence": "the evidence", "two_way": "the evidence both ways"}
    lines += [line(f"one-shot error by {by}", name, "one_shot", 100, " %") for name, by in scores.items()]
    for number, of in enumerate(rows[0]["draws"]):
        found = [row["draws"][number] for row in rows]
        for what, name in (("recognised", "recognised"), ("diversity, real drawings 1", "diversity_ratio")):
            shown = [f"{100 * r[name]:.0f} %" if name == "recognised" else f"{r[name]:.2f}" for r in found]
            lines.append(_line([f"draws {of['how']}: {what}", *shown]))
    real = [f"{100 * row['draws'][0]['recognised_real']:.0f} %" for row in rows]
    return "\n".join([*lines, _line(["real drawings: recognised", *real])])


def pictures(name: str, kinds: list[str], figures: Path, page: Path) -> list[str]:
    """What `python -m benchmarks.pictures` drew with a model."""
    texts = {
        "lookups": "The probabilities q(a | M, x) of the guide for a target of each of eight characters, with ten "
        "examples of each in memory. On the right are the six most probable templates.",
        "draws": "One drawing of each character is in memory (left). In the middle are drawings by other people. On "
        "the right are draws of the model from this slot.",
        "completions": "The lower half of each target is hidden and filled in six times. One drawing of each of twelve "
        "characters is in memory.",
        "slots": "Every learned template is framed. They are sorted by their most frequent digit. Beside each are the "
        "means of p(x | z, m_a) for six draws of z.",
    }
    found = [(figures / f"{name}-{kind}.png", texts[kind]) for kind in kinds]
    return [f"{text}\n\n{_image(text, path, page)}" for path, text in found if path.exists()]


def _image(text: str, path: Path, page: Path) -> str:
    return f"![{text}]({path.relative_to(page) if path.is_relative_to(page) else path})"


def published(titles: dict[str, str]) -> str:
    """Every published figure, once, with its protocol and mark; `titles` are those of our tables."""
    shots = sorted({t for row in LIKELIHOODS for t in row.nll})
    lines = [
        "## Published figures",
        "",
        "NLL in nats per image; each column is a number of items in memory, of all classes together.",
        "",
    ]
    lines += _head(["", "protocol", "mark", "C", *shots])
    for row in LIKELIHOODS:
        values = [f"{row.nll[t]:g}" if t in row.nll else "" for t in shots]
        lines.append(_line([row.who, row.protocol, row.mark, row.n_classes or "-", *values]))
    notes = dict.fromkeys((row.protocol, row.note) for row in LIKELIHOODS if row.note)
    lines += ["", *(f"- `{protocol}`: {note}." for protocol, note in notes)]
    lines += ["", "Few-shot classification by q(a | M, x), with other images than ours.", ""]
    lines += [*_head(["", "mark", *(f"{ways}-way {shots}-shot" for ways, shots in ACCURACY)])]
    lines.append(_line(["VMA (Bornschein et al., 2017)", "recalled", *(f"{a:.0%}" for a in ACCURACY.values())]))
    lines += ["", "What VMA (Bornschein et al., 2017) says of its curves; all recalled.", ""]
    for tables, text in CURVES.items():
        ours = [f"[{titles[name]}](#{_slug(titles[name])})" for name in tables if name in titles]
        lines.append(f"- {text}{' Ours: ' + '; '.join(ours) + '.' if ours else ''}")
    return "\n".join(lines) + "\n"


def _slug(title: str) -> str:
    """The place of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def facts(result: Result, rows: list[Row]) -> str:
    """What was trained and evaluated, in a line or two."""
    # a table that trains nothing shows how the run was trained that it evaluates
    evaluated = result["recipe"]["run"]
    training = dataclasses.asdict(read(evaluated).experiment) if evaluated else result["recipe"]["experiment"]
    lines = [f"Protocol `{result['recipe']['protocol']}`."]
    for model, run in result["runs"].items():
        trained = ""
        if run["steps"]:
            kinds = Experiment(**training).kinds
            sizes = [(kind.n_way + kind.n_absent) * kind.n_query for kind in kinds]
            size = _range(sizes) if result["recipe"]["protocol"] != "recall" else training["n_query"]
            trained = f", {run['steps']:,} steps of {size} targets in {run['seconds'] / 60:.0f} min"
        cpu = f"{run['machine']['cpu']}, {run['machine']['threads']} thread"
        lines.append(
            f"{NAMES[model]}: {run['parameters']:,} parameters{trained} (seed {training['seed']}; evaluated at commit "
            f"{run['commit']}, {cpu}{'s' * (run['machine']['threads'] > 1)})."
        )
    if evaluated:
        lines.append(f"The model is that of `{evaluated}`.")
    elif training["start"]:
        lines.append(f"Its training began with the weights of `{Path(training['start']).stem.removesuffix('-vma')}`.")
    if training["pixels"] == "causal":
        lines.append("Pixels are causal.")
    samples, targets = ({row[key] for row in rows} for key in ("num_samples", "num_targets"))
    lines.append(f"K = {_range(samples)}, {_range(targets)} targets per cell, seed {rows[0]['seed']}.")
    return " ".join(lines)


def few_shot(rows: list[Row], method: str, published: list[Published]) -> str:
    """Ours by one method, and the published rows of the same protocol."""
    ours = [row for row in rows if row["method"] == method]
    shots = sorted({row["shots"] for row in ours})
    lines = [
        f"NLL, {METHODS[method]}; each column is a number of items in memory, of all classes together.",
        "",
        *_head(["", "C", *shots]),
    ]
    for model, n_classes in sorted({(row["model"], row["n_classes"]) for row in ours}, key=ours_first):
        cells = {row["shots"]: row for row in ours if (row["model"], row["n_classes"]) == (model, n_classes)}
        lines.append(_line([f"**{NAMES[model]}**", n_classes, *(_value(cells.get(t)) for t in shots)]))
        if any(row["nll_absent"] is not None for row in cells.values()):
            lines.append(
                _line(["its class in memory / missing", n_classes, *(_by_presence(cells.get(t)) for t in shots)])
            )
    for row in published:
        values = [f"{row.nll[t]:g}" if t in row.nll else "" for t in shots]
        if any(values):
            lines.append(_line([f"{row.who} ({row.mark})", row.n_classes or "-", *values]))
    return "\n".join(lines)


def breakdown(rows: list[Row]) -> str:
    """The terms of the bound by the items in memory, where these are of one class."""
    cells = {row["shots"]: row for row in rows if row["n_classes"] == 1 and row["model"] == "vma" and "kl_a" in row}
    if not cells:
        return ""
    lines = ["The terms of the bound with 8 samples, in nats; VMA, one class in memory; columns: items in memory.", ""]
    lines += _head(["", *sorted(cells)])
    lines += [_line([name, *(f"{cells[t][key]:.2f}" for t in sorted(cells))]) for name, key in TERMS.items()]
    return "\n".join(lines)


def learned(rows: list[Row]) -> str:
    """NLL and the terms of the bound with a memory that is learned."""
    lines = ["The memory of the episode is not read. NLL, and the terms of the bound with 8 samples, in nats."]
    lines += ["", *_head(["slots", "NLL", *TERMS])]
    lines += [_line([r["n_classes"], _value(r), *(f"{r[key]:.2f}" for key in TERMS.values())]) for r in rows]
    return "\n".join(lines)


def by_examples(rows: list[Row]) -> str:
    """NLL and the terms of the bound by the examples of each class in memory."""
    each = sorted({row["shots"] // row["n_classes"] for row in rows})
    lines = ["NLL, and the terms of the bound with 8 samples, in nats; columns: examples per class.", ""]
    lines += _head(["", "C", *each])
    for model, n_classes in sorted({(row["model"], row["n_classes"]) for row in rows}, key=ours_first):
        of = {r["shots"] // n_classes: r for r in rows if (r["model"], r["n_classes"]) == (model, n_classes)}
        lines.append(_line([f"**{NAMES[model]}**", n_classes, *(_value(of.get(n)) for n in each)]))
        for name, key in TERMS.items():
            lines.append(_line([name, n_classes, *(f"{of[n][key]:.2f}" if n in of else "" for n in each)]))
    return "\n".join(lines)


def scaling(name: str, rows: list[Row], path: Path) -> str:
    """NLL by the number of classes, or slots, in memory, and the ideal."""
    lines = []
    for method in METHODS:
        ours = [row for row in rows if row["method"] == method]
        if not ours:
            continue
        columns = sorted({row["n_classes"] for row in ours})
        of = "slots" if name == "mnist-recall" else "classes"
        lines += [f"NLL, {METHODS[method]}; columns: {of} in memory.", "", *_head(["", "examples per class", *columns])]
        for model, each in sorted({(r["model"], r["shots"] // r["n_classes"]) for r in ours}, key=ours_first):
            cells = {
                row["n_classes"]: row
                for row in ours
                if row["model"] == model and row["shots"] == each * row["n_classes"]
            }
            lines.append(_line([f"**{NAMES[model]}**", each, *(_value(cells.get(c)) for c in columns)]))
            if model == "vma":  # the others have no address that could hit
                lines.append(_line(["accuracy (hit rate)", each, *(_percent(cells.get(c)) for c in columns)]))
            if name == "mnist-recall":
                lines.append(_line(["KL(a)", each, *(f"{cells[c]['kl_a']:.2f}" for c in columns)]))
            if ideal := ideal_line(name, model, cells):
                lines.append(_line([ideal[0], each, *(f"{ideal[1] + math.log(c):.2f}" for c in columns)]))
                if name != "mnist-recall":
                    lines.append(_line(["above it, paired", each, *(_above(cells, c, path) for c in columns)]))
        lines.append("")
    return "\n".join(lines).rstrip()


def classification(rows: list[Row]) -> str:
    """How often the most probable class is the target's, by guide and by posterior."""
    lines = _head(["classes drawn across alphabets", *(f"{ways}-way {shots}-shot" for ways, shots in ACCURACY)])
    by = {"sampled": "q(a \\| M, x), the guide alone", "exact-address": "p(a \\| M, x), z sampled at every slot"}
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows):
        some = [r for r in rows if (r["model"], r["method"]) == (model, method)]
        found = [
            _percent_and_error({(r["n_classes"], r["shots"] // r["n_classes"]): r for r in some}.get(key))
            for key in ACCURACY
        ]
        lines.append(_line([f"**{NAMES[model]}**, {by[method]}", *found]))
    return "\n".join(lines)


def _percent_and_error(row: Row | None) -> str:
    return "" if row is None else f"{100 * row['hit_rate']:.1f} ± {100 * (row['hit_rate_se'] or math.nan):.1f} %"


def _above(cells: dict[int, Row], n_classes: int, path: Path) -> str:
    """How far NLL is above that of one class + log C, of the same targets."""
    one, row = cells[1], cells.get(n_classes)
    if row is None or n_classes == 1 or one["num_targets"] != row["num_targets"] or not path.exists():
        return ""
    with np.load(path) as arrays:
        difference = arrays[array_name(row)] - arrays[array_name(one)] - math.log(n_classes)
    difference = difference.reshape(row["num_episodes"], -1).mean(1)
    return f"{difference.mean():+.2f} ± {difference.std(ddof=1) / math.sqrt(len(difference)):.2f}"


def paired(rows: list[Row], path: Path) -> str:
    """How much better or worse than the VMA the others are, target by target."""
    if not path.exists():
        return ""
    lines = []
    with np.load(path) as arrays:
        for row in rows:
            vma = next((r for r in rows if r["model"] == "vma" and _cell(r) == _cell(row)), None)
            if row["model"] == "vma" or vma is None or not {array_name(row), array_name(vma)} <= set(arrays.files):
                continue
            difference = arrays[array_name(row)] - arrays[array_name(vma)]
            error = difference.std(ddof=1) / math.sqrt(len(difference))
            lines.append(
                f"- {NAMES[row['model']]} minus VMA, C = {row['n_classes']}, T = {row['shots']}, {row['method']}: "
                f"{difference.mean():+.2f} ± {error:.2f}"
            )
    return "\n".join(["Paired over targets, in nats (positive: the VMA is better):", "", *lines]) if lines else ""


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row[n] for n in ("n_classes", "shots", "method", "num_targets", "num_samples", "seed"))


def _head(cells: list[Any]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _value(row: Row | None) -> str:
    return "" if row is None else figure(row)


def _by_presence(row: Row | None) -> str:
    """NLL of the targets whose class is in memory, of those whose class is not, and the share of these."""
    if row is None:
        return ""
    here, absent = (f"{row[n]:.1f}" if row[n] is not None else "-" for n in ("nll_in_memory", "nll_absent"))
    return f"{here} / {absent} ({100 - 100 * row['class_in_memory']:.0f} %)"


def _percent(row: Row | None) -> str:
    return "" if row is None or row["hit_rate"] is None else f"{100 * row['hit_rate']:.0f} %"


def _range(values: Iterable[int]) -> str:
    low, high = min(values := set(values)), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def show(result: dict[str, Any]) -> None:
    """Where the page is."""
    sys.stdout.write(f"{result['out']}: {len(result['rows'])} figures\n")


if __name__ == "__main__":
    command(main, show)
