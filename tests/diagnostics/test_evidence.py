"""Evidence estimates against the reference model, where the truth is known."""

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.diagnostics import log_evidence, slot_log_evidence
from pyro_vmem.testing import assert_unbiased

pytestmark = pytest.mark.usefixtures("float64")


def case(exact, slots=6, targets=5, per_datapoint=False):
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    guides = {}
    if not exact:
        guides = {
            "address_guide": pv.SimilarityGuide(3, normalise="memory", temperature=1.0, tied=False),
            "latent_guide": pv.GaussianGuide(2, num_features=3),
        }
    templates = torch.randn(targets, slots, 3) if per_datapoint else torch.randn(slots, 3)
    memory = pv.Memory(templates, per_datapoint=per_datapoint)
    return reference, reference.vma(exact=exact, **guides), memory, torch.randn(targets, 3)


@pytest.mark.parametrize("method", ["exact-address", "sampled"])
@pytest.mark.parametrize("max_decodes", [1, 7, 4096])
@pytest.mark.parametrize("per_datapoint", [False, True])
def test_with_the_exact_guide_one_sample_is_enough(method, max_decodes, per_datapoint):
    reference, vma, memory, x = case(True, per_datapoint=per_datapoint)
    estimate = log_evidence(vma, memory, x, 12, method, max_decodes=max_decodes)
    torch.testing.assert_close(estimate, reference.log_evidence(memory, x).detach())
    slots = slot_log_evidence(vma, memory, x, 2, max_decodes=max_decodes)
    torch.testing.assert_close(slots, reference.slot_log_evidence(memory, x).detach())


@pytest.mark.parametrize("method", ["exact-address", "sampled"])
def test_with_any_guide_the_estimate_of_the_density_is_unbiased(method):
    """exp of the estimate is unbiased: over many targets that are the same, its mean is p(x | M)."""
    reference, vma, memory, x = case(False)
    copies = 4000
    for target in x[:2]:
        estimates = log_evidence(vma, memory, target.expand(copies, -1), 24, method, max_decodes=50_000).exp()
        exact = reference.log_evidence(memory, target[None]).detach().exp()
        assert_unbiased(estimates.unsqueeze(-1), exact, resolution=0.1)


def test_summing_addresses_is_tighter_at_equal_decodes():
    reference, rough, memory, x = case(False)
    vma = reference.vma(address_guide=rough.address_guide)  # only the address guide is off
    repeated = x.repeat(400, 1)
    exact = reference.log_evidence(memory, repeated).detach()
    gaps = {m: exact - log_evidence(vma, memory, repeated, 24, m) for m in ("exact-address", "sampled")}
    difference = (gaps["sampled"] - gaps["exact-address"]).reshape(400, -1).mean(1)
    assert difference.mean() > 5 * difference.std() / 400**0.5
    torch.testing.assert_close(gaps["exact-address"], torch.zeros(len(repeated)), rtol=0, atol=1e-9)


def test_more_samples_come_closer():
    reference, vma, memory, x = case(False)
    exact = reference.log_evidence(memory, x).detach()
    gap = {n: (exact - log_evidence(vma, memory, x, n)).abs().mean() for n in (6, 6000)}
    assert gap[6000] < 0.2 * gap[6]


def test_masked_slots_have_no_part():
    reference, vma, memory, x = case(True)
    masked = pv.Memory(memory.templates, mask=torch.tensor([True] * 4 + [False] * 2))
    expected = reference.log_evidence(pv.Memory(memory.templates[:4]), x).detach()
    for method in ("exact-address", "sampled"):
        torch.testing.assert_close(log_evidence(vma, masked, x, 12, method), expected)


def test_parameters_stay_bit_equal_and_no_graph_is_kept():
    _, vma, memory, x = case(False)
    before = {name: p.clone() for name, p in vma.named_parameters()}
    assert not log_evidence(vma, memory, x, 12).requires_grad
    assert all(torch.equal(before[name], p) for name, p in vma.named_parameters())


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"method": "exact"}, "method: expected 'exact-address', 'sampled' or 'top-k', got 'exact'"),
        ({"num_samples": 0, "method": "sampled"}, "num_samples: expected at least 1, got 0"),
        ({"max_decodes": 0}, "max_decodes: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(kwargs, match):
    _, vma, memory, x = case(True)
    with pytest.raises(ValueError, match=match):
        log_evidence(vma, memory, x, **kwargs)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3\)"):
        log_evidence(vma, memory, x[0])
