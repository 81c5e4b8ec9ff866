"""The report in a real browser: nothing fails or is fetched, and it can be read on a phone, by day and by night."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from reports import a_report, everything

from pyro_vmem.app.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
FLAGS = (
    *(
        "--headless",
        "--hide-scrollbars",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
    ),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser would look for updates of its own
)
DARK = "--blink-settings=preferredColorScheme=0"
WIDE, PHONE = 1200, 360

# What a reader would see, measured in frames of some widths.
MEASURE = """
const rgb = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = colour => rgb(colour).map(v => v / 255).map(v => v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
function measure(frame) {
    const d = frame.contentDocument, w = frame.contentWindow, width = d.documentElement.clientWidth;
    const page = w.getComputedStyle(d.body).backgroundColor;
    const all = [...d.body.querySelectorAll("*")].filter(e => !e.closest("pre") || e.tagName == "PRE");
    const texts = all.filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()));
    const styles = texts.map(e => w.getComputedStyle(e));
    return {
        width, page,
        scroll: d.documentElement.scrollWidth,
        wide: all.filter(e => e.getBoundingClientRect().right > width + 0.5).map(e => e.tagName),
        headings: d.querySelectorAll("h2").length,
        images: [...d.images].map(i => i.complete && i.naturalWidth ? i.clientWidth / i.naturalWidth : 0),
        font: Math.min(...styles.map(s => parseFloat(s.fontSize))),
        contrast: Math.min(...styles.map(s => contrast(s.color, page))),
        fetched: w.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    };
}
onload = () => {
    const seen = [...document.querySelectorAll("iframe")].map(measure);
    document.body.innerHTML = "<pre>" + JSON.stringify(seen) + "</pre>";
};
"""


def look(page: str, folder: Path, *flags: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What is measured at both widths, and what the console says."""
    frames = "".join(f'<iframe width="{w}" height="800" srcdoc="{html.escape(page)}"></iframe>' for w in (WIDE, PHONE))
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"<!DOCTYPE html><meta charset='utf-8'><body>{frames}<script>{MEASURE}</script></body>")
    profile = folder / "profile"
    command = [str(BROWSER), *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", wrapper.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    shutil.rmtree(profile, ignore_errors=True)
    dumped = re.search(r"<pre>(.*)</pre>", ran.stdout, re.DOTALL)
    assert dumped is not None, ran.stderr[-2000:]
    said = [line for line in ran.stderr.splitlines() if ":CONSOLE:" in line]
    return json.loads(html.unescape(dumped[1])), said


@pytest.mark.parametrize("flags", [(), (DARK,)], ids=["light", "dark"])
def test_a_reader_sees_all_of_it(flags: tuple[str, ...], tmp_path: Path) -> None:
    report = a_report(**everything(), command="pyro-vmem train " + "--a_long_option with_a_value " * 20)
    seen, said = look(write_report(tmp_path / "report.html", report).read_text(encoding="utf-8"), tmp_path, *flags)
    assert said == []
    assert [page["width"] for page in seen] == [WIDE, PHONE]
    for page in seen:
        assert page["scroll"] <= page["width"], page["wide"]
        assert page["wide"] == []
        assert page["headings"] == 10
        assert page["fetched"] == []
        assert len(page["images"]) == 11
        assert min(page["images"]) > 0.7  # drawn, and not so much smaller that its text is lost
        assert page["font"] >= 13
        assert page["contrast"] >= 4.5
        assert (page["page"] == "rgb(255, 255, 255)") == (not flags)


def test_what_would_be_wrong_is_seen(tmp_path: Path) -> None:
    seen, said = look(
        "<body style='background: white'><p style='width: 700px; color: #aaa; font-size: 9px'>wide</p>"
        "<img src='http://localhost:9/a.png'><script>throw new Error('from the page')</script></body>",
        tmp_path,
    )
    assert any("from the page" in line for line in said)
    wide, phone = seen
    assert wide["scroll"] == wide["width"]
    assert phone["scroll"] > phone["width"]
    assert phone["wide"] == ["P"]
    assert (phone["font"], phone["images"]) == (9, [0])
    assert phone["contrast"] < 3
    assert phone["fetched"] == ["http://localhost:9/a.png"]


def test_the_page_itself_forbids_what_it_does_not_need(tmp_path: Path) -> None:
    """Whatever finds its way into it: no script runs, and nothing is fetched."""
    page = write_report(tmp_path / "report.html", a_report()).read_text(encoding="utf-8")
    added = "<script>document.title = 'changed'</script><img src='http://localhost:9/a.png'></main>"
    seen, said = look(page.replace("</main>", added), tmp_path)
    assert sum("Content Security Policy" in line for line in said) == 2 * len(seen)  # script and image, in each frame
