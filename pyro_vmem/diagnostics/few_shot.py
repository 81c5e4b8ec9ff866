"""Few-shot evaluation of a model on episodes, usually of held-out classes.

It measures the evidence of each target, the information gain of its lookup, and the accuracy.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.random_state import seeded
from pyro_vmem.data import Episode
from pyro_vmem.diagnostics.address_quality import ReliabilityCurve, calibration_error, hits, rank_correlation
from pyro_vmem.diagnostics.information import InformationSummary, information_gain, information_summary
from pyro_vmem.diagnostics.slot_weights import draw_from_guide, slot_weights, warn_if_not_finite
from pyro_vmem.diagnostics.weights import mean_and_error, trust_figures
from pyro_vmem.memory import Memory
from pyro_vmem.model import VMA
from pyro_vmem.model.checks import check_weights

__all__ = ["FewShotEvaluation", "evaluate"]

_DRAWS = 8  # of the guide per target, for the terms of the bound: few beside those of the evidence
_TOP = 5


@dataclass(frozen=True, eq=False)
class FewShotEvaluation:
    r"""The figures of :func:`evaluate`: one row per episode, one column per target, `(E, B)`, in nats.

    Attributes:
        log_evidence: :math:`\log p(x | M)`.
        log_evidence_wrong: The same with a memory of other classes; NaN without one.
        standard_error: The Monte Carlo error of `log_evidence`; NaN where it is unknown, as of
            :class:`~pyro_vmem.diagnostics.Evidence`.
        ess: The effective sample size of its `n_way * k_shot * num_samples` weights.
        khat: Their Pareto tail index; NaN for too few samples.
        information_gain: :math:`KL(q(a|x,M) \| p(a|M))`, by the guide.
        information_gain_exact: :math:`KL(p(a|x,M) \| p(a|M))`, by the evidence of each slot.
        kl_exact_to_guide: :math:`KL(p(a|x,M) \| q(a|x,M))`: large where the guide misses a slot.
        kl_guide_to_exact: :math:`KL(q(a|x,M) \| p(a|x,M))`: the loss of the bound by the address guide.
        rank_correlation: Spearman's, of the slots by guide and by exact posterior.
        same_slot: Whether both have the same most probable slot.
        reconstruction: :math:`E_q \log p(x | z, m_a)`.
        kl_z: :math:`E_q KL(q(z | x, m_a) \| p(z | m_a))`.
        class_probs: The guide's probability of each class, with shape `(E, B, C)`; `None` without labels.
        class_probs_exact: The exact posterior's.
        target_class: The column of the right class.
        information: The summary of the lookups of each episode.
        n_way: Classes in memory; `None` if the source does not say.
        k_shot: Slots per class.
        num_samples: Samples of z per slot.
        decodes: The number of decoder passes, including the wrong memories.
        seconds: The duration.
    """

    log_evidence: Tensor
    log_evidence_wrong: Tensor
    standard_error: Tensor
    ess: Tensor
    khat: Tensor
    information_gain: Tensor
    information_gain_exact: Tensor
    kl_exact_to_guide: Tensor
    kl_guide_to_exact: Tensor
    rank_correlation: Tensor
    same_slot: Tensor
    reconstruction: Tensor
    kl_z: Tensor
    class_probs: Tensor | None
    class_probs_exact: Tensor | None
    target_class: Tensor | None
    information: tuple[InformationSummary, ...]
    n_way: int | None
    k_shot: int | None
    num_samples: int
    decodes: int
    seconds: float

    @property
    def hit(self) -> Tensor:
        """Whether the guide's most probable class is the target's, `(E, B)`."""
        probs, _, right = self._of_classes()
        return probs.argmax(-1) == right

    @property
    def hit_exact(self) -> Tensor:
        """Whether the most probable class of the exact address posterior is the target's, `(E, B)`."""
        _, probs, right = self._of_classes()
        return probs.argmax(-1) == right

    def _of_classes(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.class_probs is None or self.class_probs_exact is None or self.target_class is None:
            raise ValueError(
                "labels: the episodes have none, so no class is right or wrong. Give episodes with labels."
            )
        return self.class_probs, self.class_probs_exact, self.target_class

    @property
    def reliability(self) -> ReliabilityCurve:
        """The confidence of the guide's most probable class against its accuracy, over all targets."""
        probs, _, right = self._of_classes()
        return calibration_error(probs.flatten(0, 1), right.flatten())

    def summary(self) -> dict[str, float]:
        r"""Returns flat figures; means over targets have a standard error over episodes, `_se`.

        | `nll`, `nll_wrong_memory`: minus the evidence, an upper bound; `memory_worth_nats`: their difference.
        | `elbo`, `reconstruction`, `kl_z`: the one-sample bound and two of its parts.
        | `information_gain`, its third part, and `information_gain_exact`, in nats per target; `information_gain_bits`;
          `information_gain_share` of :math:`\log C`, which tells the class, and `information_gain_share_of_slots` of
          :math:`\log |M|`, which tells the slot.
        | `mutual_information`, `marginal_kl`: the part of the gain that tells the targets of an episode apart, and the
          rest; `perplexity`: effective slots per lookup; `slots_never_first`: slots that are no target's first.
        | `hit_rate`, `hit_rate_exact`: the accuracy of guide and exact posterior. `top5_rate`, `top5_rate_exact`: the
          right class is among the first five; NaN for five classes or fewer. `chance`.
        | `calibration_error`, `calibration_error_exact`: of the class probabilities, all targets together.
        | `kl_exact_to_guide`, `kl_guide_to_exact`, `rank_correlation`, `same_slot`: agreement of the two.
        | `monte_carlo_se`: the part of `nll_se` that more samples would remove, NaN if it is unknown of any target;
          `error_unknown`: the share of such targets, whose evidence is likely too low; `khat_above`: the share of
          targets with a k-hat above 0.7; `ess`.
        | `n_way`, `k_shot`, `num_samples`, `num_episodes`, `num_targets`; `decodes`, `evaluation_seconds`,
          `decodes_per_second`.
        """
        dtype, information = self.log_evidence.dtype, self.information
        n_way, num_slots = self.n_way or math.nan, (self.n_way or math.nan) * (self.k_shot or math.nan)
        of_classes: dict[str, Tensor | None] = dict.fromkeys(
            ("hit_rate", "hit_rate_exact", "top5_rate", "top5_rate_exact")
        )
        calibration = {"calibration_error": math.nan, "calibration_error_exact": math.nan}
        if self.class_probs is not None:
            guide, exact, right = self._of_classes()
            of_classes |= {"hit_rate": self.hit.to(dtype), "hit_rate_exact": self.hit_exact.to(dtype)}
            if n_way > _TOP:
                of_classes |= {"top5_rate": hits(guide, right, _TOP), "top5_rate_exact": hits(exact, right, _TOP)}
            of_exact = calibration_error(exact.flatten(0, 1), right.flatten())
            calibration = {"calibration_error": self.reliability.error, "calibration_error_exact": of_exact.error}
        columns = {
            "nll": -self.log_evidence,
            "nll_wrong_memory": -self.log_evidence_wrong,
            "memory_worth_nats": self.log_evidence - self.log_evidence_wrong,
            "information_gain": self.information_gain,
            "information_gain_exact": self.information_gain_exact,
            **of_classes,
            "elbo": self.reconstruction - self.information_gain - self.kl_z,
            "reconstruction": self.reconstruction,
            "kl_z": self.kl_z,
            "kl_exact_to_guide": self.kl_exact_to_guide,
            "kl_guide_to_exact": self.kl_guide_to_exact,
            "rank_correlation": self.rank_correlation,
            "same_slot": self.same_slot.to(dtype),
            "ess": self.ess,
            **{
                name: torch.tensor([[float(getattr(episode, name))] for episode in information])
                for name in ("mutual_information", "marginal_kl", "perplexity", "slots_never_first")
            },
        }
        summary: dict[str, float] = {}
        for name, values in columns.items():
            # Over episodes, whose targets share a memory.
            found = (math.nan, math.nan) if values is None else mean_and_error(values.nanmean(1))
            summary[name], summary[f"{name}_se"] = found
        gain = summary["information_gain"]
        summary |= {
            "information_gain_bits": gain / math.log(2),
            "information_gain_share": gain / math.log(n_way) if n_way > 1 else math.nan,
            "information_gain_share_of_slots": gain / math.log(num_slots) if num_slots > 1 else math.nan,
            **calibration,
            **trust_figures(self.khat, self.standard_error),
            "chance": 1 / n_way,
            "n_way": n_way,
            "k_shot": self.k_shot or math.nan,
            "num_samples": self.num_samples,
            "num_episodes": len(self.log_evidence),
            "num_targets": self.log_evidence.numel(),
            "decodes": self.decodes,
            "evaluation_seconds": self.seconds,
            "decodes_per_second": self.decodes / self.seconds,
        }
        return summary


@torch.no_grad()
def evaluate(
    vma: VMA,
    episodes: Dataset[Episode],
    num_episodes: Count = 20,
    num_samples: Count = 10,
    *,
    wrong: bool = True,
    seed: NonNegativeInt = 0,
    max_decodes: Count = 1024,
    progress: bool = True,
) -> FewShotEvaluation:
    """Evaluates a model on the first episodes of a sampler; parameters and global random state stay as they are.

    The evidence sums over all slots exactly and samples z at each. All other figures follow from the same decoder
    passes, except for the terms of the bound, which take eight draws of the guide per target.

    Arguments:
        episodes: The source of the episodes; held-out classes give few-shot figures. Without labels, figures of classes
            are NaN.
        num_episodes: The number of episodes.
        num_samples: Samples of z per slot.
        wrong: Whether to measure the evidence with a memory of other classes too. It takes as many more classes, and
            twice the decoder passes.
        seed: Seeds the samples of z.

    Raises:
        ValueError: If a number is less than 1, or the source has no memory of other classes and `wrong` is true.

    Example:
        >>> import pyro_vmem as pv
        >>> sampler = pv.data.EpisodeSampler(pv.data.glyphs(size=12, drawings=12), n_way=5, k_shot=1, n_query=1)
        >>> vma = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> result = evaluate(vma, sampler, num_episodes=2, num_samples=2, progress=False)
        >>> result.log_evidence.shape, result.summary()["chance"]
        (torch.Size([2, 5]), 0.2)
    """
    check_weights(vma)
    start, rows, information, decodes = time.perf_counter(), [], [], 0
    bar = tqdm(range(num_episodes), desc="evaluating", unit="episode", disable=not (progress and sys.stderr))
    with seeded(seed):
        for index in bar:
            episode = episodes[index]
            if not isinstance(episode, Episode):
                got = type(episode).__name__
                raise ValueError(f"episodes: expected each to be a pyro_vmem.data.Episode, got {got}. Make it one.")
            episode = episode.to(next(vma.parameters()).device)
            other = None
            if wrong:
                if not hasattr(episodes, "distractors"):
                    raise ValueError(
                        f"wrong: {type(episodes).__name__} has no `distractors`, a memory of other classes. Pass "
                        "wrong=False."
                    )
                other = episodes.distractors(index).to(episode.x.device)
            row, lookups = _measure(vma, episode, other, num_samples, max_decodes)
            rows.append(row)
            information.append(lookups)
            slots = episode.memory.num_slots + (0 if other is None else other.num_slots)
            decodes += len(episode.x) * (slots * num_samples + _DRAWS)
    columns: dict[str, Any] = dict.fromkeys(("class_probs", "class_probs_exact", "target_class"))
    columns |= {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}
    warn_if_not_finite(columns["log_evidence"].flatten(), stacklevel=5)
    return FewShotEvaluation(
        **columns,
        information=tuple(information),
        n_way=getattr(episodes, "n_way", None),
        k_shot=getattr(episodes, "k_shot", None),
        num_samples=num_samples,
        decodes=decodes,
        seconds=time.perf_counter() - start,
    )


def _measure(
    vma: VMA, episode: Episode, wrong: Memory | None, num_samples: int, max_decodes: int
) -> tuple[dict[str, Tensor], InformationSummary]:
    """Measures the targets of one episode: a value of each by name, and the summary of their lookups."""
    vma.check(episode.memory, episode.x)
    x, encoded = episode.x, vma.encode(episode.memory)
    right = slot_weights(vma, encoded, x, num_samples, max_decodes=max_decodes)
    exact, columns = right.log_joint, right.estimate.honest._asdict()
    columns["log_evidence_wrong"] = torch.full_like(columns["log_evidence"], math.nan)
    if wrong is not None:
        vma.check(wrong, x)
        other = slot_weights(vma, wrong, x, num_samples, max_decodes=max_decodes)
        columns["log_evidence_wrong"] = other.estimate.log_evidence
    # Forked, so that the evidence of the next episode does not depend on what else is measured.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        draws = draw_from_guide(vma, encoded, x, _DRAWS, max_decodes=max_decodes)
    guide, prior = draws.log_q, draws.log_p
    columns |= {
        "information_gain": draws.information_gain,
        "information_gain_exact": information_gain(exact, prior),
        "kl_exact_to_guide": information_gain(exact, guide),
        "kl_guide_to_exact": information_gain(guide, exact),
        "rank_correlation": rank_correlation(guide, exact),
        "same_slot": guide.argmax(-1) == exact.argmax(-1),
        "reconstruction": draws.log_likelihood.mean(0),
        "kl_z": draws.kl_z.mean(0),
    }
    if encoded.labels is not None and episode.labels is not None:
        columns |= {  # learned slots are a class of their own
            "class_probs": encoded.by_class(guide.softmax(-1)),
            "class_probs_exact": encoded.by_class(exact.softmax(-1)),
            "target_class": torch.searchsorted(encoded.labels.unique(), episode.labels),
        }
    return columns, information_summary(guide, prior[0])
