"""The command line: pyro-vmem demo | train | evaluate | report | sample | challenge.

Each command imports what it needs, so that help and errors of use come at once, without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json as json_module
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from pyro_vmem._utils.extras import require
from pyro_vmem._utils.files import as_plain, write_atomically
from pyro_vmem._utils.guess import guess
from pyro_vmem._utils.plain_yaml import read_yaml, write_yaml
from pyro_vmem._utils.version import __version__
from pyro_vmem.app.settings import DEMO, PARTS, SPECS, Evaluation, Settings
from pyro_vmem.app.words import split_words, with_changes

__all__ = ["challenge", "demo", "evaluate", "main", "report", "sample", "train_model"]

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
    if _talks():
        _show(metrics)
    _say(f"\nReport: {folder / 'report.html'}\nMetrics: {folder / 'metrics.json'}", quiet)
    _say(f"Model: {folder / 'best.safetensors'}", quiet)
    return dict(metrics)


def train_model(
    experiment: Settings,
    out: str | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: int = 0,
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

    Raises:
        ValueError: If it does not fit: a run to resume without its folder, a part, a number out of range.
    """
    from pyro_vmem.app.experiment import Experiment
    from pyro_vmem.train.distributed import Processes, own_device

    if resume:
        if out is None:
            raise ValueError("resume: which run? Give its folder: --out runs/NAME --resume.")
        asked, experiment = experiment, Experiment.read(out)
        names = [field.name for field in dataclasses.fields(Settings)]
        ignored = [n for n in names if getattr(asked, n) not in (getattr(experiment, n), getattr(Settings(), n))]
        if ignored:
            _say(
                f"The run keeps its own settings. Without effect: {', '.join(f'--{name}' for name in ignored)}.", quiet
            )
    experiment = Experiment(**vars(experiment))
    processes = Processes.join(own_device(device))
    with _new_folder(out, "runs/train", processes) as folder:
        result = experiment.train(folder, resume=resume, progress=not quiet, device=device, workers=workers)
    _say(f"{result!r} in {folder}", quiet)
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
    _say(f"\nReport: {Path(run) / 'report.html'}\nMetrics: {Path(run) / 'metrics.json'}", quiet)
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
    _say(f"Samples: {path}", quiet)
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
    _say(
        f"{targets} images of {len(chosen)} trials, {ways}-way within an alphabet; errors, with standard error:", quiet
    )
    for name, words in (("guide", "guide"), ("evidence", "evidence"), ("two_way", "evidence, both directions")):
        _say(f"  {words:<26}{100 * found[name]:6.2f} % ± {100 * found[f'{name}_se']:.2f}", quiet)
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
GROUPS: dict[str, type[Settings | Evaluation]] = {"experiment": Settings, "how": Evaluation}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 if it failed, 2 after an error of use (a `ValueError`), 130 after Ctrl-C.

    Arguments:
        args: The words after `pyro-vmem`; those of the process by default.

    Raises:
        SystemExit: With code 2, after the usage, if the words are none of a command's; with 0 after `--help`.

    Example:
        >>> main(["evaluate", "no/such/run"])
        2
    """
    known: set[str] = set()
    warnings.formatwarning = lambda text, *_, **__: f"{name}: {text}\n"  # without the place in the code
    words = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
    name = "pyro-vmem"
    try:
        words, changes = split_words(_imported(words), SPECS)
        _check_files(words)
        config = _parser(with_choices="train" in words and not {"-h", "--help"}.isdisjoint(words)).parse_args(words)
        name = f"pyro-vmem {config.command}"
        settings = config[config.command].as_dict()
        known = settings.keys() - {"run"}
        for part, changed in changes.items():
            if part not in settings:
                raise ValueError(f"{part}: this command has no such option; `pyro-vmem train` has.")
            settings[part] = with_changes(settings[part], changed)
        as_json, _, shown = settings.pop("json"), settings.pop("config", None), settings.pop("print_config", False)
        command = COMMANDS[config.command]
        for group, cls in GROUPS.items():
            if group in command.__annotations__:
                settings[group] = cls(**{field.name: settings.pop(field.name) for field in dataclasses.fields(cls)})
        if shown:
            from pyro_vmem.app.experiment import Experiment

            experiment = Experiment(**vars(settings.pop("experiment")))
            sys.stdout.write(write_yaml(experiment.written_out() | settings))
            return 0
        # What is meant for a reader gives way to the one object.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = command(**settings)
    except KeyboardInterrupt:
        _say("Interrupted; what was written before is kept.")
        return 130
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"{name}: {_in_words(str(error), known)}\n")  # which may be of this process alone
        return 2
    except (OSError, FloatingPointError) as error:  # a full disk, a process that died, a training that diverged
        sys.stderr.write(f"{name}: {_in_words(str(error), known)}\n")
        return 1
    if as_json and _talks():
        try:
            sys.stdout.write(json_module.dumps(as_plain(result), allow_nan=False) + "\n")
            sys.stdout.flush()
        except OSError as error:
            sys.stderr.write(f"{name}: the result could not be printed ({error}).\n")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again at its end
            return 1
    return 130 if result.get("interrupted") else 0  # what follows in a script is not to begin


def _parser(with_choices: bool) -> Any:
    """One subcommand a function; the fields of Settings and Evaluation are options of their own."""
    parser = _Parser(
        prog="pyro-vmem",
        description="Variational memory addressing in Pyro.",
        formatter_class=_Formatter,
        allow_abbrev=False,
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        summary = _unmarked(inspect.cleandoc(command.__doc__ or "").split("Args:")[0].strip())
        sub = _Parser(description=summary, allow_abbrev=False, print_config=None)
        annotations = command.__annotations__
        skip: set[str | int] = set({"resume", "quiet", *GROUPS} & set(annotations))
        sub.add_function_arguments(command, skip=skip, as_positional="run" in annotations)
        if "resume" in annotations:
            sub.add_argument("--resume", action="store_true", help="Continue the run in the folder, with its settings.")
        for group in GROUPS:
            if group in annotations:
                sub.add_class_arguments(GROUPS[group])
        if with_choices and "experiment" in annotations:
            _add_choices(sub)
        if "experiment" in annotations:
            text = "Read options from a YAML file; options given after it override the file."
            sub.add_argument("--config", action="config", help=text)
            sub.add_argument("--print_config", action="store_true", help="Print all options as such a file and exit.")
        sub.add_argument("--quiet", action="store_true", help="Print results and errors only.")
        sub.add_argument(
            "--json", action="store_true", help="Print the result as one JSON object, and all else to stderr."
        )
        for action in sub._actions:
            action.help = _unmarked(action.help or "")
        commands.add_subcommand(name, sub, help=summary.splitlines()[0])
    return parser


def _unmarked(text: str) -> str:
    """A docstring without its markup, which is for the documentation."""
    return re.sub(r":\w+:`~?([^`]*)`|`([^`]*)`", r"\1\2", text)


def _add_choices(parser: Any) -> None:
    from pyro_vmem.config.spec import choices
    from pyro_vmem.model import VMA

    for action in parser._actions:
        if action.dest in PARTS:
            action.help = f"{action.help} One of {', '.join(choices(VMA, action.dest))}."


def _in_words(message: str, options: Collection[str]) -> str:
    """An error of the library in the words of the command line: `--resume`, not `resume=True`."""
    message = re.sub(r"^spec\.(?=\w)", "", message)
    if "resume" in options:  # the library's words for the places that --data_root and --out name
        message = re.sub(r"^(path|run)(?=:)", lambda m: {"path": "data_root", "run": "out"}[m[1]], message)
    message = re.sub(r"import it first, or pass trusted_modules=\['(\w+)'\]", r"pass --import \1", message)
    message = re.sub(r"\b(\w+)=True\b( \(--\1\))?", lambda m: f"--{m[1]}" if m[1] in options else m[0], message)
    message = re.sub(r"\b(\w+)=(?=[\w'\"])", lambda m: f"--{m[1]} " if m[1] in options else m[0], message)
    return re.sub(r"^(\w+)(?=[.:,])", lambda m: f"--{m[1]}" if m[1] in options else m[0], message)


def _underscored(word: str) -> str:
    """An option with underscores in its name, as `--data-root` is as good as `--data_root`; any other word as it is."""
    option, equals, value = word.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _imported(words: list[str]) -> list[str]:
    """The words without `--import MODULE`, which is done; only the command line may ask for it, no file."""
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, module = word.partition("=")
        if option != "--import":
            others.append(word)
            continue
        module = module if equals else next(rest, "")
        here = str(Path.cwd())
        sys.path.insert(0, here)
        try:
            importlib.import_module(module)
        except (ModuleNotFoundError, ValueError) as error:
            raise ValueError(
                f"import: {error}. Give the name of a module, as in `import {module or 'NAME'}`."
            ) from error
        finally:
            sys.path.remove(here)
    return others


def _check_files(words: list[str]) -> None:
    """Refuses a file whose aliases multiply, or contain themselves: the parser would follow them without end."""
    for word, following in itertools.pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        path = Path(value if equals else following)
        if option == "--config" and path.is_file():
            try:
                read_yaml(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"config: {str(path)!r} is not valid YAML ({error}). Correct it.") from error


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


def _say(text: str, quiet: bool = False) -> None:
    if _talks() and not quiet:
        sys.stderr.write(text + "\n")


def _talks() -> bool:
    """Of the processes that torchrun has started, one speaks for all."""
    return os.environ.get("RANK", "0") == "0"


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line, with what was meant; a usage of seventy options would hide it."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Prints the message, and the option or command that was meant."""
        message, hint = " ".join(message.split()), ""
        if unknown := re.match(r"unrecognized arguments: (--[\w.]+)", message, re.IGNORECASE):
            hint = f".{guess(unknown[1], [option for action in self._actions for option in action.option_strings])}"
        elif unknown := re.search(r"invalid choice: '([^']+)'", message):
            hint = f".{guess(unknown[1], [*COMMANDS])}"
        elif wrong := re.match(r'Parser key "(\w+)": Expected an? (.*)\. Got value: (.*)', message):
            expected = re.sub(r"^typing\.Literal\[(.*)\]$|^<class '(\w+)'>$", r"\1\2", wrong[2])
            message = f"--{wrong[1]}: expected {expected}, got {wrong[3]!r}"
            hint = "." + guess(wrong[3], re.findall(r"'([^']+)'", expected))
        elif lost := re.match(r'Parser key "config": File does not exist: (.*)', message):
            message = f"--config: there is no file {lost[1]}"
        elif missing := re.match(r"the following arguments are required: (\w+\.)?(\w+)", message):
            message = f"{missing[2]}: expected the folder of a run, got none"
        program = self.prog.replace(" [options]", "")
        self.exit(2, f"{program}: {message.rstrip('.')}{hint or '.'} See {program} --help.\n")


class _Formatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Help that keeps the line breaks of the examples."""
