"""Checks of what callers pass in, by the annotations of the function they call."""

from __future__ import annotations

import functools
import inspect
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin

import numpy as np
import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from beartype.vale import Is
from jaxtyping import jaxtyped
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.masked import is_masked_tensor
from torch.utils.data import Dataset

__all__ = [
    "Count",
    "Few",
    "Fraction",
    "Limit",
    "NonNegative",
    "NonNegativeInt",
    "Positive",
    "PositiveInt",
    "Probability",
    "Program",
    "Several",
    "Share",
    "Size",
    "check_entries",
    "checked",
    "in_words",
]

_F = TypeVar("_F", bound=Callable[..., Any])


def _within(low: float, high: float) -> Any:
    return Is[lambda value: not isinstance(value, bool) and low <= value <= high]


_TINY = 1e-30  # what is smaller is zero in single precision, or its inverse is infinite
_LARGE = sys.float_info.max

PositiveInt: TypeAlias = Annotated[int, _within(1, 10**12)]
NonNegativeInt: TypeAlias = Annotated[int, _within(0, 2**63)]
Size: TypeAlias = Annotated[int, _within(1, 2**20)]  # of a layer or an image: memory depends on it
Count: TypeAlias = Annotated[int, _within(1, 10**7)]  # of draws, particles, episodes: time or memory depends on it
Few: TypeAlias = Annotated[int, _within(1, 1000)]  # of layers, or of pixels to each side: each has its own weights
Several: TypeAlias = Annotated[int, _within(2, 2**20)]
Positive: TypeAlias = Annotated[float, _within(_TINY, _LARGE)]
Limit: TypeAlias = Annotated[float, _within(_TINY, math.inf)]
NonNegative: TypeAlias = Annotated[float, _within(0, _LARGE)]
Probability: TypeAlias = Annotated[float, _within(0, 1)]
Fraction: TypeAlias = Annotated[float, _within(0, math.nextafter(1, 0))]
Share: TypeAlias = Annotated[float, _within(_TINY, 1 - 1e-7)]

Program: TypeAlias = Callable[..., Any]  # a model or a guide

_WORDS = {
    "Program": "a model or guide that can be called",
    "PositiveInt": "a whole number of at least 1",
    "NonNegativeInt": "a whole number of at least 0",
    "Size": "a whole number in [1, 1,048,576]",
    "Count": "a whole number in [1, 10,000,000]",
    "Few": "a whole number in [1, 1000]",
    "Several": "a whole number in [2, 1,048,576]",
    "Positive": "a positive number",
    "Limit": "a number above 0",
    "NonNegative": "a number of at least 0",
    "Probability": "a number in [0, 1]",
    "Fraction": "a number in [0, 1)",
    "Share": "a number in (0, 1)",
    "int": "a whole number",
    "float": "a number",
}
_CONF = BeartypeConf(is_pep484_tower=True)  # where a float is meant, a whole number will do


def in_words(annotation: Any, names: Mapping[str, Any] = {}) -> str:
    """An annotation as a message gives it; `names` has those of literals.

    Example:
        >>> in_words('Float[Tensor, "B F"] | Count | Literal["sum", "mean"] | None')
        "a tensor of dtype Float and shape (B F) or a whole number in [1, 10,000,000] or 'sum' or 'mean' or None"
    """
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    for name, value in names.items():
        if get_origin(value) is Literal:
            text = re.sub(rf"\b{name}\b", f"Literal{list(get_args(value))}", text)
    text = re.sub(r"(\w+)\[Tensor, '\s*(.*?)'\]", r"a tensor of dtype \1 and shape (\2)", text.replace('"', "'"))
    text = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace(", ", " | "), text)
    return re.sub(r"\w+", lambda word: _WORDS.get(word[0], word[0]), text).replace(" | ", " or ")


