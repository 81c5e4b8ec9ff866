"""What Pyro costs: a VIMCO step through `SVI`'s machinery over the same step written by hand in PyTorch.

The same model, minibatch and particles; the two in turn, many times; the median of the ratios counts, because machines
drift. Both losses are checked to agree under the same random numbers before anything is timed.

    python -m benchmarks.step
    python -m benchmarks.step --batch 256 --slots 32 --json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from rich.console import Console
from torch import Tensor

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem.infer.terms import log_mean_exp
from pyro_vmem.infer.vimco import leave_one_out
from pyro_vmem.precision import autocast

PARTICLES = 4


def by_hand(vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
    """The loss of VIMCO with four particles, in plain PyTorch."""
    encoded, target = vma.encode(memory), vma.encode_x(x)
    q_a, p_a = vma.address_guide(encoded, target), vma.address_prior(encoded)
    q_a = q_a.expand([PARTICLES, len(x)])  # drawn in the order that Pyro draws in, so that losses can be compared
    a = q_a.sample()
    template = encoded.read(a)
    q_z = vma.latent_guide(target, template)
    z = q_z.rsample()
    log_q_a = q_a.log_prob(a)
    log_weights = p_a.log_prob(a) + vma.latent_prior(template).log_prob(z) + vma.likelihood(z, template).log_prob(x)
    log_weights = log_weights - log_q_a - q_z.log_prob(z)
    bound = log_mean_exp(log_weights)
    signal = (bound - leave_one_out(log_weights, "arithmetic")).detach()
    return -(bound + (signal * log_q_a).sum(0)).sum()


def main(batch: int = 64, slots: int = 64, width: int = 32, repeats: int = 15, seed: int = 0) -> dict[str, Any]:
    """Times both in turn.

    Args:
        batch: Targets a step.
        slots: Slots of the shared memory.
        width: The channels of the convolutions at half resolution.
        repeats: Pairs of timed steps, after two that are not counted.
        seed: Seeds weights, images and samples.
    """
    torch.manual_seed(seed)
    vma = pv.VMA.for_images((1, 28, 28), width=width)
    memory = pv.Memory((torch.rand(slots, 1, 28, 28) < 0.1).float())
    x = (torch.rand(batch, 1, 28, 28) < 0.1).float()
    elbo = pv.infer.VIMCO_ELBO(PARTICLES, max_plate_nesting=1)
    optimizer = torch.optim.Adam(vma.parameters(), lr=1e-4)

    def through_pyro(vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
        return elbo.differentiable_loss(vma.model, vma.guide, vma.encode(memory), x)

    def seconds(loss: Callable[[pv.VMA, pv.Memory, Tensor], Tensor]) -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with autocast(x.device, "auto"):
            value = loss(vma, memory, x)
        value.backward()
        optimizer.step()
        return time.perf_counter() - start

    def gradient(loss: Callable[[pv.VMA, pv.Memory, Tensor], Tensor]) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(vma, memory, x), list(vma.parameters()))])

    with pyro.get_param_store().scope():
        torch.testing.assert_close(gradient(through_pyro), gradient(by_hand), rtol=1e-3, atol=1e-3)
        for _ in range(2):
            seconds(through_pyro), seconds(by_hand)
        pairs = [(seconds(through_pyro), seconds(by_hand)) for _ in range(repeats)]
    ratios = sorted(ours / plain for ours, plain in pairs)
    row = {
        "batch": batch,
        "slots": slots,
        "particles": PARTICLES,
        "ratio_to_handwritten": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "targets_per_second": batch / statistics.median(ours for ours, _ in pairs),
    }
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": [row]}


def show(result: dict[str, Any]) -> None:
    """The ratio in a sentence."""
    (row,) = result["rows"]
    Console().print(
        f"A VIMCO step through Pyro takes {row['ratio_to_handwritten']:.2f} times the same step by hand "
        f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f}; {row['targets_per_second']:.0f} targets a second)."
    )


if __name__ == "__main__":
    command(main, show)
