"""Importance weights that were drawn in strata: their sum of means, and how far it can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vmem.diagnostics.weights import rounding, tail_index

__all__ = ["StratifiedWeights"]

MASS = 0.99  # the share of an estimate by whose strata it is judged


@dataclass(frozen=True, eq=False)
class StratifiedWeights:
    r"""Samples of each datapoint in :math:`G` strata, whose means add up: :math:`\sum_g \frac{1}{n_g} \sum_k w_{gk}`.

    Strata are slots that are summed over, and one of slots that are sampled; with a single stratum it is the mean of
    the weights.

    Arguments:
        log_weights: :math:`\log w`, with shape `(K, B)`.
        stratum: The stratum of each sample, with shape `(K, B)`; integers.
        counts: The samples :math:`n_g \ge 1` of each stratum, with shape `(G, B)`; integers.

    Example:
        >>> log_weights = torch.tensor([[1.0], [3.0], [5.0]]).log()  # a mean of 2, and 5
        >>> weights = StratifiedWeights(log_weights, torch.tensor([[0], [0], [1]]), torch.tensor([[2], [1]]))
        >>> round(float(weights.log_sum.exp()), 4)
        7.0
    """

    log_weights: Tensor
    stratum: Tensor
    counts: Tensor

    @classmethod
    def unstratified(cls, log_weights: Tensor) -> StratifiedWeights:
        """All samples `(K, B)` in one stratum."""
        stratum = torch.zeros_like(log_weights, dtype=torch.long)
        return cls(log_weights, stratum, torch.full_like(stratum[:1], len(log_weights)))

    @classmethod
    def even(cls, log_weights: Tensor) -> StratifiedWeights:
        """As many samples of every stratum: `(n, G, B)`."""
        samples, strata, batch = log_weights.shape
        stratum = torch.arange(strata, device=log_weights.device).repeat(samples).unsqueeze(-1).expand(-1, batch)
        return cls(log_weights.flatten(0, 1), stratum, torch.full_like(stratum[:strata], samples))

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
        the proposal, and what strata outside of these do has no part in the estimate.
        """
        log_shares = self._log_shares()
        shares = self._by_stratum(log_shares.softmax(0))
        relative = log_shares - log_shares.logsumexp(0) - (shares / self.counts).log().gather(0, self.stratum)
        ordered, order = shares.sort(0, descending=True)
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, ordered.cumsum(0) - ordered < MASS)
        kept = kept.gather(0, self.stratum)
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
