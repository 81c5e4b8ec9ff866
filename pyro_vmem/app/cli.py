"""The command line: from words to a call of a command, and from errors to words."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import json as json_module
import os
import re
import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from pyro_vmem._utils.files import as_plain
from pyro_vmem._utils.guess import guess
from pyro_vmem._utils.plain_yaml import read_yaml
from pyro_vmem._utils.version import __version__
from pyro_vmem.app.commands import COMMANDS, say, talks
from pyro_vmem.app.settings import PARTS, SPECS, Evaluation, Settings
from pyro_vmem.app.words import split_words, with_changes

__all__ = ["main"]

FLAGS = {
    "resume": "Continue the run in the folder, with its settings.",
    "print_config": "Print all options as a YAML file and train nothing.",
    "quiet": "Print results and errors only.",
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
        config = _parser(with_choices="train" in words and not {"-h", "--help"}.isdisjoint(words)).parse_args(words)
        name = f"pyro-vmem {config.command}"
        settings = config[config.command].as_dict()
        known = settings.keys() - {"run"}
        for part, changed in changes.items():
            if part not in settings:
                raise ValueError(f"{part}: this command has no such option; `pyro-vmem train` has.")
            settings[part] = with_changes(settings[part], changed)
        as_json, _ = settings.pop("json"), settings.pop("config", None)
        command = COMMANDS[config.command]
        for group, cls in GROUPS.items():
            if group in command.__annotations__:
                settings[group] = cls(**{field.name: settings.pop(field.name) for field in dataclasses.fields(cls)})
        # What is meant for a reader gives way to the one object.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = command(**settings)
    except KeyboardInterrupt:
        say("Interrupted; what was written before is kept.")
        return 130
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"{name}: {_in_words(str(error), known)}\n")  # which may be of this process alone
        return 2
    except (OSError, FloatingPointError) as error:  # a full disk, a process that died, a training that diverged
        sys.stderr.write(f"{name}: {_in_words(str(error), known)}\n")
        return 1
    if as_json and talks():
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
    jsonargparse.set_loader("plain YAML", read_yaml, exceptions=(ValueError,))
    parser = _Parser(
        prog="pyro-vmem",
        description="Variational memory addressing in Pyro.",
        formatter_class=_Formatter,
        allow_abbrev=False,
        version=__version__,
        parser_mode="plain YAML",
    )
    commands = parser.add_subcommands(dest="command")
    for name, command in COMMANDS.items():
        summary = _unmarked(inspect.cleandoc(command.__doc__ or "").split("Args:")[0].strip())
        sub = _Parser(description=summary, allow_abbrev=False, print_config=None, parser_mode="plain YAML")
        annotations = command.__annotations__
        skip: set[str | int] = {name for name in (*FLAGS, *GROUPS) if name in annotations}
        sub.add_function_arguments(command, skip=skip, as_positional="run" in annotations)
        for group, cls in GROUPS.items():
            if group in annotations:
                sub.add_class_arguments(cls)
        if with_choices and "experiment" in annotations:
            _add_choices(sub)
        if "experiment" in annotations:
            text = "Read options from a YAML file; options given after it override the file."
            sub.add_argument("--config", action="config", help=text)
        for flag, text in FLAGS.items():
            if flag in annotations:
                sub.add_argument(f"--{flag}", action="store_true", help=text)
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
    from pyro_vmem.config.arguments import annotation, kinds
    from pyro_vmem.config.names import names_below
    from pyro_vmem.model import VMA

    for action in parser._actions:
        if action.dest in PARTS:
            action.help = f"{action.help} One of {', '.join(names_below(kinds(annotation(VMA, action.dest))))}."


def _in_words(message: str, options: Collection[str]) -> str:
    """An error of the library in the words of the command line: `--resume`, not `resume=True`."""
    message = message.partition("\n")[0] if "Trace Shapes:" in message else message  # Pyro appends them
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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--import", action="append", default=[], dest="modules")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found, others = parser.parse_known_args(words)
        for module in found.modules:
            importlib.import_module(module)
    except (argparse.ArgumentError, ModuleNotFoundError, ValueError) as error:
        raise ValueError(f"import: {error}. Give the name of a module, as in `--import my_parts`.") from error
    finally:
        sys.path.remove(here)
    return others


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
        elif invalid := re.match(r"Problems parsing config: (.*)", message):
            message = f"--config: not valid YAML: {invalid[1]}"
        elif lost := re.match(r'Parser key "config": File does not exist: (.*)', message):
            message = f"--config: there is no file {lost[1]}"
        elif missing := re.match(r"the following arguments are required: (\w+\.)?(\w+)", message):
            message = f"{missing[2]}: expected the folder of a run, got none"
        program = self.prog.replace(" [options]", "")
        self.exit(2, f"{program}: {message.rstrip('.')}{hint or '.'} See {program} --help.\n")


class _Formatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Help that keeps the line breaks of the examples."""