def checked(function: _F, inside: bool = True) -> _F:
    """A function that checks its arguments by their annotations: types, ranges, dtypes and shapes.

    Dims of the same name have to agree between arguments. NumPy's numbers are taken as Python's own, and an array or a
    list where a tensor is meant; an array of float64, which is what NumPy makes of any numbers, in torch's default
    dtype. All this ends with `pyro.enable_validation(False)`: arguments then have to be as annotated. With
    `inside=False`, what this library itself calls is not checked.

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
        ValueError: weights: expected a tensor of dtype Float and shape (B), got a tensor of torch.float32 ...
        >>> mean(torch.ones(2, 3), torch.ones(2), 2.5)
        Traceback (most recent call last):
        ValueError: k: expected a whole number of at least 1, got 2.5.
    """
    signature = inspect.signature(function)
    variadic = {name for name, p in signature.parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def entry(*args: Any, **kwargs: Any) -> Any:
        if not is_validation_enabled() or (not inside and _is_ours(sys._getframe(1))):
            return function(*args, **kwargs)
        if not hints:  # at the first call, when all names in the annotations are there
            hints.update({name: _hint(function, name) for name in signature.parameters})
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python says it better
        given = bound.arguments
        with jaxtyped("context"):  # in which a dim of one name has one length
            for name in [name for name in given if name not in variadic]:
                if not _fits(given[name], hints[name]):
                    converted = _converted(given[name])
                    if converted is given[name] or not _fits(converted, hints[name]):
                        raise ValueError(_message(function, name, given, hints[name]))
                    given[name] = converted
        return function(*bound.args, **bound.kwargs)

    return typing.cast(_F, entry)


def check_entries(package: dict[str, Any], in_steps: Collection[str] = ()) -> None:
    """Has the public functions of a package, and the constructors of its public classes, check their arguments.

    Arguments:
        package: Its `globals()`, with `__all__`.
        in_steps: The names of what a training step calls. They check only who calls from outside of the library.
    """
    for name in package["__all__"]:
        entry = package[name]
        inside = name not in in_steps
        if not getattr(entry, "__module__", "").startswith(package["__name__"]):
            continue
        if inspect.isfunction(entry):
            package[name] = checked(entry, inside)
            setattr(sys.modules[entry.__module__], name, package[name])  # where pickle looks for it
        elif inspect.isfunction(vars(entry).get("__init__")) and not hasattr(entry.__init__, "__wrapped__"):
            type.__setattr__(entry, "__init__", checked(entry.__init__, inside))


def _is_ours(frame: types.FrameType | None) -> bool:
    """Whether the library calls, if need be by `dataclasses.replace`, or by Pyro's metaclass of distributions."""
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("pyro.", "dataclasses")):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("pyro_vmem.")


def _hint(function: Callable[..., Any], name: str) -> Any:
    """The annotation of an argument; as a text if its names are imported for type checkers alone."""
    annotation = getattr(function, "__annotations__", {}).get(name, Any)
    one = types.SimpleNamespace(__annotations__={name: annotation})
    try:
        hint = typing.get_type_hints(one, inspect.unwrap(function).__globals__, include_extras=True)[name]
    except NameError:
        return annotation
    bound = getattr(hint, "__bound__", None)  # of a type variable, which may be a text too
    return getattr(bound, "__forward_arg__", bound or hint)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided or is_masked_tensor(value)):
        return False
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (list, tuple, Sequence) and parts:  # of which beartype tries one item only
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        if origin is tuple and parts[-1] is not Ellipsis:
            return len(value) == len(parts) and all(map(_fits, value, parts))
        return all(_fits(item, parts[0]) for item in value)
    if origin is Dataset:  # a list of the same will do
        return hasattr(value, "__getitem__")
    if isinstance(hint, str):  # a class that is not imported here is known by its name
        names = {"None" if value is None else cls.__name__ for cls in type(value).__mro__}
        return bool(names & set(re.findall(r"\w+", hint)))
    if getattr(hint, "_is_protocol", False):  # isinstance would look at the values of properties
        members = {name for name in (*dir(hint), *hint.__annotations__) if not name.startswith("_")}
        return all(hasattr(type(value), name) or hasattr(value, name) for name in members)
    if hint in (int, float):  # where a float is meant, a whole number will do
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if isinstance(hint, type):  # beartype would warn of what those of Pyro are derived from
        return isinstance(value, hint)
    return is_bearable(value, hint, conf=_CONF)


def _converted(value: Any) -> Any:
    """NumPy's numbers as Python's own, and arrays and lists as tensors."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray | list | tuple):
        return value
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):  # of objects, or of rows of different lengths
        return value
    default = isinstance(value, np.ndarray) and tensor.dtype == torch.float64
    return tensor.to(torch.get_default_dtype()) if default else tensor


def _message(function: Callable[..., Any], name: str, given: dict[str, Any], hint: Any) -> str:
    value, function = given[name], inspect.unwrap(function)
    said = f"{name}: expected {in_words(function.__annotations__[name], function.__globals__)}, got {_shown(value)}"
    if inspect.isclass(value):
        return f"{said}. Write {value.__name__}(...), with its arguments."
    if not isinstance(value, Tensor) or value.is_complex():
        plain = isinstance(value, int | float)  # of which what was expected says all
        return f"{said}." if plain else f"{said}. See help({function.__qualname__.removesuffix('.__init__')})."
    if value.dtype == torch.uint8 and _fits(value / 255, hint):
        return f"{said}. Use {name} / 255."
    for method in ("float", "long", "bool", "to_dense"):
        if _fits(getattr(value, method)(), hint):
            return f"{said}. Use {name}.{method}()."
    others = [(other, x) for other, x in given.items() if isinstance(x, Tensor) and other != name]
    return said + "".join(f", where {other} has shape {tuple(x.shape)}" for other, x in others) + "."


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "meta " if value.is_meta else "" if value.layout == torch.strided else "sparse "
        return f"a {kind}tensor of {value.dtype} with shape {tuple(value.shape)}"
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    plain = value is None or isinstance(value, bool | int | float | str | list | tuple)
    return reprlib.repr(value) if plain else type(value).__name__
