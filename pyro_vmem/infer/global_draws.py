"""Several draws of the latents outside of the data plate, each with particles of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_vmem._utils.checks import Several
from pyro_vmem.infer.elbo import DifferentiableELBO, ParticleELBO

__all__ = ["GlobalDraws_ELBO"]


class GlobalDraws_ELBO(DifferentiableELBO):
    r"""The mean of an objective over several draws :math:`g_i` of the latents outside of the data plate.

    .. math:: L = \frac{1}{G} \sum_i \left( \sum_b L_b(g_i) + \log p(g_i) - \log q(g_i) \right)

    where :math:`L_b` is the bound of a datapoint by the local objective. The score function of :math:`g_i` has the mean
    over the other draws as its baseline. This reduces the variance for discrete global latents, and adds no bias.

    References:
        | Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool et al., 2019) | https://openreview.net/forum?id=r1lgTGL5DE

    Arguments:
        local: The objective of the latents of each datapoint.
        draws: The number :math:`G \ge 2` of draws; each takes as many decoder passes as `local`.

    Raises:
        ValueError: At the first loss, if there are no such latents.

    Example:
        >>> import pyro_vmem as pv
        >>> pv.infer.GlobalDraws_ELBO(pv.infer.VIMCO_ELBO(4), draws=3)
        GlobalDraws_ELBO(VIMCO_ELBO(num_particles=4), draws=3)
    """

    def __init__(self, local: ParticleELBO, draws: Several = 2) -> None:
        super().__init__(max_plate_nesting=math.inf, retain_graph=local.retain_graph)
        self.local, self.draws = local, draws

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss in nats, a scalar tensor; a `ValueError` without latents outside of the data plate."""
        terms = [self.local.terms(model, guide, *args, **kwargs) for _ in range(self.draws)]
        loss, of_all = torch.zeros(()), sum(float(one.loss.detach()) for one in terms)
        for one in terms:
            if (own := one.particles.of_globals) is None:
                raise ValueError(f"model: it has no latents outside of the data plate. Use {self.local!r} itself.")
            others = (of_all - float(one.loss.detach())) / (self.draws - 1)
            loss = loss + (one.loss - others * (own.score - own.score.detach())) / self.draws
        return loss

    def _get_trace(self, *args: Any) -> Any:
        raise NotImplementedError  # pyro.infer.ELBO wants one; the local objective has it

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.local!r}, draws={self.draws})"
