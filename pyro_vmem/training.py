"""The trainer: one torch optimizer over an objective's loss, with schedules, validation and checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from pyro_vmem.checkpoint import load_checkpoint, save_checkpoint
from pyro_vmem.data import Episode
from pyro_vmem.history import Meter, summarise, write_history
from pyro_vmem.infer import (
    VIMCO_ELBO,
    Objective,
    ParticleELBO,
    check_objective,
    choose_objective,
    named_objective,
    scale_sites,
)
from pyro_vmem.precision import autocast
from pyro_vmem.vma import VMA

__all__ = ["FitResult", "fit", "validate"]


@dataclass
class FitResult:
    """What a training run left behind.

    Attributes:
        steps: Steps taken, those before a resume included.
        seconds: Time spent training, likewise.
        history: One row a record: step, seconds and the terms, in nats per datapoint; validation rows begin `val_`.
        best_bound: The best validation bound, in nats per datapoint; `-inf` without validation.
        interrupted: Whether the run was stopped before its end, by Ctrl-C or by `piece_minutes`.
        chosen: The objective that `"auto"` chose, and why.
    """

    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best_bound: float = -math.inf
    interrupted: bool = False
    chosen: str = ""

    def __repr__(self) -> str:
        end = ", interrupted" if self.interrupted else ""
        best = f", best bound {self.best_bound:.2f} nats" if self.best_bound > -math.inf else ""
        return f"FitResult({self.steps:,} steps in {self.seconds:.0f} s{best}{end})"


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
    seed: int = 0,
    precision: Literal["auto", "bfloat16", "float32"] = "auto",
    progress: bool = True,
) -> FitResult:
    r"""Trains a model and its guide on episodes.

    Adam with a linear warm-up and a cosine decay to zero; the weight of :math:`KL(z)` rises linearly from `kl_start` to
    1 over the first part of the run, because a latent that is paid for in full from the start is not used.
    Ctrl-C ends the run early and keeps it. Pyro's parameter store and the global random state are left as they were.

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
        resume: Whether to go on from `out/last.safetensors`, if it is there.
        seed: Seeds the samples of latents.
        precision: The precision of the networks: `"auto"` takes bfloat16 where the processor has it. Densities are
            always computed in full.
        progress: Whether to show a progress bar.

    Returns:
        The steps taken and the history.

    Raises:
        ValueError: If an argument is out of range, or `out` already holds a run and `resume` is false.
        FloatingPointError: If the loss is not finite.

    Example:
        >>> import pyro_vmem as pv
        >>> train, _ = pv.data.glyphs(size=12, drawings=12).split(seed=0)
        >>> vma = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> fit(vma, pv.data.EpisodeSampler(train, n_way=4, k_shot=1, n_query=1), steps=2, progress=False).steps
        2
    """
    _check_range("steps", steps, 1, math.inf)
    for name, limit in (("minutes", minutes), ("piece_minutes", piece_minutes)):
        _check_range(name, 1.0 if limit is None else limit, 1e-6, math.inf)
    for name, value in (("kl_warmup", kl_warmup), ("kl_start", kl_start)):
        _check_range(name, value, 0.0, 1.0)
    for name, value in (("lr", lr), ("clip_norm", clip_norm), ("validate_every", validate_every)):
        _check_range(name, value, 1e-12, math.inf)
    folder = None if out is None else Path(out)
    if folder is not None:
        _check_spec(vma)
    run = _Run(vma, objective, num_particles, lr, seed, episodes[0].to(next(vma.parameters()).device))
    if folder is not None and (folder / "last.safetensors").exists():
        if not resume:
            raise ValueError(
                f"out: {str(folder)!r} already holds a run. Pass resume=True to go on from it, or another folder."
            )
        run.load(folder / "last.safetensors")
    device = next(vma.parameters()).device
    half = autocast(device, precision)
    result = run.result
    result.chosen = run.chosen
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
    meter = Meter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(pyro.get_param_store().scope())
        stack.enter_context(bar)
        if run.chosen:
            bar.write(run.chosen, file=sys.stderr)
        run.seed()
        try:
            while (part := done()) < 1.0:
                rate = lr * min(1.0, (result.steps + 1) / lr_warmup) * 0.5 * (1 + math.cos(math.pi * part))
                weight = 1.0 if part >= kl_warmup else kl_start + (1 - kl_start) * part / kl_warmup
                episode = episodes[result.steps].to(device)
                with half:
                    terms = run.step(episode, rate, weight, clip_norm)
                result.steps += 1
                result.seconds = time.perf_counter() - start
                meter.add(terms)
                bar.update()
                if result.steps % 10 == 0:
                    bar.set_postfix_str(meter.text(), refresh=False)
                if result.steps % validate_every == 0:
                    row = meter.row() | {"lr": rate, "kl_weight": weight}
                    run.record(row, validation, folder, half)
                if time.perf_counter() - begin >= piece and done() < 1.0:
                    result.interrupted = True
                    break
        except KeyboardInterrupt:
            result.interrupted = True
            bar.write(f"Interrupted after {result.steps} steps; the run is kept.", file=sys.stderr)
        if result.steps % validate_every or result.interrupted:
            run.record(meter.row(), validation, folder, half)
    vma.eval()
    if run.best is not None:
        vma.load_state_dict(run.best)
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
        num_episodes: How many episodes.
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
    meter = Meter(smoothing=0.0)
    hits = []
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(seed)
        for index in range(num_episodes):
            episode = episodes[index].to(next(vma.parameters()).device)
            memory = vma.encode(episode.memory)
            meter.add(summarise(elbo.terms(vma.model, vma.guide, memory, episode.x)))
            assert memory.labels is not None
            chosen = memory.labels[vma.address_guide(memory, vma.encode_x(episode.x)).logits.argmax(-1)]
            hits.append((chosen == episode.labels).float().mean())
    return meter.row() | {"hit_rate": float(torch.stack(hits).mean())}


class _Run:
    """Everything that changes in the course of a run: weights, optimizer, random state and result."""

    def __init__(
        self, vma: VMA, objective: Objective | ELBO, num_particles: int, lr: float, seed: int, episode: Episode
    ) -> None:
        self.vma = vma
        self.chosen = ""
        if objective == "auto":
            with torch.no_grad():
                q_a = vma.address_guide(vma.encode(episode.memory), vma.encode_x(episode.x))
            objective, why = choose_objective(q_a.enumerate_support().shape[0], num_particles)
            self.chosen = f"objective {objective!r}: {why}"
        self.elbo: Any  # a stock ELBO has no common method but loss
        self.elbo, self.guide = objective, vma.guide
        if isinstance(objective, str):
            self.elbo, self.guide = named_objective(objective, vma.guide, num_particles)
        elif isinstance(objective, TraceEnum_ELBO):
            self.guide = config_enumerate(vma.guide, "parallel", expand=True)
        check_objective(self.elbo, vma.model, self.guide, episode.memory, episode.x)
        # What the objective learns, such as a baseline, is trained and kept with the model.
        self.module = self.elbo.module if isinstance(self.elbo, ParticleELBO) else None
        learned = [*vma.parameters(), *(self.module.parameters() if self.module is not None else ())]
        self.parameters = [p for p in learned if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr)
        self.result = FitResult()
        self.best: dict[str, Tensor] | None = None
        self.random_state: Tensor | None = None
        self._seed = seed

    def seed(self) -> None:
        """Sets the global random state, which the caller has set aside, to this run's."""
        if self.random_state is None:
            torch.manual_seed(self._seed)
        else:
            torch.set_rng_state(self.random_state)

    def step(self, episode: Episode, lr: float, kl_weight: float, clip_norm: float) -> dict[str, float]:
        """One optimizer step; returns the terms per datapoint."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        count = len(episode.x)
        model, guide = (scale_sites({"z": kl_weight})(fn) for fn in (self.vma.model, self.guide))
        if isinstance(self.elbo, ParticleELBO):
            terms = self.elbo.terms(model, guide, self.vma.encode(episode.memory), episode.x)
            loss = terms.loss.item()
            terms.loss.backward()
            summary = summarise(terms, kl_weight)
        else:
            # A stock objective may go backward once a particle, so particles cannot share what was encoded.
            loss = self.elbo.loss_and_grads(model, guide, episode.memory, episode.x)
            summary = {"bound": -loss / count}
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.result.steps}. Lower lr, or look for extreme values in the data."
            )
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_div_(gradients, float(count))
        torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        self.optimizer.step()
        return summary

    def record(
        self, row: dict[str, float], validation: Dataset[Episode] | None, folder: Path | None, half: torch.autocast
    ) -> None:
        """Adds a row to the history, validates, and writes what changed to the folder."""
        row = {"step": self.result.steps, "seconds": self.result.seconds} | row
        if self.result.history and self.result.history[-1]["step"] == self.result.steps:
            row = self.result.history.pop() | row  # stopped just where a record was due
        improved = False
        if validation is not None:
            self.vma.eval()
            with half:
                row |= {f"val_{name}": value for name, value in validate(self.vma, validation).items()}
            self.vma.train()
            if row["val_bound"] > self.result.best_bound:
                improved, self.result.best_bound = True, row["val_bound"]
                self.best = {name: tensor.clone() for name, tensor in self.vma.state_dict().items()}
        self.result.history.append(row)
        if folder is not None:
            self.save(folder / "last.safetensors")
            if improved:
                save_checkpoint(folder / "best.safetensors", self.vma.state_dict(), {"spec": self.vma.spec()})
            write_history(folder / "history.csv", self.result.history)

    def save(self, path: Path) -> None:
        """Writes all of it; see `load`."""
        tensors = {f"model.{name}": tensor for name, tensor in self.vma.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        if self.module is not None:
            tensors |= {f"objective.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors["random_state"] = torch.get_rng_state()
        save_checkpoint(path, tensors, {"spec": self.vma.spec(), "result": asdict(self.result)})

    def load(self, path: Path) -> None:
        """Reads back what `save` wrote."""
        tensors, data = load_checkpoint(path)
        self.vma.load_state_dict(_under("model.", tensors))
        if self.module is not None:
            self.module.load_state_dict(_under("objective.", tensors))
        self.best = _under("best.", tensors) or None
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, key = name.split(".")
            states.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})
        self.random_state = tensors["random_state"]
        self.result = FitResult(**data["result"])
        self.result.interrupted = False


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_spec(vma: VMA) -> None:
    """A model that no checkpoint can name is refused before it is trained, not when the first one is written."""
    try:
        json.dumps(vma.spec())
    except TypeError as error:
        raise ValueError(
            f"vma: a part was built from an argument that is not plain data ({error}), so that a checkpoint could not "
            "rebuild it. Train with out=None and save the state_dict yourself."
        ) from error


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {value}.")
