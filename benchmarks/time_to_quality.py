"""How long a model of letters trains until it is good: by the best recipe here, the default one, and the paper's.

One model, one set of held-out letters, three ways to train. `paper` is that of the paper: VIMCO with four particles and
Adam, a memory for each target, its guide, float32, with nothing annealed. `default` is what `pyro-vmem train` does.
`best` has 32 letters of one drawing each in memory, instead of 16 of four, no rotated letters, KL(z) at full weight
from the start, a higher learning rate, and goes backward through one particle of four. The schedules of a recipe span
its time. The trainings take turns, and each is validated between its turns, which does not count. A bound is reached
where the line through the validations crosses it.

    python -m benchmarks.time_to_quality
    python -m benchmarks.time_to_quality --seconds 120 --json
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from benchmarks.timing import clock
from pyro_vmem.data import Episode, EpisodeSampler, FewShotDataset

FEATURES, WAYS = 64, 16


class OwnMemories(Dataset[Episode]):
    """Episodes of one target each, merged: each target has a memory of its own."""

    def __init__(self, episodes: EpisodeSampler, targets: int) -> None:
        self.episodes, self.targets = episodes, targets

    def __getitem__(self, index: int) -> Episode:
        drawn = [self.episodes[index * self.targets + i] for i in range(self.targets)]
        return pv.data.merge_episodes(
            [Episode(each.memory, each.x[:1], None if each.labels is None else each.labels[:1]) for each in drawn]
        )


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: its episodes, its objective, other parts than the default ones, and settings of `fit`."""

    episodes: Callable[[FewShotDataset], Dataset[Episode]]
    objective: pv.infer.VIMCO_ELBO
    parts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "paper": Recipe(
        lambda train: OwnMemories(EpisodeSampler(train, n_way=WAYS, k_shot=1, n_query=1), targets=16),
        pv.infer.VIMCO_ELBO(4, max_plate_nesting=1),
        {"address_guide": pv.SimilarityGuide(FEATURES, normalise="memory", temperature=1.0, tied=False)},
        {"lr": 1e-3, "schedule": pv.train.Constant(), "kl_schedule": pv.train.Constant(), "precision": "float32"},
    ),
    "default": Recipe(
        lambda train: EpisodeSampler(train, n_way=WAYS, k_shot=4, n_query=4, rotate=True),
        pv.infer.VIMCO_ELBO(4, max_plate_nesting=1),
    ),
    "best": Recipe(
        lambda train: EpisodeSampler(train, n_way=2 * WAYS, k_shot=1, n_query=4),
        pv.infer.VIMCO_ELBO(4, max_plate_nesting=1, backward=1),
        settings={"lr": 5e-3, "kl_schedule": pv.train.Constant()},
    ),
}


