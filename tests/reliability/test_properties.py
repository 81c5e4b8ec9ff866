"""Properties that hold for any memory, any model, any sampler: Hypothesis looks for one that they do not hold for."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem.data import PROTOCOLS, EpisodeSampler, FewShotDataset
from pyro_vmem.diagnostics import information_gain, log_evidence
from pyro_vmem.train import load_checkpoint, save_checkpoint

# The same examples in every run, and no folder of those that failed before.
FIXED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SEEDS = st.integers(0, 2**31)
SLOTS = st.integers(1, 7)
TARGETS = st.integers(1, 4)

PRIORS: dict[str, Callable[[], pv.AddressPrior]] = {
    "uniform": pv.UniformPrior,
    "learned": lambda: pv.LearnedPrior(5),
    "content": lambda: pv.ContentPrior(5, 6),
    "balanced": pv.ClassBalancedPrior,
    "tempered": lambda: pv.TemperedPrior(pv.LearnedPrior(5), 0.7),
}
GUIDES: dict[str, Callable[[], pv.AddressGuide]] = {
    "similarity": lambda: pv.SimilarityGuide(5),
    "pairwise": lambda: pv.PairwiseGuide(5, 6),
    "defensive": lambda: pv.DefensiveGuide(pv.SimilarityGuide(5), 0.1),
}


def reference(seed: int) -> pv.LinearGaussianMemory:
    return pv.LinearGaussianMemory(dim=3, generator=torch.Generator().manual_seed(seed)).double()


def model(seed: int, **parts: Any) -> pv.VMA:
    """Of random networks, none of whose outputs is near a constant."""
    torch.manual_seed(seed)
    vma = pv.VMA.for_vectors(3, latent_dim=2, num_features=5, hidden=(6,), **parts).double()
    for parameter in vma.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return vma


def draw_memory(slots: int, targets: int, seed: int) -> tuple[pv.Memory, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    templates = torch.randn(slots, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (slots,), generator=generator)
    return pv.Memory(templates, labels), torch.randn(targets, 3, generator=generator, dtype=torch.float64)


def permuted(memory: pv.Memory, order: Tensor) -> pv.Memory:
    assert memory.labels is not None
    return pv.Memory(memory.templates[order], memory.labels[order])


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


# The order of the slots


@FIXED
@given(SLOTS, TARGETS, SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_slots_leaves_the_evidence_alone(slots: int, targets: int, seed: int, random: Any) -> None:
    exact, (memory, x) = reference(seed), draw_memory(slots, targets, seed)
    order = torch.tensor(random.sample(range(slots), slots))
    close(exact.log_evidence(memory, x), exact.log_evidence(permuted(memory, order), x))
    # An exact guide's estimate has no variance, so that it can be compared too.
    vma = exact.vma(exact=True)
    close(log_evidence(vma, memory, x, slots), log_evidence(vma, permuted(memory, order), x, slots))


@pytest.mark.parametrize("guide", GUIDES)
@FIXED
@given(SLOTS, TARGETS, SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_slots_permutes_the_guide(guide: str, slots: int, targets: int, seed: int, random: Any) -> None:
    vma, (memory, x) = model(seed, address_guide=GUIDES[guide]()), draw_memory(slots, targets, seed)
    order = torch.tensor(random.sample(range(slots), slots))
    q, other = (vma.address_guide(vma.encode(m), vma.encode_x(x)).probs for m in (memory, permuted(memory, order)))
    close(q[:, order], other)


@pytest.mark.parametrize("prior", PRIORS)
@FIXED
@given(SLOTS, SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_slots_leaves_what_is_generated_alone(prior: str, slots: int, seed: int, random: Any) -> None:
    """The mixture that x is drawn from: each slot's weight and its own distribution of latents and pictures."""
    vma, (memory, _) = model(seed, address_prior=PRIORS[prior]()), draw_memory(slots, 1, seed)
    order = torch.tensor(random.sample(range(slots), slots))
    mixtures = []
    for shown, slot in ((memory, order), (permuted(memory, order), torch.arange(slots))):
        encoded = vma.encode(shown)
        template = encoded.read(slot)
        p_z: Any = vma.latent_prior(template)
        p_x: Any = vma.likelihood(p_z.mean, template)
        mixtures.append((vma.address_prior(encoded).probs[..., slot], p_z.mean, p_z.variance, p_x.mean, p_x.variance))
    for one, two in zip(*mixtures, strict=True):
        close(one, two)


