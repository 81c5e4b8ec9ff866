"""The embedded engine of Milvus, one for the tests of a process, and a server of it in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyro_vmem.memory import MilvusIndex, MilvusMemory

needs_milvus = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pymilvus", "milvus_lite")),
    reason="pymilvus and milvus-lite are not installed: pip install 'pyro_vmem[milvus]'",
)
FOLDER = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
names = (f"c{count}" for count in itertools.count())


@functools.cache
def uri() -> str:
    """The file of this process."""
    return f"{FOLDER.name}/{os.getpid()}.db"


def index_of(keys: Tensor) -> MilvusIndex:
    """An index in a collection of its own."""
    index = MilvusMemory.create(uri(), next(names), (8,), dim=keys.shape[1]).index
    index.add(keys)
    return index


def memory_of(templates: Tensor, labels: Tensor | None = None, dim: int = 3) -> MilvusMemory:
    """A memory in a collection of its own, with random keys."""
    shape = tuple(templates.shape[1:])
    memory = MilvusMemory.create(uri(), next(names), shape, dim, labelled=labels is not None)
    memory.add(templates, labels, torch.randn(len(templates), dim))
    return memory


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextlib.contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A server of the embedded engine at `http://127.0.0.1:port`, until it is killed or the block ends."""
    call = f"import milvus_lite.adapter.grpc.server as s; s.run_server({str(folder / 'served')!r}, '127.0.0.1', {port})"
    command = [sys.executable, "-u", "-c", call]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            assert "listening" in process.stdout.readline()
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.05)
            yield process
        finally:
            process.kill()
