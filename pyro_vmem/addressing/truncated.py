"""The most probable addresses of a guide, for sums instead of samples."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vmem.addressing.base import AddressGuide, excluding
from pyro_vmem.memory import EncodedMemory, Template

__all__ = ["TruncatedCategorical", "TruncatedGuide"]


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
        >>> from pyro_vmem import EncodedMemory, Memory, SimilarityGuide, Template
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
        super().__init__(logits=excluding(logits, ~kept), validate_args=validate_args)

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
