"""Weights, in one and several strata, against closed forms, sums by hand, simulated standard errors, and ArviZ."""

import math

import pytest
import torch

from pyro_vmem.diagnostics import pareto_k
from pyro_vmem.diagnostics.weights import StratifiedWeights
from pyro_vmem.infer import VIMCO_ELBO
from pyro_vmem.infer.elbo import log_mean_exp

pytestmark = pytest.mark.usefixtures("float64")


def weights_of_a_guide(scale, samples=4000, rows=20, dims=8):
    """log N(z; 0, I) - log N(z; 0, scale^2 I) at draws of the latter, which is too narrow where scale < 1."""
    z = scale * torch.randn(samples, rows, dims)
    return (-z.square() / 2 + (z / scale).square() / 2 + math.log(scale)).sum(-1)


def effective_sample_size(log_w):
    return StratifiedWeights.unstratified(log_w).ess


def standard_error(log_w):
    return StratifiedWeights.unstratified(log_w).standard_error


def test_effective_sample_size_is_kish_and_has_its_limits():
    log_w = torch.randn(50, 3)
    w = log_w.exp()
    torch.testing.assert_close(effective_sample_size(log_w), w.sum(0).square() / w.square().sum(0))
    torch.testing.assert_close(effective_sample_size(log_w - 900), effective_sample_size(log_w))
    assert effective_sample_size(torch.full((7, 1), -3.0)) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([[0.0], [-800.0], [-math.inf]])) == 1
    assert effective_sample_size(torch.tensor([[-5.0]])) == 1
    assert effective_sample_size(torch.full((3, 1), -math.inf)).isnan()


def test_effective_sample_size_is_that_of_the_objectives():
    import pyro_vmem as pv

    vma = pv.VMA.for_vectors(4)
    terms = VIMCO_ELBO(8).terms(vma.model, vma.guide, pv.Memory(torch.randn(5, 4)), torch.randn(6, 4))
    torch.testing.assert_close(effective_sample_size(terms.particles.log_weights.detach()), terms.ess)


def test_standard_error_is_that_of_the_mean_over_the_mean():
    log_w = torch.randn(30, 5) - 2
    w = log_w.exp()
    torch.testing.assert_close(standard_error(log_w), w.std(0) / w.mean(0) / math.sqrt(30))
    torch.testing.assert_close(standard_error(log_w - 900), standard_error(log_w))
    assert standard_error(torch.full((6, 1), -3.0)) == 0
    assert standard_error(torch.zeros(1, 2)).isnan().all()


def test_standard_error_is_the_spread_of_repeated_estimates():
    """Log-normal weights: the spread over repeats and the mean estimate of it agree within 5 %."""
    log_w = 0.7 * torch.randn(400, 4000)
    spread = log_mean_exp(log_w).std()
    assert standard_error(log_w).square().mean().sqrt() == pytest.approx(float(spread), rel=0.05)
    # closed form: Var w / (E w)^2 = exp(0.49) - 1
    assert float(spread) == pytest.approx(math.sqrt(math.expm1(0.49) / 400), rel=0.06)


def test_a_guide_that_is_too_narrow_is_found_out():
    wide, near, narrow = (pareto_k(weights_of_a_guide(scale)) for scale in (1.5, 0.9, 0.3))
    assert (wide < 0.3).all()  # bounded weights
    assert (near < 0.5).all()
    assert (narrow > 0.7).all()


def test_index_of_a_pareto_tail_is_recovered():
    """Weights that are Pareto from the start, of index k: the estimate's prior of 10 pseudo-samples aside."""
    for k in (0.3, 0.7, 1.2):
        log_w = -k * torch.rand(10_000, 10).log()
        tail = 300  # 3 sqrt K
        expected = (tail * k + 10 * 0.5) / (tail + 10)
        assert float(pareto_k(log_w).mean()) == pytest.approx(expected, abs=5 * (1 + k) / math.sqrt(tail * 10))


