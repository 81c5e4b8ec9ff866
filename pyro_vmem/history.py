"""The history of a run: terms averaged over steps, and the table of all records."""

from __future__ import annotations

import csv
from pathlib import Path

from pyro_vmem._files import write_atomically
from pyro_vmem.infer import Terms

__all__ = ["Meter", "summarise", "write_history"]


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


def summarise(terms: Terms, kl_weight: float = 1.0) -> dict[str, float]:
    """Means over datapoints of an objective's terms; KL(z) without the warm-up's weight."""
    kl = {f"kl_{name}": float(value.mean()) for name, value in terms.kl.items()}
    if kl_weight > 0:
        kl["kl_z"] /= kl_weight
    return {"bound": float(terms.bound.mean()), "reconstruction": float(terms.reconstruction.mean()), **kl}


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Writes rows as CSV; the columns are all names that occur."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    with write_atomically(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)
