"""Numbers: what is not finite is skipped, counted and named; extreme inputs behave; precisions agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from small_run import blobs, equal, same_state, sampler, small_vma, weights
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem._utils.precision import autocast
from pyro_vmem.data import Episode, EpisodeSampler, FewShotDataset
from pyro_vmem.train import trainer as steps_module
from pyro_vmem.train.not_finite import NotFiniteError

QUIET: dict[str, Any] = {"progress": False, "precision": "float32"}


class Watched:
    """A sampler that tells which episode was asked for last."""

    def __init__(self) -> None:
        self.inner, self.index = sampler(), -1

    def __getitem__(self, index: int) -> Episode:
        self.index = index
        return self.inner[index]


@contextmanager
def poisoned(vma: pv.VMA, module: str, watched: Watched, where: Callable[[int], bool], value: float) -> Any:
    """The output of a module is not finite at some training steps."""

    def poison(_: Any, __: Any, output: Tensor) -> Tensor:
        return output + value if vma.training and where(watched.index) else output

    handle = vma.get_submodule(module).register_forward_hook(poison)
    yield
    handle.remove()


# Which network is poisoned with what, and what the message names. Where a distribution refuses its parameters there are
# no terms yet, and the site's distribution is named.
OFFENCES = {
    "address_guide.embed_memory": (math.nan, r"logits of the guide's Categorical at site 'a'"),
    "latent_guide.network.1": (math.nan, r"loc of the guide's Normal at site 'z'"),
    "latent_prior.network": (math.nan, r"loc of the model's Normal at site 'z'"),
    "likelihood.network": (
        math.nan,
        r"(logits of the model's Bernoulli at site 'x'|log_likelihood, nan for 12 of 12 .*)",
    ),
}


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro says so too
@pytest.mark.parametrize("objective", ["vimco", "rws", "enumerate", "rao-blackwell"])
@pytest.mark.parametrize("module", OFFENCES)
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(module: str, objective: str) -> None:
    value, named = OFFENCES[module]
    vma, seen = small_vma(), {}

    class Remembers(Watched):
        def __getitem__(self, index: int) -> Episode:
            seen[index] = weights(vma)
            return super().__getitem__(index)

    watched = Remembers()
    with (
        poisoned(vma, module, watched, lambda index: index == 1, value),
        pytest.warns(RuntimeWarning, match=rf"not finite: step 2, {named}. The step is skipped"),
    ):
        result = pv.fit(vma, watched, objective, steps=3, **QUIET)  # type: ignore[arg-type]
    assert (result.steps, result.skipped) == (3, 1)
    assert result.first_skipped.startswith("step 2, ")
    assert equal(seen[1], seen[2])
    assert not equal(seen[2], weights(vma))
    assert all(math.isfinite(value) for row in result.history for value in row.values())
    assert repr(result).endswith("s, 1 skipped)")


def test_terms_that_are_not_finite_are_named_with_their_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the distribution itself is in order."""
    original = steps_module.Trainer._backward

    def gradient(self: Any, episode: Episode, kl_weight: float) -> Any:
        terms_of = self.objective.terms

        def terms(*args: Any) -> Any:
            terms = terms_of(*args)
            terms.particles.log_prior["z"].data[1, :5] = math.inf
            return type(terms)(terms.particles, terms.shares, terms.bound, terms.loss + math.inf)

        monkeypatch.setattr(self.objective, "terms", terms)
        return original(self, episode, kl_weight)

    monkeypatch.setattr(steps_module.Trainer, "_backward", gradient)
    with (
        pytest.warns(RuntimeWarning, match="step 1, log_prior of site 'z', inf for 5 of 12 datapoints"),
        pytest.raises(FloatingPointError, match="1 of 1 steps had a loss or gradient that is not finite"),
    ):
        pv.fit(small_vma(), sampler(), steps=1, **QUIET)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_is_named(value: float) -> None:
    """The last is finite, but the norm of the whole overflows."""
    vma = small_vma()
    count = 0

    def poison(gradient: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return torch.full_like(gradient, value) if count == 2 else gradient

    vma.latent_prior.get_parameter("network.2.bias").register_hook(poison)
    name = "the norm of the gradient, which" if value == 1e30 else "the gradient of latent_prior.network.2.bias"
    with pytest.warns(RuntimeWarning, match=f"step 2, {name}"):
        result = pv.fit(vma, sampler(), steps=4, **QUIET)
    assert result.skipped == 1
    assert all(bool(torch.isfinite(p).all()) for p in vma.parameters())


@pytest.mark.filterwarnings("ignore:not finite")
def test_ten_in_a_row_stop_the_run_with_the_best_weights(tmp_path: Path) -> None:
    vma, watched = small_vma(), Watched()
    match = r"loss: 10 of 15 steps .* 10 in a row; the first was step 6, loc of the guide's .* at site 'z'\. Lower lr"
    settings: dict[str, Any] = {"validation": sampler(seed=1), "validate_every": 2, "out": tmp_path, "steps": 20}
    with (
        poisoned(vma, "latent_guide.network.1", watched, lambda index: index >= 5, math.nan),
        pytest.raises(FloatingPointError, match=match),
    ):
        pv.fit(vma, watched, **settings, **QUIET)  # type: ignore[arg-type]
    assert equal(weights(vma), weights(pv.load(tmp_path / "best.safetensors")))
    assert not vma.training


@pytest.mark.filterwarnings("ignore:not finite")
def test_more_than_one_in_a_hundred_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module.Trainer, "_gradient", take_every_other)
    with pytest.raises(FloatingPointError, match=r"loss: 11 of 21 steps .* 1 in a row; the first was step 1, it"):
        pv.fit(small_vma(), sampler(), steps=50, **QUIET)


