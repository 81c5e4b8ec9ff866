"""What the README shows runs as it is printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_there_is_one_example_of_at_most_twenty_lines():
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20


def test_the_example_runs(capsys):
    (example,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["loss"] < names["first"]  # it trains
    assert names["gain"].shape == names["episode"].labels.shape
    assert capsys.readouterr().out


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
