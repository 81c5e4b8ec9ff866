"""From specs to objects and back. A spec is plain data that names a class and its arguments.

A spec may come from anywhere, so it runs nothing but the constructors of existing classes. An object is made after the
objects inside it; jsonargparse then converts the arguments. It does not make the objects itself, because it imports
what a class path names, and needs each argument before those that are left out can be filled in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_vmem._utils.guess import guess
from pyro_vmem.config.arguments import (
    annotation,
    check_names,
    converted,
    is_class,
    kinds,
    later,
    parameters,
    shown,
)
from pyro_vmem.config.fitting import fitting
from pyro_vmem.config.names import class_named, names_below, with_article
from pyro_vmem.parts import Part
from pyro_vmem.parts.part import public_path

__all__ = ["from_spec", "spec_of"]

KEYS = ("class_path", "init_args")


def from_spec(
    spec: Any,
    base: type | tuple[type, ...],
    trusted_modules: Sequence[str] = (),
    like: Sequence[Part] = (),
    where: str = "spec",
) -> Any:
    """Builds the object of a spec, an instance of `base`, or raises a `ValueError` as :func:`pyro_vmem.build` does.

    A class with arguments that only the trainer has becomes a `functools.partial`. The parts `like` complete the spec.
    `where` names it in error messages.

    Example:
        >>> from pyro_vmem import LatentPrior
        >>> from_spec({"class_path": "StandardPrior", "init_args": {"latent_dim": 8}}, LatentPrior)
        StandardPrior(latent_dim=8)
    """
    try:
        return _Builder(trusted_modules, like).make(spec, base if isinstance(base, tuple) else (base,), where)
    except RecursionError:
        raise ValueError(f"{where}: it is nested too deeply, or contains itself. Write it out.") from None


def spec_of(value: Any) -> dict[str, Any]:
    """Returns the spec of an objective, a schedule or a `functools.partial`, with all arguments.

    Example:
        >>> from pyro_vmem.train.schedules import WarmupCosine
        >>> spec_of(WarmupCosine())
        {'class_path': 'pyro_vmem.train.WarmupCosine', 'init_args': {'warmup': 100}}
    """
    cls: Any = value.func if isinstance(value, functools.partial) else type(value)
    own = {n: p.default for n, p in parameters(cls).items() if n not in later(cls) and p.kind is not p.VAR_KEYWORD}
    if isinstance(value, functools.partial):
        own |= value.keywords
    else:  # Objects keep their arguments as attributes of the same name.
        own = {name: getattr(value, name) for name in own if hasattr(value, name)}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in own.items()}
    return {"class_path": public_path(cls), "init_args": plain}


@dataclass(frozen=True)
class _Builder:
    """Makes the objects of a spec, the inner ones first; `where` is the place in the spec, for messages."""

    trusted_modules: Sequence[str]
    like: Sequence[Part]

    def make(self, spec: Any, bases: tuple[type, ...], where: str) -> Any:
        """The object of a name, or of a name with arguments."""
        if isinstance(spec, bases):
            return spec
        if isinstance(spec, str):
            spec = {"class_path": spec}
        there = next((part for part in self.like if isinstance(part, bases)), None)
        if isinstance(spec, Mapping) and spec.keys() == {"init_args"} and there is not None:
            spec = {"class_path": public_path(type(there)), **spec}
        name, arguments = (spec.get(key) for key in KEYS) if isinstance(spec, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, Mapping | None):
            raise ValueError(
                f'{where}: expected the name of {with_article(bases)}, or {{"class_path": ..., "init_args": {{...}}}}, '
                f"got {shown(spec)}. Choices: {', '.join(names_below(bases))}."
            )
        for key in spec:
            if key not in KEYS:
                raise ValueError(f"{where}: expected class_path and init_args, got {key!r}.{guess(key, KEYS)}")
        cls = class_named(name, bases, where, self.trusted_modules)
        given = fitting(cls, self.like) | dict(arguments or {})
        check_names(cls, given, where)
        made = {name: self.value(v, annotation(cls, name), f"{where}.{name}") for name, v in given.items()}
        values = converted(cls, made, given, where)
        if later(cls):
            return functools.partial(cls, **values)
        try:
            return cls(**values)
        except ValueError as error:
            message = str(error)
            place = f"{where}." if message.partition(":")[0] in values else f"{where}: "
            raise ValueError(f"{place}{message}") from error

    def value(self, value: Any, expected: str, where: str) -> Any:
        """A value with the objects inside it made, of the classes that its annotation allows."""
        bases = kinds(expected)
        is_spec = isinstance(value, Mapping) and ("class_path" in value or (bases and value.keys() == {"init_args"}))
        if is_spec or (bases and (isinstance(value, str) or is_class(expected))):
            return self.make(value, bases or (Part,), where)
        if isinstance(value, Mapping):
            return {key: self.value(v, expected, f"{where}.{key}") for key, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self.value(v, expected, f"{where}[{i}]") for i, v in enumerate(value))
        return value
