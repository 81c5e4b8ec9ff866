"""What a run shows of itself while it trains."""

from __future__ import annotations

import re

import pytest
from small_run import sampler, small_vma

import pyro_vmem as pv
from pyro_vmem.train import ProgressBar


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"steps": 3}, r"step 2 of 3, \d\d:\d\d left: bound -[\d.]+  recon "),
        ({"minutes": 0.02}, r"step \d+, 00:0[01] left: bound -[\d.]+  recon "),
    ],
)
def test_a_line_now_and_then_where_there_is_no_terminal(
    settings: dict[str, float], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pv.fit(small_vma(), sampler(), **settings, callbacks=[ProgressBar(seconds=0.0)])
    said = capsys.readouterr().err
    assert re.search(line, said)
    assert "\r" not in said


def test_nothing_more_than_every_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    pv.fit(small_vma(), sampler(), steps=5)
    assert capsys.readouterr().err == ""
