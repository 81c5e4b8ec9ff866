"""What a memory contributes to the evidence, against other memories and against itself without each slot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.random_state import seeded
from pyro_vmem.diagnostics.slot_weights import SlotWeights, slot_weights
from pyro_vmem.diagnostics.weights import mean_and_error
from pyro_vmem.memory import Memory
from pyro_vmem.model import VMA
from pyro_vmem.model.checks import check_weights

__all__ = ["Contribution", "contribution"]


@dataclass(frozen=True, eq=False)
class Contribution:
    r"""The contribution of a memory to each of :math:`B` targets, in nats, from :func:`contribution`.

    The evidence of all memories comes from the same samples, so differences have less noise than each value.

    Attributes:
        log_joint: :math:`\log p(a | M)\, p(x | m_a)`, with shape `(B, S)`: the logits of the exact address posterior.
        evidence: :math:`\log p(x | M)` under each memory, each `(B,)`: the `"right"` one, the `"wrong"` one if it was
            given, the `"shuffled"` one (the values of each template permuted: as much ink, no structure), and the
            `"blank"` one (templates of zeros, which a model that was not trained with empty slots has never seen).
        slot: The contribution of each slot, :math:`\log p(x | M) - \log p(x | M \setminus a)`, with shape `(B, S)`. The
            prior of the other slots is renormalised.
    """

    log_joint: Tensor
    evidence: dict[str, Tensor]
    slot: Tensor

    @property
    def worth(self) -> dict[str, Tensor]:
        """What the memory gains over each of the others, in nats, each `(B,)`."""
        right = self.evidence["right"]
        return {name: right - other for name, other in self.evidence.items() if name != "right"}

    def summary(self) -> dict[str, float]:
        """Returns means over targets and their standard errors (`_se`) for targets of the same memory.

        `slot_largest` is the contribution of the slot without which the target loses most.
        """
        columns = {"log_evidence": self.evidence["right"]}
        columns |= {f"worth_{name}": values for name, values in self.worth.items()}
        columns["slot_largest"] = self.slot.amax(-1)
        summary: dict[str, float] = {}
        for name, values in columns.items():
            summary[name], summary[f"{name}_se"] = mean_and_error(values)
        return summary


@torch.no_grad()
def contribution(
    vma: VMA,
    memory: Memory,
    x: Tensor,
    *,
    wrong: Memory | None = None,
    num_samples: Count = 10,
    seed: NonNegativeInt = 0,
    max_decodes: Count = 1024,
) -> Contribution:
    """Measures what the memory contributes to the evidence of each target, in nats.

    Parameters, Pyro's parameter store and the global random state stay as they are.

    Arguments:
        wrong: A memory that should not help, such as the other classes of `EpisodeSampler.distractors`.
        num_samples: Samples of z per slot for the evidence; addresses are summed exactly.
        seed: Seeds samples and permutations.

    Raises:
        ValueError: If a memory or x do not fit the model.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> memory, x = Memory(torch.randn(10, 5)), torch.randn(3, 5)
        >>> found = contribution(vma, memory, x, wrong=Memory(torch.randn(10, 5)))
        >>> sorted(found.worth), found.slot.shape
        (['blank', 'shuffled', 'wrong'], torch.Size([3, 10]))
    """
    check_weights(vma)
    vma.check(memory, x)
    if wrong is not None:
        vma.check(wrong, x)

    def weights(m: Memory) -> SlotWeights:
        torch.manual_seed(seed)  # the same samples for every memory
        return slot_weights(vma, m, x, num_samples, max_decodes=max_decodes)

    with seeded(seed), pyro.get_param_store().scope():
        given = _given_slots(vma, memory)
        shuffled, blank = _shuffled(given), _with_templates(given, torch.zeros_like(given.templates))
        right = weights(memory)
        others = ({} if wrong is None else {"wrong": wrong}) | {"shuffled": shuffled, "blank": blank}
        evidence = {name: weights(other).estimate.log_evidence for name, other in others.items()}
        return Contribution(
            log_joint=right.log_joint,
            evidence={"right": right.estimate.log_evidence} | evidence,
            slot=slot_contribution(right.log_prior, right.log_evidence),
        )


def slot_contribution(p_logits: Tensor, slot_log_evidence: Tensor) -> Tensor:
    r"""The contribution of each slot, from the logits of the prior and :math:`\log p(x | m_a)`, `(*, S)`, in nats.

    It needs no further decoder pass, if the prior of the others is renormalised:

    .. math:: p(x | M \setminus a) = \frac{\sum_{s \ne a} p(s | M)\, p(x | m_s)}{1 - p(a | M)}

    Slots of probability zero contribute 0, and the only slot with any probability contributes `inf`.
    """
    log_p = p_logits.log_softmax(-1).expand_as(slot_log_evidence)
    joint = log_p + slot_log_evidence
    rest = _without_each(joint) - _without_each(log_p)
    gain = joint.logsumexp(-1, keepdim=True) - rest
    gain = gain.masked_fill(log_p == -math.inf, 0.0)
    return gain.masked_fill(_without_each(log_p) == -math.inf, math.inf)


def _without_each(values: Tensor) -> Tensor:
    """The logsumexp over the last dim without each element, `(*, S)`."""
    # From both sides, because a difference of sums would cancel.
    nothing = torch.full_like(values[..., :1], -math.inf)
    before = torch.cat([nothing, values[..., :-1].logcumsumexp(-1)], -1)
    after = torch.cat([values[..., 1:].flip(-1).logcumsumexp(-1).flip(-1), nothing], -1)
    return torch.logaddexp(before, after)


def _given_slots(vma: VMA, memory: Memory) -> Memory:
    """The memory without learned slots, which come last, and come back when the memory is encoded."""
    learned = 0 if vma.templates is None or vma.encode(memory) is not memory else len(vma.templates.values)
    given = memory.num_slots - learned
    if learned == 0 or given == 0:  # where all are learned, encoding ignores what is given
        return memory
    labels, mask = (None if part is None else part[..., :given] for part in (memory.labels, memory.mask))
    templates = memory.templates[:, :given] if memory.per_datapoint else memory.templates[:given]
    return Memory(templates, labels, mask, per_datapoint=memory.per_datapoint)


def _shuffled(memory: Memory) -> Memory:
    """Permutes the values of each template."""
    templates = memory.templates
    flat = templates.flatten(2 if memory.per_datapoint else 1)
    order = torch.rand(flat.shape).argsort(-1).to(flat.device)
    return _with_templates(memory, flat.gather(-1, order).reshape(templates.shape))


def _with_templates(memory: Memory, templates: Tensor) -> Memory:
    return Memory(templates, memory.labels, memory.mask, per_datapoint=memory.per_datapoint)
