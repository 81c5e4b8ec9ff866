"""MNIST: handwritten digits, from `.npz` files or from the files of torchvision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem._utils.extras import require
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.storage import data_root, load_npz, printable

__all__ = ["mnist"]


@usual_defaults()
def mnist(root: str | os.PathLike[str] | None = None, *, train: bool = True, download: bool = False) -> FewShotDataset:
    r"""MNIST: handwritten digits, binary, as ten classes of one alphabet.

    Reads `binmnist_train.npz` or `binmnist_test.npz` (for each digit an array of shape `(n, 28, 28)` with values 0 and
    1) in `root` or `root/mnist`. Otherwise reads the files of torchvision in `root/MNIST`, binarised at 0.5.

    Arguments:
        root: The folder to search. Default: the environment variable `PYRO_VMEM_DATA`.
        train: Whether to read the 60,000 training images or the 10,000 test images.
        download: Whether `torchvision.datasets.MNIST` downloads missing images.

    Returns:
        The data set, with images of shape `(1, 28, 28)`; classes `"0"` to `"9"`, alphabet `"digits"`.

    Raises:
        ValueError: If no root is known, or a file does not hold binary digits.
        FileNotFoundError: If `root` does not hold the data.

    Example:
        >>> import tempfile
        >>> digits = {str(digit): np.ones((2, 28, 28), np.float32) for digit in range(10)}
        >>> with tempfile.TemporaryDirectory() as root:
        ...     np.savez(f"{root}/binmnist_test.npz", **digits)
        ...     mnist(root, train=False)
        FewShotDataset(20 images of shape (1, 28, 28), 10 classes, 1 alphabet, 2 drawings per class)
    """
    folder = data_root(root, "MNIST")
    name = f"binmnist_{'train' if train else 'test'}.npz"
    file = next((path for path in (folder / name, folder / "mnist" / name) if path.is_file()), None)
    if file is not None:
        images, digits = _read_binary_mnist(file)
    elif download or (folder / "MNIST").is_dir():
        data = require("torchvision.datasets", "vision").MNIST(str(folder), train=train, download=download)
        images, digits = np.asarray(data.data) > 127, np.asarray(data.targets)
    else:
        raise FileNotFoundError(
            f"root: got {printable(folder)}, expected a folder with {name} or mnist/{name} or torchvision's MNIST/ in "
            "it. Pass download=True to fetch MNIST, or point root (or PYRO_VMEM_DATA) at the data."
        )
    return FewShotDataset(
        images=torch.from_numpy(images[:, None].astype(np.uint8) * np.uint8(255)),
        classes=torch.from_numpy(digits.astype(np.int64)),
        class_names=[str(digit) for digit in range(10)],
        alphabet_names=["digits"],
    )


def _read_binary_mnist(file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    arrays = load_npz(file, "root")
    expected = [str(digit) for digit in range(10)]
    if sorted(arrays) != expected:
        raise ValueError(
            f"root: {printable(file)} holds the arrays {sorted(arrays)}, expected one for each digit, '0' to '9'."
        )
    for digit in expected:
        images = arrays[digit]
        if images.ndim != 3 or images.shape[1:] != (28, 28) or not np.isin(images, (0, 1)).all():
            raise ValueError(
                f"root: {printable(file)} holds the array {digit!r} of shape {images.shape}, expected (n, 28, 28) with "
                "values 0 and 1."
            )
    digits = np.repeat(np.arange(10), [len(arrays[digit]) for digit in expected])
    return np.concatenate([arrays[digit] for digit in expected]) > 0, digits
