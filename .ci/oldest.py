"""Prints the oldest versions that pyproject.toml allows, as requirements: `python .ci/oldest.py plots cli`."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text())["project"]
requirements = list(project["dependencies"])
for extra in sys.argv[1:]:
    requirements += project["optional-dependencies"][extra]
for requirement in requirements:
    if match := re.fullmatch(r"([\w.-]+(?:\[[\w,]+\])?)>=([\w.]+)", requirement):
        sys.stdout.write(f"{match[1]}=={match[2]}\n")
