"""Whatever happens to a run, in whatever order: no model is lost, and no run is silently another one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from small_run import weights

import pyro_vmem as pv
from benchmarks.sequences import STEPS, Sequences, sequences
from pyro_vmem.train import Trainer, callbacks, folder


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sequences]:
    """A run of three steps in the first folder, and what may happen to it next."""
    monkeypatch.setattr(Sequences, "strict", True)
    runs = Sequences()
    runs.begun(STEPS - 1)
    yield runs
    runs.teardown()


@pytest.mark.long
def test_random_sequences() -> None:
    counts = sequences(20, length=6, strict=True)
    assert counts["sequences"] >= 20
    assert counts["kills"] > 0


# What the machine looks for is found: each is a fault that this library has had.


def test_settings_that_change_in_silence_are_noticed(machine: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_warn_of_changes", lambda *_: None)
    with pytest.raises(AssertionError, match="silent_changes"):
        machine.changed("a", "learning rate", None)


def test_another_model_in_silence_is_noticed(machine: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_check_fits", lambda *_: None)
    with pytest.raises(AssertionError, match="silent_changes"):
        machine.changed("a", "model", None)


def test_a_run_begun_over_a_finished_model_is_noticed(machine: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "holds_run", lambda path: (path / folder.RUN_FILES[0]).exists())
    machine.resumed("a")
    for file in ("last.safetensors", "last-1.safetensors"):
        machine.removed("a", file)
    with pytest.raises(AssertionError, match="lost_models: a run was begun where there was one"):
        machine.begun_anew("a")


def test_a_damaged_checkpoint_shifted_over_the_good_one_is_noticed(
    machine: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_newest = callbacks.load_newest
    monkeypatch.setattr(callbacks, "load_newest", lambda path, **_: load_newest(path))
    machine.resumed("a")
    machine.damaged("a", "last.safetensors", 0.5, False)
    machine.removed("a", "best.safetensors")
    with pytest.raises(AssertionError, match=r"lost_models: step 2 was there, now it is 0"):
        machine.killed_in_a_write("a", "before the move", 4)


def test_weights_that_nobody_trained_are_noticed(machine: Sequences) -> None:
    vma = pv.VMA.for_vectors(3, latent_dim=2, num_features=4, hidden=(4,))
    pv.train.save_checkpoint(machine.root / "a" / "best.safetensors", weights(vma), {"spec": vma.spec()})
    with pytest.raises(AssertionError, match="lost_models: what is loaded was never trained"):
        machine.what_can_be_loaded_was_trained()
