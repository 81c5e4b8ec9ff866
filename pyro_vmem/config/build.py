"""Specs to objects: the one place where the name of a class becomes the class."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vmem._utils.files import versions_of
from pyro_vmem._utils.plain_yaml import read_yaml
from pyro_vmem.config.spec import from_spec
from pyro_vmem.model import VMA
from pyro_vmem.parts import (
    AddressGuide,
    AddressPrior,
    Decoder,
    Encoder,
    LatentGuide,
    LatentPrior,
    Likelihood,
    Part,
    Templates,
)
from pyro_vmem.train import load_checkpoint
from pyro_vmem.train.checkpoint import load_newest, save_checkpoint
from pyro_vmem.train.folder import check_spec

__all__ = ["build", "load", "save"]


def build(spec: Mapping[str, Any] | str | Path, trusted_modules: Sequence[str] = (), *, like: VMA | None = None) -> VMA:
    """Builds a model from a spec: plain data that names the classes of its parts.

    A class is named by itself (`"SimilarityGuide"`) or by its import path, and must be a subclass of what the argument
    is annotated with. A subclass of your own is known by its name once it is defined. `VMA.spec` gives a model's spec.

    A spec runs nothing but the constructors of parts: a name is looked up among the subclasses that exist already, and
    no module is imported to find one, unless `trusted_modules` names it.

    Arguments:
        spec: The parts and their arguments, `{"address_guide": {"class_path": ..., "init_args": {...}}, ...}`; a whole
            `{"class_path": ..., "init_args": ...}`; or the path of a JSON or YAML file that holds either. A part
            without arguments is its name alone. In a dict, a part may also be the part itself.
        trusted_modules: Modules, or packages of modules, that may be imported if a class path names them.
        like: A model that has the rest. A part that the spec leaves out is this model's, weights included. Arguments
            that it leaves out fit the other parts: lengths, shapes, the part inside, and all arguments where the class
            stays the same. The class may then be left out: `{"address_guide": {"init_args": {"temperature": 0.5}}}`.

    Returns:
        The model; the weights of parts that the spec names are fresh.

    Raises:
        ValueError: If a name, type or value does not fit; the message says where, and lists the choices.

    Example:
        >>> vma = VMA.for_vectors(5)
        >>> build(vma.spec()).spec() == vma.spec()
        True
        >>> build(vma.spec()["init_args"] | {"address_prior": "UniformPior"})
        Traceback (most recent call last):
        ValueError: spec.address_prior: expected the name of an AddressPrior, got 'UniformPior'. Did you mean
        'UniformPrior'? Choices: ...
        >>> build({"address_guide": {"class_path": "TruncatedGuide", "init_args": {"k": 16}}}, like=vma).address_guide
        TruncatedGuide(inner=SimilarityGuide(num_features=64), k=16)
    """
    if isinstance(spec, str | Path):
        spec = _read(Path(spec))
    if not isinstance(spec, Mapping):
        raise ValueError(f"spec: expected a dict, or the path of a JSON or YAML file, got {type(spec).__name__}.")
    if like is not None:
        if "class_path" in spec:
            raise ValueError("spec: with like, expected parts by name, got a whole model. Give its init_args.")
        made = from_spec({"init_args": spec}, VMA, trusted_modules, _by_kind(like))
        return like.replace(**{name: made.arguments()[name] for name in spec})
    if "class_path" not in spec:
        spec = {"class_path": "pyro_vmem.VMA", "init_args": spec}
    vma: VMA = from_spec(spec, VMA, trusted_modules)
    return vma


def load(path: str | Path, trusted_modules: Sequence[str] = ()) -> VMA:
    """The model of a run or of a checkpoint, with its weights, in the precision of the file and no less than float32.

    Arguments:
        path: A `.safetensors` file that :func:`pyro_vmem.fit` wrote, or the folder of a run: then its best weights by
            validation, or the last if there are none; where a file is damaged, those of another one, with a warning.
        trusted_modules: As of :func:`build`: where parts of your own may be imported from.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the file is corrupted or does not hold a model.

    Example:
        >>> import tempfile
        >>> vma = VMA.for_vectors(5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vma.save(f"{folder}/best.safetensors")
        ...     print(type(load(folder)).__name__)
        VMA
    """
    path = Path(path)
    tensors, data = _of_run(path) if path.is_dir() else load_checkpoint(path)
    if "spec" not in data:
        raise ValueError(f"path: {str(path)!r} holds no model. Give a checkpoint that pyro_vmem.fit wrote.")
    if not isinstance(data["spec"], dict):  # a text would be taken for the path of a file to read
        raise ValueError(f"path: the spec in {str(path)!r} is {type(data['spec']).__name__}, expected a mapping.")
    tensors = _under("model.", tensors) or tensors  # a checkpoint to resume from holds more than the model
    try:
        # A small file may name a model of any size: its shapes are compared before memory is taken for them.
        _check_shapes(data["spec"], trusted_modules, tensors)
        vma = build(data["spec"], trusted_modules)
        kinds = [value.dtype for value in tensors.values() if value.is_floating_point()]
        vma.to(functools.reduce(torch.promote_types, kinds, torch.float32)).load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"path: the weights in {str(path)!r} are not those of the model it names: {error}") from error
    return vma.eval()


def save(vma: VMA, path: str | Path) -> None:
    """Writes weights and spec of a model to one safetensors file, which :func:`load` reads; also `vma.save(path)`.

    Arguments:
        vma: The model, trained by any loop.
        path: The file, such as `"mine.safetensors"`. A file that is there is replaced.

    Raises:
        ValueError: If a part was built from an argument that is not plain data, so that a spec could not rebuild it.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> vma = VMA.for_vectors(5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vma.save(f"{folder}/mine.safetensors")
        ...     print(type(load(f"{folder}/mine.safetensors")).__name__)
        VMA
    """
    check_spec(vma)
    save_checkpoint(path, vma.state_dict(), {"spec": vma.spec()})


def _check_shapes(spec: dict[str, Any], trusted_modules: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Builds a model without memory for its weights; a `RuntimeError` names those that the tensors are not for."""
    try:
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in build(spec, trusted_modules).state_dict().items()}
    except RuntimeError as error:
        if "meta" in str(error):  # a part of somebody's own reads values while it is built, and here are none
            return
        raise
    found = {name: value.shape for name, value in tensors.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        name, shown = wrong[0], [tuple(s[wrong[0]]) if wrong[0] in s else "missing" for s in (shapes, found)]
        raise RuntimeError(f"{len(wrong)} tensors differ, the first is {name}: expected {shown[0]}, found {shown[1]}")


def _by_kind(vma: VMA) -> dict[type[Part], Part]:
    """The parts of a model, itself and what is in them, by the base class that arguments are annotated with."""
    parts: list[Part | None] = [vma.template_encoder, vma.templates, vma.address_prior, vma.latent_prior]
    parts += [vma.likelihood, getattr(vma.likelihood, "network", None), vma.address_guide, vma.latent_guide, vma]
    kinds = (AddressPrior, LatentPrior, Likelihood, AddressGuide, LatentGuide, Encoder, Decoder, Templates, VMA)
    return {kind: part for part in parts for kind in kinds if isinstance(part, kind)}


def _of_run(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The best weights of a run; they are in its last checkpoint too, should their own file be damaged."""
    best, last = folder / "best.safetensors", folder / "last.safetensors"
    earlier = versions_of(last)
    if best.exists() or not earlier:
        try:
            return load_checkpoint(best)
        except ValueError as error:
            if not earlier:
                raise
            warnings.warn(f"{error} Taking what {last.name} holds instead.", RuntimeWarning, stacklevel=3)
    tensors, data = load_newest(last)
    return _under("best.", tensors) or tensors, data


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"spec: there is no file {str(path)!r}. Give a dict, or the path of a JSON or YAML file.")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else read_yaml(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"spec: {str(path)!r} is not valid {path.suffix or 'YAML'} ({error}). Correct it.") from error
    if not isinstance(data, dict):
        raise ValueError(f"spec: {str(path)!r} holds {type(data).__name__}, expected a mapping of arguments.")
    return data
