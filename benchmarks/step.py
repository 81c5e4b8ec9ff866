"""What a training step costs, beside two others on the same network and sizes with the same losses.

The same step written by hand in PyTorch shows what Pyro costs. The step of an arrangement that is often met shows what
this one gains: each target has a memory of its own, whose templates are all encoded for it, a template that was sampled
is encoded again for guide, prior and decoder, and images lie with their channels apart, in float32, with Adam as it
comes. That is how the public re-implementation of the paper arranges its work. The losses
and gradients of all are checked to agree, under the same random numbers, before anything is timed. A fourth row is of
the same objective that goes backward through one particle of four: the same loss, and the gradient in expectation, at
fewer operations. Steps are timed in turn, with one thread by processor time, of which the work of others takes nothing;
medians of ratios count.

    python -m benchmarks.step
    python -m benchmarks.step --targets 64 --slots 64 --size 28 --json
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest.mock import patch

import pyro
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pyro_vmem as pv
from benchmarks import command
from benchmarks.timing import clock, matmul_rate
from pyro_vmem._utils.precision import autocast
from pyro_vmem.infer.elbo import log_mean_exp
from pyro_vmem.infer.vimco import leave_one_out
from pyro_vmem.memory import Template
from pyro_vmem.parts.layers import Doubling

PARTICLES = 4
ALL, FEW = "shared memory", f"shared memory, backward through 1 of {PARTICLES}"
CLIP = 10.0

Loss = Callable[[pv.VMA, pv.Memory, Tensor], Tensor]


def by_hand(vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
    """The loss of VIMCO with four particles, in plain PyTorch, with all that makes a step fast."""
    encoded, target = vma.encode(memory), vma.encode_x(x)
    q_a = vma.address_guide(encoded, target).expand([PARTICLES, len(x)])  # drawn as Pyro does, to compare the losses
    a = q_a.sample()
    template = encoded.read(a)
    q_z = vma.latent_guide(target, template)
    z = q_z.rsample()
    log_joint = vma.address_prior(encoded).log_prob(a) + vma.latent_prior(template).log_prob(z)
    return vimco(q_a.log_prob(a), log_joint + vma.likelihood(z, template).log_prob(x) - q_z.log_prob(z))


def per_target(vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
    """The same loss, where each target has a copy of the memory and nothing that was encoded is used twice."""
    copies = memory.templates.expand(len(x), *memory.templates.shape).contiguous()
    own = pv.Memory(copies, per_datapoint=True)
    encoded, target = vma.encode(own), vma.encode_x(x)
    q_a = vma.address_guide(encoded, target).expand([PARTICLES, len(x)])
    a = q_a.sample()
    raw = copies[torch.arange(len(x)), a]
    z = (q_z := vma.latent_guide(target, encode(vma, raw))).rsample()
    log_joint = vma.address_prior(encoded).log_prob(a) + vma.latent_prior(encode(vma, raw)).log_prob(z)
    return vimco(q_a.log_prob(a), log_joint + vma.likelihood(z, encode(vma, raw)).log_prob(x) - q_z.log_prob(z))


def encode(vma: pv.VMA, templates: Tensor) -> Template:
    """Templates with their features."""
    template: Template = vma.template_encoder(templates)
    return template


def vimco(log_q_a: Tensor, log_rest: Tensor) -> Tensor:
    """The loss, from the address's log-probability and the rest of the log-weights, both `(K, B)`."""
    log_weights = log_rest - log_q_a
    bound = log_mean_exp(log_weights)
    signal = (bound - leave_one_out(log_weights, "arithmetic")).detach()
    score = (signal * log_q_a).sum(0)
    return -(bound + score - score.detach()).sum()  # of the score terms, the gradient counts and not the value


@contextlib.contextmanager
def channels_apart(vma: pv.VMA) -> Iterator[None]:
    """Has the networks compute with images whose channels lie apart in memory, PyTorch's default."""

    def patches(images: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.pad(images, (0, images.shape[-1] % 2, 0, images.shape[-2] % 2)), 2)

    def as_images(x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[-3:])

    def doubling(self: Doubling, images: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv2d(images, self.weight, self.bias), 2)

    def apart(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.contiguous() for x in inputs)

    convolutions = [module for module in vma.modules() if isinstance(module, torch.nn.Conv2d)]
    handles = [module.register_forward_pre_hook(apart) for module in convolutions]
    with contextlib.ExitStack() as stack:
        for module in ("encoders", "decoders"):
            stack.enter_context(patch(f"pyro_vmem.parts.{module}.in_patches", patches))
            stack.enter_context(patch(f"pyro_vmem.parts.{module}.as_images", as_images))
        stack.enter_context(patch.object(Doubling, "forward", doubling))
        yield
    for handle in handles:
        handle.remove()