# Slots that are not in use, and slots that are there twice


@pytest.mark.parametrize(("prior", "guide"), [*zip(PRIORS, [*GUIDES, *GUIDES], strict=False)])
@FIXED
@given(SLOTS, TARGETS, SEEDS, st.lists(st.booleans(), min_size=7, max_size=7))
def test_a_masked_slot_is_an_absent_one(
    prior: str, guide: str, slots: int, targets: int, seed: int, flags: list[bool]
) -> None:
    vma = model(seed, address_prior=PRIORS[prior](), address_guide=GUIDES[guide]())
    whole, x = draw_memory(slots, targets, seed)
    used = torch.tensor([True, *flags][:slots])
    masked, absent = pv.Memory(whole.templates, whole.labels, mask=used), permuted(whole, used.nonzero()[:, 0])
    for distribution in (
        lambda m: vma.address_prior(vma.encode(m)),
        lambda m: vma.address_guide(vma.encode(m), vma.encode_x(x)),
    ):
        probs, expected = distribution(masked).probs, distribution(absent).probs
        close(probs[..., used], expected)
        assert bool((probs[..., ~used] == 0).all())
    exact = reference(seed)
    close(exact.log_evidence(masked, x), exact.log_evidence(absent, x))


@FIXED
@given(SLOTS, TARGETS, SEEDS, st.data())
def test_a_slot_twice_shifts_the_evidence_as_the_formula_says(slots: int, targets: int, seed: int, data: Any) -> None:
    r"""p(x | M + copy of m_j) = (S p(x | M) + p(x | m_j)) / (S + 1), under a uniform prior."""
    exact, (memory, x) = reference(seed), draw_memory(slots, targets, seed)
    twice = data.draw(st.integers(0, slots - 1))
    more = pv.Memory(torch.cat([memory.templates, memory.templates[twice : twice + 1]]))
    terms = torch.stack([exact.log_evidence(memory, x) + math.log(slots), exact.slot_log_evidence(memory, x)[:, twice]])
    expected = terms.logsumexp(0) - math.log(slots + 1)
    close(exact.log_evidence(more, x), expected)
    close(log_evidence(exact.vma(exact=True), more, x, slots + 1), expected)


@FIXED
@given(st.integers(1, 50), st.floats(0.0, 200.0), SEEDS)
def test_information_gain_is_between_nothing_and_the_number_of_slots(slots: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, slots, generator=generator, dtype=torch.float64)
    uniform = torch.zeros(slots, dtype=torch.float64)
    gain = information_gain(logits, uniform)
    assert bool(((gain >= -1e-9) & (gain <= math.log(slots) + 1e-9)).all())
    certain = torch.full((slots,), -1e4, dtype=torch.float64)
    certain[seed % slots] = 0.0
    close(information_gain(certain, uniform), torch.tensor(math.log(slots), dtype=torch.float64))
    close(information_gain(uniform + scale, uniform), torch.tensor(0.0, dtype=torch.float64))


# What is written comes back

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@FIXED
@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)), max_size=4),
    st.dictionaries(st.text(max_size=8), PLAIN, max_size=4),
    SEEDS,
)
def test_a_checkpoint_comes_back(shapes: dict[str, Any], data: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    tensors = {name: (20 * torch.randn(shape)).to(dtype) for name, (dtype, shape) in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "a"), tensors, data)
        read, plain = load_checkpoint(Path(folder, "a"))
    assert plain == data
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())


