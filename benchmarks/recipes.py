"""Recipes of reproductions: the experiment that is trained, and which cells of a table its model is evaluated in.

A recipe is a YAML file in benchmarks/configs, which `pyro-vmem train --config` reads too: it holds the settings of an
experiment, and under `notes` what is evaluated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

import pyro_vmem as pv
from pyro_vmem import data
from pyro_vmem._utils.plain_yaml import read_yaml
from pyro_vmem.app import Experiment
from pyro_vmem.app.experiment import MODELS
from pyro_vmem.config.arguments import checked
from pyro_vmem.data import Episode, FewShotDataset

__all__ = ["CONFIGS", "Recipe", "model_name", "read", "tables"]

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Recipe:
    """A table: what is trained for it, and what is evaluated.

    Attributes:
        experiment: What is trained, on what, and how.
        title: What the table shows.
        protocol: A protocol of `pyro_vmem.data`, or "recall"; by default, what the experiment's `data` names.
        models: What is trained and evaluated: values of the experiment's `model`.
        run: The table whose trained model is evaluated, if this one trains none of its own.
        packaged: The model of the package that was made of this table's, which serves where its run is not there.
        views: In how many ways the address guide looks at images once it is trained; see `pyro_vmem.EncoderGuide`.
        n_classes: Classes in memory; of "recall", slots.
        shots: Items in memory.
        per_class: Whether `shots` counts the items of one class, instead of all.
        methods: See `pyro_vmem.diagnostics.estimate_evidence`; sums over more slots than samples are left out.
        num_samples: Decoder passes per target.
        num_targets: Targets per cell.
        eval_seed: Seeds the evaluated episodes and the samples.
    """

    experiment: Experiment
    title: str
    protocol: str = ""
    models: list[str] = field(default_factory=lambda: ["vma"])
    run: str | None = None
    packaged: str | None = None
    views: int = 1
    n_classes: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    shots: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 10, 19])
    per_class: bool = False
    methods: list[str] = field(default_factory=lambda: ["sampled", "exact-address"])
    num_samples: int = 1000
    num_targets: int = 1000
    eval_seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "protocol", self.protocol or self.experiment.data)

    def cells(self) -> list[tuple[int, int, str]]:
        """Classes, items in memory and method of each cell."""
        pairs = [(c, t * c if self.per_class else t) for t in self.shots for c in self.n_classes]
        return [
            (c, t, method)
            for method in self.methods
            for c, t in pairs
            if method != "exact-address" or t <= self.num_samples
        ]

    def test_episodes(self, test: FewShotDataset, n_classes: int, shots: int, num_targets: int) -> Dataset[Episode]:
        """The evaluation episodes of a cell: as many as it takes for the targets."""
        if self.protocol == "recall":
            each = min(shots, 64)
            return _Counted(data.RecallSampler(test, shots, each, seed=self.eval_seed), -(-num_targets // each))
        episodes = data.protocol(self.protocol).episodes(test, n_classes, shots, seed=self.eval_seed)
        each = len(episodes[0].x)
        count = min(-(-num_targets // each), len(episodes)) if each == 1 else -(-num_targets // each)
        return data.protocol(self.protocol).episodes(test, n_classes, shots, seed=self.eval_seed, num_episodes=count)

    def trained(self) -> Experiment:
        """The experiment whose model is evaluated: this one's, or that of `run`."""
        return self.experiment if self.run is None else read(self.run).experiment

    def written_out(self) -> dict[str, Any]:
        """All of it as plain data, with all settings."""
        return dataclasses.asdict(self) | {"experiment": dataclasses.asdict(self.experiment) | {"notes": {}}}


def tables() -> list[str]:
    """The names of the recipes that there are."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read(name: str) -> Recipe:
    """The recipe of a table.

    Raises:
        ValueError: If there is none of that name, or it does not hold the settings of an experiment.
    """
    if name not in tables():
        raise ValueError(f"table: expected one of {', '.join(tables())}, got {name!r}.")
    values = read_yaml((CONFIGS / f"{name}.yaml").read_text())
    experiment = Experiment(**checked(Experiment, values, name))
    return Recipe(dataclasses.replace(experiment, notes={}), **experiment.notes)


def model_name(vma: pv.VMA) -> str:
    """The value of an experiment's `model` that stands for a model."""
    return next(name for name, cls in MODELS.items() if type(vma) is cls)


class _Counted(Dataset[Episode]):
    """The first episodes of an endless sampler."""

    def __init__(self, episodes: Dataset[Episode], count: int) -> None:
        self.episodes, self.count = episodes, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Episode:
        return self.episodes[index]
