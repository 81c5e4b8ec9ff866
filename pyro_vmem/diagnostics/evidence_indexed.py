"""Evidence and information gain of a memory that is searched by an index and too large to sum over all slots.

Slots that the guide found are summed; all others are sampled from the prior, or bounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vmem.diagnostics.slot_weights import weights_in_strata
from pyro_vmem.memory import EncodedMemory
from pyro_vmem.model import VMA

__all__: list[str] = []


def draw_others(p: torch.distributions.Categorical, excluded: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    r"""Draws from the address prior `()` outside of some distinct slots `(B, k)`.

    Returns draws `(B, K)`, and the log probability of all slots that are not excluded, `(B,)`. Where that is `-inf`,
    the draws are any slots.
    """
    # The guide may have found no other slots, while the prior reaches all of them: the estimate stays unbiased. Inverts
    # the distribution function without the steps of the excluded slots; rejection sampling would never end where the
    # others have no probability.
    probs = p.probs.double()
    steps, excluded = probs.cumsum(-1), excluded.sort(-1).values
    mass = probs[excluded]
    left = (steps[-1] - mass.sum(-1)).clamp(min=0.0)
    left = left.masked_fill(left < 1e-12 * steps[-1], 0.0)  # rounding of the sums
    level = left.unsqueeze(-1) * torch.rand(len(excluded), num_draws, dtype=probs.dtype, device=probs.device)
    for slot, step in zip(excluded.mT.unsqueeze(-1), mass.mT.unsqueeze(-1), strict=True):
        level = torch.where(level >= steps[slot] - step, level + step, level)
    drawn = torch.searchsorted(steps, level, right=True).clamp(max=len(steps) - 1)
    return drawn, (left / steps[-1]).log().to(p.logits.dtype)


def figures_of_candidates(
    vma: VMA, memory: EncodedMemory, x: Tensor, candidates: Tensor, per_slot: int, max_decodes: int
) -> dict[str, Tensor]:
    """Computes the figures of `diagnose` for the slots found, `(B, k)`, with `per_slot` draws at each and as many at
    all others."""
    size, kept = candidates.shape
    p = vma.address_prior(memory)
    log_prior = p.log_prob(candidates.mT).mT
    others, log_left = draw_others(p, candidates, 2 * per_slot * kept)
    counts = torch.tensor([per_slot] * kept + [per_slot * kept], device=x.device).expand(size, -1)
    log_left = log_left.unsqueeze(-1)
    weights = weights_in_strata(
        vma, memory, x, candidates, log_prior, counts, (others, log_left.expand_as(others)), max_decodes
    )
    estimate, log_means = weights.estimate.honest, weights.log_means.mT
    slot_evidence = log_means[:, :-1] - log_prior
    outside = weights.log_weights[per_slot * kept :].mT - log_left
    in_use = p.logits if memory.mask is None else p.logits[memory.mask]
    # The upper bounds assume that the guide has the order right: no other slot explains the target better than these.
    most = slot_evidence.amin(-1)
    return {
        **estimate.figures(),
        **top_k_bounds(slot_evidence, log_prior, most, in_use.min()),
        "rest_share": (log_means[:, -1] - estimate.log_evidence).exp(),
        "rest_above": (outside > most.unsqueeze(-1)).to(x.dtype).mean(-1),  # none where no slot is left: it is NaN
        "address_exact": (log_means[:, :-1] - estimate.log_evidence.unsqueeze(-1)).exp(),
    }


def top_k_bounds(
    log_likelihood: Tensor,  # log p(x | m_a) of the slots in T, (*, k)
    log_prior: Tensor,  # log p(a | M) of these, normalised over all slots
    log_likelihood_most: Tensor,  # log c, (*)
    log_prior_least: Tensor,  # the logarithm of the smallest prior of a slot
) -> dict[str, Tensor]:
    r"""Bounds the evidence and the exact information gain, in nats `(*)`, by some slots :math:`T` of many.

    The rest has the prior mass :math:`1 - p(T)`, and adds at most that times its largest likelihood :math:`c`:

    .. math:: \log \sum_{a \in T} p_a \ell_a \le \log p(x | M) \le
        \log \left( \sum_{a \in T} p_a \ell_a + (1 - p(T))\, c \right)

    With :math:`r` the posterior share of the rest and :math:`G_T = KL(p(a | x, a \in T) \| p(a | M))`, the gain is
    :math:`(1 - r) G_T + r G_R + r \log r + (1 - r) \log (1 - r)`. The gain within the rest, :math:`G_R`, lies between
    :math:`-\log (1 - p(T))` and minus the logarithm of its smallest prior.
    """
    log_joint = log_likelihood + log_prior
    log_rest_prior = torch.log1p(-log_prior.exp().sum(-1).clamp(max=1.0))
    lower = log_joint.logsumexp(-1)
    upper = torch.logaddexp(lower, log_rest_prior + log_likelihood_most)
    most = torch.sigmoid(log_rest_prior + log_likelihood_most - lower)  # the share of the rest
    posterior = log_joint.log_softmax(-1)
    # A slot without any evidence has a share of zero, and 0 log 0 is 0.
    inside = (posterior.exp() * (posterior - log_prior).masked_fill(posterior.isneginf(), 0.0)).sum(-1)

    def gain(share: Tensor, outside: Tensor) -> Tensor:
        mixing = torch.special.entr(share) + torch.special.entr(1 - share)
        return (1 - share) * inside + torch.where(share > 0, share * outside, 0.0) - mixing

    # Convex in the share: least where the derivative is zero, if that is in reach, and greatest at an end.
    best = torch.sigmoid(inside + log_rest_prior).clamp(max=most)
    none = torch.zeros_like(most)
    return {
        "log_evidence_lower": lower,
        "log_evidence_upper": upper,
        "information_gain_exact_lower": F.relu(gain(best, -log_rest_prior)),
        "information_gain_exact_upper": torch.maximum(gain(none, -log_prior_least), gain(most, -log_prior_least)),
    }
