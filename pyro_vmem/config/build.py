"""Builds, loads and saves models: the only module that turns names of classes into classes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vmem._utils.files import read_json, versions_of
from pyro_vmem._utils.plain_yaml import read_yaml
from pyro_vmem.config.fitting import parts_of
from pyro_vmem.config.spec import from_spec
from pyro_vmem.model import VMA
from pyro_vmem.parts import EncoderGuide, TruncatedGuide
from pyro_vmem.train import load_checkpoint
from pyro_vmem.train.checkpoint import load_newest, save_checkpoint, under
from pyro_vmem.train.folder import check_spec

__all__ = ["build", "load", "save", "take_weights"]


def build(spec: Mapping[str, Any] | str | Path, trusted_modules: Sequence[str] = (), *, like: VMA | None = None) -> VMA:
    """Builds a model from a spec: plain data that names the classes of its parts.

    Name a class by its bare name (`"SimilarityGuide"`) or by its import path. It must be a subclass of what the
    argument is annotated with. Your own subclasses are known once they are defined. `VMA.spec` returns a spec.

    A spec runs nothing but the constructors of parts. Names are looked up among existing subclasses. No module is
    imported for a name, unless `trusted_modules` lists it.

    Arguments:
        spec: The parts and their arguments, `{"address_guide": {"class_path": ..., "init_args": {...}}, ...}`; a whole
            `{"class_path": ..., "init_args": ...}`; or the path of a JSON or YAML file that holds either. A part
            without arguments is its name alone. In a dict, a part may also be the part itself.
        trusted_modules: Modules, or packages of modules, that may be imported if a class path names them.
        like: A model that completes the spec. Parts that the spec leaves out are shared with it, weights included.
            Arguments that the spec leaves out get compatible values: lengths, shapes, the inner part, and all arguments
            if the class stays the same. The class may then be left out:
            `{"address_guide": {"init_args": {"temperature": 0.5}}}`.

    Returns:
        The model. Parts named in the spec have fresh weights.

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
    if like is not None:
        if "class_path" in spec:
            raise ValueError("spec: with like, expected parts by name, got a whole model. Give its init_args.")
        made = from_spec({"init_args": spec}, VMA, trusted_modules, parts_of(like))
        return like.replace(**{name: made.arguments()[name] for name in spec})
    if "class_path" not in spec:
        spec = {"class_path": "pyro_vmem.VMA", "init_args": spec}
    vma: VMA = from_spec(spec, VMA, trusted_modules)
    return vma


def load(path: str | Path, trusted_modules: Sequence[str] = ()) -> VMA:
    """The model of a run or of a checkpoint, with its weights, in the precision of the file and no less than float32.

    Arguments:
        path: A `.safetensors` file of :func:`pyro_vmem.fit` or :func:`save`, or the folder of a run. A folder gives the
            best weights by validation, or else the last ones. If a file is damaged, another is read, with a warning.
        trusted_modules: Modules that may be imported for your own parts; see :func:`build`.

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
    if not isinstance(data["spec"], dict):  # A string would be read as the path of a file.
        raise ValueError(f"path: the spec in {str(path)!r} is {type(data['spec']).__name__}, expected a mapping.")
    tensors = under("model.", tensors) or tensors  # A checkpoint of a run holds more than the model.
    try:
        # A small file may name a huge model, so shapes are compared before memory is allocated.
        _check_shapes(data["spec"], trusted_modules, tensors)
        vma = build(data["spec"], trusted_modules)
        kinds = [value.dtype for value in tensors.values() if value.is_floating_point()]
        vma.to(functools.reduce(torch.promote_types, kinds, torch.float32)).load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"path: the weights in {str(path)!r} are not those of the model it names: {error}") from error
    return vma.eval()


def save(vma: VMA, path: str | Path) -> None:
    """Writes weights and spec of a model to one safetensors file for :func:`load`; also `vma.save(path)`.

    Raises:
        ValueError: If an argument of a part is not plain data, so that no spec can rebuild it.
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


def take_weights(vma: VMA, begun: VMA) -> None:
    """Copies the weights of the model `begun` into `vma` as far as they fit.

    Weights of the same name and shape are copied. If a layer now has more channels, its first ones are copied. If the
    address guide now has an encoder of its own, that encoder starts with the weights of the shared one.

    Example:
        >>> one, other = VMA.for_vectors(5), VMA.for_vectors(5)
        >>> take_weights(one, other)
        >>> all(bool((one.state_dict()[name] == tensor).all()) for name, tensor in other.state_dict().items())
        True
    """
    own, taken_from = vma.state_dict(), begun.state_dict()
    inner = begun.address_guide
    if isinstance(vma.address_guide, EncoderGuide) and not isinstance(inner, EncoderGuide):
        inner = inner.inner if isinstance(inner, TruncatedGuide) else inner
        taken_from |= {f"address_guide.inner.{name}": tensor for name, tensor in inner.state_dict().items()}
        encoder = begun.template_encoder.state_dict()
        taken_from |= {f"address_guide.encoder.{name}": tensor for name, tensor in encoder.items()}
    for name, tensor in taken_from.items():
        if name not in own or own[name].shape[1:] != tensor.shape[1:]:
            continue
        taken = own[name][: len(tensor)] if tensor.dim() else own[name]
        if taken.shape == tensor.shape:
            taken.copy_(tensor)


def _check_shapes(spec: dict[str, Any], trusted_modules: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Builds a model without memory for its weights; raises a `RuntimeError` if the tensors do not fit them."""
    try:
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in build(spec, trusted_modules).state_dict().items()}
    except RuntimeError as error:
        if "meta" in str(error):  # A user's part may read values in its constructor; on the meta device there are none.
            return
        raise
    found = {name: value.shape for name, value in tensors.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        name, shown = wrong[0], [tuple(s[wrong[0]]) if wrong[0] in s else "missing" for s in (shapes, found)]
        raise RuntimeError(f"{len(wrong)} tensors differ, the first is {name}: expected {shown[0]}, found {shown[1]}")


def _of_run(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The best weights of a run; if their file is damaged, those in its last checkpoint."""
    best, last = folder / "best.safetensors", folder / "last.safetensors"
    earlier = versions_of(last)
    if best.exists() or not earlier:
        try:
            return load_checkpoint(best)
        except ValueError as error:
            if not earlier:
                raise
            warnings.warn(f"{error} Taking what {last.name} holds instead.", RuntimeWarning, stacklevel=4)
    tensors, data = load_newest(last)
    return under("best.", tensors) or tensors, data


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"spec: there is no file {str(path)!r}. Give a dict, or the path of a JSON or YAML file.")
    try:
        data = read_json(path) if path.suffix == ".json" else read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"spec: {str(path)!r} is not valid {path.suffix or 'YAML'} ({error}). Correct it.") from error
    if not isinstance(data, dict):
        raise ValueError(f"spec: {str(path)!r} holds {type(data).__name__}, expected a mapping of arguments.")
    return data
