"""The snippets of the recipes and of the first page run as they are printed."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"


def snippets(page: str) -> list[tuple[str, str]]:
    """The Python blocks of a page, each with the heading that it stands under."""
    found, heading = [], ""
    # A heading or a whole block: a comment in a block is no heading.
    for title, code in re.findall(
        r"^#+ ([^\n]*)$|^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    ):
        heading = title or heading
        if code:
            found.append((heading, code))
    return found


(_, PRELUDE), *RECIPES = snippets("recipes.md")


@pytest.mark.parametrize(("heading", "code"), RECIPES, ids=[heading for heading, _ in RECIPES])
def test_a_recipe_needs_the_first_lines_only(heading: str, code: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("recipe")  # where its classes are found, as those of a script are
    monkeypatch.setitem(sys.modules, "recipe", module)
    exec(compile(PRELUDE + code, heading, "exec"), vars(module))


def test_the_first_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    ((_, code),) = snippets("index.md")
    exec(compile(code, "index.md", "exec"), {})
    assert "torch.Size([5, 1, 28, 28])" in capsys.readouterr().out
