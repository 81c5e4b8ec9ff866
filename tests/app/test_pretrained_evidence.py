"""The models of the package say of 50 fixed targets what they said when `pretrained_evidence.json` was written.

Five quantities of each model, in float32 on the CPU:

- `at_prior_mean`: log sum_a p(a | M) p(x | z_a, m_a), z_a the mean of p(z | m_a); nothing is sampled;
- `evidence`: the evidence with one seeded sample of z at every slot, so it also holds the order of random numbers. It
  is compared for the models without learned slots only: with them the number of draws has changed since, as the learned
  slots are now counted;
- `log_q_a`: log q(a | M, x) of every slot, and `best_slot`, the most probable;
- `z_norm`: the norm of the mean of q(z | x, m_a) at that slot.

The tolerance is 1e-5 of max(1, |value|): other threads or kernels move float32 by 3e-6 at most. Of `log_q_a` they move
up to 3e-5, as similarities are divided by a small temperature, and the tolerance is 1e-4. Where a change is meant:

    python tests/app/test_pretrained_evidence.py --write
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_vmem as pv

STORED = Path(__file__).with_name("pretrained_evidence.json")
NAMES = ("omniglot26", "omniglot28", "omniglot28-independent")
TOLERANCES = {"at_prior_mean": 1e-5, "evidence": 1e-5, "log_q_a": 1e-4, "z_norm": 1e-5}
SLOTS, OF_A_SLOT, ABSENT = 10, 4, 10  # letters in memory, targets of each of these, targets of letters that are not


@functools.cache
def images(size: int) -> tuple[Tensor, Tensor]:
    """Ten letters, one drawing each, as memory; 40 other drawings of these and 10 of other letters as targets."""
    drawings = OF_A_SLOT + 1
    dataset = pv.data.glyphs(size, drawings=drawings, seed=0)
    binary = (dataset.images >= 128).float()
    by_class = torch.stack([binary[dataset.classes == c] for c in range(0, dataset.num_classes, 7)])
    known, others = by_class[:SLOTS], by_class[SLOTS : SLOTS + ABSENT]
    return known[:, 0], torch.cat([known[:, 1:].flatten(0, 1), others[:, 0]])


def checksum(size: int) -> str:
    """Of the bits of all images of a size."""
    digest = hashlib.sha256()
    for batch in images(size):
        digest.update(str(tuple(batch.shape)).encode())
        digest.update(batch.to(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def found(name: str) -> dict[str, Tensor]:
    """What a model says of the targets."""
    vma = pv.VMA.from_pretrained(name)
    templates, x = images(vma.event_shape[-1])
    assert x.shape == (50, *vma.event_shape)
    memory = vma.encode(pv.Memory(templates))
    target, slots = vma.encode_x(x), torch.arange(memory.num_slots)
    template = memory.read(slots[:, None].expand(-1, len(x)))  # (S, B)
    log_p_x = vma.likelihood(vma.latent_prior(template).mean, template).log_prob(x)
    log_q_a = vma.address_guide(memory, target).logits.log_softmax(-1)
    best = log_q_a.argmax(-1)
    return {
        "at_prior_mean": (vma.address_prior(memory).logits.log_softmax(-1)[..., None] + log_p_x).logsumexp(0),
        # Fewer samples than slots: one at each, and no share of samples that rounding could move to another slot.
        "evidence": pv.diagnostics.estimate_evidence(
            vma, pv.Memory(templates), x, num_samples=1, method="exact-address", budget=0, seed=0, warn=False
        ).log_evidence,
        "log_q_a": log_q_a,
        "best_slot": best,
        "z_norm": vma.latent_guide(target, memory.read(best)).mean.norm(dim=-1),
    }


@functools.cache
def stored() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(STORED.read_text())
    return content


def test_every_model_is_held() -> None:
    assert sorted(stored()["models"]) == sorted(NAMES)
    assert set(NAMES) <= set(pv.config.pretrained_names())


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_said(name: str) -> None:
    size = pv.VMA.from_pretrained(name).event_shape[-1]
    if checksum(size) != stored()["images"][str(size)]:
        pytest.fail(
            f"the {size}x{size} images differ from those that {STORED.name} was written with, so the models cannot be "
            "compared: another matplotlib (its fonts) or Pillow, or a change of pyro_vmem.data.glyphs. This says "
            "nothing of the models."
        )
    held, now = stored()["models"][name], found(name)
    assert now["best_slot"].tolist() == held["best_slot"]
    wrong = []
    learned_slots = pv.VMA.from_pretrained(name).templates is not None
    for quantity, tolerance in TOLERANCES.items():
        if quantity == "evidence" and learned_slots:
            continue  # see above
        expected, value = torch.tensor(held[quantity], dtype=torch.float64), now[quantity].double()
        assert value.shape == expected.shape, quantity
        error = (value - expected).abs() / expected.abs().clamp(min=1)
        if not bool((error <= tolerance).all()):
            wrong.append(f"{quantity}: off by up to {error.max():.1e}, at {int((error > tolerance).sum())} values")
    assert not wrong, f"{name}: " + "; ".join(wrong)


def write() -> None:
    """Stores what the models say now."""
    checksums = json.dumps({str(size): checksum(size) for size in (26, 28)})
    models = []
    for name in NAMES:
        lines = [f'  "{key}": {json.dumps(_plain(value))}' for key, value in found(name).items()]
        models.append(f' "{name}": {{\n' + ",\n".join(lines) + "}")
    STORED.write_text(f'{{"images": {checksums},\n"models": {{\n' + ",\n".join(models) + "}}\n")


def _plain(value: Tensor) -> list[Any]:
    def short(number: Any) -> Any:
        return [short(n) for n in number] if isinstance(number, list) else float(f"{number:.8g}")

    values: list[Any] = value.tolist()
    return values if not value.is_floating_point() else short(values)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/app/test_pretrained_evidence.py --write")
    write()
