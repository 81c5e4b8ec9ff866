"""Checkpoints: what is written comes back, whole or not at all."""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pyro_vmem as pv
from pyro_vmem._utils import files as _files
from pyro_vmem._utils.files import versions_of, write_atomically, write_json
from pyro_vmem.train import checkpoint, load_checkpoint, save_checkpoint
from pyro_vmem.train.checkpoint import load_newest

TENSORS = {
    "plain": torch.randn(3, 4),
    "half": torch.randn(5).bfloat16(),
    "double": torch.randn(2, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "integers": torch.tensor([-1, 2**40]),
    "bytes": torch.randint(0, 255, (16,), dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "strided": torch.randn(4, 3).T,
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
}
DATA = {"step": 3, "name": "Größe", "nested": {"list": [1, 2.5, None, True]}, "bound": -math.inf}


def same(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], other) and tensors[name].dtype == other.dtype for name, other in others.items()
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("tensors", [TENSORS, {}], ids=["", "none"])
@pytest.mark.parametrize("data", [DATA, {}], ids=["", "no-data"])
def test_round_trip(tmp_path: Path, tensors: dict[str, torch.Tensor], data: dict[str, Any]) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    save_checkpoint(path, tensors, data)
    read, plain = load_checkpoint(str(path))
    assert same(read, tensors)
    assert plain == data
    assert names(path.parent) == ["a.safetensors"]


def test_tied_weights_and_parameters(tmp_path: Path) -> None:
    guide = pv.SimilarityGuide(6, 4, tied=True)
    save_checkpoint(tmp_path / "a", guide.state_dict(keep_vars=True), {})
    other = pv.SimilarityGuide(6, 4, tied=True)
    tensors, _ = load_checkpoint(tmp_path / "a")
    assert not any(tensor.requires_grad for tensor in tensors.values())
    other.load_state_dict(tensors)
    assert same(dict(other.state_dict()), dict(guide.state_dict()))
    assert other.embed_x is other.embed_memory


def test_a_second_one_replaces_the_first(tmp_path: Path) -> None:
    for step in range(2):
        save_checkpoint(tmp_path / "a", {"w": torch.full((3,), float(step))}, {"step": step})
    tensors, data = load_checkpoint(tmp_path / "a")
    assert data == {"step": 1}
    assert tensors["w"].tolist() == [1.0] * 3
    assert names(tmp_path) == ["a"]


@contextmanager
def little_space(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size: the system itself refuses to write on, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def interrupted(path: Path) -> None:
    with write_atomically(path) as aside:
        aside.write_text("half of")
        raise KeyboardInterrupt


@pytest.mark.parametrize("there", [True, False])
def test_an_error_while_writing_leaves_the_old_one_and_nothing_else(tmp_path: Path, there: bool) -> None:
    if there:
        save_checkpoint(tmp_path / "a", {"w": torch.ones(3)}, {"step": 1})
    before = [(name, (tmp_path / name).read_bytes()) for name in names(tmp_path)]
    with pytest.raises(OSError, match="File too large"), little_space(50_000):
        save_checkpoint(tmp_path / "a", {"w": torch.zeros(100_000)}, {"step": 2}, keep=3)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path / "a", {}, {"step": object()})
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "a")
    assert [(name, (tmp_path / name).read_bytes()) for name in names(tmp_path)] == before


