"""What grows with the memory: steps of `fit`, searches and changes at a thousand, a million and ten million slots.

Templates are letters, with pixels flipped at random, packed in one file on disk. The index is `"ivf"`. Its keys are
those of the letters with noise; `fit` replaces them, 256 after each step. Each step of `fit` is followed by the same
step on a memory of a thousand slots, and each search by one of faiss alone on the same keys. A process for each number
of slots; processor time of one thread.

    python -m benchmarks.growth
    python -m benchmarks.growth --slots [1000000] --json
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from benchmarks.scaling import BASE, FOUND, KEPT, SHAPE, draw, first, model, peak_gigabytes
from benchmarks.timing import clock
from pyro_vmem.memory import FaissIndex
from pyro_vmem.model.indexing import slot_keys

CALL = "import json, sys; from benchmarks.growth import of_size; print(json.dumps(of_size(*json.loads(sys.argv[1]))))"
DRAWN, NOISE = 10_000, 0.05  # different letters; the noise of a key, which has length 1


def write(path: Path, slots: int, letters: np.ndarray) -> None:
    """Writes packed letters over and over, one pixel in 32 flipped."""
    rows, random = np.lib.format.open_memmap(path, "w+", np.uint8, (slots, letters.shape[1])), np.random.default_rng(0)
    for start in tqdm(range(0, slots, DRAWN), desc="templates", file=sys.stderr):
        some = letters[: min(DRAWN, slots - start)]
        flips = [np.frombuffer(random.bytes(some.size), np.uint8).reshape(some.shape) for _ in range(5)]
        rows[start : start + len(some)] = some ^ np.bitwise_and.reduce(flips)


class Targets(Dataset[pv.data.Episode]):
    """Other targets at each step, from the letters."""

    def __init__(self, memory: pv.PackedMemory, letters: pv.PackedMemory, batch: int) -> None:
        self.memory, self.letters, self.batch = memory, letters, batch

    def __getitem__(self, index: int) -> pv.data.Episode:
        slots = torch.arange(index * self.batch, (index + 1) * self.batch) % self.letters.num_slots
        return pv.data.Episode(self.memory, self.letters.read(slots))


class InTurn(pv.train.Callback):
    """Times each step of `fit`, keys refreshed, and after it the same step of another trainer."""

    def __init__(self, trainer: pv.Trainer, episodes: Targets, steps: int) -> None:
        self.other, self.episodes, self.steps = trainer, episodes, steps
        self.refresher = pv.model.KeyRefresher(trainer.vma, episodes.memory)
        self.now, self.pairs = clock(torch.device("cpu")), list[tuple[float, float]]()

    def before_step(self, trainer: pv.Trainer, episode: pv.data.Episode) -> None:
        """Starts the clock."""
        self.start = self.now()

    def after_step(self, trainer: pv.Trainer, episode: pv.data.Episode) -> None:
        """Takes the other step."""
        middle, step = self.now(), trainer.result.steps
        self.other.step(self.episodes[step - 1])
        with self.other.autocast:
            self.refresher.step()
        self.pairs.append((middle - self.start, self.now() - middle))
        if step == self.steps:
            trainer.stop()  # before the end, when all keys would be made anew


def milliseconds(call: Callable[[int], Any], repeats: int) -> float:
    """The median processor time of calls, in milliseconds, after one that is not counted."""
    now, times = clock(torch.device("cpu")), []
    for number in range(repeats + 1):
        start = now()
        call(number)
        times.append(1000 * (now() - start))
    return statistics.median(times[1:])


def of_size(path: str, slots: int, width: int, batch: int, steps: int) -> dict[str, Any]:
    """The row of one number of slots."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    memory = pv.PackedMemory.open(Path(path, "templates.npy"), SHAPE)
    letters, thousand = pv.PackedMemory.open(Path(path, "letters.npy"), SHAPE), first(memory, BASE)
    memory = first(memory, slots)
    vmas = [model(width, pv.IndexedGuide(pv.SimilarityGuide(64), k=KEPT), f"of {n} slots") for n in (slots, BASE)]
    vmas[1].load_state_dict(vmas[0].state_dict())
    of_letters = slot_keys(vmas[0], letters)
    now = clock(torch.device("cpu"))
    for each in (thousand, memory):
        keys = torch.empty(each.num_slots, of_letters.shape[1])
        for some in torch.arange(each.num_slots).split(DRAWN):
            keys[some] = of_letters[: len(some)] + NOISE * torch.randn(len(some), keys.shape[1])
        start = now()
        each.index = FaissIndex(keys, "ivf")
    build, index = now() - start, memory.index
    assert isinstance(index, FaissIndex)

    settings: dict[str, Any] = {"steps": 10**6, "lr": 1e-4}
    other = pv.Trainer(vmas[1], "enumerate", pv.TrainingConfig(**settings))
    turns = InTurn(other, Targets(thousand, letters, batch), steps + 2)
    pv.fit(vmas[0], Targets(memory, letters, batch), "enumerate", callbacks=[turns], progress=False, **settings)
    pairs = turns.pairs[2:]

    queries = 10 * keys[torch.randint(slots, (batch,))] + torch.randn(batch, keys.shape[1])
    search = milliseconds(lambda _: index.search(queries, FOUND), 5)
    alone = milliseconds(lambda _: index._index.search(queries.numpy(), FOUND, params=index._parameters()), 5)
    x, key = letters.read(torch.tensor([0])), of_letters[:1]
    return {
        **{"slots": slots, "build_seconds": build},
        "seconds_a_step": statistics.median(step for step, _ in pairs),
        "ratio_to_1000": statistics.median(step / base for step, base in pairs),
        **{"search_milliseconds": search, "search_over_faiss": search / alone},
        "add_milliseconds": milliseconds(lambda _: memory.add(x, keys=key), 30),
        "remove_milliseconds": milliseconds(lambda number: memory.remove(torch.tensor([number])), 30),
        "peak_gigabytes": peak_gigabytes(),
    }


