"""How fast a model decodes against what the machine can do."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from pyro_vmem._utils.precision import autocast
from pyro_vmem.memory import Memory
from pyro_vmem.model import VMA

__all__ = ["Speed", "clock", "keep_freed_memory", "matmul_rate", "measure_speed"]

_MATRIX = 1024  # rows of the matrices whose product is timed


@dataclass(frozen=True)
class Speed:
    """What :func:`measure_speed` found.

    Attributes:
        decodes_per_second: Decodes a second of the decoder alone: no address, no sampling, no reading of templates, no
            density. What evaluates the model can come close to it at best.
        batch_size: How many decodes at once were fastest.
        flops_per_decode: Floating-point operations of one decode, a multiply-add counted as two; those of convolutions
            and matrix products, which are nearly all.
        matmul_flops_per_second: Operations a second of a product of large matrices in the same precision.

    Example:
        >>> Speed(2e3, 256, flops_per_decode=10_000_000, matmul_flops_per_second=1e11).share_of_matmul
        0.2
    """

    decodes_per_second: float
    batch_size: int
    flops_per_decode: int
    matmul_flops_per_second: float

    @property
    def flops_per_second(self) -> float:
        """Operations a second of the decoder alone."""
        return self.decodes_per_second * self.flops_per_decode

    @property
    def share_of_matmul(self) -> float:
        """The decoder's operations a second as a share of those of a matrix product."""
        return self.flops_per_second / self.matmul_flops_per_second


@torch.no_grad()
def measure_speed(
    vma: VMA,
    memory: Memory,
    batch_sizes: Sequence[int] = (64, 256, 1024),
    seconds: float = 0.3,
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
) -> Speed:
    """Measures the decoder alone, and the machine's matrix products, on the memory's device.

    Of all runs the fastest counts, since other programs can only slow one down. The global random state stays as it is.

    Arguments:
        vma: The model.
        memory: Templates to decode from; of one memory per datapoint, those of the first.
        batch_sizes: How many decodes at once; the best size counts.
        seconds: How long to run the decoder in all, and the matrix product; each size runs three times at least.
        precision: As of :func:`pyro_vmem.fit`.

    Returns:
        The rates and the operations of a decode.

    Raises:
        ValueError: If a batch size is less than 1, or the memory does not fit the model.

    Example:
        >>> memory = Memory(torch.rand(3, 1, 12, 12))
        >>> speed = measure_speed(VMA.for_images((1, 12, 12), latent_dim=4, width=4), memory, [16], seconds=0.01)
        >>> speed.decodes_per_second > 0, speed.batch_size
        (True, 16)
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes: expected numbers of at least 1, got {list(batch_sizes)}.")
    vma.check(memory, None)
    templates = memory.templates[0] if memory.per_datapoint else memory.templates
    device, decoder = templates.device, vma.likelihood.network
    with torch.random.fork_rng(), autocast(device, precision):
        encoded = vma.encode(Memory(templates))
        rates, flops = {}, 0
        for size in batch_sizes:
            # A template for each of the batch, as where addresses are sampled.
            template = encoded.read(torch.arange(size, device=device).remainder(len(templates)))
            z = vma.latent_prior(template).sample()
            with FlopCounterMode(display=False) as counter:
                decoder(z, template)
            flops = counter.get_total_flops() // size
            rates[size] = size / _fastest(partial(decoder, z, template), device, seconds / len(batch_sizes))
        product = matmul_rate(device, templates.dtype, seconds)
    best = max(rates, key=rates.__getitem__)
    return Speed(rates[best], best, flops, product)


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 0.3) -> float:
    """Operations a second of a product of large matrices: what the machine can do, in the precision of autocast.

    Arguments:
        device: The device.
        dtype: The precision where there is no autocast.
        seconds: How long to run it.

    Example:
        >>> matmul_rate(torch.device("cpu"), seconds=0.01) > 0
        True
    """
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    matrix = torch.ones(_MATRIX, _MATRIX, device=device, dtype=dtype)
    return 2 * _MATRIX**3 / _fastest(partial(torch.mm, matrix, matrix), device, seconds)


def keep_freed_memory() -> bool:
    """Tells the C library to keep memory that was freed for the process's next use, instead of giving it back.

    A training step frees as much as it needs again a moment later; fetching it page by page takes a tenth of the step
    on the CPU. The setting is the whole process's and lasts until it ends, so the package never makes it by itself:
    the command line and the benchmarks do, and a script may.

    Returns:
        Whether it could be done: with the GNU C library, as on most Linux systems, on which this matters.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # as in malloc.h
    # older versions accept no mapping threshold beyond 32 MB
    mapped = set_option(mmap_threshold, 1 << 30) or set_option(mmap_threshold, 1 << 25)
    return bool(mapped and set_option(trim_threshold, (1 << 31) - 1))


def clock(device: torch.device) -> Callable[[], float]:
    """What to time work on a device with, in seconds: for one thread on the CPU, the processor time of this process.

    Other programs take nothing of it; several threads, or a GPU, can only be timed by the clock on the wall.

    Example:
        >>> now = clock(torch.device("cpu"))
        >>> now() <= now()
        True
    """
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _fastest(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The seconds of the fastest of two or more runs, after one that does not count."""
    times: list[float] = []
    now = clock(device)
    end = now() + seconds
    while len(times) < 3 or now() < end:
        start = now()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(now() - start)
    return min(times[1:])
