"""Two bounds between which the evidence lies, for targets that are drawn from the model itself.

A drawn target brings an exact sample of its posterior along, and that turns a lower bound into an upper one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.random_state import seeded
from pyro_vmem.diagnostics.slot_weights import (
    chunks,
    log_address_prior,
    log_weights_at_slots,
    slots_in_use,
)
from pyro_vmem.memory import Memory
from pyro_vmem.model import VMA

__all__ = ["EvidenceBounds", "evidence_bounds"]


class EvidenceBounds(NamedTuple):
    r"""What :func:`evidence_bounds` found, one value a target, `(B,)`, in nats; each bounds in expectation.

    Attributes:
        lower: :math:`\log \hat p(x | M)`, whose mean over draws is at most :math:`\log p(x | M)`.
        upper: The same with the true :math:`z` among the draws, whose mean is at least that.
        x: The targets that were drawn, with shape `(B, *event)`.
    """

    lower: Tensor
    upper: Tensor
    x: Tensor


@torch.no_grad()
def evidence_bounds(
    vma: VMA,
    memory: Memory,
    num_targets: Count = 100,
    num_samples: Count = 50,
    *,
    seed: NonNegativeInt | None = None,
    max_decodes: Count = 1024,
) -> EvidenceBounds:
    r"""Bounds :math:`\log p(x | M)`, in nats, from both sides, for targets that the model draws.

    With :math:`a, z, x \sim p(a | M)\, p(z | m_a)\, p(x | z, m_a)` the pair a, z is a draw of the posterior of x. The
    estimate sums over all slots, :math:`\hat p = \sum_a p(a | M) \frac{1}{n} \sum_k w_{ak}`, with :math:`z_{ak}` of the
    guide. If one :math:`z_{ak}` at the true slot is the true :math:`z`, all draws come from a density that is
    :math:`\hat p / p(x | M)` times that of the guide, so that the mean of :math:`\log \hat p - \log p(x | M)` is a
    divergence, and not negative. The gap between both bounds is small only where the guide of z is good. It is measured
    on what the model draws, and says nothing of data that the model explains badly.

    References:
        | Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani, Adams, 2015)
        | https://arxiv.org/abs/1511.02543
        | Improving Mutual Information Estimation with Annealed and Energy-Based Bounds (Brekelmans et al., 2022),
        | section 3.1 | https://arxiv.org/abs/2303.06992

    Arguments:
        vma: The model and its guide.
        memory: The memory :math:`M`, which all targets share.
        num_targets: How many targets are drawn.
        num_samples: Samples :math:`n` of z a slot.
        seed: Seeds targets and samples, leaving the global random state as it is.
        max_decodes: How many decodes to hold in memory at once.

    Returns:
        Both bounds, in nats `(B,)`, and the targets.

    Raises:
        ValueError: If a number is less than 1, the memory does not fit the model, or each datapoint has its own.

    Example:
        >>> found = evidence_bounds(VMA.for_vectors(5), Memory(torch.randn(10, 5)), num_samples=5, seed=0)
        >>> bool(found.lower.mean() <= found.upper.mean())
        True
    """
    if memory.per_datapoint:
        raise ValueError("memory: expected one that all targets share, got one for each. Give that of one target.")
    encoded = vma.encode(memory)
    slots = slots_in_use(encoded)
    with seeded(seed):
        a = vma.address_prior(encoded).sample(torch.Size([num_targets]))
        template = encoded.read(a)
        z = vma.latent_prior(template).sample()
        p_x = vma.likelihood(z, template)
        x = p_x.sample()
        q_z = vma.latent_guide(vma.encode_x(x), template)
        true = vma.latent_prior(template).log_prob(z) - q_z.log_prob(z) + p_x.log_prob(x)
        # The first draw at the true slot: draws at a slot are alike, so it does not matter which one is the true z.
        at_true = (slots.unsqueeze(-1) == a).unsqueeze(0)
        bounds: list[Tensor] = []
        row = 0
        for _, targets in chunks(encoded, x, len(slots) * num_samples, max_decodes, False):
            rows = slice(row, row := row + len(targets))
            weights = log_weights_at_slots(vma, encoded, targets, slots, num_samples, max_decodes)
            with_true = weights.clone()
            with_true[:1] = torch.where(at_true[..., rows], true[rows], weights[:1])
            log_p = log_address_prior(vma, encoded, len(targets))[:, slots].mT - math.log(num_samples)
            both = torch.stack([weights, with_true])
            bounds.append((log_p + both).flatten(1, 2).logsumexp(1))
    lower, upper = torch.cat(bounds, -1)
    return EvidenceBounds(lower, upper, x)
