"""Draws, data and diagnostics of a VMA in the layout that ArviZ reads.

ArviZ and xarray are optional; they are imported when a function here is called.
"""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegativeInt
from pyro_vmem._utils.extras import require
from pyro_vmem._utils.random_state import seeded
from pyro_vmem._utils.version import __version__
from pyro_vmem.diagnostics.diagnose import describe
from pyro_vmem.diagnostics.slot_weights import GuideDraws, draw_from_guide
from pyro_vmem.memory import EncodedMemory, Memory
from pyro_vmem.model import VMA

if TYPE_CHECKING:
    import xarray

__all__ = ["to_arviz", "to_datatree"]

_SAMPLE = ("chain", "draw")


def to_datatree(
    vma: VMA,
    memory: Memory,
    x: Tensor,
    *,
    num_samples: Count = 200,
    per_slot: Count | Literal[0] = 25,
    labels: Tensor | None = None,
    resample: bool = False,
    seed: NonNegativeInt = 0,
    max_decodes: Count = 1024,
    progress: bool = False,
) -> xarray.DataTree:
    r"""Draws, data and diagnostics as one tree of labelled arrays, which ArviZ, xarray and netCDF understand.

    ======================  ==========================================================================================
    group                   variables
    ======================  ==========================================================================================
    `posterior`             `a` (chain, draw, datapoint), `z` (chain, draw, datapoint, z_dim): draws of the guide
    `prior`                 the same from :math:`p(a | M)\, p(z | m_a)`
    `posterior_predictive`  `x` (chain, draw, datapoint, x_dim_0, ...): a draw of :math:`p(x | z, m_a)` at each
    `sample_stats`          `log_weight` (chain, draw, datapoint): :math:`\log p(x, a, z | M) - \log q(a, z | M, x)`
    `observed_data`         `x` (datapoint, x_dim_0, ...)
    `constant_data`         `template` (slot, x_dim_0, ...), with a datapoint dim if each has its own memory;
                            `slot_label`, `slot_in_use` and `label`, if there are any
    `vi_diagnostics`        what :func:`~pyro_vmem.diagnostics.diagnose` says, from the same draws
    ======================  ==========================================================================================

    There is one chain. Its draws are independent, so ask for `arviz.summary(..., kind="stats")`: what ArviZ says of
    convergence is about chains that are not there, and k-hat in `vi_diagnostics` is what tells. Nor does leaving one
    datapoint out mean anything for local latents.

    The posterior's draws are the guide's, as they are. With `resample` they are drawn again in proportion to their
    weights, with replacement, and stand for the exact posterior as far as k-hat allows; then `log_weight` is that of
    each draw kept, and must not be applied once more.

    Arguments:
        vma: The model and its guide.
        memory: The memory :math:`M`.
        x: The targets, with shape `(B, *event)`.
        num_samples: The number of draws.
        per_slot: Samples of z a slot for the exact address posterior; 0 leaves it out.
        labels: The class of each target, integers `(B,)`.
        resample: Whether to resample draws by their importance weights.
        seed: Seeds the draws; the global random state stays as it is.
        max_decodes: How many decodes to hold in memory at once.
        progress: Whether to show a progress bar.

    Returns:
        The tree. `tree.to_netcdf(path, engine="h5netcdf")` writes it, `xarray.open_datatree` reads it.

    Raises:
        ValueError: If a number is too small, labels do not fit, or memory or x do not fit the model.
        ImportError: If xarray is not installed.

    Example:
        >>> tree = to_datatree(VMA.for_vectors(5, latent_dim=2), Memory(torch.randn(10, 5)), torch.randn(3, 5))
        >>> dict(tree["posterior"].sizes)
        {'chain': 1, 'draw': 200, 'datapoint': 3, 'z_dim': 2}
        >>> tree["vi_diagnostics"]["information_gain"].dims
        ('datapoint',)
    """
    xr = require("xarray", "arviz")
    vma.check(memory, x)
    with torch.no_grad(), seeded(seed):
        start = time.perf_counter()
        encoded = vma.encode(memory)
        draws = draw_from_guide(vma, encoded, x, num_samples, predict=True, max_decodes=max_decodes, progress=progress)
        diagnostics = describe(vma, encoded, x, draws, per_slot, labels, max_decodes=max_decodes, progress=progress)
        groups = _groups(draws, resample) | {"prior": _prior(vma, encoded, len(x), num_samples, max_decodes)}
        seconds = time.perf_counter() - start
    decodes_per_second = diagnostics.attrs["decodes"] / seconds
    diagnostics.attrs.update(seed=seed, seconds=seconds, decodes_per_second=decodes_per_second)
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
        "resampled": int(resample),
        "sampling_time": seconds,
    }
    datasets = {name: _dataset(xr, variables, facts) for name, variables in groups.items()}
    datasets["observed_data"] = _dataset(xr, {"x": (x, ("datapoint", *_event_dims(memory)))}, facts)
    datasets["constant_data"] = _dataset(xr, _constants(encoded, labels), facts)
    datasets["vi_diagnostics"] = diagnostics
    tree: xarray.DataTree = xr.DataTree.from_dict({"/": xr.Dataset(attrs=facts), **datasets})
    return tree


