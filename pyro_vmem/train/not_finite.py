"""Where a loss that is not finite comes from: the first term, or the first parameter of a site's distribution."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vmem._utils.random_state import forked
from pyro_vmem.infer.elbo import Terms

__all__ = ["NotFiniteError", "find_not_finite", "first_not_finite"]


class NotFiniteError(Exception):
    """Names the term of a step that is not finite, and its site. The step has changed no weight."""


def first_not_finite(terms: Terms) -> str:
    """Returns the first term, in the order of computation, that is not finite, and its site."""
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

    Draws once more without gradients. Random state and parameters stay unchanged.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, torch.tensor(float("nan"))))
        >>> find_not_finite(model, lambda: None)
        "scale of the model's Normal at site 'z'"
    """
    looking = _Look()
    with (
        torch.no_grad(),
        forked(*args),
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