def test_an_error_while_moving_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()  # a folder stands where the file should go
    with pytest.raises(OSError, match="a"):
        save_checkpoint(tmp_path / "a", {"w": torch.ones(3)}, {})
    assert names(tmp_path) == ["a"]


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with write_atomically(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
        assert aside.parent == path.parent  # or moving it would be a copy
    assert path.read_text() == "new"


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="path: there is no checkpoint at"):
            load_checkpoint(path)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """It may be whole, so that nothing is set aside, and no earlier one is taken in its place."""
    path = tmp_path / "last.safetensors"
    for step in (1, 2):
        save_checkpoint(path, {"w": torch.ones(2)}, {"step": step}, keep=2)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for owner, name in ((Path, "open"), (checkpoint, "safe_open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            for read in (lambda: load_checkpoint(path), lambda: load_newest(path, set_aside=True)):
                with pytest.raises(type(error), match=error.strerror):
                    read()
    assert [load_checkpoint(p)[1]["step"] for p in versions_of(path)] == [2, 1]


@pytest.mark.parametrize("write", [lambda p: save_checkpoint(p, {}, {}, keep=2), lambda p: write_json(p, {})])
def test_what_killed_writers_left_does_not_pile_up(tmp_path: Path, write: Any) -> None:
    """A writer that lives keeps its file: it has locked it."""
    path = tmp_path / "a.json"

    def die() -> None:
        with write_atomically(path) as aside:
            aside.write_bytes(b"half")
            os._exit(0)

    for _ in range(3):
        child = os.fork()
        if child == 0:
            die()
        os.waitpid(child, 0)
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
    with write_atomically(path) as aside:
        aside.write_bytes(b"whole")
        write(path)
        assert [p.name for p in tmp_path.glob(".*.tmp")] == [aside.name]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"whole"


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, TENSORS, DATA)
    whole = path.read_bytes()
    for length in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            load_checkpoint(path)


def test_a_corrupted_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, TENSORS, DATA)
    whole = path.read_bytes()
    for corrupted in (b"\xff" * 8 + whole[8:], whole[:8] + b"x" * 8 + whole[16:], b"PK" + whole[2:], whole + b"more"):
        path.write_bytes(corrupted)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            load_checkpoint(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pyro_vmem/0", "data": "{}"}])
def test_a_foreign_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a", metadata)
    with pytest.raises(ValueError, match=r"has format .*expected 'pyro_vmem/2'.*Give a checkpoint that"):
        load_checkpoint(tmp_path / "a")


def test_a_file_of_the_future(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a", {"format": "pyro_vmem/3", "versions": '{"pyro_vmem": "9.1"}'})
    with pytest.raises(ValueError, match=r"has format 3, .* reads formats 1 to 2; .*9\.1.*Update pyro_vmem"):
        load_checkpoint(tmp_path / "a")


def test_a_file_of_the_first_format(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a", {"format": "pyro_vmem/1", "data": '{"step": 3}'})
    tensors, data = load_checkpoint(tmp_path / "a")
    assert tensors["w"].tolist() == [1.0, 1.0]
    assert data == {"step": 3}
    save_file({"w": torch.ones(2)}, tmp_path / "a", {"format": "pyro_vmem/1"})
    with pytest.raises(ValueError, match=r"has no readable data .* Use another checkpoint"):
        load_checkpoint(tmp_path / "a")


def test_what_wrote_it_is_in_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", TENSORS, DATA)
    with safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pyro_vmem/2"
    assert json.loads(metadata["versions"])["pyro_vmem"] == pv.__version__
    assert metadata["checksum"].startswith("sha256:")


def test_every_byte_that_is_changed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, {"w": torch.randn(7), "n": torch.arange(3)}, {"step": 3, "bound": -101.25})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"path: .*(is corrupted|is not a whole safetensors file|has format)"):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path)[1]["step"] == 3


