"""The same model trained by every objective, for the same time.

Prints the multi-sample bound and the information gain KL(a) on held-out scripts. The model, the
episodes and the optimizer are the same. There are four decoder passes per target, except for `enumerate`, which
decodes every slot, and `truncated`, which enumerates the four most probable. What a step of each takes is measured
first, in turn and in small pieces, so that a machine whose speed drifts is fair to all; each then gets the steps that
fill the time.

    python -m benchmarks.objectives
    python -m benchmarks.objectives --seconds 120 --json
    python -m benchmarks.objectives --data omniglot
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem.infer import IWAE_ELBO, RWS_ELBO, VIMCO_ELBO, EnumGuard, RaoBlackwell_ELBO, Reinforce_ELBO

WAYS, SHOTS = 16, 2

OBJECTIVES: dict[str, ELBO] = {
    "vimco": VIMCO_ELBO(4, max_plate_nesting=1),
    "vimco, dreg": VIMCO_ELBO(4, dreg=True, max_plate_nesting=1),
    "rws": RWS_ELBO(4, max_plate_nesting=1),
    "rws, pathwise": RWS_ELBO(4, pathwise=True, max_plate_nesting=1),
    "iwae": IWAE_ELBO(4, max_plate_nesting=1),
    "reinforce": Reinforce_ELBO(4, max_plate_nesting=1),
    "rao-blackwell": RaoBlackwell_ELBO(3, max_plate_nesting=1),
    "enumerate": EnumGuard(max_plate_nesting=1),
    "truncated": EnumGuard(max_plate_nesting=1),
}


def build(name: str, image_shape: tuple[int, ...], seed: int) -> pv.VMA:
    """The model, the same for all; only `truncated` looks at fewer slots."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vma = pv.VMA.for_images(image_shape, latent_dim=16, num_features=64, width=16)
    if name == "truncated":
        vma.address_guide = pv.TruncatedGuide(vma.address_guide, k=4)
    return vma


def main(
    seconds: float = 40.0,
    episodes: int = 20,
    seed: int = 0,
    data: Literal["letters", "omniglot"] = "letters",
    timed_steps: int = 5,
) -> dict[str, Any]:
    """Trains by each objective in turn.

    Args:
        seconds: Training time of each.
        episodes: Validation episodes.
        seed: Seeds the split, the weights, the episodes and the samples.
        data: What to train on; Omniglot's background set needs `PYRO_VMEM_DATA`.
        timed_steps: Steps of each of five pieces that a step's time is measured by.
    """
    whole = pv.data.glyphs() if data == "letters" else pv.data.omniglot(subset="background")
    train, test = whole.split(seed=seed)
    sampler = pv.data.EpisodeSampler(train, WAYS, SHOTS, n_query=4, seed=seed, rotate=True)
    held_out = pv.data.EpisodeSampler(test, WAYS, SHOTS, n_query=4, seed=seed + 1)

    def fit(name: str, vma: pv.VMA, steps: int) -> pv.FitResult:
        return pv.fit(vma, sampler, OBJECTIVES[name], steps=steps, seed=seed, validate_every=10**9, progress=False)

    times: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for _ in tqdm(range(5), desc="timing", file=sys.stderr):
        for name in OBJECTIVES:
            vma = build(name, train.image_shape, seed)
            fit(name, vma, 1)
            start = time.perf_counter()
            fit(name, vma, timed_steps)
            times[name].append((time.perf_counter() - start) / timed_steps)
    rows = []
    for name in tqdm(OBJECTIVES, desc="objectives", file=sys.stderr):
        step = statistics.median(times[name])
        vma = build(name, train.image_shape, seed)
        result = fit(name, vma, max(1, round(seconds / step)))
        found = pv.validate(vma, held_out, num_episodes=episodes, num_particles=16)
        rows.append({"objective": name, "seconds_a_step": step, "steps": result.steps, **found})
    return {
        "data": data,
        "seconds": seconds,
        "seed": seed,
        "kl_a_ceiling": math.log(WAYS * SHOTS),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """The results as a table."""
    title = f"{result['seconds']:.0f} s each, on held-out scripts; KL(a) is at most {result['kl_a_ceiling']:.2f}"
    table = Table("objective", "steps", "bound, K = 16", "KL(a)", "KL(z)", "accuracy (hit rate)", title=title)
    for row in result["rows"]:
        values = (f"{row['bound']:.1f}", f"{row['kl_a']:.2f}", f"{row['kl_z']:.1f}", f"{row['hit_rate']:.2f}")
        table.add_row(row["objective"], str(row["steps"]), *values)
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
