"""Folders of data sets, and safe reading and writing of their files."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vmem._utils.files import write_atomically

__all__ = ["cache_folder", "data_root", "load_npz", "printable", "save_npz"]

# An archive may declare more than this only if its compression ratio is that of drawings.
_LARGE = 1 << 30
_MAX_RATIO = 100


def save_npz(path: str | os.PathLike[str], **arrays: np.ndarray[Any, Any]) -> None:
    """Writes arrays into a compressed `.npz` file, atomically; makes a missing folder."""
    with write_atomically(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_npz(path: Path, argument: str) -> dict[str, np.ndarray[Any, Any]]:
    """Reads all arrays of an untrusted `.npz` file, without pickle and with a limit on its unpacked size.

    Raises:
        ValueError: If it is not such an archive, or it declares over a gigabyte and over a hundred times its own size.
            The message names the argument of the file.
    """
    try:
        # Opened here, because np.load does not close a damaged archive that it opened.
        with path.open("rb") as handle:
            with zipfile.ZipFile(handle) as archive:
                declared = sum(member.file_size for member in archive.infolist())
            if declared > max(_LARGE, _MAX_RATIO * path.stat().st_size):
                raise ValueError(f"{declared:,} bytes when unpacked, of {path.stat().st_size:,}")
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # np.load raises many types on damaged files, and AttributeError on a bare array
        raise ValueError(
            f"{argument}: cannot read {printable(path)} ({error}), expected an .npz archive of plain arrays (no "
            "objects)."
        ) from error


def printable(path: Path) -> str:
    """Returns a path for a message, with control characters escaped."""
    return repr(str(path))[1:-1]


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder for parsed data: the argument, `$PYRO_VMEM_CACHE`, or one in `$XDG_CACHE_HOME` or `~/.cache`."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("PYRO_VMEM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pyro_vmem"


def data_root(root: str | os.PathLike[str] | None, what: str) -> Path:
    """The folder of the data set `what`: the argument, or `$PYRO_VMEM_DATA`; else raises a `ValueError`."""
    if root is not None:
        return Path(root).expanduser()
    if named := os.environ.get("PYRO_VMEM_DATA"):
        return Path(named).expanduser()
    raise ValueError(
        f"root: got None and the environment variable PYRO_VMEM_DATA is not set; expected the folder that "
        f"holds {what}. Pass root=..., or set the variable."
    )
