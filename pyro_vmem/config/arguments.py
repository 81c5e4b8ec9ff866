"""The arguments of a class: their names, and their types by jsonargparse."""

from __future__ import annotations

import functools
import inspect
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vmem._utils.checks import in_words
from pyro_vmem._utils.guess import guess
from pyro_vmem.config.names import below
from pyro_vmem.parts import Part

__all__ = ["annotation", "check_names", "checked", "converted", "is_class", "kinds", "later", "parameters"]

# Classes with arguments that only the trainer has.
_LATER: dict[type, tuple[str, ...]] = {Optimizer: ("params", "lr"), LRScheduler: ("optimizer",)}

_short = reprlib.Repr()  # A value that contains itself many times would print without end.
_short.maxstring = _short.maxother = 60


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
    check_names(cls, values, where)
    return converted(cls, dict(values), values, where)


def check_names(cls: type, given: Mapping[str, Any], where: str) -> None:
    """Raises a `ValueError` for arguments that a class does not have, and for the lack of those that it needs."""
    known, own = _parser(cls)[1], parameters(cls)
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


def converted(cls: type, made: dict[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns arguments in the annotated types, or raises a `ValueError` that shows what they were made of, `given`."""
    parser, known = _parser(cls)
    seen = {name: _without_texts(value, annotation(cls, name)) for name, value in made.items() if name in known}
    try:
        parsed = parser.instantiate(parser.parse_object(seen))
    except Exception as error:  # One line of the message of jsonargparse.
        key = re.search(r'Parser key "(\w+)', str(error))
        if key is None or key[1] not in made:
            raise ValueError(f"{where}: {error}") from error
        raise wrong_type(given[key[1]], annotation(cls, key[1]), f"{where}.{key[1]}") from error
    # Pyro annotates the number of plates as float, because its default is infinite, but uses it as an index.
    kept = {n for n, v in made.items() if n not in known or (type(v) is int and parser.get_default(n) == math.inf)}
    kept |= {name for name, value in seen.items() if value is not made[name] and value != made[name]}
    return {name: value if name in kept else parsed[name] for name, value in made.items()}


def _without_texts(value: Any, expected: str) -> Any:
    """Plain data with a word in place of each text that is longer, and is not written in the annotation.

    jsonargparse would read such a text as YAML, or import what it names.
    """
    if isinstance(value, Mapping):
        return {key: _without_texts(v, expected) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_texts(v, expected) for v in value)
    is_text = isinstance(value, str) and not re.fullmatch(r"[\w-]*", value)
    return "text" if is_text and not re.search(rf"(['\"]){re.escape(value)}\1", expected) else value


def wrong_type(value: Any, expected: str, where: str) -> ValueError:
    """The error for a value that its annotation does not allow."""
    literals = re.findall(r"'([^']*)'|\"([^\"]*)\"", expected) if "Literal" in expected else []
    hint = guess(value, ["".join(pair) for pair in literals])
    return ValueError(f"{where}: expected {in_words(expected) or 'something else'}, got {shown(value)}.{hint}")


def shown(value: Any) -> str:
    """A value and its type, for messages."""
    return f"{_short.repr(value)} ({type(value).__name__})"


@functools.cache
def _parser(cls: type) -> tuple[Any, list[str]]:
    """The parser of the arguments of a class, and their names; those passed on by `**kwargs` are included."""
    import jsonargparse  # Imported late: it takes a tenth of a second, and most programs read no spec.

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=later(cls) & parameters(cls).keys(), fail_untyped=False)
    return parser, list(parser.get_defaults().as_dict())


def later(cls: type) -> set[str]:
    """The arguments of a class that only the trainer can give."""
    return {name for base, names in _LATER.items() if issubclass(cls, base) for name in names}


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of the constructor of a class by name."""
    return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])  # type: ignore[misc]


def annotation(cls: type, name: str) -> str:
    """The annotation of an argument as written in the source, because its names may be there for type checkers only."""
    found = next((p for c in cls.__mro__ if "__init__" in vars(c) and (p := parameters(c).get(name))), None)
    if found is None or found.annotation is inspect.Parameter.empty:
        return ""
    return found.annotation if isinstance(found.annotation, str) else inspect.formatannotation(found.annotation)


def is_class(annotation: str) -> bool:
    """Whether an annotation is one class."""
    return re.fullmatch(r"[\w.]+", annotation) is not None


def kinds(annotation: str) -> tuple[type, ...]:
    """The classes of parts that an annotation names."""
    named = {word.rpartition(".")[2] for word in re.findall(r"[\w.]+", annotation)}
    return tuple(cls for cls in below((Part,)) if cls.__name__ in named)
