"""The folder of a run: whether it holds one, whether it can be written to, and what describes the run in it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyro_vmem._utils.files import versions_of
from pyro_vmem._utils.lock import LOCK, alone_in
from pyro_vmem.model import VMA

__all__ = ["RUN_FILES", "check_spec", "described", "holds_run", "make_folder"]

RUN_FILES = ("last.safetensors", "best.safetensors", "history.csv")


def holds_run(folder: Path) -> bool:
    """Whether a folder holds files of a run, which another run would replace."""
    return bool(versions_of(folder / RUN_FILES[0])) or any((folder / name).exists() for name in RUN_FILES)


def make_folder(folder: Path) -> None:
    """Makes a folder; raises a `ValueError` before training if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(f"out: cannot write to the folder {str(folder)!r} ({error}). Name another one.") from error


@contextmanager
def described(path: Path, write: Callable[[Path], None]) -> Iterator[None]:
    """Writes a description beside the run that the block begins, and removes it if the run cannot begin."""
    folder, new = path.parent, not path.parent.exists()
    make_folder(folder)
    kept = path.exists()
    try:
        with alone_in(folder):
            if not holds_run(folder):
                write(path)
            yield
    finally:
        if not holds_run(folder):
            (folder / LOCK).unlink(missing_ok=True)
            if not kept:
                path.unlink(missing_ok=True)
            if new:
                folder.rmdir()


def check_spec(vma: VMA) -> None:
    """Raises a `ValueError` before training if the spec of a model cannot be written to a checkpoint."""
    try:
        json.dumps(vma.spec())
    except TypeError as error:
        raise ValueError(
            f"vma: a part was built from an argument that is not plain data ({error}), so that a checkpoint could not "
            "rebuild it. Train with out=None and save the state_dict yourself."
        ) from error
