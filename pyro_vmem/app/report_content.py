"""The contents of a report: measurements and pictures of the first test episode, as arrays.

Nothing here changes the model or the random state.
"""

from __future__ import annotations

from typing import Any

import torch

from pyro_vmem._utils.random_state import seeded
from pyro_vmem.data import EpisodeSampler
from pyro_vmem.diagnostics import Calibration, Contribution, FewShotEvaluation, contribution, estimate_evidence, sbc
from pyro_vmem.memory import Memory
from pyro_vmem.model import VMA

__all__: list[str] = []

_TARGETS = 40  # targets whose contributions and weights are measured; more would double the time of the evaluation
_DRAWS = 200  # draws of the guide per target: enough to estimate a k-hat
_ROWS = 8  # targets and templates that are shown
_COMPLETIONS = 5
_SIMULATIONS = 300


@torch.no_grad()
def check(vma: VMA, episodes: EpisodeSampler, num_samples: int = 10, seed: int = 0) -> tuple[Contribution, Calibration]:
    """Measures the contribution of the memory to targets of the first episode, and the calibration of the guide."""
    device = next(vma.parameters()).device
    episode, wrong = episodes[0].to(device), episodes.distractors(0).to(device)
    memory = vma.encode(episode.memory)
    found = contribution(vma, memory, episode.x[:_TARGETS], wrong=wrong, num_samples=num_samples, seed=seed)
    return found, sbc(vma, memory, num_simulations=_SIMULATIONS, seed=seed)


@torch.no_grad()
def report_fields(
    vma: VMA,
    episodes: EpisodeSampler,
    evaluation: FewShotEvaluation,
    found: Contribution,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the fields of a report on the CPU, from an evaluation and the contribution that :func:`check` found."""
    device = next(vma.parameters()).device
    episode = episodes[0].to(device)
    memory, x = vma.encode(episode.memory), episode.x
    assert memory.labels is not None
    assert episode.labels is not None
    measured = slice(min(_TARGETS, len(x)))
    with seeded(seed):
        chosen = torch.arange(0, measured.stop, max(1, measured.stop // _ROWS))[:_ROWS]
        slots = range(min(_ROWS, memory.num_slots))
        samples = torch.stack([vma.generate(memory, 8, address=slot, mean=True) for slot in slots])
        completion = _complete(vma, memory, x[chosen.to(device)])
    weights = estimate_evidence(vma, memory, x[measured], _DRAWS, "sampled", seed=seed, max_decodes=1024, warn=False)
    guide, exact = vma.address_guide(memory, vma.encode_x(x)).probs.cpu(), found.log_joint.softmax(-1).cpu()
    x, labels, templates, classes = x.cpu(), episode.labels.cpu(), memory.templates.cpu(), memory.labels.cpu()
    addresses = {"probabilities": guide[measured], "exact": exact, "target_labels": labels[measured]}
    gain = {"gain": evaluation.information_gain.flatten(), "exact": evaluation.information_gain_exact.flatten()}
    lookup = {"targets": x[chosen], "templates": templates, "labels": classes}
    return {
        "information_gain": gain | {"num_slots": memory.num_slots, "num_classes": episodes.n_way},
        "lookup": lookup | {name: values[chosen] for name, values in addresses.items()},
        "addresses": addresses | {"labels": classes},
        "generation": {"templates": templates[: len(slots)], "samples": samples.cpu()},
        "completion": completion,
        "evidence": {name: values.cpu() for name, values in found.evidence.items()},
        "reliability": {name: getattr(evaluation.reliability, name) for name in ("confidence", "accuracy", "count")},
        "khat": weights.khat.cpu(),
    }


def _complete(vma: VMA, memory: Memory, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Completes the lower halves of targets, for `plots.completions`."""
    height = x.shape[-2]
    mask = (torch.arange(height, device=x.device) < (height + 1) // 2).unsqueeze(-1)
    filled = vma.complete(memory, x.repeat_interleave(_COMPLETIONS, 0), mask, num_particles=32, mean=True)
    samples = filled.reshape(len(x), _COMPLETIONS, *x.shape[1:])
    return {"targets": x.cpu(), "mask": mask.cpu(), "samples": samples.cpu()}
