"""Evidence and information with an index: against the sum over all slots, which the reference model knows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_vmem as pv
import pyro_vmem.memory.packed
from pyro_vmem.diagnostics import diagnose, estimate_evidence, information_gain
from pyro_vmem.diagnostics.evidence_indexed import draw_others, top_k_bounds
from pyro_vmem.testing import assert_unbiased

S, B, K, DIM = 300, 6, 8, 3


class Keyed(pv.parts.KeyedGuide):
    """The exact address posterior of the reference model under a uniform prior, as an inner product."""

    def __init__(self, reference: pv.LinearGaussianMemory, sharpness: float = 1.0) -> None:
        super().__init__()
        self.reference, self.sharpness = reference, sharpness
        scaled = reference.loading * reference.latent_log_scale.exp()
        covariance = scaled @ scaled.mT + (2 * reference.log_noise).exp() * torch.eye(DIM)
        self.white = torch.linalg.inv(torch.linalg.cholesky(covariance)).detach()

    def keys(self, features: Tensor) -> Tensor:
        r = self.reference
        mean = (r.latent_mean(features) @ r.loading.mT + features @ r.skip.mT + r.offset) @ self.white.mT
        return torch.cat([mean, -mean.square().sum(-1, keepdim=True) / 2], -1)

    def queries(self, features: Tensor) -> Tensor:
        return self.sharpness * torch.cat([features @ self.white.mT, torch.ones_like(features[..., :1])], -1)


def setting(
    sharpness: float = 1.0, share: float | None = None
) -> tuple[Any, pv.VMA, pv.PackedMemory, pv.Memory, Tensor]:
    """The reference model, it with an index, its memory packed and not, and targets."""
    reference = (
        pv.LinearGaussianMemory(DIM, noise=0.1, generator=torch.Generator().manual_seed(0))
        .double()
        .requires_grad_(False)
    )
    guide: pv.AddressGuide = pv.IndexedGuide(Keyed(reference, sharpness), k=K)
    vma = reference.vma(address_guide=guide if share is None else pv.DefensiveGuide(guide, share))
    labels = torch.arange(S) % 5
    packed = pv.PackedMemory.pack(torch.rand(S, DIM), 8, labels)
    pv.model.index_memory(vma, packed)
    plain = pv.Memory(packed.templates, labels)
    return reference, vma, packed, plain, reference.vma().generate(plain, B)


def exact_gain(reference: Any, plain: pv.Memory, x: Tensor) -> Tensor:
    return information_gain(reference.address_posterior(plain, x).logits, torch.zeros(len(plain)))


def test_the_keyed_guide_is_exact(float64: None) -> None:
    reference, vma, packed, plain, x = setting()
    q = vma.address_guide(vma.encode(packed), vma.encode_x(x))
    top = reference.address_posterior(plain, x).logits.topk(K)
    assert torch.equal(q.kept_values, top.indices)
    torch.testing.assert_close(q.kept_logits, top.values.log_softmax(-1))


@pytest.mark.parametrize("method", ["top-k", "sampled"])
@pytest.mark.parametrize("share", [None, 0.3])
def test_evidence_is_that_of_all_slots(method: Any, share: float | None, float64: None) -> None:
    reference, vma, packed, plain, x = setting(share=share)
    truth = reference.log_evidence(plain, x).detach()
    found = estimate_evidence(vma, packed, x, 2000, method, budget=0, seed=0, warn=False)
    assert found.decodes == 2000 * B
    if method == "sampled" and share is None:  # what the guide excludes is left out
        top = reference.slot_log_evidence(plain, x).topk(K).values.logsumexp(-1) - math.log(S)
        torch.testing.assert_close(found.log_evidence, top)
        assert (top < truth - 1e-3).any()
    else:
        low, high = found.interval
        width = high - low  # three half widths: six targets at once are in all of their intervals too seldom
        assert found.unknown.logical_or((low - width < truth) & (truth < high + width)).all()
        assert ((found.log_evidence - truth).abs() < 0.5).all()


@pytest.mark.parametrize("sharpness", [1.0, -0.2])  # a guide that is right, and one that looks away
def test_evidence_is_unbiased_whatever_was_found(sharpness: float, float64: None) -> None:
    reference, vma, packed, plain, x = setting(sharpness)
    truth = reference.log_evidence(plain, x).detach()
    draws = torch.stack(
        [(pv.diagnostics.log_evidence(vma, packed, x, 60, "top-k", k=4) - truth).exp() for _ in range(150)]
    )
    assert_unbiased(draws, torch.ones(B))


@pytest.mark.parametrize("chosen", ["best", "any"])
@pytest.mark.parametrize("most", ["that of the rest", "of any density"])
def test_bounds_hold(chosen: str, most: str, float64: None) -> None:
    reference, _, _, plain, x = setting()
    log_likelihood, truth = reference.slot_log_evidence(plain, x), reference.log_evidence(plain, x)
    gain, widths = exact_gain(reference, plain, x), []
    for k in (1, 5, 40, 299):
        slots = log_likelihood.topk(k).indices if chosen == "best" else torch.stack([torch.randperm(S)[:k]] * B)
        rest = log_likelihood.scatter(-1, slots, -torch.inf).amax(-1)
        if most == "of any density":
            scaled = reference.loading * reference.latent_log_scale.exp()
            covariance = scaled @ scaled.mT + (2 * reference.log_noise).exp() * torch.eye(DIM)
            rest = -0.5 * torch.logdet(2 * math.pi * covariance).expand(B)
        log_prior = torch.full((k,), -math.log(S))
        bounds = top_k_bounds(log_likelihood.gather(-1, slots), log_prior, rest, log_prior[0])
        tiny = 1e-9
        assert (bounds["log_evidence_lower"] <= truth + tiny).all()
        assert (truth <= bounds["log_evidence_upper"] + tiny).all()
        assert (bounds["information_gain_exact_lower"] <= gain + tiny).all()
        assert (gain <= bounds["information_gain_exact_upper"] + tiny).all()
        widths.append(float((bounds["information_gain_exact_upper"] - bounds["information_gain_exact_lower"]).mean()))
    assert widths == sorted(widths, reverse=True) or chosen == "any"
    if most == "that of the rest":  # one slot is left, and bounded by itself
        torch.testing.assert_close(bounds["log_evidence_upper"], truth)


def test_bounds_are_one_where_nothing_is_left(float64: None) -> None:
    reference, _, _, plain, x = setting()
    log_likelihood, prior = reference.slot_log_evidence(plain, x), torch.full((S,), -math.log(S))
    bounds = top_k_bounds(log_likelihood, prior, torch.full((B,), -torch.inf), prior[0])
    for found in (bounds["log_evidence_lower"], bounds["log_evidence_upper"]):
        torch.testing.assert_close(found, reference.log_evidence(plain, x))
    for found in (bounds["information_gain_exact_lower"], bounds["information_gain_exact_upper"]):
        torch.testing.assert_close(found, exact_gain(reference, plain, x))


def test_a_slot_without_evidence_leaves_the_bounds_of_the_gain_as_they_are() -> None:
    evidence, prior = torch.tensor([[-1.0, -2.0, -torch.inf]]), torch.full((1, 3), -math.log(3))
    bounds = top_k_bounds(evidence, prior, torch.full((1,), -torch.inf), prior[0, 0])
    q = evidence.softmax(-1)[:, :2]
    expected = (q * q.log()).sum(-1) + math.log(3)
    for name in ("information_gain_exact_lower", "information_gain_exact_upper"):
        torch.testing.assert_close(bounds[name], expected)


@pytest.mark.parametrize("share", [None, 0.2])
def test_diagnose_is_what_all_slots_say(share: float | None, float64: None) -> None:
    pytest.importorskip("xarray")
    reference, vma, packed, plain, x = setting(share=share)
    q = vma.address_guide(vma.encode(packed), vma.encode_x(x))
    labels = packed.by_class(q.probs).argmax(-1) + (torch.arange(B) == 2)  # all right but one, which is another class
    found = diagnose(vma, packed, x, num_samples=300, per_slot=40, labels=labels)
    assert found.sizes == {"datapoint": B, "slot": K}
    whole = pv.diagnostics.information_gain(q.logits, torch.zeros(S))
    torch.testing.assert_close(torch.tensor(found.information_gain.values), whole)
    torch.testing.assert_close(torch.tensor(found.perplexity.values), q.entropy().exp())
    posterior = reference.address_posterior(plain, x)
    truth, gain = reference.log_evidence(plain, x), exact_gain(reference, plain, x)
    error, estimate = torch.tensor(found.log_evidence_se.values), torch.tensor(found.log_evidence.values)
    assert (error.isnan() | ((estimate - truth).abs() <= 4 * error + 1e-9)).all()
    assert not error.isnan().all()
    for name, value in (("log_evidence", truth), ("information_gain_exact", gain)):
        assert (torch.tensor(found[f"{name}_lower"].values) <= value + 1e-9).all()
        assert (value <= torch.tensor(found[f"{name}_upper"].values) + 1e-9).all()
    assert (found.rest_above == 0).all()  # the guide has the order right
    slots = torch.tensor(found.candidate.values)
    rest = 1 - posterior.probs.gather(-1, slots).sum(-1)
    torch.testing.assert_close(torch.tensor(found.rest_share.values), rest, rtol=0.6, atol=1e-3)
    torch.testing.assert_close(
        torch.tensor(found.address_exact.values), posterior.probs.gather(-1, slots), rtol=0.1, atol=1e-3
    )
    assert found.hit.values.tolist() == [True, True, False, True, True, True]
    assert bool((found.elbo <= found.log_evidence + 4 * found.elbo_se + 0.05).all())
    assert not [name for name in found.data_vars if not found[name].attrs["long_name"]]
    assert diagnose(vma, packed, x, per_slot=0).log_evidence.equals(diagnose(vma, packed, x, per_slot=0).log_evidence)


def test_a_slot_that_the_guide_missed_is_noticed(float64: None) -> None:
    pytest.importorskip("xarray")
    _, vma, packed, _, x = setting(sharpness=-0.2)
    found = diagnose(vma, packed, x, per_slot=40)
    assert (found.rest_above > 0.3).all()
    assert (found.rest_share > 0.9).all()


def test_nothing_reads_all_slots(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    pytest.importorskip("xarray")
    _, vma, packed, _, x = setting()
    monkeypatch.setattr(pyro_vmem.memory.packed, "MOST_AT_ONCE", 0)
    read: list[int] = []
    reading = pv.PackedMemory.read
    monkeypatch.setattr(pv.PackedMemory, "read", lambda self, a: (read.append(a.numel()), reading(self, a))[1])
    diagnose(vma, packed, x[:1], num_samples=10, per_slot=1)
    estimate_evidence(vma, packed, x[:1], 20, "top-k", warn=False)
    assert 0 < max(read) <= 20


def test_a_sum_over_all_slots_is_refused(float64: None) -> None:
    reference, vma, packed, _, x = setting()
    for method in ("exact-address", "refined"):
        with pytest.raises(ValueError, match=rf"'{method}' looks at each of 300 slots .* Use method='top-k'"):
            estimate_evidence(vma, packed, x, method=method)
    dense = vma.replace(address_guide=Keyed(reference))
    with pytest.raises(ValueError, match=r"does not say which slots it found\. With an index, use IndexedGuide"):
        estimate_evidence(dense, packed, x, 20, "top-k")


@pytest.mark.parametrize("in_use", [5, 8, 1])
def test_candidates_that_cover_all_slots_end(in_use: int, float64: None) -> None:
    """Nothing is left to be drawn, and the sum over the candidates is exact."""
    pytest.importorskip("xarray")
    reference = pv.LinearGaussianMemory(DIM, generator=torch.Generator().manual_seed(0)).double().requires_grad_(False)
    vma = reference.vma(address_guide=pv.IndexedGuide(Keyed(reference), k=K))
    packed = pv.PackedMemory.pack(torch.rand(8, DIM), 8, torch.arange(8))
    packed.mask = None if in_use == 8 else torch.arange(8) < in_use
    pv.model.index_memory(vma, packed)
    plain, x = pv.Memory(packed.templates[:in_use]), torch.rand(B, DIM)
    truth = reference.log_evidence(plain, x)
    found = estimate_evidence(vma, packed, x, 50, "top-k", k=K, seed=0, warn=False)
    torch.testing.assert_close(found.log_evidence, truth)
    dataset = diagnose(vma, packed, x, num_samples=30, per_slot=5)
    torch.testing.assert_close(torch.tensor(dataset.log_evidence.values), truth)
    torch.testing.assert_close(torch.tensor(dataset.log_evidence_upper.values), truth)
    assert (dataset.rest_share == 0).all()
    assert (dataset.rest_above == 0).all()


def test_others_are_drawn_as_the_prior_has_them() -> None:
    p = torch.distributions.Categorical(torch.tensor([0.1, 0.0, 0.2, 0.3, 0.4], dtype=torch.double))
    drawn, log_left = draw_others(p, torch.tensor([[4, 1], [0, 3], [2, 0]]), 40_000)
    left = torch.tensor([0.6, 0.6, 0.7], dtype=torch.double)
    torch.testing.assert_close(log_left, left.log())
    expected = p.probs.repeat(3, 1).scatter(-1, torch.tensor([[4, 1], [0, 3], [2, 0]]), 0.0) / left.unsqueeze(-1)
    shares = torch.stack([row.bincount(minlength=5) for row in drawn]) / 40_000
    assert (shares[expected == 0] == 0).all()
    assert ((shares - expected).abs() < 5 * (expected / 40_000).sqrt()).logical_or(expected == 0).all()
    assert draw_others(p, torch.tensor([[0, 2, 3, 4]]), 9)[1].tolist() == [-math.inf]