def test_a_missing_checksum_is_noticed(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a", {"format": "pyro_vmem/2", "data": "{}"})
    with pytest.raises(ValueError, match="is corrupted: it has no checksum"):
        load_checkpoint(tmp_path / "a")


class Evil:
    """What runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["last.safetensors", "model.pt", "a"])
@pytest.mark.parametrize("how", ["torch", "pickle", "inside"])
def test_a_pickle_is_not_opened(tmp_path: Path, name: str, how: str) -> None:
    path, marker = tmp_path / name, tmp_path / "marker"
    if how == "torch":
        torch.save({"w": Evil(marker)}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        poison = torch.frombuffer(bytearray(pickle.dumps(Evil(marker))), dtype=torch.uint8)
        save_checkpoint(path, {"random_state": poison}, {})
        assert load_checkpoint(path)[0]["random_state"].equal(poison)
    if how != "inside":
        for read in (load_checkpoint, load_newest, pv.load):
            with pytest.raises(
                ValueError, match=r"is not a whole safetensors file .* looks like a pickle, which is never"
            ):
                read(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # it would have


PICKLES = ("pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle")


def unsafe_calls(tree: ast.AST) -> list[str]:
    """What can run code that a file or a text holds. (`np.load` opens no pickle unless it is told to.)"""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [module for module in modules if module.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        bad = call in ("eval", "exec", "yaml.load", "yaml.unsafe_load") or call.endswith("get_param_store().load")
        bad |= (
            call.split(".")[-1] == "load" and call.split(".")[0] == "torch" and arguments.get("weights_only") != "True"
        )
        bad |= arguments.get("allow_pickle", "False") != "False"
        if bad:
            found.append(call)
    return found


def test_nothing_that_unpickles_is_called() -> None:
    planted = "import pickle; torch.load(f); np.load(f, allow_pickle=True); pyro.get_param_store().load(f); eval(s)"
    bad = ["pickle", "torch.load", "np.load", "pyro.get_param_store().load", "eval"]
    assert sorted(unsafe_calls(ast.parse(planted))) == sorted(bad)
    assert not unsafe_calls(ast.parse("torch.load(f, weights_only=True); np.load(f, allow_pickle=False); vma.eval()"))
    root = Path(pv.__file__).parent
    for folder in (root, root.parent / "benchmarks"):
        for path in folder.rglob("*.py"):
            assert unsafe_calls(ast.parse(path.read_text())) == [], path


# Earlier versions


def test_earlier_ones_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    for step in range(5):
        save_checkpoint(path, {}, {"step": step}, keep=3)
        assert load_checkpoint(path)[1]["step"] == step
    (tmp_path / "last-best.safetensors").touch()
    (tmp_path / "last1.safetensors").touch()
    kept = versions_of(path)
    assert [p.name for p in kept] == ["last.safetensors", "last-1.safetensors", "last-2.safetensors"]
    assert [load_checkpoint(p)[1]["step"] for p in kept] == [4, 3, 2]


@pytest.mark.parametrize("links", [True, False])
def test_the_last_one_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Also where the file system knows no hard links."""
    path, seen = tmp_path / "last.safetensors", []
    save_checkpoint(path, {}, {"step": 0}, keep=2)
    save_checkpoint(path, {}, {"step": 1}, keep=2)

    def look(call: Any) -> Any:
        def looking(*args: Any) -> Any:
            seen.append(load_checkpoint(path)[1]["step"])
            result = call(*args)
            seen.append(load_checkpoint(path)[1]["step"])
            return result

        return looking

    def no_link(*_: Any) -> None:
        raise OSError("not supported")

    for name in ("replace", "link", "fsync"):
        monkeypatch.setattr(_files.os, name, look(no_link if name == "link" and not links else getattr(os, name)))
    save_checkpoint(path, {}, {"step": 2}, keep=2)
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}
    assert [load_checkpoint(p)[1]["step"] for p in versions_of(path)] == [2, 1]
    assert names(tmp_path) == ["last-1.safetensors", "last.safetensors"]


