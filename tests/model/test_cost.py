"""With a sparse guide, what is computed per target does not grow with the slots: elements are counted, not seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import pyro_vmem as pv
from pyro_vmem import Memory, PackedMemory
from pyro_vmem.data import Episode
from pyro_vmem.memory.index import Hits
from pyro_vmem.train import validate

S, B, X, K = 100_000, 32, 8, 4


class Counted(TorchDispatchMode):
    """The most elements of any tensor that takes memory of its own, and the functions that were called on slots."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.on_slots = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if any(isinstance(value, Tensor) and value.numel() >= S for value in args):
            self.on_slots.add(func._schema.name)
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def binary(*shape: int) -> Tensor:
    return (torch.rand(shape) > 0.5).float()


def case(defensive: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[pv.VMA, PackedMemory, Tensor]:
    guide: pv.AddressGuide = pv.IndexedGuide(pv.SimilarityGuide(X, 4), k=K)
    guide = pv.DefensiveGuide(guide) if defensive else guide
    vma = pv.VMA.for_vectors(X, num_features=X, hidden=(8,), address_guide=guide)
    memory = PackedMemory.pack(binary(S, X), labels=torch.arange(S) % 7)
    memory.index = pv.memory.ExactIndex(torch.randn(S, 4))

    def found(queries: Tensor, k: int) -> Hits:  # an exact search holds the scores of a block of keys
        slots = torch.randint(S // k, (len(queries), k)) * k + torch.arange(k)
        return Hits(torch.randn(len(queries), k).sort(descending=True).values, slots)

    monkeypatch.setattr(memory.index, "_search", found)
    return vma, memory, binary(B, X)


class One(torch.utils.data.Dataset[Episode]):
    def __init__(self, memory: Memory, x: Tensor) -> None:
        self.episode = Episode(memory, x, torch.zeros(len(x), dtype=torch.long))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Episode:
        return self.episode


def step(elbo: Any) -> Callable[[pv.VMA, Memory, Tensor], Any]:
    return lambda vma, memory, x: elbo.differentiable_loss(vma.model, vma.guide, vma.encode(memory), x).backward()


ASKED: dict[str, Callable[[pv.VMA, Memory, Tensor], Any]] = {
    "VIMCO": step(pv.infer.VIMCO_ELBO(2)),
    "RWS": step(pv.infer.RWS_ELBO(2)),
    "RWS, mixed": step(pv.infer.RWS_ELBO(2, defensive=0.2)),
    "RWS, mixed with the best": step(pv.infer.RWS_ELBO(2, defensive=0.2, top=3)),
    "Reinforce": step(pv.infer.Reinforce_ELBO(2)),
    "RaoBlackwell": step(pv.infer.RaoBlackwell_ELBO(2)),
    "validate": lambda vma, memory, x: validate(vma, One(memory, x), num_particles=2),
    "classify": lambda vma, memory, x: vma.classify(memory, x),
    "complete": lambda vma, memory, x: vma.complete(memory, x, torch.arange(X) < 4, num_particles=8, rounds=1),
    "generate": lambda vma, memory, x: vma.generate(memory, len(x)),
}


@pytest.mark.parametrize("defensive", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_nothing_of_the_size_of_targets_times_slots_is_made(
    name: str, defensive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vma, memory, x = case(defensive, monkeypatch)
    counted = Counted()
    with counted:
        ASKED[name](vma, memory, x)
    # What is mixed with a prior is summed over all slots, or its best are looked for: a few numbers per slot.
    dense = defensive or name == "RWS, mixed"
    assert counted.elements <= (4 * S if dense else S // 10), counted.elements / S


def test_labels_are_sorted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vma, memory, x = case(False, monkeypatch)
    first = vma.classify(memory, x)
    with (counted := Counted()):
        vma.classify(memory, x)
    assert not {name for name in counted.on_slots if "unique" in name or "sort" in name}
    assert memory.labels is not None
    memory.labels[memory.labels == 3] = 30  # which is seen
    assert vma.classify(memory, x).shape == first.shape
    assert memory.by_class(torch.full((S,), 1 / S)).argmin() != 3
    assert "7 classes" in repr(memory)
    memory.labels.fill_(5)
    assert vma.classify(memory, x).shape == (B, 1)
