"""Sums of importance weights, drawn in one or several strata, and how far such a sum can be trusted.

The functions take bare tensors of log weights; nothing here knows what a model is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

__all__ = [
    "Estimate",
    "StratifiedWeights",
    "effective_sample_size",
    "half_width",
    "pareto_k",
    "sample_counts",
    "standard_error",
    "strata_of",
    "trust_figures",
    "unknown",
]

LEAST_TAIL = 5  # weights in the tail below which a generalised Pareto distribution is not fitted
KHAT_LIMIT = 0.7  # above it the mean of weights converges too slowly to be trusted (Vehtari et al., 2024)
KHAT_DOUBT = 0.5  # above it weights have no variance, and those of a target that look better may have been lucky
ERROR_LIMIT = 0.5  # nats; from there on one weight makes up half of the estimate, and the delta method breaks down
ROUNDING_ERROR = 1e-4  # nats; weights with so little spread are equal, and few of them suffice
MISSING_SHARE = 0.05  # of a sum; if less than that is missing, nothing is made of it
KHAT_SHARE = 0.99  # the share of an estimate by whose strata its k-hat is judged


def effective_sample_size(log_weights: Float[Tensor, "..."]) -> Tensor:
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


def standard_error(log_weights: Float[Tensor, "..."]) -> Tensor:
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


def pareto_k(log_weights: Float[Tensor, "..."]) -> Tensor:
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


def tail_index(log_weights: Float[Tensor, "..."], equal_within: float) -> float:
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


@dataclass(frozen=True, eq=False)
class StratifiedWeights:
    r"""Samples of each datapoint in :math:`G` strata, whose means add up: :math:`\sum_g \frac{1}{n_g} \sum_k w_{gk}`.

    Strata are slots that are summed over, and one of slots that are sampled; with a single stratum it is the mean of
    the weights.

    Arguments:
        log_weights: :math:`\log w`, with shape `(K, B)`.
        stratum: The stratum of each sample, with shape `(K, B)`; integers.
        counts: The samples :math:`n_g \ge 1` of each stratum, with shape `(G, B)`; integers.
        mixture: The shares of components of a mixture, which so many strata in a row are; all have its density in their
            weights, and their share as a factor. The last stratum is by itself.
        expected: What share of the sum is expected of the last stratum, with shape `(B,)`, if its proposal is too poor
            for the weights to tell: there is no standard error where they come to much less.

    Example:
        >>> log_weights = torch.tensor([[1.0], [3.0], [5.0]]).log()  # a mean of 2, and 5
        >>> weights = StratifiedWeights(log_weights, torch.tensor([[0], [0], [1]]), torch.tensor([[2], [1]]))
        >>> round(float(weights.log_sum.exp()), 4)
        7.0
    """

    log_weights: Float[Tensor, "..."]
    stratum: Tensor
    counts: Tensor
    mixture: tuple[float, ...] = (1.0,)
    expected: Tensor | None = None

    @classmethod
    def unstratified(cls, log_weights: Float[Tensor, "..."]) -> StratifiedWeights:
        """All samples `(K, B)` in one stratum."""
        stratum = torch.zeros_like(log_weights, dtype=torch.long)
        return cls(log_weights, stratum, torch.full_like(stratum[:1], len(log_weights)))

    @classmethod
    def even(cls, log_weights: Float[Tensor, "..."]) -> StratifiedWeights:
        """As many samples of every stratum: `(n, G, B)`."""
        samples, strata, batch = log_weights.shape
        stratum = torch.arange(strata, device=log_weights.device).repeat(samples).unsqueeze(-1).expand(-1, batch)
        return cls(log_weights.flatten(0, 1), stratum, torch.full_like(stratum[:strata], samples))

    @property
    def estimate(self) -> Estimate:
        """The logarithm of the sum with all that tells how far it can be trusted."""
        error = self.standard_error
        if self.expected is not None:
            missing = self.expected - self._by_stratum(self._log_shares().softmax(0))[-1]
            error = error.masked_fill(missing > half_width(error).clamp(min=MISSING_SHARE), math.nan)
        return Estimate(self.log_sum, error, self.ess, self.khat)

    @property
    def log_means(self) -> Tensor:
        r""":math:`\log \frac{1}{n_g} \sum_k w_{gk}` of each stratum, with shape `(G, B)`."""
        log_shares = self._log_shares()
        largest = log_shares.amax(0).nan_to_num(0.0, 0.0, 0.0)
        return self._by_stratum((log_shares - largest).exp()).log() + largest

    @property
    def log_sum(self) -> Tensor:
        r""":math:`\log \sum_g \frac{1}{n_g} \sum_k w_{gk}`, with shape `(B,)`."""
        return self._log_shares().logsumexp(0)

    @property
    def standard_error(self) -> Tensor:
        r"""That of `log_sum` by the delta method, in nats `(B,)`; NaN if every stratum has one sample only.

        Strata vary independently: :math:`\sqrt{\sum_g \mathrm{Var}_g / n_g} / \sum_g \bar w_g`. One sample says nothing
        of the spread of its stratum, so that is taken to be the others', as a share of the mean.
        """
        shares, counts = self._log_shares().softmax(0), self.counts.to(self.log_weights.dtype)
        mean = self._by_stratum(shares) / counts
        squares = self._by_stratum((shares - mean.gather(0, self.stratum)).square())
        single = counts == 1
        totals = mean * counts
        variances = (squares * counts / (counts - 1).clamp(min=1)).masked_fill(single, 0.0)
        known = totals.masked_fill(single, 0.0)
        relative = (variances * counts).sum(0) / known.square().sum(0)
        return (variances + torch.where(single, totals.square() * relative, 0.0)).sum(0).sqrt()

    @property
    def ess(self) -> Tensor:
        r"""The effective sample size :math:`1 / \sum_{gk} c_{gk}^2` of all samples, in [1, K], with shape `(B,)`.

        :math:`c_{gk}` is what a sample has in the estimate. It is small also where most samples were spent on strata
        that hold nothing.
        """
        return (1 / self._log_shares().softmax(0).square().sum(0)).clamp(1, len(self.log_weights))

    @property
    def khat(self) -> Tensor:
        """The Pareto tail index of the weights over the mean of their stratum, with shape `(B,)`.

        The fewest strata that make up 99 % of the estimate are pooled. Weights differ between strata for no fault of
        the proposal, and what strata outside of these do has no part in the estimate. Components of one mixture are a
        single stratum here: where one of them is poor, the others make up for it.
        """
        log_shares, size = self._log_shares(), len(self.mixture)
        group, last = self.stratum // size, len(self.counts) - 1
        factor = log_shares.new_tensor(self.mixture)[self.stratum % size].masked_fill(self.stratum == last, 1.0)
        shares = log_shares.new_zeros(last // size + 1, log_shares.shape[1])
        shares = shares.scatter_add(0, group, log_shares.softmax(0))
        relative = self.log_weights - factor.log() - log_shares.logsumexp(0) - shares.log().gather(0, group)
        ordered, order = shares.sort(0, descending=True)
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, ordered.cumsum(0) - ordered < KHAT_SHARE)
        kept = kept.gather(0, group)
        columns = zip(relative.mT.cpu(), kept.mT.cpu(), self.log_weights.amax(0).tolist(), strict=True)
        indices = [
            tail_index(row[keep].double(), rounding(largest, row.dtype)) if math.isfinite(largest) else math.nan
            for row, keep, largest in columns
        ]
        return relative.new_tensor(indices)

    def _log_shares(self) -> Tensor:
        """What each sample has in the sum, `(K, B)`."""
        return self.log_weights - self.counts.to(self.log_weights.dtype).log().gather(0, self.stratum)

    def _by_stratum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.counts.shape).scatter_add(0, self.stratum, values)


class Estimate(NamedTuple):
    """The logarithm of a sum of importance weights, and how far it can be trusted; each `(B,)`."""

    log_evidence: Tensor
    standard_error: Tensor
    ess: Tensor
    khat: Tensor

    @property
    def honest(self) -> Estimate:
        """The same with an error of NaN where it is :func:`unknown`."""
        of_none = unknown(self.khat, self.standard_error)
        return self._replace(standard_error=self.standard_error.masked_fill(of_none, math.nan))

    @classmethod
    def joined(cls, parts: Iterable[Estimate]) -> Estimate:
        """The estimates of all datapoints, of those of some at a time."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


