"""Few-shot evaluation: evidence, information gain and address hits on classes that were never trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vmem.data import EpisodeSampler
from pyro_vmem.diagnostics.information import information_gain
from pyro_vmem.diagnostics.slots import slot_log_evidence
from pyro_vmem.memory import Memory
from pyro_vmem.vma import VMA

__all__ = ["FewShotEvaluation", "evaluate"]


@dataclass(frozen=True, eq=False)
class FewShotEvaluation:
    r"""What :func:`evaluate` measured: one row an episode, one column a target, `(E, B)`, in nats.

    Attributes:
        log_evidence: :math:`\log p(x | M)`.
        log_evidence_wrong: The same with a memory of other classes.
        information_gain: :math:`KL(q(a|x,M) \| p(a|M))`, by the guide.
        information_gain_exact: :math:`KL(p(a|x,M) \| p(a|M))`, by the evidence of each slot.
        hit: Whether the guide's most probable class is the target's.
        hit_exact: Whether the exact address posterior's is.
        n_way: Classes in memory.
        k_shot: Slots a class.
        num_samples: Samples of z a slot that the evidence was estimated from.
    """

    log_evidence: Tensor
    log_evidence_wrong: Tensor
    information_gain: Tensor
    information_gain_exact: Tensor
    hit: Tensor
    hit_exact: Tensor
    n_way: int
    k_shot: int
    num_samples: int

    @property
    def ceiling(self) -> float:
        r""":math:`\log C` of the number of classes: the information, in nats, that tells the target's class."""
        return math.log(self.n_way)

    def summary(self) -> dict[str, float]:
        """Means over targets with their standard errors (`_se`) over episodes; the keys name the quantity.

        `information_gain_share` is the share of :math:`\\log C`, which it takes to tell the class, and
        `information_gain_share_of_slots` that of :math:`\\log |M|`, which it takes to tell the slot.
        `memory_worth_nats` is what the right memory gains over a wrong one, target by target.
        """
        columns = {
            "nll": -self.log_evidence,
            "nll_wrong_memory": -self.log_evidence_wrong,
            "memory_worth_nats": self.log_evidence - self.log_evidence_wrong,
            "information_gain": self.information_gain,
            "information_gain_exact": self.information_gain_exact,
            "hit_rate": self.hit.to(self.log_evidence.dtype),
            "hit_rate_exact": self.hit_exact.to(self.log_evidence.dtype),
        }
        summary: dict[str, float] = {}
        for name, values in columns.items():
            summary[name], summary[f"{name}_se"] = mean_and_error(values)
        summary["information_gain_bits"] = summary["information_gain"] / math.log(2)
        summary["information_gain_share"] = summary["information_gain"] / self.ceiling if self.n_way > 1 else math.nan
        num_slots = self.n_way * self.k_shot
        summary["information_gain_share_of_slots"] = (
            summary["information_gain"] / math.log(num_slots) if num_slots > 1 else math.nan
        )
        summary["chance"] = 1 / self.n_way
        for name in ("n_way", "k_shot", "num_samples"):
            summary[name] = getattr(self, name)
        summary["num_episodes"], summary["num_targets"] = self.hit.shape[0], self.hit.numel()
        return summary


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of `(E, B)` and its standard error over episodes: targets of one episode share a memory."""
    episodes = values.mean(1)
    error = float(episodes.std() / math.sqrt(len(episodes))) if len(episodes) > 1 else math.nan
    return float(episodes.mean()), error


@torch.no_grad()
def evaluate(
    vma: VMA,
    episodes: EpisodeSampler,
    num_episodes: int = 20,
    num_samples: int = 10,
    *,
    seed: int = 0,
    max_decodes: int = 4096,
    progress: bool = True,
) -> FewShotEvaluation:
    r"""Measures a model on the first episodes of a sampler; parameters and global random state stay as they are.

    The evidence sums over all slots exactly and samples z, `num_samples` times a slot.

    Arguments:
        vma: The model and its guide.
        episodes: Where the episodes come from; classes that were not trained on, for few-shot figures.
        num_episodes: How many episodes.
        num_samples: Samples of z a slot.
        seed: Seeds the samples of z.
        max_decodes: How many decodes to hold in memory at once.
        progress: Whether to show a progress bar.

    Returns:
        The figures of each target.

    Raises:
        ValueError: If a number is less than 1, or there are too few classes for a wrong memory.

    Example:
        >>> import pyro_vmem as pv
        >>> sampler = pv.data.EpisodeSampler(pv.data.glyphs(size=12, drawings=12), n_way=5, k_shot=1, n_query=1)
        >>> vma = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> result = evaluate(vma, sampler, num_episodes=2, num_samples=2, progress=False)
        >>> result.log_evidence.shape, result.summary()["chance"]
        (torch.Size([2, 5]), 0.2)
    """
    if num_episodes < 1:
        raise ValueError(f"num_episodes: expected at least 1, got {num_episodes}.")
    rows = []
    bar = tqdm(range(num_episodes), desc="evaluating", unit="episode", disable=not progress)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for index in bar:
            episode = episodes[index].to(next(vma.parameters()).device)
            wrong = episodes.distractors(index).to(episode.x.device)
            rows.append(_measure(vma, episode.x, episode.labels, episode.memory, wrong, num_samples, max_decodes))
    columns = {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}
    return FewShotEvaluation(**columns, n_way=episodes.n_way, k_shot=episodes.k_shot, num_samples=num_samples)


def _measure(
    vma: VMA,
    x: Tensor,
    labels: Tensor,
    memory: Memory,
    wrong: Memory,
    num_samples: int,
    max_decodes: int,
) -> dict[str, Tensor]:
    """The columns of one episode's targets."""

    def joint(m: Memory) -> tuple[Tensor, Tensor]:
        encoded = vma.encode(m)
        prior = vma.address_prior(encoded).logits
        return prior, prior + slot_log_evidence(vma, encoded, x, num_samples, max_decodes=max_decodes)

    prior, right = joint(memory)
    guide = vma.address_guide(vma.encode(memory), vma.encode_x(x)).logits
    return {
        "log_evidence": right.logsumexp(-1),
        "log_evidence_wrong": joint(wrong)[1].logsumexp(-1),
        "information_gain": information_gain(guide, prior),
        "information_gain_exact": information_gain(right, prior),
        "hit": _top_class(guide, memory) == labels,
        "hit_exact": _top_class(right, memory) == labels,
    }


def _top_class(logits: Tensor, memory: Memory) -> Tensor:
    """The most probable class of each target."""
    assert memory.labels is not None
    return memory.labels.unique()[memory.by_class(logits.softmax(-1)).argmax(-1)]
