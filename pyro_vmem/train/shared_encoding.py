"""What was encoded once, gone backward through any number of times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_vmem.memory import EncodedMemory

__all__ = ["encoded_once"]


@contextmanager
def encoded_once(memory: EncodedMemory) -> Iterator[EncodedMemory]:
    """Encodes a memory such that its encoder has one backward pass, however many backward passes read the memory.

    Pyro's own objectives may have one backward pass per particle, which frees its graph. Here gradients are accumulated
    at the encodings. When the block ends, they are backpropagated through the encoder once. The result is the same
    gradient for any objective.
    """
    ends: list[tuple[Tensor, Tensor]] = []

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        ends.append((tensor, tensor.detach().requires_grad_()))
        return ends[-1][1]

    yield memory.map_encoded(lambda encoded: encoded.map(cut))
    reached = [(tensor, end.grad) for tensor, end in ends if end.grad is not None]
    if reached:
        tensors, gradients = zip(*reached, strict=True)
        torch.autograd.backward(tensors, gradients)
