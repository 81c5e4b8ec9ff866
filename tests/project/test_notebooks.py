"""The notebooks run, quickly where `PYRO_VMEM_SMOKE` asks for it, and are kept without outputs."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = (
    "01_quickstart",
    "02_model_and_shapes",
    "03_swap_parts",
    "04_which_objective",
    "05_information_gain",
    "06_few_shot",
    "07_own_data",
    "08_save_resume",
    "09_million_templates",
    "10_any_pyro_model",
)
SECONDS = 300  # a cell's; a hang ends, a slow machine does not fail

needs_kernel = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel")),
    reason="nbclient and ipykernel are not installed: pip install '.[test]'",
)

# In a process of its own: the client and its event loop have warnings that are not ours.
RUN = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    place = {"metadata": {"path": sys.argv[4]}}
    nbclient.NotebookClient(notebook, timeout=int(sys.argv[3]), kernel_name="python3", resources=place).execute()
finally:
    nbformat.write(notebook, sys.argv[2])
"""


def read(name: str) -> dict[str, Any]:
    """The notebook as plain data."""
    notebook: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return notebook


@pytest.fixture(scope="module")
def runs() -> Any:
    """The module that runs the notebooks for the site."""
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "docs" / "run_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_outputs_are_kept(name: str) -> None:
    notebook = read(name)
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    for cell in code(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_begins_with_a_title_and_its_code_is_python(name: str) -> None:
    notebook = read(name)
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")
    for cell in code(notebook):
        ast.parse("".join(cell["source"]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_site_shows_the_full_run_of_the_code_as_it_is(name: str, runs: Any) -> None:
    if not runs.kept(name):
        pytest.skip(f"there is no full run yet: make notebooks ARGS={name}")
    assert runs.is_current(name), f"make notebooks ARGS={name}, or delete docs/notebook_runs/{name}*"
    shown = code(json.loads(runs.with_outputs(name)))
    outputs = [output for cell in shown for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    figures = sorted(path.name for path in runs.RUNS.glob(f"{name}_*.png"))
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == len(figures)
    assert sum((runs.RUNS / figure).stat().st_size for figure in figures) < 250_000


def test_an_output_is_shown_at_its_own_cell_alone(tmp_path: Path, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    cells = [{"cell_type": "code", "source": [line], "outputs": []} for line in ("1 + 1", "changed()")]
    title = {"cell_type": "markdown", "source": ["# Title"]}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [title, *cells]}))
    assert not runs.is_current("a")
    two = {"output_type": "execute_result", "data": {"text/plain": "2"}}
    (tmp_path / "a.json").write_text(json.dumps([{"code": c, "outputs": [two]} for c in ("1+1  # two", "old()")]))
    assert not runs.is_current("a")
    shown = json.loads(runs.with_outputs("a"))
    assert [len(cell["outputs"]) for cell in code(shown)] == [1, 0]
    assert shown["cells"][0]["source"] == ["# Title", runs.NOTE]
    (tmp_path / "a.json").write_text(json.dumps([{"code": c, "outputs": [two]} for c in ("1 + 1", "changed()")]))
    assert json.loads(runs.with_outputs("a"))["cells"][0] == title


@pytest.mark.long
@needs_kernel
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    done = tmp_path / "done.ipynb"
    environment = {key: value for key, value in os.environ.items() if key != "PYRO_VMEM_DATA"}  # what every user has
    environment |= {"PYRO_VMEM_SMOKE": "1", "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path), "MPLBACKEND": "agg"}
    environment["PYTHONWARNINGS"] = "ignore::FutureWarning:arviz"  # on the first import of a day it tells of its plans
    command = [sys.executable, "-c", RUN, str(FOLDER / f"{name}.ipynb"), str(done), str(SECONDS), str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    outputs = [output for cell in code(json.loads(done.read_text())) for output in cell["outputs"]]
    assert outputs
    warned = ["".join(output["text"]) for output in outputs if output.get("name") == "stderr"]
    assert not [text for text in warned if "Warning" in text]
