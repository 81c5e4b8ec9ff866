"""What works on the CPU works on another device: no tensor is made in the wrong place, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretend import DEVICE, Pretend, There
from small_run import rows, sampler, small_vma, weights

import pyro_vmem as pv
from pyro_vmem.speed import measure_speed

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
    "contribution": lambda vma, e: pv.diagnostics.contribution(vma, e.memory, e.x).log_evidence,
    "sbc": lambda vma, e: pv.diagnostics.sbc(vma, e.memory, num_simulations=20, progress=False).ranks["a"],
    "datatree": lambda vma, e: pv.diagnostics.to_datatree(vma, e.memory, e.x)["posterior"]["z"].values,
    "speed": lambda vma, e: measure_speed(vma, e.memory, [4], seconds=0.0, precision="float32").batch_size,
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
