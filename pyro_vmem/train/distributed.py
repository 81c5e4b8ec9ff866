"""The processes that train one model together: each has a share of the targets, and the gradients are summed.

torch.distributed carries what they tell each other; `torchrun` starts them.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pyro_vmem.data import Episode
from pyro_vmem.memory import Memory

__all__ = ["Processes", "own_device"]

# How long a process waits for the others before it gives up; one that has died is noticed at once.
TIMEOUT = timedelta(minutes=10)


class Processes:
    """The processes of a run. This process is number `rank`.

    Each process has the whole model and a share of the targets of each episode, and draws its own random numbers. The
    first process makes all decisions that depend on time, files or the user. A step of one process alone calls nothing
    here.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.count, self.device = rank, count, torch.device(device)

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Joins the processes that `torchrun` started, or those of an existing process group."""
        if not dist.is_available():
            return cls(device=device)
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE") == "1":
                return cls(device=device)
            with _lost_contact():
                # Gradients travel by NCCL from GPUs, all else by gloo.
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            atexit.register(dist.destroy_process_group)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def first(self, work: Callable[[], Any]) -> Any:
        """Runs a function in the first process, and returns its result in all. An error is raised in all."""
        if self.count == 1:
            return work()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = work()
            except Exception as error:
                box[1] = error
        with _lost_contact():
            dist.broadcast_object_list(box, 0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def agree(self, progress: float, stop: bool) -> tuple[float, bool]:
        """Returns the share of the run that is over, by the clock of the first process, and whether any process wants
        to stop."""
        told = torch.tensor([progress * (self.rank == 0), stop], dtype=torch.float64, device=self.device)
        with _lost_contact():
            dist.all_reduce(told)
        return float(told[0]), bool(told[1])

    def begin_with(self, *modules: nn.Module | None) -> None:
        """Copies the weights of the first process to all."""
        for module in modules if self.count > 1 else ():
            for tensor in module.state_dict().values() if module is not None else ():
                with _lost_contact():
                    dist.broadcast(tensor, 0)

    def share(self, episode: Episode) -> Episode:
        """Returns the memory and the targets of this process; raises a `ValueError` if there are fewer targets than
        processes."""
        size, memory = len(episode.x), episode.memory
        if size < self.count:
            raise ValueError(
                f"episodes: got one of {size} targets for {self.count} processes. Give each episode a target for each "
                "process at least, or start fewer."
            )
        rows = slice(self.rank * size // self.count, (self.rank + 1) * size // self.count)
        if memory.per_datapoint:
            labels, mask = (None if t is None else t[rows] for t in (memory.labels, memory.mask))
            memory = Memory(memory.templates[rows], labels, mask, per_datapoint=True)
        return Episode(memory, episode.x[rows], None if episode.labels is None else episode.labels[rows])

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Adds up the gradients of all processes. A parameter without a gradient in all of them keeps none."""
        pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        got = torch.tensor([float(p.grad is not None) for p in parameters]).to(pieces[0])
        whole = torch.cat([*pieces, got])  # one message, not one for each parameter
        with _lost_contact():
            dist.all_reduce(whole)
        *summed, got = whole.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, count in zip(parameters, summed, got.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter) if count else None

    def mean(self, terms: dict[str, float], share: float) -> dict[str, float]:
        """Computes means over all targets from the means of each process over its targets."""
        values = torch.tensor(list(terms.values()), dtype=torch.float64, device=self.device) * share
        with _lost_contact():
            dist.all_reduce(values)
        return dict(zip(terms, values.tolist(), strict=True))


def own_device(name: str | torch.device = "auto") -> torch.device:
    """Returns the device of a name or of `"auto"`. Under `torchrun`, a name without a number is the GPU of this
    process.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here ({reason}). Use 'cpu', or 'auto'.") from error
    return device


@contextmanager
def _lost_contact() -> Iterator[None]:
    """What torch raises where another process is gone, in other words."""
    try:
        yield
    except RuntimeError as error:
        rank = os.environ.get("RANK", "")
        raise ConnectionError(
            f"process {rank or dist.get_rank()} has lost contact with another one, which was killed or has failed; "
            "its own message, or torchrun's, says why. The run is kept up to its last checkpoint: go on from there "
            f"with resume=True (--resume), with as many processes or others. ({str(error).split('. ')[0]})"
        ) from error
