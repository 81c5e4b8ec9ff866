"""From specs to objects and back. A spec is plain data that names a class and its arguments.

A spec may come from anywhere, so it runs nothing but the constructors of existing classes. An object is made after the
objects inside it; jsonargparse then checks and converts the arguments. It does not make the objects itself, because it
imports what a class path names, and needs each argument before those that are left out can be filled in.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vmem._utils.checks import in_words
from pyro_vmem._utils.guess import guess
from pyro_vmem.config.names import below, class_named, names_below, with_article
from pyro_vmem.parts import Part
from pyro_vmem.parts.part import public_path

__all__ = ["checked", "choices", "from_spec", "spec_of"]

KEYS = ("class_path", "init_args")

# Classes with arguments that only the trainer has. A spec gives the others and becomes a `functools.partial`.
_LATER: dict[type, tuple[str, ...]] = {Optimizer: ("params", "lr"), LRScheduler: ("optimizer",)}

_short = reprlib.Repr()  # A value that contains itself many times would print without end.
_short.maxstring = _short.maxother = 60


def from_spec(
    spec: Any,
    base: type | tuple[type, ...],
    trusted_modules: Sequence[str] = (),
    like: Mapping[type, Part] | None = None,
    where: str = "spec",
) -> Any:
    """Builds the object of a spec, an instance of `base`, or raises a `ValueError` as :func:`pyro_vmem.build` does.

    `like` maps base classes to parts whose arguments complete the spec. `where` names the spec in error messages.

    Example:
        >>> from pyro_vmem import LatentPrior
        >>> from_spec({"class_path": "StandardPrior", "init_args": {"latent_dim": 8}}, LatentPrior)
        StandardPrior(latent_dim=8)
    """
    try:
        return _Builder(trusted_modules, like or {}).make(spec, base if isinstance(base, tuple) else (base,), where)
    except RecursionError:
        raise ValueError(f"{where}: it is nested too deeply, or contains itself. Write it out.") from None


def checked(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks and converts arguments of a class by their annotations; the arguments name no classes.

    Raises:
        ValueError: If an argument is unknown, missing or of another type. It names the first one.

    Example:
        >>> from pyro_vmem import StandardPrior
        >>> checked(StandardPrior, {"latent_dim": "many"}, "prior")
        Traceback (most recent call last):
        ValueError: prior.latent_dim: expected a whole number in [1, 1,048,576], got 'many' (str).
    """
    _check_names(cls, values, where)
    return _converted(cls, dict(values), values, where)


def spec_of(value: Any) -> dict[str, Any]:
    """Returns the spec of a part, an objective, a schedule, a class or a `functools.partial`.

    Example:
        >>> from pyro_vmem.train.schedules import WarmupCosine
        >>> spec_of(WarmupCosine())
        {'class_path': 'pyro_vmem.train.WarmupCosine', 'init_args': {'warmup': 100}}
    """
    if isinstance(value, Part):
        return value.spec()
    cls: Any = value.func if isinstance(value, functools.partial) else value if inspect.isclass(value) else type(value)
    later = _later(cls)
    kept = {n: p.default for n, p in _parameters(cls).items() if n not in later and p.kind is not p.VAR_KEYWORD}
    if isinstance(value, functools.partial):
        kept |= value.keywords
    elif value is not cls:  # Objects keep their arguments as attributes of the same name.
        kept = {name: getattr(value, name) for name in kept if hasattr(value, name)}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in kept.items()}
    return {"class_path": public_path(cls), "init_args": plain}


def choices(cls: type, argument: str) -> list[str]:
    """The names of the classes that an argument accepts."""
    return names_below(_kinds(_annotation(cls, argument)))


@dataclass(frozen=True)
class _Builder:
    """Makes the objects of a spec; `where` is the place in the spec, for messages."""

    trusted_modules: Sequence[str]
    like: Mapping[type, Part]

    def make(self, spec: Any, bases: tuple[type, ...], where: str) -> Any:
        """The object of a name, or of a name with arguments."""
        if isinstance(spec, bases):
            return spec
        if isinstance(spec, str):
            spec = {"class_path": spec}
        if isinstance(spec, Mapping) and spec.keys() == {"init_args"} and bases[0] in self.like:
            spec = {"class_path": public_path(type(self.like[bases[0]])), **spec}
        name, arguments = (spec.get(key) for key in KEYS) if isinstance(spec, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, Mapping | None):
            raise ValueError(
                f'{where}: expected the name of {with_article(bases)}, or {{"class_path": ..., "init_args": {{...}}}}, '
                f"got {_shown(spec)}. Choices: {', '.join(names_below(bases))}."
            )
        for key in spec:
            if key not in KEYS:
                raise ValueError(f"{where}: expected class_path and init_args, got {key!r}.{guess(key, KEYS)}")
        cls = class_named(name, bases, where, self.trusted_modules)
        given = _fitting(cls, self.like) | dict(arguments or {})
        _check_names(cls, given, where)
        made = {name: self.value(v, _annotation(cls, name), f"{where}.{name}") for name, v in given.items()}
        values = _converted(cls, made, given, where)
        if _later(cls):
            return functools.partial(cls, **values)
        try:
            return cls(**values)
        except ValueError as error:
            message = str(error)
            place = f"{where}." if message.partition(":")[0] in values else f"{where}: "
            raise ValueError(f"{place}{message}") from error

    def value(self, value: Any, annotation: str, where: str) -> Any:
        """A value with the objects inside it made, of the classes that `annotation` allows."""
        kinds = _kinds(annotation)
        is_spec = isinstance(value, Mapping) and ("class_path" in value or (kinds and value.keys() == {"init_args"}))
        is_name = isinstance(value, str) and kinds
        is_due = _is_one_class(annotation) and kinds and not (value is None and annotation.endswith(" | None"))
        if is_spec or is_name or is_due:
            return self.make(value, kinds or (Part,), where)
        if isinstance(value, Mapping):
            return {key: self.value(v, annotation, f"{where}.{key}") for key, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self.value(v, annotation, f"{where}[{i}]") for i, v in enumerate(value))
        # For an annotation of a function or class, jsonargparse would import any dotted name.
        if isinstance(value, str) and "." in value and not re.search(r"\b(str|Path|Any|Literal)\b|^$", annotation):
            raise _wrong_type(value, annotation, where)
        return value


