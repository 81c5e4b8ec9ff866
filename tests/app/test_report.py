"""The page of a run: its verdict, its numbers, and that it is whole."""

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from reports import METRICS, a_report, everything

from pyro_vmem import plots
from pyro_vmem.app import report as report_module
from pyro_vmem.app.report import write_report
from pyro_vmem.app.report_text import verdict

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The tags, text and attributes of a page; fails where a tag is not closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        self.text = " ".join(self.text.split())  # as a browser shows it
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path, **changes) -> Page:
    return Page(write_report(folder / "report.html", a_report(**changes)).read_text(encoding="utf-8"))


def test_the_parser_sees_an_open_tag() -> None:
    with pytest.raises(AssertionError):
        Page("<p><b>text</p>")


def test_structure(tmp_path) -> None:
    path = write_report(tmp_path / "new" / "report.html", a_report())
    assert path == tmp_path / "new" / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>\n")
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in source
    headings = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings == ["h1"] + ["h2"] * 8
    assert path.stat().st_size < 2_000_000


def test_every_section(tmp_path) -> None:
    page = page_of(tmp_path, **everything())
    alts = [str(attributes["alt"]) for attributes in page.all("img")]
    assert len(alts) == 5 + 2 + 1 + 1 + 2
    assert (
        "Heat map of q(a | M, x) for 3 targets and 20 slots, both sorted by class; the right slots are framed." in alts
    )
    assert "3 targets, the part of each that was observed, and 4 completions." in alts
    assert "Evidence in nats per datapoint by memory: right -0.5, wrong -16.0, blank -1600.0." in alts
    assert "A blank memory, which the model may never have seen, loses 1,599 nats." in page.text
    assert "Reliability diagram: calibration error 0.071." in alts
    assert "Pareto k-hat of 4 datapoints; 2 are above 0.7." in alts
    assert "The second bar is the exact posterior" in page.text
    assert [tag for tag, _ in page.tags].count("h2") == 10


def test_what_is_wrong_comes_first(tmp_path) -> None:
    bad = METRICS | {"mutual_information": 0.01, "memory_worth_nats": 0.1}
    text = page_of(tmp_path, metrics=bad).text
    first = text.index("The address guide ignores the target")
    assert text.index("A run") < first < text.index("The memory is not used") < text.index("With 20 unseen")
    assert text[:first].split() == ["A", "run", "A", "run"]  # title and heading
    assert "ignores the target" not in page_of(tmp_path).text
    assert {"class": "verdict wrong"} in page_of(tmp_path, metrics=bad).all("p")
    assert {"class": "verdict"} in page_of(tmp_path).all("p")


def test_nothing_rests_on_evidence_whose_error_is_unknown(tmp_path) -> None:
    known, unknown = (page_of(tmp_path, metrics=METRICS | {"error_unknown": share}).text for share in (0.04, 0.98))
    assert "the memory is worth 17.2 nats per image" in known
    assert "is worth 17.2" not in unknown
    assert "not stated: for 98 % of the images the error of the evidence is unknown." in " ".join(unknown.split())
    assert "71 % of the time" in unknown  # what stands


def test_drawings_take_the_colour_of_the_pages_text(tmp_path) -> None:
    """Light or dark by the reader's scheme, and a mid-tone that is legible on both where styles are not understood."""
    tone = plots.ON_ANY_PAGE["text.color"]
    for attributes in page_of(tmp_path, **everything()).all("img"):
        svg = base64.b64decode(str(attributes["src"]).partition(",")[2]).decode()
        assert "prefers-color-scheme: dark" in svg
        assert svg.count(f"var(--ink, {tone})") == svg.count(tone) > 0
        background = re.search(r'<g id="patch_1">\s*<path[^>]*?style="([^"]*)"', svg)
        assert background is None or "fill: none" in background.group(1)


def test_fetches_nothing(tmp_path) -> None:
    page = page_of(tmp_path, **everything())
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "style"):
            assert (attributes.get(name) or "data:").startswith("data:")
    style = (tmp_path / "report.html").read_text(encoding="utf-8").split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_figures_are_whole_drawings_with_a_description(tmp_path) -> None:
    figures = page_of(tmp_path).all("img")
    assert len(figures) == 5
    for attributes in figures:
        prefix = "data:image/svg+xml;base64,"
        assert attributes["src"].startswith(prefix)
        root = ElementTree.fromstring(base64.b64decode(attributes["src"].removeprefix(prefix)))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        for element in root.iter():
            link = element.get("{http://www.w3.org/1999/xlink}href", "#")
            assert link.startswith(("#", "data:"))
        assert len(attributes["alt"]) > 40
    assert "For 1 of 3 the first template is of the right class." in figures[0]["alt"]
    assert "val_bound -112.0" in figures[3]["alt"]


