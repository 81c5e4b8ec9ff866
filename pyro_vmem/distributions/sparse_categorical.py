"""Categorical distributions that name few of their values, so that a million of them cost nothing."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence, register_kl
from torch.distributions.utils import lazy_property

from pyro_vmem.distributions.masking import UNUSED_LOGIT

__all__ = ["MixedCategorical", "TruncatedCategorical", "sparse_probs"]


class _Sparse(dist.Categorical):
    """A categorical whose logits are made only where someone asks for all of them.

    Attributes:
        kept_values: The values that have a probability of their own, with shape `(*, k)`.
    """

    kept_values: Tensor

    def _begin(self, like: Tensor, num_values: int, batch_shape: torch.Size, validate_args: bool | None) -> None:
        self._param, self._num_events = like, num_values
        torch.distributions.Distribution.__init__(self, batch_shape, validate_args=validate_args)

    @property
    def param_shape(self) -> torch.Size:
        return torch.Size([*self.batch_shape, self._num_events])

    @lazy_property
    def probs(self) -> Tensor:
        return self.logits.exp()


class TruncatedCategorical(_Sparse):
    """A categorical on some of its values, each row's own; enumeration visits those only.

    Arguments:
        logits: Unnormalised log-probabilities of the values that are kept, with shape `(*, k)`.
        support: Those values, no two the same, with shape `(*, k)`.
        num_values: How many values there are: 0..S-1.

    Example:
        >>> TruncatedCategorical(torch.zeros(2), torch.tensor([1, 3]), 4).probs
        tensor([0.0000, 0.5000, 0.0000, 0.5000])
    """

    arg_constraints = {"kept_logits": dist.constraints.real_vector}  # noqa: RUF012  # as of torch

    def __init__(self, logits: Tensor, support: Tensor, num_values: int, validate_args: bool | None = None) -> None:
        self.kept_values = support
        self.kept_logits = logits.log_softmax(-1)
        self._begin(logits, num_values, logits.shape[:-1], validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedCategorical:
        new = self._get_checked_instance(TruncatedCategorical, _instance)
        new.kept_values = self.kept_values.expand(*batch_shape, -1)
        new.kept_logits = self.kept_logits.expand(*batch_shape, -1)
        new._begin(self._param, self._num_events, torch.Size(batch_shape), False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def logits(self) -> Tensor:
        excluded = torch.full(self.param_shape, UNUSED_LOGIT, dtype=self._param.dtype, device=self._param.device)
        return excluded.scatter(-1, self.kept_values, self.kept_logits)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        found = value.unsqueeze(-1) == self.kept_values
        log_prob = torch.where(found, self.kept_logits, 0.0).sum(-1)
        return torch.where(found.any(-1), log_prob, UNUSED_LOGIT)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # as of torch
        places = torch.distributions.Categorical(logits=self.kept_logits).sample(torch.Size(sample_shape))
        return self.kept_values.expand(*places.shape, -1).gather(-1, places.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """In nats, in the shape of the batch."""
        return -(self.kept_logits.exp() * self.kept_logits).sum(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """The values that are kept, `(k, *)`; raises a `ValueError` unless expanded, as they differ from row to row."""
        if not expand:
            raise ValueError(
                "expand: the values of a truncated categorical differ from row to row, so they cannot be enumerated "
                'unexpanded. Use config_enumerate(guide, "parallel", expand=True).'
            )
        return self.kept_values.movedim(-1, 0)


class MixedCategorical(_Sparse):
    r"""A truncated categorical mixed with another over all values: :math:`(1 - \epsilon)\, q_k + \epsilon\, p`.

    Arguments:
        kept: The truncated one, with batch shape `(*)`.
        rest: The other, with a batch shape that broadcasts with that, `()` for one that is shared.
        share: The share :math:`\epsilon` of the other, in (0, 1).

    Example:
        >>> kept = TruncatedCategorical(torch.zeros(1), torch.tensor([3]), 4)
        >>> MixedCategorical(kept, dist.Categorical(logits=torch.zeros(4)), 0.4).probs
        tensor([0.1000, 0.1000, 0.1000, 0.7000])
    """

    arg_constraints = {}  # noqa: RUF012  # as of torch; its parts have theirs

    def __init__(
        self, kept: TruncatedCategorical, rest: dist.Categorical, share: float, validate_args: bool | None = None
    ) -> None:
        self.kept, self.rest, self.share = kept, rest, share
        self.kept_values = kept.kept_values
        self._begin(kept._param, kept._num_events, kept.batch_shape, validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixedCategorical:
        new = self._get_checked_instance(MixedCategorical, _instance)
        # What is shared stays unexpanded: all its values for each datapoint would be a large matrix.
        new.kept, new.rest, new.share = self.kept.expand(batch_shape), self.rest, self.share
        new.kept_values = new.kept.kept_values
        new._begin(self._param, self._num_events, torch.Size(batch_shape), False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def logits(self) -> Tensor:
        return torch.logaddexp(self.kept.logits + math.log1p(-self.share), self.rest.logits + math.log(self.share))

    def log_prob(self, value: Tensor) -> Tensor:
        kept = self.kept.log_prob(value) + math.log1p(-self.share)
        return torch.logaddexp(kept, self.rest.log_prob(value) + math.log(self.share))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # as of torch
        kept = self.kept.sample(sample_shape)
        if self.rest.batch_shape:
            rest = self.rest.sample(kept.shape[: kept.dim() - len(self.rest.batch_shape)])
        else:  # one random number a draw, so that processes can share them
            steps = self.rest.probs.double().cumsum(-1)
            rest = at_level(steps, steps[-1] * torch.rand(kept.shape, dtype=steps.dtype, device=kept.device))
        return torch.where(torch.rand(kept.shape, device=kept.device) < self.share, rest, kept)

    def entropy(self) -> Tensor:
        """In nats, in the shape of the batch."""
        # The sum over all values as if none were kept, and what is different at those that are.
        everywhere = self.share * (math.log(self.share) - _unexpanded(self.rest).entropy())
        values = self.kept_values.movedim(-1, 0)
        log_q, log_rest = self.log_prob(values), self.rest.log_prob(values) + math.log(self.share)
        return -everywhere - (log_q.exp() * log_q - log_rest.exp() * log_rest).sum(0)


def at_level(steps: Tensor, level: Tensor) -> Tensor:
    """The values at which a distribution function passes a level: draws, of a level that is uniform.

    Arguments:
        steps: The distribution function, not decreasing, with shape `(S,)` or `(*, S)`.
        level: The levels, from 0 to below the last step, with shape `(*)`.

    Returns:
        The values, with shape `(*)`; none whose step is zero.

    Example:
        >>> at_level(torch.tensor([0.2, 0.2, 1.0]), torch.tensor([0.1, 0.2, 0.9]))
        tensor([0, 2, 2])
    """
    if steps.dim() == 1:
        found = torch.searchsorted(steps, level, right=True)
    else:
        found = torch.searchsorted(steps.contiguous(), level.unsqueeze(-1), right=True).squeeze(-1)
    return found.clamp(max=steps.shape[-1] - 1)


def sparse_probs(q: dist.Categorical) -> tuple[Tensor, Tensor | None]:
    """The probabilities of those values that have any, and which these are; of all, and `None`, if all have.

    Example:
        >>> sparse_probs(TruncatedCategorical(torch.zeros(2), torch.tensor([1, 3]), 4))
        (tensor([0.5000, 0.5000]), tensor([1, 3]))
    """
    if isinstance(q, TruncatedCategorical):
        return q.kept_logits.exp(), q.kept_values
    return q.probs, None


@register_kl(TruncatedCategorical, dist.Categorical)  # type: ignore[untyped-decorator]
def _kl_of_truncated(q: TruncatedCategorical, p: dist.Categorical) -> Tensor:
    log_p = p.log_prob(q.kept_values.movedim(-1, 0)).movedim(0, -1)
    return (q.kept_logits.exp() * (q.kept_logits - log_p)).sum(-1)


@register_kl(MixedCategorical, dist.Categorical)  # type: ignore[untyped-decorator]
def _kl_of_mixed(q: MixedCategorical, p: dist.Categorical) -> Tensor:
    # As of the entropy.
    everywhere = q.share * (math.log(q.share) + kl_divergence(_unexpanded(q.rest), _unexpanded(p)))
    values = q.kept_values.movedim(-1, 0)
    log_q, log_p, log_rest = q.log_prob(values), p.log_prob(values), q.rest.log_prob(values) + math.log(q.share)
    return everywhere + (log_q.exp() * (log_q - log_p) - log_rest.exp() * (log_rest - log_p)).sum(0)


def _unexpanded(categorical: dist.Categorical) -> dist.Categorical:
    """The same with one row where all are one row in memory, as after `expand`."""
    logits = categorical.logits
    for dim in range(logits.dim() - 1):
        if logits.stride(dim) == 0:
            logits = logits.narrow(dim, 0, 1)
    return dist.Categorical(logits=logits)
