"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Imports a module of an optional dependency; an `ImportError` has the `pip` command for its extra.

    Example:
        >>> require("math", "plots").sqrt(9.0)
        3.0
        >>> require("no_such_module", "plots")
        Traceback (most recent call last):
            ...
        ImportError: this feature needs no_such_module: pip install '.[plots]' in the clone of pyro_vmem
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # An error inside an installed module is not explained here.
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        package = module.partition(".")[0]
        raise ImportError(
            f"this feature needs {package}: pip install '.[{extra}]' in the clone of pyro_vmem"
        ) from error
