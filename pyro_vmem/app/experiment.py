"""An experiment in a folder: data, model, training, evaluation and report."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pyro.infer import ELBO
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from pyro_vmem import infer
from pyro_vmem._utils.extras import require
from pyro_vmem._utils.files import read_json, write_atomically, write_json
from pyro_vmem._utils.guess import guess
from pyro_vmem._utils.precision import autocast
from pyro_vmem._utils.version import __version__
from pyro_vmem.app.report import Report, write_report
from pyro_vmem.app.report_content import check, report_fields
from pyro_vmem.app.report_text import problems, verdict
from pyro_vmem.app.settings import DEMO, DEMO_VALIDATES_EVERY, PARTS, Evaluation
from pyro_vmem.app.sources import Sources
from pyro_vmem.app.words import quoted
from pyro_vmem.config import build, from_pretrained, load
from pyro_vmem.config.arguments import checked
from pyro_vmem.config.build import take_weights
from pyro_vmem.config.pretrained import unpack
from pyro_vmem.config.spec import from_spec, spec_of
from pyro_vmem.data import Episode, EpisodeSampler, LibraryEpisodes
from pyro_vmem.diagnostics import Contribution, FewShotEvaluation, evaluate
from pyro_vmem.infer.by_name import Objective, named_objective
from pyro_vmem.model import VMA, NoMemoryVAE, SetStatisticsVAE, SoftAttentionVAE, index_memory
from pyro_vmem.parts import LearnedTemplates
from pyro_vmem.plots import lookups
from pyro_vmem.train import Callback, RefreshKeys, TrainingConfig, fit
from pyro_vmem.train.distributed import Processes, own_device
from pyro_vmem.train.folder import described
from pyro_vmem.train.history import FitResult, read_result
from pyro_vmem.train.schedules import Schedule

__all__ = ["Evaluation", "Experiment", "read_result"]

# Options that are specs beside the parts, and what each may be.
TRAINING: dict[str, type | tuple[type, ...]] = {
    "objective": ELBO,
    "optimizer": Optimizer,
    "schedule": (Schedule, LRScheduler),
    "kl_schedule": Schedule,
}
SYMBOLS = {
    **{"p(a | M)": "address_prior", "p(z | m_a)": "latent_prior", "p(x | z, m_a)": "likelihood"},
    **{"q(a | M, x)": "address_guide", "q(z | x, m_a)": "latent_guide"},
}
MODELS: dict[str, Any] = {
    "vma": VMA,
    "soft-attention": SoftAttentionVAE,
    "set-statistics": SetStatisticsVAE,
    "no-memory": NoMemoryVAE,
}


@dataclass(frozen=True)  # of no further fields, so that the check below is called
class Experiment(Sources):
    """Trains, evaluates and reports a model in a folder, by :class:`pyro_vmem.app.Settings`.

    Example:
        >>> Experiment(seed=3, objective="RWS_ELBO").title
        'glyphs, RWS_ELBO, seed 3'
    """

    def __post_init__(self) -> None:
        # Checked before a folder is made: a run that cannot begin leaves nothing behind.
        for name in ("latent_dim", "num_features", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}.")
        if self.only is not None and self.only not in PARTS:
            raise ValueError(f"only: expected one of {', '.join(PARTS)}, got {self.only!r}.{guess(self.only, PARTS)}")
        if self.library and self.recall:
            raise ValueError("library, recall: episodes are of one or the other. Leave one out.")
        self.made_objective()
        self.config()

    @property
    def title(self) -> str:
        """A line that distinguishes this experiment from others."""
        objective = self.objective["class_path"] if isinstance(self.objective, dict) else self.objective
        return f"{self.data}, {objective}, seed {self.seed}"

    def config(self) -> TrainingConfig:
        """The settings of training."""
        names = {field.name for field in dataclasses.fields(TrainingConfig)}
        values = {name: getattr(self, name) for name in names}
        return TrainingConfig(
            **{n: from_spec(v, TRAINING[n], where=n) if n in TRAINING else v for n, v in values.items()}
        )

    def made_objective(self) -> ELBO | Literal["auto"]:
        """Makes the objective from its spec; returns the name `"auto"` unchanged, because the choice needs a model."""
        if self.objective == "auto":
            return "auto"
        elbo: ELBO = from_spec(self._objective_spec(), ELBO, where="objective")
        return elbo

    def _objective_spec(self) -> dict[str, Any]:
        """The spec of the objective, with the class and the arguments of a short name."""
        names = get_args(Objective)
        named = {"class_path": self.objective} if not isinstance(self.objective, dict) else self.objective
        name: Any = named.get("class_path")
        given = named.get("init_args") or {}
        if name in names and isinstance(given, dict):
            if name == "auto":
                raise ValueError("objective: 'auto' takes no arguments. Name the objective that has them.")
            named = spec_of(named_objective(name))
            given = {**named["init_args"], "max_plate_nesting": 1, **given}
        elif isinstance(name, str) and not hasattr(infer, name) and (hint := guess(name, names)):
            raise ValueError(f"objective: expected the name of an objective, got {name!r}.{hint}")
        # A VMA has one plate. An objective that has to find that out runs the model once more.
        told = {} if str(name).endswith("GlobalDraws_ELBO") else {"max_plate_nesting": 1}  # it asks its inner one
        return named | {"init_args": {**told, **given} if isinstance(given, dict) else given}

    def written_out(self) -> dict[str, Any]:
        """Returns all settings, with all arguments of objective, optimizer and schedules."""
        values, config = asdict(self), self.config()
        values |= {name: spec_of(getattr(config, name)) for name in TRAINING if name != "objective"}
        elbo = self.made_objective()
        if elbo != "auto":
            # Not as attributes: its constructor adds a plate of its own to those that it is told of.
            values["objective"] = spec_of(partial(type(elbo), **self._objective_spec()["init_args"]))
        return values

    def begin(self, device: torch.device | str = "cpu") -> tuple[VMA, Dataset[Episode], Dataset[Episode]]:
        """Makes a new model on the CPU, and episodes for training and validation on a device."""
        episodes, held_out = self.episodes(device)
        vma = self.new_model(episodes[0])
        if isinstance(episodes, LibraryEpisodes):
            index_memory(vma, episodes.memory)
        return vma, episodes, held_out

    def new_model(self, episode: Episode) -> VMA:
        """Makes a model for images like those of an episode; its weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            ink = float(episode.x.mean())
            networks: dict[str, Any] = {"width": self.width, "decoder": self.decoder, "pixels": self.pixels}
            sizes = (tuple(episode.x.shape[1:]), self.latent_dim, self.num_features)
            vma = from_pretrained(self.pretrained) if self.pretrained else VMA.for_images(*sizes, **networks, ink=ink)
            vma = build({name: spec for name in PARTS if (spec := getattr(self, name)) is not None}, like=vma)
            if self.templates is not None and vma.templates is not None:
                values = vma.templates.values.data
                first = episode.memory.templates[: len(values)].cpu()
                values.copy_(first if isinstance(vma.templates, LearnedTemplates) else torch.tensor(ink))
            if self.model != "vma":
                vma = MODELS[self.model].like(vma)
        if self.start is not None:
            take_weights(vma, load(self.start))
        if self.only is not None:
            vma.requires_grad_(False)
            getattr(vma, self.only).requires_grad_(True)
        return vma

    def train(
        self,
        out: str | Path,
        resume: bool = False,
        progress: bool = True,
        device: str = "auto",
        workers: int = 0,
        callbacks: Sequence[Callback] = (),
    ) -> FitResult:
        """Trains a new model into a folder, or resumes the run that it holds; see :func:`pyro_vmem.fit`.

        The folder gets `experiment.json`, the checkpoints and `history.csv`. The device `"auto"` is a GPU if there is
        one.
        """
        folder, where = Path(out), own_device(device)
        vma, episodes, held_out = self.begin("cpu" if workers else where)
        described_as = partial(write_json, values=asdict(self) | {"pyro_vmem": __version__})
        is_first = Processes.join(where).rank == 0
        if progress and is_first:
            sys.stderr.write(f"{self._plan(vma, episodes[0], folder, where)}\n")
        with described(folder / "experiment.json", described_as) if is_first else contextlib.nullcontext():
            return fit(
                vma,
                episodes,
                self.made_objective(),
                self.config(),
                callbacks=[RefreshKeys(self.refresh_slots), *callbacks],
                validation=held_out,
                validate_every=self.validates_every,
                select=self.select,
                out=folder,
                resume=resume,
                device=where,
                workers=workers,
                progress=progress,
            )

    @property
    def validates_every(self) -> int:
        """Steps between validations: enough of them for a learning curve, few enough to cost little."""
        if self.validate_every is not None:
            return self.validate_every
        fewest, share = (25, self.steps / 40) if self.minutes is None else (DEMO_VALIDATES_EVERY, 7 * self.minutes)
        return min(500, max(fewest, int(share)))

    def _plan(self, vma: VMA, episode: Episode, folder: Path, device: torch.device) -> str:
        """Describes the training in two sentences."""
        trained = sum(p.numel() for p in vma.parameters() if p.requires_grad)
        length = f"{self.steps:,} steps" if self.minutes is None else f"{self.minutes:g} minutes"
        return (
            f"Training {trained:,} parameters for {length} on {device}: {self.data}, {len(episode.x)} targets and "
            f"{episode.memory.num_slots} slots per step. Every {self.validates_every:,} steps the model is validated "
            f"on held-out classes and saved in {folder}."
        )

    def adopt(self, out: str | Path) -> FitResult:
        """Copies the pretrained model into a folder, as a run that was not trained."""
        unpack(self.pretrained or "", Path(out))
        write_json(Path(out) / "experiment.json", asdict(self) | {"pyro_vmem": __version__})
        return FitResult()

    @classmethod
    def read(cls, folder: str | Path) -> Experiment:
        """Reads the experiment of a run's folder.

        Raises:
            FileNotFoundError: If the folder holds no run.
            ValueError: If its settings cannot be read.
        """
        path = Path(folder) / "experiment.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"run: there is no run in {str(folder)!r} ({path.name} is missing). Train one first."
            )
        try:
            values = read_json(path)
            if not isinstance(values, dict):
                raise ValueError(f"it holds {type(values).__name__}, expected a mapping")
            values.pop("pyro_vmem", None)
            return cls(**checked(cls, values, "settings"))
        except ValueError as error:
            raise ValueError(
                f"run: {str(path)!r} does not hold the settings of a run ({error}). Correct it, or train again."
            ) from error

    def test_episodes(self, how: Evaluation, device: torch.device | str = "cpu") -> EpisodeSampler:
        """Makes episodes of test classes on a device."""
        return EpisodeSampler(self.datasets()[2], how.ways, how.shots, how.queries, how.eval_seed, device=device)

    def evaluate(
        self, folder: str | Path, how: Evaluation, progress: bool = True, device: str = "auto"
    ) -> dict[str, Any]:
        """Evaluates a run's model on a device; returns the metrics by name.

        Most are numbers. `contribution` and `calibration` hold those of the memory and the guide in the first episode,
        `reliability` holds the bins of the class probabilities, and `verdict` is a text.
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

        The result of training is read from `history.csv` by default. `seconds` tells the time since the experiment
        began, for the metrics; by default it is that of this call.
        """
        start, where, folder = time.perf_counter(), own_device(device), Path(folder)
        vma, episodes = load(folder).to(where), self.test_episodes(how, where)
        result = result or read_result(folder)
        evaluation, found, metrics = self._evaluate(vma, episodes, how, progress)
        metrics |= {"steps": result.steps, "training_seconds": round(result.seconds, 1)}
        with autocast(next(vma.parameters()).device, "auto"):
            fields = report_fields(vma, episodes, evaluation, found, seed=self.seed)
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
        """The settings of the report by name."""
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
            f"objective {self.made_objective()!r}, seed {self.seed}",
            "Model": f"{sum(p.numel() for p in vma.parameters()):,} parameters, z of length {vma.latent_dim}",
            "Parts": ", ".join(f"{symbol} {type(getattr(vma, name)).__name__}" for symbol, name in SYMBOLS.items()),
            "Software": f"pyro_vmem {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        }

    def _command(self, steps: int, folder: Path, how: Evaluation) -> str:
        """The commands that give the same numbers again: the demo where it has all options, else two."""
        wanted, default = asdict(self) | {"steps": steps, "minutes": None}, asdict(Experiment())
        changed = {name: value for name, value in wanted.items() if value != default[name]}
        made: dict[str, Any] = {"steps": steps} if steps else {"pretrained": self.pretrained}
        always = {"data": self.data, "data_root": self.data_root, **made, "seed": self.seed}
        evaluation = {name: value for name, value in asdict(how).items() if value != getattr(Evaluation, name)}
        of_demo = all(wanted[name] == value for name, value in DEMO.items())
        if of_demo and changed.keys() <= {"steps", *DEMO, *always} and self.data in ("glyphs", "omniglot"):
            return f"pyro-vmem demo{quoted(always | evaluation)}"
        train = f"pyro-vmem train --out {shlex.quote(str(folder))}{quoted(always | changed)}"
        return f"{train}\npyro-vmem report {shlex.quote(str(folder))}{quoted(evaluation)}"
