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
