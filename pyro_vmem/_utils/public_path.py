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
        # By getattr: the outermost package imports its names when the first of them is asked for.
        if getattr(sys.modules.get(".".join(packages[:depth])), cls.__qualname__, None) is cls:
            return f"{'.'.join(packages[:depth])}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"
