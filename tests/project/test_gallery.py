"""The gallery: every figure is in it, and its page is what the script writes."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

from pyro_vmem import plots

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["gallery"]


def called(code):
    """The function of `plots` that a line calls."""
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert call.func.value.id == "plots"
    return call.func.attr


def test_every_figure_is_shown(gallery):
    functions = {name for name in plots.__all__ if callable(getattr(plots, name))}
    assert {called(picture.code) for picture in gallery.PICTURES} == functions


def test_the_page_is_what_the_script_writes(gallery):
    assert (DOCS / "gallery.md").read_text() == gallery.page()


def test_pictures_are_there_small_and_transparent(gallery):
    names = {f"{picture.name}.png" for picture in gallery.PICTURES}
    files = list((DOCS / "gallery").iterdir())
    assert {path.name for path in files} == names
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 60_000
    assert sum(sizes) < 600_000
    for path in files:
        with Image.open(path) as image:
            corners = [(x, y) for x in (0, image.width - 1) for y in (0, image.height - 1)]
            assert [image.convert("RGBA").getpixel(corner)[3] for corner in corners] == [0] * 4, path


def test_a_picture_is_drawn_by_the_line_that_is_shown(gallery):
    picture = gallery.Picture("khat", "", "plots.khat_scatter(ax, khat)", (2.0, 2.0))
    drawn = gallery.draw(picture, {"khat": [0.1, 0.9]})
    other = gallery.draw(picture, {"khat": [0.1, 0.2]})
    assert drawn.startswith(b"\x89PNG")
    assert drawn != other
