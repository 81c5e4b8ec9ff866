"""Draws of address and latent from the guide of a VMA, with the terms of their importance weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vmem.diagnostics.slots import chunks, draws_at
from pyro_vmem.memory import EncodedMemory
from pyro_vmem.model import VMA

__all__ = ["GuideDraws", "draw_from_guide"]


@dataclass(frozen=True, eq=False)
class GuideDraws:
    r"""K draws of :math:`a, z \sim q(a | M, x)\, q(z | x, m_a)` for each of B targets; log-probabilities in nats.

    Attributes:
        a: Addresses, with shape `(K, B)`.
        z: Latents, with shape `(K, B, D)`.
        kl_z: :math:`\log q(z | x, m_a) - \log p(z | m_a)`, with shape `(K, B)`.
        log_likelihood: :math:`\log p(x | z, m_a)`, with shape `(K, B)`.
        q_logits: :math:`\log q(a | M, x)`, with shape `(B, S)`.
        p_logits: :math:`\log p(a | M)`, with shape `(B, S)`.
        predicted: A draw from each :math:`p(x | z, m_a)`, with shape `(K, B, *event)`, if it was asked for.
    """

    a: Tensor
    z: Tensor
    kl_z: Tensor
    log_likelihood: Tensor
    q_logits: Tensor
    p_logits: Tensor
    predicted: Tensor | None = None

    @property
    def log_weights(self) -> Tensor:
        r""":math:`\log p(x, a, z | M) - \log q(a, z | x, M)`, with shape `(K, B)`."""
        log_ratio = (self.p_logits - self.q_logits).gather(-1, self.a.mT).mT
        return self.log_likelihood + log_ratio - self.kl_z


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
        >>> from pyro_vmem.memory import Memory
        >>> vma = VMA.for_vectors(5, latent_dim=2)
        >>> draws = draw_from_guide(vma, vma.encode(Memory(torch.randn(10, 5))), torch.randn(3, 5), 7)
        >>> draws.a.shape, draws.z.shape, draws.log_weights.shape
        (torch.Size([7, 3]), torch.Size([7, 3, 2]), torch.Size([7, 3]))
    """
    rows = [
        _draw(vma, chunk, targets, num_samples, predict, max_decodes)
        for chunk, targets in chunks(memory, x, num_samples, max_decodes, progress)
    ]
    draws = {name: torch.cat([row[name] for row in rows], dim=1) for name in rows[0]}
    return GuideDraws(q_logits=draws.pop("q_logits")[0], p_logits=draws.pop("p_logits")[0], **draws)


def _draw(
    vma: VMA, memory: EncodedMemory, x: Tensor, num_samples: int, predict: bool, max_decodes: int
) -> dict[str, Tensor]:
    """Each of the fields, targets along the second dim."""
    target = vma.encode_x(x)
    q_a, p_a = vma.address_guide(memory, target), vma.address_prior(memory)
    addresses = q_a.sample(torch.Size([num_samples]))
    parts = []
    for drawn in draws_at(vma, memory, target, addresses, max_decodes):
        part = {"a": drawn.a, "z": drawn.z, "kl_z": drawn.kl_z, "log_likelihood": drawn.p_x.log_prob(x)}
        parts.append(part | ({"predicted": drawn.p_x.sample()} if predict else {}))
    fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return fields | {
        "q_logits": q_a.logits.unsqueeze(0),
        "p_logits": p_a.logits.expand_as(q_a.logits).unsqueeze(0),
    }
