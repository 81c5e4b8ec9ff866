"""Address priors p(a | M), and the distribution over slots that they and the address guides return."""

from __future__ import annotations

import abc

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pyro_vmem._utils.checks import Positive, Size
from pyro_vmem._utils.precision import full_precision, no_autocast
from pyro_vmem.distributions import UniformCategorical
from pyro_vmem.distributions.masking import excluding
from pyro_vmem.memory import EncodedMemory, Memory
from pyro_vmem.parts.layers import mlp, unit
from pyro_vmem.parts.part import Part

__all__ = [
    "AddressPrior",
    "ClassBalancedPrior",
    "ContentPrior",
    "LearnedPrior",
    "TemperedPrior",
    "UniformPrior",
    "over_slots",
]


def over_slots(logits: Float[Tensor, "... S"], memory: Memory) -> dist.Categorical:
    r"""A categorical distribution over the slots of a memory; slots that are not in use have probability zero.

    Arguments:
        logits: Unnormalised log-probabilities, with shape `(*, S)`.
        memory: The memory :math:`M`.

    Returns:
        A categorical with batch shape `(*)`.

    Raises:
        ValueError: If there are more or fewer logits than slots.

    Example:
        >>> from pyro_vmem import Memory
        >>> memory = Memory(torch.rand(3, 8), mask=torch.tensor([True, True, False]))
        >>> over_slots(torch.zeros(3), memory).probs
        tensor([0.5000, 0.5000, 0.0000])
    """
    if logits.shape[-1] != memory.num_slots:
        raise ValueError(f"logits: expected shape (*, {memory.num_slots}), one per slot, got {tuple(logits.shape)}.")
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


class UniformPrior(AddressPrior):
    r"""A uniform prior over the slots in use: :math:`p(a | M) = 1/S`.

    Example:
        >>> UniformPrior()(Memory(torch.rand(4, 8))).probs
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def forward(self, memory: Memory) -> dist.Categorical:
        if not memory.store.is_decoded:  # of which there may be millions
            like = torch.empty((), dtype=memory.dtype, device=memory.device)
            return UniformCategorical(memory.num_slots, memory.mask, int(memory.slots_in_use), full_precision(like))
        return over_slots(
            torch.zeros(*memory.batch_shape, memory.num_slots, dtype=memory.dtype, device=memory.device), memory
        )


class LearnedPrior(AddressPrior):
    r"""A prior by a learned query: :math:`p(a = s | M) \propto \exp(\langle e_s, q_0 \rangle / \|e_s\|)`.

    :math:`e_s` are the features of slot :math:`s`, and :math:`q_0` is the query. It starts as the uniform prior.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017), section 3.1
        | https://arxiv.org/abs/1709.07116

    Arguments:
        num_features: The length :math:`F` of a feature vector.

    Example:
        >>> from pyro_vmem import EncodedMemory, Template
        >>> memory = Memory(torch.rand(4, 8))
        >>> LearnedPrior(16)(EncodedMemory(memory, Template(memory.templates, torch.rand(4, 16)))).logits.shape
        torch.Size([4])
    """

    def __init__(self, num_features: Size = 128) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_features))

    def forward(self, memory: EncodedMemory) -> dist.Categorical:
        directions = unit(memory.features)
        with no_autocast(directions):
            return over_slots(directions @ self.query.to(directions.dtype), memory)


class ContentPrior(AddressPrior):
    r"""A prior that scores each template by a network: :math:`p(a = s | M) \propto \exp(w^\top f(e_s))`.

    :math:`e_s` are the features of slot :math:`s`, and :math:`f` is a multilayer perceptron. Unlike
    :class:`LearnedPrior` it can prefer several kinds of template at once. It starts near the uniform prior.

    References:
        | Attention-based Deep Multiple Instance Learning (Ilse, Tomczak, Welling, 2018), equation 8
        | https://arxiv.org/abs/1802.04712

    Arguments:
        num_features: The length :math:`F` of a feature vector.
        hidden: The width of the hidden layer.

    Example:
        >>> from pyro_vmem import EncodedMemory, Template
        >>> memory = Memory(torch.rand(4, 8))
        >>> ContentPrior(16)(EncodedMemory(memory, Template(memory.templates, torch.rand(4, 16)))).logits.shape
        torch.Size([4])
    """

    def __init__(self, num_features: Size = 128, hidden: Size = 64) -> None:
        super().__init__()
        # No bias at the end: one that all slots share changes nothing.
        self.network = nn.Sequential(mlp(num_features, hidden), nn.Tanh())
        self.score = nn.Linear(hidden, 1, bias=False)
        with torch.no_grad():
            self.score.weight.mul_(0.1)

    def forward(self, memory: EncodedMemory) -> dist.Categorical:
        hidden = full_precision(self.network(memory.features))
        with no_autocast(hidden):
            return over_slots(self.score(hidden).squeeze(-1), memory)


class ClassBalancedPrior(AddressPrior):
    r"""Gives every class in memory the same probability: :math:`p(a | M) = 1 / (C\, n_{c_a})`.

    :math:`n_c` is the number of slots in use with label :math:`c`, and :math:`C` the number of classes. A class with
    many templates is generated no more often than one with few.

    References:
        | Decoupling Representation and Classifier for Long-Tailed Recognition (Kang et al., 2020), equation 1, q = 0
        | https://arxiv.org/abs/1910.09217

    Example:
        >>> memory = Memory(torch.rand(4, 8), labels=torch.tensor([0, 0, 0, 7]))
        >>> ClassBalancedPrior()(memory).probs
        tensor([0.1667, 0.1667, 0.1667, 0.5000])
    """

    def forward(self, memory: Memory) -> dist.Categorical:
        """As of :class:`AddressPrior`; a `ValueError` if the memory has no labels."""
        if memory.labels is None:
            raise ValueError(
                "memory: ClassBalancedPrior needs labels, got none. Make it with Memory(templates, labels)."
            )
        classes, index = memory.labels.unique(return_inverse=True)
        in_use = torch.ones_like(index) if memory.mask is None else memory.mask.to(index.dtype)
        counts = index.new_zeros(*memory.batch_shape, len(classes)).scatter_add(-1, index, in_use)
        return over_slots(-counts.gather(-1, index).to(memory.dtype).log(), memory)


class TemperedPrior(AddressPrior):
    r"""Another prior, sharpened or flattened: :math:`p_\tau(a | M) \propto p(a | M)^{1/\tau}`.

    `vma.replace(address_prior=TemperedPrior(vma.address_prior, 0.5))` makes a trained model generate from its most
    typical slots. :math:`\tau \to \infty` is the uniform prior. The temperature is not learned.

    References:
        | On Calibration of Modern Neural Networks (Guo, Pleiss, Sun, Weinberger, 2017), section 4.2
        | https://arxiv.org/abs/1706.04599

    Arguments:
        inner: The prior :math:`p(a | M)`.
        temperature: The temperature :math:`\tau > 0`; below 1 sharpens.

    Example:
        >>> memory = Memory(torch.rand(4, 8), labels=torch.tensor([0, 0, 0, 7]))
        >>> TemperedPrior(ClassBalancedPrior(), 0.5)(memory).probs
        tensor([0.0833, 0.0833, 0.0833, 0.7500])
    """

    def __init__(self, inner: AddressPrior, temperature: Positive = 1.0) -> None:
        super().__init__()
        self.inner = inner
        self.temperature = temperature

    def forward(self, memory: EncodedMemory) -> dist.Categorical:
        return over_slots(self.inner(memory).logits / self.temperature, memory)
