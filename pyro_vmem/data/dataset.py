"""Data sets grouped by class and alphabet, and their splits into disjoint classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Integer, Shaped
from torch import Tensor

from pyro_vmem._utils.checks import NonNegativeInt, Share, checked
from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem.data.storage import save_npz

__all__ = ["FewShotDataset"]


class FewShotDataset:
    r"""Observations :math:`x`, the class of each, and the alphabet of each class.

    Images are channel-first, `(C, H, W)`; in `uint8` images 0 is paper and 255 is ink. Floating-point observations may
    have any event shape, such as `(D,)`.

    Arguments:
        images: The observations, with shape :math:`(N, *)`; `uint8` in 0..255, or floating point.
        classes: The class index of each observation, with shape :math:`(N)`; every class has at least one.
        class_names: The :math:`n` class names, unique. Default: `"0"`, `"1"`, ...
        alphabets: The alphabet index of each class, with shape :math:`(n)`. Default: one alphabet.
        alphabet_names: The alphabet names, unique, each in use. Default: `"0"`, `"1"`, ...

    Raises:
        ValueError: If lengths, types or indices do not agree, a class or an alphabet is empty, a name is repeated, or a
            value is NaN or infinite.

    Example:
        >>> images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
        >>> dataset = FewShotDataset(images, torch.tensor([0, 0, 0, 1, 1, 2]), ["a", "b", "c"])
        >>> dataset
        FewShotDataset(6 images of shape (1, 4, 4), 3 classes, 1 alphabet, 1..3 drawings per class)
    """

    images: Tensor
    classes: Tensor
    class_names: list[str]
    alphabets: Tensor
    alphabet_names: list[str]

    @usual_defaults()
    def __init__(
        self,
        images: Shaped[Tensor, "N ..."],
        classes: Integer[Tensor, " N"],
        class_names: Sequence[str] | None = None,
        alphabets: Integer[Tensor, " n"] | None = None,
        alphabet_names: Sequence[str] | None = None,
    ) -> None:
        _check_images(images)
        self.images, self.classes = images, classes.long()
        self.class_names = _named_or_numbered("classes", self.classes, class_names, "class", "image")
        if alphabets is None:
            alphabets = torch.zeros(self.num_classes, dtype=torch.long)
        if len(alphabets) != self.num_classes:
            raise ValueError(
                f"alphabets: got shape {tuple(alphabets.shape)}, expected ({self.num_classes},), one for each class."
            )
        self.alphabets = alphabets.long()
        self.alphabet_names = _named_or_numbered("alphabets", self.alphabets, alphabet_names, "alphabet", "class")

    def __len__(self) -> int:
        """The number of observations :math:`N`."""
        return len(self.images)

    def __repr__(self) -> str:
        def count(n: int, one: str, many: str) -> str:
            return f"{n:,} {one if n == 1 else many}"

        low, high = int(self.class_sizes.min()), int(self.class_sizes.max())
        spread = count(low, "drawing", "drawings") if low == high else f"{low:,}..{high:,} drawings"
        return (
            f"FewShotDataset({count(len(self), 'image', 'images')} of shape {self.image_shape}, "
            f"{count(self.num_classes, 'class', 'classes')}, "
            f"{count(len(self.alphabet_names), 'alphabet', 'alphabets')}, {spread} per class)"
        )

    @property
    def num_classes(self) -> int:
        """The number of classes :math:`n`."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The event shape of one observation: `(C, H, W)` for images."""
        return tuple(self.images.shape[1:])

    @property
    def class_sizes(self) -> Tensor:
        """The number of observations in each class, with shape :math:`(n)`."""
        return torch.bincount(self.classes, minlength=self.num_classes)

    @staticmethod
    def to_float(images: Tensor) -> Tensor:
        """Converts observations `(*)` to the default dtype of torch; `uint8` values 0..255 become 0..1."""
        if images.dtype == torch.uint8:
            return images.to(torch.get_default_dtype()).div_(255)
        return images.to(torch.get_default_dtype())

    @checked
    @usual_defaults()
    def subset(self, class_indices: Integer[Tensor, " n"]) -> FewShotDataset:
        r"""Returns the data set of some classes, renumbered from 0 in the order given.

        Arguments:
            class_indices: The classes to keep, each once, with shape :math:`(n')`.

        Raises:
            ValueError: If the selection is empty, repeats a class or has an unknown one.

        Example:
            >>> images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
            >>> dataset = FewShotDataset(images, torch.arange(4), ["a", "b", "c", "d"])
            >>> dataset.subset([3, 1]).class_names
            ['d', 'b']
        """
        chosen = class_indices.long()
        if len(chosen) == 0:
            raise ValueError("class_indices: expected at least one class index, got none.")
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"class_indices: got values {low}..{high}, expected 0 to {self.num_classes - 1}.")
        if int(torch.bincount(chosen).max()) > 1:
            raise ValueError("class_indices: got a class more than once, expected each class once.")

        renumbered = torch.full((self.num_classes,), -1)
        renumbered[chosen] = torch.arange(len(chosen))
        classes = renumbered[self.classes]
        kept = classes >= 0
        alphabets_in_use, alphabets = torch.unique(self.alphabets[chosen], return_inverse=True)
        return FewShotDataset(
            images=self.images[kept],
            classes=classes[kept],
            class_names=[self.class_names[i] for i in chosen.tolist()],
            alphabets=alphabets,
            alphabet_names=[self.alphabet_names[i] for i in alphabets_in_use.tolist()],
        )

    @checked
    @usual_defaults()
    def split(
        self,
        by: Literal["alphabet", "class"] = "alphabet",
        test: Share | Sequence[str] = 0.2,
        seed: NonNegativeInt = 0,
    ) -> tuple[FewShotDataset, FewShotDataset]:
        """Splits into two data sets that share no class, and by default no alphabet.

        Arguments:
            by: `"alphabet"` keeps whole alphabets together; `"class"` draws classes from all alphabets.
            test: The share of the classes to hold out, in (0, 1), or the names of the alphabets (with `by="class"`, of
                the classes) to hold out. Whole alphabets are drawn at random until they are closest to the share.
            seed: The seed of the draw; unused with names.

        Returns:
            The training set and the test set, with classes in the same order.

        Raises:
            ValueError: If a name is unknown or repeated, the share is out of range, or one side would be empty.

        Example:
            >>> images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
            >>> dataset = FewShotDataset(
            ...     images, torch.arange(6), alphabets=torch.tensor([0, 0, 1, 1, 2, 2]),
            ...     alphabet_names=["Greek", "Latin", "Lao"],
            ... )
            >>> train, test = dataset.split(by="alphabet", test=["Lao"])
            >>> train.alphabet_names, test.alphabet_names
            (['Greek', 'Latin'], ['Lao'])
            >>> train, test = dataset.split(by="class", test=0.5, seed=1)
            >>> train.num_classes, test.num_classes
            (3, 3)
        """
        names = self.alphabet_names if by == "alphabet" else self.class_names
        group = self.alphabets if by == "alphabet" else torch.arange(self.num_classes)
        if len(names) < 2:
            raise ValueError(
                f"by: got {by!r}, but this data set has one {by} ({names[0]!r}), and both sides of a split "
                "need one. " + ("Use by='class'." if by == "alphabet" and self.num_classes > 1 else "Add classes.")
            )
        if isinstance(test, float):
            held_out = _draw_groups(group, len(names), test, seed)
        else:
            held_out = _named_groups(names, list(test), by)
        is_test = torch.isin(group, held_out)
        return self.subset(torch.nonzero(~is_test)[:, 0]), self.subset(torch.nonzero(is_test)[:, 0])

    def save_npz(self, path: str | os.PathLike[str]) -> None:
        """Writes the data set to one `.npz` file for :func:`~pyro_vmem.data.from_npz`, whole or not at all.

        Example:
            >>> import tempfile
            >>> from pyro_vmem.data import from_npz
            >>> dataset = FewShotDataset(torch.randn(3, 2), torch.tensor([0, 0, 1]), ["a", "b"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     dataset.save_npz(f"{folder}/mine.npz")
            ...     from_npz(f"{folder}/mine.npz")
            FewShotDataset(3 images of shape (2,), 2 classes, 1 alphabet, 1..2 drawings per class)
        """
        images = self.images.detach().cpu()
        if images.dtype == torch.bfloat16:  # numpy lacks bfloat16; float32 holds every value of it
            images = images.float()
        save_npz(
            path,
            images=images.numpy(),
            classes=self.classes.cpu().numpy(),
            class_names=np.array(self.class_names, dtype=np.str_),
            alphabets=self.alphabets.cpu().numpy(),
            alphabet_names=np.array(self.alphabet_names, dtype=np.str_),
        )


