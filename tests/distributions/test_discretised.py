"""Quantised values: probabilities sum to one, draws follow them, extremes are finite."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vmem.distributions import CategoricalLevels, DiscretisedLogistic
from pyro_vmem.testing import assert_unbiased

LOCS = torch.tensor([-1e6, -3.0, -0.01, 0.0, 0.3, 0.5, 1.0, 1.2, 1e6], dtype=torch.float64)


def levels(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.get_default_dtype()) / (n - 1)


@pytest.mark.parametrize("n", [2, 3, 16, 256])
@pytest.mark.parametrize("scale", [1e-4, 0.02, 0.5, 40.0])
def test_probabilities_of_the_levels_sum_to_one(n: int, scale: float, float64: None) -> None:
    p = DiscretisedLogistic(LOCS, torch.tensor(scale), n)
    log_probs = p.log_prob(levels(n).unsqueeze(-1))
    assert log_probs.shape == (n, len(LOCS))
    assert torch.isfinite(log_probs).all()
    torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(len(LOCS)))


def test_they_are_the_mass_of_each_interval(float64: None) -> None:
    loc, scale, n = torch.tensor(0.4), torch.tensor(0.15), 6
    logistic = torch.distributions.TransformedDistribution(
        dist.Uniform(0.0, 1.0),
        [torch.distributions.SigmoidTransform().inv, torch.distributions.AffineTransform(loc, scale)],
    )
    p = DiscretisedLogistic(loc, scale, n)
    for k in range(n):
        low = -30.0 if k == 0 else (k - 0.5) / (n - 1)
        high = 30.0 if k == n - 1 else (k + 0.5) / (n - 1)
        points = torch.linspace(low, high, 200_001)
        mass = torch.trapezoid(logistic.log_prob(points).exp(), points)
        assert p.log_prob(torch.tensor(k / (n - 1))).exp() == pytest.approx(float(mass), rel=1e-5)


def test_gradients_are_finite_however_improbable_a_level() -> None:
    loc = torch.tensor([-1e6, -50.0, 0.5, 1e6]).requires_grad_()
    log_scale = torch.tensor(-8.0).requires_grad_()
    log_probs = DiscretisedLogistic(loc, log_scale.exp()).log_prob(levels(256).unsqueeze(-1))
    assert torch.isfinite(log_probs).all()
    for gradient in torch.autograd.grad(log_probs.sum(), [loc, log_scale]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("n", [2, 5])
def test_draws_follow_the_probabilities(n: int, float64: None) -> None:
    logistic = DiscretisedLogistic(torch.tensor([-0.2, 0.4, 0.9]), torch.tensor(0.2), n)
    categorical = CategoricalLevels(torch.randn(3, n))
    for p in (logistic, categorical):
        drawn = p.sample(torch.Size([20_000]))
        assert set(drawn.unique().tolist()) <= set(levels(n).tolist())
        probs = p.log_prob(levels(n).unsqueeze(-1)).exp()
        for k, level in enumerate(levels(n)):
            assert_unbiased((drawn == level).double(), probs[k])
        torch.testing.assert_close(p.mean, (probs * levels(n).unsqueeze(-1)).sum(0))


def test_categorical_probabilities_are_the_softmax(float64: None) -> None:
    logits = torch.randn(2, 3, 4)
    p = CategoricalLevels(logits)
    for k in range(4):
        torch.testing.assert_close(p.log_prob(torch.full((2, 3), k / 3)), logits.log_softmax(-1)[..., k])
    assert p.log_prob(levels(4).reshape(4, 1, 1)).shape == (4, 2, 3)


@pytest.mark.parametrize(
    "p", [DiscretisedLogistic(torch.tensor([0.2, 0.6]), torch.tensor(0.1), 4), CategoricalLevels(torch.randn(2, 4))]
)
def test_expanding(p: DiscretisedLogistic | CategoricalLevels) -> None:
    q = p.expand(torch.Size([5, 2]))
    assert (q.batch_shape, q.event_shape, q.sample().shape) == ((5, 2), (), (5, 2))
    value = q.sample()
    torch.testing.assert_close(q.log_prob(value), p.log_prob(value))
    assert p.to_event(1).expand(torch.Size([3])).log_prob(torch.zeros(3, 2)).shape == (3,)
