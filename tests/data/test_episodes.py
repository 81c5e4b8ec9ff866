"""EpisodeSampler: counts, independence of order and process, and what may not leak into the memory."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from torch.utils.data import DataLoader

from pyro_vmem.data import Episode, EpisodeSampler, FewShotDataset, MixedEpisodes
from pyro_vmem.memory import Memory


def numbered(sizes: list[int], side: int = 4) -> FewShotDataset:
    """A data set whose images all differ, also when turned: the largest pixel of each has its own value."""
    n = sum(sizes)
    images = torch.zeros(n, 1, side, side)
    images[:, 0, 0, 1] = torch.arange(1, n + 1).float()
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    return FewShotDataset(images[shuffled], classes[shuffled])


def identity(images: torch.Tensor) -> list[int]:
    return images.flatten(1).amax(1).int().tolist()


def same(a: Episode, b: Episode) -> bool:
    assert a.memory.labels is not None
    assert b.memory.labels is not None
    return (
        torch.equal(a.memory.templates, b.memory.templates)
        and torch.equal(a.memory.labels, b.memory.labels)
        and torch.equal(a.x, b.x)
        and torch.equal(a.labels, b.labels)
    )


@pytest.mark.parametrize("sizes", [[9] * 12, [7, 30, 8, 7, 11, 9]])
@pytest.mark.parametrize("rotate", [False, True])
def test_counts_labels_and_no_target_in_memory(sizes: list[int], rotate: bool) -> None:
    dataset = numbered(sizes)
    class_of = dict(zip(identity(dataset.images), dataset.classes.tolist(), strict=True))
    sampler = EpisodeSampler(dataset, n_way=5, k_shot=4, n_query=3, seed=1, rotate=rotate)
    for index in range(50):
        episode = sampler[index]
        labels = episode.memory.labels
        assert labels is not None
        assert episode.memory.templates.shape == (20, 1, 4, 4)
        assert episode.x.shape == (15, 1, 4, 4)
        assert episode.x.dtype == torch.float32
        assert sorted(torch.bincount(labels)[torch.unique(labels)].tolist()) == [4] * 5
        assert sorted(torch.bincount(episode.labels)[torch.unique(episode.labels)].tolist()) == [3] * 5
        assert torch.equal(torch.unique(labels), torch.unique(episode.labels))
        for images, own in ((episode.memory.templates, labels), (episode.x, episode.labels)):
            assert [class_of[i] for i in identity(images)] == (own % len(sizes)).tolist()
        for label in torch.unique(labels).tolist():
            drawn = identity(episode.memory.templates[labels == label])
            drawn += identity(episode.x[episode.labels == label])
            assert len(set(drawn)) == 7


def test_all_drawings_of_the_smallest_class_can_be_used() -> None:
    dataset = numbered([5, 40])
    episode = EpisodeSampler(dataset, n_way=2, k_shot=3, n_query=2)[0]
    labels = episode.memory.labels
    assert labels is not None
    drawn = identity(episode.memory.templates[labels == 0]) + identity(episode.x[episode.labels == 0])
    assert sorted(drawn) == [1, 2, 3, 4, 5]


def test_every_class_and_every_drawing_comes_up_about_equally_often() -> None:
    dataset = numbered([6, 12, 6, 6])
    sampler = EpisodeSampler(dataset, n_way=2, k_shot=1, n_query=1)
    classes = torch.zeros(4)
    targets = torch.zeros(31)
    episodes = 2000
    for index in range(episodes):
        episode = sampler[index]
        classes[episode.labels] += 1
        targets[identity(episode.x)] += 1
    # Class counts are binomial(2000, 1/2): 5 standard deviations are 112. Those of a drawing of the class of
    # 12 are binomial(2000, 1/24): mean 83, 5 standard deviations are 45; of the others, mean 167 and 62.
    assert (classes - 1000).abs().max() < 112
    assert (targets[7:19] - 2000 / 24).abs().max() < 45
    assert (torch.cat([targets[1:7], targets[19:]]) - 2000 / 12).abs().max() < 62


def test_positions_tell_nothing_about_the_class() -> None:
    sampler = EpisodeSampler(numbered([8] * 4), n_way=2, k_shot=4, n_query=2)
    pairs = torch.zeros(8, 8)
    targets = 0
    episodes = 1000
    for index in range(episodes):
        episode = sampler[index]
        labels = episode.memory.labels
        assert labels is not None
        pairs += labels[:, None] == labels
        targets += int(episode.labels[0] == episode.labels[1])
    # Two slots share a class with probability 3/7, two targets with 1/3; 5 standard deviations are 78 and 75.
    off_diagonal = pairs[~torch.eye(8, dtype=torch.bool)]
    assert (off_diagonal - episodes * 3 / 7).abs().max() < 78
    assert abs(targets - episodes / 3) < 75


def test_an_episode_depends_on_seed_and_index_only() -> None:
    dataset = numbered([8] * 12)
    one = EpisodeSampler(dataset, n_way=3, seed=5)
    two = EpisodeSampler(dataset, n_way=3, seed=5)
    state = torch.random.get_rng_state()
    late = one[100]
    for index in (*range(3), 100):
        assert same(one[index], two[index])
    assert same(late, two[100])
    assert torch.equal(state, torch.random.get_rng_state())
    assert not same(one[0], one[1])
    assert not same(one[0], EpisodeSampler(dataset, n_way=3, seed=6)[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_loader_with_and_without_workers_gives_the_same_episodes(workers: int) -> None:
    sampler = EpisodeSampler(numbered([8] * 12), n_way=3, rotate=True, num_episodes=7)
    loader = DataLoader(sampler, batch_size=None, num_workers=workers)
    loaded = list(loader)
    assert len(loaded) == len(sampler) == 7
    for a, b in zip(loaded, sampler, strict=True):
        assert same(a, b)


def test_length_and_end() -> None:
    dataset = numbered([8] * 12)
    assert len(EpisodeSampler(dataset)) == 10**9
    sampler = EpisodeSampler(dataset, num_episodes=2)
    assert len(list(sampler)) == 2
    with pytest.raises(IndexError, match="index: got 2, expected 0 to 1"):
        sampler[2]
    with pytest.raises(IndexError, match="index: got -1"):
        sampler[-1]


@pytest.mark.parametrize(
    ("rotate", "flip", "variants"), [(True, False, 4), (False, True, 2), (True, True, 8), (False, False, 1)]
)
def test_variants_are_exact_turns_and_classes_of_their_own(rotate: bool, flip: bool, variants: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3 * 6, 2, 5, 5), generator=generator, dtype=torch.uint8)
    dataset = FewShotDataset(images, torch.arange(18) % 3)
    sampler = EpisodeSampler(dataset, n_way=2, k_shot=2, n_query=2, rotate=rotate, flip=flip)
    assert sampler.num_classes == 3 * variants
    seen = set()
    for index in range(60):
        episode = sampler[index]
        for image, label in zip(episode.x, episode.labels.tolist(), strict=True):
            c, t = label % 3, label // 3
            mirrored, turn = (t >= 4, t % 4) if rotate else (t == 1, 0)
            source = dataset.to_float(dataset.images[dataset.classes == c])
            turned = torch.rot90(source.flip(-1) if mirrored else source, turn, (-2, -1))
            assert (turned == image).flatten(1).all(1).sum() == 1
            seen.add(label)
    assert seen == set(range(3 * variants))


@pytest.mark.parametrize("rotate", [False, True])
def test_distractors_share_no_class_with_their_episode(rotate: bool) -> None:
    dataset = numbered([8] * 7)
    sampler = EpisodeSampler(dataset, n_way=3, k_shot=2, seed=2, rotate=rotate)
    class_of = dict(zip(identity(dataset.images), dataset.classes.tolist(), strict=True))
    for index in range(50):
        memory, episode = sampler.distractors(index), sampler[index]
        assert memory.labels is not None
        assert memory.templates.shape == (6, 1, 4, 4)
        assert torch.bincount(memory.labels)[torch.unique(memory.labels)].tolist() == [2, 2, 2]
        assert not {c % 7 for c in memory.labels.tolist()} & {c % 7 for c in episode.labels.tolist()}
        assert [class_of[i] for i in identity(memory.templates)] == (memory.labels % 7).tolist()
        assert len(set(zip(identity(memory.templates), memory.labels.tolist(), strict=True))) == 6
    assert torch.equal(sampler.distractors(4).templates, sampler.distractors(4).templates)
    assert not torch.equal(sampler.distractors(4).templates, sampler.distractors(5).templates)


def test_distractors_need_enough_other_classes() -> None:
    sampler = EpisodeSampler(numbered([8] * 5), n_way=3)
    with pytest.raises(ValueError, match="n_way: got 3, but only 2 of 5 classes are not in episode 0"):
        sampler.distractors(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_way": 0}, r"n_way: expected a whole number in \[1, 10,000,000\], got 0"),
        ({"k_shot": -1}, r"k_shot: expected a whole number in \[1, 10,000,000\], got \-1"),
        ({"n_query": 0}, r"n_query: expected a whole number in \[1, 10,000,000\], got 0"),
        ({"num_episodes": 0}, r"num_episodes: expected a whole number in \[1, 10,000,000\] or None, got 0"),
        ({"seed": -1}, r"seed: expected a whole number of at least 0, got \-1"),
        ({"n_way": 4}, "n_way: got 4, expected at most 3"),
        ({"n_way": 13, "rotate": True}, "n_way: got 13, expected at most 12"),
        (
            {"n_way": 2, "k_shot": 4, "n_query": 3},
            r"got 4 \+ 3, expected at most 6, the drawings of class '1'",
        ),
    ],
)
def test_refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(numbered([8, 6, 9]), **{"n_way": 2, "k_shot": 2, "n_query": 2, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("event", [(5,), (1, 4, 5)])
@pytest.mark.parametrize("variant", ["rotate", "flip"])
def test_variants_need_square_images(event: tuple[int, ...], variant: str) -> None:
    dataset = FewShotDataset(torch.rand(8, *event), torch.zeros(8).long())
    with pytest.raises(ValueError, match=r"rotate, flip: .* expected square images"):
        EpisodeSampler(dataset, n_way=1, **{variant: True})


def test_vector_events() -> None:
    episode = EpisodeSampler(FewShotDataset(torch.rand(40, 3), torch.arange(40) % 4), n_way=2)[0]
    assert (episode.memory.templates.shape, episode.x.shape) == ((8, 3), (8, 3))


class Recorder(Memory):
    """Stands in for a memory, where no second device can be counted on; it remembers what it was told."""

    def __init__(self, *told: object) -> None:
        super().__init__(torch.zeros(1, 3))
        self.told = told

    def to(self, device: str, non_blocking: bool) -> Recorder:
        return Recorder(device, non_blocking)

    def pin_memory(self) -> Recorder:
        return Recorder("pinned")


def test_to_and_pin_memory_reach_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    episode = Episode(Recorder(), torch.rand(1, 3), torch.tensor([0]))  # type: ignore[arg-type]
    with pyro.validation_enabled(False):  # which refuses tensors without values
        moved = episode.to("meta", non_blocking=True)
    assert moved.memory.told == (torch.device("meta"), True)  # type: ignore[attr-defined]
    assert {moved.x.device.type, moved.labels.device.type} == {"meta"}
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    assert episode.pin_memory().memory.told == ("pinned",)  # type: ignore[attr-defined]
    assert {id(tensor) for tensor in pinned} == {id(episode.x), id(episode.labels)}
    real = Episode(Memory(torch.rand(2, 3)), torch.rand(1, 3), torch.tensor([0])).to("cpu")
    assert real.memory.num_slots == 2


def test_repr() -> None:
    sampler = EpisodeSampler(numbered([8] * 4), n_way=2, flip=True)
    assert repr(sampler) == (
        "EpisodeSampler(8 classes, n_way=2, k_shot=4, n_query=4, seed=0, rotate=False, flip=True, num_episodes=None)"
    )
    assert repr(sampler[0]) == "Episode(8 slots, 8 targets of shape (1, 4, 4), 2 classes)"


def test_absent_classes_have_targets_and_no_slots() -> None:
    dataset = numbered([9] * 12)
    sampler = EpisodeSampler(dataset, n_way=2, k_shot=3, n_query=2, seed=1, n_absent=4)
    plain = EpisodeSampler(dataset, n_way=2, k_shot=3, n_query=2, seed=1)
    for index in range(30):
        episode = sampler[index]
        assert episode.memory.labels is not None
        assert len(episode.x) == 12
        in_memory = torch.isin(episode.labels, episode.memory.labels)
        assert int(in_memory.sum()) == 4
        assert len(episode.labels.unique()) == 6
        drawn = identity(episode.memory.templates) + identity(episode.x)
        assert len(set(drawn)) == len(drawn)
        assert torch.equal(
            dataset.classes[[identity(dataset.images).index(i) for i in identity(episode.x)]], episode.labels
        )
        assert set(episode.memory.labels.tolist()) == set(plain[index].memory.labels.tolist())  # type: ignore[union-attr]
        others = sampler.distractors(index).labels
        assert others is not None
        assert not torch.isin(others, episode.labels).any()
    assert repr(sampler).endswith("seed=1, n_absent=4, num_episodes=None)")


@pytest.mark.parametrize(
    ("n_absent", "message"),
    [
        (-1, r"n_absent: expected a whole number of at least 0, got \-1"),
        (11, r"n_way \+ n_absent: got 2 \+ 11, expected at most 12"),
    ],
)
def test_absent_classes_there_are_not(n_absent: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(numbered([9] * 12), n_way=2, n_absent=n_absent)


def test_kinds_of_episodes_come_in_turn() -> None:
    dataset = numbered([9] * 12)
    one, two = EpisodeSampler(dataset, n_way=2, seed=0), EpisodeSampler(dataset, n_way=3, seed=1)
    mixed = MixedEpisodes([one, two, one])
    for index, expected in enumerate([one[0], two[0], one[0], one[1], two[1], one[1]]):
        assert same(mixed[index], expected)
    with pytest.raises(ValueError, match=r"samplers: got none, expected at least one"):
        MixedEpisodes([])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"memory": torch.rand(3, 4)}, r"memory: expected Memory, got .*\(3, 4\)"),
        ({"x": [[0.0] * 4]}, r"labels: expected a tensor of dtype Integer .*\(2,\), where x has shape \(1, 4\)"),
        ({"x": torch.rand(4)}, r"labels: expected a tensor of dtype Integer .*\(2,\), where x has shape \(4,\)"),
        ({"x": torch.rand(2, 5)}, r"x: expected shape \(B, 4\) .* got \(2, 5\)"),
        ({"x": torch.rand(0, 4), "labels": torch.zeros(0).long()}, r"got \(0, 4\)"),
        (
            {"labels": torch.zeros(2, 1).long()},
            r"labels: expected a tensor of dtype Integer .*\(2, 1\), where x has shape \(2, 4\)",
        ),
        (
            {"labels": torch.zeros(2)},
            r"labels: expected a tensor of dtype Integer .*torch\.float32.*Use labels\.long\(\)",
        ),
        (
            {"memory": Memory(torch.rand(3, 3, 4), per_datapoint=True)},
            "x: expected 3 targets, one for each memory, got 2",
        ),
    ],
)
def test_an_episode_refuses_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "memory": Memory(torch.rand(3, 4)),
        "x": torch.rand(2, 4),
        "labels": torch.zeros(2).long(),
    }
    Episode(**fields)
    with pytest.raises(ValueError, match=message):
        Episode(**fields | changed)


def test_an_episode_may_have_no_labels() -> None:
    episode = Episode(Memory(torch.rand(3, 4)), torch.rand(2, 4))
    assert episode.labels is episode.to("cpu").labels is None
