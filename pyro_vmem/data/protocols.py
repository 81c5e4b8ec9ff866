"""The named protocols for comparing few-shot likelihoods."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vmem._utils.checks import Count, NonNegativeInt, checked
from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.episodes import Episode
from pyro_vmem.data.omniglot import omniglot
from pyro_vmem.memory import Memory

__all__ = ["PROTOCOLS", "Protocol", "ProtocolEpisodes", "protocol"]

_BLANK = -1  # the label of the blank template of an empty memory

Splits = tuple[FewShotDataset, FewShotDataset, FewShotDataset]
Indices = tuple[Sequence[int], Sequence[int]]  # of the templates and of the targets, in the data set


class Protocol(abc.ABC):
    r"""A protocol: images, test classes, and the draw of a target and its memory.

    Always report its name with a figure. Copies of the target in memory, or the ink of the images, change likelihoods
    more than the choice of a model.

    Attributes:
        name: The name.
        resize: The images; see `resize` of :func:`~pyro_vmem.data.omniglot`.
        copies: Whether an exact copy of a target may be in its memory.

    Example:
        >>> sorted(PROTOCOLS)
        ['gmn', 'gmn-distinct', 'vma-45-5', 'whole-memory', 'zholus']
        >>> images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
        >>> episodes = protocol("gmn-distinct").episodes(FewShotDataset(images, torch.arange(60) % 3), shots=4)
        >>> episodes[7]
        Episode(4 slots, 1 targets of shape (1, 8, 8), 1 classes)
    """

    name: ClassVar[str]
    resize: ClassVar[Literal["index28", "nearest26", "maxpool26"]] = "index28"
    copies: ClassVar[bool] = False

    def datasets(self, root: str | os.PathLike[str] | None = None, *, full: bool = False) -> Splits:
        """Returns the classes for training, validation and test.

        Validation classes are whole alphabets, held out of the training classes. Make every choice of development on
        them.

        Arguments:
            root: The folder with Omniglot. Default: the environment variable `PYRO_VMEM_DATA`.
            full: Whether images keep their full size, for example for :class:`~pyro_vmem.data.WarpedEpisodes`.
        """
        resize = None if full else self.resize
        train, validation = omniglot(root, subset="background", resize=resize).split(test=0.15, seed=0)
        return train, validation, omniglot(root, subset="evaluation", resize=resize)

    @checked
    def episodes(
        self,
        dataset: FewShotDataset,
        n_classes: Count = 1,
        shots: NonNegativeInt = 1,
        seed: NonNegativeInt = 0,
        num_episodes: Count | None = None,
    ) -> ProtocolEpisodes:
        """Returns the evaluation episodes of one cell of a table.

        Arguments:
            dataset: The test classes.
            n_classes: The number of classes :math:`C`.
            shots: The number of items :math:`T` in memory, of all classes together.
            seed: The seed of the episodes. Use the same for every model, so that figures are paired.
            num_episodes: The number of episodes. Default: that of the protocol.

        Raises:
            ValueError: If the protocol does not have this cell, or the data set has too few drawings for it.
        """
        return ProtocolEpisodes(self, dataset, n_classes, shots, seed, num_episodes)

    def num_episodes(self, dataset: FewShotDataset) -> int:
        """The number of episodes that the protocol evaluates."""
        return 1000

    @abc.abstractmethod
    def check(self, dataset: FewShotDataset, n_classes: int, shots: int) -> None:
        """Raises a `ValueError` if the protocol does not have this cell."""

    @abc.abstractmethod
    def draw(self, drawings: list[Tensor], n_classes: int, shots: int, index: int, seed: int) -> Indices:
        """Draws episode `index` from the indices of the images of each class, one tensor `(n,)` per class."""


class ProtocolEpisodes(Dataset[Episode]):
    """The episodes of one cell of the table of a protocol; `episodes[i]` depends only on the arguments and `i`."""

    def __init__(
        self,
        protocol: Protocol,
        dataset: FewShotDataset,
        n_classes: int,
        shots: int,
        seed: int,
        num_episodes: int | None,
    ) -> None:
        num_episodes = protocol.num_episodes(dataset) if num_episodes is None else num_episodes
        protocol.check(dataset, n_classes, shots)
        self.protocol, self.dataset = protocol, dataset
        self.n_classes, self.shots, self.seed, self.num_episodes = n_classes, shots, seed, num_episodes
        by_class = dataset.classes.argsort(stable=True)
        self._drawings = list(by_class.split(dataset.class_sizes.tolist()))

    def __len__(self) -> int:
        """The number of episodes."""
        return self.num_episodes

    @usual_defaults()
    def __getitem__(self, index: int) -> Episode:
        """Returns the episode of an index: one target, or several that share a memory."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 to {len(self) - 1}.")
        slots, targets = (
            torch.as_tensor(np.array(part, dtype=np.int64))
            for part in self.protocol.draw(self._drawings, self.n_classes, self.shots, index, self.seed)
        )
        x = FewShotDataset.to_float(self.dataset.images[targets])
        if len(slots):
            memory = Memory(FewShotDataset.to_float(self.dataset.images[slots]), labels=self.dataset.classes[slots])
        else:
            memory = Memory(torch.zeros_like(x[:1]), labels=torch.tensor([_BLANK]))
        return Episode(memory, x, self.dataset.classes[targets])

    def __iter__(self) -> Iterator[Episode]:
        """Iterates over the episodes."""
        for index in range(len(self)):
            yield self[index]


