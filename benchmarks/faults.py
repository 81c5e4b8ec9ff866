"""What a run survives: processes killed at random moments, full disks, damaged files, bad input, hours of steps.

Kills: a process trains with checkpoints every one to three steps and is killed (SIGKILL), at a random time or inside of
a write; the next one resumes, and is killed too, until the run is over. After each kill the state in the folder is
compared, bit for bit, with that of a run that was never stopped: weights, optimizer, random state, best weights,
running averages, history. The parent imports the library once and forks: a kill costs a fraction of a second.

Of two processes that train together, one is killed; the other ends by saying so, and both are started again.

Full disks: a run writes to a file system of its own, of a megabyte, that is filled up as it writes a checkpoint or best
weights, so that the write ends half-way. It has to say so, and to go on from what was kept when there is space again.

Sequences: all that may happen to a run, at random and one after the other; see `benchmarks/sequences.py`. Hostile
files: the memory that opening one takes, and the programs that it starts. Threads: calls at the same time, against
the same calls alone.

Corruption: checkpoints with a bit turned over, cut off, or written by something else. Bad input: the cases of
`tests/helpers/bad_input.py`. Soak: short episodes of changing sizes, and the memory that the process holds.

    python -m benchmarks.faults
    python -m benchmarks.faults --kills 500 --soak_steps 100000 --json
    python -m benchmarks.faults --kept faults-kept.json --json   # goes on where it was, if it was stopped
"""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib
import io
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from tqdm.auto import tqdm

import pyro_vmem as pv
from benchmarks import command
from benchmarks.hostile import open_all
from benchmarks.killing import POINTS, armed, die, in_a_fork, same, state
from benchmarks.sequences import sequences
from pyro_vmem._utils.files import versions_of, write_json
from pyro_vmem.data import Episode, EpisodeSampler, FewShotDataset
from pyro_vmem.train import load_checkpoint

STEPS = 24

# The runs that are killed, in turn. "pieces" stops and resumes each run by itself as well.
RUNS: list[dict[str, Any]] = [
    {"validate_every": 1},
    {"validate_every": 2, "validate": True},
    {"validate_every": 3, "validate": True, "objective": "rws"},
    {"validate_every": 3, "pieces": True, "validate": True},
]

RANDOM = "at a random time"
LOST = 7  # the exit code of a process that has lost contact with the other