def to_arviz(source: VMA | xarray.DataTree, *args: Any, **kwargs: Any) -> Any:
    """What the installed ArviZ works on: an `arviz.InferenceData` before ArviZ 1.0, a `xarray.DataTree` since.

    Arguments:
        source: A tree of :func:`to_datatree`, or a VMA.
        args: Of a VMA, what :func:`to_datatree` takes: memory and targets.
        kwargs: Its keyword arguments.

    Returns:
        The groups of :func:`to_datatree`.

    Raises:
        ImportError: If ArviZ is not installed.
        ValueError: As of :func:`to_datatree`.

    Example:
        >>> data = to_arviz(VMA.for_vectors(5, latent_dim=2), Memory(torch.randn(10, 5)), torch.randn(3, 5))
        >>> import arviz
        >>> arviz.summary(data, kind="stats").shape[0]  # three addresses, three latents of two dims
        9
    """
    arviz = require("arviz", "arviz")
    tree = to_datatree(source, *args, **kwargs) if isinstance(source, VMA) else source
    if int(arviz.__version__.partition(".")[0]) >= 1:
        return tree
    return arviz.InferenceData.from_datatree(tree)


# Each group's variables: their values and dims.
_Variables = dict[str, tuple[Tensor, tuple[str, ...]]]


def _groups(draws: GuideDraws, resample: bool) -> dict[str, _Variables]:
    """The draws of the guide, or those that their weights choose."""
    assert draws.predicted is not None
    log_weights, rows = draws.log_weights, torch.arange(len(draws.a), device=draws.a.device).unsqueeze(-1)
    if resample:
        rows = torch.distributions.Categorical(logits=log_weights.mT).sample(rows.shape[:1])
    columns = torch.arange(draws.a.shape[1], device=draws.a.device)
    a, z, predicted, log_weights = (v[rows, columns] for v in (draws.a, draws.z, draws.predicted, log_weights))
    event_dims = tuple(f"x_dim_{i}" for i in range(predicted.dim() - 2))
    return {
        "posterior": _latents(a, z),
        "posterior_predictive": {"x": (predicted.unsqueeze(0), (*_SAMPLE, "datapoint", *event_dims))},
        "sample_stats": {"log_weight": (log_weights.unsqueeze(0), (*_SAMPLE, "datapoint"))},
    }


def _prior(vma: VMA, memory: EncodedMemory, size: int, num_samples: int, max_decodes: int) -> _Variables:
    p_a = vma.address_prior(memory)
    a = p_a.sample(torch.Size([num_samples] if memory.per_datapoint else [num_samples, size]))
    # the templates of all draws at once would be many
    z = [vma.latent_prior(memory.read(some)).sample() for some in a.split(max(1, max_decodes // size))]
    return _latents(a, torch.cat(z))


def _latents(a: Tensor, z: Tensor) -> _Variables:
    return {
        "a": (a.unsqueeze(0), (*_SAMPLE, "datapoint")),
        "z": (z.unsqueeze(0), (*_SAMPLE, "datapoint", "z_dim")),
    }


def _constants(memory: Memory, labels: Tensor | None) -> _Variables:
    slot_dims = ("datapoint", "slot") if memory.per_datapoint else ("slot",)
    constants: _Variables = {"template": (memory.templates, (*slot_dims, *_event_dims(memory)))}
    if memory.labels is not None:
        constants["slot_label"] = memory.labels, slot_dims
    if memory.mask is not None:
        constants["slot_in_use"] = memory.mask, slot_dims
    if labels is not None:
        constants["label"] = labels, ("datapoint",)
    return constants


def _event_dims(memory: Memory) -> tuple[str, ...]:
    return tuple(f"x_dim_{i}" for i in range(len(memory.event_shape)))


def _dataset(xr: Any, variables: _Variables, facts: dict[str, Any]) -> xarray.Dataset:
    sizes = {dim: n for value, dims in variables.values() for dim, n in zip(dims, value.shape, strict=True)}
    arrays = {name: (dims, value.detach().cpu().numpy()) for name, (value, dims) in variables.items()}
    dataset: xarray.Dataset = xr.Dataset(arrays, {dim: range(n) for dim, n in sizes.items()}, facts)
    return dataset
