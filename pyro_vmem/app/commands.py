"""The commands: pyro-vmem demo | train | evaluate | report | sample | challenge.

Each imports what it needs, so that help and errors of use come at once, without torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pyro_vmem._utils.extras import require
from pyro_vmem._utils.files import write_atomically
from pyro_vmem._utils.plain_yaml import write_yaml
from pyro_vmem.app.settings import DEMO, Evaluation, Settings

__all__ = ["COMMANDS", "challenge", "demo", "evaluate", "report", "sample", "train_model"]

EVALUATION = Evaluation()


def demo(
    data: Literal["glyphs", "omniglot"] = "glyphs",
    data_root: str | None = None,
    minutes: float = 3.0,
    steps: int | None = None,
    out: str | None = None,
    seed: int = 0,
    pretrained: str | None = None,
    how: Evaluation = EVALUATION,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains on characters for a few minutes and shows what the memory does for unseen ones.

    Examples:
        pyro-vmem demo
        pyro-vmem demo --pretrained omniglot28
        pyro-vmem demo --data omniglot --data-root ~/data/omniglot --json

    Args:
        data: The images: letters of the fonts that matplotlib ships, or Omniglot.
        data_root: Where Omniglot is: the folder with images_background and images_evaluation, or their zip files.
        minutes: How long to train. The evaluation takes additional time.
        steps: Train this many steps instead. The numbers are then the same on any machine of this kind.
        out: A new folder for report, metrics and checkpoints. Default: runs/demo, or the next free number.
        seed: Seeds everything.
        pretrained: Show this model of the package, and train nothing.
        how: How to evaluate.
    """
    from pyro_vmem.app.experiment import Experiment
    from pyro_vmem.train.distributed import Processes, own_device

    start = time.perf_counter()
    for module, extra in (("matplotlib", "plots"), ("rich", "cli")):  # not found out after training
        require(module, extra)
    processes = Processes.join(own_device())
    budget: dict[str, Any] = {"minutes": minutes} if steps is None else {"steps": steps}
    experiment = Experiment(data=data, data_root=data_root, seed=seed, pretrained=pretrained, **DEMO, **budget)
    with _new_folder(out, "runs/demo", processes) as folder:
        if pretrained is None:
            result = experiment.train(folder, progress=not quiet)
        else:
            result = processes.first(lambda: experiment.adopt(folder))
    seconds = lambda: time.perf_counter() - start  # noqa: E731
    metrics = processes.first(lambda: experiment.report(folder, how, result, seconds, progress=_bar(quiet)))
    if talks():
        _show(metrics)
    say(f"\nReport: {folder / 'report.html'}\nMetrics: {folder / 'metrics.json'}", quiet)
    say(f"Model: {folder / 'best.safetensors'}", quiet)
    return dict(metrics)


