"""Evidence and information gain with a memory that is too large to be summed: some slots summed, the rest sampled."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vmem.diagnostics.bounds import top_k_bounds
from pyro_vmem.diagnostics.slots import at_addresses, chunks, draws_at
from pyro_vmem.diagnostics.strata import StratifiedWeights
from pyro_vmem.distributions import MixedCategorical, TruncatedCategorical
from pyro_vmem.memory import EncodedMemory, Memory, Template
from pyro_vmem.model import VMA

__all__ = ["check_searched", "describe_searched", "searched_weights"]


def check_searched(memory: Memory, method: str) -> None:
    """Raises a `ValueError` for a method that would look at every slot."""
    if method not in ("sampled", "top-k"):
        raise ValueError(
            f"method: {method!r} looks at each of {memory.num_slots:,} slots for every target, and this memory has an "
            "index so that nothing looks at all. Use method='top-k', which sums the k most probable slots and samples "
            "the rest."
        )


def searched_weights(
    vma: VMA, memory: EncodedMemory, x: Tensor, num_samples: int, method: str, k: int, max_decodes: int
) -> StratifiedWeights:
    """Weights of some targets, by `"sampled"` or `"top-k"`; the rest of the slots are sampled from the prior.

    Unlike the guide, which may have found no others, the prior reaches all of them: the estimate is unbiased.

    Arguments:
        vma: The model and its guide.
        memory: The memory, with an index.
        x: The targets, with shape `(B, *event)`.
        num_samples: Decodes a target.
        method: `"sampled"` or `"top-k"`.
        k: How many of the slots that the guide found `"top-k"` sums over.
        max_decodes: How many decodes to hold in memory at once.

    Returns:
        The weights, `(num_samples, B)`; the slots that are summed are strata, the others the last one.

    Raises:
        ValueError: If the address guide does not say which slots it found.
    """
    target = vma.encode_x(x)
    q, p = _parts(vma, memory, target)
    if method == "sampled":
        a = q.sample(torch.Size([num_samples]))
        log_ratio = p.log_prob(a) - q.log_prob(a)
        return StratifiedWeights.unstratified(log_ratio + at_addresses(vma, memory, x, target, a, max_decodes))
    top = _most_probable(q, k)
    strata = top.shape[-1] + 1
    # Half of the samples are divided equally, half as the guide has it.
    mass = torch.cat([q.log_prob(top.mT).exp().mT, top.new_zeros(len(x), 1)], -1)
    least = 2 if num_samples >= 2 * strata else 1
    counts = least + ((num_samples - least * strata) * (mass + 1 / strata) / (mass.sum(-1, keepdim=True) + 1)).floor()
    counts = counts.long()
    counts[:, 0] += num_samples - counts.sum(-1)
    position = torch.arange(num_samples, device=x.device).expand(len(x), -1)
    stratum = torch.searchsorted(counts.cumsum(-1), position.contiguous(), right=True)
    is_rest = stratum == strata - 1
    a = torch.where(is_rest, 0, top.gather(-1, stratum.clamp(max=strata - 2)))
    a = torch.where(is_rest, _others(p, top, int(counts[:, -1].max()), stratum.shape[1]).mT, a).mT
    log_p = torch.where(is_rest.mT, torch.log1p(-p.log_prob(top.mT).exp().sum(0)), p.log_prob(a))
    return StratifiedWeights(log_p + at_addresses(vma, memory, x, target, a, max_decodes), stratum.mT, counts.mT)


def describe_searched(
    vma: VMA,
    memory: EncodedMemory,
    x: Tensor,
    num_samples: int,
    per_slot: int,
    labels: Tensor | None,
    *,
    max_decodes: int,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `diagnose` says of a memory with an index: the slots are those that the guide found, best first.

    Returns:
        Values `(B,)` and `(B, k)` by name, and facts about how they were made.
    """
    rows: list[dict[str, Tensor]] = []
    for chunk, targets in chunks(memory, x, num_samples, max_decodes, progress):
        values = _of_guide(vma, chunk, targets, num_samples, max_decodes)
        if per_slot:
            values |= _of_slots(vma, chunk, targets, values["candidate"], per_slot, max_decodes)
        rows.append(values)
    values = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    kept = values["candidate"].shape[1]
    if not per_slot:
        values |= {f"log_evidence{end}": values[f"log_evidence_sampled{end}"] for end in ("", "_se")}
        values |= {name: values[f"{name}_sampled"] for name in ("ess", "khat")}
    values["elbo_gap"] = values["log_evidence"] - values["elbo"]
    if labels is not None:
        assert memory.labels is not None
        found = memory.by_class(values["address_guide"], values["candidate"]).argmax(-1)
        values["hit"] = memory.labels.unique()[found] == labels
    facts = {
        "title": f"diagnostics of {vma.name!r}",
        "model": repr(vma),
        "num_slots": memory.num_slots,
        "slot": "the candidates that the guide found, best first; their addresses are in `candidate`",
        "num_samples": num_samples,
        "per_slot": per_slot,
        "method": "top-k" if per_slot else "sampled",
        "decodes": (num_samples + 2 * per_slot * kept) * len(x),
    }
    return values, facts


