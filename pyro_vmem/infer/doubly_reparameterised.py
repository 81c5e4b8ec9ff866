"""Doubly reparameterised gradients: the guide of a continuous latent is trained through the latent's value only.

Its noise vanishes as the guide becomes exact, where the plain pathwise gradient keeps the noise of the score term.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["PathWeight", "doubly_reparameterised", "through_values_only"]


class PathWeight:
    r"""The factor by which the gradient through one sampled value is multiplied.

    It depends on all weights, which are known only after the value was used: the model's gradient is to keep the
    factor :math:`\tilde w_k` that the bound gives it, and only what flows on into the guide gets another one.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None

    def attach(self, value: Tensor) -> Tensor:
        """The value, of any shape, with a gradient that is multiplied on its way to where the value came from."""
        value = value.view_as(value)
        value.register_hook(lambda gradient: gradient if self.factor is None else gradient * self.factor)
        return value


class doubly_reparameterised(Messenger):
    """Draws the reparameterised sites of a guide so that the gradient through each value can be weighted."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or not getattr(msg["fn"], "has_rsample", False):
            return
        value = msg["fn"](*msg["args"], **msg["kwargs"])
        if value.requires_grad:
            path = PathWeight()
            msg["value"] = path.attach(value)
            msg["infer"] = {**msg["infer"], "path": path}


def through_values_only(guide_trace: Trace) -> None:
    r"""Takes the direct gradient of :math:`\log q` out of a trace: its parameters act through the value alone.

    Raises:
        ValueError: If a latent's guide depends on the value of a reparameterised latent.
    """
    sites: dict[str, Any] = {name: site for name, site in guide_trace.nodes.items() if site["type"] == "sample"}
    drawn = {name: site for name, site in sites.items() if "path" in site["infer"]}
    direct = {}
    for name, site in drawn.items():
        log_prob = site["fn"].log_prob(site["value"].detach(), *site["args"], **site["kwargs"])
        direct[name] = scale_and_mask(log_prob, site["scale"], site["mask"])
    _check_independent(sites, drawn, direct)
    for name, site in drawn.items():
        site["log_prob"] = site["log_prob"] - direct[name] + direct[name].detach()


def _check_independent(sites: dict[str, Any], drawn: dict[str, Any], direct: dict[str, Tensor]) -> None:
    for name, site in sites.items():
        log_prob = direct.get(name, site["log_prob"])
        others = [other for other in drawn if other != name]
        if not log_prob.requires_grad or not others:
            continue
        values = [drawn[other]["value"] for other in others]
        for other, gradient in zip(
            others, torch.autograd.grad(log_prob.sum(), values, retain_graph=True, allow_unused=True), strict=True
        ):
            if gradient is not None:
                raise ValueError(
                    f"dreg: the guide of {name!r} depends on the value of {other!r}, and doubly reparameterised "
                    "gradients are for reparameterised latents that no other latent's guide depends on. "
                    "Use dreg=False."
                )
