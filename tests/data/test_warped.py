"""Warped episodes: which map each image is under, and that the map which moves nothing changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyro_vmem import Memory
from pyro_vmem.data import Affine, Episode, EpisodeSampler, FewShotDataset, WarpedEpisodes
from pyro_vmem.data.omniglot import _RESIZE
from pyro_vmem.data.warped import _warp

STILL = Affine()


def drawings(side: int = 105, classes: int = 5) -> FewShotDataset:
    """Blots that touch no border."""
    images = torch.zeros(classes * 8, 1, side, side)
    inner = images[..., side // 3 : -side // 3, side // 3 : -side // 3]
    inner.copy_(torch.rand(inner.shape, generator=torch.Generator().manual_seed(0)) > 0.5)
    return FewShotDataset(images, torch.arange(classes * 8) % classes)


def plain(dataset: FewShotDataset) -> EpisodeSampler:
    return EpisodeSampler(dataset, n_way=4, k_shot=2, n_query=3, seed=1)


def images(episode: Episode) -> torch.Tensor:
    return torch.cat([episode.memory.templates, episode.x])


@pytest.mark.parametrize("resize", ["index28", "nearest26", None])
def test_the_map_that_moves_nothing_resizes_as_the_data_set_does(resize: str | None) -> None:
    episodes = plain(drawings())
    still = WarpedEpisodes(episodes, STILL, STILL, resize)[3]  # type: ignore[arg-type]
    whole = images(episodes[3])[:, 0].bool().numpy()
    assert np.array_equal(images(still)[:, 0].bool().numpy(), _RESIZE[resize](whole))
    assert torch.equal(still.labels, episodes[3].labels)


def test_maps_move_pixels_where_they_say() -> None:
    image = torch.zeros(1, 1, 20, 20)
    image[0, 0, 4, 13] = 1.0  # row 4, column 13: at (3.5, -5.5) from the centre

    def moved(matrix: list[list[float]]) -> list[list[int]]:
        found: list[list[int]] = (
            _warp(image, torch.tensor([matrix], dtype=torch.float64), None)[0, 0].nonzero().tolist()
        )
        return found

    # A map says where a pixel of the result looks.
    assert moved([[1, 0, 0.1], [0, 1, -0.05], [0, 0, 1]]) == [[5, 11]]  # two columns to the right, one row up
    assert moved([[-1, 0, -0.05], [0, -1, -0.05], [0, 0, 1]]) == [[15, 6]]  # half a turn, and back by a pixel
    assert moved([[0, -1, -0.05], [1, 0, 0], [0, 0, 1]]) == [[6, 4]]  # a quarter turn
    twice = moved([[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]])  # twice as large: the centre's half, at (7, -11) .. cut off
    assert twice == []
    assert moved([[1, 0, 2], [0, 1, 0], [0, 0, 1]]) == []  # all from outside


def test_numbers_say_how_far_maps_go() -> None:
    affine = Affine(rotation=30, scale=0.2, shear=0.3, shift=0.1)
    maps = affine.maps(4000, np.random.default_rng(0))
    wide = np.hypot(maps[:, 0, 0], maps[:, 1, 0])
    angle = np.degrees(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
    high = np.linalg.det(maps[:, :2, :2]) / wide
    shear = (maps[:, 0, 1] * maps[:, 0, 0] + maps[:, 1, 1] * maps[:, 1, 0]) / wide**2 * wide
    for values, most in ((angle, 30), (np.log(wide), 0.2), (np.log(high), 0.2), (shear, 0.3), (maps[:, :2, 2], 0.1)):
        assert np.abs(values).max() <= most * (1 + 1e-9)
        # even between the two: the mean of the square is a third of the end's, give or take four standard errors
        assert np.square(values).mean() == pytest.approx(most**2 / 3, abs=4 * most**2 * math.sqrt(4 / 45 / values.size))
    assert np.array_equal(STILL.maps(3, np.random.default_rng(0)), np.tile(np.eye(3), (3, 1, 1)))


def test_images_of_a_class_share_its_map_and_no_other() -> None:
    image = torch.zeros(1, 21, 21)
    image[0, 10, 15] = 1.0
    same = FewShotDataset(image.repeat(40, 1, 1, 1), torch.arange(40) % 5)
    episode = WarpedEpisodes(plain(same), Affine(rotation=180), STILL, seed=2)[0]
    labels = torch.cat([episode.memory.labels, episode.labels])  # type: ignore[list-item]
    for label in labels.unique():
        of_class = images(episode)[labels == label]
        assert torch.equal(of_class, of_class[:1].expand_as(of_class))
    assert len(torch.unique(images(episode), dim=0)) == 4


def test_each_image_has_a_map_of_its_own_which_index_and_seed_decide() -> None:
    episodes = plain(drawings(side=21))
    warped = WarpedEpisodes(episodes, STILL, Affine(shift=0.2), seed=2)
    assert torch.equal(images(warped[4]), images(WarpedEpisodes(episodes, STILL, Affine(shift=0.2), seed=2)[4]))
    assert not torch.equal(images(warped[4]), images(WarpedEpisodes(episodes, STILL, Affine(shift=0.2), seed=3)[4]))
    dot = torch.zeros(40, 1, 21, 21)
    dot[:, :, 10, 10] = 1.0
    seen = WarpedEpisodes(plain(FewShotDataset(dot, torch.arange(40) % 5)), STILL, Affine(shift=0.2))[0]
    assert len(torch.unique(images(seen), dim=0)) > 10


def test_what_cannot_be_warped_is_refused() -> None:
    with pytest.raises(ValueError, match="seed: expected a whole number of at least 0, got -1"):
        WarpedEpisodes(plain(drawings(21)), seed=-1)
    with pytest.raises(ValueError, match=r"resize: expected .index28. or .nearest26. or None, got .max."):
        WarpedEpisodes(plain(drawings(21)), resize="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got images of 8x9, expected square"):
        WarpedEpisodes(plain(FewShotDataset(torch.rand(40, 1, 8, 9), torch.arange(40) % 5)))[0]
    bare = Episode(Memory(torch.rand(3, 1, 8, 8)), torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="memory or targets have no labels"):
        WarpedEpisodes([bare])[0]  # type: ignore[arg-type]
