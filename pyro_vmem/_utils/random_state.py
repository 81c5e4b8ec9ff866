"""The global random generators of torch, Python and NumPy. A process has one of each.

A block that seeds them keeps other threads out until they are restored, and has the CPU as default device.
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
    """The states of Python and NumPy as tensors, for a checkpoint; 32-bit words are exact in float64.

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
    """Restores the states of :func:`random_states`; ignores missing ones."""
    if "python_random_state" in states:
        *words, has_spare, spare = states["python_random_state"].tolist()
        random.setstate((3, tuple(int(word) for word in words), spare if has_spare else None))
    if "numpy_random_state" in states:
        *keys, position, has_spare, spare = states["numpy_random_state"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_spare), spare))


def seed_all(seed: int) -> None:
    """Seeds the generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def forked(*places: Any) -> Iterator[None]:
    """Restores the torch generators of the CPU and of given devices (or of the devices of tensors) after the block.

    `torch.random.fork_rng()` alone would initialise all GPUs of the machine.
    """
    devices = {device for place in places if isinstance(device := getattr(place, "device", place), torch.device)}
    used = [device for device in devices if device.type == "cuda"]
    with one_thread(), usual_defaults(), torch.random.fork_rng(devices=used):
        yield


@contextmanager
def set_aside(device: torch.device) -> Iterator[None]:
    """Restores the random generators of torch, Python and NumPy after a training run in the `with` block."""
    with one_thread(trains=True), forked(device):
        states = random_states()
        try:
            yield
        finally:
            set_random_states(states)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds the torch generators in the block and restores them after it; None does nothing."""
    with one_thread(), usual_defaults():
        if seed is None:
            yield
            return
        # `manual_seed` seeds all devices, so all are restored.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            yield
