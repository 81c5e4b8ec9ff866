"""Which slot: address priors p(a | M) and address guides q(a | M, x)."""

from __future__ import annotations

import abc
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.part import Part
from pyro_vmem.precision import full_precision, no_autocast

__all__ = [
    "AddressGuide",
    "AddressPrior",
    "LearnedPrior",
    "SimilarityGuide",
    "TruncatedGuide",
    "UniformPrior",
    "over_slots",
]

# The logit of a slot that is not in use. Its probability is exactly zero in every floating-point type, while its
# log-probability stays finite: with -inf, enumeration would compute 0 * (inf - inf).
UNUSED_LOGIT = -1e4


def over_slots(logits: Tensor, memory: Memory) -> dist.Categorical:
    r"""The categorical distribution over the slots of a memory; slots that are not in use have probability zero.

    Arguments:
        logits: Unnormalised log-probabilities, with shape `(*, S)`.
        memory: The memory :math:`M`.

    Returns:
        A categorical with batch shape `(*)`.

    Example:
        >>> memory = Memory(torch.rand(3, 8), mask=torch.tensor([True, True, False]))
        >>> over_slots(torch.zeros(3), memory).probs
        tensor([0.5000, 0.5000, 0.0000])
    """
    logits = full_precision(logits)
    if memory.mask is not None:
        logits = _excluding(logits, ~memory.mask)
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


class UniformPrior(AddressPrior):
    r"""Every slot in use is equally likely: :math:`p(a | M) = 1/S`.

    Example:
        >>> UniformPrior()(Memory(torch.rand(4, 8))).probs
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def forward(self, memory: Memory) -> dist.Categorical:
        return over_slots(memory.templates.new_zeros(*memory.batch_shape, memory.num_slots), memory)


class LearnedPrior(AddressPrior):
    r"""A prior that looks at the templates: :math:`p(a = s | M) \propto \exp(\langle e_s, q_0 \rangle / \|e_s\|)`.

    :math:`e_s` are the features of slot :math:`s`, :math:`q_0` is a learned query. It starts as the uniform prior.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017), section 3.1
        | https://arxiv.org/abs/1709.07116

    Arguments:
        num_features: The length :math:`F` of a feature vector.

    Example:
        >>> memory = Memory(torch.rand(4, 8))
        >>> LearnedPrior(16)(EncodedMemory(memory, Template(memory.templates, torch.rand(4, 16)))).logits.shape
        torch.Size([4])
    """

    def __init__(self, num_features: int = 128) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_features))

    def forward(self, memory: EncodedMemory) -> dist.Categorical:
        unit = _unit(memory.features)
        with no_autocast(unit):
            return over_slots(unit @ self.query.to(unit.dtype), memory)


class SimilarityGuide(AddressGuide):
    r"""The slot whose embedding is most similar to the target's.

    .. math:: q(a = s | M, x) \propto \exp(\langle h(m_s), g(x) \rangle / (\|h(m_s)\| \, \tau))

    `normalise` says which of the two embeddings is divided by its norm: the memory's (`"memory"`), both (`"cosine"`) or
    neither (`"dot"`). The paper's guide is `normalise="memory", temperature=1.0, tied=False`. The default has one
    embedding for both, so that before any training a target already looks up what resembles it: with weights of their
    own, there is nothing at first from which the lookup could be learned. One embedding of a shared memory serves the
    whole minibatch, so the cost is :math:`O(S B E)`.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017), section 3.2
        | https://arxiv.org/abs/1709.07116

    Arguments:
        num_features: The length :math:`F` of a feature vector, of templates as of targets.
        embed_dim: The length :math:`E` of an embedding.
        normalise: `"cosine"`, `"memory"` or `"dot"`.
        temperature: The temperature :math:`\tau > 0` to start from; it is learned.
        tied: Whether :math:`h` and :math:`g` share their weights.

    Raises:
        ValueError: If `normalise` is none of the three, or `temperature` is not positive.

    Example:
        >>> memory = Memory(torch.rand(4, 8))
        >>> encoded = EncodedMemory(memory, Template(memory.templates, torch.rand(4, 16)))
        >>> SimilarityGuide(16)(encoded, Template(torch.rand(3, 8), torch.rand(3, 16))).logits.shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        num_features: int = 128,
        embed_dim: int = 64,
        normalise: Literal["memory", "cosine", "dot"] = "cosine",
        temperature: float = 0.1,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if normalise not in ("memory", "cosine", "dot"):
            raise ValueError(f"normalise: expected 'memory', 'cosine' or 'dot', got {normalise!r}.")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}.")
        self.normalise = normalise
        self.embed_memory = nn.Linear(num_features, embed_dim)
        self.embed_x = self.embed_memory if tied else nn.Linear(num_features, embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    @property
    def temperature(self) -> Tensor:
        r"""The temperature :math:`\tau`."""
        return self.log_temperature.exp()

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        # Similarities decide between slots, so they are not rounded to half precision.
        keys = full_precision(self.embed_memory(memory.features))
        query = full_precision(self.embed_x(x.features))
        if self.normalise != "dot":
            keys = _unit(keys)
        if self.normalise == "cosine":
            query = _unit(query)
        with no_autocast(keys):
            logits = (keys @ query.unsqueeze(-1)).squeeze(-1) if memory.per_datapoint else query @ keys.mT
        return over_slots(logits / self.temperature, memory)


class TruncatedGuide(AddressGuide):
    r"""The :math:`k` most probable addresses of another guide, renormalised: :math:`q_k(a) \propto q(a)` on the top k.

    With `pyro.infer.TraceEnum_ELBO` and `config_enumerate(vma.guide, "parallel", expand=True)` it costs k decodes a
    target instead of one a slot, and its gradient is exact: the bound is that of the truncated posterior. Under a
    uniform prior :math:`KL(q_k \| p) = \log S - H(q_k)`.

    Arguments:
        inner: The guide whose addresses are truncated.
        k: How many addresses are kept, at least 1; of a smaller memory, all.

    Raises:
        ValueError: If `k` is less than 1.

    Example:
        >>> memory = Memory(torch.rand(20, 8))
        >>> encoded = EncodedMemory(memory, Template(memory.templates, torch.rand(20, 16)))
        >>> q = TruncatedGuide(SimilarityGuide(16), k=3)(encoded, Template(torch.rand(5, 8), torch.rand(5, 16)))
        >>> q.enumerate_support().shape, int((q.probs > 0).sum())
        (torch.Size([3, 5]), 15)
    """

    def __init__(self, inner: AddressGuide, k: int = 8) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}.")
        self.inner = inner
        self.k = k

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        logits = self.inner(memory, x).logits
        return TruncatedCategorical(logits, logits.topk(min(self.k, memory.num_slots), dim=-1).indices)


