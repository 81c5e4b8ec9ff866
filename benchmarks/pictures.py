"""Pictures of the paper, drawn by a table's model: lookups among unseen characters, and new examples of each.

python -m benchmarks.pictures lookup
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import pyro_vmem as pv
from benchmarks import command
from benchmarks.recipes import Recipe, read
from benchmarks.reproduce import trained
from pyro_vmem import plots
from pyro_vmem._files import write_atomically
from pyro_vmem.data import Episode, EpisodeSampler


def lookup_histogram(vma: pv.VMA, recipe: Recipe, seed: int) -> Figure:
    """The mass of q(a | x, M) over a memory of eight classes with ten examples each, and the templates on top."""
    episode = EpisodeSampler(recipe.datasets()[2], n_way=8, k_shot=10, n_query=1, seed=seed)[0]
    memory, probs = looked_up(vma, episode)
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.2, 1])
    plots.address_heat_map(left.subplots(), probs, memory.labels[: probs.shape[-1]], episode.labels)
    plots.lookups(right, episode.x, memory.templates, probs, memory.labels, episode.labels, max_slots=6)
    return figure


def one_shot(vma: pv.VMA, recipe: Recipe, seed: int) -> Figure:
    """Twelve unseen characters, ten new examples of each."""
    memory = EpisodeSampler(recipe.datasets()[2], n_way=12, k_shot=1, n_query=1, seed=seed)[0].memory
    samples = torch.stack([vma.generate(memory, 10, address=slot) for slot in range(memory.num_slots)])
    figure = Figure(figsize=(6.5, 6.5))
    return plots.one_shot_generations(figure, memory.templates, samples)


PICTURES: dict[str, Callable[[pv.VMA, Recipe, int], Figure]] = {"histogram": lookup_histogram, "one-shot": one_shot}


@torch.no_grad()
def looked_up(vma: pv.VMA, episode: Episode) -> tuple[pv.Memory, torch.Tensor]:
    """The memory that was given, and the guide's probabilities of its slots."""
    memory = vma.encode(episode.memory)
    return episode.memory, vma.address_guide(memory, vma.encode_x(episode.x)).probs[:, : episode.memory.num_slots]


def main(
    table: str, results: str = "results", run: str | None = None, out: str = "docs/results", seed: int = 0
) -> dict[str, Any]:
    """Draws them.

    Args:
        table: The table whose model it is.
        results: The folder of results.
        run: The folder of the run; by default the weights in the folder of results.
        out: The folder of the pictures.
        seed: Seeds episodes and draws.
    """
    recipe = read(table)
    vma = trained(Path(run or "no/such/run"), Path(results, "checkpoints", f"{recipe.run or table}-vma"))
    paths = []
    with torch.random.fork_rng():
        for name, draw in PICTURES.items():
            torch.manual_seed(seed)
            paths.append(Path(out, f"{table}-{name}.png"))
            with write_atomically(paths[-1]) as aside:
                draw(vma, recipe, seed).savefig(aside, format="png", dpi=130)
    return {"pictures": [str(path) for path in paths]}


def show(result: dict[str, Any]) -> None:
    """Where they are."""
    sys.stdout.write("\n".join(result["pictures"]) + "\n")


if __name__ == "__main__":
    command(main, show)
