"""Where the time of a training step goes, measured by `torch.profiler`.

The library marks "encode memory", "encode x" and "decode" with `torch.profiler.record_function`; this script marks the
rest of a step. It prints the time per step of each stage, and the operations that take longest.

    python -m benchmarks.profile_step --targets 64 --slots 64
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function

import pyro_vmem as pv
from benchmarks import command

STAGES = ("encode memory", "objective", "encode x", "decode", "backward", "optimizer")


def main(targets: int = 64, slots: int = 64, size: int = 28, width: int = 32, steps: int = 5) -> dict[str, Any]:
    """Profiles steps of VIMCO with four particles on random images of `size` pixels."""
    vma, elbo = pv.VMA.for_images((1, size, size), width=width), pv.infer.VIMCO_ELBO(4, max_plate_nesting=1)
    memory = pv.Memory((torch.rand(slots, 1, size, size) < 0.1).float())
    x = (torch.rand(targets, 1, size, size) < 0.1).float()
    optimizer = torch.optim.Adam(vma.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        encoded = vma.encode(memory)
        with record_function("objective"):  # it contains "encode x" and "decode"
            loss = elbo.differentiable_loss(vma.model, vma.guide, encoded, x)
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()

    with pyro.get_param_store().scope():
        for _ in range(2):  # the first steps allocate memory and start threads
            step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(steps):
                step()
    ms = {event.key: event.cpu_time_total / steps / 1e3 for event in found.key_averages()}
    rows = [{"stage": name, "ms_per_step": ms[name]} for name in STAGES]
    return {"rows": rows, "table": found.key_averages().table("self_cpu_time_total", 15)}


def show(result: dict[str, Any]) -> None:
    """The stages, then the operations."""
    for row in result["rows"]:
        Console().print(f"{row['stage']:<14} {row['ms_per_step']:8.2f} ms")
    Console(width=240).print(result["table"], highlight=False)


if __name__ == "__main__":
    command(main, show)
