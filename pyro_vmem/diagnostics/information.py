"""Information measures of addresses, on bare tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vmem._utils.checks import Positive

__all__ = ["InformationSummary", "address_entropy", "information_gain", "information_summary"]


def information_gain(q_logits: Float[Tensor, "..."], p_logits: Float[Tensor, "..."]) -> Tensor:
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
    log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
    # 0 log 0 = 0: a slot that the guide excludes adds nothing, whatever the prior says of it.
    terms = (log_q.exp() * (log_q - log_p)).masked_fill(log_q.exp() == 0, 0.0)
    return terms.sum(-1)


def address_entropy(logits: Float[Tensor, "... S"]) -> Tensor:
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


@dataclass(frozen=True)
class InformationSummary:
    r"""What lookups of a set of targets say about them, as :func:`information_summary` found it; in nats.

    :math:`q(a) = \frac{1}{N} \sum_x q(a | x)` is the marginal over targets. The information gain is the sum of two:
    what addresses tell about the target, :math:`I(a; x) = E_x KL(q(a | x) \| q(a))`, and how unlike the prior they are
    on the whole, :math:`KL(q(a) \| p(a))`. A guide that always looks at one slot gains :math:`\log |M|` nats, none of
    which is mutual information.

    Attributes:
        information_gain: The mean of :math:`KL(q(a | x) \| p(a))`: the sum of the next two.
        mutual_information: :math:`I(a; x)`, at most :math:`\min(\log |M|, \log N)`.
        marginal_kl: :math:`KL(q(a) \| p(a))`.
        entropy: The mean entropy of :math:`q(a | x)`.
        marginal_entropy: The entropy of :math:`q(a)`: `mutual_information` plus `entropy`.
        perplexity: The mean of :math:`\exp` of the entropy of :math:`q(a | x)`: the effective number of slots a target.
        marginal_perplexity: The same of :math:`q(a)`: the effective number of slots of all targets together.
        slots_neglected: How many slots have less than `threshold` of the share in :math:`q(a)` that the prior gives
            them.
        slots_never_first: How many slots are the most probable one of no target.
        coverage: The share of slots that are the most probable one of some target. With :math:`N < |M|` targets it is
            at most :math:`N / |M|`.
        threshold: The share of the prior below which a slot counts as neglected.
        num_slots: Slots :math:`|M|` to which the prior gives any probability; the others are not counted anywhere.
        num_targets: Targets :math:`N`.

    References:
        | ELBO surgery: yet another way to carve up the variational evidence lower bound (Hoffman, Johnson, 2016),
        | section 3 | http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
    """

    information_gain: float
    mutual_information: float
    marginal_kl: float
    entropy: float
    marginal_entropy: float
    perplexity: float
    marginal_perplexity: float
    slots_neglected: int
    slots_never_first: int
    coverage: float
    threshold: float
    num_slots: int
    num_targets: int

    def as_dict(self) -> dict[str, float]:
        """The fields by name."""
        return dataclasses.asdict(self)

    def summary(self) -> dict[str, float]:
        r"""The fields by name, and of each information its `_bits` and its `_share` of :math:`\log |M|`.

        With one slot there is nothing to tell, and shares are NaN.
        """
        summary = self.as_dict()
        for name in ("information_gain", "mutual_information", "marginal_kl"):
            summary[f"{name}_bits"] = summary[name] / math.log(2)
            summary[f"{name}_share"] = summary[name] / math.log(self.num_slots) if self.num_slots > 1 else math.nan
        return summary


def information_summary(
    q_logits: Float[Tensor, "N S"], p_logits: Float[Tensor, " S"], *, threshold: Positive = 0.1
) -> InformationSummary:
    r"""What the lookups of a set of targets in one memory say about them.

    Arguments:
        q_logits: Unnormalised :math:`\log q(a | x, M)` of :math:`N` targets, with shape `(N, S)`.
        p_logits: Unnormalised :math:`\log p(a | M)`, with shape `(S,)`; slots may have `-inf`, or so little that it is
            zero as a probability, as slots of a memory that are not in use have.
        threshold: A slot is neglected if :math:`q(a)` is less than this share of :math:`p(a)`.

    Returns:
        Information in nats, and how many of the slots the targets use.

    Raises:
        ValueError: If the shapes are not these; memories of their own for each target have no slots in common.

    Example:
        >>> q_logits = 9 * torch.eye(4)[[0, 1, 1]]  # three targets, each sure of a slot, two of the same
        >>> found = information_summary(q_logits, torch.zeros(4))
        >>> found.slots_never_first, round(found.marginal_perplexity, 1)
        (2, 1.9)
    """
    if len(q_logits) == 0:
        raise ValueError("q_logits: expected at least one target, got none.")
    q_logits, p_logits = q_logits.detach().cpu().double(), p_logits.detach().cpu().double()
    log_q = q_logits.log_softmax(-1)
    marginal = log_q.logsumexp(0) - math.log(len(log_q))
    prior, used = p_logits.softmax(-1), marginal.exp()
    in_memory = prior > 0
    first = torch.zeros_like(in_memory).index_fill(0, log_q.argmax(-1).unique(), True) & in_memory
    num_slots = int(in_memory.sum())
    entropy = address_entropy(log_q)
    marginal_entropy = float(address_entropy(marginal))
    return InformationSummary(
        information_gain=float(information_gain(log_q, p_logits).mean()),
        mutual_information=float(information_gain(log_q, marginal).mean()),
        marginal_kl=float(information_gain(marginal, p_logits)),
        entropy=float(entropy.mean()),
        marginal_entropy=marginal_entropy,
        perplexity=float(entropy.exp().mean()),
        marginal_perplexity=math.exp(marginal_entropy),
        slots_neglected=int(((used < threshold * prior) & in_memory).sum()),
        slots_never_first=num_slots - int(first.sum()),
        coverage=int(first.sum()) / num_slots,
        threshold=threshold,
        num_slots=num_slots,
        num_targets=len(log_q),
    )
