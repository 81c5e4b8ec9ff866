"""Checks of what callers pass in, by the annotations of the function they call."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import operator
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Collection
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, SupportsIndex, TypeAlias, TypeVar, get_args, get_origin

import numpy as np
import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from beartype.roar import BeartypeException
from beartype.vale import Is
from jaxtyping import AbstractArray, jaxtyped
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vmem._utils.public_path import public_path

__all__ = [
    "Count",
    "Few",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Probability",
    "Size",
    "check_count",
    "check_entries",
    "check_range",
    "checked",
]

_F = TypeVar("_F", bound=Callable[..., Any])

# Where a float is meant, a whole number will do.
_CONF = BeartypeConf(is_pep484_tower=True)
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
    Tensor: "a tensor",
    os.PathLike[str]: "a path",
    Path: "a path",
}
# What jaxtyping calls a dtype, as people do, and the method that converts to it.
_DTYPES = {"Float": ("floating-point numbers", "float"), "Int": ("integers", "long"), "Integer": ("integers", "long"),
           "Bool": ("True and False", "bool"), "Num": ("numbers", "float"), "Real": ("numbers", "float")}  # fmt: skip


def _whole(low: int, high: float) -> Any:
    hint = Annotated[int, Is[lambda value: not isinstance(value, bool) and low <= value <= high]]
    _WORDS[hint] = f"a whole number of at least {low}" if high == math.inf else f"a whole number in [{low}, {high:,}]"
    return hint


def _real(words: str, accepts: Callable[[float], bool]) -> Any:
    hint = Annotated[float, Is[lambda value: not isinstance(value, bool) and accepts(value)]]
    _WORDS[hint] = words
    return hint


if typing.TYPE_CHECKING:  # to type checkers they are plain numbers
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    Size: TypeAlias = int
    Count: TypeAlias = int
    Few: TypeAlias = int
    PositiveFloat: TypeAlias = float
    Probability: TypeAlias = float
else:
    PositiveInt = _whole(1, math.inf)
    NonNegativeInt = _whole(0, math.inf)
    Size = _whole(1, 2**20)  # of a layer or an image: memory depends on it
    Count = _whole(1, 10**7)  # of draws, particles, episodes: time or memory depends on it
    Few = _whole(1, 1000)  # of layers, or of pixels to each side: each has its own weights
    PositiveFloat = _real("a positive number", lambda value: 1e-30 < value < math.inf)
    Probability = _real("a number in [0, 1]", lambda value: 0 <= value <= 1)


def checked(function: _F) -> _F:
    """A function that checks its arguments by their annotations: types, ranges, dtypes and shapes.

    Dims of the same name have to agree between arguments. NumPy's numbers are taken as Python's own, and an array or a
    list where a tensor is meant; an array of float64, which is what NumPy makes of any numbers, in torch's default
    dtype. All this ends with `pyro.enable_validation(False)`: arguments then have to be as annotated.

    Raises:
        ValueError: If an argument is not as annotated; it says which, what was given and what was expected.

    Example:
        >>> from jaxtyping import Float
        >>> @checked
        ... def mean(x: Float[Tensor, "B F"], weights: Float[Tensor, " B"], k: PositiveInt = 1) -> Tensor:
        ...     return k * (weights @ x)
        >>> mean(np.ones((2, 3)), [0.5, 0.5], np.int64(2))
        tensor([2., 2., 2.])
        >>> mean(torch.ones(2, 3), torch.ones(3))
        Traceback (most recent call last):
        ValueError: weights: expected a tensor of floating-point numbers of shape (B), where x is (B F) = (2, 3), got...
        >>> mean(torch.ones(2, 3), torch.ones(2), 2.5)
        Traceback (most recent call last):
        ValueError: k: expected a whole number of at least 1, got 2.5.
    """
    signature = inspect.signature(function)
    variadic = {name for name, p in signature.parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def entry(*args: Any, **kwargs: Any) -> Any:
        if not is_validation_enabled():
            return function(*args, **kwargs)
        if not hints:  # at the first call, when all names in the annotations are there
            hints.update(_hints(function) or {"return": Any})
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python says it better
        given = bound.arguments
        with jaxtyped("context"):  # in which a dim of one name has one length
            for name, value in given.items():
                hint = hints.get(name, Any)
                if name in variadic:
                    for item in value.values() if isinstance(value, dict) else value:
                        _taken(name, item, hint, {}, {})
                else:
                    given[name] = _taken(name, value, hint, given, hints)
        return function(*bound.args, **bound.kwargs)

    return typing.cast(_F, entry)


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


def check_entries(package: dict[str, Any], but: Collection[str] = ()) -> None:
    """Has the public functions of a package, and the constructors of its public classes, check their arguments.

    Its own modules import from each other's files, whose functions they so call unchecked: only who comes from outside
    is checked.

    Arguments:
        package: Its `globals()`, with `__all__`.
        but: The names of what stays as it is: what a training step makes in numbers.
    """
    for name in package["__all__"]:
        entry = package[name]
        if name in but or not getattr(entry, "__module__", "").startswith(package["__name__"]):
            continue
        if inspect.isfunction(entry):
            package[name] = checked(entry)
            setattr(sys.modules[entry.__module__], name, package[name])  # where pickle looks for it
        elif inspect.isfunction(vars(entry).get("__init__")) and not hasattr(entry.__init__, "__wrapped__"):
            type.__setattr__(entry, "__init__", checked(entry.__init__))


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, without those whose names cannot be resolved."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:  # some are for type checkers alone
        hints: dict[str, Any] = {}
        for name, text in function.__annotations__.items():
            part = types.SimpleNamespace(__annotations__={name: text}, __globals__=function.__globals__)
            try:
                hints |= typing.get_type_hints(part, part.__globals__, include_extras=True)
            except NameError:
                continue
        return hints


def _taken(name: str, value: Any, hint: Any, given: dict[str, Any], hints: dict[str, Any]) -> Any:
    """The value, as it is or converted; raises if it is neither."""
    tensors = _tensors(hint)
    try:
        if _fits(value, hint):
            if tensors and isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
                kind = "a meta tensor, which has no values" if value.is_meta else "a sparse tensor. Use its to_dense()"
                raise ValueError(f"{name}: expected {_words(hint)}, got {kind}.")
            return value
        converted = _converted(value, tensors)
        if converted is not value and _fits(converted, hint):
            return converted
    except BeartypeException:  # an annotation that it cannot check
        return value
    except RuntimeError as error:
        raise ValueError(f"{name}: expected {_words(hint)}, got {_shown(value)} ({error}).") from error
    known = ""
    if tensors and isinstance(converted, Tensor):
        dims = {dim for tensor in tensors for dim in _dims(tensor)}
        for other, other_hint in hints.items():
            for tensor in _tensors(other_hint):
                if other == name:
                    break  # only arguments before it have set lengths
                if dims & _dims(tensor) and isinstance(given.get(other), Tensor):
                    known += f", where {other} is ({tensor.dim_str.strip()}) = {tuple(given[other].shape)}"
            if other == name:
                break
    raise ValueError(f"{name}: expected {_words(hint)}{known}, got {_shown(value)}.{_remedy(name, converted, hint)}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Dataset:  # a list of the same will do, and what is in it is seen as it is read
        return True
    if len(parts := _parts(hint)) > 1:
        return any(_fits(value, part) for part in parts)
    if getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False):
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (list, tuple, collections.abc.Sequence) and arguments:  # of which beartype tries one item only
        if not isinstance(value, collections.abc.Sequence) or isinstance(value, str):
            return False
        if origin is tuple and Ellipsis not in arguments:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return all(_fits(item, arguments[0]) for item in value)
    # Beartype would look into what a class is derived from, and warn of what it finds in those of Pyro.
    if inspect.isclass(hint) and hint not in (float, Any) and origin is None:
        return isinstance(value, hint)
    return is_bearable(value, hint, conf=_CONF)


def _converted(value: Any, tensors: list[Any]) -> Any:
    """NumPy's numbers as Python's own, and arrays and lists as tensors where these are meant."""
    if isinstance(value, np.generic):
        return value.item()
    if not tensors or not isinstance(value, np.ndarray | list | tuple):
        return value
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):  # of objects, or of rows of different lengths
        return value
    default = isinstance(value, np.ndarray) and tensor.dtype == torch.float64
    return tensor.to(torch.get_default_dtype()) if default else tensor


@functools.cache  # asked at every call
def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself."""
    return get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated and hint not in _WORDS else hint