class Arrangement:
    """One way to make a step: the gradient, clipped, and Adam."""

    def __init__(
        self,
        vma: pv.VMA,
        episode: pv.data.Episode,
        loss: Loss | None = None,
        fused: bool = True,
        backward: int | None = None,
    ) -> None:
        self.vma, self.episode, self.loss = vma, episode, loss
        self.elbo = pv.infer.VIMCO_ELBO(PARTICLES, max_plate_nesting=1, backward=backward)
        self.trainers: dict[str, pv.Trainer] = {}
        self.optimizer = torch.optim.Adam(vma.parameters(), lr=1e-4, fused=fused or None)

    def take(self, precision: Literal["auto", "float32"]) -> None:
        """One step; the package's own is that of `pyro_vmem.fit`."""
        half = autocast(self.episode.x.device, precision)
        if self.loss is None:
            if precision not in self.trainers:
                config = pv.TrainingConfig(
                    lr=1e-4, clip_norm=CLIP, kl_schedule=pv.train.Constant(), precision=precision
                )
                self.trainers[precision] = pv.Trainer(self.vma, self.elbo, config)
            self.trainers[precision].step(self.episode)
            return
        self.optimizer.zero_grad(set_to_none=True)
        with half:
            loss = self.loss(self.vma, self.episode.memory, self.episode.x) / len(self.episode.x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vma.parameters(), CLIP, error_if_nonfinite=True)
        self.optimizer.step()

    def seconds(self, precision: Literal["auto", "float32"]) -> float:
        """The time of a step."""
        now = clock(self.episode.x.device)
        start = now()
        self.take(precision)
        return now() - start


