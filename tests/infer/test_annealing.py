"""scale_sites: the named log-probabilities are scaled, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_vmem import VMA, Memory
from pyro_vmem.infer import VIMCO_ELBO
from pyro_vmem.infer.annealing import scale_sites


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(torch.zeros(()), 2.0))
        z = pyro.sample("z", dist.Normal(y, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(loc, 1.0))
        pyro.sample("z", dist.Normal(0.5 * x, 0.7))


def log_probs(fn: Any, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    pyro.set_rng_seed(seed)
    trace = poutine.trace(fn).get_trace(x)
    trace.compute_log_prob()
    return {name: trace.nodes[name]["log_prob"] for name in ("y", "z", "x")}


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0, 3.0])
def test_named_sites_are_scaled_and_no_others(beta: float) -> None:
    x = torch.randn(5)
    plain, scaled = log_probs(model, x), log_probs(scale_sites({"z": beta})(model), x)
    torch.testing.assert_close(scaled["z"], beta * plain["z"])
    for name in ("y", "x"):
        assert torch.equal(scaled[name], plain[name])


def test_it_is_a_handler_as_pyros_are() -> None:
    x = torch.randn(5)
    plain = log_probs(model, x)

    @scale_sites({"z": 0.5, "x": 2.0})
    def decorated(x: Tensor) -> None:
        model(x)

    for fn in (decorated, scale_sites({"z": 0.5})(scale_sites({"x": 2.0})(model))):
        scaled = log_probs(fn, x)
        torch.testing.assert_close(scaled["z"], 0.5 * plain["z"])
        torch.testing.assert_close(scaled["x"], 2.0 * plain["x"])
    twice = log_probs(scale_sites({"z": 0.5})(scale_sites({"z": 0.5})(model)), x)
    torch.testing.assert_close(twice["z"], 0.25 * plain["z"])
    with scale_sites({"z": 0.5}):
        inside = log_probs(model, x)
    torch.testing.assert_close(inside["z"], 0.5 * plain["z"])
    assert torch.equal(log_probs(model, x)["z"], plain["z"])  # nothing is left behind
    with poutine.scale(scale=4.0):
        both = log_probs(scale_sites({"z": 0.5})(model), x)
    torch.testing.assert_close(both["z"], 2.0 * plain["z"])
    torch.testing.assert_close(both["x"], 4.0 * plain["x"])


def test_an_absent_site_changes_nothing() -> None:
    x = torch.randn(5)
    plain, scaled = log_probs(model, x), log_probs(scale_sites({"no such site": 0.5})(model), x)
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_around_model_and_guide_it_is_the_weight_of_the_kl(beta: float, float64: None) -> None:
    """The bound is E[log p(x | z)] - KL(y) - beta E[KL(z)], each in closed form."""
    x = torch.randn(4)
    elbo = TraceMeanField_ELBO(num_particles=200_000, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo.loss(scale_sites({"z": beta})(model), scale_sites({"z": beta})(guide), x)
    loc, z_loc, z_scale = 0.3, 0.5 * x, 0.7
    kl_y = math.log(2.0) + (1 + loc**2) / (2 * 4) - 0.5
    # over y ~ N(loc, 1): E[(z_loc - y)^2] = (z_loc - loc)^2 + 1
    kl_z = -math.log(z_scale) + (z_scale**2 + (z_loc - loc) ** 2 + 1) / 2 - 0.5
    squared = (x - z_loc) ** 2 + z_scale**2
    reconstruction = -squared / (2 * 0.25) - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    exact = -(reconstruction - kl_y - beta * kl_z).sum().item()
    # A particle's loss has a standard deviation below 10 nats: five standard errors are 5 * 10 / sqrt(200,000).
    assert loss == pytest.approx(exact, abs=0.12)


@pytest.mark.parametrize(
    "elbo",
    [Trace_ELBO(max_plate_nesting=1), VIMCO_ELBO(num_particles=2, max_plate_nesting=1)],
    ids=["Trace_ELBO", "VIMCO_ELBO"],
)
def test_the_warm_up_of_a_vma(elbo: Any) -> None:
    """At beta = 1 nothing is changed; with one particle the loss is linear in beta."""
    vma = VMA.for_vectors(4, latent_dim=2, num_features=6, hidden=(8,))
    memory, x = Memory(torch.randn(5, 4)), torch.randn(3, 4)
    losses = []
    for beta in (0.0, 0.5, 1.0):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(scale_sites({"z": beta})(vma.model), scale_sites({"z": beta})(vma.guide), memory, x))
    assert losses[0] != pytest.approx(losses[2])
    if isinstance(elbo, Trace_ELBO):
        assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)
    pyro.set_rng_seed(0)
    assert losses[2] == pytest.approx(elbo.loss(vma.model, vma.guide, memory, x), rel=1e-6)


@pytest.mark.parametrize("scale", [-0.1, float("nan")])
def test_a_factor_below_zero_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"scales: expected factors of at least 0, got .* for site 'z'"):
        scale_sites({"a": 1.0, "z": scale})
