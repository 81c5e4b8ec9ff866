"""How well each slot explains each target: samples of z at addresses, and the evidence of every slot."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from pyro.distributions import Distribution
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.model import VMA

__all__ = ["slot_log_evidence"]


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
        Nats, with shape `(B, S)`; slots that are not in use have an estimate too, and no weight in the prior.

    Raises:
        ValueError: If a number is less than 1, or memory or x do not fit the model.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> slot_log_evidence(vma, Memory(torch.randn(10, 5)), torch.randn(3, 5)).shape
        torch.Size([3, 10])
    """
    check_numbers(num_samples=num_samples, max_decodes=max_decodes)
    vma.check(memory, x)
    encoded, slots = vma.encode(memory), torch.arange(memory.num_slots, device=x.device)
    rows = []
    for chunk, targets in chunks(encoded, x, memory.num_slots, max_decodes, progress):
        log_weights = at_slots(vma, chunk, targets, slots, num_samples, max_decodes)
        rows.append(log_weights.logsumexp(0).mT - math.log(num_samples))
    return torch.cat(rows)


def at_slots(vma: VMA, memory: EncodedMemory, x: Tensor, slots: Tensor, num_samples: int, max_decodes: int) -> Tensor:
    r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` of samples of z at each of some slots.

    Arguments:
        vma: The model and its guide.
        memory: The memory of these targets.
        x: The targets, with shape `(B, *event)`.
        slots: The slots, with shape `(S,)`.
        num_samples: Samples `n` of z a slot.
        max_decodes: How many decodes to hold in memory at once. On a CPU more are slower, on a GPU faster.

    Returns:
        Nats, with shape `(n, S, B)`.
    """
    target = vma.encode_x(x)
    parts = []
    for some in slots.split(max(1, max_decodes // len(x))):
        at_once = max(1, max_decodes // (len(some) * len(x)))
        parts.append(_latent_log_weights(vma, x, target, memory.read(some.unsqueeze(-1)), num_samples, at_once))
    return torch.cat(parts, 1)


def at_addresses(vma: VMA, memory: EncodedMemory, x: Tensor, target: Template, a: Tensor, max_decodes: int) -> Tensor:
    r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` of one draw of z at each address `(K, B)`; in nats."""
    return torch.cat([drawn.p_x.log_prob(x) - drawn.kl_z for drawn in draws_at(vma, memory, target, a, max_decodes)])


class Drawn(NamedTuple):
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


def draws_at(vma: VMA, memory: EncodedMemory, target: Template, a: Tensor, max_decodes: int) -> Iterator[Drawn]:
    """One draw of z at each address `(K, B)`, of which at most `max_decodes` are decoded together."""
    for some in a.split(max(1, max_decodes // a.shape[-1])):
        template = memory.read(some)
        q_z = vma.latent_guide(target, template)
        z = q_z.sample()
        kl_z = q_z.log_prob(z) - vma.latent_prior(template).log_prob(z)
        yield Drawn(some, z, kl_z, vma.likelihood(z, template))


def _latent_log_weights(
    vma: VMA, x: Tensor, target: Template, template: Template, num_samples: int, at_once: int
) -> Tensor:
    """As above, of `num_samples` draws for each target and template, of which `at_once` are decoded together."""
    q_z, p_z = vma.latent_guide(target, template), vma.latent_prior(template)
    parts = []
    for start in range(0, num_samples, at_once):
        z = q_z.sample(torch.Size([min(at_once, num_samples - start)]))
        parts.append(p_z.log_prob(z) - q_z.log_prob(z) + vma.likelihood(z, template).log_prob(x))
    return torch.cat(parts)


def chunks(
    memory: EncodedMemory, x: Tensor, decodes_each: int, max_decodes: int, progress: bool
) -> Iterator[tuple[EncodedMemory, Tensor]]:
    """Some targets at a time with their memory, such that `decodes_each` a target are at most `max_decodes`."""
    size = max(1, max_decodes // decodes_each)
    for start in tqdm(range(0, len(x), size), desc="evidence", unit="chunk", disable=not progress):
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


def slots_in_use(memory: Memory) -> Tensor:
    """The slots that some datapoint's memory uses."""
    if memory.mask is None:
        return torch.arange(memory.num_slots, device=memory.device)
    return memory.mask.reshape(-1, memory.num_slots).any(0).nonzero().squeeze(-1)


def top_class(logits: Tensor, memory: Memory) -> Tensor:
    """The most probable class of each target, by logits of slots `(B, S)`; the memory has labels."""
    assert memory.labels is not None
    return memory.labels.unique()[memory.by_class(logits.softmax(-1)).argmax(-1)]