def _check_enough(dataset: FewShotDataset, needed: int, what: str) -> None:
    smallest = int(dataset.class_sizes.min())
    if needed > smallest:
        raise ValueError(f"shots: {what} need {needed} drawings of a class, the smallest class has {smallest}.")


class _Gmn(Protocol):
    """The protocol of Generative Matching Networks (Bartunov, Vetrov, 2017): a sequence of items with replacement.

    :math:`C` classes are drawn, with possible repeats; each item is a drawing of one of them. The target is the item
    after the :math:`T` items in memory, so cells with the same :math:`C` share their sequences. The target is a copy of
    an item in memory with probability :math:`1 - (1 - 1/(20 C))^T`.
    """

    name = "gmn"
    copies = True

    def check(self, dataset: FewShotDataset, n_classes: int, shots: int) -> None:
        """Accepts every number of classes and shots."""

    def draw(self, drawings: list[Tensor], n_classes: int, shots: int, index: int, seed: int) -> Indices:
        generator = np.random.default_rng((seed, index))
        classes = generator.integers(len(drawings), size=n_classes)
        items: list[int] = []
        for _ in range(shots + 1):
            items.append(self._item(drawings[classes[generator.integers(n_classes)]], items, generator))
        return items[:-1], items[-1:]

    def _item(self, of_class: Tensor, before: list[int], generator: np.random.Generator) -> int:
        return int(of_class[generator.integers(len(of_class))])


class _GmnDistinct(_Gmn):
    """The protocol `gmn` without repeated drawings, so that copying does not help."""

    name = "gmn-distinct"
    copies = False

    def check(self, dataset: FewShotDataset, n_classes: int, shots: int) -> None:
        _check_enough(dataset, shots + 1, f"{shots} shots and a target, which may all be of one class,")

    def _item(self, of_class: Tensor, before: list[int], generator: np.random.Generator) -> int:
        left = [i for i in of_class.tolist() if i not in before]
        return int(left[generator.integers(len(left))])


class _Zholus(Protocol):
    """The protocol of the public PyTorch re-implementation: every image is a target once, with its class in memory.

    The number of classes in memory is uniform from 1 to :math:`min(C, T)`, per target. If it is two, the number of
    items of the class of the target is uniform from 1 to :math:`T - 1`.
    """

    name = "zholus"
    resize = "nearest26"

    def num_episodes(self, dataset: FewShotDataset) -> int:
        return len(dataset)

    def check(self, dataset: FewShotDataset, n_classes: int, shots: int) -> None:
        if n_classes > 2 or shots < 1:
            raise ValueError(
                f"n_classes, shots: got {n_classes}, {shots}; 'zholus' has 1 or 2 classes and at least 1 shot. "
                "Take 'gmn-distinct' for others."
            )
        if n_classes > dataset.num_classes:
            raise ValueError(f"n_classes: got {n_classes}, but there are {dataset.num_classes} classes. Use more.")
        _check_enough(dataset, shots + 1, f"{shots} shots and a target of one class")

    def draw(self, drawings: list[Tensor], n_classes: int, shots: int, index: int, seed: int) -> Indices:
        images = torch.cat(drawings)
        owner = np.repeat(np.arange(len(drawings)), [len(d) for d in drawings])
        # The order of the targets is random, so the first ones represent all.
        place = int(np.random.default_rng(seed).permutation(len(images))[index % len(images)])
        target, own = int(images[place]), int(owner[place])
        generator = np.random.default_rng((seed, index))
        in_memory = int(generator.integers(1, min(n_classes, shots) + 1))
        of_target = shots if in_memory == 1 else int(generator.integers(1, shots))
        others = [i for i in drawings[own].tolist() if i != target]
        slots = list(generator.choice(others, of_target, replace=False))
        if of_target < shots:
            other = int(generator.integers(len(drawings) - 1))
            slots += list(generator.choice(drawings[other + (other >= own)], shots - of_target, replace=False))
        return list(generator.permutation(slots)), [target]


