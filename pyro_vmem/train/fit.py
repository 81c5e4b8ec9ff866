"""Training in one call: a loop over episodes around the trainer, and the callbacks that surround its steps."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vmem._utils.checks import NonNegativeInt, PositiveInt
from pyro_vmem._utils.files import remove_leftovers
from pyro_vmem._utils.lock import alone_in
from pyro_vmem._utils.random_state import set_aside
from pyro_vmem._utils.signals import on_interrupt
from pyro_vmem.data import Episode
from pyro_vmem.data.loading import load_ahead, lost_worker
from pyro_vmem.infer.by_name import Objective
from pyro_vmem.memory import PackedMemory
from pyro_vmem.model import VMA
from pyro_vmem.train.callbacks import Callback, Checkpoints, ProgressBar, RefreshKeys, Validation, looked_up
from pyro_vmem.train.config import TrainingConfig
from pyro_vmem.train.distributed import Processes, own_device
from pyro_vmem.train.folder import RUN_FILES, check_spec, make_folder
from pyro_vmem.train.history import FitResult
from pyro_vmem.train.trainer import Trainer
from pyro_vmem.train.validation import first_episode

__all__ = ["fit"]

MOST_WORKERS = 256  # each is a process that holds a copy of the source


def fit(
    vma: VMA,
    episodes: Dataset[Episode],
    objective: Objective | ELBO = "vimco",
    config: TrainingConfig | None = None,
    *,
    validation: Dataset[Episode] | None = None,
    validate_every: PositiveInt = 500,
    select: Literal["best", "last"] = "best",
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    device: str | torch.device | None = None,
    workers: NonNegativeInt = 0,
    progress: bool = True,
    **settings: Any,
) -> FitResult:
    r"""Trains a model and its guide on episodes.

    :class:`TrainingConfig` has the settings. Pyro's parameter store and the global random state stay unchanged.

    Ctrl-C ends the run after the current step and keeps it. A second Ctrl-C ends it at once, with the last checkpoint.
    A killed run continues from its last checkpoint as if it had never stopped. On the CPU and with `steps`, it reaches
    the same weights bit for bit.

    A step whose loss or gradient is not finite changes no weight and is counted in the result. Ten such steps in a row,
    or more than one in a hundred, stop the run. If a checkpoint cannot be written, as on a full disk, there is a
    warning, and training goes on. If it is the last one, there is an error at the end.

    Started by `torchrun` (or with `torch.distributed` initialised), the processes train one model together, each on a
    share of the targets of each episode. An episode must then depend on its number only. The run can be resumed with
    another number of processes.

    If the guide searches an index of the memory, its keys are refreshed; see :class:`pyro_vmem.train.RefreshKeys`.

    Arguments:
        vma: The model and its guide, trained in place. At the end it has the weights that `select` names.
        episodes: The source of training episodes. Step i takes episode i.
        objective: `"vimco"`, `"rws"`, `"iwae"`, `"reinforce"` or `"rao-blackwell"`, each of :mod:`pyro_vmem.infer` and
            with four particles; `"enumerate"` (stock `TraceEnum_ELBO`: all slots are summed, or those a
            :class:`TruncatedGuide` keeps); `"auto"`, which chooses by the number of slots and says what and why; or any
            `pyro.infer.ELBO`, such as `pyro_vmem.infer.VIMCO_ELBO(8, backward=1)`.
        config: The settings. Or give its fields as arguments, such as `steps=5000, lr=1e-3`.
        validation: The source of validation episodes, of held-out classes.
        validate_every: Steps between validations and checkpoints.
        select: Which weights are kept: `"best"`, those of the best bound in a validation, if there is any, or
            `"last"`, those of the last.
        out: A folder for `last.safetensors`, `best.safetensors` and `history.csv`.
        resume: Whether to go on from `out/last.safetensors`, if there is a run; where it is damaged, from the one
            before.
        callbacks: Callbacks between steps, such as :class:`pyro_vmem.train.Log` and :class:`pyro_vmem.train.StopAfter`.
            A callback replaces one of the same class that this function would add.
        device: The device, such as `"cuda"`, or `"auto"` for a GPU if there is one. Default: that of the model.
        workers: How many processes load episodes; by default this one does, for a GPU in a thread ahead of the steps.
        progress: Whether to show a progress bar.
        settings: Fields of :class:`TrainingConfig`, in place of `config`.

    Raises:
        ValueError: If an argument is out of range, or `out` already holds a run and `resume` is false, or one that
            does not fit or cannot be resumed.
        FloatingPointError: If too many steps had to be skipped; it names the first term and site that was not finite.
            The model then holds its best weights by validation, or those of the last good step.
        OSError: At the end, if the last checkpoint could not be written. The model is trained nevertheless. A
            `ConnectionError` if another process of the run died, and a `ChildProcessError` if a loading process died.
            The last checkpoint is kept.

    Example:
        >>> import pyro_vmem as pv
        >>> train, _ = pv.data.glyphs(size=12, drawings=12).split(seed=0)
        >>> vma = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> fit(vma, pv.data.EpisodeSampler(train, n_way=4, k_shot=1, n_query=1), steps=2, progress=False).steps
        2
    """
    config = _config(config, settings)
    if config.patience is not None and validation is None:
        raise ValueError(f"patience: got {config.patience}, but there is no validation. Pass validation= as well.")
    if device is not None:
        vma.to(own_device(device))
    processes = Processes.join(next((p.device for p in vma.parameters()), torch.device("cpu")))
    trainer = Trainer(vma, objective, config, processes)
    called = _with_defaults(vma, callbacks, validation, select, out, progress)
    checkpoints = next((one for one in called if isinstance(one, Checkpoints)), None)
    called = [one for one in called if one.everywhere or processes.rank == 0]
    if checkpoints is not None:
        check_spec(vma)
    with contextlib.ExitStack() as stack:
        # Whatever the caller is in: without these nothing would be trained. A source of episodes may draw from the
        # generators that are set aside.
        for outside in (torch.inference_mode(False), torch.enable_grad(), set_aside(trainer.device)):
            stack.enter_context(outside)
        trainer.seed()  # so that the first episode is the same one when the run is resumed
        episode = first_episode(episodes, "episodes", 1 if config.minutes is not None else config.steps)
        trainer.settings |= {"select": select, "first training episode": _digest(episode)}
        if validation is not None:
            first = _digest(first_episode(validation, "validation", 1))
            trainer.settings |= {"first validation episode": first, "validate_every": validate_every}
        _check_workers(workers, called, vma, episode)
        trainer.begin(episode := episode.to(trainer.device))
        state = processes.first(lambda: None if checkpoints is None else _enter(stack, checkpoints, resume))
        trainer.seed()
        if state is not None:
            trainer.load_state_dict(state)
        processes.begin_with(vma, trainer.module)
        vma.train()
        last = config.steps if config.minutes is None else 10**12
        loaded = load_ahead(episodes, trainer.result.steps, last, trainer.device, workers)
        for context in (lost_worker(), contextlib.closing(loaded), on_interrupt(trainer.stop)):
            stack.enter_context(context)
        if processes.rank:  # the first says it for all
            stack.enter_context(warnings.catch_warnings(action="ignore"))
        for callback in called:
            callback.start(trainer, episode)
        if state is not None and trainer.finished():
            warnings.warn(
                f"resume: the run is over, after {trainer.result.steps} steps. To train the model further, load it and "
                "start a run in another folder.",
                RuntimeWarning,
                stacklevel=3,
            )
        try:
            while True:
                if trainer.result.steps and trainer.result.steps % validate_every == 0:
                    _record(trainer, called, episode)
                if trainer.finished():
                    break
                episode = next(loaded)
                for callback in called:
                    callback.before_step(trainer, episode)
                trainer.step(episode)
                for callback in called:
                    callback.after_step(trainer, episode)
            if not trainer.stopped:
                _record(trainer, called, episode)
        finally:
            _end(trainer, called, checkpoints if processes.rank == 0 else None)
    if checkpoints is not None:
        checkpoints.check(trainer)
    return trainer.result


def _record(trainer: Trainer, callbacks: Sequence[Callback], episode: Episode) -> None:
    """Adds a row to the history, unless this step has one."""
    history = trainer.result.history
    if history and history[-1]["step"] == trainer.result.steps:
        return
    row = trainer.row(episode)
    for callback in callbacks:
        row |= callback.measure(trainer, episode)
    history.append(row)
    for callback in callbacks:
        callback.record(trainer, row)


def _end(trainer: Trainer, callbacks: Sequence[Callback], checkpoints: Checkpoints | None) -> None:
    """Keeps what is not in the folder yet, and leaves the model with its best weights, however the run ended."""
    result = trainer.result
    result.interrupted = trainer.stopped
    if checkpoints is not None:
        checkpoints.write_rest(trainer)
    if trainer.stopped and result.steps and (not result.history or result.history[-1]["step"] != result.steps):
        # The checkpoint is of the run as it would have gone on; only what is returned has this row.
        result.history.append(trainer.row())
    trainer.vma.eval()
    if trainer.best is not None:
        trainer.vma.load_state_dict(trainer.best)
    for callback in callbacks:
        callback.end(trainer)


def _enter(stack: contextlib.ExitStack, checkpoints: Checkpoints, resume: bool) -> dict[str, Any] | None:
    """Takes the folder for this run alone; returns the state to go on from."""
    make_folder(checkpoints.folder)
    stack.enter_context(alone_in(checkpoints.folder))
    for name in RUN_FILES:  # a run that is over already writes none of them again
        remove_leftovers(checkpoints.folder / name)
    return checkpoints.read(resume)


def _config(config: TrainingConfig | None, settings: dict[str, Any]) -> TrainingConfig:
    if config is not None and settings:
        raise ValueError(f"{min(settings)}: give it in the config, or all settings as arguments; got both.")
    known = TrainingConfig.__dataclass_fields__
    for name in settings:
        if name not in known:
            raise TypeError(f"{name}: fit has no such argument; the fields of TrainingConfig are {', '.join(known)}.")
    return config or TrainingConfig(**settings)


def _with_defaults(
    vma: VMA,
    given: Sequence[Callback],
    validation: Dataset[Episode] | None,
    select: Literal["best", "last"],
    out: str | Path | None,
    progress: bool,
) -> list[Callback]:
    """The callbacks of a run, in their order: what is measured, then what writes it, then the caller's own."""
    usual: list[Callback] = [RefreshKeys()] if looked_up(vma.address_guide) else []
    usual += [] if validation is None else [Validation(validation, select)]
    usual += [] if out is None else [Checkpoints(out)]
    usual += [ProgressBar()] if progress and sys.stderr is not None else []  # a service may have none
    replaced = tuple(type(callback) for callback in given)
    return [callback for callback in usual if not isinstance(callback, replaced)] + list(given)


