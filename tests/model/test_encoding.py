"""What a step encodes: each template once, for any objective; and only what is read, where that is less than all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO, config_enumerate
from small_run import blobs, small_vma
from torch import Tensor

import pyro_vmem as pv

S, B = 60, 5  # slots and targets
FULL = torch.autocast("cpu", enabled=False)

GUIDES: dict[str, Callable[[pv.SimilarityGuide], pv.AddressGuide]] = {
    "all slots": lambda inner: inner,
    "truncated": lambda inner: pv.TruncatedGuide(inner, k=3),
    "indexed": lambda inner: pv.IndexedGuide(inner, k=3),
    "with features of its own": lambda inner: pv.EncoderGuide(inner, small_vma(seed=5).template_encoder),
}
STOCK: dict[str, Callable[[], ELBO]] = {
    "one particle": lambda: Trace_ELBO(),
    "three, one by one": lambda: Trace_ELBO(num_particles=3),
    "three at once": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "graph, three one by one": lambda: TraceGraph_ELBO(num_particles=3),
}


def made(guide: str = "all slots", **parts: Any) -> tuple[pv.VMA, pv.data.Episode]:
    vma = small_vma(**parts)
    vma = vma.replace(address_guide=GUIDES[guide](vma.address_guide))
    images = (blobs().images > 0).float()
    return vma, pv.data.Episode(pv.Memory(images[:S], torch.arange(S)), images[S : S + B], torch.zeros(B).long())


def encoded(vma: pv.VMA, x: Tensor) -> list[tuple[int, bool]]:
    """How many templates are encoded at once from now on, and whether with gradient; targets are not counted."""
    found: list[tuple[int, bool]] = []

    def note(_: Any, args: tuple[Tensor]) -> None:
        if args[0] is not x:
            found.append((len(args[0]), torch.is_grad_enabled()))

    vma.template_encoder.register_forward_pre_hook(note)
    return found


def gradient(vma: pv.VMA, step: Callable[[], Any]) -> list[Tensor]:
    vma.zero_grad()
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        step()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in vma.parameters()]


def begun(vma: pv.VMA, objective: Any, episode: pv.data.Episode) -> pv.Trainer:
    trainer = pv.Trainer(vma, objective, pv.TrainingConfig(precision="float32"))
    trainer.begin(episode)
    return trainer


def take(vma: pv.VMA, objective: Any, episode: pv.data.Episode) -> tuple[Any, list[Tensor]]:
    steps = begun(vma, objective, episode)
    return steps, gradient(vma, lambda: steps._backward(episode, 1.0))


def same(one: list[Tensor], other: list[Tensor]) -> None:
    assert any(bool(g.abs().max() > 0) for g in one)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("where", ["plain", "packed"])
def test_pyros_own_objectives_go_through_the_encoder_once(name: str, where: str) -> None:
    vma, episode = made("indexed" if where == "packed" else "all slots")
    if where == "packed":
        memory = pv.PackedMemory.pack(episode.memory.templates, labels=episode.memory.labels)
        pv.model.index_memory(vma, memory)
        episode = pv.data.Episode(memory, episode.x, episode.labels)
    expected = gradient(vma, lambda: STOCK[name]().loss_and_grads(vma.model, vma.guide, episode.memory, episode.x))
    steps = begun(vma, STOCK[name](), episode)
    counts = encoded(vma, episode.x)
    found = gradient(vma, lambda: steps._backward(episode, 1.0))
    same(found, expected)
    particles = 3 if "one by one" in name else 1
    # What the guide read is what the model reads.
    assert 1 <= len(counts) <= (1 if where == "plain" else particles)
    assert all(grad for _, grad in counts)


def test_what_is_summed_is_encoded_once() -> None:
    vma, episode = made()
    expected = gradient(
        vma,
        lambda: pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(
            vma.model, config_enumerate(vma.guide, "parallel", expand=True), episode.memory, episode.x
        ),
    )
    steps = begun(vma, "enumerate", episode)
    gradient(vma, lambda: steps._backward(episode, 1.0))  # the first time, its cost is estimated
    counts = encoded(vma, episode.x)
    same(gradient(vma, lambda: steps._backward(episode, 1.0)), expected)
    assert counts == [(S, True)]


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize(
    "objective",
    [
        pv.infer.VIMCO_ELBO(3, max_plate_nesting=1),
        pv.infer.RaoBlackwell_ELBO(2, max_plate_nesting=1),
        "enumerate",
    ],
    ids=["vimco", "rao-blackwell", "enumerate"],
)
@pytest.mark.parametrize("learned", [False, True])
def test_only_what_is_read_is_encoded_where_that_is_less(
    guide: str, objective: Any, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vma, episode = made(guide, templates=pv.ExtraTemplates(2, (1, 8, 8)) if learned else None)
    slots = S + 2 * learned
    steps, _ = take(vma, objective, episode)
    reads = steps.decodes * B
    assert reads == B * (3 if objective != "enumerate" or guide in ("truncated", "indexed") else slots)
    counts = encoded(vma, episode.x)
    found = gradient(vma, lambda: steps._backward(episode, 1.0))
    with_gradient = [count for count, grad in counts if grad]
    assert len(with_gradient) == 1
    if guide == "all slots" or reads > slots:
        assert counts == [(slots, True)]  # all have keys, so all are encoded: the features are gathered
    else:
        assert with_gradient[0] <= reads
        assert [count for count, grad in counts if not grad] == [slots] * (guide in ("truncated", "indexed"))
    steps.decodes = slots  # so that all are encoded beforehand
    same(found, gradient(vma, lambda: steps._backward(episode, 1.0)))


def test_a_second_run_reads_what_the_first_has_encoded() -> None:
    """With `backward`, the model runs without gradient and then with it."""
    vma, episode = made()
    counts = encoded(vma, episode.x)
    take(vma, pv.infer.VIMCO_ELBO(4, backward=1, max_plate_nesting=1), episode)
    assert counts[-1] == (S, True)
    assert sum(grad for _, grad in counts) == 1
    memory, a = vma.encode(episode.memory, reads=B), torch.tensor([3, 1])
    counts.clear()
    memory.read(a)
    with torch.no_grad():
        assert not memory.read(a).features.requires_grad
    assert counts == [(2, True)]


def test_drawing_a_few_encodes_a_few() -> None:
    vma, episode = made()
    counts = encoded(vma, episode.x)
    assert vma.generate(episode.memory, 3).shape == (3, 1, 8, 8)
    assert sum(count for count, _ in counts) <= 3
    counts.clear()
    pyro.set_rng_seed(0)
    few = vma.generate(episode.memory, 3, mean=True)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(few, vma.generate(vma.encode(episode.memory), 3, mean=True), rtol=1e-4, atol=1e-4)


def test_a_memory_for_each_target_is_encoded_as_a_whole() -> None:
    vma, episode = made()
    memory = pv.Memory(torch.stack([episode.memory.templates] * B), per_datapoint=True)
    assert vma.encode(memory, reads=B).features.shape == (B, S, 16)


def test_baselines_train_by_pyros_own_objectives() -> None:
    for baseline in (pv.baselines.NoMemoryVAE, pv.baselines.SoftAttentionVAE):
        torch.manual_seed(0)
        vma = baseline.for_images((1, 8, 8), latent_dim=4, num_features=16, width=4)
        _, episode = made()
        expected = gradient(
            vma,
            lambda: Trace_ELBO(num_particles=2).loss_and_grads(vma.model, vma.guide, episode.memory, episode.x),  # noqa: B023
        )
        same(take(vma, Trace_ELBO(num_particles=2), episode)[1], expected)
