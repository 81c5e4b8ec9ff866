"""Bounds from both sides, against the reference model, where the truth is known."""

import pyro.distributions as dist
import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.diagnostics import evidence_bounds
from pyro_vmem.testing import assert_unbiased

pytestmark = pytest.mark.usefixtures("float64")


class Wide(pv.LatentGuide):
    """The exact posterior of the latent, too wide and moved."""

    def __init__(self, reference):
        super().__init__()
        self.reference, self.latent_dim = reference, reference.latent_dim

    def forward(self, x, template):
        exact = self.reference.latent_posterior(x.raw, template.raw)
        return dist.Normal(exact.mean + 0.5 * exact.stddev, 1.5 * exact.stddev).to_event(1)


def setting(exact=False, mask=None):
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    vma = reference.vma(latent_guide=None if exact else Wide(reference))
    return reference, vma, pv.Memory(1.5 * torch.randn(6, 3), mask=mask)


@pytest.mark.parametrize("max_decodes", [7, 100_000])
def test_with_the_exact_guide_both_bounds_are_the_evidence(max_decodes):
    mask = torch.tensor([True, True, False, True, True, True])
    reference, vma, memory = setting(exact=True, mask=mask)
    found = evidence_bounds(vma, memory, 20, 3, seed=0, max_decodes=max_decodes)
    truth = reference.log_evidence(memory, found.x).detach()
    torch.testing.assert_close(found.lower, truth)
    torch.testing.assert_close(found.upper, truth)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_truth_lies_between(num_samples):
    reference, vma, memory = setting()
    found = evidence_bounds(vma, memory, 4000, num_samples, seed=0, max_decodes=100_000)
    truth = reference.log_evidence(memory, found.x).detach()
    for gap in (truth - found.lower, found.upper - truth):
        error = float(gap.std()) / len(gap) ** 0.5
        assert float(gap.mean()) > 5 * error  # on the right side, by more than chance


def test_the_true_draw_is_one_of_the_posterior():
    """The mean of p(x | M) over the estimate with the true z is one, as its draws have the inverse as their density."""
    reference, vma, memory = setting()
    found = evidence_bounds(vma, memory, 20_000, 2, seed=0, max_decodes=100_000)
    truth = reference.log_evidence(memory, found.x).detach()
    assert_unbiased((truth - found.upper).exp().view(100, -1).mean(1), torch.ones(()), resolution=0.05)


def test_more_samples_bring_them_together():
    _, vma, memory = setting()
    few, many = (evidence_bounds(vma, memory, 500, n, seed=0, max_decodes=100_000) for n in (1, 30))
    assert (many.upper - many.lower).mean() < 0.3 * (few.upper - few.lower).mean()


def test_a_memory_of_each_target_is_refused():
    _, vma, _ = setting()
    with pytest.raises(ValueError, match="memory: expected one that all targets share"):
        evidence_bounds(vma, pv.Memory(torch.randn(4, 6, 3), per_datapoint=True))
