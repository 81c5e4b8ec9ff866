"""What works on the CPU works on another device: no tensor is made in the wrong place, and the numbers are the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import DEVICE, Pretend, There
from small_run import blobs, rows, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem.app import Evaluation, Experiment, commands
from pyro_vmem.data.loading import _in_a_thread

pytestmark = pytest.mark.long

QUIET: dict[str, Any] = {"progress": False, "precision": "float32"}


class NoAutocast:
    """Autocast, of which a device of pretence knows nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


@pytest.fixture
def _pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    adam = torch.optim.Adam
    monkeypatch.setattr(torch, "autocast", NoAutocast)
    monkeypatch.setattr("pyro_vmem._utils.precision._Autocast", NoAutocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused=False, **kwargs: adam(*args, **kwargs, foreach=False))
    with Pretend():
        yield


def plain(value: Any) -> Any:
    """Off the device."""
    return value.inner if isinstance(value, There) else value


@pytest.mark.usefixtures("_pretend")
def test_the_device_of_pretence_refuses_tensors_of_the_cpu() -> None:
    there = torch.ones(3, device=DEVICE)
    assert (there.device, float((there + 1).sum())) == (DEVICE, 6.0)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        small_vma().to(DEVICE).generate(sampler()[0].memory)


@pytest.mark.usefixtures("_pretend")
@pytest.mark.parametrize("objective", ["vimco", "reinforce", "rao-blackwell", "enumerate"])
def test_training(objective: Any) -> None:
    here, there = small_vma(), small_vma()
    settings = QUIET | {"steps": 2, "validation": sampler(1), "validate_every": 1}
    expected = pv.fit(here, sampler(), objective, **settings)
    found = pv.fit(there, sampler(), objective, device=DEVICE, **settings)
    assert {p.device for p in there.parameters()} == {DEVICE}
    for row, other in zip(rows(found.history), rows(expected.history), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)
    for name, tensor in weights(there).items():
        torch.testing.assert_close(plain(tensor), here.state_dict()[name], rtol=1e-3, atol=1e-4)


def both(episode: pv.data.Episode) -> list[torch.Tensor]:
    memory = episode.memory
    assert memory.labels is not None
    return [memory.templates, memory.labels, episode.x, episode.labels]


@pytest.mark.usefixtures("_pretend")
@pytest.mark.parametrize("transforms", [{}, {"rotate": True, "flip": True}, {"n_absent": 2}])
def test_episodes_made_on_the_device_are_the_same(transforms: Any) -> None:
    here, there = (pv.data.EpisodeSampler(blobs(), 3, 2, 2, device=where, **transforms) for where in (None, DEVICE))
    warped_here, warped_there = (pv.data.WarpedEpisodes(sampler) for sampler in (here, there))
    assert (here.device.type, there.device, repr(here)) == ("cpu", DEVICE, repr(there))
    for one, other in ((here[3], there[3]), (warped_here[3], warped_there[3])):
        for expected, found in zip(both(one), both(other), strict=True):
            assert found.device == DEVICE
            torch.testing.assert_close(plain(found), expected, rtol=0, atol=1e-6)
    expected, found = here.distractors(3), there.distractors(3)
    assert torch.equal(plain(found.templates), expected.templates)
    assert torch.equal(plain(found.labels), expected.labels)
    made = there[3]
    assert next(_in_a_thread([made], range(1), pin=True)) is made  # type: ignore[arg-type]


@pytest.mark.usefixtures("_pretend")
def test_training_on_episodes_made_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_thread(episodes: Any, indices: range, _: bool) -> Iterator[pv.data.Episode]:
        return (episodes[index] for index in indices)

    monkeypatch.setattr("pyro_vmem.data.loading._in_a_thread", in_this_thread)  # another has no device of pretence
    here, there = small_vma(), small_vma()
    made_there = [pv.data.EpisodeSampler(blobs(seed=s), 6, 1, 2, seed=s, device=DEVICE) for s in (0, 1)]
    expected = pv.fit(here, sampler(), steps=2, validation=sampler(1), **QUIET)
    found = pv.fit(there, made_there[0], steps=2, validation=made_there[1], device=DEVICE, **QUIET)
    for row, other in zip(rows(found.history), rows(expected.history), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)
    with pytest.raises(ValueError, match=r"workers: expected 0, got 1: the episodes are made on 'meta'"):
        pv.fit(there, made_there[0], steps=2, workers=1, device=DEVICE, **QUIET)


