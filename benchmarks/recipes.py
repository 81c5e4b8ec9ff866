"""Recipes of reproductions: what is trained on, how, and which cells of a table are evaluated."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
from torch.utils.data import Dataset

import pyro_vmem as pv
from pyro_vmem import data
from pyro_vmem.data import Episode, FewShotDataset
from pyro_vmem.model import NoMemoryVAE, SetStatisticsVAE, SoftAttentionVAE
from pyro_vmem.parts import MLPDecoder, MLPEncoder

__all__ = ["MODELS", "Evaluation", "Kind", "Networks", "Recipe", "Training", "model_name", "read", "tables"]

CONFIGS = Path(__file__).parent / "configs"
MODELS: dict[str, type[pv.VMA]] = {
    "vma": pv.VMA,
    "soft-attention": SoftAttentionVAE,
    "set-statistics": SetStatisticsVAE,
    "no-memory": NoMemoryVAE,
}
ModelName = Literal["vma", "soft-attention", "set-statistics", "no-memory"]
Datasets = tuple[FewShotDataset, FewShotDataset, FewShotDataset]


@dataclass(frozen=True)
class Networks:
    """Sizes of the networks; the baselines have the same.

    Attributes:
        kind: "conv", or "mlp" for the paper's model of MNIST.
        latent_dim: The length of z.
        num_features: The length of a feature vector.
        width: Channels at half resolution, of "conv".
        truncate: Slots that the address guide keeps while training; None for all.
        pixels: See `pyro_vmem.VMA.for_images`.
        own_features: Whether the address guide has an encoder of its own.
        views: In how many ways it looks at images once it is trained; see `pyro_vmem.EncoderGuide`.
        extra_slots: Learned slots beside those of the memory, for targets of no class in it.
        learned_slots: Slots of a memory that is learned in place of the given one; 0 for the given one.
    """

    kind: Literal["conv", "mlp"] = "conv"
    latent_dim: int = 48
    num_features: int = 128
    width: int = 32
    truncate: int | None = 4
    pixels: Literal["independent", "causal"] = "independent"
    own_features: bool = False
    views: int = 1
    extra_slots: int = 0
    learned_slots: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of training episodes: see `pyro_vmem.data.EpisodeSampler`; `warp` as of `Training`."""

    n_way: int = 16
    k_shot: int = 4
    n_query: int = 4
    n_absent: int = 0
    warp: bool = False


