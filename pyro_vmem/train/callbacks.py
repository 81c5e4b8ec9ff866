"""What surrounds the steps of a run: validation, checkpoints, a progress bar, logging, fresh keys, an end in time."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from pyro_vmem._utils.checks import Few, Limit, NonNegativeInt
from pyro_vmem.data import Episode
from pyro_vmem.memory import AddressIndex, Memory
from pyro_vmem.model.indexing import KeyRefresher, staleness
from pyro_vmem.parts import AddressGuide, IndexedGuide
from pyro_vmem.train.checkpoint import load_newest, save_checkpoint
from pyro_vmem.train.folder import RUN_FILES, holds_run
from pyro_vmem.train.history import write_history
from pyro_vmem.train.trainer import Trainer
from pyro_vmem.train.validation import validate

__all__ = ["Callback", "Checkpoints", "Log", "ProgressBar", "RefreshKeys", "StopAfter", "Validation"]


class Callback:
    """Methods that a run calls between its steps. A subclass overrides the methods that it needs.

    Attributes:
        everywhere: Whether it is called in all processes that train together, and not only in the first.
    """

    everywhere: ClassVar[bool] = False

    def start(self, trainer: Trainer, episode: Episode) -> None:
        """Called before the first step with the first episode. A resumed run has been loaded by then."""

    def before_step(self, trainer: Trainer, episode: Episode) -> None:
        """Called before each step, with its episode."""

    def after_step(self, trainer: Trainer, episode: Episode) -> None:
        """Called after each step, with its episode. `trainer.stop()` ends the run here."""

    def measure(self, trainer: Trainer, episode: Episode) -> Mapping[str, float]:
        """Called with the last episode when a row of the history is due; returns entries of the row by name."""
        return {}

    def record(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Called after a row was added to the history."""

    def end(self, trainer: Trainer) -> None:
        """Called at the end of the run, also after an error. The model has its best weights by then."""


class Validation(Callback):
    """Validates on held-out episodes and selects the weights to keep.

    Arguments:
        episodes: The source of episodes, of held-out classes.
        select: The weights that the model gets at the end: `"best"`, those with the best bound, or `"last"`, those of
            the last validation. If only a guide is trained, the bound hardly differs; use `"last"`.
    """

    everywhere = True

    def __init__(self, episodes: Dataset[Episode], select: Literal["best", "last"] = "best") -> None:
        self.episodes, self.select = episodes, select

    def measure(self, trainer: Trainer, episode: Episode) -> dict[str, float]:
        trainer.vma.eval()
        with trainer.autocast:
            found = trainer.processes.first(lambda: validate(trainer.vma, self.episodes))
        trainer.vma.train()
        if found["bound"] > trainer.result.best_bound or self.select == "last":
            trainer.keep_weights()
        trainer.result.best_bound = max(found["bound"], trainer.result.best_bound)
        return {f"val_{name}": value for name, value in found.items()}


