"""From names to classes. A name stands for a class that exists: no module is imported for it unless it is trusted.

jsonargparse imports whatever a class path names. It has a setting against that, but for the whole process of the user.
So names become classes here, and jsonargparse sees no name of a class.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vmem._utils.guess import guess
from pyro_vmem.parts.part import Part, public_path

__all__ = ["below", "class_named", "names_below", "with_article"]


def class_named(name: str, bases: tuple[type, ...], where: str, trusted_modules: Sequence[str] = ()) -> type:
    """The subclass of one of the bases with a name: the bare one, or its path in any module that holds it.

    Raises:
        ValueError: If there is none, or more than one. `where` is the place of the name in a spec, for the message.

    Example:
        >>> from pyro_vmem import AddressPrior
        >>> class_named("UniformPrior", (AddressPrior,), "spec") is class_named(
        ...     "pyro_vmem.UniformPrior", (AddressPrior,), "spec"
        ... )
        True
    """
    module = name.rpartition(".")[0]
    found = _matches(name, bases)
    if not found and any(f"{module}.".startswith(f"{trusted}.") for trusted in trusted_modules):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # The module exists, but one that it imports does not.
            raise ValueError(f"{where}: there is no module {module!r}, which {name!r} names.") from error
        found = _matches(name, bases)
    paths = sorted({_definition(cls) for cls in found})
    if len(paths) > 1:
        raise ValueError(
            f"{where}: {name!r} names more than one {bases[0].__name__}: {', '.join(paths)}. Write the whole path."
        )
    if found:
        return found[-1]  # The last definition, if a notebook cell has defined the class again.
    if others := _matches(name, (Part,)):
        kind = next((c for c in others[0].__mro__[1:] if inspect.isabstract(c) and c is not Part), Part)
        why = f", which is {with_article((kind,))}."
    elif module and module not in sys.modules:
        why = f". Module {module!r} is not imported, and a spec imports none: import it first, or pass "
        why += f"trusted_modules=[{module.partition('.')[0]!r}]."
    else:
        why = f".{guess(name, names_below(bases))}"
    choices = ", ".join(names_below(bases))
    raise ValueError(f"{where}: expected the name of {with_article(bases)}, got {name!r}{why} Choices: {choices}.")


def below(bases: tuple[type, ...]) -> Iterator[type]:
    """Classes and their subclasses, with later definitions last."""
    for base in bases:
        yield base
        subclasses: list[type] = base.__subclasses__()
        yield from below(tuple(subclasses))


def names_below(bases: tuple[type, ...]) -> list[str]:
    """The names of the public classes that are not abstract."""
    names = (cls.__name__ for cls in below(bases) if _is_concrete(cls))
    return sorted({name for name in names if not name.startswith("_")})


def with_article(classes: tuple[type, ...]) -> str:
    """The names of classes in a sentence, such as `an AddressGuide`."""
    return " or ".join(f"{'an' if cls.__name__[0] in 'AEIO' else 'a'} {cls.__name__}" for cls in classes)


def _matches(name: str, bases: tuple[type, ...]) -> list[type]:
    module, _, last = name.rpartition(".")
    found = [
        cls
        for cls in dict.fromkeys(below(bases))
        if cls.__name__ == last
        and _is_concrete(cls)
        and (not module or name in (_definition(cls), public_path(cls)) or _holds(module, last, cls))
    ]
    # If the module has another class under the name, a notebook cell has defined it again.
    return [cls for cls in found if _holds(cls.__module__, cls.__qualname__, cls)] or found


def _is_concrete(cls: type) -> bool:
    return not inspect.isabstract(cls) and cls not in (Part, Optimizer, LRScheduler)  # abstract in all but name


def _definition(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _holds(module: str, name: str, cls: type) -> bool:
    """Whether an imported module has the class under that name, without running any code of it."""
    return inspect.getattr_static(sys.modules.get(module), name, None) is cls
