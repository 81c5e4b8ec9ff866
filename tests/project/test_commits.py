"""Every commit that a figure or a model card names is in the history."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyro_vmem as pv

ROOT = Path(__file__).parent.parent.parent


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


def commits_in(text: str) -> set[str]:
    """The commits that a text names, without the plus of changed files."""
    return set(re.findall(r"\bcommit ([0-9a-f]{7,40})\b", text))


def of_results() -> Iterator[tuple[str, str]]:
    """Each commit of a run or row, with the file that names it."""
    for path in sorted((ROOT / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for entry in [*found["runs"].values(), *found["rows"]]:
            yield path.name, entry["commit"].removesuffix("+")


def all_named() -> dict[str, set[str]]:
    """The files that name a commit, by commit."""
    named: dict[str, set[str]] = {}
    for file, commit in of_results():
        named.setdefault(commit, set()).add(file)
    for folder in ("docs", "results", "pyro_vmem/weights"):
        for path in (ROOT / folder).glob("*.md"):
            for commit in commits_in(path.read_text(encoding="utf-8")):
                named.setdefault(commit, set()).add(path.name)
    return named


def missing(named: dict[str, set[str]]) -> dict[str, set[str]]:
    """Those that the history of this commit does not hold."""
    return {name: files for name, files in named.items() if git("merge-base", "--is-ancestor", name, "HEAD").returncode}


@pytest.fixture
def _history() -> None:
    try:
        shallow = git("rev-parse", "--is-shallow-repository").stdout.strip()
    except FileNotFoundError:
        pytest.skip("there is no git")
    if shallow != "false":
        pytest.skip("there is no history, or only a part of it")


@pytest.mark.usefixtures("_history")
def test_every_commit_that_is_named_is_in_the_history() -> None:
    named = all_named()
    assert len(named) >= 10
    assert missing(named) == {}
    assert missing({"0123456789": set()})  # one that is not is noticed


@pytest.mark.parametrize("name", pv.config.pretrained_names())
def test_each_card_names_a_commit_and_a_licence(name: str) -> None:
    card = pv.config.model_card(name)
    assert commits_in(card)
    assert "Apache License 2.0" in card
