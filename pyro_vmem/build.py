"""Specs to objects: the one place where the name of a class becomes the class."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_vmem._extras import require
from pyro_vmem.checkpoint import load_checkpoint
from pyro_vmem.part import Part
from pyro_vmem.vma import VMA

__all__ = ["build", "load"]


def build(spec: dict[str, Any] | str | Path) -> VMA:
    """Builds a model from a spec: plain data that names the classes of its parts.

    A class is named by itself (`"SimilarityGuide"`) or by its import path; it must be a subclass of what the argument
    is annotated with. `VMA.spec` gives the spec of a model.

    Arguments:
        spec: The five parts and their arguments, `{"address_guide": {"class_path": ..., "init_args": {...}}, ...}`; a
            whole `{"class_path": ..., "init_args": ...}`; or the path of a JSON or YAML file that holds either.

    Returns:
        The model, with fresh weights.

    Raises:
        ValueError: If a name, type or value does not fit; the message lists the choices.
        ImportError: If jsonargparse is not installed: `pip install 'pyro_vmem[cli]'`.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> build(vma.spec()).spec() == vma.spec()
        True
    """
    jsonargparse = require("jsonargparse", extra="cli")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--vma", type=VMA)
    try:
        if isinstance(spec, str | Path):
            spec = _read(Path(spec))
        if not isinstance(spec, dict):
            raise ValueError(f"spec: expected a dict, or the path of a JSON or YAML file, got {type(spec).__name__}.")
        if "class_path" not in spec:
            spec = {"class_path": "pyro_vmem.VMA", "init_args": spec}
        vma: VMA = parser.instantiate(parser.parse_object({"vma": spec})).vma
    except jsonargparse.ArgumentError as error:
        hint = f"\nThe parts of pyro_vmem: {', '.join(sorted(_names(Part)))}." if "mport path" in str(error) else ""
        raise ValueError(f"spec: {error}{hint}") from None  # the parser's own chain says the same five times
    return vma


def load(path: str | Path) -> VMA:
    """The model of a run or of a checkpoint, with its weights.

    Arguments:
        path: A `.safetensors` file that :func:`pyro_vmem.fit` wrote, or the folder of a run: then its best weights by
            validation, or the last if there are none.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the file is corrupted or does not hold a model.
        ImportError: If jsonargparse is not installed: `pip install 'pyro_vmem[cli]'`.

    Example:
        >>> import tempfile
        >>> from pyro_vmem.checkpoint import save_checkpoint
        >>> vma = VMA.for_vectors(5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/best.safetensors", vma.state_dict(), {"spec": vma.spec()})
        ...     print(type(load(folder)).__name__)
        VMA
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "best.safetensors", path / "last.safetensors"]
        path = next((p for p in candidates if p.exists()), candidates[0])
    tensors, data = load_checkpoint(path)
    if "spec" not in data:
        raise ValueError(f"path: {str(path)!r} holds no model. Give a checkpoint that pyro_vmem.fit wrote.")
    vma = build(data["spec"])
    prefix = "model."  # a checkpoint to resume from holds more than the model
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        vma.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"path: the weights in {str(path)!r} are not those of the model it names: {error}") from error
    return vma.eval()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"spec: there is no file {str(path)!r}. Give a dict, or the path of a JSON or YAML file.")
    text = path.read_text()
    if path.suffix == ".json":
        data = _parsed(path, json.loads, text, json.JSONDecodeError)
    else:
        yaml = require("yaml", extra="cli")
        data = _parsed(path, yaml.safe_load, text, yaml.YAMLError)
    if not isinstance(data, dict):
        raise ValueError(f"spec: {str(path)!r} holds {type(data).__name__}, expected a mapping of arguments.")
    return data


def _parsed(path: Path, parse: Callable[[str], Any], text: str, kind: type[Exception]) -> Any:
    try:
        return parse(text)
    except kind as error:
        raise ValueError(f"spec: {str(path)!r} is not valid {path.suffix or 'YAML'} ({error}). Correct it.") from error


def _names(cls: type[Part]) -> set[str]:
    """The names of the public classes of parts that can be made, below this one."""
    below: set[str] = set().union(*(_names(sub) for sub in cls.__subclasses__()))
    made = not inspect.isabstract(cls) and not cls.__name__.startswith("_") and cls is not Part
    return below | {cls.__name__} if made else below
