"""All figures of each datapoint's lookup, as one labelled dataset.

It combines information, evidence and address quality, for a VMA or any pair of Pyro programs.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegativeInt, checked
from pyro_vmem._utils.extras import require
from pyro_vmem._utils.random_state import seeded
from pyro_vmem._utils.version import __version__
from pyro_vmem.diagnostics.evidence_indexed import figures_of_candidates
from pyro_vmem.diagnostics.information import information_gain
from pyro_vmem.diagnostics.program_diagnosis import diagnose_program
from pyro_vmem.diagnostics.slot_weights import (
    GuideDraws,
    chunks,
    draw_from_guide,
    joined,
    slot_weights,
    slots_in_use,
    warn_if_not_finite,
)
from pyro_vmem.diagnostics.weights import StratifiedWeights
from pyro_vmem.memory import EncodedMemory, Memory
from pyro_vmem.model import VMA
from pyro_vmem.model.checks import check_weights

if TYPE_CHECKING:
    import xarray

__all__ = ["diagnose"]

# Units and long name of each variable. Each latent site of a program has a `kl_*` of its own besides.
DESCRIPTIONS = {
    "information_gain": ("nats", "information gain KL(q(a|M,x) || p(a|M)) of the guide"),
    "information_gain_exact": ("nats", "information gain KL(p(a|x,M) || p(a|M)) of the exact address posterior"),
    "information_gain_exact_lower": ("nats", "lower bound on the exact information gain"),
    "information_gain_exact_upper": ("nats", "upper bound on the exact information gain"),
    "information_gain_exact_se": ("nats", "Monte Carlo standard error of information_gain_exact"),
    "information_gap": ("nats", "information_gain - information_gain_exact: the excess claim of the guide"),
    "information_share": ("1", "information_gain as a share of log of the number of slots in use"),
    "address_entropy": ("nats", "entropy of q(a|M,x)"),
    "perplexity": ("1", "exp(address_entropy): the effective number of slots"),
    "kl_exact_to_guide": ("nats", "KL(p(a|x,M) || q(a|M,x)): large where the address guide misses a slot"),
    "kl_guide_to_exact": ("nats", "KL(q(a|M,x) || p(a|x,M)): the loss of the ELBO by the address guide"),
    "reconstruction": ("nats", "E_q log p(x|z,m_a)"),
    "elbo": ("nats", "evidence lower bound E_q log w"),
    "elbo_se": ("nats", "Monte Carlo standard error of elbo"),
    "elbo_gap": ("nats", "log_evidence - elbo: the loss by the whole guide"),
    "log_evidence": ("nats", "log p(x|M)"),
    "log_evidence_se": ("nats", "Monte Carlo standard error of log_evidence; NaN where it is unknown"),
    "log_evidence_lower": ("nats", "lower bound on log p(x|M): only the candidates explain anything"),
    "log_evidence_upper": (
        "nats",
        "log p(x|M) if every other slot explained as much as the worst candidate: an upper bound",
    ),
    "rest_share": ("1", "share of the other slots in the address posterior, from draws of the prior"),
    "rest_above": ("1", "share of the draws from the other slots that explain more than the worst candidate"),
    "ess": ("1", "effective sample size of the weights behind log_evidence"),
    "khat": ("1", "Pareto tail index of the weights behind log_evidence; above 0.7 not to be trusted"),
    "log_evidence_sampled": ("nats", "log p(x|M) from draws of the guide alone"),
    "log_evidence_sampled_se": ("nats", "Monte Carlo standard error of log_evidence_sampled"),
    "ess_sampled": ("1", "effective sample size of the guide's importance weights"),
    "khat_sampled": ("1", "Pareto tail index of the guide's importance weights; above 0.7 the guide is too narrow"),
    "address_guide": ("1", "q(a|M,x)"),
    "address_exact": ("1", "p(a|x,M), by the evidence of each slot"),
    "address_prior": ("1", "p(a|M)"),
    "candidate": ("1", "address of each slot that the guide found, best first"),
    "top": ("1", "most probable address by the guide"),
    "top_exact": ("1", "most probable address by the exact posterior"),
    "hit": ("1", "whether the guide's most probable class is the label"),
    "hit_exact": ("1", "whether the exact posterior's most probable class is the label"),
}


def diagnose(
    program: VMA | tuple[Any, Any],
    *args: Any,
    num_samples: Count = 200,
    per_slot: Count | Literal[0] = 25,
    labels: Integer[Tensor, " B"] | None = None,
    site: str | None = "a",
    seed: NonNegativeInt = 0,
    max_decodes: Count = 1024,
    progress: bool = False,
    **kwargs: Any,
) -> xarray.Dataset:
    r"""Measures the lookup of each datapoint: its gain by the guide and in truth, and the loss by the guide.

    `diagnose(vma, memory, x)` has, in nats per datapoint:

    - `information_gain`, the guide's :math:`KL(q(a|M,x) \| p(a|M))`; `information_gain_exact`, that of the exact
      address posterior :math:`p(a | x, M) \propto p(a | M)\, p(x | m_a)`, by importance sampling of z at every slot;
      their difference `information_gap`; `information_share` of :math:`\log |M|`; `address_entropy`, `perplexity`.
    - `elbo`, `reconstruction` and `kl_z`, over draws from the guide; `elbo_gap`, the distance to `log_evidence`. Of
      that gap, `kl_guide_to_exact` is the loss by the address guide, and the rest is the loss by the latent guide.
    - `log_evidence` by summing all slots, with its Monte Carlo error, effective sample size and :math:`\hat k`; the
      same with `_sampled`, from draws of the guide.
    - `address_guide`, `address_exact` and `address_prior`, the probabilities of each slot; `top` and `top_exact`, the
      most probable ones; `hit` and `hit_exact` if there are labels.

    With a memory that has an index, `slot` stands for the candidates that the guide found, with addresses `candidate`.
    `log_evidence` and `rest_share` then sample the other slots from the prior, and `log_evidence` and
    `information_gain_exact` have bounds, `_lower` and `_upper`. The upper bounds assume that no other slot explains a
    target better than the worst candidate; `rest_above` is the share of draws that did.

    `diagnose((model, guide), *args)` has all figures that need no slots, for any pair of Pyro programs with a data
    plate: the information gain of the categorical `site`, `kl_*` of every other latent site, bound and evidence.

    References:
        | Variational Memory Addressing in Generative Models (Bornschein et al., 2017), section 3
        | https://arxiv.org/abs/1709.07116

    Arguments:
        program: A VMA, or a pair `(model, guide)`.
        args: Of a VMA, the memory :math:`M` and the targets x `(B, *event)`. Of a pair, the arguments of both.
        num_samples: Draws :math:`K` from the guide per datapoint; a :math:`\hat k` takes more than 20.
        per_slot: Samples of z per slot; a :math:`\hat k` takes 25, because one slot explains most targets. 0 leaves out
            the `*_exact` figures, and `log_evidence` is the sampled one.
        labels: The class of each target, integers `(B,)`, for a memory with labels.
        site: The categorical site of a pair; None if there is none.
        kwargs: Keyword arguments of a pair.

    Returns:
        A dataset with dims `datapoint` and `slot`. Every variable has `units` and `long_name`. The attributes of the
        dataset name the settings, the number of decoder passes and the seconds.

    Raises:
        ValueError: If labels, memory or x do not fit the model, or a pair has no such site.
        ImportError: If xarray is not installed.

    Example:
        >>> from pyro_vmem.memory import Memory
        >>> dataset = diagnose(VMA.for_vectors(5), Memory(torch.randn(10, 5)), torch.randn(3, 5))
        >>> dict(dataset.sizes), dataset.information_gain.attrs["units"]
        ({'datapoint': 3, 'slot': 10}, 'nats')
    """
    require("xarray", "arviz")
    shared: dict[str, Any] = {"num_samples": num_samples, "max_decodes": max_decodes, "progress": progress}
    with torch.no_grad(), seeded(seed):
        if isinstance(program, VMA):
            dataset, _, _ = measure(program, *args, per_slot=per_slot, labels=labels, **(shared | kwargs))
        elif labels is not None:
            raise ValueError("labels: they are compared with those of a VMA's memory; a pair has none. Leave them out.")
        else:
            dataset = as_dataset(*diagnose_program(*program, args, kwargs, site, **shared))
    dataset.attrs.update(num_samples=num_samples, seed=seed)
    return dataset


@checked
def measure(
    vma: VMA,
    memory: Memory,
    x: Float[Tensor, "B ..."],
    *,
    num_samples: int,
    per_slot: int,
    labels: Tensor | None,
    max_decodes: int,
    progress: bool,
    predict: bool = False,
) -> tuple[xarray.Dataset, EncodedMemory, GuideDraws]:
    """Makes the dataset of :func:`diagnose` for a VMA; also returns the encoded memory and the draws of the guide."""
    check_weights(vma)
    vma.check(memory, x)
    start = time.perf_counter()
    memory = vma.encode(memory)
    if labels is not None and memory.labels is None:
        raise ValueError("labels: the memory has none to compare with. Make it with Memory(templates, labels).")
    if labels is not None and labels.shape != x.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(x)},), one per target, got {tuple(labels.shape)}.")
    draws = draw_from_guide(vma, memory, x, num_samples, predict=predict, max_decodes=max_decodes, progress=progress)
    log_weights, gain = draws.log_weights, draws.information_gain
    sampled = StratifiedWeights.unstratified(log_weights).estimate.honest
    values = {
        "information_gain": gain,
        "information_share": gain / memory.slots_in_use.log(),  # NaN for a single slot: there is nothing to gain
        "address_entropy": draws.address_entropy,
        "perplexity": draws.address_entropy.exp(),
        "reconstruction": draws.log_likelihood.mean(0),
        "kl_z": draws.kl_z.mean(0),
        "elbo": log_weights.mean(0),
        "elbo_se": log_weights.std(0) / math.sqrt(len(log_weights)),
        **sampled.figures("_sampled"),
        "address_guide": draws.log_q.softmax(-1) if draws.candidates is None else draws.log_q.exp(),
    }
    decodes = log_weights.numel()
    if draws.candidates is None:
        values |= {"top": draws.log_q.argmax(-1), "address_prior": draws.log_p.softmax(-1)}
        if per_slot:
            values |= _figures_of_slots(vma, memory, x, draws, per_slot, max_decodes, progress)
            decodes += per_slot * len(slots_in_use(memory)) * len(x)
    else:
        values |= {"top": draws.candidates[:, 0], "candidate": draws.candidates}
        if per_slot:
            found = [
                figures_of_candidates(vma, chunk, targets, draws.candidates[rows], per_slot, max_decodes)
                for rows, chunk, targets in chunks(memory, x, per_slot, max_decodes)
            ]
            values |= joined(found)
            decodes += 2 * per_slot * draws.candidates.numel()
    if not per_slot:
        values |= sampled.figures()
    warn_if_not_finite(values["log_evidence"], stacklevel=6)
    values["elbo_gap"] = values["log_evidence"] - values["elbo"]
    if labels is not None:
        assert memory.labels is not None
        classes = memory.labels.unique()
        hits = {"hit": "address_guide"} | ({"hit_exact": "address_exact"} if per_slot else {})
        for name, of in hits.items():
            values[name] = classes[memory.by_class(values[of], draws.candidates).argmax(-1)] == labels
    facts = {
        "title": f"diagnostics of {vma.name!r}",
        "model": repr(vma),
        "num_slots": memory.num_slots,
        "per_slot": per_slot,
        "method": "sampled" if not per_slot else "exact-address" if draws.candidates is None else "top-k",
        "decodes": decodes,
        "seconds": time.perf_counter() - start,
    }
    if draws.candidates is not None:
        facts["slot"] = "the candidates that the guide found, best first; their addresses are in `candidate`"
    return as_dataset(values, facts), memory, draws


def _figures_of_slots(
    vma: VMA,
    memory: EncodedMemory,
    x: Tensor,
    draws: GuideDraws,
    per_slot: int,
    max_decodes: int,
    progress: bool,
) -> dict[str, Tensor]:
    """The figures that follow from the evidence of every slot."""
    found = slot_weights(vma, memory, x, per_slot, max_decodes=max_decodes, progress=progress)
    estimate, exact, q, p = found.estimate.honest, found.log_joint, draws.log_q, draws.log_p
    posterior, gain = exact.softmax(-1), information_gain(exact, p)
    # The delta method: d gain / d log p(x | m_a) = p(a|x,M) (log p(a|x,M) / p(a|M) - gain).
    log_ratio = (exact.log_softmax(-1) - p).masked_fill(posterior == 0, 0.0)
    gain_error = (posterior * (log_ratio - gain.unsqueeze(-1)) * found.standard_error).square().sum(-1).sqrt()
    return {
        **estimate.figures(),
        "information_gain_exact": gain,
        "information_gain_exact_se": gain_error,
        "information_gap": draws.information_gain - gain,
        "kl_exact_to_guide": information_gain(exact, q),
        "kl_guide_to_exact": information_gain(q, exact),
        "address_exact": posterior,
        "top_exact": exact.argmax(-1),
    }


def as_dataset(values: dict[str, Tensor], facts: dict[str, Any]) -> xarray.Dataset:
    """Makes a labelled dataset of tensors `(B,)` and `(B, S)`, in the order of their descriptions."""
    named = {name: described for name, described in DESCRIPTIONS.items() if name in values}
    for name in sorted(values.keys() - named.keys()):
        named[name] = ("nats", f"KL(q || p) of the latent {name.removeprefix('kl_')}")
    variables = {
        name: (("datapoint", "slot")[: values[name].dim()], values[name], {"units": units, "long_name": long_name})
        for name, (units, long_name) in named.items()
    }
    facts |= {"pyro_vmem_version": __version__, "decodes_per_second": facts["decodes"] / facts["seconds"]}
    return labelled(variables, facts)


def labelled(variables: dict[str, Any], facts: dict[str, Any]) -> xarray.Dataset:
    """Makes a dataset of dims, tensor and attributes by name; every dim counts from 0."""
    xr = require("xarray", "arviz")
    sizes = {dim: n for dims, value, *_ in variables.values() for dim, n in zip(dims, value.shape, strict=True)}
    arrays = {name: (dims, value.detach().cpu().numpy(), *attrs) for name, (dims, value, *attrs) in variables.items()}
    dataset: xarray.Dataset = xr.Dataset(arrays, {dim: range(n) for dim, n in sizes.items()}, facts)
    return dataset
