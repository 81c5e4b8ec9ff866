"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["write_atomically"]


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and moves it there when the block ends without an error.

    Neither an interrupted run nor a second process can leave or see half of a file.

    Arguments:
        path: The file to write or replace; its folder is made where it is missing.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with write_atomically(f"{folder}/a.txt") as aside:
        ...         _ = aside.write_text("whole")
        ...     os.listdir(folder)
        ['a.txt']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        # mkstemp makes files that only their owner can read; give this one the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
