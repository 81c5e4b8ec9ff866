"""What an objective can do, checked against a model and a guide before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, ReweightedWakeSleep, TraceEnum_ELBO

from pyro_vmem.infer.base import ParticleELBO

__all__ = ["Capabilities", "capabilities", "check_objective"]


@dataclass(frozen=True)
class Capabilities:
    """What an objective declares.

    Attributes:
        discrete: How the guide's discrete sites get their gradient.
        bias: What the gradient is in expectation: `""` for that of the stated objective exactly, else what is off.
        least_particles: The least number of particles that it is defined for.
        decodes: How often the model is evaluated for each datapoint; `None` if the enumerated sites decide.
    """

    discrete: str
    bias: str
    least_particles: int
    decodes: int | None


def capabilities(elbo: ELBO) -> Capabilities:
    """What an objective of this library, or `TraceEnum_ELBO`, declares.

    Raises:
        ValueError: If it is another of Pyro's objectives, which declare nothing.

    Example:
        >>> import pyro_vmem as pv
        >>> capabilities(pv.infer.RWS_ELBO(8))
        Capabilities(discrete='wake phase', bias='guide: self-normalised, O(1/K)', least_particles=2, decodes=8)
    """
    if isinstance(elbo, ParticleELBO):
        return Capabilities(elbo.discrete, elbo.bias, elbo.least_particles, elbo.decodes)
    if isinstance(elbo, TraceEnum_ELBO):
        return Capabilities("summed", "", 1, None)
    raise ValueError(f"elbo: {type(elbo).__name__} declares nothing. Expected an objective of pyro_vmem.infer.")


def check_objective(elbo: ELBO, model: Any, guide: Any, *args: Any, **kwargs: Any) -> None:
    """Refuses an objective that would silently not train this guide.

    Runs the guide once, without gradients; parameters and random state stay as they are.

    Arguments:
        elbo: The objective.
        model: The model.
        guide: Its guide.
        args: Their arguments.
        kwargs: Their keyword arguments.

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
    with torch.no_grad(), torch.random.fork_rng(), pyro.get_param_store().scope():
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
