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
        ValueError: If it is not valid, or grows too large by its aliases.

    Example:
        >>> read_yaml("[1, 1e-3, yes, a]")  # 1e-3 is a number, as in YAML 1.2 and JSON
        [1, 0.001, True, 'a']
    """
    import yaml
    from jsonargparse import get_loader  # takes a tenth of a second, and most programs read no YAML

    try:
        data = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    waiting, seen = [data], 0
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if (seen := seen + 1) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values, its aliases followed. Write it without them")
    return data


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
    """Takes what is said of arguments of specs out of the words of a command.

    Arguments:
        words: All words.
        names: The options that are specs.

    Returns:
        The other words, and for each spec its arguments by their path, with their values, in order.

    Raises:
        ValueError: If a value is missing, or is none.

    Example:
        >>> words = "train --address_guide TruncatedGuide --address_guide.inner.temperature=0.5 --steps 10".split()
        >>> split_words(words, ["address_guide"])
        (['train', '--address_guide', 'TruncatedGuide', '--steps', '10'],
         {'address_guide': [(['inner', 'temperature'], 0.5)]})
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


def quoted(values: dict[str, Any]) -> str:
    """Options as a shell takes them, each with a space before; those without a value are left out.

    Example:
        >>> quoted({"steps": 10, "minutes": None, "data_root": "my data"})
        " --steps 10 --data_root 'my data'"
        >>> quoted({"likelihood": {"class_path": "GaussianDecoder", "init_args": {"scale": 0.1}}})
        ' --likelihood GaussianDecoder --likelihood.scale 0.1'
    """
    words = [word for name, value in values.items() if value is not None for word in _words(name, value)]
    return "".join(f" {shlex.quote(word)}" for word in words)


def _words(name: str, value: Any) -> list[str]:
    if not isinstance(value, dict) or not value.keys() <= {"class_path", "init_args"}:
        return [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    head = [f"--{name}", value["class_path"]] if "class_path" in value else []
    arguments = (value.get("init_args") or {}).items()
    return [*head, *(word for key, given in arguments for word in _words(f"{name}.{key}", given))]
