"""Doubly reparameterised gradients: the guide of a continuous latent is trained through the latent's value only.

Its noise vanishes as the guide becomes exact, where the plain pathwise gradient keeps the noise of the score term.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor
from torch import Tensor

from pyro_vmem.infer.particles import PATH

__all__ = ["PathWeight", "depends_on", "doubly_reparameterised", "is_delta", "through_values_only"]


class PathWeight:
    r"""The factor by which the gradient through one sampled value is multiplied.

    The factor depends on all weights, which are known only after the value was used. The gradient of the model keeps
    the factor :math:`\tilde w_k` of the bound. Only the gradient that reaches the guide is multiplied.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None

    def attach(self, value: Tensor) -> Tensor:
        """Returns the value, of any shape; the gradient that passes through it towards the guide is multiplied."""
        value = value.view_as(value)
        value.register_hook(lambda gradient: gradient if self.factor is None else gradient * self.factor)
        return value


class doubly_reparameterised(Messenger):
    """Draws the reparameterised sites of a guide, such that the gradient through each value can be weighted later."""

    def _pyro_sample(self, msg: Any) -> None:
        # A Delta has no noise of its own: the gradient through its value goes on to those that it is made of.
        if msg["is_observed"] or msg["value"] is not None or is_delta(msg) or not msg["fn"].has_rsample:
            return
        value = msg["fn"](*msg["args"], **msg["kwargs"])
        if value.requires_grad:
            path = PathWeight()
            msg["value"] = path.attach(value)
            msg["infer"] = {**msg["infer"], PATH: path}


def is_delta(site: Any) -> bool:
    """Whether a site is a `Delta`, with any plates and masks."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def through_values_only(guide_trace: Trace) -> None:
    r"""Removes the direct gradient of :math:`\log q` from a trace, so the parameters act through the value only.

    Raises a `ValueError` if a latent's guide depends on the value of a reparameterised latent.
    """
    sites: dict[str, Any] = {name: site for name, site in guide_trace.nodes.items() if site["type"] == "sample"}
    drawn = {name: site for name, site in sites.items() if PATH in site["infer"]}
    direct = {}
    for name, site in drawn.items():
        log_prob = site["fn"].log_prob(site["value"].detach(), *site["args"], **site["kwargs"])
        direct[name] = scale_and_mask(log_prob, site["scale"], site["mask"])
    for name, site in sites.items():
        if is_delta(site) or site_is_factor(site):
            continue  # the Jacobian of a change of variables, which is part of the path
        others = {other: drawn[other]["value"] for other in drawn if other != name}
        if found := depends_on(direct.get(name, site["log_prob"]), others):
            raise ValueError(
                f"dreg: the guide of {name!r} depends on the value of {found[0]!r}, and doubly reparameterised "
                "gradients are for reparameterised latents that no other latent's guide depends on. Use dreg=False."
            )
    for name, site in drawn.items():
        site["log_prob"] = site["log_prob"] - direct[name] + direct[name].detach()


def depends_on(log_prob: Any, values: dict[str, Tensor]) -> list[str]:
    """The names of the values (of any shape) on which a log-probability depends, so that they get a gradient."""
    if not values or not isinstance(log_prob, Tensor) or not log_prob.requires_grad:
        return []
    found = torch.autograd.grad(log_prob.sum(), list(values.values()), retain_graph=True, allow_unused=True)
    return [name for name, gradient in zip(values, found, strict=True) if gradient is not None]
