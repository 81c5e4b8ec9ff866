"""Optional dependencies: without one, what needs it says how to install it, and the rest works."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem._utils.extras import require

ROOT = Path(pv.__file__).parent


def block(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Makes `import package` fail as if it were not installed, whatever has imported it before."""
    names = [name for name in sys.modules if name.startswith(f"{package}.")]
    for name in [package, *names]:
        monkeypatch.setitem(sys.modules, name, None)


def requirements() -> Iterator[tuple[Path, str, str]]:
    """Every `require(module, extra)` of the package."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                literals = [value.value for value in values if isinstance(value, ast.Constant)]
                if len(literals) == 2:
                    yield path, *literals  # type: ignore[misc]


def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "alphabet" / "class"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"never read")
    return tmp_path / "images"


NEEDS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "FaissIndex": ("faiss", "faiss", lambda _: pv.memory.FaissIndex(torch.rand(4, 2))),
    "FlowGuide": ("zuko", "flows", lambda _: pv.FlowGuide(4, 6)),
    "glyphs": ("matplotlib", "plots", lambda _: pv.data.glyphs(size=12, drawings=12)),
    "from_folder": ("PIL", "vision", lambda path: pv.data.from_folder(image_folder(path))),
    "mnist": ("torchvision", "vision", lambda path: pv.data.mnist(path, download=True)),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("what", NEEDS)
def test_a_missing_extra_is_named(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package, extra, call = NEEDS[what]
    block(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"this feature needs {package}: pip install '.\[{extra}\]' in the clone"):
        call(tmp_path)


def test_the_core_needs_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (
        "rich",
        "matplotlib",
        "PIL",
        "torchvision",
        "arviz",
        "xarray",
        "faiss",
        "zuko",
        "tensorboard",
        "wandb",
        "mlflow",
    ):
        block(monkeypatch, package)
    vma = pv.VMA.for_vectors(4)
    memory = pv.Memory(torch.rand(3, 4), torch.arange(3))
    assert vma.classify(memory, torch.rand(2, 4)).shape == (2, 3)
    assert vma.spec()["class_path"] == "pyro_vmem.VMA"


def test_an_error_inside_of_an_installed_module_is_not_explained_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "half_installed.py", "import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all") as caught:
        require("half_installed", "plots")
    assert "pip install" not in str(caught.value)


def test_every_extra_that_a_message_names_exists() -> None:
    pyproject = ROOT.parent / "pyproject.toml"
    if not pyproject.is_file():
        pytest.skip("the package is installed without its sources")
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    found = list(requirements())
    assert {path.name for path, _, _ in found} >= {"flows.py", "glyphs.py", "commands.py"}
    distributions = {"PIL": "pillow", "yaml": "pyyaml", "faiss": "faiss-cpu", "milvus_lite": "milvus-lite"}
    comes_with = {"PIL": "matplotlib", "grpc": "pymilvus"}  # which cannot do without it
    for path, module, extra in found:
        assert extra in extras, path
        package = module.partition(".")[0]
        wanted = {distributions.get(package, package), comes_with.get(package, package)}
        assert any(requirement.startswith(tuple(wanted)) for requirement in extras[extra]), (path, module, extra)
