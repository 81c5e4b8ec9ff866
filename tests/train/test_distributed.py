"""Several processes train one model: the run of one, where there is no chance in it, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from processes import start, together, wait
from small_run import blobs, equal, kept, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem.data import Episode, merge_episodes
from pyro_vmem.train.distributed import own_device

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")

SETTINGS: dict[str, Any] = {"steps": 6, "validate_every": 2, "progress": False, "precision": "float32"}


class Double:
    """Episodes in double precision, in which what is equal but for the order of summation is hardly different."""

    def __getitem__(self, index: int) -> Episode:
        episode = sampler()[index]
        assert episode.labels is not None
        return Episode(episode.memory.to(torch.float64), episode.x.double(), episode.labels)


class PerTarget(Double):
    """A memory for each target, and shares of 1 and 2 targets."""

    def __getitem__(self, index: int) -> Episode:
        whole = super().__getitem__(index)
        assert whole.labels is not None
        return merge_episodes([Episode(whole.memory, whole.x[i : i + 1], whole.labels[i : i + 1]) for i in range(3)])


class AtTheMean(pv.GaussianGuide):
    """Draws the mean each time: with all addresses summed there is no chance in the loss."""

    def forward(self, *args: Any) -> Any:
        normal = super().forward(*args).base_dist

        class Fixed(dist.Normal):
            def rsample(self, sample_shape: Any = ()) -> torch.Tensor:
                return self.loc.expand(self._extended_shape(sample_shape))

        return Fixed(normal.loc, normal.scale).to_event(1)


def model(seed: int = 0) -> pv.VMA:
    torch.manual_seed(seed)
    return small_vma(seed).replace(latent_guide=AtTheMean(4, 16)).double()


def train(out: Path | None, vma: pv.VMA, episodes: Any = None, **changes: Any) -> pv.FitResult:
    if out is None:
        return pv.fit(vma, episodes or Double(), "enumerate", **SETTINGS | changes)
    return pv.fit(vma, episodes or Double(), "enumerate", **SETTINGS | {"out": out, "resume": True} | changes)


def at_second(rank: int, index: int, happens: Callable[[], Any]) -> Any:
    """Episodes at one of which something happens in the second process."""

    class Eventful(Double):
        def __getitem__(self, asked: int) -> Episode:
            if asked == index and rank == 1:
                happens()
            return super().__getitem__(asked)

    return Eventful()


@pytest.mark.parametrize("episodes", [Double, PerTarget])
def test_two_processes_are_one_where_there_is_no_chance(tmp_path: Path, episodes: Any) -> None:
    alone = model()
    expected = train(None, alone, episodes())

    def work(rank: int) -> None:
        vma = model(seed=rank)  # the weights of the first are everyone's
        result = train(None, vma, episodes())
        torch.save(weights(vma), tmp_path / f"{rank}.pt")
        if rank == 0:
            (tmp_path / "history.json").write_text(json.dumps(result.history))

    together(work)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(first, second)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-7, atol=1e-7)
    rows = json.loads((tmp_path / "history.json").read_text())
    assert len(rows) == 3
    for row, other in zip(rows, expected.history, strict=True):
        assert row.keys() == other.keys()
        assert all(row[n] == pytest.approx(other[n], rel=1e-7) for n in row if n != "seconds")


def test_each_draws_numbers_of_its_own(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        drawn = []

        class Draws(pv.train.Callback):
            everywhere = True

            def start(self, trainer: pv.Trainer, episode: Episode) -> None:
                drawn.append(float(torch.rand(())))

        pv.fit(small_vma(), sampler(), steps=1, callbacks=[Draws()], progress=False)
        (tmp_path / str(rank)).write_text(str(drawn[0]))

    together(work)
    assert (tmp_path / "0").read_text() != (tmp_path / "1").read_text()


def test_ctrl_c_in_one_stops_all_after_the_same_step(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        result = train(tmp_path, model(), at_second(rank, 3, lambda: signal.raise_signal(signal.SIGINT)))
        assert (result.interrupted, result.steps) == (True, 4)

    together(work)
    with pytest.warns(RuntimeWarning, match=r"goes on with processes=1 \(was 2\)\.$"):  # the same but for rounding
        assert train(tmp_path, model()).steps == 6


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(ConnectionError, match=r"process 0 has lost contact with another one.*--resume"):
            train(tmp_path, model(), at_second(rank, 5, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(7)

    assert wait(start(work)) == [7, -signal.SIGKILL]
    assert kept(tmp_path)[1]["result"]["steps"] in (4, 5)

    def go_on(rank: int) -> None:
        assert train(tmp_path, model(seed=3)).steps == 6

    together(go_on)
    expected = model()
    train(None, expected)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(kept(tmp_path)[0][f"model.{name}"], tensor, rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.filterwarnings("ignore:not finite")
def test_a_step_that_is_not_finite_in_one_is_skipped_by_all() -> None:
    def work(rank: int) -> None:
        vma, steps = small_vma(), []

        def poison(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            return output * torch.nan if rank == 1 and len(steps) == 2 else output

        class Counts(pv.train.Callback):
            everywhere = True

            def before_step(self, trainer: pv.Trainer, episode: Episode) -> None:
                steps.append(trainer.result.steps)

        vma.get_submodule("latent_guide.network.1").register_forward_hook(poison)
        result = pv.fit(vma, sampler(), callbacks=[Counts()], **SETTINGS)
        assert (result.steps, result.skipped) == (6, 1)
        assert result.first_skipped.startswith("step 2, ")

    together(work)


def test_errors_are_those_of_all(tmp_path: Path) -> None:
    class OneTarget(Double):
        def __getitem__(self, index: int) -> Episode:
            episode = super().__getitem__(index)
            return Episode(episode.memory, episode.x[:1])

    train(tmp_path / "run", model(), steps=1)

    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"episodes: got one of 1 targets for 2 processes"):
            train(None, model(), OneTarget())
        with pytest.raises(ValueError, match=r"out: .* already holds a run. Pass resume=True"):
            pv.fit(model(), Double(), out=tmp_path / "run", **SETTINGS)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"out: cannot write to the folder"):
            pv.fit(model(), Double(), out=tmp_path / "run" / "history.csv" / "x", **SETTINGS)  # type: ignore[arg-type]

    together(work)


def test_a_time_budget_is_the_first_process_s(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        (tmp_path / f"steps-{rank}").write_text(str(train(None, model(), minutes=0.01).steps))

    together(work)
    first, second = ((tmp_path / f"steps-{rank}").read_text() for rank in (0, 1))
    assert first == second != "0"


@pytest.mark.long
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
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        cwd=Path(__file__).parent.parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2  # one object, of the first process
    assert done.stderr.count("FitResult(2 steps") == 1
    assert pv.load(tmp_path / "run").latent_dim == 2


def test_devices() -> None:
    assert own_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert own_device() == torch.device("cpu")
        for name in ("cuda", "cuda:3", "gpu"):
            with pytest.raises(ValueError, match=rf"device: '{name}' cannot be used here .* Use 'cpu', or 'auto'"):
                own_device(name)
