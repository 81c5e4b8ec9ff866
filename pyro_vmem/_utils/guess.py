"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

__all__ = ["guess"]


def guess(name: Any, names: Sequence[Any]) -> str:
    """` Did you mean 'x'?`, if one of the names is close."""
    close = difflib.get_close_matches(name, names, 1) if isinstance(name, str) else []
    return f" Did you mean {close[0]!r}?" if close else ""
