"""The pages of the reference: every public name once, where it is first exported."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

# The reference: a page for each of these, of all names in its `__all__`. What no folder exports is internal.
MODULES = {
    "pyro_vmem": "pyro_vmem: what most programs need",
    "pyro_vmem.memory": "pyro_vmem.memory",
    "pyro_vmem.parts": "pyro_vmem.parts",
    "pyro_vmem.model": "pyro_vmem.model",
    "pyro_vmem.data": "pyro_vmem.data",
    "pyro_vmem.infer": "pyro_vmem.infer",
    "pyro_vmem.train": "pyro_vmem.train",
    "pyro_vmem.diagnostics": "pyro_vmem.diagnostics",
    "pyro_vmem.plots": "pyro_vmem.plots",
    "pyro_vmem.distributions": "pyro_vmem.distributions",
    "pyro_vmem.config": "pyro_vmem.config",
    "pyro_vmem.app": "pyro_vmem.app",
    "pyro_vmem.testing": "pyro_vmem.testing",
}


def public_names() -> dict[str, dict[str, Any]]:
    """What each page documents, by full name; every object once, where it is first exported."""
    pages: dict[str, dict[str, Any]] = {name: {} for name in MODULES}
    seen: set[int] = set()
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            value = getattr(module, public)
            if isinstance(value, ModuleType) or id(value) in seen:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                seen.add(id(value))
            elif any(full.endswith(f".{public}") for page in pages.values() for full in page):
                continue  # a constant that was exported before
            pages[name][f"{name}.{public}"] = value
    return pages


def canonical_names() -> dict[str, str]:
    """Where an object is documented, by where it is defined and by its bare name."""
    names: dict[str, str] = {}
    for page in public_names().values():
        for full, value in page.items():
            names.setdefault(full.rpartition(".")[2], full)
            if inspect.isclass(value) or inspect.isfunction(value):
                names[f"{value.__module__}.{value.__qualname__}"] = full
    return names


def pages() -> dict[str, str]:
    """The pages of the reference, by file name."""
    written = {}
    for page, names in public_names().items():
        title, doc = MODULES[page], inspect.cleandoc(importlib.import_module(page).__doc__ or "")
        lines = [title, "=" * len(title), "", f".. py:module:: {page}", "", doc, ""]
        for full, value in names.items():
            if inspect.isclass(value):
                lines += [f".. autoclass:: {full}", "   :members:"]
                lines += ["   :show-inheritance:", ""] if value.__bases__ != (object,) else [""]
            elif inspect.isfunction(value):
                lines += [f".. autofunction:: {full}", ""]
            else:
                shown = f"Keys: {', '.join(f'`{key}`' for key in value)}." if isinstance(value, dict) else f"`{value}`"
                # Below a `py:module`, a name is taken to be in that module.
                lines += [f".. py:data:: {full.removeprefix(f'{page}.')}", "", f"   {shown}", ""]
        written[f"{page}.rst"] = "\n".join(lines)
    return written


def write_all(folder: Path, files: dict[str, str]) -> None:
    """Makes these files all that a folder holds; those that are the same already are left alone."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in files:
            path.unlink()
    for name, text in files.items():
        if not (folder / name).is_file() or (folder / name).read_text() != text:
            (folder / name).write_text(text)
