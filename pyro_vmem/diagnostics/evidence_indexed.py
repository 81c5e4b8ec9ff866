"""Evidence and information gain with a memory whose index is searched, as it is too large to sum over all its slots.

Slots that the guide found are summed, all others are sampled from the prior, or bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pyro_vmem.diagnostics.slot_weights import weights_in_strata
from pyro_vmem.memory import EncodedMemory, Memory
from pyro_vmem.model import VMA

__all__ = ["TopKBounds", "check_method", "draw_others", "figures_of_candidates", "top_k_bounds"]


def check_method(memory: Memory, method: str) -> None:
    """Raises a `ValueError` for a method that would look at every slot of a memory with an index."""
    if memory.index is not None and method not in ("sampled", "top-k"):
        raise ValueError(
            f"method: {method!r} looks at each of {memory.num_slots:,} slots for every target, and this memory has an "
            "index so that nothing looks at all. Use method='top-k', which sums the k most probable slots and samples "
            "the rest."
        )


def draw_others(p: torch.distributions.Categorical, excluded: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    r"""Draws from the address prior that are none of some slots.

    Unlike the guide, which may have found no others, the prior reaches all slots: an estimate with them is unbiased.

    Arguments:
        p: The prior :math:`p(a | M)` of a shared memory, with batch shape `()`.
        excluded: The slots that are not drawn, no two of a row the same, with shape `(B, k)`.
        num_draws: The number :math:`K` of draws.

    Returns:
        Draws `(B, K)`, and the logarithm of the probability of all that is not excluded, `(B,)`. Where that is zero,
        it is `-inf`, and what is drawn is any slot.
    """
    # By the distribution function, from which the steps of the excluded slots are taken out. Drawing again whatever is
    # excluded would never end where nothing else has any probability.
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
    """What :func:`diagnose` says from draws at each slot that the guide found, and as many of all others together.

    Arguments:
        vma: The model and its guide.
        memory: The memory of these targets, with an index.
        x: The targets, with shape `(B, *event)`.
        candidates: The slots that the guide found, with shape `(B, k)`.
        per_slot: Draws at each.
        max_decodes: How many decodes to hold in memory at once.

    Returns:
        Values `(B,)` and `(B, k)` by name.
    """
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
    # What is assumed of the others: that the guide has put nothing before what explains the target better.
    most = slot_evidence.amin(-1)
    bounds = top_k_bounds(slot_evidence, log_prior, most, in_use.min())
    return {
        "log_evidence": estimate.log_evidence,
        "log_evidence_se": estimate.standard_error,
        "ess": estimate.ess,
        "khat": estimate.khat,
        "log_evidence_lower": bounds.log_evidence_lower,
        "log_evidence_upper": bounds.log_evidence_upper,
        "information_gain_exact_lower": bounds.information_gain_lower,
        "information_gain_exact_upper": bounds.information_gain_upper,
        "rest_share": (log_means[:, -1] - estimate.log_evidence).exp(),
        "rest_above": (outside > most.unsqueeze(-1)).to(x.dtype).mean(-1),  # none where no slot is left: it is NaN
        "address_exact": (log_means[:, :-1] - estimate.log_evidence.unsqueeze(-1)).exp(),
    }


@dataclass(frozen=True, eq=False)
class TopKBounds:
    r"""Between what the evidence and the information gain lie, as :func:`top_k_bounds` found; nats, each `(*)`.

    Attributes:
        log_evidence_lower: :math:`\log \sum_{a \in T} p(a | M)\, p(x | m_a)`, as if the rest explained nothing.
        log_evidence_upper: The same with the most that the rest can add.
        information_gain_lower: The least that :math:`KL(p(a | x, M) \| p(a | M))` can be.
        information_gain_upper: The most.
        rest_share: The largest share of the rest in the address posterior, in [0, 1].
    """

    log_evidence_lower: Tensor
    log_evidence_upper: Tensor
    information_gain_lower: Tensor
    information_gain_upper: Tensor
    rest_share: Tensor


def top_k_bounds(
    log_likelihood: Float[Tensor, "*#batch k"],
    log_prior: Float[Tensor, "*#batch k"],
    log_likelihood_most: Float[Tensor, "*#batch"],
    log_prior_least: Float[Tensor, "*#batch"],
) -> TopKBounds:
    r"""Bounds on the evidence and on the exact information gain from some slots :math:`T` of many.

    The rest has the prior mass :math:`1 - p(T)`, and adds at most that times its largest likelihood :math:`c`:

    .. math:: \log \sum_{a \in T} p_a \ell_a \le \log p(x | M) \le
        \log \left( \sum_{a \in T} p_a \ell_a + (1 - p(T))\, c \right)

    With :math:`r` the posterior share of the rest and :math:`G_T = KL(p(a | x, a \in T) \| p(a | M))`, the gain is
    :math:`(1 - r) G_T + r G_R + r \log r + (1 - r) \log (1 - r)` where :math:`G_R`, the gain within the rest, lies
    between :math:`-\log (1 - p(T))` and minus the logarithm of its smallest prior.

    Arguments:
        log_likelihood: :math:`\log \ell_a = \log p(x | m_a)` of the slots in :math:`T`, with shape `(*, k)`.
        log_prior: :math:`\log p(a | M)` of these slots, normalised over all slots; broadcasts with that.
        log_likelihood_most: :math:`\log c`, what no other slot's :math:`\log p(x | m_a)` exceeds, with shape `(*)`.
            A model of binary data is never above 0. The smallest in :math:`T` is much tighter, and holds if the guide
            that chose :math:`T` has the order right: an assumption.
        log_prior_least: The logarithm of the smallest prior of a slot; :math:`-\log |M|` for the uniform one.

    Returns:
        The bounds.

    Raises:
        ValueError: If `log_prior` sums to more than 1.

    Example:
        >>> import math
        >>> log_prior = torch.full((2,), -math.log(1e6))
        >>> found = top_k_bounds(torch.tensor([-80.0, -90.0]), log_prior, torch.tensor(-100.0), log_prior.min())
        >>> print(f"{found.log_evidence_lower:.3f} {found.log_evidence_upper:.3f} {found.rest_share:.4f}")
        -93.815 -93.813 0.0021
    """
    log_joint = log_likelihood + log_prior
    mass = log_prior.exp().sum(-1)
    if bool((mass > 1 + 1e-4).any()):
        raise ValueError(
            f"log_prior: expected log-probabilities of some of all slots, but they sum to {mass.max():.3g}."
        )
    log_rest_prior = torch.log1p(-mass.clamp(max=1.0))
    lower = log_joint.logsumexp(-1)
    upper = torch.logaddexp(lower, log_rest_prior + log_likelihood_most)
    most = torch.sigmoid(log_rest_prior + log_likelihood_most - lower)  # the share of the rest
    posterior = log_joint.log_softmax(-1)
    inside = (posterior.exp() * (posterior - log_prior)).sum(-1)

    def gain(share: Tensor, outside: Tensor) -> Tensor:
        mixing = torch.special.entr(share) + torch.special.entr(1 - share)
        return (1 - share) * inside + torch.where(share > 0, share * outside, 0.0) - mixing

    # Convex in the share: least where the derivative is zero, if that is in reach, and greatest at an end.
    best = torch.sigmoid(inside + log_rest_prior).clamp(max=most)
    none = torch.zeros_like(most)
    return TopKBounds(
        log_evidence_lower=lower,
        log_evidence_upper=upper,
        information_gain_lower=F.relu(gain(best, -log_rest_prior)),
        information_gain_upper=torch.maximum(gain(none, -log_prior_least), gain(most, -log_prior_least)),
        rest_share=most,
    )
