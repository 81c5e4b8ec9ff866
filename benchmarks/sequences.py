"""Random sequences of what may happen to runs: a state machine, and what has to hold after each of its steps.

Runs in two folders are trained, killed at any moment, damaged, emptied, renamed, resumed with other settings, begun
anew, and trained by two processes at once. Whatever the sequence, no trained model is lost or changed: what could be
loaded can be loaded still, and is a model that training has made. And no run is silently another one: each checkpoint
is equal, bit for bit, to that of a run that was never disturbed. Where a run was told that its settings are others
now, that is the run that goes on with these from the checkpoint that it had.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import pyro_vmem as pv
from benchmarks.killing import POINTS, armed, die, in_a_fork, same, state
from pyro_vmem._utils.files import versions_of
from pyro_vmem.data import EpisodeSampler, FewShotDataset

STEPS, EVERY = 4, 2
FOLDERS = ("a", "b")
FILES = ("last.safetensors", "last-1.safetensors", "best.safetensors", "history.csv", ".lock")
REFUSED = 3  # the exit code of a process whose run was refused

# What may be changed of a run. Where another model is handed in, it has to be refused; all else has to be told.
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "learning rate": {"lr": 1e-2},
    "seed": {"seed": 5},
    "steps": {"steps": STEPS + 2},
    "objective": {"objective": "rws"},
    "data": {"data": 2},
    "validation": {"validation": None},
    "selection": {"select": "last"},
    "clipping": {"clip_norm": 0.1},
    "model": {"address_prior": pv.TemperedPrior(pv.UniformPrior(), 0.5)},
}

NAMES = st.sampled_from([*FOLDERS, FOLDERS[0], FOLDERS[0]])  # where most happens

State = tuple[dict[str, torch.Tensor], dict[str, Any]]


def episodes(seed: int) -> EpisodeSampler:
    """Vectors in a few classes."""
    points = torch.randn(30, 3, generator=torch.Generator().manual_seed(seed))
    return EpisodeSampler(FewShotDataset(points, torch.arange(10).repeat_interleave(3)), 4, 1, 2, seed)


def train(folder: Path, change: str, resume: bool = True, keep: int = 2, last_step: int | None = None) -> None:
    """A run with a change; the process dies after a step if that is asked for. What is said goes into a file."""
    given: dict[str, Any] = {"objective": "vimco", "data": 0, "validation": 1, "address_prior": None} | CHANGES[change]
    torch.manual_seed(random.SystemRandom().randrange(2**31) if versions_of(folder / FILES[0]) else 0)
    parts = {name: given.pop(name) for name in ["address_prior"] if given[name] or given.pop(name)}
    vma = pv.VMA.for_vectors(3, latent_dim=2, num_features=4, hidden=(4,), **parts)
    data, held_out = episodes(given.pop("data")), given.pop("validation")

    class Dies(pv.train.Callback):
        def after_step(self, trainer: pv.Trainer, episode: pv.data.Episode) -> None:
            if trainer.result.steps == last_step:
                die()

    def say(message: Warning | str, *_: Any, **__: Any) -> None:
        with Path(f"{folder}.said").open("a", encoding="utf-8") as file:
            file.write(f"{message}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = say
        try:
            pv.fit(
                vma,
                data,
                validation=None if held_out is None else [episodes(held_out)[0]],  # type: ignore[arg-type]
                callbacks=[pv.train.Checkpoints(folder, keep), Dies()],
                resume=resume,
                progress=False,
                validate_every=EVERY,
                **({"steps": STEPS} | given),
            )
        except ValueError as error:
            say(str(error))
            os._exit(REFUSED)


@functools.cache
def warm_up() -> None:
    """Trains once before anything is forked: what torch does once in a process takes longer than a run."""
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder, "run"), "nothing")


@dataclass
class Run:
    """What is known of the run in a folder: the settings that it has now, and the states that it may have by steps."""

    change: str = "nothing"
    known: list[dict[int, State]] = field(default_factory=list)

    def knows(self, found: State) -> bool:
        """Whether a state is one of a run that was never disturbed."""
        steps = found[1]["result"]["steps"]
        return any(steps in states and same(found, states[steps]) for states in self.known)


class Sequences(RuleBasedStateMachine):
    """What may happen to two runs, and what has to hold then.

    Attributes:
        counts: What was done, and what was found wrong, in all sequences.
        strict: Whether what is found wrong is an error at once.
    """

    counts: ClassVar[Counter[str]] = Counter()
    strict: ClassVar[bool] = True
    whole: ClassVar[dict[str, dict[int, State]]] = {}  # runs that began in an empty folder, by their change
    read: ClassVar[dict[str, State | None]] = {}  # what checkpoints hold, by their hash; None if they are damaged

    def __init__(self) -> None:
        super().__init__()
        warm_up()
        self.counts["sequences"] += 1
        self.root = Path(tempfile.mkdtemp())
        self.runs = {name: Run() for name in FOLDERS}
        self.loaded: dict[str, dict[str, str]] = {}  # the hashes of what was loaded last, by folder

    def teardown(self) -> None:
        """Removes the folders."""
        shutil.rmtree(self.root)

    def wrong(self, what: str, why: str) -> None:
        """Counts what is wrong."""
        self.counts[what] += 1
        if self.strict:
            raise AssertionError(f"{what}: {why}")

    # What happens

    @initialize(last_step=st.sampled_from([None, STEPS, STEPS - 1]))
    def begun(self, last_step: int | None) -> None:
        """Most is to happen to a run that is there."""
        self._trained(FOLDERS[0], last_step=last_step)

    @rule(name=NAMES)
    def resumed(self, name: str) -> None:
        """Trains until the run is over."""
        self._trained(name)

    @rule(name=NAMES, place=st.sampled_from([*POINTS]), nth=st.integers(1, 9))
    def killed_in_a_write(self, name: str, place: str, nth: int) -> None:
        """Trains until the process is killed."""
        self._trained(name, place=place, nth=nth)

    @rule(name=NAMES, step=st.integers(1, STEPS))
    def killed_after_a_step(self, name: str, step: int) -> None:
        """Trains until the process is killed."""
        self._trained(name, last_step=step)

    @rule(name=NAMES, change=st.sampled_from([*CHANGES]), last_step=st.sampled_from([None, STEPS - 1]))
    def changed(self, name: str, change: str, last_step: int | None) -> None:
        """Goes on with other settings, and from then on."""
        before = self.runs[name].change
        self.runs[name].change = change
        if self._trained(name, last_step=last_step) == REFUSED:
            self.runs[name].change = before

    @rule(name=NAMES)
    def begun_anew(self, name: str) -> None:
        """Without `resume`, where there may be a run."""
        holds = any((self.root / name / file).exists() for file in FILES[:-1])
        before, code = self._contents(name), self._train(name, resume=False)
        if holds and (code != REFUSED or self._contents(name) != before):
            self.wrong("lost_models", "a run was begun where there was one")
        if not holds:
            self._check(name, {}, code, [])

    @rule(name=NAMES)
    def trained_by_two(self, name: str) -> None:
        """Two processes at once: one waits for the other, or is refused."""
        self._trained(name, also=True)

    @rule(name=NAMES, file=st.sampled_from(FILES[:-1]), place=st.floats(0, 0.999), cut=st.booleans())
    def damaged(self, name: str, file: str, place: float, cut: bool) -> None:
        """A file is cut off, or has a bit turned over."""
        path = self.root / name / file
        if not path.is_file() or path.stat().st_size == 0:
            return
        self.counts["damaged"] += 1
        whole = path.read_bytes()
        at = int(place * len(whole))
        path.write_bytes(whole[:at] + (b"" if cut else bytes([whole[at] ^ 1]) + whole[at + 1 :]))

    @rule(name=NAMES, file=st.sampled_from(FILES))
    def removed(self, name: str, file: str) -> None:
        """A file is removed."""
        self.counts["removed"] += (self.root / name / file).exists()
        (self.root / name / file).unlink(missing_ok=True)

    @rule(name=NAMES, file=st.sampled_from(FILES[1:3]))
    def renamed(self, name: str, file: str) -> None:
        """Another checkpoint takes the place of the last, if that is free."""
        source, target = self.root / name / file, self.root / name / FILES[0]
        if source.exists() and not target.exists():
            source.rename(target)

    @rule()
    def exchanged(self) -> None:
        """The two folders change names."""
        one, two = FOLDERS
        for source, target in ((one, "c"), (two, one), ("c", two)):
            if (self.root / source).exists():
                (self.root / source).rename(self.root / target)
        self.runs = {one: self.runs[two], two: self.runs[one]}

    # What has to hold

    @invariant()
    def what_can_be_loaded_was_trained(self) -> None:
        """In each folder with a whole checkpoint there is a model, and it is one that training has made."""
        for name, run in self.runs.items():
            whole, hashes = self._whole(name), self._hashes(name)
            if not whole or self.loaded.get(name) == hashes:  # to load a model takes most of a sequence's time
                continue
            self.loaded[name] = hashes
            try:
                with warnings.catch_warnings(action="ignore"):
                    found = pv.load(self.root / name).state_dict()
            except (OSError, ValueError) as error:
                self.wrong("lost_models", f"{sorted(whole)} are whole, and nothing can be loaded: {error}")
                continue
            made = [
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                for states in run.known
                for tensors, _ in states.values()
                for prefix in ("model.", "best.")
            ]
            if not any(
                found.keys() == one.keys() and all(torch.equal(found[key], one[key]) for key in found) for one in made
            ):
                self.wrong("lost_models", "what is loaded was never trained")

    # How it is done

    def _contents(self, name: str) -> dict[str, bytes]:
        folder = self.root / name
        paths = [path for path in folder.iterdir() if path.name != ".lock"] if folder.exists() else []
        return {path.name: path.read_bytes() for path in paths}

    def _hashes(self, name: str) -> dict[str, str]:
        """The hashes of the checkpoints that are there."""
        paths = [self.root / name / file for file in FILES[:3]]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}

    def _whole(self, name: str) -> dict[str, State]:
        """The checkpoints that can be read."""
        hashes = self._hashes(name)
        for file, key in hashes.items():
            if key not in self.read:
                try:
                    self.read[key] = state(self.root / name / file)
                except ValueError:
                    self.read[key] = None
        return {file: found for file, key in hashes.items() if (found := self.read[key]) is not None}

    def _reached(self, name: str) -> int:
        """After how many steps the newest checkpoint was written that can be read."""
        runs = [data for _, data in self._whole(name).values() if "result" in data]
        return max((data["result"]["steps"] for data in runs), default=0)

    def _train(self, name: str, place: str = "", nth: int = 0, also: bool = False, **how: Any) -> int:
        """Trains in another process, or in two at once; returns the exit code, of the one that came further."""
        folder, change = self.root / name, self.runs[name].change
        Path(f"{folder}.said").unlink(missing_ok=True)
        self.counts["processes"] += 1 + also

        def work() -> None:
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            if place:
                armed(place, nth)
            train(folder, change, **how)

        def two() -> None:
            codes = [0, 0]
            child = os.fork()
            if child == 0:
                work()
                os._exit(0)
            codes[0] = in_a_fork(work)
            codes[1] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(min(codes) if {*codes} <= {0, REFUSED} else 1)

        code = in_a_fork(two if also else work)
        if code not in (0, REFUSED, -signal.SIGKILL):
            raise RuntimeError(f"a process ended with {code}; see the traceback above")
        self.counts["kills"] += code == -signal.SIGKILL
        return code

    def _trained(self, name: str, **how: Any) -> int:
        """Trains, checks what came of it, and returns the exit code."""
        before, whole, reached = self._contents(name), self._whole(name), self._reached(name)
        code = self._train(name, **how)
        said = Path(f"{self.root / name}.said")
        lines = said.read_text(encoding="utf-8").splitlines() if said.exists() else []
        run, runs = self.runs[name], [whole[file] for file in FILES[:2] if file in whole]
        if code == REFUSED:
            self.counts["refused"] += 1
            if self._contents(name) != before:
                self.wrong("lost_models", "a run that was refused has changed its folder")
            can_go_on = runs and "result" in runs[0][1]
            # The model of the run that is there, and the one that was handed in.
            same_model = can_go_on and ("TemperedPrior" in str(runs[0][1]["spec"])) == (run.change == "model")
            if not before or same_model:
                self.wrong("refused_wrongly", " ".join(lines))
            return code
        self._check(name, before, code, lines)
        if (now := self._reached(name)) < reached:
            self.wrong("lost_models", f"step {reached} was there, now it is {now}")
        return code

    def _check(self, name: str, before: dict[str, bytes], code: int, said: list[str]) -> None:
        """Compares all checkpoints of a folder with those of runs that were never disturbed."""
        run = self.runs[name]
        if not before:
            run.known = []
        told = any(line.startswith("resume: the run had other settings") for line in said)
        self.counts["told"] += told
        if told or not before:
            run.known.append(self._undisturbed(before, run.change))
        for file, found in self._whole(name).items():
            if "result" in found[1] and not run.knows(found):
                self.wrong("silent_changes", f"{file} is not that of a run that was never disturbed; {said}")
        last = self._whole(name).get(FILES[0])
        if code == 0 and (last is None or not same(last, run.known[-1][max(run.known[-1])])):
            self.wrong("silent_changes", f"the run is over, and is not the one that was never disturbed; {said}")

    def _undisturbed(self, before: dict[str, bytes], change: str) -> dict[int, State]:
        """The states of a run that goes on from some files without being disturbed."""
        if not before and change in self.whole:
            return self.whole[change]
        folder = Path(tempfile.mkdtemp(dir=self.root))
        for file, content in before.items():
            (folder / file).write_bytes(content)
        if in_a_fork(lambda: (torch.set_num_threads(1), train(folder, change, keep=1000))) != 0:
            raise RuntimeError("a run that nobody disturbed has failed")
        found = []
        for path in versions_of(folder / FILES[0]):
            try:
                found.append(state(path))
            except ValueError:  # damaged before
                continue
        states = {one[1]["result"]["steps"]: one for one in reversed(found) if "result" in one[1]}
        if not before:
            self.whole[change] = states
        return states


def sequences(count: int, length: int = 8, strict: bool = False, begin: int = 0) -> Counter[str]:
    """Runs random sequences; returns what was done, and how often something was wrong.

    Arguments:
        count: How many, at least.
        length: How many things happen in each, at most.
        strict: Whether what is wrong is an error at once.
        begin: Seeds the sequences: the same ones each time for the same number.
    """
    Sequences.counts.clear()
    Sequences.strict = strict
    Sequences.read.clear()
    run_state_machine_as_test(
        seed(begin)(Sequences),
        settings=settings(
            database=None,
            deadline=None,
            max_examples=count,
            stateful_step_count=length,
            phases=[Phase.generate],
            suppress_health_check=[*HealthCheck],
        ),
    )
    return Counter(Sequences.counts)
