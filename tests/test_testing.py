"""The assertion that tests lean on can itself fail, both ways."""

import pytest
import torch

from pyro_vmem.testing import assert_unbiased


def test_passes_an_unbiased_and_catches_a_biased_one():
    samples = torch.randn(400, 3)
    assert_unbiased(samples, torch.zeros(3))
    with pytest.raises(AssertionError, match=r"element \(1,\): mean .* standard errors from the exact value 0"):
        assert_unbiased(samples + torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3))


def test_noise_is_no_excuse():
    samples = 100 * torch.randn(20, 3) + 1
    assert_unbiased(samples, torch.ones(3))
    with pytest.raises(AssertionError, match="too noisy to tell"):
        assert_unbiased(samples, torch.ones(3), resolution=0.1)


def test_an_estimate_without_noise_is_compared_as_numbers_are():
    exact = torch.tensor([1.0, 2.0])
    assert_unbiased(exact.expand(10, 2), exact)
    with pytest.raises(AssertionError, match="element"):
        assert_unbiased(exact.expand(10, 2), exact + torch.tensor([0.0, 1e-3]))


def test_nan_fails():
    samples = torch.randn(20, 2)
    samples[3, 1] = torch.nan
    with pytest.raises(AssertionError):
        assert_unbiased(samples, torch.zeros(2))


@pytest.mark.parametrize("shape", [(20, 3), (9, 2), (20,)])
def test_shapes_are_checked(shape):
    with pytest.raises(ValueError, match="samples: expected shape"):
        assert_unbiased(torch.randn(shape), torch.zeros(2))