@dataclass(frozen=True)
class Training:
    """How it is trained; what is not named here is as in `pyro_vmem.fit`.

    Attributes:
        n_way: Classes in memory; of "recall", all slots.
        k_shot: Slots a class.
        n_query: Targets a class; of "recall", all targets.
        more: Further kinds of episodes, taken in turn with these.
        rotate: Whether classes turned by 90, 180 and 270 degrees are further classes.
        flip: Whether mirrored classes are.
        warp: Whether training images are under random affine maps, of classes and of images; those of `more`, where
            they say so.
        objective: See `pyro_vmem.fit`; "wake" trains the address guide by the wake phase of `RWS_ELBO`, half of the
            particles drawn from its eight most probable slots.
        only: The part that is trained, all others frozen; all parts by default.
        num_particles: Particles of the objective.
        backward: Of how many of them the model's gradient is taken; None for all.
        lr: The highest learning rate.
        kl_start: The weight of KL(z) to start from.
        kl_warmup: The part of the run over which it rises to one.
        steps: Steps in all; the schedules go by them, so that pieces of any length add up to the same run.
        validate_every: Steps between validations.
        held_out: Ways, shots and queries of the validation episodes; those of several kinds are of the same kinds.
        select: Which weights are evaluated: see `pyro_vmem.fit`.
        seed: Seeds weights, episodes and samples; validation episodes have the next seed.
    """

    n_way: int = 16
    k_shot: int = 4
    n_query: int = 4
    more: list[Kind] = field(default_factory=list)
    rotate: bool = True
    flip: bool = True
    warp: bool = False
    objective: str = "vimco"
    only: str | None = None
    num_particles: int = 4
    backward: int | None = None
    lr: float = 2e-3
    kl_start: float = 0.1
    kl_warmup: float = 0.5
    steps: int = 40_000
    validate_every: int = 500
    held_out: tuple[int, int, int] = (20, 1, 2)
    select: Literal["best", "last"] = "best"
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Which cells are evaluated, and how closely.

    Attributes:
        n_classes: Classes in memory; of "recall", slots.
        shots: Items in memory.
        per_class: Whether `shots` counts the items of one class, instead of all.
        methods: See `pyro_vmem.diagnostics.estimate_evidence`; sums over more slots than samples are left out.
        num_samples: Decodes a target.
        num_targets: Targets a cell.
        seed: Seeds episodes and samples.
    """

    n_classes: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    shots: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 10, 19])
    per_class: bool = False
    methods: list[str] = field(default_factory=lambda: ["sampled", "exact-address"])
    num_samples: int = 1000
    num_targets: int = 1000
    seed: int = 0

    def cells(self) -> list[tuple[int, int, str]]:
        """Classes, items in memory and method of each cell."""
        pairs = [(c, t * c if self.per_class else t) for t in self.shots for c in self.n_classes]
        return [
            (c, t, method)
            for method in self.methods
            for c, t in pairs
            if method != "exact-address" or t <= self.num_samples
        ]


@dataclass(frozen=True)
class Recipe:
    """A table: what is trained and evaluated for it.

    Attributes:
        title: What the table shows.
        protocol: A protocol of `pyro_vmem.data`, or "recall".
        images: "protocol" for the protocol's own, "mnist", or "synthetic" for patterns that need no files.
        networks: Sizes of the networks.
        training: How it is trained.
        evaluation: Which cells are evaluated.
        models: What is trained and evaluated: keys of `MODELS`.
        run: The table whose trained model is evaluated, if this one trains none of its own.
        start: The table whose trained weights are started from, as far as they fit.
    """

    title: str
    protocol: str
    images: Literal["protocol", "mnist", "synthetic"] = "protocol"
    networks: Networks = field(default_factory=Networks)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    models: list[ModelName] = field(default_factory=lambda: ["vma"])
    run: str | None = None
    start: str | None = None

    def datasets(self) -> Datasets:
        """What is trained on, validated on and tested on."""
        if self.images == "synthetic":
            return _synthetic(24, 0), _synthetic(12, 1), _synthetic(12, 2)
        if self.images == "mnist":
            whole = data.mnist()
            held_out = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)) < 5000
            return _some(whole, ~held_out), _some(whole, held_out), data.mnist(train=False)
        return data.protocol(self.protocol).datasets()

    def training_episodes(
        self, datasets: Datasets, device: torch.device | str | None = None
    ) -> tuple[Dataset[Episode], Dataset[Episode]]:
        """Episodes to train on, made on a device, and to validate on."""
        train, validation, _ = datasets
        t = self.training
        if self.protocol == "recall":
            sizes = (t.n_way * t.k_shot, t.n_query)
            return data.RecallSampler(train, *sizes, seed=t.seed), data.RecallSampler(validation, *sizes, t.seed + 1)
        kinds = [Kind(t.n_way, t.k_shot, t.n_query, warp=t.warp), *t.more]
        full: FewShotDataset = train
        resize: Any = None
        if any(kind.warp for kind in kinds) and self.images == "protocol":  # warped as drawn, made small then
            full, resize = data.protocol(self.protocol).datasets(full=True)[0], data.protocol(self.protocol).resize

        def sampler(kind: Kind, seed: int) -> Dataset[Episode]:
            sizes = (kind.n_way, kind.k_shot, kind.n_query, seed)
            how: dict[str, Any] = {"rotate": t.rotate, "flip": t.flip, "n_absent": kind.n_absent, "device": device}
            plain = data.EpisodeSampler(full if kind.warp else train, *sizes, **how)
            return data.WarpedEpisodes(plain, resize=resize, seed=seed) if kind.warp else plain

        if not t.more:
            return sampler(kinds[0], t.seed), data.EpisodeSampler(validation, *t.held_out, seed=t.seed + 1)
        mixed = [sampler(kind, t.seed + 100 * number) for number, kind in enumerate(kinds)]
        # What is to be good at all kinds is chosen by all kinds.
        held_out_kinds = [
            data.EpisodeSampler(validation, k.n_way, k.k_shot, k.n_query, seed=t.seed + 1 + number, n_absent=k.n_absent)
            for number, k in enumerate(kinds)
        ]
        return data.MixedEpisodes(mixed), data.MixedEpisodes(held_out_kinds)

    def test_episodes(self, test: FewShotDataset, n_classes: int, shots: int, num_targets: int) -> Dataset[Episode]:
        """The evaluation episodes of a cell: as many as it takes for the targets."""
        seed = self.evaluation.seed
        if self.protocol == "recall":
            return _Counted(
                data.RecallSampler(test, shots, min(shots, 64), seed=seed), -(-num_targets // min(shots, 64))
            )
        episodes = data.protocol(self.protocol).episodes(test, n_classes, shots, seed=seed)
        each = len(episodes[0].x)
        count = min(-(-num_targets // each), len(episodes)) if each == 1 else -(-num_targets // each)
        return data.protocol(self.protocol).episodes(test, n_classes, shots, seed=seed, num_episodes=count)

    def model(self, name: str, ink: float, begun: pv.VMA | None = None, images: torch.Tensor | None = None) -> pv.VMA:
        """A new model; its weights are those of the recipe's seed, or those of a model that was trained before.

        Arguments:
            name: A key of `MODELS`.
            ink: The share of ink in the images.
            begun: A model whose weights are taken: all that have the same shape, and the first channels of a layer
                that has more of them now.
            images: What learned slots start from, at least as many as there are; noise by default.
        """
        n = self.networks
        with torch.random.fork_rng():
            torch.manual_seed(self.training.seed)
            if n.kind == "conv":
                side = 28 if self.images == "mnist" else _side(self)
                sizes = ((1, side, side), n.latent_dim, n.num_features, n.width)
                vma = pv.VMA.for_images(*sizes, pixels=n.pixels, ink=ink)
            else:
                vma = _mlp(n, ink)
            if n.own_features:
                guide = pv.EncoderGuide(vma.address_guide, copy.deepcopy(vma.template_encoder))
                vma = vma.replace(address_guide=guide)
            if n.truncate is not None:
                vma = vma.replace(address_guide=pv.TruncatedGuide(vma.address_guide, k=n.truncate))
            if n.extra_slots:
                vma = vma.replace(templates=pv.ExtraTemplates(n.extra_slots, vma.event_shape))
                vma.templates.values.data.fill_(ink)  # type: ignore[union-attr]
            if n.learned_slots:
                vma = vma.replace(templates=pv.LearnedTemplates(n.learned_slots, vma.event_shape))
                if images is not None:
                    vma.templates.values.data.copy_(images[: n.learned_slots])  # type: ignore[union-attr]
            vma = vma if name == "vma" else MODELS[name].like(vma)  # type: ignore[attr-defined]
        if begun is not None:
            _take_weights(vma, begun)
        if self.training.only is not None:
            vma.requires_grad_(False)
            getattr(vma, self.training.only).requires_grad_(True)
        return vma


def tables() -> list[str]:
    """The names of the recipes that there are."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read(name: str) -> Recipe:
    """The recipe of a table.

    Raises:
        ValueError: If there is none of that name.
    """
    path = CONFIGS / f"{name}.yaml"
    if name not in tables():
        raise ValueError(f"table: expected one of {', '.join(tables())}, got {name!r}.")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, "recipe")
    recipe: Recipe = parser.instantiate(parser.parse_object({"recipe": _yaml(path)})).recipe
    return recipe


