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
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args, get_origin

import numpy as np
import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import jaxtyped
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.masked import is_masked_tensor
from torch.utils.data import Dataset

__all__ = ["check_entries", "checked", "converted", "device_named", "in_words"]  # and the names of ranges

_F = TypeVar("_F", bound=Callable[..., Any])
_CONF = BeartypeConf(is_pep484_tower=True)  # where a float is meant, a whole number will do


class _Within(NamedTuple):
    """A range, both ends included, and how a message gives it."""

    low: float
    high: float
    words: str


_TINY = 1e-30  # what is smaller is zero in single precision, or its inverse is infinite
_LARGE = sys.float_info.max

PositiveInt: TypeAlias = Annotated[int, _Within(1, 10**12, "a whole number of at least 1")]
NonNegativeInt: TypeAlias = Annotated[int, _Within(0, 2**63, "a whole number of at least 0")]
# Time or memory depends on these: draws, particles, episodes; the size of a layer or an image; layers with own weights.
Count: TypeAlias = Annotated[int, _Within(1, 10**7, "a whole number in [1, 10,000,000]")]
Size: TypeAlias = Annotated[int, _Within(1, 2**20, "a whole number in [1, 1,048,576]")]
Several: TypeAlias = Annotated[int, _Within(2, 2**20, "a whole number in [2, 1,048,576]")]
Few: TypeAlias = Annotated[int, _Within(1, 1000, "a whole number in [1, 1000]")]
Positive: TypeAlias = Annotated[float, _Within(_TINY, _LARGE, "a positive number")]
Limit: TypeAlias = Annotated[float, _Within(_TINY, math.inf, "a number above 0")]
NonNegative: TypeAlias = Annotated[float, _Within(0, _LARGE, "a number of at least 0")]
Probability: TypeAlias = Annotated[float, _Within(0, 1, "a number in [0, 1]")]
Fraction: TypeAlias = Annotated[float, _Within(0, math.nextafter(1, 0), "a number in [0, 1)")]
Share: TypeAlias = Annotated[float, _Within(_TINY, 1 - 1e-7, "a number in (0, 1)")]
Program: TypeAlias = Callable[..., Any]  # a model or a guide


def in_words(annotation: Any, names: Mapping[str, Any] = {}) -> str:
    """Returns an annotation as text for a message; `names` maps its names to their values.

    Example:
        >>> in_words('Float[Tensor, "B F"] | Count | Literal["sum", "mean"] | None')
        "a tensor of dtype Float and shape (B F) or a whole number in [1, 10,000,000] or 'sum' or 'mean' or None"
    """

    def meaning(found: re.Match[str]) -> str:
        value = names.get(found[0], globals().get(found[0]))
        if get_origin(value) is Literal:
            return " | ".join(map(repr, get_args(value)))
        of_range = get_origin(value) is Annotated and isinstance(get_args(value)[1], _Within)
        plain = {"int": "a whole number", "float": "a number"}.get(found[0], found[0])
        return get_args(value)[1].words if of_range else plain

    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"(\w+)\[Tensor, '\s*(.*?)'\]", r"a tensor of dtype \1 and shape (\2)", text.replace('"', "'"))
    text = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace(", ", " | "), text)
    return re.sub(r"\b[A-Za-z]+\b(?!')", meaning, text).replace(" | ", " or ")


