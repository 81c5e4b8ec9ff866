"""Data sets from image folders, `class/*.png` or `alphabet/class/*.png`, and the safe opening of images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vmem._utils.checks import Fraction, Size
from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem._utils.extras import require
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.npz import number_names
from pyro_vmem.data.storage import printable

__all__ = ["from_folder", "open_picture"]

Array = NDArray[Any]

_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pbm", ".pgm", ".ppm"},
)
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_MAX_PIXELS = 1 << 26  # 8192 x 8192, more than a camera has; a small file may declare far more


@usual_defaults()
def from_folder(
    path: str | os.PathLike[str],
    *,
    size: tuple[Size, Size] | None = None,
    ink: Literal["dark", "light"] = "dark",
    threshold: Fraction | None = 0.5,
) -> FewShotDataset:
    r"""Images from `path/<class>/*` or from `path/<alphabet>/<class>/*`.

    PNG, JPEG, BMP, GIF, TIFF, WebP and PNM files are read as grey images and rotated by their EXIF data. Only the first
    frame is read. Transparent parts are paper. Other files, and names that start with a dot, are ignored. With
    alphabets, a class is named `"alphabet/class"`.

    Arguments:
        path: The folder.
        size: The height and width :math:`(H, W)` to resize every image to. Default: all images must have one size.
        ink: Whether the drawing is darker or lighter than its background.
        threshold: The level in [0, 1) above which a pixel becomes 255, and below which 0; None keeps grey values.

    Returns:
        The data set, with shape :math:`(N, 1, H, W)`, in the order of the names.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If there is no image, a class is empty, a file is unreadable or a link out of the folder, or the
            sizes differ.

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
        raise FileNotFoundError(f"path: got {printable(root)}, expected a folder of class folders.")

    class_folders = _class_folders(root)
    images: list[Array] = []
    classes: list[int] = []
    first = class_folders[0]
    for index, folder in enumerate(class_folders):
        files = _image_files(root, folder)
        if not files:
            raise ValueError(
                f"path: the class folder {printable(folder)} holds no image, expected at least one. Remove it."
            )
        for file in files:
            image = _read_ink(file, size, ink)
            first = first if images else file
            if images and image.shape != images[0].shape:
                (height, width), (first_height, first_width) = image.shape, images[0].shape
                raise ValueError(
                    f"path: {printable(file)} is {height}x{width} and {printable(first)} is "
                    f"{first_height}x{first_width} (height x width), expected one size. Pass size=(H, W) to resize."
                )
            images.append(image if threshold is None else (image > 255 * threshold) * np.uint8(255))
            classes.append(index)

    names = [folder.relative_to(root).as_posix() for folder in class_folders]
    alphabets = [name.rpartition("/")[0] or root.resolve().name for name in names]
    return FewShotDataset(
        torch.from_numpy(np.stack(images)[:, None]), torch.tensor(classes), names, *number_names(alphabets)
    )


def _class_folders(root: Path) -> list[Path]:
    """Lists the class folders; raises a `ValueError` for a mixture of classes and alphabets."""
    if _image_files(root, root):
        raise ValueError(f"path: {printable(root)} holds images itself, expected class folders with images in them.")
    tops = [entry for entry in _entries(root, root) if entry.is_dir()]
    inner = {top: [entry for entry in _entries(root, top) if entry.is_dir()] for top in tops}
    if not any(inner.values()):
        classes = tops
    else:
        for top in tops:
            if not inner[top] or _image_files(root, top):
                raise ValueError(
                    f"path: {printable(top)} is not a folder of class folders as others in {printable(root)} are, "
                    "expected either class folders or alphabet folders throughout."
                )
        classes = [folder for top in tops for folder in inner[top]]
    if not any(_image_files(root, folder) for folder in classes):
        raise ValueError(
            f"path: {printable(root)} holds no image, expected path/<class>/* or path/<alphabet>/<class>/*."
        )
    return classes


def _image_files(root: Path, folder: Path) -> list[Path]:
    return [entry for entry in _entries(root, folder) if entry.suffix.lower() in _SUFFIXES and entry.is_file()]


def _entries(root: Path, folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if not entry.is_symlink():
            continue
        try:
            target = entry.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # it points to nothing or to itself
            raise ValueError(f"path: {printable(entry)} is a link that leads nowhere. Remove it.") from error
        if not target.is_relative_to(root.resolve()):
            raise ValueError(
                f"path: {printable(entry)} is a link out of {printable(root)}, expected files inside it. Copy what it "
                "points to."
            )
    return entries


def _read_ink(file: Path, size: tuple[int, int] | None, ink: str) -> NDArray[np.uint8]:
    """Reads an image as ink, 0 to 255, with shape (H, W)."""
    pil, operations = require("PIL.Image", "vision"), require("PIL.ImageOps", "vision")
    try:
        with open_picture(file) as image:
            if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                raise ValueError(f"pixels of 32 bits, mode {image.mode!r}, whose white is not known")
            # Cameras store the image as on the sensor, with its rotation in the EXIF data.
            image = operations.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits per pixel, which PIL would clip
                image = pil.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                ground = pil.new("RGBA", image.size, "white" if ink == "dark" else "black")
                image = pil.alpha_composite(ground, image.convert("RGBA"))
            image = image.convert("L")
            if size is not None and image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), pil.Resampling.BOX)
            grey: NDArray[np.uint8] = np.array(image, dtype=np.uint8)
    except Exception as error:  # Pillow raises many types on damaged files
        raise ValueError(
            f"path: cannot read {printable(file)} ({error}), expected an image. Replace or remove it."
        ) from error
    return 255 - grey if ink == "dark" else grey


def open_picture(file: Path | BinaryIO, formats: tuple[str, ...] = _FORMATS, max_pixels: int = _MAX_PIXELS) -> Any:
    """Opens an image for a `with` block, without decoding it; raises a `ValueError` if it has too many pixels."""
    # Without a list, Pillow tries all formats, and starts Ghostscript for EPS, which runs code from the file.
    image = require("PIL.Image", "vision").open(file, formats=formats)
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ValueError(f"{width}x{height} pixels, more than {max_pixels:,}")
    return image