def _of_guide(vma: VMA, memory: EncodedMemory, x: Tensor, num_samples: int, max_decodes: int) -> dict[str, Tensor]:
    """What follows from draws of the guide."""
    target = vma.encode_x(x)
    q, p = _parts(vma, memory, target)
    gain, candidates = kl_divergence(q, p), _most_probable(q, q.kept_values.shape[-1])
    a = q.sample(torch.Size([num_samples]))
    drawn = draws_at(vma, memory, target, a, max_decodes)
    parts = [torch.stack([each.p_x.log_prob(x), each.kl_z]) for each in drawn]
    log_likelihood, kl_z = torch.cat(parts, 1)
    log_weights = log_likelihood - kl_z + p.log_prob(a) - q.log_prob(a)
    sampled = StratifiedWeights.unstratified(log_weights)
    inside = q.log_prob(candidates.mT).exp().mT
    entropy = q.entropy()
    return {
        "information_gain": gain,
        "information_share": gain / memory.slots_in_use.log(),
        "address_entropy": entropy,
        "perplexity": entropy.exp(),
        "reconstruction": log_likelihood.mean(0),
        "kl_z": kl_z.mean(0),
        "elbo": log_weights.mean(0),
        "elbo_se": log_weights.std(0) / math.sqrt(num_samples),
        "log_evidence_sampled": sampled.log_sum,
        "log_evidence_sampled_se": sampled.standard_error,
        "ess_sampled": sampled.ess,
        "khat_sampled": sampled.khat,
        "address_guide": inside,
        "candidate": candidates,
        "top": candidates[:, 0],
    }


def _of_slots(
    vma: VMA, memory: EncodedMemory, x: Tensor, candidates: Tensor, per_slot: int, max_decodes: int
) -> dict[str, Tensor]:
    """What follows from the evidence of each candidate, and of as many draws from the rest."""
    target, kept = vma.encode_x(x), candidates.shape[1]
    p = vma.address_prior(memory)
    inside = at_addresses(vma, memory, x, target, candidates.repeat_interleave(per_slot, -1).mT, max_decodes)
    others = _others(p, candidates, per_slot * kept, per_slot * kept)
    outside = at_addresses(vma, memory, x, target, others, max_decodes)
    log_prior = p.log_prob(candidates.mT).mT
    slot_evidence = inside.unflatten(0, (kept, per_slot)).logsumexp(1).mT - math.log(per_slot)
    log_rest_prior = torch.log1p(-log_prior.exp().sum(-1))
    counts = torch.tensor([per_slot] * kept + [len(others)], device=x.device).unsqueeze(-1).expand(-1, len(x))
    stratum = torch.arange(kept + 1, device=x.device).repeat_interleave(counts[:, 0]).unsqueeze(-1).expand(-1, len(x))
    log_weights = torch.cat([inside + log_prior.mT.repeat_interleave(per_slot, 0), outside + log_rest_prior])
    weights = StratifiedWeights(log_weights, stratum.contiguous(), counts.contiguous())
    in_use = p.logits if memory.mask is None else p.logits[memory.mask]
    # What is assumed of the rest: that the guide has put nothing before what explains the target better.
    most = slot_evidence.amin(-1)
    bounds = top_k_bounds(slot_evidence, log_prior, most, in_use.min())
    rest_share = ((outside.logsumexp(0) - math.log(len(others))) + log_rest_prior - weights.log_sum).exp()
    return {
        "log_evidence": weights.log_sum,
        "log_evidence_se": weights.standard_error,
        "ess": weights.ess,
        "khat": weights.khat,
        "log_evidence_lower": bounds.log_evidence_lower,
        "log_evidence_upper": bounds.log_evidence_upper,
        "information_gain_exact_lower": bounds.information_gain_lower,
        "information_gain_exact_upper": bounds.information_gain_upper,
        "rest_share": rest_share,
        "rest_above": (outside > most).to(x.dtype).mean(0),
        "address_exact": (slot_evidence + log_prior - weights.log_sum.unsqueeze(-1)).exp(),
    }


def _parts(vma: VMA, memory: EncodedMemory, target: Template) -> tuple[Any, dist.Categorical]:
    """Address guide and prior, the first of a kind that names what it found."""
    q = vma.address_guide(memory, target)
    if not isinstance(q, TruncatedCategorical | MixedCategorical):
        raise ValueError(
            f"vma: its address guide, {vma.address_guide!r}, does not say which slots it found. With an index, use "
            "IndexedGuide(...), or a DefensiveGuide of one."
        )
    return q, vma.address_prior(memory)


def _most_probable(q: Any, k: int) -> Tensor:
    """The `k` most probable of the slots that were found, best first: `(B, k)`."""
    log_q = q.log_prob(q.kept_values.movedim(-1, 0)).movedim(0, -1)
    return q.kept_values.gather(-1, log_q.topk(min(k, log_q.shape[-1]), dim=-1).indices)


def _others(p: dist.Categorical, top: Tensor, count: int, size: int) -> Tensor:
    """Draws from the prior that are not among `top` `(B, k)`: `(size, B)`, of which the last `count` are drawn."""
    drawn = p.sample(torch.Size([count, len(top)]))
    while bool((again := (drawn.unsqueeze(-1) == top).any(-1)).any()):
        drawn[again] = p.sample(torch.Size([int(again.sum())]))
    return torch.cat([drawn.new_zeros(size - count, len(top)), drawn])
