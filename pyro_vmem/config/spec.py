"""Specs to objects and back. A spec is plain data that names a class and its arguments.

A spec may come from anywhere, so it runs nothing but the constructors of existing classes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
import reprlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vmem._utils.checks import in_words
from pyro_vmem._utils.guess import guess
from pyro_vmem.parts import Part
from pyro_vmem.parts.part import public_path

__all__ = ["checked", "choices", "from_spec", "spec_of"]

KEYS = ("class_path", "init_args")

# Classes with arguments that only the trainer has. A spec gives the others and becomes a `functools.partial`.
_LATER: dict[type, tuple[str, ...]] = {Optimizer: ("params", "lr"), LRScheduler: ("optimizer",)}

_ONE = re.compile(r"[\w.]+( \| None)?")  # an annotation that is one class
_PLAIN = re.compile(r"Spec|(list\[)?dict\b(?!\[).*")  # annotations of data that stays as it is

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
        builder = _Builder(tuple(trusted_modules), like or {})
        return builder.make(spec, base if isinstance(base, tuple) else (base,), where)
    except RecursionError:
        raise ValueError(f"{where}: it is nested too deeply, or contains itself. Write it out.") from None


def checked(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks arguments of a class against their annotations; raises a `ValueError` that names the first misfit.

    Example:
        >>> from pyro_vmem import StandardPrior
        >>> checked(StandardPrior, {"latent_dim": "many"}, "prior")
        Traceback (most recent call last):
        ValueError: prior.latent_dim: expected a whole number in [1, 1,048,576], got 'many' (str).
    """
    return _Builder((), {}).arguments(cls, values, where)


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
    return _names(_kinds(_annotation(cls, argument)))


