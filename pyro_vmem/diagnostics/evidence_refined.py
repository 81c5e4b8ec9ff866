"""The evidence by proposals for the latent that are refined for each target, at the most probable slots.

A few gradients find a better Gaussian than a poor guide of the latent has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal

from pyro_vmem._utils.checks import Count, NonNegative, Positive, Share
from pyro_vmem.diagnostics.pathfinder import DECODES_PER_GRADIENT, OptimizationPath, moments
from pyro_vmem.diagnostics.weights import StratifiedWeights, strata_of
from pyro_vmem.memory import EncodedMemory, Template
from pyro_vmem.model import VMA
from pyro_vmem.parts.latents import FullPrecisionNormal

__all__ = ["RefineConfig"]


@dataclass(frozen=True)
class RefineConfig:
    """How `estimate_evidence(..., "refined", refine=RefineConfig(...))` spends its decoder passes.

    A gradient counts as two passes. The settings change the variance of the estimate, and never its mean.

    Arguments:
        decodes_per_slot: The decoder passes per target for each refined slot.
        max_slots: The most slots to refine.
        starts_per_slot: The paths that begin for each refined slot.
        start_gradients: The gradients of each of these paths, before the best continue.
        gradients: The gradients after which a normal approximation is kept. An earlier one is wider.
        mixture: The shares of the draws at a refined slot: of the guide, then of each normal approximation. The share
            of the guide bounds the weights.
        tried_share: The share of decoder passes for slots that are tried at the mean of z.
        tried_roots: The least number of tried slots, in square roots of the number of slots.
        tried_limit: The largest share of decoder passes for tried slots.
        guide_share: The share of the address guide in the expected mass of a tried slot; the trial has the rest.
        prior_share: The share of the address prior in the draws of other slots, for slots that the guide excludes.
        equal_share: The share of draws that is divided equally between refined slots and the others.
        longest_step: The longest step of a path, in standard deviations of the guide.
        variances: The least and the largest variance of a normal approximation, over those of the guide.
        slack: The most log density that a step may lose, in nats.

    Raises:
        ValueError: If a number is out of range, or shares do not add up to 1.

    Example:
        >>> RefineConfig(max_slots=2).gradients
        (4, 8)
    """

    decodes_per_slot: Count = 48
    max_slots: Count = 4
    starts_per_slot: Count = 3
    start_gradients: Count = 2
    gradients: tuple[Count, ...] = (4, 8)
    mixture: tuple[Share, ...] = (0.25, 0.25, 0.5)
    tried_share: Share = 0.1
    tried_roots: Positive = 1.25
    tried_limit: Share = 1 / 3
    guide_share: Share = 0.25
    prior_share: Share = 0.1
    equal_share: Share = 0.25
    longest_step: Positive = 4.0
    variances: tuple[Positive, Positive] = (1e-4, 4.0)
    slack: NonNegative = 0.5

    def __post_init__(self) -> None:
        if not self.gradients or list(self.gradients) != sorted(set(self.gradients)):
            raise ValueError(f"gradients: expected increasing numbers, got {self.gradients}.")
        if self.gradients[0] < self.start_gradients:
            raise ValueError(
                f"gradients: expected at least start_gradients, {self.start_gradients}, got {self.gradients}."
            )
        if len(self.mixture) != len(self.gradients) + 1 or abs(sum(self.mixture) - 1) > 1e-6:
            raise ValueError(
                f"mixture: expected {len(self.gradients) + 1} positive shares that add up to 1, one of the guide and "
                f"one of each of gradients, got {self.mixture}."
            )
        paths = self.start_gradients * self.starts_per_slot + self.gradients[-1] - self.start_gradients
        # Room for its paths and draws, the draws of other slots, and the tried slots.
        least = math.ceil((DECODES_PER_GRADIENT * paths + 2 * self.least_draws) / (1 - self.tried_limit) - 1e-9)
        if self.decodes_per_slot < least:
            raise ValueError(
                f"decodes_per_slot: expected at least {least}, which the paths and draws of one slot take, "
                f"got {self.decodes_per_slot}. Take fewer gradients or starts_per_slot."
            )

    @property
    def least_draws(self) -> int:
        """The fewest draws at a refined slot: one of each component of the mixture."""
        return math.ceil(1 / min(self.mixture))


class Proposal(NamedTuple):
    """What to draw: the slots to refine, and the draws at these and at all others."""

    slots: Tensor  # (R, B)
    gaussians: list[MultivariateNormal]  # of the latent at each of them, (R, B)
    log_others: Tensor  # the logits of the other slots, (B, S); all minus infinity where there are none
    counts: Tensor  # the draws of each component at each refined slot, and of all others, (B, G R + 1)
    expected: Tensor  # the probability of all other slots by the address guide, (B,)


def refined_weights(
    vma: VMA, memory: EncodedMemory, x: Tensor, num_samples: int, config: RefineConfig, max_decodes: int
) -> StratifiedWeights:
    """Weighs draws in strata: each mixture component at a refined slot, and all other slots together.

    The passes that make the proposal have no part in the estimate, which is therefore unbiased. All draws at a refined
    slot have the density of the mixture (Safe and Effective Importance Sampling, Owen, Zhou, 2000).
    """
    target, components = vma.encode_x(x), len(config.mixture)
    slots, gaussians, log_others, counts, expected = _proposal(vma, memory, x, target, num_samples, config)
    stratum = strata_of(counts).mT.contiguous()
    elsewhere = stratum == counts.shape[-1] - 1
    # Where there is no other slot, any slot serves: its weight is zero.
    others = Categorical(logits=log_others.clamp(min=torch.finfo(log_others.dtype).min / 2))
    refined = (stratum // components).clamp(max=len(slots) - 1)
    a = torch.where(elsewhere, others.sample(stratum.shape[:1]), slots.gather(0, refined))
    log_p = vma.address_prior(memory).logits.expand_as(log_others).gather(-1, a.mT).mT
    log_chosen = (log_others - log_others.logsumexp(-1, keepdim=True)).gather(-1, a.mT).mT
    log_chosen = log_chosen.nan_to_num(math.inf, neginf=-math.inf)
    log_shares = log_p.new_tensor(config.mixture).log()
    component = stratum % components
    log_ratio = log_p + torch.where(elsewhere, -log_chosen, log_shares[component])
    parts = []
    for rows in torch.arange(len(stratum), device=x.device).split(max(1, max_decodes // len(x))):
        template = memory.read(a[rows])
        q_z = vma.latent_guide(target, template)
        z, log_q = _draw(q_z, gaussians, log_shares, refined[rows], component[rows], elsewhere[rows])
        parts.append(vma.latent_prior(template).log_prob(z) + vma.likelihood(z, template).log_prob(x) - log_q)
    return StratifiedWeights(log_ratio + torch.cat(parts), stratum, counts.mT.contiguous(), config.mixture, expected)


def _draw(
    q_z: torch.distributions.Distribution,
    gaussians: list[MultivariateNormal],
    log_shares: Tensor,
    refined: Tensor,
    component: Tensor,
    elsewhere: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draws z `(n, B)`, and its log density: of a mixture component at refined slots, of the guide elsewhere."""
    at = refined, torch.arange(refined.shape[1], device=refined.device)
    at_slot = [FullPrecisionNormal(g.mean[at], scale_tril=g.scale_tril[at]) for g in gaussians]
    drawn = torch.stack([part.sample() for part in (q_z, *at_slot)])
    chosen = component.masked_fill(elsewhere, 0)[None, ..., None].expand_as(drawn[:1])
    z = drawn.gather(0, chosen).squeeze(0)
    log_q = torch.stack([part.log_prob(z) for part in (q_z, *at_slot)])
    return z, torch.where(elsewhere, log_q[0], (log_q + log_shares[:, None, None]).logsumexp(0))


