"""Few-shot evaluation: what it counts, and that it changes nothing."""

import dataclasses
import math
import re

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.data import EpisodeSampler, FewShotDataset
from pyro_vmem.diagnostics import FewShotEvaluation, evaluate
from pyro_vmem.diagnostics.information import information_summary
from pyro_vmem.diagnostics.weights import mean_and_error


def blobs(classes=12, drawings=6):
    """Each class a random pattern, each drawing the pattern with a few pixels turned over."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(classes, 1, 1, 8, 8, generator=generator) > 0.5
    flips = torch.rand(classes, drawings, 1, 8, 8, generator=generator) > 0.97
    images = (patterns ^ flips).flatten(0, 1).to(torch.uint8) * 255
    return FewShotDataset(images, torch.arange(classes).repeat_interleave(drawings))


def small_vma():
    torch.manual_seed(0)
    return pv.VMA.for_images((1, 8, 8), latent_dim=4, num_features=16, width=4)


def test_figures_add_up():
    sampler = EpisodeSampler(blobs(), n_way=5, k_shot=2, n_query=3, seed=0)
    result = evaluate(small_vma(), sampler, num_episodes=4, num_samples=2, progress=False)
    summary = result.summary()
    assert result.hit.shape == (4, 15)
    assert summary["num_targets"] == 60
    assert summary["chance"] == 0.2
    assert summary["nll"] == pytest.approx(-float(result.log_evidence.mean()))
    assert summary["memory_worth_nats"] == pytest.approx(summary["nll_wrong_memory"] - summary["nll"], rel=1e-4)
    assert summary["information_gain_bits"] == pytest.approx(summary["information_gain"] / math.log(2))
    assert summary["information_gain_share"] == pytest.approx(summary["information_gain"] / math.log(5))
    assert 0 <= summary["information_gain"] <= math.log(10) + 1e-6
    by_hand = result.log_evidence.mean(1)
    assert summary["nll_se"] == pytest.approx(float(by_hand.std() / 2))


def test_the_similar_template_is_hit_without_training_and_a_shuffled_one_is_not():
    sampler = EpisodeSampler(blobs(), n_way=5, k_shot=1, n_query=2, seed=0)
    vma = small_vma()
    # Chance is 0.2, with a standard error of 0.05 over 60 targets.
    assert evaluate(vma, sampler, 6, 1, progress=False).hit.float().mean() > 0.2 + 4 * 0.05

    class Scrambled(pv.data.EpisodeSampler):
        """The same episodes with the labels of the slots moved on by one."""

        n_way, k_shot = 5, 1

        def __init__(self):
            pass

        def __getitem__(self, index):
            episode = sampler[index]
            labels = episode.memory.labels
            moved = dict(zip(labels.tolist(), labels.roll(1).tolist(), strict=True))
            wrong = torch.tensor([moved[int(c)] for c in episode.labels])
            return pv.data.Episode(episode.memory, episode.x, wrong)

        def distractors(self, index):
            return sampler.distractors(index)

    assert evaluate(vma, Scrambled(), 6, 1, progress=False).hit.float().mean() < 0.2


def test_evaluation_changes_nothing_and_repeats_itself():
    vma = small_vma()
    before = {name: p.clone() for name, p in vma.state_dict().items()}
    state = torch.get_rng_state()
    sampler = EpisodeSampler(blobs(), n_way=4, k_shot=1, n_query=1, seed=0)
    first, second = (evaluate(vma, sampler, 2, 2, seed=3, progress=False) for _ in range(2))
    other = evaluate(vma, sampler, 2, 2, seed=4, progress=False)
    assert torch.equal(first.log_evidence, second.log_evidence)
    assert not torch.equal(first.log_evidence, other.log_evidence)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], p) for name, p in vma.state_dict().items())


def vectors(classes=9, drawings=4):
    """Real vectors, so that the reference model can be evaluated."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(classes, 1, 3, generator=generator)
    points = centres + 0.3 * torch.randn(classes, drawings, 3, generator=generator)
    return FewShotDataset(points.flatten(0, 1), torch.arange(classes).repeat_interleave(drawings))


