"""Few-shot evaluation: what it counts, and that it changes nothing."""

import math

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.data import EpisodeSampler, FewShotDataset
from pyro_vmem.diagnostics import evaluate
from pyro_vmem.diagnostics.few_shot import mean_and_error


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

    class Scrambled:
        """The same episodes with the labels of the slots moved on by one."""

        n_way, k_shot = 5, 1

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


def test_a_repeated_slot_of_a_class_counts_for_the_class():
    """Two slots of 0.3 each beat one of 0.4: the class is judged, not the slot."""
    from pyro_vmem.diagnostics.few_shot import _top_class

    memory = pv.Memory(torch.rand(3, 2), labels=torch.tensor([7, 9, 9]))
    logits = torch.tensor([[0.4, 0.3, 0.3]]).log()
    assert _top_class(logits, memory).tolist() == [9]


def test_standard_error_is_over_episodes():
    values = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    mean, error = mean_and_error(values)
    assert mean == 1.0
    assert error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(mean_and_error(values[:1])[1])


def test_bad_arguments():
    sampler = EpisodeSampler(blobs(classes=6), n_way=4, k_shot=1, n_query=1, seed=0)
    with pytest.raises(ValueError, match="num_episodes: expected at least 1, got 0"):
        evaluate(small_vma(), sampler, 0)
    with pytest.raises(ValueError, match="n_way"):  # too few classes left for a wrong memory
        evaluate(small_vma(), sampler, 1, progress=False)
