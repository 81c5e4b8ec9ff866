"""The base class of all swappable parts. A part remembers the arguments it was built with."""

from __future__ import annotations

import abc
import inspect
import sys
from typing import Any, Self

from torch import Tensor, nn

from pyro_vmem._utils.checks import checked
from pyro_vmem._utils.guess import guess

__all__ = ["Part", "public_path"]


class Part(nn.Module, abc.ABC):
    """A module that remembers the arguments it was built with.

    They give its repr and its spec, plain data from which :func:`pyro_vmem.build` builds it again.

    Example:
        >>> from pyro_vmem import StandardPrior
        >>> StandardPrior(latent_dim=8)
        StandardPrior(latent_dim=8)
        >>> StandardPrior()
        StandardPrior()
        >>> StandardPrior(latent_dim=8).spec()
        {'class_path': 'pyro_vmem.StandardPrior', 'init_args': {'latent_dim': 8}}
    """

    _arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]

    def __new__(cls, *args: Any, **kwargs: Any) -> Part:
        part = super().__new__(cls)
        try:
            signature = inspect.signature(cls.__init__)
            bound = signature.bind(part, *args, **kwargs)
            bound.apply_defaults()
            arguments = {name: bound.arguments[name] for name in list(bound.arguments)[1:]}
            for parameter in signature.parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:  # each by its own name
                    arguments |= arguments.pop(parameter.name)
            part.__dict__["_arguments"] = arguments
        except TypeError:  # Wrong arguments, which __init__ reports better, or a copy, which restores __dict__.
            part.__dict__["_arguments"] = {}
        return part

    def __init__(self) -> None:  # whose signature is that of a part without arguments
        super().__init__()

    def __getstate__(self) -> dict[str, Any]:
        # Pyro keeps a weak reference on each parameter to the tensor in its store. It cannot be pickled, and Pyro
        # sets it again when the parameter is next looked up.
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        state: dict[str, Any] = super().__getstate__()  # without what was compiled
        return state

    def arguments(self) -> dict[str, Any]:
        """The arguments of this part, defaults included. A part among them is the one in place now."""
        in_place = {name: getattr(self, name, value) for name, value in self._arguments.items()}
        return {
            name: in_place[name] if isinstance(value, Part) or isinstance(in_place[name], Part) else value
            for name, value in self._arguments.items()
        }

    def spec(self) -> dict[str, Any]:
        """This part as plain data: `{"class_path": ..., "init_args": {...}}`, without its weights."""
        cls = type(self)
        init_args = {name: _plain(value) for name, value in self.arguments().items()}
        return {"class_path": public_path(cls), "init_args": init_args}

    def _with(self, changes: dict[str, Any]) -> Self:
        """The same class with some other arguments; everything else is shared.

        Networks that the constructor makes are made anew if the new arguments need another size.
        """
        arguments = self.arguments()
        for name in changes:
            if name not in arguments:
                hint = guess(name, [*arguments])
                raise ValueError(
                    f"{name}: {type(self).__name__} has no such argument.{hint} It has {', '.join(arguments)}."
                )
        other = type(self)(**(arguments | changes))
        for held in ("_modules", "_parameters", "_buffers"):  # including those that are no argument
            ours, made = getattr(self, held), getattr(other, held)
            for name, value in ours.items():
                if name not in changes and _shapes(value) == _shapes(made.get(name)):
                    made[name] = value
        other.training = self.training
        return other

    def __repr__(self) -> str:
        """The class and all arguments that differ from the defaults."""
        parameters = inspect.signature(type(self).__init__).parameters
        # A list from a spec stands for a tuple.
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in self.arguments().items()}
        given = {name: p.default for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        shown = [f"{name}={_short(v)}" for name, v in values.items() if name not in given or v != given[name]]
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    """The repr of a value; floats have four digits."""
    return repr(float(f"{value:.4g}") if isinstance(value, float) else value)


def public_path(cls: type) -> str:
    """The shortest import path of a class: the outermost package that exports it.

    Specs name classes by this path, so moving a file leaves stored models readable.

    Example:
        >>> from pyro_vmem import StandardPrior
        >>> public_path(StandardPrior), StandardPrior.__module__
        ('pyro_vmem.StandardPrior', 'pyro_vmem.parts.latents')
    """
    packages = cls.__module__.split(".")
    for depth in range(1, len(packages)):
        # By getattr: the outermost package imports its names lazily.
        if getattr(sys.modules.get(".".join(packages[:depth])), cls.__qualname__, None) is cls:
            return f"{'.'.join(packages[:depth])}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _shapes(held: nn.Module | Tensor | None) -> Any:
    """The names and shapes of the tensors of a module."""
    if isinstance(held, nn.Module):
        return {name: value.shape for name, value in held.state_dict().items()}
    return None if held is None else held.shape


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.spec()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return value
