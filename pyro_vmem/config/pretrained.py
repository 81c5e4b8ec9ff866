"""Trained models that come with the package."""

from __future__ import annotations

from pathlib import Path

from pyro_vmem.config.build import load
from pyro_vmem.model import VMA
from pyro_vmem.train import load_checkpoint, save_checkpoint
from pyro_vmem.train.folder import holds_run
from pyro_vmem.train.history import write_history

__all__ = ["from_pretrained", "model_card", "pretrained_names", "protocol_of", "unpack"]

_WEIGHTS = Path(__file__).parent.parent / "weights"


def pretrained_names() -> list[str]:
    """The names of the packaged models.

    Example:
        >>> pretrained_names()
        ['omniglot26', 'omniglot28', 'omniglot28-independent']
    """
    return sorted(path.stem for path in _WEIGHTS.glob("*.safetensors"))


def from_pretrained(name: str) -> VMA:
    """A trained model in evaluation mode, also as `VMA.from_pretrained`; nothing is downloaded.

    Weights are stored in half precision and loaded as float32. :func:`model_card` has the training data, figures and
    limits of a model. A name that is none of :func:`pretrained_names` raises a `ValueError`.

    Example:
        >>> import torch, pyro_vmem as pv
        >>> vma = pv.VMA.from_pretrained("omniglot28")
        >>> vma.generate(pv.Memory(torch.zeros(3, 1, 28, 28)), 2).shape
        torch.Size([2, 1, 28, 28])
    """
    return load(_path(name, ".safetensors"))


def model_card(name: str) -> str:
    """The training data, figures and limits of one of :func:`pretrained_names`, in Markdown.

    Example:
        >>> model_card("omniglot28").splitlines()[0]
        '# omniglot28'
    """
    return _path(name, ".md").read_text(encoding="utf-8")


def protocol_of(name: str) -> str:
    """The protocol of the training images of a model; see :func:`pyro_vmem.data.protocol`."""
    protocol: str = load_checkpoint(_path(name, ".safetensors"))[1]["protocol"]
    return protocol


def unpack(name: str, folder: Path) -> None:
    """Makes a folder of a run with a packaged model as its best weights and no history.

    Raises:
        ValueError: If the folder holds a run.
    """
    vma = from_pretrained(name)
    if holds_run(folder):
        raise ValueError(f"out: {str(folder)!r} already holds a run. Give another folder.")
    save_checkpoint(folder / "best.safetensors", vma.state_dict(), {"spec": vma.spec()})
    write_history(folder / "history.csv", [])


def _path(name: str, suffix: str) -> Path:
    if name not in pretrained_names():
        raise ValueError(f"name: expected one of {', '.join(map(repr, pretrained_names()))}, got {name!r}.")
    return _WEIGHTS / f"{name}{suffix}"
