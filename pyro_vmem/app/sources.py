"""Images and episodes of an experiment: what its model is trained, validated and tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from pyro_vmem import data
from pyro_vmem.app.settings import Settings
from pyro_vmem.config.arguments import checked
from pyro_vmem.config.pretrained import protocol_of
from pyro_vmem.data import (
    Episode,
    EpisodeSampler,
    FewShotDataset,
    LibraryEpisodes,
    MixedEpisodes,
    RecallSampler,
    WarpedEpisodes,
)
from pyro_vmem.data.protocols import PROTOCOLS

__all__ = ["Kind", "Sources"]


@dataclass(frozen=True)
class Kind:
    """A kind of training episodes; see `Settings`."""

    n_way: int = 16
    k_shot: int = 4
    n_query: int = 4
    n_absent: int = 0
    warp: bool = False


@dataclass(frozen=True)
class Sources(Settings):
    """Which images there are, and which episodes are made of them, by the settings."""

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of training episodes."""
        more = (Kind(**checked(Kind, values, f"more[{number}]")) for number, values in enumerate(self.more))
        return [Kind(self.n_way, self.k_shot, self.n_query, self.n_absent, self.warp), *more]

    def datasets(self) -> tuple[FewShotDataset, FewShotDataset, FewShotDataset]:
        """Classes to train on, to validate on and to test on, whole alphabets apart where there are alphabets.

        Raises:
            ValueError: If the place of the images is needed and not given.
        """
        if self.data in PROTOCOLS:
            return PROTOCOLS[self.data].datasets(self.data_root)
        if self.data == "mnist":  # classes are those of the test set: what is new are the images
            whole = data.mnist(self.data_root)
            held_out = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)) < 5000
            return _some(whole, ~held_out), _some(whole, held_out), data.mnist(self.data_root, train=False)
        if self.data == "omniglot":
            train, validation = self._background(self.resize)
            return train, validation, data.omniglot(self.data_root, subset="evaluation", resize=self.resize)
        if self.data == "glyphs":
            whole = data.glyphs(int(self.resize[-2:]), seed=self.seed)
        elif self.data_root is None:
            raise ValueError(f"data_root: data={self.data!r} needs the place of the images, got None.")
        else:
            whole = data.from_folder(self.data_root) if self.data == "folder" else data.from_npz(self.data_root)
        by: Literal["alphabet", "class"] = "alphabet" if len(whole.alphabet_names) > 2 else "class"
        rest, test = whole.split(by=by, test=0.2, seed=self.seed)
        train, validation = rest.split(by=by, test=0.15, seed=self.seed)
        return train, validation, test

    def episodes(self, device: torch.device | str = "cpu") -> tuple[Dataset[Episode], Dataset[Episode]]:
        """Episodes to train on and to validate on, made on a device."""
        train, validation, _ = self.datasets()
        if self.recall:
            sizes = (self.n_way * self.k_shot, self.n_query)
            return RecallSampler(train, *sizes, self.seed), RecallSampler(validation, *sizes, self.seed + 1)
        held_out = self._held_out(validation, device)
        if self.library:
            return LibraryEpisodes(train, self.k_shot, self.n_way * self.n_query, self.seed, self.rotate), held_out
        # Each kind has seeds of its own, so that no two draw the same episodes.
        samplers = [self._sampler(kind, train, self.seed + 100 * i, device) for i, kind in enumerate(self.kinds)]
        return (MixedEpisodes(samplers) if self.more else samplers[0]), held_out

    def _held_out(self, validation: FewShotDataset, device: torch.device | str) -> Dataset[Episode]:
        if self.held_out is None and self.more:  # what is to be good at all kinds is chosen by all kinds
            samplers = []
            for seed, kind in enumerate(self.kinds, self.seed + 1):
                sizes = (kind.n_way, kind.k_shot, kind.n_query, seed)
                samplers.append(EpisodeSampler(validation, *sizes, n_absent=kind.n_absent, device=device))
            return MixedEpisodes(samplers)
        ways, shots, queries = self.held_out or (min(20, validation.num_classes), self.k_shot, 2)
        return EpisodeSampler(validation, ways, shots, queries, seed=self.seed + 1, device=device)

    def _sampler(
        self, kind: Kind, train: FewShotDataset, seed: int, device: torch.device | str
    ) -> EpisodeSampler | WarpedEpisodes:
        resize: Any = None
        if kind.warp and self.data in PROTOCOLS:  # warped as drawn, made small then
            train, resize = PROTOCOLS[self.data].datasets(self.data_root, full=True)[0], self.resize
        elif kind.warp and self.data == "omniglot":
            train, resize = self._background(None)[0], self.resize
        sizes, turned = (kind.n_way, kind.k_shot, kind.n_query, seed), {"rotate": self.rotate, "flip": self.flip}
        plain = EpisodeSampler(train, *sizes, **turned, n_absent=kind.n_absent, device=device)
        return WarpedEpisodes(plain, resize=resize, seed=seed) if kind.warp else plain

    @property
    def resize(self) -> Any:
        """How Omniglot's drawings become small images; see :func:`pyro_vmem.data.omniglot`."""
        name = protocol_of(self.pretrained) if self.pretrained is not None else self.data
        return PROTOCOLS[name].resize if name in PROTOCOLS else "index28"

    def _background(self, resize: Any) -> tuple[FewShotDataset, FewShotDataset]:
        background = data.omniglot(self.data_root, subset="background", resize=resize)
        return background.split(by="alphabet", test=0.15, seed=self.seed)


def _some(dataset: FewShotDataset, chosen: torch.Tensor) -> FewShotDataset:
    return FewShotDataset(dataset.images[chosen], dataset.classes[chosen], dataset.class_names)
