"""What the package lets in: it opens no connection and starts no other program."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vmem

ROOT = Path(pyro_vmem.__file__).parent.parent

# An audit hook sees every socket, whoever opens it, and cannot be taken off again.
ALONE = """
import sys

def forbid(event, arguments):
    if event.startswith(("socket.", "urllib.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")):
        raise PermissionError(f"{event} {arguments}")

sys.addaudithook(forbid)
"""

WORK = """
import importlib, pkgutil, tempfile
import pyro_vmem as pv
for module in pkgutil.walk_packages(pv.__path__, "pyro_vmem."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from small_run import blobs, sampler, small_vma
with tempfile.TemporaryDirectory() as folder:
    pv.fit(small_vma(), sampler(), steps=2, validation=sampler(1), validate_every=1, out=folder, progress=False)
    vma = pv.load(folder)
print(pv.diagnostics.evaluate(vma, sampler(), num_episodes=1, num_samples=1).summary()["nll"])
"""


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYRO_VMEM", "COV_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "helpers")}
    return subprocess.run(
        [sys.executable, *options, "-c", ALONE + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )


def test_importing_training_and_evaluating_open_no_connection() -> None:
    done = run(WORK)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
    ],
)
def test_a_connection_or_a_program_would_be_noticed(code: str) -> None:
    done = run(code)
    assert done.returncode == 1
    assert "PermissionError" in done.stderr


NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "aiohttp", "huggingface_hub"}


def test_only_what_is_asked_to_download_can() -> None:
    """No module imports what opens connections; torchvision's data sets do, and are told whether to by the caller."""
    package = Path(pyro_vmem.__file__).parent
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & NETWORK, path
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.hub")), path
    for source in (pyro_vmem.data.omniglot, pyro_vmem.data.mnist):
        assert inspect.signature(source).parameters["download"].default is False
    for name in set(pyro_vmem.data.__all__) - {"omniglot", "mnist"}:
        value = getattr(pyro_vmem.data, name)
        assert not callable(value) or "download" not in inspect.signature(value).parameters


LOCALE = """
import pathlib, warnings
from pyro_vmem._utils.files import write_json
from pyro_vmem.app.experiment import Experiment, read_result
from pyro_vmem.train.history import write_history
# Only the files of this package: others read theirs as they like.
warnings.filterwarnings("error", category=EncodingWarning)
with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_json(folder / "experiment.json", {"data_root": "Größe/\u0416"})
    write_history(folder / "history.csv", [{"step": 1.0, "seconds": 2.0}])
    assert Experiment.read(folder).data_root == "Größe/\u0416"
    assert read_result(folder).steps == 1
    (folder / "spec.json").write_text('{"name": "Größe"}', encoding="utf-8")
    try:
        pv.build(folder / "spec.json")
    except ValueError as error:
        assert "VMA needs" in str(error)
"""


def test_text_is_utf_8_whatever_the_locale() -> None:
    done = run(WORK + LOCALE, "-X", "warn_default_encoding")
    assert done.returncode == 0, done.stderr
