"""Episodes of several kinds, taken in turn."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from pyro_vmem.data.episodes import Episode

__all__ = ["MixedEpisodes"]


class MixedEpisodes(Dataset[Episode]):
    """Episodes of several samplers in turn, such as large and small memories.

    A model is good at the memories that it was trained on: one that always saw 64 slots, with the target's class among
    them, has to be shown the others too.

    Arguments:
        samplers: Where the episodes come from; give each a seed of its own. One that is there twice comes up twice as
            often.

    Raises:
        ValueError: There is no sampler.

    Example:
        >>> import torch
        >>> from pyro_vmem.data import EpisodeSampler, FewShotDataset
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
        """Return the episode of an index, which depends on the samplers and the index only."""
        return self.samplers[index % len(self.samplers)][index // len(self.samplers)]
