"""A sigmoid belief network with two binary layers on binarised digits, by VIMCO with more and more samples.

All runs have the same steps. Each model is scored on test digits by the bound of the K that it was trained with, and by
that of as many samples for all. Seconds are of processor time.

    python -m benchmarks.belief_network
    python -m benchmarks.belief_network --json --steps 50000 --layer 200
"""

from __future__ import annotations

import time
from typing import Any

import pyro
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_vmem as pv
from benchmarks import command
from benchmarks.examples import SigmoidBelief
from pyro_vmem.infer import VIMCO_ELBO


@torch.no_grad()
def bound(belief: SigmoidBelief, x: Tensor, num_particles: int) -> Tensor:
    """The multi-sample bound of each image in nats."""
    elbo = VIMCO_ELBO(num_particles, max_plate_nesting=1)
    return torch.cat([elbo.terms(belief.model, belief.guide, part).bound for part in x.split(50)])


def main(
    samples: list[int] | None = None,
    steps: int = 1000,
    batch: int = 24,
    layer: int = 64,
    lr: float = 3e-3,
    test: int = 1000,
    common: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains a network for each K.

    Args:
        samples: The numbers K; by default 2, 5, 10 and 50.
        steps: Training steps of each.
        batch: Images in a step.
        layer: The latents of each layer.
        lr: The learning rate of Adam; it falls to zero as a straight line.
        test: How many test images are scored.
        common: The samples of the bound that all are compared by.
        seed: Of weights, minibatches and draws.
    """
    train, held_out = (pv.data.mnist(train=kind).images.flatten(1).float() for kind in (True, False))
    train, held_out = train / train.max(), held_out / held_out.max()
    rows = []
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        for count in samples or [2, 5, 10, 50]:
            torch.manual_seed(seed)
            belief, elbo = SigmoidBelief(train.shape[1], layer, layer), VIMCO_ELBO(count, max_plate_nesting=1)
            optimizer, start = torch.optim.Adam(belief.parameters(), lr=lr), time.process_time()
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
            scored = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))[:test]]
            for _ in range(steps):
                x = train[torch.randint(len(train), (batch,))]
                optimizer.zero_grad()
                (elbo.differentiable_loss(belief.model, belief.guide, x) / batch).backward()
                optimizer.step()
                schedule.step()
            seconds = time.process_time() - start
            own, same = bound(belief, scored, count), bound(belief, scored, common)
            row = {
                "samples": count,
                "seconds": round(seconds),
                "bound": float(own.mean()),
                "common": float(same.mean()),
            }
            row |= {"standard_error": float(own.std() / len(own) ** 0.5), "seconds": round(seconds)}
            rows.append(row)
    settings = {"steps": steps, "batch": batch, "layer": layer, "test": test, "common_samples": common, "seed": seed}
    return {**settings, "torch": torch.__version__, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """The bounds by the number of samples."""
    table = Table("K", "test bound of K samples", f"of {result['common_samples']} samples", "seconds")
    for row in result["rows"]:
        own = f"{row['bound']:.2f} ± {row['standard_error']:.2f}"
        table.add_row(str(row["samples"]), own, f"{row['common']:.2f}", str(row["seconds"]))
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
