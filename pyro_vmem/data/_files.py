"""Where files are looked for and how they are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vmem._utils.files import write_atomically

__all__ = ["cache_folder", "data_root", "save_npz"]


def save_npz(path: str | os.PathLike[str], **arrays: np.ndarray[Any, Any]) -> None:
    """Write a compressed ``.npz`` file whole or not at all.

    The file appears under its name only when it is complete, so that neither an interrupted run nor a
    second process can leave or see half of it.

    Arguments:
        path: The file to write or replace; its folder is made where it is missing.
        **arrays: The arrays by name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_npz(f"{folder}/a.npz", a=np.arange(3))
        ...     os.listdir(folder)
        ['a.npz']
    """
    with write_atomically(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return the folder for parsed data: the argument, or the environment's choice, or ``~/.cache``.

    Arguments:
        cache_dir: A folder, or None for ``$PYRO_VMEM_CACHE``, else ``$XDG_CACHE_HOME/pyro_vmem``, else
            ``~/.cache/pyro_vmem``.

    Example:
        >>> cache_folder("here").name
        'here'
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("PYRO_VMEM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pyro_vmem"


def data_root(root: str | os.PathLike[str] | None, what: str) -> Path:
    """Return the folder to look for a data set in: the argument, or ``$PYRO_VMEM_DATA``.

    Arguments:
        root: A folder, or None for the environment variable.
        what: The data set's name, for the message.

    Raises:
        ValueError: Neither is given.

    Example:
        >>> data_root("somewhere", "Omniglot").name
        'somewhere'
    """
    if root is not None:
        return Path(root).expanduser()
    if named := os.environ.get("PYRO_VMEM_DATA"):
        return Path(named).expanduser()
    raise ValueError(
        f"root: got None and the environment variable PYRO_VMEM_DATA is not set; expected the folder that "
        f"holds {what}. Pass root=..., or set the variable."
    )
