"""What address priors and address guides are, and the distribution over slots that they return."""

from __future__ import annotations

import abc

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vmem._utils.precision import full_precision
from pyro_vmem.distributions import excluding
from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.parts.part import Part

__all__ = ["AddressGuide", "AddressPrior", "over_slots", "unit"]


def over_slots(logits: Tensor, memory: Memory) -> dist.Categorical:
    r"""The categorical distribution over the slots of a memory; slots that are not in use have probability zero.

    Arguments:
        logits: Unnormalised log-probabilities, with shape `(*, S)`.
        memory: The memory :math:`M`.

    Returns:
        A categorical with batch shape `(*)`.

    Example:
        >>> import torch
        >>> from pyro_vmem import Memory
        >>> memory = Memory(torch.rand(3, 8), mask=torch.tensor([True, True, False]))
        >>> over_slots(torch.zeros(3), memory).probs
        tensor([0.5000, 0.5000, 0.0000])
    """
    logits = full_precision(logits)
    if memory.mask is not None:
        logits = excluding(logits, ~memory.mask)
    return dist.Categorical(logits=logits)


class AddressPrior(Part):
    r"""An address prior :math:`p(a | M)`."""

    @abc.abstractmethod
    def forward(self, memory: EncodedMemory) -> dist.Categorical:
        r"""
        Arguments:
            memory: The memory :math:`M`, with :math:`S` slots.

        Returns:
            A categorical over :math:`S` slots, with batch shape `()` for a shared memory, else `(B,)`.
        """


class AddressGuide(Part):
    r"""An address guide :math:`q(a | M, x)`: the recogniser of the slot."""

    @abc.abstractmethod
    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        r"""
        Arguments:
            memory: The memory :math:`M`, with :math:`S` slots.
            x: The target with its features, with leading shape `(*, B)`.

        Returns:
            A categorical over :math:`S` slots, with batch shape `(*, B)`.
        """


def unit(vectors: Tensor) -> Tensor:
    """Vectors `(*, F)` divided by their norm, in full precision."""
    return nn.functional.normalize(full_precision(vectors), dim=-1)