def unknown(khat: Tensor, standard_error: Tensor) -> Tensor:
    """Whether weights do not tell the error of their sum, which is then likely too low; shape as of both.

    That is for a k-hat above 0.7, an error above 0.5 nats, and too few weights for a k-hat, unless these are equal. A
    datapoint that drew no large weight has a small k-hat and a small error. What gives it away is that the others,
    which have the same guide, did: where half of the k-hats are above 0.5, no error is known.
    """
    few = khat.isnan() & ~(standard_error < ROUNDING_ERROR)
    doubtful = (khat > KHAT_DOUBT) | few
    return (khat > KHAT_LIMIT) | ~(standard_error <= ERROR_LIMIT) | few | (doubtful.double().mean() > 0.5)


def half_width(standard_error: Tensor) -> Tensor:
    r"""How far a 95 % interval of a log sum reaches to each side, in nats; shape as of its standard error.

    It is Student's quantile with as many degrees of freedom as equal weights would have this error, :math:`1 / se^2`,
    by the first terms of its expansion around the normal one (Abramowitz, Stegun, 1964, 26.7.5).
    """
    z, variance = 1.959964, standard_error.square()
    correction = (z**3 + z) / 4 * variance + (5 * z**5 + 16 * z**3 + 3 * z) / 96 * variance.square()
    return (z + correction) * standard_error


