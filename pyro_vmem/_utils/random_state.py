"""The global random generators: torch's, and Python's and NumPy's, which data and parts of one's own may draw from.

A process has one of each. Whoever seeds them in a block keeps other threads out of it until they are put back. What is
measured there does not depend on the caller's default device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem._utils.one_thread import one_thread

__all__ = ["forked", "random_states", "seed_all", "seeded", "set_aside", "set_random_states"]


def random_states() -> dict[str, Tensor]:
    """The states of both, as tensors, which a checkpoint can hold: words of 32 bits are exact in float64.

    Example:
        >>> before = random_states()
        >>> drawn = random.random(), np.random.rand()
        >>> set_random_states(before)
        >>> drawn == (random.random(), np.random.rand())
        True
    """
    _, words, spare = random.getstate()
    python = [*words, spare is not None, spare or 0.0]
    state: Any = np.random.get_state(legacy=False)
    numpy = [*state["state"]["key"].tolist(), state["state"]["pos"], state["has_gauss"], state["gauss"]]
    tensors = {"python_random_state": python, "numpy_random_state": numpy}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in tensors.items()}


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Goes back to what :func:`random_states` gave; leaves alone what is missing."""
    if "python_random_state" in states:
        *words, has_spare, spare = states["python_random_state"].tolist()
        random.setstate((3, tuple(int(word) for word in words), spare if has_spare else None))
    if "numpy_random_state" in states:
        *keys, position, has_spare, spare = states["numpy_random_state"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_spare), spare))


def seed_all(seed: int) -> None:
    """Seeds torch's, Python's and NumPy's generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def forked(*places: Any) -> Iterator[None]:
    """Leaves torch's generators as they were before the block: the CPU's, and those of devices or of what lies there.

    `torch.random.fork_rng()` alone would wake up, and copy the states of, all GPUs of the machine.
    """
    devices = {device for place in places if isinstance(device := getattr(place, "device", place), torch.device)}
    used = [device for device in devices if device.type == "cuda"]
    with one_thread(), usual_defaults(), torch.random.fork_rng(devices=used):
        yield


@contextmanager
def set_aside(device: torch.device) -> Iterator[None]:
    """Leaves torch's, Python's and NumPy's generators as they were before the block, which is a training run."""
    with one_thread(trains=True), forked(device):
        states = random_states()
        try:
            yield
        finally:
            set_random_states(states)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds torch's generators in the block, and leaves them as they were before; None draws from them as they are."""
    with one_thread(), usual_defaults():
        if seed is None:
            yield
            return
        # `manual_seed` seeds those of all devices, so all are put back.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            yield
