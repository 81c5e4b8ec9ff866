"""Episodes with targets that are copies of templates."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem.data.dataset import FewShotDataset
from pyro_vmem.data.episodes import Episode
from pyro_vmem.memory import Memory

__all__ = ["RecallSampler"]


class RecallSampler(Dataset[Episode]):
    r"""Memories of any images, with targets that are copies of templates: a test of recall.

    This is no few-shot protocol. The best possible NLL is :math:`\log |M|` nats, the cost of the slot. Labels are the
    numbers of the slots, so accuracy is that of the slot. Classes of the images play no role.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017)
        | https://arxiv.org/abs/1709.07116

    Arguments:
        dataset: The images.
        memory_size: The number of slots :math:`S`, drawn without replacement.
        n_query: The number of targets, copies of distinct slots.
        seed: The seed of the episodes.

    Raises:
        ValueError: If there are fewer images than slots, or fewer slots than targets.

    Example:
        >>> sampler = RecallSampler(FewShotDataset(torch.randn(60, 3), torch.arange(60) % 3), memory_size=8, n_query=2)
        >>> episode = sampler[0]
        >>> bool((episode.memory.templates[episode.labels] == episode.x).all())
        True
    """

    def __init__(
        self, dataset: FewShotDataset, memory_size: Count = 256, n_query: Count = 64, seed: NonNegativeInt = 0
    ) -> None:
        if memory_size > len(dataset):
            raise ValueError(f"memory_size: got {memory_size}, expected at most {len(dataset)}, the images there are.")
        if n_query > memory_size:
            raise ValueError(f"n_query: got {n_query}, expected at most {memory_size}, the slots there are.")
        self.dataset, self.memory_size, self.n_query, self.seed = dataset, memory_size, n_query, seed

    @usual_defaults()
    def __getitem__(self, index: int) -> Episode:
        """Returns the episode of an index, which depends only on the arguments and the index."""
        generator = np.random.default_rng((self.seed, index))
        slots = torch.from_numpy(generator.choice(len(self.dataset), self.memory_size, replace=False))
        labels = torch.from_numpy(generator.choice(self.memory_size, self.n_query, replace=False))
        templates = FewShotDataset.to_float(self.dataset.images[slots])
        return Episode(Memory(templates, labels=torch.arange(self.memory_size)), templates[labels], labels)
