"""Training steps: the gradient of an objective, checked, and one optimizer over all that learns."""

from __future__ import annotations

import math
from typing import Any, get_args

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vmem._utils.param_store import no_store
from pyro_vmem.data import Episode
from pyro_vmem.infer import ParticleELBO, check_objective, choose_objective
from pyro_vmem.infer.annealing import scale_sites
from pyro_vmem.infer.by_name import Objective, named_objective
from pyro_vmem.infer.elbo import Terms
from pyro_vmem.model import VMA
from pyro_vmem.train.distributed import Ranks
from pyro_vmem.train.history import summarise
from pyro_vmem.train.shared_encoding import encoded_once

__all__ = ["NotFiniteError", "Steps", "find_not_finite"]


class NotFiniteError(Exception):
    """What was not finite in a step, and where; the step has moved nothing."""


class Steps:
    """Steps of an objective's gradient on a model, its guide and what the objective itself learns.

    Arguments:
        vma: The model and its guide; trained in place.
        objective: As of :func:`pyro_vmem.fit`.
        num_particles: The particles of a named objective.
        lr: The learning rate to start from.
        episode: Any of the episodes, to check the objective with.
        ranks: The processes that take the steps together; by default this one alone.
        backward: Of how many particles of a named objective the model's gradient is taken; by default of all.

    Raises:
        ValueError: If the objective is unknown, or does not fit the model.

    Attributes:
        chosen: The objective that `"auto"` chose, and why.
        module: What the objective learns, such as a baseline; `None` for most.
        optimizer: Adam over all parameters.
        decodes: How many templates are read for each target.
    """

    def __init__(
        self,
        vma: VMA,
        objective: Objective | ELBO,
        num_particles: int,
        lr: float,
        episode: Episode,
        ranks: Ranks | None = None,
        backward: int | None = None,
    ) -> None:
        if not isinstance(objective, str | ELBO):
            raise ValueError(
                f"objective: expected one of {get_args(Objective)} or a pyro.infer.ELBO, got "
                f"{type(objective).__name__}."
            )
        for name, parameter in vma.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"vma: {name!r} holds values that are not finite. Build or load it again.")
        vma.check(episode.memory, episode.x)
        self.vma, self.ranks = vma, ranks or Ranks()
        self.chosen = ""
        if objective == "auto":
            objective, why = choose_objective(self._values(episode), num_particles)
            self.chosen = f"objective {objective!r}: {why}"
        self.elbo: Any  # a stock ELBO has no common method but loss
        self.elbo, self.guide = objective, vma.guide
        if backward is not None and not isinstance(objective, str):
            raise ValueError(f"backward: it is for an objective by name; give {type(objective).__name__} its own.")
        if isinstance(objective, str):
            self.elbo = named_objective(objective, num_particles)
            if backward is not None:
                if not isinstance(self.elbo, ParticleELBO):
                    raise ValueError(f"backward: {objective!r} sums over addresses. Use 'vimco', 'iwae' or 'rws'.")
                self.elbo._check_backward(backward, num_particles, True)
                self.elbo.backward = backward
        if isinstance(self.elbo, TraceEnum_ELBO):
            self.guide = config_enumerate(vma.guide, "parallel", expand=True)
        self.decodes = self.elbo.decodes if isinstance(self.elbo, ParticleELBO) else self.elbo.num_particles
        if isinstance(self.elbo, TraceEnum_ELBO):
            self.decodes *= self._values(episode)
        check_objective(self.elbo, vma.model, self.guide, episode.memory, episode.x)
        # What the objective learns, such as a baseline, is trained and kept with the model.
        self.module = self.elbo.module if isinstance(self.elbo, ParticleELBO) else None
        learned = [*vma.named_parameters(), *(self.module.named_parameters() if self.module is not None else ())]
        self.names = [name for name, p in learned if p.requires_grad]
        self.parameters = [p for _, p in learned if p.requires_grad]
        if not self.parameters:
            raise ValueError("vma: all parameters are frozen. Unfreeze what is to be trained: `requires_grad_(True)`.")
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=True)

    def take(
        self, episode: Episode, lr: float, kl_weight: float, clip_norm: float, half: torch.autocast
    ) -> dict[str, float]:
        """One optimizer step; returns the terms per datapoint.

        Arguments:
            episode: The memory and the targets.
            lr: The learning rate.
            kl_weight: The weight of :math:`KL(z)`.
            clip_norm: The largest norm of the gradient of the loss per datapoint.
            half: The precision that networks run in.

        Raises:
            NotFiniteError: If the loss or the gradient is not finite. Nothing has moved then but the random state.
        """
        remembered = {} if self.module is None else {n: b.clone() for n, b in self.module.named_buffers()}
        try:
            with self.ranks.all_or_none(NotFiniteError), half:
                summary = self._gradient(episode, kl_weight)
            self.ranks.sum_gradients(self.parameters)
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], float(len(episode.x)))
            try:  # which raises before it scales anything
                torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm, error_if_nonfinite=True)
            except RuntimeError as error:
                raise NotFiniteError(self._bad_gradient()) from error
        except NotFiniteError:
            for name, buffer in remembered.items():
                self.module.get_buffer(name).copy_(buffer)  # type: ignore[union-attr]
            self.optimizer.zero_grad(set_to_none=True)
            raise
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.ranks.average_buffers(self.module, len(episode.x))
        return self.ranks.mean(summary, len(episode.x))

    @torch.no_grad()
    def _values(self, episode: Episode) -> int:
        """How many slots would be summed: all, or those that the guide keeps."""
        q_a = self.vma.address_guide(self.vma.encode(episode.memory), self.vma.encode_x(episode.x))
        return len(q_a.enumerate_support())

    def _gradient(self, episode: Episode, kl_weight: float) -> dict[str, float]:
        """Puts the gradient of the loss summed over this process's targets into every `.grad`; returns the terms."""
        self.optimizer.zero_grad(set_to_none=True)
        size = len(episode.x)
        programs = self.vma.model, self.ranks.noise(self.guide, size)
        model, guide = (scale_sites({"z": kl_weight})(fn) for fn in programs)
        episode = self.ranks.share(episode)
        memory = self.vma.encode(episode.memory, reads=self.decodes * len(episode.x))
        try:
            if isinstance(self.elbo, ParticleELBO):
                with no_store(), self.ranks.choice(size):  # the optimizer has the parameters
                    terms = self.elbo.terms(model, guide, memory, episode.x)
                loss = terms.loss.item()
                if not math.isfinite(loss):
                    raise NotFiniteError(first_not_finite(terms))
                terms.loss.backward()
                return summarise(terms, kl_weight)
            with encoded_once(memory) as shared:
                loss = self.elbo.loss_and_grads(model, guide, shared, episode.x)
        except (ValueError, RuntimeError) as error:
            # A distribution refuses parameters that are not finite, before there is a loss.
            where = find_not_finite(model, guide, episode.memory, episode.x)
            if where:
                raise NotFiniteError(where) from error
            raise
        if not math.isfinite(loss):
            raise NotFiniteError(find_not_finite(model, guide, episode.memory, episode.x) or f"the loss is {loss}")
        return {"bound": -loss / len(episode.x)}

    def _bad_gradient(self) -> str:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return f"the gradient of {name}"
        return "the norm of the gradient, which overflows"


