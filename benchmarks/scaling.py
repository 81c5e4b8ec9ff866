"""What a training step takes as the memory grows to a million templates: time, peak memory, and what an index finds.

Templates are letters, each moved, turned, sheared and stretched on its own, packed as bits in one file. `exact`
sums all slots; `truncated` encodes all without gradient and the 8 most probable again with it; `indexed` looks those up
and encodes them alone. A
process for each number of slots times its steps in turn with those of an indexed memory of 1,000, in processor time,
because the machine may be shared; peak memory is that of all it did so far. A row whose step would decode or encode too
much to be timed has no time.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --json --slots [100,1000,10000]
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from pyro_vmem._utils.precision import autocast
from pyro_vmem.memory import Hits, recall

SHAPE, KEPT, FOUND, BASE = (1, 28, 28), 8, 32, 1000
CALL = "import json, sys; from benchmarks.scaling import of_size; print(json.dumps(of_size(*json.loads(sys.argv[1]))))"
MOST_DECODES, MOST_ENCODES = 10_000, 20_000  # a step


def jittered(images: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Binary drawings of letters taken at random, each moved, turned, sheared and stretched a little."""
    letters = images[torch.randint(len(images), (n,), generator=generator)].float() / 255
    maps = torch.eye(2, 3) + 0.25 * (torch.rand(n, 2, 3, generator=generator) - 0.5)
    grid = F.affine_grid(maps, list(letters.shape), align_corners=False)
    return (F.grid_sample(letters, grid, align_corners=False) > 0.5).float()


def draw(images: Tensor, n: int, seed: int) -> Iterator[Tensor]:
    """`n` of them, some at a time."""
    generator = torch.Generator().manual_seed(seed)
    for start in tqdm(range(0, n, 5000), desc="templates", file=sys.stderr):
        yield jittered(images, min(5000, n - start), generator)


def peak_gigabytes() -> float:
    """The most memory that this process had at any time; `getrusage` would count that of its parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1e6


def model(width: int, guide: pv.AddressGuide, name: str) -> pv.VMA:
    """The convolutional model with this address guide."""
    return pv.VMA.for_images(SHAPE, latent_dim=16, num_features=64, width=width, address_guide=guide, name=name)


class Steps:
    """Training steps of a model on a memory, of which so many templates are read at most; as those of `fit`."""

    def __init__(self, vma: pv.VMA, memory: pv.Memory, x: Tensor, reads: int) -> None:
        self.vma, self.memory, self.x, self.reads = vma, memory, x, reads
        guide = config_enumerate(vma.guide, "parallel", expand=True)
        self.svi = SVI(vma.model, guide, pyro.optim.Adam({"lr": 1e-4}), TraceEnum_ELBO(max_plate_nesting=1))

    def take(self) -> float:
        """One step; its processor time."""
        start = time.process_time()
        with autocast(self.x.device, "auto"):
            self.svi.step(self.vma.encode(self.memory, self.reads), self.x)
        return time.process_time() - start


def in_turn(steps: Steps, base: Steps, repeats: int) -> dict[str, float]:
    """Seconds a step, and as a multiple of the other's, after one of each that is not counted."""
    pairs = [(steps.take(), base.take()) for _ in range(repeats + 1)][1:]
    return {
        "seconds_a_step": statistics.median(one for one, _ in pairs),
        "ratio_to_1000": statistics.median(one / other for one, other in pairs),
    }


def first(memory: pv.PackedMemory, slots: int) -> pv.PackedMemory:
    """The first slots of a memory, mapped from the same file."""
    return pv.PackedMemory(memory.packed[:slots], memory.event_shape)


