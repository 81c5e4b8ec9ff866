"""Loggers beside `history.csv`: what arrives, and that none ever ends a run."""

from __future__ import annotations

import csv
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem import VMA
from pyro_vmem.train.loggers import logging_to

POINTS = pv.data.FewShotDataset(torch.rand(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 8)
EPISODES = pv.data.EpisodeSampler(POINTS, n_way=4, k_shot=1, n_query=1)


def train(logger: Any, steps: int = 4, **settings: Any) -> pv.FitResult:
    torch.manual_seed(0)
    vma = VMA.for_vectors(4, latent_dim=2, num_features=6, hidden=(8,))
    settings = {"validate_every": 2, "validation": EPISODES, "progress": False} | settings
    return pv.fit(vma, EPISODES, steps=steps, logger=logger, **settings)


def rows_of(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_function_gets_every_row_as_it_is_made(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    result = train(lambda step, row: seen.append({"step": step, **row}), out=tmp_path)
    assert [row["step"] for row in seen] == [2, 4]
    assert seen == result.history == rows_of(tmp_path / "history.csv")
    assert {"bound", "kl_a", "kl_z", "lr", "val_bound", "val_hit_rate"} <= seen[0].keys()


def test_a_logger_changes_no_number() -> None:
    without, with_one = train(None), train(lambda step, row: torch.rand(3))
    timeless = [[{n: v for n, v in row.items() if n != "seconds"} for row in r.history] for r in (without, with_one)]
    assert timeless[0][0] == timeless[1][0]  # before the logger drew


class Broken:
    """Fails from its second row on, and when it is closed."""

    def __init__(self) -> None:
        self.calls, self.closed = 0, False

    def __call__(self, step: int, values: Any) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("the service is down")

    def close(self) -> None:
        self.closed = True
        raise OSError("still down")


def test_one_that_fails_is_warned_of_once_and_the_others_go_on() -> None:
    broken, steps = Broken(), []
    with pytest.warns(
        RuntimeWarning, match=r"logger: Broken failed \(ConnectionError: the service is down\)"
    ) as caught:
        result = train([broken, lambda step, row: steps.append(step)], steps=8)
    assert len(caught) == 1
    assert (broken.calls, broken.closed) == (2, False)
    assert steps == [2, 4, 6, 8]
    assert result.steps == 8


def test_one_that_fails_as_it_is_closed_ends_nothing() -> None:
    broken = Broken()
    with pytest.warns(RuntimeWarning, match=r"Broken failed \(OSError: still down\)"):
        assert train(broken, steps=2).steps == 2
    assert broken.closed


def test_an_interrupt_is_not_swallowed() -> None:
    def interrupted(step: int, row: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), logging_to(interrupted) as log:
        log({"step": 1.0, "bound": -1.0})


@pytest.mark.parametrize(
    ("logger", "settings", "message"),
    [
        ("tensorbord", {"out": True}, "logger: expected 'tensorboard', 'wandb', 'mlflow', or a function of a step"),
        (["tensorboard", 3], {"out": True}, "got 3"),
        ("tensorboard", {}, "logger: 'tensorboard' writes to the folder of the run. Give out."),
    ],
)
def test_what_is_no_logger_is_refused_before_a_step(
    logger: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    out = {"out": tmp_path / "run"} if settings else {}
    with pytest.raises(ValueError, match=message):
        train(logger, **out)


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_a_step(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"this feature needs {package}: pip install 'pyro_vmem\[{package}\]'"):
        train(package, out=tmp_path / "run")


def test_tensorboard_files_hold_the_history(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are not ours
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        result = train("tensorboard", out=tmp_path)
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    assert {"training/bound", "training/kl_a", "validation/bound", "validation/hit_rate"} <= set(names)
    for name in names:
        column = name.removeprefix("training/").replace("validation/", "val_")
        logged = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        assert logged == [(row["step"], pytest.approx(row[column], rel=1e-5)) for row in result.history], name
    assert any("objective" in tag for tag in events.Tags()["tensors"])


# Stubs: the packages are not among those of the tests.


class Calls(list[tuple[Any, ...]]):
    def note(self, *names: str) -> Any:
        return lambda *args, **kwargs: self.append((*names, args, kwargs))


def stub_of_wandb(calls: Calls) -> types.ModuleType:
    module = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=calls.note("log"), finish=calls.note("finish"))
    module.init = lambda **kwargs: calls.append(("init", kwargs)) or run  # type: ignore[attr-defined]
    return module


def stub_of_mlflow(calls: Calls) -> types.ModuleType:
    class MlflowClient:
        log_param, log_metric = staticmethod(calls.note("param")), staticmethod(calls.note("metric"))
        set_terminated = staticmethod(calls.note("terminated"))

        def get_experiment_by_name(self, name: str) -> None:
            calls.append(("asked", name))

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            calls.append(("run", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    module = types.ModuleType("mlflow")
    module.MlflowClient = MlflowClient  # type: ignore[attr-defined]
    return module


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "wandb", stub_of_wandb(calls))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    result = train("wandb", out=tmp_path / "mine")
    (_, begun), *logged, end = calls
    assert (begun["project"], begun["group"], begun["dir"]) == ("pyro_vmem", "mine", str(tmp_path / "mine"))
    assert begun["config"]["objective"] == "vimco"
    for (_, args, kwargs), row in zip(logged, result.history, strict=True):
        assert kwargs == {"step": row["step"]}
        assert args[0] == {name: value for name, value in row.items() if name != "step"}
    assert end[0] == "finish"


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "mlflow", stub_of_mlflow(calls))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    result = train("mlflow", out=tmp_path / "mine")
    assert calls[:2] == [("asked", "pyro_vmem"), ("run", "7", "mine")]
    params = {args[1]: args[2] for kind, args, _ in calls[2:-1] if kind == "param"}
    assert (params["objective"], params["from_step"]) == ("vimco", 0)
    metrics = [(*args, kwargs["step"]) for kind, args, kwargs in calls[2:-1] if kind == "metric"]
    expected = [("r1", n, v, row["step"]) for row in result.history for n, v in row.items() if n != "step"]
    assert metrics == expected
    assert calls[-1] == ("terminated", ("r1",), {})


def test_a_service_that_cannot_be_reached_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("wandb")

    def refuse(**_: Any) -> None:
        raise ConnectionError("no key")

    module.init = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.warns(RuntimeWarning, match=r"logger: wandb failed \(ConnectionError: no key\)"):
        assert train("wandb", out=tmp_path).steps == 4
    assert len(rows_of(tmp_path / "history.csv")) == 2
