"""One run at a time per folder, by a lock file that the system releases however a process ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["LOCK", "alone_in"]

LOCK = ".lock"

# Seconds to wait for a process that is ending: a worker notices within five that its parent is gone.
PATIENCE = 15.0


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes and threads until the block ends.

    The holder may lock it again. An empty file `.lock` stays, because removing it could let in two waiting processes.

    Raises:
        ValueError: If another holder keeps it for fifteen seconds.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder, alone_in(Path(folder)), alone_in(Path(folder)):
        ...     os.listdir(folder)
        ['.lock']
    """
    # One object per path, so that its holder can lock it again.
    lock = FileLock(folder.resolve() / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise ValueError(
            f"out: another run is writing to {str(folder)!r}. Wait until it is over, stop it, or name another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()
