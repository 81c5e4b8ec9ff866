"""The history of a run: terms averaged over steps, and the table of all records."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyro_vmem._utils.files import write_atomically
from pyro_vmem.infer.elbo import Terms

__all__ = ["FitResult", "Meter", "read_result", "summarise", "write_history"]


@dataclass
class FitResult:
    """What a training run left behind.

    Attributes:
        steps: Steps taken, those before a resume and those skipped included.
        seconds: Time spent training, likewise.
        history: One row a record: step, seconds and the terms, in nats per datapoint; validation rows begin `val_`.
        best_bound: The best validation bound, in nats per datapoint; `-inf` without validation.
        interrupted: Whether the run was stopped before its end, by Ctrl-C or by `piece_minutes`.
        chosen: The objective that `"auto"` chose, and why.
        skipped: Steps whose loss or gradient was not finite; they moved no weight.
        first_skipped: Which step was the first of them, and what was not finite.
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
    """Running averages of terms, for the progress bar and the history.

    Arguments:
        smoothing: What a step keeps of those before; 0 for the plain mean over all.
    """

    def __init__(self, smoothing: float = 0.98) -> None:
        self.smoothing = smoothing
        self.sums: dict[str, float] = {}
        self.count = 0.0

    def add(self, terms: dict[str, float]) -> None:
        """Takes in one step."""
        keep = self.smoothing or 1.0  # without smoothing, the plain mean
        self.count = keep * self.count + 1.0
        self.sums = {name: keep * self.sums.get(name, 0.0) + value for name, value in terms.items()}

    def row(self) -> dict[str, float]:
        """The averages by name."""
        return {name: total / self.count for name, total in self.sums.items()}

    def text(self) -> str:
        """The averages of note, in a line."""
        names = {"bound": "bound", "reconstruction": "recon", "kl_a": "KL(a)", "kl_z": "KL(z)"}
        row = self.row()
        return "  ".join(f"{shown} {row[name]:.2f}" for name, shown in names.items() if name in row)

    def state(self) -> dict[str, Any]:
        """The sums and their weight, as plain data."""
        return {"sums": self.sums, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state` gave."""
        self.sums, self.count = dict(state["sums"]), state["count"]


def summarise(terms: Terms, kl_weight: float = 1.0) -> dict[str, float]:
    """Means over datapoints of an objective's terms; KL(z) without the warm-up's weight."""
    kl = {f"kl_{name}": float(value.mean()) for name, value in terms.kl.items()}
    if kl_weight > 0:
        kl["kl_z"] /= kl_weight
    return {"bound": float(terms.bound.mean()), "reconstruction": float(terms.reconstruction.mean()), **kl}


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Writes rows as CSV; the columns are all names that occur."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    with write_atomically(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def read_result(folder: str | Path) -> FitResult:
    """What training left in a run's folder, as its history tells.

    Arguments:
        folder: The run.

    Raises:
        FileNotFoundError: If the folder has no `history.csv`; a `ValueError`, if it cannot be read.
    """
    path = Path(folder) / "history.csv"
    if not path.is_file():
        raise FileNotFoundError(f"run: {str(path)!r} is missing, so its training is not known. Train a run first.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            history = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        last = {"step": 0.0, "seconds": 0.0} | (history[-1] if history else {})
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"run: {str(path)!r} is not a history ({error}). Go on with the run (resume), which writes it again."
        ) from error
    best = max((row["val_bound"] for row in history if "val_bound" in row), default=-math.inf)
    return FitResult(steps=int(last["step"]), seconds=last["seconds"], history=history, best_bound=best)