@FIXED
@given(
    st.sampled_from(sorted(PRIORS)),
    st.sampled_from(sorted(GUIDES)),
    st.none() | st.integers(1, 3),
    st.integers(1, 6),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    SEEDS,
)
def test_a_model_comes_back(
    prior: str, guide: str, truncate: int | None, latent_dim: int, hidden: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    q: pv.AddressGuide = GUIDES[guide]()
    vma = pv.VMA.for_vectors(
        3,
        latent_dim,
        num_features=5,
        hidden=tuple(hidden),
        address_prior=PRIORS[prior](),
        address_guide=q if truncate is None else pv.TruncatedGuide(q, k=truncate),
    )
    again = pv.build(json.loads(json.dumps(vma.spec())))
    assert again.spec() == vma.spec()
    assert repr(again) == repr(vma)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "best.safetensors"), vma.state_dict(), {"spec": vma.spec()})
        loaded = pv.load(folder)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in vma.state_dict().items())


# Samplers


def numbered(sizes: list[int]) -> FewShotDataset:
    """Drawings that are their own number, so that one can be recognised; turned pictures too."""
    total = sum(sizes)
    images = torch.arange(total, dtype=torch.float32)[:, None, None, None].expand(total, 1, 2, 2).clone()
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return FewShotDataset(images, classes, alphabets=torch.arange(len(sizes)) % 3)


def ids(values: Tensor) -> list[int]:
    return [int(value) for value in values.flatten(1)[:, 0]]


@FIXED
@given(
    st.lists(st.integers(2, 6), min_size=4, max_size=9),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**8),
    SEEDS,
)
def test_an_episode_never_shows_a_target(
    sizes: list[int], ways: int, rotate: bool, flip: bool, index: int, seed: int
) -> None:
    dataset = numbered(sizes)
    shots = 1 + seed % (min(sizes) - 1)
    episodes = EpisodeSampler(dataset, ways, shots, min(sizes) - shots, seed, rotate=rotate, flip=flip)
    episode = episodes[index]
    labels = episode.memory.labels
    assert labels is not None
    slots, targets = ids(episode.memory.templates), ids(episode.x)
    shown = list(zip(slots, labels.tolist(), strict=True)) + list(zip(targets, episode.labels.tolist(), strict=True))
    assert len(set(shown)) == len(shown)  # no picture twice, unless turned to be of another class
    assert not {*zip(slots, labels.tolist(), strict=True)} & {*zip(targets, episode.labels.tolist(), strict=True)}
    for number, label in shown:
        assert int(dataset.classes[number]) == label % len(sizes)
    assert torch.equal(labels.unique(), episode.labels.unique())
    assert torch.equal(episodes[index].x, episode.x)


@FIXED
@given(st.lists(st.integers(3, 6), min_size=6, max_size=12), st.sampled_from(["alphabet", "class"]), SEEDS)
def test_training_never_sees_a_test_class(sizes: list[int], by: Any, seed: int) -> None:
    dataset = numbered(sizes)
    train, test = dataset.split(by=by, test=0.3, seed=seed)
    assert sorted(train.class_names + test.class_names) == sorted(dataset.class_names)
    assert not set(train.class_names) & set(test.class_names)
    if by == "alphabet":
        assert not set(train.alphabet_names) & set(test.alphabet_names)
    assert sorted(ids(train.images) + ids(test.images)) == list(range(sum(sizes)))
    shown = EpisodeSampler(train, 2, 1, 1, seed)[seed % 10**9]
    held_out = set(ids(test.images))
    assert not held_out & {*ids(shown.memory.templates), *ids(shown.x)}


@pytest.mark.parametrize("name", sorted(name for name, protocol in PROTOCOLS.items() if not protocol.copies))
@settings(FIXED, max_examples=10)
@given(st.integers(0, 9), SEEDS)
def test_a_protocols_target_is_not_in_its_memory(name: str, index: int, seed: int) -> None:
    dataset = numbered([20] * 45)
    shots = {"vma-45-5": 1}.get(name, 2)
    cell = {"vma-45-5": (45, 45 * 5), "whole-memory": (45, 45 * 5)}.get(name, (1, shots))
    episode = PROTOCOLS[name].episodes(dataset, *cell, seed=seed)[index]
    assert not set(ids(episode.memory.templates)) & set(ids(episode.x))
