"""Encoders and decoder as `torch.compile` makes them, for as long as they are asked for."""

from __future__ import annotations

import os
import shutil
import sys
from types import TracebackType
from typing import Any

import torch
from torch import nn

from pyro_vmem.model import VMA

__all__ = ["Compiled", "check_compiler"]


class Compiled:
    """A context in which a model's encoders and its decoder run compiled, and all else as it is.

    Names, weights, spec and checkpoints are the same in and out of it. Each network is compiled in its first call,
    which takes a minute or more, and again where sizes change.

    Arguments:
        vma: The model.
        enabled: Whether it does anything.

    Raises:
        ValueError: If there is no C++ compiler.

    Example:
        >>> vma = VMA.for_images((1, 12, 12), latent_dim=4, width=4)
        >>> with Compiled(vma, enabled=False):
        ...     vma.encode_x(torch.rand(2, 1, 12, 12)).features.shape
        torch.Size([2, 128])
    """

    def __init__(self, vma: VMA, enabled: bool = True) -> None:
        self.calls: dict[nn.Module, Any] = {}
        if not enabled:
            return
        check_compiler()
        for module in (vma.template_encoder, vma.x_encoder, vma.likelihood.network):
            if module is not None:
                self.calls[module] = torch.compile(module._call_impl)

    def __enter__(self) -> None:
        for module, call in self.calls.items():
            module._compiled_call_impl = call  # where `nn.Module.compile` puts it, for good

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self.calls:
            module._compiled_call_impl = None


def check_compiler() -> None:
    """Raises a `ValueError` if there is no C++ compiler, which `torch.compile` needs."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compile: torch.compile needs a C++ compiler, and there is no {compiler!r} on the path. Install one, name "
            "another in the environment variable CXX, or leave compile=False."
        )
