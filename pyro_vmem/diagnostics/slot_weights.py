"""Importance weights of a VMA: at every slot, at given addresses, and of draws from its guide.

All estimates of the evidence and all figures on single slots are computed from these.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro.distributions import Distribution
from torch import Tensor
from torch.distributions import kl_divergence
from tqdm.auto import tqdm

from pyro_vmem._utils.checks import Count
from pyro_vmem.diagnostics.information import information_gain
from pyro_vmem.diagnostics.weights import Estimate, StratifiedWeights, strata_of
from pyro_vmem.distributions import MixedCategorical, TruncatedCategorical
from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.model import VMA

__all__ = ["slot_log_evidence"]


# Every slot


class SlotWeights(NamedTuple):
    """The evidence of each target at every slot, in nats."""

    log_prior: Tensor  # log p(a | M), (B, S); -inf for slots that are not in use
    log_evidence: Tensor  # estimates of log p(x | m_a), (B, S); -inf for slots without samples
    standard_error: Tensor  # their Monte Carlo errors, (B, S); NaN for a single sample
    estimate: Estimate  # of log p(x | M) by summing the slots

    @property
    def log_joint(self) -> Tensor:
        r""":math:`\log p(a | M)\, p(x | m_a)`, with shape `(B, S)`: the logits of the exact address posterior."""
        return self.log_prior + self.log_evidence


@torch.no_grad()
def slot_weights(
    vma: VMA,
    memory: Memory,
    x: Tensor,
    num_samples: int,
    *,
    slots: Tensor | None = None,
    max_decodes: Count = 1024,
    progress: bool = False,
) -> SlotWeights:
    """Computes importance weights of samples of z at every slot in use, or at the given slots `(n,)`."""
    encoded = vma.encode(memory)
    slots = slots_in_use(encoded) if slots is None else slots
    log_prior = log_address_prior(vma, encoded, len(x))
    log_evidence, errors = torch.full_like(log_prior, -math.inf), torch.zeros_like(log_prior)
    estimates = []
    for rows, chunk, targets in chunks(encoded, x, len(slots), max_decodes, progress):
        log_weights = log_weights_at_slots(vma, chunk, targets, slots, num_samples, max_decodes)
        log_evidence[rows, slots] = log_weights.logsumexp(0).mT - math.log(num_samples)
        error = StratifiedWeights.unstratified(log_weights.flatten(1)).standard_error
        errors[rows, slots] = error.reshape(log_weights.shape[1:]).mT
        estimates.append(StratifiedWeights.even(log_weights + log_prior[rows, slots].mT).estimate)
    return SlotWeights(log_prior, log_evidence, errors, Estimate.joined(estimates))


@torch.no_grad()
def slot_log_evidence(
    vma: VMA, memory: Memory, x: Tensor, num_samples: Count = 50, *, max_decodes: Count = 1024, progress: bool = False
) -> Tensor:
    r"""Estimates :math:`\log p(x | m_a)` of each target from each slot, in nats.

    With the address prior's logits added, these are the logits of the exact address posterior:
    :math:`p(a | x, M) \propto p(a | M)\, p(x | m_a)`.

    Arguments:
        num_samples: Samples of z per slot.

    Returns:
        Nats, with shape `(B, S)`, including learned slots. Slots that are not in use have an estimate too, and no
        weight in the prior.

    Raises:
        ValueError: If memory or x do not fit the model.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> slot_log_evidence(vma, Memory(torch.randn(10, 5)), torch.randn(3, 5)).shape
        torch.Size([3, 10])
    """
    vma.check(memory, x)
    encoded = vma.encode(memory)
    slots = torch.arange(encoded.num_slots, device=x.device)
    found = slot_weights(vma, encoded, x, num_samples, slots=slots, max_decodes=max_decodes, progress=progress)
    return found.log_evidence


def log_weights_at_slots(
    vma: VMA, memory: EncodedMemory, x: Tensor, slots: Tensor, num_samples: int, max_decodes: int
) -> Tensor:
    r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` of samples of z at each of some slots, `(n, S, B)`."""
    target = vma.encode_x(x)
    parts = []
    for some in slots.split(max(1, max_decodes // len(x))):
        at_once = max(1, max_decodes // (len(some) * len(x)))
        # The guide of z runs once per slot and target, for all samples.
        template = memory.read(some.unsqueeze(-1))
        q_z, p_z = vma.latent_guide(target, template), vma.latent_prior(template)
        draws = []
        for start in range(0, num_samples, at_once):
            z = q_z.sample(torch.Size([min(at_once, num_samples - start)]))
            draws.append(p_z.log_prob(z) - q_z.log_prob(z) + vma.likelihood(z, template).log_prob(x))
        parts.append(torch.cat(draws))
    return torch.cat(parts, 1)


# Given addresses


def latents_at(
    vma: VMA, memory: EncodedMemory, target: Template, a: Tensor, max_decodes: int
) -> Iterator[tuple[Tensor, Tensor, Distribution]]:
    r"""Draws z at addresses `(K, B)`; also returns :math:`\log q(z | x, m_a) / p(z | m_a)` and the log-likelihood."""
    for some in a.split(max(1, max_decodes // a.shape[-1])):
        template = memory.read(some)
        q_z = vma.latent_guide(target, template)
        z = q_z.sample()
        yield z, q_z.log_prob(z) - vma.latent_prior(template).log_prob(z), vma.likelihood(z, template)


def log_weights_at(vma: VMA, memory: EncodedMemory, x: Tensor, target: Template, a: Tensor, max_decodes: int) -> Tensor:
    r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` of one draw of z at each address `(K, B)`; in nats."""
    return torch.cat([p_x.log_prob(x) - kl_z for _, kl_z, p_x in latents_at(vma, memory, target, a, max_decodes)])


def weights_in_strata(
    vma: VMA,
    memory: EncodedMemory,
    x: Tensor,
    slots: Tensor,
    log_prior: Float[Tensor, "..."],
    counts: Tensor,
    others: tuple[Tensor, Tensor] | None,
    max_decodes: int,
) -> StratifiedWeights:
    r"""Weighs draws for a sum over slots: each of the slots `(B, k)` is a stratum, and all others are sampled.

    `counts` are the draws of each stratum, with a last one for the others. `others` are as many draws of other slots as
    there are draws in all, `(B, K)`, and :math:`\log p(a | M)` minus the log probability of drawing each.
    """
    stratum = strata_of(counts)
    chosen = stratum.clamp(max=slots.shape[-1] - 1)
    a, log_ratio = slots.gather(-1, chosen), log_prior.gather(-1, chosen)
    if others is not None:
        is_other = stratum == slots.shape[-1]
        a, log_ratio = torch.where(is_other, others[0], a), torch.where(is_other, others[1], log_ratio)
    log_weights = log_weights_at(vma, memory, x, vma.encode_x(x), a.mT, max_decodes)
    return StratifiedWeights(log_ratio.mT + log_weights, stratum.mT, counts.mT)


# Draws from the guide


@dataclass(frozen=True, eq=False)
class GuideDraws:
    r"""K draws of :math:`a, z \sim q(a | M, x)\, q(z | x, m_a)` for each of B targets; log-probabilities in nats."""

    a: Tensor  # addresses, (K, B)
    z: Tensor  # latents, (K, B, D)
    kl_z: Tensor  # log q(z | x, m_a) - log p(z | m_a), (K, B)
    log_likelihood: Tensor  # log p(x | z, m_a), (K, B)
    log_ratio: Tensor  # log p(a | M) - log q(a | M, x), (K, B)
    information_gain: Tensor  # KL(q(a | M, x) || p(a | M)), (B,)
    address_entropy: Tensor  # of q(a | M, x), (B,)
    log_q: Tensor  # log q(a | M, x), (B, S)
    log_p: Tensor  # log p(a | M), (B, S)
    # With an index, the S slots that the guide found, best first, (B, S). Then log_q and log_p are of these.
    candidates: Tensor | None = None
    predicted: Tensor | None = None  # a draw from each p(x | z, m_a), (K, B, *event), on request

    @property
    def log_weights(self) -> Tensor:
        r""":math:`\log p(x, a, z | M) - \log q(a, z | x, M)`, with shape `(K, B)`."""
        return self.log_likelihood + self.log_ratio - self.kl_z


@torch.no_grad()
def draw_from_guide(
    vma: VMA,
    memory: EncodedMemory,
    x: Tensor,
    num_samples: int,
    *,
    predict: bool = False,
    max_decodes: Count = 1024,
    progress: bool = False,
) -> GuideDraws:
    """Draws from the guide of each target, and with `predict` an observation at each draw."""
    of_draws: list[dict[str, Tensor]] = []
    of_targets: list[dict[str, Tensor]] = []
    for _, chunk, targets in chunks(memory, x, num_samples, max_decodes, progress):
        target = vma.encode_x(targets)
        q, p = address_distributions(vma, chunk, target)
        a = q.sample(torch.Size([num_samples]))
        drawn = [
            {"z": z, "kl_z": kl_z, "log_likelihood": p_x.log_prob(targets)}
            | ({"predicted": p_x.sample()} if predict else {})
            for z, kl_z, p_x in latents_at(vma, chunk, target, a, max_decodes)
        ]
        of_draws.append(joined(drawn) | {"a": a, "log_ratio": p.log_prob(a) - q.log_prob(a)})
        of_targets.append(_of_addresses(q, p, chunk))
    return GuideDraws(**joined(of_draws, dim=1), **joined(of_targets))


def joined(rows: list[dict[str, Tensor]], dim: int = 0) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows], dim) for name in rows[0]}


def _of_addresses(
    q: torch.distributions.Categorical, p: torch.distributions.Categorical, memory: EncodedMemory
) -> dict[str, Tensor]:
    """The figures of address guide and prior; nothing has the size of a memory that is searched by an index."""
    if memory.index is None:
        log_q, log_p = q.logits, p.logits.expand_as(q.logits)
        gain = information_gain(log_q, log_p)
        return {"information_gain": gain, "address_entropy": q.entropy(), "log_q": log_q, "log_p": log_p}
    candidates = found_slots(q)
    return {
        "information_gain": kl_divergence(q, p),
        "address_entropy": q.entropy(),
        "log_q": q.log_prob(candidates.mT).mT,
        "log_p": p.log_prob(candidates.mT).mT,
        "candidates": candidates,
    }


# Addresses


def address_distributions(
    vma: VMA, memory: EncodedMemory, target: Template
) -> tuple[torch.distributions.Categorical, torch.distributions.Categorical]:
    """Address guide and prior; raises a `ValueError` for an index and a guide that does not name the slots it found."""
    q = vma.address_guide(memory, target)
    if memory.index is not None and not isinstance(q, TruncatedCategorical | MixedCategorical):
        raise ValueError(
            f"vma: its address guide, {vma.address_guide!r}, does not say which slots it found. With an index, use "
            "IndexedGuide(...), or a DefensiveGuide of one."
        )
    return q, vma.address_prior(memory)


def log_address_prior(vma: VMA, memory: EncodedMemory, num_targets: int) -> Tensor:
    r""":math:`\log p(a | M)` of each target, with shape `(B, S)`; `-inf` for slots that are not in use."""
    log_prior = vma.address_prior(memory).logits.expand(num_targets, -1)
    # A very small prior is not enough: the evidence of a slot could outweigh it.
    return log_prior if memory.mask is None else log_prior.masked_fill(~memory.mask, -math.inf)


def found_slots(q: Any, k: int | None = None) -> Tensor:
    """The slots that a guide found in an index, or the `k` most probable of these, best first: `(B, k)`."""
    found: Tensor = q.kept_values
    log_q = q.log_prob(found.mT).mT
    return found.gather(-1, log_q.topk(min(k or log_q.shape[-1], log_q.shape[-1]), dim=-1).indices)


def slots_in_use(memory: Memory) -> Tensor:
    """The slots that the memory of at least one datapoint uses."""
    if memory.mask is None:
        return torch.arange(memory.num_slots, device=memory.device)
    return memory.mask.reshape(-1, memory.num_slots).any(0).nonzero().squeeze(-1)


# Shared by all of these functions


def chunks(
    memory: EncodedMemory, x: Tensor, decodes_each: int, max_decodes: int, progress: bool = False
) -> Iterator[tuple[slice, EncodedMemory, Tensor]]:
    """Yields rows, memory and targets of batches with at most `max_decodes` decoder passes each."""
    size = max(1, max_decodes // decodes_each)
    for start in tqdm(range(0, len(x), size), desc="evidence", unit="chunk", disable=not (progress and sys.stderr)):
        rows = slice(start, start + size)
        yield rows, memory.of_datapoints(rows), x[rows]


def warn_if_not_finite(values: Tensor, stacklevel: int = 5) -> None:
    """Warns of evidence that is NaN or infinite."""
    wrong = ~values.isfinite()
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        warnings.warn(
            f"log_evidence: {int(wrong.sum())} of {len(values)} estimates are not finite (target {first}: "
            f"{float(values[first])}). Check that the weights of the model are finite; half precision and a diverged "
            "training are what makes them NaN.",
            stacklevel=stacklevel,
        )
