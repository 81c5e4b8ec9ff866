"""YAML as plain data, and specs as words of the command line: `--address_guide TruncatedGuide --address_guide.k 16`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["quoted", "read_yaml", "split_words", "with_changes", "write_yaml"]

Change = tuple[list[str], Any]

MOST_VALUES = 100_000  # of a file once its aliases are followed, which can multiply a few lines without end


def read_yaml(text: str) -> Any:
    """What a text says; no tags, so nothing is run.

    Raises:
        ValueError: If it is not valid, has a key twice, is nested too deeply, or grows too large by its aliases.

    Example:
        >>> read_yaml("[1, 1e-3, yes, a]")  # 1e-3 is a number, as in YAML 1.2 and JSON
        [1, 0.001, True, 'a']
    """
    import yaml
    from jsonargparse import get_loader  # takes a tenth of a second, and most programs read no YAML

    try:
        # The nodes are counted before values are made of them: merge keys (<<) multiply while that is done.
        if (node := yaml.compose(text, Loader=yaml.SafeLoader)) is not None:
            _count(node, {})
        return get_loader("yaml")(text)
    except (yaml.YAMLError, TypeError) as error:  # a TypeError: a key that is a list
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _count(node: Any, known: dict[int, int]) -> int:
    """The values that a node of YAML stands for, its aliases followed; `known` holds those of nodes counted before."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # what a node counts while it is counted: one inside of itself is too large
        pairs = node.value if node.id == "mapping" else ()
        names = [key.value for key, _ in pairs if key.id == "scalar" and key.value != "<<"]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"it has the key {min(twice)!r} twice")
        inner = [one for pair in pairs for one in pair] or (node.value if node.id == "sequence" else [])
        known[id(node)] = 1 + sum(_count(one, known) for one in inner)
    if known[id(node)] > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values, its aliases followed. Write it without them")
    return known[id(node)]


def write_yaml(data: Any) -> str:
    """Plain data as a text that :func:`read_yaml` reads.

    Example:
        >>> print(write_yaml({"steps": 10, "held_out": (20, 1, 2)}), end="")
        steps: 10
        held_out: [20, 1, 2]
    """
    import yaml

    plain = json.loads(json.dumps(data))  # tuples are lists
    text: str = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
    return text


def split_words(words: Sequence[str], names: Iterable[str]) -> tuple[list[str], dict[str, list[Change]]]:
    """Splits what is said of arguments of the specs `names` from the other words of a command.

    Returns the other words, and for each spec the path of each argument with its value, in order. Raises a `ValueError`
    if a value is missing, or is none.

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
    """A spec with some arguments changed, those of parts inside of it by their path.

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
    """Options as a shell takes them, each with a space before; those without a value are left out.

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
