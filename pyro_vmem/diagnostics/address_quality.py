"""How good addresses are: against labels, against their own confidence, and against the exact posterior.

The functions take bare tensors of probabilities or logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from pyro_vmem._utils.checks import Count
from pyro_vmem.diagnostics.information import information_gain
from pyro_vmem.distributions import UNUSED_LOGIT

__all__ = ["Agreement", "ReliabilityCurve", "agreement", "calibration_error", "hit_rate", "top_k_hit_rate"]


def hit_rate(probabilities: Float[Tensor, "*batch C"], labels: Integer[Tensor, "*batch"]) -> Tensor:
    """The share of targets whose most probable class, or slot, is the right one.

    It is :func:`top_k_hit_rate` of k = 1; shapes as of that.

    Example:
        >>> hit_rate(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]), torch.tensor([0, 0, 0]))
        tensor(0.5000)
    """
    return top_k_hit_rate(probabilities, labels, 1)


def top_k_hit_rate(probabilities: Float[Tensor, "*batch C"], labels: Integer[Tensor, "*batch"], k: Count) -> Tensor:
    r"""The share of targets whose right class, or slot, is among the :math:`k` most probable.

    Ties count as if broken at random, so that equal probabilities hit as often as chance does, whatever their order.

    Arguments:
        probabilities: Of classes (`Memory.by_class`, `VMA.classify`) or of slots, with shape `(*, C)`; logits serve as
            well.
        labels: The column that is right, with shape `(*)`. Columns of classes are those of `memory.labels.unique()`.
        k: How many columns may be right.

    Returns:
        The share, a scalar in [0, 1].

    Raises:
        ValueError: If the shapes do not fit, a probability is NaN, a label is no column, or `k` is less than 1.

    Example:
        >>> probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
        >>> top_k_hit_rate(probabilities, torch.tensor([1, 0]), k=2)
        tensor(0.5000)
    """
    return _hits(probabilities, labels, k).mean()


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """A reliability curve, as :func:`calibration_error` found it: one value a bin, `(bins,)`.

    Attributes:
        error: The expected calibration error: the mean distance between confidence and accuracy, in [0, 1].
        confidence: The mean probability of the most probable column; NaN in an empty bin.
        accuracy: How often it is the right one; NaN in an empty bin.
        count: How many targets.
    """

    error: float
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def calibration_error(
    probabilities: Float[Tensor, "N C"],
    labels: Integer[Tensor, " N"],
    bins: Count = 15,
    binning: Literal["width", "mass"] = "width",
) -> ReliabilityCurve:
    r"""The expected calibration error of addresses: how far their confidence is from how often they are right.

    Targets are put into bins by the probability of their most probable column, and
    :math:`\sum_b \frac{n_b}{N} |\mathrm{accuracy}_b - \mathrm{confidence}_b|` is taken. Accuracies of small bins are
    noisy, so it is above zero for a calibrated guide too: by about :math:`\sqrt{b / N}` for b bins in use.

    References:
        | On Calibration of Modern Neural Networks (Guo, Pleiss, Sun, Weinberger, 2017), section 2
        | https://arxiv.org/abs/1706.04599

    Arguments:
        probabilities: Of classes or slots, with shape `(N, C)`; rows add up to 1.
        labels: The column that is right, with shape `(N,)`.
        bins: How many bins.
        binning: `"width"` for bins of equal width between 0 and 1, `"mass"` for as many targets in each.

    Returns:
        The error and the curve.

    Raises:
        ValueError: If the shapes do not fit, rows do not add up to 1, or an argument is out of range.

    Example:
        >>> sure = torch.tensor([[0.9, 0.1]]).expand(10, -1)  # right in 6 of 10
        >>> found = calibration_error(sure, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]), bins=2)
        >>> round(found.error, 3), found.accuracy, found.count
        (0.3, tensor([   nan, 0.6000]), tensor([ 0, 10]))
    """
    if not bool(((probabilities.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError("probabilities: expected rows that add up to 1, got others. Take logits.softmax(-1).")
    hits, confidence = _hits(probabilities, labels, 1), probabilities.amax(-1)
    if binning == "width":
        index = (confidence * bins).long().clamp(max=bins - 1)
    else:
        index = confidence.argsort().argsort() * bins // len(confidence)
    count = index.bincount(minlength=bins)
    accuracy, mean = (values.new_zeros(bins).index_add(0, index, values) / count for values in (hits, confidence))
    gaps = (accuracy - mean).abs().nan_to_num() * count
    return ReliabilityCurve(float(gaps.sum() / len(confidence)), mean, accuracy, count)


@dataclass(frozen=True, eq=False)
class Agreement:
    r"""How close a guide's addresses are to the exact posterior's, as :func:`agreement` found it, each `(*)`.

    Attributes:
        kl_from_exact: :math:`KL(p(a|x,M) \| q(a|M,x))`, in nats: large where the guide misses a slot.
        kl_from_guide: :math:`KL(q(a|M,x) \| p(a|x,M))`, in nats: large where the guide looks at a wrong slot; the
            looseness of the bound that the address guide is to blame for.
        total_variation: :math:`\frac{1}{2} \sum_a |q_a - p_a|`, in [0, 1].
        rank_correlation: Spearman's, over slots in use, in [-1, 1]; NaN where one of the two is uniform.
        same_first: Whether both have the same most probable slot.
    """

    kl_from_exact: Tensor
    kl_from_guide: Tensor
    total_variation: Tensor
    rank_correlation: Tensor
    same_first: Tensor

    def summary(self) -> dict[str, float]:
        """The mean of each over targets; of the rank correlation, over targets that have one."""
        columns = {name: values.to(self.total_variation.dtype) for name, values in vars(self).items()}
        return {name: float(values.nanmean() if "rank" in name else values.mean()) for name, values in columns.items()}


def agreement(q_logits: Float[Tensor, "*batch S"], exact_logits: Float[Tensor, "*batch S"]) -> Agreement:
    r"""Compares the addresses of a guide with the exact posterior's.

    Arguments:
        q_logits: Unnormalised :math:`\log q(a | M, x)`, with shape `(*, S)`.
        exact_logits: Unnormalised :math:`\log p(a | x, M)`, with shape `(*, S)`: the address prior's logits plus
            :func:`~pyro_vmem.diagnostics.slot_log_evidence`, or those of the reference model.

    Returns:
        Divergences in nats, total variation, rank correlation, and whether the first slot is the same. Slots to which
        neither gives any probability, as slots that are not in use, have no part.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> found = agreement(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 1.0, 2.0]))
        >>> found.same_first, found.rank_correlation
        (tensor(True), tensor(0.5000))
    """
    q, p = q_logits.softmax(-1), exact_logits.softmax(-1)
    possible = _possible(q_logits) | _possible(exact_logits)
    return Agreement(
        kl_from_exact=information_gain(exact_logits, q_logits),
        kl_from_guide=information_gain(q_logits, exact_logits),
        total_variation=(q - p).abs().sum(-1) / 2,
        rank_correlation=_correlation(_ranks(q_logits), _ranks(exact_logits), possible).to(q.dtype),
        same_first=q_logits.argmax(-1) == exact_logits.argmax(-1),
    )


def _hits(probabilities: Tensor, labels: Tensor, k: int) -> Tensor:
    """The probability that the right column is among the first k, ties broken at random, with shape `(*)`."""
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
    """Whether a slot has any probability; one that is not in use has a logit that is as good as minus infinity."""
    return logits - logits.amax(-1, keepdim=True) > UNUSED_LOGIT / 2


def _ranks(values: Tensor) -> Tensor:
    """The ranks of values along the last dim, ties at the mean of theirs; in double precision."""
    ordered, order = values.sort(-1)
    new = torch.cat([torch.zeros_like(ordered[..., :1], dtype=torch.bool), ordered[..., 1:] != ordered[..., :-1]], -1)
    group = new.long().cumsum(-1)
    position = torch.arange(values.shape[-1], device=values.device).double().expand(values.shape)
    zeros = torch.zeros_like(position)
    total = zeros.scatter_add(-1, group, position)
    size = zeros.scatter_add(-1, group, torch.ones_like(position))
    mean = (total / size.clamp(min=1)).gather(-1, group)
    return zeros.scatter(-1, order, mean)


def _correlation(a: Tensor, b: Tensor, counted: Tensor) -> Tensor:
    """Pearson's correlation along the last dim, of the entries that are counted."""
    a, b = (torch.where(counted, v - _mean(v, counted), 0.0) for v in (a, b))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return (values * counted).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)
