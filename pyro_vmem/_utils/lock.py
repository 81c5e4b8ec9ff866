"""One run at a time in a folder, by a lock file that the system opens however a process ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["LOCK", "alone_in"]

LOCK = ".lock"

# Seconds to wait for a process that is about to end: one that loads episodes sees after five that its parent is gone.
PATIENCE = 15.0


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads out of a folder until the block is over.

    An empty file `.lock` stays in the folder: to remove it could let in two who wait for it.

    Arguments:
        folder: A folder that is there. Who holds it already may take it again.

    Raises:
        ValueError: If another one holds it, and goes on holding it for fifteen seconds.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder, alone_in(Path(folder)), alone_in(Path(folder)):
        ...     os.listdir(folder)
        ['.lock']
    """
    # One object for each path, so that the thread that has it can take it again.
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
