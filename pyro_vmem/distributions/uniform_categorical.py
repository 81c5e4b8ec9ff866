"""The uniform distribution over many values, some of them excluded, at a cost that does not grow with their number."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.distributions import register_kl
from torch.distributions.kl import _kl_categorical_categorical
from torch.distributions.utils import lazy_property

from pyro_vmem.distributions.masking import UNUSED_LOGIT

__all__ = ["UniformCategorical"]

REJECTED_AT_MOST = 0.9  # the share of excluded values above which draws are looked up in a list of the others


class UniformCategorical(dist.Categorical):
    """A categorical with equal probabilities, which holds no number per value; `logits` and `probs` are made on demand.

    Arguments:
        num_values: The number of values :math:`S`: 0..S-1.
        allowed: True at the values that are not excluded, with shape `(S,)`. Default: all.
        count: The number of values that are not excluded. Default: it is counted.
        like: A tensor with the dtype and device of the log-probabilities.

    Example:
        >>> q = UniformCategorical(4, torch.tensor([True, False, True, True]))
        >>> q.log_prob(torch.tensor([0, 1])).exp(), q.entropy().exp()
        (tensor([0.3333, 0.0000]), tensor(3.))
    """

    arg_constraints = {}  # noqa: RUF012  # as of torch; there is no parameter

    def __init__(
        self,
        num_values: int,
        allowed: Bool[Tensor, " S"] | None = None,
        count: int | None = None,
        like: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.allowed = allowed
        self.count = count if count is not None else num_values if allowed is None else int(allowed.sum())
        self._num_events, self._param = num_values, torch.zeros(()) if like is None else like
        torch.distributions.Distribution.__init__(self, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UniformCategorical:
        new = self._get_checked_instance(UniformCategorical, _instance)
        new.allowed, new.count, new._num_events, new._param = self.allowed, self.count, self._num_events, self._param
        torch.distributions.Distribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def param_shape(self) -> torch.Size:
        return torch.Size([*self.batch_shape, self._num_events])

    @lazy_property
    def logits(self) -> Tensor:
        values = torch.full(
            (self._num_events,), -math.log(self.count), dtype=self._param.dtype, device=self._param.device
        )
        if self.allowed is not None:
            values = values.masked_fill(~self.allowed, UNUSED_LOGIT - math.log(self.count))
        return values.expand(self.param_shape)

    @lazy_property
    def probs(self) -> Tensor:
        return self.logits.exp()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        log_prob = torch.full_like(value, -math.log(self.count), dtype=self._param.dtype)
        return log_prob if self.allowed is None else torch.where(self.allowed[value], log_prob, log_prob + UNUSED_LOGIT)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # as of torch
        shape, device = torch.Size([*sample_shape, *self.batch_shape]), self._param.device
        if self.allowed is None:
            return torch.randint(self._num_events, shape, device=device)
        if self.count < (1 - REJECTED_AT_MOST) * self._num_events:
            return self.allowed.nonzero().squeeze(-1)[torch.randint(self.count, shape, device=device)]
        drawn = torch.randint(self._num_events, shape, device=device)
        while bool((excluded := ~self.allowed[drawn]).any()):
            drawn = torch.where(excluded, torch.randint(self._num_events, shape, device=device), drawn)
        return drawn

    def entropy(self) -> Tensor:
        """In nats, in the shape of the batch."""
        return torch.full(self.batch_shape, math.log(self.count), dtype=self._param.dtype, device=self._param.device)


@register_kl(UniformCategorical, UniformCategorical)  # type: ignore[untyped-decorator]
def _kl_of_uniform(q: UniformCategorical, p: UniformCategorical) -> Tensor:
    if p.allowed is None or p.allowed is q.allowed:
        return p.entropy() - q.entropy()
    divergence: Tensor = _kl_categorical_categorical(q, p)
    return divergence
