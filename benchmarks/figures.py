"""Figures of docs/results.md, of rows that `python -m benchmarks.reproduce` wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.published import Published

Row = dict[str, Any]
MOST_LETTERS = 55  # of a label in a legend of two columns

NAMES = {
    "vma": "VMA, this library",
    "soft-attention": "soft-attention memory",
    "set-statistics": "set statistics",
    "no-memory": "VAE without memory",
}


def ideal_line(name: str, model: str, cells: dict[int, Row]) -> tuple[str, float] | None:
    """What is to be added to log C, and its name; nothing where the number of classes makes no difference."""
    if name == "mnist-recall":
        return "ideal: log \\|M\\|", 0.0
    return ("ideal: one class + log C", float(cells[1]["nll"])) if 1 in cells and model != "no-memory" else None


def ours_first(key: tuple[str, int]) -> tuple[int, int]:
    """Sorts pairs of model and number as `NAMES` has the models."""
    return list(NAMES).index(key[0]), key[1]


def plot_few_shot(rows: list[Row], protocol: str, published: list[Published]) -> Figure:
    """NLL against the items in memory, a line for each model and number of classes; published ones dashed."""
    drawn = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = drawn.subplots()
    method = max(rows, key=lambda row: row["num_targets"])["method"]
    for model, n_classes in sorted({(row["model"], row["n_classes"]) for row in rows}, key=ours_first):
        cells = [r for r in rows if (r["model"], r["n_classes"], r["method"]) == (model, n_classes, method)]
        _errorbar(axes, cells, "shots", f"{NAMES[model]}, C = {n_classes}")
    for row in published:
        near = row.protocol == "unresolved" and protocol == "gmn-distinct" and row.n_classes == 1
        of = "" if row.n_classes is None else f", C = {row.n_classes}"
        if row.protocol == protocol or near:
            axes.plot(
                [*row.nll],
                [*row.nll.values()],
                "--" if len(row.nll) > 1 else "x",
                lw=1,
                label=f"{row.who}{of} ({row.mark})",
            )
    axes.set_xticks(sorted({row["shots"] for row in rows}))
    axes.set_xlabel("items in memory")
    return _finished(drawn, axes)


def plot_scaling(rows: list[Row], name: str) -> Figure:
    """NLL against the number of classes, beside the ideal line."""
    drawn = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = drawn.subplots()
    method = rows[0]["method"]
    lines = sorted({(r["model"], r["shots"] // r["n_classes"]) for r in rows}, key=ours_first)
    for model, each in lines:
        cells = [
            r for r in rows if (r["model"], r["method"]) == (model, method) and r["shots"] == each * r["n_classes"]
        ]
        label = f"{NAMES[model]}, {each} example{'s' * (each > 1)} per class"
        cells.sort(key=lambda row: row["n_classes"])
        # Without bars: targets are the same all along the line, so theirs would be those of its height alone.
        (line,) = axes.plot([r["n_classes"] for r in cells], [r["nll"] for r in cells], "o-", ms=4, label=label)
        if ideal := ideal_line(name, model, {r["n_classes"]: r for r in cells}):
            x = np.array(sorted(r["n_classes"] for r in cells))
            of_each = f"{ideal[0]}, of each" if len(lines) > 1 else ideal[0]
            axes.plot(
                *(x, ideal[1] + np.log(x), ":"),
                color=line.get_color() if len(lines) > 1 else "black",
                zorder=3,
                label=of_each.replace("\\", "") if (model, each) == lines[0] else None,
            )
    axes.set_xscale("log", base=2)
    ticks = sorted({row["n_classes"] for row in rows})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("classes in memory")
    return _finished(drawn, axes)


def plot_recall(rows: list[Row], history: dict[str, list[float]], slots: int) -> Figure:
    """KL(a) and NLL of copies beside log |M|: as training goes on, and by the slots in memory at test."""
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    drawn.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr]  # it was just given
    training, test = drawn.subplots(1, 2)
    training.plot(history["step"], [-bound for bound in history["val_bound"]], "-", label="-bound, validation")
    training.plot(history["step"], history["val_kl_a"], "-", label="KL(a), validation")
    training.axhline(np.log(slots), color="black", ls=":", zorder=3, label=f"log {slots} = {np.log(slots):.2f}")
    training.set(xlabel="training step", ylim=(0, None))
    cells = sorted(rows, key=lambda row: row["n_classes"])
    sizes = [row["n_classes"] for row in cells]
    test.plot(sizes, [row["nll"] for row in cells], "o-", ms=9, mfc="none", label="NLL, unseen images")
    test.plot(sizes, [row["kl_a"] for row in cells], "s-", ms=4, label="KL(a), unseen images")
    test.plot(sizes, np.log(sizes), ":", color="black", zorder=3, label="ideal: log |M|")
    test.set_xscale("log", base=2)
    test.set_xticks(sizes, [str(n) for n in sizes])
    test.minorticks_off()
    test.set(xlabel="slots in memory", ylim=(0, None))
    for axes in (training, test):
        axes.set_ylabel("nats per image")
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def plot_breakdown(rows: list[Row]) -> Figure:
    """KL(a), KL(z) and NLL against the examples per class, a line for each model and number of classes."""
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    drawn.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr]  # it was just given
    panels = drawn.subplots(1, 3)
    method = rows[0]["method"]
    lines = sorted({(row["model"], row["n_classes"]) for row in rows}, key=ours_first)
    for model, n_classes in lines:
        cells = [r for r in rows if (r["model"], r["n_classes"], r["method"]) == (model, n_classes, method)]
        cells.sort(key=lambda row: row["shots"])
        each = [row["shots"] // n_classes for row in cells]
        for axes, key in zip(panels, ("kl_a", "kl_z", "nll"), strict=True):
            (line,) = axes.plot(each, [row[key] for row in cells], "o-", ms=4, label=f"{NAMES[model]}, C = {n_classes}")
        most = "log |M|, the largest possible KL(a)" if (model, n_classes) == lines[-1] else None
        panels[0].plot(each, np.log([row["shots"] for row in cells]), ":", color=line.get_color(), label=most)
    for axes, label in zip(panels, ("KL(a) (nats)", "KL(z) (nats)", "NLL (nats per image)"), strict=True):
        axes.set_ylabel(label)
        axes.set_xlabel("examples per class")
        axes.set_xticks(sorted({row["shots"] // row["n_classes"] for row in rows}))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    # below, where it covers no line
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return drawn


def _errorbar(axes: Any, cells: list[Row], by: str, label: str) -> None:
    cells = sorted(cells, key=lambda row: row[by])
    x, y, error = ([row[key] or 0.0 for row in cells] for key in (by, "nll", "nll_se"))
    axes.errorbar(x, y, yerr=error, marker="o", ms=3, capsize=2, label=label)


def _finished(drawn: Figure, axes: Any) -> Figure:
    axes.set_ylabel("NLL (nats per image)")
    columns = 2 if max(len(label) for label in axes.get_legend_handles_labels()[1]) < MOST_LETTERS else 1
    # below, where it covers no line
    axes.legend(fontsize=8, frameon=False, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    axes.spines[["top", "right"]].set_visible(False)
    return drawn
