"""What a memory contributes, against the reference model, where the truth is known."""

import math

import pyro
import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.diagnostics import contribution
from pyro_vmem.diagnostics.contribution import _shuffled, slot_contribution

pytestmark = pytest.mark.usefixtures("float64")


def case(slots=6, targets=5, mask=None, per_datapoint=False, learned=False):
    """The reference model with its exact guide: every sample of z gives the exact evidence of its slot."""
    torch.manual_seed(0)
    prior = None
    if learned:
        prior = pv.LearnedPrior(num_features=3)
        prior.query.data = torch.tensor([0.7, -1.1, 0.4])
    reference = pv.LinearGaussianMemory(address_prior=prior, generator=torch.Generator().manual_seed(0))
    templates = torch.randn(targets, slots, 3) if per_datapoint else torch.randn(slots, 3)
    memory = pv.Memory(templates, mask=mask, per_datapoint=per_datapoint)
    return reference, reference.vma(exact=True), memory, torch.randn(targets, 3)


def with_templates(memory, templates):
    return pv.Memory(templates, memory.labels, memory.mask, per_datapoint=memory.per_datapoint)


@pytest.mark.parametrize("per_datapoint", [False, True])
def test_evidence_under_each_memory_is_exact(per_datapoint) -> None:
    reference, vma, memory, x = case(per_datapoint=per_datapoint)
    wrong = pv.Memory(5 + torch.randn(4, 3))
    found = contribution(vma, memory, x, wrong=wrong, num_samples=1)
    blank = with_templates(memory, torch.zeros_like(memory.templates))
    torch.testing.assert_close(found.evidence["right"], reference.log_evidence(memory, x))
    torch.testing.assert_close(found.log_joint.softmax(-1), reference.address_posterior(memory, x).probs)
    torch.testing.assert_close(found.evidence["wrong"], reference.log_evidence(wrong, x))
    torch.testing.assert_close(found.evidence["blank"], reference.log_evidence(blank, x))
    assert set(found.worth) == {"wrong", "shuffled", "blank"}
    torch.testing.assert_close(found.worth["blank"], found.evidence["right"] - reference.log_evidence(blank, x))
    assert contribution(vma, memory, x, num_samples=1).worth.keys() == {"shuffled", "blank"}


def test_a_shuffled_template_has_the_same_values_in_another_order() -> None:
    memory = pv.Memory(torch.rand(40, 2, 5, 3), torch.arange(40), torch.arange(40) > 3)
    shuffled = _shuffled(memory)
    before, after = memory.templates.flatten(1), shuffled.templates.flatten(1)
    torch.testing.assert_close(after.sort(-1).values, before.sort(-1).values)
    moved = (before != after).double().mean()
    assert 0.9 < moved < 1  # each value stays with a probability of 1/30
    orders = [row.argsort().argsort() for row in after]
    assert len({tuple(order.tolist()) for order in orders}) == 40  # each slot has an order of its own
    assert torch.equal(shuffled.labels, memory.labels)
    assert torch.equal(shuffled.mask, memory.mask)


def test_shuffled_evidence_is_that_of_a_permuted_memory() -> None:
    """With two values a template there are two orders; each target's value is that of one of the combinations."""
    reference = pv.LinearGaussianMemory(dim=2, generator=torch.Generator().manual_seed(0))
    memory, x = pv.Memory(torch.tensor([[1.0, -2.0], [3.0, 0.5]])), torch.randn(4, 2)
    found = contribution(reference.vma(), memory, x, num_samples=1, seed=3)
    candidates = []
    for flips in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows = [row.flip(0) if flip else row for row, flip in zip(memory.templates, flips, strict=True)]
        candidates.append(reference.log_evidence(pv.Memory(torch.stack(rows)), x))
    gaps = (torch.stack(candidates) - found.evidence["shuffled"]).abs().amax(-1)
    assert gaps.min() < 1e-9
    assert gaps.sort().values[1] > 1e-3


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("per_datapoint", [False, True])
def test_without_a_slot_is_what_a_mask_gives(learned, per_datapoint) -> None:
    """The closed form against the model's own evidence with the slot masked, under a uniform and a learned prior."""
    if learned and per_datapoint:
        used = torch.ones(5, 6, dtype=torch.bool)
    else:
        used = torch.tensor([True, True, False, True, True, True]).expand(5, 6) if per_datapoint else None
    reference, vma, memory, x = case(mask=used, per_datapoint=per_datapoint, learned=learned)
    found = contribution(vma, memory, x, num_samples=1).slot
    used = torch.ones(6, dtype=torch.bool) if used is None else used
    for slot in range(6):
        without = used.clone()
        without[..., slot] = False
        masked = pv.Memory(memory.templates, mask=without, per_datapoint=per_datapoint)
        expected = reference.log_evidence(memory, x) - reference.log_evidence(masked, x)
        torch.testing.assert_close(found[:, slot], expected)
        if not bool(used[..., slot].all()):
            assert float(found[:, slot].abs().max()) < 1e-9  # it was not there