def _proposal(
    vma: VMA, memory: EncodedMemory, x: Tensor, target: Template, num_samples: int, config: RefineConfig
) -> Proposal:
    """Tries the slots that the guide finds most probable, refines z at the best of these, and divides the draws."""
    guide, log_p = vma.address_guide(memory, target).probs, vma.address_prior(memory).logits
    log_p = log_p.expand_as(guide)
    num_slots = guide.shape[-1]
    most = max(int(num_samples * config.tried_share), round(config.tried_roots * math.sqrt(num_slots)))
    tried = guide.topk(min(num_slots, int(num_samples * config.tried_limit), most), dim=-1).indices
    worth = log_p.gather(-1, tried) + _at_mean(vma, x, target, memory.read(tried.mT)).mT
    num_refined = min(tried.shape[-1], config.max_slots, num_samples // config.decodes_per_slot)
    # More paths begin than continue, because the worth of a slot shows only after some steps.
    begun = worth.topk(min(tried.shape[-1], config.starts_per_slot * num_refined), dim=-1).indices
    slots = tried.gather(-1, begun).mT
    template = memory.read(slots)
    path = OptimizationPath(
        log_joint_of_latent(vma, x, template),
        *moments(vma.latent_guide(target, template)),
        config.longest_step,
        config.variances,
        config.slack,
    ).advance(config.start_gradients)
    advanced = log_p.gather(-1, slots.mT) + path.laplace_log_evidence.mT
    worth = worth.scatter(-1, begun, advanced)
    best = advanced.topk(num_refined, dim=-1).indices.mT
    slots = slots.gather(0, best)
    path.select(best, log_joint_of_latent(vma, x, memory.read(slots)))
    gaussians = [path.advance(gradients).normal_approximation for gradients in config.gradients]
    mass = guide.gather(-1, tried)
    # Half of the logarithm, because a trial at one point overstates the differences between slots.
    guess = (worth / 2).softmax(-1).nan_to_num(0.0) * mass.sum(-1, keepdim=True)
    share = guide.scatter(-1, tried, config.guide_share * mass + (1 - config.guide_share) * guess)
    elsewhere = (1 - config.prior_share) * share + config.prior_share * log_p.exp()
    elsewhere = elsewhere.scatter(-1, slots.mT, 0.0)
    mass = torch.cat([share.gather(-1, slots.mT), elsewhere.sum(-1, keepdim=True)], -1)
    gradients = config.start_gradients * begun.shape[-1] + (path.gradients - config.start_gradients) * num_refined
    num_draws = num_samples - tried.shape[-1] - DECODES_PER_GRADIENT * gradients
    expected = 1 - guide.gather(-1, slots.mT).sum(-1)
    return Proposal(slots.contiguous(), gaussians, elsewhere.log(), _counts(num_draws, mass, config), expected)


def log_joint_of_latent(vma: VMA, x: Tensor, template: Template) -> Callable[[Tensor], Tensor]:
    r""":math:`\log p(z | m_a)\, p(x | z, m_a)` as a function of z: `(*, B, D)` to `(*, B)`."""
    prior = vma.latent_prior(template)  # asked once, not at each gradient

    def log_joint(z: Tensor) -> Tensor:
        value: Tensor = prior.log_prob(z) + vma.likelihood(z, template).log_prob(x)
        return value

    return log_joint


def _at_mean(vma: VMA, x: Tensor, target: Template, template: Template) -> Tensor:
    r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` at the mean of the guide, in nats; with shape `(*, B)`."""
    q_z = vma.latent_guide(target, template)
    z, _ = moments(q_z)
    log_ratio: Tensor = vma.latent_prior(template).log_prob(z) - q_z.log_prob(z)
    return log_ratio + vma.likelihood(z, template).log_prob(x)


def _counts(num_draws: int, mass: Tensor, config: RefineConfig) -> Tensor:
    """Divides draws between refined slots and others by mass `(B, R + 1)`, and at slots between components."""
    least, size = config.least_draws, mass.shape[-1]
    share = (1 - config.equal_share) * mass / mass.sum(-1, keepdim=True) + config.equal_share / size
    each = least + ((num_draws - least * size) * share.nan_to_num(0.0)).floor().long()
    each.scatter_add_(-1, mass.argmax(-1, keepdim=True), num_draws - each.sum(-1, keepdim=True))
    at_slots = each[:, :-1]
    first = [(at_slots * share).long() for share in config.mixture[:-1]]
    by_component = torch.stack([*first, at_slots - torch.stack(first).sum(0)], -1)
    return torch.cat([by_component.flatten(1), each[:, -1:]], -1).contiguous()
