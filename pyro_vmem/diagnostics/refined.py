"""The evidence by a proposal for the latent that is refined for each target, at the slots that matter."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal

from pyro_vmem.diagnostics.climb import DECODES, Climb, at_mean
from pyro_vmem.diagnostics.strata import StratifiedWeights
from pyro_vmem.memory import EncodedMemory, Template
from pyro_vmem.model import VMA
from pyro_vmem.parts.latents import FullPrecisionNormal

__all__ = ["LEAST", "refined_weights"]

EACH, MOST_SLOTS = 48, 4  # a slot is refined for so many decodes, and no more than so many slots
BEGUN, FIRST = 3, 2  # for each of them so many are begun, and take so many gradients: the mean of z tells too little
KEPT = (4, 8)  # the gradients after which a Gaussian is kept: the earlier is the wider
LEAST = 48  # the fewest decodes that are of use
# Slots that are tried first are a tenth of the decodes, or a little more than the square root of how many there are, if
# that is more; and a third of the decodes at most.
TENTH, THIRD, ROOTS = 10, 3, 1.25
# What latents at a refined slot are drawn from, and the share of each: the guide, the Gaussian from halfway, the last.
SHARES = (0.25, 0.25, 0.5)
LEAST_EACH = 4  # draws at a refined slot: one of each component
GUIDE_SHARE = 0.25  # of what is expected of a slot that was tried; the rest is by how the trial went
PRIOR_SHARE = 0.1  # of the draws of other slots: a guide that excludes a slot does not exclude it here


class Proposal(NamedTuple):
    """Where to draw.

    Attributes:
        slots: The refined slots, with shape `(R, B)`.
        gaussians: Of the latent at each of them, with batch shape `(R, B)`.
        log_others: The logits of the other slots, with shape `(B, S)`; all minus infinity where there are none.
        counts: The draws of each component at each refined slot, and of all others, with shape `(3 R + 1, B)`.
    """

    slots: Tensor
    gaussians: list[MultivariateNormal]
    log_others: Tensor
    counts: Tensor


def refined_weights(
    vma: VMA, memory: EncodedMemory, x: Tensor, num_samples: int, max_decodes: int
) -> StratifiedWeights:
    """Weights of some targets: each component at a refined slot is a stratum, and all other slots are the last one.

    The proposal is made before they are drawn, of decodes that have no other part: the estimate is unbiased whatever it
    is. A quarter of the draws at a refined slot are the guide's, and all are weighted by the mixture, so no weight is
    more than four times what it is by the guide.

    References:
        | Safe and Effective Importance Sampling (Owen, Zhou, 2000): mixtures that include the first proposal

    Arguments:
        vma: The model and its guide.
        memory: The memory of these targets.
        x: The targets, with shape `(B, *event)`.
        num_samples: Decodes a target, at least :data:`LEAST`; a gradient is two.
        max_decodes: How many decodes to hold in memory at once.

    Returns:
        The weights, `(n, B)`: those of the draws that the proposal has left.
    """
    target = vma.encode_x(x)
    slots, gaussians, log_others, counts = _proposal(vma, memory, x, target, num_samples)
    position = torch.arange(int(counts[:, 0].sum()), device=x.device).expand(len(x), -1)
    stratum = torch.searchsorted(counts.mT.cumsum(-1).contiguous(), position.contiguous(), right=True).mT.contiguous()
    elsewhere = stratum == len(counts) - 1
    # Where there is no other slot, any will do: its weight is zero.
    others = Categorical(logits=log_others.clamp(min=torch.finfo(log_others.dtype).min / 2))
    refined = (stratum // len(SHARES)).clamp(max=len(slots) - 1)
    a = torch.where(elsewhere, others.sample(stratum.shape[:1]), slots.gather(0, refined))
    log_p = vma.address_prior(memory).logits.expand_as(log_others).gather(-1, a.mT).mT
    log_chosen = (log_others - log_others.logsumexp(-1, keepdim=True)).gather(-1, a.mT).mT
    log_chosen = log_chosen.nan_to_num(math.inf, neginf=-math.inf)
    log_shares = torch.tensor(SHARES, dtype=log_p.dtype, device=x.device).log()
    component = stratum % len(SHARES)
    log_ratio = log_p + torch.where(elsewhere, -log_chosen, log_shares[component])
    parts = []
    for rows in position[0].split(max(1, max_decodes // len(x))):
        template = memory.read(a[rows])
        z, log_q = _draw(
            vma.latent_guide(target, template), gaussians, log_shares, refined[rows], component[rows], elsewhere[rows]
        )
        parts.append(vma.latent_prior(template).log_prob(z) + vma.likelihood(z, template).log_prob(x) - log_q)
    return StratifiedWeights(log_ratio + torch.cat(parts), stratum, counts)


def _draw(
    q_z: torch.distributions.Distribution,
    gaussians: list[MultivariateNormal],
    log_shares: Tensor,
    refined: Tensor,
    component: Tensor,
    elsewhere: Tensor,
) -> tuple[Tensor, Tensor]:
    """Latents of a component at refined slots, of the guide elsewhere; and the log density of what they are drawn from.

    That is the mixture at refined slots. Of shape `(n, B)`, as the last three arguments.
    """
    at = refined, torch.arange(refined.shape[1], device=refined.device)
    at_slot = [FullPrecisionNormal(g.mean[at], scale_tril=g.scale_tril[at]) for g in gaussians]
    drawn = torch.stack([part.sample() for part in (q_z, *at_slot)])
    chosen = component.masked_fill(elsewhere, 0)[None, ..., None].expand_as(drawn[:1])
    z = drawn.gather(0, chosen).squeeze(0)
    log_q = torch.stack([part.log_prob(z) for part in (q_z, *at_slot)])
    return z, torch.where(elsewhere, log_q[0], (log_q + log_shares[:, None, None]).logsumexp(0))


def _proposal(vma: VMA, memory: EncodedMemory, x: Tensor, target: Template, num_samples: int) -> Proposal:
    """Tries the slots that the guide finds most probable, climbs at the best of these, and divides the draws.

    The climb begins at several slots for each one that it goes on with: what a slot is worth shows after a step.
    """
    guide, log_p = vma.address_guide(memory, target).probs, vma.address_prior(memory).logits
    log_p = log_p.expand_as(guide)
    num_slots = guide.shape[-1]
    most = max(num_samples // TENTH, round(ROOTS * math.sqrt(num_slots)))
    tried = guide.topk(min(num_slots, num_samples // THIRD, most), dim=-1).indices
    worth = log_p.gather(-1, tried) + at_mean(vma, x, target, memory.read(tried.mT)).mT
    refined = min(tried.shape[-1], MOST_SLOTS, num_samples // EACH)
    begun = worth.topk(min(tried.shape[-1], BEGUN * refined), dim=-1).indices
    slots = tried.gather(-1, begun).mT
    climb = Climb(vma, x, target, memory.read(slots)).go_on(FIRST)
    climbed = log_p.gather(-1, slots.mT) + climb.log_evidence.mT
    worth = worth.scatter(-1, begun, climbed)
    best = climbed.topk(refined, dim=-1).indices.mT
    slots = slots.gather(0, best)
    climb.keep(best, memory.read(slots))
    gaussians = [climb.go_on(gradients).gaussian for gradients in KEPT]
    mass = guide.gather(-1, tried)
    guess = (worth / 2).softmax(-1).nan_to_num(0.0) * mass.sum(-1, keepdim=True)
    share = guide.scatter(-1, tried, GUIDE_SHARE * mass + (1 - GUIDE_SHARE) * guess)
    elsewhere = ((1 - PRIOR_SHARE) * share + PRIOR_SHARE * log_p.exp()).scatter(-1, slots.mT, 0.0)
    mass = torch.cat([share.gather(-1, slots.mT), elsewhere.sum(-1, keepdim=True)], -1)
    gradients = FIRST * begun.shape[-1] + (KEPT[-1] - FIRST) * refined
    num_draws = num_samples - tried.shape[-1] - DECODES * gradients
    return Proposal(slots.contiguous(), gaussians, elsewhere.log(), _counts(num_draws, mass))


def _counts(num_draws: int, mass: Tensor) -> Tensor:
    """Divides draws between slots and others by their mass `(B, R + 1)`, a quarter equally, and between components."""
    share = 0.75 * mass / mass.sum(-1, keepdim=True) + 0.25 / mass.shape[-1]
    each = LEAST_EACH + ((num_draws - LEAST_EACH * mass.shape[-1]) * share.nan_to_num(0.0)).floor().long()
    each.scatter_add_(-1, mass.argmax(-1, keepdim=True), num_draws - each.sum(-1, keepdim=True))
    quarter = each[:, :-1] // 4
    by_component = torch.stack([quarter, quarter, each[:, :-1] - 2 * quarter], -1)
    return torch.cat([by_component.flatten(1), each[:, -1:]], -1).mT.contiguous()
