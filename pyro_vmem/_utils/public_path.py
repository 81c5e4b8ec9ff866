"""The import path that a class is known by."""

from __future__ import annotations

import sys

__all__ = ["public_path"]


def public_path(cls: type) -> str:
    """The shortest import path of a class: that of the outermost package that has it under its name.

    A spec names classes by this path, so a file can be moved without making stored models unreadable.

    Example:
        >>> from pyro_vmem import StandardPrior
        >>> public_path(StandardPrior), StandardPrior.__module__
        ('pyro_vmem.StandardPrior', 'pyro_vmem.parts.latents')
    """
    packages = cls.__module__.split(".")
    for depth in range(1, len(packages)):
        module = sys.modules.get(".".join(packages[:depth]))
        if vars(module or object).get(cls.__qualname__) is cls:
            return f"{'.'.join(packages[:depth])}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"