class Doubled(pv.data.EpisodeSampler):
    """The same episodes in double precision."""

    n_way, k_shot = 4, 2

    def __init__(self, sampler):
        self.sampler = sampler

    def __getitem__(self, index):
        episode = self.sampler[index]
        return pv.data.Episode(episode.memory.to(torch.float64), episode.x.double(), episode.labels)

    def distractors(self, index):
        return self.sampler.distractors(index).to(torch.float64)


@pytest.fixture
def exact(float64):
    """The evaluation of a model whose guide is the exact posterior, and that model with its episodes."""
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    sampler = Doubled(EpisodeSampler(vectors(), n_way=4, k_shot=2, n_query=2, seed=0))
    with torch.no_grad():
        return evaluate(reference.vma(exact=True), sampler, 3, 2, progress=False), reference, sampler


def test_figures_of_an_exact_guide_are_the_closed_forms(exact):
    result, reference, sampler = exact
    for index in range(3):
        episode, wrong = sampler[index], sampler.distractors(index)
        posterior = reference.address_posterior(episode.memory, episode.x)
        gain = (posterior.probs * (posterior.logits + math.log(8))).sum(-1)
        evidence = reference.log_evidence(episode.memory, episode.x)
        torch.testing.assert_close(result.log_evidence[index], evidence.detach())
        torch.testing.assert_close(result.log_evidence_wrong[index], reference.log_evidence(wrong, episode.x).detach())
        torch.testing.assert_close(result.information_gain[index], gain.detach())
        torch.testing.assert_close(result.information_gain_exact[index], gain.detach())
        is_class = episode.memory.labels == episode.memory.labels.unique()[:, None]
        probs = (posterior.probs[:, None] * is_class).sum(-1)
        torch.testing.assert_close(result.class_probs[index], probs.detach())
        torch.testing.assert_close(result.class_probs_exact[index], probs.detach())
        right = episode.memory.labels.unique()[result.target_class[index]]
        assert torch.equal(right, episode.labels)


def test_an_exact_guide_agrees_with_the_exact_posterior(exact):
    result, *_ = exact
    summary = result.summary()
    assert summary["kl_exact_to_guide"] == pytest.approx(0, abs=1e-9)
    assert summary["kl_guide_to_exact"] == pytest.approx(0, abs=1e-9)
    assert summary["rank_correlation"] == pytest.approx(1)
    assert summary["same_slot"] == 1
    assert summary["monte_carlo_se"] == pytest.approx(0, abs=1e-9)  # every sample of z weighs the same
    assert summary["calibration_error"] == pytest.approx(summary["calibration_error_exact"])
    parts = summary["reconstruction"] - summary["information_gain"] - summary["kl_z"]
    assert summary["elbo"] == pytest.approx(parts)
    # The bound of an exact guide is the evidence; eight draws of 24 targets leave some noise.
    gap = (result.reconstruction - result.information_gain - result.kl_z - result.log_evidence).flatten()
    assert abs(float(gap.mean())) < 5 * float(gap.std()) / math.sqrt(len(gap))
    assert float(gap.std()) < 1


class Flat(pv.AddressGuide):
    """A guide that ignores the target: every slot alike."""

    def forward(self, memory, x):
        return pv.over_slots(x.raw.new_zeros(len(x.raw), memory.num_slots), memory)


def test_a_guide_that_ignores_the_target(exact):
    _, reference, sampler = exact
    vma = reference.vma(address_guide=Flat())
    result = evaluate(vma, sampler, 2, 1, progress=False)
    summary = result.summary()
    for name in ("information_gain", "mutual_information", "marginal_kl"):
        assert summary[name] == pytest.approx(0, abs=1e-9)
    assert summary["perplexity"] == pytest.approx(8)
    torch.testing.assert_close(result.kl_exact_to_guide, result.information_gain_exact)
    posterior = torch.stack([reference.address_posterior(sampler[i].memory, sampler[i].x).logits for i in (0, 1)])
    torch.testing.assert_close(result.kl_guide_to_exact, -(posterior + math.log(8)).mean(-1).detach())
    assert math.isnan(summary["rank_correlation"])


