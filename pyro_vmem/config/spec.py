"""Plain data to parts: names and arguments become the classes and types that annotations ask for."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pyro_vmem.parts import Part

__all__ = ["choices", "class_named", "from_spec"]

KEYS = ("class_path", "init_args")


def from_spec(
    spec: Any, base: type[Part], trusted_modules: Sequence[str] = (), like: Mapping[type[Part], Part] | None = None
) -> Any:
    """The part that a spec stands for; what is refused, and why, says :func:`pyro_vmem.build`.

    Arguments:
        spec: The name of a class, or `{"class_path": ..., "init_args": {...}}`.
        base: What the part has to be.
        trusted_modules: Modules, or packages of modules, that may be imported if a class path names them.
        like: A part for each base class: what a spec does not give is taken from these, as :func:`_fitting` says.

    Raises:
        ValueError: If a name, type or value does not fit.

    Example:
        >>> from pyro_vmem import LatentPrior
        >>> from_spec({"class_path": "StandardPrior", "init_args": {"latent_dim": 8}}, LatentPrior)
        StandardPrior(latent_dim=8)
    """
    if isinstance(trusted_modules, str):
        raise ValueError(f"trusted_modules: expected a list of names, got {trusted_modules!r}. Put it in a list.")
    try:
        return _Builder(tuple(trusted_modules), like or {}).part(spec, base, "spec")
    except RecursionError:
        raise ValueError("spec: it is nested too deeply; a YAML file can contain itself. Write it out.") from None


def choices(cls: type[Part], argument: str) -> list[str]:
    """The names of the classes that an argument of a class can be.

    Example:
        >>> from pyro_vmem import TruncatedGuide
        >>> "PairwiseGuide" in choices(TruncatedGuide, "inner")
        True
    """
    hint = _hints(cls)[argument]
    return [name for base in get_args(hint) or (hint,) if base is not types.NoneType for name in _choice_names(base)]


def class_named(name: str, base: type[Part]) -> type[Part]:
    """The class of that name or import path below another.

    Raises:
        ValueError: If there is none, or more than one.

    Example:
        >>> class_named("UniformPrior", Part).__module__
        'pyro_vmem.parts.address_priors'
    """
    return _Builder((), {}).named(name, base, "name")


class _Builder:
    """Turns plain data into what annotations ask for; `where` is the place in the spec, for messages."""

    def __init__(self, trusted: tuple[str, ...], like: Mapping[type[Part], Part]) -> None:
        self.trusted, self.like = trusted, like

    def part(self, spec: Any, base: type[Part], where: str) -> Any:
        """The part that a name, or a name with arguments, stands for."""
        if isinstance(spec, base):
            return spec
        if isinstance(spec, str):
            spec = {"class_path": spec}
        if isinstance(spec, Mapping) and spec.keys() == {"init_args"} and base in self.like:
            spec = {"class_path": _path(type(self.like[base])), **spec}
        name, arguments = (spec.get(key) for key in KEYS) if isinstance(spec, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, Mapping | None):
            raise ValueError(
                f'{where}: expected the name of {_a(base)}, or {{"class_path": ..., "init_args": {{...}}}}, '
                f"got {_shown(spec)}.{_choices(base)}"
            )
        for key in spec:
            if key not in KEYS:
                raise ValueError(f"{where}: expected class_path and init_args, got {key!r}.{_guess(key, KEYS)}")
        cls = self.named(name, base, where)
        values = self.arguments(cls, _fitting(cls, self.like) | dict(arguments or {}), where)
        try:
            return cls(**values)
        except ValueError as error:
            message = str(error)
            place = f"{where}." if message.partition(":")[0] in values else f"{where}: "
            raise ValueError(f"{place}{message}") from error

    def named(self, name: str, base: type[Part], where: str) -> type[Part]:
        """The class of that name or import path below `base`."""
        module, _, _ = name.rpartition(".")
        found = _matches(name, base)
        if not found and any(module == t or module.startswith(f"{t}.") for t in self.trusted):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise  # it exists, and fails inside on another module
                raise ValueError(f"{where}: there is no module {module!r}, which {name!r} names.") from error
            found = _matches(name, base)
        if len({_path(cls) for cls in found}) > 1:
            paths = ", ".join(sorted(map(_path, found)))
            raise ValueError(f"{where}: {name!r} names more than one {base.__name__}: {paths}. Write the whole path.")
        if not found:
            raise ValueError(f"{where}: expected the name of {_a(base)}, got {name!r}{_why_not(name, base)}")
        return found[-1]  # of a class that was defined again, the last

    def arguments(self, cls: type[Part], given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Arguments of a class, of the types it is annotated with."""
        parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
        named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        others = next((name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD), None)
        for name in given:
            if name not in named and others is None:
                raise ValueError(
                    f"{where}: {cls.__name__} has no argument {name!r}.{_guess(name, named)} "
                    f"Its arguments: {', '.join(named) or 'none'}."
                )
        missing = [name for name in named if parameters[name].default is inspect.Parameter.empty and name not in given]
        if missing:
            raise ValueError(f"{where}: {cls.__name__} needs {', '.join(missing)}. Add what is missing.")
        hints = _hints(cls)
        if others is not None:
            hints = {name: hints.get(others, Any) for name in given if name not in named} | hints
        return {name: self.value(value, hints.get(name, Any), f"{where}.{name}") for name, value in given.items()}

    def value(self, value: Any, hint: Any, where: str) -> Any:
        """A value of an annotated type."""
        origin, args = get_origin(hint) or hint, get_args(hint)
        if origin in (Union, types.UnionType):
            return self.one_of(value, args, where)
        if origin is Literal:
            if value not in args:
                raise ValueError(f"{where}: expected {_either(args)}, got {_shown(value)}.{_guess(value, args)}")
            return value
        if inspect.isclass(origin) and issubclass(origin, Part):
            return self.part(value, origin, where)
        if hint is Any:
            return self.untyped(value, where)
        if origin in (tuple, list, Sequence, Iterable) and isinstance(value, tuple | list):
            return self.elements(value, origin, args, where)
        if origin in (dict, Mapping) and isinstance(value, Mapping):
            of = args[1] if args else Any
            return {key: self.value(v, of, f"{where}.{key}") for key, v in value.items()}
        if origin is float and type(value) is int:
            return float(value)
        if inspect.isclass(origin) and isinstance(value, origin) and not (isinstance(value, bool) and origin is int):
            return value
        raise ValueError(f"{where}: expected {_type_name(hint)}, got {_shown(value)}.")

    def one_of(self, value: Any, hints: tuple[Any, ...], where: str) -> Any:
        if value is None and types.NoneType in hints:
            return None
        others = [hint for hint in hints if hint is not types.NoneType]
        for hint in others[:-1]:
            try:
                return self.value(value, hint, where)
            except ValueError:
                continue
        try:
            return self.value(value, others[-1], where)
        except ValueError:
            if len(others) == 1:
                raise
            raise ValueError(f"{where}: expected {' or '.join(map(_type_name, hints))}, got {_shown(value)}.") from None

    def elements(self, values: Sequence[Any], origin: Any, args: tuple[Any, ...], where: str) -> Any:
        fixed = origin is tuple and Ellipsis not in args and bool(args)
        if fixed and len(values) != len(args):
            raise ValueError(f"{where}: expected {len(args)} values, got {len(values)}.")
        hints = args if fixed else [args[0] if args else Any] * len(values)
        made = [
            self.value(value, hint, f"{where}[{i}]") for i, (value, hint) in enumerate(zip(values, hints, strict=True))
        ]
        return made if origin is list else tuple(made)

    def untyped(self, value: Any, where: str) -> Any:
        """Plain data as it is, and parts in it."""
        if isinstance(value, Mapping):
            if "class_path" in value:
                return self.part(value, Part, where)
            return {key: self.untyped(v, f"{where}.{key}") for key, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self.untyped(v, f"{where}[{i}]") for i, v in enumerate(value))
        return value