def test_file_and_folder_reach_the_disk_before_and_after_the_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def noted(name: str) -> Any:
        original = getattr(os, name)

        def call(*args: Any) -> Any:
            is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")
            calls.append("fsync folder" if is_folder else name)
            return original(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(_files.os, name, noted(name))
    save_checkpoint(tmp_path / "a", {}, {})
    assert calls == ["fsync", "replace", "fsync folder"]


def test_the_newest_whole_one_is_taken_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    for step in range(3):
        save_checkpoint(path, {}, {"step": step}, keep=3)
    assert load_newest(path)[1]["step"] == 2
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=r"last.safetensors' is not a whole .* Going on from last-1\.safetensors"):
        assert load_newest(path)[1]["step"] == 1
    path.unlink()
    assert load_newest(path)[1]["step"] == 1
    (tmp_path / "last-1.safetensors").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="Going on from last-2"):
        assert load_newest(path)[1]["step"] == 0
    (tmp_path / "last-2.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"None of 'last-1.safetensors', 'last-2.safetensors' can be read. Start again"
    ):
        load_newest(path)
    with pytest.raises(FileNotFoundError, match="path: there is no checkpoint"):
        load_newest(tmp_path / "other")


# Models


@pytest.fixture
def vma() -> pv.VMA:
    pytest.importorskip("jsonargparse")
    return pv.VMA.for_vectors(4, latent_dim=2, num_features=6, hidden=(8,), name="mine")


def shifted(vma: pv.VMA, by: float) -> dict[str, torch.Tensor]:
    return {name: value + by for name, value in vma.state_dict().items()}


def test_load_a_file(tmp_path: Path, vma: pv.VMA) -> None:
    save_checkpoint(tmp_path / "a.safetensors", vma.state_dict(), {"spec": vma.spec()})
    for path in (tmp_path / "a.safetensors", str(tmp_path / "a.safetensors")):
        loaded = pv.load(path)
        assert same(dict(loaded.state_dict()), dict(vma.state_dict()))
        assert loaded.spec() == vma.spec()
        assert loaded.name == "mine"
        assert not loaded.training
    memory, x = pv.Memory(torch.rand(3, 4), torch.arange(3)), torch.rand(5, 4)
    assert torch.equal(loaded.classify(memory, x), vma.classify(memory, x))


def test_load_a_run_takes_the_best_or_the_last(tmp_path: Path, vma: pv.VMA) -> None:
    spec = {"spec": vma.spec()}
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        pv.load(tmp_path)
    last = {f"model.{name}": value for name, value in shifted(vma, 1.0).items()}
    last |= {f"best.{name}": value for name, value in shifted(vma, 5.0).items()}
    last |= {"optimizer.0.step": torch.tensor(3.0), "random_state": torch.get_rng_state()}
    save_checkpoint(tmp_path / "last.safetensors", last, spec | {"result": {}})
    assert same(dict(pv.load(tmp_path).state_dict()), shifted(vma, 5.0))
    assert same(dict(pv.load(tmp_path / "last.safetensors").state_dict()), shifted(vma, 1.0))
    save_checkpoint(tmp_path / "best.safetensors", shifted(vma, 2.0), spec)
    assert same(dict(pv.load(tmp_path).state_dict()), shifted(vma, 2.0))


def test_load_what_holds_no_model(tmp_path: Path, vma: pv.VMA) -> None:
    save_checkpoint(tmp_path / "a", vma.state_dict(), {"step": 3})
    with pytest.raises(ValueError, match=r"holds no model\. Give a checkpoint that pyro_vmem.fit wrote"):
        pv.load(tmp_path / "a")


def test_load_runs_nothing_that_a_file_names(tmp_path: Path, vma: pv.VMA) -> None:
    spec = vma.spec()
    marker = tmp_path / "marker"
    spec["init_args"]["address_prior"] = {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}}
    save_checkpoint(tmp_path / "a", vma.state_dict(), json.loads(json.dumps({"spec": spec})))
    with pytest.raises(ValueError, match=r"expected the name of an AddressPrior, got 'os\.system'"):
        pv.load(tmp_path / "a")
    assert not marker.exists()


def test_weights_of_another_model_are_refused(tmp_path):
    save_checkpoint(tmp_path / "a", pv.VMA.for_vectors(5).state_dict(), {"spec": pv.VMA.for_vectors(6).spec()})
    with pytest.raises(ValueError, match=r"path: the weights in .* are not those of the model it names"):
        pv.load(tmp_path / "a")
