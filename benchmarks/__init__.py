"""Benchmarks: each is a command, `python -m benchmarks.NAME`, with a table for people and `--json` for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import jsonargparse


def command(main: Callable[..., dict[str, Any]], show: Callable[[dict[str, Any]], None]) -> None:
    """Runs a benchmark from the command line: its arguments are options, its result a table or one JSON object."""
    parser = jsonargparse.ArgumentParser(description=sys.modules[main.__module__].__doc__)
    parser.add_function_arguments(main, as_positional=True)
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    settings = parser.parse_args().as_dict()
    as_json = settings.pop("json")
    result = main(**settings)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        show(result)