def _fitting(cls: type[Part], like: Mapping[type[Part], Part]) -> dict[str, Any]:
    """Arguments of a class that make it fit in among other parts.

    If one of these is of the same class, its arguments. Then the lengths and shapes that go by one name in all parts;
    and for a part that cannot be left out, the one of its kind.
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
    hints = _hints(cls)
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if shapes.get(name) is not None:
            values.setdefault(name, shapes[name])
        elif parameter.default is parameter.empty and inspect.isclass(kind := hints.get(name)):
            for part in (part for part in like.values() if isinstance(part, kind)):
                values.setdefault(name, part)
    return values


def _subclasses(base: type[Part]) -> Iterator[type[Part]]:
    """A class and all below it that can be made; of those defined again (a notebook's cell), the last is last."""
    if not inspect.isabstract(base) and base is not Part:
        yield base
    for sub in base.__subclasses__():
        yield from _subclasses(sub)


def _matches(name: str, base: type[Part]) -> list[type[Part]]:
    """The classes below `base` that a name or an import path stands for."""
    module, _, last = name.rpartition(".")
    found = [
        cls
        for cls in dict.fromkeys(_subclasses(base))
        if name == _path(cls) or (cls.__name__ == last and (not module or _holds(module, last, cls)))
    ]
    # A class that its module no longer means by its name was defined again since, as in a notebook's cell.
    return [cls for cls in found if _holds(cls.__module__, cls.__qualname__, cls)] or found


def _holds(module: str, name: str, cls: type[Part]) -> bool:
    """Whether a module that is imported has the class by that name; asked so that none of its code runs."""
    held = sys.modules.get(module)
    return type(held) is types.ModuleType and vars(held).get(name) is cls


def _path(cls: type[Part]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _hints(cls: type[Part]) -> dict[str, Any]:
    """The annotations of a class's arguments, those that `**kwargs` passes on to its bases included."""
    hints: dict[str, Any] = {}
    for owner in reversed(cls.__mro__):
        if "__init__" in vars(owner):
            try:
                hints |= typing.get_type_hints(vars(owner)["__init__"])
            except (NameError, TypeError):  # it names what only a type checker imports, or nothing at all
                continue
    return hints


def _why_not(name: str, base: type[Part]) -> str:
    """The end of the message that no such class was found."""
    others = _matches(name, Part)
    module = name.rpartition(".")[0]
    if others:
        kind = next((c for c in others[0].__mro__[1:] if inspect.isabstract(c) and c is not Part), Part)
        return f", which is {_a(kind)}.{_choices(base)}"
    if module and module not in sys.modules:
        return (
            f". Module {module!r} is not imported, and a spec imports none: import it first, or pass "
            f"trusted_modules=[{module.partition('.')[0]!r}].{_choices(base)}"
        )
    return f".{_guess(name, _choice_names(base))}{_choices(base)}"


def _choice_names(base: type[Part]) -> list[str]:
    return sorted({cls.__name__ for cls in _subclasses(base) if not cls.__name__.startswith("_")})


def _choices(base: type[Part]) -> str:
    return f" Choices: {', '.join(_choice_names(base))}."


def _guess(name: Any, names: Sequence[Any]) -> str:
    """` Did you mean 'x'?`, if one of the names is close."""
    close = (
        difflib.get_close_matches(name, [n for n in names if isinstance(n, str)], 1) if isinstance(name, str) else []
    )
    return f" Did you mean {close[0]!r}?" if close else ""


def _a(cls: type) -> str:
    return f"{'an' if cls.__name__[0] in 'AEIO' else 'a'} {cls.__name__}"


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(filter(None, [", ".join(map(repr, values[:-1])), repr(values[-1])]))


def _type_name(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) and not get_args(hint) else str(hint).replace("typing.", "")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else f'{text[:60]}...'} ({type(value).__name__})"
