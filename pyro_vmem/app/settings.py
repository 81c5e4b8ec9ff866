"""The options of experiments and evaluations, with their defaults.

Nothing heavy is imported here, so that the command line can print its help and refuse a misspelt option at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Evaluation", "Settings"]

PARTS = (
    *("address_prior", "latent_prior", "likelihood", "address_guide", "latent_guide"),
    *("template_encoder", "x_encoder", "templates"),
)
SPECS = (*PARTS, "objective", "optimizer", "schedule", "kl_schedule")

DEMO_VALIDATES_EVERY = 10  # steps: at least thirty points of a learning curve in three minutes on a busy core

# What the demo trains by, beside the defaults of `pyro-vmem train`. Many classes of one drawing each teach the guide
# most, KL(z) at full weight from the start makes the memory matter at once, and one particle of four goes backward.
DEMO: dict[str, Any] = {
    "n_way": 32,
    "k_shot": 1,
    "n_query": 2,
    "objective": {"class_path": "VIMCO_ELBO", "init_args": {"num_particles": 4, "backward": 1}},
    "kl_schedule": "Constant",
    "validate_every": DEMO_VALIDATES_EVERY,
}

# A spec as an option holds it. A bare `dict`: in one of `Any`, jsonargparse would import what a class path names.
Spec = dict | str | None  # type: ignore[type-arg]
Images = Literal[
    "glyphs", "omniglot", "folder", "npz", "mnist", "gmn", "gmn-distinct", "whole-memory", "zholus", "vma-45-5"
]
ModelName = Literal["vma", "soft-attention", "set-statistics", "no-memory"]


@dataclass(frozen=True)
class Evaluation:
    """How a trained model is evaluated, on held-out classes.

    Attributes:
        ways: Classes in memory.
        shots: Slots per class.
        queries: Targets per class.
        episodes: The number of episodes, each with its own memory.
        samples: Samples of z per slot for the evidence; addresses are summed exactly.
        eval_seed: Seeds the episodes and the samples.
    """

    ways: int = 20
    shots: int = 1
    queries: int = 2
    episodes: int = 10
    samples: int = 10
    eval_seed: int = 1


@dataclass(frozen=True)
class Settings:
    """All settings that repeat a run: data, model and training.

    A spec is the name of a class, or `{"class_path": ..., "init_args": {...}}`. Arguments of a part that you leave out
    get compatible values; see `like` of :func:`pyro_vmem.build`.

    Attributes:
        data: The images: `"glyphs"` (letters of the fonts of matplotlib, without a download), `"omniglot"`, `"folder"`
            (folders of images, one per class), `"npz"`, `"mnist"`, or a protocol on Omniglot: `"gmn"`,
            `"gmn-distinct"`, `"whole-memory"`, `"zholus"` or `"vma-45-5"`.
        data_root: The folder of the images; see the functions of the same names in :mod:`pyro_vmem.data`.
        n_way: Classes in memory during training.
        k_shot: Slots per class.
        n_query: Targets per class.
        n_absent: Further classes with targets and without slots.
        rotate: Whether to add whole classes rotated by 90, 180 and 270 degrees.
        flip: Whether to add mirrored classes.
        warp: Whether to apply random affine maps to classes and images; see :class:`pyro_vmem.data.WarpedEpisodes`.
        more: Further kinds of episodes, in turn with these, such as `[{"n_way": 4, "n_query": 16}]`. Each has its own
            `n_way`, `k_shot`, `n_query`, `n_absent` and `warp`.
        held_out: Ways, shots and queries of the validation episodes. Default: 20 ways (or all classes), `k_shot` and 2;
            with `more`, the kinds of the training episodes.
        library: Whether all episodes share one memory with `k_shot` drawings of every class; see
            :class:`pyro_vmem.data.LibraryEpisodes`. An `IndexedGuide` searches its index.
        recall: Whether targets are copies of `n_query` of `n_way * k_shot` images in memory; see
            :class:`pyro_vmem.data.RecallSampler`.
        pretrained: A packaged model to start from; see `VMA.from_pretrained`. Images then have its size.
        seed: Seeds splits, episodes, weights and samples.
        latent_dim: The length of z.
        num_features: The length of the features of templates and targets.
        width: The channels of the convolutions at half resolution.
        decoder: `"warp"` or `"conv"`; see :class:`pyro_vmem.VMA`.
        pixels: `"independent"` or `"causal"`; see :class:`pyro_vmem.VMA`.
        address_prior: p(a | M), a spec. This and the next six replace the default part.
        latent_prior: p(z | m_a), a spec.
        likelihood: p(x | z, m_a), a spec.
        address_guide: q(a | M, x), a spec.
        latent_guide: q(z | x, m_a), a spec.
        template_encoder: The encoder of templates, a spec.
        x_encoder: The encoder of targets, a spec. Default: that of templates.
        templates: Learned slots, a spec. Default: none. Learned slots that replace the given ones start as training
            images; learned slots beside them start grey.
        model: The VMA, or a baseline with the same networks; see :mod:`pyro_vmem.model`.
        start: The folder or checkpoint of a run with initial weights, as far as they fit.
        only: The only part to train, with all others frozen. Default: all are trained.
        objective: The name of an objective, see :func:`pyro_vmem.fit`, or the spec of one.
        steps: Training steps.
        minutes: A time budget for training, instead of `steps`.
        lr: The learning rate, which `schedule` scales.
        optimizer: The spec of an optimizer of torch; its learning rate is `lr`.
        schedule: The factor of the learning rate: the spec of a schedule, or of a scheduler of torch.
        kl_schedule: The weight of KL(z): the spec of a schedule.
        clip_norm: The largest norm of the gradient of the loss per datapoint.
        precision: The precision of the networks; see :class:`pyro_vmem.TrainingConfig`.
        validate_every: Steps between validations. Default: a fortieth of `steps`, at least 25 and at most 500; with
            `minutes`, seven times their number, at least 10 and at most 500.
        patience: Early stopping: end after this many validations in a row without a better bound. Default: never.
        select: Which weights are kept, those of the best validation or the last.
        refresh_slots: How many keys of the index to recompute after each step; see
            :class:`pyro_vmem.train.RefreshKeys`.
        notes: Anything else to keep with the run. It has no effect.
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
    more: list[dict] = dataclasses.field(default_factory=list)  # type: ignore[type-arg]
    held_out: tuple[int, int, int] | None = None
    library: bool = False
    recall: bool = False
    pretrained: str | None = None
    seed: int = 0
    latent_dim: int = 32
    num_features: int = 128
    width: int = 32
    decoder: Literal["warp", "conv"] = "warp"
    pixels: Literal["independent", "causal"] = "independent"
    address_prior: Spec = None
    latent_prior: Spec = None
    likelihood: Spec = None
    address_guide: Spec = None
    latent_guide: Spec = None
    template_encoder: Spec = None
    x_encoder: Spec = None
    templates: Spec = None
    model: ModelName = "vma"
    start: str | None = None
    only: str | None = None
    objective: Spec = "vimco"
    steps: int = 20_000
    minutes: float | None = None
    lr: float = 3e-3
    optimizer: Spec = "Adam"
    schedule: Spec = "WarmupCosine"
    kl_schedule: Spec = "LinearRise"
    clip_norm: float = 10.0
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    validate_every: int | None = None
    patience: int | None = None
    select: Literal["best", "last"] = "best"
    refresh_slots: int = 256
    notes: dict = dataclasses.field(default_factory=dict)  # type: ignore[type-arg]
