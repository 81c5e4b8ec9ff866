"""Episodes that share one memory: what is in it, what is drawn, and a run that trains on it by an index."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import blobs

import pyro_vmem as pv
from pyro_vmem.app import Experiment, cli
from pyro_vmem.data import FewShotDataset, LibraryEpisodes


@pytest.mark.parametrize("rotate", [False, True])
def test_memory_and_targets_are_different_drawings_of_the_same_classes(rotate: bool) -> None:
    # Each image is its own number, in its upper left corner, so that turned ones can be told.
    images = torch.zeros(40, 1, 3, 3)
    images[:, 0, 0, 0] = torch.arange(40) / 64
    dataset = FewShotDataset(images, torch.arange(40) % 5)
    library = LibraryEpisodes(dataset, k_shot=3, num_targets=11, seed=2, rotate=rotate)
    memory, turns = library.memory, 4 if rotate else 1
    assert memory.labels is not None
    assert memory.labels.bincount().tolist() == [3] * 5 * turns
    assert memory.bits == 8

    def numbers(values: torch.Tensor) -> list[int]:
        return (values.amax((1, 2, 3)) * 64).round().int().tolist()

    for templates, labels in ((memory.templates, memory.labels), (library[4].x, library[4].labels)):
        pairs = zip(templates, labels, strict=True)
        turned = torch.stack([torch.rot90(t, -(int(c) // 5), (-2, -1)) for t, c in pairs])
        assert bool((turned[:, 0, 0, 0] == turned.amax((1, 2, 3))).all())
        assert [n % 5 for n in numbers(templates)] == (labels % 5).tolist()
    there = set(zip(numbers(memory.templates), memory.labels.tolist(), strict=True))
    seen = set()
    for index in range(60):
        episode = library[index]
        drawn = list(zip(numbers(episode.x), episode.labels.tolist(), strict=True))
        assert (episode.memory is memory, len(set(drawn))) == (True, 11)
        seen |= set(drawn)
    assert not seen & there
    assert len(seen) == (40 - 15) * turns  # all others come up
    again = LibraryEpisodes(dataset, k_shot=3, num_targets=11, seed=2, rotate=rotate)
    assert torch.equal(again.memory.packed, memory.packed)
    assert torch.equal(again[7].x, library[7].x)
    assert not torch.equal(LibraryEpisodes(dataset, 3, 11, seed=3, rotate=rotate).memory.packed, memory.packed)


def test_binary_images_are_stored_as_bits() -> None:
    library = LibraryEpisodes(blobs(), num_targets=1000)
    assert (library.memory.bits, library.memory.num_slots, library.num_targets) == (1, 16, 80)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none in memory": ({"k_shot": 0}, r"k_shot: expected a whole number in \[1, 10,000,000\], got 0"),
    "none left": ({"k_shot": 6}, "k_shot: got 6, expected less than 6"),
    "no target": ({"num_targets": 0}, r"num_targets: expected a whole number in \[1, 10,000,000\], got 0"),
    "seed": ({"seed": -1}, r"seed: expected a whole number of at least 0, got \-1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(name: str) -> None:
    arguments, match = WRONG[name]
    with pytest.raises(ValueError, match=match):
        LibraryEpisodes(blobs(), **arguments)
    with pytest.raises(ValueError, match=r"rotate: got images of shape \(3,\)"):
        LibraryEpisodes(FewShotDataset(torch.rand(8, 3), torch.arange(8) % 2), rotate=True)
    with pytest.raises(IndexError, match="index: got -1"):
        LibraryEpisodes(blobs())[-1]


def test_a_command_trains_on_it_and_refreshes_its_keys(tmp_path: Path) -> None:
    blobs(classes=40).save_npz(tmp_path / "blobs.npz")
    words = (
        f"train --data npz --data-root {tmp_path / 'blobs.npz'} --out {tmp_path / 'run'} --steps 2 --k-shot 1 --n-way 4"
    )
    words += " --n-query 1 --latent-dim 4 --width 4 --library true --address_guide IndexedGuide --address_guide.k 3"
    assert cli.main([*words.split(), "--refresh-slots", "7", "--device", "cpu"]) == 0
    experiment = Experiment.read(tmp_path / "run")
    assert (experiment.library, experiment.refresh_slots) == (True, 7)
    history = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert {"key_overlap", "key_missed", "key_drift"} <= set(history[0].split(","))
    vma, episodes, _ = experiment.begin()
    assert isinstance(episodes, LibraryEpisodes)
    assert isinstance(vma.address_guide, pv.IndexedGuide)
    assert episodes.memory.index is not None
    assert len(episodes[0].x) == 4
    assert json.loads(json.dumps(dataclasses.asdict(experiment)))["library"] is True
    with pytest.warns(RuntimeWarning, match="the run is over"):
        assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
