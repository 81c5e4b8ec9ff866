"""The most probable values of a categorical, and one drawn from the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vmem.distributions.sparse_categorical import MixedCategorical, TruncatedCategorical, at_level

__all__ = ["top_and_rest"]


@torch.no_grad()
def top_and_rest(q: torch.distributions.Categorical, k: int) -> Tensor:
    r"""The :math:`k` most probable values of each row, and a draw from :math:`q` given that it is none of these.

    Of a sparse categorical over :math:`S` values nothing of the size of the rows times :math:`S` is made.

    Arguments:
        q: The categorical, with batch shape `(*)`.
        k: How many values, fewer than those that have a probability of their own: all, or those that a truncated
            categorical keeps.

    Returns:
        Values `(k + 1, *)`, the most probable first, what was drawn last. Where the others have no probability at all,
        what is drawn is any value.

    Example:
        >>> top_and_rest(torch.distributions.Categorical(probs=torch.tensor([0.1, 0.6, 0.0, 0.3])), 2)
        tensor([1, 3, 0])
        >>> top_and_rest(TruncatedCategorical(torch.tensor([1.0, 2.0]), torch.tensor([40, 70]), 1_000_000), 1)
        tensor([70, 40])
    """
    if isinstance(q, TruncatedCategorical):
        places = _dense(q.kept_logits, k).movedim(0, -1)
        return q.kept_values.gather(-1, places).movedim(-1, 0)
    if isinstance(q, MixedCategorical):
        top = _most_probable(q, k)
        drawn = _drawn_beside(q, top)
        return torch.cat([top, drawn.unsqueeze(-1)], -1).movedim(-1, 0)
    return _dense(q.logits, k)


def _dense(logits: Tensor, k: int) -> Tensor:
    top = logits.topk(k, dim=-1).indices
    # Where the others' probability has underflowed, any of them will do: its weight is zero.
    others = logits.clamp(min=torch.finfo(logits.dtype).min / 2).scatter(-1, top, -math.inf)
    drawn = torch.distributions.Categorical(logits=others).sample()
    return torch.cat([top.movedim(-1, 0), drawn.unsqueeze(0)])


def _most_probable(q: MixedCategorical, k: int) -> Tensor:
    """The k most probable values of each row, `(*, k)`."""
    # They are among those that are kept, and of the others the most probable of the other categorical.
    kept, num_values = q.kept_values, q.param_shape[-1]
    likely = q.rest.logits.topk(min(k + kept.shape[-1], num_values), dim=-1).indices.expand(*q.batch_shape, -1)
    candidates = torch.cat([kept, likely], -1)
    log_q = q.log_prob(candidates.movedim(-1, 0)).movedim(0, -1)
    log_q[..., kept.shape[-1] :].masked_fill_(_is_among(likely, kept), -math.inf)  # which are there already
    return candidates.gather(-1, log_q.topk(k, dim=-1).indices)


def _drawn_beside(q: MixedCategorical, top: Tensor) -> Tensor:
    """A draw from q given that it is none of some values `(*, k)`."""
    rest, share, shape = q.rest.probs.double(), q.share, q.batch_shape
    mass_of_top = rest.expand(*shape, -1).gather(-1, top)
    left_of_rest = (share * (rest.sum(-1) - mass_of_top.sum(-1))).clamp(min=0.0)
    excluded = _is_among(q.kept_values, top)
    left_of_kept = ((1 - share) * q.kept.kept_logits.exp().double().masked_fill(excluded, 0.0)).sum(-1)
    chance = torch.rand(shape, dtype=rest.dtype, device=rest.device) * (left_of_kept + left_of_rest)

    lowest = torch.finfo(q.kept.kept_logits.dtype).min
    logits = q.kept.kept_logits.clamp(min=lowest / 2).masked_fill(excluded, lowest)
    place = torch.distributions.Categorical(logits=logits).sample().unsqueeze(-1)
    of_kept = q.kept_values.gather(-1, place).squeeze(-1)

    # Of the other categorical by its distribution function, from which the steps of the values in `top` are taken out.
    steps = rest.cumsum(-1)
    level = torch.rand(shape, dtype=rest.dtype, device=rest.device) * (steps[..., -1] - mass_of_top.sum(-1))
    for value in top.sort(-1).values.split(1, -1):
        step = rest.expand(*shape, -1).gather(-1, value).squeeze(-1)
        before = steps.expand(*shape, -1).gather(-1, value).squeeze(-1) - step
        level = torch.where(level >= before, level + step, level)
    of_rest = at_level(steps if steps.dim() == 1 else steps.expand(*shape, -1), level)
    return torch.where(chance < left_of_kept, of_kept, of_rest)


def _is_among(values: Tensor, others: Tensor) -> Tensor:
    return (values.unsqueeze(-1) == others.unsqueeze(-2)).any(-1)
