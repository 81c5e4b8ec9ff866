"""Checkpoints: what is written comes back, whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pyro_vmem as pv
from pyro_vmem import checkpoint
from pyro_vmem._files import write_atomically
from pyro_vmem.checkpoint import load_checkpoint, save_checkpoint

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


def failing_save(tensors: Any, path: Path, metadata: Any) -> None:
    Path(path).write_bytes(b"half of")
    raise OSError("no space left on device")


def interrupted(path: Path) -> None:
    with write_atomically(path) as aside:
        aside.write_text("half of")
        raise KeyboardInterrupt


@pytest.mark.parametrize("there", [True, False])
def test_an_error_while_writing_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        save_checkpoint(tmp_path / "a", {"w": torch.ones(3)}, {"step": 1})
    before = [(name, (tmp_path / name).read_bytes()) for name in names(tmp_path)]
    monkeypatch.setattr(checkpoint, "save_file", failing_save)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path / "a", {"w": torch.zeros(3)}, {"step": 2})
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
    with pytest.raises(ValueError, match=r"has format .*expected 'pyro_vmem/1'"):
        load_checkpoint(tmp_path / "a")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_checkpoint(tmp_path / "a")


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
    assert same(dict(pv.load(tmp_path).state_dict()), shifted(vma, 1.0))
    save_checkpoint(tmp_path / "best.safetensors", shifted(vma, 2.0), spec)
    assert same(dict(pv.load(tmp_path).state_dict()), shifted(vma, 2.0))


def test_load_what_holds_no_model(tmp_path: Path, vma: pv.VMA) -> None:
    save_checkpoint(tmp_path / "a", vma.state_dict(), {"step": 3})
    with pytest.raises(ValueError, match=r"holds no model\. Give a checkpoint that pyro_vmem.fit wrote"):
        pv.load(tmp_path / "a")


@pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonarg|Importing '):DeprecationWarning")
def test_load_runs_nothing_that_a_file_names(tmp_path: Path, vma: pv.VMA) -> None:
    spec = vma.spec()
    marker = tmp_path / "marker"
    spec["init_args"]["address_prior"] = {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}}
    save_checkpoint(tmp_path / "a", vma.state_dict(), json.loads(json.dumps({"spec": spec})))
    with pytest.raises(ValueError, match=r"os\.system does not correspond to a subclass of AddressPrior"):
        pv.load(tmp_path / "a")
    assert not marker.exists()


def test_weights_of_another_model_are_refused(tmp_path):
    save_checkpoint(tmp_path / "a", pv.VMA.for_vectors(5).state_dict(), {"spec": pv.VMA.for_vectors(6).spec()})
    with pytest.raises(ValueError, match=r"path: the weights in .* are not those of the model it names"):
        pv.load(tmp_path / "a")
