"""YAML as plain data."""

from __future__ import annotations

import re
from typing import Any

from pyro_vmem._utils.extras import require

__all__ = ["read_yaml", "write_yaml"]

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def read_yaml(text: str) -> Any:
    """What a text says; no tags, so nothing is run.

    Raises:
        ValueError: If it is not valid.
        ImportError: If PyYAML is not installed.

    Example:
        >>> read_yaml("[1, 1e-3, yes, a]")  # 1e-3 is a number, as in YAML 1.2 and JSON
        [1, 0.001, True, 'a']
    """
    yaml = require("yaml", extra="cli")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """With numbers such as 1e-3."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    try:
        return Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def write_yaml(data: Any) -> str:
    """Plain data as a text that :func:`read_yaml` reads.

    Example:
        >>> print(write_yaml({"steps": 10, "address_guide": {"class_path": "PairwiseGuide"}}), end="")
        steps: 10
        address_guide:
          class_path: PairwiseGuide
    """
    text: str = require("yaml", extra="cli").safe_dump(data, sort_keys=False)
    return text
