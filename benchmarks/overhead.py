"""What a training step costs whatever the sizes: Python, and the start of each operation.

Model and minibatch are as small as they get. `svi.step` of Pyro and the step of `fit` are timed beside the same step
written by hand in PyTorch, with images and with vectors. With a second checkout of this repository, each in a process
of its own, they take turns, and the ratio of the two is told. Times are processor time, in milliseconds; the fifth
smallest of a hundred counts, because what other programs do to the caches only adds to it. The start of Python, of the
package and of its command are timed, too.

    python -m benchmarks.overhead --before ../other-checkout
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.console import Console

import pyro_vmem as pv
from benchmarks import command
from benchmarks.step import CLIP, PARTICLES, by_hand
from benchmarks.timing import clock

WORKER = "--worker"
HERE = Path(__file__).resolve().parent.parent


def steps() -> dict[str, Callable[[], Any]]:
    """A step of each kind, by name."""
    torch.manual_seed(0)
    models = {
        "images": (pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4), (torch.rand(8, 1, 12, 12) < 0.2).float()),
        "vectors": (pv.VMA.for_vectors(5), torch.randn(8, 5)),
    }
    found: dict[str, Callable[[], Any]] = {}
    for kind, (vma, data) in models.items():
        vma.name = kind
        memory, x = pv.Memory(data[:4]), data[4:]
        elbo = pv.infer.VIMCO_ELBO(PARTICLES, max_plate_nesting=1)
        svi = pyro.infer.SVI(vma.model, vma.guide, pyro.optim.Adam({"lr": 1e-4}), loss=elbo)
        config = pv.TrainingConfig(lr=1e-4, clip_norm=CLIP, kl_schedule=pv.train.Constant(), precision="float32")
        trainer, episode = pv.Trainer(vma, elbo, config), pv.data.Episode(memory, x, torch.arange(4))
        optimizer = torch.optim.Adam(vma.parameters(), lr=1e-4, fused=True)

        def plain(vma: pv.VMA = vma, memory: pv.Memory = memory, x: Any = x, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            (by_hand(vma, memory, x) / len(x)).backward()
            torch.nn.utils.clip_grad_norm_(vma.parameters(), CLIP, error_if_nonfinite=True)
            optimizer.step()

        found[f"svi.step, {kind}, without validation"] = lambda svi=svi, vma=vma, memory=memory, x=x: unchecked(
            svi, vma, memory, x
        )
        found[f"svi.step, {kind}"] = lambda svi=svi, vma=vma, memory=memory, x=x: svi.step(vma.encode(memory), x)
        found[f"fit, {kind}"] = lambda trainer=trainer, episode=episode: trainer.step(episode)
        found[f"by hand, {kind}"] = plain
    return found


def unchecked(svi: pyro.infer.SVI, vma: pv.VMA, memory: pv.Memory, x: torch.Tensor) -> None:
    """A step with all checks off."""
    with pyro.validation_enabled(False):
        svi.step(vma.encode(memory), x)


def work() -> None:
    """Takes each step once for each line of input, and prints the times."""
    torch.set_num_threads(1)
    now, all_steps = clock(torch.device("cpu")), steps()
    for _ in sys.stdin:
        times = {}
        for name, step in all_steps.items():
            start = now()
            step()
            times[name] = 1000 * (now() - start)
        sys.stdout.write(json.dumps(times) + "\n")
        sys.stdout.flush()


def start_up(repeats: int) -> list[dict[str, Any]]:
    """Seconds of commands, and those of what they cannot do without; in turn, of which the fastest count."""
    code = {
        "import pyro_vmem": "import pyro_vmem",
        "from pyro_vmem import VMA": "from pyro_vmem import VMA",
        "import torch, pyro": "import torch, pyro",
        "python": "pass",
    }
    module = [sys.executable, "-m", "pyro_vmem.app.cli"]
    calls = {name: [sys.executable, "-c", line] for name, line in code.items()}
    calls |= {f"pyro-vmem {option}": [*module, option] for option in ("--help", "--version", "--stesp")}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(call, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(HERE)})
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    least = {name: min(each) for name, each in times.items()}
    floors = {name: least["import torch, pyro" if "import" in name else "python"] for name in calls}
    return [
        {"command": name, "seconds": least[name], "floor": floors[name]}
        for name in calls
        if "pyro_vmem" in name or "-" in name
    ]


def main(before: Path | None = None, repeats: int = 100) -> dict[str, Any]:
    """Times all in turn.

    Args:
        before: Another checkout, to compare with.
        repeats: Timed steps of each, after five that are not counted.
    """
    checkouts = {"now": HERE} | ({} if before is None else {"before": before.resolve()})
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-P", __file__, WORKER],  # this file, and all else from the checkout
            env=os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, path in checkouts.items()
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for turn in range(repeats + 5):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            row = json.loads(worker.stdout.readline())
            times[name] += [row] * (turn >= 5)
    for worker in workers.values():
        worker.communicate()
    rows = []
    for step in times["now"][0]:
        few = {name: sorted(row[step] for row in all_rows)[min(4, repeats - 1)] for name, all_rows in times.items()}
        row = {"step": step, "milliseconds": few["now"]}
        rows.append(row | ({"ratio_to_before": few["now"] / few["before"]} if "before" in few else {}))
    return {"torch": torch.__version__, "rows": rows, "start_up": start_up(min(5, repeats))}


def show(result: dict[str, Any]) -> None:
    """A line for each."""
    for row in result["rows"]:
        ratio = f", {row['ratio_to_before']:.2f} of before" if "ratio_to_before" in row else ""
        Console().print(f"{row['step']}: {row['milliseconds']:.1f} ms{ratio}")
    for row in result["start_up"]:
        Console().print(f"{row['command']}: {row['seconds']:.2f} s, of which {row['floor']:.2f} s are not ours")


if __name__ == "__main__":
    if sys.argv[1:] == [WORKER]:
        work()
    else:
        command(main, show)
