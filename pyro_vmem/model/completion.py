"""Completion: draws the missing part of targets, given the observed part and a memory."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from pyro_vmem.distributions.sparse_categorical import top
from pyro_vmem.memory import EncodedMemory, Template
from pyro_vmem.parts import AddressGuide, AddressPrior, LatentGuide, LatentPrior, Likelihood

__all__ = ["complete"]

BLANK_SLOTS = 256  # The mean of this many slots fills the missing part when the guide chooses the slots to try.


class _Model(Protocol):
    """The parts of a :class:`VMA` that a completion needs."""

    address_prior: AddressPrior
    latent_prior: LatentPrior
    likelihood: Likelihood
    address_guide: AddressGuide
    latent_guide: LatentGuide

    def encode_x(self, x: Tensor) -> Template:
        """Targets with their features."""


def complete(
    vma: _Model, memory: EncodedMemory, x: Tensor, known: Tensor, num_particles: int, rounds: int, mean: bool
) -> Tensor:
    r"""See `VMA.complete`.

    Slot :math:`s` has :math:`n` particles, whose completed targets are :math:`x_1, \ldots, x_n`. The weight of a
    particle :math:`z` is

    .. math:: w = \frac{p(s | M)\, p(z | m_s)\, p(x_{obs} | z, m_s)}{\frac{1}{n} \sum_j q(z | x_j, m_s)}

    Its mean is :math:`p(s, x_{obs} | M)`. In the first round :math:`q` is the prior. The sum over all particles is the
    deterministic mixture of Owen and Zhou (2000). With a single :math:`x_j`, :math:`q` would be narrower than the
    posterior given :math:`x_{obs}`, and few particles would have all the weight.

    Targets `x` and `known`, both `(B, *event)`, are zero and false where a value is missing.
    """
    slots = _candidates(vma, memory, x, known, num_particles)  # (C, B)
    each = math.ceil(num_particles / len(slots))
    template = memory.read(slots)
    log_prior = vma.address_prior(memory).log_prob(slots)
    p_z = vma.latent_prior(template)
    z = p_z.sample(torch.Size([each]))  # (n, C, B, D)
    log_q = p_z.log_prob(z)
    for round_ in range(rounds + 1):
        p_x = vma.likelihood(z, template)
        filled, log_known = vma.likelihood.fill(p_x, x, known, mean and round_ == rounds)
        log_weights = log_prior + p_z.log_prob(z) + log_known - log_q  # (n, C, B)
        if round_ == rounds:
            break
        # Each slot resamples its own particles. Slots are compared at the end only.
        replacements = torch.distributions.Categorical(logits=log_weights.movedim(0, -1)).sample(torch.Size([each]))
        filled = _rows(filled, replacements)
        q_z = vma.latent_guide(vma.encode_x(filled), template)
        z = q_z.sample()
        # Of each draw under all n distributions, (n draws, n distributions, C, B).
        log_q = torch.stack([q_z.log_prob(one) for one in z]).logsumexp(1) - math.log(each)
    chosen = torch.distributions.Categorical(logits=log_weights.flatten(0, 1).mT).sample()
    return _rows(filled.flatten(0, 1).unsqueeze(1), chosen.reshape(1, 1, -1))[0, 0]


def _candidates(vma: _Model, memory: EncodedMemory, x: Tensor, known: Tensor, most: int) -> Tensor:
    """The slots to try, `(C, B)`: all, or the most probable ones by the guide."""
    if memory.num_slots <= most:
        return torch.arange(memory.num_slots, device=x.device).unsqueeze(-1).expand(-1, len(x))
    some = vma.address_prior(memory).sample(torch.Size([BLANK_SLOTS]))
    some = some if memory.per_datapoint else some.unsqueeze(-1)
    target = vma.encode_x(torch.where(known, x, memory.memory.read(some).mean(0)))
    q = vma.address_guide(memory, target)
    return top(q, min(most, len(q.enumerate_support()))).mT


def _rows(values: Tensor, which: Tensor) -> Tensor:
    """The values `(n, C, B, *event)` at indices `which`, `(m, C, B)`, along the first dim."""
    index = which.reshape(*which.shape, *[1] * (values.dim() - 3)).expand(*which.shape, *values.shape[3:])
    return values.gather(0, index)