def test_mutual_information_and_the_rest_are_the_information_gain(exact):
    summary = exact[0].summary()
    assert summary["mutual_information"] + summary["marginal_kl"] == pytest.approx(summary["information_gain"])
    assert 0 < summary["mutual_information"] <= math.log(8)
    assert 1 <= summary["perplexity"] <= 8
    assert 0 <= summary["slots_never_first"] <= 7
    assert summary["mutual_information_se"] > 0


def test_decodes_are_counted(monkeypatch):
    vma = small_vma()
    count = 0
    forward = vma.likelihood.forward

    def counting(z, template):
        nonlocal count
        count += z.shape[:-1].numel()
        return forward(z, template)

    monkeypatch.setattr(vma.likelihood, "forward", counting)
    result = evaluate(vma, EpisodeSampler(blobs(), n_way=5, k_shot=2, n_query=3, seed=0), 2, 3, progress=False)
    assert result.decodes == count == 2 * 15 * (2 * 10 * 3 + 8)
    assert result.summary()["decodes_per_second"] == pytest.approx(count / result.seconds)


def test_less_memory_gives_the_same_numbers():
    sampler = EpisodeSampler(blobs(), n_way=5, k_shot=1, n_query=2, seed=0)
    many, few = (evaluate(small_vma(), sampler, 2, 1, progress=False, max_decodes=n) for n in (1000, 50))
    torch.testing.assert_close(many.log_evidence, few.log_evidence)  # 50 hold all slots of all targets, once
    assert few.khat.isnan().all()  # of five weights there is no tail


def test_a_repeated_slot_of_a_class_counts_for_the_class():
    """Two slots of 0.3 each beat one of 0.4: the class is judged, not the slot."""
    result = edited(class_probs=pv.Memory(torch.rand(3, 2), torch.tensor([7, 9, 9])).by_class(PROBS))
    assert result.hit.tolist() == [[True]]


PROBS = torch.tensor([[[0.4, 0.3, 0.3]]])


def edited(**changes):
    """An evaluation of one target of the second of two classes, of which only what is given matters."""
    one, information = torch.zeros(1, 1), information_summary(torch.zeros(1, 3), torch.zeros(3))
    names = [f.name for f in dataclasses.fields(FewShotEvaluation) if f.type == "Tensor"]
    values = dict.fromkeys(names, one) | {"target_class": torch.ones(1, 1, dtype=torch.long)}
    values |= {"class_probs": PROBS, "class_probs_exact": PROBS, "information": (information,)}
    counts = {"n_way": 2, "k_shot": 1, "num_samples": 1, "decodes": 1, "seconds": 1.0}
    return FewShotEvaluation(**(values | counts | changes))


def test_top_five():
    probs = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.08, 0.05, 0.02]).expand(2, 7, 7)
    result = edited(
        class_probs=probs, class_probs_exact=probs.flip(-1), target_class=torch.arange(7).expand(2, 7), n_way=7
    )
    summary = result.summary()
    assert summary["top5_rate"] == pytest.approx(5 / 7)
    assert summary["top5_rate_exact"] == pytest.approx(5 / 7)
    assert summary["hit_rate"] == pytest.approx(1 / 7)
    assert result.class_probs_exact[0, 0].argmax() == 6
    assert math.isnan(edited(n_way=5).summary()["top5_rate"])  # any five of five


def test_reliability_pools_all_targets():
    sure = torch.tensor([0.1, 0.9]).expand(1, 10, 2)
    result = edited(class_probs=sure, target_class=(torch.arange(10) < 6).long()[None])
    assert result.reliability.error == pytest.approx(0.3)
    assert int(result.reliability.count.sum()) == 10


def test_shares_that_are_not_to_be_trusted():
    khat, error = torch.tensor([[0.2, 0.9], [0.4, math.inf]]), torch.tensor([[0.1, math.nan], [0.1, 0.2]])
    summary = edited(khat=khat, standard_error=error, log_evidence=torch.zeros(2, 2)).summary()
    assert summary["khat_above"] == 0.5
    assert summary["error_unknown"] == 0.25
    assert math.isnan(summary["monte_carlo_se"])
    known = edited(khat=khat, standard_error=error.nan_to_num(0.3), log_evidence=torch.zeros(2, 2)).summary()
    assert known["monte_carlo_se"] == pytest.approx(math.sqrt(0.01 + 0.09 + 0.01 + 0.04) / 4)


