"""The tables of the page on performance, from what the benchmarks printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from IPython.display import Markdown

Row = dict[str, Any]
BENCHMARKS = Path(__file__).parent / "benchmarks"


def read(name: str) -> Row:
    """What a benchmark printed."""
    found: Row = json.loads((BENCHMARKS / f"{name}.json").read_text())
    return found


def table(rows: list[Row], columns: dict[str, str], digits: int = 2) -> Markdown:
    """Columns by their titles; `columns` maps a title to a key."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [number(row.get(key), digits) for key in columns.values()]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return Markdown("\n".join(lines))


def number(value: Any, digits: int = 2) -> str:
    """A cell of a table."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def shares(rows: list[Row], *keys: str) -> list[Row]:
    """Shares as percentages, and a guide in the words of the page."""
    words = [{key: f"{100 * row[key]:.0f} %" for key in keys if row.get(key) is not None} for row in rows]
    guides = [{"guide": row["guide"].replace("too sure", "overconfident")} if "guide" in row else {} for row in rows]
    return [row | shown | guide for row, shown, guide in zip(rows, words, guides, strict=True)]


def line(what: str, floor: float | str, here: float | None, ceiling: float | None, unit: str) -> Row:
    """A row of the table of floors; a floor that was not reached is a text."""
    gap = None if isinstance(floor, str) or here is None else f"{here / floor:.2g}"
    shown = [
        value if isinstance(value, str) else number(value, 3) + unit * (value is not None)
        for value in (floor, here, ceiling)
    ]
    return dict(zip(("what", "floor", "here", "ceiling"), [what, *shown], strict=True)) | {"gap": gap}


def floors() -> Markdown:
    """What cannot be undercut, what was measured, and the limit that was set."""
    overhead, growth, quality, evidence = (read(n) for n in ("overhead", "growth", "time_to_quality", "evidence"))
    steps, rows = {row["step"]: row["milliseconds"] for row in overhead["rows"]}, []
    for row in growth["rows"][1:]:
        slots = f"{row['slots']:,} slots"
        base = row["seconds_a_step"] / row["ratio_to_1000"]
        rows.append(line(f"step of `fit`, {slots}", base, row["seconds_a_step"], 2 * base, " s"))
        alone = row["search_milliseconds"] / row["search_over_faiss"]
        rows.append(line(f"search, {slots}", alone, row["search_milliseconds"], 1.2 * alone, " ms"))
        for what in ("add", "remove"):
            key = f"{what}_milliseconds"
            rows.append(line(f"{what} a slot, {slots}", growth["rows"][0][key], row[key], 1.0, " ms"))
    rows.append(line("smallest `svi.step`", steps["by hand, vectors"], steps["svi.step, vectors"], 8.0, " ms"))
    recipes = {row["recipe"]: row for row in quality["rows"]}
    for recipe, goal in (("paper", 5), ("default", 2)):
        for words, measure in (("the bound", "bound"), (f"{quality['hit_rate']:.0%} of 20", "hit_rate")):
            key = f"seconds_to_{measure}"
            needed, ours = recipes[recipe][key], recipes["best"][key]
            floor = needed or f"over {recipes[recipe]['seconds']:.0f} s"
            rows.append(line(f"training to {words}, {recipe} recipe", floor, ours, needed and needed / goal, " s"))
    for row in overhead["start_up"]:
        limit = 1.1 * row["floor"] if "import" in row["command"] else 0.5
        rows.append(line(f"`{row['command']}`", row["floor"], row["seconds"], limit, " s"))
    for row in shares(evidence["to_error"]):
        if row["method"] == "sampled":
            plain = row["seconds"] if row["reached"] else f"over {row['seconds']:.0f} s"
        elif row["method"] == "refined":
            rows.append(
                line(f"evidence of {row['targets']:,} targets, {row['guide']}", plain, row["seconds"], None, " s")
            )
    columns = {"what": "what", "floor": "floor", "here": "here", "ceiling": "ceiling", "here over floor": "gap"}
    return table(rows, columns)
