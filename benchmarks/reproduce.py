"""Trains and evaluates what a table needs, in pieces of any length, and writes results/TABLE.json after every cell.

    python -m benchmarks.reproduce gmn-distinct --minutes 20           # as often as it takes; goes on where it was
    python -m benchmarks.reproduce gmn-distinct --run runs/mine        # evaluates a run that is there
    python -m benchmarks.reproduce gmn-distinct --shots [1,5] --targets 100 --samples 100   # a quick look
    python -m benchmarks.reproduce gmn-distinct --model no-memory      # a baseline

Recipes are in benchmarks/configs. `python -m benchmarks.tables` makes docs/results.md of all results.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

import pyro_vmem as pv
from benchmarks import command
from benchmarks.checkpoints import fingerprint, pack, progress, unpack
from benchmarks.recipes import Recipe, model_name, read
from pyro_vmem import data
from pyro_vmem._utils.files import write_atomically
from pyro_vmem._utils.precision import autocast
from pyro_vmem._utils.random_state import forked
from pyro_vmem.app import Experiment
from pyro_vmem.app.settings import ModelName
from pyro_vmem.data import Episode, merge_episodes
from pyro_vmem.data.storage import save_npz
from pyro_vmem.diagnostics import estimate_evidence, slot_log_evidence
from pyro_vmem.diagnostics.weights import trust_figures
from pyro_vmem.parts.learned_templates import NO_CLASS
from pyro_vmem.train.history import summarise

BATCH = 32  # targets that are read and encoded together; each batch has a seed of its own for its samples
MAX_DECODES = {"cpu": 250, "cuda": 20_000}  # at once: on a CPU what fits into its cache, thousands take twice the time
BREAKDOWN = ("kl_a", "kl_z", "reconstruction")  # of the bound, of which the guide is a part
BREAKDOWN_PARTICLES = 8
POSTERIOR_SAMPLES = 200  # of z and a, for the posterior over addresses: to tell which class is first takes few
HISTORY = ("step", "seconds", "bound", "kl_a", "kl_z", "val_bound", "val_kl_a", "val_kl_z", "val_hit_rate")


def main(
    table: str,
    model: ModelName | None = None,
    run: str | None = None,
    start: str | None = None,
    minutes: float | None = None,
    train: bool = True,
    evaluate: bool | None = None,
    classes: list[int] | None = None,
    shots: list[int] | None = None,
    methods: list[str] | None = None,
    samples: int | None = None,
    targets: int | None = None,
    out: str = "results",
    runs: str = "runs",
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """Goes on with a table.

    Args:
        table: A recipe in benchmarks/configs.
        model: One model, in place of all those of the recipe.
        run: A run's folder whose model is evaluated; nothing is trained.
        start: A run's folder whose model is trained further, in place of the weights that the recipe starts from.
        minutes: When to stop: training is kept to be resumed, no further cell is begun.
        train: Whether to train, where the run is not over.
        evaluate: Whether to evaluate; by default, once the run is over.
        classes: In place of the recipe's numbers of classes.
        shots: In place of its numbers of shots.
        methods: In place of its methods.
        samples: In place of its number of samples.
        targets: In place of its number of targets.
        out: The folder of results.
        runs: The folder of runs, and of their exact checkpoints.
        device: Where to train and evaluate, such as "cuda".
        workers: How many processes make the training episodes, on the CPU; by default they are made where it trains.
    """
    begin, recipe = time.perf_counter(), read(table)
    results = Results(Path(out) / f"{table}.json", table, recipe)
    how = {"n_classes": classes, "shots": shots, "methods": methods, "num_samples": samples, "num_targets": targets}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in how.items() if value is not None})  # type: ignore[arg-type]
    test, checkpoints = recipe.experiment.datasets()[2], Path(out) / "checkpoints"

    def left() -> float | None:
        """Minutes that are left."""
        return None if minutes is None else max(1e-5, minutes - (time.perf_counter() - begin) / 60)

    for name in recipe.models if model is None and run is None else [model or "vma"]:
        folder = Path(run or f"{runs}/{recipe.run or table}/{name}")
        stem = checkpoints / f"{recipe.run or table}-{name}"
        steps = recipe.experiment.steps
        over = bool(run or recipe.run) or progress(folder)["steps"] >= steps
        if train and not over:
            unpack(stem, folder) if not (folder / "last.safetensors").exists() else None
            experiment = dataclasses.replace(recipe.experiment, model=name, start=start or recipe.experiment.start)
            result = fit(experiment, folder, left(), device, workers)
            over = result.steps >= steps
            pack(folder, stem, over)
        if evaluate or (evaluate is None and over):
            vma = trained(recipe, folder, stem).to(device)
            evaluated = name if run is None else model_name(vma)
            results.of_run(evaluated, vma, progress(folder) if folder.exists() else {})
            for cell in recipe.cells():
                if minutes is not None and time.perf_counter() - begin > 60 * minutes:
                    break
                evaluate_cell(results, recipe, test, vma, evaluated, *cell)
    return results.content


def batches(episodes: Dataset[Episode], size: int) -> Iterator[Episode]:
    """Merges `size` episodes of one target into one with a memory per datapoint; yields other episodes as they are."""
    rows: list[Episode] = []
    for index in range(len(episodes)):  # type: ignore[arg-type]
        episode = episodes[index]
        if len(episode.x) > 1:
            yield episode
            continue
        rows.append(episode)
        if len(rows) == size:
            yield merge_episodes(rows)
            rows = []
    if rows:
        yield merge_episodes(rows)


def fit(
    experiment: Experiment, folder: Path, minutes: float | None = None, device: str = "cpu", workers: int = 0
) -> pv.FitResult:
    """A piece of the training of an experiment: of a new model, or of one that was begun."""
    pieces = [] if minutes is None else [pv.train.StopAfter(minutes)]
    how: dict[str, Any] = {"device": device, "workers": workers, "progress": sys.stderr.isatty()}
    return experiment.train(folder, resume=True, callbacks=pieces, **how)


def trained(recipe: Recipe, folder: Path, stem: Path) -> pv.VMA:
    """The model of a run, or else of its checkpoint among the results or in the package, ready to be evaluated.

    Its address guide sees all slots, and looks at images in as many ways as the recipe says.
    """
    of_run = recipe if recipe.run is None else read(recipe.run)
    path = folder if folder.exists() else stem.with_name(f"{stem.name}.safetensors")
    packaged = of_run.packaged if stem.name.endswith("-vma") and not path.exists() else None
    return all_slots(pv.load(path) if packaged is None else pv.VMA.from_pretrained(packaged), of_run.views)


def all_slots(vma: pv.VMA, views: int = 1) -> pv.VMA:
    """A model whose address guide sees all slots, in `views` ways."""
    if isinstance(vma.address_guide, pv.TruncatedGuide):
        # Truncated, it would miss the mass of all but a few slots: the samples would be of a smaller evidence.
        vma.address_guide = vma.address_guide.inner
    if views > 1:
        guide = vma.address_guide
        assert isinstance(guide, pv.EncoderGuide)
        vma.address_guide = pv.EncoderGuide(guide.inner, guide.encoder, views)
    return vma


class Results:
    """A table's figures, written after every cell.

    Arguments:
        path: The JSON file; beside it, in an `.npz`, lies the NLL of every target, which pairs models.
        table: The table.
        recipe: Its recipe.
    """

    def __init__(self, path: Path, table: str, recipe: Recipe) -> None:
        self.path, self.arrays = path, path.with_suffix(".npz")
        empty: dict[str, Any] = {"runs": {}, "rows": []}
        self.content = json.loads(path.read_text()) if path.exists() else empty
        self.content = {"table": table, "recipe": recipe.written_out()} | {
            name: self.content[name] for name in ("runs", "rows")
        }

    def of_run(self, model: str, vma: pv.VMA, fitted: dict[str, Any]) -> None:
        """Notes the run that a model comes from, and forgets figures of other weights."""
        name = fingerprint(vma.state_dict())
        known = self.content["runs"].get(model)
        if known is not None and known["weights"] == name and not fitted:
            return  # the run is gone, and was noted when it was there
        history = fitted.get("history", [])
        thinned = history[:: -max(1, len(history) // 100)][::-1]  # the last is among them
        self.content["runs"][model] = {
            "weights": name,
            "parameters": sum(p.numel() for p in vma.parameters()),
            "steps": fitted.get("steps"),
            "seconds": fitted.get("seconds"),
            "commit": commit(),
            "machine": machine(next(vma.parameters()).device),
            "history": {n: [_short(row.get(n, math.nan)) for row in thinned] for n in HISTORY},
        }
        rows = self.content["rows"]
        self.content["rows"] = [row for row in rows if row["model"] != model or row["weights"] == name]

    def has(self, key: dict[str, Any]) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.content["rows"])

    def add(self, row: dict[str, Any], nll: Tensor) -> None:
        """Adds a row and the NLL of its targets; writes both."""
        self.content["rows"].append(row)
        kept: dict[str, Any] = {}
        if self.arrays.exists():
            with np.load(self.arrays) as arrays:
                kept = {n: arrays[n] for n in arrays.files}
        save_npz(self.arrays, **kept | {array_name(row): nll.numpy().astype(np.float32)})
        with write_atomically(self.path) as aside:
            aside.write_text(_lines(self.content) + "\n")


def array_name(row: dict[str, Any]) -> str:
    """The name under which the NLL of a row's targets is kept."""
    names = ("model", "n_classes", "shots", "method", "num_samples", "num_targets", "seed")
    return "/".join(str(row[name]) for name in names)


