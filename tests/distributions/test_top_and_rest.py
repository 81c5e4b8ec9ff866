"""The most probable slots of a sparse guide summed and the others sampled: as of a dense one, at the price of few."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import Discrete, discrete_case, estimates, exact_elbo, gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import pyro_vmem as pv
from pyro_vmem.distributions import MixedCategorical, SparseCategorical, TruncatedCategorical
from pyro_vmem.distributions.sparse_categorical import top_and_rest
from pyro_vmem.infer import RaoBlackwell_ELBO
from pyro_vmem.memory import Hits
from pyro_vmem.testing import assert_unbiased

S, B, KEPT = 9, 6, 4
KINDS = ["truncated", "shared rest", "rest of each row", "rest with masked slots", "likely rest"]


def sparse(kind: str) -> dist.Categorical:
    """A sparse categorical over few values, so that it can be compared with a dense one."""
    support = torch.stack([torch.randperm(S)[:KEPT] for _ in range(B)])
    kept = TruncatedCategorical(torch.randn(B, KEPT), support, S)
    if kind == "truncated":
        return kept
    rest = torch.randn(B, S) if kind == "rest of each row" else torch.randn(S)
    if kind == "rest with masked slots":
        rest = rest.index_fill(0, torch.tensor([2, 5]), -1e4)
    return MixedCategorical(kept, dist.Categorical(logits=rest), 0.9 if kind == "likely rest" else 0.3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3])
def test_they_are_those_of_the_dense_distribution(kind: str, k: int) -> None:
    q, copies = sparse(kind), 20_000
    dense = dist.Categorical(logits=q.logits)
    assert torch.equal(top_and_rest(q, k)[:-1], top_and_rest(dense, k)[:-1])
    top = dense.probs.topk(k).indices
    assert torch.equal(top_and_rest(q, k)[:-1], top.T)
    rest = dense.probs.scatter(-1, top, 0.0)
    conditional = rest / rest.sum(-1, keepdim=True)
    for categorical in (q, dense):
        drawn = torch.stack([top_and_rest(categorical.expand((200, B)), k)[-1] for _ in range(copies // 200)]).flatten(
            0, 1
        )
        assert_unbiased(torch.nn.functional.one_hot(drawn, S).double(), conditional)


@pytest.mark.parametrize("share", [0.1, 0.7])
@pytest.mark.parametrize("defensive", [False, True])
def test_mixtures_are_those_of_the_dense_distribution(defensive: bool, share: float, float64: None) -> None:
    values, slots = torch.tensor([[3, 0, 4], [1, 2, 5]]), 7
    q: SparseCategorical = TruncatedCategorical(torch.randn(2, 3), values, slots)
    if defensive:
        q = q.mixed_with(dist.Categorical(logits=torch.randn(slots)), 0.3)
    other = dist.Categorical(logits=torch.randn(slots))
    torch.testing.assert_close(q.mixed_with(other, share).probs, (1 - share) * q.probs + share * other.probs)
    for k in (1, 2, 3, 9):
        kept = q.kept if isinstance(q, MixedCategorical) else q
        best = torch.zeros(2, slots).scatter(-1, kept.probs.topk(min(k, 3), -1).indices, 1 / min(k, 3))
        mixed = q.mixed_with_its_top(k, share)
        torch.testing.assert_close(mixed.probs, (1 - share) * q.probs + share * best)
        assert torch.equal(mixed.kept_values, values)
        torch.testing.assert_close(mixed.log_prob(values.mT).mT, mixed.logits.gather(-1, values))


@pytest.mark.usefixtures("float64")
def test_where_nothing_is_left() -> None:
    """All that is probable is in the sum: what is drawn has no weight, and is a value all the same."""
    kept = TruncatedCategorical(torch.tensor([0.0, -1e5]), torch.tensor([7, 3]), S)
    assert top_and_rest(kept, 1).tolist() == [7, 3]
    one = dist.Categorical(logits=torch.full((S,), -1e4).index_fill(0, torch.tensor([7]), 0.0))
    drawn = top_and_rest(MixedCategorical(kept, one, 0.5), 1)
    assert drawn[0] == 7
    assert 0 <= drawn[1] < S


class SparseDiscrete(Discrete):
    """The small model with a guide that keeps two values of three, mixed with the model's own prior or not."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def q_of_k(self, x: Tensor) -> dist.Categorical:
        top = self.q_k[(x > 0).long()].topk(2)
        kept = TruncatedCategorical(top.values, top.indices, 3)
        return MixedCategorical(kept, dist.Categorical(logits=self.p_k), self.share) if self.share else kept

    def guide(self, x: Tensor) -> None:
        pyro.module("discrete", self)
        with self.plate(x):
            k = pyro.sample("k", self.q_of_k(x))
            pyro.sample("j", dist.Categorical(logits=self.q_j[(x > 0).long(), k]))

    def states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        side = (x > 0).long()
        log_q = self.q_of_k(x).logits.unsqueeze(-1) + self.q_j.log_softmax(-1)[side]
        log_p = self.p_k.log_softmax(-1).unsqueeze(-1) + self.p_j.log_softmax(-1)
        log_x = dist.Normal(self.mean, 0.7).log_prob(x[:, None, None])
        return (log_p + log_x - log_q).flatten(1).T, log_q.flatten(1).T


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("share", "k"), [(0.0, 1), (0.4, 1), (0.4, 2)])
def test_the_bound_and_its_gradient_are_those_of_the_sum_over_all(share: float, k: int) -> None:
    _, x, _ = discrete_case()
    toy = SparseDiscrete(share)
    parameters = list(toy.parameters())
    value = exact_elbo(*toy.states(x)).sum()
    exact, copies = gradients(-value, parameters), 2000
    elbo = RaoBlackwell_ELBO(k, site="k")
    samples = estimates(elbo, toy.model, toy.guide, [x.repeat(copies)], parameters, copies, 40)
    assert_unbiased(samples, exact, resolution=0.05)
    values = torch.tensor([elbo.loss(toy.model, toy.guide, x.repeat(500)) / 500 for _ in range(40)])
    assert_unbiased(values, -value.detach(), resolution=0.02)


