"""Logits that exclude values of a categorical."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["UNUSED_LOGIT", "excluding"]

# The logit of a slot that is not in use. Its probability is exactly zero in every floating-point type, while its
# log-probability stays finite: with -inf, enumeration would compute 0 * (inf - inf).
UNUSED_LOGIT = -1e4


def excluding(logits: Float[Tensor, "*#batch S"], excluded: Bool[Tensor, "*#batch S"]) -> Tensor:
    """Logits `(*, S)` that give some values probability zero, however large the others are."""
    # The largest remaining logit becomes zero, so UNUSED_LOGIT is far below it.
    best = logits.detach().masked_fill(excluded, -torch.inf).amax(-1, keepdim=True)
    return (logits - best).masked_fill(excluded, UNUSED_LOGIT)
