"""Information measures of addresses, on bare tensors of logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical

__all__ = ["InformationSummary", "information_gain"]


def information_gain(q_logits: Float[Tensor, "*#batch S"], p_logits: Float[Tensor, "*#batch S"]) -> Tensor:
    r"""Computes the information that a lookup gains, :math:`KL(q(a | M, x) \| p(a | M))`, in nats.

    The guide's logits give the gain that the guide claims. The logits of the exact address posterior give the true one.
    Under a uniform prior the gain is at most :math:`\log |M|`.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017), equation 3
        | https://arxiv.org/abs/1709.07116

    Arguments:
        q_logits: Unnormalised :math:`\log q(a | M, x)`, with shape `(*, S)`.
        p_logits: Unnormalised :math:`\log p(a | M)`; broadcasts with `q_logits`. Slots may have `-inf` in both.

    Returns:
        Nats, with shape `(*)`; infinite where `q` is positive and `p` is zero.

    Example:
        >>> import torch
        >>> information_gain(torch.tensor([0.0, -torch.inf]), torch.zeros(2))  # one slot of two, for certain: log 2
        tensor(0.6931)
    """
    log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
    # 0 log 0 = 0: a slot that the guide excludes adds nothing, whatever the prior says of it.
    terms = (log_q.exp() * (log_q - log_p)).masked_fill(log_q.exp() == 0, 0.0)
    return terms.sum(-1)


class InformationSummary(NamedTuple):
    r"""What the lookups of a set of targets say about them; information is in nats.

    :math:`q(a) = \frac{1}{N} \sum_x q(a | x)` is the marginal over targets. The information gain is the sum of two
    terms (ELBO surgery, Hoffman, Johnson, 2016): the mutual information of address and target, and the divergence of
    the marginal from the prior. A guide that always looks at one slot gains :math:`\log |M|` nats, none of which is
    mutual information.

    Attributes:
        information_gain: The mean of :math:`KL(q(a | x) \| p(a))`.
        mutual_information: :math:`I(a; x) = E_x KL(q(a | x) \| q(a))`.
        marginal_kl: :math:`KL(q(a) \| p(a))`.
        perplexity: The mean perplexity of :math:`q(a | x)`.
        slots_never_first: How many slots are the most probable one of no target.
    """

    information_gain: float
    mutual_information: float
    marginal_kl: float
    perplexity: float
    slots_never_first: int


def information_summary(q_logits: Tensor, p_logits: Tensor) -> InformationSummary:
    """Summarises the lookups of N targets `(N, S)` in one memory, whose prior `(S,)` is zero at slots not in use."""
    # In double precision: mutual information is a small difference for a poor guide.
    log_q, log_p = (logits.detach().cpu().double().log_softmax(-1) for logits in (q_logits, p_logits))
    marginal = log_q.logsumexp(0) - math.log(len(log_q))
    in_memory = log_p.exp() > 0
    first = torch.zeros_like(in_memory).index_fill(0, log_q.argmax(-1).unique(), True)
    return InformationSummary(
        information_gain=float(information_gain(log_q, log_p).mean()),
        mutual_information=float(information_gain(log_q, marginal).mean()),
        marginal_kl=float(information_gain(marginal, log_p)),
        perplexity=float(Categorical(logits=log_q).entropy().exp().mean()),
        slots_never_first=int((in_memory & ~first).sum()),
    )