class _Builder:
    """Turns plain data into annotated arguments; `where` is the place in the spec, for messages."""

    def __init__(self, trusted: tuple[str, ...], like: Mapping[type, Part]) -> None:
        self.trusted, self.like = trusted, like

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
                f'{where}: expected the name of {_a(bases)}, or {{"class_path": ..., "init_args": {{...}}}}, '
                f"got {_shown(spec)}.{_choices(bases)}"
            )
        for key in spec:
            if key not in KEYS:
                raise ValueError(f"{where}: expected class_path and init_args, got {key!r}.{guess(key, KEYS)}")
        cls = self.named(name, bases, where)
        values = self.arguments(cls, _fitting(cls, self.like) | dict(arguments or {}), where)
        if _later(cls):
            return functools.partial(cls, **values)
        try:
            return cls(**values)
        except ValueError as error:
            message = str(error)
            place = f"{where}." if message.partition(":")[0] in values else f"{where}: "
            raise ValueError(f"{place}{message}") from error

    def named(self, name: str, bases: tuple[type, ...], where: str) -> type:
        """The class with a name or import path that is a subclass of one of the bases."""
        module = name.rpartition(".")[0]
        found = _matches(name, bases)
        if not found and any(f"{module}.".startswith(f"{trusted}.") for trusted in self.trusted):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise  # The module exists, but one that it imports does not.
                raise ValueError(f"{where}: there is no module {module!r}, which {name!r} names.") from error
            found = _matches(name, bases)
        paths = sorted({f"{cls.__module__}.{cls.__qualname__}" for cls in found})
        if len(paths) > 1:
            raise ValueError(
                f"{where}: {name!r} names more than one {bases[0].__name__}: {', '.join(paths)}. Write the whole path."
            )
        if found:
            return found[-1]  # The last definition, if a notebook cell has defined the class again.
        if others := _matches(name, (Part,)):
            kind = next((c for c in others[0].__mro__[1:] if inspect.isabstract(c) and c is not Part), Part)
            why = f", which is {_a((kind,))}."
        elif module and module not in sys.modules:
            why = f". Module {module!r} is not imported, and a spec imports none: import it first, or pass "
            why += f"trusted_modules=[{module.partition('.')[0]!r}]."
        else:
            why = f".{guess(name, _names(bases))}"
        raise ValueError(f"{where}: expected the name of {_a(bases)}, got {name!r}{why}{_choices(bases)}")

    def arguments(self, cls: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The arguments of a class: makes the parts among them; jsonargparse checks the types of all."""
        parser, known = _parser(cls)
        own = _parameters(cls)
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
        made = {name: self.value(v, _annotation(cls, name), f"{where}.{name}") for name, v in given.items()}
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

    def value(self, value: Any, annotation: str, where: str) -> Any:
        """A value with its inner parts made, of the classes that `annotation` allows."""
        if _PLAIN.fullmatch(annotation):
            return value
        kinds = _kinds(annotation)
        if kinds and (value is not None or not annotation.endswith(" | None")) and _ONE.fullmatch(annotation):
            return self.make(value, kinds, where)
        if isinstance(value, Mapping) and ("class_path" in value or (kinds and value.keys() == {"init_args"})):
            return self.make(value, kinds or (Part,), where)
        if isinstance(value, Mapping):
            return {key: self.value(v, annotation, f"{where}.{key}") for key, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self.value(v, annotation, f"{where}[{i}]") for i, v in enumerate(value))
        if isinstance(value, str) and kinds:
            return self.make(value, kinds, where)
        # For an annotation of a function or class, jsonargparse would import any dotted name.
        if isinstance(value, str) and "." in value and not re.search(r"\b(str|Path|Any|Literal)\b|^$", annotation):
            raise _wrong_type(value, annotation, where)
        return value


@functools.cache
def _parser(cls: type) -> tuple[Any, list[str]]:
    """The parser that checks names and types of the arguments of a class, those passed on by `**kwargs` included."""
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


def _kinds(annotation: str) -> tuple[type, ...]:
    """The classes of parts that an annotation names."""
    named = {word.rpartition(".")[2] for word in re.findall(r"[\w.]+", annotation)}
    return tuple(cls for cls in _below(Part) if cls.__name__ in named)


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
        elif parameter.default is parameter.empty and _ONE.fullmatch(annotation):
            for part in (part for part in like.values() if isinstance(part, _kinds(annotation))):
                values.setdefault(name, part)
    return values


def _below(base: type) -> Iterator[type]:
    """A class and its subclasses, with later definitions last."""
    yield base
    subs: list[type] = base.__subclasses__()
    for sub in subs:
        yield from _below(sub)


def _matches(name: str, bases: tuple[type, ...]) -> list[type]:
    """The subclasses of the bases that have a name or import path."""
    module, _, last = name.rpartition(".")
    found = [
        cls
        for cls in dict.fromkeys(sub for base in bases for sub in _below(base))
        if not (inspect.isabstract(cls) or cls is Part)
        and (
            name == f"{cls.__module__}.{cls.__qualname__}"
            or (cls.__name__ == last and (not module or _holds(module, last, cls)))
        )
    ]
    # If the module has another class under the name, a notebook cell has defined it again.
    return [cls for cls in found if _holds(cls.__module__, cls.__qualname__, cls)] or found


def _holds(module: str, name: str, cls: type) -> bool:
    """Whether an imported module has the class under that name, without running any code of it."""
    if module == "pyro_vmem":  # It imports its names lazily.
        return getattr(sys.modules[module], name, None) is cls
    held = sys.modules.get(module)
    return type(held) is types.ModuleType and vars(held).get(name) is cls


def _names(bases: tuple[type, ...]) -> list[str]:
    found = (cls for base in bases for cls in _below(base) if not inspect.isabstract(cls))
    return sorted({cls.__name__ for cls in found if cls not in (Part, *_LATER) and not cls.__name__.startswith("_")})


def _choices(bases: tuple[type, ...]) -> str:
    return f" Choices: {', '.join(_names(bases))}."


def _a(bases: tuple[type, ...]) -> str:
    return " or ".join(f"{'an' if cls.__name__[0] in 'AEIO' else 'a'} {cls.__name__}" for cls in bases)


def _wrong_type(value: Any, annotation: str, where: str) -> ValueError:
    literals = re.findall(r"'([^']*)'|\"([^\"]*)\"", annotation) if "Literal" in annotation else []
    hint = guess(value, ["".join(pair) for pair in literals])
    return ValueError(f"{where}: expected {in_words(annotation) or 'something else'}, got {_shown(value)}.{hint}")


def _shown(value: Any) -> str:
    return f"{_short.repr(value)} ({type(value).__name__})"
