"""Episodes: a memory of a few classes, and targets of the same classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vmem._utils.checks import Count, NonNegativeInt, device_named
from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.memory import Memory

__all__ = ["Episode", "EpisodeSampler", "MixedEpisodes", "merge_episodes"]

# The length of an endless sampler, for a DataLoader: more episodes than a training run draws.
_ENDLESS = 10**9

_EPISODE, _DISTRACTORS = 0, 1


@dataclass(frozen=True, eq=False)
class Episode:
    r"""A memory :math:`M` and a minibatch of targets :math:`x` that share its classes.

    Attributes:
        memory: The memory, shared by all targets or one per target.
        x: The targets, with shape :math:`(B, *)`.
        labels: The class of each target, with shape :math:`(B)`, numbered as in `memory.labels`; `None` if unknown.

    Raises:
        ValueError: If memory, targets and labels do not fit together.

    Example:
        >>> memory = Memory(torch.rand(3, 1, 4, 4), labels=torch.tensor([7, 7, 9]))
        >>> Episode(memory, torch.rand(2, 1, 4, 4), torch.tensor([9, 7]))
        Episode(3 slots, 2 targets of shape (1, 4, 4), 2 classes)
    """

    memory: Memory
    x: Float[Tensor, "B ..."]
    labels: Integer[Tensor, " B"] | None = None

    def __post_init__(self) -> None:
        # Shapes and types only: a check of values in a training step would wait for the GPU.
        event, batch = tuple(self.memory.event_shape), tuple(self.memory.batch_shape)
        if self.x.ndim != len(event) + 1 or tuple(self.x.shape[1:]) != event or len(self.x) == 0:
            raise ValueError(
                f"x: expected shape (B, {', '.join(map(str, event))}) as the memory's templates have, got "
                f"{tuple(self.x.shape)}. One target alone is x[None]."
            )
        if batch and batch != (len(self.x),):
            raise ValueError(f"x: expected {batch[0]} targets, one for each memory, got {len(self.x)}.")

    def __repr__(self) -> str:
        classes = "no labels" if self.labels is None else f"{len(torch.unique(self.labels))} classes"
        shape = tuple(self.x.shape[1:])
        return f"Episode({self.memory.num_slots} slots, {len(self.x)} targets of shape {shape}, {classes})"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Episode:
        """Returns the episode on a device; with `non_blocking`, a copy from pinned memory may overlap computation."""
        labels, device = self.x if self.labels is None else self.labels, device_named(device)
        if self.x.device == self.memory.device == labels.device == device:  # as of `Tensor.to`
            return self
        return Episode(
            self.memory.to(device, non_blocking=non_blocking),
            self.x.to(device, non_blocking=non_blocking),
            None if self.labels is None else self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Episode:
        """Returns the episode in page-locked memory, for `DataLoader(pin_memory=True)`."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return Episode(self.memory.pin_memory(), self.x.pin_memory(), labels)


