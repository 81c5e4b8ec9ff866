"""The shape of the package: what may import what, what importing does, and what every public name comes with."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pyro_vmem

ROOT = Path(pyro_vmem.__file__).parent

# A folder imports only from those before it, and from itself.
ORDER = [
    "_utils",
    "plots",
    "distributions",
    "infer",
    "testing",
    "memory",
    "parts",
    "data",
    "model",
    "diagnostics",
    "train",
    "config",
    "app",
]
OPTIONAL = [
    *("matplotlib", "PIL", "torchvision", "jsonargparse", "jinja2", "yaml", "rich", "arviz", "xarray", "faiss", "zuko"),
    *("pymilvus", "milvus_lite"),
]
ENDS = (ROOT / "__init__.py", ROOT / "__main__.py")  # they stand above everything
FILES = sorted(path for path in ROOT.rglob("*.py") if path not in ENDS)


def unit_of(path: Path) -> str:
    """The module or folder of the ladder that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The full names of all that a file imports, wherever in it: `pyro_vmem.parts.mlp`, `torch.nn`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def units_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imports(path)]
    assert ["pyro_vmem"] not in names, f"{path}: imports the whole package"
    return {parts[1] for parts in names if parts[0] == "pyro_vmem"}


def modules() -> list[ModuleType]:
    found = [m.name for m in pkgutil.walk_packages([str(ROOT)], "pyro_vmem.") if not m.name.endswith("__main__")]
    return [pyro_vmem, *map(importlib.import_module, found)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_up_the_ladder(path: Path) -> None:
    unit = unit_of(path)
    assert unit in ORDER, f"give {unit} its place in ORDER"
    allowed = {*ORDER[: ORDER.index(unit)], unit}
    assert units_imported(path) <= allowed


def test_data_knows_nothing_of_models() -> None:
    for path in FILES:
        if unit_of(path) == "data":
            assert units_imported(path) <= {"data", "memory", "_utils"}, path
            assert not any(name.split(".")[0] == "pyro" for name in imports(path)), path


def test_plots_and_reports_see_arrays_not_models() -> None:
    models = {"parts", "model", "infer", "train"}
    for path in FILES:
        if unit_of(path) == "plots" or path.name == "report.py":
            assert not units_imported(path) & models, path


def test_diagnostics_never_train() -> None:
    for path in FILES:
        if unit_of(path) == "diagnostics":
            assert "train" not in units_imported(path), path
            assert not any(name.startswith(("torch.optim", "pyro.optim")) for name in imports(path)), path


PROBE = """
import json, random, sys
import numpy, pyro, torch
before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
settings = [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.distributions.Distribution._validate_args, pyro.settings.get()]
import pyro_vmem
print(json.dumps({
    "optional": [name for name in sys.argv[1:] if name in sys.modules],
    "parameters": list(pyro.get_param_store().keys()),
    "torch": torch.equal(before[0], torch.get_rng_state()),
    "random": before[1] == random.getstate(),
    "numpy": before[2] == str(numpy.random.get_state()),
    "settings": settings == [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                             torch.distributions.Distribution._validate_args, pyro.settings.get()],
}))
"""


def test_importing_does_nothing_else() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE, *OPTIONAL],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert json.loads(ran.stdout) == {
        "optional": [],
        "parameters": [],
        "torch": True,
        "random": True,
        "numpy": True,
        "settings": True,
    }


def test_only_the_command_line_prints() -> None:
    for path in FILES:
        if path.name != "cli.py":
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path


def test_random_states_are_put_back_of_named_devices() -> None:
    """`fork_rng()` alone wakes up every GPU of the machine."""
    for path in [*FILES, *(ROOT.parent / "benchmarks").glob("*.py"), *(ROOT.parent / "docs").glob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        forks = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "fork_rng"]
        assert all(any(keyword.arg == "devices" for keyword in call.keywords) for call in forks), path


def test_every_public_name_exists_and_has_a_docstring() -> None:
    checked = 0
    for module in modules():
        assert module.__doc__, module.__name__
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                # a class's own, not its base's; a dataclass writes its signature where there is none
                docstring = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
                assert docstring, f"{module.__name__}.{name}"
                assert not docstring.startswith(f"{name}("), f"{module.__name__}.{name}"
                checked += 1
    assert checked > 60


def test_every_module_says_what_is_public() -> None:
    for module in modules():
        if module.__name__.rpartition(".")[2] not in ("version",):
            assert getattr(module, "__all__", None) is not None or module.__name__.endswith("cli"), module.__name__
            names = list(getattr(module, "__all__", []))
            assert len(names) == len(set(names)), module.__name__


def without_example() -> set[str]:
    return {
        name
        for name in pyro_vmem.__all__
        if inspect.isclass(value := getattr(pyro_vmem, name)) or inspect.isfunction(value)
        if "Example:\n" not in (value.__doc__ or "") or ">>>" not in (value.__doc__ or "")
    }


def test_every_public_name_has_an_example() -> None:
    # An abstract part is shown by its subclasses, a result by the function that returns it.
    abstract = {n for n in pyro_vmem.__all__ if inspect.isabstract(getattr(pyro_vmem, n))}
    assert without_example() <= abstract | {"FitResult"}


def file_arrows() -> dict[str, set[str]]:
    """For each file of the package the files that it imports, under `TYPE_CHECKING` too."""
    by_name = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in FILES}
    arrows: dict[str, set[str]] = {}
    for name, path in by_name.items():
        found = set(imports(path)) | {full.rpartition(".")[0] for full in imports(path)}
        arrows[name] = {other for other in found if other in by_name and other != name}
    return arrows


def test_no_files_import_each_other_in_a_circle() -> None:
    left = file_arrows()
    while free := {name for name, found in left.items() if not found & left.keys()}:
        left = {name: found for name, found in left.items() if name not in free}
    assert not left
