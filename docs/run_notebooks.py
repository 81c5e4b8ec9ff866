"""Runs the notebooks in full and keeps their outputs for the site: `make notebooks`, half an hour on one core.

The outputs of NAME.ipynb are in docs/notebook_runs/NAME.json, its figures beside it. `make notebooks ARGS=NAME` runs
one notebook. Without a name, all notebooks run whose code has changed since their last run.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
RUNS = Path(__file__).parent / "notebook_runs"
NOTE = "\n\n*Cells without output have changed since the last full run. Run* `make notebooks` *to see theirs.*"


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of code of a notebook."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def meaning(source: str | list[str]) -> str:
    """The code of a cell without comments and layout, which change no output."""
    return ast.dump(ast.parse("".join(source)))


def read(name: str) -> dict[str, Any]:
    """A notebook as it is in the repository, without outputs."""
    notebook: dict[str, Any] = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    return notebook


def kept(name: str) -> list[dict[str, Any]]:
    """The code and the outputs of each cell at the last full run; empty if there was none."""
    path = RUNS / f"{name}.json"
    cells: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return cells


def is_current(name: str) -> bool:
    """Whether the last full run was of the code that the notebook has now."""
    cells = code_cells(read(name))
    return [meaning(cell["code"]) for cell in kept(name)] == [meaning(cell["source"]) for cell in cells]


def with_outputs(name: str) -> str:
    """The notebook with the outputs of its last full run; changed cells have none, and a note says so."""
    notebook = read(name)
    outputs = {meaning(cell["code"]): cell["outputs"] for cell in kept(name)}
    for number, cell in enumerate(code_cells(notebook), 1):
        cell["execution_count"] = number
        cell["outputs"] = outputs.get(meaning(cell["source"]), [])
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
            if figure := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = base64.b64encode((RUNS / figure).read_bytes()).decode()
    if not is_current(name):
        notebook["cells"][0]["source"] = [*notebook["cells"][0]["source"], NOTE]
    return json.dumps(notebook)


def small(png: bytes) -> bytes:
    """A figure with a palette of 256 colours, which is a third of the size."""
    from PIL import Image

    kept = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(kept, "png", optimize=True)
    return kept.getvalue()


def run(name: str) -> None:
    """Runs one notebook in full and keeps its outputs, without progress bars and log lines."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=3600, kernel_name="python3").execute()
    for old in RUNS.glob(f"{name}_*.png"):
        old.unlink()
    cells, figures = [], 0
    for cell in code_cells(notebook):
        outputs = []
        for output in cell["outputs"]:
            data = output.get("data", {})
            if output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in data:
                continue
            if "image/png" in data:
                figures += 1
                output["data"] = {"image/png": f"{name}_{figures}.png"}
                (RUNS / f"{name}_{figures}.png").write_bytes(small(base64.b64decode(data["image/png"])))
            outputs.append({key: value for key, value in output.items() if key != "execution_count"})
        cells.append({"code": cell["source"], "outputs": outputs})
    (RUNS / f"{name}.json").write_text(json.dumps(cells, indent=1) + "\n")


def main(names: list[str]) -> None:
    """Runs the notebooks named, or those whose code has changed."""
    for variable in ("PYRO_VMEM_SMOKE", "PYRO_VMEM_DATA"):  # full runs, on the data that every user has
        os.environ.pop(variable, None)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")])
    RUNS.mkdir(exist_ok=True)
    for name in names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")):
        if names or not is_current(name):
            sys.stderr.write(f"{name}\n")
            run(name)


if __name__ == "__main__":
    main(sys.argv[1:])
