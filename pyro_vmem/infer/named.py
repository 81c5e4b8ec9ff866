"""Objectives by name, for configurations and the command line."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pyro.infer import ELBO, TraceEnum_ELBO, config_enumerate

from pyro_vmem.infer.base import ParticleELBO
from pyro_vmem.infer.iwae import IWAE_ELBO
from pyro_vmem.infer.rao_blackwell import RaoBlackwell_ELBO
from pyro_vmem.infer.reinforce import Reinforce_ELBO
from pyro_vmem.infer.rws import RWS_ELBO
from pyro_vmem.infer.vimco import VIMCO_ELBO

__all__ = ["Objective", "named_objective"]

Objective = Literal["vimco", "rws", "iwae", "reinforce", "rao-blackwell", "enumerate"]

_OF_PARTICLES: dict[str, type[ParticleELBO]] = {
    "vimco": VIMCO_ELBO,
    "rws": RWS_ELBO,
    "iwae": IWAE_ELBO,
    "reinforce": Reinforce_ELBO,
}


def named_objective(name: Objective, guide: Any, num_particles: int) -> tuple[ELBO, Any]:
    """The objective of that name for a model with one plate, and the guide as the objective wants it.

    Arguments:
        name: `"vimco"`, `"rws"`, `"iwae"`, `"reinforce"`, `"rao-blackwell"`, or `"enumerate"` for Pyro's own
            `TraceEnum_ELBO`.
        guide: The guide.
        num_particles: The decodes a datapoint; `"enumerate"` has as many as there are values.

    Raises:
        ValueError: If there is no such objective, or it needs more particles.

    Example:
        >>> named_objective("rao-blackwell", lambda x: None, 4)[0]
        RaoBlackwell_ELBO(k=3, site='a')
    """
    if name in _OF_PARTICLES:
        return _OF_PARTICLES[name](num_particles, max_plate_nesting=1), guide
    if name == "rao-blackwell":
        return RaoBlackwell_ELBO(num_particles - 1, max_plate_nesting=1), guide
    if name == "enumerate":
        return TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(guide, "parallel", expand=True)
    raise ValueError(f"objective: expected one of {get_args(Objective)} or a pyro.infer.ELBO, got {name!r}.")
