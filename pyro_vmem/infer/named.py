"""Objectives by name, for configurations and the command line."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pyro.infer import ELBO, config_enumerate

from pyro_vmem.infer.base import ParticleELBO
from pyro_vmem.infer.enumeration import EnumGuard
from pyro_vmem.infer.iwae import IWAE_ELBO
from pyro_vmem.infer.rao_blackwell import RaoBlackwell_ELBO
from pyro_vmem.infer.reinforce import Reinforce_ELBO
from pyro_vmem.infer.rws import RWS_ELBO
from pyro_vmem.infer.vimco import VIMCO_ELBO

__all__ = ["Objective", "choose_objective", "named_objective"]

Objective = Literal["auto", "vimco", "rws", "iwae", "reinforce", "rao-blackwell", "enumerate"]

MANY_VALUES = 128  # from here on the noise of sampled addresses costs more than a looser bound: docs/objectives.md

_OF_PARTICLES: dict[str, type[ParticleELBO]] = {
    "vimco": VIMCO_ELBO,
    "iwae": IWAE_ELBO,
    "reinforce": Reinforce_ELBO,
}


def choose_objective(num_values: int, num_particles: int) -> tuple[Objective, str]:
    """The objective for a discrete site with so many values, and why.

    Arguments:
        num_values: The values of the site: the slots of the memory, or those that a :class:`TruncatedGuide` keeps.
        num_particles: The decodes a datapoint that a sampled objective would take.

    Raises:
        ValueError: If a number is less than 1.

    Example:
        >>> choose_objective(64, 4)
        ('vimco', '64 values are too many to sum at 4 decodes, few enough for the tighter bound of 4 samples')
    """
    for name, number in (("num_values", num_values), ("num_particles", num_particles)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}.")
    if num_values <= max(num_particles, 2):
        return "enumerate", f"{num_values} values can be summed at no more than {num_particles} decodes"
    if num_particles < 2:
        raise ValueError(f"num_particles: 'auto' with {num_values} values needs at least 2, got {num_particles}.")
    many = f"{num_values} values are too many to sum at {num_particles} decodes"
    if num_values <= MANY_VALUES:
        return "vimco", f"{many}, few enough for the tighter bound of {num_particles} samples"
    return "rao-blackwell", f"{many} or to sample all: the {num_particles - 1} most probable are summed"


def named_objective(name: Objective, guide: Any, num_particles: int, backward: int | None = None) -> tuple[ELBO, Any]:
    """The objective of that name for a model with one plate, and the guide as the objective wants it.

    Arguments:
        name: `"vimco"`, `"rws"` (with pathwise latents), `"iwae"`, `"reinforce"`, `"rao-blackwell"`, or `"enumerate"`
            for Pyro's own enumeration, guarded. `"auto"` needs :func:`choose_objective`.
        guide: The guide.
        num_particles: The decodes a datapoint; `"enumerate"` has as many as there are values.
        backward: Of how many particles the model's gradient is taken, as of :class:`ParticleELBO`; by default of all.

    Raises:
        ValueError: If there is no such objective, it needs more particles, or it has no such `backward`.

    Example:
        >>> named_objective("rao-blackwell", lambda x: None, 4)[0]
        RaoBlackwell_ELBO(k=3, site='a')
    """
    if name == "rws":
        return RWS_ELBO(num_particles, pathwise=True, max_plate_nesting=1, backward=backward), guide
    if name in _OF_PARTICLES:
        return _OF_PARTICLES[name](num_particles, max_plate_nesting=1, backward=backward), guide
    if backward is not None and name in ("rao-blackwell", "enumerate"):
        raise ValueError(f"backward: {name!r} sums over addresses, all with gradients. Use 'vimco', 'iwae' or 'rws'.")
    if name == "rao-blackwell":
        return RaoBlackwell_ELBO(num_particles - 1, max_plate_nesting=1), guide
    if name == "enumerate":
        return EnumGuard(max_plate_nesting=1), config_enumerate(guide, "parallel", expand=True)
    if name == "auto":
        raise ValueError("objective: 'auto' is chosen by choose_objective(num_values, num_particles); pass its answer.")
    raise ValueError(f"objective: expected one of {get_args(Objective)} or a pyro.infer.ELBO, got {name!r}.")