class Training:
    """A training of a new model by one recipe, with what was measured after so many seconds of it."""

    def __init__(self, name: str, train: FewShotDataset, test: FewShotDataset, width: int, seconds: float) -> None:
        self.recipe, self.train, self.width = RECIPES[name], train, width
        self.held_out = EpisodeSampler(test, n_way=20, k_shot=1, n_query=2)
        self.episodes = self.recipe.episodes(train)
        self.now, self.seconds = clock(torch.device("cpu")), 0.0
        trainer = self.new_trainer(10**6)
        taken = [self.take(trainer) for _ in range(8)]
        self.steps = max(4, round(seconds / (sum(taken[2:]) / 6)))
        self.trainer, self.seconds = self.new_trainer(self.steps), 0.0
        self.rows: list[dict[str, float]] = []

    def new_trainer(self, steps: int) -> pv.Trainer:
        """A new model, the same each time, in a trainer of so many steps."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = {"latent_dim": 4, "num_features": FEATURES, "width": self.width}
            vma = pv.VMA.for_images(self.train.image_shape, **sizes, **self.recipe.parts)
        return pv.Trainer(vma, self.recipe.objective, pv.TrainingConfig(steps=steps, **self.recipe.settings))

    def take(self, trainer: pv.Trainer) -> float:
        """One step with its episode; its processor time."""
        start = self.now()
        trainer.step(self.episodes[trainer.result.steps])
        return self.now() - start

    def go_on(self, share: float) -> None:
        """Trains up to this share of its steps, and validates."""
        while self.trainer.result.steps < share * self.steps:
            self.seconds += self.take(self.trainer)
        found = pv.validate(self.trainer.vma, self.held_out)
        self.trainer.vma.train()
        self.rows.append({"seconds": self.seconds} | {name: found[name] for name in ("bound", "hit_rate")})

    def until(self, name: str, value: float) -> float | None:
        """The seconds until a measure reaches a value; `None` if it never does."""
        for before, after in zip(self.rows, self.rows[1:], strict=False):
            if after[name] >= value:
                share = (value - before[name]) / (after[name] - before[name])
                return before["seconds"] + max(0.0, share) * (after["seconds"] - before["seconds"])
        return None


def main(
    seconds: float = 60.0,
    bound: float | None = None,
    hit_rate: float = 0.8,
    size: int = 20,
    width: int = 16,
    validations: int = 20,
    longer: float = 1.0,
) -> dict[str, Any]:
    """Trains by all recipes in turn.

    Args:
        seconds: Processor time of each training.
        bound: The bound to reach, in nats per image. Default: the best one of the default recipe.
        hit_rate: The share of targets whose letter the guide has to find among 20.
        size: Height and width of the letters.
        width: The channels of the convolutions at half resolution.
        validations: How often each model is validated.
        longer: How many times as long the paper's recipe trains.
    """
    train, test = pv.data.glyphs(size=size).split(seed=0)
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        times = {name: seconds * (longer if name == "paper" else 1.0) for name in RECIPES}
        trainings = {name: Training(name, train, test, width, times[name]) for name in RECIPES}
        for turn in tqdm(range(validations + 1), desc="turns", file=sys.stderr):
            for training in trainings.values():
                training.go_on(turn / validations)
    bound = max(row["bound"] for row in trainings["default"].rows) if bound is None else bound
    rows: list[dict[str, Any]] = []
    for name, training in trainings.items():
        row: dict[str, Any] = {"recipe": name, "steps": training.steps, "seconds": training.seconds}
        for measure, value in (("bound", bound), ("hit_rate", hit_rate)):
            needed, ours = training.until(measure, value), trainings["best"].until(measure, value)
            row |= {f"seconds_to_{measure}": needed, f"best_{measure}": max(each[measure] for each in training.rows)}
            row[f"times_best_{measure}"] = needed / ours if needed and ours else None
            # What never gets there takes at least as long as it was trained.
            row[f"at_least_{measure}"] = training.seconds / ours if ours and not needed else None
        rows.append(row)
    curves = {name: training.rows for name, training in trainings.items()}
    return {"bound": bound, "hit_rate": hit_rate, "torch": torch.__version__, "rows": rows, "curves": curves}


def show(result: dict[str, Any]) -> None:
    """A row for each recipe."""
    title = f"Seconds until the bound is {result['bound']:.1f} nats, and until the guide finds {result['hit_rate']:.0%}"
    table = Table("recipe", "to the bound", "times best", "to the guide", "times best", "bound", "guide", title=title)
    for row in result["rows"]:
        cells = []
        for measure in ("bound", "hit_rate"):
            needed, times, least = (row[f"{key}_{measure}"] for key in ("seconds_to", "times_best", "at_least"))
            cells.append(f"{needed:.1f}" if needed else f"over {row['seconds']:.0f}")
            cells.append(f"{times:.2f}" if times else f"over {least:.1f}" if least else "-")
        table.add_row(row["recipe"], *cells, f"{row['best_bound']:.1f}", f"{row['best_hit_rate']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