def evaluate_cell(
    results: Results,
    recipe: Recipe,
    test: data.FewShotDataset,
    vma: pv.VMA,
    model: str,
    n_classes: int,
    shots: int,
    method: Any,
) -> None:
    """Evaluates a cell, unless it is there, and writes it down."""
    episodes = recipe.test_episodes(test, n_classes, shots, recipe.num_targets)
    key = {
        "model": model,
        "weights": results.content["runs"][model]["weights"],
        "protocol": recipe.protocol,
        "n_classes": n_classes,
        "shots": shots,
        "method": method,
        "num_samples": recipe.num_samples,
        "num_episodes": len(episodes),  # type: ignore[arg-type]
        "seed": recipe.eval_seed,
    }
    if results.has(key):
        return
    begin, columns = time.perf_counter(), []
    means: list[Tensor] = []
    hits: list[Tensor] = []
    parts: list[tuple[float, ...]] = []
    device = next(vma.parameters()).device
    for number, episode in enumerate(e.to(device) for e in batches(episodes, BATCH)):
        with torch.no_grad(), autocast(episode.x.device, "auto"):
            memory = vma.encode(episode.memory)
            guide = vma.address_guide(memory, vma.encode_x(episode.x))
            terms = taken_apart(vma, memory, episode.x, recipe.eval_seed * 1_000_003 + number)
        found = estimate_evidence(
            vma,
            memory,
            episode.x,
            recipe.num_samples,
            method,
            budget=0,  # what is published are figures of one method
            seed=recipe.eval_seed * 1_000_003 + number,
            precision="auto",
            max_decodes=MAX_DECODES[device.type],
            warn=False,
        )
        seed = recipe.eval_seed * 1_000_003 + number
        probs = (
            guide.probs
            if method == "sampled"
            else posterior(vma, memory, episode.x, min(recipe.num_samples, POSTERIOR_SAMPLES), seed)
        )
        columns.append((found.nll, found.standard_error, found.khat, *_lookup(episode, memory, probs)))
        parts.append((len(episode.x), *(terms[name] for name in BREAKDOWN)))
        shared = not episode.memory.per_datapoint
        means.append(found.nll.mean(0, keepdim=True) if shared else found.nll)
        hits.append(columns[-1][-1].float().mean(0, keepdim=True))
    nll, error, khat, copy, present, hit = (torch.cat(column).double().cpu() for column in zip(*columns, strict=True))
    by_episode = torch.cat(means).double().cpu()
    size, *totals = (torch.tensor(column) for column in zip(*parts, strict=True))
    of_bound = {n: _short(float((t * size).sum() / size.sum())) for n, t in zip(BREAKDOWN, totals, strict=True)}
    seconds = time.perf_counter() - begin
    row = key | {
        "num_targets": len(nll),
        "nll": _short(float(by_episode.mean())),
        "nll_se": _short(_error(by_episode)),
        **{name: _short(value) for name, value in trust_figures(khat, error).items()},
        "copy_rate": _short(float(copy.mean())),
        "class_in_memory": _short(float(present.mean())),
        "nll_in_memory": _short(float(nll[present > 0].mean())),
        "nll_absent": _short(float(nll[present == 0].mean())),
        "hit_rate": _short(float(hit[present > 0].mean())),
        "hit_rate_se": _short(_error(torch.cat(hits).double().cpu() if shared else hit[present > 0])),
        **of_bound,
        "seconds": round(seconds, 1),
        "decodes_per_second": round(found.decodes / len(episode.x) * len(nll) / seconds),
        "commit": commit(),
    }
    results.add(row, nll)
    sys.stderr.write(f"{model} C={n_classes} T={shots} {method}: {figure(row)} nats\n")