class Checkpoints(Callback):
    """Keeps a run in a folder: `last.safetensors`, `best.safetensors` and `history.csv`.

    If a file cannot be written, as on a full disk, there is a warning. The old file stays, and the next checkpoint is
    written as usual.

    Arguments:
        folder: An existing folder.
        keep: The number of last checkpoints to keep, at least 1. The one before the last is `last-1.safetensors`.

    Attributes:
        unwritten: The error that kept the newest state out of the folder; `None` if there was none.
    """

    def __init__(self, folder: str | Path, keep: Few = 2) -> None:
        self.folder, self.keep = Path(folder).absolute(), keep  # wherever the process goes to meanwhile
        self.unwritten: OSError | None = None
        self._written: tuple[Any, int] = (None, 0)  # the best weights and the step that are in the folder

    def read(self, resume: bool) -> dict[str, Any] | None:
        """Reads the state to continue from; `None` if the folder holds no run.

        Raises:
            ValueError: If it holds a run, and `resume` is false or the run cannot be resumed.
        """
        folder = self.folder
        if not holds_run(folder):
            return None
        if not resume:
            raise ValueError(
                f"out: {str(folder)!r} already holds a run. Pass resume=True to go on from it, or name another folder."
            )
        try:
            tensors, data = load_newest(folder / RUN_FILES[0], set_aside=True)
        except FileNotFoundError as error:
            there = [name for name in RUN_FILES if (folder / name).exists()]
            raise ValueError(
                f"out: the run in {str(folder)!r} cannot be resumed: {RUN_FILES[0]} is missing, and {there} are there. "
                "Restore it, load the weights with pyro_vmem.load, or name another folder."
            ) from error
        return tensors | data

    def record(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        step, state = trainer.result.steps, trainer.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        data = {name: value for name, value in state.items() if name not in tensors}
        try:
            # The best weights first: a run that is killed in between finds them again when it is resumed. But without
            # any last checkpoint there is nothing to resume from, so that the first one comes before them.
            if (self.folder / RUN_FILES[0]).exists():
                self._write_best(trainer)
            save_checkpoint(self.folder / RUN_FILES[0], tensors, data, self.keep)
            self._write_best(trainer)
            write_history(self.folder / "history.csv", trainer.result.history)
            self._written, self.unwritten = (trainer.best, step), None
        except OSError as error:
            self.unwritten = error
            warnings.warn(
                f"out: step {step} could not be written to {str(self.folder)!r} ({error}). What was there before is "
                "kept, and training goes on; free some space before the next checkpoint.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _write_best(self, trainer: Trainer) -> None:
        best = trainer.best
        if best is not None and best is not self._written[0]:
            save_checkpoint(self.folder / "best.safetensors", best, {"spec": trainer.vma.spec()})
            self._written = best, self._written[1]

    def write_rest(self, trainer: Trainer) -> None:
        """Writes the steps since the last record, unless there are none or a step was interrupted."""
        if trainer.whole and trainer.result.steps and self._written[1] != trainer.result.steps:
            self.record(trainer, {})

    def start(self, trainer: Trainer, episode: Episode) -> None:
        """Notes the last step in the folder. The best weights there may be of later steps, which were lost."""
        self._written = None, trainer.result.steps
        if not (self.folder / "best.safetensors").exists():  # of a run that was killed before it was written
            self._write_best(trainer)

    def check(self, trainer: Trainer) -> None:
        """Raises an `OSError` if the last checkpoint could not be written."""
        if self.unwritten is not None:
            raise OSError(
                f"out: the last checkpoint, of step {trainer.result.steps}, could not be written to "
                f"{str(self.folder)!r} ({self.unwritten}). The model is trained; free some space and save it with "
                "save_checkpoint, or train on from the last checkpoint with resume=True."
            ) from self.unwritten


class ProgressBar(Callback):
    """Shows steps, time left and averages of the terms: as a bar on a terminal, otherwise as a line now and then.

    Arguments:
        seconds: The time between two lines if stderr is not a terminal.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds

    def start(self, trainer: Trainer, episode: Episode) -> None:
        total, steps = None if trainer.config.minutes else trainer.config.steps, trainer.result.steps
        self.bar = tqdm(total=total, initial=steps, desc="training", unit="step", disable=not sys.stderr.isatty())
        self._begun, self._first = time.perf_counter(), steps
        self._next = self._begun + self.seconds
        if trainer.result.chosen:
            self.bar.write(trainer.result.chosen, file=sys.stderr)

    def after_step(self, trainer: Trainer, episode: Episode) -> None:
        self.bar.update()
        if self.bar.disable and time.perf_counter() >= self._next:
            self._next = time.perf_counter() + self.seconds
            steps, of = trainer.result.steps, "" if trainer.config.minutes else f" of {trainer.config.steps:,}"
            line = f"step {steps:,}{of}, {self._left(trainer)} left: {trainer.meter.text()}"
            self.bar.write(line, file=sys.stderr)
        elif trainer.result.steps % 10 == 0:
            # Of a number of steps the bar itself tells the time left.
            left = f"{self._left(trainer)} left  " if trainer.config.minutes else ""
            self.bar.set_postfix_str(left + trainer.meter.text(), refresh=False)

    def _left(self, trainer: Trainer) -> str:
        """The time that the run still takes: of its minutes, or by the pace of the steps so far."""
        config, result = trainer.config, trainer.result
        if config.minutes is not None:
            seconds = 60 * config.minutes - result.seconds
        else:
            per_step = (time.perf_counter() - self._begun) / max(1, result.steps - self._first)
            seconds = per_step * (config.steps - result.steps)
        return str(tqdm.format_interval(max(0.0, seconds)))

    def end(self, trainer: Trainer) -> None:
        if trainer.stopped:
            self.bar.write(f"Interrupted after {trainer.result.steps} steps; the run is kept.", file=sys.stderr)
        elif trainer.out_of_patience():
            text = f"Ended after {trainer.result.steps:,} steps by early stopping (patience {trainer.config.patience})."
            self.bar.write(text, file=sys.stderr)
        self.bar.close()


class Log(Callback):
    """Sends each row of the history to a function. If the function fails, there is a warning, and it is not called
    again.

    Arguments:
        function: Called with the step and the numbers by name.

    Example:
        >>> Log(lambda step, row: print(step, round(row["bound"], 1))).record(None, {"step": 500, "bound": -90.04})
        500 -90.0
    """

    def __init__(self, function: Callable[[int, dict[str, float]], Any]) -> None:
        self.function: Callable[[int, dict[str, float]], Any] | None = function

    def record(self, trainer: Trainer | None, row: Mapping[str, float]) -> None:
        if self.function is None:
            return
        try:
            self.function(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        except Exception as error:  # whatever a service throws
            name = getattr(self.function, "__name__", type(self.function).__name__)
            self.function = None
            warnings.warn(
                f"log: {name} failed ({type(error).__name__}: {error}), and is asked no more. Training goes on.",
                RuntimeWarning,
                stacklevel=3,
            )


class StopAfter(Callback):
    """Ends this call of :func:`fit` after some time, with the schedules where they are.

    Repeated calls with `resume=True` give the same result as one call without a stop.

    Arguments:
        minutes: The time, more than 0. The current step is finished first.
    """

    def __init__(self, minutes: Limit) -> None:
        self.minutes = minutes

    def start(self, trainer: Trainer, episode: Episode) -> None:
        self._end = time.perf_counter() + 60 * self.minutes

    def after_step(self, trainer: Trainer, episode: Episode) -> None:
        if time.perf_counter() >= self._end:
            trainer.stop()


class RefreshKeys(Callback):
    """Recomputes the keys of the indexes that the guide searches: some slots after each step, all at the end.

    The history has the columns `key_overlap`, `key_missed` and `key_drift`; see
    :class:`pyro_vmem.model.indexing.Staleness`. A resumed run begins with fresh keys.

    Arguments:
        slots_per_step: The number of slots whose keys are recomputed after each step, in turn. 0 recomputes none.
    """

    everywhere = True

    def __init__(self, slots_per_step: NonNegativeInt = 256) -> None:
        self.slots_per_step = slots_per_step
        self._met: dict[AddressIndex, KeyRefresher] = {}

    def wants(self, guide: object, memory: Memory) -> bool:
        """Whether the guide searches an index of this memory, and keys are refreshed."""
        return memory.index is not None and self.slots_per_step > 0 and looked_up(guide) > 0

    def start(self, trainer: Trainer, episode: Episode) -> None:
        self._met.clear()
        self._resumed = trainer.result.steps > 0
        self.before_step(trainer, episode)

    def before_step(self, trainer: Trainer, episode: Episode) -> None:
        """Notes a memory. In a resumed run, a new memory gets fresh keys."""
        memory, index = episode.memory, episode.memory.index
        if index is None or not self.wants(trainer.vma.address_guide, memory):
            return
        if index not in self._met:
            self._met[index] = KeyRefresher(trainer.vma, memory, self.slots_per_step)
            if self._resumed:
                with trainer.autocast:
                    self._met[index].refresh()
        self._met[index].memory = memory  # which may have been moved, or have grown

    def after_step(self, trainer: Trainer, episode: Episode) -> None:
        index = episode.memory.index
        if index is not None and self.wants(trainer.vma.address_guide, episode.memory):
            with trainer.autocast:
                self._met[index].step()

    def measure(self, trainer: Trainer, episode: Episode) -> dict[str, float]:
        """Measures how stale the keys are for the targets of an episode."""
        if not self.wants(trainer.vma.address_guide, episode.memory):
            return {}
        with trainer.autocast:
            found = staleness(trainer.vma, episode.memory, episode.x, looked_up(trainer.vma.address_guide))
        means = {"key_overlap": float(found.overlap.mean()), "key_missed": float(found.missed.mean())}
        return means | {"key_drift": found.drift}

    def end(self, trainer: Trainer) -> None:
        """Recomputes all keys with the best weights, unless the run was stopped."""
        if not trainer.stopped and trainer.whole:
            with trainer.autocast:
                for refresher in self._met.values():
                    refresher.refresh()


def looked_up(guide: object) -> int:
    """The number of slots that a guide looks up in an index; 0 if it uses none."""
    while isinstance(guide, AddressGuide) and not isinstance(guide, IndexedGuide):
        guide = getattr(guide, "inner", None)
    return guide.k if isinstance(guide, IndexedGuide) else 0
