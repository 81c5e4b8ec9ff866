"""Images and episodes of an experiment: what its model is trained, validated and tested on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from pyro_vmem import data
from pyro_vmem.config.pretrained import protocol_of
from pyro_vmem.config.spec import checked
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

Images = Literal[
    "glyphs", "omniglot", "folder", "npz", "mnist", "gmn", "gmn-distinct", "whole-memory", "zholus", "vma-45-5"
]


@dataclass(frozen=True)
class Kind:
    """A kind of training episodes, as :class:`pyro_vmem.data.EpisodeSampler` has them; `warp` as of `Sources`.

    Example:
        >>> Kind(n_absent=2).n_absent
        2
    """

    n_way: int = 16
    k_shot: int = 4
    n_query: int = 4
    n_absent: int = 0
    warp: bool = False


@dataclass(frozen=True)
class Sources:
    """Which images there are, and which episodes are made of them.

    Attributes:
        data: The images: `"glyphs"` (letters of the fonts that matplotlib ships, always at hand), `"omniglot"`,
            `"folder"` (folders of images, one per class), `"npz"`, `"mnist"`, or Omniglot as a protocol for comparing
            likelihoods has it: `"gmn"`, `"gmn-distinct"`, `"whole-memory"`, `"zholus"` or `"vma-45-5"`.
        data_root: Where they are; see the functions of the same names in :mod:`pyro_vmem.data`.
        n_way: Classes in memory while training.
        k_shot: Slots per class.
        n_query: Targets per class.
        n_absent: Further classes that have targets and no slots.
        rotate: Whether whole classes turned by 90, 180 and 270 degrees are further classes.
        flip: Whether mirrored classes are further classes.
        warp: Whether classes and images are under random affine maps; see :class:`pyro_vmem.data.WarpedEpisodes`.
        more: Further kinds of episodes, taken in turn with these, such as `[{"n_way": 4, "n_query": 16}]`: each has its
            own `n_way`, `k_shot`, `n_query`, `n_absent` and `warp`.
        held_out: Ways, shots and queries of the validation episodes. By default 20 ways (or all that there are),
            `k_shot` and 2; with `more`, they are of the kinds that are trained on.
        library: Whether one memory of `k_shot` drawings of every class serves all of training, with as many targets per
            step as otherwise; see :class:`pyro_vmem.data.LibraryEpisodes`. An `IndexedGuide` looks in its index.
        recall: Whether targets are copies of what is in a memory of any `n_way * k_shot` images, `n_query` in all; see
            :class:`pyro_vmem.data.RecallSampler`.
        pretrained: A model of the package to start from, in place of a new one; see `VMA.from_pretrained`. Images are
            then of its size.
        seed: Seeds splits, episodes, weights and samples.
    """

    data: Images = "glyphs"
    data_root: str | None = None
    n_way: int = 16
    k_shot: int = 4
    n_query: int = 4
    n_absent: int = 0
    rotate: bool = True
    flip: bool = False
    warp: bool = False
    more: list[dict] = field(default_factory=list)  # type: ignore[type-arg]
    held_out: tuple[int, int, int] | None = None
    library: bool = False
    recall: bool = False
    pretrained: str | None = None
    seed: int = 0

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
            train, validation = self._background(self._resize)
            return train, validation, data.omniglot(self.data_root, subset="evaluation", resize=self._resize)
        if self.data == "glyphs":
            whole = data.glyphs(int(self._resize[-2:]), seed=self.seed)
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
            samplers = [
                EpisodeSampler(validation, *sizes, seed=self.seed + 1 + number, n_absent=kind.n_absent, device=device)
                for number, kind in enumerate(self.kinds)
                for sizes in [(kind.n_way, kind.k_shot, kind.n_query)]
            ]
            return MixedEpisodes(samplers)
        ways, shots, queries = self.held_out or (min(20, validation.num_classes), self.k_shot, 2)
        return EpisodeSampler(validation, ways, shots, queries, seed=self.seed + 1, device=device)

    def _sampler(
        self, kind: Kind, train: FewShotDataset, seed: int, device: torch.device | str
    ) -> EpisodeSampler | WarpedEpisodes:
        resize: Any = None
        if kind.warp and self.data in PROTOCOLS:  # warped as drawn, made small then
            train, resize = PROTOCOLS[self.data].datasets(self.data_root, full=True)[0], PROTOCOLS[self.data].resize
        elif kind.warp and self.data == "omniglot":
            train, resize = self._background(None)[0], self._resize
        sizes, turned = (kind.n_way, kind.k_shot, kind.n_query, seed), {"rotate": self.rotate, "flip": self.flip}
        plain = EpisodeSampler(train, *sizes, **turned, n_absent=kind.n_absent, device=device)
        return WarpedEpisodes(plain, resize=resize, seed=seed) if kind.warp else plain

    @property
    def _resize(self) -> Any:
        return "index28" if self.pretrained is None else PROTOCOLS[protocol_of(self.pretrained)].resize

    def _background(self, resize: Any) -> tuple[FewShotDataset, FewShotDataset]:
        background = data.omniglot(self.data_root, subset="background", resize=resize)
        return background.split(by="alphabet", test=0.15, seed=self.seed)


def _some(dataset: FewShotDataset, chosen: torch.Tensor) -> FewShotDataset:
    return FewShotDataset(dataset.images[chosen], dataset.classes[chosen], dataset.class_names)
