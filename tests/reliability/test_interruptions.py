"""Ctrl-C, at whatever moment, and a disk that is full: what was computed is kept, and goes on bit for bit."""

from __future__ import annotations

import random
import resource
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import equal, rows, same_state, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem._utils.signals import on_interrupt
from pyro_vmem.data import Episode
from pyro_vmem.train import callbacks as training
from pyro_vmem.train import load_checkpoint

SETTINGS: dict[str, Any] = {"steps": 6, "validation": sampler(seed=1), "validate_every": 2, "progress": False}


def whole_run(folder: Path) -> tuple[dict[str, torch.Tensor], pv.FitResult]:
    vma = small_vma()
    result = pv.fit(vma, sampler(), out=folder, **SETTINGS)
    return weights(vma), result


def resume(folder: Path) -> tuple[dict[str, torch.Tensor], pv.FitResult]:
    vma = small_vma(seed=9)
    result = pv.fit(vma, sampler(), out=folder, resume=True, **SETTINGS)
    return weights(vma), result


def assert_resumes_exactly(tmp_path: Path) -> None:
    """The run in `parts`, gone on with, is the run in `whole`."""
    expected, whole = whole_run(tmp_path / "whole")
    resumed, result = resume(tmp_path / "parts")
    assert equal(expected, resumed)
    assert rows(result.history) == rows(whole.history)
    assert same_state(tmp_path / "whole", tmp_path / "parts")


def pressing(call: Any, nth: int, presses: int = 1, after: bool = False) -> Any:
    """Presses Ctrl-C at the n-th call of a function, before or after it, as often as is asked."""
    count = 0

    def pressed(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        for _ in range(presses * (count == nth and not after)):
            signal.raise_signal(signal.SIGINT)
        result = call(*args, **kwargs)
        for _ in range(presses * (count == nth and after)):
            signal.raise_signal(signal.SIGINT)
        return result

    return pressed


# Where Ctrl-C is pressed at the third step, or at the first record: what is patched, which call, and after how many
# steps the run then ends.
MOMENTS = {
    "backward": (torch.Tensor, "backward", 3, 3),
    "in the optimizer": (torch.optim.Adam, "step", 3, 3),
    "clipping": (torch.nn.utils, "clip_grad_norm_", 3, 3),
    "validation": (training, "validate", 1, 2),
    "writing": (training, "save_checkpoint", 1, 2),
    "between files": (training, "write_history", 1, 2),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_one_ctrl_c_waits_for_the_step_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, after: bool
) -> None:
    owner, name, nth, steps = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, pressing(getattr(owner, name), nth, after=after))
        vma = small_vma()
        result = pv.fit(vma, sampler(), out=tmp_path / "parts", **SETTINGS)
    assert result.interrupted
    assert result.steps == steps
    assert load_checkpoint(tmp_path / "parts" / "last.safetensors")[1]["result"]["steps"] == steps
    assert [path.name for path in (tmp_path / "parts").glob(".*")] == [".lock"]
    assert_resumes_exactly(tmp_path)


def test_a_second_ctrl_c_ends_it_at_once_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", pressing(torch.optim.Adam.step, 4, presses=2))
        vma = small_vma()
        with pytest.raises(KeyboardInterrupt):
            pv.fit(vma, sampler(), out=tmp_path / "parts", **SETTINGS)
    assert load_checkpoint(tmp_path / "parts" / "last.safetensors")[1]["result"]["steps"] == 2
    assert equal(weights(vma), weights(pv.load(tmp_path / "parts" / "best.safetensors")))
    assert not vma.training
    assert_resumes_exactly(tmp_path)


def test_a_first_ctrl_c_is_noted_a_second_one_passed_on_and_the_handler_put_back() -> None:
    heard: list[int] = []
    asked: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with on_interrupt(lambda: asked.append(True)):
            signal.raise_signal(signal.SIGINT)
            assert (len(asked), heard) == (1, [])
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_trains_in_other_threads_too() -> None:
    """Where no signal handler can be set."""
    results: list[pv.FitResult] = []
    thread = threading.Thread(target=lambda: results.append(pv.fit(small_vma(), sampler(), steps=1, progress=False)))
    thread.start()
    thread.join()
    assert results[0].steps == 1


