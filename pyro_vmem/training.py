"""The trainer: one torch optimizer over an objective's loss, with schedules, validation and checkpoints."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Literal

import pyro
import torch
from pyro.infer import ELBO
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from pyro_vmem._lock import alone_in
from pyro_vmem._signals import uninterrupted
from pyro_vmem.data import Episode, EpisodeSampler
from pyro_vmem.history import FitResult, Meter, summarise
from pyro_vmem.infer import VIMCO_ELBO, Objective
from pyro_vmem.precision import autocast
from pyro_vmem.run import Run, check_spec, holds_run, make_folder
from pyro_vmem.steps import NotFiniteError, Steps
from pyro_vmem.vma import VMA

__all__ = ["FitResult", "fit", "validate"]

# When too many steps have been skipped: all of the last, or a share of all (and no fewer than the first).
MOST_SKIPPED_IN_A_ROW = 10
MOST_SKIPPED_SHARE = 0.01


def fit(
    vma: VMA,
    episodes: Dataset[Episode],
    objective: Objective | ELBO = "vimco",
    steps: int = 20_000,
    *,
    minutes: float | None = None,
    piece_minutes: float | None = None,
    num_particles: int = 4,
    lr: float = 3e-3,
    lr_warmup: int = 100,
    kl_warmup: float = 0.5,
    kl_start: float = 0.1,
    clip_norm: float = 10.0,
    validation: Dataset[Episode] | None = None,
    validate_every: int = 500,
    out: str | Path | None = None,
    resume: bool = False,
    keep: int = 2,
    seed: int = 0,
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
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

    Arguments:
        vma: The model and its guide; trained in place, and at the end it holds the best weights by validation, or the
            last without it.
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
        lr: The highest learning rate.
        lr_warmup: Steps until it is reached.
        kl_warmup: The part of the run over which the weight of :math:`KL(z)` rises, in [0, 1].
        kl_start: The weight of :math:`KL(z)` to start from, in [0, 1].
        clip_norm: The largest norm of the gradient of the loss per datapoint.
        validation: Where validation episodes come from: classes that are not trained on.
        validate_every: Steps between validations and checkpoints.
        out: A folder for `last.safetensors`, `best.safetensors` and `history.csv`.
        resume: Whether to go on from `out/last.safetensors`, if it is there; where it is damaged, from the one before.
        keep: How many of the last checkpoints are kept: the one before the last is `last-1.safetensors`.
        seed: Seeds the samples of latents.
        precision: The precision of the networks: `"auto"` takes bfloat16 where the processor has it. Densities are
            always computed in full.
        progress: Whether to show a progress bar.

    Returns:
        The steps taken and the history.

    Raises:
        ValueError: If an argument is out of range, or `out` already holds a run and `resume` is false, or one that
            does not fit.
        FloatingPointError: If too many steps had to be skipped; it names the first term and site that was not finite.
            The model then holds its best weights by validation, or those of the last good step.
        OSError: At the end, if the last checkpoint could not be written. The model is trained all the same.

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
        _check_range(name, whole, least, 10**12, int)
    for name, whole, least in (("num_particles", num_particles, 1), ("seed", seed, 0), ("lr_warmup", lr_warmup, 0)):
        _check_range(name, whole, least, 2**63, int)
    for name, limit in (("minutes", minutes), ("piece_minutes", piece_minutes)):
        _check_range(name, 1.0 if limit is None else limit, 1e-6, math.inf)
    for name, value in (("kl_warmup", kl_warmup), ("kl_start", kl_start)):
        _check_range(name, value, 0.0, 1.0)
    _check_range("lr", lr, 1e-12, 1e3)
    _check_range("clip_norm", clip_norm, 1e-12, math.inf)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_spec(vma)
    device = next(vma.parameters()).device
    half = autocast(device, precision)
    first = _first(episodes, "episodes", 1 if minutes is not None else steps)
    if validation is not None:
        _first(validation, "validation", 1)
    settings = {
        "objective": objective if isinstance(objective, str) else type(objective).__name__,
        "episodes": repr(episodes) if isinstance(episodes, EpisodeSampler) else None,
        **{"num_particles": num_particles, "lr": lr, "lr_warmup": lr_warmup, "kl_warmup": kl_warmup},
        **{"kl_start": kl_start, "clip_norm": clip_norm, "seed": seed},
    }
    run = Run(Steps(vma, objective, num_particles, lr, first.to(device)), settings, folder, keep)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            make_folder(folder)
            stack.enter_context(alone_in(folder))
            if holds_run(folder):
                if not resume:
                    raise ValueError(
                        f"out: {str(folder)!r} already holds a run. Pass resume=True to go on from it, or name another "
                        "folder."
                    )
                run.load()
        result = run.result
        result.chosen = run.steps.chosen
        begin = time.perf_counter()
        start = begin - result.seconds
        piece = math.inf if piece_minutes is None else 60 * piece_minutes

        def done() -> float:
            """The part of the run that is behind us, in [0, 1]."""
            return min(1.0, result.steps / steps if minutes is None else (time.perf_counter() - start) / (60 * minutes))

        vma.train()
        bar = tqdm(
            total=None if minutes else steps, initial=result.steps, desc="training", unit="step", disable=not progress
        )
        whole = True  # whether the run is between two steps
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(pyro.get_param_store().scope())
        stack.enter_context(bar)
        stack.callback(_finish, run)
        if result.chosen:
            bar.write(result.chosen, file=sys.stderr)
        run.set_random_state(seed)
        try:
            if result.steps and result.steps % validate_every == 0:
                _record(run, validation, half)  # if it was stopped just before
            while (part := done()) < 1.0:
                run.rates["lr"] = (
                    lr * min(1.0, (result.steps + 1) / max(1, lr_warmup)) * 0.5 * (1 + math.cos(math.pi * part))
                )
                run.rates["kl_weight"] = 1.0 if part >= kl_warmup else kl_start + (1 - kl_start) * part / kl_warmup
                episode = episodes[result.steps].to(device)
                whole = False
                with uninterrupted():
                    _step(run, episode, clip_norm, half)
                    result.seconds = time.perf_counter() - start
                    whole = True
                bar.update()
                if result.steps % 10 == 0:
                    bar.set_postfix_str(run.meter.text(), refresh=False)
                if result.steps % validate_every == 0:
                    _record(run, validation, half)
                if time.perf_counter() - begin >= piece and done() < 1.0:
                    result.interrupted = True
                    break
            if result.steps and not result.interrupted:
                _record(run, validation, half)
        except KeyboardInterrupt:
            if not whole:
                raise
            result.interrupted = True
            bar.write(f"Interrupted after {result.steps} steps; the run is kept.", file=sys.stderr)
        if result.steps and result.skipped == result.steps and not result.interrupted:
            raise _too_many_skipped(run)  # a short run that has trained nothing
        if not run.recorded:
            # The checkpoint is of the run as it would have gone on; only what is returned has this row.
            with uninterrupted():
                run.write()
            result.history.append(_row(run))
    if run.unwritten is not None:
        raise OSError(
            f"out: the last checkpoint, of step {result.steps}, could not be written to {str(folder)!r} "
            f"({run.unwritten}). The model is trained; free some space and save it with pyro_vmem.checkpoint, or train "
            "on from the last checkpoint with resume=True."
        ) from run.unwritten
    return result


@torch.no_grad()
def validate(
    vma: VMA, episodes: Dataset[Episode], num_episodes: int = 8, num_particles: int = 8, seed: int = 0
) -> dict[str, float]:
    """The multi-sample bound and its terms on the first episodes of a sampler, in nats per datapoint.

    Parameters and global random state stay as they are; the same call gives the same numbers.

    Arguments:
        vma: The model and its guide.
        episodes: Where the episodes come from.
        num_episodes: How many episodes; all, if there are fewer.
        num_particles: The particles of the bound.
        seed: Seeds the samples of latents.

    Returns:
        `bound`, `reconstruction`, `kl_a`, `kl_z` and `hit_rate` (of the guide's most probable slot's class).

    Example:
        >>> import pyro_vmem as pv
        >>> sampler = pv.data.EpisodeSampler(pv.data.glyphs(size=12, drawings=12), n_way=5, k_shot=1, n_query=1)
        >>> sorted(validate(pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4), sampler, num_episodes=1))
        ['bound', 'hit_rate', 'kl_a', 'kl_z', 'reconstruction']
    """
    elbo = VIMCO_ELBO(num_particles=num_particles, max_plate_nesting=1)
    _check_range("num_episodes", num_episodes, 1, math.inf, int)
    _first(episodes, "episodes", 1)
    if hasattr(type(episodes), "__len__"):
        num_episodes = min(num_episodes, len(episodes))  # type: ignore[arg-type]
    meter = Meter(smoothing=0.0)
    hits = []
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(seed)
        for index in range(num_episodes):
            episode = episodes[index].to(next(vma.parameters()).device)
            if episode.memory.labels is None:
                raise ValueError("episodes: validation needs the class of each slot. Make memories with labels.")
            memory = vma.encode(episode.memory)
            meter.add(summarise(elbo.terms(vma.model, vma.guide, memory, episode.x)))
            chosen = episode.memory.labels[vma.address_guide(memory, vma.encode_x(episode.x)).logits.argmax(-1)]
            hits.append((chosen == episode.labels).float().mean())
    return meter.row() | {"hit_rate": float(torch.stack(hits).mean())}


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


def _record(run: Run, validation: Dataset[Episode] | None, half: torch.autocast) -> None:
    """Adds a row to the history, unless this step has one, validates, and writes what changed to the folder."""
    if run.recorded:
        return
    row = _row(run) | run.rates
    if validation is not None:
        run.vma.eval()
        with half:
            row |= {f"val_{name}": value for name, value in validate(run.vma, validation).items()}
        run.vma.train()
    with uninterrupted():
        if row.get("val_bound", -math.inf) > run.result.best_bound:
            run.result.best_bound = row["val_bound"]
            run.set_best()
        run.result.history.append(row)
        run.write()


def _finish(run: Run) -> None:
    """Leaves the model with its best weights, however the run ended."""
    run.vma.eval()
    if run.best is not None:
        run.vma.load_state_dict(run.best)


def _first(episodes: Dataset[Episode], name: str, least: int) -> Episode:
    """The first episode, if there are enough of them and they are episodes."""
    known = getattr(type(episodes), "__len__", None)
    count = least if known is None else len(episodes)  # type: ignore[arg-type]
    if count < least:
        raise ValueError(f"{name}: got {count}, but {least} are needed. Give more, or train for fewer steps.")
    try:
        first = episodes[0]
    except (TypeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{name}: expected a map from 0, 1, ... to episodes, got {type(episodes).__name__} ({error}). "
            "Use pyro_vmem.data.EpisodeSampler."
        ) from error
    if not isinstance(first, Episode):
        raise ValueError(
            f"{name}: expected each to be a pyro_vmem.data.Episode, got {type(first).__name__}. "
            "Use pyro_vmem.data.EpisodeSampler, or Episode(memory, x, labels)."
        )
    return first


def _check_range(name: str, value: float, low: float, high: float, kind: type = float) -> None:
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"{name}: expected a {'whole ' * (kind is int)}number in [{low:g}, {high:g}], got {value!r}.")
