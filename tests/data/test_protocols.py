"""The named protocols: what is in memory, what is a target, and that one is never in the other unless it may be."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from benchmarks.reproduce import batches
from pyro_vmem.data import (
    PROTOCOLS,
    Episode,
    FewShotDataset,
    RecallSampler,
    merge_episodes,
    protocol,
)
from pyro_vmem.testing import assert_unbiased

NAMES = sorted(PROTOCOLS)
DISTINCT = [name for name in NAMES if not PROTOCOLS[name].copies]


def numbered(classes: int = 30, drawings: int = 20) -> FewShotDataset:
    """Every image is its own number, in a random order of classes: what was drawn can be read off."""
    owner = torch.arange(classes).repeat_interleave(drawings)
    owner = owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(0))]
    return FewShotDataset(torch.arange(len(owner)).float()[:, None], owner)


def numbers(images: torch.Tensor) -> list[int]:
    return [int(n) for n in images.flatten()]


def equal(one: Episode, two: Episode) -> bool:
    return torch.equal(one.memory.templates, two.memory.templates) and torch.equal(one.x, two.x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n_classes", "shots"), [(1, 1), (1, 19), (2, 2), (2, 10)])
def test_counts_and_labels(name: str, n_classes: int, shots: int) -> None:
    dataset = numbered()
    episodes = protocol(name).episodes(dataset, n_classes, shots, seed=3, num_episodes=25)
    assert len(list(episodes)) == 25
    for episode in episodes:
        assert episode.memory.num_slots == shots
        assert episode.memory.labels is not None
        assert len(episode.memory.labels.unique()) <= n_classes
        assert torch.equal(episode.memory.labels, dataset.classes[numbers(episode.memory.templates)])
        assert torch.equal(episode.labels, dataset.classes[numbers(episode.x)])


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_depends_on_seed_and_index_only(name: str) -> None:
    dataset = numbered()
    one, other = (protocol(name).episodes(dataset, 2, 4, seed=seed) for seed in (0, 1))
    assert equal(one[7], protocol(name).episodes(dataset, 2, 4, seed=0, num_episodes=8)[7])
    assert not equal(one[7], one[8])
    assert not equal(one[7], other[7])
    state = torch.get_rng_state()
    one[3]
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(IndexError, match=r"index: got 8, expected 0 to 7"):
        protocol(name).episodes(dataset, 2, 4, num_episodes=8)[8]


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize(("n_classes", "shots"), [(1, 1), (1, 19), (2, 2), (2, 10)])
def test_no_target_is_in_memory_and_no_item_twice(name: str, n_classes: int, shots: int) -> None:
    for episode in protocol(name).episodes(numbered(3), n_classes, shots, num_episodes=50):
        drawn = numbers(torch.cat([episode.memory.templates, episode.x]))
        assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("name", ["vma-45-5", "whole-memory", "zholus"])
@pytest.mark.parametrize(("n_classes", "shots"), [(1, 1), (2, 2), (2, 10)])
def test_the_class_of_a_target_is_in_memory(name: str, n_classes: int, shots: int) -> None:
    for episode in protocol(name).episodes(numbered(5), n_classes, shots, num_episodes=50):
        assert episode.memory.labels is not None
        assert torch.isin(episode.labels, episode.memory.labels).all()


@pytest.mark.parametrize(("n_classes", "shots"), [(1, 1), (1, 5), (2, 5), (4, 19)])
def test_gmn_copies_as_often_as_the_formula_says(n_classes: int, shots: int) -> None:
    """With so many classes, that one is drawn twice for an episode hardly happens."""
    episodes = protocol("gmn").episodes(numbered(2000), n_classes, shots, num_episodes=3000)
    copies = torch.tensor([bool((e.memory.templates == e.x).any()) for e in episodes], dtype=torch.float64)
    expected = 1 - (1 - 1 / (20 * n_classes)) ** shots
    assert_unbiased(copies, torch.tensor(expected, dtype=torch.float64), z=4.0, resolution=0.2)


@pytest.mark.parametrize("name", ["gmn", "gmn-distinct"])
def test_positions_of_one_sequence(name: str) -> None:
    """The target of one position is the next item in the memory of the later ones."""
    dataset = numbered()
    longest = protocol(name).episodes(dataset, 2, 19, num_episodes=20)
    for shots in (0, 1, 4):
        for index, episode in enumerate(protocol(name).episodes(dataset, 2, shots, num_episodes=20)):
            sequence = numbers(longest[index].memory.templates)
            assert numbers(episode.x) == [sequence[shots]]
            assert shots == 0 or numbers(episode.memory.templates) == sequence[:shots]


def test_gmn_draws_classes_with_replacement_and_each_equally_often() -> None:
    episodes = protocol("gmn").episodes(numbered(5), n_classes=2, shots=1, num_episodes=4000)
    labels = torch.stack([e.labels[0] for e in episodes])
    assert_unbiased(torch.eye(5)[labels], torch.full((5,), 0.2), resolution=0.1)
    # two items are of one class if the two classes are the same, 1 in 5, or the same one of them is taken twice, 1 in 2
    same = torch.tensor([float(e.labels[0] == e.memory.labels[0]) for e in episodes])  # type: ignore[index]
    assert_unbiased(same, torch.tensor(0.2 + 0.8 * 0.5), resolution=0.05)


def test_an_empty_memory_is_a_blank_template() -> None:
    (episode,) = protocol("gmn-distinct").episodes(numbered(), 1, 0, num_episodes=1)
    assert numbers(episode.memory.templates) == [0]
    assert episode.memory.labels is not None
    assert not torch.isin(episode.labels, episode.memory.labels).any()


def test_zholus_takes_every_image_once_in_an_order_that_all_cells_share() -> None:
    dataset = numbered(6)
    targets = {}
    for n_classes, shots in [(1, 1), (2, 5), (2, 19)]:
        episodes = protocol("zholus").episodes(dataset, n_classes, shots)
        assert len(episodes) == len(dataset) == 120
        targets[n_classes, shots] = [numbers(e.x)[0] for e in episodes]
        assert sorted(targets[n_classes, shots]) == list(range(120))
    assert targets[1, 1] == targets[2, 5] == targets[2, 19] != list(range(120))


def test_zholus_numbers_of_classes_and_of_items_are_uniform() -> None:
    shots = 5
    episodes = protocol("zholus").episodes(numbered(200), 2, shots)
    own = torch.tensor([int((e.memory.labels == e.labels).sum()) for e in episodes])
    assert_unbiased((own == shots).double(), torch.tensor(0.5, dtype=torch.float64), resolution=0.03)
    counts = torch.eye(shots, dtype=torch.float64)[own[own < shots]][:, 1:]
    assert_unbiased(counts, torch.full((shots - 1,), 1 / (shots - 1), dtype=torch.float64), resolution=0.1)


@pytest.mark.parametrize("name", ["vma-45-5", "whole-memory"])
def test_shared_memories_hold_equally_many_of_each_class(name: str) -> None:
    for episode in protocol(name).episodes(numbered(12), n_classes=10, shots=30, num_episodes=20):
        assert not episode.memory.per_datapoint
        assert episode.memory.labels is not None
        assert episode.memory.labels.unique(return_counts=True)[1].tolist() == [3] * 10
        assert len(episode.x) == 4
        assert len(episode.labels.unique()) == 1
    # with one class and 18 shots, two drawings are left to be targets
    assert [len(e.x) for e in protocol(name).episodes(numbered(12), 1, 18, num_episodes=3)] == [2, 2, 2]


@pytest.mark.parametrize("name", ["vma-45-5", "whole-memory"])
def test_a_larger_shared_memory_is_a_smaller_one_with_more_in_it(name: str) -> None:
    dataset = numbered(12)
    largest = protocol(name).episodes(dataset, 12, 12 * 16, num_episodes=30)
    own = torch.stack([e.labels[0] for e in largest])
    for n_classes, each in [(1, 1), (5, 2), (12, 1), (1, 16)]:
        for episode, large in zip(
            protocol(name).episodes(dataset, n_classes, n_classes * each, num_episodes=30), largest, strict=True
        ):
            assert numbers(episode.x) == numbers(large.x)
            assert set(numbers(episode.memory.templates)) <= set(numbers(large.memory.templates))
    assert len(own.unique()) > 6  # which class the targets are of is random


def test_drawings_are_those_of_classes_of_any_size() -> None:
    dataset = FewShotDataset(torch.arange(30.0)[:, None], torch.tensor([0] * 7 + [1] * 3 + [2] * 20))
    for name in NAMES:
        for episode in protocol(name).episodes(dataset, 1, 2, num_episodes=20):
            assert episode.memory.labels is not None
            assert torch.equal(episode.memory.labels, dataset.classes[numbers(episode.memory.templates)])


def test_batches_merge_single_targets_and_pass_shared_memories_on() -> None:
    episodes = protocol("zholus").episodes(numbered(6), 2, 5)
    parts = list(batches(episodes, 32))
    assert [len(e.x) for e in parts] == [32] * (len(episodes) // 32) + [len(episodes) % 32] * (len(episodes) % 32 > 0)
    assert parts[0].memory.per_datapoint
    assert parts[0].memory.labels is not None
    for row in (0, 31):
        one = episodes[row]
        assert torch.equal(parts[0].memory.templates[row], one.memory.templates)
        assert torch.equal(parts[0].memory.labels[row], one.memory.labels)  # type: ignore[arg-type]
        assert torch.equal(parts[0].x[row : row + 1], one.x)
        assert parts[0].labels[row] == one.labels[0]
    shared = protocol("whole-memory").episodes(numbered(6), 2, 4, num_episodes=3)
    assert all(equal(one, two) for one, two in zip(batches(shared, 32), shared, strict=True))


def test_only_single_targets_with_equally_many_slots_can_be_merged() -> None:
    dataset = numbered(6)
    one, two = (protocol("gmn").episodes(dataset, 1, shots, num_episodes=1)[0] for shots in (1, 2))
    several = protocol("whole-memory").episodes(dataset, 1, 1, num_episodes=1)[0]
    for rows in ([one, two], [several], []):
        with pytest.raises(ValueError, match=r"episodes: expected one target each and equally many slots, got"):
            merge_episodes(rows)


@pytest.mark.parametrize(
    ("name", "n_classes", "shots", "message"),
    [
        ("gmn", 0, 1, r"n_classes: expected a whole number in \[1, 10,000,000\], got 0"),
        ("gmn", 1, -1, r"shots: expected a whole number of at least 0, got \-1"),
        ("gmn-distinct", 2, 20, r"shots: 20 shots and a target.* need 21 drawings of a class, .* has 20"),
        ("zholus", 3, 5, r"n_classes, shots: got 3, 5; 'zholus' has 1 or 2 classes"),
        ("zholus", 1, 0, r"n_classes, shots: got 1, 0; 'zholus' .* at least 1 shot"),
        ("zholus", 1, 20, r"shots: 20 shots .* need 21 drawings"),
        ("vma-45-5", 4, 6, r"shots: got 6, 'vma-45-5' has equally many of each of 4 classes. Take a multiple"),
        ("vma-45-5", 31, 31, r"n_classes: got 31, but there are 30 classes"),
        ("whole-memory", 2, 40, r"shots: 20 of each class in memory and a target need 21 drawings"),
    ],
)
def test_cells_that_a_protocol_does_not_have(name: str, n_classes: int, shots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol(name).episodes(numbered(), n_classes, shots)


def test_unknown_names_and_numbers() -> None:
    with pytest.raises(ValueError, match=r"name: got 'vma', expected one of 'gmn', 'gmn-distinct'"):
        protocol("vma")
    with pytest.raises(ValueError, match=r"num_episodes: expected a whole number in \[1, 10,000,000\] or None, got 0"):
        protocol("gmn").episodes(numbered(), num_episodes=0)
    with pytest.raises(ValueError, match=r"n_classes: got 2, but there are 1 classes"):
        protocol("zholus").episodes(numbered(1), 2, 3)


# Recall


def test_recall_targets_are_copies_of_distinct_slots() -> None:
    sampler = RecallSampler(numbered(), memory_size=50, n_query=20, seed=1)
    episode = sampler[4]
    assert len(set(numbers(episode.memory.templates))) == 50
    assert len(set(numbers(episode.x))) == 20
    assert torch.equal(episode.memory.templates[episode.labels], episode.x)
    assert torch.equal(episode.memory.labels, torch.arange(50))  # type: ignore[arg-type]
    assert equal(episode, RecallSampler(numbered(), 50, 20, seed=1)[4])
    assert not equal(episode, sampler[5])
    assert not equal(episode, RecallSampler(numbered(), 50, 20, seed=2)[4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_size": 601}, r"memory_size: got 601, expected at most 600"),
        ({"memory_size": 5, "n_query": 6}, r"n_query: got 6, expected at most 5"),
        ({"seed": -1}, r"seed: expected a whole number of at least 0, got \-1"),
    ],
)
def test_recall_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallSampler(numbered(), **arguments)


# The data sets themselves

DATA = os.environ.get("PYRO_VMEM_DATA")
needs_omniglot = pytest.mark.skipif(DATA is None, reason="PYRO_VMEM_DATA names no folder that holds Omniglot")


@needs_omniglot
@pytest.mark.parametrize(
    ("name", "classes", "alphabets", "side", "in_all"),
    [
        ("gmn", 659, 20, 28, 964),
        ("gmn-distinct", 659, 20, 28, 964),
        ("whole-memory", 659, 20, 28, 964),
        ("zholus", 659, 20, 26, 964),
        ("vma-45-5", 144, 5, 26, 1623 - 144),
    ],
)
@pytest.mark.long
def test_classes_and_images_of_a_protocol(name: str, classes: int, alphabets: int, side: int, in_all: int) -> None:
    train, validation, test = protocol(name).datasets()
    assert test.num_classes == classes
    assert len(test.alphabet_names) == alphabets
    assert train.num_classes + validation.num_classes == in_all
    for part in (train, validation, test):
        assert part.image_shape == (1, side, side)
        assert part.class_sizes.unique().tolist() == [20]
    groups = [set(part.alphabet_names) for part in (train, validation, test)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 50


@needs_omniglot
def test_gmn_images_are_those_of_gmn() -> None:
    from pathlib import Path

    file = Path(str(DATA)) / "omniglot" / "test_small.npz"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    test = protocol("gmn").datasets()[2]
    with np.load(file) as arrays:
        theirs = {row.tobytes() for array in (arrays[key] for key in arrays.files) for row in array == 0}
    ours = {row.tobytes() for row in (test.images.flatten(1) == 255).numpy()}
    assert ours == theirs
