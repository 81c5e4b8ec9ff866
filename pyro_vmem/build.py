"""Specs to objects: the one place where the name of a class becomes the class."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_vmem._extras import require
from pyro_vmem._spec import from_spec
from pyro_vmem.checkpoint import load_checkpoint
from pyro_vmem.vma import VMA

__all__ = ["build", "load"]

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def build(spec: Mapping[str, Any] | str | Path, trusted_modules: Sequence[str] = ()) -> VMA:
    """Builds a model from a spec: plain data that names the classes of its parts.

    A class is named by itself (`"SimilarityGuide"`) or by its import path, and must be a subclass of what the argument
    is annotated with. A subclass of your own is known by its name as soon as it is defined, in a notebook or in a
    module that was imported. `VMA.spec` gives the spec of a model.

    A spec runs nothing but the constructors of parts: a name is looked up among the subclasses that exist already, and
    no module is imported to find one, unless `trusted_modules` names it.

    Arguments:
        spec: The five parts and their arguments, `{"address_guide": {"class_path": ..., "init_args": {...}}, ...}`; a
            whole `{"class_path": ..., "init_args": ...}`; or the path of a JSON or YAML file that holds either. A part
            without arguments is its name alone. In a dict, a part may also be the part itself.
        trusted_modules: Modules, or packages of modules, that may be imported if a class path names them.

    Returns:
        The model, with fresh weights.

    Raises:
        ValueError: If a name, type or value does not fit; the message says where, and lists the choices.
        ImportError: If the file is YAML and PyYAML is not installed: `pip install 'pyro_vmem[cli]'`.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> build(vma.spec()).spec() == vma.spec()
        True
        >>> spec = vma.spec()["init_args"] | {"address_prior": "UniformPior"}
        >>> build(spec)
        Traceback (most recent call last):
        ValueError: spec.address_prior: expected the name of an AddressPrior, got 'UniformPior'. Did you mean
        'UniformPrior'? Choices: ...
    """
    if isinstance(spec, str | Path):
        spec = _read(Path(spec))
    if not isinstance(spec, Mapping):
        raise ValueError(f"spec: expected a dict, or the path of a JSON or YAML file, got {type(spec).__name__}.")
    if "class_path" not in spec:
        spec = {"class_path": "pyro_vmem.vma.VMA", "init_args": spec}
    vma: VMA = from_spec(spec, VMA, trusted_modules)
    return vma


def load(path: str | Path, trusted_modules: Sequence[str] = ()) -> VMA:
    """The model of a run or of a checkpoint, with its weights.

    Arguments:
        path: A `.safetensors` file that :func:`pyro_vmem.fit` wrote, or the folder of a run: then its best weights by
            validation, or the last if there are none.
        trusted_modules: As of :func:`build`: where parts of your own may be imported from.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the file is corrupted or does not hold a model.

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
    vma = build(data["spec"], trusted_modules)
    prefix = "model."  # a checkpoint to resume from holds more than the model
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        vma.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"path: the weights in {str(path)!r} are not those of the model it names: {error}") from error
    return vma.eval()


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"spec: there is no file {str(path)!r}. Give a dict, or the path of a JSON or YAML file.")
    text = path.read_text()
    if path.suffix == ".json":
        data = _parsed(path, json.loads, text, json.JSONDecodeError)
    else:
        yaml = require("yaml", extra="cli")

        class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
            """Reads 1e-3 as a number, as YAML 1.2 and JSON do."""

        Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
        data = _parsed(path, lambda text: Loader(text).get_single_data(), text, yaml.YAMLError)
    if not isinstance(data, dict):
        raise ValueError(f"spec: {str(path)!r} holds {type(data).__name__}, expected a mapping of arguments.")
    return data


def _parsed(path: Path, parse: Callable[[str], Any], text: str, kind: type[Exception]) -> Any:
    try:
        return parse(text)
    except kind as error:
        raise ValueError(f"spec: {str(path)!r} is not valid {path.suffix or 'YAML'} ({error}). Correct it.") from error
