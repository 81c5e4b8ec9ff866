"""Loading ahead changes nothing but the time; a worker that dies ends the run with a clear error, and it goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import equal, rows, same_state, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem.data import Episode, MixedEpisodes, RecallSampler, protocol
from pyro_vmem.data import loading as loading_module
from pyro_vmem.data.loading import load_ahead

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # says torch where cores are few

DATASET = sampler().dataset
SAMPLERS: dict[str, Any] = {
    "episodes": sampler(),
    "mixed": MixedEpisodes([sampler(), sampler(1)]),
    "recall": RecallSampler(DATASET, 8, 4),
    "protocol": protocol("gmn").episodes(DATASET, shots=1),
}


def same(one: Episode, two: Episode) -> bool:
    return torch.equal(one.x, two.x) and torch.equal(one.memory.templates, two.memory.templates)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_loads_in_order_in_workers(name: str, workers: int) -> None:
    before = torch.get_rng_state()
    loaded = load_ahead(SAMPLERS[name], 3, 8, workers=workers)
    assert all(same(next(loaded), SAMPLERS[name][index]) for index in range(3, 8))
    assert next(loaded, None) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_thread_loads_ahead_in_order_and_its_errors_wait_for_their_turn() -> None:
    started, threads = [], set()

    class Fails:
        def __getitem__(self, index: int) -> Episode:
            started.append(index)
            threads.add(threading.current_thread())
            if index == 4:
                raise OSError("a broken picture")
            return sampler()[index]

    loaded = loading_module._in_a_thread(Fails(), range(1, 9), pin=False)  # type: ignore[arg-type]
    assert same(next(loaded), sampler()[1])
    assert [same(next(loaded), sampler()[index]) for index in (2, 3)] == [True, True]
    with pytest.raises(OSError, match="a broken picture"):
        next(loaded)
    assert started[:4] == [1, 2, 3, 4]
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_what_goes_to_a_gpu_is_pinned_and_loaded_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(Episode, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(Episode, "to", lambda self, device, non_blocking: calls.append((device, non_blocking)) or self)
    loaded = load_ahead(sampler(), 0, 1, "cuda:3")
    assert same(next(loaded), sampler()[0])
    assert calls == ["pinned", (torch.device("cuda:3"), True)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_with_workers_is_the_run_without(tmp_path: Path, workers: int) -> None:
    settings: dict[str, Any] = {"steps": 3, "validate_every": 2, "progress": False}
    one, two = small_vma(), small_vma()
    expected = pv.fit(one, sampler(), out=tmp_path / "one", **settings)
    found = pv.fit(two, sampler(), out=tmp_path / "two", workers=workers, **settings)
    assert equal(weights(one), weights(two))
    assert rows(found.history) == rows(expected.history)
    assert same_state(tmp_path / "one", tmp_path / "two")
    assert not multiprocessing.active_children()


class Deadly:
    """A sampler whose worker is killed, as by a system that is out of memory."""

    def __getitem__(self, index: int) -> Episode:
        if index == 4 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return sampler()[index]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills by a signal")
def test_a_killed_worker_is_a_clear_error_and_the_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 6, "validate_every": 1, "progress": False, "resume": True}
    pv.fit(small_vma(), sampler(), out=tmp_path / "whole", **settings)
    with pytest.raises(
        ChildProcessError, match=r"workers: a process that loads episodes has died .*resume=True .*--resume.* workers=0"
    ):
        pv.fit(small_vma(), Deadly(), out=tmp_path / "parts", workers=1, **settings)  # type: ignore[arg-type]
    assert not multiprocessing.active_children()
    left = pv.fit(small_vma(), sampler(), out=tmp_path / "parts", **settings)
    assert left.steps == 6
    assert same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), ChildProcessError),
        (EOFError(), ChildProcessError),
        (ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."), ConnectionResetError),
    ],
)
def test_a_worker_that_dies_while_it_sends(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    """The connection may be lost before torch knows of the death; an error of the source in the worker is its own."""

    def lost(self: Any) -> Any:
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_get_data", lost)
    monkeypatch.setattr(loading_module.time, "sleep", lambda _: None)
    with pytest.raises(expected):
        pv.fit(small_vma(), sampler(), steps=2, workers=1, progress=False)


def test_other_errors_of_workers_are_their_own() -> None:
    class Broken:
        def __getitem__(self, index: int) -> Episode:
            if index == 2:
                raise RuntimeError("a broken picture")
            return sampler()[index]

    with pytest.raises(RuntimeError, match="a broken picture"):
        pv.fit(small_vma(), Broken(), steps=4, workers=1, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"workers: expected a whole number of at least 0, got \-1"):
        pv.fit(small_vma(), sampler(), steps=1, workers=-1, progress=False)


SPAWNED = """
import sys, torch
import torch.multiprocessing as mp
import pyro_vmem as pv
from small_run import sampler, small_vma

class Mine:
    def __getitem__(self, index):
        return sampler()[index]

def local():
    class Local(Mine):
        pass
    return Local()

if __name__ == "__main__":
    mp.set_start_method("spawn")
    try:
        pv.fit(small_vma(), local(), steps=1, workers=1, progress=False)
    except ValueError as error:
        print(error)
    sys.modules["__main__"].__spec__ = None
    del sys.modules["__main__"].__file__  # as in a notebook
    try:
        pv.fit(small_vma(), Mine(), steps=1, workers=1, progress=False)
    except ChildProcessError as error:
        print(error)
"""


def test_a_source_that_cannot_be_sent_to_a_spawned_process_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SPAWNED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    cannot_be_sent, died = done.stdout.splitlines()
    assert cannot_be_sent.startswith("workers: the source of episodes cannot be sent to another process (")
    assert "local" in cannot_be_sent
    assert "could not unpickle the source, which has to be defined in a module and not in a notebook" in died
