"""What a second process is worth: the same run by one process and by two, at the same minibatch.

Steps a second. The runs take
turns, many times, and the median of the ratios counts, because machines drift. Each runs in processes of its own, which
talk by gloo.

    python -m benchmarks.ranks
    python -m benchmarks.ranks --steps 20 --json
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem.data import EpisodeSampler


def work(rank: int, count: int, threads: int, steps: int, width: int, episodes: EpisodeSampler, folder: str) -> None:
    """One process's part of a run; the first leaves its history in the folder."""
    torch.set_num_threads(threads)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    torch.manual_seed(0)
    vma = pv.VMA.for_images(episodes.dataset.image_shape, width=width)
    result = pv.fit(vma, episodes, steps=steps, validate_every=1, precision="float32", progress=False)
    if rank == 0:
        Path(folder, "history.json").write_text(json.dumps(result.history))
    if count > 1:
        dist.destroy_process_group()


def run(count: int, threads: int, steps: int, width: int, episodes: EpisodeSampler) -> float:
    """Steps a second of a run by so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (count, threads, steps, width, episodes, folder), nprocs=count, start_method="fork")
        rows = json.loads(Path(folder, "history.json").read_text())
    times = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(rows)]
    return 1 / statistics.median(times)


def main(steps: int = 10, repeats: int = 3, ways: int = 16, queries: int = 4, width: int = 32) -> dict[str, Any]:
    """Runs all in turn.

    Args:
        steps: Steps of each run.
        repeats: Runs of each kind.
        ways: Classes in memory, of four slots each.
        queries: Targets of each class.
        width: The channels of the convolutions at half resolution.
    """
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    episodes = EpisodeSampler(pv.data.glyphs(), n_way=ways, k_shot=4, n_query=queries)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kinds = list(dict.fromkeys([(1, 1), (2, 1), (1, cores)]))  # processes, threads of each
    rounds = [{kind: run(*kind, steps, width, episodes) for kind in kinds} for _ in range(repeats)]
    rows = [
        {
            "processes": kind[0],
            "threads": kind[1],
            "steps_per_second": statistics.median(found[kind] for found in rounds),
            "ratio_to_one": statistics.median(found[kind] / found[1, 1] for found in rounds),
        }
        for kind in kinds
    ]
    two = rows[kinds.index((2, 1))]
    return {
        "torch": torch.__version__,
        "cores": cores,
        "targets": ways * queries,
        "steps": steps,
        "ratio_two_processes": two["ratio_to_one"],
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """The runs as a table."""
    table = Table("processes", "threads each", "steps/s", "over one")
    for row in result["rows"]:
        table.add_row(
            str(row["processes"]),
            str(row["threads"]),
            f"{row['steps_per_second']:.2f}",
            f"{row['ratio_to_one']:.2f}",
        )
    Console().print(table, f"{result['targets']} targets per step, on {result['cores']} cores.", sep="\n")


if __name__ == "__main__":
    command(main, show)
