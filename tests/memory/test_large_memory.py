"""Memories that are too large to be looked through: packed templates, encoded as they are read, found by an index."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vmem as pv
import pyro_vmem.memory.packed
from pyro_vmem.distributions import MixedCategorical, TruncatedCategorical
from pyro_vmem.model.indexing import slot_keys
from pyro_vmem.testing import assert_unbiased

EVENT, S, B, K = (1, 6, 5), 60, 7, 4
KINDS = ["exact"] + ["ivf"] * (importlib.util.find_spec("faiss") is not None)


def binary(*shape: int) -> Tensor:
    return (torch.rand(*shape) > 0.5).to(torch.get_default_dtype())


def model(**parts: Any) -> pv.VMA:
    """A small convolutional model whose guide looks in an index."""
    guide = pv.IndexedGuide(pv.SimilarityGuide(8, 4), k=K)
    return pv.VMA.for_images(EVENT, latent_dim=3, num_features=8, width=4, **({"address_guide": guide} | parts))


class Counting(torch.nn.Module):
    """An encoder that remembers how many templates it was given."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder, self.counts = encoder, [0]

    def forward(self, x: Tensor) -> pv.Template:
        self.counts.append(x.shape[:-3].numel())
        template: pv.Template = self.encoder(x)
        return template


# Packed


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("event", [(5,), (1, 6, 5), (3, 2, 2)])
@pytest.mark.parametrize("where", ["RAM", "file"])
def test_what_is_packed_is_read_again(bits: Any, event: tuple[int, ...], where: str, tmp_path: Path) -> None:
    templates = binary(S, *event) if bits == 1 else torch.randint(256, (S, *event)) / 255
    path = tmp_path / "templates.npy" if where == "file" else None
    packed = pv.PackedMemory.pack(templates.split(25), bits, torch.arange(S), path)  # some at a time
    plain = pv.Memory(templates, torch.arange(S))
    assert (packed.num_slots, packed.event_shape, packed.batch_shape) == (S, event, ())
    assert (packed.dtype, packed.device) == (plain.dtype, plain.device)
    for leading in [(), (7,), (5, 7), (3, 1, 7)]:
        a = torch.randint(S, leading)
        torch.testing.assert_close(packed.read(a), plain.read(a), rtol=0, atol=1e-6)
    torch.testing.assert_close(packed.templates, templates, rtol=0, atol=1e-6)
    added = packed.add(templates[:2].flip(0), torch.tensor([7, 8]))
    assert added.tolist() == [S, S + 1]
    torch.testing.assert_close(packed.read(torch.tensor([S, 3, S + 1])), templates[[1, 3, 0]], rtol=0, atol=1e-6)
    if path is not None:
        assert len(np.load(path)) == S
        again = pv.PackedMemory.open(path, event, bits)
        torch.testing.assert_close(again.templates, templates, rtol=0, atol=1e-6)


def test_grey_levels_are_rounded_to_the_nearest() -> None:
    templates = torch.rand(S, 3)
    assert (pv.PackedMemory.pack(templates, bits=8).templates - templates).abs().max() <= 0.5 / 255 + 1e-6


def test_bits_are_those_of_numpy() -> None:
    templates = binary(S, *EVENT)
    expected = np.packbits(templates.numpy().reshape(S, -1).astype(np.uint8), axis=1)
    assert torch.equal(pv.PackedMemory.pack(templates).packed, torch.from_numpy(expected))


