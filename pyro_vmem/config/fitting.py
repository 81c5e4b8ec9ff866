"""Arguments that a spec leaves out: those with which a new part fits into a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyro_vmem.config.arguments import annotation, is_class, kinds, parameters
from pyro_vmem.model import VMA
from pyro_vmem.parts import Part

__all__ = ["fitting", "parts_of"]

_SHAPES = ("latent_dim", "num_features", "event_shape", "map_channels")


def parts_of(vma: VMA) -> list[Part]:
    """The model, its parts and the decoder inside its likelihood, one of each kind."""
    parts: list[Any] = [vma.template_encoder, vma.templates, vma.address_prior, vma.latent_prior, vma.likelihood]
    parts += [getattr(vma.likelihood, "network", None), vma.address_guide, vma.latent_guide, vma]
    return [part for part in parts if isinstance(part, Part)]


def fitting(cls: type, like: Sequence[Part]) -> dict[str, Any]:
    """Arguments that make an object of a class fit the parts `like`.

    A part of the same class gives all its arguments. Otherwise the parts give the lengths and shapes of the same name,
    and a required inner part is the one of its kind.

    Example:
        >>> from pyro_vmem import TruncatedGuide
        >>> fitting(TruncatedGuide, parts_of(VMA.for_vectors(5)))
        {'inner': SimilarityGuide(num_features=64)}
    """
    values: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for part in like:
        if type(part) is cls:
            values |= part.arguments()
        for name in _SHAPES:
            if getattr(part, name, ()):
                shapes.setdefault(name, getattr(part, name))
    shapes["image_shape"] = shapes.get("event_shape")
    for name, parameter in parameters(cls).items() if like else ():
        expected = annotation(cls, name)
        if shapes.get(name) is not None:
            values.setdefault(name, shapes[name])
        elif parameter.default is parameter.empty and is_class(expected):
            for part in (part for part in like if isinstance(part, kinds(expected))):
                values.setdefault(name, part)
    return values
