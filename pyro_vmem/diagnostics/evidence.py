"""The evidence log p(x | M) of a model by importance sampling, with an error that is right or unknown.

Methods differ in how addresses are summed or sampled, and in the proposal for the latent.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.precision import autocast
from pyro_vmem._utils.random_state import seeded
from pyro_vmem.diagnostics.evidence_indexed import draw_others
from pyro_vmem.diagnostics.evidence_refined import RefineConfig, refined_weights
from pyro_vmem.diagnostics.slot_weights import (
    address_distributions,
    chunks,
    found_slots,
    log_address_prior,
    log_weights_at,
    log_weights_at_slots,
    slots_in_use,
    warn_if_not_finite,
    weights_in_strata,
)
from pyro_vmem.diagnostics.weights import (
    ERROR_LIMIT,
    KHAT_LIMIT,
    Estimate,
    StratifiedWeights,
    half_width,
    mean_and_error,
    sample_counts,
    trust_figures,
)
from pyro_vmem.memory import EncodedMemory, Memory
from pyro_vmem.model import VMA

__all__ = ["Evidence", "Method", "estimate_evidence", "log_evidence"]

Method = Literal["exact-address", "sampled", "top-k", "refined"]

PILOT_FROM = 4  # samples per slot; from there on one of them is spent to find the slots that matter
WARNED_SHARE = 0.05  # of the targets; there is a warning if the error of more of them is unknown
BUDGET = 4  # times num_samples, for better methods where an error is unknown
CHECKED_SHARE = 4  # one over the share of num_samples that checks the slots a method may have missed


@dataclass(frozen=True, eq=False)
class Evidence:
    r"""The evidence of each target `(B,)`, as :func:`estimate_evidence` finds it.

    Attributes:
        log_evidence: :math:`\log p(x | M)`, in nats; a lower bound in expectation.
        standard_error: The Monte Carlo error by the delta method, in nats. It is NaN where it is unknown: weights with
            a k-hat above 0.7, an error above 0.5 nats, or too few samples, of this target or of half of all; a variance
            that hangs on two or three samples; or a method that may have missed a slot. Such an estimate is likely too
            low.
        ess: The effective sample size of all weights :math:`p(a | M) w`, in [1, samples]. Samples at slots that hold
            nothing do not count.
        khat: The Pareto tail index of the weights over the mean of their slot, for the slots that make up 99 % of the
            estimate. It is `-inf` for weights without spread, and NaN for 20 samples or fewer (see
            :func:`~pyro_vmem.diagnostics.pareto_k`).
        num_samples: Decoder passes per target, as requested.
        method: The method, as requested.
        decodes: The decoder passes of all targets, including better methods and checks.
    """

    log_evidence: Tensor
    standard_error: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int
    method: Method
    decodes: int

    @property
    def nll(self) -> Tensor:
        """The negative log-likelihood, with shape `(B,)`, in nats."""
        return -self.log_evidence

    @property
    def unknown(self) -> Tensor:
        """Whether the error of an estimate is unknown, `(B,)`. Such an estimate is likely too low."""
        return self.standard_error.isnan()

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """The ends of a 95 % interval of the evidence, each `(B,)` in nats; NaN where the error is unknown."""
        reach = half_width(self.standard_error)
        return self.log_evidence - reach, self.log_evidence + reach

    def __repr__(self) -> str:
        share = float(self.unknown.double().mean())
        return (
            f"Evidence(mean {float(self.log_evidence.mean()):.2f} nats over {len(self.log_evidence)} targets, "
            f"error unknown for {share:.0%}, method={self.method!r}, decodes={self.decodes})"
        )

    def summary(self) -> dict[str, float]:
        """Returns means over targets, by the name of the quantity.

        `nll_se` is the standard error of the mean `nll` over independent targets (for episodes, see
        :func:`~pyro_vmem.diagnostics.evaluate`). `monte_carlo_se` is the part of it that more samples would remove; it
        is NaN if the error of any target is unknown. `error_unknown` is the share of such targets, and `khat_above` the
        share of targets with a k-hat above 0.7.
        """
        nll, error = mean_and_error(self.nll)
        return {
            "nll": nll,
            "nll_se": error,
            "ess": float(self.ess.mean()),
            **trust_figures(self.khat, self.standard_error),
            "num_samples": self.num_samples,
            "decodes": self.decodes,
            "num_targets": len(self.nll),
        }


@torch.no_grad()
def estimate_evidence(
    vma: VMA,
    memory: Memory,
    x: Tensor,
    num_samples: Count = 1000,
    method: Method = "exact-address",
    *,
    k: Count = 8,
    refine: RefineConfig | None = None,
    budget: NonNegativeInt | None = None,
    seed: NonNegativeInt | None = None,
    precision: Literal["auto", "bfloat16", "float32"] | None = None,
    max_decodes: Count = 1024,
    progress: bool = False,
    warn: bool = True,
) -> Evidence:
    r"""Estimates :math:`\log p(x | M)` of each target, in nats, with an error that is right or unknown.

    - `"exact-address"` sums over all slots and samples only z, :math:`n_a` times at slot :math:`a`:
      :math:`\log \sum_a p(a | M) \frac{1}{n_a} \sum_k p(z_k | m_a) p(x | z_k, m_a) / q(z_k | x, m_a)`. Each slot has
      at least one sample. The others go to the slots that the address guide or a first draw at every slot favours. It
      is the tightest method if there are at least four samples per slot.
    - `"top-k"` sums over the :math:`k` slots that the address guide finds most probable, and samples the others from
      the rest of the guide. It is the tightest method with fewer samples. With an index it sums over slots that an
      :class:`~pyro_vmem.IndexedGuide` found, and samples the others from the prior.
    - `"refined"` is for a poor guide of the latent. It climbs towards the mode of z at the best slots, where a gradient
      counts as two decoder passes, and draws z from a mixture of the guide and the Gaussians on the way. All other
      slots are sampled together. See :class:`~pyro_vmem.diagnostics.RefineConfig`.
    - `"sampled"` draws (a, z) from the guide: :math:`\log \frac{1}{K} \sum_k w_k`, as in the literature.

    Every method estimates :math:`p(x | M)` without bias, except for slots that a guide excludes. The logarithm is a
    lower bound in expectation, which tightens with more samples.

    Where the weights do not tell the error of a target, better methods follow within the `budget`: the sum over all
    slots, then `"refined"`, then all that is left of the budget. A sum over all slots with few draws checks the other
    methods, because a slot that an overconfident guide excludes leaves no trace in the weights. If the error remains
    unknown, it is NaN.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016), equation 8
        | https://arxiv.org/abs/1509.00519
        | Monte Carlo theory, methods and examples (Owen, 2013), section 8.4, stratification
        | https://artowen.su.domains/mc/
        | Pathfinder: Parallel quasi-Newton variational inference (Zhang, Carpenter, Gelman, Vehtari, 2022)
        | https://arxiv.org/abs/2108.03782

    Arguments:
        memory: The memory :math:`M`. With an index, the method has to be `"top-k"` or `"sampled"`.
        num_samples: Decoder passes per target; at least one per stratum (two for a standard error), and at least 48
            for `"refined"`.
        method: `"exact-address"`, `"sampled"`, `"top-k"` or `"refined"`.
        k: The number of slots that `"top-k"` sums over.
        refine: The settings of `"refined"`.
        budget: The most further decoder passes per target, for checks and better methods; by default four times
            `num_samples`. With 0 the errors are those that the weights tell. If the budget is too small for a check,
            the errors of a method other than `"exact-address"` are unknown. A memory with an index is not checked.
        seed: Seeds the samples and leaves the global random state as it is; by default that state is used.
        precision: The precision of the networks, as of `pyro_vmem.fit`. Densities and weights are always float32.
        warn: Whether to warn if more than 5 % of the errors are :attr:`~Evidence.unknown`.

    Raises:
        ValueError: If memory or x do not fit the model, or the method does not fit the memory.

    Warns:
        UserWarning: If an estimate is not finite, or (see `warn`) many have an unknown error.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> evidence = estimate_evidence(vma, Memory(torch.randn(10, 5)), torch.randn(3, 5), num_samples=500, seed=0)
        >>> low, high = evidence.interval
        >>> evidence.log_evidence.shape, high.shape
        (torch.Size([3]), torch.Size([3]))
    """
    with seeded(seed), contextlib.nullcontext() if precision is None else autocast(x.device, precision):
        plan = _plan(vma, memory, x, num_samples, method, k, refine or RefineConfig(), max_decodes)
        budget = BUDGET * plan.decodes if budget is None else budget
        estimate, decodes = _with_honest_errors(plan, x, budget, progress)
    evidence = Evidence(*estimate, num_samples, method, decodes)
    _warn(evidence, warn)
    return evidence


@torch.no_grad()
def log_evidence(
    vma: VMA,
    memory: Memory,
    x: Tensor,
    num_samples: Count = 1000,
    method: Method = "exact-address",
    *,
    k: Count = 8,
    max_decodes: Count = 1024,
    progress: bool = False,
) -> Tensor:
    r"""Estimates :math:`\log p(x | M)` of each target, in nats, with shape `(B,)`; negated, it is the NLL.

    Arguments and errors are those of :func:`estimate_evidence`, which also gives the error of the estimate.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> log_evidence(vma, Memory(torch.randn(10, 5)), torch.randn(3, 5), num_samples=50).shape
        torch.Size([3])
    """
    plan = _plan(vma, memory, x, num_samples, method, k, RefineConfig(), max_decodes)
    values = torch.cat([weights.log_sum for weights in _weights(plan, x, progress)])
    warn_if_not_finite(values)
    return values


@dataclass(frozen=True, eq=False)
class _Plan:
    """How the evidence of each target is estimated: checked arguments, and the decoder passes per target."""

    vma: VMA
    memory: EncodedMemory
    slots: Tensor  # those in use
    method: Method
    k: int
    refine: RefineConfig
    decodes: int
    max_decodes: int


def _plan(
    vma: VMA,
    memory: Memory,
    x: Tensor,
    num_samples: int,
    method: Method,
    k: int,
    refine: RefineConfig,
    max_decodes: int,
) -> _Plan:
    vma.check(memory, x)
    encoded = vma.encode(memory)
    if encoded.index is not None and method not in ("sampled", "top-k"):
        raise ValueError(
            f"method: {method!r} looks at each of {encoded.num_slots:,} slots for every target, but this memory has an "
            "index to avoid that. Use method='top-k', which sums the k most probable slots and samples the rest."
        )
    slots = slots_in_use(encoded)
    if method == "top-k" and encoded.index is None and k >= len(slots):
        method = "exact-address"
    plan = _Plan(vma, encoded, slots, method, k, refine, num_samples, max_decodes)
    return replace(plan, decodes=max(num_samples, _least_decodes(plan)))


def _with_honest_errors(plan: _Plan, x: Tensor, budget: int, progress: bool) -> tuple[Estimate, int]:
    """Estimates whose error is right or NaN, and the number of decoder passes that they took."""
    found, decodes = _estimate(plan, x, progress), plan.decodes * len(x)
    left, sums_slots, checkable = budget, plan.method == "exact-address", plan.memory.index is None
    least = found.log_evidence if sums_slots else torch.full_like(found.log_evidence, -math.inf)
    if budget > 0 and checkable and not sums_slots:
        check = replace(plan, method="exact-address", decodes=max(len(plan.slots), plan.decodes // CHECKED_SHARE))
        if check.decodes > left:
            return found._replace(standard_error=torch.full_like(found.standard_error, math.nan)), decodes
        # A sum over all slots is too low in expectation, so a method that is further below it has missed a slot.
        summed = list(_weights(check, x, progress))
        least = torch.cat([weights.log_sum for weights in summed])
        left, decodes = left - check.decodes, decodes + check.decodes * len(x)
        found = _not_below(found, least)
        if plan.method == "sampled":
            posterior = torch.cat([weights.log_means for weights in summed], 1).mT.softmax(-1)
            found = _not_less(found, _address_error(plan, x, posterior))
    for method, most in _better(plan, x):
        # More samples do not mend an estimate that is not finite: the model is broken, or the target impossible.
        rows = (found.standard_error.isnan() & found.log_evidence.isfinite()).nonzero().squeeze(-1)
        stage = replace(plan, method=method, decodes=min(most, left), memory=plan.memory.of_datapoints(rows))
        if len(rows) == 0 or stage.decodes < _least_decodes(stage):
            continue
        again = _estimate(stage, x[rows], progress)
        if method != "exact-address" and checkable:
            again = _not_below(again, least[rows])
        left, decodes = left - stage.decodes, decodes + stage.decodes * len(rows)
        found = Estimate(*(old.index_copy(0, rows, new) for old, new in zip(found, again, strict=True)))
    return found, decodes


def _better(plan: _Plan, x: Tensor) -> list[tuple[Method, int]]:
    """The methods to try where an error is unknown, with their decoder passes; the last one takes all that is left."""
    everything = torch.iinfo(torch.long).max
    if plan.memory.index is not None:
        return [(plan.method, everything)]
    sums: list[tuple[Method, int]] = [] if plan.method == "exact-address" else [("exact-address", plan.decodes)]
    target, first = plan.vma.encode_x(x[:1]), plan.memory.of_datapoints(slice(1)).read(plan.slots[:1].unsqueeze(-1))
    support = plan.vma.latent_guide(target, first).support
    if getattr(support, "base_constraint", support) not in (constraints.real, constraints.real_vector):
        return [*sums, ("exact-address", everything)]  # a Gaussian proposal does not fit such a latent
    first_try: list[tuple[Method, int]] = [] if plan.method == "refined" else [("refined", plan.decodes)]
    return [*sums, *first_try, ("refined", everything)]


def _not_below(estimate: Estimate, least: Tensor) -> Estimate:
    """Sets the error to NaN where the interval ends below evidence that is known to be there."""
    error = estimate.standard_error
    missed = estimate.log_evidence + half_width(error) < least
    return estimate._replace(standard_error=error.masked_fill(missed, math.nan))


def _address_error(plan: _Plan, x: Tensor, posterior: Tensor) -> Tensor:
    r"""Computes the error `(B,)` that sampled addresses have at least, from the posterior of each slot `(B, S)`.

    :math:`\frac{1}{K} (\sum_a r_a^2 / q_a - 1)` is the relative variance of K weights :math:`r_a / q_a`. The weights do
    not show it if an overconfident guide hardly ever draws some slots. All that such slots hold counts as missed.
    """
    draws = plan.decodes * plan.vma.address_guide(plan.memory, plan.vma.encode_x(x)).probs[..., plan.slots]
    rare = draws < 1
    missed = (posterior * rare).sum(-1)
    variance = (posterior.square() / draws).masked_fill(rare, 0.0).sum(-1) - (1 - missed).square() / plan.decodes
    return (variance.clamp(min=0.0) + missed.square()).sqrt()


def _not_less(estimate: Estimate, error: Tensor) -> Estimate:
    """Sets the error to at least a known one."""
    return estimate._replace(standard_error=torch.maximum(estimate.standard_error, error)).honest


def _estimate(plan: _Plan, x: Tensor, progress: bool) -> Estimate:
    return Estimate.joined(weights.estimate for weights in _weights(plan, x, progress)).honest


def _least_decodes(plan: _Plan) -> int:
    """The fewest decoder passes per target of a method."""
    least = {"exact-address": len(plan.slots), "sampled": 1, "top-k": min(plan.k, len(plan.slots)) + 1}
    return least.get(plan.method, plan.refine.decodes_per_slot)


def _weights(plan: _Plan, x: Tensor, progress: bool) -> Iterator[StratifiedWeights]:
    """The weights of one batch of targets at a time."""
    for _, memory, targets in chunks(plan.memory, x, plan.decodes, plan.max_decodes, progress):
        if plan.method == "refined":
            yield refined_weights(plan.vma, memory, targets, plan.decodes, plan.refine, plan.max_decodes)
        else:
            of_method = {"exact-address": _exact_address, "top-k": _top_k, "sampled": _sampled}[plan.method]
            yield of_method(plan, memory, targets)


def _exact_address(plan: _Plan, memory: EncodedMemory, x: Tensor) -> StratifiedWeights:
    """Makes each slot a stratum; a first draw at each decides where the others go."""
    vma, slots, num_samples = plan.vma, plan.slots, plan.decodes
    log_p = log_address_prior(vma, memory, len(x))[:, slots]
    mass = vma.address_guide(memory, vma.encode_x(x)).probs[..., slots]
    size = len(slots)
    if num_samples < PILOT_FROM * size:
        counts = sample_counts(num_samples, mass)
    else:
        # The first draws only divide the others. If they counted, a slot with low ones would get fewer further samples,
        # and its low mean would stay: a bias.
        pilot = log_weights_at_slots(vma, memory, x, slots, 1, plan.max_decodes).squeeze(0).mT + log_p
        share = (mass + pilot.softmax(-1)) / 2
        share = share.masked_fill(~share.isfinite().all(-1, keepdim=True), 1 / size)  # no slot explains it
        num_samples -= size
        counts = 1 + ((num_samples - size) * share).floor().long()
        counts.scatter_add_(-1, share.argmax(-1, keepdim=True), num_samples - counts.sum(-1, keepdim=True))
    return weights_in_strata(vma, memory, x, slots.expand(len(x), -1), log_p, counts, None, plan.max_decodes)


def _top_k(plan: _Plan, memory: EncodedMemory, x: Tensor) -> StratifiedWeights:
    """Makes each of the slots that are most probable by the guide a stratum, and all others together one."""
    vma, num_samples = plan.vma, plan.decodes
    q, p = address_distributions(vma, memory, vma.encode_x(x))
    if memory.index is not None:
        top = found_slots(q, plan.k)
        others, log_left = draw_others(p, top, num_samples)
        log_ratio = log_left.unsqueeze(-1).expand_as(others)
        log_p, inside = p.log_prob(top.mT).mT, q.log_prob(top.mT).exp().mT
        rest = (1 - inside.sum(-1, keepdim=True)).clamp(min=0.0)
    else:
        top, log_q, all_log_p = q.logits.topk(plan.k, dim=-1).indices, q.logits, p.logits.expand_as(q.logits)
        # Where the probability of the others has underflowed, any of them will do.
        left = log_q.clamp(min=torch.finfo(log_q.dtype).min / 2).scatter(-1, top, -math.inf)
        q_others = torch.distributions.Categorical(logits=left)
        others = q_others.sample(torch.Size([num_samples])).mT
        log_ratio = all_log_p.gather(-1, others) - q_others.logits.gather(-1, others)
        log_p, inside = all_log_p.gather(-1, top), log_q.gather(-1, top).exp()
        rest = left.logsumexp(-1, keepdim=True).exp()
    counts = sample_counts(num_samples, torch.cat([inside, rest], -1))
    return weights_in_strata(vma, memory, x, top, log_p, counts, (others, log_ratio), plan.max_decodes)


def _sampled(plan: _Plan, memory: EncodedMemory, x: Tensor) -> StratifiedWeights:
    """Draws addresses from the guide, in one stratum."""
    target = plan.vma.encode_x(x)
    q, p = address_distributions(plan.vma, memory, target)
    a = q.sample(torch.Size([plan.decodes]))
    log_weights = log_weights_at(plan.vma, memory, x, target, a, plan.max_decodes)
    return StratifiedWeights.unstratified(p.log_prob(a) - q.log_prob(a) + log_weights)


def _warn(evidence: Evidence, of_unknown: bool) -> None:
    """Warns of bad estimates at the user's line."""
    warn_if_not_finite(evidence.log_evidence, stacklevel=6)
    count = int(evidence.unknown.sum())
    if of_unknown and count > WARNED_SHARE * len(evidence.log_evidence):
        warnings.warn(
            f"log_evidence: the errors of {count} of {len(evidence.log_evidence)} estimates are unknown: they hang on "
            f"few large weights (k-hat above {KHAT_LIMIT}, standard error above {ERROR_LIMIT} nats, or too few samples "
            "to tell), or slots were missed, so they are likely too low. To know them, draw more samples "
            "(num_samples), allow a larger budget, or train the guide longer.",
            stacklevel=5,
        )