def trust_figures(khat: Tensor, standard_error: Tensor) -> dict[str, float]:
    """Figures over datapoints of shape `(*)`, whose error is NaN where it is unknown."""
    return {
        "monte_carlo_se": float(standard_error.square().sum().sqrt()) / standard_error.numel(),
        "error_unknown": float(standard_error.isnan().double().mean()),
        "khat_above": float((khat > KHAT_LIMIT).double().mean()),
    }


def sample_counts(num_samples: int, mass: Tensor) -> Tensor:
    """How many samples each stratum gets: half are divided equally, half by mass, and two each where they suffice.

    So no stratum is starved by a proposal that is too sure.

    Arguments:
        num_samples: How many samples there are, at least one a stratum.
        mass: The probability of each stratum, with shape `(B, G)`.

    Returns:
        Integers `(B, G)`, whose rows add up to `num_samples`.
    """
    strata = mass.shape[-1]
    least = 2 if num_samples >= 2 * strata else 1  # one sample says nothing of the spread
    share = (mass + 1 / strata) / 2
    counts = least + ((num_samples - least * strata) * share).floor().long()
    counts[..., 0] += num_samples - counts.sum(-1)
    return counts


def strata_of(counts: Tensor) -> Tensor:
    """The stratum of each sample in order, `(B, K)`, from how many each stratum has, `(B, G)`."""
    positions = torch.arange(int(counts[0].sum()), device=counts.device).expand(len(counts), -1)
    return torch.searchsorted(counts.cumsum(-1).contiguous(), positions.contiguous(), right=True)


def _check(log_weights: Float[Tensor, "..."]) -> None:
    if log_weights.dim() == 0 or len(log_weights) == 0:
        raise ValueError(
            f"log_weights: expected shape (K, *) with K >= 1 samples, got {tuple(log_weights.shape)}. "
            "One datapoint's weights have shape (K,)."
        )