def _check_workers(workers: int, callbacks: Sequence[Callback], vma: VMA, episode: Episode) -> None:
    """Raises a `ValueError` if other processes cannot load such episodes."""
    if not workers:
        return
    if workers > MOST_WORKERS:
        raise ValueError(f"workers: expected at most {MOST_WORKERS}, got {workers}. Two or four are usual.")
    if any(isinstance(c, RefreshKeys) and c.wants(vma.address_guide, episode.memory) for c in callbacks):
        raise ValueError(
            f"workers: expected 0, got {workers}: an index whose keys are refreshed has to stay in this process. Load "
            "the episodes here, or pass callbacks=[RefreshKeys(0)] to train with the keys as they are."
        )
    if episode.x.device.type != "cpu":
        raise ValueError(
            f"workers: expected 0, got {workers}: the episodes are made on {str(episode.x.device)!r}, which other "
            "processes cannot do. Load them here, or make them on the CPU: EpisodeSampler(..., device='cpu')."
        )


def _digest(episode: Episode) -> str:
    """What tells an episode from others: a short hash of its targets, labels and, unless packed, templates."""
    memory, digest = episode.memory, hashlib.sha256(str(episode.memory.num_slots).encode())
    # A packed memory may have millions of templates.
    templates = None if isinstance(memory, PackedMemory) else memory.templates
    for value in (episode.x, episode.labels, memory.labels, templates):
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]