def main(
    slots: list[int] | None = None, width: int = 16, batch: int = 64, steps: int = 12, folder: Path | None = None
) -> dict[str, Any]:
    """Measures all of it.

    Args:
        slots: The numbers of slots; by default a thousand, a million and ten million.
        width: The channels of the convolutions at half resolution.
        batch: Targets per step, and queries per search.
        steps: Timed steps of each.
        folder: Where the templates are written, 98 bytes each. Default: the folder for temporary files.
    """
    sizes, rows = slots or [1000, 10**6, 10**7], []
    with tempfile.TemporaryDirectory(dir=folder) as made:
        images = pv.data.glyphs(drawings=4).images
        letters = pv.PackedMemory.pack(draw(images, DRAWN, seed=0), path=Path(made, "letters.npy"))
        write(Path(made, "templates.npy"), max(*sizes, BASE), letters.packed.numpy())
        for size in tqdm(sizes, desc="sizes", file=sys.stderr):
            arguments = json.dumps([made, size, width, batch, steps])
            ran = subprocess.run([sys.executable, "-c", CALL, arguments], capture_output=True, text=True, check=False)
            if ran.returncode:
                raise RuntimeError(f"{size} slots: {ran.stderr[-2000:]}")
            rows.append(json.loads(ran.stdout.splitlines()[-1]))
    return {"batch": batch, "width": width, "kept": KEPT, "found": FOUND, "torch": torch.__version__, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """A row for each number of slots."""
    names = [name for name in result["rows"][0] if name != "slots"]
    table = Table("slots", *(name.replace("_", " ") for name in names))
    for row in result["rows"]:
        table.add_row(f"{row['slots']:,}", *(f"{row[name]:.3g}" for name in names))
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
