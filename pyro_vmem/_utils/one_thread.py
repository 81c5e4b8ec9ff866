"""One thread at a time: the generators of torch and the handlers and parameter store of Pyro exist once per process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_thread"]


class _Turn:
    """A lock that its thread may take again, and whether the holder trains."""

    def __init__(self) -> None:
        self.lock, self.trains = threading.RLock(), False


_turn = _Turn()


def _forget() -> None:
    global _turn
    _turn = _Turn()


if hasattr(os, "register_at_fork"):  # A forked child has only one thread, and none that would release the lock.
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def one_thread(trains: bool = False) -> Iterator[None]:
    """Keeps the other threads of this process out of the library until the block ends.

    Two threads with one generator and one stack of handlers would mix their random numbers and sites. A thread waits
    while another is in a short block. A training run may take hours, so other threads get a `RuntimeError` if the
    holder `trains`.

    Example:
        >>> with one_thread(), one_thread():
        ...     print("the same thread may enter again")
        the same thread may enter again
    """
    turn = _turn  # Released also in a forked child.
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
