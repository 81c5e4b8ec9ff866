"""Address quality against counts by hand, simulation, and SciPy."""

import math

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.diagnostics import calibration_error, hit_rate
from pyro_vmem.diagnostics.address_quality import rank_correlation

pytestmark = pytest.mark.usefixtures("float64")


def test_hits_by_hand():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    labels = torch.tensor([0, 1, 2, 0])
    assert hit_rate(probabilities, labels) == 0.25
    assert hit_rate(probabilities, labels, 2) == 0.5
    assert hit_rate(probabilities, labels, 3) == 1.0
    assert hit_rate(probabilities.log(), labels, 2) == 0.5
    assert hit_rate(probabilities.view(2, 2, 3), labels.view(2, 2)) == 0.25


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_ties_hit_as_chance_does_wherever_the_right_column_is(k):
    for label in range(5):
        rate = hit_rate(torch.full((1, 5), 0.2), torch.tensor([label]), k)
        assert rate == pytest.approx(min(k, 5) / 5)
    # one before, two tied for the next place
    assert hit_rate(torch.tensor([[0.5, 0.2, 0.2, 0.1]]), torch.tensor([2]), 2) == 0.5


def test_hits_of_a_model_are_those_of_its_classes():
    memory = pv.Memory(torch.randn(6, 4), labels=torch.tensor([7, 7, 3, 3, 5, 5]))
    vma, x, truth = pv.VMA.for_vectors(4), torch.randn(40, 4), torch.tensor([3, 5, 7, 7]).repeat(10)
    probabilities = vma.classify(memory, x)
    classes = memory.labels.unique()
    expected = (classes[probabilities.argmax(-1)] == truth).double().mean()
    assert hit_rate(probabilities, torch.searchsorted(classes, truth)) == expected


def simulated(targets, sharpen):
    """Confidences and labels: the labels are drawn from probabilities that are then sharpened."""
    logits = 2 * torch.randn(targets, 4)
    return (sharpen * logits).softmax(-1), torch.distributions.Categorical(logits=logits).sample()


def test_a_calibrated_guide_has_no_error_and_an_overconfident_one_has():
    honest, sure = (calibration_error(*simulated(20_000, s), 10) for s in (1.0, 3.0))
    assert honest.error < 2 * math.sqrt(10 / 20_000)
    assert sure.error > 0.1
    used = sure.count > 500
    assert (sure.confidence > sure.accuracy)[used].all()
    # each accuracy is within five of its standard errors of the confidence
    used = honest.count > 50
    gap = (honest.accuracy - honest.confidence)[used].abs()
    assert (gap < 5 * (0.25 / honest.count[used]).sqrt()).all()


def test_error_is_the_weighted_sum_of_gaps():
    probabilities, labels = simulated(103, 2.0)
    found = calibration_error(probabilities, labels, 7)
    confidence, hit = probabilities.amax(-1), (probabilities.argmax(-1) == labels).double()
    index = torch.bucketize(confidence, torch.linspace(0, 1, 8)) - 1
    groups = [(index == b).nonzero().squeeze(-1) for b in range(7)]
    gaps = [len(group) * abs(hit[group].mean() - confidence[group].mean()) for group in groups if len(group)]
    assert found.count.tolist() == [len(group) for group in groups]
    assert found.error == pytest.approx(float(sum(gaps)) / 103)
    assert (found.accuracy.isnan() == (found.count == 0)).all()


def test_of_a_sure_guide_the_last_bin_holds_all():
    found = calibration_error(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), 4)
    assert found.count.tolist() == [0, 0, 0, 2]
    assert found.error == 0.5


def test_rank_correlation_with_itself_and_with_its_opposite():
    q = torch.randn(3, 6)
    torch.testing.assert_close(rank_correlation(q, q.exp()), torch.ones(3))
    torch.testing.assert_close(rank_correlation(q, -q), -torch.ones(3))
    constant = rank_correlation(torch.stack([torch.zeros(6), q[0]]), torch.stack([q[0], q[0]]))
    assert constant.isnan().tolist() == [True, False]


def test_scipy_agrees_on_rank_correlation_with_ties():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    q, p = torch.randint(0, 6, (20, 12)).double(), torch.randint(0, 6, (20, 12)).double()
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(q.numpy(), p.numpy(), strict=True)]
    torch.testing.assert_close(rank_correlation(q, p), torch.tensor(expected))


@pytest.mark.parametrize("unused", [-math.inf, -1e4])
def test_slots_that_are_not_in_use_have_no_rank(unused):
    q, p = torch.randn(4, 6), torch.randn(4, 6)
    q[:, [0, 3]], p[:, [0, 3]] = unused, unused - 3.0
    keep = [1, 2, 4, 5]
    torch.testing.assert_close(rank_correlation(q, p), rank_correlation(q[:, keep], p[:, keep]))


def test_the_guide_s_divergence_is_what_the_bound_loses():
    """log p(x | M) - ELBO = KL(q || p) where only the address guide is off."""
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    vma = reference.vma(address_guide=pv.SimilarityGuide(3, temperature=1.0))
    memory, x = pv.Memory(torch.randn(5, 3)), torch.randn(8, 3)
    q = vma.address_guide(vma.encode(memory), vma.encode_x(x)).logits
    joint = reference.slot_log_evidence(memory, x) - math.log(5)
    elbo = (q.exp() * (joint - q)).sum(-1)
    gap = reference.log_evidence(memory, x) - elbo
    exact = reference.address_posterior(memory, x).logits
    torch.testing.assert_close(pv.diagnostics.information_gain(q, exact), gap)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: hit_rate(torch.rand(3, 2), torch.tensor([0, 1])),
            r"labels: expected a tensor of dtype Integer .*\(2,\), where probabilities has shape \(3, 2\)",
        ),
        (lambda: hit_rate(torch.rand(2, 2), torch.tensor([0, 2])), r"labels: expected integers in 0..1, .* got 0..2"),
        (
            lambda: hit_rate(torch.rand(2, 2), torch.tensor([0.0, 1.0])),
            r"labels: expected a tensor of dtype Integer .*torch\.float64.*Use labels\.long\(\)",
        ),
        (
            lambda: hit_rate(torch.rand(2, 2), torch.tensor([0, 1]), 0),
            r"k: expected a whole number in \[1, 10,000,000\], got 0",
        ),
        (lambda: calibration_error(torch.randn(2, 2), torch.tensor([0, 1])), "rows that add up to 1"),
        (
            lambda: calibration_error(torch.full((2, 2), 0.5), torch.tensor([0, 1]), 0),
            r"bins: expected a whole number in \[1, 10,000,000\], got 0",
        ),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("function", [hit_rate, calibration_error])
def test_nan_is_no_hit(function):
    probabilities = torch.tensor([[0.5, 0.5], [math.nan, math.nan]])
    with pytest.raises(ValueError, match=r"probabilities: expected .*got"):
        function(probabilities, torch.tensor([0, 1]))
