"""Stratified weights against sums by hand and simulated spreads."""

import math

import pytest
import torch

from pyro_vmem.diagnostics import effective_sample_size, pareto_k, standard_error
from pyro_vmem.diagnostics.strata import StratifiedWeights
from pyro_vmem.infer.elbo import log_mean_exp

pytestmark = pytest.mark.usefixtures("float64")


def shuffled(parts):
    """Strata `(n_g, B)` of different sizes as one set of samples in random order."""
    order = torch.randperm(sum(len(part) for part in parts))
    batch = parts[0].shape[1]
    stratum = torch.cat([torch.full_like(part, g, dtype=torch.long) for g, part in enumerate(parts)])
    counts = torch.tensor([[len(part)] * batch for part in parts])
    return StratifiedWeights(torch.cat(parts)[order], stratum[order], counts)


def test_one_stratum_is_the_mean_of_its_weights():
    log_w = torch.randn(200, 5) - 40
    weights = StratifiedWeights.unstratified(log_w)
    torch.testing.assert_close(weights.log_sum, log_mean_exp(log_w))
    torch.testing.assert_close(weights.standard_error, standard_error(log_w))
    torch.testing.assert_close(weights.ess, effective_sample_size(log_w))
    torch.testing.assert_close(weights.khat, pareto_k(log_w))


def test_strata_by_hand():
    parts = [torch.randn(n, 4) + g for g, n in enumerate((5, 9, 2))]
    weights = shuffled(parts)
    w = [part.exp() for part in parts]
    total = sum(part.mean(0) for part in w)
    variance = sum(part.var(0) / len(part) for part in w)
    torch.testing.assert_close(weights.log_sum, total.log())
    torch.testing.assert_close(weights.standard_error, variance.sqrt() / total)
    share = torch.cat([part / len(part) for part in w]) / total
    torch.testing.assert_close(weights.ess, 1 / share.square().sum(0))


def test_even_strata_are_those_by_hand():
    log_w = torch.randn(7, 3, 4)
    weights, by_hand = StratifiedWeights.even(log_w), shuffled(list(log_w.unbind(1)))
    for name in ("log_sum", "standard_error", "ess"):
        torch.testing.assert_close(getattr(weights, name), getattr(by_hand, name))
    torch.testing.assert_close(weights.log_sum, log_mean_exp(log_w).logsumexp(0))


def test_spread_between_strata_is_no_error_and_no_tail():
    """Slots of very different evidence, each without spread: the sum is exact."""
    weights = StratifiedWeights.even(torch.tensor([0.0, -1.0, -9.0, -200.0]).reshape(1, 4, 1).expand(30, 4, 2))
    torch.testing.assert_close(weights.standard_error, torch.zeros(2))
    assert (weights.khat == -math.inf).all()
    assert (weights.ess < 120).all()


def test_tail_is_that_of_the_strata_that_hold_the_estimate():
    heavy, light = -3.0 * torch.rand(400, 1).log(), 0.1 * torch.randn(400, 1)
    far = 100.0
    assert shuffled([light, heavy - far]).khat < 0.5
    assert shuffled([light - far, heavy]).khat > 0.7
    level = float(log_mean_exp(heavy))
    assert shuffled([light + level + math.log(10), heavy]).khat > 0.7  # a tenth of the estimate is part of its tail
    assert shuffled([light + level + math.log(1000), heavy]).khat < 0.5  # a thousandth is not
    assert shuffled([light[:20], heavy - far]).khat.isnan()  # 20 samples are too few to tell


def test_a_stratum_of_one_sample_is_taken_to_spread_as_the_others_do():
    many, one = torch.randn(30, 2), torch.randn(1, 2)
    weights = shuffled([many, one])
    relative = many.exp().var(0) / many.exp().mean(0).square()
    variance = many.exp().var(0) / 30 + relative * one[0].exp().square()
    by_hand = variance.sqrt() / (many.exp().mean(0) + one[0].exp())
    torch.testing.assert_close(weights.standard_error, by_hand)
    assert shuffled([one, one]).standard_error.isnan().all()  # nothing tells of any spread


def test_weights_of_zero_and_beyond():
    parts = [torch.randn(40, 3), torch.full((30, 3), -math.inf)]
    parts[0][:, 1] = -math.inf  # nothing at all
    parts[0][3, 2] = math.nan
    weights = shuffled(parts)
    assert weights.log_sum.isfinite().tolist() == weights.khat.isfinite().tolist() == [True, False, False]
    assert weights.log_sum[1] == -math.inf
    assert weights.khat[1:].isnan().all()
    torch.testing.assert_close(weights.standard_error[0], standard_error(parts[0][:, 0]))
