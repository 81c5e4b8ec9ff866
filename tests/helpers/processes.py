"""Two processes of a run, forked from this one: no torch is imported a second time."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def start(work: Callable[[int], object], count: int = 2) -> list[int]:
    """Runs `work(rank)` in processes that form a gloo group; returns their numbers."""
    folder = tempfile.mkdtemp()
    return [_fork(work, rank, count, folder) for rank in range(count)]


def _fork(work: Callable[[int], object], rank: int, count: int, folder: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(seconds=200)
        )
        with contextlib.redirect_stderr(Path(folder, f"errors-{rank}").open("w")):
            work(rank)
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(children: list[int], seconds: float = 240) -> list[int]:
    """Their exit codes; a process that hangs is killed, and its code is -9."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, 9)
        time.sleep(0.01)
    return [codes[child] for child in children]


def together(work: Callable[[int], object], count: int = 2) -> None:
    """Runs `work(rank)` in processes that form a group, and waits for them."""
    codes = wait(start(work, count))
    assert codes == [0] * count, codes