@functools.cache  # asked at every call
def _tensors(hint: Any) -> list[Any]:
    """The members of a hint that are tensors."""
    members = [_bare(part) for part in _parts(hint)]
    return [member for member in members if inspect.isclass(member) and issubclass(member, AbstractArray | Tensor)]


def _dims(tensor: Any) -> set[str]:
    return set(tensor.dim_str.replace("*", "").split()) - {"..."} if hasattr(tensor, "dim_str") else set()


def _words(hint: Any) -> str:
    """A hint in words."""
    *others, last = dict.fromkeys(words for part in _parts(hint) for words in _alternatives(part))
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(hint: Any) -> list[str]:
    """What a hint that is no union stands for, each in words."""
    if hint in _WORDS:
        return [_WORDS[hint]]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _alternatives(arguments[0])
    if origin is typing.Literal:
        return [repr(argument) for argument in arguments]
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        kind = _DTYPES.get(hint.__name__.partition("[")[0], ("numbers", ""))[0]
        shape = "" if hint.dim_str.strip() == "..." else f" of shape ({hint.dim_str.strip()})"
        return [f"a tensor of {kind}{shape}"]
    if origin in (collections.abc.Sequence, list, tuple):
        items = [_words(argument) for argument in arguments if argument is not Ellipsis]
        fixed = origin is tuple and Ellipsis not in arguments
        return [f"({', '.join(items)})" if fixed else f"a list or tuple, each item {items[0]}"]
    if origin is collections.abc.Callable:
        return ["a function"]
    cls = origin or hint
    if not inspect.isclass(cls):
        return [str(hint)]
    path = cls.__name__.lower() if cls.__module__ == "collections.abc" else public_path(cls)
    path = path.removeprefix("builtins.").removeprefix("pathlib.")
    return [f"{'an' if path[0] in 'aeiou' else 'a'} {path}"]


