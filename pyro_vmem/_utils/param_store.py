"""The registration of a module's parameters in Pyro's parameter store."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary, WeakSet

import pyro
import torch
from pyro.params import param_with_module_name
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["ONE_LOSS", "no_store", "register", "register_unnamed"]

_SEPARATOR = param_with_module_name("", "")  # between the name of a module and that of a parameter
# What has been done for the loss that is being computed, by keys of whoever does it; `None` outside of one. Model and
# guide ask for the same: that parameters are told to whoever trains them, and that the input fits.
ONE_LOSS: ContextVar[set[Hashable] | None] = ContextVar("one_loss", default=None)
_STORED: ContextVar[bool] = ContextVar("stored", default=True)
# By identity, because `==` of tensors compares elements.
_REGISTERED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # all tensors put into the store here
_MODULES: WeakSet[nn.Module] = WeakSet()  # all existing modules that have put some there
_NAMES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # of those that the user cannot name


@contextmanager
def no_store() -> Iterator[None]:
    """Turns :func:`register` off, for callers that hold the parameters already.

    Looking up all parameters in the store takes two milliseconds per step.
    """
    token = _STORED.set(False)
    try:
        yield
    finally:
        _STORED.reset(token)


def register(name: str, module: nn.Module) -> None:
    """Calls `pyro.module(name, module)` and makes sure that the store holds the parameters of this module.

    Entries of a module that no longer exists are replaced. Entries read from a file, or set by other means, are copied
    into the parameters of the module.

    Raises:
        RuntimeError: If the store holds parameters of another module that exists, or values of other shapes, or would
            hold a copy.
    """
    if not _STORED.get():
        return
    store = pyro.get_param_store()
    own = {f"{name}{_SEPARATOR}{short}": value for short, value in module.named_parameters() if value.requires_grad}
    stored = dict(store.named_parameters())  # of an unconstrained parameter, the tensor itself
    if others := [full_name for full_name, value in own.items() if stored.get(full_name, value) is not value]:
        _make_way(name, module, own, {full_name: store[full_name] for full_name in others})
    for full_name in own.keys() - store.keys():
        if not own[full_name].is_contiguous():
            raise RuntimeError(
                f"parameter {full_name!r} is not contiguous in memory (channels_last?), so Pyro's parameter store "
                "would train a copy of it. Make it contiguous: the networks here lay out images, not weights."
            )
        _REGISTERED[own[full_name]] = True
    _MODULES.add(module)
    for full_name, parameter in own.items():
        pyro.param(full_name, parameter)


def register_unnamed(stem: str, module: nn.Module) -> None:
    """Registers a module that the user cannot name, as `stem`, or with a number if another existing module has it."""
    if module not in _NAMES:
        names = itertools.chain([stem], (f"{stem}{number}" for number in itertools.count(2)))
        _NAMES[module] = next(name for name in names if name not in _NAMES.values())
    register(_NAMES[module], module)


def _make_way(name: str, module: nn.Module, parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Removes foreign values from the store, unless another existing module owns them."""
    gc.collect()  # A model held only by a reference cycle, such as a traceback, no longer counts as existing.
    living = {id(value) for other in _MODULES if other is not module for value in other.parameters()}
    clash = [n for n, value in others.items() if id(value) in living]
    loaded = {n: value for n, value in others.items() if value not in _REGISTERED}
    clash += [n for n, value in loaded.items() if value.shape != parameters[n].shape]
    if clash:
        raise RuntimeError(
            f"Pyro's parameter store already holds another module's parameters under the name {name!r} "
            f"(first: {clash[0]!r}), so this one would not be trained. Call pyro.clear_param_store() before "
            "you build a new model, or give each model its own name: VMA(..., name='vma2')."
        )
    store = pyro.get_param_store()
    with torch.no_grad():
        for full_name, value in loaded.items():
            parameters[full_name].copy_(value)
    for full_name in list(store.keys()):  # and the entries that this module has no parameter for
        left_over = full_name.startswith(f"{name}{_SEPARATOR}") and store[full_name] in _REGISTERED
        if full_name in others or (left_over and full_name not in parameters and id(store[full_name]) not in living):
            del store[full_name]
