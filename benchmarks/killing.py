"""Processes killed at any moment of a run, and the states that they leave, compared bit for bit."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyro_vmem._utils import files as _files
from pyro_vmem.train import load_checkpoint

# Where a write can be cut: the call that is killed, and whether before, in the midst or after it.
POINTS = {
    "before the file is opened": ("mkstemp", "before"),
    "before the first byte": ("write", "before"),
    "after half the bytes": ("write", "half"),
    "after the last byte": ("write", "after"),
    "before the file is flushed": ("fsync", "before"),
    "after the file is flushed": ("fsync", "after"),
    "before the old file gets its second name": ("link", "before"),
    "after the old file got its second name": ("link", "after"),
    "before the move": ("replace", "before"),
    "after the move": ("replace", "after"),
}


def in_a_fork(work: Callable[[], Any], kill_after: float | None = None) -> int:
    """Does some work in a child process; returns its exit code, `-SIGKILL` if it was killed.

    Arguments:
        work: What to do.
        kill_after: Seconds after which it is killed, if it is not done.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "resume: the run is over")
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: Any) -> None:
    """Ends this process as a power cut would: no handler, no `finally`."""
    os.kill(os.getpid(), signal.SIGKILL)


def armed(point: str, nth: int) -> None:
    """Makes this process die in the n-th of its calls of a point."""
    name, when = POINTS[point]
    owner: Any = {"mkstemp": _files.tempfile, "write": Path}.get(name, os)
    attribute = "write_bytes" if name == "write" else name
    original = getattr(owner, attribute)
    count = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth and when == "before":
            die()
        if count == nth and when == "half":
            original(args[0], args[1][: len(args[1]) // 2])
            die()
        result = original(*args, **kwargs)
        if count == nth and when == "after":
            die()
        return result

    setattr(owner, attribute, deadly)


def state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a checkpoint holds, less the time, in which alone two equal runs differ."""
    tensors, data = load_checkpoint(path)
    if "result" in data:
        data["result"] |= {"seconds": 0.0, "interrupted": False}
        for row in data["result"]["history"]:
            row["seconds"] = 0.0
    return tensors, data


def same(one: tuple[dict[str, torch.Tensor], Any], two: tuple[dict[str, torch.Tensor], Any]) -> bool:
    """Whether two states are equal bit for bit."""
    return (
        one[1] == two[1]
        and one[0].keys() == two[0].keys()
        and all(torch.equal(t, two[0][n]) for n, t in one[0].items())
    )