def test_the_only_slot_in_use_cannot_be_left_out() -> None:
    _, vma, memory, x = case(mask=torch.tensor([False, True, False, False, False, False]))
    slot = contribution(vma, memory, x, num_samples=1).slot
    assert slot[:, 1].eq(math.inf).all()
    assert slot[:, [0, 2, 3, 4, 5]].abs().max() < 1e-9


class TestSlotContribution:
    def test_by_hand(self) -> None:
        p, evidence = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.02, 0.4, 0.1]])
        total = (p * evidence).sum()
        left = torch.tensor([0.3 * 0.4 + 0.2 * 0.1, 0.5 * 0.02 + 0.2 * 0.1, 0.5 * 0.02 + 0.3 * 0.4])
        expected = total.log() - (left / (1 - p)).log()
        found = slot_contribution(p.log() + 3.0, evidence.log())  # the prior need not be normalised
        torch.testing.assert_close(found, expected[None])

    def test_keeps_its_digits_where_one_slot_is_all(self) -> None:
        """log(exp(a) - exp(b)) would be the logarithm of zero here."""
        evidence = torch.tensor([[-100.0, -1000.0, -1001.0]])
        found = slot_contribution(torch.zeros(3), evidence)
        rest = -1000.0 + math.log1p(math.exp(-1)) - math.log(2)
        total = -100.0 - math.log(3)
        torch.testing.assert_close(found[0, 0], torch.tensor(total - rest))
        torch.testing.assert_close(found[0, 1:], torch.full((2,), total + 100.0 + math.log(2)))

    def test_equal_slots_contribute_nothing(self) -> None:
        found = slot_contribution(torch.randn(7), torch.full((2, 7), -3.0))
        torch.testing.assert_close(found, torch.zeros(2, 7))

    def test_impossible_slots(self) -> None:
        found = slot_contribution(torch.tensor([0.0, -math.inf, 0.0]), torch.tensor([[-1.0, 0.0, -2.0]]))
        two = slot_contribution(torch.zeros(2), torch.tensor([[-1.0, -2.0]]))
        torch.testing.assert_close(found, torch.tensor([[two[0, 0], 0.0, two[0, 1]]]))
        used = torch.arange(50) % 3 > 0
        prior = torch.randn(50, dtype=torch.float32).masked_fill(~used, -math.inf)
        assert slot_contribution(prior, 50 * torch.randn(9, 50, dtype=torch.float32))[:, ~used].eq(0).all()
        assert slot_contribution(torch.zeros(1), torch.zeros(3, 1)).eq(math.inf).all()


def test_chunks_do_not_change_the_result() -> None:
    _, vma, memory, x = case(per_datapoint=True)
    whole = contribution(vma, memory, x, num_samples=2)
    parts = contribution(vma, memory, x, num_samples=2, max_decodes=2)
    torch.testing.assert_close(whole.slot, parts.slot)


def test_changes_nothing_and_repeats_itself() -> None:
    torch.manual_seed(0)
    vma, memory, x = pv.VMA.for_vectors(3), pv.Memory(torch.randn(4, 3)), torch.randn(5, 3)
    before = {name: p.clone() for name, p in vma.state_dict().items()}
    state = torch.get_rng_state()
    first, second, other = (contribution(vma, memory, x, wrong=memory, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.evidence["right"], second.evidence["right"])
    assert not torch.equal(first.evidence["right"], other.evidence["right"])
    # Common random numbers: against itself a memory is worth nothing, to the last digit.
    assert torch.equal(first.worth["wrong"], torch.zeros(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())
    assert all(torch.equal(before[name], p) for name, p in vma.state_dict().items())


def test_summary_is_means_with_errors_over_targets() -> None:
    _, vma, memory, x = case()
    found = contribution(vma, memory, x, num_samples=1)
    summary = found.summary()
    assert summary["worth_blank"] == pytest.approx(float(found.worth["blank"].mean()))
    assert summary["worth_blank_se"] == pytest.approx(float(found.worth["blank"].std()) / math.sqrt(5))
    assert summary["slot_largest"] == pytest.approx(float(found.slot.max(-1).values.mean()))
    one = contribution(vma, memory, x[:1], num_samples=1).summary()
    assert math.isnan(one["log_evidence_se"])


def test_bad_arguments() -> None:
    _, vma, memory, x = case()
    with pytest.raises(ValueError, match=r"num_samples: expected a whole number in \[1, 10,000,000\], got 0"):
        contribution(vma, memory, x, num_samples=0)
    with pytest.raises(ValueError, match="memory: its templates"):
        contribution(vma, memory, x, wrong=pv.Memory(torch.randn(4, 2)))
