"""Attend, infer, repeat (Eslami et al., 2016): learns to count the digits on a canvas, by any objective.

A canvas holds none, one or two digits, apart from each other. How many, nobody tells.
A run that is started again with the same file goes on where it was; seconds are of processor time.

    python -m benchmarks.air --minutes 120 --file air.pt
    python -m benchmarks.air --objective TraceGraph_ELBO --minutes 120 --file other.pt --json
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import RenyiELBO, TraceGraph_ELBO
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_vmem as pv
from benchmarks import command
from benchmarks.examples import AIR
from pyro_vmem.infer import RWS_ELBO, VIMCO_ELBO, Reinforce_ELBO

OBJECTIVES = {
    "VIMCO_ELBO": lambda k: VIMCO_ELBO(k, max_plate_nesting=1),
    "Reinforce_ELBO": lambda k: Reinforce_ELBO(k, max_plate_nesting=1),
    "RWS_ELBO": lambda k: RWS_ELBO(k, max_plate_nesting=1),
    "RenyiELBO": lambda k: RenyiELBO(0.0, k, max_plate_nesting=1, vectorize_particles=True),
    "TraceGraph_ELBO": lambda k: TraceGraph_ELBO(k, max_plate_nesting=1, vectorize_particles=True),
}


def digits(train: bool, size: int) -> Tensor:
    """Digits of that size: MNIST where `PYRO_VMEM_DATA` has it, else the letters that the package brings."""
    if "PYRO_VMEM_DATA" in os.environ:
        images = pv.data.mnist(train=train).images
    else:
        images = pv.data.glyphs().split(seed=0)[0 if train else 1].images
    return F.interpolate(images.float() / images.max(), size, mode="area").squeeze(1)


def canvases(images: Tensor, side: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Canvases `(count, side, side)` and how many digits each has, `(count,)`: none, one or two, as often."""
    number, size = torch.randint(3, (count,), generator=generator), images.shape[-1]
    x, places = torch.zeros(count, side, side), torch.zeros(2, count, 2, dtype=torch.long)
    # A seventh of a digit is its margin on each side.
    while (over := ((places[0] - places[1]).abs() < 5 * size / 7).all(-1)).any():
        places[:, over] = torch.randint(side - size + 1, (2, int(over.sum()), 2), generator=generator)
    within = torch.arange(size)
    for i in range(2):
        rows = (number > i).nonzero().squeeze(-1)
        of_row, of_column = (places[i, rows, axis, None] + within for axis in range(2))
        drawn = images[torch.randint(len(images), (len(rows),), generator=generator)]
        x[rows[:, None, None], of_row[:, :, None], of_column[:, None, :]] += drawn
    return x, number


@torch.no_grad()
def held_out_figures(air: AIR, x: Tensor, number: Tensor) -> dict[str, float]:
    """How often the guide counts right, over all canvases and for each number, and the multi-sample bound."""
    counted = pyro.poutine.trace(air.guide).get_trace(x)
    found = sum(counted.nodes[f"here_{t}"]["value"] for t in range(air.steps))
    right = (found == number).float()
    bound = -VIMCO_ELBO(10, max_plate_nesting=1).loss(air.model, air.guide, x[:500]) / len(x[:500])
    of_each = {f"accuracy_{n}": float(right[number == n].mean()) for n in range(3)}
    return {"accuracy": float(right.mean()), **of_each, "bound_10": bound}


def main(
    objective: str = "VIMCO_ELBO",
    num_particles: int = 5,
    minutes: float = 1.0,
    side: int = 20,
    digit: int = 9,
    hidden: int = 64,
    what: int = 8,
    noise: float = 0.2,
    presence: float = 0.01,
    batch: int = 32,
    lr: float = 1e-3,
    anneal: int = 2000,
    every: int = 500,
    test: int = 3000,
    seed: int = 0,
    file: str | None = None,
) -> dict[str, Any]:
    """Trains, and counts held-out canvases now and then.

    Args:
        objective: One of `VIMCO_ELBO`, `Reinforce_ELBO`, `RWS_ELBO`, `RenyiELBO`, `TraceGraph_ELBO`.
        num_particles: Its particles.
        minutes: Of processor time, in all runs of this file together.
        side: The rows and columns of a canvas.
        digit: Those of a digit.
        hidden: The width of the networks.
        what: The numbers that a digit's appearance is made of.
        noise: The standard deviation of a pixel. At 0.3, which suits digits of 28 pixels, the faintest of 9 pixels add
            less to the likelihood than an object costs, and the right posterior leaves them out.
        presence: The prior probability of one more object, when `anneal` is over.
        batch: Canvases in a step; each is new.
        lr: The learning rate of Adam; it falls to zero in the last fifth of the time.
        anneal: In how many steps the prior probability of one more object falls, from 1 - 1e-6 to `presence`.
        every: After how many steps held-out canvases are counted.
        test: How many those are.
        seed: Of weights, canvases and draws.
        file: Where to keep the run; nowhere by default.
    """
    path, budget = Path(file) if file else None, 60 * minutes
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "rows": []}
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(seed)
        air = AIR(side, digit, what=what, hidden=hidden, noise=noise)
        elbo = OBJECTIVES[objective](num_particles)
        optimizer = torch.optim.Adam(air.parameters(), lr=lr)
        images, generator = digits(True, digit), torch.Generator().manual_seed(seed)
        held_out = canvases(digits(False, digit), side, test, torch.Generator().manual_seed(10**6))
        if path is not None and path.exists():
            state = torch.load(path, weights_only=True)
            air.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"][0])
            generator.set_state(state["random"][1])
        start = time.process_time() - state["seconds"]
        while (spent := time.process_time() - start) < budget:
            # At first objects cannot be left out: they have to become of use before the model may go without.
            share = min(1.0, state["step"] / anneal)
            air.presence.fill_(torch.lerp(torch.tensor(14.0), torch.tensor(presence).logit(), share).sigmoid())
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 5 * (1 - spent / budget))
            x, _ = canvases(images, side, batch, generator)
            optimizer.zero_grad()
            elbo.loss_and_grads(air.model, air.guide, x)  # RenyiELBO has nothing else
            torch.nn.utils.clip_grad_norm_(air.parameters(), 200.0 * batch)
            optimizer.step()
            state["step"] += 1
            if state["step"] % every == 0 or time.process_time() - start >= budget:
                row = {
                    "step": state["step"],
                    "seconds": round(time.process_time() - start),
                    **held_out_figures(air, *held_out),
                }
                state["rows"].append(row)
                keep(state, air, optimizer, generator, time.process_time() - start, path)
    settings = {"objective": objective, "num_particles": num_particles, "batch": batch, "side": side, "digit": digit}
    settings |= {"noise": noise, "presence": presence, "lr": lr, "test": test}
    return {**settings, "minutes": minutes, "seed": seed, "torch": torch.__version__, "rows": state["rows"]}


def keep(state: dict[str, Any], air: AIR, optimizer: Any, generator: Any, seconds: float, path: Path | None) -> None:
    """Writes the run to its file, so that a kill at any moment leaves the old one or the new one."""
    state |= {"seconds": seconds, "model": air.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"random": (torch.get_rng_state(), generator.get_state())}
    if path is not None:
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


def show(result: dict[str, Any]) -> None:
    """How often the guide counts right, over time."""
    columns = list(result["rows"][0])
    table = Table(*columns, title=f"{result['objective']}, K = {result['num_particles']}")
    for row in result["rows"]:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
