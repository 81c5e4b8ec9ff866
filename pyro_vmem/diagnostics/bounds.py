"""What a sum over some slots proves about the sum over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TopKBounds", "top_k_bounds"]


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
    log_likelihood: Tensor, log_prior: Tensor, log_likelihood_most: Tensor, log_prior_least: Tensor
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
