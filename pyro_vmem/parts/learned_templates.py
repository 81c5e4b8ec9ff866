"""Learned templates, in place of the given ones or beside them."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vmem._utils.checks import Size
from pyro_vmem.memory import Memory
from pyro_vmem.parts.part import Part

__all__ = ["ExtraTemplates", "LearnedTemplates", "Templates"]

NO_CLASS = -1


class Templates(Part):
    """Templates that belong to the model: `VMA(..., templates=...)` applies this part to each memory it is given.

    Arguments:
        num_slots: The number of learned slots.
        event_shape: The shape of one template.

    Attributes:
        values: The learned templates, a parameter with shape `(num_slots, *event_shape)`. They start between 0 and 1;
            to start from data: `values.data.copy_(x[:num_slots])`.
    """

    def __init__(self, num_slots: Size, event_shape: Sequence[Size]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.values = nn.Parameter(torch.rand(num_slots, *self.event_shape))

    @abc.abstractmethod
    def forward(self, memory: Memory) -> Memory:
        """
        Arguments:
            memory: The memory that the model is given.

        Returns:
            The memory that the model reads. If the given one has labels, learned slots have the label -1.
        """

    def _labels(self, memory: Memory, leading: Sequence[int] = ()) -> Tensor | None:
        """The labels of the learned slots, if the given ones have any."""
        labels = memory.labels
        return None if labels is None else labels.new_full((*leading, len(self.values)), NO_CLASS)


class LearnedTemplates(Templates):
    r"""A learned memory: :math:`M = (m_1, \ldots, m_S)` are parameters, and the given memory is ignored.

    The model is then a mixture of :math:`S` components, one per template. With :class:`UniformPrior` it has the prior
    of a VampPrior autoencoder, whose latent is the pair of address and :math:`z`.

    References:
        | VAE with a VampPrior (Tomczak, Welling, 2018), section 2, on learned pseudo-inputs
        | https://arxiv.org/abs/1705.07120

    Example:
        >>> from pyro_vmem import VMA
        >>> vma = VMA.for_vectors(5, templates=LearnedTemplates(16, (5,)))
        >>> vma.encode(Memory(torch.zeros(1, 5)))
        EncodedMemory(16 slots of (5,), shared)
    """

    def forward(self, memory: Memory) -> Memory:
        return Memory(self.values, self._labels(memory), per_datapoint=False)


class ExtraTemplates(Templates):
    r"""Learned slots after the given ones, for targets that no given template explains.

    The given slots keep their addresses. A learned slot explains targets whose class is missing from memory: "none of
    these".

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017) https://arxiv.org/abs/1709.07116
        | Slots that stand for "none of these" are from its public implementation, which has two.

    Raises:
        ValueError: When called, if a given slot has the label -1.

    Example:
        >>> from pyro_vmem import VMA
        >>> vma = VMA.for_vectors(5, templates=ExtraTemplates(2, (5,)))
        >>> memory = Memory(torch.rand(3, 5), labels=torch.tensor([0, 1, 1]))
        >>> vma.encode(memory).labels
        tensor([ 0,  1,  1, -1, -1])
        >>> vma.classify(memory, torch.rand(7, 5)).shape  # "none of these", 0 and 1
        torch.Size([7, 3])
    """

    def forward(self, memory: Memory) -> Memory:
        """As of :class:`Templates`; a `ValueError` if a given slot has the label -1."""
        if memory.labels is not None and bool((memory.labels == NO_CLASS).any()):
            raise ValueError(
                f"memory: a slot has the label {NO_CLASS}, which is that of learned slots, and would join them. "
                "Number its classes from 0 on."
            )
        leading = memory.batch_shape
        values = self.values.expand(*leading, *self.values.shape)
        templates = torch.cat([memory.templates, values.to(memory.templates.dtype)], dim=len(leading))
        labels, mask = self._labels(memory, leading), memory.mask
        if labels is not None:
            assert memory.labels is not None
            labels = torch.cat([memory.labels, labels], dim=-1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(*leading, len(self.values))], dim=-1)
        return Memory(templates, labels, mask, per_datapoint=memory.per_datapoint)
