"""YAML as plain data: runs nothing, and limits the size after aliases are expanded."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["read_yaml", "write_yaml"]

MOST_VALUES = 100_000  # after aliases are expanded, which can multiply a few lines without end


def read_yaml(text: str) -> Any:
    """Reads YAML without tags, so nothing is run.

    Raises:
        ValueError: If it is not valid, has a key twice, is nested too deeply, or its aliases make it too large.

    Example:
        >>> read_yaml("[1, 1e-3, yes, a]")  # 1e-3 is a number, as in YAML 1.2 and JSON
        [1, 0.001, True, 'a']
    """
    import yaml
    from jsonargparse import get_loader  # Imported late: it takes a tenth of a second, and most programs read no YAML.

    try:
        # Nodes are counted before values are made, because merge keys (<<) multiply values.
        if (node := yaml.compose(text, Loader=yaml.SafeLoader)) is not None:
            _count(node, {})
        return get_loader("yaml")(text)
    except (yaml.YAMLError, TypeError) as error:  # a TypeError: a key that is a list
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _count(node: Any, known: dict[int, int]) -> int:
    """The number of values of a YAML node with aliases expanded; `known` holds earlier counts."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # the count of a node inside itself: too large
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
