"""The clock that benchmarks use, and the rate of large matrix products that they compare a step with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

MATRIX_SIZE = 1024  # rows and columns: large enough that a processor reaches its full rate


def clock(device: torch.device) -> Callable[[], float]:
    """A function that returns seconds.

    With one thread on the CPU it is the processor time of this process, which other programs do not disturb. With
    several threads or a GPU only the wall clock measures the work.
    """
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


@torch.no_grad()
def matmul_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a product of large matrices, in the precision of autocast."""
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=dtype)
    now, times = clock(device), []
    end = now() + seconds
    while len(times) < 3 or now() < end:
        start = now()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(now() - start)
    # The first run starts threads and libraries; of the others the fastest is the least disturbed.
    return 2 * MATRIX_SIZE**3 / min(times[1:])