def test_numbers_appear(tmp_path) -> None:
    text = page_of(tmp_path).text
    for part in [
        *("98.3 ± 0.4 nats", "115.5 ± 0.6 nats", "17.2 ± 0.5 nats", "2.41 ± 0.03 nats", "3.48 bits", "80 % of log |M|"),
        *("2.74 ± 0.02 nats", "3.95 bits", "71.2 ± 2.1 %", "80.3 ± 1.8 %", "chance 5 %", "182 s", "4,000", "400"),
        *("from 10 samples", "log C = 3.00", "glyphs", "pyro-vmem demo --seed 0", verdict(METRICS)),
        *("took 25 s for 160,000 decoder passes, 6,504 per second", "12.3 ± 0.2 nats", "2.30 ± 0.03 nats", "0.071"),
    ]:
        assert part in text


def test_one_episode_has_no_standard_error(tmp_path) -> None:
    errors = {name: math.nan for name in METRICS if name.endswith("_se")}
    text = page_of(tmp_path, metrics=METRICS | errors | {"num_episodes": 1}).text
    assert "in 1 episode of held-out classes." in text
    assert "98.3 nats" in text
    assert "nan" not in text


def test_no_terms_and_no_command(tmp_path) -> None:
    page = page_of(tmp_path, history=[{"step": 5}], command="")
    assert "No terms were recorded." in page.text
    assert "How to repeat it" not in page.text
    assert len(page.all("img")) == 3


def test_numpy_arrays_and_many_rows(tmp_path) -> None:
    report = a_report()
    x = report.lookup["templates"].repeat(2, 1, 1, 1).numpy()
    labels, q = report.lookup["labels"].numpy(), report.lookup["probabilities"][:1].repeat(40, 1).numpy()
    lookup = {"targets": x, "target_labels": labels.repeat(2), "templates": x[:20], "labels": labels}
    lookup["probabilities"] = q
    generation = {"templates": x, "samples": x[:, None].repeat(30, 1)}
    gain = report.information_gain | {name: report.information_gain[name].numpy() for name in ("gain", "exact")}
    page = page_of(tmp_path, lookup=lookup, generation=generation, information_gain=gain)
    assert page.all("img")[0]["alt"].startswith("8 target images")
    assert page.all("img")[1]["alt"] == "8 framed templates, each beside 6 images that the model draws from it."


def test_text_is_escaped(tmp_path) -> None:
    hostile = "</title><script>alert('$verdict & \"x\"')</script>"
    page = page_of(tmp_path, title=hostile, facts={hostile: hostile}, command=hostile)
    assert page.all("script") == []
    assert page.text.count(hostile) == 5  # title, heading, verdict, name and value of the fact, command


def test_nothing_is_left_when_a_figure_fails(tmp_path, monkeypatch) -> None:
    path = write_report(tmp_path / "report.html", a_report())
    before = path.read_bytes()

    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(plots, "learning_curves", fail)
    for name in ("report.html", "other.html"):
        with pytest.raises(RuntimeError, match="no ink"):
            write_report(tmp_path / name, a_report(title="Another run"))
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_bytes() == before


def test_missing_metrics_are_named(tmp_path) -> None:
    metrics = {name: value for name, value in METRICS.items() if name != "steps"}
    with pytest.raises(ValueError, match=r"metrics: \['steps'\] are missing"):
        write_report(tmp_path / "report.html", a_report(metrics=metrics))
    assert list(tmp_path.iterdir()) == []


def test_leaves_pyplot_and_settings_alone(tmp_path) -> None:
    import matplotlib.pyplot as plt

    settings, figures = dict(matplotlib.rcParams), plt.get_fignums()  # another test of this process may have drawn
    write_report(tmp_path / "report.html", a_report(**everything()))
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == figures


def test_an_argument_that_no_figure_has_is_named(tmp_path) -> None:
    lookup = a_report().lookup
    with pytest.raises(TypeError, match="tempaltes"):
        write_report(tmp_path / "report.html", a_report(lookup=lookup | {"tempaltes": lookup["templates"]}))


def test_the_template_lies_beside_its_module_and_escapes_all() -> None:
    template = Path(report_module.__file__).with_name("report.html.j2")
    assert "<!DOCTYPE html>" in template.read_text(encoding="utf-8")
    assert "|safe" not in template.read_text(encoding="utf-8").replace(" ", "")  # every value is escaped