def take_every_other(self: Any, episode: Episode, *_: Any) -> dict[str, float]:
    self.count = getattr(self, "count", 0) + 1
    if self.count % 2:
        raise NotFiniteError("it")
    return {"bound": -1.0}


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_steps_skipped_do_not_spoil_a_running_baseline() -> None:
    """The average of the signals is a buffer, which one NaN would make NaN for good."""
    vma, watched = small_vma(), Watched()
    elbo = pv.infer.Reinforce_ELBO(2, "average", max_plate_nesting=1)
    with (
        pyro.validation_enabled(False),
        poisoned(vma, "likelihood.network", watched, lambda index: index == 2, math.nan),
        pytest.warns(RuntimeWarning, match="log_likelihood, nan for 12 of 12 datapoints"),
    ):
        result = pv.fit(vma, watched, elbo, steps=3, **QUIET)  # type: ignore[arg-type]
    assert result.skipped == 1
    assert elbo.module is not None
    assert all(bool(torch.isfinite(buffer).all()) for buffer in elbo.module.buffers())


@pytest.mark.filterwarnings("ignore:not finite")
def test_skipped_steps_are_resumed_exactly(tmp_path: Path) -> None:
    def run(folder: str, piece: float) -> pv.FitResult:
        vma, watched = small_vma(), Watched()
        with poisoned(vma, "latent_prior.network", watched, lambda index: index in (1, 2), math.nan):
            return pv.fit(
                vma,
                watched,  # type: ignore[arg-type]
                steps=5,
                validate_every=2,
                out=tmp_path / folder,
                resume=True,
                callbacks=[pv.train.StopAfter(piece)],
                **QUIET,
            )

    whole = run("whole", 1e6)
    for _ in range(5):
        parts = run("parts", 1e-5)
    assert (whole.skipped, parts.skipped) == (2, 2)
    assert same_state(tmp_path / "whole", tmp_path / "parts")


def test_a_users_error_is_not_taken_for_a_bad_number() -> None:
    class Wrong(Watched):
        def __getitem__(self, index: int) -> Episode:
            episode = super().__getitem__(index)
            return episode if index == 0 else Episode(episode.memory, episode.x[:, :, :5], episode.labels)

    with pytest.raises(ValueError, match="x: expected shape"):
        pv.fit(small_vma(), Wrong(), steps=2, **QUIET)  # type: ignore[arg-type]


# Extreme inputs


def trains_and_explains(vma: pv.VMA, episodes: Any, objective: str = "vimco") -> pv.FitResult:
    result = pv.fit(vma, episodes, objective, steps=3, **QUIET)  # type: ignore[arg-type]
    assert result.skipped == 0
    values = [value for row in result.history for value in row.values()]
    values += pv.validate(vma, episodes, num_episodes=1).values()
    episode = episodes[0]
    values += pv.diagnostics.log_evidence(vma, episode.memory, episode.x, num_samples=2).flatten().tolist()
    assert all(math.isfinite(value) for value in values)
    assert all(bool(torch.isfinite(p).all()) for p in vma.parameters())
    probabilities = vma.classify(episode.memory, episode.x)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(episode.x)))
    return result


@pytest.mark.parametrize("ink", [0, 255], ids=["blank", "all ink"])
@pytest.mark.parametrize("decoder", ["warp", "conv"])
def test_pictures_that_are_all_the_same(ink: int, decoder: Any) -> None:
    dataset = FewShotDataset(torch.full((12, 1, 8, 8), ink, dtype=torch.uint8), torch.arange(12) % 4)
    trains_and_explains(small_vma(decoder=decoder), EpisodeSampler(dataset, n_way=3, k_shot=1, n_query=1))


@pytest.mark.parametrize("objective", ["vimco", "rws", "iwae", "reinforce", "enumerate"])
def test_one_slot(objective: str) -> None:
    episodes = EpisodeSampler(blobs(), n_way=1, k_shot=1, n_query=3)
    with pytest.raises(ValueError, match=r"k: expected fewer than the 1 values of site 'a', got 3\. To sum all"):
        pv.fit(small_vma(), episodes, "rao-blackwell", steps=1, **QUIET)
    result = trains_and_explains(small_vma(), episodes, objective)
    if "kl_a" in result.history[-1]:
        assert result.history[-1]["kl_a"] == pytest.approx(0.0, abs=1e-6)


