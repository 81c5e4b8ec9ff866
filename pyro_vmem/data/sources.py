"""Data sets from files: MNIST, folders of images, and ``.npz`` archives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vmem._utils.extras import require
from pyro_vmem.data._files import data_root
from pyro_vmem.data.dataset import FewShotDataset

__all__ = ["from_folder", "from_npz", "mnist"]

Array = NDArray[Any]

_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pbm", ".pgm", ".ppm"},
)


def mnist(root: str | os.PathLike[str] | None = None, *, train: bool = True, download: bool = False) -> FewShotDataset:
    r"""MNIST: handwritten digits, binary, as ten classes of one alphabet.

    Reads ``binmnist_train.npz`` or ``binmnist_test.npz`` (for each digit an array of shape ``(n, 28, 28)``
    with values 0 and 1) in ``root`` or ``root/mnist``, else what torchvision keeps in ``root/MNIST``,
    binarised at 0.5.

    Arguments:
        root: The folder to look in; by default the environment variable ``PYRO_VMEM_DATA``.
        train: Whether to read the 60,000 training images or the 10,000 test images.
        download: Whether to fetch the images, by ``torchvision.datasets.MNIST``, where ``root`` lacks them.

    Returns:
        The data set, with images of shape ``(1, 28, 28)``; classes ``"0"`` to ``"9"``, alphabet ``"digits"``.

    Raises:
        ValueError: No root is known, or a file does not hold binary digits.
        FileNotFoundError: ``root`` does not hold the data.

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
            f"root: got {folder}, expected a folder with {name} or mnist/{name} or torchvision's MNIST/ in "
            "it. Pass download=True to fetch MNIST, or point root (or PYRO_VMEM_DATA) at the data."
        )
    return FewShotDataset(
        images=torch.from_numpy(images[:, None].astype(np.uint8) * np.uint8(255)),
        classes=torch.from_numpy(digits.astype(np.int64)),
        class_names=[str(digit) for digit in range(10)],
        alphabet_names=["digits"],
    )


def _read_binary_mnist(file: Path) -> tuple[Array, Array]:
    arrays = _read_npz(file, "root")
    expected = [str(digit) for digit in range(10)]
    if sorted(arrays) != expected:
        raise ValueError(f"root: {file} holds the arrays {sorted(arrays)}, expected one for each digit, '0' to '9'.")
    for digit in expected:
        images = arrays[digit]
        if images.ndim != 3 or images.shape[1:] != (28, 28) or not np.isin(images, (0, 1)).all():
            raise ValueError(
                f"root: {file} holds the array {digit!r} of shape {images.shape}, expected (n, 28, 28) with "
                "values 0 and 1."
            )
    digits = np.repeat(np.arange(10), [len(arrays[digit]) for digit in expected])
    return np.concatenate([arrays[digit] for digit in expected]) > 0, digits


