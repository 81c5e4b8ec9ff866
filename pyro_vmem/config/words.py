"""Specs of parts as words of the command line: `--address_guide TruncatedGuide --address_guide.k 16`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["quoted", "split_words", "to_words", "underscored", "with_changes"]

Change = tuple[list[str], Any]


def split_words(
    words: Sequence[str], names: Iterable[str], parse: Callable[[str], Any] = str
) -> tuple[list[str], dict[str, list[Change]]]:
    """Takes what is said of arguments of parts out of the words of a command.

    Arguments:
        words: All words.
        names: The options that are parts.
        parse: Makes a value of a word.

    Returns:
        The other words, and for each part its arguments by their path, with their values, in order.

    Raises:
        ValueError: If a value is missing, or is none.

    Example:
        >>> words = "train --address_guide TruncatedGuide --address_guide.inner.temperature=0.5 --steps 10".split()
        >>> split_words(words, ["address_guide"])
        (['train', '--address_guide', 'TruncatedGuide', '--steps', '10'],
         {'address_guide': [(['inner', 'temperature'], '0.5')]})
    """
    others: list[str] = []
    changes: dict[str, list[Change]] = {}
    heads = {f"--{name}": name for name in names}
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        head, *path = option.split(".")
        if head not in heads or not path:
            others.append(word)
            continue
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise ValueError(f"{option}: expected a value after it, got none.")
        try:
            parsed = parse(value)
        except ValueError as error:
            raise ValueError(f"{option}: {value!r} is not a value ({error}). Put quotes around it.") from error
        # `--address_guide.init_args.k`, as in a file, is `--address_guide.k`
        changes.setdefault(heads[head], []).append(([name for name in path if name != "init_args"], parsed))
    return others, changes


def with_changes(spec: Any, changes: Iterable[Change]) -> Any:
    """A spec with some arguments changed, those of parts inside of it by their path.

    Example:
        >>> with_changes("TruncatedGuide", [(["k"], 16), (["inner"], "PairwiseGuide"), (["inner", "hidden"], 32)])
        {'class_path': 'TruncatedGuide',
         'init_args': {'k': 16, 'inner': {'class_path': 'PairwiseGuide', 'init_args': {'hidden': 32}}}}
    """
    for (name, *deeper), value in changes:
        spec = {"class_path": spec} if isinstance(spec, str) else dict(spec or {})
        if name == "class_path":
            spec[name] = value
            continue
        arguments = dict(spec.get("init_args") or {})
        arguments[name] = with_changes(arguments.get(name), [(deeper, value)]) if deeper else value
        spec["init_args"] = arguments
    return spec


def to_words(name: str, value: Any) -> list[str]:
    """An option as the words that give it again.

    Example:
        >>> to_words("steps", 10)
        ['--steps', '10']
        >>> to_words("likelihood", {"class_path": "GaussianDecoder", "init_args": {"scale": 0.1}})
        ['--likelihood', 'GaussianDecoder', '--likelihood.scale', '0.1']
    """
    if not isinstance(value, dict) or not value.keys() <= {"class_path", "init_args"}:
        return [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    head = [f"--{name}", value["class_path"]] if "class_path" in value else []
    arguments = (value.get("init_args") or {}).items()
    return [*head, *(word for key, given in arguments for word in to_words(f"{name}.{key}", given))]


def quoted(values: dict[str, Any]) -> str:
    """Options as a shell takes them, each with a space before; those without a value are left out.

    Example:
        >>> quoted({"steps": 10, "minutes": None, "data_root": "my data"})
        " --steps 10 --data_root 'my data'"
    """
    given = ((name, value) for name, value in values.items() if value is not None)
    return "".join(f" {shlex.quote(word)}" for name, value in given for word in to_words(name, value))


def underscored(word: str) -> str:
    """An option with underscores in its name, and any other word as it is.

    Example:
        >>> underscored("--data-root=a-b"), underscored("a-b")
        ('--data_root=a-b', 'a-b')
    """
    option, equals, value = word.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if word.startswith("--") else word
