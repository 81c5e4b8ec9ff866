"""The built wheel, installed into an empty environment with the README's extras, does all that the README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
(EXTRAS,) = set(re.findall(r"pip install '\.\[([\w,]+)\]'", README))
# The code is the README's, with these values in place of those that take minutes.
SHORTER = {"range(1_000)": "range(5)", "minutes=3": "minutes=0.01", "RUN": "runs/train"}
OPTIONS = {"train": "--steps 2 --width 8", "report": "--ways 2 --episodes 2 --samples 2"}


def shortened(text: str) -> str:
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


def needed(requirements: Sequence[str], extras: frozenset[str], found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The installed distributions that requirements ask for, and theirs, each with the extras asked of it."""
    for required in map(Requirement, requirements):
        if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            name = required.name.lower().replace("_", "-")
            if name not in found or not required.extras <= found[name]:
                found.setdefault(name, set()).update(required.extras)
                needed(distribution(name).requires or (), frozenset(found[name]), found)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of the wheel and what it declares to need, by links to what is installed here, and no more."""
    folder = tmp_path_factory.mktemp("wheel")
    for command in (
        [sys.executable, "-m", "venv", "--without-pip", folder / "venv"],
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT],
    ):
        subprocess.run(command, check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    (built,) = distributions(path=[str(wheel)])
    for name in needed(built.requires or (), frozenset(EXTRAS.split(",")), {}):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(installed.locate_file(top))).resolve())
    # Without an index: what is declared and was not linked is an error.
    install = ["--python", folder / "venv/bin/python", "install", "-q", "--no-index", f"{wheel}[{EXTRAS}]"]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return folder / "venv" / "bin"


@pytest.mark.long
def test_the_readme_works_top_to_bottom(environment: Path, tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYRO_VMEM"))}
    variables |= {"PATH": f"{environment}:{os.environ['PATH']}", "MPLBACKEND": "agg"}

    def run(*command: str) -> str:
        ran = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, (command, ran.stderr[-3000:])
        return ran.stdout

    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    inline = [line for line in re.findall(r"`([^`\n]+)`", README) if re.match(r"(pv|vma)\.[\w.]+\(.*\)$", line)]
    assert len(inline) >= 8
    names = "memory, x, mask = episode.memory, episode.x, torch.arange(28) < 14"
    script = shortened("\n".join([example, names, *inline, "print(pv.__file__)"]))
    assert run("python", "-c", script).splitlines()[-1].startswith(str(environment.parent))
    assert (tmp_path / "lookups.png").exists()

    commands = list(dict.fromkeys(re.findall(r"`(pyro-vmem [^`]+)`", README)))
    assert [command.split()[1] for command in commands] == [*OPTIONS]
    for command in map(shortened, commands):
        run(*command.split(), *OPTIONS[command.split()[1]].split())
    assert (tmp_path / "runs/train/report.html").exists()
