"""How good addresses are: against labels, against their own confidence, and against other addresses.

The functions take bare tensors of probabilities or logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from pyro_vmem._utils.checks import Count
from pyro_vmem.distributions.masking import UNUSED_LOGIT

__all__ = ["ReliabilityCurve", "calibration_error", "hit_rate"]


def hit_rate(probabilities: Float[Tensor, "*batch C"], labels: Integer[Tensor, "*batch"], k: Count = 1) -> Tensor:
    r"""Computes the accuracy: the share of targets whose right class, or slot, is among the :math:`k` most probable.

    Ties count as if broken at random. Equal probabilities thus reach chance level in any order.

    Arguments:
        probabilities: Of classes (`Memory.by_class`, `VMA.classify`) or of slots, with shape `(*, C)`, or their logits.
        labels: The right column, with shape `(*)`. Columns of classes are those of `memory.labels.unique()`.
        k: How many columns may be right.

    Returns:
        The share, a scalar in [0, 1].

    Raises:
        ValueError: If the shapes do not fit, a probability is NaN, or a label is no column.

    Example:
        >>> probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
        >>> hit_rate(probabilities, torch.tensor([1, 0])), hit_rate(probabilities, torch.tensor([1, 0]), k=2)
        (tensor(0.), tensor(0.5000))
    """
    return hits(probabilities, labels, k).mean()


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """The accuracy of targets in bins of similar confidence, from :func:`calibration_error`. Shapes are `(bins,)`.

    Attributes:
        error: The expected calibration error: the mean distance between confidence and accuracy, in [0, 1].
        confidence: The mean probability of the most probable column; NaN in an empty bin.
        accuracy: How often that column is the right one; NaN in an empty bin.
        count: The number of targets.
    """

    error: float
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def calibration_error(
    probabilities: Float[Tensor, "N C"], labels: Integer[Tensor, " N"], bins: Count = 15
) -> ReliabilityCurve:
    r"""Computes the expected calibration error of addresses: the distance between their confidence and accuracy.

    Targets are sorted into bins of equal width by the probability of their most probable column. The error is
    :math:`\sum_b \frac{n_b}{N} |\mathrm{accuracy}_b - \mathrm{confidence}_b|`. Accuracies of small bins are noisy, so a
    calibrated guide also has an error above zero, of about :math:`\sqrt{b / N}` for b bins in use.

    References:
        | On Calibration of Modern Neural Networks (Guo, Pleiss, Sun, Weinberger, 2017), section 2
        | https://arxiv.org/abs/1706.04599

    Arguments:
        probabilities: Of classes or slots, with shape `(N, C)`; rows add up to 1.
        labels: The right column, with shape `(N,)`.
        bins: How many bins.

    Raises:
        ValueError: If the shapes do not fit, or rows do not add up to 1.

    Example:
        >>> confident = torch.tensor([[0.9, 0.1]]).expand(10, -1)  # right in 6 of 10
        >>> found = calibration_error(confident, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]), bins=2)
        >>> round(found.error, 3), found.accuracy, found.count
        (0.3, tensor([   nan, 0.6000]), tensor([ 0, 10]))
    """
    if not bool(((probabilities.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError("probabilities: expected rows that add up to 1, got others. Take logits.softmax(-1).")
    right, confidence = hits(probabilities, labels, 1), probabilities.amax(-1)
    index = (confidence * bins).long().clamp(max=bins - 1)
    count = index.bincount(minlength=bins)
    accuracy, mean = (values.new_zeros(bins).index_add(0, index, values) / count for values in (right, confidence))
    gaps = (accuracy - mean).abs().nan_to_num() * count
    return ReliabilityCurve(float(gaps.sum() / len(confidence)), mean, accuracy, count)


def rank_correlation(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Computes Spearman's rank correlation of the slots by two sets of logits `(*, S)`; NaN where one is uniform.

    Slots without any probability in both have no part in it.
    """
    possible = _possible(q_logits) | _possible(p_logits)
    size = possible.sum(-1, keepdim=True)
    q, p = (
        torch.where(possible, ranks - (ranks * possible).sum(-1, keepdim=True) / size, 0.0)
        for ranks in (_ranks(q_logits), _ranks(p_logits))
    )
    correlation = (q * p).sum(-1) / (q.square().sum(-1) * p.square().sum(-1)).sqrt()
    return correlation.to(q_logits.dtype)


def hits(probabilities: Tensor, labels: Tensor, k: int) -> Tensor:
    """The probability that the right column is among the first k, with ties broken at random: `(*, C)` to `(*)`."""
    columns = probabilities.shape[-1]
    if probabilities.numel() == 0:
        raise ValueError(f"probabilities: expected at least one row, got none, {tuple(probabilities.shape)}.")
    if bool(((labels < 0) | (labels >= columns)).any()):
        raise ValueError(
            f"labels: expected integers in 0..{columns - 1}, the right columns, got {labels.min()}..{labels.max()}. "
            "Columns of classes are those of memory.labels.unique(): use torch.searchsorted."
        )
    if bool(probabilities.isnan().any()):
        rows = int(probabilities.isnan().any(-1).sum())
        raise ValueError(
            f"probabilities: expected numbers, got NaN in {rows} of {labels.numel()} rows. Check the model's "
            "weights, or leave those rows out."
        )
    right = probabilities.gather(-1, labels.unsqueeze(-1))
    before, tied = (probabilities > right).sum(-1), (probabilities == right).sum(-1)
    return ((k - before) / tied.clamp(min=1)).clamp(0, 1).to(probabilities.dtype)


def _possible(logits: Tensor) -> Tensor:
    """Whether a slot has any probability: the logit of a slot that is not in use is close to minus infinity."""
    return logits - logits.amax(-1, keepdim=True) > UNUSED_LOGIT / 2


def _ranks(values: Tensor) -> Tensor:
    """The ranks of values along the last dim in double precision; equal values share the mean of their ranks."""
    ordered, values = values.sort(-1).values, values.contiguous()
    first, after = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (first + after - 1).double() / 2
