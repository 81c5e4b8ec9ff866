"""Specs as words of the command line: `--address_guide TruncatedGuide --address_guide.k 16`.

jsonargparse takes such words for a class that is imported, and wants all arguments that have no default. Here torch is
not imported yet, and the model that fills in the other arguments is made later.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from pyro_vmem._utils.plain_yaml import read_yaml

__all__: list[str] = []

Change = tuple[list[str], Any]


def split_words(words: Sequence[str], names: Iterable[str]) -> tuple[list[str], dict[str, list[Change]]]:
    """Splits off the arguments of specs: returns the other words, and for each spec the path and value of each.

    Example:
        >>> split_words("train --address_guide.inner.temperature=0.5 --steps 10".split(), ["address_guide"])
        (['train', '--steps', '10'], {'address_guide': [(['inner', 'temperature'], 0.5)]})
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
            parsed = read_yaml(value)
        except ValueError as error:
            raise ValueError(f"{option}: {value!r} is not a value ({error}). Put quotes around it.") from error
        # `--address_guide.init_args.k`, as in a file, is `--address_guide.k`
        changes.setdefault(heads[head], []).append(([name for name in path if name != "init_args"], parsed))
    return others, changes


def with_changes(spec: Any, changes: Iterable[Change]) -> Any:
    """Changes arguments of a spec. A path such as `inner.k` names an argument of an inner part.

    Example:
        >>> with_changes("TruncatedGuide", [(["k"], 16)])
        {'class_path': 'TruncatedGuide', 'init_args': {'k': 16}}
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


def quoted(values: dict[str, Any]) -> str:
    """Writes options as a shell takes them, each with a space before it, without those of no value.

    Example:
        >>> quoted({"minutes": None, "likelihood": {"class_path": "GaussianDecoder", "init_args": {"scale": 0.1}}})
        ' --likelihood GaussianDecoder --likelihood.scale 0.1'
    """
    return "".join(_option(name, value) for name, value in values.items() if value is not None)


def _option(name: str, value: Any) -> str:
    if not isinstance(value, dict) or not value.keys() <= {"class_path", "init_args"}:
        return f" --{name} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
    head = f" --{name} {shlex.quote(value['class_path'])}" if "class_path" in value else ""
    return head + "".join(_option(f"{name}.{key}", inner) for key, inner in (value.get("init_args") or {}).items())
