"""The history of a run as it is made, for TensorBoard, Weights & Biases and MLflow, beside `history.csv`."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pyro_vmem._utils.extras import require

__all__ = ["MLflowLogger", "TensorBoardLogger", "WandbLogger", "logging_to"]

Row = Mapping[str, float]
LoggerName = Literal["tensorboard", "wandb", "mlflow"]
Logger = Callable[[int, Row], None]
Loggers = LoggerName | Logger | Sequence[LoggerName | Logger] | None


class TensorBoardLogger:
    """Writes event files, which `tensorboard --logdir FOLDER` shows.

    Arguments:
        folder: Where the run is; the files go to `tensorboard` in it.
        settings: What the run was started with, shown as text.
        step: The step that the run goes on from: what is there of later ones, which were lost, is hidden.

    Raises:
        ImportError: If TensorBoard is not installed: `pip install 'pyro_vmem[tensorboard]'`.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None, step: int = 0) -> None:
        require("tensorboard", "tensorboard")
        module = importlib.import_module("torch.utils.tensorboard")  # torch's own, which needs it
        self.writer = module.SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step or None)
        for name, value in (settings or {}).items():
            self.writer.add_text(name, str(value), step)

    def __call__(self, step: int, values: Row) -> None:
        """Adds a row of the history: one scalar a name, those of validation under `validation/`."""
        for name, value in values.items():
            group = "validation" if name.startswith("val_") else "training"
            self.writer.add_scalar(f"{group}/{name.removeprefix('val_')}", value, step)
        self.writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self.writer.close()


class WandbLogger:
    """Logs to Weights & Biases, in the project `pyro_vmem` unless `WANDB_PROJECT` names another.

    A resumed run is a second one of the same group. Without a network, `WANDB_MODE=offline` keeps all in the folder.

    Arguments:
        folder: Where the run is; its name is the group's, and wandb's own files go to `wandb` in it.
        settings: What the run was started with.
        step: The step that the run goes on from.

    Raises:
        ImportError: If wandb is not installed: `pip install 'pyro_vmem[wandb]'`.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None, step: int = 0) -> None:
        wandb = require("wandb", "wandb")
        project = os.environ.get("WANDB_PROJECT", "pyro_vmem")
        self.run = wandb.init(
            project=project, group=Path(folder).name, dir=str(folder), config=dict(settings or {}) | {"from_step": step}
        )

    def __call__(self, step: int, values: Row) -> None:
        """Logs a row of the history."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


class MLflowLogger:
    """Logs to MLflow, in the experiment `pyro_vmem` unless `MLFLOW_EXPERIMENT_NAME` names another.

    Where to is told by `MLFLOW_TRACKING_URI`, as always with MLflow, such as `sqlite:///mlflow.db`; its global state is
    left alone.

    Arguments:
        folder: Where the run is; its name is the MLflow run's.
        settings: What the run was started with: the MLflow run's parameters.
        step: The step that the run goes on from.

    Raises:
        ImportError: If MLflow is not installed: `pip install 'pyro_vmem[mlflow]'`.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None, step: int = 0) -> None:
        self.client = require("mlflow", "mlflow").MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "pyro_vmem")
        known = self.client.get_experiment_by_name(name)
        experiment = self.client.create_experiment(name) if known is None else known.experiment_id
        self.run = self.client.create_run(experiment, run_name=Path(folder).name).info.run_id
        for key, value in {**(settings or {}), "from_step": step}.items():
            self.client.log_param(self.run, key, value)

    def __call__(self, step: int, values: Row) -> None:
        """Logs a row of the history."""
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def close(self) -> None:
        """Ends the run."""
        self.client.set_terminated(self.run)


LOGGERS: dict[LoggerName, tuple[Callable[..., Logger], str]] = {
    "tensorboard": (TensorBoardLogger, "tensorboard"),
    "wandb": (WandbLogger, "wandb"),
    "mlflow": (MLflowLogger, "mlflow"),
}


@contextlib.contextmanager
def logging_to(
    loggers: Loggers,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    step: int = 0,
) -> Iterator[Callable[[Row], None]]:
    """Gives a function that sends a row of the history to loggers, and closes them in the end.

    A logger is a name, or any function of a step and a row. One that fails is warned of and asked no more; it never
    ends a run. That its package is not installed is an error, before the run begins.

    Arguments:
        loggers: One, several or none.
        folder: Where the run is.
        settings: What the run was started with.
        step: The step that the run goes on from.

    Raises:
        ValueError: If there is no logger of the name, or it is to write to a folder and there is none.
        ImportError: If a package is not installed.

    Example:
        >>> rows = []
        >>> with logging_to(lambda step, row: rows.append((step, row["bound"]))) as log:
        ...     log({"step": 500, "seconds": 9.0, "bound": -90.0})
        >>> rows
        [(500, -90.0)]
    """
    several = [loggers] if isinstance(loggers, str) or callable(loggers) else list(loggers or ())
    at_work: dict[int, tuple[str, Logger]] = {}

    def guarded(index: int, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a service throws
            at_work.pop(index, None)
            warnings.warn(
                f"logger: {name} failed ({type(error).__name__}: {error}), and is asked no more. Training goes on, and "
                "history.csv has all.",
                RuntimeWarning,
                stacklevel=3,
            )
            return None

    makers = [_maker(logger, folder, settings, step) for logger in several]  # all are known before any is begun
    for index, (name, make) in enumerate(makers):
        if (made := guarded(index, name, make)) is not None:
            at_work[index] = name, made

    def log(row: Row) -> None:
        step, values = int(row["step"]), {name: value for name, value in row.items() if name != "step"}
        for index, (name, logger) in list(at_work.items()):
            guarded(index, name, partial(logger, step, values))

    try:
        yield log
    finally:
        for index, (name, logger) in list(at_work.items()):
            guarded(index, name, getattr(logger, "close", lambda: None))


def _maker(
    logger: Any, folder: Path | None, settings: Mapping[str, Any] | None, step: int
) -> tuple[str, Callable[[], Logger]]:
    """The name of a logger and what begins it."""
    if callable(logger):
        return getattr(logger, "__name__", type(logger).__name__), lambda: logger
    if logger not in LOGGERS:
        raise ValueError(
            f"logger: expected {', '.join(map(repr, LOGGERS))}, or a function of a step and a row, got {logger!r}."
        )
    if folder is None:
        raise ValueError(f"logger: {logger!r} writes to the folder of the run. Give out.")
    cls, package = LOGGERS[logger]
    require(package, package)
    return logger, lambda: cls(folder, settings, step)
