"""Episodes whose images are moved by a few pixels, each by its own."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vmem.data.episodes import Episode
from pyro_vmem.memory import Memory

__all__ = ["ShiftedEpisodes"]


class ShiftedEpisodes(Dataset[Episode]):
    """Episodes of another sampler with every template and every target moved, up to so many pixels in each direction.

    A lookup that is trained on them cannot go by where a character lies in its image. What is moved in is blank, what
    is moved out is lost.

    Arguments:
        episodes: Where the episodes come from; images with a blank margin.
        pixels: The most that an image is moved by.
        seed: Seeds how far; use one of its own.

    Raises:
        ValueError: If `pixels` or `seed` is negative.

    Example:
        >>> from pyro_vmem.data import EpisodeSampler, FewShotDataset
        >>> dataset = FewShotDataset(torch.rand(60, 1, 8, 8), torch.arange(60) % 6)
        >>> ShiftedEpisodes(EpisodeSampler(dataset, n_way=3, k_shot=4, n_query=2), pixels=2)[5]
        Episode(12 slots, 6 targets of shape (1, 8, 8), 3 classes)
    """

    def __init__(self, episodes: Dataset[Episode], pixels: int = 2, seed: int = 0) -> None:
        for name, value in (("pixels", pixels), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name}: got {value}, expected 0 or more.")
        self.episodes, self.pixels, self.seed = episodes, pixels, seed

    def __getitem__(self, index: int) -> Episode:
        """Return the episode of an index, which depends on the arguments and the index only."""
        episode, generator = self.episodes[index], np.random.default_rng(np.random.SeedSequence((self.seed, index)))
        memory = episode.memory
        templates = self._moved(memory.templates, generator)
        memory = Memory(templates, memory.labels, memory.mask, per_datapoint=memory.per_datapoint)
        return dataclasses.replace(episode, memory=memory, x=self._moved(episode.x, generator))

    def _moved(self, images: Tensor, generator: np.random.Generator) -> Tensor:
        flat = images.flatten(0, -4)
        _, _, height, width = flat.shape
        down, right = torch.from_numpy(generator.integers(0, 2 * self.pixels, (2, len(flat)), endpoint=True))
        rows, columns = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
        padded = F.pad(flat, (self.pixels,) * 4)
        each = torch.arange(len(flat))
        moved = padded.permute(0, 2, 3, 1)[each[:, None, None], rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).reshape(images.shape).contiguous()
