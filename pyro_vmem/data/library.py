"""Episodes that share one large memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.episodes import Episode
from pyro_vmem.memory import PackedMemory

__all__ = ["LibraryEpisodes"]


class LibraryEpisodes(Dataset[Episode]):
    r"""Episodes that share a memory of some drawings of every class. Targets are the other drawings.

    The memory is packed and may be large. An :class:`~pyro_vmem.IndexedGuide` searches its index, which
    :func:`~pyro_vmem.model.index_memory` makes. :func:`~pyro_vmem.fit` keeps the keys fresh.

    Arguments:
        dataset: The classes; images in 0..255 or in [0, 1].
        k_shot: The number of slots of each class.
        num_targets: The number :math:`B` of targets in an episode, or all remaining drawings if they are fewer.
        seed: The seed of memory and episodes.
        rotate: Whether to add the classes rotated by 90, 180 and 270 degrees, as in :class:`EpisodeSampler`.

    Raises:
        ValueError: If a class has no drawing left for targets, or images are not square with `rotate`.

    Attributes:
        memory: The memory, with labels.

    Example:
        >>> library = LibraryEpisodes(FewShotDataset(torch.rand(60, 1, 4, 4), torch.arange(60) % 6), k_shot=4)
        >>> library.memory
        PackedMemory(24 slots of (1, 4, 4), shared, 6 classes, 8 bits a value)
        >>> library[3]
        Episode(24 slots, 36 targets of shape (1, 4, 4), 6 classes)
    """

    @usual_defaults()
    def __init__(
        self,
        dataset: FewShotDataset,
        k_shot: Count = 1,
        num_targets: Count = 64,
        seed: NonNegativeInt = 0,
        rotate: bool = False,
    ) -> None:
        smallest = int(dataset.class_sizes.min())
        if k_shot >= smallest:
            raise ValueError(
                f"k_shot: got {k_shot}, expected less than {smallest}, the drawings of the smallest class."
            )
        shape = dataset.image_shape
        if rotate and (len(shape) != 3 or shape[1] != shape[2]):
            raise ValueError(f"rotate: got images of shape {shape}, expected square images (C, H, H).")
        turns = range(4) if rotate else range(1)
        self.images = torch.cat([torch.rot90(dataset.images, t, (-2, -1)) if t else dataset.images for t in turns])
        self.classes = torch.cat([dataset.classes + t * dataset.num_classes for t in turns])
        self.seed = seed
        chosen = self._chosen(k_shot)
        self.rest = (~chosen).nonzero().squeeze(-1)
        self.num_targets = min(num_targets, len(self.rest))
        slots = chosen.nonzero().squeeze(-1)
        ink = 255 if dataset.images.dtype == torch.uint8 else 1
        binary = bool(((dataset.images == 0) | (dataset.images == ink)).all())
        batches = (FewShotDataset.to_float(self.images[some]) for some in slots.split(4096))
        self.memory = PackedMemory.pack(batches, 1 if binary else 8, self.classes[slots])

    def _chosen(self, k_shot: int) -> Tensor:
        """The drawings in memory: the first of each class by random keys."""
        keys = np.random.default_rng(self.seed).random(len(self.classes))
        order = torch.from_numpy(np.lexsort((keys, self.classes.numpy())))
        sizes = torch.bincount(self.classes)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        return place < k_shot

    def __repr__(self) -> str:
        return f"LibraryEpisodes({self.memory!r}, {self.num_targets} targets, seed={self.seed})"

    @usual_defaults()
    def __getitem__(self, index: int) -> Episode:
        """Returns the episode of an index, which depends only on the arguments and the index."""
        if index < 0:
            raise IndexError(f"index: got {index}, expected at least 0.")
        generator = np.random.default_rng((self.seed, index))
        drawn = self.rest[torch.from_numpy(generator.choice(len(self.rest), self.num_targets, replace=False))]
        return Episode(self.memory, FewShotDataset.to_float(self.images[drawn]), self.classes[drawn])