def test_a_file_larger_than_the_ram_can_be_read(tmp_path: Path) -> None:
    path, rows = tmp_path / "large.npy", 4_000_000_000
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (rows, 98)})
        begin = file.tell()
        file.truncate(begin + rows * 98)  # 392 GB, none of which is there
        file.seek(begin + (rows - 1) * 98)
        file.write(bytes([255] * 98))
    memory = pv.PackedMemory.open(path, (1, 28, 28))
    read = memory.read(torch.tensor([0, rows // 2, rows - 1]))
    assert read.mean((1, 2, 3)).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"would decode all 4,000,000,000 templates, 12544\.0 GB"):
        memory.templates  # noqa: B018  # a property that refuses


def test_a_memory_moves_without_its_templates() -> None:
    memory = pv.PackedMemory.pack(binary(S, 3), labels=torch.arange(S))
    moved = memory.to(torch.float64)
    assert isinstance(moved, pv.PackedMemory)
    assert (moved.dtype, moved.packed is memory.packed, moved.labels is not None) == (torch.float64, True, True)
    assert moved.read(torch.tensor([1])).dtype == torch.float64
    assert model().encode(pv.PackedMemory.pack(binary(S, *EVENT))).to(torch.float64).dtype == torch.float64


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "values between": (lambda: pv.PackedMemory.pack(torch.full((2, 3), 0.5)), "binary values.* Use bits=8"),
    "values beyond": (lambda: pv.PackedMemory.pack(torch.full((2, 3), 2.0), bits=8), r"values in \[0, 1\]"),
    "no templates": (lambda: pv.PackedMemory.pack([]), "templates: expected at least one"),
    "batches that differ": (lambda: pv.PackedMemory.pack([binary(2, 3), binary(2, 4)]), r"\(n, 3\), got .*\(2, 4\)"),
    "bits there are not": (lambda: pv.PackedMemory.pack(binary(2, 3), bits=2), "bits: expected 1 or 8, got 2"),  # type: ignore[arg-type]
    "another event": (lambda: pv.PackedMemory(torch.zeros(3, 2, dtype=torch.uint8), (17,)), r"packed: .*\(S, 3\)"),
    "labels of others": (
        lambda: pv.PackedMemory.pack(binary(2, 3), labels=torch.arange(3)),
        r"labels: expected a tensor of dtype Integer and shape \(S\) .*, got .*\(3,\).*where packed has shape \(2, 1\)",
    ),
    "no labels to add": (
        lambda: pv.PackedMemory.pack(binary(2, 3)).add(binary(1, 3), torch.arange(1)),
        "labels: .*none",
    ),
    "labels left out": (
        lambda: pv.PackedMemory.pack(binary(2, 3), labels=torch.arange(2)).add(binary(1, 3)),
        r"labels: expected one a template, got none",
    ),
    "no slot left": (
        lambda: pv.PackedMemory.pack(binary(2, 3)).remove(torch.arange(2)),
        "slots: no slot would be left",
    ),
    "no keys": (
        lambda: pv.model.index_memory(
            model(address_guide=pv.PairwiseGuide(8)), pv.PackedMemory.pack(binary(2, *EVENT))
        ),
        r"has no keys to search. Use IndexedGuide",
    ),
    "no index to refresh": (
        lambda: pv.model.KeyRefresher(model(), pv.PackedMemory.pack(binary(2, *EVENT))),
        r"memory: it has no index. Make one with index_memory",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str) -> None:
    call, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_address_that_is_no_slot_is_refused() -> None:
    with pytest.raises(IndexError, match=r"a: expected addresses in 0\.\.4, got 5"):
        pv.PackedMemory.pack(binary(5, 3)).read(torch.tensor([5]))


# Encoded as it is read


def test_reads_are_those_of_a_memory_encoded_as_a_whole() -> None:
    vma, templates = model(), binary(S, *EVENT)
    lazy, whole = vma.encode(pv.PackedMemory.pack(templates)), vma.encode(pv.Memory(templates))
    assert lazy.is_lazy
    for leading in [(), (7,), (5, 7), (3, 1, 7)]:
        a = torch.randint(S, leading)
        one, other = lazy.read(a), whole.read(a)
        for ours, theirs in zip(
            (one.raw, one.features, *one.maps), (other.raw, other.features, *other.maps), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(lazy.features, whole.features)


def test_what_was_read_without_gradient_is_encoded_again() -> None:
    lazy, a = model().encode(pv.PackedMemory.pack(binary(S, *EVENT))), torch.tensor([1, 2])
    with torch.no_grad():
        lazy.read(a)
    assert lazy.read(a).features.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert lazy.read(a).features.dtype == torch.bfloat16
    assert lazy.read(a).features.dtype == torch.float32


@pytest.mark.parametrize("few", [False, True], ids=["enumerated", "backward through one"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_encodes_what_was_chosen_once(kind: Any, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyro_vmem.memory.packed, "MOST_AT_ONCE", 0)  # nothing may ask for all
    vma, memory = model(), pv.PackedMemory.pack(binary(20 * S, *EVENT))
    pv.model.index_memory(vma, memory, kind)
    counting = Counting(vma.template_encoder)
    encoded, x = pv.EncodedMemory(memory, counting), binary(B, *EVENT)
    guide = vma.guide if few else config_enumerate(vma.guide, "parallel", expand=True)
    elbo = pv.infer.VIMCO_ELBO(4, max_plate_nesting=1, backward=1) if few else TraceEnum_ELBO(max_plate_nesting=1)
    SVI(vma.model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(encoded, x)
    assert K <= sum(counting.counts) <= B * K


def test_a_guide_that_looks_at_all_is_refused() -> None:
    vma = model(address_guide=pv.SimilarityGuide(8))
    large = pv.PackedMemory(torch.zeros(300_000_000, 4, dtype=torch.uint8), EVENT)
    with pytest.raises(ValueError, match="Use parts that read few slots, IndexedGuide and UniformPrior"):
        vma.guide(large, binary(B, *EVENT))


# Found by an index


@pytest.mark.parametrize(
    "make", [lambda: pv.SimilarityGuide(8, 4), lambda: pv.SimilarityGuide(8, 4, "memory", 0.5, False)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_the_exact_top_k(
    make: Callable[[], pv.SimilarityGuide], masked: bool, float64: None
) -> None:
    templates, x, mask = binary(S, *EVENT), binary(B, *EVENT), None
    if masked:
        mask = torch.rand(S) > 0.4
    inner = make()
    exact = model(address_guide=pv.TruncatedGuide(inner, k=K))
    indexed = copy.deepcopy(exact)
    indexed.address_guide = pv.IndexedGuide(copy.deepcopy(inner), k=K)
    packed = pv.PackedMemory.pack(templates)
    packed.mask = mask
    pv.model.index_memory(indexed, packed)
    found = []
    for vma, memory in ((exact, pv.Memory(templates, mask=mask)), (indexed, packed)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = config_enumerate(vma.guide, "parallel", expand=True)
        loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vma.model, guide, vma.encode(memory), x)
        found.append([loss, *torch.autograd.grad(loss, list(vma.parameters()))])
    assert len(found[0]) > 20
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_old_keys_choose_and_fresh_ones_score() -> None:
    vma, memory, x = model(), pv.PackedMemory.pack(binary(S, *EVENT)), binary(B, *EVENT)
    index = pv.model.index_memory(vma, memory)
    index.update(torch.arange(S), torch.randn_like(index.keys))  # keys of nothing
    q = vma.address_guide(vma.encode(memory), vma.encode_x(x))
    queries = vma.address_guide.inner.queries(vma.encode_x(x).features)
    assert torch.equal(q.kept_values, index.search(queries, K).slots)
    scores = vma.address_guide.inner(vma.encode(memory), vma.encode_x(x)).logits.gather(-1, q.kept_values)
    torch.testing.assert_close(q.kept_logits, scores.log_softmax(-1))


def sparse(share: float | None, rows: tuple[int, ...] = (B,)) -> tuple[dist.Categorical, dist.Categorical]:
    """A sparse distribution, and a prior over the same values."""
    support = torch.stack([torch.randperm(9)[:3] for _ in range(torch.Size(rows).numel())]).reshape(*rows, 3)
    q: dist.Categorical = TruncatedCategorical(torch.randn(*rows, 3), support, 9)
    if share is not None:
        q = MixedCategorical(q, dist.Categorical(logits=torch.randn(9)), share)  # type: ignore[arg-type]
    return q, dist.Categorical(logits=torch.randn(9))


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("batch", [(B,), (2, B)])
def test_sparse_distributions_are_those_of_their_logits(
    share: float | None, batch: tuple[int, ...], float64: None
) -> None:
    q, p = sparse(share)
    q, p = q.expand(batch), p.expand(batch)
    dense = dist.Categorical(logits=q.logits)
    torch.testing.assert_close(q.probs.sum(-1), torch.ones(batch))
    values = torch.arange(9).reshape(9, *[1] * len(batch))
    torch.testing.assert_close(q.log_prob(values).exp(), dense.log_prob(values).exp())
    torch.testing.assert_close(q.entropy(), dense.entropy())
    torch.testing.assert_close(kl_divergence(q, p), pv.diagnostics.information_gain(q.logits, p.logits))
    draws = q.sample((4000,))
    assert draws.shape == (4000, *batch)
    assert_unbiased(torch.nn.functional.one_hot(draws, 9).to(torch.float64), dense.probs)
    assert (q.log_prob(values).min() > -20) == (share is not None)


@pytest.mark.parametrize("objective", ["vimco", "rao-blackwell", "enumerate"])
def test_it_trains(objective: Any) -> None:
    vma = model()
    memory = pv.PackedMemory.pack(binary(S, *EVENT), labels=torch.arange(S))
    pv.model.index_memory(vma, memory)
    episodes = [pv.data.Episode(memory, binary(B, *EVENT), torch.randint(S, (B,))) for _ in range(3)]
    before = [p.detach().clone() for p in vma.parameters()]
    assert pv.fit(vma, episodes, objective, steps=3, progress=False).steps == 3  # type: ignore[arg-type]
    assert all(not torch.equal(old, new) for old, new in zip(before, vma.parameters(), strict=True))


def test_it_trains_with_full_support() -> None:
    guide = pv.DefensiveGuide(pv.IndexedGuide(pv.SimilarityGuide(8, 4), k=2), share=0.5)
    vma, memory = model(address_guide=guide), pv.PackedMemory.pack(binary(S, *EVENT))
    pv.model.index_memory(vma, memory)
    terms = pv.infer.VIMCO_ELBO(40).terms(vma.model, vma.guide, vma.encode(memory), binary(B, *EVENT))
    drawn = terms.particles.log_guide["a"]
    assert (drawn > -2.0).any()
    torch.testing.assert_close(drawn.min(), torch.tensor(0.5 / S).log())


# Slots come and go


@pytest.mark.parametrize("kind", KINDS)
def test_templates_come_and_go_without_retraining(kind: Any, float64: None) -> None:
    vma = pv.VMA.for_vectors(30, address_guide=pv.IndexedGuide(pv.SimilarityGuide(64, temperature=1e-6), k=K))
    templates = binary(S, 30)
    memory = pv.PackedMemory.pack(templates, labels=torch.zeros(S, dtype=torch.long))
    pv.model.index_memory(vma, memory, kind, effort=None if kind == "exact" else 1000)
    x = binary(3, 30)
    weights = [p.detach().clone() for p in vma.parameters()]
    slots = pv.model.add_templates(vma, memory, x, torch.tensor([1, 2, 3]))
    assert slots.tolist() == [S, S + 1, S + 2]
    assert all(torch.equal(old, new) for old, new in zip(weights, vma.parameters(), strict=True))

    def top() -> list[int]:
        with torch.no_grad():
            q = vma.address_guide(vma.encode(memory), vma.encode_x(x))
        return q.kept_values.gather(-1, q.kept_logits.argmax(-1, keepdim=True)).squeeze(-1).tolist()

    assert top() == slots.tolist()
    assert vma.classify(memory, x).argmax(-1).tolist() == [1, 2, 3]
    assert vma.generate(memory, 5).shape == (5, 30)
    memory.remove(slots[1:2])
    assert top()[0::2] == slots[0::2].tolist()
    assert top()[1] < S
    assert vma.address_prior(vma.encode(memory)).probs[S + 1] == 0
    assert "62 of 63 in use" in repr(memory)


# Keys grow old


def test_staleness_is_what_fresh_keys_would_find() -> None:
    vma, templates, x = model(), binary(S, *EVENT), binary(B, *EVENT)
    memory, k = pv.PackedMemory.pack(templates), 5
    index = pv.model.index_memory(vma, memory)
    assert pv.model.staleness(vma, memory, x, k).overlap.tolist() == [1.0] * B
    with torch.no_grad():
        for p in vma.parameters():
            p.add_(0.05 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0.0)
    found = pv.model.staleness(vma, memory, x, k, sample=None)
    queries = vma.address_guide.inner.queries(vma.encode_x(x).features)
    old = (queries @ index.keys.mT).topk(k).indices
    logits = vma.address_guide.inner(vma.encode(pv.Memory(templates)), vma.encode_x(x)).logits
    new = logits.topk(k).indices
    overlap = [len(set(a) & set(b)) / k for a, b in zip(old.tolist(), new.tolist(), strict=True)]
    assert found.overlap.tolist() == pytest.approx(overlap)
    assert 0 < sum(overlap) / B < 1
    probs = logits.softmax(-1)
    missed = 1 - probs.gather(-1, old).sum(-1) / probs.gather(-1, new).sum(-1)
    torch.testing.assert_close(found.missed, missed, atol=1e-5, rtol=1e-4)
    assert found.drift > 0.01
    assert found.num_slots == S
    assert pv.model.staleness(vma, memory, x, k, sample=20).num_slots == 20


@pytest.mark.parametrize("kind", KINDS)
def test_refreshing_in_turn_leaves_no_old_key(kind: Any) -> None:
    vma, memory, x = model(), pv.PackedMemory.pack(binary(S, *EVENT)), binary(B, *EVENT)
    index = pv.model.index_memory(vma, memory, kind)
    refresher = pv.model.KeyRefresher(vma, memory, slots_a_step=25)
    with torch.no_grad():
        vma.address_guide.inner.embed_memory.weight.normal_()
    drifts = [refresher.step() for _ in range(4)]
    assert min(drifts[:3]) > 0.05
    assert drifts[3] < drifts[0] / 2  # all but 15 of these for the second time
    torch.testing.assert_close(index.keys, slot_keys(vma, memory).to(index.keys))
    assert pv.model.staleness(vma, memory, x).drift < 1e-6
    with torch.no_grad():
        vma.address_guide.inner.embed_memory.weight.normal_()
    assert refresher.refresh() > 0.05
    assert pv.model.staleness(vma, memory, x).drift < 1e-6
