"""A data set in one `.npz` file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.storage import load_npz, printable

__all__ = ["from_npz", "number_names"]

Array = NDArray[Any]


@usual_defaults()
def from_npz(path: str | os.PathLike[str]) -> FewShotDataset:
    r"""Reads a data set from one `.npz` file of `numpy.savez` or :meth:`FewShotDataset.save_npz`.

    The file holds two arrays, and up to three more:

    - `images`: :math:`(N, H, W)`, :math:`(N, C, H, W)` or vectors :math:`(N, D)`; `uint8` with 255 for ink, `bool` with
      True for ink, or floating point.
    - `classes`: :math:`(N)`, indices from 0, or names as strings, numbered in sorted order.
    - `class_names`: :math:`(n)`, strings; optional, and only with indices in `classes`.
    - `alphabets`: :math:`(n)`, an index from 0 or a name for each class; optional.
    - `alphabet_names`: strings; optional, and only with indices in `alphabets`.

    Arguments:
        path: The file.

    Returns:
        The data set. Images without a channel dim get one.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not such an archive, or its arrays do not agree.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/a.npz", images=np.zeros((3, 8, 8), np.uint8), classes=["b", "a", "a"])
        ...     dataset = from_npz(f"{folder}/a.npz")
        >>> dataset.image_shape, dataset.class_names, dataset.classes
        ((1, 8, 8), ['a', 'b'], tensor([1, 0, 0]))
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"path: got {printable(file)}, expected an .npz file.")
    arrays = load_npz(file, "path")
    known = {"images", "classes", "class_names", "alphabets", "alphabet_names"}
    if not {"images", "classes"} <= arrays.keys() <= known:
        raise ValueError(
            f"path: {printable(file)} holds the arrays {sorted(arrays)}, expected 'images' and 'classes', and at most "
            f"'class_names', 'alphabets' and 'alphabet_names' beside them."
        )
    images = arrays["images"]
    if images.dtype == np.bool_:
        images = images * np.uint8(255)
    if images.ndim == 3:
        images = images[:, None]
    try:
        return FewShotDataset(
            torch.from_numpy(np.ascontiguousarray(images)),
            *_indices(arrays, "classes", "class_names"),
            *(_indices(arrays, "alphabets", "alphabet_names") if "alphabets" in arrays else (None, None)),
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"path: {printable(file)} does not hold a data set. {error}") from error


def _indices(arrays: dict[str, Array], values: str, names: str) -> tuple[torch.Tensor, list[str] | None]:
    """Returns indices and names, given either of the two."""
    array = arrays[values]
    if array.ndim != 1:
        raise ValueError(f"{values}: got shape {array.shape}, expected one dimension.")
    if array.dtype.kind == "U":
        if names in arrays:
            raise ValueError(f"{names}: expected none where {values} holds names.")
        return number_names(array.tolist())
    found = [str(name) for name in arrays[names]] if names in arrays else None
    # torch has no arithmetic on unsigned integers of more than eight bits
    whole = array.astype(np.int64) if array.dtype.kind == "u" else np.ascontiguousarray(array)
    return torch.from_numpy(whole), found


def number_names(names: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
    """Numbers names in sorted order: the number of each, `(N,)`, and the sorted names."""
    unique = sorted(set(names))
    number = {name: i for i, name in enumerate(unique)}
    return torch.tensor([number[name] for name in names]), unique
