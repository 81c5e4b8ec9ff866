"""Guides over the most probable addresses, which can be summed instead of sampled."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vmem._utils.checks import Count
from pyro_vmem.distributions.masking import excluding
from pyro_vmem.distributions.sparse_categorical import TruncatedCategorical, top
from pyro_vmem.memory import EncodedMemory, Template
from pyro_vmem.parts.address_guides import AddressGuide, KeyedGuide

__all__ = ["IndexedGuide", "TruncatedGuide"]


class TruncatedGuide(AddressGuide):
    r"""The :math:`k` most probable addresses of another guide, renormalised: :math:`q_k(a) \propto q(a)` on the top k.

    With `pyro.infer.TraceEnum_ELBO` and `config_enumerate(vma.guide, "parallel", expand=True)`, enumeration costs
    :math:`k` decoder passes per target instead of one per slot. The gradient is exact for the bound of the truncated
    posterior. Under a uniform prior :math:`KL(q_k \| p) = \log S - H(q_k)`. If memory has more slots than are read,
    :func:`fit` encodes templates when they are read. A :class:`KeyedGuide` then chooses its slots without gradient, and
    only these are encoded with gradient.

    Arguments:
        inner: The guide whose addresses are truncated.
        k: The number :math:`k` of addresses, at least 1. A smaller memory keeps all.

    Example:
        >>> from pyro_vmem import EncodedMemory, Memory, SimilarityGuide, Template
        >>> memory = Memory(torch.rand(20, 8))
        >>> encoded = EncodedMemory(memory, Template(memory.templates, torch.rand(20, 16)))
        >>> q = TruncatedGuide(SimilarityGuide(16), k=3)(encoded, Template(torch.rand(5, 8), torch.rand(5, 16)))
        >>> q.enumerate_support().shape, int((q.probs > 0).sum())
        (torch.Size([3, 5]), 15)
    """

    def __init__(self, inner: AddressGuide, k: Count = 8) -> None:
        super().__init__()
        self.inner, self.k = inner, k

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        if memory.is_lazy and isinstance(self.inner, KeyedGuide):
            return _best_of_all(self.inner, memory, x, self.k)
        logits = self.inner(memory, x).logits
        slots = logits.topk(min(self.k, memory.num_slots), dim=-1).indices
        return TruncatedCategorical(logits.gather(-1, slots), slots, memory.num_slots)


class IndexedGuide(AddressGuide):
    r"""A :class:`TruncatedGuide` that searches the index of a memory, for millions of slots.

    A target costs one search and :math:`k` templates that are read, encoded and scored again. The gradient flows
    through these :math:`k` scores, and equals that of the truncated guide over the same addresses. The keys of the
    index have no gradient and may be stale. Without an index this is a truncated guide, if the whole memory is encoded.
    In a :class:`DefensiveGuide` every slot has a positive probability.

    References:
        | REALM: Retrieval-Augmented Language Model Pre-Training (Guu et al., 2020), section 3.3, on scoring again
        | after a search with stale keys | https://arxiv.org/abs/2002.08909

    Arguments:
        inner: The guide whose keys are in the index.
        k: The number :math:`k` of addresses, at least 1. A smaller memory keeps all.

    Raises:
        ValueError: When called, if a memory that is encoded as it is read is too large for all keys and has no index.

    Example:
        >>> from pyro_vmem import EncodedMemory, Memory, SimilarityGuide, Template
        >>> memory = Memory(torch.rand(20, 8))
        >>> encoded = EncodedMemory(memory, Template(memory.templates, torch.rand(20, 16)))
        >>> q = IndexedGuide(SimilarityGuide(16), k=3)(encoded, Template(torch.rand(5, 8), torch.rand(5, 16)))
        >>> q.enumerate_support().shape, q.kept_values.shape
        (torch.Size([3, 5]), torch.Size([5, 3]))
    """

    def __init__(self, inner: KeyedGuide, k: Count = 8) -> None:
        super().__init__()
        self.inner, self.k = inner, k

    def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
        if memory.index is None:
            return _best_of_all(self.inner, memory, x, self.k)
        with torch.no_grad():
            queries = self.inner.queries(x.features)
        hits = memory.index.search(queries, min(self.k, len(memory.index)))
        return _scored_again(self.inner, memory, x, *hits.filled(memory.num_slots))


def _best_of_all(inner: KeyedGuide, memory: EncodedMemory, x: Template, k: int) -> TruncatedCategorical:
    """The truncated guide on the most probable of all slots, which are chosen without gradient."""
    with torch.no_grad():
        slots = top(inner(memory, x), min(k, memory.num_slots))
    return _scored_again(inner, memory, x, slots)


def _scored_again(
    inner: KeyedGuide, memory: EncodedMemory, x: Template, slots: Tensor, missing: Tensor | None = None
) -> TruncatedCategorical:
    """The truncated guide on slots `(*, k)`; their templates are read and encoded with gradient.

    Where a search found too few slots, `missing` is true and the probability is zero.
    """
    scores = inner.scores(memory.read(slots.movedim(-1, 0)), x).movedim(0, -1)
    logits = scores if missing is None else excluding(scores, missing)
    return TruncatedCategorical(logits, slots, memory.num_slots)
