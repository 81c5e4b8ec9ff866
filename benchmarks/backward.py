"""How much noisier a gradient is that goes backward through some of four particles, drawn by their weights.

All have the same expectation, so variances compare: the total variance of the gradient of each part's parameters, as a
multiple of that with all particles, which are the same ones. Once with one minibatch, where only the draws vary; and
once with a new episode for each gradient, which is the noise that training has. Letters, a small convolutional model as
built and trained a little. It depends on how unequal the weights are: the effective sample size is beside it.

    python -m benchmarks.backward
    python -m benchmarks.backward --repeats 200 --json
"""

from __future__ import annotations

import sys
from statistics import fmean
from typing import Any

import pyro
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command

PARTICLES = 4
COUNTS = (None, 2, 1)  # of how many the gradient is taken; all, to begin with
PARTS = ("template_encoder", "address_guide", "latent_guide", "latent_prior", "likelihood")


def gradients(vma: pv.VMA, episode: pv.data.Episode, backward: int | None) -> tuple[dict[str, Tensor], float]:
    """The gradient of the loss per target, of the parameters of each part and of all; the effective sample size."""
    elbo = pv.infer.VIMCO_ELBO(PARTICLES, max_plate_nesting=1, backward=backward)
    terms = elbo.terms(vma.model, vma.guide, vma.encode(episode.memory), episode.x)
    loss = terms.loss / len(episode.x)
    names = [name for name, _ in vma.named_parameters()]
    grads = dict(zip(names, torch.autograd.grad(loss, list(vma.parameters())), strict=True))
    parts = {part: [g.flatten() for name, g in grads.items() if name.split(".")[0] == part] for part in PARTS}
    parts["all"] = [g.flatten() for g in grads.values()]
    return {part: torch.cat(of) for part, of in parts.items()}, float(terms.ess.mean())


class Variance:
    """The variance of vectors, summed over their elements, as they come."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), 0.0

    def add(self, vector: Tensor) -> None:
        """One more."""
        self.count += 1
        before = vector - self.mean
        self.mean = self.mean + before / self.count
        self.squares += float((before * (vector - self.mean)).sum())

    @property
    def total(self) -> float:
        """Of those so far."""
        return self.squares / (self.count - 1)


def main(repeats: int = 40, steps: int = 150, width: int = 8, seed: int = 0) -> dict[str, Any]:
    """Measures before and after some training.

    Args:
        repeats: Gradients of each kind.
        steps: Training steps.
        width: The channels of the convolutions at half resolution.
        seed: Seeds weights, episodes and draws.
    """
    train, _ = pv.data.glyphs().split(seed=0)
    episodes = pv.data.EpisodeSampler(train, n_way=16, k_shot=1, n_query=4, seed=seed)
    rows: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(seed)
        vma = pv.VMA.for_images(train.image_shape, latent_dim=16, num_features=64, width=width)
        with torch.no_grad():  # at initialisation, some layers are zero, and some gradients with them
            for parameter in vma.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        for trained in (0, steps):
            if trained:
                pv.fit(vma, episodes, steps=steps, seed=seed, progress=False)
            found: dict[tuple[str, int | None, str], Variance] = {}
            sizes = []
            for repeat in tqdm(range(repeats), desc=f"after {trained} steps", file=sys.stderr):
                for varied, episode in (("draws", episodes[10**6]), ("episodes", episodes[10**6 + repeat])):
                    for backward in COUNTS:
                        torch.manual_seed(repeat)  # the same particles
                        of_parts, size = gradients(vma, episode, backward)
                        sizes.append(size)
                        for part, gradient in of_parts.items():
                            found.setdefault((varied, backward, part), Variance()).add(gradient)
            for backward in COUNTS[1:]:
                for part in (*PARTS, "all"):
                    ratios = {
                        varied: found[varied, backward, part].total / found[varied, None, part].total
                        for varied in ("draws", "episodes")
                    }
                    rows.append({"steps": trained, "backward": backward, "part": part, "ess": fmean(sizes), **ratios})
    return {
        "particles": PARTICLES,
        "repeats": repeats,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """The ratios as a table."""
    table = Table(
        "steps", "backward", "part", "draws vary", "episodes too", title="variance over that of all particles"
    )
    for row in result["rows"]:
        ratios = (f"{row[varied]:.2f}" for varied in ("draws", "episodes"))
        table.add_row(
            str(row["steps"]), f"{row['ess']:.2f}", f"{row['backward']} of {result['particles']}", row["part"], *ratios
        )
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
