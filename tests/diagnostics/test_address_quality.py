"""Address quality against counts by hand, simulation, and SciPy."""

import math

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.diagnostics import agreement, calibration_error, hit_rate, top_k_hit_rate

pytestmark = pytest.mark.usefixtures("float64")


def test_hits_by_hand():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    labels = torch.tensor([0, 1, 2, 0])
    assert hit_rate(probabilities, labels) == 0.25
    assert top_k_hit_rate(probabilities, labels, 2) == 0.5
    assert top_k_hit_rate(probabilities, labels, 3) == 1.0
    assert top_k_hit_rate(probabilities.log(), labels, 2) == 0.5
    assert hit_rate(probabilities.view(2, 2, 3), labels.view(2, 2)) == 0.25


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_ties_hit_as_chance_does_wherever_the_right_column_is(k):
    for label in range(5):
        rate = top_k_hit_rate(torch.full((1, 5), 0.2), torch.tensor([label]), k)
        assert rate == pytest.approx(min(k, 5) / 5)
    # one before, two tied for the next place
    assert top_k_hit_rate(torch.tensor([[0.5, 0.2, 0.2, 0.1]]), torch.tensor([2]), 2) == 0.5


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


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_a_calibrated_guide_has_no_error_and_one_too_sure_has(binning):
    honest, sure = (calibration_error(*simulated(20_000, s), 10, binning) for s in (1.0, 3.0))
    assert honest.error < 2 * math.sqrt(10 / 20_000)
    assert sure.error > 0.1
    used = sure.count > 500
    assert (sure.confidence > sure.accuracy)[used].all()
    # each accuracy is within five of its standard errors of the confidence
    used = honest.count > 50
    gap = (honest.accuracy - honest.confidence)[used].abs()
    assert (gap < 5 * (0.25 / honest.count[used]).sqrt()).all()


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_error_is_the_weighted_sum_of_gaps(binning):
    probabilities, labels = simulated(103, 2.0)
    found = calibration_error(probabilities, labels, 7, binning)
    confidence, hit = probabilities.amax(-1), (probabilities.argmax(-1) == labels).double()
    if binning == "width":
        index = torch.bucketize(confidence, torch.linspace(0, 1, 8)) - 1
        groups = [(index == b).nonzero().squeeze(-1) for b in range(7)]
    else:
        groups = torch.tensor_split(confidence.argsort(), 7)
        assert found.count.max() - found.count.min() <= 1
        assert (found.confidence.diff() > 0).all()
    filled = [group for group in groups if len(group)]
    gaps = [len(group) * abs(hit[group].mean() - confidence[group].mean()) for group in filled]
    assert int(found.count.sum()) == 103
    if binning == "width":
        assert found.count.tolist() == [len(group) for group in groups]
        assert found.error == pytest.approx(float(sum(gaps)) / 103)
    else:  # groups of one target more or less
        assert found.error == pytest.approx(float(sum(gaps)) / 103, abs=0.03)
    assert (found.accuracy.isnan() == (found.count == 0)).all()


def test_of_a_sure_guide_the_last_bin_holds_all():
    found = calibration_error(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), 4)
    assert found.count.tolist() == [0, 0, 0, 2]
    assert found.error == 0.5


def test_agreement_by_hand():
    q, p = torch.randn(7, 5), torch.randn(7, 5)
    found = agreement(q, p)
    torch.testing.assert_close(found.kl_from_guide, (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1))
    torch.testing.assert_close(found.kl_from_exact, (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1))
    # total variation is the largest difference of any event: the slots where q is above p
    excess = (q.softmax(-1) - p.softmax(-1)).clamp(min=0).sum(-1)
    torch.testing.assert_close(found.total_variation, excess)
    assert found.same_first.tolist() == (q.argmax(-1) == p.argmax(-1)).tolist()
    assert found.summary()["same_first"] == pytest.approx(float(found.same_first.double().mean()))
    assert found.summary()["kl_from_exact"] == pytest.approx(float(found.kl_from_exact.mean()))


def test_agreement_with_itself_and_with_its_opposite():
    q = torch.randn(3, 6)
    same, opposite = agreement(q, q - 7), agreement(q, -q)
    for name in ("kl_from_exact", "kl_from_guide", "total_variation"):
        torch.testing.assert_close(getattr(same, name), torch.zeros(3))
        assert (getattr(opposite, name) > 0).all()
    torch.testing.assert_close(same.rank_correlation, torch.ones(3))
    torch.testing.assert_close(opposite.rank_correlation, -torch.ones(3))
    assert same.same_first.all()
    assert not opposite.same_first.any()
    constant = agreement(torch.stack([torch.zeros(6), q[0]]), torch.stack([q[0], q[0]]))
    assert constant.rank_correlation.isnan().tolist() == [True, False]
    assert constant.summary()["rank_correlation"] == pytest.approx(1)


def test_scipy_agrees_on_rank_correlation_with_ties():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    q, p = torch.randint(0, 6, (20, 12)).double(), torch.randint(0, 6, (20, 12)).double()
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(q.numpy(), p.numpy(), strict=True)]
    torch.testing.assert_close(agreement(q, p).rank_correlation, torch.tensor(expected))


@pytest.mark.parametrize("unused", [-math.inf, -1e4])
def test_slots_that_are_not_in_use_have_no_part(unused):
    q, p = torch.randn(4, 6), torch.randn(4, 6)
    q[:, [0, 3]], p[:, [0, 3]] = unused, unused - 3.0
    keep = [1, 2, 4, 5]
    found, expected = agreement(q, p), agreement(q[:, keep], p[:, keep])
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), values)


def test_the_guide_s_divergence_is_what_the_bound_loses():
    """log p(x | M) - ELBO = KL(q || p) where only the address guide is off."""
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    vma = reference.vma(address_guide=pv.SimilarityGuide(3, temperature=1.0))
    memory, x = pv.Memory(torch.randn(5, 3)), torch.randn(8, 3)
    q = vma.address_guide(vma.encode(memory), vma.encode_x(x)).logits
    joint = reference.slot_log_evidence(memory, x) - math.log(5)
    elbo = (q.exp() * (joint - q)).sum(-1)
    gap = reference.log_evidence(memory, x) - elbo
    torch.testing.assert_close(agreement(q, reference.address_posterior(memory, x).logits).kl_from_guide, gap)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: hit_rate(torch.rand(3, 2), torch.tensor([0, 1])), r"labels: expected one for each row .*\(3, 2\)"),
        (lambda: hit_rate(torch.rand(2, 2), torch.tensor([0, 2])), r"labels: expected integers in 0..1, .* got 0..2"),
        (lambda: hit_rate(torch.rand(2, 2), torch.tensor([0.0, 1.0])), "labels: expected integers"),
        (lambda: top_k_hit_rate(torch.rand(2, 2), torch.tensor([0, 1]), 0), "k: expected at least 1, got 0"),
        (lambda: calibration_error(torch.randn(2, 2), torch.tensor([0, 1])), "rows that add up to 1"),
        (lambda: calibration_error(torch.full((2, 2), 0.5), torch.tensor([0, 1]), 0), "bins: expected at least 1"),
        (
            lambda: calibration_error(torch.full((2, 2), 0.5), torch.tensor([0, 1]), 5, "equal"),
            "binning: expected 'width' or 'mass', got 'equal'",
        ),
        (lambda: agreement(torch.zeros(2, 3), torch.zeros(3)), r"exact_logits: expected the shape .* got \(3,\)"),
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
