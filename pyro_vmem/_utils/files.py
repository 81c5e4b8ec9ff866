"""Atomic writes that survive a crash, and JSON files."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["as_plain", "numbered", "read_json", "remove_leftovers", "versions_of", "write_atomically", "write_json"]


@contextmanager
def write_atomically(path: str | os.PathLike[str], keep: int = 1) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and moves it to `path` if the block ends without an error.

    No process sees or leaves half of a file. File and folder are flushed, so a crash of the machine leaves the old
    or the new file.

    Arguments:
        path: The file to write or replace. A missing folder is made.
        keep: How many versions of the file to keep. With 3, the old content of `a.txt` moves to `a-1.txt`, and that of
            `a-1.txt` to `a-2.txt`. An existing `path` exists at every moment.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for text in ("first", "second"):
        ...         with write_atomically(f"{folder}/a.txt", keep=2) as aside:
        ...             _ = aside.write_text(text)
        ...     sorted(os.listdir(folder)), Path(folder, "a-1.txt").read_text()
        (['a-1.txt', 'a.txt'], 'first')
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    aside, lock = _made_aside(target)
    try:
        yield aside
        # mkstemp makes files that only their owner can read; this gives the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        _flush(aside)
        _shift(target, keep)
        os.replace(aside, target)
        _flush_folder(target.parent)
    finally:
        aside.unlink(missing_ok=True)
        lock.close()


def numbered(path: Path, number: int) -> Path:
    """The path of an earlier version of a file, such as `last-1.safetensors`; 0 for the file itself."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path


def versions_of(path: Path) -> list[Path]:
    """The existing versions of a file, newest first."""
    found = {}
    for candidate in path.parent.glob(f"{glob.escape(path.stem)}*{path.suffix}") if path.parent.is_dir() else ():
        number = candidate.stem.removeprefix(path.stem).removeprefix("-") or "0"
        if number.isdecimal() and numbered(path, int(number)) == candidate and candidate.is_file():
            found[int(number)] = candidate
    return [found[number] for number in sorted(found)]


def _made_aside(target: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside another, and its lock. A file without a lock was left by a dead process."""
    while True:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        file = os.fdopen(handle, "rb")
        if not _locked(file):
            file.close()  # Windows does not move open files
        elif not os.fstat(file.fileno()).st_nlink:
            file.close()  # another process removed it just before it was locked
            continue
        return Path(name), file


def remove_leftovers(target: Path) -> None:
    """Removes what killed processes have written of a file and not finished."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:  # somebody else's, or gone by now
            if _locked(file):
                leftover.unlink()


def _locked(file: IO[bytes]) -> bool:
    """Locks a file until it is closed, also by the death of the process; returns false if that fails."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):  # the latter without fcntl
        return False
    return True


def _shift(target: Path, keep: int) -> None:
    """Renames each version to the next older one; `target` itself stays, under two names, until it is replaced."""
    for number in range(keep - 1, 0, -1):
        newer, older = numbered(target, number - 1), numbered(target, number)
        if not newer.is_file():
            continue
        aside, lock = _made_aside(target)
        lock.close()
        try:
            aside.unlink()
            try:
                os.link(newer, aside)
            except OSError:  # a file system without hard links
                shutil.copyfile(newer, aside)
                _flush(aside)
            os.replace(aside, older)
        finally:
            aside.unlink(missing_ok=True)


def as_plain(values: Any) -> Any:
    """Converts values to JSON types, NaN and infinity to null."""
    if isinstance(values, dict):
        return {name: as_plain(value) for name, value in values.items()}
    if isinstance(values, list):
        return [as_plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_json(path: Path) -> Any:
    """Reads a JSON file; a `ValueError` if it is not valid, has a key twice or is nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {min(name for name in found if names.count(name) > 1)!r} twice")
    return found


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    with write_atomically(path) as aside:
        aside.write_text(json.dumps(as_plain(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    # Some systems cannot flush a folder; the file is in place all the same.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