def model_name(vma: pv.VMA) -> str:
    """The key in `MODELS` of a model."""
    return next(name for name, cls in MODELS.items() if type(vma) is cls)


def _take_weights(vma: pv.VMA, begun: pv.VMA) -> None:
    own, taken_from = vma.state_dict(), begun.state_dict()
    guide, inner = vma.address_guide, begun.address_guide
    if isinstance(guide, pv.EncoderGuide) and not isinstance(
        inner, pv.EncoderGuide
    ):  # it begins with the features there are
        inner = inner.inner if isinstance(inner, pv.TruncatedGuide) else inner
        taken_from |= {f"address_guide.inner.{name}": tensor for name, tensor in inner.state_dict().items()}
        encoder = begun.template_encoder.state_dict()
        taken_from |= {f"address_guide.encoder.{name}": tensor for name, tensor in encoder.items()}
    for name, tensor in taken_from.items():
        if name not in own or own[name].shape[1:] != tensor.shape[1:]:
            continue
        taken = own[name][: len(tensor)] if tensor.dim() else own[name]
        if taken.shape == tensor.shape:
            taken.copy_(tensor)


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def _side(recipe: Recipe) -> int:
    if recipe.images == "synthetic":
        return 8
    return int(data.protocol(recipe.protocol).resize[-2:])


def _mlp(n: Networks, ink: float) -> pv.VMA:
    """The paper's model of MNIST: multilayer perceptrons 784-256-128 and back."""
    shape = (1, 28, 28)
    decoder = MLPDecoder(shape, n.latent_dim, n.num_features, (n.num_features, 2 * n.num_features))
    return pv.VMA(
        address_prior=pv.UniformPrior(),
        latent_prior=pv.TemplatePrior(n.latent_dim, n.num_features),
        likelihood=pv.BernoulliDecoder(decoder, ink),
        address_guide=pv.SimilarityGuide(n.num_features),
        latent_guide=pv.GaussianGuide(n.latent_dim, n.num_features),
        template_encoder=MLPEncoder(shape, n.num_features, (2 * n.num_features,)),
    )


def _some(dataset: FewShotDataset, chosen: torch.Tensor) -> FewShotDataset:
    return FewShotDataset(dataset.images[chosen], dataset.classes[chosen], dataset.class_names)


def _synthetic(classes: int, seed: int, drawings: int = 20) -> FewShotDataset:
    """Each class a random pattern, each drawing the pattern with a few pixels turned over."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(classes, 1, 1, 8, 8, generator=generator) > 0.7
    flips = torch.rand(classes, drawings, 1, 8, 8, generator=generator) > 0.97
    images = (patterns ^ flips).flatten(0, 1).to(torch.uint8) * 255
    return FewShotDataset(images, torch.arange(classes).repeat_interleave(drawings))


class _Counted(Dataset[Episode]):
    """The first episodes of an endless sampler."""

    def __init__(self, episodes: Dataset[Episode], count: int) -> None:
        self.episodes, self.count = episodes, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Episode:
        return self.episodes[index]
