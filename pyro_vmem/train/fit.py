"""The trainer: one torch optimizer over an objective's loss, with schedules, validation and checkpoints."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Literal

import pyro
import torch
from pyro.infer import ELBO
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from pyro_vmem._utils.checks import check_range
from pyro_vmem._utils.lock import alone_in
from pyro_vmem._utils.precision import autocast
from pyro_vmem._utils.random_state import set_aside
from pyro_vmem._utils.signals import uninterrupted
from pyro_vmem.data import Episode, EpisodeSampler
from pyro_vmem.data.loading import load_ahead, lost_worker
from pyro_vmem.infer.by_name import Objective
from pyro_vmem.model import VMA
from pyro_vmem.model.indexing import FreshKeys
from pyro_vmem.train.compiling import Compiled
from pyro_vmem.train.distributed import Ranks, own_device
from pyro_vmem.train.history import FitResult
from pyro_vmem.train.loggers import Loggers, logging_to
from pyro_vmem.train.state import Run, check_spec, holds_run, make_folder
from pyro_vmem.train.step import NotFiniteError, Steps
from pyro_vmem.train.validation import first_episode, validate

__all__ = ["FitResult", "fit"]

# When too many steps have been skipped: all of the last, or a share of all (and no fewer than the first).
MOST_SKIPPED_IN_A_ROW = 10
MOST_SKIPPED_SHARE = 0.01
INTERRUPTED = "Interrupted after {} steps; the run is kept."


def fit(
    vma: VMA,
    episodes: Dataset[Episode],
    objective: Objective | ELBO = "vimco",
    steps: int = 20_000,
    *,
    minutes: float | None = None,
    piece_minutes: float | None = None,
    num_particles: int = 4,
    backward: int | None = None,
    lr: float = 3e-3,
    lr_warmup: int = 100,
    kl_warmup: float = 0.5,
    kl_start: float = 0.1,
    clip_norm: float = 10.0,
    validation: Dataset[Episode] | None = None,
    validate_every: int = 500,
    select: Literal["best", "last"] = "best",
    out: str | Path | None = None,
    resume: bool = False,
    keep: int = 2,
    seed: int = 0,
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    device: str | torch.device | None = None,
    workers: int = 0,
    compile: bool = False,
    refresh_slots: int = 256,
    logger: Loggers = None,
    progress: bool = True,
) -> FitResult:
    r"""Trains a model and its guide on episodes.

    Adam with a linear warm-up and a cosine decay to zero; the weight of :math:`KL(z)` rises linearly from `kl_start` to
    1 over the first part of the run, because a latent that is paid for in full from the start is not used.
    Pyro's parameter store and the global random state are left as they were.

    Ctrl-C ends the run after the step that it is in, and keeps it (a second one ends it at once, and leaves the last
    checkpoint). A run that was killed, at whatever moment, goes on from its last checkpoint as if it had never been
    stopped: on the CPU and with `steps`, to the same weights bit for bit.

    A step whose loss or gradient is not finite moves nothing; it is counted in the result, and ten of them in a row, or
    more than one in a hundred, stop the run. A checkpoint that cannot be written, as on a full disk, is warned of, and
    training goes on; if it is the last one, an error says so at the end.

    Started by `torchrun` (or with `torch.distributed` initialised), the processes train one model together, each on its
    share of the targets of each episode: the same run as that of one process, but for the order of summation. It can be
    resumed by another number of processes.

    Where the memory of the episodes has an index that the guide looks in, its keys are refreshed: some slots after each
    step, in turn, and all at the end. Rows of the history tell how old they had become: `key_overlap`, `key_missed` and
    `key_drift`, see :class:`pyro_vmem.model.indexing.Staleness`. A resumed run begins with fresh keys.

    Arguments:
        vma: The model and its guide; trained in place, and at the end it holds the weights that `select` names.
        episodes: Where the training episodes come from: step i takes episode i.
        objective: `"vimco"`, `"rws"`, `"iwae"`, `"reinforce"` or `"rao-blackwell"`, each of :mod:`pyro_vmem.infer`;
            `"enumerate"` (stock `TraceEnum_ELBO`: all slots are summed, or those a :class:`TruncatedGuide` keeps);
            `"auto"`, which chooses by the number of slots and says what and why; or any `pyro.infer.ELBO`.
        steps: Steps in all.
        minutes: A time budget instead: training ends, and the schedules with it, when it is used up. The number of
            steps is then the machine's; give `steps` for the same numbers anywhere.
        piece_minutes: Where to stop this call, with the schedules where they are: calls with `resume=True` until the
            run is whole add up to the run that was never stopped.
        num_particles: The particles :math:`K` of a named objective: its decodes a target.
        backward: Of how many of them, drawn by their weights, the model's gradient is taken; by default of all. With 1
            a step takes less time and memory and has more noise: see the page on objectives. For `"vimco"`, `"iwae"`
            and `"rws"`.
        lr: The highest learning rate.
        lr_warmup: Steps until it is reached.
        kl_warmup: The part of the run over which the weight of :math:`KL(z)` rises, in [0, 1].
        kl_start: The weight of :math:`KL(z)` to start from, in [0, 1].
        clip_norm: The largest norm of the gradient of the loss per datapoint.
        validation: Where validation episodes come from: classes that are not trained on.
        validate_every: Steps between validations and checkpoints.
        select: Which weights are kept: `"best"`, those of the best bound in a validation, if there is any, or
            `"last"`, those of the last. The bound hardly tells them apart where the model stays and only a guide is
            trained.
        out: A folder for `last.safetensors`, `best.safetensors` and `history.csv`.
        resume: Whether to go on from `out/last.safetensors`, if it is there; where it is damaged, from the one before.
        keep: How many of the last checkpoints are kept: the one before the last is `last-1.safetensors`.
        seed: Seeds the samples of latents.
        precision: The precision of the networks: `"auto"` takes bfloat16 where the processor has it. Densities are
            always computed in full.
        device: Where to train, such as `"cuda"`, or `"auto"` for a GPU if there is one; by default where the model is.
        workers: How many processes load episodes; by default this one does, for a GPU in a thread ahead of the steps.
        compile: Whether encoders and decoder are compiled by `torch.compile` for training steps; all else, and what is
            saved, stays as it is. It takes minutes to begin, and on a CPU it has not paid: see the page on performance.
        refresh_slots: How many slots of an index have their keys computed anew after each step: no key is older than
            slots over `refresh_slots` steps. 0 leaves the keys as they are.
        logger: Where the history goes beside `history.csv`: `"tensorboard"`, `"wandb"`, `"mlflow"`, a function of a
            step and a row, or several; one that fails is warned of and ends nothing.
        progress: Whether to show a progress bar.

    Returns:
        The steps taken and the history.

    Raises:
        ValueError: If an argument is out of range, or `out` already holds a run and `resume` is false, or one that
            does not fit.
        FloatingPointError: If too many steps had to be skipped; it names the first term and site that was not finite.
            The model then holds its best weights by validation, or those of the last good step.
        OSError: At the end, if the last checkpoint could not be written. The model is trained all the same.
            `ConnectionError` if another process of the run has died, `ChildProcessError` if one that loads episodes
            has; the run is kept up to its last checkpoint.

    Example:
        >>> import pyro_vmem as pv
        >>> train, _ = pv.data.glyphs(size=12, drawings=12).split(seed=0)
        >>> vma = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> fit(vma, pv.data.EpisodeSampler(train, n_way=4, k_shot=1, n_query=1), steps=2, progress=False).steps
        2
    """
    if not isinstance(vma, VMA):
        raise ValueError(
            f"vma: expected a pyro_vmem.VMA, got {type(vma).__name__}. Train other models with pyro.infer.SVI and an "
            "objective of pyro_vmem.infer."
        )
    for name, whole, least in (("steps", steps, 1), ("validate_every", validate_every, 1), ("keep", keep, 1)):
        check_range(name, whole, least, 10**12, int)
    wholes = {"seed": seed, "lr_warmup": lr_warmup, "workers": workers, "refresh_slots": refresh_slots}
    for name, whole, least in (("num_particles", num_particles, 1), *((n, w, 0) for n, w in wholes.items())):
        check_range(name, whole, least, 2**63, int)
    check_range("backward", 1 if backward is None else backward, 1, 2**63, int)
    for name, limit in (("minutes", minutes), ("piece_minutes", piece_minutes)):
        check_range(name, 1.0 if limit is None else limit, 1e-6, math.inf)
    for name, value in (("kl_warmup", kl_warmup), ("kl_start", kl_start)):
        check_range(name, value, 0.0, 1.0)
    check_range("lr", lr, 1e-12, 1e3)
    check_range("clip_norm", clip_norm, 1e-12, math.inf)
    if select not in ("best", "last"):
        raise ValueError(f"select: expected 'best' or 'last', got {select!r}.")
    folder = None if out is None else Path(out)
    if folder is not None:
        check_spec(vma)
    if device is not None:
        vma.to(own_device(device))
    device = next(vma.parameters()).device
    half = autocast(device, precision)
    compiled = Compiled(vma, compile)
    with set_aside():  # which a source of episodes may draw from
        first = first_episode(episodes, "episodes", 1 if minutes is not None else steps)
        if validation is not None:
            first_episode(validation, "validation", 1)
    settings = {
        "objective": objective if isinstance(objective, str) else type(objective).__name__,
        "episodes": repr(episodes) if isinstance(episodes, EpisodeSampler) else None,
        **{"num_particles": num_particles, "lr": lr, "lr_warmup": lr_warmup, "kl_warmup": kl_warmup},
        **{"kl_start": kl_start, "clip_norm": clip_norm, "seed": seed},
        **{"refresh_slots": refresh_slots, "backward": backward},
    }
    if workers and FreshKeys(vma, refresh_slots).wants(first.memory):
        raise ValueError(
            f"workers: expected 0, got {workers}: an index whose keys are refreshed has to stay in this process. Load "
            "the episodes here, or pass refresh_slots=0 to train with the keys as they are."
        )
    if workers and first.x.device.type != "cpu":
        raise ValueError(
            f"workers: expected 0, got {workers}: the episodes are made on {str(first.x.device)!r}, which other "
            "processes cannot do. Load them here, or make them on the CPU: EpisodeSampler(..., device='cpu')."
        )
    ranks = Ranks.join(device)
    talks = ranks.index == 0
    run = Run(
        Steps(vma, objective, num_particles, lr, first.to(device), ranks, backward), settings, folder, keep, select
    )
    with contextlib.ExitStack() as stack:

        def enter(folder: Path) -> bool:
            make_folder(folder)
            stack.enter_context(alone_in(folder))
            return holds_run(folder)

        if folder is not None and ranks.first(partial(enter, folder)):
            if not resume:
                raise ValueError(
                    f"out: {str(folder)!r} already holds a run. Pass resume=True to go on from it, or name another "
                    "folder."
                )
            run.load()
        ranks.begin_with(vma, run.steps.module)
        result = run.result
        result.chosen = run.steps.chosen
        keys, episode = FreshKeys(vma, refresh_slots, resumed=result.steps > 0), first.to(device)
        with half:
            keys.meet(episode.memory)
        run.log = stack.enter_context(logging_to(logger if talks else None, folder, settings, result.steps))
        begin = time.perf_counter()
        start = begin - result.seconds
        piece = math.inf if piece_minutes is None else 60 * piece_minutes

        def done() -> float:
            """The part of the run that is behind us, in [0, 1]."""
            return min(1.0, result.steps / steps if minutes is None else (time.perf_counter() - start) / (60 * minutes))

        vma.train()
        quiet = not (progress and talks)
        bar = tqdm(total=None if minutes else steps, initial=result.steps, desc="training", unit="step", disable=quiet)
        whole, stop = True, False  # whether the run is between two steps, and is to stop there
        loaded = load_ahead(episodes, result.steps, 10**12 if minutes else steps, device, workers)
        stack.enter_context(lost_worker())
        stack.enter_context(ranks.stoppable())
        stack.enter_context(contextlib.closing(loaded))
        if not talks:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(set_aside())
        stack.enter_context(pyro.get_param_store().scope())
        stack.enter_context(bar)
        stack.callback(_finish, run)
        if result.chosen and talks:
            bar.write(result.chosen, file=sys.stderr)
        run.set_random_state(seed)
        try:
            if result.steps and result.steps % validate_every == 0:
                _record(run, validation, half, keys, episode)  # if it was stopped just before
            while True:
                part, stop = ranks.agree(done(), stop)
                if stop or part == 1.0:
                    break
                run.rates["lr"] = (
                    lr * min(1.0, (result.steps + 1) / max(1, lr_warmup)) * 0.5 * (1 + math.cos(math.pi * part))
                )
                run.rates["kl_weight"] = 1.0 if part >= kl_warmup else kl_start + (1 - kl_start) * part / kl_warmup
                episode = next(loaded)
                with half:
                    keys.meet(episode.memory)
                whole = False
                with uninterrupted():
                    with compiled:
                        _step(run, episode, clip_norm, half)
                    with half:
                        keys.step(episode.memory)
                    result.seconds = time.perf_counter() - start
                    whole = True
                bar.update()
                if result.steps % 10 == 0:
                    bar.set_postfix_str(run.meter.text(), refresh=False)
                if result.steps % validate_every == 0:
                    _record(run, validation, half, keys, episode)
                stop = time.perf_counter() - begin >= piece
            result.interrupted = part < 1.0
            if result.interrupted and ranks.stopped and talks:
                bar.write(INTERRUPTED.format(result.steps), file=sys.stderr)
            if result.steps and not result.interrupted:
                _record(run, validation, half, keys, episode)
        except KeyboardInterrupt:
            if not whole:
                raise
            result.interrupted = True
            bar.write(INTERRUPTED.format(result.steps), file=sys.stderr)
        except Exception:  # of a source of episodes, as a rule: what was computed is kept
            if whole and result.steps and not run.recorded:
                run.write()
            raise
        if result.steps and result.skipped == result.steps and not result.interrupted:
            raise _too_many_skipped(run)  # a short run that has trained nothing
        if not run.recorded:
            # The checkpoint is of the run as it would have gone on; only what is returned has this row.
            with uninterrupted():
                run.write()
            result.history.append(_row(run))
    if not result.interrupted:
        with half:
            keys.refresh(progress=not quiet)  # those of the best weights
    if run.unwritten is not None:
        raise OSError(
            f"out: the last checkpoint, of step {result.steps}, could not be written to {str(folder)!r} "
            f"({run.unwritten}). The model is trained; free some space and save it with save_checkpoint, or train "
            "on from the last checkpoint with resume=True."
        ) from run.unwritten
    return result


def _step(run: Run, episode: Episode, clip_norm: float, half: torch.autocast) -> None:
    """One step, counted whether it moved anything or had to be skipped."""
    result = run.result
    try:
        terms = run.steps.take(episode, run.rates["lr"], run.rates["kl_weight"], clip_norm, half)
    except NotFiniteError as error:
        result.steps += 1
        result.skipped += 1
        run.skipped_in_a_row += 1
        if result.skipped == 1:
            result.first_skipped = f"step {result.steps}, {error}"
            warnings.warn(f"not finite: {result.first_skipped}. The step is skipped.", RuntimeWarning, stacklevel=3)
        if run.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW or result.skipped > max(
            MOST_SKIPPED_IN_A_ROW, MOST_SKIPPED_SHARE * result.steps
        ):
            raise _too_many_skipped(run) from error
        return
    result.steps += 1
    run.skipped_in_a_row = 0
    run.meter.add(terms)


def _too_many_skipped(run: Run) -> FloatingPointError:
    result = run.result
    return FloatingPointError(
        f"loss: {result.skipped} of {result.steps} steps had a loss or gradient that is not finite, "
        f"{run.skipped_in_a_row} in a row; the first was {result.first_skipped}. Lower lr, or look for extreme values "
        "in the data."
    )


def _row(run: Run) -> dict[str, float]:
    return {"step": run.result.steps, "seconds": run.result.seconds} | run.meter.row()


def _record(
    run: Run, validation: Dataset[Episode] | None, half: torch.autocast, keys: FreshKeys, episode: Episode
) -> None:
    """Adds a row to the history, unless this step has one, validates, and writes what changed to the folder."""
    if run.recorded:
        return
    row = _row(run) | run.rates
    with half:
        row |= keys.row(episode.memory, episode.x)
    if validation is not None:
        run.vma.eval()
        with half:
            found = run.ranks.first(lambda: validate(run.vma, validation))
        row |= {f"val_{name}": value for name, value in found.items()}
        run.vma.train()
    with uninterrupted():
        run.select_of(row)
        run.result.history.append(row)
        run.write()
    run.log(row)


def _finish(run: Run) -> None:
    """Leaves the model with its best weights, however the run ended."""
    run.vma.eval()
    if run.best is not None:
        run.vma.load_state_dict(run.best)