@pytest.mark.usefixtures("_pretend")
def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blobs(classes=40)
    data.save_npz(tmp_path / "blobs.npz")
    monkeypatch.setattr("pyro_vmem.app.experiment.autocast", NoAutocast)
    experiment = Experiment("npz", str(tmp_path / "blobs.npz"), 4, 1, 1, latent_dim=4, width=4, steps=1)
    how = Evaluation(ways=4, queries=1, episodes=1, samples=1)
    experiment.train(tmp_path / "cpu", progress=False, device="cpu")
    shutil.copytree(tmp_path / "cpu", tmp_path / "meta")
    found = [experiment.report(tmp_path / where, how, progress=False, device=where) for where in ("cpu", "meta")]
    found.append(experiment.evaluate(tmp_path / "cpu", how, progress=False, device="meta"))
    commands.sample(str(tmp_path / "meta"), rows=2, columns=2, device="meta")
    assert (tmp_path / "meta" / "samples.png").exists()
    for name in ("nll", "information_gain", "hit_rate"):
        assert [metrics[name] for metrics in found] == pytest.approx([found[0][name]] * 3, rel=1e-3, abs=1e-3), name


def evidence(vma: pv.VMA, episode: pv.data.Episode, method: Any) -> torch.Tensor:
    estimate = pv.diagnostics.estimate_evidence(vma, episode.memory, episode.x, 20, method=method, seed=0, warn=False)
    return estimate.log_evidence


ASKED: dict[str, Callable[[pv.VMA, pv.data.Episode], Any]] = {
    "generate": lambda vma, e: vma.generate(e.memory, 2, mean=True),
    "classify": lambda vma, e: vma.classify(e.memory, e.x),
    "complete": lambda vma, e: vma.complete(e.memory, e.x, e.x > 0.5, num_particles=4, rounds=2, mean=True),
    "validate": lambda vma, _: pv.validate(vma, sampler(), num_episodes=1),
    "evaluate": lambda vma, _: pv.diagnostics.evaluate(vma, sampler(), 1, 2, progress=False).summary()["nll"],
    "diagnose": lambda vma, e: pv.diagnostics.diagnose(vma, e.memory, e.x)["log_evidence"].values,
    "sampled": lambda vma, e: evidence(vma, e, "sampled"),
    "exact": lambda vma, e: evidence(vma, e, "exact-address"),
    "top-k": lambda vma, e: evidence(vma, e, "top-k"),
    "contribution": lambda vma, e: pv.diagnostics.contribution(vma, e.memory, e.x).evidence["right"],
    "sbc": lambda vma, e: pv.diagnostics.sbc(vma, e.memory, num_simulations=20, progress=False).ranks["a"],
    "datatree": lambda vma, e: pv.diagnostics.to_datatree(vma, e.memory, e.x)["posterior"]["z"].values,
}


@pytest.mark.usefixtures("_pretend")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # an untrained model's estimates
@pytest.mark.parametrize("name", ASKED)
def test_what_a_trained_model_is_asked(name: str) -> None:
    vma, episode = small_vma().eval(), sampler()[0]
    torch.manual_seed(1)
    expected = ASKED[name](vma, episode)
    torch.manual_seed(1)
    found = ASKED[name](vma.to(DEVICE), episode.to(DEVICE))
    if isinstance(expected, dict):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    else:
        torch.testing.assert_close(plain(found), expected, rtol=1e-4, atol=1e-4)
