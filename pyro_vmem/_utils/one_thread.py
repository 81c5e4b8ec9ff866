"""One thread at a time: torch's generators, Pyro's handlers and its parameter store exist once in a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_thread"]


class _Turn:
    """Whose turn it is: a lock that its thread may take again, and whether what it does is a training run."""

    def __init__(self) -> None:
        self.lock, self.trains = threading.RLock(), False


_turn = _Turn()


def _forget() -> None:
    global _turn
    _turn = _Turn()


if hasattr(os, "register_at_fork"):  # a forked child has only the thread that forked, and nobody to let go of the lock
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def one_thread(trains: bool = False) -> Iterator[None]:
    """Keeps the other threads of this process out of the library until the block is over.

    Two threads that draw from one generator, or push handlers on Pyro's one stack, get each other's numbers and sites.
    What takes moments is waited for. A training run may take hours, so that what would wait for one is refused.

    Arguments:
        trains: Whether the block is a training run.

    Raises:
        RuntimeError: If another thread trains.

    Example:
        >>> with one_thread(), one_thread():
        ...     print("the same thread may enter again")
        the same thread may enter again
    """
    turn = _turn  # what was entered is left, also in a forked child
    while not turn.lock.acquire(timeout=0.05):
        if turn.trains:
            raise RuntimeError(
                "threads: another thread of this process is training. The random generators, Pyro's handlers and its "
                "parameter store exist once in a process. Wait until that run is over, or start a process for each."
            )
    before, turn.trains = turn.trains, turn.trains or trains
    try:
        yield
    finally:
        turn.trains = before
        turn.lock.release()
