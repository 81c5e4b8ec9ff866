"""The registration of a module's parameters in Pyro's parameter store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import pyro
from pyro.params import param_with_module_name
from torch import nn

__all__ = ["no_store", "register"]

_STORED: ContextVar[bool] = ContextVar("stored", default=True)


@contextmanager
def no_store() -> Iterator[None]:
    """Within it, :func:`register` does nothing: whoever runs the programs has their parameters from elsewhere.

    To look each of them up in Pyro's store takes two milliseconds a step, whatever its size.
    """
    token = _STORED.set(False)
    try:
        yield
    finally:
        _STORED.reset(token)


def register(name: str, module: nn.Module) -> None:
    """`pyro.module(name, module)`, refusing to train parameters that are not this module's own.

    Raises:
        RuntimeError: If the parameter store holds other parameters under that name, or would hold a copy.
    """
    if not _STORED.get():
        return
    store = pyro.get_param_store()
    for short, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        full_name = param_with_module_name(name, short)
        value = pyro.param(full_name, parameter)  # which a handler may wrap, as pyro.render_model does
        if full_name in store:
            value = store[full_name]
        if value is not parameter:
            if not parameter.is_contiguous():
                raise RuntimeError(
                    f"parameter {short!r} is not contiguous in memory (channels_last?), so Pyro's parameter store "
                    "would train a copy of it. Make it contiguous: the networks here lay out images, not weights."
                )
            raise RuntimeError(
                f"Pyro's parameter store already holds another module's parameters under the name {name!r} "
                f"(first: {full_name!r}), so this one would not be trained. Call pyro.clear_param_store() before "
                "you build a new model, or give each model its own name: VMA(..., name='vma2')."
            )
