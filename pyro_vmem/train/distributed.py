"""The processes that train one model together: what each has a share of, and what they agree on."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyro_vmem.data import Episode
from pyro_vmem.infer.noise import share_noise
from pyro_vmem.infer.resampled_backward import CHOICE
from pyro_vmem.memory import Memory

__all__ = ["Ranks", "own_device"]

# How long a process waits for the others before it gives up; one that has died is noticed at once.
TIMEOUT = timedelta(minutes=10)


class Ranks:
    r"""The processes of a run, of which this is one. Alone, every method is the identity.

    Each has the whole model and takes a share of the targets of each episode. All draw the random numbers of the whole
    minibatch and use those of their share, and the gradients are summed: the step is that of one process, but for the
    order of summation, and random states never part. What depends on a clock, a file or a person, the first decides.

    Arguments:
        index: Which this is, from 0.
        count: How many there are. With more than one, `torch.distributed` has been initialised.

    Example:
        >>> ranks = Ranks.join(torch.device("cpu"))
        >>> ranks.count, ranks.first(lambda: "here")
        (1, 'here')
    """

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count
        self.stopped = False
        """Whether somebody has pressed Ctrl-C here."""

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """The processes that `torchrun` has started, or those of a process group that is there already.

        Arguments:
            device: Where the model is: gradients travel by NCCL from GPUs, all else by gloo.
        """
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE") == "1":
                return cls()
            with _lost_contact():
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            atexit.register(dist.destroy_process_group)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return cls(dist.get_rank(), dist.get_world_size())

    # What is decided once

    def first(self, work: Callable[[], Any]) -> Any:
        """What some work gives in the first process; the others wait for it. An error there is one everywhere."""
        if self.count == 1:
            return work()
        box: list[Any] = [None, None]
        if self.index == 0:
            try:
                box[0] = work()
            except Exception as error:
                box[1] = error
        with _lost_contact():
            dist.broadcast_object_list(box, 0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def agree(self, part: float, stop: bool) -> tuple[float, bool]:
        """The part of the run that is over by the first process's clock, and whether any process wants to stop."""
        if self.count == 1:
            return part, stop
        asked = (stop and self.index == 0) or self.stopped
        told = self._sum(torch.tensor([part * (self.index == 0), asked], dtype=torch.float64))
        return float(told[0]), bool(told[1])

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Remembers a first Ctrl-C in `stopped`, because no process can stop alone; a second one is passed on."""
        before = signal.getsignal(signal.SIGINT)
        if self.count == 1 or threading.current_thread() is not threading.main_thread() or before is None:
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.stopped and callable(before):
                before(number, frame)
            self.stopped = True

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # A step

    def begin_with(self, *modules: nn.Module | None) -> None:
        """Gives all processes the weights of the first."""
        for module in modules if self.count > 1 else ():
            for tensor in module.state_dict().values() if module is not None else ():
                with _lost_contact():
                    dist.broadcast(tensor, 0)

    def rows(self, size: int) -> slice:
        """Which of so many targets are this process's."""
        return slice(self.index * size // self.count, (self.index + 1) * size // self.count)

    def share(self, episode: Episode) -> Episode:
        """The memory and this process's targets.

        Raises:
            ValueError: If there are fewer targets than processes.
        """
        if self.count == 1:
            return episode
        if len(episode.x) < self.count:
            raise ValueError(
                f"episodes: got one of {len(episode.x)} targets for {self.count} processes. Give each episode a target "
                "for each process at least, or start fewer."
            )
        rows, memory = self.rows(len(episode.x)), episode.memory
        if memory.per_datapoint:
            labels, mask = (None if t is None else t[rows] for t in (memory.labels, memory.mask))
            memory = Memory(memory.templates[rows], labels, mask, per_datapoint=True)
        return Episode(memory, episode.x[rows], episode.labels[rows])

    def noise(self, guide: Any, size: int) -> Any:
        """A guide of this process's targets that draws what a guide of all would draw for them."""
        return guide if self.count == 1 else share_noise(self.rows(size), size)(guide)

    def choice(self, size: int) -> AbstractContextManager[Any]:
        """A context in which an objective chooses among the particles of these targets as if it had all."""
        return nullcontext() if self.count == 1 else share_noise(self.rows(size), size, {CHOICE})

    @contextmanager
    def all_or_none(self, kind: type[Exception]) -> Iterator[None]:
        """Raises an error of a kind in all processes if one has it, and sets all random states to that one's."""
        if self.count == 1:
            yield
            return
        mine: tuple[str, Any] | None = None
        try:
            yield
        except kind as error:
            mine = str(error), _random_state()
        if not bool(self._sum(torch.tensor([float(mine is not None)]))[0]):
            return
        told: list[Any] = [None] * self.count
        with _lost_contact():
            dist.all_gather_object(told, mine)
        text, state = next(answer for answer in told if answer is not None)
        _set_random_state(state)
        raise kind(text)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Adds up the gradients of all processes; what got none in any of them has none still."""
        if self.count == 1:
            return
        pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        got = torch.tensor([float(p.grad is not None) for p in parameters], device=pieces[0].device)
        *summed, got = self._sum(torch.cat([*pieces, got])).split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, count in zip(parameters, summed, got.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter) if count else None

    def mean(self, terms: dict[str, float], size: int) -> dict[str, float]:
        """Means over all targets, of means over each process's."""
        if self.count == 1:
            return terms
        values = torch.tensor(list(terms.values()), dtype=torch.float64)
        return dict(zip(terms, self._sum(values * self._weight(size)).tolist(), strict=True))

    def average_buffers(self, module: nn.Module | None, size: int) -> None:
        """Averages what an objective remembers of its targets, such as a running mean."""
        for buffer in module.buffers() if self.count > 1 and module is not None else ():
            if buffer.is_floating_point():
                buffer.copy_(self._sum(buffer * self._weight(size)))

    # What each has a part of

    def gather(self, values: Tensor) -> list[Tensor]:
        """The values of each process, `(n_r, *)`, in their order; without gradients."""
        if self.count == 1:
            return [values]
        sizes = torch.zeros(self.count)
        sizes[self.index] = len(values)
        lengths = [int(size) for size in self._sum(sizes)]
        padded = values.new_zeros(max(lengths), *values.shape[1:])
        padded[: len(values)] = values
        found = [torch.empty_like(padded) for _ in lengths]
        with _lost_contact():
            dist.all_gather(found, padded)
        return [one[:length] for one, length in zip(found, lengths, strict=True)]

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over processes of values `(*)`, without gradients."""
        return values if self.count == 1 else self._sum(values)

    def _weight(self, size: int) -> float:
        rows = self.rows(size)
        return (rows.stop - rows.start) / size

    def _sum(self, values: Tensor) -> Tensor:
        # The few numbers that a group of NCCL alone is asked to add go by way of the GPU.
        backends = dist.get_backend_config()
        there = values if values.is_cuda or "cpu:" in backends or backends == "gloo" else values.cuda()
        with _lost_contact():
            dist.all_reduce(there)
        return there.to(values.device)


def own_device(name: str | torch.device = "auto") -> torch.device:
    """The device of a name; with `torchrun`, and where the name has no number, this process's own GPU.

    Arguments:
        name: As torch names devices, or `"auto"`: a GPU if there is one, else the CPU.

    Raises:
        ValueError: If there is no such device.

    Example:
        >>> own_device("cpu")
        device(type='cpu')
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
        index = os.environ.get("RANK", "")
        raise ConnectionError(
            f"process {index or dist.get_rank()} has lost contact with another one, which was killed or has failed; "
            "its own message, or torchrun's, says why. The run is kept up to its last checkpoint: go on from there "
            f"with resume=True (--resume), with as many processes or others. ({str(error).split('. ')[0]})"
        ) from error


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