def checked(function: _F, inside: bool = True) -> _F:
    """Wraps a function such that it checks its arguments by their annotations: types, ranges, dtypes and shapes.

    Dims of the same name have to agree between arguments. NumPy numbers are converted to Python numbers. Arrays and
    lists are converted to tensors. Float64 arrays get the default dtype of torch, because float64 is the default of
    NumPy. `pyro.enable_validation(False)` turns checks and conversions off. With `inside=False`, calls by this library
    are not checked.

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
        # `torch.compile` cannot see through the checks, and what it compiles is called by this library.
        if torch.compiler.is_compiling() or not is_validation_enabled() or (not inside and _is_ours(sys._getframe(1))):
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
                    taken = converted(given[name])
                    if taken is given[name] or not _fits(taken, hints[name]):
                        raise ValueError(_message(function, name, given, hints[name]))
                    given[name] = taken
        return function(*bound.args, **bound.kwargs)

    vars(entry)["is_checked"] = True
    return typing.cast(_F, entry)


def check_entries(package: dict[str, Any], in_steps: Collection[str] = (), methods: bool = False) -> None:
    """Makes the public functions of a package, and the constructors of its public classes, check their arguments.

    Arguments:
        package: Its `globals()`, with `__all__`.
        in_steps: The names of functions that training steps call. They check only calls from outside of the library.
        methods: Whether the public methods of these classes check calls from outside, too.
    """
    for name in package["__all__"]:
        entry = package[name]
        inside = name not in in_steps
        if not getattr(entry, "__module__", "").startswith(package["__name__"]):
            continue
        if inspect.isfunction(entry):
            package[name] = checked(entry, inside)
            setattr(sys.modules[entry.__module__], name, package[name])  # where pickle looks for it
            continue
        if inspect.isfunction(own := vars(entry).get("__init__")) and "is_checked" not in vars(own):
            type.__setattr__(entry, "__init__", checked(entry.__init__, inside))
        for method, own in list(vars(entry).items()) if methods and inspect.isclass(entry) else ():
            if method.startswith("_") or method == "forward":  # which only modules call
                continue
            if isinstance(own, classmethod | staticmethod) and "is_checked" not in vars(own.__func__):
                type.__setattr__(entry, method, type(own)(checked(own.__func__, inside=False)))
            elif inspect.isfunction(own) and "is_checked" not in vars(own):
                type.__setattr__(entry, method, checked(own, inside=False))


def _is_ours(frame: types.FrameType | None) -> bool:
    """Whether the library calls, if need be by `dataclasses.replace`, or by Pyro's metaclass of distributions."""
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("pyro.", "dataclasses")):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("pyro_vmem.")


def _hint(function: Callable[..., Any], name: str) -> Any:
    """The annotation of an argument; as a text if its names are imported for type checkers alone."""
    annotation = getattr(function, "__annotations__", {}).get(name, Any)
    one = types.SimpleNamespace(__annotations__={name: annotation})
    # A dataclass has arguments from other modules, where the ranges of this one were imported.
    names = globals() | inspect.unwrap(function).__globals__
    try:
        hint = typing.get_type_hints(one, names, include_extras=True)[name]
    except NameError:
        return annotation
    bound = getattr(hint, "__bound__", None)  # of a type variable, which may be a text too
    return getattr(bound, "__forward_arg__", bound or hint)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(value, Tensor) and (_is_empty(value) or value.layout != torch.strided or is_masked_tensor(value)):
        return False
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Annotated and isinstance(parts[1], _Within):
        return _fits(value, parts[0]) and parts[1].low <= value <= parts[1].high
    if origin in (list, tuple, Sequence) and parts:  # of which beartype tries one item only
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        if origin is tuple and parts[-1] is not Ellipsis:
            return len(value) == len(parts) and all(map(_fits, value, parts))
        return all(_fits(item, parts[0]) for item in value)
    if origin is Dataset:  # a list of the same will do
        return hasattr(value, "__getitem__") and not isinstance(value, str | dict)
    if isinstance(hint, str):  # a class that is not imported here is known by its name
        names = {"None" if value is None else cls.__name__ for cls in type(value).__mro__}
        return bool(names & set(re.findall(r"\w+", hint)))
    if getattr(hint, "_is_protocol", False):  # isinstance would look at the values of properties
        members = {name for name in (*dir(hint), *hint.__annotations__) if not name.startswith("_")}
        return all(hasattr(type(value), name) or hasattr(value, name) for name in members)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if isinstance(hint, type):  # beartype would warn of what those of Pyro are derived from
        return isinstance(value, hint)
    return is_bearable(value, hint, conf=_CONF)


def converted(value: Any) -> Any:
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


def device_named(name: torch.device | str) -> torch.device:
    """The device of a name; raises a `ValueError` if no device has it."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected a name such as 'cpu' or 'cuda', got {name!r}.") from error


def _message(function: Callable[..., Any], name: str, given: dict[str, Any], hint: Any) -> str:
    value, function = given[name], inspect.unwrap(function)
    said = f"{name}: expected {in_words(function.__annotations__[name], function.__globals__)}, got {_shown(value)}"
    if inspect.isclass(value):
        return f"{said}. Write {value.__name__}(...), with its arguments."
    if re.search(r"\bMemory\b", str(function.__annotations__[name])) and isinstance(value, Tensor | np.ndarray | list):
        return f"{said}. Use Memory(templates)."
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


def _is_empty(value: Tensor) -> bool:
    """Whether a tensor has no values; a subclass that says it is on meta may keep its values elsewhere."""
    return value.is_meta and type(value) in (Tensor, torch.nn.Parameter)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "meta " if _is_empty(value) else "" if value.layout == torch.strided else "sparse "
        return f"a {kind}tensor of {value.dtype} with shape {tuple(value.shape)}"
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    plain = value is None or isinstance(value, bool | int | float | str | list | tuple)
    return reprlib.repr(value) if plain else type(value).__name__
