"""What a process may have set before it calls the library: default dtype and device, autocast, no stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import blobs, equal, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem.data import EpisodeSampler, LibraryEpisodes, RecallSampler

DATA = blobs()
SOURCES: dict[str, Any] = {
    "EpisodeSampler": lambda: EpisodeSampler(DATA, 4, 1, 2, rotate=True, flip=True),
    "LibraryEpisodes": lambda: LibraryEpisodes(DATA, 2, 4),
    "RecallSampler": lambda: RecallSampler(DATA, 8, 4),
    "WarpedEpisodes": lambda: pv.data.WarpedEpisodes(EpisodeSampler(DATA, 4, 1, 2)),
    "gmn": lambda: pv.data.protocol("gmn").episodes(DATA, n_classes=3, shots=2),
    "a part of the data": lambda: EpisodeSampler(DATA.split(by="class", seed=0)[0], 4, 1, 2),
}


@pytest.mark.parametrize("name", SOURCES)
def test_episodes_are_the_same_in_double_precision(name: str, request: pytest.FixtureRequest) -> None:
    episode = SOURCES[name]()[3]
    request.getfixturevalue("float64")
    double = SOURCES[name]()[3]
    assert double.x.dtype == double.memory.dtype == torch.float64
    assert torch.equal(double.x, (episode.x.double() * 255).round() / 255)  # as the image holds it
    assert torch.equal(double.labels, episode.labels)


def test_letters_are_the_same_in_double_precision(request: pytest.FixtureRequest) -> None:
    images = pv.data.glyphs(size=12, drawings=2).images
    request.getfixturevalue("float64")
    assert torch.equal(pv.data.glyphs(size=12, drawings=2).images, images)


def test_a_double_model_trains_and_is_measured(float64: None) -> None:
    vma = small_vma()
    pv.fit(vma, sampler(), steps=1, validation=sampler(1), progress=False)
    assert {p.dtype for p in vma.parameters()} == {torch.float64}
    assert pv.diagnostics.evaluate(vma, sampler(), 1, 2, progress=False).log_evidence.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_loaded_model_has_the_precision_of_its_file_and_no_less_than_single(
    dtype: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    vma = small_vma().to(dtype)
    vma.save(tmp_path / "a.safetensors")
    request.getfixturevalue("float64")
    found = weights(pv.load(tmp_path / "a.safetensors"))
    assert {tensor.dtype for tensor in found.values()} == {torch.promote_types(dtype, torch.float32)}
    assert all(torch.equal(tensor, found[name].to(dtype)) for name, tensor in vma.state_dict().items())


def test_a_model_of_half_precision_is_refused_before_it_computes() -> None:
    for call in (lambda v: pv.fit(v, sampler(), steps=1), lambda v: pv.diagnostics.evaluate(v, sampler(), 1, 2)):
        with pytest.raises(ValueError, match=r"^memory: the dtype of its templates is torch.float32.* torch.float16"):
            call(small_vma().half())


@pytest.mark.parametrize("name", SOURCES)
def test_episodes_are_made_on_the_cpu_whatever_the_default_device(name: str) -> None:
    episode = SOURCES[name]()[3]
    with torch.device("meta"):
        found = SOURCES[name]()[3]
    assert found.x.device.type == found.memory.device.type == "cpu"
    assert torch.equal(found.x, episode.x)


VMA, SAMPLER, EPISODE = small_vma(), sampler(), sampler()[0]
MEASURED: dict[str, Any] = {
    "validate": lambda: pv.validate(VMA, SAMPLER, num_episodes=1)["bound"],
    "evaluate": lambda: pv.diagnostics.evaluate(VMA, SAMPLER, 1, 2, progress=False).log_evidence,
    "diagnose": lambda: pv.diagnostics.diagnose(VMA, EPISODE.memory, EPISODE.x, seed=0).log_evidence.values,
    "sbc": lambda: pv.diagnostics.sbc(VMA, EPISODE.memory, num_simulations=20, progress=False).ranks["a"],
    "glyphs": lambda: pv.data.glyphs(size=12, drawings=2).images,
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_measured_does_not_depend_on_the_default_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = torch.as_tensor(MEASURED[name]())
    with torch.device("meta"):
        found = MEASURED[name]()
    assert torch.equal(torch.as_tensor(found, device="cpu"), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_autocast_around_a_run_changes_nothing(dtype: torch.dtype) -> None:
    """Its rounded weights torch would keep for the run, and those of a step for the next."""
    alone, inside = small_vma(), small_vma()
    settings: dict[str, Any] = {"steps": 3, "lr": 0.1, "precision": "bfloat16", "progress": False}
    trainer = pv.Trainer(alone, "vimco", pv.TrainingConfig(**{n: v for n, v in settings.items() if n != "progress"}))
    trainer.seed()
    while not trainer.finished():
        trainer.step(sampler()[trainer.result.steps])
    with torch.autocast("cpu", dtype):
        inside.encode(EPISODE.memory)
        pv.fit(inside, sampler(), validation=sampler(1), select="last", **settings)
        inside.encode(EPISODE.memory)
    assert equal(weights(alone), weights(inside))


def test_weights_that_cannot_be_trained_are_named() -> None:
    with torch.inference_mode():
        vma = small_vma()
    with pytest.raises(ValueError, match=r"vma: its weights were made in torch.inference_mode\(\)"):
        pv.fit(vma, sampler(), steps=1, progress=False)


def test_a_process_without_stderr_trains_and_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a service or pythonw has."""
    monkeypatch.setattr(sys, "stderr", None)
    assert pv.fit(small_vma(), sampler(), "auto", steps=1).steps == 1
    assert len(pv.diagnostics.evaluate(VMA, sampler(), 1, 2).log_evidence)
    assert len(pv.diagnostics.sbc(VMA, EPISODE.memory, num_simulations=20).ranks["a"])
