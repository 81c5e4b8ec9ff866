"""Several processes train one model: the same run as that of one, whatever happens to them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import start, together, wait
from small_run import blobs, equal, kept, same_state, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem.data import Episode, merge_episodes
from pyro_vmem.train.distributed import own_device

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")


class Double:
    """Episodes in double precision, in which what is equal but for the order of summation is hardly different."""

    def __init__(self, seed: int = 0) -> None:
        self.inner = sampler(seed)

    def __getitem__(self, index: int) -> Episode:
        episode = self.inner[index]
        return Episode(episode.memory.to(torch.float64), episode.x.double(), episode.labels)


SETTINGS: dict[str, Any] = {
    **{"steps": 6, "validation": Double(1), "validate_every": 2},
    **{"progress": False, "precision": "float32"},  # not half
}


def train(out: Path | None, episodes: Any = None, **changes: Any) -> pv.FitResult:
    """The run of these tests, from where the folder left it."""
    return pv.fit(small_vma().double(), episodes or Double(), out=out, resume=True, **SETTINGS | changes)


class At:
    """A sampler at one of whose episodes something happens in one of the processes."""

    def __init__(self, rank: int, index: int, happens: Callable[[], Any]) -> None:
        self.rank, self.index, self.happens = rank, index, happens

    def __getitem__(self, index: int) -> Episode:
        if index == self.index and self.rank == 1:
            self.happens()
        return Double()[index]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process in `one`, and of two in `two`."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder / "one")

    def work(rank: int) -> None:
        vma = small_vma(seed=rank).double()  # the weights of the first are everyone's
        result = pv.fit(vma, Double(), out=folder / "two", **SETTINGS)
        torch.save(weights(vma), folder / f"weights-{rank}.pt")
        assert result.steps == 6

    together(work)
    return folder


def close(one: Path, two: Path) -> None:
    """Two runs are the same but for the order of summation, and have the same random state."""
    (tensors, data), (others, other) = kept(one), kept(two)
    assert torch.equal(tensors["random_state"], others["random_state"])
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-8, atol=1e-8)
    assert len(data["result"]["history"]) == len(other["result"]["history"]) > 0
    for row, another in zip(data["result"]["history"], other["result"]["history"], strict=True):
        for name in row.keys() | another.keys():
            assert row[name] == pytest.approx(another[name], rel=1e-8, abs=1e-8), name
    assert data["meter"]["sums"] == pytest.approx(other["meter"]["sums"], rel=1e-8)


def test_two_processes_are_one(whole: Path) -> None:
    close(whole / "one", whole / "two")
    first, second = (torch.load(whole / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(first, second)


def test_every_objective(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, memory: pv.Memory, x: torch.Tensor) -> torch.Tensor:
            return self.weight.expand(len(x))

    class PerTarget:
        """A memory for each target, and shares of 1 and 2 targets."""

        def __getitem__(self, index: int) -> Episode:
            whole = Double()[index]
            return merge_episodes(
                [Episode(whole.memory, whole.x[i : i + 1], whole.labels[i : i + 1]) for i in range(3)]
            )

    def reinforce(particles: int, baseline: Any) -> pv.infer.Reinforce_ELBO:
        elbo = pv.infer.Reinforce_ELBO(particles, baseline, max_plate_nesting=1)
        assert elbo.module is not None
        elbo.module.double()
        return elbo

    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "rws": lambda: {"objective": "rws"},
        "rao-blackwell": lambda: {"objective": "rao-blackwell"},
        "enumerate": lambda: {"objective": "enumerate"},
        "running mean": lambda: {"objective": reinforce(2, "average")},
        "network": lambda: {"objective": reinforce(1, Net())},
        "few backward": lambda: {"objective": "vimco", "backward": 1},
        "per target": lambda: {"episodes": PerTarget()},
    }
    for name, changes in runs.items():
        train(tmp_path / "one" / name, steps=3, validation=None, **changes())

    def work(rank: int) -> None:
        for name, changes in runs.items():
            train(tmp_path / "two" / name, steps=3, validation=None, **changes())

    together(work)
    for name in runs:
        close(tmp_path / "one" / name, tmp_path / "two" / name)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_resumed_by_as_many_or_by_others(whole: Path, tmp_path: Path, before: int, after: int) -> None:
    def work(rank: int) -> None:
        train(tmp_path / "parts", callbacks=[pv.train.StopAfter(1e-5)])

    for count, part in ((before, work), (after, lambda _: train(tmp_path / "parts"))):
        together(part, count)
    if before == after:
        assert same_state(whole / "two", tmp_path / "parts")
    else:
        close(whole / "one", tmp_path / "parts")


def test_ctrl_c_in_one_stops_all_after_the_same_step(whole: Path, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        result = train(tmp_path / "parts", At(rank, 3, lambda: signal.raise_signal(signal.SIGINT)))
        assert (result.interrupted, result.steps) == (True, 4)

    together(work)
    together(lambda _: train(tmp_path / "parts"))
    assert same_state(whole / "two", tmp_path / "parts")


@pytest.mark.parametrize("index", [1, 5])
def test_a_killed_process_ends_the_run_and_it_goes_on_bit_for_bit(whole: Path, tmp_path: Path, index: int) -> None:
    def work(rank: int) -> None:
        with pytest.raises(ConnectionError, match=r"process 0 has lost contact with another one.*--resume"):
            train(tmp_path / "parts", At(rank, index, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(7)

    assert wait(start(work)) == [7, -signal.SIGKILL]
    together(lambda _: train(tmp_path / "parts"))
    assert same_state(whole / "two", tmp_path / "parts")


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("module", ["likelihood.network", "latent_guide.network.1"])
def test_a_step_that_is_not_finite_in_one_is_skipped_by_all(tmp_path: Path, module: str) -> None:
    """Target 7 of the second episode, which is the second process's, comes out as NaN."""

    def poisoned(rank: int, count: int) -> pv.FitResult:
        vma, index = small_vma().double(), -1

        class Watched:
            def __getitem__(self, asked: int) -> Episode:
                nonlocal index
                index = asked
                return Double()[asked]

        def poison(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            offset = 0 if count == 1 else 6
            if not vma.training or index != 1 or (count == 2 and rank == 0):
                return output
            output = output.clone()
            output[:, 7 - offset] = math.nan
            return output

        vma.get_submodule(module).register_forward_hook(poison)
        return pv.fit(vma, Watched(), out=tmp_path / str(count), **SETTINGS | {"validation": None})

    def work(rank: int) -> None:
        with pytest.warns(RuntimeWarning, match="not finite") if rank == 0 else contextlib.nullcontext():
            result = poisoned(rank, 2)
        assert (result.steps, result.skipped) == (6, 1)
        assert result.first_skipped.startswith("step 2, lo")

    with pytest.warns(RuntimeWarning, match="not finite"):
        poisoned(0, 1)
    together(work)
    (_, one), (_, two) = kept(tmp_path / "1"), kept(tmp_path / "2")
    assert two["result"]["skipped"] == one["result"]["skipped"] == 1
    close(tmp_path / "1", tmp_path / "2")


def test_errors_are_those_of_all(whole: Path, tmp_path: Path) -> None:
    class OneTarget:
        def __getitem__(self, index: int) -> Episode:
            episode = Double()[index]
            return Episode(episode.memory, episode.x[:1], episode.labels[:1])

    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"episodes: got one of 1 targets for 2 processes"):
            train(None, OneTarget())
        with pytest.raises(ValueError, match=r"out: .* already holds a run. Pass resume=True"):
            pv.fit(small_vma().double(), Double(), out=whole / "two", **SETTINGS)
        with pytest.raises(ValueError, match=r"out: cannot write to the folder"):
            pv.fit(small_vma().double(), Double(), out=whole / "one" / "history.csv" / "run", **SETTINGS)

    together(work)


