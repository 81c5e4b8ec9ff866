"""The same model trained on letters by every objective, for the same wall time.

Prints the multi-sample bound and the information gain KL(a) on scripts that were not trained on. The model, the
episodes and the optimizer are the same; decodes a target are four, but for `enumerate`, which decodes every slot, and
`truncated`, which enumerates the four most probable.

    python -m benchmarks.objectives
    python -m benchmarks.objectives --seconds 120 --json
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem.infer import Objective

WAYS, SHOTS = 16, 2


def main(seconds: float = 40.0, episodes: int = 20, seed: int = 0) -> dict[str, Any]:
    """Trains by each objective in turn.

    Args:
        seconds: Training time of each.
        episodes: Validation episodes.
        seed: Seeds the split, the weights, the episodes and the samples.
    """
    train, test = pv.data.glyphs().split(seed=seed)
    sampler = pv.data.EpisodeSampler(train, WAYS, SHOTS, n_query=4, seed=seed, rotate=True)
    held_out = pv.data.EpisodeSampler(test, WAYS, SHOTS, n_query=4, seed=seed + 1)
    rows = []
    for name in [*(name for name in get_args(Objective) if name != "auto"), "truncated"]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            vma = pv.VMA.for_images(train.image_shape, latent_dim=16, num_features=64, width=16)
        if name == "truncated":
            vma.address_guide = pv.TruncatedGuide(vma.address_guide, k=4)
        objective = "enumerate" if name == "truncated" else name
        result = pv.fit(vma, sampler, objective, minutes=seconds / 60, seed=seed)
        found = pv.validate(vma, held_out, num_episodes=episodes, num_particles=16)
        rows.append({"objective": name, "steps": result.steps, **found})
    ceiling = math.log(WAYS * SHOTS)
    return {"seconds": seconds, "seed": seed, "kl_a_ceiling": ceiling, "torch": torch.__version__, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """The results as a table."""
    title = f"{result['seconds']:.0f} s each, on scripts not trained on; KL(a) is at most {result['kl_a_ceiling']:.2f}"
    table = Table("objective", "steps", "bound, K = 16", "KL(a)", "KL(z)", "hit rate", title=title)
    for row in result["rows"]:
        values = (f"{row['bound']:.1f}", f"{row['kl_a']:.2f}", f"{row['kl_z']:.1f}", f"{row['hit_rate']:.2f}")
        table.add_row(row["objective"], str(row["steps"]), *values)
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
