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

__all__ = ["pareto_k"]

LEAST_TAIL = 5  # weights in the tail below which a generalised Pareto distribution is not fitted
KHAT_LIMIT = 0.7  # above it the mean of weights converges too slowly to be trusted (Vehtari et al., 2024)
KHAT_DOUBT = 0.5  # above it weights have no variance, and a target with a smaller k-hat may have been lucky
ERROR_LIMIT = 0.5  # nats; from there on one weight makes up half of the estimate, and the delta method breaks down
ROUNDING_ERROR = 1e-4  # nats; weights with so little spread are equal, and few of them suffice
LEAST_FREEDOM = 3  # degrees; with fewer, a variance is known so poorly that a small one may be luck
MISSING_SHARE = 0.05  # of a sum; a smaller missing part is ignored
KHAT_SHARE = 0.99  # k-hat is that of the strata with this share of the estimate


def pareto_k(log_weights: Float[Tensor, "K ..."]) -> Tensor:
    r"""Estimates the Pareto tail index :math:`\hat k` of importance weights, for each datapoint by itself.

    A generalised Pareto distribution is fitted to the largest :math:`\min(K / 5, 3 \sqrt K)` weights. Weights have
    :math:`1 / k` moments. Below 0.5 the mean weight has a finite variance. Above 0.7 it converges so slowly that no
    practical number of samples makes it trustworthy: the proposal is too narrow for its target.

    References:
        | Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2024), sections 2.4, 3
        | https://arxiv.org/abs/1507.02646
        | A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang, Stephens, 2009)

    Arguments:
        log_weights: :math:`\log w_k` of :math:`K` samples, with shape `(K, *)`; any constant may be added.

    Returns:
        The tail index, with shape `(*)`. Three values are not fitted: `-inf` where the largest weights are equal up to
        rounding; `inf` where fewer than five of them differ from zero and from the rest; NaN where a weight is NaN,
        none is positive, or :math:`K \le 20` is too small.

    Raises:
        ValueError: If there are no weights.

    Example:
        >>> good = pareto_k(torch.randn(1000, generator=torch.Generator().manual_seed(0)))  # log-normal, scale 1
        >>> poor = pareto_k(9 * torch.randn(1000, generator=torch.Generator().manual_seed(0)))
        >>> bool(good < 0.7), bool(poor > 0.7), pareto_k(torch.zeros(1000))
        (True, True, tensor(-inf))
    """
    if len(log_weights) == 0:
        raise ValueError("log_weights: expected shape (K, *) with K >= 1 samples, got none.")
    rows = log_weights.detach().reshape(len(log_weights), -1).mT.cpu()
    return log_weights.new_tensor([_tail_index(row, float(row.max())) for row in rows]).reshape(log_weights.shape[1:])


def _tail_index(log_weights: Tensor, magnitude: float) -> float:
    """k-hat of one row of log weights `(K,)`, which were rounded when they had this magnitude."""
    size = len(log_weights)
    tail = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    if tail < LEAST_TAIL or not math.isfinite(magnitude) or not math.isfinite(log_weights.max()):
        return math.nan
    ordered = log_weights.double().sort().values - float(log_weights.max())
    # Below this, weights are zero for all that a mean can tell.
    cutoff = max(float(ordered[-tail - 1]), math.log(torch.finfo(ordered.dtype).tiny))
    if -cutoff <= 1e2 * torch.finfo(log_weights.dtype).eps * max(1.0, abs(magnitude)):
        return -math.inf
    above = ordered[ordered > cutoff]
    if len(above) < LEAST_TAIL:
        return math.inf
    fitted: float = fit_generalized_pareto((above - cutoff).expm1())[0]
    return fitted if math.isfinite(fitted) else math.inf


