"""Every spec that is stored in the repository names classes by their public paths, so that files can be moved."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyro_vmem as pv
from pyro_vmem.parts.part import public_path

PACKAGE = Path(pv.__file__).parent
STORED = sorted([*PACKAGE.glob("weights/*.safetensors"), *PACKAGE.parent.glob("results/checkpoints/*.safetensors")])


def class_paths(spec: Any) -> Iterator[str]:
    """All class paths in a spec, however deep."""
    if isinstance(spec, dict):
        if "class_path" in spec:
            yield spec["class_path"]
        for value in spec.values():
            yield from class_paths(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from class_paths(value)


def test_there_are_stored_specs() -> None:
    assert len(STORED) >= 4
    nested = {"class_path": "a.B", "init_args": {"parts": [{"class_path": "a.C"}]}}
    assert list(class_paths(nested)) == ["a.B", "a.C"]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_spec_has_public_names_only(path: Path) -> None:
    found = list(class_paths(pv.train.load_checkpoint(path)[1]["spec"]))
    assert len(found) >= 6
    for name in found:
        module, _, cls = name.rpartition(".")
        assert public_path(getattr(importlib.import_module(module), cls)) == name
        assert not any(word.startswith("_") for word in name.split("."))


@pytest.mark.parametrize("model", [pv.VMA.for_vectors(3), pv.VMA.for_images((1, 8, 8), latent_dim=2, width=2)])
def test_a_new_spec_has_public_names_only(model: pv.VMA) -> None:
    for vma in (model, *(cls.like(model) for cls in (pv.baselines.SoftAttentionVAE, pv.baselines.NoMemoryVAE))):
        for name in class_paths(vma.spec()):
            module, _, cls = name.rpartition(".")
            assert public_path(getattr(importlib.import_module(module), cls)) == name
            assert not any(word.startswith("_") for word in name.split("."))


def test_the_public_path_is_known_before_the_package_has_imported_the_name() -> None:
    code = "from pyro_vmem.parts import StandardPrior; print(StandardPrior(3).spec()['class_path'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "pyro_vmem.StandardPrior\n"


def test_a_spec_is_built_before_the_package_has_imported_the_name() -> None:
    code = "from pyro_vmem.config.spec import from_spec; from pyro_vmem.parts import LatentPrior as P; "
    code += "print(from_spec({'class_path': 'pyro_vmem.StandardPrior', 'init_args': {'latent_dim': 3}}, P))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "StandardPrior(latent_dim=3)\n"