def test_a_time_budget_is_the_first_process_s(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        result = train(tmp_path, validation=None, minutes=0.01, steps=1)
        (tmp_path / f"steps-{rank}").write_text(str(result.steps))

    together(work)
    first, second = ((tmp_path / f"steps-{rank}").read_text() for rank in (0, 1))
    assert first == second != "0"


def test_torchrun_trains_from_the_command_line(tmp_path: Path) -> None:
    dataset = blobs(40)
    data = tmp_path / "data.npz"
    np.savez(data, images=dataset.images.numpy(), classes=dataset.classes.numpy())
    small = ["--data", "npz", "--data-root", str(data), "--steps", "2", "--latent-dim", "2", "--width", "2"]
    small += ["--n-way", "2", "--k-shot", "1", "--n-query", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pyro_vmem", "train"),
            *("--out", str(tmp_path / "run"), "--device", "cpu", "--json", *small),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2  # one object, of the first process
    assert done.stderr.count("FitResult(2 steps") == 1
    assert pv.load(tmp_path / "run").latent_dim == 2
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["n_query"] == 1


def test_devices() -> None:
    assert own_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert own_device() == torch.device("cpu")
        for name in ("cuda", "cuda:3", "gpu"):
            with pytest.raises(ValueError, match=rf"device: '{name}' cannot be used here .* Use 'cpu', or 'auto'"):
                own_device(name)
