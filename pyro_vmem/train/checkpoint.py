"""Checkpoints: tensors and plain data in one safetensors file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pyro_vmem._utils.checks import Few
from pyro_vmem._utils.files import versions_of, write_atomically
from pyro_vmem._utils.version import __version__

__all__ = ["load_checkpoint", "load_newest", "save_checkpoint", "under"]

# 1: tensors and data. 2: with a checksum of both, and the versions that wrote them.
FORMAT = 2
_PICKLES = (b"PK\x03\x04", b"\x80")  # how torch.save and pickle.dump begin a file


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], data: dict[str, Any], keep: Few = 1) -> None:
    """Writes a checkpoint to a temporary file and moves it, so that a reader never sees half a file.

    Arguments:
        path: The file. Missing folders are made, and an existing file is replaced.
        tensors: Named tensors, of any shape, on any device.
        data: Data that JSON can hold.
        keep: The number of versions to keep. With 2, the previous file becomes `<name>-1.safetensors`.

    Raises:
        OSError: If it cannot be written, as on a full disk. The old file stays.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_checkpoint(f"{folder.name}/last.safetensors", {"w": torch.ones(2)}, {"step": 3})
        >>> load_checkpoint(f"{folder.name}/last.safetensors")
        ({'w': tensor([1., 1.])}, {'step': 3})
        >>> folder.cleanup()
    """
    # Cloned, because tied weights are two names for one tensor, which safetensors does not write.
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    versions = {"pyro_vmem": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
    metadata = {"format": f"pyro_vmem/{FORMAT}", "data": json.dumps(data), "versions": json.dumps(versions)}
    metadata["checksum"] = _checksum(flat, metadata)
    # Not by save_file, which leaves a file of a name unknown to us where it is killed.
    content = save(flat, metadata)
    with write_atomically(path, keep) as aside:
        aside.write_bytes(content)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint that :func:`save_checkpoint` wrote. Nothing in it is executed.

    Arguments:
        path: The file.

    Returns:
        The tensors by name, with their shapes, on the CPU, and the data.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read from the disk.
        ValueError: If it is truncated, corrupted, not a checkpoint, or of a later version of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no checkpoint at {str(path)!r}. Give the file that a run wrote.")
    with path.open("rb") as raw:
        begins = raw.read(4)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, because these are views of the file, which may be gone before they are.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:  # an OSError tells of the disk, or of permissions, and not of the file
        hint = "Delete it and use another one; a run's checkpoint before that is <name>-1.safetensors."
        if begins.startswith(_PICKLES):
            hint = "It looks like a pickle, which is never opened, because that can run code. Convert it yourself."
        raise ValueError(f"path: {str(path)!r} is not a whole safetensors file ({error}). {hint}") from error
    _check_format(path, metadata)
    if "checksum" in metadata and metadata["checksum"] != _checksum(tensors, metadata):
        raise ValueError(
            f"path: {str(path)!r} is corrupted: its content does not have the checksum that it was written with. "
            "Delete it and use another one; a run's checkpoint before that is <name>-1.safetensors."
        )
    try:
        data: dict[str, Any] = json.loads(metadata["data"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"path: {str(path)!r} has no readable data ({error!r}). Use another checkpoint.") from error
    return tensors, data


def load_newest(path: str | Path, set_aside: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint. If it is damaged, reads the newest earlier version that is not, with a warning for each.

    With `set_aside` a damaged file is renamed to `<name>-damaged.safetensors`, so that the next checkpoint does not
    replace a good one. Tensors keep their shapes. Raises a `FileNotFoundError` if no version exists, and a `ValueError`
    if none can be read.
    """
    candidates = versions_of(Path(path))
    errors: dict[Path, ValueError] = {}
    for candidate in candidates:
        try:
            found = load_checkpoint(candidate)
        except ValueError as error:
            errors[candidate] = error
            continue
        for damaged, failed in errors.items():
            if set_aside:
                damaged.replace(damaged.with_name(f"{damaged.stem}-damaged{damaged.suffix}"))
            warnings.warn(f"{failed} Going on from {candidate.name} instead.", RuntimeWarning, stacklevel=2)
        return found
    if errors:
        tried = ", ".join(repr(candidate.name) for candidate in candidates)
        first, *_, last = [*errors.values()] * 2
        raise ValueError(f"{first} None of {tried} can be read. Start again in another folder.") from last
    return load_checkpoint(path)


def under(prefix: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors, of any shape, whose names begin so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    written = re.fullmatch(r"pyro_vmem/(\d{1,9})", metadata.get("format", ""))
    number = int(written[1]) if written else 0
    if number > FORMAT:
        raise ValueError(
            f"path: {str(path)!r} has format {number}, this version of pyro_vmem reads formats 1 to {FORMAT}; it was "
            f"written by versions {metadata.get('versions', 'unknown')}. Update pyro_vmem."
        )
    if number < 1:
        raise ValueError(
            f"path: {str(path)!r} has format {metadata.get('format')!r}, expected 'pyro_vmem/{FORMAT}'. "
            "It was not written by pyro_vmem. Give a checkpoint that pyro_vmem.fit wrote."
        )
    if number >= 2 and "checksum" not in metadata:
        raise ValueError(f"path: {str(path)!r} is corrupted: it has no checksum. Delete it and use another one.")


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of all that a checkpoint holds: names, types, shapes and bytes of tensors, and the metadata."""
    digest = hashlib.sha256()
    rest = {name: value for name, value in metadata.items() if name != "checksum"}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return "sha256:" + digest.hexdigest()