def _shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with shape {value.shape}"
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return reprlib.repr(value)
    plain = isinstance(value, list | tuple) and all(isinstance(item, int | float | str | None) for item in value)
    return f"the {type(value).__name__} {reprlib.repr(value)}" if plain else type(value).__name__


def _remedy(name: str, value: Any, hint: Any) -> str:
    """What to do, where that is plain, or what an annotation says of it: `Annotated[VMA, "Do this."]`."""
    for tensor in _tensors(hint) if isinstance(value, Tensor) else ():
        kind = tensor.__name__.partition("[")[0]
        if kind in _DTYPES and str(value.dtype).removeprefix("torch.") not in tensor.dtypes:
            return f" Convert it, as {name}.{_DTYPES[kind][1]}() does."
    for part in _parts(hint):
        for note in get_args(part)[1:] if get_origin(part) is Annotated else ():
            if isinstance(note, str):
                return f" {note}"
    for cls in map(_bare, _parts(hint)):
        if inspect.isclass(cls) and cls.__module__.startswith("pyro_vmem") and not getattr(cls, "_is_protocol", False):
            if inspect.isclass(value) and issubclass(value, cls):
                return f" Write {value.__name__}(), with its arguments."
            concrete = [c for c in (cls, *cls.__subclasses__()) if not inspect.isabstract(c)]
            return f" Make one, as {public_path(concrete[0])}(...) does." if concrete else ""
    return ""
