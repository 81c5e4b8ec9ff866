"""A memory in Milvus: the same as a packed memory, in a file or behind a server, alone or with others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from milvus_engine import free_port, index_of, memory_of, names, needs_milvus, server, uri
from small_run import blobs, small_vma
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem.memory import ExactIndex, MilvusMemory
from pyro_vmem.model.indexing import slot_keys

pytestmark = needs_milvus
SETTINGS: dict[str, Any] = {"steps": 4, "progress": False, "precision": "float32", "validate_every": 2, "lr": 0.02}


def binary(*shape: int) -> Tensor:
    return (torch.rand(*shape) > 0.5).float()


# As other indexes and memories


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_an_index_finds_what_looking_at_all_keys_finds(data: st.DataObject) -> None:
    """Through additions, removals and updates in any order; whole numbers, so that no score is rounded."""
    numbers = st.lists(st.integers(-9, 9), min_size=2, max_size=2)
    keys = data.draw(st.lists(numbers, min_size=1, max_size=8))
    index, exact = (make(torch.tensor(keys).float()) for make in (index_of, ExactIndex))
    for what in data.draw(st.lists(st.sampled_from(["add", "remove", "update"]), max_size=6)):
        slot = data.draw(st.integers(0, exact.num_slots - 1))
        some = torch.tensor([data.draw(numbers)]).float()
        for one in (index, exact):
            if what == "add":
                one.add(some)
            elif what == "remove" and (len(one) > 1 or not bool(one.present[slot])):
                one.remove(torch.tensor([slot]))
            elif what == "update" and bool(one.present[slot]):
                one.update(torch.tensor([slot]), some)
    query, k = torch.tensor([data.draw(numbers)]).float(), data.draw(st.integers(1, 10))
    found, expected = index.search(query, k), exact.search(query, k)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(index.slots, exact.slots)
    slots = found.slots[found.slots >= 0]
    assert len(slots.unique()) == len(slots) == min(k, len(exact))
    assert torch.equal(exact.keys_of(slots) @ query[0], found.scores[found.slots >= 0])
    assert torch.equal(index.keys_of(exact.slots), exact.keys_of(exact.slots))


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("shape", [(5,), (1, 3, 4)])
def test_templates_are_read_as_from_a_packed_memory(bits: Any, shape: tuple[int, ...]) -> None:
    templates = binary(30, *shape) if bits == 1 else torch.rand(30, *shape)
    memory = MilvusMemory.create(uri(), next(names), shape, 3, bits, labelled=False)
    with pytest.raises(IndexError, match=r"a: expected addresses in 0\.\.-1"):
        memory.read(torch.tensor([0]))
    memory.add(templates, keys=torch.randn(30, 3))
    packed = pv.PackedMemory.pack(templates, bits)
    a = torch.randint(30, (4, 6))
    assert torch.equal(memory.read(a), packed.read(a))
    assert torch.equal(memory.templates, packed.templates)
    assert memory.to(torch.float64).read(a).dtype == torch.float64
    with pytest.raises(IndexError, match=r"a: expected addresses in 0\.\.29"):
        memory.read(torch.tensor([30]))


def test_slots_come_and_go_and_are_there_when_it_is_opened_again() -> None:
    templates, labels = binary(6, 8), torch.tensor([3, 3, 5, 5, 7, 7])
    memory = memory_of(templates, labels)
    memory.remove(torch.tensor([0, 4]))
    slots = memory.add(1 - templates[:2], torch.tensor([9, 9]), torch.randn(2, 3))
    assert (slots.tolist(), len(memory.index), memory.num_slots) == ([6, 7], 6, 8)
    assert memory.mask is not None
    assert memory.mask.tolist() == [False, True, True, True, False, True, True, True]
    keys = memory.index.keys_of(memory.index.slots)
    again = MilvusMemory(uri(), memory.index.collection.name)
    assert again.labels is not None
    assert (again.num_slots, again.mask, again.labels.tolist()) == (6, None, [3, 5, 5, 7, 9, 9])
    assert torch.equal(again.templates, torch.cat([templates[[1, 2, 3, 5]], 1 - templates[:2]]))
    assert torch.equal(again.index.keys_of(torch.arange(6)), keys)
    with pytest.raises(ValueError, match="no slot would be left"):
        again.remove(torch.arange(6))


def test_a_search_among_some_classes() -> None:
    labels = torch.arange(40) % 4
    memory = memory_of(binary(40, 8), labels, dim=8)
    some, queries = memory.of_classes([1, 3]), torch.randn(5, 8)
    exact = ExactIndex(memory.index.keys_of(torch.arange(40)))
    exact.remove((labels % 2 == 0).nonzero().squeeze(-1))
    assert torch.equal(some.index.search(queries, 7).slots, exact.search(queries, 7).slots)
    assert (len(some.index), int(some.slots_in_use), len(memory.index), memory.mask) == (20, 20, 40, None)
    with pytest.raises(ValueError, match=r"labels: no slot in use has one of \[8\]"):
        memory.of_classes([8])
    with pytest.raises(ValueError, match="labels: of_classes needs them"):
        memory_of(binary(2, 8)).of_classes([1])


def test_rows_that_others_add_and_remove_are_known_after_sync() -> None:
    templates = binary(4, 8)
    one = memory_of(templates, torch.arange(4))
    other = MilvusMemory(uri(), one.index.collection.name)
    large = 100 * torch.ones(3, 3)
    for which, label in ((other, 10), (one, 20), (other, 30)):  # at the same time, so that the order differs
        which.add(binary(1, 8), torch.tensor([label]), large[:1])
    other.remove(torch.tensor([1]))
    queries, k = torch.ones(2, 3), 4
    assert set(one.index.search(queries, k).slots.flatten().tolist()) == {0, 2, 3, 4}  # and none that others added
    with pytest.raises(IndexError, match=r"slot 1 was removed by somebody else\. Call memory\.sync\(\)"):
        one.read(torch.tensor([1]))
    one.sync()
    assert one.labels is not None
    assert one.mask is not None
    assert one.labels.tolist() == [0, 1, 2, 3, 20, 10, 30]
    assert one.mask.tolist() == [True, False] + 5 * [True]
    assert set(one.index.search(queries, 3).slots.flatten().tolist()) == {4, 5, 6}
    assert torch.equal(one.read(torch.tensor([6, 0])), torch.cat([other.read(torch.tensor([5])), templates[:1]]))
    one.add(binary(1, 8), torch.tensor([40]), large[:1])  # after ids that are not in order
    assert set(one.index.search(queries, 4).slots.flatten().tolist()) == {4, 5, 6, 7}


def test_keys_of_rows_that_others_removed_are_not_updated() -> None:
    one = memory_of(binary(4, 8))
    MilvusMemory(uri(), one.index.collection.name).remove(torch.tensor([1]))
    keys = torch.randn(4, 3)
    one.index.update(torch.arange(4), keys)
    assert torch.equal(one.index.keys_of(torch.tensor([0, 2, 3])), keys[[0, 2, 3]])
    assert MilvusMemory(uri(), one.index.collection.name).num_slots == 3


# With a model


def in_milvus(vma: pv.VMA, slots: int = 20) -> tuple[MilvusMemory, pv.PackedMemory]:
    """A memory in Milvus and a packed one of the same templates, with the model's keys."""
    templates = (blobs().images[:slots] > 0).float()
    packed = pv.PackedMemory.pack(templates, labels=torch.arange(slots) % 3)
    keys = pv.model.index_memory(vma, packed)
    memory = MilvusMemory.create(uri(), next(names), tuple(templates.shape[1:]), keys.dim)
    pv.model.add_templates(vma, memory, templates, packed.labels)
    return memory, packed


