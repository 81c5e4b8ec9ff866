"""Checkpoints small enough for the repository: weights in full, the optimizer's moments in half the bits.

A finished run leaves its best weights. An unfinished one leaves what it takes to go on: its last weights, bit for bit,
and in a second file Adam's moments, rounded to bfloat16; so it goes on a little differently than it would have.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vmem.train import load_checkpoint, save_checkpoint

__all__ = ["fingerprint", "pack", "progress", "unpack"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def progress(run: Path) -> dict[str, Any]:
    """What a run's last checkpoint says of it: steps, seconds, history and the rest of `pyro_vmem.FitResult`."""
    if not (run / "last.safetensors").exists():
        return {"steps": 0, "seconds": 0.0, "history": [], "best_bound": -math.inf}
    result: dict[str, Any] = load_checkpoint(run / "last.safetensors")[1]["result"]
    return result


def pack(run: Path, stem: Path, finished: bool) -> list[Path]:
    """Writes `<stem>.safetensors`, and `<stem>-optimizer.safetensors` of an unfinished run.

    Arguments:
        run: The folder that `pyro_vmem.fit` wrote.
        stem: Where to write to, without the suffix.
        finished: Whether the run is over.

    Returns:
        The files that were written.
    """
    weights, moments = stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}-optimizer.safetensors")
    tensors, data = load_checkpoint(run / "last.safetensors")
    if finished:
        best = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
        last = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        save_checkpoint(weights, best or last, data)
        moments.unlink(missing_ok=True)
        return [weights]
    save_checkpoint(
        weights, {n: t for n, t in tensors.items() if n.startswith("model.") or n.endswith("random_state")}, data
    )
    state = {n: t for n, t in tensors.items() if n.startswith("optimizer.")}
    halved = {n: t.bfloat16() if n.endswith(_MOMENTS) else t for n, t in state.items()}
    save_checkpoint(moments, halved, {"steps": data["result"]["steps"]})
    return [weights, moments]


def unpack(stem: Path, run: Path) -> bool:
    """Makes a run's folder of what `pack` wrote of an unfinished one, so that `fit(..., resume=True)` goes on.

    Returns:
        Whether there was one.

    Raises:
        ValueError: If the two files are not of the same step.
    """
    weights, moments = stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}-optimizer.safetensors")
    if not (weights.exists() and moments.exists()):
        return False
    tensors, data = load_checkpoint(weights)
    state, other = load_checkpoint(moments)
    if other["steps"] != data["result"]["steps"]:
        raise ValueError(f"{moments}: it is of step {other['steps']}, {weights.name} of {data['result']['steps']}.")
    # The best weights so far were not kept: the next validation makes its own.
    data["result"]["best_bound"] = -math.inf
    save_checkpoint(run / "last.safetensors", tensors | {n: t.float() for n, t in state.items()}, data)
    return True


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A short name for a set of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