def posterior(vma: pv.VMA, memory: pv.EncodedMemory, x: Tensor, num_samples: int, seed: int) -> Tensor:
    """The model's own p(a | x, M), the samples of z shared out among the slots."""
    with torch.no_grad(), autocast(x.device, "auto"), forked(x.device):
        torch.manual_seed(seed)
        each = max(1, num_samples // memory.num_slots)
        evidence = slot_log_evidence(vma, memory, x, each, max_decodes=MAX_DECODES[x.device.type])
        return (evidence + vma.address_prior(memory).logits).softmax(-1)


def taken_apart(vma: pv.VMA, memory: pv.Memory, x: Tensor, seed: int) -> dict[str, float]:
    """The terms of the bound with a few particles; parameter store and random state stay as they are."""
    elbo = pv.infer.VIMCO_ELBO(BREAKDOWN_PARTICLES, max_plate_nesting=1)
    with pyro.get_param_store().scope(), forked(x.device):
        torch.manual_seed(seed)
        return summarise(elbo.terms(vma.model, vma.guide, memory, x))


def _error(values: Tensor) -> float:
    """The standard error of the mean of independent values."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def figure(row: dict[str, Any]) -> str:
    """A row's NLL with its standard error, if it has one."""
    return f"{row['nll']:.2f}" + (f" ± {row['nll_se']:.2f}" if row["nll_se"] is not None else "")


def _lookup(episode: data.Episode, memory: pv.Memory, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each target: whether a copy of it is in memory, whether its class is, whether the guide finds the class."""
    assert memory.labels is not None
    slots = memory.templates if memory.per_datapoint else memory.templates[None]
    copy = (slots == episode.x[:, None]).flatten(2).all(-1).any(-1)
    labels = memory.labels.expand(probs.shape)
    classes, column = labels.unique(return_inverse=True)
    by_class = probs.new_zeros(len(probs), len(classes)).scatter_add(-1, column, probs)
    by_class[:, classes == NO_CLASS] = -1.0  # a learned slot is of no class that could be told
    hit = classes[by_class.argmax(-1)] == episode.labels
    return copy, (labels == episode.labels[:, None]).any(-1), hit


def machine(device: str | torch.device | None = None) -> dict[str, Any]:
    """What figures of time depend on."""
    name = platform.processor() or platform.machine()
    file = Path("/proc/cpuinfo")
    if file.exists():
        name = next(
            (line.split(":")[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")),
            name,
        )
    gpu = {"gpu": torch.cuda.get_device_name(device)} if torch.device(device or "cpu").type == "cuda" else {}
    return {"cpu": name, **gpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def commit() -> str:
    """The commit that is checked out; with a plus, if the package or the benchmarks are changed."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", "pyro_vmem", "benchmarks") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    here = Path(__file__).parent.parent
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _lines(value: Any, indent: str = "") -> str:
    """JSON with what holds no further dicts on a line of its own."""
    items = value.items() if isinstance(value, dict) else [(None, v) for v in value] if isinstance(value, list) else []
    if not any(isinstance(v, dict) for _, v in items):
        return json.dumps(value)
    inner = indent + " "
    texts = [(json.dumps(k) + ": " if k is not None else "") + _lines(v, inner) for k, v in items]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(texts) + f"\n{indent}{closing}"


def _short(value: float) -> float | None:
    """Five digits; None for what JSON has no number for."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def show(result: dict[str, Any]) -> None:
    """The rows as a table."""
    table = Table("model", "C", "T", "method", "K", "targets", "NLL", title=result["recipe"]["title"])
    for row in result["rows"]:
        cells = [str(row[name]) for name in ("model", "n_classes", "shots", "method", "num_samples", "num_targets")]
        table.add_row(*cells, figure(row))
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
