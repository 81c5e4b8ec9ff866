"""The same model on a GPU: the losses and gradients of the CPU, and the time of a step in float32 and in bfloat16.

Latents are drawn once, on the CPU, and used on both, so that losses can be compared; steps are those of `fit`, whose
episodes are made on the GPU. Without a GPU it says so, and its exit code is 2.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --batch [256] --json
"""

from __future__ import annotations

import itertools
import statistics
import sys
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.replay_messenger import ReplayMessenger
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem.data import Episode, EpisodeSampler
from pyro_vmem.train.distributed import own_device


def loss_and_gradient(vma: pv.VMA, episode: Episode, latents: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The bound of each target and the gradient of the loss, with given latents, on the CPU."""
    device, trace = next(vma.parameters()).device, poutine.Trace()
    for name, value in latents.items():
        trace.add_node(name, name=name, type="sample", is_observed=False, value=value.to(device), infer={})
    episode, elbo = episode.to(device), pv.infer.VIMCO_ELBO(4, max_plate_nesting=1)
    with pyro.get_param_store().scope(), ReplayMessenger(trace=trace):
        terms = elbo.terms(vma.model, vma.guide, vma.encode(episode.memory), episode.x)
        gradients = torch.autograd.grad(terms.loss, list(vma.parameters()))
    return terms.bound.cpu(), torch.cat([g.flatten() for g in gradients]).cpu()


def latents_of(vma: pv.VMA, episode: Episode) -> dict[str, Tensor]:
    """Four particles of the guide."""
    with pyro.get_param_store().scope(), torch.no_grad(), pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(vma.guide).get_trace(episode.memory, episode.x)
    return {name: trace.nodes[name]["value"] for name in "az"}


def step_seconds(device: torch.device, episodes: EpisodeSampler, width: int, steps: int, precision: Any) -> float:
    """The median time of a step of `fit`, the making of its episode there included."""
    episodes = EpisodeSampler(episodes.dataset, episodes.n_way, episodes.k_shot, episodes.n_query, device=device)
    vma = pv.VMA.for_images(episodes.dataset.image_shape, width=width)
    settings: dict[str, Any] = {"validate_every": 1, "precision": precision, "progress": False}
    rows = pv.fit(vma, episodes, steps=steps + 3, device=device, **settings).history[2:]
    return statistics.median(b["seconds"] - a["seconds"] for a, b in itertools.pairwise(rows))


def main(
    device: str = "cuda", batch: list[int] | None = None, width: int = 32, steps: int = 30, seed: int = 0
) -> dict[str, Any]:
    """Compares and times.

    Args:
        device: The GPU.
        batch: Numbers of targets per step, multiples of 16, with a memory of 64 slots, or a quarter as many if that is
            more; by default 64 and 1,024.
        width: The channels of the convolutions at half resolution.
        steps: Timed steps in each precision.
        seed: Seeds weights, episodes and samples.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.stderr.write("device: no GPU is here that torch can use. Run this benchmark where there is one.\n")
        raise SystemExit(2)
    where = own_device(device)
    return {"torch": torch.__version__, "rows": [of_size(where, n, width, steps, seed) for n in batch or [64, 1024]]}


def of_size(where: torch.device, batch: int, width: int, steps: int, seed: int) -> dict[str, Any]:
    """The row of one number of targets."""
    sizes = {"n_way": max(16, batch // 16), "k_shot": 4, "n_query": min(16, batch // 16)}
    episodes = EpisodeSampler(pv.data.glyphs(), **sizes, seed=seed)
    torch.manual_seed(seed)
    vma = pv.VMA.for_images(episodes.dataset.image_shape, width=width)
    latents = latents_of(vma, episodes[0])
    bound, gradient = loss_and_gradient(vma, episodes[0], latents)
    there, moved = loss_and_gradient(vma.to(where), episodes[0], latents)
    torch.testing.assert_close(there, bound, rtol=1e-3, atol=0.1)
    row: dict[str, Any] = {
        "targets": len(episodes[0].x),
        "gpu": torch.cuda.get_device_name(where) if where.type == "cuda" else "none, a rehearsal on the CPU",
        "largest_difference_of_bound": float((bound - there).abs().max()),
        "relative_difference_of_gradient": float((gradient - moved).norm() / gradient.norm()),
    }
    for precision in ("float32", "bfloat16"):
        row[f"ms_a_step_{precision}"] = 1000 * step_seconds(where, episodes, width, steps, precision)
    row["speedup_bfloat16"] = row["ms_a_step_float32"] / row["ms_a_step_bfloat16"]
    return row


def show(result: dict[str, Any]) -> None:
    """A column for each number of targets."""
    table = Table("", *("" for _ in result["rows"]))
    for name in result["rows"][0]:
        values = [row[name] for row in result["rows"]]
        table.add_row(name.replace("_", " "), *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
