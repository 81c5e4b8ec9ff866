"""Two bounds on the evidence, for targets that are drawn from the model itself.

A drawn target comes with an exact sample of its posterior, which turns a lower bound into an upper one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.random_state import seeded
from pyro_vmem.diagnostics.slot_weights import chunks, log_address_prior, log_weights_at_slots, slots_in_use
from pyro_vmem.memory import Memory
from pyro_vmem.model import VMA

__all__ = ["EvidenceBounds", "evidence_bounds"]


class EvidenceBounds(NamedTuple):
    r"""Both bounds of each target `(B,)`, in nats, and the targets `(B, *event)`, from :func:`evidence_bounds`.

    The mean of `lower` over draws is at most :math:`\log p(x | M)`, and that of `upper` is at least that.
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
    r"""Bounds :math:`\log p(x | M)` in nats, from below and above, for targets drawn from the model.

    The lower bound sums over all slots, :math:`\hat p = \sum_a p(a | M) \frac{1}{n} \sum_k w_{ak}`, with :math:`z_{ak}`
    drawn from the guide. The upper bound uses the same sum, but one draw at the true slot is the true :math:`z` of the
    target. This makes the mean of :math:`\log \hat p - \log p(x | M)` a KL divergence, which is not negative. The gap
    is small only for a good guide of z. The bounds hold for targets of the model, not for data that the model explains
    badly.

    References:
        | Sandwiching the marginal likelihood using bidirectional Monte Carlo (Grosse, Ghahramani, Adams, 2015)
        | https://arxiv.org/abs/1511.02543
        | Improving Mutual Information Estimation with Annealed and Energy-Based Bounds (Brekelmans et al., 2022),
        | section 3.1 | https://arxiv.org/abs/2303.06992

    Arguments:
        memory: The memory :math:`M`, shared by all targets.
        num_targets: The number of targets.
        num_samples: Samples :math:`n` of z per slot.
        seed: Seeds targets and samples and leaves the global random state as it is.

    Raises:
        ValueError: If the memory does not fit the model, or each datapoint has its own.

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
        for rows, _, targets in chunks(encoded, x, len(slots) * num_samples, max_decodes):
            weights = log_weights_at_slots(vma, encoded, targets, slots, num_samples, max_decodes)
            with_true = weights.clone()
            with_true[:1] = torch.where(at_true[..., rows], true[rows], weights[:1])
            log_p = log_address_prior(vma, encoded, len(targets))[:, slots].mT - math.log(num_samples)
            both = torch.stack([weights, with_true])
            bounds.append((log_p + both).flatten(1, 2).logsumexp(1))
    lower, upper = torch.cat(bounds, -1)
    return EvidenceBounds(lower, upper, x)
