"""A uniform categorical without numbers per value is the dense one with equal logits."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_vmem as pv
from pyro_vmem.distributions import MixedCategorical, TruncatedCategorical, UniformCategorical
from pyro_vmem.parts import UniformPrior

S, DRAWS = 12, 60_000
MASKS = {"all": None, "most": torch.arange(S) % 4 != 1, "one in twelve": torch.arange(S) == 7}


def pair(which: str) -> tuple[UniformCategorical, dist.Categorical]:
    """The prior of a packed memory and that of a plain one."""
    templates = (torch.rand(S, 6) > 0.5).float()
    packed = pv.PackedMemory.pack(templates)
    packed.mask = MASKS[which]
    q = UniformPrior()(packed)
    assert isinstance(q, UniformCategorical)
    return q, UniformPrior()(pv.Memory(templates, mask=MASKS[which]))


@pytest.mark.parametrize("which", MASKS)
def test_it_is_the_dense_prior(which: str) -> None:
    q, dense = pair(which)
    values = torch.arange(S)
    torch.testing.assert_close(q.log_prob(values), dense.log_prob(values))
    torch.testing.assert_close(q.logits, dense.logits)
    torch.testing.assert_close(q.probs, dense.probs)
    torch.testing.assert_close(q.entropy(), dense.entropy())
    torch.testing.assert_close(kl_divergence(q, q), torch.tensor(0.0))
    everywhere, _ = pair("all")
    torch.testing.assert_close(kl_divergence(q, everywhere), kl_divergence(dense, everywhere))
    rows, dense_rows = q.expand((4,)), dense.expand((4,))
    assert torch.equal(rows.enumerate_support(), dense_rows.enumerate_support())
    value = torch.randint(S, (3, 4))
    torch.testing.assert_close(rows.log_prob(value), dense_rows.log_prob(value))
    with pytest.raises(ValueError, match="within the support"):
        q.log_prob(torch.tensor(S))


@pytest.mark.parametrize("which", MASKS)
def test_draws_are_equally_frequent(which: str) -> None:
    q, dense = pair(which)
    drawn = q.expand((3,)).sample((DRAWS // 3,))
    assert drawn.shape == (DRAWS // 3, 3)
    shares, p = torch.bincount(drawn.flatten(), minlength=S) / DRAWS, dense.probs
    assert bool(((shares - p).abs() <= 5 * (p * (1 - p) / DRAWS).sqrt()).all())


def test_mixtures_with_it_are_those_with_the_dense_one() -> None:
    q, dense = pair("most")
    kept = TruncatedCategorical(torch.randn(5, 3), torch.stack([torch.randperm(S)[:3] for _ in range(5)]), S)
    mixed, expected = MixedCategorical(kept, q, 0.4), MixedCategorical(kept, dense, 0.4)
    torch.testing.assert_close(mixed.probs, expected.probs)
    torch.testing.assert_close(mixed.entropy(), expected.entropy())
    torch.testing.assert_close(kl_divergence(mixed, q), kl_divergence(expected, dense))
    drawn = mixed.sample((DRAWS,))
    shares, p = torch.stack([torch.bincount(row, minlength=S) for row in drawn.mT]) / DRAWS, expected.probs
    assert bool(((shares - p).abs() <= 5 * (p * (1 - p) / DRAWS).sqrt() + 1e-9).all())