def test_index_is_of_each_datapoint_by_itself():
    log_w = torch.cat([weights_of_a_guide(0.3, rows=1), weights_of_a_guide(1.5, rows=1)], 1)
    khat = pareto_k(log_w)
    torch.testing.assert_close(khat, torch.stack([pareto_k(log_w[:, 0]), pareto_k(log_w[:, 1])]))
    assert khat[0] > 0.7 > 0.3 > khat[1]
    torch.testing.assert_close(pareto_k(log_w - 500), khat)
    assert pareto_k(log_w.reshape(4000, 2, 1)).shape == (2, 1)


def test_what_is_not_fitted():
    assert pareto_k(torch.full((100,), -123.0)) == -math.inf
    rounded = -100 + torch.zeros(1000, dtype=torch.float32).uniform_(-5e-5, 5e-5)
    assert pareto_k(rounded) == -math.inf
    assert pareto_k(torch.randn(20)).isnan()
    assert pareto_k(torch.randn(21)).isfinite()
    assert pareto_k(torch.cat([torch.zeros(3), torch.full((97,), -math.inf)])) == math.inf
    assert pareto_k(torch.cat([torch.randn(3), torch.full((97,), -9e3)])) == math.inf
    assert pareto_k(torch.full((100,), -math.inf)).isnan()
    assert pareto_k(torch.randn(100).index_fill(0, torch.tensor(3), math.nan)).isnan()


def test_arviz_agrees():
    pytest.importorskip("arviz", reason="ArviZ is not installed")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        psislw = getattr(arviz, "psislw", None)
    if psislw is None:
        pytest.skip("ArviZ 1.x has no psislw")
    for samples in (25, 100, 1000):
        for scale in (0.4, 0.8, 1.5):
            log_w = weights_of_a_guide(scale, samples, rows=5) - 80
            expected = torch.as_tensor(psislw(log_w.mT.numpy().copy())[1])
            torch.testing.assert_close(pareto_k(log_w), expected, rtol=1e-9, atol=1e-9)


def test_no_weights_are_refused():
    with pytest.raises(
        ValueError, match=r"log_weights: expected a tensor of dtype Float and shape \(K \.\.\.\), got .*\(\)"
    ):
        pareto_k(torch.tensor(0.0))
    with pytest.raises(ValueError, match="log_weights"):
        pareto_k(torch.zeros(0, 3))


# Strata


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
    torch.testing.assert_close(weights.log_means, torch.stack([part.mean(0) for part in w]).log())


def test_the_mean_of_a_stratum_far_below_the_others_is_not_lost():
    parts = [torch.randn(3, 4, dtype=torch.float32) - level for level in (0.0, 500.0, 90.0)]
    expected = torch.stack([part.double().logsumexp(0) - math.log(3) for part in parts])
    torch.testing.assert_close(shuffled(parts).log_means, expected.float())
    parts[1] = torch.full_like(parts[1], -torch.inf)
    assert bool(shuffled(parts).log_means[1].isneginf().all())


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
    torch.testing.assert_close(weights.standard_error[0], standard_error(parts[0][:, :1])[0])


def test_degrees_of_freedom_are_those_of_welch():
    one = StratifiedWeights.unstratified(torch.randn(40, 3))
    torch.testing.assert_close(one.degrees_of_freedom, torch.full((3,), 39.0))
    log_w = torch.randn(6, 2, 3)  # six samples in each of two strata
    v = log_w.exp().var(0)
    torch.testing.assert_close(
        StratifiedWeights.even(log_w).degrees_of_freedom, 5 * v.sum(0).square() / v.square().sum(0)
    )


def test_an_error_that_hangs_on_two_samples_is_unknown_unless_they_are_equal():
    many, two = torch.randn(100, 1) - 3, torch.tensor([[0.0], [0.1]])
    for pair, known in ((two, False), (torch.zeros(2, 1), True), (two - 9, True)):
        counts = torch.tensor([[100], [2]])
        stratum = torch.tensor([0] * 100 + [1] * 2).unsqueeze(-1)
        weights = StratifiedWeights(torch.cat([many, pair]), stratum, counts)
        assert bool(weights.estimate.standard_error.isfinite()) == known
