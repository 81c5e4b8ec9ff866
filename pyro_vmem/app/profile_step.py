"""Where the time of a training step goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro.infer import ELBO
from torch.utils.flop_counter import FlopCounterMode

from pyro_vmem._utils.precision import autocast
from pyro_vmem.app.speed import clock, matmul_rate
from pyro_vmem.data import Episode
from pyro_vmem.infer.by_name import Objective
from pyro_vmem.model import VMA
from pyro_vmem.train.step import Steps

__all__ = ["PARTS", "StepProfile", "profile_step"]

PARTS = (
    *("encode memory", "encode x", "address", "read", "latent", "decode", "likelihood"),
    *("backward", "optimizer", "Pyro and the rest"),
)


@dataclass(frozen=True)
class StepProfile:
    """What :func:`profile_step` found, of one step.

    Attributes:
        seconds: The time of each part, which add up to that of the step: encoding the memory and the targets; priors
            and guides of addresses, and of latents; reading features; the decoder; the density of the observation;
            the gradient of all of it; clipping and Adam; and what is left, Pyro with its draws and their densities.
        flops: Floating-point operations of each part, a multiply-add counted as two; those of convolutions and matrix
            products, which are nearly all.
        matmul_flops_per_second: Operations a second of a product of large matrices in the same precision.
        targets: Targets of the step.
        decodes: Decodes of the step.
        device: Where it ran.
        precision: What the networks ran in.
    """

    seconds: dict[str, float]
    flops: dict[str, int]
    matmul_flops_per_second: float
    targets: int
    decodes: int
    device: str
    precision: str

    @property
    def seconds_a_step(self) -> float:
        """The time of the step."""
        return sum(self.seconds.values())

    @property
    def flops_per_second(self) -> float:
        """Operations a second of the step."""
        return sum(self.flops.values()) / self.seconds_a_step

    @property
    def share_of_matmul(self) -> float:
        """The step's operations a second as a share of those of a matrix product."""
        return self.flops_per_second / self.matmul_flops_per_second

    def table(self) -> list[tuple[str, str, str, str]]:
        """For each part its name, milliseconds, share of the time and billions of operations, in words."""
        return [
            (part, f"{1e3 * time:.1f}", f"{time / self.seconds_a_step:.0%}", f"{self.flops[part] / 1e9:.2f}")
            for part, time in self.seconds.items()
        ]

    def sentence(self) -> str:
        """What the step did, how fast, and how near that is to what the machine can do."""
        rates = self.targets / self.seconds_a_step, self.flops_per_second / 1e9, self.matmul_flops_per_second / 1e9
        return (
            f"{self.targets} targets, {self.decodes} decodes in {1e3 * self.seconds_a_step:.0f} ms, {self.precision} "
            f"on {self.device}: {rates[0]:.0f} targets a second, {rates[1]:.0f} GFLOP/s, {self.share_of_matmul:.0%} of "
            f"the {rates[2]:.0f} of a product of large matrices."
        )

    def summary(self) -> dict[str, Any]:
        """All of it by name, as plain data."""
        rows = [
            {"part": part, "seconds": time, "share": time / self.seconds_a_step, "gflop": self.flops[part] / 1e9}
            for part, time in self.seconds.items()
        ]
        return {
            "rows": rows,
            "seconds_a_step": self.seconds_a_step,
            "targets_per_second": self.targets / self.seconds_a_step,
            "targets": self.targets,
            "decodes": self.decodes,
            "gflops": self.flops_per_second / 1e9,
            "matmul_gflops": self.matmul_flops_per_second / 1e9,
            "flop_share": self.share_of_matmul,
            "device": self.device,
            "precision": self.precision,
        }


