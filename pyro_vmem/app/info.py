"""What is here: versions, processor, data and extras; or what a run, a file or a part is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import pyro
import torch

from pyro_vmem._utils.precision import has_bfloat16
from pyro_vmem._utils.version import __version__
from pyro_vmem.app.experiment import Experiment, read_result
from pyro_vmem.config import load
from pyro_vmem.config.spec import class_named
from pyro_vmem.parts import Part
from pyro_vmem.train import load_checkpoint

__all__ = ["about", "about_here"]

Facts = dict[str, Any]

# Where the data sets are looked for, below PYRO_VMEM_DATA.
_PLACES = {
    "omniglot": [
        f"{folder}images_{part}{suffix}"
        for folder in ("", "omniglot/", "omniglot-py/")
        for part in ("background", "evaluation")
        for suffix in ("", ".zip")
    ],
    "mnist": ["binmnist_train.npz", "mnist/binmnist_train.npz", "MNIST"],
}


def about(what: str | Path | None = None) -> Facts:
    """What there is to know of something, as plain data.

    Arguments:
        what: The folder of a run, a `.safetensors` file or the name of a part; by default, this installation.

    Raises:
        ValueError: If it is none of these; the message lists the parts.
        FileNotFoundError: If a folder holds no run.

    Example:
        >>> about("TruncatedGuide")["arguments"]
        {'inner': 'AddressGuide', 'k': 'int = 8'}
        >>> sorted(about())
        ['data', 'devices', 'extras', 'threads', 'versions']
    """
    if what is None:
        return about_here()
    path = Path(what)
    if path.is_dir():
        return _about_run(path)
    if path.is_file():
        return _about_file(path)
    if path.suffix or len(path.parts) > 1:
        raise ValueError(f"what: there is no file and no folder {str(what)!r}. Name a run, a model or a part.")
    return _about_part(str(what))


def about_here() -> Facts:
    """Versions, devices, threads, data sets that are found, and which extras are installed."""
    names = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
    devices = {"cpu": _with_half(torch.device("cpu"), _processor())}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        devices[str(device)] = _with_half(device, torch.cuda.get_device_name(index))
    root = os.environ.get("PYRO_VMEM_DATA")
    found = {"glyphs": "always, with the extra plots"} | {
        name: next((str(Path(root, place)) for place in places if root and Path(root, place).exists()), "not found")
        for name, places in _PLACES.items()
    }
    return {
        "versions": {"pyro_vmem": __version__, **names, "numpy": numpy.__version__},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "data": {"PYRO_VMEM_DATA": root or "not set", **found},
        "extras": _extras(),
    }


def _with_half(device: torch.device, name: str) -> str:
    return f"{name}, bfloat16 {'in hardware' if has_bfloat16(device) else 'not in hardware, so float32'}"


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    text = listed.read_text() if listed.is_file() else ""
    named = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _extras() -> dict[str, str]:
    """What is missing of each extra."""
    try:
        required = importlib.metadata.requires("pyro_vmem") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"extra == '([\w-]+)'", line)
        if extra is None or extra[1] in ("all", "test", "docs", "notebook"):
            continue
        package = re.match(r"[\w.-]+", line)
        assert package is not None
        missing.setdefault(extra[1], [])
        try:
            importlib.metadata.version(package[0])
        except importlib.metadata.PackageNotFoundError:
            missing[extra[1]].append(package[0])
    return {name: f"lacks {', '.join(lacks)}" if lacks else "installed" for name, lacks in sorted(missing.items())}


def _about_run(folder: Path) -> Facts:
    experiment = Experiment.read(folder)
    result = read_result(folder)
    default = asdict(Experiment())
    metrics = folder / "metrics.json"
    facts: Facts = {
        "run": experiment.title,
        "settings": {name: value for name, value in asdict(experiment).items() if value != default[name]},
        "trained": repr(result),
        "files": sorted(path.name for path in folder.iterdir() if path.is_file()),
    }
    if metrics.is_file():
        facts["verdict"] = json.loads(metrics.read_text()).get("verdict")
    return facts | {"model": repr(load(folder)).splitlines()}


def _about_file(path: Path) -> Facts:
    tensors, data = load_checkpoint(path)
    facts: Facts = {"file": str(path), "megabytes": round(path.stat().st_size / 1e6, 2), "tensors": len(tensors)}
    if "result" in data:
        result = data["result"]
        facts["run"] = f"to resume from, after {result['steps']:,} steps, {result['seconds']:.0f} s"
        facts["settings"] = data.get("settings", {})
    if "spec" in data:
        facts["model"] = repr(load(path)).splitlines()
    return facts


def _about_part(name: str) -> Facts:
    cls = class_named(name, Part)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    kinds = [base.__name__ for base in cls.__mro__[1:] if issubclass(base, Part) and base is not Part]
    return {
        "part": f"{cls.__module__}.{cls.__qualname__}",
        "kind": kinds,
        "arguments": {
            p.name: str(p.annotation) + ("" if p.default is p.empty else f" = {p.default!r}")
            for p in parameters
            if p.kind is not p.VAR_KEYWORD
        },
        "text": (inspect.getdoc(cls) or "").splitlines(),
    }
