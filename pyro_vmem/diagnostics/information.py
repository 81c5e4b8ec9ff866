"""Information measures of addresses, on bare tensors."""

from __future__ import annotations

from torch import Tensor

__all__ = ["address_entropy", "information_gain"]


def information_gain(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    r"""The information that a lookup gains, :math:`KL(q(a | x, M) \| p(a | M)) = \sum_a q_a \log (q_a / p_a)`, in nats.

    With the guide's logits it is the guide's claim; with those of the exact address posterior, the truth. Under a
    uniform prior it is at most :math:`\log |M|`.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017), equation 3
        | https://arxiv.org/abs/1709.07116

    Arguments:
        q_logits: Unnormalised :math:`\log q(a | x, M)`, with shape `(*, S)`.
        p_logits: Unnormalised :math:`\log p(a | M)`; broadcasts with `q_logits`. Slots may have `-inf` in both.

    Returns:
        Nats, with shape `(*)`; infinite where `q` is positive and `p` is zero.

    Raises:
        ValueError: If the number of slots differs.

    Example:
        >>> import torch
        >>> information_gain(torch.tensor([0.0, -torch.inf]), torch.zeros(2))  # one slot of two, for certain: log 2
        tensor(0.6931)
    """
    if q_logits.shape[-1] != p_logits.shape[-1]:
        raise ValueError(
            f"p_logits: expected {q_logits.shape[-1]} slots in the last dim as q_logits {tuple(q_logits.shape)} has, "
            f"got {tuple(p_logits.shape)}."
        )
    log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
    # 0 log 0 = 0: a slot that the guide excludes adds nothing, whatever the prior says of it.
    terms = (log_q.exp() * (log_q - log_p)).masked_fill(log_q.exp() == 0, 0.0)
    return terms.sum(-1)


def address_entropy(logits: Tensor) -> Tensor:
    r"""The entropy :math:`-\sum_a q_a \log q_a` of addresses, in nats; its exponential is the number of slots in play.

    Arguments:
        logits: Unnormalised log-probabilities, with shape `(*, S)`.

    Returns:
        Nats, with shape `(*)`.

    Example:
        >>> import torch
        >>> address_entropy(torch.zeros(4)).exp()
        tensor(4.)
    """
    log_q = logits.log_softmax(-1)
    return -(log_q.exp() * log_q).masked_fill(log_q.exp() == 0, 0.0).sum(-1)