class Noisy:
    """Episodes that depend on all the global generators, as somebody's own may."""

    def __getitem__(self, index: int) -> Episode:
        episode = sampler()[index]
        noise = random.random() + np.random.normal() + random.gauss(0, 1) + float(torch.rand(()))
        return Episode(pv.Memory(episode.memory.templates + noise, episode.memory.labels), episode.x, episode.labels)


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = {"steps": 5, "validate_every": 2, "progress": False}
    whole = small_vma()
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    pv.fit(whole, Noisy(), **settings)  # type: ignore[arg-type]
    assert before[:2] == (random.getstate(), str(np.random.get_state()))
    assert torch.equal(before[2], torch.get_rng_state())
    random.seed(7)  # which is none of the run's business
    np.random.seed(7)
    parts = small_vma()
    for _ in range(5):
        pv.fit(parts, Noisy(), out=tmp_path, resume=True, callbacks=[pv.train.StopAfter(1e-5)], **settings)  # type: ignore[arg-type]
        random.random(), np.random.normal()
    assert equal(weights(whole), weights(parts))


class Fails:
    """A source of which one episode cannot be had, at first."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __getitem__(self, index: int) -> Episode:
        if index == self.index:
            raise FileNotFoundError("the disk with the pictures is gone")
        return sampler()[index]


@pytest.mark.parametrize("index", [3, 4])  # between records, and right after one
def test_an_error_of_the_data_keeps_all_steps_before_it(tmp_path: Path, index: int) -> None:
    settings = SETTINGS | {"out": tmp_path / "parts"}
    with pytest.raises(FileNotFoundError, match="the disk with the pictures is gone"):
        pv.fit(small_vma(), Fails(index), **settings)  # type: ignore[arg-type]
    assert load_checkpoint(tmp_path / "parts" / "last.safetensors")[1]["result"]["steps"] == index
    assert_resumes_exactly(tmp_path)


# A disk that is full


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> Any:
    """Some of the writes of checkpoints and best weights fail, by their number."""
    count = 0
    original = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        nonlocal count
        count += 1
        if count in calls:
            original(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        yield


def test_a_full_disk_is_told_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS | {"validation": None, "out": tmp_path / "parts"}
    match = r"out: step 4 could not be written to .*No space left on device.* training goes on; free some space"
    with full_disk(monkeypatch, {2}), pytest.warns(RuntimeWarning, match=match):
        result = pv.fit(small_vma(), sampler(), **settings)
    paths = sorted((tmp_path / "parts").glob("*.safetensors"))
    steps = [load_checkpoint(path)[1]["result"]["steps"] for path in paths]
    assert steps == [2, 6]  # the one that failed is missing, the one before is kept
    assert result.steps == 6
    assert [path.name for path in (tmp_path / "parts").glob(".*")] == [".lock"]


def test_best_weights_that_could_not_be_written_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = iter([-10.0, -20.0, -30.0])
    monkeypatch.setattr(training, "validate", lambda *_: {"bound": next(bounds)})
    vma = small_vma()
    with full_disk(monkeypatch, {1}), pytest.warns(RuntimeWarning, match="step 2 could not be written"):
        pv.fit(vma, sampler(), out=tmp_path, **SETTINGS)
    assert equal(weights(vma), weights(pv.load(tmp_path / "best.safetensors")))


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS | {"validation": None, "out": tmp_path / "parts"}
    vma = small_vma()
    with (
        full_disk(monkeypatch, {3, 4}),
        pytest.warns(RuntimeWarning, match="step 6 could not be written"),
        pytest.raises(OSError, match=r"out: the last checkpoint, of step 6, could not be written .* with resume=True"),
    ):
        pv.fit(vma, sampler(), **settings)
    expected = small_vma()
    pv.fit(expected, sampler(), **settings | {"out": None})
    assert equal(weights(vma), weights(expected))  # it is trained all the same
    resumed = small_vma(seed=3)
    pv.fit(resumed, sampler(), resume=True, **settings)
    assert equal(weights(resumed), weights(expected))


def test_a_disk_that_is_full_already_is_found_out_before_training(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # the system refuses every byte
    try:
        with pytest.raises(ValueError, match=r"out: cannot write to the folder .*File too large.* Name another one"):
            pv.fit(small_vma(), sampler(), **SETTINGS | {"out": tmp_path})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
