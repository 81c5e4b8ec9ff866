"""Makes docs/results.md and its figures of what `python -m benchmarks.reproduce` wrote to results/.

python -m benchmarks.tables
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import command
from benchmarks.published import ACCURACY, CURVES, LIKELIHOODS, Published
from benchmarks.recipes import read
from benchmarks.reproduce import array_name, figure
from pyro_vmem._files import write_atomically

Row = dict[str, Any]
Result = dict[str, Any]

FEW_SHOT = ("gmn-distinct-causal", "zholus", "gmn-distinct", "gmn")
METHODS = {
    "sampled": "addresses and latents sampled from the guide",
    "exact-address": "addresses summed exactly, latents sampled",
    "top-k": "the most probable addresses summed, others sampled",
}
NAMES = {
    "vma": "VMA, this library",
    "soft-attention": "soft-attention memory",
    "set-statistics": "set statistics",
    "no-memory": "VAE without memory",
}
CAUSAL = (
    "Each pixel is also given those before it; the published models have pixels that are independent given latent and "
    "template, and most of the distance to them is owed to that."
)
INTRO = """# Results

NLL in nats an image, lower is better, on characters that were neither trained nor validated on; mean ± one standard
error over episodes. Protocols are those of `pyro_vmem.data.protocol`; a number means nothing without its own. NLL is
estimated by importance sampling, so it is an upper bound in expectation that more samples tighten. Made by `python -m
benchmarks.tables` of [results](../results), whose JSON files hold recipe, seeds, commit, machine and time; [the
log](../results/LOG.md) says what was tried. Marks of published figures: seen in the source, quoted by another, recalled
and yet to be checked.
"""


def main(results: str = "results", out: str = "docs/results.md", figures: str = "docs/results") -> dict[str, Any]:
    """Writes the page.

    Args:
        results: The folder of results.
        out: The page.
        figures: The folder of its figures.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(Path(results).glob("*.json"))}
    order = [*FEW_SHOT, *(name for name in found if name not in FEW_SHOT)]
    parts, rows = [INTRO], []
    for name in order:
        if name in found and found[name]["rows"]:
            result = found[name]
            parts.append(section(name, result, Path(results), Path(figures), Path(out).parent))
            rows += [{"table": name, **row} for row in best(result["rows"])]
    with write_atomically(out) as aside:
        aside.write_text("\n".join(parts))
    return {"out": out, "rows": rows}


def best(rows: Iterable[Row]) -> list[Row]:
    """Of each cell the row with the most targets, and of these the one with the most samples."""
    chosen: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: (row["num_targets"], row["num_samples"])):
        chosen[row["model"], row["n_classes"], row["shots"], row["method"]] = row
    return list(chosen.values())


def section(name: str, result: Result, results: Path, figures: Path, page: Path) -> str:
    """A table's heading, facts, tables and figure."""
    rows = best(result["rows"])
    curves = result["recipe"]["evaluation"]["per_class"]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    protocol = result["recipe"]["protocol"]
    published = LIKELIHOODS if result["recipe"]["images"] == "protocol" else []
    if name in ("classification", "lookup"):
        text = [f"## {result['recipe']['title']}", facts(result, rows), classification(rows)]
        return "\n\n".join([*text, *pictures(name, figures, page)]) + "\n"
    tables = [scaling(name, rows, results / f"{name}.npz")] if curves else []
    tables += [] if curves else [few_shot(protocol, rows, m, published if m == methods[0] else []) for m in methods]
    drawn = plot_scaling(rows, name) if curves else plot_few_shot(rows, protocol, published)
    path = figures / f"{name}.png"
    with write_atomically(path) as aside:
        drawn.savefig(aside, format="png", dpi=120)
    text = [f"## {result['recipe']['title']}", facts(result, rows), *tables]
    if not curves and (terms := breakdown(rows)):
        text.append(terms)
    gains = "" if curves else paired(rows, results / f"{name}.npz")  # targets that share a memory are no pairs
    if gains:
        text.append(gains)
    if name in CURVES:
        text.append(f"The paper: {CURVES[name]}")
    shown = path.relative_to(page) if path.is_relative_to(page) else path
    text.append(f"![{result['recipe']['title']}]({shown})")
    return "\n\n".join(part for part in text if part) + "\n"


def pictures(name: str, figures: Path, page: Path) -> list[str]:
    """What `python -m benchmarks.pictures` drew with the table's model."""
    texts = {
        "histogram": "q(a | x, M) of a target of each of eight unseen characters, ten examples of each in memory, and "
        "the templates looked up first.",
        "one-shot": "Unseen characters, framed, and new examples drawn from one of each.",
    }
    found = [(figures / f"{name}-{kind}.png", text) for kind, text in texts.items()]
    shown = [(path.relative_to(page) if path.is_relative_to(page) else path, t) for path, t in found if path.exists()]
    return [f"{text}\n\n![{text}]({path})" for path, text in shown]


