"""A whole experiment in a folder: data, model, training, evaluation, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import ELBO

from pyro_vmem import data
from pyro_vmem._utils.extras import require
from pyro_vmem._utils.files import write_atomically, write_json
from pyro_vmem._utils.precision import autocast
from pyro_vmem._utils.version import __version__
from pyro_vmem.app.report import Report, write_report
from pyro_vmem.app.report_content import check, gather
from pyro_vmem.app.report_text import problems, verdict
from pyro_vmem.config import build, from_pretrained, load
from pyro_vmem.config.pretrained import protocol_of, unpack
from pyro_vmem.config.words import quoted
from pyro_vmem.data import EpisodeSampler, FewShotDataset, LibraryEpisodes
from pyro_vmem.diagnostics import Contribution, FewShotEvaluation, evaluate
from pyro_vmem.infer import ParticleELBO
from pyro_vmem.infer.by_name import Objective, named_objective
from pyro_vmem.model import VMA, index_memory
from pyro_vmem.plots import lookups
from pyro_vmem.train import RefreshKeys, fit, read_result
from pyro_vmem.train.distributed import Processes, own_device
from pyro_vmem.train.folder import described
from pyro_vmem.train.history import FitResult

__all__ = ["Evaluation", "Experiment", "read_result"]

# A part as plain data: the name of its class, or that with arguments.
PartSpec = dict[str, Any] | str | None
Source = EpisodeSampler | LibraryEpisodes
PARTS = (
    *("address_prior", "latent_prior", "likelihood", "address_guide", "latent_guide"),
    *("template_encoder", "x_encoder", "templates"),
)


@dataclass(frozen=True)
class Evaluation:
    """How a trained model is evaluated, on classes that it was not trained on.

    Attributes:
        ways: Classes in memory.
        shots: Slots a class.
        queries: Targets a class.
        episodes: Episodes, each with a memory of its own.
        samples: Samples of z a slot, from which the evidence is estimated; addresses are summed exactly.
        eval_seed: Seeds the episodes and the samples.
    """

    ways: int = 20
    shots: int = 1
    queries: int = 2
    episodes: int = 10
    samples: int = 10
    eval_seed: int = 1


@dataclass(frozen=True)
class Experiment:
    """What is trained, on what, and how: everything that a run can be repeated from.

    Attributes:
        data: The images: `"glyphs"` (letters of the fonts that matplotlib ships, always at hand), `"omniglot"`,
            `"folder"` (folders of images, one a class) or `"npz"`.
        data_root: Where they are; see the functions of the same names in :mod:`pyro_vmem.data`.
        n_way: Classes in memory while training.
        k_shot: Slots a class.
        n_query: Targets a class.
        rotate: Whether whole classes turned by 90, 180 and 270 degrees are further classes.
        library: Whether one memory of `k_shot` drawings of every class serves all of training, with as many targets a
            step as otherwise; see :class:`pyro_vmem.data.LibraryEpisodes`. An `IndexedGuide` looks in its index.
        refresh_slots: How many keys of that index are computed anew after each step; see
            :class:`pyro_vmem.train.RefreshKeys`.
        latent_dim: The length of z.
        width: The channels of the convolutions at half resolution.
        decoder: `"warp"` or `"conv"`; see :class:`pyro_vmem.VMA`.
        pixels: `"independent"` or `"causal"`; likewise.
        pretrained: A model of the package to start from, in place of a new one; see `VMA.from_pretrained`.
        objective: The name of an objective; see :func:`pyro_vmem.fit`.
        num_particles: Particles of the objective.
        backward: Of how many of them the model's gradient is taken; by default of all. See :func:`pyro_vmem.fit`.
        steps: Training steps.
        minutes: A time budget for training, in place of `steps`.
        lr: The highest learning rate.
        seed: Seeds splits, episodes, weights and samples.
        address_prior: p(a | M), in place of the default: the name of a class, or `{"class_path": ..., "init_args":
            {...}}`; arguments that are not given are such that it fits, see `like` of :func:`pyro_vmem.build`.
        latent_prior: p(z | m_a), likewise.
        likelihood: p(x | z, m_a), likewise.
        address_guide: q(a | M, x), likewise.
        latent_guide: q(z | x, m_a), likewise.
        template_encoder: What makes features of templates, likewise.
        x_encoder: What makes features of targets, likewise; by default, the same as of templates.
        templates: Slots that are learned, likewise; by default, none.

    Example:
        >>> Experiment(seed=3).title
        'glyphs, vimco, seed 3'
    """

    data: Literal["glyphs", "omniglot", "folder", "npz"] = "glyphs"
    data_root: str | None = None
    n_way: int = 16
    k_shot: int = 4
    n_query: int = 4
    rotate: bool = True
    library: bool = False
    refresh_slots: int = 256
    latent_dim: int = 32
    width: int = 32
    decoder: Literal["warp", "conv"] = "warp"
    pixels: Literal["independent", "causal"] = "independent"
    pretrained: str | None = None
    objective: Objective = "vimco"
    num_particles: int = 4
    backward: int | None = None
    steps: int = 20_000
    minutes: float | None = None
    lr: float = 3e-3
    seed: int = 0
    address_prior: PartSpec = None
    latent_prior: PartSpec = None
    likelihood: PartSpec = None
    address_guide: PartSpec = None
    latent_guide: PartSpec = None
    template_encoder: PartSpec = None
    x_encoder: PartSpec = None
    templates: PartSpec = None

    def __post_init__(self) -> None:
        # Checked before a folder is made: a run that cannot begin leaves nothing behind.
        for name in ("latent_dim", "width", "steps", "minutes", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}.")

    @property
    def title(self) -> str:
        """What tells this experiment from others, in one line."""
        return f"{self.data}, {self.objective}, seed {self.seed}"

    def datasets(self) -> tuple[FewShotDataset, FewShotDataset, FewShotDataset]:
        """Classes to train on, to validate on and to test on, whole alphabets apart where there are alphabets.

        Raises:
            ValueError: If the place of the images is needed and not given.
        """
        resize: Any = "index28" if self.pretrained is None else data.protocol(protocol_of(self.pretrained)).resize
        if self.data == "omniglot":
            background = data.omniglot(self.data_root, subset="background", resize=resize)
            train, validation = background.split(by="alphabet", test=0.15, seed=self.seed)
            return train, validation, data.omniglot(self.data_root, subset="evaluation", resize=resize)
        if self.data == "glyphs":
            whole = data.glyphs(int(resize[-2:]), seed=self.seed)
        elif self.data_root is None:
            raise ValueError(f"data_root: data={self.data!r} needs the place of the images, got None.")
        else:
            whole = data.from_folder(self.data_root) if self.data == "folder" else data.from_npz(self.data_root)
        by: Literal["alphabet", "class"] = "alphabet" if len(whole.alphabet_names) > 2 else "class"
        rest, test = whole.split(by=by, test=0.2, seed=self.seed)
        train, validation = rest.split(by=by, test=0.15, seed=self.seed)
        return train, validation, test

    def begin(self, device: torch.device | str = "cpu") -> tuple[VMA, Source, EpisodeSampler]:
        """A new model, on the CPU, and the episodes that it is trained and validated on, made on a device."""
        train, validation, _ = self.datasets()
        sizes, ways = (self.n_way, self.k_shot, self.n_query), min(20, validation.num_classes)
        if self.library:
            episodes: Source = LibraryEpisodes(train, self.k_shot, self.n_way * self.n_query, self.seed, self.rotate)
        else:
            episodes = EpisodeSampler(train, *sizes, seed=self.seed, rotate=self.rotate, device=device)
        held_out = EpisodeSampler(validation, ways, self.k_shot, n_query=2, seed=self.seed + 1, device=device)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            ink = float(episodes[0].x.mean())
            network = {"width": self.width, "decoder": self.decoder, "pixels": self.pixels}
            vma = VMA.for_images(train.image_shape, self.latent_dim, **network, ink=ink)  # type: ignore[arg-type]
            vma = vma if self.pretrained is None else from_pretrained(self.pretrained)
            vma = build({name: spec for name in PARTS if (spec := getattr(self, name)) is not None}, like=vma)
        if isinstance(episodes, LibraryEpisodes):
            index_memory(vma, episodes.memory)
        return vma, episodes, held_out

    def train(
        self,
        out: str | Path,
        resume: bool = False,
        progress: bool = True,
        device: str = "auto",
        workers: int = 0,
    ) -> FitResult:
        """Trains a new model into a folder, or goes on with the one that is there.

        Arguments:
            out: The folder; it will hold `experiment.json`, the checkpoints and `history.csv`.
            resume: Whether to go on with a run that `out` holds.
            progress: Whether to show progress bars.
            device: Where to train; `"auto"` takes a GPU if there is one.
            workers: Processes that load episodes; see :func:`pyro_vmem.fit`.

        Raises:
            ValueError: If `out` holds a run and `resume` is false, or a setting is out of range.
        """
        folder, where = Path(out), own_device(device)
        vma, episodes, held_out = self.begin("cpu" if workers else where)
        described_as = partial(write_json, values=asdict(self) | {"pyro_vmem": __version__})
        is_first = Processes.join(where).index == 0
        with described(folder / "experiment.json", described_as) if is_first else contextlib.nullcontext():
            return fit(
                vma,
                episodes,
                self._objective(),
                steps=self.steps,
                minutes=self.minutes,
                lr=self.lr,
                callbacks=[RefreshKeys(self.refresh_slots)],
                validation=held_out,
                out=folder,
                resume=resume,
                seed=self.seed,
                device=where,
                workers=workers,
                progress=progress,
            )

    def _objective(self) -> Objective | ELBO:
        """The objective, with the numbers of particles that are asked for."""
        if self.objective == "auto":
            return self.objective
        elbo = named_objective(self.objective, self.num_particles)
        if self.backward is not None:
            if not isinstance(elbo, ParticleELBO):
                raise ValueError(f"backward: {self.objective!r} sums over addresses. Use 'vimco', 'iwae' or 'rws'.")
            elbo._check_backward(self.backward, self.num_particles, True)
            elbo.backward = self.backward
        return elbo

    def adopt(self, out: str | Path) -> FitResult:
        """Puts the pretrained model into a folder as it is, to be evaluated, reported and sampled from there.

        Arguments:
            out: A new folder.

        Raises:
            ValueError: If `out` holds a run, or there is no model of that name.
        """
        unpack(self.pretrained or "", out)
        write_json(Path(out) / "experiment.json", asdict(self) | {"pyro_vmem": __version__})
        return FitResult()

    @classmethod
    def read(cls, folder: str | Path) -> Experiment:
        """The experiment of a run's folder.

        Raises:
            FileNotFoundError: If the folder holds no run; a `ValueError`, if it is not one that can be read.
        """
        path = Path(folder) / "experiment.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"run: there is no run in {str(folder)!r} ({path.name} is missing). Train one first."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"run: {str(path)!r} does not hold the settings of a run ({error}). Correct it, or train again."
            ) from error

    def test_episodes(self, how: Evaluation, device: torch.device | str = "cpu") -> EpisodeSampler:
        """Episodes of classes that were neither trained nor validated on, made on a device."""
        return EpisodeSampler(self.datasets()[2], how.ways, how.shots, how.queries, how.eval_seed, device=device)

    def evaluate(
        self, folder: str | Path, how: Evaluation, progress: bool = True, device: str = "auto"
    ) -> dict[str, Any]:
        """Evaluates a run's model on a device; returns the metrics by name.

        Most are numbers; `contribution` holds what the memory contributes to the first episode, `calibration` what
        simulation says of the guide there, `reliability` the bins of its class probabilities, `verdict` the words.
        """
        where = own_device(device)
        return self._evaluate(load(folder).to(where), self.test_episodes(how, where), how, progress)[2]

    def report(
        self,
        folder: str | Path,
        how: Evaluation,
        result: FitResult | None = None,
        seconds: Callable[[], float] | None = None,
        progress: bool = True,
        device: str = "auto",
    ) -> dict[str, Any]:
        """Evaluates a run's model, writes `metrics.json`, `report.html` and `lookup.png`; returns the metrics.

        Arguments:
            folder: The run.
            how: How to evaluate.
            result: What training left; by default, what `history.csv` tells of it.
            seconds: Tells the time since the experiment began, for the metrics; by default that of this call.
            progress: Whether to show progress bars.
            device: Where to evaluate; `"auto"` takes a GPU if there is one.
        """
        start, where, folder = time.perf_counter(), own_device(device), Path(folder)
        vma, episodes = load(folder).to(where), self.test_episodes(how, where)
        result = result or read_result(folder)
        evaluation, found, metrics = self._evaluate(vma, episodes, how, progress)
        metrics |= {"steps": result.steps, "training_seconds": round(result.seconds, 1)}
        with autocast(next(vma.parameters()).device, "auto"):
            fields = gather(vma, episodes, evaluation, found, seed=self.seed)
        report = Report(
            title=f"Variational memory addressing on {self.data}",
            facts=self._facts(vma, episodes, metrics, result),
            metrics={name: value for name, value in metrics.items() if isinstance(value, int | float)},
            history=result.history,
            command=self._command(result.steps, folder, how),
            **fields,
        )
        write_report(folder / "report.html", report)
        figure = require("matplotlib.figure", "plots").Figure(figsize=(8, 5))
        lookups(figure, **{name: values for name, values in report.lookup.items() if name != "exact"})
        with write_atomically(folder / "lookup.png") as aside:
            figure.savefig(aside, format="png", dpi=160, bbox_inches="tight")
        metrics["seconds"] = round(seconds() if seconds is not None else time.perf_counter() - start, 1)
        write_json(folder / "metrics.json", metrics)
        return metrics

    def _evaluate(
        self, vma: VMA, episodes: EpisodeSampler, how: Evaluation, progress: bool
    ) -> tuple[FewShotEvaluation, Contribution, dict[str, Any]]:
        start = time.perf_counter()
        with autocast(next(vma.parameters()).device, "auto"):
            evaluation = evaluate(vma, episodes, how.episodes, how.samples, seed=how.eval_seed, progress=progress)
            found, calibration = check(vma, episodes, how.samples, seed=how.eval_seed)
        metrics: dict[str, Any] = {**evaluation.summary(), "data": self.data, "seed": self.seed}
        curve = evaluation.reliability
        metrics |= {
            "contribution": found.summary(),
            "calibration": calibration.summary(),
            "reliability": {name: getattr(curve, name).tolist() for name in ("confidence", "accuracy", "count")},
            "problems": problems(metrics),
            "verdict": verdict(metrics),
            "seconds": round(time.perf_counter() - start, 1),
        }
        return evaluation, found, metrics

    def _facts(self, vma: VMA, episodes: EpisodeSampler, metrics: dict[str, Any], result: FitResult) -> dict[str, str]:
        """The settings by name."""
        slots = episodes.n_way * episodes.k_shot
        return {
            "Images": f"{self.data}, {' x '.join(map(str, vma.event_shape))}, binary",
            "Tested on": f"{episodes.dataset.num_classes} classes of {len(episodes.dataset.alphabet_names)} alphabets, "
            "none of them trained on",
            "Memory": f"{slots} slots, {episodes.n_way} classes; targets are other drawings of these",
            "Episodes": f"{metrics['num_episodes']} episodes, {metrics['num_targets']} targets, seed {episodes.seed}",
            "NLL": f"addresses summed exactly, {metrics['num_samples']} samples of z per slot; an upper bound",
            "Guide": "on data simulated from the model, "
            + ", ".join(f"q({site}) is {row['verdict']}" for site, row in metrics["calibration"].items()),
            "Precision": "networks in bfloat16 where the processor has it, densities in float32",
            "Trained": f"not here, see pyro_vmem.config.model_card({self.pretrained!r})"
            if result.steps == 0
            else f"{result.steps:,} steps of {self.n_way * self.n_query} targets in {result.seconds:.0f} s, "
            f"objective {self.objective}, K = {self.num_particles}, seed {self.seed}",
            "Model": f"{sum(p.numel() for p in vma.parameters()):,} parameters, z of length {vma.latent_dim}",
            "Software": f"pyro_vmem {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        }

    def _command(self, steps: int, folder: Path, how: Evaluation) -> str:
        """The commands that give the same numbers again: the demo where it has all options, else two."""
        wanted = asdict(self) | {"steps": steps, "minutes": None}
        changed = {name: value for name, value in wanted.items() if value != getattr(Experiment, name)}
        made: dict[str, Any] = {"steps": steps} if steps else {"pretrained": self.pretrained}
        always = {"data": self.data, "data_root": self.data_root, **made, "seed": self.seed}
        evaluation = {name: value for name, value in asdict(how).items() if value != getattr(Evaluation, name)}
        if changed.keys() <= {"steps", *always} and self.data in ("glyphs", "omniglot"):
            return f"pyro-vmem demo{quoted(always | evaluation)}"
        train = f"pyro-vmem train --out {shlex.quote(str(folder))}{quoted(always | changed)}"
        return f"{train}\npyro-vmem report {shlex.quote(str(folder))}{quoted(evaluation)}"