class TruncatedCategorical(dist.Categorical):
    """A categorical on some of its values, each row's own; enumeration visits those only.

    Arguments:
        logits: Unnormalised log-probabilities of all values, with shape `(*, S)`.
        support: The values that are kept, with shape `(*, k)`.

    Example:
        >>> TruncatedCategorical(torch.zeros(4), torch.tensor([1, 3])).probs
        tensor([0.0000, 0.5000, 0.0000, 0.5000])
    """

    def __init__(self, logits: Tensor, support: Tensor, validate_args: bool | None = None) -> None:
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, support, True)
        self.kept_values = support
        super().__init__(logits=_excluding(logits, ~kept), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedCategorical:
        new = self._get_checked_instance(TruncatedCategorical, _instance)
        new.kept_values = self.kept_values.expand(*batch_shape, -1)
        expanded: TruncatedCategorical = super().expand(batch_shape, new)
        return expanded

    def enumerate_support(self, expand: bool = True) -> Tensor:
        if not expand:
            raise ValueError(
                "expand: the values of a truncated categorical differ from row to row, so they cannot be enumerated "
                'unexpanded. Use config_enumerate(guide, "parallel", expand=True).'
            )
        return self.kept_values.movedim(-1, 0)


def _excluding(logits: Tensor, excluded: Tensor) -> Tensor:
    """Logits with some values made impossible, however large the others are."""
    # The best value that stays is moved to zero, so that UNUSED_LOGIT is far below it.
    best = logits.detach().masked_fill(excluded, -torch.inf).amax(-1, keepdim=True)
    return (logits - best).masked_fill(excluded, UNUSED_LOGIT)


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(full_precision(vectors), dim=-1)
