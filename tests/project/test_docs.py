"""The site: every public name is on it, every page is reached, every link into the repository leads somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest

import pyro_vmem

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public() -> Iterator[tuple[str, str, Any]]:
    """Module, name and value of what the package and its folders export."""
    found = [m.name for m in pkgutil.iter_modules(pyro_vmem.__path__, "pyro_vmem.")]
    for name in ["pyro_vmem", *(n for n in found if "._" not in n)]:
        module = importlib.import_module(name)
        for attribute in getattr(module, "__all__", []):
            value = getattr(module, attribute)
            if not isinstance(value, ModuleType):
                yield name, attribute, value


def test_every_public_name_is_in_the_reference_once(reference: Any) -> None:
    names = [full for page in reference.public_names().values() for full in page]
    assert len(names) == len(set(names))
    listed = {id(value) for page in reference.public_names().values() for value in page.values()}
    bare = {full.rpartition(".")[2] for full in names}
    count = 0
    for module, name, value in public():
        assert id(value) in listed or (name in bare and not (inspect.isclass(value) or callable(value))), (module, name)
        count += 1
    assert count > 180


def test_packages_have_all_of_their_names_on_their_own_page(reference: Any) -> None:
    text = reference.pages()
    for module in ("pyro_vmem", "pyro_vmem.data", "pyro_vmem.infer", "pyro_vmem.diagnostics", "pyro_vmem.plots"):
        for name in importlib.import_module(module).__all__:
            if not isinstance(getattr(importlib.import_module(module), name), ModuleType):
                assert re.search(rf":: ({re.escape(module)}\.)?{name}$", text[f"{module}.rst"], re.MULTILINE), (
                    module,
                    name,
                )


def test_every_page_and_notebook_is_reached_from_the_first() -> None:
    toc = set(re.findall(r"^([\w/.*\[\]]+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    for page in PAGES:
        assert page.stem == "index" or any(page.match(f"{entry}.md") for entry in toc), page.name
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.stem}" in toc


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_into_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
        # Notebooks are copied beside the pages when the site is built.
        assert (DOCS / target).exists() or ((ROOT / target).suffix == ".ipynb" and (ROOT / target).exists()), target


needs_sphinx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "furo")),
    reason="sphinx is not installed: pip install '.[docs]'",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", str(folder / "trees"), "docs"]
    ran = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.mark.long
@needs_sphinx
def test_the_inventory_has_every_name(reference: Any, site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = {item for kind in inventory.data if kind.startswith("py:") for item in inventory.data[kind]}
    wanted = {full for page in reference.public_names().values() for full in page}
    assert wanted - names == set()


class Links(HTMLParser):
    """The links of a page, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def broken(folder: Path) -> list[tuple[str, str]]:
    """The links between pages that lead nowhere: to no file, or to no place in it."""
    pages = {path.resolve(): Links(path) for path in folder.rglob("*.html")}
    found = []
    for page, parsed in pages.items():
        for link in parsed.links:
            target, _, place = unquote(link).partition("#")
            if re.match(r"[a-z]+:", link) or link.startswith("//"):
                continue
            path = (page.parent / target.partition("?")[0]).resolve() if target else page
            # A page of source links back by one prefix for all of its module, so of these only the page is looked at.
            if not path.is_file() or (
                place and "_modules" not in page.parts and path in pages and place not in pages[path].places
            ):
                found.append((page.name, link))
    return found


@pytest.mark.long
@needs_sphinx
def test_every_link_between_pages_leads_somewhere(site: Path) -> None:
    assert broken(site) == []
    assert sum(len(Links(path).links) for path in site.rglob("*.html")) > 2000


def test_broken_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<a href='b.html#there'></a><a href='https://pyro.ai'></a><a href='#here'></a>")
    (tmp_path / "b.html").write_text("<p id='there'></p><img src='c.png'><a href='a.html#gone'></a>")
    assert sorted(broken(tmp_path)) == [("a.html", "#here"), ("b.html", "a.html#gone"), ("b.html", "c.png")]


@pytest.mark.long
@needs_sphinx
def test_every_class_and_function_has_its_source_beside_it(reference: Any, site: Path) -> None:
    for page, names in reference.public_names().items():
        text = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
        for full, value in names.items():
            if inspect.isclass(value) or inspect.isfunction(value):
                entry = text.partition(f'id="{full}"')[2].partition("</dt>")[0]
                assert "[source]" in entry, full


def test_links_to_the_outside_are_whole() -> None:
    """Whether they can be reached is for `make linkcheck` to say."""
    texts = [page.read_text() for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]]
    links = [link for text in texts for link in re.findall(r"\]\((http[^)\s]*)\)", text)]
    assert len(links) > 5
    for link in links:
        assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/[^\s<>\"]*)?", link), link


def test_the_findings_state_figures_that_stand_in_a_table_or_in_the_log() -> None:
    findings, _, tables = (DOCS / "results.md").read_text().partition("## How to read the tables")
    log = (ROOT / "results" / "LOG.md").read_text()
    figures = re.findall(r"\d[\d,.]* ± [\d.]*\d", findings)
    assert len(figures) > 10
    for figure in figures:
        assert figure in tables or figure in log, figure