def episodes(seed: int = 0) -> EpisodeSampler:
    """Vectors in a few classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 1, 6, generator=generator)
    points = centres + 0.3 * torch.randn(12, 5, 6, generator=generator)
    return EpisodeSampler(FewShotDataset(points.flatten(0, 1), torch.arange(12).repeat_interleave(5)), 4, 1, 2, seed)


def train(folder: Path, setting: dict[str, Any], keep: int = 2) -> pv.FitResult:
    """The run of a setting, from where the folder left it."""
    torch.manual_seed(random.SystemRandom().randrange(2**31) if _holds(folder) else 0)  # a resume needs no seed
    vma = pv.VMA.for_vectors(6, latent_dim=2, num_features=8, hidden=(16,))
    stop = [pv.train.StopAfter(1e-3)] if setting.get("pieces") else []
    while True:
        called = [pv.train.Checkpoints(folder, keep), *stop]
        result = pv.fit(
            vma,
            episodes(),
            setting.get("objective", "vimco"),
            steps=STEPS,
            validation=episodes(1) if setting.get("validate") else None,
            validate_every=setting["validate_every"],
            callbacks=called,
            resume=True,
            progress=False,
        )
        if not result.interrupted:
            return result


def helper(name: str) -> Any:
    """A module of `tests/helpers`."""
    place = str(Path(__file__).parent.parent / "tests" / "helpers")
    if place not in sys.path:
        sys.path.insert(0, place)
    return importlib.import_module(name)


def _holds(folder: Path) -> bool:
    return bool(versions_of(folder / "last.safetensors"))


# Kills


def kill_runs(kills: int, seed: int) -> list[dict[str, Any]]:
    """Kills processes that train; returns, for each place, how often, and after how many all was equal."""
    draw = random.Random(seed)
    places = [RANDOM, *POINTS]
    found = {place: {"place": place, "kills": 0, "bit_equal": 0} for place in places}
    references: dict[int, dict[int, Any]] = {}
    done = number = 0
    attempts = itertools.count()
    bar = tqdm(total=kills, desc="killed", unit="process")
    while done < kills:
        setting = RUNS[number % len(RUNS)]
        with tempfile.TemporaryDirectory() as root:
            if number % len(RUNS) not in references:
                references[number % len(RUNS)] = reference(Path(root, "whole"), setting)
            whole = references[number % len(RUNS)]
            killed = kill_one_run(Path(root, "run"), setting, whole, found, kills - done, draw, attempts)
            bar.update(killed)
            done += killed
        number += 1
    bar.close()
    return [row for row in found.values() if row["kills"]]


def reference(folder: Path, setting: dict[str, Any]) -> dict[int, Any]:
    """The states of a run that is never stopped, by the number of steps."""
    if in_a_fork(lambda: train(folder, setting | {"pieces": False}, keep=1000)) != 0:
        raise RuntimeError(f"the run {setting} failed; see the traceback above")
    states = [state(path) for path in versions_of(folder / "last.safetensors")]
    return {data["result"]["steps"]: (tensors, data) for tensors, data in states}


def kill_one_run(
    folder: Path,
    setting: dict[str, Any],
    whole: dict[int, Any],
    found: dict[str, dict[str, Any]],
    most: int,
    draw: random.Random,
    attempts: Iterator[int],
) -> int:
    """One run, killed until it is over; returns how often."""
    points, equal, count, reached = list(POINTS), True, 0, 0
    rows = []
    while True:
        number, at_a_point = divmod(next(attempts), 2)
        place = points[number % len(points)] if at_a_point else RANDOM
        nth = draw.randint(1, 9)

        def work(place: str = place, nth: int = nth) -> None:
            if place in POINTS:
                armed(place, nth)
            train(folder, setting)

        last = count >= most
        if last:
            code = in_a_fork(lambda: train(folder, setting))
        else:
            code = in_a_fork(work, draw.uniform(0.0, 0.6) if place not in POINTS else None)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a process that resumed {setting} failed; see the traceback above")
        if _holds(folder):
            now = state(folder / "last.safetensors")
            equal &= now[1]["result"]["steps"] >= reached  # no checkpoint is lost
            reached = now[1]["result"]["steps"]
            expected = whole.get(reached)  # pieces also end between records
            equal &= expected is None or same(now, expected)
        equal &= _holds(folder) or reached == 0
        if code == 0:
            break
        count += 1
        found[place]["kills"] += 1
        rows.append(found[place])
    equal &= not list(folder.glob(".*.tmp")) and same(state(folder / "last.safetensors"), whole[STEPS])
    for row in rows:
        row["bit_equal"] += equal
    return count


# Several processes


def two(work: Callable[[int], Any]) -> list[int]:
    """Does work in two processes of a run; returns their exit codes."""
    return helper("processes").wait(helper("processes").start(work), seconds=120)


def train_as_one_of_two(folder: Path, setting: dict[str, Any], victim: int, delay: float, rank: int) -> None:
    """Trains; the victim is killed some seconds after it has begun."""
    if rank == victim:
        threading.Timer(delay, die).start()
    try:
        train(folder, setting)
    except ConnectionError:  # what the other one says
        os._exit(LOST)


def kill_one_of_two(kills: int, seed: int) -> dict[str, Any]:
    """Kills one of the two processes of a run at random times, and starts both again, until it is over."""
    draw, setting, bar = random.Random(seed), RUNS[0], tqdm(total=kills, desc="killed, of two", unit="process")
    row = {"place": "one of two processes, which lose nothing", "kills": 0, "bit_equal": 0}
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        if kills and two(lambda _: train(Path(root, "whole"), setting, keep=1000)) != [0, 0]:
            raise RuntimeError("two processes cannot train together; see the traceback above")
        seconds = time.perf_counter() - start
        for number in itertools.count():
            folder, equal, count, codes, reached = Path(root, str(number)), True, 0, [1, 1], 0
            if row["kills"] >= kills:
                bar.close()
                return row
            while codes != [0, 0]:
                victim, delay = draw.randrange(2), draw.uniform(0.0, seconds)
                last = row["kills"] + count >= kills
                work = partial(train_as_one_of_two, folder, setting, -1 if last else victim, delay)
                codes = two(work)
                # A kill in the last moments, when the other process is done, tells nothing and does not count.
                waited = codes == [-signal.SIGKILL] * 2  # the other one noticed nothing, and was killed after a while
                if not waited and set(codes) not in ({0}, {-signal.SIGKILL, LOST}, {-signal.SIGKILL, 0}):
                    raise RuntimeError(f"two processes, one of them killed, ended with {codes}")
                equal &= not waited
                count += waited or LOST in codes
                if _holds(folder):
                    now = state(folder / "last.safetensors")
                    equal &= now[1]["result"]["steps"] >= reached  # no checkpoint is lost
                    reached = now[1]["result"]["steps"]
            equal &= reached == STEPS and not list(folder.glob(".*.tmp"))
            bar.update(count)
            row["kills"] += count
            row["bit_equal"] += count * equal
    return row


# Full disks


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """A file system of a megabyte at a folder, where this process may mount one; tells what it is."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield "a file system of 1 MB" if mounted else "an error in place of a full disk"
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Takes all space but some bytes."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)) == 4096:
                pass
        file.truncate(max(0, file.tell() - leave))


