"""Whether half precision costs quality: the same training in bfloat16 and in float32, and the difference of the bounds.

Weights, episodes and draws are the same within a pair, and pairs differ in all of them. Both are validated in float32
on letters that were not trained on; of the differences, the mean and its standard error over pairs count.

    python -m benchmarks.precision
    python -m benchmarks.precision --pairs 8 --steps 1000 --width 32 --json
"""

from __future__ import annotations

import statistics
import sys
from typing import Any, Literal

import torch
from rich.console import Console
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command

PRECISIONS: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")


def trained(
    precision: Literal["bfloat16", "float32"], train: pv.data.FewShotDataset, steps: int, width: int, seed: int
) -> pv.VMA:
    """A model after some steps."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vma = pv.VMA.for_images(train.image_shape, latent_dim=16, num_features=64, width=width)
    episodes = pv.data.EpisodeSampler(train, n_way=16, k_shot=1, n_query=2, seed=seed)
    pv.fit(vma, episodes, steps=steps, seed=seed, precision=precision, progress=False)
    return vma


def main(pairs: int = 4, steps: int = 80, width: int = 8, episodes: int = 8) -> dict[str, Any]:
    """Trains and compares.

    Args:
        pairs: How many trainings in each precision.
        steps: Steps of each.
        width: The channels of the convolutions at half resolution.
        episodes: Episodes of validation.
    """
    train, test = pv.data.glyphs().split(seed=0)
    held_out = pv.data.EpisodeSampler(test, n_way=16, k_shot=1, n_query=4, seed=0)
    rows: list[dict[str, Any]] = []
    for seed in tqdm(range(pairs), desc="pairs", file=sys.stderr):
        row: dict[str, Any] = {"seed": seed}
        for precision in PRECISIONS:
            found = pv.validate(trained(precision, train, steps, width, seed), held_out, num_episodes=episodes)
            row |= {f"{name}_{precision}": found[name] for name in ("bound", "hit_rate")}
        rows.append(row | {"difference": row["bound_bfloat16"] - row["bound_float32"]})
    differences = [row["difference"] for row in rows]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if pairs > 1 else None
    return {
        "steps": steps,
        "difference": statistics.mean(differences),
        "difference_se": error,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """The difference in a sentence."""
    error = "" if result["difference_se"] is None else f" ± {result['difference_se']:.2f}"
    Console().print(
        f"After {result['steps']} steps the bound is {result['difference']:+.2f}{error} nats an image in bfloat16 "
        f"against float32 (mean and standard error of {len(result['rows'])} pairs)."
    )


if __name__ == "__main__":
    command(main, show)