class EpisodeSampler(Dataset[Episode]):
    r"""Draws episodes: `n_way` classes, `k_shot` memory slots and `n_query` targets of each.

    Classes, and the drawings of a class, are drawn without replacement, so a target is never in memory. The order of
    slots and targets is random, so a position says nothing about a class.

    With `n_absent`, some targets are of classes missing from memory. Training on them teaches a model to ignore an
    irrelevant memory.

    `sampler[i]` depends only on the arguments and `i`. It is the same in any process and in any order, also under
    `DataLoader(sampler, batch_size=None, num_workers=2)`.

    With `rotate` or `flip`, transformed classes are classes of their own. Class :math:`c` under the :math:`t`-th
    transform has the label :math:`c + n t`, where :math:`n` is the number of classes of the data set. The transforms
    are the identity, with `rotate` the rotations by 90, 180 and 270 degrees (counter-clockwise), and with `flip` all
    of these after a left-right mirroring.

    Arguments:
        dataset: The classes to draw from.
        n_way: The number of classes in an episode.
        k_shot: The number of memory slots of each class; :math:`S` = `n_way * k_shot`.
        n_query: The number of targets of each class; :math:`B` = `n_way * n_query`.
        rotate: Whether to add the classes rotated by 90, 180 and 270 degrees.
        flip: Whether to add the mirrored classes.
        n_absent: The number of further classes with targets and without slots; :math:`B` = ``(n_way + n_absent) *
            n_query``.
        num_episodes: The number of episodes. Default: endless, and `len` is :math:`10^9`.
        device: The device of images and episodes. Episodes do not depend on it. Default: that of the data set.

    Raises:
        ValueError: If the data set has too few classes or drawings of a class, or images are
            not square with `rotate` or `flip`.

    Example:
        >>> images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
        >>> dataset = FewShotDataset(images, torch.arange(60) % 6)
        >>> sampler = EpisodeSampler(dataset, n_way=3, k_shot=4, n_query=2, seed=0)
        >>> sampler[5]
        Episode(12 slots, 6 targets of shape (1, 8, 8), 3 classes)
        >>> torch.equal(sampler[5].x, sampler[5].x)
        True
    """

    def __init__(
        self,
        dataset: FewShotDataset,
        n_way: Count = 8,
        k_shot: Count = 4,
        n_query: Count = 4,
        seed: NonNegativeInt = 0,
        *,
        rotate: bool = False,
        flip: bool = False,
        n_absent: NonNegativeInt = 0,
        num_episodes: Count | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = dataset.image_shape
        if (rotate or flip) and (len(shape) != 3 or shape[1] != shape[2]):
            raise ValueError(
                f"rotate, flip: got images of shape {shape}, expected square images (C, H, H). Pass "
                "rotate=False, flip=False."
            )
        turns = range(4) if rotate else range(1)
        self._transforms = [(mirror, turn) for mirror in ((False, True) if flip else (False,)) for turn in turns]
        self.num_classes = dataset.num_classes * len(self._transforms)
        if n_way + n_absent > self.num_classes:
            given = f"n_way + n_absent: got {n_way} + {n_absent}" if n_absent else f"n_way: got {n_way}"
            raise ValueError(
                f"{given}, expected at most {self.num_classes}, the classes there are to draw "
                "from. Lower it or use more classes."
            )
        sizes = dataset.class_sizes
        smallest = int(sizes.argmin())
        if k_shot + n_query > int(sizes[smallest]):
            raise ValueError(
                f"k_shot + n_query: got {k_shot} + {n_query}, expected at most {int(sizes[smallest])}, the "
                f"drawings of class {dataset.class_names[smallest]!r}. Lower them or leave that class out "
                "with dataset.subset."
            )

        self.dataset, self.seed, self.num_episodes = dataset, seed, num_episodes
        self.n_way, self.k_shot, self.n_query, self.n_absent = n_way, k_shot, n_query, n_absent
        self.rotate, self.flip = rotate, flip
        self._images = dataset.images if device is None else dataset.images.to(device_named(device))
        self._sizes = sizes
        self._starts = sizes.cumsum(0) - sizes
        self._by_class = dataset.classes.argsort(stable=True)

    def __repr__(self) -> str:
        variants = f", rotate={self.rotate}, flip={self.flip}" if self.rotate or self.flip else ""
        variants += f", n_absent={self.n_absent}" if self.n_absent else ""
        return (
            f"EpisodeSampler({self.num_classes:,} classes, n_way={self.n_way}, k_shot={self.k_shot}, "
            f"n_query={self.n_query}, seed={self.seed}{variants}, num_episodes={self.num_episodes})"
        )

    @property
    def device(self) -> torch.device:
        """The device of the episodes."""
        return self._images.device

    def __len__(self) -> int:
        """The number of episodes; :math:`10^9` if endless."""
        return _ENDLESS if self.num_episodes is None else self.num_episodes

    @usual_defaults()
    def __getitem__(self, index: int) -> Episode:
        """Returns the episode of an index, which depends on the arguments and the index only."""
        generator = self._generator(index, _EPISODE)
        variants = torch.randperm(self.num_classes, generator=generator)[: self.n_way + self.n_absent]
        drawings = self._draw(variants, self.k_shot + self.n_query, generator)
        labels = variants[:, None].expand_as(drawings)
        slots = torch.randperm(self.n_way * self.k_shot, generator=generator)
        targets = torch.randperm(len(variants) * self.n_query, generator=generator)

        def both(table: Tensor) -> Tensor:
            memory, query = table[: self.n_way, : self.k_shot], table[:, self.k_shot :]
            return torch.cat([memory.reshape(-1)[slots], query.reshape(-1)[targets]])

        events, labels = self._load(both(drawings), both(labels))
        size = len(slots)
        return Episode(Memory(events[:size], labels=labels[:size]), events[size:], labels[size:])

    def __iter__(self) -> Iterator[Episode]:
        """Iterates over the episodes."""
        for index in range(len(self)):
            yield self[index]

    @usual_defaults()
    def distractors(self, index: int) -> Memory:
        r"""Returns a memory like that of episode `index`, but of other classes.

        It has `n_way` classes with `k_shot` slots each, and no transform of a class of the episode. The evidence of the
        targets under the right memory minus that under this one measures the contribution of the memory.

        Raises:
            ValueError: If the data set has too few other classes.

        Example:
            >>> dataset = FewShotDataset(torch.randn(60, 3), torch.arange(60) % 6)
            >>> sampler = EpisodeSampler(dataset, n_way=3)
            >>> bool(torch.isin(sampler.distractors(0).labels, sampler[0].labels).any())
            False
        """
        order = torch.randperm(self.num_classes, generator=self._generator(index, _EPISODE))
        taken = order[: self.n_way + self.n_absent]
        n = self.dataset.num_classes
        allowed = torch.ones(n, dtype=torch.bool)
        allowed[taken % n] = False
        others = torch.nonzero(allowed.repeat(len(self._transforms)))[:, 0]
        if len(others) < self.n_way:
            raise ValueError(
                f"n_way: got {self.n_way}, but only {len(others)} of {self.num_classes} classes are not in "
                f"episode {index}, and distractors need {self.n_way}. Lower n_way or use more classes."
            )
        generator = self._generator(index, _DISTRACTORS)
        variants = others[torch.randperm(len(others), generator=generator)[: self.n_way]]
        drawings = self._draw(variants, self.k_shot, generator)
        slots = torch.randperm(self.n_way * self.k_shot, generator=generator)
        events, labels = self._load(drawings.reshape(-1)[slots], variants.repeat_interleave(self.k_shot)[slots])
        return Memory(events, labels=labels)

    def _generator(self, index: int, purpose: int) -> torch.Generator:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 to {len(self) - 1}.")
        state = np.random.SeedSequence((self.seed, index, purpose)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def _draw(self, variants: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draws distinct images of each class, as indices into the data set, with shape (n_way, count)."""
        classes = variants % self.dataset.num_classes
        sizes = self._sizes[classes]
        keys = torch.rand(len(classes), int(sizes.max()), generator=generator, dtype=torch.float32)
        keys.masked_fill_(torch.arange(keys.shape[1]) >= sizes[:, None], -1.0)
        return self._by_class[self._starts[classes][:, None] + keys.topk(count).indices]

    def _load(self, drawings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gathers images as floats, each under the transform of its label; returns images and labels on the device.

        The random numbers are drawn on the CPU, so they are the same on every device.
        """
        device = self._images.device
        events, there = FewShotDataset.to_float(self._images[drawings.to(device)]), labels.to(device)
        if len(self._transforms) == 1:
            return events, there
        transform = labels // self.dataset.num_classes
        for t in torch.unique(transform).tolist():
            mirror, turn = self._transforms[t]
            rows = torch.nonzero(transform == t)[:, 0].to(device)
            chosen = events[rows]
            events[rows] = torch.rot90(chosen.flip(-1) if mirror else chosen, turn, (-2, -1))
        return events, there


class MixedEpisodes(Dataset[Episode]):
    """Episodes of several samplers in turn, such as large and small memories.

    A model works best with the kinds of memory that it was trained on, so train it on all kinds that it has to serve.

    Arguments:
        samplers: The samplers, with different seeds. A repeated sampler gives more episodes.

    Raises:
        ValueError: If there is no sampler.

    Example:
        >>> dataset = FewShotDataset(torch.randn(60, 3), torch.arange(60) % 6)
        >>> mixed = MixedEpisodes([EpisodeSampler(dataset, n_way=4), EpisodeSampler(dataset, 1, 1, n_absent=2, seed=1)])
        >>> [mixed[i].memory.num_slots for i in range(4)]
        [16, 1, 16, 1]
    """

    def __init__(self, samplers: Sequence[Dataset[Episode]]) -> None:
        if not samplers:
            raise ValueError("samplers: got none, expected at least one.")
        self.samplers = list(samplers)

    def __getitem__(self, index: int) -> Episode:
        """Returns the episode of an index, which depends only on the samplers and the index."""
        return self.samplers[index % len(self.samplers)][index // len(self.samplers)]


def merge_episodes(episodes: Sequence[Episode]) -> Episode:
    """Merges episodes of one target each and equally many slots into one with a memory per datapoint.

    Raises:
        ValueError: If there is no episode, one has several targets, or the numbers of slots differ.

    Example:
        >>> memory = Memory(torch.rand(5, 3), labels=torch.arange(5))
        >>> one = Episode(memory, torch.rand(1, 3), torch.tensor([2]))
        >>> merge_episodes([one, one, one]).memory
        Memory(5 slots of (3,), one for each of 3 datapoints, 5 classes)
    """
    if not episodes or any(len(e.x) != 1 or e.memory.num_slots != episodes[0].memory.num_slots for e in episodes):
        found = [(len(e.x), e.memory.num_slots) for e in episodes]
        raise ValueError(f"episodes: expected one target each and equally many slots, got (targets, slots) {found}.")
    labels = [e.memory.labels for e in episodes if e.memory.labels is not None]
    memory = Memory(
        torch.stack([e.memory.templates for e in episodes]),
        labels=torch.stack(labels) if labels else None,
        per_datapoint=True,
    )
    classes = [e.labels for e in episodes if e.labels is not None]
    joined = torch.cat(classes) if len(classes) == len(episodes) else None
    return Episode(memory, torch.cat([e.x for e in episodes]), joined)