def facts(result: Result, rows: list[Row]) -> str:
    """What was trained and evaluated, in a line or two."""
    # a table that trains nothing shows how the run was trained that it evaluates
    evaluated = result["recipe"]["run"]
    training = dataclasses.asdict(read(evaluated).training) if evaluated else result["recipe"]["training"]
    lines = [f"Protocol `{result['recipe']['protocol']}`."]
    for model, run in result["runs"].items():
        trained = ""
        if run["steps"]:
            kinds = [training | {"n_absent": 0}, *training.get("more", [])]
            sizes = [(kind["n_way"] + kind["n_absent"]) * kind["n_query"] for kind in kinds]
            size = _range(sizes) if result["recipe"]["protocol"] != "recall" else training["n_query"]
            trained = f", {run['steps']:,} steps of {size} targets in {run['seconds'] / 60:.0f} min"
        cpu = f"{run['machine']['cpu']}, {run['machine']['threads']} thread"
        lines.append(
            f"{NAMES[model]}: {run['parameters']:,} parameters{trained} (seed {training['seed']}; evaluated at commit "
            f"{run['commit']}, {cpu}{'s' * (run['machine']['threads'] > 1)})."
        )
    if start := result["recipe"]["start"]:
        lines.append(f"Its training began with the weights of `{start}`.")
    if result["recipe"]["networks"].get("pixels") == "causal":
        lines.append(CAUSAL)
    samples, targets = ({row[key] for row in rows} for key in ("num_samples", "num_targets"))
    lines.append(f"K = {_range(samples)}, {_range(targets)} targets a cell, seed {rows[0]['seed']}.")
    return " ".join(lines)


def few_shot(protocol: str, rows: list[Row], method: str, published: list[Published]) -> str:
    """Ours by one method, and the published rows of the same protocol, then of others."""
    ours = [row for row in rows if row["method"] == method]
    shots = sorted({row["shots"] for row in ours})
    lines = [f"NLL, {METHODS[method]}; columns: items in memory, all classes together.", "", *_head(["", "C", *shots])]
    for model, n_classes in sorted({(row["model"], row["n_classes"]) for row in ours}, key=_ours_first):
        cells = {row["shots"]: row for row in ours if (row["model"], row["n_classes"]) == (model, n_classes)}
        lines.append(_line([f"**{NAMES[model]}**", n_classes, *(_value(cells.get(t)) for t in shots)]))
        if any(row["nll_absent"] is not None for row in cells.values()):
            lines.append(
                _line(["its class in memory / absent", n_classes, *(_by_presence(cells.get(t)) for t in shots)])
            )
    for same in (True, False):
        for row in published:
            if (row.protocol == protocol) == same and any(t in row.nll for t in shots):
                where = "" if same else f", protocol {row.protocol}"
                values = [f"{row.nll[t]:g}" if t in row.nll else "" for t in shots]
                lines.append(_line([f"{row.who}{where} ({row.mark})", row.n_classes or "-", *values]))
    if published and not any(row.protocol == protocol for row in published):
        lines += ["", "No published figure is of this protocol: those above are near it, not comparable to the nat."]
    return "\n".join(lines)