def indexed(seed: int = 0, k: int = 4) -> pv.VMA:
    vma = small_vma(seed)
    return vma.replace(address_guide=pv.DefensiveGuide(pv.IndexedGuide(vma.address_guide, k=k), share=0.1))


def test_guide_classes_evidence_and_diagnosis_are_those_of_a_packed_memory() -> None:
    vma = indexed()
    memory, packed = in_milvus(vma)
    for one in (memory, packed):
        one.remove(torch.tensor([2, 11]))
    x = packed.read(torch.tensor([5, 7, 1]))
    for ask in (
        lambda m: vma.address_guide(vma.encode(m), vma.encode_x(x)).probs,
        lambda m: vma.classify(m, x),
        lambda m: torch.as_tensor(
            pv.diagnostics.estimate_evidence(
                vma, m, x, num_samples=20, method="top-k", k=3, seed=0, warn=False
            ).log_evidence
        ),
        lambda m: torch.as_tensor(
            pv.diagnostics.diagnose(vma, m, x, num_samples=20, per_slot=2, seed=0)["information_gain"].to_numpy()
        ),
    ):
        torch.testing.assert_close(ask(memory), ask(packed))


def test_training_refreshes_the_keys_in_the_database() -> None:
    vma = indexed()
    memory, packed = in_milvus(vma)
    for one in (memory, packed):
        one.remove(torch.tensor([3]))  # which has no key to refresh
    name, fingerprint = memory.index.collection.name, vma.fingerprint()
    labels = torch.randint(20, (4, 5))
    episodes = {one: [pv.data.Episode(one, packed.read(rows), rows) for rows in labels] for one in (memory, packed)}
    start = {key: value.clone() for key, value in vma.state_dict().items()}
    ends = []
    for one in (packed, memory):
        torch.manual_seed(0)
        vma.load_state_dict(start)
        if one is packed:
            pv.model.index_memory(vma, one)
        result = pv.fit(vma, episodes[one], callbacks=[pv.train.RefreshKeys(6)], **SETTINGS)  # type: ignore[arg-type]
        ends.append(result.history[-1]["bound"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    again = MilvusMemory(uri(), name)
    torch.testing.assert_close(
        again.index.keys_of(again.index.slots), slot_keys(vma, memory, memory.index.slots), rtol=1e-4, atol=1e-5
    )
    assert again.index.made_by == vma.fingerprint() != fingerprint


def test_keys_of_another_model_are_refused() -> None:
    vma, other = indexed(), indexed(seed=1)
    memory, _ = in_milvus(vma)
    again, x = MilvusMemory(uri(), memory.index.collection.name), torch.zeros(1, *vma.event_shape)
    message = rf"{uri()}.*fingerprint '{vma.fingerprint()}', this one's is '{other.fingerprint()}'.*index_memory"
    for call in (
        lambda: other.lookup(again, x),
        lambda: pv.model.add_templates(other, again, x, torch.tensor([0])),
        lambda: pv.fit(other, [pv.data.Episode(again, x, torch.zeros(1).long())], steps=1, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    vma.lookup(again, x)
    with torch.no_grad():
        for weight in vma.parameters():
            weight.mul_(1.1)
    vma.lookup(again, x)  # while it is trained, keys are somewhat old
    with pytest.raises(ValueError, match="fingerprint"):
        vma.lookup(MilvusMemory(uri(), memory.index.collection.name), x)
    again.index.update(torch.tensor([0]), again.index.keys_of(torch.tensor([0])))
    assert MilvusMemory(uri(), memory.index.collection.name).index.made_by == "in training"
    pv.model.index_memory(other, again)
    other.lookup(MilvusMemory(uri(), memory.index.collection.name), x)


def test_keys_of_another_dimension_and_other_collections_are_refused() -> None:
    memory, name = memory_of(binary(3, 8)), next(names)
    with pytest.raises(ValueError, match=r"keys: expected .*\(n, 3\), got torch.float32 \(1, 4\)"):
        memory.add(binary(1, 8), keys=torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"queries: expected shape \(\*, 3\)"):
        memory.index.search(torch.randn(2, 4), 1)
    with pytest.raises(ValueError, match=rf"collection: .*has none named '{name}'"):
        MilvusMemory(uri(), name)
    with pytest.raises(ValueError, match=r"collection: .* has one named"):
        MilvusMemory.create(uri(), memory.index.collection.name, (8,), 3)
    memory.index.collection._connected().create_collection(name, dimension=3)
    with pytest.raises(ValueError, match="was not made by pyro_vmem"):
        MilvusMemory(uri(), name)
    with pytest.raises(ValueError, match=r"event_shape: .* at most 49,151 bytes, got 120,000"):
        MilvusMemory.create(uri(), next(names), (3, 200, 200), 3, bits=8)


# Several processes

PROCESS = """
import json, sys, torch
from pyro_vmem.memory import MilvusMemory
try:
    memory = MilvusMemory(sys.argv[1], sys.argv[2])
    memory.remove(torch.tensor([0]))
    memory.add(torch.ones(1, 8), torch.tensor([7]), 50 * torch.ones(1, 3))
    found = memory.labels.tolist(), memory.templates.tolist()
except ConnectionError as error:
    found = str(error)
print(json.dumps(found), flush=True)
if "kill" in sys.argv:
    import os
    os.kill(os.getpid(), 9)
"""


def other_process(*arguments: str) -> Any:
    ran = subprocess.run([sys.executable, "-c", PROCESS, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode in (0, -9), ran.stderr
    assert not ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.long
def test_a_file_belongs_to_one_process_at_a_time_and_outlasts_one_that_is_killed(tmp_path: Path) -> None:
    file, templates = str(tmp_path / "memory.db"), binary(3, 8)
    memory = MilvusMemory.create(file, "letters", (8,), 3)
    memory.add(templates, torch.arange(3), torch.randn(3, 3))
    refused = other_process(file, "letters")
    assert file in refused
    assert "one process at a time" in refused
    memory.close()
    after = torch.cat([templates[1:], torch.ones(1, 8)])
    labels, read = other_process(file, "letters", "kill")
    assert labels == [0, 1, 2, 7]
    assert read[1:] == after.tolist()
    again = MilvusMemory(file, "letters")
    assert torch.equal(again.templates, after)
    again.close()


@pytest.mark.long
def test_two_processes_on_a_server_that_is_lost_and_comes_back(tmp_path: Path) -> None:
    port, templates = free_port(), binary(3, 8)
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(ConnectionError, match=url):
        MilvusMemory(url, "letters", timeout=2)
    with server(tmp_path, port) as process:
        memory = MilvusMemory.create(url, "letters", (8,), 3, timeout=5)
        memory.add(templates, torch.arange(3), torch.randn(3, 3))
        other_process(url, "letters")
        memory.sync()
        assert memory.labels is not None
        assert memory.labels.tolist() == [0, 1, 2, 7]
        assert int(memory.index.search(torch.ones(3), 1).slots) == 3
        process.kill()
        process.wait()
        before = memory.num_slots, memory.mask
        for call in (
            lambda: memory.index.search(torch.ones(3), 1),
            lambda: memory.read(torch.tensor([1])),
            lambda: memory.add(templates[:1], torch.tensor([9]), torch.ones(1, 3)),
            lambda: memory.remove(torch.tensor([1])),
            memory.sync,
        ):
            with pytest.raises(ConnectionError, match=rf"uri: '{url}', collection 'letters'.*is stored"):
                call()
        assert (memory.num_slots, memory.mask) == before
    with server(tmp_path, port):
        assert int(memory.index.search(torch.ones(3), 1).slots) == 3
        assert memory.add(templates[:1], torch.tensor([9]), torch.ones(1, 3)).tolist() == [4]
        assert torch.equal(
            MilvusMemory(url, "letters").templates, torch.cat([templates[1:], torch.ones(1, 8), templates[:1]])
        )
        memory.close()
