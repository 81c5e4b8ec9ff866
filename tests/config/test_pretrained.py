"""Trained models that come with the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.config import pretrained
from pyro_vmem.train import load_checkpoint, save_checkpoint


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pv.VMA:
    """A small model in place of those of the package."""
    torch.manual_seed(0)
    vma = pv.VMA.for_images((1, 8, 8), latent_dim=4, num_features=16, width=4)
    halves = {name: tensor.half() for name, tensor in vma.state_dict().items()}
    save_checkpoint(tmp_path / "weights" / "small.safetensors", halves, {"spec": vma.spec(), "protocol": "gmn"})
    (tmp_path / "weights" / "small.md").write_text("# small\n")
    monkeypatch.setattr(pretrained, "_WEIGHTS", tmp_path / "weights")
    return vma


@pytest.mark.parametrize("name", pretrained.pretrained_names())
def test_what_comes_with_the_package(name: str) -> None:
    vma = pv.VMA.from_pretrained(name)
    assert not vma.training
    assert {tensor.dtype for tensor in vma.state_dict().values()} == {torch.float32}
    card = pv.config.model_card(name)
    for section in ("## Data", "## Figures", "## Limits", "## File", "Apache License 2.0"):
        assert section in card
    assert hashlib.sha256((pretrained._WEIGHTS / f"{name}.safetensors").read_bytes()).hexdigest() in card
    assert f"{sum(p.numel() for p in vma.parameters()):,} parameters" in card  # that of this model
    assert (pretrained._WEIGHTS / f"{name}.safetensors").stat().st_size < 5e6


def test_it_has_seen_characters() -> None:
    """Letters are not what it was trained on, but nearer to it than their mirror images are to each other."""
    _, test = pv.data.glyphs().split(by="alphabet", test=0.2, seed=0)
    episode = pv.data.EpisodeSampler(test, n_way=20, k_shot=1, n_query=4, seed=1)[0]
    vma = pv.VMA.from_pretrained("omniglot28")
    probs = vma.classify(episode.memory, episode.x)
    classes = vma.encode(episode.memory).labels.unique()  # type: ignore[union-attr]
    hits = (classes[probs.argmax(-1)] == episode.labels).float().mean()
    assert hits > 0.4  # chance: 0.05


def test_weights_are_those_of_the_file_in_full_precision(small: pv.VMA) -> None:
    loaded = pv.VMA.from_pretrained("small")
    for name, tensor in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert pv.config.model_card("small") == "# small\n"


@pytest.mark.parametrize(
    "ask", [pv.config.from_pretrained, pv.config.model_card, lambda name: pretrained.unpack(name, Path("run"))]
)
def test_a_wrong_name_is_answered_with_the_right_ones(ask, small: pv.VMA) -> None:
    with pytest.raises(ValueError, match="name: expected one of 'small', got 'smal'"):
        ask("smal")


def test_unpacked_it_is_a_run(small: pv.VMA, tmp_path: Path) -> None:
    pretrained.unpack("small", tmp_path / "run")
    assert pv.load(tmp_path / "run").spec() == small.spec()
    assert (tmp_path / "run" / "history.csv").exists()
    save_checkpoint(tmp_path / "other" / "last.safetensors", small.state_dict(), {})
    with pytest.raises(ValueError, match="already holds a run"):
        pretrained.unpack("small", tmp_path / "other")
    assert not (tmp_path / "other" / "best.safetensors").exists()


def test_training_starts_from_its_weights(small: pv.VMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_vmem.app import experiment, sources

    images = (torch.rand(400, 1, 8, 8) < 0.2).to(torch.uint8) * 255
    dataset = pv.data.FewShotDataset(images, torch.arange(400) // 10)
    monkeypatch.setattr(sources.data, "glyphs", lambda size, seed: dataset)
    started = experiment.Experiment(pretrained="small", n_way=4, k_shot=1, n_query=1, steps=1, lr=1e-9)
    started.train(tmp_path / "run", progress=False)
    tensors, _ = load_checkpoint(tmp_path / "run" / "best.safetensors")
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensors[name], tensor.half().float(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", pretrained.pretrained_names())
def test_an_experiment_draws_images_of_its_size(name: str) -> None:
    from pyro_vmem.app import Experiment

    vma, episodes, held_out = Experiment(pretrained=name, n_way=4, k_shot=1, n_query=1).begin()
    assert episodes[0].x.shape[1:] == held_out[0].x.shape[1:] == vma.event_shape
