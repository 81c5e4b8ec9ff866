"""Noise of the address guide's gradient, for every objective at the same number of decodes.

On the reference model (one set of parameters a number of slots) and on letters, before and after training the guide:
the variance of the gradient of the address guide's parameters, summed over parameters, and its signal-to-noise ratio,
the norm of the mean over the square root of that variance. Objectives have different gradients, so the ratio of
variances is that of the squared noise-to-signal ratios, VIMCO over the objective: above 1 is better than VIMCO.

    python -m benchmarks.estimators
    python -m benchmarks.estimators --json --repeats 400
"""

from __future__ import annotations

import sys
from typing import Any

import pyro
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem.infer import (
    IWAE_ELBO,
    RWS_ELBO,
    VIMCO_ELBO,
    ParticleELBO,
    RaoBlackwell_ELBO,
    Reinforce_ELBO,
)

DECODES = 4


def objectives() -> dict[str, ParticleELBO]:
    """Each with four decodes a datapoint."""
    return {
        "vimco": VIMCO_ELBO(DECODES, max_plate_nesting=1),
        "vimco, geometric": VIMCO_ELBO(DECODES, "geometric", max_plate_nesting=1),
        "iwae": IWAE_ELBO(DECODES, max_plate_nesting=1),
        "rws": RWS_ELBO(DECODES, max_plate_nesting=1),
        "reinforce": Reinforce_ELBO(DECODES, max_plate_nesting=1),
        "rao-blackwell": RaoBlackwell_ELBO(DECODES - 1, max_plate_nesting=1),
    }


def gradient(elbo: ParticleELBO, vma: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
    """One draw of the gradient of the loss per datapoint, of the address guide's parameters."""
    parameters = list(vma.address_guide.parameters())
    loss = elbo.differentiable_loss(vma.model, vma.guide, vma.encode(memory), x) / len(x)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def measure(vma: pv.VMA, memory: pv.Memory, x: Tensor, repeats: int) -> list[dict[str, Any]]:
    """A row an objective."""
    rows = []
    for name, elbo in objectives().items():
        draws = torch.stack([gradient(elbo, vma, memory, x) for _ in range(repeats)])
        variance = float(draws.var(0).sum())
        # the mean's own noise is in its squared norm: take it out
        signal = max(float(draws.mean(0).square().sum()) - variance / repeats, 0.0)
        rows.append({"objective": name, "variance": variance, "snr": (signal / variance) ** 0.5 if variance else None})
    vimco = rows[0]
    for row in rows:
        row["variance_ratio"] = vimco["variance"] / row["variance"] if row["variance"] else None
        row["snr_ratio"] = row["snr"] / vimco["snr"] if row["snr"] and vimco["snr"] else None
    return rows


def reference(slots: int, trained: bool) -> tuple[pv.VMA, pv.Memory, Tensor]:
    """The reference model with a similarity guide; trained by enumeration, which has no noise of its own."""
    torch.manual_seed(slots)
    model = pv.LinearGaussianMemory(dim=8, latent_dim=2, generator=torch.Generator().manual_seed(0))
    guide = pv.SimilarityGuide(8, embed_dim=8, normalise="dot", temperature=1.0, tied=False)
    vma = model.vma(address_guide=guide)
    memory = pv.Memory(2 * torch.randn(slots, 8))
    x = torch.cat([vma.model(memory) for _ in range(64)]).detach()
    if trained:
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
        prior = -torch.tensor(float(slots)).log()
        evidence = model.slot_log_evidence(memory, x).detach()
        for _ in range(600):
            log_q = guide(vma.encode(memory), vma.encode_x(x)).logits
            loss = -(log_q.exp() * (evidence + prior - log_q)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return vma, memory, x


def letters(steps: int) -> tuple[pv.VMA, pv.Memory, Tensor]:
    """A small convolutional model on glyphs, after some steps of VIMCO."""
    train, _ = pv.data.glyphs().split(seed=0)
    episodes = pv.data.EpisodeSampler(train, n_way=16, k_shot=1, n_query=2, seed=0)
    torch.manual_seed(0)
    vma = pv.VMA.for_images(train.image_shape, latent_dim=16, num_features=64, width=16)
    if steps:
        pv.fit(vma, episodes, steps=steps)
    episode = episodes[10**6]
    return vma, episode.memory, episode.x


def main(repeats: int = 200, slots: list[int] | None = None, letter_steps: int = 600) -> dict[str, Any]:
    """Measures all of it.

    Args:
        repeats: Draws of each gradient.
        slots: The numbers of slots of the reference model; by default 8, 64 and 512.
        letter_steps: Training steps of the model on letters.
    """
    cases: list[tuple[str, bool, Any]] = []
    for count in slots or [8, 64, 512]:
        cases += [(f"reference, |M| = {count}", trained, (reference, count, trained)) for trained in (False, True)]
    cases += [("letters, |M| = 16", bool(steps), (letters, steps)) for steps in (0, letter_steps)]
    rows = []
    with torch.random.fork_rng():
        for name, trained, (make, *arguments) in tqdm(cases, desc="cases", file=sys.stderr):
            with pyro.get_param_store().scope():
                vma, memory, x = make(*arguments)
                torch.manual_seed(0)
                rows += [{"case": name, "trained": trained, **row} for row in measure(vma, memory, x, repeats)]
    return {"decodes": DECODES, "repeats": repeats, "torch": torch.__version__, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """The variance ratios as a table."""
    names = list(objectives())
    table = Table("case", "guide", *names, title="variance of VIMCO over that of the objective", title_justify="left")
    for start in range(0, len(result["rows"]), len(names)):
        rows = result["rows"][start : start + len(names)]
        ratios = [f"{row['variance_ratio']:.3g}" if row["variance_ratio"] else "no noise" for row in rows]
        table.add_row(rows[0]["case"], "trained" if rows[0]["trained"] else "as built", *ratios)
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
