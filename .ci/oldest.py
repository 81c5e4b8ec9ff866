"""Prints the oldest versions that pyproject.toml allows, as requirements: `python .ci/oldest.py plots cli`.

With `--but torch`, that one is of the version in constraints.txt.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("extras", nargs="*")
parser.add_argument("--but", nargs="*", default=[])
arguments = parser.parse_args()

root = Path(__file__).parent.parent
project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
latest = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
requirements = list(project["dependencies"])
for extra in arguments.extras:
    requirements += project["optional-dependencies"][extra]
for requirement in requirements:
    if match := re.fullmatch(r"([\w.-]+)((?:\[[\w,]+\])?)>=([\w.]+)", requirement):
        name, options, oldest = match.groups()
        sys.stdout.write(f"{name}{options}=={latest[name] if name in arguments.but else oldest}\n")