def from_folder(
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    ink: Literal["dark", "light"] = "dark",
    threshold: float | None = 0.5,
) -> FewShotDataset:
    r"""Images from ``path/<class>/*`` or from ``path/<alphabet>/<class>/*``.

    PNG, JPEG, BMP, GIF, TIFF, WebP and PNM files are read as grey; transparent parts are paper. Other files,
    and names that start with a dot, are passed over. With alphabets, a class is named ``"alphabet/class"``.

    Arguments:
        path: The folder.
        size: The height and width :math:`(H, W)` to bring every image to; by default they must agree.
        ink: Whether the drawing is darker or lighter than its ground.
        threshold: How much ink, in [0, 1), makes a pixel ink, which gives 0 and 255 only; None keeps grey
            values.

    Returns:
        The data set, with shape :math:`(N, 1, H, W)`, in the order of the names.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There is no image, a class is empty, a file is unreadable or a link out of the folder, or
            the sizes differ.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog"):
        ...         Path(folder, name).mkdir()
        ...         Image.new("L", (6, 4)).save(Path(folder, name, "1.png"))
        ...     from_folder(folder)
        FewShotDataset(2 images of shape (1, 4, 6), 2 classes, 1 alphabet, 1 drawing per class)
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"path: got {root}, expected a folder of class folders.")
    if ink not in ("dark", "light"):
        raise ValueError(f"ink: got {ink!r}, expected 'dark' or 'light'.")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold: got {threshold}, expected 0 <= threshold < 1, or None to keep grey values.")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: got {size}, expected a height and a width of at least 1.")

    class_folders = _class_folders(root)
    images: list[Array] = []
    classes: list[int] = []
    first: Path | None = None
    for index, folder in enumerate(class_folders):
        files = _image_files(root, folder)
        if not files:
            raise ValueError(f"path: the class folder {folder} holds no image, expected at least one. Remove it.")
        for file in files:
            image = _read_ink(file, size, ink)
            first = first or file
            if images and image.shape != images[0].shape:
                raise ValueError(
                    f"path: {file} is {image.shape[0]}x{image.shape[1]} and {first} is {images[0].shape[0]}x"
                    f"{images[0].shape[1]} (height x width), expected one size. Pass size=(H, W) to resize."
                )
            images.append(image if threshold is None else (image > 255 * threshold) * np.uint8(255))
            classes.append(index)

    names = [folder.relative_to(root).as_posix() for folder in class_folders]
    alphabets = [name.rpartition("/")[0] or root.resolve().name for name in names]
    return FewShotDataset(torch.from_numpy(np.stack(images)[:, None]), torch.tensor(classes), names, *_index(alphabets))


def _class_folders(root: Path) -> list[Path]:
    """List the folders that are classes, and refuse a layout that mixes classes and alphabets."""
    if _image_files(root, root):
        raise ValueError(f"path: {root} holds images itself, expected class folders with images in them.")
    tops = _folders(root, root)
    inner = {top: _folders(root, top) for top in tops}
    if not any(inner.values()):
        classes = tops
    else:
        for top in tops:
            if not inner[top] or _image_files(root, top):
                raise ValueError(
                    f"path: {top} is not a folder of class folders as others in {root} are, expected either "
                    "class folders or alphabet folders throughout."
                )
        classes = [folder for top in tops for folder in inner[top]]
    if not any(_image_files(root, folder) for folder in classes):
        raise ValueError(f"path: {root} holds no image, expected path/<class>/* or path/<alphabet>/<class>/*.")
    return classes


def _folders(root: Path, folder: Path) -> list[Path]:
    return [entry for entry in _entries(root, folder) if entry.is_dir()]


def _image_files(root: Path, folder: Path) -> list[Path]:
    return [entry for entry in _entries(root, folder) if entry.suffix.lower() in _SUFFIXES and entry.is_file()]


def _entries(root: Path, folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if entry.is_symlink() and not entry.resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"path: {entry} is a link out of {root}, expected files inside it. Copy what it points to."
            )
    return entries


def _read_ink(file: Path, size: tuple[int, int] | None, ink: str) -> NDArray[np.uint8]:
    """Read an image as ink, 0 to 255, with shape (H, W)."""
    pil = require("PIL.Image", "vision")
    try:
        with pil.open(file) as image:
            if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                raise ValueError(f"pixels of 32 bits, mode {image.mode!r}, whose white is not known")
            if image.mode.startswith("I"):  # 16 bits a pixel, which PIL's conversion to grey would clip
                image = pil.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                ground = pil.new("RGBA", image.size, "white" if ink == "dark" else "black")
                image = pil.alpha_composite(ground, image.convert("RGBA"))
            image = image.convert("L")
            if size is not None and image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), pil.Resampling.BOX)
            grey: NDArray[np.uint8] = np.array(image, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise ValueError(f"path: cannot read {file} ({error}), expected an image. Replace or remove it.") from error
    return 255 - grey if ink == "dark" else grey


def from_npz(path: str | os.PathLike[str]) -> FewShotDataset:
    r"""A data set from one ``.npz`` file, as ``numpy.savez`` or :meth:`FewShotDataset.save_npz` writes it.

    The file holds two arrays, and up to three more:

    - ``images``: :math:`(N, H, W)`, :math:`(N, C, H, W)` or vectors :math:`(N, D)`; ``uint8`` with 255 for
      ink, ``bool`` with True for ink, or floating point.
    - ``classes``: :math:`(N)`, indices from 0, or names as strings, which are numbered in sorted order.
    - ``class_names``: :math:`(n)`, strings; optional, and only with indices in ``classes``.
    - ``alphabets``: :math:`(n)`, an index from 0 or a name for each class; optional.
    - ``alphabet_names``: strings; optional, and only with indices in ``alphabets``.

    Arguments:
        path: The file.

    Returns:
        The data set; images get the channel dimension that they lack.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such an archive, or its arrays do not agree.

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
        raise FileNotFoundError(f"path: got {file}, expected an .npz file.")
    arrays = _read_npz(file, "path")
    known = {"images", "classes", "class_names", "alphabets", "alphabet_names"}
    if not {"images", "classes"} <= arrays.keys() <= known:
        raise ValueError(
            f"path: {file} holds the arrays {sorted(arrays)}, expected 'images' and 'classes', and at most "
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
        raise ValueError(f"path: {file} does not hold a data set. {error}") from error


def _read_npz(file: Path, argument: str) -> dict[str, Array]:
    try:
        # Opened here: on a damaged archive np.load leaves what it opened itself to the garbage collector.
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # np.load raises many types on damaged files, and AttributeError on a bare array
        raise ValueError(
            f"{argument}: cannot read {file} ({error}), expected an .npz archive of plain arrays (no objects)."
        ) from error


def _indices(arrays: dict[str, Array], values: str, names: str) -> tuple[torch.Tensor, list[str] | None]:
    """Return indices and names, whichever of the two the file spells out."""
    array = arrays[values]
    if array.ndim != 1:
        raise ValueError(f"{values}: got shape {array.shape}, expected one dimension.")
    if array.dtype.kind == "U":
        if names in arrays:
            raise ValueError(f"{names}: expected none where {values} holds names.")
        return _index(array.tolist())
    found = [str(name) for name in arrays[names]] if names in arrays else None
    return torch.from_numpy(np.ascontiguousarray(array)), found


def _index(names: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
    """Number names in sorted order."""
    unique = sorted(set(names))
    number = {name: i for i, name in enumerate(unique)}
    return torch.tensor([number[name] for name in names]), unique