def _check_images(images: Tensor) -> None:
    if images.ndim < 2 or 0 in images.shape:
        raise ValueError(
            f"images: got shape {tuple(images.shape)}, expected (N, C, H, W) or (N, D), with at least one entry."
        )
    if images.dtype == torch.uint8:
        if int(images.max()) == 1:
            raise ValueError(
                "images: got uint8 values 0 and 1, expected 0..255 with 255 = ink. Multiply by 255, or pass "
                "images.float()."
            )
    elif not images.is_floating_point():
        raise ValueError(f"images: got {images.dtype}, expected torch.uint8 in 0..255 or floating point.")
    elif not bool(torch.isfinite(images).all()):
        raise ValueError("images: got NaN or infinite values, expected finite ones. Drop or fill them first.")


def _named_or_numbered(name: str, index: Tensor, given: Sequence[str] | None, group: str, member: str) -> list[str]:
    """The names of groups, by default their numbers; each is unique and has a member."""
    low, high = int(index.min()), int(index.max())
    names = [str(i) for i in (range(high + 1) if given is None else given)]
    if low < 0 or high >= len(names):
        raise ValueError(f"{name}: got indices {low}..{high}, expected 0 to {len(names) - 1} for {len(names)} names.")
    if len(set(names)) != len(names):
        twice = next(n for i, n in enumerate(names) if n in names[:i])
        raise ValueError(f"{group}_names: got {twice!r} more than once, expected unique names.")
    sizes = torch.bincount(index, minlength=len(names))
    if int(sizes.min()) == 0:
        empty = int(sizes.argmin())
        raise ValueError(
            f"{name}: {group} {empty} ({names[empty]!r}) is empty, expected at least one {member}. Leave it "
            "out and renumber."
        )
    return names


def _draw_groups(group: Tensor, num_groups: int, share: float, seed: int) -> Tensor:
    """Draws whole groups until their number of classes is closest to a share of all classes."""
    sizes = torch.bincount(group, minlength=num_groups)
    target = share * len(group)
    order = torch.randperm(num_groups, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out: list[int] = []
    total = 0
    for i in order:
        new = total + int(sizes[i])
        # Skip a group that would move the total away from the target.
        if abs(new - target) < abs(total - target) and new <= 1.25 * target and len(held_out) < num_groups - 1:
            held_out.append(i)
            total = new
    if not held_out:  # every group is too large: the smallest is closest
        held_out = [int(sizes.argmin())]
    return torch.tensor(held_out)


def _named_groups(names: list[str], chosen: list[str], by: str) -> Tensor:
    unknown = [name for name in chosen if name not in names]
    if unknown:
        some = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"test: got {unknown[0]!r}, expected names of {by} groups such as {some}.")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"test: got {chosen}, expected each name once.")
    if not 0 < len(chosen) < len(names):
        raise ValueError(
            f"test: got {len(chosen)} of {len(names)} names, expected at least one on each side of the split."
        )
    return torch.tensor([names.index(name) for name in chosen])