def test_every_key_is_documented():
    documented = set(re.findall(r"`(\w+)`", FewShotEvaluation.summary.__doc__))
    keys = {key for key in edited().summary() if not key.endswith("_se") or key == "monte_carlo_se"}
    assert keys <= documented


def test_standard_error_is_over_episodes():
    values = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    mean, error = mean_and_error(values.nanmean(1))
    assert mean == 1.0
    assert error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(mean_and_error(values[:1].nanmean(1))[1])
    some = torch.tensor([[0.0, math.nan], [1.0, 3.0], [math.nan, math.nan]])
    assert mean_and_error(some.nanmean(1)) == (1.0, pytest.approx(1.0))


def test_bad_arguments():
    sampler = EpisodeSampler(blobs(classes=6), n_way=4, k_shot=1, n_query=1, seed=0)
    with pytest.raises(ValueError, match=r"num_episodes: expected a whole number in \[1, 10,000,000\], got 0"):
        evaluate(small_vma(), sampler, 0)
    with pytest.raises(ValueError, match="n_way"):  # too few classes left for a wrong memory
        evaluate(small_vma(), sampler, 1, progress=False)


def test_a_learned_slot_is_a_class_of_its_own():
    vma = small_vma().replace(templates=pv.ExtraTemplates(1, (1, 8, 8)))
    sampler = EpisodeSampler(blobs(), n_way=5, k_shot=2, n_query=3, seed=0)
    result = evaluate(vma, sampler, num_episodes=2, num_samples=2, progress=False)
    assert result.class_probs.shape == result.class_probs_exact.shape == (2, 15, 6)
    assert int(result.target_class.min()) == 1  # the first is that of the learned slot
    assert torch.equal(result.hit, result.class_probs.argmax(-1) == result.target_class)
    assert result.summary()["hit_rate"] > 0.4  # similar templates are found without training


def test_without_a_wrong_memory_the_rest_is_the_same():
    """All of the classes may then be in memory."""
    sampler = EpisodeSampler(blobs(), n_way=12, k_shot=1, n_query=1, seed=0)
    with pytest.raises(ValueError, match="classes"):
        evaluate(small_vma(), sampler, 2, 2, progress=False)
    alone = evaluate(small_vma(), sampler, 2, 2, wrong=False, progress=False)
    assert alone.log_evidence.isfinite().all()
    assert math.isnan(alone.summary()["memory_worth_nats"])
    assert alone.decodes == 2 * 12 * (12 * 2 + 8)


def test_episodes_without_labels_give_all_that_needs_none():
    """From a source that knows nothing but its episodes."""
    sampler = EpisodeSampler(blobs(), n_way=3, k_shot=1, n_query=2)

    class Bare:
        def __getitem__(self, index):
            episode = sampler[index]
            return pv.data.Episode(pv.Memory(episode.memory.templates), episode.x)

    with pytest.raises(ValueError, match=r"wrong: Bare has no `distractors`, .* Pass wrong=False"):
        evaluate(small_vma(), Bare(), 1, 1, progress=False)
    found = evaluate(small_vma(), Bare(), 2, 2, wrong=False, progress=False)
    labelled = evaluate(small_vma(), sampler, 2, 2, wrong=False, progress=False)
    assert torch.equal(found.log_evidence, labelled.log_evidence)
    of_classes = {"hit_rate", "hit_rate_exact", "chance", "n_way", "k_shot", "calibration_error"}
    of_classes |= {"calibration_error_exact", "information_gain_share", "information_gain_share_of_slots"}
    timed = {"evaluation_seconds", "decodes_per_second"}
    for name, value in found.summary().items():
        expected = labelled.summary()[name]
        if name.removesuffix("_se") in of_classes:
            assert math.isnan(value), name
        elif name not in timed:
            assert value == expected or (math.isnan(value) and math.isnan(expected)), name
    with pytest.raises(ValueError, match="labels: the episodes have none"):
        _ = found.hit
