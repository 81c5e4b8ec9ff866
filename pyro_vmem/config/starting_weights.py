"""Weights of one model as the initial weights of a similar one."""

from __future__ import annotations

from pyro_vmem.model import VMA
from pyro_vmem.parts import EncoderGuide, TruncatedGuide

__all__ = ["take_weights"]


def take_weights(vma: VMA, begun: VMA) -> None:
    """Copies the weights of the model `begun` into `vma` as far as they fit.

    Weights of the same name and shape are copied. If a layer now has more channels, its first ones are copied. If the
    address guide now has an encoder of its own, that encoder starts with the weights of the shared one.

    Example:
        >>> one, other = VMA.for_vectors(5), VMA.for_vectors(5)
        >>> take_weights(one, other)
        >>> all(bool((one.state_dict()[name] == tensor).all()) for name, tensor in other.state_dict().items())
        True
    """
    own, taken_from = vma.state_dict(), begun.state_dict()
    inner = begun.address_guide
    if isinstance(vma.address_guide, EncoderGuide) and not isinstance(inner, EncoderGuide):
        inner = inner.inner if isinstance(inner, TruncatedGuide) else inner
        taken_from |= {f"address_guide.inner.{name}": tensor for name, tensor in inner.state_dict().items()}
        encoder = begun.template_encoder.state_dict()
        taken_from |= {f"address_guide.encoder.{name}": tensor for name, tensor in encoder.items()}
    for name, tensor in taken_from.items():
        if name not in own or own[name].shape[1:] != tensor.shape[1:]:
            continue
        taken = own[name][: len(tensor)] if tensor.dim() else own[name]
        if taken.shape == tensor.shape:
            taken.copy_(tensor)