def check_equal(vma: pv.VMA, memory: pv.Memory, x: Tensor, seed: int) -> dict[str, float]:
    """Loss and gradient of all agree; returns the losses, per target.

    Of the gradient with one particle of four only the expectation would agree, which the tests see to.
    """

    def through_pyro(vma: pv.VMA, memory: pv.Memory, x: Tensor, backward: int | None = None) -> Tensor:
        elbo = pv.infer.VIMCO_ELBO(PARTICLES, max_plate_nesting=1, backward=backward)
        return elbo.differentiable_loss(vma.model, vma.guide, vma.encode(memory), x)

    def backward_through_one(vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
        return through_pyro(vma, memory, x, 1)

    found = {}
    for loss in (through_pyro, backward_through_one, by_hand, per_target):
        torch.manual_seed(seed)
        with channels_apart(vma) if loss is per_target else contextlib.nullcontext():
            value = loss(vma, memory, x)
            gradient = torch.autograd.grad(value, list(vma.parameters()))
        found[loss.__name__] = value.detach() / len(x), torch.cat([g.flatten() for g in gradient]) / len(x)
    for name, (value, gradient) in found.items():
        torch.testing.assert_close(value, found["by_hand"][0], rtol=1e-5, atol=1e-5)
        if name != "backward_through_one":
            torch.testing.assert_close(gradient, found["by_hand"][1], rtol=1e-3, atol=1e-4)
    return {name: float(value) for name, (value, _) in found.items()}


def main(
    targets: int = 256,
    slots: int = 32,
    size: int = 26,
    width: int = 32,
    per_target_targets: int = 32,
    repeats: int = 9,
    seed: int = 0,
) -> dict[str, Any]:
    """Times all in turn.

    Args:
        targets: Targets a step.
        slots: Slots of the memory.
        size: Height and width of the images.
        width: The channels of the convolutions at half resolution.
        per_target_targets: Targets a step where each has a memory of its own: its time is in proportion to them.
        repeats: Timed steps of each, after two that are not counted; one where each target has a memory of its own.
        seed: Seeds weights, images and samples.
    """
    torch.manual_seed(seed)
    vma = pv.VMA.for_images((1, size, size), width=width)
    with torch.no_grad():  # at initialisation, some layers are zero, and some gradients with them
        for parameter in vma.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    memory = pv.Memory((torch.rand(slots, 1, size, size) < 0.1).float())
    x = (torch.rand(targets, 1, size, size) < 0.1).float()
    few = x[:per_target_targets]
    rows: list[dict[str, Any]] = []
    with pyro.get_param_store().scope():
        losses = check_equal(vma, memory, x[: min(targets, 8)], seed)
        episode = pv.data.Episode(memory, x, torch.zeros(targets, dtype=torch.long))
        ours = {ALL: Arrangement(vma, episode), FEW: Arrangement(vma, episode, backward=1)}
        plain = Arrangement(vma, episode, by_hand)
        own = Arrangement(vma, pv.data.Episode(memory, few, episode.labels[: len(few)]), per_target, fused=False)
        with channels_apart(vma):
            own.take("float32")
            each = statistics.median(own.seconds("float32") for _ in range(repeats)) / len(few)
        for precision in ("float32", "auto"):
            times: dict[str, list[float]] = {name: [] for name in (*ours, "by hand")}
            for turn in range(repeats + 2):
                for name, one in (ours | {"by hand": plain}).items():
                    seconds = one.seconds(precision)
                    times[name] += [seconds] * (turn >= 2)
            with autocast(x.device, precision):
                ceiling = matmul_rate(x.device)
            for name, one in ours.items():
                with FlopCounterMode(display=False) as counter:
                    one.take(precision)
                mine, flops = statistics.median(times[name]), counter.get_total_flops()
                ratios = sorted(a / b for a, b in zip(times[name], times["by hand"], strict=True))
                rows.append(
                    {
                        "arrangement": name,
                        "precision": dtype_name(precision),
                        **{"targets": targets, "slots": slots, "particles": PARTICLES},
                        "targets_per_second": targets / mine,
                        "speedup_vs_per_target_memory": each * targets / mine,
                        "ratio_to_handwritten": statistics.median(ratios),
                        **{"ratio_min": ratios[0], "ratio_max": ratios[-1]},
                        "gflops_a_step": flops / 1e9,
                        "gflops": flops / mine / 1e9,
                        "matmul_gflops": ceiling / 1e9,
                        "flop_share": flops / mine / ceiling,
                    }
                )
    rows.append(
        {
            "arrangement": "a memory for each target",
            "precision": "float32",
            **{"targets": len(few), "slots": slots, "particles": PARTICLES},
            "targets_per_second": 1 / each,
        }
    )
    full, _, half, half_few, _ = rows
    best = max(half, half_few, key=lambda row: row["targets_per_second"])
    return {
        "ratio_to_handwritten": half["ratio_to_handwritten"],
        "speedup_vs_per_target_memory": full["speedup_vs_per_target_memory"],
        "speedup_vs_per_target_memory_bf16": best["speedup_vs_per_target_memory"],
        "speedup_vs_per_target_memory_bf16_is_of": best["arrangement"],
        "speedup_vs_per_target_memory_bf16_all_particles": half["speedup_vs_per_target_memory"],
        "flop_share": half["flop_share"],
        "losses": losses,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def dtype_name(precision: Literal["auto", "float32"]) -> str:
    """What the networks run in."""
    return "bfloat16" if autocast(torch.device("cpu"), precision)._enabled else "float32"


def show(result: dict[str, Any]) -> None:
    """The ratios in sentences."""
    *shared, own = result["rows"]
    say = Console().print
    for row in shared:
        say(
            f"{row['arrangement'].capitalize()}, {row['precision']}: {row['targets_per_second']:.0f} targets a second, "
            f"{row['targets']} a step, {row['slots']} slots, K = {row['particles']}; {row['ratio_to_handwritten']:.2f} "
            f"times the step by hand ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}), "
            f"{row['speedup_vs_per_target_memory']:.1f} times as many targets a second as with a memory for each; "
            f"{row['gflops']:.0f} GFLOP/s, {row['flop_share']:.0%} of {row['matmul_gflops']:.0f} in products of large "
            "matrices."
        )
    say(
        f"A memory for each target, float32: {own['targets_per_second']:.1f} targets a second, {own['targets']} a step."
    )


if __name__ == "__main__":
    command(main, show)
