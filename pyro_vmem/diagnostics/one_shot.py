"""One-shot classification of images, each given one image of every class.

Three scores choose the class: the guide, the evidence of the image given the class's image, and both directions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.random_state import seeded
from pyro_vmem.data import OneShotTrial
from pyro_vmem.diagnostics.slot_weights import log_weights_at_slots
from pyro_vmem.diagnostics.weights import mean_and_error
from pyro_vmem.memory import Memory
from pyro_vmem.model import VMA

__all__ = ["OneShotErrors", "one_shot_errors"]


@dataclass(frozen=True, eq=False)
class OneShotErrors:
    r"""The share of test images of each trial that get a wrong class, `(R,)`, by three scores.

    Attributes:
        guide: By :math:`q(a | M, x)`, with one template of each class in memory.
        evidence: By :math:`\log p(x | m)`.
        two_way: By :math:`\log p(x | m) + \log p(m | x) - \log p(m)`.
    """

    guide: Tensor
    evidence: Tensor
    two_way: Tensor

    def summary(self) -> dict[str, float]:
        """The mean of each over trials, and its standard error over trials as `_se`; NaN for a single trial."""
        summary: dict[str, float] = {"num_trials": len(self.guide)}
        for name in ("guide", "evidence", "two_way"):
            summary[name], summary[f"{name}_se"] = mean_and_error(getattr(self, name))
        return summary


@torch.no_grad()
def one_shot_errors(
    vma: VMA,
    trials: Sequence[OneShotTrial],
    num_samples: Count = 20,
    *,
    seed: NonNegativeInt = 0,
    max_decodes: Count = 1024,
    progress: bool = False,
) -> OneShotErrors:
    r"""Classifies the test images of one-shot trials, whose classes the model has not seen in training.

    The evidence :math:`\log p(x | m)` of image x given image m is that of a memory whose only slot is m. The score of
    both directions adds how well x explains m, compared with other images: :math:`p(m)` is the mean of :math:`p(m |
    x')` over all test images of the trial.

    References:
        | Human-level concept learning through probabilistic program induction (Lake et al., 2015)
        | https://doi.org/10.1126/science.aab3050

    Arguments:
        trials: As :func:`~pyro_vmem.data.one_shot_trials` reads them, `R` of them.
        num_samples: Samples of z for each pair of images, in each direction.

    Raises:
        ValueError: If there is no trial, or images do not fit the model.

    Example:
        >>> import pyro_vmem as pv
        >>> vma = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> trials = pv.data.within_alphabet_trials(pv.data.glyphs(size=12, drawings=4), num_trials=2, n_way=5)
        >>> one_shot_errors(vma, trials, num_samples=2).two_way.shape
        torch.Size([2])
    """
    if not trials:
        raise ValueError("trials: expected at least one, got none.")
    device = next(vma.parameters()).device
    errors = []
    with seeded(seed):
        for trial in tqdm(trials, desc="one-shot trials", unit="trial", disable=not (progress and sys.stderr)):
            training, test, right = (tensor.to(device) for tensor in trial)
            memory = Memory(training)
            vma.check(memory, test)
            encoded = vma.encode(memory)
            guide = vma.address_guide(encoded, vma.encode_x(test)).logits[..., : len(training)]
            forward = _log_evidence(vma, test, training, num_samples, max_decodes)
            reverse = _log_evidence(vma, training, test, num_samples, max_decodes).mT
            two_way = forward + reverse.log_softmax(0)  # the mean over test images, but for its constant
            errors.append(
                torch.stack([(score.argmax(-1) != right).float().mean() for score in (guide, forward, two_way)])
            )
    return OneShotErrors(*torch.stack(errors, 1).cpu())


def _log_evidence(vma: VMA, x: Tensor, m: Tensor, num_samples: int, max_decodes: int) -> Tensor:
    r"""Estimates :math:`\log p(x | m)` of each of `B` images given each of `C`, with shape `(B, C)`; in nats."""
    slot = torch.zeros(1, dtype=torch.long, device=x.device)
    rows = []
    for some in x.split(max(1, max_decodes // len(m))):
        pairs_x = some.repeat_interleave(len(m), 0)
        templates = m.repeat(len(some), *[1] * (m.ndim - 1)).unsqueeze(1)
        memory = vma.encode(Memory(templates, per_datapoint=True))
        log_weights = log_weights_at_slots(vma, memory, pairs_x, slot, num_samples, max_decodes).squeeze(1)
        rows.append((log_weights.logsumexp(0) - math.log(num_samples)).reshape(len(some), len(m)))
    return torch.cat(rows)
