"""Checkpoints: tensors and plain data in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_vmem._files import write_atomically

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = "pyro_vmem/1"


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    """Writes a checkpoint beside its place and moves it there, so that a reader never sees half of one.

    Arguments:
        path: Where to write; folders are made, a file that is there is replaced.
        tensors: Named tensors, on any device.
        data: Plain data that JSON can hold.

    Example:
        >>> import tempfile
        >>> import torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_checkpoint(f"{folder.name}/last.safetensors", {"w": torch.ones(2)}, {"step": 3})
        >>> load_checkpoint(f"{folder.name}/last.safetensors")
        ({'w': tensor([1., 1.])}, {'step': 3})
        >>> folder.cleanup()
    """
    # Cloned, because tied weights are two names for one tensor, which safetensors does not write.
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "data": json.dumps(data)}
    with write_atomically(path) as aside:
        save_file(flat, aside, metadata)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint that :func:`save_checkpoint` wrote. Nothing in it is executed.

    Arguments:
        path: The file.

    Returns:
        The tensors, on the CPU, and the plain data.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, corrupted or not one of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: there is no checkpoint at {str(path)!r}. Give the file that a run wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {str(path)!r} is not a whole safetensors file ({error}). Use another one.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path: {str(path)!r} has format {metadata.get('format')!r}, expected {FORMAT!r}. "
            "It was not written by this version of pyro_vmem."
        )
    return tensors, json.loads(metadata["data"])