def train_model(
    experiment: Settings,
    out: str | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: int = 0,
    print_config: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains a model into a folder.

    Name a part of the model by its class and give its arguments after it, here or in a YAML file. Parts and arguments
    that you leave out get compatible defaults. `--import MODULE` makes your own classes known.

    Examples:
        pyro-vmem train --out runs/glyphs --steps 5000
        pyro-vmem train --out runs/glyphs --resume
        pyro-vmem train --address_guide TruncatedGuide --address_guide.k 16 --objective enumerate
        pyro-vmem train --config run.yaml --address_guide.inner PairwiseGuide --print_config
        torchrun --nproc-per-node 2 -m pyro_vmem train --out runs/glyphs

    Args:
        experiment: What to train, on what, and how.
        out: A new folder for checkpoints and history, or that of a run to resume. Default: runs/train, or the next free
            number.
        resume: Continue the run in the folder, with its settings.
        device: The device for training: cpu, cuda, cuda:1 ... Default: a GPU if there is one.
        workers: The number of processes that load episodes. Default: the trainer loads them.
        print_config: Print all options as a YAML file and train nothing.

    Raises:
        ValueError: If it does not fit: a run to resume without its folder, a part, a number out of range.
    """
    from pyro_vmem.app.experiment import Experiment
    from pyro_vmem.train.distributed import Processes, own_device

    if print_config:
        options = {"out": out, "resume": resume, "device": device, "workers": workers, "quiet": quiet}
        written = Experiment(**vars(experiment)).written_out() | options
        sys.stdout.write(write_yaml(written))
        return written
    if resume:
        if out is None:
            raise ValueError("resume: which run? Give its folder: --out runs/NAME --resume.")
        asked, experiment = experiment, Experiment.read(out)
        names = [field.name for field in dataclasses.fields(Settings)]
        ignored = [n for n in names if getattr(asked, n) not in (getattr(experiment, n), getattr(Settings(), n))]
        if ignored:
            say(f"The run keeps its own settings. Without effect: {', '.join(f'--{name}' for name in ignored)}.", quiet)
    experiment = Experiment(**vars(experiment))
    processes = Processes.join(own_device(device))
    with _new_folder(out, "runs/train", processes) as folder:
        result = experiment.train(folder, resume=resume, progress=not quiet, device=device, workers=workers)
    say(f"{result!r} in {folder}", quiet)
    done = {"out": str(folder), "steps": result.steps, "seconds": round(result.seconds, 1), "bound": result.best_bound}
    return done | {"interrupted": result.interrupted}


def evaluate(run: str, how: Evaluation = EVALUATION, device: str = "auto", quiet: bool = False) -> dict[str, Any]:
    """Evaluates the model of a run on its test classes.

    Examples:
        pyro-vmem evaluate runs/glyphs
        pyro-vmem evaluate runs/glyphs --ways 100 --episodes 50 --json

    Args:
        run: The folder that train or demo wrote.
        how: How to evaluate.
        device: The device for evaluation: cpu, cuda, cuda:1 ... Default: a GPU if there is one.
    """
    from pyro_vmem.app.experiment import Experiment

    metrics = Experiment.read(run).evaluate(run, how, progress=_bar(quiet), device=device)
    _show(metrics)
    return metrics


def report(run: str, how: Evaluation = EVALUATION, device: str = "auto", quiet: bool = False) -> dict[str, Any]:
    """Evaluates the model of a run and writes its report.html again, with all figures.

    Examples:
        pyro-vmem report runs/glyphs
        pyro-vmem report runs/glyphs --ways 100 --episodes 50

    Args:
        run: The folder that train or demo wrote.
        how: How to evaluate.
        device: The device for evaluation, as in evaluate.
    """
    from pyro_vmem.app.experiment import Experiment, read_result

    require("matplotlib", "plots")
    experiment, result = Experiment.read(run), read_result(run)
    metrics = experiment.report(run, how, result, progress=_bar(quiet), device=device)
    _show(metrics)
    say(f"\nReport: {Path(run) / 'report.html'}\nMetrics: {Path(run) / 'metrics.json'}", quiet)
    return metrics


def sample(
    run: str,
    out: str | None = None,
    rows: int = 8,
    columns: int = 8,
    seed: int = 0,
    mean: bool = True,
    temperature: float = 1.0,
    best_of: int = 1,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Draws new examples of unseen characters into a PNG file, one row per template.

    Examples:
        pyro-vmem sample runs/glyphs --out samples.png

    Args:
        run: The folder that train or demo wrote.
        out: The PNG file. Default: samples.png in the folder.
        rows: How many templates.
        columns: How many draws of each.
        seed: Seeds the templates and the draws.
        mean: Show the mean of each image given its latent. If false, draw binary pixels independently.
        temperature: The factor of the distance of z from the mean of its prior; below 1, draws vary less.
        best_of: The number of candidates per draw. The guide chooses the one that it recognises best.
        device: The device for drawing, as in evaluate.
    """
    figure_module = require("matplotlib.figure", "plots")
    import torch

    from pyro_vmem._utils.random_state import seeded
    from pyro_vmem.app.experiment import Experiment
    from pyro_vmem.config import load
    from pyro_vmem.plots import one_shot_generations
    from pyro_vmem.train.distributed import own_device

    vma = load(run).to(where := own_device(device))
    memory = Experiment.read(run).test_episodes(Evaluation(ways=rows, eval_seed=seed), where)[0].memory
    with seeded(seed):
        options: dict[str, Any] = {"mean": mean, "temperature": temperature, "best_of": best_of}
        samples = torch.stack([vma.generate(memory, columns, address=slot, **options) for slot in range(rows)])
    path = Path(out) if out is not None else Path(run) / "samples.png"
    figure = figure_module.Figure(figsize=(0.7 * (columns + 1.5), 0.7 * rows))
    with write_atomically(path) as aside:
        one_shot_generations(figure, memory.templates.cpu(), samples.cpu())
        figure.savefig(aside, format=path.suffix[1:] or "png", dpi=200)
    say(f"Samples: {path}", quiet)
    return {"out": str(path), "rows": rows, "columns": columns}


def challenge(
    run: str,
    trials: str | None = None,
    data_root: str | None = None,
    ways: int = 20,
    samples: int = 20,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Classifies images in one-shot trials within an alphabet, given one image of each character.

    Examples:
        pyro-vmem challenge omniglot28 --trials all_runs
        pyro-vmem challenge runs/train --json

    Args:
        run: The folder that train or demo wrote, or the name of a model of the package.
        trials: The folder of the published trials, all_runs, with run01/class_labels.txt and so on. By default 20
            trials are drawn from the validation alphabets of the run.
        data_root: Where the images of the validation alphabets are, for a model of the package and no trials.
        ways: Characters per trial, if no trials are given.
        samples: Samples of z per pair of images, in each direction.
        seed: Seeds the samples, and the trials if none are given.
        device: The device for evaluation, as in evaluate.
    """
    from pyro_vmem._utils.precision import autocast
    from pyro_vmem.app.experiment import Experiment
    from pyro_vmem.config import from_pretrained, load, pretrained_names
    from pyro_vmem.config.pretrained import protocol_of
    from pyro_vmem.data import one_shot_trials, within_alphabet_trials
    from pyro_vmem.diagnostics import one_shot_errors
    from pyro_vmem.train.distributed import own_device

    if run in pretrained_names():
        protocol: Any = protocol_of(run)
        vma, experiment = from_pretrained(run), Experiment(data=protocol, data_root=data_root)
    else:
        vma, experiment = load(run), Experiment.read(run)
    if trials is None:
        chosen = within_alphabet_trials(experiment.datasets()[1], n_way=ways, seed=seed)
    else:
        chosen = one_shot_trials(trials, resize=experiment.resize)
    where = own_device(device)
    with autocast(where, "auto"):
        found = one_shot_errors(vma.to(where), chosen, samples, seed=seed, progress=_bar(quiet)).summary()
    ways, targets = len(chosen[0].training), sum(len(trial.test) for trial in chosen)
    say(f"{targets} images of {len(chosen)} trials, {ways}-way within an alphabet; errors, with standard error:", quiet)
    for name, words in (("guide", "guide"), ("evidence", "evidence"), ("two_way", "evidence, both directions")):
        say(f"  {words:<26}{100 * found[name]:6.2f} % ± {100 * found[f'{name}_se']:.2f}", quiet)
    return found | {"n_way": ways, "num_targets": targets, "num_samples": samples, "seed": seed}


# `train` is also a folder of the package: a function of that name would make jsonargparse import it, and torch with it.
COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "demo": demo,
    "train": train_model,
    "evaluate": evaluate,
    "report": report,
    "sample": sample,
    "challenge": challenge,
}


def _show(metrics: dict[str, Any]) -> None:
    """The metrics in a sentence and as a table on the terminal."""
    from pyro_vmem.app.report_text import result_rows, speed_sentence, verdict

    table_module, console_module = require("rich.table", extra="cli"), require("rich.console", extra="cli")
    table = table_module.Table("", "per image", "", show_edge=False, show_lines=True)
    table.columns[1].justify, table.columns[1].no_wrap, table.columns[2].style = "right", True, "dim"
    for row in result_rows(metrics):
        table.add_row(*row)
    console = console_module.Console()
    console.print(verdict(metrics), "", table, "", speed_sentence(metrics), sep="\n", highlight=False)


@contextlib.contextmanager
def _new_folder(out: str | None, name: str, processes: Any) -> Iterator[Path]:
    """The folder of a new run: `out`, or the first of `name`, `name-2` and so on that nobody has.

    It is taken, not looked up: two commands that start together get one each. A run that cannot begin leaves none.
    """
    if out is not None:
        yield Path(out)
        return

    def take() -> Path:
        for number in itertools.count(1):
            folder = Path(name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
        raise AssertionError

    folder = processes.first(take)
    try:
        yield folder
    except BaseException:
        for made in (folder, folder.parent):
            with contextlib.suppress(OSError):  # there is something in it
                made.rmdir()
        raise


def _bar(quiet: bool) -> bool:
    """Whether to show a progress bar of a minute or so: not to a file, which would get every frame of it."""
    return not quiet and sys.stderr.isatty()


def say(text: str, quiet: bool = False) -> None:
    if talks() and not quiet:
        sys.stderr.write(text + "\n")


def talks() -> bool:
    """Of the processes that torchrun has started, one speaks for all."""
    return os.environ.get("RANK", "0") == "0"