def first_not_finite(terms: Terms) -> str:
    """The first term of an objective, in the order of computation, that is not finite, and the site it belongs to."""
    particles = terms.particles
    groups = {"log_guide": particles.log_guide, "log_prior": particles.log_prior}
    values = [(f"{term} of site {site!r}", value) for term, sites in groups.items() for site, value in sites.items()]
    for what, value in [*values, ("log_likelihood", particles.log_likelihood)]:
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            rows = int(bad.any(0).sum())
            return f"{what}, {value[bad][0].item()} for {rows} of {value.shape[1]} datapoints"
    return f"the loss, {terms.loss.item()}, though all terms are finite"


def find_not_finite(model: Any, guide: Any, *args: Any) -> str:
    """The first site of guide and model whose distribution has a parameter that is not finite; `""` if none has.

    Draws once more, without gradients; random state and parameters stay as they are.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, torch.tensor(math.nan)))
        >>> find_not_finite(model, lambda: None)
        "scale of the model's Normal at site 'z'"
    """
    looking = _Look()
    with (
        torch.no_grad(),
        torch.random.fork_rng(),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),  # which would refuse it before the site has a name
        looking,
    ):
        try:
            looking.program = "guide"
            drawn = poutine.trace(guide).get_trace(*args)
            looking.program = "model"
            poutine.replay(model, drawn)(*args)
        except (ValueError, RuntimeError):  # what cannot be drawn, because of what was found
            pass
    return looking.found


class _Look(Messenger):
    """Keeps the first parameter of a site's distribution that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.program = ""
        self.found = ""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        for name in getattr(fn, "arg_constraints", {}):
            value = fn.__dict__.get(name)
            if not self.found and isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                self.found = f"{name} of the {self.program}'s {type(fn).__name__} at site {msg['name']!r}"
