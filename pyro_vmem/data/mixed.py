"""Episodes of several kinds, taken in turn."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from pyro_vmem.data.episodes import Episode

__all__ = ["MixedEpisodes"]


class MixedEpisodes(Dataset[Episode]):
    """Episodes of several samplers in turn, such as large and small memories.

    A model works best with the kinds of memory that it was trained on, so train it on all kinds that it has to serve.

    Arguments:
        samplers: The samplers, with different seeds. A repeated sampler gives more episodes.

    Raises:
        ValueError: If there is no sampler.

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
        """Returns the episode of an index, which depends only on the samplers and the index."""
        return self.samplers[index % len(self.samplers)][index // len(self.samplers)]
