"""Information measures against sums by hand and limits."""

import math

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.diagnostics.information import information_gain, information_summary

pytestmark = pytest.mark.usefixtures("float64")


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


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


def test_under_a_uniform_prior_gain_and_entropy_add_up_to_log_slots():
    q = 3 * torch.randn(20, 6)
    torch.testing.assert_close(information_gain(q, torch.zeros(6)) + entropy(q), torch.full((20,), math.log(6)))


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
    with pytest.raises(
        ValueError,
        match=r"p_logits: expected a tensor of dtype Float .*\(4,\), where q_logits has shape \(2, 3\)",
    ):
        information_gain(torch.zeros(2, 3), torch.zeros(4))


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])
def test_the_gain_is_mutual_information_and_the_marginal_divergence(sharpness):
    q, p = sharpness * torch.randn(40, 9) + torch.randn(9), torch.randn(9)
    found = information_summary(q, p)
    assert found.information_gain == pytest.approx(float(information_gain(q, p).mean()))
    assert found.information_gain == pytest.approx(found.mutual_information + found.marginal_kl, abs=1e-12)
    assert min(found.mutual_information, found.marginal_kl) > -1e-12


def test_information_by_hand_from_the_table_of_joint_probabilities():
    q, p = torch.randn(6, 4), torch.randn(4)
    joint = q.softmax(-1) / 6  # p(x, a) of six equally likely targets
    marginal = joint.sum(0)
    found = information_summary(q, p)
    by_hand = (joint * (joint / (marginal * joint.sum(1, keepdim=True))).log()).sum()
    assert found.mutual_information == pytest.approx(float(by_hand))
    assert found.marginal_kl == pytest.approx(float((marginal * (marginal / p.softmax(-1)).log()).sum()))
    assert found.perplexity == pytest.approx(float(entropy(q).exp().mean()))


def test_one_slot_for_all_targets_is_gain_without_information():
    found = information_summary(torch.tensor([0.0, 50.0, 0.0, 0.0]).expand(5, -1), torch.zeros(4))
    assert found.information_gain == pytest.approx(math.log(4))
    assert found.mutual_information == pytest.approx(0, abs=1e-12)
    assert found.perplexity == pytest.approx(1)
    assert found.slots_never_first == 3


def test_a_slot_for_each_target_is_all_information():
    found = information_summary(50 * torch.eye(4), torch.zeros(4))
    assert found.mutual_information == pytest.approx(math.log(4))
    assert found.marginal_kl == pytest.approx(0, abs=1e-12)
    assert found.perplexity == pytest.approx(1)
    assert found.slots_never_first == 0


@pytest.mark.parametrize("unused", [-math.inf, -1e4])
def test_slots_that_are_not_in_memory_are_not_counted(unused):
    q, p = torch.randn(8, 6), torch.randn(6)
    q[:, [1, 4]], p[[1, 4]] = unused, unused
    keep = [0, 2, 3, 5]
    expected = information_summary(q[:, keep], p[keep])
    assert information_summary(q, p) == pytest.approx(expected)


def test_summary_of_a_model_with_a_masked_memory():
    memory = pv.Memory(torch.randn(6, 5), mask=torch.arange(6) < 4)
    vma = pv.VMA.for_vectors(5)
    encoded = vma.encode(memory)
    q, p = vma.address_guide(encoded, vma.encode_x(torch.randn(30, 5))).logits, vma.address_prior(encoded).logits
    found = information_summary(q, p)
    assert found.information_gain == pytest.approx(math.log(4) - float(entropy(q.detach()).mean()), abs=1e-6)
    assert math.isfinite(found.marginal_kl)
