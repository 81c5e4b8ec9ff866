"""A call of each public function and constructor: that of the example in its docstring, or one by its signature."""

import contextlib
import doctest
import functools
import inspect
import io
import itertools
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from unittest import mock

import pyro
import torch
from jaxtyping import AbstractArray
from torch import Tensor
from torch.utils.data import Dataset

import pyro_vmem as pv
from pyro_vmem._utils.checks import _hint

GLYPHS = pv.data.glyphs


@dataclass(frozen=True)
class Call:
    """A function and the arguments that its example gives it, defaults included."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def __call__(self, **changes: Any) -> Any:
        positional, named = [], {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            value = (self.arguments | changes)[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional += value
            elif parameter.kind is parameter.VAR_KEYWORD:
                named |= value
            elif parameter.kind is parameter.KEYWORD_ONLY:
                named[name] = value
            else:
                positional.append(value)
        return self.function(*positional, **named)


def entries() -> dict[str, Callable[..., Any]]:
    """All that the package and its public folders export and that can be called, by the shortest name."""
    packages = [pv, *(value for name in pv.__all__ if isinstance(value := getattr(pv, name), ModuleType))]
    found: dict[str, Callable[..., Any]] = {}
    for package in packages:
        for name in package.__all__:
            value = getattr(package, name)
            known = not callable(value) or value in found.values()
            # These cannot be made, or are tuples that the library makes.
            other = inspect.isabstract(value) or getattr(value, "_is_protocol", False) or hasattr(value, "_fields")
            if not known and not other:
                found[f"{package.__name__}.{name}"] = value
    return found


def methods() -> dict[str, Callable[..., Any]]:
    """All public methods of these classes that check their arguments."""
    found: dict[str, Callable[..., Any]] = {}
    for name, entry in entries().items():
        for method in vars(entry) if inspect.isclass(entry) else ():
            value = getattr(entry, method)
            if not method.startswith("_") and getattr(value, "is_checked", False):
                found[f"{name}.{method}"] = value
    return found


def call_of(name: str) -> Call:
    """The call to change: as in the example, or with arguments made by their annotations."""
    found = recorded(name)
    if found is None:
        entry: Any = (entries() | methods())[name]
        function = inspect.unwrap(entry.__init__ if inspect.isclass(entry) else entry)
        kinds = inspect.signature(entry).parameters
        found = Call(entry, {key: _default(function, key, kind) for key, kind in kinds.items() if key != "self"})
        if "self" in kinds:
            of_class = recorded(name.rpartition(".")[0])
            found.arguments["self"] = None if of_class is None else of_class()
    return found


def _default(function: Any, name: str, parameter: inspect.Parameter) -> Any:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return () if parameter.kind is parameter.VAR_POSITIONAL else {}
    return _made(_hint(function, name)) if parameter.default is parameter.empty else parameter.default


def _made(hint: Any) -> Any:
    """A value that an annotation allows."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _made(parts[0])
    if origin is Annotated:
        return 0.5 if parts[0] is float else 3
    if origin is Literal:
        return parts[0]
    if origin in (Sequence, tuple, list):
        return [_made(part) for part in parts if part is not Ellipsis]
    if origin is Dataset:
        return [pv.data.Episode(pv.Memory(torch.rand(3, 4)), torch.rand(2, 4))]
    if isinstance(hint, type) and issubclass(hint, Tensor | AbstractArray):
        return torch.rand(2, 4)
    if isinstance(hint, type):
        for name, entry in entries().items():
            if inspect.isclass(entry) and issubclass(entry, hint) and (found := recorded(name)) is not None:
                return found()
    return {int: 3, float: 0.5, str: "none", bool: True}.get(hint, ".")


@functools.cache
def small_glyphs(**arguments: Any) -> pv.data.FewShotDataset:
    """The data set of most examples, made once, and not while each call is watched."""
    before = sys.getprofile()
    sys.setprofile(None)
    try:
        return GLYPHS(**arguments)
    finally:
        sys.setprofile(before)


@functools.cache
def recorded(name: str) -> Call | None:
    """The first call of an entry in its own example; None where there is none."""
    entry: Any = (entries() | methods())[name]
    owners = [entry] if name in entries() else [entry, entries()[name.rpartition(".")[0]]]
    function = inspect.unwrap(entry.__init__ if inspect.isclass(entry) else entry)
    code = getattr(function, "__code__", None)
    kinds = inspect.signature(entry).parameters
    module = sys.modules[entry.__module__]
    calls: list[dict[str, Any]] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        of_class = not inspect.isclass(entry) or type(frame.f_locals.get("self")) is entry
        if event == "call" and frame.f_code is code and not calls and of_class:
            calls.append({key: frame.f_locals[key] for key in kinds if key in frame.f_locals})
            raise KeyboardInterrupt  # the only exception that ends a doctest; the call itself need not run

    finder = doctest.DocTestFinder(recurse=False)
    for test in itertools.chain(*(finder.find(owner, name, module, dict(vars(module))) for owner in owners)):
        aside = (pyro.get_param_store().scope(), mock.patch.object(pv.data, "glyphs", small_glyphs))
        with aside[0], aside[1], tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            sys.setprofile(watch)
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    runner.run(test, out=io.StringIO().write, clear_globs=False)
            finally:
                sys.setprofile(None)
    return Call(entry, calls[0]) if calls and calls[0].keys() == kinds.keys() else None
