"""What a memory contributes to the evidence, measured against other memories and without each of its slots.

Beside it, how the bound divides into reconstruction and divergences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.random_state import seeded
from pyro_vmem.diagnostics.slot_weights import SlotWeights, slot_weights
from pyro_vmem.infer import IWAE_ELBO
from pyro_vmem.memory import EncodedMemory, Memory
from pyro_vmem.model import VMA
from pyro_vmem.model.checks import check_weights

__all__ = ["Contribution", "contribution", "slot_contribution"]


@dataclass(frozen=True, eq=False)
class Contribution:
    r"""What :func:`contribution` found for each of :math:`B` targets, in nats.

    The evidence under all memories comes from the same samples, so differences are less noisy than each by itself.

    Attributes:
        log_joint: :math:`\log p(a | M)\, p(x | m_a)`, with shape `(B, S)`: the logits of the exact address posterior.
        log_evidence: :math:`\log p(x | M)`, with shape `(B,)`.
        log_evidence_wrong: The same with the wrong memory, if one was given.
        log_evidence_shuffled: The same with each template's values permuted: as much ink, no structure.
        log_evidence_blank: The same with templates of zeros. Unless the model was trained with empty slots, it has
            never seen one: the value tells what happens then, not what a model without memory would reach.
        slot: What each slot contributes, :math:`\log p(x | M) - \log p(x | M \setminus a)`, with shape `(B, S)`;
            see :func:`slot_contribution`.
        reconstruction: :math:`E_q \log p(x | z, m_a)`, with shape `(B,)`.
        kl_a: :math:`KL(q(a | M, x) \| p(a | M))`, with shape `(B,)`.
        kl_z: :math:`E_q KL(q(z | x, m_a) \| p(z | m_a))`, with shape `(B,)`.
    """

    log_joint: Tensor
    log_evidence: Tensor
    log_evidence_wrong: Tensor | None
    log_evidence_shuffled: Tensor
    log_evidence_blank: Tensor
    slot: Tensor
    reconstruction: Tensor
    kl_a: Tensor
    kl_z: Tensor

    @property
    def elbo(self) -> Tensor:
        """The one-sample bound, reconstruction minus both divergences, in nats, with shape `(B,)`."""
        return self.reconstruction - self.kl_a - self.kl_z

    @property
    def worth(self) -> dict[str, Tensor]:
        """What the memory gains over the `"wrong"`, the `"shuffled"` and the `"blank"` one, each `(B,)`."""
        others = {
            "wrong": self.log_evidence_wrong,
            "shuffled": self.log_evidence_shuffled,
            "blank": self.log_evidence_blank,
        }
        return {name: self.log_evidence - other for name, other in others.items() if other is not None}

    def summary(self) -> dict[str, float]:
        """Means over targets, with their standard errors (`_se`) as targets vary while the memory stays.

        `worth_wrong`, `worth_shuffled` and `worth_blank` are differences of evidence, target by target; `slot_largest`
        is what the slot contributes without which the target loses most.
        """
        columns = {"log_evidence": self.log_evidence}
        columns |= {f"worth_{name}": values for name, values in self.worth.items()}
        columns |= {"slot_largest": self.slot.amax(-1), "elbo": self.elbo, "reconstruction": self.reconstruction}
        columns |= {"kl_a": self.kl_a, "kl_z": self.kl_z}
        summary: dict[str, float] = {}
        for name, values in columns.items():
            size = len(values)
            summary[name] = float(values.mean())
            summary[f"{name}_se"] = float(values.std()) / math.sqrt(size) if size > 1 else math.nan
        return summary


@torch.no_grad()
def contribution(
    vma: VMA,
    memory: Memory,
    x: Tensor,
    *,
    wrong: Memory | None = None,
    num_samples: Count = 10,
    num_particles: Count = 16,
    seed: NonNegativeInt = 0,
    max_decodes: Count = 1024,
) -> Contribution:
    r"""Measures what the memory contributes to the evidence of each target, and how the bound divides, in nats.

    Parameters, Pyro's parameter store and the global random state stay as they are.

    Arguments:
        vma: The model and its guide.
        memory: The memory :math:`M`.
        x: The targets, with shape `(B, *event)`.
        wrong: A memory that should not help, such as `EpisodeSampler.distractors` makes: other classes.
        num_samples: Samples of z a slot, from which the evidence is estimated; addresses are summed exactly.
        num_particles: Particles, from which the terms of the bound are estimated.
        seed: Seeds samples and permutations.
        max_decodes: How many decodes to hold in memory at once.

    Returns:
        The contributions.

    Raises:
        ValueError: If a number is less than 1, or a memory or x do not fit the model.

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
        return Contribution(
            log_joint=right.log_joint,
            log_evidence=right.estimate.log_evidence,
            log_evidence_wrong=None if wrong is None else weights(wrong).estimate.log_evidence,
            log_evidence_shuffled=weights(shuffled).estimate.log_evidence,
            log_evidence_blank=weights(blank).estimate.log_evidence,
            slot=slot_contribution(right.log_prior, right.log_evidence),
            **_bound(vma, vma.encode(memory), x, num_particles, max_decodes),
        )