def of_size(path: str, slots: int, width: int, batch: int, repeats: int, kinds: list[str]) -> list[dict[str, Any]]:
    """The rows of one number of slots."""
    torch.manual_seed(0)
    whole = pv.PackedMemory.open(path, SHAPE)
    x = whole.read(torch.arange(whole.num_slots - batch, whole.num_slots))  # which are in no memory here
    guide = pv.SimilarityGuide(64)
    indexed = model(width, pv.IndexedGuide(guide, k=KEPT), "indexed")
    thousand = first(whole, BASE)
    pv.model.index_memory(indexed, thousand)
    few = batch * KEPT
    base = Steps(indexed, thousand, x, few)
    rows: list[dict[str, Any]] = []

    def row(how: str, index: str | None, decodes: int, encodes: int, steps: Steps | None, **more: Any) -> None:
        timed: dict[str, Any] = {"seconds_a_step": None, "ratio_to_1000": None}
        if steps is not None:
            timed = in_turn(steps, base, repeats)
        size = {"slots": slots, "how": how, "index": index, "decodes": decodes, "encodes": encodes}
        rows.append(size | timed | {"peak_gigabytes": peak_gigabytes() if steps is not None else None} | more)

    memory, exact = first(whole, slots), None
    for kind in kinds:
        start = time.process_time()
        if exact is None:
            with autocast(x.device, "auto"):
                exact = pv.model.index_memory(indexed, memory)
            made = {"keys_seconds": time.process_time() - start}
        else:
            memory.index = pv.memory.FaissIndex(exact.keys, kind)  # type: ignore[arg-type]
            made = {"build_seconds": time.process_time() - start}
        assert memory.index is not None
        made |= looked_up(indexed, memory.index, exact, x)
        row("indexed", kind, few, few, Steps(indexed, memory, x, few), **made)
    memory.index = exact = None
    plain = pv.Memory(memory.read(torch.arange(slots))) if slots <= MOST_ENCODES else None
    truncated = model(width, pv.TruncatedGuide(guide, k=KEPT), "truncated")
    encodes = slots + few if slots > few else slots
    row("truncated", None, few, encodes, None if plain is None else Steps(truncated, plain, x, few))
    all_read = batch * slots
    timed = plain is not None and all_read <= MOST_DECODES
    exact_steps = Steps(model(width, guide, "exact"), plain, x, all_read) if plain is not None and timed else None
    row("exact", None, all_read, slots, exact_steps)
    return rows


@torch.no_grad()
def looked_up(vma: pv.VMA, index: pv.memory.AddressIndex, exact: pv.memory.AddressIndex, x: Tensor) -> dict[str, float]:
    """How long a search takes, and what of the exact search it finds."""
    guide = vma.address_guide.inner
    assert isinstance(guide, pv.parts.KeyedGuide)
    queries = guide.queries(vma.encode_x(x).features)
    start = time.process_time()
    found: Hits = index.search(queries, FOUND)
    seconds = time.process_time() - start
    return {"search_seconds": seconds, "recall": float(recall(found, exact.search(queries, FOUND)).mean())}


def main(
    slots: list[int] | None = None,
    width: int = 16,
    batch: int = 64,
    repeats: int = 3,
    hnsw_slots: int = 100_000,
) -> dict[str, Any]:
    """Measures all of it.

    Args:
        slots: The numbers of slots; by default 100 to 1,000,000.
        width: The channels of the convolutions at half resolution.
        batch: Targets a step.
        repeats: Timed pairs of steps.
        hnsw_slots: Up to how many slots the graph index is built, which takes minutes for a million.
    """
    sizes = slots or [10**n for n in range(2, 7)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path, images = str(Path(folder, "templates.npy")), pv.data.glyphs(drawings=4).images
        pv.PackedMemory.pack(draw(images, max(*sizes, BASE) + batch, seed=0), path=path)
        for size in tqdm(sizes, desc="sizes", file=sys.stderr):
            kinds = ["exact", *["ivf"] * (size > BASE), *["hnsw"] * (BASE < size <= hnsw_slots)]
            arguments = json.dumps([path, size, width, batch, repeats, kinds])
            ran = subprocess.run([sys.executable, "-c", CALL, arguments], capture_output=True, text=True, check=False)
            if ran.returncode:
                raise RuntimeError(f"{size} slots: {ran.stderr[-2000:]}")
            rows += json.loads(ran.stdout.splitlines()[-1])
    found = [row for row in rows if row["how"] == "indexed"]
    largest = [row for row in found if row["slots"] == max(sizes) and row["index"] != "exact"] or found[-1:]
    best = min(largest, key=lambda row: row["ratio_to_1000"])
    return {
        "ratio_to_1000": best["ratio_to_1000"],
        "recall": best["recall"],
        "peak_gigabytes": max(row["peak_gigabytes"] for row in found),
        "largest": max(sizes),
        "batch": batch,
        "width": width,
        "kept": KEPT,
        "found": FOUND,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """One table, a row for each memory and way."""
    title = (
        f"A step at {result['largest']:,} slots is {result['ratio_to_1000']:.2f} times that at {BASE:,}; recall of the "
        f"exact top {result['found']}: {result['recall']:.1%}; at most {result['peak_gigabytes']:.2f} GB"
    )
    table = Table(
        "slots", "how", "index", "s a step", "times 1,000", "peak GB", "recall", title=title, title_justify="left"
    )
    for row in result["rows"]:
        numbers = (row["seconds_a_step"], row["ratio_to_1000"], row["peak_gigabytes"], row.get("recall"))
        cells = ["-" if number is None else f"{number:.3g}" for number in numbers]
        table.add_row(f"{row['slots']:,}", row["how"], row["index"] or "", *cells)
    Console().print(table)


if __name__ == "__main__":
    command(main, show)
