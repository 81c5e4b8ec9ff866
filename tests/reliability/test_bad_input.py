"""Bad input is refused by the right error, with a message that helps; nothing is written or changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_input import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused(case: Case, tmp_path: Path) -> None:
    assert case.problem(tmp_path) == ""


def test_the_table_is_large_and_names_each_once() -> None:
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_case_that_is_accepted_is_noticed(tmp_path: Path) -> None:
    """Each way in which a refusal can be wrong."""

    def leaves_a_file(folder: Path) -> None:
        (folder / "out").mkdir()
        raise ValueError("x: bad")

    def changes_a_model(_: Path) -> None:
        from bad_input import VECTORS

        next(VECTORS.parameters()).data += 1.0
        raise ValueError("x: bad")

    def fails(_: Path) -> None:
        raise KeyError("x")

    for call, problem in (
        (lambda _: None, "was accepted"),
        (fails, "raised KeyError"),
        (changes_a_model, "changed a model"),
        (leaves_a_file, "left"),
    ):
        assert Case("", call, ValueError, "^x: bad").problem(tmp_path).startswith(problem)