def slot_contribution(p_logits: Float[Tensor, "*#batch S"], slot_log_evidence: Float[Tensor, "*#batch S"]) -> Tensor:
    r"""What each slot contributes to the evidence: :math:`\log p(x | M) - \log p(x | M \setminus a)`, in nats.

    Without slot :math:`a` the prior of the others is renormalised, so that no decode is needed beyond those of the
    slots' evidence:

    .. math:: p(x | M \setminus a) = \frac{\sum_{s \ne a} p(s | M)\, p(x | m_s)}{1 - p(a | M)}

    A prior that scores each template by itself (uniform, or :class:`pyro_vmem.LearnedPrior`) is just that. A slot that
    explains the target better than the others do on average contributes more than zero, any other less.

    Arguments:
        p_logits: Unnormalised :math:`\log p(a | M)`, with shape `(S,)` or `(*, S)`; `-inf` for slots not in use.
        slot_log_evidence: :math:`\log p(x | m_a)`, with shape `(*, S)`.

    Returns:
        Nats, with shape `(*, S)`; zero for slots of probability zero, `inf` for the only one that has any.

    Raises:
        ValueError: If the number of slots differs.

    Example:
        >>> slot_contribution(torch.zeros(2), torch.tensor([[-10.0, -12.0]])).round(decimals=2)
        tensor([[ 1.4300, -0.5700]])
    """
    log_p = p_logits.log_softmax(-1).expand_as(slot_log_evidence)
    joint = log_p + slot_log_evidence
    rest = _without_each(joint) - _without_each(log_p)
    gain = joint.logsumexp(-1, keepdim=True) - rest
    gain = gain.masked_fill(log_p == -math.inf, 0.0)
    return gain.masked_fill(_without_each(log_p) == -math.inf, math.inf)


def _without_each(values: Tensor) -> Tensor:
    """The logsumexp over the last dim without each element, `(*, S)`; nothing is subtracted, so nothing cancels."""
    nothing = torch.full_like(values[..., :1], -math.inf)
    before = torch.cat([nothing, values[..., :-1].logcumsumexp(-1)], -1)
    after = torch.cat([values[..., 1:].flip(-1).logcumsumexp(-1).flip(-1), nothing], -1)
    return torch.logaddexp(before, after)


def _bound(vma: VMA, memory: EncodedMemory, x: Tensor, num_particles: int, max_decodes: int) -> dict[str, Tensor]:
    """The terms of the bound, from the particles of an objective."""
    elbo = IWAE_ELBO(num_particles=num_particles, max_plate_nesting=1)
    size = max(1, max_decodes // num_particles)
    rows = []
    for start in range(0, len(x), size):
        of = slice(start, start + size)
        terms = elbo.terms(vma.model, vma.guide, memory.of_datapoints(of), x[of])
        rows.append((terms.reconstruction, terms.kl["a"], terms.kl["z"]))
    columns = zip(("reconstruction", "kl_a", "kl_z"), zip(*rows, strict=True), strict=True)
    return {name: torch.cat(parts) for name, parts in columns}


def _given_slots(vma: VMA, memory: Memory) -> Memory:
    """The slots that a user gave: those that are learned come last, and come back when a memory is encoded."""
    learned = 0 if vma.templates is None or vma.encode(memory) is not memory else len(vma.templates.values)
    given = memory.num_slots - learned
    if learned == 0 or given == 0:  # where all are learned, encoding ignores what is given
        return memory
    labels, mask = (None if part is None else part[..., :given] for part in (memory.labels, memory.mask))
    templates = memory.templates[:, :given] if memory.per_datapoint else memory.templates[:given]
    return Memory(templates, labels, mask, per_datapoint=memory.per_datapoint)


def _shuffled(memory: Memory) -> Memory:
    """Each template's values in an order of its own."""
    templates = memory.templates
    flat = templates.flatten(2 if memory.per_datapoint else 1)
    order = torch.rand(flat.shape).argsort(-1).to(flat.device)
    return _with_templates(memory, flat.gather(-1, order).reshape(templates.shape))


def _with_templates(memory: Memory, templates: Tensor) -> Memory:
    return Memory(templates, memory.labels, memory.mask, per_datapoint=memory.per_datapoint)