def _check_names(cls: type, given: Mapping[str, Any], where: str) -> None:
    """Refuses arguments that a class does not have, and the lack of those that it needs."""
    known, own = _parser(cls)[1], _parameters(cls)
    loose = any(p.kind is p.VAR_KEYWORD for p in own.values())
    for name in given:
        if name not in known and not (loose and isinstance(name, str)):
            raise ValueError(
                f"{where}: {cls.__name__} has no argument {name!r}.{guess(name, known)} "
                f"Its arguments: {', '.join(known) or 'none'}."
            )
    needed = [name for name in known if name in own and own[name].default is inspect.Parameter.empty]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{where}: {cls.__name__} needs {', '.join(missing)}. Add what is missing.")


def _converted(cls: type, made: dict[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of the annotated types, by jsonargparse; `given` is what they were made of, for messages."""
    parser, known = _parser(cls)
    try:
        parsed = parser.instantiate(parser.parse_object({name: v for name, v in made.items() if name in known}))
    except Exception as error:  # One line of the message of jsonargparse.
        key = re.search(r'Parser key "(\w+)', str(error))
        if key is None or key[1] not in made:
            raise ValueError(f"{where}: {error}") from error
        raise _wrong_type(given[key[1]], _annotation(cls, key[1]), f"{where}.{key[1]}") from error
    # Pyro annotates the number of plates as float, because its default is infinite, but uses it as an index.
    kept = {n for n, v in made.items() if n not in known or (type(v) is int and parser.get_default(n) == math.inf)}
    return {name: value if name in kept else parsed[name] for name, value in made.items()}


@functools.cache
def _parser(cls: type) -> tuple[Any, list[str]]:
    """The parser of the arguments of a class, and their names; those passed on by `**kwargs` are included."""
    import jsonargparse  # Imported late: it takes a tenth of a second, and most programs read no spec.

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=_later(cls) & _parameters(cls).keys(), fail_untyped=False)
    return parser, list(parser.get_defaults().as_dict())


def _later(cls: type) -> set[str]:
    """The arguments of a class that only the trainer can give."""
    return {name for base, names in _LATER.items() if issubclass(cls, base) for name in names}


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])  # type: ignore[misc]


def _annotation(cls: type, name: str) -> str:
    """The annotation of an argument as written in the source, for names that cannot be resolved."""
    found = next((p for c in cls.__mro__ if "__init__" in vars(c) and (p := _parameters(c).get(name))), None)
    if found is None or found.annotation is inspect.Parameter.empty:
        return ""
    return found.annotation if isinstance(found.annotation, str) else inspect.formatannotation(found.annotation)


def _is_one_class(annotation: str) -> bool:
    return re.fullmatch(r"[\w.]+( \| None)?", annotation) is not None


def _kinds(annotation: str) -> tuple[type, ...]:
    """The classes of parts that an annotation names."""
    named = {word.rpartition(".")[2] for word in re.findall(r"[\w.]+", annotation)}
    return tuple(cls for cls in below((Part,)) if cls.__name__ in named)


def _fitting(cls: type, like: Mapping[type, Part]) -> dict[str, Any]:
    """Arguments that make an object of a class fit other parts.

    A part of the same class gives all its arguments. Otherwise the other parts give the lengths and shapes of the same
    name, and a required inner part is the one of its kind.
    """
    values: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for part in like.values():
        if type(part) is cls:
            values |= part.arguments()
        for name in ("latent_dim", "num_features", "event_shape", "map_channels"):
            if getattr(part, name, ()):
                shapes.setdefault(name, getattr(part, name))
    shapes["image_shape"] = shapes.get("event_shape")
    for name, parameter in _parameters(cls).items() if like else ():
        annotation = _annotation(cls, name)
        if shapes.get(name) is not None:
            values.setdefault(name, shapes[name])
        elif parameter.default is parameter.empty and _is_one_class(annotation):
            for part in (part for part in like.values() if isinstance(part, _kinds(annotation))):
                values.setdefault(name, part)
    return values


def _wrong_type(value: Any, annotation: str, where: str) -> ValueError:
    literals = re.findall(r"'([^']*)'|\"([^\"]*)\"", annotation) if "Literal" in annotation else []
    hint = guess(value, ["".join(pair) for pair in literals])
    return ValueError(f"{where}: expected {in_words(annotation) or 'something else'}, got {_shown(value)}.{hint}")


def _shown(value: Any) -> str:
    return f"{_short.repr(value)} ({type(value).__name__})"
