"""Episodes with randomly rotated, stretched, sheared and shifted images."""

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
    """The range of random affine maps of the plane; each number is uniform between minus and plus its bound."""

    rotation: NonNegative = 0.0  # the angle, in degrees
    scale: NonNegative = 0.0  # the logarithm of the factors of width and height, drawn independently
    shear: NonNegative = 0.0  # the sideways shift of a point, as a share of its height
    shift: NonNegative = 0.0  # the shift in each direction, as a share of the side of the image

    def maps(self, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
        """Draws maps as matrices on (x, y, 1), with the centre as origin and the side as unit: `(count, 3, 3)`."""
        angle, width, height, shear, right, down = generator.uniform(-1, 1, (6, count))
        turn, maps = angle * math.radians(self.rotation), np.tile(np.eye(3), (count, 1, 1))
        wide, high = np.exp(width * self.scale), np.exp(height * self.scale)
        cos, sin, aside = np.cos(turn), np.sin(turn), shear * self.shear
        maps[:, 0, 0], maps[:, 0, 1] = cos * wide, cos * aside - sin * high
        maps[:, 1, 0], maps[:, 1, 1] = sin * wide, sin * aside + cos * high
        maps[:, 0, 2], maps[:, 1, 2] = right * self.shift, down * self.shift
        return maps


class WarpedEpisodes(Dataset[Episode]):
    r"""Episodes of another sampler, with an affine map per class followed by one per image.

    The maps of classes make new classes, and the maps of images make new drawings. A guide trained on them cannot use
    the position of a character. All maps are drawn anew in every episode. Each pixel is the nearest source pixel, so
    binary images stay binary; pixels from outside are blank. With `resize`, full-size images are reduced after the
    maps, as in :func:`~pyro_vmem.data.omniglot`, so strokes look the same as in other small images.

    Arguments:
        episodes: The source of episodes: square images with a blank margin, and labels.
        of_class: The range of the maps of classes.
        of_image: The range of the maps of images.
        resize: "index28" or "nearest26"; `None` keeps the size.
        seed: The seed of the maps, different from that of the source.

    Raises:
        ValueError: At the first episode, if images are not square or the memory has no labels.

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
        """Returns the episode of an index, which depends only on the arguments and the index."""
        episode, generator = self.episodes[index], np.random.default_rng((self.seed, index))
        memory = episode.memory
        if memory.labels is None or episode.labels is None:
            raise ValueError(
                "episodes: memory or targets have no labels, so their classes are unknown. Use a sampler with labels."
            )
        labels, images = torch.cat([memory.labels, episode.labels]), torch.cat([memory.templates, episode.x])
        classes, of = np.unique(labels.cpu().numpy(), return_inverse=True)
        maps = self.of_image.maps(len(images), generator) @ self.of_class.maps(len(classes), generator)[of]
        warped = _warp(images, torch.from_numpy(maps).to(images.device), self.resize)
        size = memory.num_slots
        return Episode(Memory(warped[:size], memory.labels, memory.mask), warped[size:], episode.labels)


def _warp(images: Tensor, maps: Tensor, resize: str | None) -> Tensor:
    """Images `(N, C, H, H)` under maps from each pixel to its source."""
    _, channels, side, width = images.shape
    if side != width:
        raise ValueError(f"episodes: got images of {side}x{width}, expected square ones.")
    size, offset = LATTICES[resize] if resize else (side, 0.0)
    # in float64, so that the identity takes exactly the pixels that resizing takes
    places = (torch.arange(size, dtype=torch.float64, device=images.device) + offset) * side / size - side / 2
    y, x = torch.meshgrid(places, places, indexing="ij")
    looks = maps[:, :2, :2] @ torch.stack([x, y]).flatten(1) + maps[:, :2, 2:] * side + side / 2
    looks = looks.floor().long()
    inside = ((looks >= 0) & (looks < side)).all(1)
    pixels = (looks[:, 1] * side + looks[:, 0]).where(inside, 0)
    found = images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1))
    return found.where(inside[:, None], 0.0).unflatten(2, (size, size))
