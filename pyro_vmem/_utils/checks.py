"""Checks of arguments."""

from __future__ import annotations

import operator
from numbers import Integral, Real
from typing import SupportsIndex

__all__ = ["check_count", "check_range"]


def check_count(name: str, value: SupportsIndex, least: int = 1) -> int:
    """A count as an `int`, NumPy's integers included; raises a `ValueError` if it is not whole or is too small.

    Example:
        >>> check_count("num_particles", 2.5)
        Traceback (most recent call last):
        ValueError: num_particles: expected a whole number, got 2.5.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}: expected a whole number, got {value!r}.")
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{name}: expected at least {least}, got {value}.")
    return operator.index(value)


def check_range(name: str, value: float, low: float, high: float, kind: type = float) -> None:
    """Raises a `ValueError` if an argument is not a number in a range; with `kind=int`, not a whole one.

    Example:
        >>> check_range("steps", 0, 1, 100, int)
        Traceback (most recent call last):
        ValueError: steps: expected a whole number in [1, 100], got 0.
    """
    # NumPy's integers and floats are registered as these, so they are taken as Python's own.
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"{name}: expected a {'whole ' * (kind is int)}number in [{low:g}, {high:g}], got {value!r}.")
