"""The history of a run: terms averaged over steps, and the table of all records."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pyro_vmem._utils.files import write_atomically
from pyro_vmem.infer.elbo import Terms

__all__ = ["FitResult", "Meter", "read_result", "summarise", "write_history"]


@dataclass
class FitResult:
    """The result of a training run.

    Attributes:
        steps: The number of steps, including those before a resume and skipped ones.
        seconds: Time spent training, over all calls.
        history: One row per record: step, seconds and the terms in nats per datapoint. Names of validation terms begin
            with `val_`. While the weight of KL(z) is below one, the trained quantity is `tempered_bound`, and `bound`
            is the bound with weight one. A Pyro objective gives only one of the two: `tempered_bound` while the weight
            is below one, `bound` afterwards.
        best_bound: The best validation bound, in nats per datapoint; `-inf` without validation.
        interrupted: Whether the run was stopped before its end, by Ctrl-C or by :class:`StopAfter`.
        chosen: The objective that `"auto"` chose, and why.
        skipped: The number of steps whose loss or gradient was not finite. They changed no weight.
        first_skipped: The first such step, and the term that was not finite.
    """

    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best_bound: float = -math.inf
    interrupted: bool = False
    chosen: str = ""
    skipped: int = 0
    first_skipped: str = ""

    def __repr__(self) -> str:
        end = f", {self.skipped} skipped" if self.skipped else ""
        end += ", interrupted" if self.interrupted else ""
        best = f", best bound {self.best_bound:.2f} nats" if self.best_bound > -math.inf else ""
        return f"FitResult({self.steps:,} steps in {self.seconds:.0f} s{best}{end})"


class Meter:
    """Running averages of terms. Each starts at the first step that has the term, and ends at the first without it."""

    def __init__(self, smoothing: float = 0.98) -> None:
        self.smoothing = smoothing  # what a step keeps of those before; 0 for the plain mean over all
        self.sums: dict[str, tuple[float, float]] = {}  # the sum and its weight, by name

    def add(self, terms: dict[str, float]) -> None:
        """Adds the terms of one step."""
        keep, before = self.smoothing or 1.0, self.sums
        self.sums = {}
        for name, value in terms.items():
            total, count = before.get(name, (0.0, 0.0))
            self.sums[name] = keep * total + value, keep * count + 1.0

    def row(self) -> dict[str, float]:
        """The averages by name."""
        return {name: total / count for name, (total, count) in self.sums.items()}

    def text(self) -> str:
        """Returns the most important averages as one line of text."""
        names = {"bound": "bound", "reconstruction": "recon", "kl_a": "KL(a)", "kl_z": "KL(z)"}
        row = self.row()
        return "  ".join(f"{shown} {row[name]:.2f}" for name, shown in names.items() if name in row)


def summarise(terms: Terms) -> dict[str, float]:
    """Computes means of an objective's terms over datapoints, in nats."""
    means = {"bound": terms.bound, "reconstruction": terms.reconstruction}
    means |= {f"kl_{name}": value for name, value in terms.kl.items()}
    # In one transfer: each makes a GPU wait.
    return dict(zip(means, torch.stack(list(means.values())).mean(1).tolist(), strict=True))


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Writes rows as CSV; the columns are all names that occur."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    with write_atomically(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def read_result(folder: str | Path) -> FitResult:
    """Reads the result of a run from the history in its folder.

    Arguments:
        folder: The run.

    Raises:
        FileNotFoundError: If the folder has no `history.csv`; a `ValueError`, if it cannot be read.
    """
    path = Path(folder) / "history.csv"
    if not path.is_file():
        raise FileNotFoundError(f"folder: {str(path)!r} is missing, so its training is not known. Train a run first.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            history = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        last = {"step": 0.0, "seconds": 0.0} | (history[-1] if history else {})
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"run: {str(path)!r} is not a history ({error}). Resume the run, which writes it again."
        ) from error
    best = max((row["val_bound"] for row in history if "val_bound" in row), default=-math.inf)
    return FitResult(steps=int(last["step"]), seconds=last["seconds"], history=history, best_bound=best)