def breakdown(rows: list[Row]) -> str:
    """The terms of the bound by the items in memory, where these are of one class."""
    cells = {row["shots"]: row for row in rows if row["n_classes"] == 1 and row["model"] == "vma" and "kl_a" in row}
    if not cells:
        return ""
    terms = {"KL(a)": "kl_a", "KL(z)": "kl_z", "reconstruction": "reconstruction"}
    lines = ["The bound with 8 samples taken apart, in nats, VMA, one class in memory; columns: items in memory.", ""]
    lines += _head(["", *sorted(cells)])
    lines += [_line([name, *(f"{cells[t][key]:.2f}" for t in sorted(cells))]) for name, key in terms.items()]
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
        lines += [f"NLL, {METHODS[method]}; columns: {of} in memory.", "", *_head(["", "examples a class", *columns])]
        for model, each in sorted({(r["model"], r["shots"] // r["n_classes"]) for r in ours}, key=_ours_first):
            cells = {
                row["n_classes"]: row
                for row in ours
                if row["model"] == model and row["shots"] == each * row["n_classes"]
            }
            lines.append(_line([f"**{NAMES[model]}**", each, *(_value(cells.get(c)) for c in columns)]))
            lines.append(_line(["hit rate", each, *(_percent(cells.get(c)) for c in columns)]))
            if ideal := _ideal(name, cells):
                lines.append(_line([ideal[0], each, *(f"{ideal[1] + math.log(c):.2f}" for c in columns)]))
                if name != "mnist-recall":
                    lines.append(_line(["above it, paired", each, *(_above(cells, c, path) for c in columns)]))
        lines.append("")
    return "\n".join(lines).rstrip()


def classification(rows: list[Row]) -> str:
    """How often the most probable class is the target's, by guide and by posterior, beside the paper's figures."""
    lines = _head(["", *(f"{ways}-way {shots}-shot" for ways, shots in ACCURACY)])
    by = {"sampled": "q(a \\| x, M), the guide alone", "exact-address": "p(a \\| x, M), z sampled at every slot"}
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows):
        some = [r for r in rows if (r["model"], r["method"]) == (model, method)]
        found = [
            _percent_and_error({(r["n_classes"], r["shots"] // r["n_classes"]): r for r in some}.get(key))
            for key in ACCURACY
        ]
        lines.append(_line([f"**{NAMES[model]}**, {by[method]}", *found]))
    lines.append(
        _line(
            [
                "VMA (Bornschein et al., 2017), q(a \\| x, M), other images (recalled)",
                *(f"{a:.0%}" for a in ACCURACY.values()),
            ]
        )
    )
    return "\n".join(lines)


def _percent_and_error(row: Row | None) -> str:
    return "" if row is None else f"{100 * row['hit_rate']:.1f} ± {100 * (row['hit_rate_se'] or math.nan):.1f} %"


def _ideal(name: str, cells: dict[int, Row]) -> tuple[str, float] | None:
    """What is to be added to log C, and its name."""
    if name == "mnist-recall":
        return "ideal: log \\|M\\|", 0.0
    return ("ideal: one class + log C", float(cells[1]["nll"])) if 1 in cells else None


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


def _ours_first(key: tuple[str, int]) -> tuple[int, int]:
    return list(NAMES).index(key[0]), key[1]


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row[n] for n in ("n_classes", "shots", "method", "num_targets", "num_samples", "seed"))


def plot_few_shot(rows: list[Row], protocol: str, published: list[Published]) -> Figure:
    """NLL against the items in memory, a line for each model and number of classes; published ones dashed."""
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.subplots()
    method = rows[0]["method"]
    for model, n_classes in sorted({(row["model"], row["n_classes"]) for row in rows}, key=_ours_first):
        cells = [r for r in rows if (r["model"], r["n_classes"], r["method"]) == (model, n_classes, method)]
        _errorbar(axes, cells, "shots", f"{NAMES[model]}, C = {n_classes}")
    for row in published:
        near = row.protocol == "unresolved" and protocol == "gmn-distinct" and row.n_classes == 1
        if row.protocol == protocol or near:
            axes.plot([*row.nll], [*row.nll.values()], "--", lw=1, label=f"{row.who}, C = {row.n_classes} ({row.mark})")
    axes.set_xticks(sorted({row["shots"] for row in rows}))
    axes.set_xlabel("items in memory")
    return _finished(drawn, axes)


def plot_scaling(rows: list[Row], name: str) -> Figure:
    """NLL against the number of classes, beside the ideal line."""
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.subplots()
    method = rows[0]["method"]
    for model, each in sorted({(r["model"], r["shots"] // r["n_classes"]) for r in rows}, key=_ours_first):
        cells = [
            r for r in rows if (r["model"], r["method"]) == (model, method) and r["shots"] == each * r["n_classes"]
        ]
        label = NAMES[model] if name == "mnist-recall" else f"{NAMES[model]}, {each} a class"
        cells.sort(key=lambda row: row["n_classes"])
        # Without bars: targets are the same all along the line, so theirs would be those of its height alone.
        (drawn_line,) = axes.plot([r["n_classes"] for r in cells], [r["nll"] for r in cells], "o-", ms=3, label=label)
        line = drawn_line.get_color()
        if ideal := _ideal(name, {r["n_classes"]: r for r in cells}):
            x = np.array(sorted(r["n_classes"] for r in cells))
            axes.plot(x, ideal[1] + np.log(x), ":", color=line, label=ideal[0].replace("\\", ""))
    axes.set_xscale("log", base=2)
    ticks = sorted({row["n_classes"] for row in rows})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_xlabel("slots in memory" if name == "mnist-recall" else "classes in memory")
    return _finished(drawn, axes)


def _errorbar(axes: Any, cells: list[Row], by: str, label: str) -> None:
    cells = sorted(cells, key=lambda row: row[by])
    x, y, error = ([row[key] or 0.0 for row in cells] for key in (by, "nll", "nll_se"))
    axes.errorbar(x, y, yerr=error, marker="o", ms=3, capsize=2, label=label)


def _finished(drawn: Figure, axes: Any) -> Figure:
    axes.set_ylabel("NLL (nats an image)")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


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
