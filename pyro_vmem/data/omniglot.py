"""Omniglot from its folders or archives, at the image sizes of the literature."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem._utils.extras import require
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.image_folder import open_picture
from pyro_vmem.data.npz import number_names
from pyro_vmem.data.storage import cache_folder, data_root, load_npz, printable, save_npz

__all__ = ["omniglot", "read_drawing"]

Bits = NDArray[np.bool_]

_SIDE = 105
_MAX_FILE_BYTES = 1 << 20  # drawings take a few hundred bytes each
_CACHE_VERSION = 1
_PARTS = {
    "all": ("images_background", "images_evaluation"),
    "background": ("images_background",),
    "evaluation": ("images_evaluation",),
}


# The rows and columns that a small image takes: its size, and the offset within each step. PIL's NEAREST takes the
# source pixel under the centre of the new one.
LATTICES = {"index28": (28, 0.0), "nearest26": (26, 0.5)}


def _pick(size: int, shift: float) -> Callable[[Bits], Bits]:
    index = np.floor((np.arange(size) + shift) * _SIDE / size).astype(int)
    return lambda ink: ink[:, index][:, :, index]


def _max_pool(ink: Bits) -> Bits:
    pooled: Bits = ink[:, :104, :104].reshape(-1, 26, 4, 26, 4).max(axis=(2, 4))
    return pooled


_RESIZE: dict[str | None, Callable[[Bits], Bits]] = {
    **{name: _pick(*lattice) for name, lattice in LATTICES.items()},
    "maxpool26": _max_pool,
    None: lambda ink: ink,
}


@usual_defaults()
def omniglot(
    root: str | os.PathLike[str] | None = None,
    *,
    subset: Literal["all", "background", "evaluation"] = "all",
    resize: Literal["index28", "nearest26", "maxpool26"] | None = "index28",
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> FewShotDataset:
    r"""Omniglot: handwritten characters of 50 alphabets, 20 drawings of each.

    Reads the folders `images_background/<Alphabet>/characterNN/*.png` and `images_evaluation/...`, or zip archives of
    them, in `root`, `root/omniglot` or `root/omniglot-py`. Images are `(1, H, W)` with 255 for ink; classes are named
    `"Alphabet/characterNN"`. A small cache file makes later calls fast.

    References:
        | Human-level concept learning through probabilistic program induction (Lake et al., 2015)
        | https://github.com/brendenlake/omniglot

    Arguments:
        root: The folder to search. Default: the environment variable `PYRO_VMEM_DATA`.
        subset: `"background"` (964 characters of 30 alphabets), `"evaluation"` (659 of 20) or `"all"`.
        resize: How 105x105 images are reduced. `"index28"` takes rows and columns :math:`\lfloor 105 i / 28 \rfloor`;
            `"nearest26"` is PIL's NEAREST at 26x26; `"maxpool26"` is 4x4 max-pooling of the ink in the 104x104 crop;
            None keeps 105x105.
        cache_dir: The folder of the cache file. Default: `$PYRO_VMEM_CACHE`, else `$XDG_CACHE_HOME/pyro_vmem`, else
            `~/.cache/pyro_vmem`.
        download: Whether `torchvision.datasets.Omniglot` downloads missing data.

    Returns:
        The data set, with shape :math:`(N, 1, H, W)`, in the order of the names.

    Raises:
        ValueError: If a file is not a readable 105x105 drawing.
        FileNotFoundError: If `root` does not hold the data.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = Path(root, "images_background", "Tiny", "character01")
        ...     folder.mkdir(parents=True)
        ...     Image.new("1", (105, 105), 1).save(folder / "0001_01.png")
        ...     omniglot(root, subset="background", cache_dir=root)
        FewShotDataset(1 image of shape (1, 28, 28), 1 class, 1 alphabet, 1 drawing per class)
    """
    folder = data_root(root, "Omniglot")
    sources = [_find(folder, part) or _fetch(folder, part, download) for part in _PARTS[subset]]
    listings = [source.drawings() for source in sources]
    stamps = [[(drawing.member, *drawing.stamp) for drawing in drawings] for drawings in listings]
    content = json.dumps((_CACHE_VERSION, resize, [source.path.name for source in sources], stamps))
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    file = cache_folder(cache_dir) / f"omniglot-{resize}-{subset}-{key}.npz"
    cached = _load_cache(file)
    if cached is None:
        cached = _parse(sources, listings, _RESIZE[resize])
        ink, names = cached
        arrays = {"bits": np.packbits(ink.reshape(len(ink), -1), axis=1), "shape": np.array(ink.shape)}
        # Without a cache the next call is slower, but this one need not fail.
        with contextlib.suppress(OSError):
            save_npz(file, **arrays, names=np.array(names, dtype=np.str_))
    ink, names = cached
    classes, class_names = number_names(names)
    alphabets = number_names([name.partition("/")[0] for name in class_names])
    return FewShotDataset(
        torch.from_numpy(ink[:, None].view(np.uint8) * np.uint8(255)), classes, class_names, *alphabets
    )


@dataclass(frozen=True)
class _Drawing:
    """One image file of a source: its place, and an identifier of its content for the cache."""

    member: str
    class_name: str
    stamp: tuple[int, int]


@dataclass(frozen=True)
class _Source:
    """A folder or a zip archive with one part of the data set."""

    path: Path
    part: str

    def drawings(self) -> list[_Drawing]:
        """Lists the drawings in the order of their names."""
        # Archives are never unpacked. A member is read into memory only if its name is that of a drawing, so a hostile
        # name cannot reach the disk.
        layout = re.compile(rf"{self.part}/([^/\\]+)/(character\d+)/[^/\\]+\.png")
        found = []
        for member, stamp in self._files():
            match = layout.fullmatch(member)
            if match and match[1] not in (".", ".."):
                found.append(_Drawing(member, f"{match[1]}/{match[2]}", stamp))
        if not found:
            raise ValueError(
                f"root: {printable(self.path)} holds no drawing, expected {self.part}/<Alphabet>/characterNN/*.png. It "
                "may be an interrupted copy: remove it and fetch it again."
            )
        return sorted(found, key=lambda drawing: drawing.member)

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        if self.path.is_dir():
            for file in self.path.glob("*/*/*.png"):
                stat = file.stat()
                yield f"{self.part}/{file.relative_to(self.path).as_posix()}", (stat.st_size, stat.st_mtime_ns)
        else:
            stat = self.path.stat()
            with self._archive() as archive:
                for info in archive.infolist():
                    yield info.filename, (stat.st_size, stat.st_mtime_ns)

    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(
                f"root: {printable(self.path)} is not a readable zip archive ({error}). Remove it and fetch it again."
            ) from error

    def read(self, drawings: list[_Drawing]) -> Iterator[Bits]:
        """Reads drawings as ink, each with shape (105, 105), True for ink."""
        if self.path.is_dir():
            yield from (read_drawing(self.path.parent / drawing.member) for drawing in drawings)
            return
        with self._archive() as archive:
            for drawing in drawings:
                size = archive.getinfo(drawing.member).file_size
                yield _ink(partial(archive.open, drawing.member), size, f"{self.path}: {drawing.member}")


def read_drawing(path: Path, resize: str | None = None) -> Bits:
    """Reads one drawing as ink, `(H, W)`, True for ink, and makes it smaller; errors are those of :func:`omniglot`."""
    ink = _ink(partial(path.open, "rb"), path.stat().st_size, str(path))
    return _RESIZE[resize](ink[None])[0]


def _ink(opened: Callable[[], Any], size: int, name: str) -> Bits:
    """The ink of a file that has a size in bytes; `name` is what an error calls it."""
    where = printable(Path(name))
    try:
        if size > _MAX_FILE_BYTES:
            raise ValueError(f"{size} bytes")
        with opened() as file, open_picture(file, ("PNG",), max_pixels=(10 * _SIDE) ** 2) as image:
            ink: Bits = np.asarray(image.convert("L")) < 128
    except Exception as error:  # Pillow and zipfile raise many types on damaged files
        raise ValueError(
            f"root: cannot read {where} ({error}), expected a PNG of a drawing. Replace the file."
        ) from error
    if ink.shape != (_SIDE, _SIDE):
        raise ValueError(
            f"root: {where} is {ink.shape[1]}x{ink.shape[0]}, expected {_SIDE}x{_SIDE}. For "
            "images of other sizes use from_folder."
        )
    return ink


def _find(root: Path, part: str) -> _Source | None:
    for folder in (root, root / "omniglot", root / "omniglot-py"):
        for path in (folder / part, folder / f"{part}.zip"):
            if path.is_dir() or (path.suffix and path.is_file()):
                return _Source(path, part)
    return None


def _fetch(root: Path, part: str, download: bool) -> _Source:
    if download:
        datasets = require("torchvision.datasets", "vision")
        datasets.Omniglot(str(root), background=part == "images_background", download=True)
        source = _find(root, part)
        if source is not None:
            return source
    raise FileNotFoundError(
        f"root: got {printable(root)}, expected a folder with {part}/ or {part}.zip in it, in its omniglot/ or in its "
        f"omniglot-py/. Pass download=True to fetch it, or point root (or PYRO_VMEM_DATA) at the data."
    )


def _parse(
    sources: list[_Source], listings: list[list[_Drawing]], resize: Callable[[Bits], Bits]
) -> tuple[Bits, list[str]]:
    images: list[Bits] = []
    names: list[str] = []
    with tqdm(total=sum(map(len, listings)), desc="Omniglot", unit=" drawings", leave=False, disable=None) as progress:
        for source, drawings in zip(sources, listings, strict=True):
            for drawing, ink in zip(drawings, source.read(drawings), strict=True):
                images.append(resize(ink[None])[0])
                names.append(drawing.class_name)
                progress.update()
    return np.stack(images), names


def _load_cache(file: Path) -> tuple[Bits, list[str]] | None:
    """Returns the content of a cache file, or None if it is absent or damaged."""
    try:
        arrays = load_npz(file, "cache_dir")
        shape = tuple(int(n) for n in arrays["shape"])
        names = [str(name) for name in arrays["names"]]
        ink = np.unpackbits(arrays["bits"], axis=1, count=shape[1] * shape[2]).reshape(shape).view(np.bool_)
    except (ValueError, KeyError, TypeError, IndexError):  # damaged: parse the sources again
        return None
    return (ink, names) if len(names) == len(ink) else None
