"""How many decoder passes refined latents save for the evidence, on Omniglot, for models that were trained for long.

The standard error of an estimate is how far it is spread when it is made again: here it is made many times, by sampling
addresses with all decoder passes, and by refining latents with fewer; a gradient counts as two passes. Beside it are
the root mean square of the distance to a long run, which includes the bias of the logarithm of a mean, the error that
each estimate states, and the time per target. Ratios are to sampling with all passes, with bootstrap intervals.

    python -m benchmarks.refined
    python -m benchmarks.refined --targets 40 --repeats 8 --json   # as on the page about performance, in 25 minutes
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from benchmarks.reproduce import MAX_DECODES, machine
from pyro_vmem.diagnostics.evidence import Method, estimate_evidence

INDEPENDENT = "omniglot28-independent"
CASES = ((INDEPENDENT, 20), (INDEPENDENT, 64), (INDEPENDENT, 256), ("omniglot28", 64))  # models; slots in memory
COUNTS = (51, 100, 200, 400)  # decoder passes of refined latents
RESAMPLED = 2000  # sets of targets for an interval


def on_targets(
    name: str, slots: int, decodes: int, targets: int, repeats: int, long: int, device: str
) -> list[dict[str, Any]]:
    """A row for sampling with all decoder passes, and one for refined latents with each of `COUNTS`.

    One example each of `slots` unseen characters is in memory. The truth is the mean density of `long` refined runs of
    2,000 decoder passes.
    """
    vma = pv.VMA.from_pretrained(name).to(device)
    test = pv.data.protocol("gmn-distinct").datasets()[2]
    episode = pv.data.EpisodeSampler(test, n_way=slots, k_shot=1, n_query=-(-targets // slots), seed=0)[0].to(device)
    memory, x = episode.memory, episode.x[:targets]

    def runs(count: int, method: Method, seeds: range) -> tuple[Tensor, Tensor, float]:
        how: dict[str, Any] = {
            "precision": "auto",
            "max_decodes": MAX_DECODES[x.device.type],
            "budget": 0,
            "warn": False,
        }
        begin = time.perf_counter()
        found = [estimate_evidence(vma, memory, x, count, method, seed=s, **how) for s in seeds]
        seconds = time.perf_counter() - begin
        parts = [torch.stack([getattr(f, part) for f in found]) for part in ("log_evidence", "standard_error")]
        return parts[0].double().cpu(), parts[1].double().cpu(), seconds

    truth = runs(2000, "refined", range(1000, 1000 + long))[0].logsumexp(0) - math.log(long)
    rows: list[dict[str, Any]] = []
    sampled: dict[str, Tensor] = {}
    settings: list[tuple[Method, int]] = [("sampled", decodes), *(("refined", count) for count in COUNTS)]
    for method, count in settings:
        found, stated, seconds = runs(count, method, range(repeats))
        errors = {
            "standard_error": found.var(0),
            "rmse": (found - truth).square().mean(0),
            "stated_standard_error": stated.square().nanmean(0),
        }
        sampled = sampled or errors
        row: dict[str, Any] = {"case": f"{name}, |M| = {slots}", "method": method, "decodes": count}
        row |= {"times_fewer_decodes": decodes / count, "gap": float((truth - found).mean())}
        for kind, squares in errors.items():
            row[kind] = float(squares.mean().sqrt())
            row[f"{kind}_ratio"], row[f"{kind}_ratio_interval"] = ratio(squares, sampled[kind])
        row["median_error"] = float((found - truth).abs().median())
        row["covered"] = float(((found - truth).abs() < 1.96 * stated).double().mean())
        row["targets_per_second"] = repeats * targets / seconds
        rows.append(row)
    return rows


def ratio(squares: Tensor, of: Tensor) -> tuple[float, list[float]]:
    """The ratio of two root mean squares over targets, and the 95 % interval of the bootstrap."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(of), (RESAMPLED, len(of)), generator=generator)
    spread = (squares[drawn].mean(-1) / of[drawn].mean(-1)).sqrt()
    return float((squares.mean() / of.mean()).sqrt()), spread.quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def main(
    decodes: int = 1024,
    targets: int = 8,
    repeats: int = 4,
    long: int = 2,
    device: str = "cpu",
    cases: int | None = None,
) -> dict[str, Any]:
    """Measures all of it.

    Args:
        decodes: Decoder passes per target of sampling.
        targets: Targets of each model.
        repeats: How many times each estimate is made.
        long: Runs that the truth is the mean of.
        device: Where.
        cases: How many of the models; all by default.
    """
    rows: list[dict[str, Any]] = []
    for name, slots in tqdm(CASES[:cases], desc="models", file=sys.stderr):
        rows += on_targets(name, slots, decodes, targets, repeats, long, device)
    sizes = {"decodes": decodes, "targets": targets, "repeats": repeats, "long": long}
    return {**sizes, "machine": machine(device), "rows": rows}


def show(result: dict[str, Any]) -> None:
    """One table."""
    title = f"{result['targets']} targets, each estimate made {result['repeats']} times; errors in nats"
    headings = ("standard error", "over sampling's", "RMSE", "stated", "covered", "targets/s")
    table = Table("case", "method", "decodes", *headings, title=title)
    for row in result["rows"]:
        low, high = row["standard_error_ratio_interval"]
        over = f"{row['standard_error_ratio']:.2f} ({low:.2f} to {high:.2f})"
        errors = [f"{row[name]:.2f}" for name in ("rmse", "stated_standard_error")]
        cells = [
            f"{row['standard_error']:.2f}",
            over,
            *errors,
            f"{row['covered']:.0%}",
            f"{row['targets_per_second']:.3g}",
        ]
        table.add_row(row["case"], row["method"], str(row["decodes"]), *cells)
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
