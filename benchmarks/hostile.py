"""Files from strangers, and what opening one costs: the memory that is taken, and the programs that are started."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyro_vmem as pv
from benchmarks.killing import in_a_fork
from pyro_vmem.train import save_checkpoint

MOST = 6 << 30  # bytes of address space more than this process has: no file takes all of the machine
SECONDS = 60

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 105 105\n%%EndComments\nshowpage\n%%EOF\n"


def large_model(path: Path) -> None:
    """A small checkpoint of a spec whose networks would have a billion weights."""
    spec = pv.VMA.for_vectors(5, latent_dim=2, num_features=4, hidden=(8, 8)).spec()
    text = json.dumps(spec).replace("[8, 8]", "[32768, 32768]")
    save_checkpoint(path, {"w": torch.ones(2)}, {"spec": json.loads(text)})


def spec_as_path(path: Path) -> None:
    """A checkpoint whose spec is the name of a file that never ends."""
    save_checkpoint(path, {"w": torch.ones(2)}, {"spec": "/dev/zero"})


def aliases(path: Path) -> None:
    """YAML of nine lists, each of nine times the one before."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    path.write_text("\n".join(lines), encoding="utf-8")


def nested(path: Path) -> None:
    """JSON of lists in lists."""
    path.write_text("[" * 200_000, encoding="utf-8")


def archive(path: Path) -> None:
    """A megabyte that unpacks to a gigabyte."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 32, 32)})
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("images.npy", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for _ in range(1 << 10):
            member.write(bytes(1 << 20))


def picture(path: Path) -> None:
    """A picture of 400 million pixels in 50 kB."""
    from PIL import Image

    path.mkdir()
    Image.new("1", (20_000, 20_000), 1).save(path / "a.png")


def postscript(path: Path) -> None:
    """A program in PostScript that calls itself a picture."""
    path.mkdir()
    (path / "a.png").write_bytes(POSTSCRIPT)


def from_folder(path: Path) -> Any:
    """Reads a folder of pictures, of one class."""
    return pv.data.from_folder(path.parent, size=(8, 8))


HOSTILE: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], Any]]] = {
    "a spec of a billion weights": ("large.safetensors", large_model, pv.load),
    "a spec that is a path": ("path.safetensors", spec_as_path, pv.load),
    "aliases of aliases": ("aliases.yaml", aliases, pv.build),
    "lists in lists": ("nested.json", nested, pv.build),
    "an archive of zeros": ("zeros.npz", archive, pv.data.from_npz),
    "a picture of white": ("picture", picture, from_folder),
    "a picture that is a program": ("postscript", postscript, from_folder),
}


def opened(make: Callable[[Path], None], name: str, read: Callable[[Path], Any]) -> tuple[float, int]:
    """Opens a hostile file in a process of its own; returns the megabytes it took, and the programs it started."""
    with tempfile.TemporaryDirectory() as root:
        file, told, ran = Path(root, "files", name), Path(root, "told"), Path(root, "ran")
        file.parent.mkdir()
        make(file)
        program = Path(root, "gs")  # what Pillow starts for PostScript, if it is let
        program.write_text(f"#!/bin/sh\necho gs >> {ran}\n", encoding="utf-8")
        program.chmod(0o755)

        def work() -> None:
            os.environ["PATH"] = f"{root}{os.pathsep}{os.environ['PATH']}"
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * os.sysconf("SC_PAGE_SIZE") + MOST
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

            def watch(event: str, arguments: tuple[Any, ...]) -> None:
                if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
                    with ran.open("a", encoding="utf-8") as log:
                        log.write(f"{event}\n")

            sys.addaudithook(watch)
            signal.alarm(SECONDS)
            taken = 0.0
            try:
                read(file)
            except Exception as error:  # however it is refused
                if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                    taken = MOST / 1e6
            taken = max(taken, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
            told.write_text(json.dumps(taken), encoding="utf-8")

        in_a_fork(work)
        taken = json.loads(told.read_text(encoding="utf-8")) if told.exists() else MOST / 1e6
        return taken, len(ran.read_text(encoding="utf-8").splitlines()) if ran.exists() else 0


def open_all() -> list[dict[str, Any]]:
    """Opens each hostile file."""
    rows = []
    for what, (name, make, read) in HOSTILE.items():
        taken, programs = opened(make, name, read)
        rows.append({"file": what, "mb": round(taken, 1), "programs": programs})
    return rows
