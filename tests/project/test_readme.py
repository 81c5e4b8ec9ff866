"""What the README shows runs as it is printed."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pyro_vmem as pv

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_there_is_one_example_of_at_most_twenty_lines():
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20


def test_the_example_runs(capsys, monkeypatch, tmp_path):
    (example,) = blocks("python")
    assert example.count("range(1_000)") == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example.replace("range(1_000)", "range(20)"), "README.md", "exec"), names)
    untrained = pv.VMA.for_images(names["train"].image_shape, name="untrained")
    before = pv.infer.VIMCO_ELBO(4).loss(untrained.model, untrained.guide, names["episode"].memory, names["episode"].x)
    assert names["loss"] < before  # it trains
    assert "information gain" in capsys.readouterr().out
    with Image.open("lookups.png") as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize(
    "target", re.findall(r"\]\((?!https?://|#)([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
)
def test_links_into_the_repository_exist(target):
    path, _, place = target.partition("#")
    assert (ROOT / path).exists()
    headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if place else []
    assert not place or place in [re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings]


def test_the_commands_exist():
    cli = pytest.importorskip("pyro_vmem.app.cli")
    commands = set(re.findall(r"pyro-vmem (\w+)", README))
    assert commands
    assert commands <= cli.COMMANDS.keys()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
