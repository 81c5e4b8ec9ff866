"""The shell of a page: escaped text, tables, drawings that follow the page's light or dark scheme, and its style."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping
from string import Template
from typing import Any

from pyro_vmem._utils.extras import require
from pyro_vmem.plots import ON_ANY_PAGE

__all__ = ["definitions", "drawing", "escape", "page", "pair", "preformatted", "table"]


def escape(text: str) -> str:
    """Text that is no markup, whatever it holds.

    Example:
        >>> escape("p(a | M) < 1 & \\"q\\"")
        'p(a | M) &lt; 1 &amp; &quot;q&quot;'
    """
    return html.escape(str(text))


def table(rows: Iterable[tuple[str, str, str]], head: tuple[str, str]) -> str:
    """A table of names, values and meanings; a value may have lines."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}<small>{escape(meaning)}</small></th><td>{escape(value)}</td></tr>\n'
        for name, value, meaning in rows
    )
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    return f"<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def definitions(facts: Mapping[str, str]) -> str:
    """A list of names and values."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in facts.items())
    return f"<dl>\n{rows}</dl>\n"


def preformatted(text: str) -> str:
    """A command, to be copied."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>\n'


def pair(parts: Iterable[str]) -> str:
    """Parts beside each other, or below where the page is narrow."""
    return f'<div class="pair">{"".join(parts)}</div>\n'


def drawing(
    size: tuple[float, float], draw: Callable[[Any], object], alt: str, caption: str, crop: bool = False
) -> str:
    """A figure as an image within the page, its text and lines in the colour of the page's text.

    Arguments:
        size: Width and height in inches; small, so that its text can be read on a phone.
        draw: Draws on the figure it is given.
        alt: What the figure shows, in words.
        caption: What to look for.
        crop: Whether to cut the figure to what is drawn, in place of laying it out.
    """
    with require("matplotlib", "plots").rc_context(ON_ANY_PAGE):
        figure = require("matplotlib.figure", "plots").Figure(size, layout=None if crop else "constrained")
        draw(figure)
        file = io.BytesIO()
        tight: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.05} if crop else {}
        figure.savefig(file, format="svg", metadata={"Date": None}, **tight)
    # An image of its own keeps the ids of one drawing from those of the next.
    data = base64.b64encode(_following_the_page(file.getvalue().decode()).encode()).decode("ascii")
    return (
        f'<figure>\n<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>\n"
    )


def _following_the_page(svg: str) -> str:
    """The mid-tone of text becomes that of the page; where styles are not understood it stays a mid-tone."""
    tone: str = ON_ANY_PAGE["text.color"]
    start = svg.index(">", svg.index("<svg")) + 1
    body = svg[start:].replace(f": {tone}", f": var(--ink, {tone})")
    return f"{svg[:start]}\n<style>{_INK}</style>{body}"


def page(title: str, lead: str, notes: Iterable[str], sections: Mapping[str, str], wrong: bool = False) -> str:
    """The whole page.

    Arguments:
        title: The heading.
        lead: What a reader has to know first.
        notes: Smaller paragraphs below it.
        sections: The body of each section, as markup, by its heading.
        wrong: Whether the first lines warn.
    """
    return _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        lead=escape(lead),
        mood="verdict wrong" if wrong else "verdict",
        notes="".join(f'<p class="soft">{escape(note)}</p>\n' for note in notes),
        sections="".join(f"<section>\n<h2>{escape(name)}</h2>\n{body}</section>\n" for name, body in sections.items()),
    )


_INK = "svg { --ink: #3d444d; } @media (prefers-color-scheme: dark) { svg { --ink: #c4c9cf; } }"

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1f2328; --soft: #57606a; --rule: #d8d8d3; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --text: #e6e6e3; --soft: #a8b0b8; --rule: #3a4048; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 48rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; }
section > :not(h2) + figure, section > :not(h2) + .pair, section > :not(h2) + table { margin-top: 1.5rem; }
.wrong { --mark: #d55e00; }
.verdict { font-size: 1.2rem; line-height: 1.45; border-left: 4px solid var(--mark); padding-left: .9rem; margin: 0; }
.soft, figcaption, small { color: var(--soft); font-size: .875rem; }
.soft { margin: .75rem 0 0; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .5rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; text-align: left; }
th { font-weight: 600; }
small { display: block; font-weight: 400; }
td, thead th + th { white-space: pre; text-align: right; padding-left: 1rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; max-width: 34rem; }
img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .5rem; }
.pair { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid var(--rule); border-radius: .5rem; }
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p class="$mood">$lead</p>
$notes</header>
$sections</main>
</body>
</html>
""")
