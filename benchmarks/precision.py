"""What half precision and going backward through one particle of four cost in quality, at equal steps and equal time.

The same training in float32 with the gradient of all particles, which the others are compared with; in bfloat16; in
bfloat16 with the gradient of one particle a target; and that with as many steps as fit in the time of the first, by the
processor time of steps taken in turn. Weights and episodes are the same for a seed, and seeds differ in all. All are
validated in float32 on held-out letters; of the differences, mean and standard error over seeds count.

    python -m benchmarks.precision
    python -m benchmarks.precision --pairs 8 --steps 1000 --width 32 --json
"""

from __future__ import annotations

import statistics
import sys
from typing import Any, Literal, NamedTuple

import pyro
import torch
from rich.console import Console
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from benchmarks.timing import clock


class Way(NamedTuple):
    """A way to train."""

    precision: Literal["bfloat16", "float32"]
    backward: int | None


WAYS = {
    "float32": Way("float32", None),
    "bfloat16": Way("bfloat16", None),
    "bfloat16_one": Way("bfloat16", 1),
    "bfloat16_one_at_equal_time": Way("bfloat16", 1),
}
WORDS = {
    "bfloat16": "in bfloat16",
    "bfloat16_one": "in bfloat16, backward through one of four, after as many steps",
    "bfloat16_one_at_equal_time": "the same after as much time",
}


def begin(train: pv.data.FewShotDataset, width: int, seed: int) -> tuple[pv.VMA, pv.data.EpisodeSampler]:
    """A new model and its episodes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vma = pv.VMA.for_images(train.image_shape, latent_dim=16, num_features=64, width=width)
    return vma, pv.data.EpisodeSampler(train, n_way=16, k_shot=1, n_query=4, seed=seed)


def seconds_a_step(train: pv.data.FewShotDataset, width: int, repeats: int) -> dict[str, float]:
    """The processor time of a step of each way, taken in turn; medians."""
    vma, episodes = begin(train, width, 0)
    episode = episodes[0]
    taken = {
        name: pv.Trainer(
            vma,
            pv.infer.VIMCO_ELBO(4, max_plate_nesting=1, backward=way.backward),
            pv.TrainingConfig(lr=1e-4, kl_schedule=pv.train.Constant(), precision=way.precision),
        )
        for name, way in WAYS.items()
    }
    now = clock(torch.device("cpu"))
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats + 1):
        for name, steps in taken.items():
            start = now()
            steps.step(episode)
            times[name].append(now() - start)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main(pairs: int = 5, steps: int = 150, width: int = 16, episodes: int = 8, repeats: int = 20) -> dict[str, Any]:
    """Trains and compares.

    Args:
        pairs: How many trainings in each way.
        steps: Steps of each, but where the time is to be equal.
        width: The channels of the convolutions at half resolution.
        episodes: Episodes of validation.
        repeats: Steps of each way that are timed.
    """
    train, test = pv.data.glyphs().split(seed=0)
    held_out = pv.data.EpisodeSampler(test, n_way=16, k_shot=1, n_query=4, seed=0)
    with pyro.get_param_store().scope():
        seconds = seconds_a_step(train, width, repeats)
    counts = dict.fromkeys(WAYS, steps)
    counts["bfloat16_one_at_equal_time"] = max(1, round(steps * seconds["float32"] / seconds["bfloat16_one"]))
    rows: list[dict[str, Any]] = []
    for seed in tqdm(range(pairs), desc="seeds", file=sys.stderr):
        row: dict[str, Any] = {"seed": seed}
        for name, (precision, backward) in WAYS.items():
            vma, sampler = begin(train, width, seed)
            elbo = pv.infer.VIMCO_ELBO(4, max_plate_nesting=1, backward=backward)
            pv.fit(vma, sampler, elbo, steps=counts[name], seed=seed, precision=precision, progress=False)
            found = pv.validate(vma, held_out, num_episodes=episodes)
            row |= {f"{key}_{name}": found[key] for key in ("bound", "hit_rate")}
        rows.append(row | {f"difference_{name}": row[f"bound_{name}"] - row["bound_float32"] for name in WORDS})
    result: dict[str, Any] = {"steps": counts, "seconds_a_step": seconds}
    for name in WORDS:
        differences = [row[f"difference_{name}"] for row in rows]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if pairs > 1 else None
        result |= {f"difference_{name}": statistics.mean(differences), f"difference_{name}_se": error}
    return result | {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}


def show(result: dict[str, Any]) -> None:
    """The differences in sentences."""
    Console().print(
        f"The bound against that of float32 after {result['steps']['float32']} steps, nats per image, mean and "
        f"standard error of {len(result['rows'])} trainings:"
    )
    for name, words in WORDS.items():
        error = result[f"difference_{name}_se"]
        Console().print(
            f"  {result[f'difference_{name}']:+.2f}{'' if error is None else f' ± {error:.2f}'} {words} "
            f"({result['steps'][name]} steps)"
        )


if __name__ == "__main__":
    command(main, show)
