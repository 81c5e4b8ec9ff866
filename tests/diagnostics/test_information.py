"""Information measures against sums by hand and limits."""

import math

import pytest
import torch

from pyro_vmem.diagnostics import address_entropy, information_gain

pytestmark = pytest.mark.usefixtures("float64")


def test_gain_is_the_sum_by_hand_and_nonnegative():
    q, p = torch.randn(50, 7), torch.randn(7)
    gain = information_gain(q, p)
    by_hand = sum(q.softmax(-1)[:, s] * (q.softmax(-1)[:, s] / p.softmax(-1)[s]).log() for s in range(7))
    torch.testing.assert_close(gain, by_hand)
    assert (gain > 0).all()
    torch.testing.assert_close(
        gain,
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=q), torch.distributions.Categorical(logits=p).expand([50])
        ),
    )


def test_limits():
    uniform = torch.zeros(9)
    assert information_gain(uniform, uniform).item() == pytest.approx(0.0, abs=1e-12)
    certain = torch.full((9,), -math.inf).index_fill(0, torch.tensor(3), 0.0)
    assert information_gain(certain, uniform).item() == pytest.approx(math.log(9))
    assert information_gain(uniform, certain).item() == math.inf
    assert address_entropy(certain).item() == 0.0
    assert address_entropy(uniform).item() == pytest.approx(math.log(9))


def test_under_a_uniform_prior_gain_and_entropy_add_up_to_log_slots():
    q = 3 * torch.randn(20, 6)
    torch.testing.assert_close(information_gain(q, torch.zeros(6)) + address_entropy(q), torch.full((20,), math.log(6)))


def test_unused_slots_count_nothing():
    q, p = torch.randn(4, 5), torch.randn(5)
    q[:, 2], p[2] = -math.inf, -math.inf
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(information_gain(q, p), information_gain(q[:, keep], p[keep]))


def test_gradient_is_finite_where_the_guide_is_certain():
    q = torch.tensor([0.0, -2000.0, -2000.0], requires_grad=True)
    information_gain(q, torch.zeros(3)).backward()
    assert q.grad.isfinite().all()


def test_different_numbers_of_slots_are_refused():
    with pytest.raises(ValueError, match=r"p_logits: expected 3 slots .* got \(4,\)"):
        information_gain(torch.zeros(2, 3), torch.zeros(4))
