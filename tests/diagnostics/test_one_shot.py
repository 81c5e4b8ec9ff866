"""One-shot classification against the reference model, whose evidence is known."""

import math

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.data import OneShotTrial
from pyro_vmem.diagnostics import one_shot_errors

pytestmark = pytest.mark.usefixtures("float64")


def reference_and_trials(num_trials=8, n_way=9):
    """Trials whose test images the reference draws, each from one training image."""
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    vma, trials = reference.vma(exact=True), []
    for _ in range(num_trials):
        templates, right = 2 * torch.randn(n_way, 3), torch.randperm(n_way)
        drawn = [vma.generate(pv.Memory(templates), 1, address=int(slot), mean=False) for slot in right]
        trials.append(OneShotTrial(templates, torch.cat(drawn), right))
    return reference, trials


def log_evidence(reference, x, m):
    """The exact log p(x | m) of each pair, `(B, C)`."""
    each = [reference.log_evidence(pv.Memory(template[None]), x).detach() for template in m]
    return torch.stack(each, -1)


@pytest.mark.parametrize("max_decodes", [5, 10_000])
def test_scores_are_those_of_the_exact_evidence(max_decodes):
    reference, trials = reference_and_trials()
    found = one_shot_errors(reference.vma(exact=True), trials, 1, max_decodes=max_decodes)
    guide, evidence, two_way = [], [], []
    for training, test, right in trials:
        forward, reverse = log_evidence(reference, test, training), log_evidence(reference, training, test).mT
        unconditional = reverse.logsumexp(0) - math.log(len(test))
        for errors, score in ((evidence, forward), (two_way, forward + reverse - unconditional)):
            errors.append((score.argmax(-1) != right).double().mean())
        posterior = reference.address_posterior(pv.Memory(training), test).probs
        guide.append((posterior.argmax(-1) != right).double().mean())
    assert 0 < torch.stack(evidence).mean() < 0.8  # neither all right nor chance, so that scores matter
    assert (torch.stack(evidence) != torch.stack(two_way)).any()
    torch.testing.assert_close(found.guide.double(), torch.stack(guide), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.evidence.double(), torch.stack(evidence), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.two_way.double(), torch.stack(two_way), rtol=1e-6, atol=1e-6)


def test_learned_slots_take_part_in_no_score():
    _, trials = reference_and_trials(1)
    plain = pv.VMA.for_vectors(3)
    with_slots = plain.replace(templates=pv.ExtraTemplates(2, (3,)))
    assert torch.equal(one_shot_errors(plain, trials, 3).evidence, one_shot_errors(with_slots, trials, 3).evidence)
    assert torch.equal(one_shot_errors(plain, trials, 3).guide, one_shot_errors(with_slots, trials, 3).guide)


@pytest.mark.parametrize("baseline", [pv.model.NoMemoryVAE, pv.model.SetStatisticsVAE, pv.model.SoftAttentionVAE])
def test_any_model_has_the_evidence_of_an_image_given_another(baseline):
    _, trials = reference_and_trials(1)
    assert one_shot_errors(baseline.for_vectors(3), trials, 2).evidence.shape == (1,)


def test_the_summary_has_errors_over_trials_and_state_stays():
    reference, trials = reference_and_trials()
    state = torch.get_rng_state()
    summary = one_shot_errors(reference.vma(exact=True), trials, 1).summary()
    assert torch.equal(state, torch.get_rng_state())
    assert summary["num_trials"] == 8
    assert summary["two_way_se"] > 0
    assert math.isnan(one_shot_errors(reference.vma(exact=True), trials[:1], 1).summary()["guide_se"])


def test_no_trials_and_images_of_another_size_are_refused():
    reference, trials = reference_and_trials(1)
    with pytest.raises(ValueError, match="trials: expected at least one"):
        one_shot_errors(reference.vma(exact=True), [])
    with pytest.raises(ValueError, match="memory"):
        one_shot_errors(pv.VMA.for_vectors(4), trials)