def test_more_than_is_kept_cannot_be_summed() -> None:
    toy, (_, x, _) = SparseDiscrete(0.0), discrete_case()
    with pytest.raises(ValueError, match=r"k: expected fewer than the 2 values of site 'k', got 2\. To sum all"):
        RaoBlackwell_ELBO(2, site="k").loss(toy.model, toy.guide, x.float())


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("full", [False, True])
def test_a_step_makes_nothing_of_the_size_of_targets_times_slots(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, x = 100_000, (torch.rand(B, 8) > 0.5).float()
    guide: pv.AddressGuide = pv.IndexedGuide(pv.SimilarityGuide(8, 4), k=KEPT)
    vma = pv.VMA.for_vectors(8, num_features=8, hidden=(8,), address_guide=pv.DefensiveGuide(guide) if full else guide)
    memory = pv.PackedMemory.pack((torch.rand(slots, 8) > 0.5).float())
    memory.index = pv.memory.ExactIndex(torch.randn(slots, 4))
    found = torch.randint(slots // KEPT, (B, KEPT)) * KEPT + torch.arange(KEPT)  # an exact search holds many scores
    monkeypatch.setattr(memory.index, "_search", lambda queries, k: Hits(torch.randn(B, k), found[:, :k]))
    largest = Largest()
    with largest:
        RaoBlackwell_ELBO(2).differentiable_loss(vma.model, vma.guide, vma.encode(memory), x).backward()
    # The prior of a mixture is summed over all slots, once.
    assert largest.bytes < (4 * slots * B // 2 if full else 4 * slots // 10)
