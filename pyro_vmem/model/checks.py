"""Checks of a model: its parts fit together, and its weights are finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributions import Categorical, Distribution

from pyro_vmem._utils.precision import no_autocast
from pyro_vmem._utils.random_state import forked
from pyro_vmem.memory import Memory, Template
from pyro_vmem.parts import Part

__all__ = ["check_parts", "check_weights"]

SLOTS, TARGETS = 2, 3  # Sizes of the pass on zeros; they differ, so that swapped dims are noticed.


@torch.no_grad()
def check_parts(vma: Any) -> None:
    """Raises a `ValueError` if the parts of a :class:`VMA` do not fit together, as a pass on zeros shows.

    Nothing is changed: the pass runs in evaluation mode, and random states are restored.
    """
    weight = next(vma.parameters(), torch.zeros(()))
    if weight.is_meta:  # sizes without numbers
        return
    modes = [(module, module.training) for module in vma.modules()]
    try:
        # Autocast would cache the rounded weights, and use them after others have been loaded.
        with forked(weight.device), no_autocast(weight):
            _pass_on_zeros(vma.eval(), weight)
    finally:
        for module, mode in modes:
            module.training = mode


def _pass_on_zeros(vma: Any, weight: torch.Tensor) -> None:
    event, x = tuple(vma.event_shape), weight.new_zeros(TARGETS, *vma.event_shape)
    for role in ("template_encoder", "x_encoder"):
        encoder = getattr(vma, role)
        if encoder is not None:
            seen, wanted = _run(vma, role, x), (TARGETS, encoder.num_features)
            if not isinstance(seen, Template) or tuple(seen.features.shape) != wanted:
                expected = f"a Template with features {wanted} of observations {tuple(x.shape)}"
                _refuse(vma, role, expected, seen, "Return Template(x, features), `num_features` of each.")
    memory = vma.encode(Memory(weight.new_zeros(SLOTS, *event), torch.arange(SLOTS, device=weight.device)))
    target, z = vma.encode_x(x), weight.new_zeros(TARGETS, vma.latent_dim)
    template = memory.read(torch.zeros(TARGETS, dtype=torch.long, device=weight.device))
    for role, passed, shape in (("address_prior", (memory,), ()), ("address_guide", (memory, target), (TARGETS,))):
        q = _run(vma, role, *passed)
        if not isinstance(q, Categorical) or not _fits(q, shape, ()) or q.probs.shape[-1] != memory.num_slots:
            expected = f"a Categorical over {memory.num_slots} slots, with batch shape {shape}"
            _refuse(vma, role, expected, q, "Return `pyro_vmem.over_slots(logits, memory)`, of one logit per slot.")
    for role, passed, shape in (
        ("latent_prior", (template,), (vma.latent_dim,)),
        ("latent_guide", (target, template), (vma.latent_dim,)),
        ("likelihood", (z, template), event),
    ):
        p = _run(vma, role, *passed)
        if not isinstance(p, Distribution) or not _fits(p, (TARGETS,), shape):
            remedy = f"Return one of pyro.distributions, with `.to_event({len(shape)})` if its values are independent."
            _refuse(vma, role, f"a distribution with batch shape {(TARGETS,)} and event shape {shape}", p, remedy)


def _fits(p: Distribution, batch: tuple[int, ...], event: tuple[int, ...]) -> bool:
    """Whether a distribution has the event shape, and a batch shape that broadcasts to the plate."""
    broadcasts = all(size in (1, n) for size, n in zip(reversed(p.batch_shape), reversed(batch), strict=False))
    return tuple(p.event_shape) == event and len(p.batch_shape) <= len(batch) and broadcasts


def _run(vma: Any, role: str, *passed: Any) -> Any:
    part = getattr(vma, role)
    try:
        return part(*passed)
    except Exception as error:  # A part of the user may raise anything.
        remedy = "Give it the sizes that the other parts have."
        sizes = {"num_features": vma.template_encoder.num_features, "latent_dim": vma.latent_dim}
        for inner in part.modules():
            arguments = inner.arguments() if isinstance(inner, Part) else {}
            for name, size in sizes.items():
                if arguments.get(name, size) != size:
                    remedy = f"It is for {name}={arguments[name]}, the other parts for {size}. Give all the same."
        raise ValueError(
            f"{role}: {part!r} does not take what the other parts give, on zeros of {tuple(vma.event_shape)}: "
            f"{type(error).__name__}: {error}. {remedy}"
        ) from error


def _refuse(vma: Any, role: str, expected: str, got: Any, remedy: str) -> None:
    shown = type(got).__name__
    if isinstance(got, Distribution):
        shown = f"{shown} with batch shape {tuple(got.batch_shape)} and event shape {tuple(got.event_shape)}"
    elif isinstance(got, Template | torch.Tensor):
        tensor = got.features if isinstance(got, Template) else got
        shown = f"{shown} {tuple(tensor.shape)}"
    raise ValueError(f"{role}: expected {expected}, got {shown} of {getattr(vma, role)!r}. {remedy}")


def check_weights(module: nn.Module) -> None:
    """Raises a `ValueError` if a parameter is not finite, because every measurement would be wrong.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.fill_(float("nan"))
        >>> check_weights(layer)
        Traceback (most recent call last):
        ValueError: vma: 'weight' holds values that are not finite. Build or load it again.
    """
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"vma: {name!r} holds values that are not finite. Build or load it again.")