def test_one_class() -> None:
    dataset = blobs(classes=1)
    episodes = EpisodeSampler(dataset, n_way=1, k_shot=3, n_query=2)
    trains_and_explains(small_vma(), episodes)
    episode = episodes[0]
    assert small_vma().classify(episode.memory, episode.x).shape == (2, 1)


def test_one_particle() -> None:
    for elbo in (
        pv.infer.Reinforce_ELBO(1, "average", max_plate_nesting=1),
        pv.infer.Reinforce_ELBO(1, "none", max_plate_nesting=1),
    ):
        trains_and_explains(small_vma(), sampler(), elbo)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_particles: VIMCO_ELBO needs at least 2, got 1"):
        pv.fit(small_vma(), sampler(), pv.infer.VIMCO_ELBO(1), steps=1, **QUIET)


def test_identical_templates() -> None:
    """Nothing tells the slots apart, so the guide has nothing to say."""
    vma, template = small_vma(), blobs().images[:1].float() / 255
    memory = pv.Memory(template.expand(7, 1, 8, 8).clone(), labels=torch.arange(7))
    q_a = vma.address_guide(vma.encode(memory), vma.encode_x(template))
    torch.testing.assert_close(q_a.probs, torch.full((1, 7), 1 / 7))
    evidence = []
    for memory_ in (memory, pv.Memory(template)):
        torch.manual_seed(0)
        evidence.append(pv.diagnostics.log_evidence(vma, memory_, template, num_samples=700))
    torch.testing.assert_close(*evidence, atol=0.5, rtol=0.0)


def test_a_hundred_thousand_slots() -> None:
    vma = pv.VMA.for_vectors(2, latent_dim=1, num_features=2, hidden=(2,))
    memory = pv.Memory(torch.randn(100_000, 2))
    x = torch.randn(2, 2)
    elbo = pv.infer.VIMCO_ELBO(2, max_plate_nesting=1)
    loss = elbo.differentiable_loss(vma.model, vma.guide, vma.encode(memory), x)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(bool(torch.isfinite(p.grad).all()) for p in vma.parameters() if p.grad is not None)
    assert vma.generate(memory, 3).shape == (3, 2)
    q_a = vma.address_guide(vma.encode(memory), vma.encode_x(x))
    torch.testing.assert_close(q_a.probs.sum(-1), torch.ones(2), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("scale", [1e-20, 1e6, 1e18])
def test_vectors_of_extreme_size(scale: float) -> None:
    """A loss that overflows is skipped, not learned from; one that does not stays finite."""
    vma = pv.VMA.for_vectors(3, latent_dim=2, num_features=4, hidden=(4,))
    torch.manual_seed(0)
    dataset = FewShotDataset(torch.randn(12, 3) * scale, torch.arange(12) % 4)
    episodes = EpisodeSampler(dataset, n_way=3, k_shot=1, n_query=1)
    if scale < 1e18:
        assert pv.fit(vma, episodes, steps=3, **QUIET).skipped == 0
    else:
        with (
            pytest.warns(RuntimeWarning, match="not finite: step 1, "),
            pytest.raises(FloatingPointError, match=r"loss: 3 of 3 steps .* Lower lr, or look for extreme values"),
        ):
            pv.fit(vma, episodes, steps=3, **QUIET)
    assert all(bool(torch.isfinite(p).all()) for p in vma.parameters())


# Precisions


def value_and_gradient(dtype: torch.dtype, half: bool = False) -> tuple[Tensor, Tensor]:
    """Of the bound with all addresses summed and the latent drawn with the same noise, whatever the dtype."""
    vma = small_vma()
    generator = torch.Generator().manual_seed(1)
    for parameter in vma.parameters():  # off the kinks that fresh weights are on, where a gradient depends on rounding
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    vma = vma.to(dtype)
    episode = sampler()[0]
    memory, x = episode.memory.to(dtype), episode.x.to(dtype)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    noise = torch.randn(len(memory), len(x), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class SameNoise(pyro.poutine.messenger.Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            if msg["name"] == "z" and msg["value"] is None:
                normal = msg["fn"].base_dist
                msg["value"] = normal.loc + normal.scale * noise.to(normal.loc.dtype)
                msg["done"] = True

    guide = SameNoise()(config_enumerate(vma.guide, "parallel", expand=True))
    with pyro.get_param_store().scope(), autocast(x.device, "bfloat16" if half else "float32"):
        loss = elbo.differentiable_loss(vma.model, guide, memory, x) / len(x)
    gradient = torch.autograd.grad(loss, list(vma.parameters()))
    return loss.detach().double(), torch.cat([g.flatten() for g in gradient]).double()


def test_precisions_agree_on_value_and_gradient() -> None:
    """Of a bound near 45 nats: float32 to a millionth, bfloat16 networks (8 bits) to about one in a hundred."""
    exact, gradient = value_and_gradient(torch.float64)
    for half, of_value, of_gradient in ((False, 1e-6, 1e-5), (True, 1e-2, 0.1)):
        value, other = value_and_gradient(torch.float32, half)
        assert abs(float(value / exact) - 1) < of_value
        assert float((other - gradient).norm() / gradient.norm()) < of_gradient
    assert float((other - gradient).norm() / gradient.norm()) > 1e-4  # bfloat16 was in use
