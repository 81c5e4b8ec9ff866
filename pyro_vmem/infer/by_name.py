"""Objectives by name: which there are, and whether one can train a given guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, ReweightedWakeSleep, TraceEnum_ELBO

from pyro_vmem._utils.checks import Program
from pyro_vmem._utils.random_state import forked
from pyro_vmem.infer.enumeration import EnumGuard
from pyro_vmem.infer.iwae import IWAE_ELBO
from pyro_vmem.infer.rao_blackwell import RaoBlackwell_ELBO
from pyro_vmem.infer.reinforce import Reinforce_ELBO
from pyro_vmem.infer.rws import RWS_ELBO
from pyro_vmem.infer.vimco import VIMCO_ELBO

__all__ = ["Objective", "check_objective", "named_objective"]

Objective = Literal["auto", "vimco", "rws", "iwae", "reinforce", "rao-blackwell", "enumerate"]

NUM_PARTICLES = 4  # the decoder passes per datapoint of a named objective; all names cost the same, but for "enumerate"


def named_objective(name: Objective) -> ELBO:
    """The objective of that name for a model with one plate, at four decoder passes per datapoint.

    Arguments:
        name: `"vimco"`, `"rws"` (with pathwise latents), `"iwae"`, `"reinforce"`, `"rao-blackwell"`, or `"enumerate"`
            for Pyro's own enumeration, guarded; its guide has to be marked by `config_enumerate`, and it has as many
            decoder passes as there are values. `"auto"` is for :func:`choose`.

    Raises:
        ValueError: If there is no such objective.

    Example:
        >>> named_objective("rao-blackwell")
        RaoBlackwell_ELBO(k=3)
    """
    made: dict[str, Callable[[], ELBO]] = {
        "vimco": lambda: VIMCO_ELBO(NUM_PARTICLES, max_plate_nesting=1),
        "rws": lambda: RWS_ELBO(NUM_PARTICLES, pathwise=True, max_plate_nesting=1),
        "iwae": lambda: IWAE_ELBO(NUM_PARTICLES, max_plate_nesting=1),
        "reinforce": lambda: Reinforce_ELBO(NUM_PARTICLES, max_plate_nesting=1),
        "rao-blackwell": lambda: RaoBlackwell_ELBO(NUM_PARTICLES - 1, max_plate_nesting=1),  # and one is sampled
        "enumerate": lambda: EnumGuard(max_plate_nesting=1),
    }
    if isinstance(name, str) and name in made:
        return made[name]()
    if name == "auto":
        raise ValueError("objective: 'auto' depends on the model; pass what choose(model, guide, ...) recommends.")
    raise ValueError(f"objective: expected one of {get_args(Objective)} or a pyro.infer.ELBO, got {name!r}.")


def check_objective(elbo: ELBO, model: Program, guide: Program, *args: Any, **kwargs: Any) -> None:
    """Refuses an objective that would silently not train this guide.

    Runs the guide once with the arguments of both programs, without gradients; parameters and random state stay as they
    are.

    Raises:
        ValueError: If the guide has discrete sites that the objective gives no gradient, weights the whole minibatch as
            one, or has no site to enumerate.

    Example:
        >>> import pyro_vmem as pv
        >>> vma, memory, x = pv.VMA.for_vectors(5), pv.Memory(torch.randn(6, 5)), torch.randn(3, 5)
        >>> check_objective(pv.infer.VIMCO_ELBO(4), vma.model, vma.guide, memory, x)
        >>> check_objective(RenyiELBO(alpha=0, num_particles=4), vma.model, vma.guide, memory, x)
        Traceback (most recent call last):
        ValueError: objective: RenyiELBO gives the guide's discrete sites ['a'] no gradient. ...
    """
    with torch.no_grad(), forked(*args, *kwargs.values()), pyro.get_param_store().scope():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    sites: dict[str, Any] = {
        name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site["is_observed"]
    }
    # An enumerated site is no sample, so that is not what these are about.
    sites = {name: site for name, site in sites.items() if type(site["fn"]).__name__ != "_Subsample"}
    discrete = [name for name, site in sites.items() if not getattr(site["fn"], "has_rsample", False)]
    if isinstance(elbo, RenyiELBO) and discrete:
        raise ValueError(
            f"objective: RenyiELBO gives the guide's discrete sites {discrete} no gradient. "
            "Use IWAE_ELBO or VIMCO_ELBO."
        )
    datapoints = max((site["fn"].batch_shape.numel() for site in sites.values()), default=1)
    if isinstance(elbo, ReweightedWakeSleep) and datapoints > 1:
        raise ValueError(
            f"objective: pyro.infer.ReweightedWakeSleep forms one weight for all {datapoints} datapoints. Use RWS_ELBO."
        )
    enumerated = [name for name, site in sites.items() if site["infer"].get("enumerate")]
    if isinstance(elbo, TraceEnum_ELBO) and discrete and not enumerated:
        raise ValueError(
            f"objective: {type(elbo).__name__} would sample the guide's discrete sites {discrete} and learn by the "
            "bare score function, as none is marked for enumeration. "
            'Pass config_enumerate(guide, "parallel", expand=True).'
        )
