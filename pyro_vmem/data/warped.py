"""Episodes whose images are turned, stretched, sheared and moved at random: characters that nobody drew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vmem._utils.checks import NonNegative, NonNegativeInt
from pyro_vmem.data.episodes import Episode
from pyro_vmem.data.omniglot import LATTICES
from pyro_vmem.memory import Memory

__all__ = ["Affine", "WarpedEpisodes"]


@dataclass(frozen=True)
class Affine:
    """How far random affine maps of the plane go; each number is drawn evenly between minus and plus what is given.

    Attributes:
        rotation: The angle, in degrees.
        scale: The logarithm of the factor by which width and height are stretched, each by its own.
        shear: By how much of its height a point is moved sideways.
        shift: How far, in each direction, as a share of the image's side.

    Raises:
        ValueError: If one is negative.

    Example:
        >>> Affine(rotation=10).maps(3, np.random.default_rng(0)).shape
        (3, 3, 3)
    """

    rotation: NonNegative = 0.0
    scale: NonNegative = 0.0
    shear: NonNegative = 0.0
    shift: NonNegative = 0.0

    def maps(self, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
        """Draw maps as matrices on (x, y, 1), with the centre as origin and the side as unit: `(count, 3, 3)`."""
        angle, width, height, shear, right, down = generator.uniform(-1, 1, (6, count))
        turn, maps = angle * math.radians(self.rotation), np.tile(np.eye(3), (count, 1, 1))
        wide, high = np.exp(width * self.scale), np.exp(height * self.scale)
        cos, sin, aside = np.cos(turn), np.sin(turn), shear * self.shear
        maps[:, 0, 0], maps[:, 0, 1] = cos * wide, cos * aside - sin * high
        maps[:, 1, 0], maps[:, 1, 1] = sin * wide, sin * aside + cos * high
        maps[:, 0, 2], maps[:, 1, 2] = right * self.shift, down * self.shift
        return maps


class WarpedEpisodes(Dataset[Episode]):
    r"""Episodes of another sampler, each image under an affine map of its own after one of its class.

    The map of the class makes further classes of those there are; that of the image makes further drawings, so that a
    lookup which is trained on them cannot go by where a character lies. Both are drawn anew in every episode. A pixel
    takes the value of the one that lies under it, so images without greys stay so; what comes from outside is blank.
    With `resize`, images as large as they were drawn become small as :func:`~pyro_vmem.data.omniglot` makes them small,
    after the maps: what is drawn then has the strokes that other small images have.

    Arguments:
        episodes: Where the episodes come from; square images with a blank margin, and labels.
        of_class: How far the map of a class goes.
        of_image: How far that of an image goes.
        resize: "index28" or "nearest26", or `None` for images that stay as large as they are.
        seed: Seeds the maps; use one of its own.

    Raises:
        ValueError: If `seed` is negative or `resize` is unknown; at the first episode, if images are not square or the
            memory has no labels.

    Example:
        >>> from pyro_vmem.data import EpisodeSampler, FewShotDataset
        >>> dataset = FewShotDataset(torch.rand(60, 1, 8, 8), torch.arange(60) % 6)
        >>> plain = EpisodeSampler(dataset, n_way=3, k_shot=4, n_query=2)
        >>> WarpedEpisodes(plain, of_class=Affine(rotation=20), of_image=Affine(shift=0.1))[5]
        Episode(12 slots, 6 targets of shape (1, 8, 8), 3 classes)
    """

    def __init__(
        self,
        episodes: Dataset[Episode],
        of_class: Affine = Affine(rotation=20.0, scale=0.2, shear=0.3),
        of_image: Affine = Affine(rotation=10.0, scale=0.1, shear=0.15, shift=0.07),
        resize: Literal["index28", "nearest26"] | None = None,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.episodes, self.of_class, self.of_image = episodes, of_class, of_image
        self.resize, self.seed = resize, seed

    def __repr__(self) -> str:
        return f"WarpedEpisodes({self.episodes!r}, {self.of_class}, {self.of_image}, resize={self.resize!r})"

    def __getitem__(self, index: int) -> Episode:
        """Return the episode of an index, which depends on the arguments and the index only."""
        episode, generator = self.episodes[index], np.random.default_rng(np.random.SeedSequence((self.seed, index)))
        memory = episode.memory
        if memory.labels is None or episode.labels is None:
            raise ValueError(
                "episodes: memory or targets have no labels, so classes cannot be told. Use a sampler that labels."
            )
        labels, images = torch.cat([memory.labels, episode.labels]), torch.cat([memory.templates, episode.x])
        classes, of = np.unique(labels.cpu().numpy(), return_inverse=True)
        maps = self.of_image.maps(len(images), generator) @ self.of_class.maps(len(classes), generator)[of]
        warped = _warp(images, torch.from_numpy(maps).to(images.device), self.resize)
        size = memory.num_slots
        return Episode(Memory(warped[:size], memory.labels, memory.mask), warped[size:], episode.labels)


def _warp(images: Tensor, maps: Tensor, resize: str | None) -> Tensor:
    """Images `(N, C, H, H)` under maps of where each pixel looks."""
    _, channels, side, width = images.shape
    if side != width:
        raise ValueError(f"episodes: got images of {side}x{width}, expected square ones.")
    size, offset = LATTICES[resize] if resize else (side, 0.0)
    # in float64, so that the map that moves nothing takes the very pixels that resizing takes
    places = (torch.arange(size, dtype=torch.float64, device=images.device) + offset) * side / size - side / 2
    y, x = torch.meshgrid(places, places, indexing="ij")
    looks = maps[:, :2, :2] @ torch.stack([x, y]).flatten(1) + maps[:, :2, 2:] * side + side / 2
    looks = looks.floor().long()
    inside = ((looks >= 0) & (looks < side)).all(1)
    pixels = (looks[:, 1] * side + looks[:, 0]).where(inside, 0)
    found = images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1))
    return found.where(inside[:, None], 0.0).unflatten(2, (size, size))
