"""Training with an index: its keys are refreshed as the weights move, and the history tells how old they had become."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import blobs, small_vma, weights

import pyro_vmem as pv
from pyro_vmem.memory import ExactIndex
from pyro_vmem.model.indexing import slot_keys

SLOTS = 40
AGES = ("key_overlap", "key_missed", "key_drift")
SETTINGS: dict[str, Any] = {"steps": 6, "progress": False, "precision": "float32", "validate_every": 2, "lr": 0.02}


def indexed(seed: int = 0) -> pv.VMA:
    """A small model whose guide looks in an index."""
    vma = small_vma(seed)
    return vma.replace(address_guide=pv.DefensiveGuide(pv.IndexedGuide(vma.address_guide, k=4), share=0.1))


class Library:
    """Episodes that share one memory."""

    def __init__(self, vma: pv.VMA, slots: int = SLOTS) -> None:
        templates = (blobs().images[:slots] > 0).float()
        self.memory = pv.PackedMemory.pack(templates, labels=torch.arange(slots))
        self.index = pv.model.index_memory(vma, self.memory)

    def __getitem__(self, index: int) -> pv.data.Episode:
        labels = torch.randint(SLOTS, (5,), generator=torch.Generator().manual_seed(index))
        return pv.data.Episode(self.memory, self.memory.read(labels), labels)


def oldest(vma: pv.VMA, library: Library) -> torch.Tensor:
    """How far each key is from a fresh one."""
    return (library.index.keys - slot_keys(vma, library.memory)).norm(dim=-1)


def test_keys_follow_the_weights() -> None:
    vma = indexed()
    library = Library(vma)
    before = library.index.keys.clone()
    result = pv.fit(vma, library, callbacks=[pv.train.RefreshKeys(10)], **SETTINGS)
    assert float((library.index.keys - before).norm(dim=-1).min()) > 1e-3  # the weights moved
    assert float(oldest(vma, library).max()) < 1e-5
    rows = [row for row in result.history if "key_drift" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert 0 < row["key_overlap"] <= 1
        assert -1e-6 <= row["key_missed"] < 1
        assert row["key_drift"] > 1e-4


def test_a_step_refreshes_so_many_slots(tmp_path: Path) -> None:
    vma = indexed()
    library = Library(vma)
    keys = [library.index.keys.clone()]

    class Watch:
        """Notes the keys as they are when a step begins."""

        def __getitem__(self, index: int) -> pv.data.Episode:
            keys.append(library.index.keys.clone())
            return library[index]

    pv.fit(vma, Watch(), callbacks=[pv.train.RefreshKeys(15)], **SETTINGS)  # type: ignore[arg-type]
    moved = [(after != before).any(-1).nonzero().squeeze(-1).tolist() for before, after in itertools.pairwise(keys)]
    first = next(i for i, slots in enumerate(moved) if slots)
    expected = [list(range(15)), list(range(15, 30)), sorted([*range(30, 40), *range(5)]), list(range(5, 20))]
    assert moved[first : first + 4] == expected


def test_without_refreshing_keys_stay() -> None:
    vma = indexed()
    library = Library(vma)
    before = library.index.keys.clone()
    result = pv.fit(vma, library, callbacks=[pv.train.RefreshKeys(0)], **SETTINGS)
    assert torch.equal(library.index.keys, before)
    assert not any(name in row for row in result.history for name in AGES)
    assert "key_drift" not in pv.fit(small_vma(), [library[0]] * 6, **SETTINGS).history[-1]  # type: ignore[arg-type]


def test_old_keys_are_told_of() -> None:
    drifts = []
    for slots in (1, SLOTS):
        vma = indexed()
        drifts.append(
            pv.fit(vma, Library(vma), callbacks=[pv.train.RefreshKeys(slots)], **SETTINGS).history[-1]["key_drift"]
        )
    assert drifts[0] > 0.005
    assert drifts[1] < 1e-5


def test_a_resumed_run_begins_with_fresh_keys(tmp_path: Path) -> None:
    vma, settings = indexed(), SETTINGS | {"out": tmp_path, "callbacks": [pv.train.RefreshKeys(1)]}
    pv.fit(vma, Library(vma), **settings | {"steps": 4})
    again = indexed(seed=1)
    library = Library(again)  # keys of weights that are about to be replaced
    seen: list[float] = []

    class Watch:
        def __getitem__(self, index: int) -> pv.data.Episode:
            if index == 4:
                seen.append(float(oldest(again, library).max()))
            return library[index]

    with pytest.warns(RuntimeWarning, match=r"goes on with steps=6 \(was 4\)"):
        result = pv.fit(again, Watch(), resume=True, **settings)  # type: ignore[arg-type]
    assert (result.steps, seen) == (6, [pytest.approx(0, abs=1e-5)])
    library.index.keys.zero_()
    with pytest.warns(RuntimeWarning, match="the run is over"):
        pv.fit(again, library, resume=True, **settings)
    assert float(oldest(again, library).max()) < 1e-5


def test_the_best_weights_have_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    vma = indexed()
    library = Library(vma)
    bounds = iter([-1.0, -2.0, -3.0])
    monkeypatch.setattr("pyro_vmem.train.callbacks.validate", lambda *_: {"bound": next(bounds)})
    best = []
    pv.fit(
        vma,
        library,
        validation=[library[0]],
        callbacks=[pv.train.Log(lambda *_: best.append(weights(vma)))],
        **SETTINGS,
    )  # type: ignore[arg-type]
    assert all(torch.equal(best[0][name], value) for name, value in weights(vma).items())
    assert float(oldest(vma, library).max()) < 1e-5


def test_an_index_stays_in_its_process() -> None:
    vma = indexed()
    with pytest.raises(ValueError, match=r"workers: expected 0, got 2: an index .*RefreshKeys\(0\)"):
        pv.fit(vma, Library(vma), workers=2, **SETTINGS)
    with pytest.raises(ValueError, match=r"slots_per_step: expected a whole number of at least 0, got \-1"):
        pv.fit(vma, Library(vma), callbacks=[pv.train.RefreshKeys(-1)], **SETTINGS)


def test_an_index_is_built_anew_of_new_keys() -> None:
    index, keys = ExactIndex(torch.randn(5, 3)), torch.randn(5, 3)
    index.rebuild(keys)
    assert torch.equal(index.keys, keys)
    with pytest.raises(ValueError, match="keys: expected 5, one per slot, got 4"):
        index.rebuild(keys[:4])