def full_from(nth: int, disk: Path, is_real: bool) -> None:
    """Makes the disk run full in the n-th of this process's writes of checkpoints."""
    original, count = Path.write_bytes, 0

    def write(path: Path, content: bytes) -> int:
        nonlocal count
        count += 1
        if count == nth and is_real:
            fill(disk, len(content) // 2)
        if count >= nth and not is_real:
            original(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, content)

    Path.write_bytes = write  # type: ignore[method-assign]


def train_until_full(nth: int, disk: Path, setting: dict[str, Any], is_real: bool) -> None:
    """Trains until the end on a disk that runs full; succeeds if that is said in time and at the end."""
    full_from(nth, disk, is_real)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(disk / "run", setting)
        except OSError as error:
            said = [str(warning.message) for warning in caught]
            if str(error).startswith("out: the last checkpoint") and any("could not be written" in s for s in said):
                return
            raise
    raise RuntimeError("nothing was said of the full disk")


def fill_disks(count: int, seed: int) -> dict[str, Any]:
    """Fills disks under runs; returns how many of these lost nothing, and what the disks were."""
    draw, survived, kind = random.Random(seed), 0, ""
    for number in tqdm(range(count), desc="filled", unit="disk"):
        setting = RUNS[number % 3]
        with tempfile.TemporaryDirectory() as root:
            whole, disk = reference(Path(root, "whole"), setting), Path(root, "disk")
            disk.mkdir()
            with small_disk(disk) as kind:
                nth, is_real = draw.randint(3, STEPS // setting["validate_every"]), "file system" in kind
                said = in_a_fork(partial(train_until_full, nth, disk, setting, is_real)) == 0
                kept = state(disk / "run" / "last.safetensors") if _holds(disk / "run") else None
                (disk / "ballast").unlink(missing_ok=True)
                resumed = in_a_fork(partial(train, disk / "run", setting)) == 0
                last = state(disk / "run" / "last.safetensors")
                good = kept is None or same(kept, whole[kept[1]["result"]["steps"]])
                good &= same(last, whole[STEPS])
                survived += said and resumed and good and not list((disk / "run").glob(".*.tmp"))
    return {"full_disks": count, "full_disks_survived": survived, "full_disk": kind}


# Damaged files


def damaged(whole: bytes, count: int, draw: random.Random) -> Iterator[bytes]:
    """Files that are not what was written."""
    foreign = save({"w": torch.ones(2)}, {"format": "pt"})
    future = save({"w": torch.ones(2)}, {"format": "pyro_vmem/999", "data": "{}"})
    yield from (b"", foreign, future, b"PK\x03\x04" + whole[4:], whole + b"\0", whole[:-1], b"\x80\x05" + whole[2:])
    for _ in range(count):
        place = draw.randrange(len(whole))
        kind = draw.choice(["bit", "bit", "cut", "zeros"])
        if kind == "bit":
            yield whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        elif kind == "cut":
            yield whole[:place]
        elif any(whole[place : place + 512]):  # a block that never reached the disk
            yield (whole[:place] + bytes(512) + whole[place + 512 :])[: len(whole)]


def corrupt(count: int, seed: int) -> dict[str, Any]:
    """Damages checkpoints; returns how many were refused, of how many."""
    draw = random.Random(seed)
    detected = total = 0
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, "last.safetensors")
        if in_a_fork(lambda: train(Path(root), RUNS[1], keep=1)) != 0:
            raise RuntimeError("the run to damage failed; see the traceback above")
        for content in tqdm(damaged(path.read_bytes(), count, draw), desc="damaged", unit="file"):
            path.write_bytes(content)
            total += 1
            with contextlib.suppress(ValueError):
                load_checkpoint(path)
                continue
            detected += 1
    return {"corrupt_files": total, "corrupt_files_detected": detected}


# Bad input


def refuse() -> dict[str, Any]:
    """Tries all that is bad input; returns how many were refused as they should be, of how many."""
    cases = helper("bad_input").CASES
    refused = 0
    for case in tqdm(cases, desc="refused", unit="input"):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            refused += case.is_refused(Path(folder))
    return {"bad_inputs": len(cases), "bad_inputs_refused": refused}


# Soak


def resident_megabytes() -> float:
    """The memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Changing:
    """Episodes of changing sizes of memory and minibatch."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        sizes = [(draw.randint(2, 12), draw.randint(1, 3), draw.randint(1, 2)) for _ in range(16)]
        dataset = episodes().dataset
        self.samplers = [EpisodeSampler(dataset, ways, shots, queries, seed) for ways, shots, queries in sizes]

    def __getitem__(self, index: int) -> Episode:
        return self.samplers[index % len(self.samplers)][index]


def soak(steps: int, seed: int) -> list[dict[str, float]]:
    """Trains on, validates and evaluates episodes of changing sizes; returns the memory held after so many steps."""
    rows, start, bar = [], time.perf_counter(), tqdm(total=steps, desc="soak", unit="step")
    changing: Any = Changing(seed)
    torch.manual_seed(seed)
    vma = pv.VMA.for_vectors(6, latent_dim=2, num_features=8, hidden=(16,))
    taken, piece = 0, max(1, steps // 40)
    while taken < steps:
        particles = 2 + taken // piece % 5
        elbo = pv.infer.VIMCO_ELBO(particles, max_plate_nesting=1)
        pv.fit(vma, changing, elbo, steps=piece, progress=False, seed=taken)
        pv.validate(vma, changing, num_episodes=1)
        episode = changing[taken]
        pv.diagnostics.log_evidence(vma, episode.memory, episode.x, num_samples=50)
        taken += piece
        bar.update(piece)
        seconds = round(time.perf_counter() - start, 1)
        rows.append({"steps": taken, "seconds": seconds, "rss_mb": round(resident_megabytes(), 2)})
    return rows


def growth(rows: list[dict[str, float]]) -> float:
    """How much more was held in the last quarter than in the second: the first warms up."""
    held = [row["rss_mb"] for row in rows]
    quarter = max(1, len(held) // 4)
    return statistics.median(held[-quarter:]) - statistics.median(held[quarter : 2 * quarter] or held[:1])


# Threads


def wrong_in_threads(times: int, threads: int = 4) -> dict[str, Any]:
    """Evaluates in threads, and trains in pairs of them; returns how many calls were neither right nor refused."""
    torch.manual_seed(0)
    vma = pv.VMA.for_vectors(6, latent_dim=2, num_features=8, hidden=(16,))
    models = [copy.deepcopy(vma) for _ in range(2 * times + 1)]

    def measure(_: int) -> float:
        return pv.diagnostics.evaluate(vma, episodes(), 2, 3, seed=0, progress=False).summary()["nll"]

    def fit(model: pv.VMA) -> bool:
        try:
            pv.fit(model, episodes(), steps=4, progress=False)
        except RuntimeError as error:
            return str(error).startswith("threads: ")
        return all(torch.equal(p, models[0].state_dict()[name]) for name, p in model.state_dict().items())

    alone, _ = measure(0), fit(models[0])
    with ThreadPoolExecutor(threads) as pool:
        wrong = sum(value != alone for value in pool.map(measure, range(threads * times)))
    for pair in zip(models[1::2], models[2::2], strict=True):
        with ThreadPoolExecutor(2) as pool:
            wrong += sum(not right for right in pool.map(fit, pair))
    return {"thread_runs": (threads + 2) * times, "thread_runs_wrong": wrong}


SLICE = 10  # sequences that are kept together


class Parts:
    """The parts of this benchmark that are done, in a file if there is one: the next process does the others.

    Arguments:
        path: The JSON file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.done: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def part(self, name: str, work: Callable[..., dict[str, Any]], *arguments: int) -> dict[str, Any]:
        """What some work found, done with these arguments or kept, with the seconds that it took."""
        key, start = " ".join([name, *map(str, arguments)]), time.perf_counter()
        if key not in self.done:
            self.done[key] = work(*arguments)
            self.done[key] |= {"seconds": round(time.perf_counter() - start, 1)}
            if self.path is not None:
                write_json(self.path, self.done)
        return dict(self.done[key])


def main(
    kills: int = 120,
    kills_of_two: int = 8,
    full_disks: int = 6,
    corruptions: int = 1000,
    soak_steps: int = 36_000,
    sequences_of_faults: int = 200,
    thread_runs: int = 10,
    seed: int = 0,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Does all of it.

    Args:
        kills: Processes to kill, of runs of one process.
        kills_of_two: Processes to kill, of runs of two.
        full_disks: Disks to fill.
        corruptions: Checkpoints to damage at random, besides those that are not checkpoints at all.
        soak_steps: Training steps of the soak: as many as two hours have at five a second.
        sequences_of_faults: Random sequences of what may happen to runs; see `benchmarks/sequences.py`.
        thread_runs: How often four threads evaluate, and two train, at the same time.
        seed: Seeds moments and places.
        kept: A file where each part is kept once it is done; a part that is in it is not done again.
    """
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    do, counts = Parts(kept).part, Counter[str]()
    for begin in range(0, sequences_of_faults, SLICE):
        counts.update(do("sequences", _sequences, min(SLICE, sequences_of_faults - begin), seed + begin))
    hostile = do("hostile", lambda: {"files": open_all()})
    killed = do("kills", lambda *given: {"rows": kill_runs(*given)}, kills, seed)
    of_two = do("two", kill_one_of_two, kills_of_two, seed)
    disks = do("disks", fill_disks, full_disks, seed)
    damage = do("damage", corrupt, corruptions, seed)
    held = do("soak", lambda *given: {"rows": soak(*given)}, soak_steps, seed)
    inputs = do("inputs", refuse)
    threads = do("threads", wrong_in_threads, thread_runs)  # last, because pools of threads do not survive a fork
    parts = [hostile, killed, of_two, disks, damage, held, inputs, threads]
    seconds = counts.pop("seconds", 0) + sum(part.pop("seconds") for part in parts)
    rows, soaked = [*killed["rows"], of_two], held["rows"]
    return {
        "torch": torch.__version__,
        "kills": sum(row["kills"] for row in rows),
        "bit_equal_resumes": sum(row["bit_equal"] for row in rows),
        "kills_during_a_write": sum(row["kills"] for row in rows if row["place"] in POINTS),
        **disks,
        **damage,
        **inputs,
        **{name: counts[name] for name in ("sequences", "lost_models", "silent_changes", "refused_wrongly")},
        **{f"sequences_{name}": counts[name] for name in ("processes", "kills", "damaged", "told", "refused")},
        "programs_started": sum(file["programs"] for file in hostile["files"]),
        "largest_allocation_of_a_hostile_file_mb": max(file["mb"] for file in hostile["files"]),
        **threads,
        "soak_steps": int(soaked[-1]["steps"]) if soaked else 0,
        "soak_rss_mb": round(soaked[-1]["rss_mb"], 1),
        "soak_rss_growth_mb": round(growth(soaked), 2),
        "seconds": round(seconds, 1),
        "rows": rows,
        "soak": soaked,
        "hostile": hostile["files"],
    }


def _sequences(count: int, begin: int) -> dict[str, Any]:
    return dict(sequences(count, begin=begin))


def show(result: dict[str, Any]) -> None:
    """The kills by place, the memory held against time, and the rest in sentences."""
    table = Table("killed", "times", "bit for bit equal after")
    for row in result["rows"]:
        table.add_row(row["place"], str(row["kills"]), str(row["bit_equal"]))
    held = Table("steps", "seconds", "MB held")
    for row in result["soak"][:: max(1, len(result["soak"]) // 10)]:
        held.add_row(f"{row['steps']:,}", f"{row['seconds']:.0f}", f"{row['rss_mb']:.1f}")
    Console().print(
        table,
        held,
        f"{result['full_disks_survived']} of {result['full_disks']} runs on a full disk ({result['full_disk']}) lost "
        "nothing.",
        f"{result['corrupt_files_detected']} of {result['corrupt_files']} damaged files were refused.",
        f"{result['bad_inputs_refused']} of {result['bad_inputs']} bad inputs were refused with the right message.",
        f"{result['sequences']} random sequences: {result['lost_models']} models lost, {result['silent_changes']} runs "
        "silently changed.",
        f"Hostile files took {result['largest_allocation_of_a_hostile_file_mb']} MB at most, and started "
        f"{result['programs_started']} programs.",
        f"{result['thread_runs_wrong']} of {result['thread_runs']} calls in threads were wrong.",
        f"{result['soak_steps']} steps on episodes of changing sizes: {result['soak_rss_growth_mb']:+} MB held.",
        sep="\n",
    )


if __name__ == "__main__":
    command(main, show)