def profile_step(
    vma: VMA,
    episode: Episode,
    objective: Objective | ELBO = "vimco",
    num_particles: int = 4,
    steps: int = 5,
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    backward: int | None = None,
) -> StepProfile:
    """Takes a few training steps, as :func:`pyro_vmem.fit` does, and tells where the time of the fastest went.

    The model's weights, Pyro's parameter store and the global random state are as before.

    Arguments:
        vma: The model and its guide.
        episode: The memory and the targets.
        objective: As of :func:`pyro_vmem.fit`.
        num_particles: The particles of a named objective.
        steps: How many steps are timed, after two that are not.
        precision: As of :func:`pyro_vmem.fit`.
        backward: As of :func:`pyro_vmem.fit`.

    Raises:
        ValueError: If `steps` is less than 1, or episode, objective and model do not fit.

    Example:
        >>> import pyro_vmem as pv
        >>> sampler = pv.data.EpisodeSampler(pv.data.glyphs(size=12, drawings=12), n_way=4, k_shot=1, n_query=1)
        >>> profile = profile_step(VMA.for_images((1, 12, 12), latent_dim=4, width=4), sampler[0], steps=1)
        >>> tuple(profile.seconds) == PARTS, profile.targets, profile.decodes
        (True, 4, 16)
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    device = next(vma.parameters()).device
    half, episode = autocast(device, precision), episode.to(device)
    weights = {name: tensor.clone() for name, tensor in vma.state_dict().items()}
    training = vma.training
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        taken = Steps(vma, objective, num_particles, 1e-6, episode, backward=backward)
        sections = _Sections(vma, taken, device)
        vma.train()
        try:
            with sections:
                for _ in range(2):
                    taken.take(episode, 1e-6, 1.0, 1.0, half)
                times = [sections.of(lambda: taken.take(episode, 1e-6, 1.0, 1.0, half)) for _ in range(steps)]
                with FlopCounterMode(display=False) as sections.counter:
                    sections.of(lambda: taken.take(episode, 1e-6, 1.0, 1.0, half))
        finally:
            vma.train(training)
            vma.load_state_dict(weights)
            vma.zero_grad(set_to_none=True)
        with half:
            product = matmul_rate(device, episode.x.dtype)
    fastest = min(times, key=lambda each: sum(each.values()))
    flops = {part: int(sections.flops.get(part, 0)) for part in PARTS}
    name = str(torch.get_autocast_dtype(device.type) if half._enabled else episode.x.dtype).removeprefix("torch.")
    return StepProfile(fastest, flops, product, len(episode.x), sections.decodes, str(device), name)


class _Sections:
    """A context in which the parts of a step are timed: each without those that it calls."""

    def __init__(self, vma: VMA, taken: Steps, device: torch.device) -> None:
        self.now, self.device = clock(device), device
        self.counter: FlopCounterMode | None = None
        self.seconds: dict[str, float] = {}
        self.flops: dict[str, float] = {}
        self.decodes = 0
        self.open: list[str] = []
        self.since: tuple[float, int] = (0.0, 0)
        self.places: list[tuple[Any, str, str]] = [
            (vma, "encode", "encode memory"),
            (vma, "encode_x", "encode x"),
            *((part, "forward", "address") for part in (vma.address_prior, vma.address_guide)),
            *((part, "forward", "latent") for part in (vma.latent_prior, vma.latent_guide)),
            (vma.likelihood.network, "forward", "decode"),
            (vma.likelihood, "forward", "likelihood"),
            (torch.autograd, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "optimizer"),
            (taken.optimizer, "step", "optimizer"),
        ]
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        for owner, name, part in self.places:
            self.stack.enter_context(_replaced(owner, name, self.timed(getattr(owner, name), part)))

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, whose time is the part's."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.section(part):
                found = function(*args, **kwargs)
            # what the part returns goes on to work for it
            if part == "encode memory" and "read" not in vars(found):
                found.read = self.timed(found.read, "read")
            elif part == "likelihood":
                self.decodes += found.batch_shape.numel()
                self.watch_density(found)
            return found

        return run

    def watch_density(self, density: Any) -> Any:
        """The distribution, whose density is timed; also that of a copy which Pyro expands to its plates."""
        expand = density.expand
        density.log_prob = self.timed(density.log_prob, "likelihood of x")
        density.expand = lambda *args, **kwargs: self.watch_density(expand(*args, **kwargs))
        return density

    @contextlib.contextmanager
    def section(self, part: str) -> Iterator[None]:
        """Time spent in here is the part's, and not of what it was called from."""
        part = "likelihood" if part == "likelihood of x" else part
        self.settle()
        self.open.append(part)
        try:
            yield
        finally:
            self.settle()
            self.open.pop()

    def settle(self) -> None:
        """Gives the time since the last call, and its operations, to the part that is open."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self.now(), 0 if self.counter is None else self.counter.get_total_flops()
        if self.open:
            part = self.open[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now[0] - self.since[0]
            self.flops[part] = self.flops.get(part, 0) + now[1] - self.since[1]
        self.since = now

    def of(self, step: Callable[[], Any]) -> dict[str, float]:
        """The seconds of each part of a step."""
        self.seconds, self.flops, self.decodes = {}, {}, 0
        with self.section("Pyro and the rest"):
            step()
        return {part: self.seconds.get(part, 0.0) for part in PARTS}


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value for a while; one of the class is found again afterwards."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
