"""How recognisable and how diverse the draws of a model are, beside real drawings of the same classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegative, NonNegativeInt, Several
from pyro_vmem._utils.random_state import seeded
from pyro_vmem.data import Episode
from pyro_vmem.diagnostics.weights import mean_and_error
from pyro_vmem.model import VMA

__all__ = ["SampleQuality", "sample_quality"]


@dataclass(frozen=True, eq=False)
class SampleQuality:
    """Draws and real drawings of the same classes, one figure per episode, each `(E,)`.

    Attributes:
        recognised: The share of draws whose nearest reference is of the right class.
        recognised_real: The same for real drawings.
        diversity: The mean of 1 minus the cosine between the embeddings of two draws of one class.
        diversity_real: The same for real drawings.
    """

    recognised: Tensor
    recognised_real: Tensor
    diversity: Tensor
    diversity_real: Tensor

    def summary(self) -> dict[str, float]:
        """The means over episodes, their standard errors as `_se`, and draws over real ones as `diversity_ratio`."""
        summary: dict[str, float] = {}
        for name in ("recognised", "recognised_real", "diversity", "diversity_real"):
            summary[name], summary[f"{name}_se"] = mean_and_error(getattr(self, name))
        return summary | {"diversity_ratio": summary["diversity"] / summary["diversity_real"]}


@torch.no_grad()
def sample_quality(
    vma: VMA,
    episodes: Sequence[Episode],
    embed: Callable[[Tensor], Tensor],
    num_draws: Several = 4,
    *,
    temperature: NonNegative = 1.0,
    best_of: Count = 1,
    seed: NonNegativeInt = 0,
) -> SampleQuality:
    r"""Measures the draws :math:`x \sim p(x | m_a)` of a model from each slot of a memory.

    A recogniser that the model has no part in judges the draws. The first target of each class is the reference of this
    class. A draw is recognised if no other reference is nearer to it. The other targets of the class are the real
    drawings that draws are compared with. A draw that copies its template is recognised, but has no diversity.

    Arguments:
        episodes: Memories with one slot per class, and at least three targets of each class.
        embed: The recogniser: images `(N, *event)` to vectors `(N, E)`, in which drawings of one class are near.
        num_draws: Draws from each slot.
        temperature: As of :meth:`VMA.generate`, like `best_of`.

    Raises:
        ValueError: If there are no episodes, or one without labels, with several slots of a class or too few targets.

    Example:
        >>> import pyro_vmem as pv
        >>> sampler = pv.data.EpisodeSampler(pv.data.glyphs(size=12, drawings=6), n_way=5, k_shot=1, n_query=4)
        >>> vma = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> found = sample_quality(vma, [sampler[0], sampler[1]], lambda images: images.flatten(1))
        >>> found.recognised.shape
        torch.Size([2])
    """
    if len(episodes) == 0:
        raise ValueError("episodes: expected at least one, got none.")
    rows = []
    with seeded(seed):
        for episode in episodes:
            labels, slots = episode.labels, episode.memory.labels
            by_class = [] if labels is None or slots is None else [episode.x[labels == label] for label in slots]
            if slots is None or len(slots.unique()) < len(slots) or min(map(len, by_class), default=0) < 3:
                raise ValueError(
                    "episodes: expected one slot per class, and at least three targets of each. Make them by "
                    "EpisodeSampler(dataset, n_way=20, k_shot=1, n_query=5)."
                )
            few = min(map(len, by_class))
            real = _embedded(embed, torch.stack([images[:few] for images in by_class]))
            drawn = [
                vma.generate(episode.memory, num_draws, slot, temperature=temperature, best_of=best_of)
                for slot in range(len(slots))
            ]
            references, seen = real[:, 0], [_embedded(embed, torch.stack(drawn)), real[:, 1:]]
            rows.append([*(_recognised(some, references) for some in seen), *map(_diversity, seen)])
    return SampleQuality(*torch.tensor(rows).T)


def _embedded(embed: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Unit vectors `(C, n, E)` of images `(C, n, *event)`."""
    return torch.nn.functional.normalize(embed(images.flatten(0, 1)).float(), dim=-1).unflatten(0, images.shape[:2])


def _recognised(images: Tensor, references: Tensor) -> float:
    """The share of `(C, n, E)` that are nearest to the reference of their own class, of `(C, E)`."""
    nearest = (images @ references.mT).argmax(-1)
    return float((nearest == torch.arange(len(images), device=images.device).unsqueeze(-1)).float().mean())


def _diversity(images: Tensor) -> float:
    """The mean of 1 minus the cosine over pairs of different images of a class, `(C, n, E)`."""
    n = images.shape[1]
    together = images.sum(1).square().sum(-1)  # n + the sum of the cosines of all ordered pairs
    return float(1 - ((together - n) / (n * (n - 1))).mean())
