"""Loads episodes ahead of their step, in a thread or in worker processes."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset

from pyro_vmem.data.episodes import Episode

__all__: list[str] = []

# How many episodes each loader prepares ahead.
AHEAD = 2


def load_ahead(
    episodes: Dataset[Episode],
    start: int,
    stop: int,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Generator[Episode]:
    """Iterates over episodes `start` to `stop - 1`, in order, on a device; an error in one is raised in its turn.

    The episodes and the global random state do not depend on how they are loaded. A source that cannot be sent to the
    workers raises a `ValueError`.
    """
    device = torch.device(device)
    pin = device.type == "cuda"
    if workers:
        loader = DataLoader(
            episodes,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            prefetch_factor=AHEAD,
            pin_memory=pin,
            generator=torch.Generator(),  # otherwise the seeds of workers would come from the global generator
        )
        try:
            loaded = iter(loader)
        except OSError:
            raise
        except Exception as error:  # any error of pickling, where processes are not forked
            raise ValueError(
                f"workers: the source of episodes cannot be sent to another process ({error}). Define it at the top of "
                "a module, without functions or open files in it, or load here: workers=0."
            ) from error
        try:
            yield from (episode.to(device, non_blocking=pin) for episode in loaded)
        except (ConnectionError, EOFError) as error:
            if str(error).startswith("Caught"):  # in the worker, by the source
                raise
            # A worker dies while it sends an episode. torch raises its own error as soon as the worker is dead.
            time.sleep(5)
            raise RuntimeError(f"DataLoader worker: its connection is lost ({error})") from error
    elif device.type == "cpu":
        for index in range(start, stop):
            yield episodes[index].to(device)
    else:
        yield from (episode.to(device, non_blocking=pin) for episode in _in_a_thread(episodes, range(start, stop), pin))


def _in_a_thread(episodes: Dataset[Episode], indices: range, pin: bool) -> Iterator[Episode]:
    def load(index: int) -> Episode:
        episode = episodes[index]
        return episode.pin_memory() if pin and episode.x.device.type == "cpu" else episode

    pool = ThreadPoolExecutor(1, "episodes")
    try:
        waiting = deque(pool.submit(load, index) for index in indices[:AHEAD])
        for index in indices[AHEAD:]:
            episode = waiting.popleft().result()
            waiting.append(pool.submit(load, index))
            yield episode
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def lost_worker() -> Iterator[None]:
    """Raises a `ChildProcessError` with advice when a worker has died.

    torch reports the death at once, so the error may be raised at any line of the block.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = "It may have been killed for want of memory"
        if multiprocessing.get_start_method() != "fork":
            reason += ", or could not unpickle the source, which has to be defined in a module and not in a notebook"
        raise ChildProcessError(
            f"workers: a process that loads episodes has died ({str(error).splitlines()[0]}) {reason}. The run is "
            "kept up to its last checkpoint: go on from there with resume=True (--resume), with fewer workers if it "
            "happens again; workers=0 loads in this process and shows its error."
        ) from error
