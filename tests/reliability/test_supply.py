"""What the package lets in: it opens no connection and starts no other program."""

from __future__ import annotations

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


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYRO_VMEM", "COV_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "helpers")}
    return subprocess.run(
        [sys.executable, "-c", ALONE + code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
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
