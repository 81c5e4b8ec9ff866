"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

__all__ = ["alone_in"]

# Seconds to wait for a process that is about to end: one that loads episodes sees after five that its parent is gone.
PATIENCE = 15.0

_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads out of a folder until the block is over.

    The lock is on the folder itself: it leaves nothing behind, and the system opens it however a process ends. Where
    there are no such locks, as on Windows and on some network file systems, nobody is kept out.

    Arguments:
        folder: A folder that is there. Who holds it already may take it again.

    Raises:
        ValueError: If another one holds it, and goes on holding it for fifteen seconds.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, alone_in(Path(folder)), alone_in(Path(folder)):
        ...     os.listdir(folder)
        []
    """
    place = folder.resolve()
    if place in _held.get():
        yield
        return
    with contextlib.ExitStack() as stack:
        handle = _lock(place)
        if handle is not None:
            stack.callback(os.close, handle)
        token = _held.set(_held.get() | {place})
        stack.callback(_held.reset, token)
        yield


def _lock(folder: Path) -> int | None:
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError as error:
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
            os.close(handle)
            raise ValueError(
                f"out: another run is writing to {str(folder)!r}. Wait until it is over, stop it, or name another "
                "folder."
            ) from error
        except OSError:  # a file system without locks
            os.close(handle)
            return None
