"""The trainer: one step of an objective's gradient at a time, and all that the next step depends on.

It reads no clock but its own, and writes no file: what surrounds the steps is in the callbacks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
import warnings
from dataclasses import asdict, fields, replace
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vmem._utils.param_store import no_store
from pyro_vmem._utils.precision import autocast
from pyro_vmem._utils.random_state import forked, random_states, seed_all, set_random_states
from pyro_vmem._utils.version import __version__
from pyro_vmem.data import Episode
from pyro_vmem.infer import VIMCO_ELBO, ParticleELBO, check_objective, choose
from pyro_vmem.infer.annealing import scale_sites
from pyro_vmem.infer.by_name import NUM_PARTICLES, Objective, named_objective
from pyro_vmem.infer.elbo import Terms
from pyro_vmem.memory.encoded import encoded_once
from pyro_vmem.model import VMA
from pyro_vmem.model.checks import check_weights
from pyro_vmem.train.checkpoint import under
from pyro_vmem.train.config import TrainingConfig
from pyro_vmem.train.distributed import Processes
from pyro_vmem.train.history import FitResult, Meter, summarise
from pyro_vmem.train.not_finite import NotFiniteError, find_not_finite, first_not_finite
from pyro_vmem.train.schedules import Schedule

__all__ = ["Trainer"]

# When too many steps have been skipped: all of the last, or a share of all (and no fewer than the first).
MOST_SKIPPED_IN_A_ROW = 10
MOST_SKIPPED_SHARE = 0.01
# A weight of KL(z) of zero is taken as this: the untempered terms are the tempered ones divided by it.
LEAST_WEIGHT = 1e-6


class Trainer:
    r"""Trains a model and its guide, one step per episode.

    Use it to write a loop of your own instead of :func:`fit`. Random numbers come from the global generators, which
    :meth:`state_dict` holds.

    Arguments:
        vma: The model and its guide; trained in place.
        objective: The name of an objective, or any `pyro.infer.ELBO`; as of :func:`fit`.
        config: The settings. Default: those of :class:`TrainingConfig`.
        processes: The processes that train together. Default: this one alone.

    Attributes:
        result: Steps, seconds, history and skipped steps.
        meter: Running averages of the terms.
        rates: The learning rate and the weight of :math:`KL(z)` at the last step.
        best: The weights of the last :meth:`keep_weights`, or `None`.
        stopped: Whether the run was stopped before its end.

    Raises:
        ValueError: If the objective is unknown, a weight is not finite, or no parameter requires a gradient.

    Example:
        >>> import pyro_vmem as pv
        >>> train, _ = pv.data.glyphs(size=12, drawings=12).split(seed=0)
        >>> episodes = pv.data.EpisodeSampler(train, n_way=4, k_shot=1, n_query=1)
        >>> trainer = Trainer(pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4), "vimco", TrainingConfig(steps=2))
        >>> while not trainer.finished():
        ...     terms = trainer.step(episodes[trainer.result.steps])
        >>> trainer.result.steps, sorted(terms)
        (2, ['bound', 'kl_a', 'kl_z', 'reconstruction'])
    """

    def __init__(
        self,
        vma: VMA,
        objective: Objective | ELBO = "vimco",
        config: TrainingConfig | None = None,
        processes: Processes | None = None,
    ) -> None:
        if any(parameter.is_inference() for parameter in vma.parameters()):
            raise ValueError("vma: its weights were made in torch.inference_mode(). Build it outside to train it.")
        check_weights(vma)
        self.vma, self.config, self.processes = vma, config or TrainingConfig(), processes or Processes()
        # What is chosen by the number of slots has to wait for the first episode. A stock ELBO knows only its loss.
        self.objective: Any = None
        if objective != "auto":
            self.objective = objective if isinstance(objective, ELBO) else named_objective(objective)
        # What the objective learns, such as a baseline, is trained and kept with the model.
        self.module = self.objective.module if isinstance(self.objective, ParticleELBO) else None
        learned = [*vma.named_parameters(), *(self.module.named_parameters() if self.module is not None else ())]
        self.names = [name for name, p in learned if p.requires_grad]
        self.parameters = [p for _, p in learned if p.requires_grad]
        if not self.parameters:
            raise ValueError("vma: all parameters are frozen. Unfreeze what is to be trained: `requires_grad_(True)`.")
        self.device = self.parameters[0].device
        make, config = self.config.optimizer, self.config
        # One kernel for all parameters: several times faster on models this small.
        fused = {"fused": True} if make in (torch.optim.Adam, torch.optim.AdamW) else {}
        self.optimizer = make(self.parameters, lr=config.lr, **fused)
        self.scheduler: LRScheduler | None = None  # torch's; a `Schedule` is asked at each step
        if not isinstance(config.schedule, Schedule):
            self.scheduler = config.schedule(self.optimizer)
        self.autocast = autocast(self.device, config.precision)
        self.settings = {
            "objective": _named(objective),
            **{field.name: _named(getattr(config, field.name)) for field in fields(config)},
            **{"pyro_vmem": __version__, "torch": torch.__version__, "pyro": pyro.__version__},
            **{"device": self.device.type, "threads": torch.get_num_threads(), "processes": self.processes.count},
        }
        self.result, self.meter, self.rates = FitResult(), Meter(), dict[str, float]()
        self.skipped_in_a_row, self.moves = 0, 0  # steps since the last that moved the weights, and those that did
        self.best: dict[str, Tensor] | None = None
        self.stopped, self._asked_to_stop = False, False
        self.whole = True  # false within a step, when the state is neither that before nor that after
        self._start: float | None = None

    def begin(self, episode: Episode) -> None:
        """Checks model and objective with an episode, and starts the clock. The first step calls it if needed.

        Raises:
            ValueError: If the objective does not fit the model, or the model does not fit the episode.
        """
        vma = self.vma
        vma.check(episode.memory, episode.x)
        if self.objective is None:
            choice = choose(vma.model, vma.guide, episode.memory, episode.x)
            self.objective, self.result.chosen = choice.objective, f"objective {choice}"
        enumerates = isinstance(self.objective, TraceEnum_ELBO)
        self.guide = config_enumerate(vma.guide, "parallel", expand=True) if enumerates else vma.guide
        particles = isinstance(self.objective, ParticleELBO)
        self.decodes = self.objective.decodes if particles else self.objective.num_particles
        if enumerates:  # all slots, or those that the guide keeps
            with torch.no_grad():
                q_a = vma.address_guide(vma.encode(episode.memory), vma.encode_x(episode.x))
            self.decodes *= len(q_a.enumerate_support())
        check_objective(self.objective, vma.model, self.guide, episode.memory, episode.x)
        self._start = time.perf_counter() - self.result.seconds

    def step(self, episode: Episode) -> dict[str, float]:
        """Takes one step; returns its terms in nats per datapoint, or no terms if the step was skipped.

        A step whose loss or gradient is not finite changes no weight. It is counted, and the first gives a warning.

        Arguments:
            episode: The memory and the targets.

        Raises:
            FloatingPointError: If too many steps had to be skipped.
        """
        if self._start is None:
            self.begin(episode)
        config, result, terms = self.config, self.result, dict[str, float]()
        progress, own = self._progress(), episode
        if self.processes.count > 1:
            progress, _ = self.processes.agree(progress, False)
            own = self.processes.share(episode)
        if isinstance(config.schedule, Schedule):
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * config.schedule(result.steps, progress)
        kl_weight = config.kl_schedule(result.steps, progress)
        self.rates = {"lr": float(self.optimizer.param_groups[0]["lr"]), "kl_weight": kl_weight}
        self.whole = False
        try:
            terms = self._gradient(own, len(episode.x), kl_weight)
        except NotFiniteError as error:
            result.steps += 1
            self._skip(error)
        else:
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            if self.processes.count > 1:
                terms = self.processes.mean(terms, len(own.x) / len(episode.x))
            self.meter.add(terms)
            result.steps += 1
            self.moves += 1
            self.skipped_in_a_row = 0
        assert self._start is not None
        result.seconds = time.perf_counter() - self._start
        self.whole = True
        return terms

    def finished(self) -> bool:
        """Whether the run is over, or was asked to stop. Call it between steps.

        Raises:
            FloatingPointError: If the run is over and no step has changed a weight.
        """
        progress, stop = self._progress(), self._asked_to_stop
        if self.processes.count > 1:
            progress, stop = self.processes.agree(progress, stop)
        over = progress >= 1.0 or (self.config.patience is not None and self.out_of_patience())
        self.stopped = stop and not over
        if over and self.result.skipped == self.result.steps > 0:
            raise self._too_many_skipped()
        return stop or over

    def out_of_patience(self) -> bool:
        """Whether none of the last `patience` validations improved the best bound."""
        if (patience := self.config.patience) is None:
            return False
        # From the history, which a resumed run has too, and which all processes share.
        bounds = [row["val_bound"] for row in self.result.history if "val_bound" in row]
        return len(bounds) > patience and max(bounds[-patience:]) <= max(bounds[:-patience])

    def stop(self) -> None:
        """Asks the run to stop after the current step."""
        self._asked_to_stop = True

    def row(self, episode: Episode | None = None) -> dict[str, float]:
        """A row of the history: the step, the seconds, the average of each term of the bound, and the learning rates.

        Arguments:
            episode: If the objective gives only its loss, the terms of the bound are measured on this episode.
        """
        of_bound = dict[str, float]() if episode is None else self._of_bound(episode)
        return {"step": self.result.steps, "seconds": self.result.seconds} | of_bound | self.meter.row() | self.rates

    @torch.no_grad()
    def _of_bound(self, episode: Episode) -> dict[str, float]:
        """The parts of the bound on an episode, where the objective, such as one of Pyro's, gives its loss alone."""
        if isinstance(self.objective, ParticleELBO):
            return {}
        elbo, vma = VIMCO_ELBO(NUM_PARTICLES, max_plate_nesting=1), self.vma
        with self.autocast, forked(self.device), pyro.get_param_store().scope():
            found = summarise(elbo.terms(vma.model, vma.guide, vma.encode(episode.memory), episode.x))
        return {name: found[name] for name in ("reconstruction", "kl_a", "kl_z") if name in found}

    def keep_weights(self) -> None:
        """Remembers the present weights as the best."""
        self.best = {name: tensor.clone() for name, tensor in self.vma.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the full state by name, as tensors and data. A run resumed from it is the same bit for bit."""
        state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in self.vma.state_dict().items()}
        state |= {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
        if self.module is not None:
            state |= {f"objective.{name}": tensor for name, tensor in self.module.state_dict().items()}
        optimizer, plain = self.optimizer.state_dict(), dict[str, Any]()
        for index, values in optimizer["state"].items():
            state |= {f"optimizer.{index}.{n}": value for n, value in values.items() if isinstance(value, Tensor)}
            plain[str(index)] = {n: value for n, value in values.items() if not isinstance(value, Tensor)}
        state |= {"random_state": torch.get_rng_state()} | random_states()
        if self.device.type == "cuda":
            state["cuda_random_state"] = torch.cuda.get_rng_state(self.device)
        return state | {
            "spec": self.vma.spec(),
            "settings": self.settings,
            "trained": self.names,
            "optimizer": {
                "class": type(self.optimizer).__qualname__,
                "state": plain,
                "param_groups": optimizer["param_groups"],
            },
            "moves": self.moves,
            "result": asdict(self.result),
            "meter": self.meter.sums,
            "rates": self.rates,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of :meth:`state_dict`; in the first process also the random state.

        Raises:
            ValueError: If model, trained parameters or objective differ. Nothing is changed then. Other settings that
                differ give a warning.
        """
        self._check_fits(state)
        self._warn_of_changes(state["settings"])
        chosen = self.result.chosen
        self.result = FitResult(**state["result"])
        self.result.interrupted, self.result.chosen = False, chosen or self.result.chosen
        self.meter.sums = {name: (total, count) for name, (total, count) in state["meter"].items()}
        self.rates, self.skipped_in_a_row = dict(state["rates"]), state["skipped_in_a_row"]
        # A scheduler of torch is taken through the steps again: not each can be written down without loss. What it has
        # set is then replaced by what it had set before, which is the same but for a changed schedule.
        self.moves = state["moves"]
        with warnings.catch_warnings(action="ignore"):
            for _ in range(self.moves if self.scheduler is not None else 0):
                self.scheduler.step()  # type: ignore[union-attr]
        saved = {int(index): dict(values) for index, values in state["optimizer"]["state"].items()}
        for name, tensor in under("optimizer.", state).items():
            index, key = name.split(".")
            saved.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": saved, "param_groups": state["optimizer"]["param_groups"]})
        self.vma.load_state_dict(under("model.", state))
        if self.module is not None:
            self.module.load_state_dict(under("objective.", state))
        self.best = under("best.", state) or None
        if self.processes.rank:  # which draws numbers of its own
            self.seed(self.result.steps)
        else:
            set_random_states(state)
            torch.set_rng_state(state["random_state"])
            if "cuda_random_state" in state and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_random_state"], self.device)
        self._start = time.perf_counter() - self.result.seconds

    def seed(self, step: int = 0) -> None:
        """Seeds the global generators for a step, differently in each process."""
        seed_all(self.config.seed + self.processes.rank * (1_000_003 + step))

    def _progress(self) -> float:
        """The share of the run that is behind us, in [0, 1]."""
        minutes = self.config.minutes
        if minutes is None:
            return min(1.0, self.result.steps / self.config.steps)
        return 0.0 if self._start is None else min(1.0, (time.perf_counter() - self._start) / (60 * minutes))

    def _gradient(self, own: Episode, targets: int, kl_weight: float) -> dict[str, float]:
        """Puts the clipped gradient of the loss per datapoint into every `.grad`; returns this process's terms."""
        remembered = {} if self.module is None else {n: b.clone() for n, b in self.module.named_buffers()}
        self.optimizer.zero_grad(set_to_none=True)
        terms, problem = dict[str, float](), ""
        try:
            with self.autocast:
                terms = self._backward(own, kl_weight)
        except NotFiniteError as error:
            problem = str(error)
            # The sum over processes is then not finite either, so that all of them skip the step.
            self.parameters[0].grad = torch.full_like(self.parameters[0], math.nan)
        if self.processes.count > 1:
            self.processes.sum_gradients(self.parameters)
        torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], float(targets))
        try:  # which raises before it scales anything
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm, error_if_nonfinite=True)
        except RuntimeError as error:
            found = problem or self._bad_gradient()
            for name, buffer in remembered.items():
                self.module.get_buffer(name).copy_(buffer)  # type: ignore[union-attr]
            self.optimizer.zero_grad(set_to_none=True)
            raise NotFiniteError(found) from error
        return terms

    def _backward(self, episode: Episode, kl_weight: float) -> dict[str, float]:
        """Adds the gradient of the loss summed over targets to every `.grad`; returns the terms per datapoint."""
        model, guide, weight = self.vma.model, self.guide, max(kl_weight, LEAST_WEIGHT)
        if weight != 1.0:
            scaled = scale_sites({"z": weight})
            model, guide = scaled(model), scaled(guide)
        memory = self.vma.encode(episode.memory, reads=self.decodes * len(episode.x))
        try:
            if isinstance(self.objective, ParticleELBO):
                with no_store():  # the optimizer has the parameters
                    terms = self.objective.terms(model, guide, memory, episode.x)
                terms.loss.backward()
                if not math.isfinite(terms.loss.item()):  # asked when all is on its way: it makes a GPU wait
                    raise NotFiniteError(first_not_finite(terms))
                if weight == 1.0:
                    return summarise(terms)
                return summarise(self._untempered(terms, weight)) | {"tempered_bound": float(terms.bound.mean())}
            with encoded_once(memory) as shared, pyro.get_param_store().scope():
                loss = self.objective.loss_and_grads(model, guide, shared, episode.x)
        except (ValueError, RuntimeError) as error:
            # A distribution refuses parameters that are not finite, before there is a loss.
            where = find_not_finite(model, guide, episode.memory, episode.x)
            if where:
                raise NotFiniteError(where) from error
            raise
        if not math.isfinite(loss):
            raise NotFiniteError(find_not_finite(model, guide, episode.memory, episode.x) or f"the loss is {loss}")
        return {"bound" if weight == 1.0 else "tempered_bound": -loss / len(episode.x)}

    @torch.no_grad()
    def _untempered(self, terms: Terms, weight: float) -> Terms:
        """The terms of the same particles, with KL(z) in full."""
        p = terms.particles
        log_prior = p.log_prior | {"z": p.log_prior["z"] / weight}
        log_guide = p.log_guide | {"z": p.log_guide["z"] / weight}
        # Without `paths`, whose factors are those of the loss that was gone backward through.
        particles = replace(p, log_prior=log_prior, log_guide=log_guide, paths=[])
        return replace(terms, particles=particles, bound=self.objective.estimate(particles)[0])

    def _skip(self, error: NotFiniteError) -> None:
        result = self.result
        result.skipped += 1
        self.skipped_in_a_row += 1
        if result.skipped == 1:
            result.first_skipped = f"step {result.steps}, {error}"
            warnings.warn(f"not finite: {result.first_skipped}. The step is skipped.", RuntimeWarning, stacklevel=5)
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW or result.skipped > max(
            MOST_SKIPPED_IN_A_ROW, MOST_SKIPPED_SHARE * result.steps
        ):
            raise self._too_many_skipped() from error

    def _too_many_skipped(self) -> FloatingPointError:
        result = self.result
        return FloatingPointError(
            f"loss: {result.skipped} of {result.steps} steps had a loss or gradient that is not finite, "
            f"{self.skipped_in_a_row} in a row; the first was {result.first_skipped}. Lower lr, or look for extreme "
            "values in the data."
        )

    def _bad_gradient(self) -> str:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return f"the gradient of {name}"
        return "the norm of the gradient, which overflows"

    def _check_fits(self, state: dict[str, Any]) -> None:
        """Raises a `ValueError` if a state is not of such a run, before anything of this one is changed."""
        if not {"result", "spec", "optimizer", "settings", "random_state"} <= state.keys():
            raise ValueError(
                "out: the checkpoint holds a model but no run to resume. Load it with pyro_vmem.load, or start in "
                "another folder."
            )
        modules = {"vma": ("model.", self.vma), "objective": ("objective.", self.module)}
        for argument, (prefix, module) in modules.items():
            expected = {} if module is None else {name: _kind(t) for name, t in module.state_dict().items()}
            found = {name: _kind(tensor) for name, tensor in under(prefix, state).items()}
            if expected != found:
                name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
                raise ValueError(
                    f"{argument}: the run had another one: {name!r} has shape {found.get(name, 'none')} there and "
                    f"{expected.get(name, 'none')} here. Build it as it was (pyro_vmem.load gives the model), or start "
                    "in another folder."
                )
        if (now := _plain(self.vma.spec())) != (was := _plain(state["spec"])):
            arguments = now.get("init_args", {}), was.get("init_args", {})
            changed = [n for n in sorted({*arguments[0], *arguments[1]}) if arguments[0].get(n) != arguments[1].get(n)]
            raise ValueError(
                f"vma: the run trained another model. It differs in {', '.join(changed) or 'its class'}. Build it as "
                "it was (pyro_vmem.load gives the model), or start in another folder."
            )
        kind = type(self.optimizer).__qualname__
        if (was := state["optimizer"].get("class", kind)) != kind:
            raise ValueError(
                f"optimizer: the run was trained by {was}, whose state {kind} cannot continue. Give it {was} again, or "
                "start in another folder from its weights."
            )
        if state["trained"] != self.names:
            changed = sorted(set(state["trained"]) ^ set(self.names))
            raise ValueError(
                f"vma: the run trained other parameters: {', '.join(changed[:5])} and {max(0, len(changed) - 5)} more. "
                "Freeze and unfreeze (requires_grad) as it was then."
            )

    def _warn_of_changes(self, before: dict[str, Any]) -> None:
        now = _plain(self.settings)
        names = [*before, *(name for name in now if name not in before)]  # a validation may be new, or gone
        changed = [f"{n}={now.get(n)!r} (was {before.get(n)!r})" for n in names if now.get(n) != before.get(n)]
        if changed and self.processes.rank == 0:
            warnings.warn(
                f"resume: the run had other settings before; it goes on with {', '.join(changed)}.",
                RuntimeWarning,
                stacklevel=5,
            )


def _named(value: Any) -> Any:
    """A setting as plain data, by which a resumed run can be compared with the one before."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, functools.partial):
        given = ", ".join([*map(repr, value.args), *(f"{n}={v!r}" for n, v in value.keywords.items())])
        return f"{_named(value.func)}({given})"
    text = getattr(value, "__qualname__", None) or repr(value)
    if (code := getattr(value, "__code__", None)) is not None and "<lambda>" in text:
        # No name tells it from another one: what it does is what it runs, looks up and holds.
        plain = [constant for constant in code.co_consts if not hasattr(constant, "co_code")]
        return f"{text} {hashlib.sha256(repr((code.co_code, code.co_names, plain)).encode()).hexdigest()[:12]}"
    if text.startswith("<") and " object at " in text:  # as an objective of Pyro's
        # Pyro sets `max_plate_nesting` itself, in the first step.
        held = [
            name for name in sorted(getattr(value, "__dict__", {})) if name[0] != "_" and name != "max_plate_nesting"
        ]
        return f"{type(value).__qualname__}({', '.join(f'{name}={_named(getattr(value, name))}' for name in held)})"
    return text


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON; what JSON does not know by its text."""
    return json.loads(json.dumps(value, default=repr))
