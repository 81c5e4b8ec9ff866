"""How far importance weights can be trusted: their effective sample size, tail index and standard error."""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

__all__ = ["effective_sample_size", "pareto_k", "standard_error"]

LEAST_TAIL = 5  # weights in the tail below which a generalised Pareto distribution is not fitted


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""The number of equally weighted samples that weighted ones are worth: :math:`(\sum_k w_k)^2 / \sum_k w_k^2`.

    References:
        | Sequential Imputations and Bayesian Missing Data Problems (Kong, Liu, Wong, 1994), section 4.1

    Arguments:
        log_weights: :math:`\log w_k` of :math:`K` samples, with shape `(K, *)`; any constant may be added.

    Returns:
        The effective sample size, in [1, K], with shape `(*)`; NaN where no weight is positive.

    Raises:
        ValueError: If there are no weights.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -50.0], [0.0, -50.0], [0.0, -50.0]]))
        tensor([4., 1.])
    """
    _check(log_weights)
    weights = log_weights.softmax(0)
    return (1 / weights.square().sum(0)).clamp(1, len(log_weights))


def standard_error(log_weights: Tensor) -> Tensor:
    r"""The standard error of :math:`\log \frac{1}{K} \sum_k w_k` by the delta method, in nats.

    It is that of the mean weight over the mean weight. Where the tail of the weights is heavy (see :func:`pareto_k`)
    it is too small: the large weights have not been drawn yet.

    Arguments:
        log_weights: :math:`\log w_k` of :math:`K` independent samples, with shape `(K, *)`.

    Returns:
        Nats, with shape `(*)`; NaN for a single sample, which says nothing of the spread.

    Raises:
        ValueError: If there are no weights.

    Example:
        >>> standard_error(torch.tensor([1.0, 3.0]).log())  # mean 2, standard error of the mean 1
        tensor(0.5000)
    """
    _check(log_weights)
    size = len(log_weights)
    relative = log_weights.softmax(0) * size - 1  # of mean zero
    return (relative.square().sum(0) / size).sqrt() / math.sqrt(size - 1) if size > 1 else relative[0] * math.nan


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""The Pareto tail index :math:`\hat k` of importance weights, for each datapoint by itself.

    A generalised Pareto distribution is fitted to the largest :math:`\min(K / 5, 3 \sqrt K)` weights. Weights have
    :math:`1 / k` moments: below 0.5 the mean weight has a finite variance, above 0.7 it converges so slowly that no
    practical number of samples makes it trustworthy; then the proposal is too narrow for its target.

    References:
        | Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2024), sections 2.4, 3
        | https://arxiv.org/abs/1507.02646
        | A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang, Stephens, 2009)

    Arguments:
        log_weights: :math:`\log w_k` of :math:`K` samples, with shape `(K, *)`; any constant may be added.

    Returns:
        The tail index, with shape `(*)`. Three values are not fitted: `-inf` where the largest weights are equal up to
        rounding, so that there is no tail; `inf` where fewer than five of them are distinct from zero and from the
        rest, so that all depends on those; NaN where a weight is NaN, none is positive, or :math:`K \le 20`, too few
        to tell.

    Raises:
        ValueError: If there are no weights.

    Example:
        >>> good = pareto_k(torch.randn(1000, generator=torch.Generator().manual_seed(0)))  # log-normal, scale 1
        >>> poor = pareto_k(9 * torch.randn(1000, generator=torch.Generator().manual_seed(0)))
        >>> bool(good < 0.7), bool(poor > 0.7), pareto_k(torch.zeros(1000))
        (True, True, tensor(-inf))
    """
    _check(log_weights)
    rows = log_weights.detach().reshape(len(log_weights), -1).mT.cpu()
    indices = [tail_index(row.double(), rounding(float(row.max()), row.dtype)) for row in rows]
    return log_weights.new_tensor(indices).reshape(log_weights.shape[1:])


def rounding(log_weight: float, dtype: torch.dtype) -> float:
    """How far apart log weights of this size may be and still be equal, in nats."""
    return 1e2 * torch.finfo(dtype).eps * max(1.0, abs(log_weight))


def tail_index(log_weights: Tensor, equal_within: float) -> float:
    """k-hat of one row of log weights `(K,)` in double precision, where differences of `equal_within` nats are none."""
    size = len(log_weights)
    tail = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    largest = float(log_weights.max())
    if tail < LEAST_TAIL or not math.isfinite(largest):
        return math.nan
    ordered = log_weights.sort().values - largest
    # Below this, weights are zero for all that a mean can tell.
    cutoff = max(float(ordered[-tail - 1]), math.log(torch.finfo(ordered.dtype).tiny))
    if -cutoff <= equal_within:
        return -math.inf
    above = ordered[ordered > cutoff]
    if len(above) < LEAST_TAIL:
        return math.inf
    fitted: float = fit_generalized_pareto((above - cutoff).expm1())[0]
    return fitted if math.isfinite(fitted) else math.inf


def _check(log_weights: Tensor) -> None:
    if log_weights.dim() == 0 or len(log_weights) == 0:
        raise ValueError(
            f"log_weights: expected shape (K, *) with K >= 1 samples, got {tuple(log_weights.shape)}. "
            "One datapoint's weights have shape (K,)."
        )