class _Shared(Protocol):
    """One memory of :math:`n = T / C` examples of each of :math:`C` classes, shared by targets of one of them.

    Episodes of the same index have the same targets for all :math:`C` and :math:`n`, as far as drawings are left. A
    larger memory contains the smaller ones, so figures of all cells are paired.
    """

    num_targets: ClassVar[int] = 4

    def num_episodes(self, dataset: FewShotDataset) -> int:
        return 250

    def check(self, dataset: FewShotDataset, n_classes: int, shots: int) -> None:
        if shots < n_classes or shots % n_classes:
            raise ValueError(
                f"shots: got {shots}, {self.name!r} has equally many of each of {n_classes} classes. Take a multiple."
            )
        if n_classes > dataset.num_classes:
            raise ValueError(f"n_classes: got {n_classes}, but there are {dataset.num_classes} classes. Lower it.")
        each = shots // n_classes
        _check_enough(dataset, each + 1, f"{each} of each class in memory and a target")

    def draw(self, drawings: list[Tensor], n_classes: int, shots: int, index: int, seed: int) -> Indices:
        generator, each = np.random.default_rng((seed, index)), shots // n_classes
        order = generator.permutation(len(drawings))[:n_classes]
        shuffled = [generator.permutation(drawings[c].numpy()) for c in order]
        slots = np.concatenate([row[:each] for row in shuffled])
        return list(generator.permutation(slots)), list(shuffled[0][each:][-self.num_targets :])


class _Vma(_Shared):
    """The protocol of the paper: 45 training alphabets, five test alphabets, 26x26 images, one memory."""

    name = "vma-45-5"
    resize = "maxpool26"
    test_alphabets: ClassVar[tuple[str, ...]] = ("Tengwar", "Sylheti", "Tibetan", "Syriac_(Serto)", "ULOG")

    def datasets(self, root: str | os.PathLike[str] | None = None, *, full: bool = False) -> Splits:
        rest, test = omniglot(root, resize=self.resize).split(test=self.test_alphabets)
        train, validation = rest.split(test=0.1, seed=0)
        return train, validation, test


class _WholeMemory(_Shared):
    """The protocol `vma-45-5` on the images and classes of `gmn`, with up to 659 classes in one memory."""

    name = "whole-memory"


PROTOCOLS: dict[str, Protocol] = {p.name: p for p in (_Gmn(), _GmnDistinct(), _Zholus(), _Vma(), _WholeMemory())}
"""The protocols by name."""


def protocol(name: str) -> Protocol:
    """Returns the protocol of a name.

    - `gmn`: 28x28 images, a sequence of items drawn with replacement. The target may be a copy.
    - `gmn-distinct`: the same without copies. The headline results use it.
    - `zholus`: 26x26 images by nearest pixel. Every evaluation image is a target once, with its class in memory.
    - `vma-45-5`: 26x26 images by max-pooling, five test alphabets, one memory for all targets.
    - `whole-memory`: the same on the images and classes of `gmn`.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017)
        | https://arxiv.org/abs/1709.07116
        | Few-shot Generative Modelling with Generative Matching Networks (Bartunov, Vetrov, 2018)
        | https://arxiv.org/abs/1612.02192

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> protocol("zholus").resize
        'nearest26'
    """
    if name not in PROTOCOLS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(map(repr, PROTOCOLS))}.")
    return PROTOCOLS[name]
