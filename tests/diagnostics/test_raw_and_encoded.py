"""Every function about a memory says the same of it raw and encoded, and covers the slots that the model reads."""

import math

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem import diagnostics

X, S, B = 4, 6, 5
MEMORIES = {
    "plain": {},
    "masked": {"mask": torch.arange(S) < 4},
    "one slot": {"slots": 1},
    "one slot in use": {"mask": torch.arange(S) == 2},
    "per datapoint": {"per_datapoint": True},
    "masked per datapoint": {"per_datapoint": True, "mask": torch.arange(S) < torch.tensor([[6], [1], [3], [4], [2]])},
}


def all_values(found):
    values = [*found.evidence.values(), *(v for v in vars(found).values() if isinstance(v, torch.Tensor))]
    return torch.cat([v.flatten().nan_to_num(0.0) for v in values])


FUNCTIONS = {
    **{
        f"estimate_evidence {method}": lambda vma, m, x, method=method: (
            diagnostics.estimate_evidence(vma, m, x, 60, method, k=2, seed=0, warn=False).log_evidence
        )
        for method in ("exact-address", "sampled", "top-k", "refined")
    },
    "log_evidence": lambda vma, m, x: diagnostics.log_evidence(vma, m, x, 40),
    "slot_log_evidence": lambda vma, m, x: diagnostics.slot_log_evidence(vma, m, x, 3),
    "contribution": lambda vma, m, x: all_values(diagnostics.contribution(vma, m, x, wrong=m, num_samples=2)),
    "diagnose": lambda vma, m, x: torch.as_tensor(
        diagnostics.diagnose(vma, m, x, num_samples=5, per_slot=3)["address_exact"].values
    ),
    "to_datatree": lambda vma, m, x: torch.as_tensor(
        diagnostics.to_datatree(vma, m, x, num_samples=5, per_slot=2)["constant_data"]["template"].values
    ),
    "sbc": lambda vma, m, x: torch.cat(
        list(diagnostics.sbc(vma, m, num_simulations=20, num_draws=9).ranks.values()), -1
    ),
}


def given(slots=S, mask=None, per_datapoint=False):
    generator = torch.Generator().manual_seed(0)
    shape = (B, slots, X) if per_datapoint else (slots, X)
    labels = torch.arange(slots).expand(shape[:-1]) % 3
    return pv.Memory(torch.rand(shape, generator=generator), labels, mask, per_datapoint=per_datapoint)


@pytest.mark.parametrize("templates", [None, pv.ExtraTemplates, pv.LearnedTemplates])
@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_raw_and_encoded_memories_are_alike(name, kind, templates) -> None:
    if name in ("diagnose", "to_datatree"):
        pytest.importorskip("xarray")
    torch.manual_seed(0)
    vma = pv.VMA.for_vectors(X, latent_dim=2, templates=None if templates is None else templates(2, (X,)))
    memory, x = given(**MEMORIES[kind]), torch.rand(B, X)
    if templates is pv.LearnedTemplates and memory.per_datapoint:
        pytest.skip("learned slots alone are a shared memory")
    answers = []
    for m in (memory, vma.encode(memory)):
        torch.manual_seed(0)
        answers.append(FUNCTIONS[name](vma, m, x))
    torch.testing.assert_close(*answers)
    assert answers[0].numel() > 0
    if name in ("slot_log_evidence", "diagnose"):
        assert answers[0].shape == (B, vma.encode(memory).num_slots)


def test_slots_and_prior_are_the_exact_posterior_of_a_model_with_learned_slots() -> None:
    torch.manual_seed(0)
    vma = pv.VMA.for_vectors(X, latent_dim=2, templates=pv.ExtraTemplates(1, (X,)))
    memory, x = given(), torch.rand(B, X)
    logits = diagnostics.slot_log_evidence(vma, memory, x, 2000) + vma.address_prior(vma.encode(memory)).logits
    evidence = diagnostics.estimate_evidence(vma, memory, x, 14_000, seed=0, warn=False)
    torch.testing.assert_close(logits.logsumexp(-1), evidence.log_evidence, rtol=0, atol=0.1)
    assert evidence.decodes == 14_000 * B


def test_learned_slots_stay_as_they_are_while_given_ones_are_shuffled_or_blanked() -> None:
    torch.manual_seed(0)
    vma = pv.VMA.for_vectors(X, latent_dim=2, templates=pv.LearnedTemplates(3, (X,)))
    found = diagnostics.contribution(vma, given(), torch.rand(B, X))
    for worth in found.worth.values():
        torch.testing.assert_close(worth, torch.zeros(B))


def test_hidden_slots_that_explain_far_better_have_no_part() -> None:
    """A slot that is not in use has a logit of -1e4, which evidence can outweigh."""
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    x = torch.zeros(2, 3)
    memory = pv.Memory(torch.tensor([[900.0] * 3, [0.0] * 3]), torch.arange(2), torch.tensor([True, False]))
    found = diagnostics.contribution(reference.vma(), memory, x, num_samples=2)
    assert found.log_joint.softmax(-1).tolist() == [[1.0, 0.0]] * 2
    slot = reference.slot_log_evidence(memory, x).detach()
    assert float((slot[:, 1] - slot[:, 0]).min()) > 1e4
    torch.testing.assert_close(found.evidence["right"], slot[:, 0])
    assert math.isinf(float(found.slot[0, 0]))
