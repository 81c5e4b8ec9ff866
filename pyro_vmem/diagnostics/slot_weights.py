"""Importance weights of a VMA: at every slot, at given addresses, and of draws from its guide.

Every estimate of the evidence, and all that is said of single slots, is made of these.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions import Distribution
from torch import Tensor
from torch.distributions import kl_divergence
from tqdm.auto import tqdm

from pyro_vmem.diagnostics.information import address_entropy, information_gain
from pyro_vmem.diagnostics.weights import Estimate, StratifiedWeights, standard_error, strata_of
from pyro_vmem.distributions import MixedCategorical, TruncatedCategorical
from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.model import VMA

__all__ = ["GuideDraws", "SlotWeights", "draw_from_guide", "slot_log_evidence", "slot_weights"]


# Every slot


@dataclass(frozen=True, eq=False)
class SlotWeights:
    r"""What :func:`slot_weights` found of each target at every slot, in nats.

    Attributes:
        log_prior: :math:`\log p(a | M)`, with shape `(B, S)`; `-inf` for slots that are not in use.
        log_evidence: Estimates of :math:`\log p(x | m_a)`, with shape `(B, S)`; `-inf` for slots without samples.
        standard_error: Their Monte Carlo errors, with shape `(B, S)`; NaN of a single sample.
        estimate: :math:`\log p(x | M)` by summing the slots, and how far it can be trusted.
    """

    log_prior: Tensor
    log_evidence: Tensor
    standard_error: Tensor
    estimate: Estimate

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
    max_decodes: int = 1024,
    progress: bool = False,
) -> SlotWeights:
    r"""Weights :math:`p(a | M)\, p(z | m_a)\, p(x | z, m_a) / q(z | x, m_a)` of as many samples of z at every slot.

    Arguments:
        vma: The model and its guide.
        memory: The memory :math:`M`.
        x: The targets, with shape `(B, *event)`.
        num_samples: Samples of z a slot.
        slots: Which slots, with shape `(n,)`. Default: those in use.
        max_decodes: How many decodes to hold in memory at once.
        progress: Whether to show a progress bar.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> found = slot_weights(vma, Memory(torch.randn(10, 5)), torch.randn(3, 5), num_samples=4)
        >>> found.log_joint.shape, found.estimate.log_evidence.shape
        (torch.Size([3, 10]), torch.Size([3]))
    """
    encoded = vma.encode(memory)
    slots = slots_in_use(encoded) if slots is None else slots
    log_prior = log_address_prior(vma, encoded, len(x))
    log_evidence, errors = torch.full_like(log_prior, -math.inf), torch.zeros_like(log_prior)
    estimates, row = [], 0
    for chunk, targets in chunks(encoded, x, len(slots), max_decodes, progress):
        log_weights = log_weights_at_slots(vma, chunk, targets, slots, num_samples, max_decodes)
        rows = slice(row, row := row + len(targets))
        log_evidence[rows, slots] = log_weights.logsumexp(0).mT - math.log(num_samples)
        errors[rows, slots] = standard_error(log_weights).mT
        estimates.append(StratifiedWeights.even(log_weights + log_prior[rows, slots].mT).estimate)
    return SlotWeights(log_prior, log_evidence, errors, Estimate.joined(estimates))


@torch.no_grad()
def slot_log_evidence(
    vma: VMA, memory: Memory, x: Tensor, num_samples: int = 50, *, max_decodes: int = 1024, progress: bool = False
) -> Tensor:
    r"""Estimates :math:`\log p(x | m_a)` of each target from each slot, in nats.

    Added to the address prior's logits it gives the exact address posterior:
    :math:`p(a | x, M) \propto p(a | M)\, p(x | m_a)`.

    Arguments:
        vma: The model and its guide.
        memory: The memory :math:`M`.
        x: The targets, with shape `(B, *event)`.
        num_samples: Samples of z a slot.
        max_decodes: How many decodes to hold in memory at once. On a CPU more are slower, on a GPU faster.
        progress: Whether to show a progress bar.

    Returns:
        Nats, with shape `(B, S)`, learned slots among them; slots that are not in use have an estimate too, and no
        weight in the prior.

    Raises:
        ValueError: If a number is less than 1, or memory or x do not fit the model.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> slot_log_evidence(vma, Memory(torch.randn(10, 5)), torch.randn(3, 5)).shape
        torch.Size([3, 10])
    """
    check_numbers(num_samples=num_samples, max_decodes=max_decodes)
    vma.check(memory, x)
    encoded = vma.encode(memory)
    slots = torch.arange(encoded.num_slots, device=x.device)
    found = slot_weights(vma, encoded, x, num_samples, slots=slots, max_decodes=max_decodes, progress=progress)
    return found.log_evidence


def log_weights_at_slots(
    vma: VMA, memory: EncodedMemory, x: Tensor, slots: Tensor, num_samples: int, max_decodes: int
) -> Tensor:
    r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` of samples of z at each of some slots `(S,)`: `(n, S, B)`.

    The guide of z is asked once for each slot and target, however many samples are drawn from it.
    """
    target = vma.encode_x(x)
    parts = []
    for some in slots.split(max(1, max_decodes // len(x))):
        at_once = max(1, max_decodes // (len(some) * len(x)))
        template = memory.read(some.unsqueeze(-1))
        q_z, p_z = vma.latent_guide(target, template), vma.latent_prior(template)
        draws = []
        for start in range(0, num_samples, at_once):
            z = q_z.sample(torch.Size([min(at_once, num_samples - start)]))
            draws.append(p_z.log_prob(z) - q_z.log_prob(z) + vma.likelihood(z, template).log_prob(x))
        parts.append(torch.cat(draws))
    return torch.cat(parts, 1)


# Given addresses


class LatentDraw(NamedTuple):
    r"""One draw of z by the guide at each of some addresses `(n, B)`.

    Attributes:
        a: The addresses.
        z: The latents, with shape `(n, B, D)`.
        kl_z: :math:`\log q(z | x, m_a) - \log p(z | m_a)`, with shape `(n, B)`; in nats.
        p_x: The likelihood there, with batch shape `(n, B)`.
    """

    a: Tensor
    z: Tensor
    kl_z: Tensor
    p_x: Distribution


def latents_at(vma: VMA, memory: EncodedMemory, target: Template, a: Tensor, max_decodes: int) -> Iterator[LatentDraw]:
    """One draw of z at each address `(K, B)`, of which at most `max_decodes` are decoded together."""
    for some in a.split(max(1, max_decodes // a.shape[-1])):
        template = memory.read(some)
        q_z = vma.latent_guide(target, template)
        z = q_z.sample()
        kl_z = q_z.log_prob(z) - vma.latent_prior(template).log_prob(z)
        yield LatentDraw(some, z, kl_z, vma.likelihood(z, template))


def log_weights_at(vma: VMA, memory: EncodedMemory, x: Tensor, target: Template, a: Tensor, max_decodes: int) -> Tensor:
    r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` of one draw of z at each address `(K, B)`; in nats."""
    return torch.cat([drawn.p_x.log_prob(x) - drawn.kl_z for drawn in latents_at(vma, memory, target, a, max_decodes)])


def weights_in_strata(
    vma: VMA,
    memory: EncodedMemory,
    x: Tensor,
    slots: Tensor,
    log_prior: Tensor,
    counts: Tensor,
    others: tuple[Tensor, Tensor] | None,
    max_decodes: int,
) -> StratifiedWeights:
    r"""Weights of the sum over all slots, of which some are summed and all others may be sampled.

    Arguments:
        vma: The model and its guide.
        memory: The memory of these targets.
        x: The targets, with shape `(B, *event)`.
        slots: The slots that are summed: each is a stratum, `(B, k)`.
        log_prior: :math:`\log p(a | M)` of these, `(B, k)`.
        counts: The draws of each stratum, `(B, k)`, or `(B, k + 1)` with others, which are the last stratum.
        others: As many draws of other slots as there are draws, and :math:`\log p(a | M)` minus the log probability of
            drawing each; `(B, K)` both.
        max_decodes: How many decodes to hold in memory at once.
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
    r"""K draws of :math:`a, z \sim q(a | M, x)\, q(z | x, m_a)` for each of B targets; log-probabilities in nats.

    Attributes:
        a: Addresses, with shape `(K, B)`.
        z: Latents, with shape `(K, B, D)`.
        kl_z: :math:`\log q(z | x, m_a) - \log p(z | m_a)`, with shape `(K, B)`.
        log_likelihood: :math:`\log p(x | z, m_a)`, with shape `(K, B)`.
        log_ratio: :math:`\log p(a | M) - \log q(a | M, x)`, with shape `(K, B)`.
        information_gain: :math:`KL(q(a | M, x) \| p(a | M))`, with shape `(B,)`.
        address_entropy: The entropy of :math:`q(a | M, x)`, with shape `(B,)`.
        log_q: :math:`\log q(a | M, x)`, with shape `(B, S)`.
        log_p: :math:`\log p(a | M)`, with shape `(B, S)`.
        candidates: With a memory that has an index, the `S` slots that the guide found, best first, `(B, S)`; the two
            above are of these. Else they are of all slots.
        predicted: A draw from each :math:`p(x | z, m_a)`, with shape `(K, B, *event)`, if it was asked for.
    """

    a: Tensor
    z: Tensor
    kl_z: Tensor
    log_likelihood: Tensor
    log_ratio: Tensor
    information_gain: Tensor
    address_entropy: Tensor
    log_q: Tensor
    log_p: Tensor
    candidates: Tensor | None = None
    predicted: Tensor | None = None

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
    max_decodes: int = 1024,
    progress: bool = False,
) -> GuideDraws:
    """Draws from the guide of each target.

    Arguments:
        vma: The model and its guide.
        memory: The encoded memory :math:`M`.
        x: The targets, with shape `(B, *event)`.
        num_samples: The number :math:`K` of draws.
        predict: Whether to draw an observation at each.
        max_decodes: How many decodes to hold in memory at once.
        progress: Whether to show a progress bar.

    Example:
        >>> vma = VMA.for_vectors(5, latent_dim=2)
        >>> draws = draw_from_guide(vma, vma.encode(Memory(torch.randn(10, 5))), torch.randn(3, 5), 7)
        >>> draws.a.shape, draws.z.shape, draws.log_weights.shape
        (torch.Size([7, 3]), torch.Size([7, 3, 2]), torch.Size([7, 3]))
    """
    of_draws: dict[str, list[Tensor]] = {}
    of_targets: dict[str, list[Tensor]] = {}
    for chunk, targets in chunks(memory, x, num_samples, max_decodes, progress):
        target = vma.encode_x(targets)
        q, p = address_distributions(vma, chunk, target)
        a = q.sample(torch.Size([num_samples]))
        drawn = [
            {"a": each.a, "z": each.z, "kl_z": each.kl_z, "log_likelihood": each.p_x.log_prob(targets)}
            | ({"predicted": each.p_x.sample()} if predict else {})
            for each in latents_at(vma, chunk, target, a, max_decodes)
        ]
        fields = {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}
        for name, value in (fields | {"log_ratio": p.log_prob(a) - q.log_prob(a)}).items():
            of_draws.setdefault(name, []).append(value)
        for name, value in _of_addresses(q, p, chunk).items():
            of_targets.setdefault(name, []).append(value)
    return GuideDraws(
        **{name: torch.cat(parts, 1) for name, parts in of_draws.items()},
        **{name: torch.cat(parts) for name, parts in of_targets.items()},
    )


def _of_addresses(
    q: torch.distributions.Categorical, p: torch.distributions.Categorical, memory: EncodedMemory
) -> dict[str, Tensor]:
    """What follows from guide and prior of the address; of a memory with an index, nothing is made of all slots."""
    if memory.index is None:
        log_q, log_p = q.logits, p.logits.expand_as(q.logits)
        gain, entropy = information_gain(log_q, log_p), address_entropy(log_q)
        return {"information_gain": gain, "address_entropy": entropy, "log_q": log_q, "log_p": log_p}
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
    """Address guide and prior; with an index, a guide that names the slots that it found.

    Raises:
        ValueError: If the memory has an index and the guide names none.
    """
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
    """The slots that some datapoint's memory uses."""
    if memory.mask is None:
        return torch.arange(memory.num_slots, device=memory.device)
    return memory.mask.reshape(-1, memory.num_slots).any(0).nonzero().squeeze(-1)


# What all of these functions share


def chunks(
    memory: EncodedMemory, x: Tensor, decodes_each: int, max_decodes: int, progress: bool
) -> Iterator[tuple[EncodedMemory, Tensor]]:
    """Some targets at a time with their memory, such that `decodes_each` a target are at most `max_decodes`."""
    size = max(1, max_decodes // decodes_each)
    for start in tqdm(range(0, len(x), size), desc="evidence", unit="chunk", disable=not (progress and sys.stderr)):
        rows = slice(start, start + size)
        yield memory.of_datapoints(rows), x[rows]


def check_numbers(**numbers: int) -> None:
    """Raises a `ValueError` for a number below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}.")


def warn_if_not_finite(values: Tensor, stacklevel: int = 4) -> None:
    """An estimate of the evidence that is no number is never silent."""
    wrong = ~values.isfinite()
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        warnings.warn(
            f"log_evidence: {int(wrong.sum())} of {len(values)} estimates are not finite (target {first}: "
            f"{float(values[first])}). Check that the weights of the model are finite; half precision and a diverged "
            "training are what makes them NaN.",
            stacklevel=stacklevel,
        )
