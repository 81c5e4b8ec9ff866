"""One-shot classification trials within an alphabet, as published for Omniglot or drawn from any data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegativeInt, Several
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.omniglot import read_drawing
from pyro_vmem.data.storage import printable

__all__ = ["OneShotTrial", "one_shot_trials", "within_alphabet_trials"]


class OneShotTrial(NamedTuple):
    """Images of `C` characters by one drawer, and `B` images by another drawer that are to be told apart.

    Attributes:
        training: One image of each character, with shape `(C, 1, H, W)`; 1 is ink.
        test: The images to classify, with shape `(B, 1, H, W)`.
        right: The training image of the same character, with shape `(B)`.
    """

    training: Tensor
    test: Tensor
    right: Tensor


def one_shot_trials(
    root: str | os.PathLike[str], *, resize: Literal["index28", "nearest26", "maxpool26"] | None = "index28"
) -> list[OneShotTrial]:
    r"""Reads trials in the layout of the published one-shot challenge, the folder `all_runs`.

    Each run is a folder `runNN` with the images `training/*.png` and `test/*.png` and a file `class_labels.txt`. A line
    of this file names a test image and the training image of the same character, as in
    `run01/test/item01.png run01/training/class04.png`. Images have 105x105 pixels.

    References:
        | Human-level concept learning through probabilistic program induction (Lake et al., 2015)
        | https://github.com/brendenlake/omniglot

    Arguments:
        root: The folder with the runs.
        resize: How images become smaller; see :func:`~pyro_vmem.data.omniglot`.

    Raises:
        FileNotFoundError: If there is no run in `root`, or a file that a run names is missing.
        ValueError: If a file cannot be read, or a line of `class_labels.txt` does not name two images of its run.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for image in ("training/class01.png", "test/item01.png"):
        ...         path = Path(root, "run01", image)
        ...         path.parent.mkdir(parents=True)
        ...         Image.new("1", (105, 105), 1).save(path)
        ...     labels = "run01/test/item01.png run01/training/class01.png"
        ...     _ = Path(root, "run01", "class_labels.txt").write_text(labels)
        ...     one_shot_trials(root)[0].training.shape
        torch.Size([1, 1, 28, 28])
    """
    runs = sorted(Path(root).expanduser().glob("run*/class_labels.txt"))
    if not runs:
        raise FileNotFoundError(f"root: {printable(Path(root))} holds no runNN/class_labels.txt. Give such a folder.")
    return [_read_run(labels, resize) for labels in runs]


def within_alphabet_trials(
    dataset: FewShotDataset, num_trials: Count = 20, n_way: Several = 20, seed: NonNegativeInt = 0
) -> list[OneShotTrial]:
    """Draws trials like the published ones: characters of one alphabet, training and test images by two drawers.

    The k-th drawing of each character is taken to be by the k-th drawer of its alphabet, as in Omniglot.

    Arguments:
        dataset: Characters with alphabets.
        num_trials: The number of trials.
        n_way: The number of characters per trial; alphabets with fewer are left out.
        seed: Seeds alphabets, characters and drawers.

    Raises:
        ValueError: If no alphabet has enough characters, or a character has fewer than two drawings.

    Example:
        >>> import pyro_vmem as pv
        >>> trials = within_alphabet_trials(pv.data.glyphs(size=12, drawings=4), num_trials=2, n_way=5)
        >>> len(trials), trials[0].test.shape
        (2, torch.Size([5, 1, 12, 12]))
    """
    alphabets = [
        which.nonzero().squeeze(-1) for which in dataset.alphabets == torch.arange(len(dataset.alphabet_names))[:, None]
    ]
    large = [classes for classes in alphabets if len(classes) >= n_way]
    if not large:
        largest = max(map(len, alphabets))
        raise ValueError(f"n_way: expected at most the {largest} characters of the largest alphabet, got {n_way}.")
    drawers = int(dataset.class_sizes.min())
    if drawers < 2:
        raise ValueError("dataset: expected at least two drawings of each character, got one of some.")
    by_class = dataset.classes.argsort(stable=True).split(dataset.class_sizes.tolist())
    generator = torch.Generator().manual_seed(seed)
    trials = []
    for _ in range(num_trials):
        classes = large[int(torch.randint(len(large), (), generator=generator))]
        chosen = classes[torch.randperm(len(classes), generator=generator)[:n_way]].tolist()
        by_one, by_other = torch.randperm(drawers, generator=generator)[:2].tolist()
        training, test = (
            dataset.to_float(dataset.images[torch.stack([by_class[c][drawer] for c in chosen])])
            for drawer in (by_one, by_other)
        )
        trials.append(OneShotTrial(training, test, torch.arange(n_way)))
    return trials


def _read_run(labels: Path, resize: str | None) -> OneShotTrial:
    """The trial of one run."""
    folder = labels.parent
    pairs = [line.split() for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
    listed = {
        f"{folder.name}/{part}/{file.name}" for part in ("training", "test") for file in (folder / part).iterdir()
    }
    for pair in pairs:
        if len(pair) != 2 or not {*pair} <= listed:  # so that no line names a file outside of its run
            raise ValueError(f"root: {printable(labels)} names {' '.join(pair)!r}, expected two images of its run.")
    if not pairs:
        raise ValueError(f"root: {printable(labels)} is empty, expected one line per test image.")
    training = sorted(
        {right for _, right in pairs} | {name for name in listed if "/training/" in name and name.endswith(".png")}
    )

    def read(names: list[str]) -> Tensor:
        drawings = [read_drawing(folder.parent / name, resize) for name in names]
        return torch.from_numpy(np.stack(drawings)[:, None]).float()

    right = torch.tensor([training.index(right) for _, right in pairs])
    return OneShotTrial(read(training), read([test for test, _ in pairs]), right)