@dataclass(frozen=True, eq=False)
class StratifiedWeights:
    r"""Samples of each datapoint in :math:`G` strata, whose means add up: :math:`\sum_g \frac{1}{n_g} \sum_k w_{gk}`.

    A stratum is a slot that is summed over, or all slots that are sampled together.
    """

    log_weights: Tensor  # log w, (K, B)
    stratum: Tensor  # of each sample, (K, B)
    counts: Tensor  # the samples n_g of each stratum, at least 1, (G, B)
    # The shares of the components of a mixture; so many strata in a row are its components. Their weights have the
    # density of the whole mixture, and their share as a factor. The last stratum stands alone.
    mixture: tuple[float, ...] = (1.0,)
    # The expected share of the last stratum in the sum, (B,), where its proposal is too poor for the weights to tell.
    # There is no standard error where the stratum has much less.
    expected: Tensor | None = None

    @classmethod
    def unstratified(cls, log_weights: Float[Tensor, "..."]) -> StratifiedWeights:
        """All samples `(K, B)` in one stratum."""
        stratum = torch.zeros_like(log_weights, dtype=torch.long)
        return cls(log_weights, stratum, torch.full_like(stratum[:1], len(log_weights)))

    @classmethod
    def even(cls, log_weights: Tensor) -> StratifiedWeights:
        """The same number of samples in every stratum: `(n, G, B)`."""
        samples, strata, batch = log_weights.shape
        stratum = torch.arange(strata, device=log_weights.device).repeat(samples).unsqueeze(-1).expand(-1, batch)
        return cls(log_weights.flatten(0, 1), stratum, torch.full_like(stratum[:strata], samples))

    @property
    def estimate(self) -> Estimate:
        """The logarithm of the sum with all figures on its reliability."""
        error = self.standard_error
        few = (self.degrees_of_freedom < LEAST_FREEDOM) & (error > ROUNDING_ERROR)
        error = error.masked_fill(few, math.nan)
        if self.expected is not None:
            missing = self.expected - self._by_stratum(self._log_shares().softmax(0))[-1]
            error = error.masked_fill(missing > half_width(error).clamp(min=MISSING_SHARE), math.nan)
        return Estimate(self.log_sum, error, self.ess, self.khat)

    @property
    def log_means(self) -> Tensor:
        r""":math:`\log \frac{1}{n_g} \sum_k w_{gk}` of each stratum, with shape `(G, B)`."""
        log_shares = self._log_shares()
        # The largest weight of each stratum: beside that of all strata, a mean 104 nats below it is zero in float32.
        least = torch.full_like(self.counts, -math.inf, dtype=log_shares.dtype)
        largest = least.scatter_reduce(0, self.stratum, log_shares.detach(), "amax").nan_to_num(0.0, 0.0, 0.0)
        return self._by_stratum((log_shares - largest.gather(0, self.stratum)).exp()).log() + largest

    @property
    def log_sum(self) -> Tensor:
        r""":math:`\log \sum_g \frac{1}{n_g} \sum_k w_{gk}`, with shape `(B,)`."""
        return self._log_shares().logsumexp(0)

    @property
    def standard_error(self) -> Tensor:
        r"""The standard error of `log_sum` by the delta method, in nats `(B,)`.

        Strata vary independently: :math:`\sqrt{\sum_g \mathrm{Var}_g / n_g} / \sum_g \bar w_g`. A stratum of a single
        sample is taken to have the relative spread of the others. The error is NaN if every stratum has one sample.
        """
        return self._variances.sum(0).sqrt()

    @property
    def degrees_of_freedom(self) -> Tensor:
        r"""The degrees of freedom of the sum's variance, with shape `(B,)` (Welch, 1947).

        :math:`(\sum_g v_g)^2 / \sum_g \frac{v_g^2}{n_g - 1}` for variances :math:`v_g` of the strata's means. They are
        few if most of the variance is that of a stratum with few samples.
        """
        variances = self._variances
        spread = variances.square() / (self.counts - 1).clamp(min=1)
        return variances.sum(0).square() / spread.sum(0)

    @property
    def _variances(self) -> Tensor:
        """The variance of the mean of each stratum over the square of the sum, `(G, B)`."""
        shares, counts = self._log_shares().softmax(0), self.counts.to(self.log_weights.dtype)
        mean = self._by_stratum(shares) / counts
        squares = self._by_stratum((shares - mean.gather(0, self.stratum)).square())
        single = counts == 1
        totals = mean * counts
        variances = (squares * counts / (counts - 1).clamp(min=1)).masked_fill(single, 0.0)
        known = totals.masked_fill(single, 0.0)
        relative = (variances * counts).sum(0) / known.square().sum(0)
        return variances + torch.where(single, totals.square() * relative, 0.0)

    @property
    def ess(self) -> Tensor:
        r"""The effective sample size :math:`1 / \sum_k c_k^2`, by the share of each sample in the sum: `(B,)`.

        It lies in [1, K]. It is also small where most samples were spent on strata that hold nothing.
        """
        return (1 / self._log_shares().softmax(0).square().sum(0)).clamp(1, len(self.log_weights))

    @property
    def khat(self) -> Tensor:
        """The Pareto tail index of the weights over the mean of their stratum, with shape `(B,)`.

        Pools the fewest strata that make up 99 % of the estimate: differences between strata are no fault of the
        proposal, and small strata have no part in the estimate. The components of a mixture count as one stratum,
        because a good one makes up for a poor one.
        """
        log_shares, size = self._log_shares(), len(self.mixture)
        group, last = self.stratum // size, len(self.counts) - 1
        factor = log_shares.new_tensor(self.mixture)[self.stratum % size].masked_fill(self.stratum == last, 1.0)
        shares = log_shares.new_zeros(last // size + 1, log_shares.shape[1])
        shares = shares.scatter_add(0, group, log_shares.softmax(0))
        relative = self.log_weights - factor.log() - log_shares.logsumexp(0) - shares.log().gather(0, group)
        ordered, order = shares.sort(0, descending=True)
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, ordered.cumsum(0) - ordered < KHAT_SHARE)
        columns = zip(relative.mT.cpu(), kept.gather(0, group).mT.cpu(), self.log_weights.amax(0).tolist(), strict=True)
        # Without any positive weight, no stratum is kept.
        indices = [_tail_index(row[keep], largest) if keep.any() else math.nan for row, keep, largest in columns]
        return relative.new_tensor(indices)

    def _log_shares(self) -> Tensor:
        """The logarithm of what each sample adds to the sum, `(K, B)`."""
        return self.log_weights - self.counts.to(self.log_weights.dtype).log().gather(0, self.stratum)

    def _by_stratum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.counts.shape).scatter_add(0, self.stratum, values)


