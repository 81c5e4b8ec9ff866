"""Sparse categorical distributions, whose cost does not depend on the number of values."""

from __future__ import annotations

import abc
import math
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.distributions import kl_divergence, register_kl
from torch.distributions.utils import lazy_property

from pyro_vmem._utils.checks import Count, PositiveInt
from pyro_vmem.distributions.masking import UNUSED_LOGIT
from pyro_vmem.distributions.uniform_categorical import UniformCategorical

__all__ = ["MixedCategorical", "SparseCategorical", "TruncatedCategorical", "sparse_parts", "top", "top_and_rest"]


class SparseCategorical(dist.Categorical, abc.ABC):
    """A categorical over :math:`S` values with explicit probabilities for few of them.

    No method costs rows times S, except `logits` and `probs`, which are dense. The functions :func:`sparse_parts`,
    :func:`top` and :func:`top_and_rest` take any categorical, sparse or dense.

    Attributes:
        kept_values: The distinct values with explicit probabilities, with shape `(*, k)`.
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

    @abc.abstractmethod
    def parts(self) -> list[tuple[Tensor, Tensor | None]]:
        """Values and log-probabilities of shape `(*, k)`; see :func:`sparse_parts`."""

    @abc.abstractmethod
    def top(self, k: int) -> Tensor:
        """Values of shape `(*, k)`; see :func:`top`."""

    @abc.abstractmethod
    def sample_beside(self, top: Tensor) -> Tensor:
        """A draw, with shape `(*)`, given that it is none of the most probable values `top`, `(*, k)`."""

    @abc.abstractmethod
    def mixed_with(self, other: dist.Categorical, share: float) -> MixedCategorical:
        r"""The mixture :math:`(1 - \epsilon)\, q + \epsilon\, p` with a categorical :math:`p` over all values."""

    @abc.abstractmethod
    def mixed_with_its_top(self, k: int, share: float) -> SparseCategorical:
        """The mixture with the uniform distribution on the `k` most probable kept values, or on all kept values."""


class TruncatedCategorical(SparseCategorical):
    """A categorical on some values, different in each row. Enumeration visits only these.

    Arguments:
        logits: Unnormalised log-probabilities of the kept values, with shape `(*, k)`.
        support: The kept values, distinct, with shape `(*, k)`.
        num_values: The number of values: 0..S-1.

    Raises:
        ValueError: If a logit is NaN.

    Example:
        >>> TruncatedCategorical(torch.zeros(2), torch.tensor([1, 3]), 4).probs
        tensor([0.0000, 0.5000, 0.0000, 0.5000])
    """

    arg_constraints = {"kept_logits": dist.constraints.real_vector}  # noqa: RUF012  # as of torch

    def __init__(
        self,
        logits: Float[Tensor, "*#batch k"],
        support: Integer[Tensor, "*#batch k"],
        num_values: PositiveInt,
        validate_args: bool | None = None,
    ) -> None:
        self.kept_values = support
        self.kept_logits = logits.log_softmax(-1)
        try:
            self._begin(logits, num_values, logits.shape[:-1], validate_args)
        except ValueError as error:  # of what the arguments became
            raise ValueError(str(error).replace("kept_", "", 1)) from error

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
        """The kept values, `(k, *)`; raises a `ValueError` unless expanded, because rows differ."""
        if not expand:
            raise ValueError(
                "expand: the values of a truncated categorical differ from row to row, so they cannot be enumerated "
                'unexpanded. Use config_enumerate(guide, "parallel", expand=True).'
            )
        return self.kept_values.movedim(-1, 0)

    def parts(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(self.kept_logits.exp(), self.kept_values)]

    def top(self, k: int) -> Tensor:
        return self.kept_values.gather(-1, self.kept_logits.topk(k, dim=-1).indices)

    def sample_beside(self, top: Tensor) -> Tensor:
        places = _sample_beside(self.kept_logits, _is_among(self.kept_values, top))
        return self.kept_values.gather(-1, places.unsqueeze(-1)).squeeze(-1)

    def mixed_with(self, other: dist.Categorical, share: float) -> MixedCategorical:
        return MixedCategorical(self, other, share)

    def mixed_with_its_top(self, k: int, share: float) -> TruncatedCategorical:
        k = min(k, self.kept_values.shape[-1])
        best = self.kept_logits.topk(k, dim=-1).indices
        log_uniform = torch.full_like(self.kept_logits, -math.inf).scatter(-1, best, math.log(share / k))
        logits = torch.logaddexp(self.kept_logits + math.log1p(-share), log_uniform)
        return TruncatedCategorical(logits, self.kept_values, self._num_events)


class MixedCategorical(SparseCategorical):
    r"""A mixture of a truncated categorical and one over all values: :math:`q = (1 - \epsilon)\, q_k + \epsilon\, p`.

    Arguments:
        kept: The truncated categorical :math:`q_k`, with batch shape `(*)`.
        rest: The categorical :math:`p` over all values, with a batch shape that broadcasts; `()` if shared.
        share: The share :math:`\epsilon` of :math:`p`, in (0, 1).

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
        # A shared categorical is not expanded: datapoints times values would be a large matrix.
        new.kept, new.rest, new.share = self.kept.expand(batch_shape), self.rest, self.share
        new.kept_values = new.kept.kept_values
        new._begin(self._param, self._num_events, torch.Size(batch_shape), False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def logits(self) -> Tensor:
        return torch.logaddexp(self.kept.logits + math.log1p(-self.share), self._log_rest(None))

    def _log_rest(self, value: Tensor | None) -> Tensor:
        r""":math:`\log \epsilon\, p_a` of values, or of all."""
        return (self.rest.logits if value is None else self.rest.log_prob(value)) + math.log(self.share)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.logaddexp(self.kept.log_prob(value) + math.log1p(-self.share), self._log_rest(value))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # as of torch
        kept = self.kept.sample(sample_shape)
        if self.rest.batch_shape or isinstance(self.rest, UniformCategorical):
            rest = self.rest.sample(kept.shape[: kept.dim() - len(self.rest.batch_shape)])
        else:  # Inversion of the distribution function needs one random number per draw, not a row of S probabilities.
            steps = self.rest.probs.double().cumsum(-1)
            rest = _at_level(steps, steps[-1] * torch.rand(kept.shape, dtype=steps.dtype, device=kept.device))
        return torch.where(torch.rand(kept.shape, device=kept.device) < self.share, rest, kept)

    def entropy(self) -> Tensor:
        r"""In nats, in the shape of the batch.

        .. math:: H(q) = -\sum_a \epsilon p_a \log \epsilon p_a
            - \sum_{a\ \mathrm{kept}} (q_a \log q_a - \epsilon p_a \log \epsilon p_a)

        The first sum, over all values, is :math:`\epsilon (\log \epsilon - H(p))`.
        """
        everywhere = self.share * (math.log(self.share) - _unexpanded(self.rest).entropy())
        values = self.kept_values.movedim(-1, 0)
        log_q, log_rest = self.log_prob(values), self._log_rest(values)
        return -everywhere - (log_q.exp() * log_q - log_rest.exp() * log_rest).sum(0)

    def parts(self) -> list[tuple[Tensor, Tensor | None]]:
        return [
            ((1 - self.share) * self.kept.kept_logits.exp(), self.kept_values),
            (self.share * self.rest.probs, None),
        ]

    def top(self, k: int) -> Tensor:
        # Candidates are the kept values and the most probable other values of the other categorical.
        kept = self.kept_values
        likely = self.rest.logits.topk(min(k + kept.shape[-1], self._num_events), dim=-1).indices
        likely = likely.expand(*self.batch_shape, -1)
        candidates = torch.cat([kept, likely], -1)
        log_q = self.log_prob(candidates.movedim(-1, 0)).movedim(0, -1)
        log_q[..., kept.shape[-1] :].masked_fill_(_is_among(likely, kept), -math.inf)  # already among the candidates
        return candidates.gather(-1, log_q.topk(k, dim=-1).indices)

    def sample_beside(self, top: Tensor) -> Tensor:
        rest, share, shape = self.rest.probs.double(), self.share, self.batch_shape
        mass_of_top = rest.expand(*shape, -1).gather(-1, top)
        left_of_rest = (share * (rest.sum(-1) - mass_of_top.sum(-1))).clamp(min=0.0)
        excluded = _is_among(self.kept_values, top)
        left_of_kept = ((1 - share) * self.kept.kept_logits.exp().double().masked_fill(excluded, 0.0)).sum(-1)
        chance = torch.rand(shape, dtype=rest.dtype, device=rest.device) * (left_of_kept + left_of_rest)
        of_kept = self.kept.sample_beside(top)
        # Draws from the other categorical by its distribution function without the steps of the values in `top`: a
        # level past such a step is raised by it.
        steps = rest.cumsum(-1)
        level = torch.rand(shape, dtype=rest.dtype, device=rest.device) * (steps[..., -1] - mass_of_top.sum(-1))
        for value in top.sort(-1).values.split(1, -1):
            step = rest.expand(*shape, -1).gather(-1, value).squeeze(-1)
            before = steps.expand(*shape, -1).gather(-1, value).squeeze(-1) - step
            level = torch.where(level >= before, level + step, level)
        of_rest = _at_level(steps if steps.dim() == 1 else steps.expand(*shape, -1), level)
        return torch.where(chance < left_of_kept, of_kept, of_rest)

    def mixed_with(self, other: dist.Categorical, share: float) -> MixedCategorical:
        # The two categoricals over all values become one.
        of_rest = (1 - share) * self.share
        total = of_rest + share
        rest = dist.Categorical(probs=(of_rest * self.rest.probs + share * other.probs) / total)
        return MixedCategorical(self.kept, rest, total)

    def mixed_with_its_top(self, k: int, share: float) -> MixedCategorical:
        # The share of the other categorical decreases.
        of_rest = (1 - share) * self.share
        return MixedCategorical(self.kept.mixed_with_its_top(k, share / (1 - of_rest)), self.rest, of_rest)


# Functions of any categorical, sparse or dense


def sparse_parts(q: torch.distributions.Categorical) -> list[tuple[Tensor, Tensor | None]]:
    r"""A categorical as a sum of parts: probabilities with their values.

    Arguments:
        q: The categorical, with batch shape `(*)`.

    Returns:
        Pairs of probabilities `(*, k)` and values `(*, k)`. `None` instead of values means all: probabilities are
        `(*, S)`, with leading dims that broadcast.

    Example:
        >>> sparse_parts(TruncatedCategorical(torch.zeros(2), torch.tensor([1, 3]), 4))
        [(tensor([0.5000, 0.5000]), tensor([1, 3]))]
    """
    return q.parts() if isinstance(q, SparseCategorical) else [(q.probs, None)]


def top(q: torch.distributions.Categorical, k: Count) -> Tensor:
    """The `k` most probable values of each row, `(*, k)`, best first. A row must have at least `k` values.

    Example:
        >>> top(TruncatedCategorical(torch.tensor([1.0, 2.0]), torch.tensor([40, 70]), 1_000_000), 1)
        tensor([70])
    """
    return q.top(k) if isinstance(q, SparseCategorical) else q.logits.topk(k, dim=-1).indices


@torch.no_grad()
def top_and_rest(q: torch.distributions.Categorical, k: Count) -> Tensor:
    r"""The :math:`k` most probable values of each row, and a draw from :math:`q` given that it is none of these.

    Arguments:
        q: The categorical, with batch shape `(*)`.
        k: The number of values, less than all, or less than the kept values of a truncated categorical.

    Returns:
        Values `(k + 1, *)`, the most probable first, the draw last. If the other values have probability zero, the draw
        is any of them.

    Example:
        >>> top_and_rest(torch.distributions.Categorical(probs=torch.tensor([0.1, 0.6, 0.0, 0.3])), 2)
        tensor([1, 3, 0])
        >>> top_and_rest(TruncatedCategorical(torch.tensor([1.0, 2.0]), torch.tensor([40, 70]), 1_000_000), 1)
        tensor([70, 40])
    """
    values = top(q, k)
    if isinstance(q, SparseCategorical):
        drawn = q.sample_beside(values)
    else:
        drawn = _sample_beside(q.logits, torch.zeros_like(q.logits, dtype=torch.bool).scatter(-1, values, True))
    return torch.cat([values, drawn.unsqueeze(-1)], -1).movedim(-1, 0)


def _sample_beside(logits: Tensor, excluded: Tensor) -> Tensor:
    """A draw that is none of the excluded values, with shape `(*)`."""
    # If the probability of the others has underflowed, any of them will do: its weight is zero.
    lowest = torch.finfo(logits.dtype).min
    others = logits.clamp(min=lowest / 2).masked_fill(excluded, lowest)
    return torch.distributions.Categorical(logits=others).sample()


def _at_level(steps: Tensor, level: Tensor) -> Tensor:
    """The values, `(*)`, at which a distribution function, `(S,)` or `(*, S)`, crosses levels `(*)`.

    With uniform levels these are draws. A value of probability zero is never returned.
    """
    if steps.dim() == 1:
        found = torch.searchsorted(steps, level, right=True)
    else:
        found = torch.searchsorted(steps.contiguous(), level.unsqueeze(-1), right=True).squeeze(-1)
    return found.clamp(max=steps.shape[-1] - 1)


def _is_among(values: Tensor, others: Tensor) -> Tensor:
    return (values.unsqueeze(-1) == others.unsqueeze(-2)).any(-1)


@register_kl(TruncatedCategorical, dist.Categorical)  # type: ignore[untyped-decorator]
def _kl_of_truncated(q: TruncatedCategorical, p: dist.Categorical) -> Tensor:
    log_p = p.log_prob(q.kept_values.movedim(-1, 0)).movedim(0, -1)
    return (q.kept_logits.exp() * (q.kept_logits - log_p)).sum(-1)


@register_kl(MixedCategorical, dist.Categorical)  # type: ignore[untyped-decorator]
def _kl_of_mixed(q: MixedCategorical, p: dist.Categorical) -> Tensor:
    r"""The KL divergence with the rest :math:`r`: a sum over all values, and a correction for the kept ones.

    .. math:: \epsilon (\log \epsilon + KL(r \| p))
        + \sum_{a\ \mathrm{kept}} (q_a \log (q_a / p_a) - \epsilon r_a \log (\epsilon r_a / p_a))
    """
    everywhere = q.share * (math.log(q.share) + kl_divergence(_unexpanded(q.rest), _unexpanded(p)))
    values = q.kept_values.movedim(-1, 0)
    log_q, log_p, log_rest = q.log_prob(values), p.log_prob(values), q._log_rest(values)
    return everywhere + (log_q.exp() * (log_q - log_p) - log_rest.exp() * (log_rest - log_p)).sum(0)


def _unexpanded(categorical: dist.Categorical) -> dist.Categorical:
    """One row, if all rows share their memory, as after `expand`."""
    if isinstance(categorical, UniformCategorical):
        return categorical.expand(())
    logits = categorical.logits
    for dim in range(logits.dim() - 1):
        if logits.stride(dim) == 0:
            logits = logits.narrow(dim, 0, 1)
    return dist.Categorical(logits=logits)
