"""The evidence log p(x | M) of a model, by importance sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.vma import VMA

__all__ = ["log_evidence", "slot_log_evidence"]


@torch.no_grad()
def log_evidence(
    vma: VMA,
    memory: Memory,
    x: Tensor,
    num_samples: int = 1000,
    method: Literal["exact-address", "sampled"] = "exact-address",
    *,
    max_decodes: int = 4096,
    progress: bool = False,
) -> Tensor:
    r"""Estimates :math:`\log p(x | M)` of each target, in nats.

    - `"sampled"` draws (a, z) from the guide: :math:`\log \frac{1}{K} \sum_k w_k`, as the literature does.
    - `"exact-address"` sums over all slots and samples only z:
      :math:`\log \sum_a p(a | M) \frac{1}{K_a} \sum_k p(z_k | m_a) p(x | z_k, m_a) / q(z_k | x, m_a)`. It does not
      depend on the address guide, and is the tighter of the two unless slots are many and samples few.

    Both are lower bounds in expectation that tighten as samples are added. Both decode `num_samples` times a target.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016), equation 8
        | https://arxiv.org/abs/1509.00519

    Arguments:
        vma: The model and its guide.
        memory: The memory :math:`M`.
        x: The targets, with shape `(B, *event)`.
        num_samples: Decodes a target. `"exact-address"` gives each slot an equal share, at least one sample.
        method: `"exact-address"` or `"sampled"`.
        max_decodes: How many decodes to hold in memory at once.
        progress: Whether to show a progress bar.

    Returns:
        Nats, with shape `(B,)`; negated, the NLL.

    Raises:
        ValueError: If `method` is neither of the two, a number is less than 1, or memory or x do not fit the model.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> log_evidence(vma, Memory(torch.randn(10, 5)), torch.randn(3, 5), num_samples=50).shape
        torch.Size([3])
    """
    if method == "exact-address":
        per_slot = max(1, num_samples // memory.num_slots)
        slots = slot_log_evidence(vma, memory, x, per_slot, max_decodes=max_decodes, progress=progress)
        return (vma.address_prior(vma.encode(memory)).logits + slots).logsumexp(-1)
    if method != "sampled":
        raise ValueError(f"method: expected 'exact-address' or 'sampled', got {method!r}.")
    _check(vma, memory, x, num_samples, max_decodes)
    encoded = vma.encode(memory)
    rows = []
    for chunk, targets in _chunks(encoded, x, num_samples, max_decodes, progress):
        target = vma.encode_x(targets)
        q_a, p_a = vma.address_guide(chunk, target), vma.address_prior(chunk)
        total = torch.full((len(targets),), -math.inf, dtype=q_a.logits.dtype, device=x.device)
        at_once = max(1, max_decodes // len(targets))
        for start in range(0, num_samples, at_once):
            a = q_a.sample(torch.Size([min(at_once, num_samples - start)]))
            log_weight = p_a.log_prob(a) - q_a.log_prob(a) + _latent_log_weight(vma, targets, target, chunk.read(a))
            total = torch.logaddexp(total, log_weight.logsumexp(0))
        rows.append(total - math.log(num_samples))
    return torch.cat(rows)


@torch.no_grad()
def slot_log_evidence(
    vma: VMA, memory: Memory, x: Tensor, num_samples: int = 50, *, max_decodes: int = 4096, progress: bool = False
) -> Tensor:
    r"""Estimates :math:`\log p(x | m_a)` of each target from each slot, in nats.

    Added to the address prior's logits it gives the exact address posterior:
    :math:`p(a | x, M) \propto p(a | M)\, p(x | m_a)`.

    Arguments:
        vma: The model and its guide.
        memory: The memory :math:`M`.
        x: The targets, with shape `(B, *event)`.
        num_samples: Samples of z a slot.
        max_decodes: How many decodes to hold in memory at once.
        progress: Whether to show a progress bar.

    Returns:
        Nats, with shape `(B, S)`; slots that are not in use have an estimate too, and no weight in the prior.

    Raises:
        ValueError: If a number is less than 1, or memory or x do not fit the model.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> slot_log_evidence(vma, Memory(torch.randn(10, 5)), torch.randn(3, 5)).shape
        torch.Size([3, 10])
    """
    _check(vma, memory, x, num_samples, max_decodes)
    encoded = vma.encode(memory)
    rows = []
    for chunk, targets in _chunks(encoded, x, memory.num_slots, max_decodes, progress):
        target = vma.encode_x(targets)
        parts = []
        for slots in torch.arange(memory.num_slots, device=x.device).split(max(1, max_decodes // len(targets))):
            template = chunk.read(slots.unsqueeze(-1))
            log_weight = [_latent_log_weight(vma, targets, target, template) for _ in range(num_samples)]
            parts.append(torch.stack(log_weight).logsumexp(0) - math.log(num_samples))
        rows.append(torch.cat(parts).mT)
    return torch.cat(rows)


def _latent_log_weight(vma: VMA, x: Tensor, target: Template, template: Template) -> Tensor:
    r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` of one draw of z for each target and template."""
    q_z = vma.latent_guide(target, template)
    z = q_z.sample()
    weight: Tensor = vma.latent_prior(template).log_prob(z) - q_z.log_prob(z)
    return weight + vma.likelihood(z, template).log_prob(x)


def _chunks(
    memory: EncodedMemory, x: Tensor, decodes_each: int, max_decodes: int, progress: bool
) -> Iterator[tuple[EncodedMemory, Tensor]]:
    size = max(1, max_decodes // decodes_each)
    starts = range(0, len(x), size)
    bar = tqdm(starts, desc="evidence", unit="chunk", disable=not progress)
    for start in bar:
        rows = slice(start, start + size)
        yield memory.of_datapoints(rows), x[rows]


def _check(vma: VMA, memory: Memory, x: Tensor, num_samples: int, max_decodes: int) -> None:
    for name, value in (("num_samples", num_samples), ("max_decodes", max_decodes)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}.")
    vma.check(memory, x)
