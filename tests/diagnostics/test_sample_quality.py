"""Recognisability and diversity of draws, against models whose draws are known."""

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.data import Episode
from pyro_vmem.diagnostics import sample_quality


def copying(noise, shift=0):
    """A model whose draw is the template of a slot plus noise: of the slot asked for, or of one `shift` further on."""
    vma = pv.VMA.for_vectors(40)

    def generate(memory, n, address, **_):
        template = memory.templates[(address + shift) % memory.num_slots]
        return template + noise * torch.randn(n, *template.shape)

    vma.generate = generate
    return vma


def episodes(noise=0.3, count=4, n_way=6, n_query=5, dim=40):
    """Classes that are directions, and targets around them."""
    made = []
    for _ in range(count):
        centres = torch.nn.functional.one_hot(torch.randperm(dim)[:n_way], dim).float()
        x = (centres[:, None] + noise * torch.randn(n_way, n_query, dim) / dim**0.5).flatten(0, 1)
        labels = torch.arange(n_way).repeat_interleave(n_query)
        order = torch.randperm(len(x))
        made.append(Episode(pv.Memory(centres, labels=torch.arange(n_way)), x[order], labels[order]))
    return made


def embed(x):
    return x


def test_draws_from_the_classes_are_as_good_as_real_ones():
    noise, dim = 0.3, 40
    found = sample_quality(copying(noise / dim**0.5), episodes(noise), embed, num_draws=30).summary()
    assert found["recognised"] == found["recognised_real"] == 1
    assert 0.9 < found["diversity_ratio"] < 1.1
    # Two directions that differ by noise of length s have the expected cosine 1 / (1 + s^2), nearly.
    assert found["diversity_real"] == pytest.approx(1 - 1 / (1 + noise**2), rel=0.1)


def test_copies_have_no_diversity_and_other_classes_are_not_recognised():
    copied = sample_quality(copying(0.0), episodes(), embed).summary()
    assert copied["recognised"] == 1
    assert copied["diversity"] == pytest.approx(0, abs=1e-5)
    assert sample_quality(copying(0.0, shift=1), episodes(), embed).summary()["recognised"] == 0


def test_noise_is_recognised_by_chance():
    found = sample_quality(copying(1e4), episodes(1e4, count=10, n_query=6), embed, num_draws=40).summary()
    assert found["recognised_real"] == pytest.approx(1 / 6, abs=0.05)  # no drawing is its own reference
    assert found["recognised"] == pytest.approx(1 / 6, abs=0.05)
    assert found["diversity"] == pytest.approx(1, abs=0.05)


def test_a_model_draws_by_its_options_and_the_seed_alone():
    vma, given = pv.VMA.for_vectors(40), episodes(count=2)
    state = torch.get_rng_state()
    first, again = (sample_quality(vma, given, embed, temperature=0.5, best_of=2, seed=3).diversity for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, sample_quality(vma, given, embed, temperature=0.5, best_of=2, seed=4).diversity)


def test_episodes_that_do_not_fit_are_refused():
    one = episodes(count=1)[0]
    with pytest.raises(ValueError, match="at least one"):
        sample_quality(copying(0.1), [], embed)
    for bad in (
        Episode(one.memory, one.x),
        Episode(pv.Memory(one.memory.templates, labels=torch.zeros(6, dtype=torch.long)), one.x, one.labels),
        episodes(n_query=2, count=1)[0],
    ):
        with pytest.raises(ValueError, match="one slot per class"):
            sample_quality(copying(0.1), [bad], embed)
