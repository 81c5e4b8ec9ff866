"""Whether training waits for data: episodes a second of every sampler, over the steps a second that use them.

Each sampler loads in this process; the training episodes also in a thread ahead of the steps, and in worker processes.
The steps are those of the default model on the training episodes. All take turns, because machines drift.

    python -m benchmarks.load
    python -m benchmarks.load --seconds 0.2 --json
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem.data import EpisodeSampler, MixedEpisodes, RecallSampler, protocol
from pyro_vmem.data.loading import _in_a_thread, load_ahead

ENDLESS = 10**9


def rate(loaded: Iterator[Any], seconds: float) -> float:
    """Items a second, after the first two, which start whatever loads them."""
    next(loaded), next(loaded)
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds or not count:
        next(loaded)
        count += 1
    return count / taken if taken > 0 else float(count)


def over_and_over(episodes: Any) -> Iterator[Any]:
    """What a source with an end loads, from the start again after its end: a fast machine gets there."""
    while True:
        yield from load_ahead(episodes, 0, len(episodes))


def sources(episodes: EpisodeSampler, held_out: pv.data.FewShotDataset) -> dict[str, Callable[[], Any]]:
    """What loads, by name, the training episodes first."""
    recall = RecallSampler(held_out, 64, 16)
    return {
        "training episodes": lambda: load_ahead(episodes, 0, ENDLESS),
        "training episodes, thread": lambda: _in_a_thread(episodes, range(ENDLESS), pin=False),
        "training episodes, 1 worker": lambda: load_ahead(episodes, 0, ENDLESS, workers=1),
        "training episodes, 2 workers": lambda: load_ahead(episodes, 0, ENDLESS, workers=2),
        "mixed": lambda: load_ahead(MixedEpisodes([episodes, recall]), 0, ENDLESS),
        "recall": lambda: load_ahead(recall, 0, ENDLESS),
        **{
            f"protocol {name}": lambda name=name: over_and_over(protocol(name).episodes(held_out, shots=1))
            for name in ("gmn", "gmn-distinct", "zholus")
        },
    }


def main(seconds: float = 1.0, repeats: int = 3, width: int = 32) -> dict[str, Any]:
    """Measures all in turn.

    Args:
        seconds: How long each loads at a time.
        repeats: Turns.
        width: The channels of the convolutions at half resolution, of the model whose steps are measured.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")  # says torch where cores are few
    train, held_out = pv.data.glyphs().split(by="alphabet", test=0.2)
    episodes = EpisodeSampler(train, n_way=16, k_shot=4, n_query=4, rotate=True)
    vma = pv.VMA.for_images(train.image_shape, width=width)
    loaders = sources(episodes, held_out)
    steps: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(repeats):
        history = pv.fit(vma, episodes, steps=4, validate_every=1, progress=False).history
        steps.append(3 / (history[-1]["seconds"] - history[0]["seconds"]))
        for name, start in loaders.items():
            with closing(start()) as loaded:
                rates[name].append(rate(loaded, seconds))
    rows = [
        {
            "source": name,
            "episodes_per_second": statistics.median(found),
            "over_step": statistics.median(one / step for one, step in zip(found, steps, strict=True)),
        }
        for name, found in rates.items()
    ]
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps_per_second": statistics.median(steps),
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """The rates as a table."""
    table = Table("episodes", "a second", "over the steps a second")
    for row in result["rows"]:
        table.add_row(row["source"], f"{row['episodes_per_second']:.0f}", f"{row['over_step']:.0f}")
    Console().print(table, f"The default model takes {result['steps_per_second']:.1f} steps a second.", sep="\n")


if __name__ == "__main__":
    command(main, show)
