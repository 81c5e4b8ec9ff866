"""Draws, data and diagnostics of a VMA in the layout of ArviZ.

ArviZ and xarray are optional: a call imports them.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.extras import require
from pyro_vmem._utils.random_state import seeded
from pyro_vmem._utils.version import __version__
from pyro_vmem.diagnostics.diagnose import labelled, measure
from pyro_vmem.memory import EncodedMemory, Memory
from pyro_vmem.model import VMA

if TYPE_CHECKING:
    import xarray

__all__ = ["to_arviz", "to_datatree"]

_SAMPLE = ("chain", "draw", "datapoint")


def to_datatree(
    vma: VMA,
    memory: Memory,
    x: Tensor,
    *,
    num_samples: Count = 200,
    per_slot: Count | Literal[0] = 25,
    labels: Tensor | None = None,
    seed: NonNegativeInt = 0,
    max_decodes: Count = 1024,
    progress: bool = False,
) -> xarray.DataTree:
    r"""Draws, data and diagnostics as one tree of labelled arrays, which ArviZ, xarray and netCDF understand.

    ======================  ==========================================================================================
    group                   variables
    ======================  ==========================================================================================
    `posterior`             `a` (chain, draw, datapoint), `z` (chain, draw, datapoint, z_dim): draws of the guide
    `prior`                 `a` and `z` as above, drawn from :math:`p(a | M)\, p(z | m_a)`
    `posterior_predictive`  `x` (chain, draw, datapoint, x_dim_0, ...): one draw of :math:`p(x | z, m_a)` per draw
    `sample_stats`          `log_weight` (chain, draw, datapoint): :math:`\log p(x, a, z | M) - \log q(a, z | M, x)`
    `observed_data`         `x` (datapoint, x_dim_0, ...)
    `constant_data`         `template` (slot, x_dim_0, ...), with a datapoint dim if each has its own memory;
                            `slot_label`, `slot_in_use` and `label`, if there are any
    `vi_diagnostics`        the variables of :func:`~pyro_vmem.diagnostics.diagnose`, from the same draws
    ======================  ==========================================================================================

    There is one chain of independent draws. The convergence diagnostics of ArviZ do not apply to it, so call
    `arviz.summary(..., kind="stats")`; k-hat in `vi_diagnostics` says how far the draws can be trusted.

    The draws of the posterior are those of the guide. Resampled by the weights `exp(log_weight)`, they are draws of the
    exact posterior.

    Arguments:
        num_samples: The number of draws.
        per_slot: Samples of z per slot for the exact address posterior; 0 leaves it out.
        labels: The class of each target, integers `(B,)`.

    Returns:
        The tree. `tree.to_netcdf(path, engine="h5netcdf")` writes it, `xarray.open_datatree` reads it.

    Raises:
        ValueError: If labels, memory or x do not fit the model.
        ImportError: If xarray is not installed.

    Example:
        >>> tree = to_datatree(VMA.for_vectors(5, latent_dim=2), Memory(torch.randn(10, 5)), torch.randn(3, 5))
        >>> dict(tree["posterior"].sizes)
        {'chain': 1, 'draw': 200, 'datapoint': 3, 'z_dim': 2}
        >>> tree["vi_diagnostics"]["information_gain"].dims
        ('datapoint',)
    """
    xr = require("xarray", "arviz")
    settings: dict[str, Any] = {"num_samples": num_samples, "per_slot": per_slot, "labels": labels}
    settings |= {"max_decodes": max_decodes, "progress": progress}
    with torch.no_grad(), seeded(seed):
        diagnostics, encoded, draws = measure(vma, memory, x, predict=True, **settings)
        prior = _of_prior(vma, encoded, len(x), num_samples, max_decodes)
    diagnostics.attrs.update(num_samples=num_samples, seed=seed)
    facts = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "inference_library": "pyro_vmem",
        "inference_library_version": __version__,
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "title": diagnostics.attrs["title"],
        "model": repr(vma),
        "num_samples": num_samples,
        "seed": seed,
        "sampling_time": diagnostics.attrs["seconds"],
    }
    event_dims = tuple(f"x_dim_{i}" for i in range(len(memory.event_shape)))
    slot_dims = ("datapoint", "slot") if memory.per_datapoint else ("slot",)
    assert draws.predicted is not None
    groups: dict[str, _Variables] = {
        "posterior": _latents(draws.a, draws.z),
        "posterior_predictive": {"x": ((*_SAMPLE, *event_dims), draws.predicted.unsqueeze(0))},
        "sample_stats": {"log_weight": (_SAMPLE, draws.log_weights.unsqueeze(0))},
        "prior": prior,
        "observed_data": {"x": (("datapoint", *event_dims), x)},
    }
    constants = {
        "template": ((*slot_dims, *event_dims), encoded.templates),
        "slot_label": (slot_dims, encoded.labels),
        "slot_in_use": (slot_dims, encoded.mask),
        "label": (("datapoint",), labels),
    }
    groups["constant_data"] = {name: (dims, value) for name, (dims, value) in constants.items() if value is not None}
    datasets = {name: labelled(variables, facts) for name, variables in groups.items()}
    everything = {"/": xr.Dataset(attrs=facts), **datasets, "vi_diagnostics": diagnostics}
    tree: xarray.DataTree = xr.DataTree.from_dict(everything)
    return tree


def to_arviz(tree: xarray.DataTree) -> Any:
    """Returns what the installed ArviZ works on: an `arviz.InferenceData` before 1.0, a `xarray.DataTree` since.

    Raises:
        ImportError: If ArviZ is not installed.

    Example:
        >>> tree = to_datatree(VMA.for_vectors(5, latent_dim=2), Memory(torch.randn(10, 5)), torch.randn(3, 5))
        >>> import arviz
        >>> arviz.summary(to_arviz(tree), kind="stats").shape[0]  # three addresses, three latents of two dims
        9
    """
    arviz = require("arviz", "arviz")
    return tree if int(arviz.__version__.partition(".")[0]) >= 1 else arviz.InferenceData.from_datatree(tree)


# The variables of a group: their dims and values.
_Variables = dict[str, tuple[tuple[str, ...], Tensor]]


def _of_prior(vma: VMA, memory: EncodedMemory, size: int, num_samples: int, max_decodes: int) -> _Variables:
    a = vma.address_prior(memory).sample(torch.Size([num_samples] if memory.per_datapoint else [num_samples, size]))
    # Some at a time: the templates of all draws may not fit into memory.
    z = [vma.latent_prior(memory.read(some)).sample() for some in a.split(max(1, max_decodes // size))]
    return _latents(a, torch.cat(z))


def _latents(a: Tensor, z: Tensor) -> _Variables:
    return {"a": (_SAMPLE, a.unsqueeze(0)), "z": ((*_SAMPLE, "z_dim"), z.unsqueeze(0))}
