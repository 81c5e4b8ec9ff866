"""A recogniser of characters, which judges the draws of models that it has no part in.

A prototypical network: images become vectors, and a target of an episode gets the class whose drawing in memory is
nearest by cosine. It is trained on the background characters of Omniglot under random affine maps, and tested on the
characters of the evaluation alphabets.

    python -m benchmarks.recogniser
    python -m benchmarks.recogniser --steps 3000 --out recogniser.safetensors

References:
    | Prototypical Networks for Few-shot Learning (Snell, Swersky, Zemel, 2017) | https://arxiv.org/abs/1703.05175
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem.data import Episode, EpisodeSampler, FewShotDataset, WarpedEpisodes
from pyro_vmem.train import load_checkpoint, save_checkpoint


class Recogniser(nn.Sequential):
    """Images `(N, 1, 28, 28)` to vectors of length one, `(N, 256)`."""

    def __init__(self, width: int = 48) -> None:
        channels = [1, width, width, width, width]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(width, 256))

    def forward(self, images: Tensor) -> Tensor:
        """The vectors of images."""
        return nn.functional.normalize(super().forward(images), dim=-1)

    def scores(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """The cosine of each target with each slot, and the slot of each target's class."""
        assert episode.memory.labels is not None
        assert episode.labels is not None
        vectors = self(torch.cat([episode.memory.templates, episode.x]))
        slots, targets = vectors[: episode.memory.num_slots], vectors[episode.memory.num_slots :]
        return targets @ slots.mT, (episode.labels[:, None] == episode.memory.labels).float().argmax(-1)


def train(background: FewShotDataset, steps: int, seed: int = 0) -> Recogniser:
    """Trains a recogniser on 40-way episodes, each with new affine maps of classes and of images."""
    plain = EpisodeSampler(background, n_way=40, k_shot=1, n_query=3, rotate=True, seed=seed)
    episodes = WarpedEpisodes(plain, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        recogniser = Recogniser()
    optimizer = torch.optim.AdamW(recogniser.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), desc="recogniser", file=sys.stderr):
        scores, right = recogniser.scores(episodes[step])
        nn.functional.cross_entropy(16 * scores, right).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return recogniser.eval()


@torch.no_grad()
def accuracy(recogniser: Recogniser, test: FewShotDataset, episodes: int = 100) -> tuple[float, float]:
    """The share of targets that are recognised, 20-way 1-shot, and its standard error over episodes."""
    sampler = EpisodeSampler(test, n_way=20, k_shot=1, n_query=2)
    found = [recogniser.scores(sampler[i]) for i in range(episodes)]
    shares = torch.stack([(scores.argmax(-1) == right).float().mean() for scores, right in found])
    return float(shares.mean()), float(shares.std() / math.sqrt(episodes))


def load(path: str | Path) -> Recogniser:
    """The recogniser of a file that this command wrote."""
    recogniser = Recogniser()
    recogniser.load_state_dict(load_checkpoint(path)[0])
    return recogniser.eval()


def main(steps: int = 2000, seed: int = 0, out: str | None = None) -> dict[str, Any]:
    """Trains and tests.

    Args:
        steps: Training steps of 40 characters.
        seed: Seeds weights and episodes.
        out: Where its weights go.
    """
    background, _, test = pv.data.protocol("whole-memory").datasets()
    recogniser = train(background, steps, seed)
    if out is not None:
        save_checkpoint(out, recogniser.state_dict(), {})
    found, error = accuracy(recogniser, test)
    return {"steps": steps, "accuracy": found, "standard_error": error}


def show(result: dict[str, Any]) -> None:
    """Its accuracy."""
    sys.stdout.write(f"{result['accuracy']:.1%} ± {result['standard_error']:.1%}, 20-way 1-shot across alphabets\n")


if __name__ == "__main__":
    command(main, show)
