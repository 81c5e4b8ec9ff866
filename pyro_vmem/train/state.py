"""The state of a run: all that a resumed one needs to go on as if it had never been stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vmem._utils.files import remove_leftovers, versions_of
from pyro_vmem._utils.lock import alone_in
from pyro_vmem._utils.random_state import random_states, seed_all, set_random_states
from pyro_vmem.model import VMA
from pyro_vmem.train.checkpoint import load_newest, save_checkpoint
from pyro_vmem.train.history import FitResult, Meter, write_history
from pyro_vmem.train.step import Steps

__all__ = ["Run", "check_spec", "described", "holds_run", "make_folder"]


class Run:
    """Everything that changes in the course of a run, and the folder that it is kept in.

    Arguments:
        steps: The model, the optimizer and the objective.
        settings: What else the numbers depend on, by name, as plain data.
        folder: Where checkpoints are kept; `None` for nowhere.
        keep: How many of the last checkpoints.
        select: Which weights count as the best: those of the best bound in a validation, or the last.

    Attributes:
        result: Steps taken, time and history. The sampler's position is the number of steps.
        meter: Running averages of the terms.
        rates: Where the schedules were at the last step.
        skipped_in_a_row: Steps skipped since the last that was not.
        best: The best weights by validation.
        log: Takes each row of the history.
        unwritten: Why the newest state is not in the folder, if it should be; `None` if it is.
    """

    def __init__(self, steps: Steps, settings: dict[str, Any], folder: Path | None, keep: int, select: str) -> None:
        self.steps = steps
        self.ranks = steps.ranks  # the first of them reads and writes
        self.settings = settings
        self.folder = folder
        self.keep = keep
        self.select = select
        self.result = FitResult(chosen=steps.chosen)
        self.meter = Meter()
        self.rates: dict[str, float] = {}
        self.skipped_in_a_row = 0
        self.best: dict[str, Tensor] | None = None
        self.log: Callable[[dict[str, float]], None] = lambda row: None
        self.unwritten: OSError | None = None
        self._best_is_written = True
        self._random_states: dict[str, Tensor] = {}

    @property
    def vma(self) -> VMA:
        """The model."""
        return self.steps.vma

    @property
    def _device(self) -> torch.device:
        return next(self.vma.parameters()).device

    @property
    def recorded(self) -> bool:
        """Whether the history has a row of the present step."""
        return bool(self.result.history) and self.result.history[-1]["step"] == self.result.steps

    def set_random_state(self, seed: int) -> None:
        """Sets the global random state, which the caller has set aside, to this run's."""
        seed_all(seed)
        states, device = self._random_states, self._device
        set_random_states(states)
        if "random_state" in states:
            torch.set_rng_state(states["random_state"])
        if "cuda_random_state" in states and device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda_random_state"], device)

    def select_of(self, row: dict[str, float]) -> None:
        """Remembers the present weights as the best, if they are by a row of the history."""
        bound = row.get("val_bound", -math.inf)
        if bound <= self.result.best_bound and self.select == "best":
            return
        self.result.best_bound = max(bound, self.result.best_bound)
        self.best = {name: tensor.clone() for name, tensor in self.vma.state_dict().items()}
        self._best_is_written = False

    def write(self) -> None:
        """Writes what has changed to the folder. If that fails, it says so, and what was there before stays.

        A full disk is no reason to lose what was computed: the run goes on, and the next call tries again.
        """
        if self.folder is None or self.ranks.index:
            return
        try:
            # The best weights first: a run that is killed in between finds them again when it is resumed.
            if self.best is not None and not self._best_is_written:
                save_checkpoint(self.folder / "best.safetensors", self.best, {"spec": self.vma.spec()})
                self._best_is_written = True
            self._save(self.folder / "last.safetensors")
            write_history(self.folder / "history.csv", self.result.history)
            self.unwritten = None
        except OSError as error:
            self.unwritten = error
            warnings.warn(
                f"out: step {self.result.steps} could not be written to {str(self.folder)!r} ({error}). What was there "
                "before is kept, and training goes on; free some space before the next checkpoint.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _save(self, path: Path) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.vma.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
        for index, state in self.steps.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        if self.steps.module is not None:
            tensors |= {f"objective.{name}": tensor for name, tensor in self.steps.module.state_dict().items()}
        tensors |= {"random_state": torch.get_rng_state()} | random_states()
        if self._device.type == "cuda":  # for whichever GPU, and in each process, the run goes on
            tensors["cuda_random_state"] = torch.cuda.get_rng_state(self._device)
        data = {
            "spec": self.vma.spec(),
            "result": asdict(self.result),
            "meter": self.meter.state(),
            "rates": self.rates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "trained": self.steps.names,
            "settings": self.settings,
        }
        save_checkpoint(path, tensors, data, self.keep)

    def load(self) -> None:
        """Goes on from the newest checkpoint in the folder that is whole; the model is changed last.

        Raises:
            ValueError: If none is, or they are not of such a run.
        """
        tensors, data = self.ranks.first(self._read)
        if not {"result", "spec"} <= data.keys() or "random_state" not in tensors:
            raise ValueError(
                f"out: the checkpoint in {str(self.folder)!r} holds a model but no run to resume. Load it with "
                "pyro_vmem.load, or start in another folder."
            )
        self._check_fits(tensors)
        if data.get("trained", self.steps.names) != self.steps.names:
            changed = sorted(set(data["trained"]) ^ set(self.steps.names))
            raise ValueError(
                f"vma: the run in {str(self.folder)!r} trained other parameters: {', '.join(changed[:5])} and "
                f"{max(0, len(changed) - 5)} more. Freeze and unfreeze (requires_grad) as it was then."
            )
        known = {field.name for field in dataclasses.fields(FitResult)}
        self.result = FitResult(**{name: value for name, value in data["result"].items() if name in known})
        self.result.interrupted = False
        if "meter" in data:  # not in format 1
            self.meter.restore(data["meter"])
            self.rates, self.skipped_in_a_row = data["rates"], data["skipped_in_a_row"]
        self._warn_of_changes(data.get("settings", {}))
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, key = name.split(".")
            states.setdefault(int(index), {})[key] = tensor
        self.steps.optimizer.load_state_dict(self.steps.optimizer.state_dict() | {"state": states})
        if self.steps.module is not None:
            self.steps.module.load_state_dict(_under("objective.", tensors))
        self._random_states = {name: tensor for name, tensor in tensors.items() if name.endswith("random_state")}
        self.vma.load_state_dict(_under("model.", tensors))
        self.best = _under("best.", tensors) or None
        self._best_is_written = self.best is None  # what is there may be of steps that were lost

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        assert self.folder is not None
        for name in ("last.safetensors", "best.safetensors", "history.csv"):
            remove_leftovers(self.folder / name)
        return load_newest(self.folder / "last.safetensors")

    def _check_fits(self, tensors: dict[str, Tensor]) -> None:
        """Raises a `ValueError` if the checkpoint is of another model, before anything of this one is changed."""
        modules = {"vma": ("model.", self.vma), "objective": ("objective.", self.steps.module)}
        for argument, (prefix, module) in modules.items():
            expected = {} if module is None else {n: tuple(t.shape) for n, t in module.state_dict().items()}
            found = {name: tuple(tensor.shape) for name, tensor in _under(prefix, tensors).items()}
            if expected != found:
                name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
                raise ValueError(
                    f"{argument}: the run in {str(self.folder)!r} was of another one: {name!r} has shape "
                    f"{found.get(name, 'none')} there and {expected.get(name, 'none')} here. Build it as it was "
                    "(pyro_vmem.load gives the model), or start in another folder."
                )

    def _warn_of_changes(self, before: dict[str, Any]) -> None:
        now = self.settings
        changed = [
            f"{name}={now[name]!r} (was {was!r})"
            for name, was in before.items()
            if None not in (was, now.get(name)) and now[name] != was
        ]
        if changed and self.ranks.index == 0:
            warnings.warn(
                f"resume: the run had other settings before; it goes on with {', '.join(changed)}.",
                RuntimeWarning,
                stacklevel=3,
            )


def holds_run(folder: Path) -> bool:
    """Whether there is a checkpoint to resume from."""
    return bool(versions_of(folder / "last.safetensors"))


def make_folder(folder: Path) -> None:
    """A folder that cannot be made or written to raises a `ValueError` before training, not at the first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(f"out: cannot write to the folder {str(folder)!r} ({error}). Name another one.") from error


@contextmanager
def described(path: Path, write: Callable[[Path], None]) -> Iterator[None]:
    """Keeps a file beside the run that the block begins; a run that cannot begin leaves nothing behind."""
    folder, new = path.parent, not path.parent.exists()
    make_folder(folder)
    with alone_in(folder):
        keep = path.exists()
        if not holds_run(folder):
            write(path)
        try:
            yield
        finally:
            if not keep and not holds_run(folder):
                path.unlink()
                if new:
                    folder.rmdir()


def check_spec(vma: VMA) -> None:
    """A model that no checkpoint can name raises a `ValueError` before it is trained, not when one is written."""
    try:
        json.dumps(vma.spec())
    except TypeError as error:
        raise ValueError(
            f"vma: a part was built from an argument that is not plain data ({error}), so that a checkpoint could not "
            "rebuild it. Train with out=None and save the state_dict yourself."
        ) from error


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
