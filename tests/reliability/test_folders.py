"""The folder of a run: one run at a time, nothing left of one that cannot begin, and what is damaged is made up for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import equal, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem._utils import lock as _lock
from pyro_vmem._utils.lock import alone_in
from pyro_vmem.app import Experiment, cli
from pyro_vmem.app.experiment import read_result
from pyro_vmem.train import callbacks, load_checkpoint
from pyro_vmem.train.folder import RUN_FILES

QUIET: dict[str, Any] = {"progress": False, "validate_every": 1}


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# One at a time

HOLD = """
import sys, time
from pathlib import Path
from pyro_vmem._utils.lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            other.kill()


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lock, "PATIENCE", 0.1)
    pv.fit(small_vma(), sampler(), steps=2, out=tmp_path, **QUIET)
    before, vma = written(tmp_path), small_vma()
    fresh = weights(vma)
    with held_by_another(tmp_path) as other:
        for call in (
            lambda: pv.fit(vma, sampler(), steps=4, out=tmp_path, resume=True, **QUIET),
            lambda: Experiment(steps=1).train(tmp_path, progress=False),
        ):
            with pytest.raises(
                ValueError, match=r"^out: another run is writing to '.*'\. Wait until .* another folder"
            ):
                call()
        assert written(tmp_path) == before
        assert equal(weights(vma), fresh)
        assert pv.load(tmp_path) is not None  # who only reads need not wait
        other.send_signal(signal.SIGKILL)  # what holds it is let go of by the system
        other.wait()
    with pytest.warns(RuntimeWarning, match=r"goes on with steps=4 \(was 2\)"):
        assert pv.fit(vma, sampler(), steps=4, out=tmp_path, resume=True, **QUIET).steps == 4
    assert sorted(written(tmp_path)) == [
        ".lock",
        "history.csv",
        "last-1.safetensors",
        "last.safetensors",
    ]


def test_what_killed_writers_left_is_removed_when_a_run_that_is_over_is_resumed(tmp_path: Path) -> None:
    """It writes no file again that could remove what is left of an earlier write."""
    pv.fit(small_vma(), sampler(), steps=1, out=tmp_path, **QUIET)
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in RUN_FILES:
        (tmp_path / f".{name}.12345678.tmp").write_bytes(b"half")
    (mine := tmp_path / ".notes.tmp").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="the run is over"):
        pv.fit(small_vma(), sampler(), steps=1, out=tmp_path, resume=True, **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, mine.name])


def test_a_folder_is_waited_for_if_its_process_is_about_to_end(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as other:
        killed = threading.Event()
        threading.Timer(0.3, lambda: (killed.set(), other.kill())).start()
        with alone_in(tmp_path):
            assert killed.is_set()


def test_two_threads_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lock, "PATIENCE", 0.1)
    errors: list[ValueError] = []

    def take() -> None:
        try:
            with alone_in(tmp_path):
                pass
        except ValueError as error:
            errors.append(error)

    for _ in range(2):
        with alone_in(tmp_path), alone_in(tmp_path / "."):
            thread = threading.Thread(target=take)
            thread.start()
            thread.join()
        assert len(errors) == 1
        errors.clear()
        take()  # it is free again, whoever was refused
        assert errors == []


# Damaged files


def run_in(folder: Path) -> dict[str, torch.Tensor]:
    """A run whose best weights are not its last; returns the best."""
    vma = small_vma()
    bounds = iter([-10.0, -20.0, -30.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "validate", lambda *_: {"bound": next(bounds)})
        pv.fit(vma, sampler(), steps=3, validation=sampler(1), out=folder, **QUIET)
    return weights(vma)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_best_weights_are_found_in_the_last_checkpoint_too(tmp_path: Path, damage: str) -> None:
    best = run_in(tmp_path)
    last = {name.removeprefix("model."): t for name, t in load_checkpoint(tmp_path / "last.safetensors")[0].items()}
    assert not equal(best, {name: last[name] for name in best})
    path = tmp_path / "best.safetensors"
    if damage == "missing":
        path.unlink()
        assert equal(weights(pv.load(tmp_path)), best)
        return
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(RuntimeWarning, match=r"best.safetensors' is not a whole .* Taking what last.safetensors holds"):
        assert equal(weights(pv.load(tmp_path)), best)
    (tmp_path / "last.safetensors").write_bytes(b"")
    with pytest.warns(RuntimeWarning) as caught:
        assert equal(weights(pv.load(tmp_path)), best)
    assert "Going on from last-1.safetensors" in str(caught[1].message)
    (tmp_path / "last-1.safetensors").write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"None of 'last.safetensors', 'last-1"):
        pv.load(tmp_path)
    (tmp_path / "last.safetensors").unlink()
    (tmp_path / "last-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"best.safetensors' is not a whole safetensors file"):
        pv.load(tmp_path)


@pytest.mark.long
def test_a_run_that_cannot_begin_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(*_: Any) -> None:
        raise ValueError("objective: it does not fit")

    monkeypatch.setattr(pv.Trainer, "begin", unfit)
    experiment = Experiment(steps=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="objective: it does not fit"):
            experiment.train(tmp_path / "new", progress=False)
        assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    for content in (None, "{}"):
        if content is not None:
            (tmp_path / "mine" / "experiment.json").write_text(content)
        with pytest.raises(ValueError, match="objective: it does not fit"):
            experiment.train(tmp_path / "mine", progress=False)
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["experiment.json"] * (content is not None)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"steps": "x"}', b'{"steps": -1}', b"\xff\xfe"])
def test_settings_that_are_damaged_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "experiment.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^run: '.*experiment.json' does not hold the settings of a run \(.*Correct it"
    ):
        Experiment.read(tmp_path)


@pytest.mark.parametrize("content", [b"step,seconds\n1,x\n", b"step\n1,2,3\n", b"\xff\n1\n", b"step\n\0\n"])
def test_a_history_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "history.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"^run: '.*history.csv' is not a history \(.*Resume the run"):
        read_result(tmp_path)


# The command line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), 1),
        (PermissionError(13, "Permission denied"), 1),
        (FloatingPointError("loss: 10 of 10 steps"), 1),
        (FileNotFoundError("run: there is none"), 2),
    ],
)
def test_a_command_that_fails_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Experiment, "train", fail)
    assert cli.main(["train", "--out", str(tmp_path / "out"), "--steps", "1"]) == code
    assert capsys.readouterr().err == f"pyro-vmem train: {error}\n".replace("run:", "--out:")
