"""Validation: how good a model is on held-out episodes, without side effects."""

from __future__ import annotations

import pyro
import torch
from torch.utils.data import Dataset

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.random_state import forked
from pyro_vmem.data import Episode
from pyro_vmem.distributions.sparse_categorical import top
from pyro_vmem.infer import VIMCO_ELBO
from pyro_vmem.model import VMA
from pyro_vmem.train.history import Meter, summarise

__all__ = ["first_episode", "validate"]


@torch.no_grad()
def validate(
    vma: VMA, episodes: Dataset[Episode], num_episodes: Count = 8, num_particles: Count = 8, seed: NonNegativeInt = 0
) -> dict[str, float]:
    """Computes the multi-sample bound and its terms on the first episodes of a sampler, in nats per datapoint.

    Parameters and global random state stay unchanged. The same call gives the same numbers.

    Arguments:
        vma: The model and its guide.
        episodes: The source of the episodes.
        num_episodes: The number of episodes; all if there are fewer.
        num_particles: The particles of the bound.
        seed: Seeds the samples of latents.

    Returns:
        `bound`, `reconstruction`, `kl_a`, `kl_z` and `hit_rate`, the accuracy of the guide's most probable slot, on
        episodes with labels.

    Raises:
        ValueError: If there are no episodes.

    Example:
        >>> import pyro_vmem as pv
        >>> sampler = pv.data.EpisodeSampler(pv.data.glyphs(size=12, drawings=12), n_way=5, k_shot=1, n_query=1)
        >>> sorted(validate(pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4), sampler, num_episodes=1))
        ['bound', 'hit_rate', 'kl_a', 'kl_z', 'reconstruction']
    """
    elbo = VIMCO_ELBO(num_particles=num_particles, max_plate_nesting=1)
    first_episode(episodes, "episodes", 1)
    if hasattr(type(episodes), "__len__"):
        num_episodes = min(num_episodes, len(episodes))  # type: ignore[arg-type]
    meter = Meter(smoothing=0.0)
    hits = []
    device = next(vma.parameters()).device
    with forked(device), pyro.get_param_store().scope():
        torch.manual_seed(seed)
        for index in range(num_episodes):
            episode = episodes[index].to(device)
            memory = vma.encode(episode.memory)
            meter.add(summarise(elbo.terms(vma.model, vma.guide, memory, episode.x)))
            if memory.labels is None or episode.labels is None:
                continue
            best = top(vma.address_guide(memory, vma.encode_x(episode.x)), 1)
            chosen = (memory.labels.gather(-1, best) if memory.per_datapoint else memory.labels[best]).squeeze(-1)
            hits.append((chosen == episode.labels).float().mean())
    return meter.row() | ({"hit_rate": float(torch.stack(hits).mean())} if hits else {})


def first_episode(episodes: Dataset[Episode], name: str, least: int) -> Episode:
    """Returns the first episode; raises a `ValueError` if there are too few, or one is not an :class:`Episode`."""
    known = getattr(type(episodes), "__len__", None)
    count = least if known is None else len(episodes)  # type: ignore[arg-type]
    if count < least:
        raise ValueError(f"{name}: got {count}, but {least} are needed. Give more, or train for fewer steps.")
    try:
        first = episodes[0]
    except (TypeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{name}: expected a map from 0, 1, ... to episodes, got {type(episodes).__name__} ({error}). "
            "Use pyro_vmem.data.EpisodeSampler."
        ) from error
    if not isinstance(first, Episode):
        raise ValueError(
            f"{name}: expected each to be a pyro_vmem.data.Episode, got {type(first).__name__}. "
            "Use pyro_vmem.data.EpisodeSampler, or Episode(memory, x, labels)."
        )
    return first