class Estimate(NamedTuple):
    """The logarithm of a sum of importance weights, and figures on its reliability; each `(B,)`."""

    log_evidence: Tensor
    standard_error: Tensor
    ess: Tensor
    khat: Tensor

    @property
    def honest(self) -> Estimate:
        """Returns the estimate with NaN in place of each error that is :func:`unknown`."""
        of_none = unknown(self.khat, self.standard_error)
        return self._replace(standard_error=self.standard_error.masked_fill(of_none, math.nan))

    def figures(self, suffix: str = "") -> dict[str, Tensor]:
        """Returns the values `(B,)` by their names in a dataset."""
        names = (f"log_evidence{suffix}", f"log_evidence{suffix}_se", f"ess{suffix}", f"khat{suffix}")
        return dict(zip(names, self, strict=True))

    @classmethod
    def joined(cls, parts: Iterable[Estimate]) -> Estimate:
        """Concatenates the estimates of batches of datapoints."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


def unknown(khat: Tensor, standard_error: Tensor) -> Tensor:
    """Whether the weights cannot give the error of their sum. Such a sum is likely too low.

    This holds for a k-hat above 0.7, an error above 0.5 nats, or too few weights for a k-hat, unless all weights are
    equal. A datapoint that drew no large weight by chance has a small k-hat and a small error. Therefore all errors are
    unknown if half of the k-hats of the batch are above 0.5.
    """
    few = khat.isnan() & ~(standard_error < ROUNDING_ERROR)
    doubtful = (khat > KHAT_DOUBT) | few
    return (khat > KHAT_LIMIT) | ~(standard_error <= ERROR_LIMIT) | few | (doubtful.double().mean() > 0.5)


def half_width(standard_error: Tensor) -> Tensor:
    r"""Half the width of a 95 % interval of a log sum, in nats; shape as of its standard error.

    It is Student's quantile with :math:`1 / se^2` degrees of freedom, the number of equal weights with this error, by
    the first terms of its expansion around the normal quantile (Abramowitz, Stegun, 1964, 26.7.5).
    """
    z, variance = 1.959964, standard_error.square()
    correction = (z**3 + z) / 4 * variance + (5 * z**5 + 16 * z**3 + 3 * z) / 96 * variance.square()
    return (z + correction) * standard_error


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Computes the mean of independent values `(N,)` without NaN, and its standard error; NaN for a single value."""
    values = values[~values.isnan()]
    return float(values.mean()), float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def trust_figures(khat: Tensor, standard_error: Tensor) -> dict[str, float]:
    """Computes summary figures over datapoints of shape `(*)`, whose unknown errors are NaN."""
    return {
        "monte_carlo_se": float(standard_error.square().sum().sqrt()) / standard_error.numel(),
        "error_unknown": float(standard_error.isnan().double().mean()),
        "khat_above": float((khat > KHAT_LIMIT).double().mean()),
    }


def sample_counts(num_samples: int, mass: Tensor) -> Tensor:
    """Divides samples between strata of probabilities `(B, G)`: half equally, half by probability."""
    strata = mass.shape[-1]
    # The equal half keeps an overconfident proposal from starving a stratum; one sample says nothing about the spread.
    least = 2 if num_samples >= 2 * strata else 1
    share = (mass + 1 / strata) / 2
    counts = least + ((num_samples - least * strata) * share).floor().long()
    counts[..., 0] += num_samples - counts.sum(-1)
    return counts


def strata_of(counts: Tensor) -> Tensor:
    """The stratum of each sample in order, `(B, K)`, from the number of samples of each stratum, `(B, G)`."""
    positions = torch.arange(int(counts[0].sum()), device=counts.device).expand(len(counts), -1)
    return torch.searchsorted(counts.cumsum(-1).contiguous(), positions.contiguous(), right=True)
