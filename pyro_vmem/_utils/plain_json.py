"""Plain values in JSON files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pyro_vmem._utils.files import write_atomically

__all__ = ["as_plain", "write_json"]


def as_plain(values: Any) -> Any:
    """Values as JSON can hold them: null for what is no number, such as the standard error of one episode.

    Example:
        >>> as_plain({"nll_se": math.nan, "count": [1, math.inf]})
        {'nll_se': None, 'count': [1, None]}
    """
    if isinstance(values, dict):
        return {name: as_plain(value) for name, value in values.items()}
    if isinstance(values, list):
        return [as_plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with write_atomically(path) as aside:
        aside.write_text(json.dumps(as_plain(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")
