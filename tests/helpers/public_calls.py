"""A valid call of each public function and constructor, recorded from the example in its docstring."""

import contextlib
import doctest
import functools
import inspect
import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pyro

import pyro_vmem as pv


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
            if callable(value) and value not in found.values():
                found[f"{package.__name__}.{name}"] = value
    return found


@functools.cache
def recorded(name: str) -> Call | None:
    """The first call of an entry in its own example; None where there is none."""
    entry: Any = entries()[name]
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

    for test in doctest.DocTestFinder(recurse=False).find(entry, name, module, dict(vars(module))):
        with pyro.get_param_store().scope(), tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            sys.setprofile(watch)
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    runner.run(test, out=io.StringIO().write, clear_globs=False)
            finally:
                sys.setprofile(None)
    return Call(entry, calls[0]) if calls and calls[0].keys() == kinds.keys() else None
