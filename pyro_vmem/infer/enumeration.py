"""Enumeration whose memory is estimated before it is used."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vmem._utils.checks import Positive
from pyro_vmem._utils.random_state import forked

__all__ = ["EnumGuard", "EnumerationCost", "saved_bytes"]


@dataclass(frozen=True)
class EnumerationCost:
    """The estimated cost of one step of an enumeration."""

    values: int  # joint values of the enumerated sites
    gigabytes: float  # what is kept for the backward pass

    def __str__(self) -> str:
        return f"{self.values:,} values, about {self.gigabytes:.3g} GB per step"


class EnumGuard(TraceEnum_ELBO):
    r"""A `pyro.infer.TraceEnum_ELBO` that estimates its memory use first, and refuses to exceed a limit.

    Enumerating :math:`S` addresses for :math:`B` datapoints takes :math:`S B` decoder passes. Before the first step,
    and when shapes change, the model is run with one and with two values of the enumerated site. The estimate is the
    difference of the two, times the number of values. Parameters and random state stay as they are.

    Arguments:
        max_gigabytes: The most memory a step may take. Default: nine tenths of the free memory, if it is known.
        max_plate_nesting: As in `pyro.infer.ELBO`.

    Raises:
        ValueError: Before anything is enumerated, if the estimate is above the limit, or the limit is not positive.

    Example:
        >>> import pyro_vmem as pv
        >>> from pyro.infer import config_enumerate
        >>> vma, memory, x = pv.VMA.for_vectors(5), pv.Memory(torch.randn(60, 5)), torch.randn(3, 5)
        >>> guide = config_enumerate(vma.guide, "parallel", expand=True)
        >>> EnumGuard(max_plate_nesting=1).cost(vma.model, guide, memory, x).values
        60
        >>> EnumGuard(max_gigabytes=1e-6, max_plate_nesting=1).loss(vma.model, guide, memory, x)
        Traceback (most recent call last):
        ValueError: enumeration: 60 values, about ... GB per step; the limit is 1e-06 GB. ...
    """

    def __init__(self, max_gigabytes: Positive | None = None, max_plate_nesting: float = math.inf) -> None:
        super().__init__(max_plate_nesting=max_plate_nesting)
        self.max_gigabytes = max_gigabytes
        self._accepted: set[tuple[torch.Size, ...]] = set()

    def cost(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> EnumerationCost:
        """Estimates the cost of a step; the arguments are those of `loss`."""
        probe = TraceEnum_ELBO(max_plate_nesting=self.max_plate_nesting)
        one, two = _FirstValues(1), _FirstValues(2)

        def kept(limited: _FirstValues) -> int:
            return saved_bytes(lambda: list(probe._get_traces(model, limited(guide), args, kwargs)))

        with forked(*args, *kwargs.values()), pyro.get_param_store().scope(), torch.enable_grad(), _conflicts():
            first, both = kept(one), kept(two)
        values = math.prod(two.sizes.values())
        return EnumerationCost(values, (first + max(0, both - first) * (values - 1)) / 1e9)

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        tensors = _tensors((*args, *kwargs.values()))
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes in self._accepted:
            yield from super()._get_traces(model, guide, args, kwargs)
            return
        cost, limit = self.cost(model, guide, *args, **kwargs), self.max_gigabytes
        if limit is None:
            limit = 0.9 * _free_bytes(tensors[0].device if tensors else torch.device("cpu")) / 1e9
        if cost.gigabytes > limit:
            raise ValueError(
                f"enumeration: {cost}; the limit is {limit:.3g} GB. Sum fewer values, with pyro_vmem.TruncatedGuide or "
                "RaoBlackwell_ELBO; sample them, with VIMCO_ELBO; take fewer datapoints per step; raise max_gigabytes."
            )
        for traces in super()._get_traces(model, guide, args, kwargs):
            _check_plates(*traces)
            _check_sampled(*traces)
            yield traces
        self._accepted.add(shapes)

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        with _conflicts():
            return super()._get_trace(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_gigabytes={self.max_gigabytes})"


@contextmanager
def _conflicts() -> Iterator[None]:
    """Says what to do where Pyro has no dim for an enumerated site; its advice, a longer history, is for loops only."""
    try:
        yield
    except ValueError as error:
        if "Enumeration dim conflict" not in str(error):
            raise
        raise ValueError(
            f"enumeration: {str(error).splitlines()[0]}: model and guide draw latents that depend on one another in "
            "different orders. Draw them in the model's order, or sample them, by VIMCO_ELBO."
        ) from error


def _check_plates(*traces: Trace) -> None:
    """Refuses a site outside of a plate that depends on what is enumerated in it.

    All elements of the plate are enumerated together, in one dim. A site that sees them all would see them with one and
    the same value only, and Pyro does no more than warn.
    """
    sites: list[Any] = [site for trace in traces for site in trace.nodes.values() if site["type"] == "sample"]
    for enumerated in sites:
        dim = enumerated["infer"].get("_enumerate_dim")
        plates = {frame for frame in enumerated["cond_indep_stack"] if frame.vectorized}
        for site in sites if dim is not None else []:
            shape = site["log_prob"].shape if "log_prob" in site else ()
            if len(shape) >= -dim and shape[dim] > 1 and (left := plates - set(site["cond_indep_stack"])):
                raise ValueError(
                    f"enumeration: {site['name']!r} depends on {enumerated['name']!r}, which plate "
                    f"{min(frame.name for frame in left)!r} has several of. Only cases in which these are equal would "
                    "be summed. Sample instead, by VIMCO_ELBO or Reinforce_ELBO."
                )


def _check_sampled(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuses a latent that is sampled in a plate, not enumerated, if a site outside of the plate may depend on it.

    Pyro takes the score function of such a latent times what lies in all plates of the latent, and nothing else. Of
    dependence only the order of sites is known.
    """
    sites: dict[str, Any] = dict(guide_trace.nodes)
    for name, latent in sites.items():
        if latent["type"] != "sample" or latent["is_observed"] or latent["infer"].get("enumerate"):
            continue
        if not isinstance(latent["score_parts"].score_function, Tensor):
            continue
        plates = {frame for frame in latent["cond_indep_stack"] if frame.vectorized}
        for trace in (model_trace, guide_trace):
            names = list(trace.nodes)
            for later in names[names.index(name) + 1 :] if name in names else names:
                site = trace.nodes[later]
                if site["type"] == "sample" and "log_prob" in site and plates - set(site["cond_indep_stack"]):
                    raise ValueError(
                        f"enumeration: {name!r} is sampled in plates {sorted(frame.name for frame in plates)}, and "
                        f"{later!r}, outside of one of them, comes after it. The gradient would lack the part of the "
                        "latter. Sample all, by VIMCO_ELBO or Reinforce_ELBO."
                    )


class _FirstValues(Messenger):
    """Leaves out all but the first values of the first enumerated site, and all but one of the others."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep
        self.sizes: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["infer"].get("enumerate") != "parallel":
            return
        support = msg["fn"].enumerate_support(expand=msg["infer"].get("expand", False))
        self.sizes[msg["name"]] = len(support)
        first = support[: self.keep if len(self.sizes) == 1 else 1]
        msg["fn"] = copy.copy(msg["fn"])  # Pyro asks for the type, so a wrapper would not be enumerated
        msg["fn"].enumerate_support = lambda expand=True: first


def saved_bytes(run: Callable[[], Any]) -> int:
    """Measures the memory that autograd keeps for the backward pass of a run, in bytes."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def _tensors(values: Any, depth: int = 3) -> list[Tensor]:
    """The tensors among some values, and among the attributes of those that are none: a memory holds its in a store."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif depth and hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
            found += _tensors(vars(value).values(), depth - 1)
    return found


def _free_bytes(device: torch.device) -> float:
    """The memory that a device has left; infinite where neither CUDA nor Linux tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)
