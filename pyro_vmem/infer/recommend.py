"""Recommends an objective for a program, and says why and what a step of it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.util import prune_subsample_sites

from pyro_vmem._utils.checks import Program, Several
from pyro_vmem._utils.random_state import forked
from pyro_vmem.infer.by_name import NUM_PARTICLES
from pyro_vmem.infer.elbo import ParticleELBO
from pyro_vmem.infer.enumeration import saved_bytes
from pyro_vmem.infer.global_draws import GlobalDraws_ELBO
from pyro_vmem.infer.global_latents import global_names
from pyro_vmem.infer.iwae import IWAE_ELBO
from pyro_vmem.infer.particles import samples
from pyro_vmem.infer.rao_blackwell import RaoBlackwell_ELBO
from pyro_vmem.infer.unordered_set import UnorderedSet_ELBO
from pyro_vmem.infer.vimco import VIMCO_ELBO

__all__ = ["Choice", "choose"]

MANY_VALUES = 128  # from here on the noise of sampled addresses costs more than a looser bound: docs/objectives.md


@dataclass(frozen=True)
class Choice:
    """An objective for a program.

    Attributes:
        objective: The objective.
        why: The reason in a sentence.
        decodes: The number of decoder passes per datapoint and step.
        gigabytes: The memory that a step keeps for the backward pass, as measured.
    """

    objective: ELBO
    why: str
    decodes: int
    gigabytes: float

    def __str__(self) -> str:
        cost = f"{self.decodes} decoder passes per datapoint, {self.gigabytes:.2g} GB per step"
        return f"{self.objective!r}: {self.why}; {cost}"


def choose(model: Program, guide: Program, *args: Any, num_particles: Several = NUM_PARTICLES, **kwargs: Any) -> Choice:
    """Recommends an objective by the latents of the program.

    The program is run a few times; parameters and random state stay as they are.

    Arguments:
        num_particles: The decoder passes per datapoint that a step may take, at least 2. All others are those of the
            programs.

    Raises:
        ValueError: If `num_particles` is less than 2, or the recommended objective refuses the program.

    Example:
        >>> import pyro_vmem as pv
        >>> vma, memory, x = pv.VMA.for_vectors(5), pv.Memory(torch.randn(60, 5)), torch.randn(3, 5)
        >>> print(pv.infer.choose(vma.model, vma.guide, memory, x))
        VIMCO_ELBO(num_particles=4): 60 values of 'a' are too many ...; 4 decoder passes per datapoint, ... GB per step
    """
    with forked(*args, *kwargs.values()), pyro.get_param_store().scope(), torch.enable_grad():
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
        drawn, run = prune_subsample_sites(drawn), prune_subsample_sites(run)
        outside = global_names(run, drawn)
        discrete = {name: s["fn"] for name, s in samples(drawn).items() if not s["fn"].has_rsample}
        frames = [frame for site in run.nodes.values() for frame in site.get("cond_indep_stack", ())]
        nesting = max((-frame.dim for frame in frames if frame.dim is not None), default=0)
        local, why = _local({n: fn for n, fn in discrete.items() if n not in outside}, num_particles, nesting)
        objective: Any = local
        if shared := sorted(set(discrete) & outside):
            objective = GlobalDraws_ELBO(local, 2)
            why += f"; two draws of {shared}, which are outside of the data plate, with each other as a baseline"
        kept = saved_bytes(lambda: objective.differentiable_loss(model, guide, *args, **kwargs))
    return Choice(objective, why, local.decodes * (2 if shared else 1), kept / 1e9)


def _local(discrete: dict[str, Any], passes: int, nesting: int) -> tuple[ParticleELBO, str]:
    """The objective for the discrete latents of a datapoint, and why."""
    if not discrete:
        return IWAE_ELBO(passes, max_plate_nesting=nesting), "all latents of a datapoint are reparameterised"
    vimco, (name, fn) = VIMCO_ELBO(passes, max_plate_nesting=nesting), next(iter(discrete.items()))
    if len(discrete) > 1 or not isinstance(fn, torch.distributions.Categorical):
        return vimco, f"it samples any discrete latents: {sorted(discrete)}"
    values = len(fn.enumerate_support())  # those that a truncated guide keeps
    if 1 < values <= passes:
        few = f"{values} values of {name!r} can be summed at no more than {passes} decoder passes"
        return UnorderedSet_ELBO(values, name, max_plate_nesting=nesting), few
    many = f"{values} values of {name!r} are too many to sum at {passes} decoder passes"
    if values > MANY_VALUES:
        summed = RaoBlackwell_ELBO(passes - 1, name, max_plate_nesting=nesting)
        return summed, f"{many} or to sample all: the {passes - 1} likeliest are summed"
    return vimco, f"{many}, few enough for the tighter bound of {passes} samples" if values > 1 else "any will do"
