"""The contract of every swappable part, tried on every implementation.

Leading dims are (enumeration, particle, batch), trailing dims the event. A new class is one line in `PARTS`.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem import EncodedMemory, Memory, Part, Template
from pyro_vmem._utils.precision import full_precision
from pyro_vmem.distributions import CausalBernoulli
from pyro_vmem.parts import ConvDecoder, ConvEncoder, Decoder, Encoder, FlatEncoder, MLPDecoder, MLPEncoder, WarpDecoder
from pyro_vmem.parts.layers import Residual
from pyro_vmem.testing import assert_unbiased
from pyro_vmem.train import load_checkpoint, save_checkpoint

EVENT, F, D, S, B = (1, 6, 5), 6, 3, 5, 7
MAPS = ((2, 3, 3), (4, 2, 2))  # what ConvEncoder(EVENT, F, width=2) makes
LEADING = [(), (7,), (5, 7), (3, 1, 7)]
LABELS = torch.tensor([4, 0, 4, 4, 2])
LEVELS = 3


def mlp_decoder() -> MLPDecoder:
    return MLPDecoder(EVENT, D, F, (8,))


PARTS: dict[str, Callable[[], Part]] = {
    "UniformPrior": pv.UniformPrior,
    "LearnedPrior": lambda: pv.LearnedPrior(F),
    "ContentPrior": lambda: pv.ContentPrior(F, 8),
    "ClassBalancedPrior": pv.ClassBalancedPrior,
    "TemperedPrior": lambda: pv.TemperedPrior(pv.ContentPrior(F, 8), 0.5),
    "SimilarityGuide": lambda: pv.SimilarityGuide(F, 4, "memory", 0.5, tied=False),
    "TruncatedGuide": lambda: pv.TruncatedGuide(pv.SimilarityGuide(F, 4, "memory", 0.5, tied=False), k=2),
    "IndexedGuide": lambda: pv.IndexedGuide(pv.SimilarityGuide(F, 4, "memory", 0.5, tied=False), k=2),
    "SimilarityGuide-cosine": lambda: pv.SimilarityGuide(F, 4, "cosine", 0.5, tied=False),
    "SimilarityGuide-dot": lambda: pv.SimilarityGuide(F, 4, "dot", 0.5, tied=False),
    "SimilarityGuide-tied": lambda: pv.SimilarityGuide(F, 4, "cosine", 0.5, tied=True),
    "PairwiseGuide": lambda: pv.PairwiseGuide(F, 8),
    "DefensiveGuide": lambda: pv.DefensiveGuide(pv.PairwiseGuide(F, 8), 0.2, pv.ContentPrior(F, 8)),
    "DefensiveGuide-truncated": lambda: pv.DefensiveGuide(pv.TruncatedGuide(pv.SimilarityGuide(F, 4), k=2)),
    "DefensiveGuide-indexed": lambda: pv.DefensiveGuide(pv.IndexedGuide(pv.SimilarityGuide(F, 4), k=3), 0.3),
    "EncoderGuide": lambda: pv.EncoderGuide(pv.SimilarityGuide(F, 4), MLPEncoder(EVENT, F, (8,))),
    "UniformGuide": pv.baselines.UniformGuide,
    "StandardPrior": lambda: pv.StandardPrior(D),
    "TemplatePrior": lambda: pv.TemplatePrior(D, F, (8,)),
    "TemplatePrior-linear": lambda: pv.TemplatePrior(D, F, ()),
    "FullCovariancePrior": lambda: pv.FullCovariancePrior(D, F, (8,)),
    "FullCovarianceGuide": lambda: pv.FullCovarianceGuide(D, F, (8, 6)),
    "GaussianGuide": lambda: pv.GaussianGuide(D, F, (8,)),
    "GaussianGuide-deep": lambda: pv.GaussianGuide(D, F, (8, 6)),
    "BernoulliDecoder": lambda: pv.BernoulliDecoder(mlp_decoder()),
    "GaussianDecoder": lambda: pv.GaussianDecoder(mlp_decoder(), scale=0.7),
    "GaussianDecoder-fixed": lambda: pv.GaussianDecoder(mlp_decoder(), learn_scale=False),
    "DiscretisedLogisticDecoder": lambda: pv.DiscretisedLogisticDecoder(mlp_decoder(), LEVELS, scale=0.2),
    "CategoricalDecoder": lambda: pv.CategoricalDecoder(MLPDecoder((LEVELS, 6, 5), D, F, (8,)), LEVELS),
    "CausalBernoulliDecoder": lambda: pv.CausalBernoulliDecoder(
        ConvDecoder(EVENT, D, F, (2, 4), width=2, out_channels=4), context=3, hidden=4, radius=2
    ),
    "FlatEncoder": lambda: FlatEncoder(EVENT),
    "MLPEncoder": lambda: MLPEncoder(EVENT, F, (8,)),
    "ConvEncoder": lambda: ConvEncoder(EVENT, F, width=2),
    "MLPDecoder": mlp_decoder,
    "ConvDecoder": lambda: ConvDecoder(EVENT, D, F, (2, 4), width=2),
    "ConvDecoder-no-skips": lambda: ConvDecoder(EVENT, D, F, None, width=2),
    "WarpDecoder": lambda: WarpDecoder(EVENT, D, F, (2, 4), width=2),
    "WarpDecoder-no-skips": lambda: WarpDecoder(EVENT, D, F, None, width=2),
    "LearnedTemplates": lambda: pv.LearnedTemplates(2, EVENT),
    "ExtraTemplates": lambda: pv.ExtraTemplates(2, EVENT),
    "VMA": lambda: pv.VMA.for_vectors(4, 2, F, (8,)),
    "NoMemoryVAE": lambda: pv.baselines.NoMemoryVAE.for_vectors(4, 2, F, (8,)),
    "SetStatisticsVAE": lambda: pv.baselines.SetStatisticsVAE.for_vectors(4, 2, F, (8,)),
    "SoftAttentionVAE": lambda: pv.baselines.SoftAttentionVAE.for_vectors(4, 2, F, (8,)),
}
HAS_ZUKO = importlib.util.find_spec("zuko") is not None
if HAS_ZUKO:
    PARTS |= {
        "FlowPrior": lambda: pv.FlowPrior(D, F, (8,)),
        "FlowGuide": lambda: pv.FlowGuide(D, F, (8, 6), transforms=3),
    }


def kinds(*classes: type[Part]) -> list[str]:
    """The names of the parts of those kinds."""
    return [name for name, make in PARTS.items() if isinstance(make(), classes)]


OF_A_MODEL = [name for name in PARTS if name not in kinds(pv.VMA)]  # a part made of parts; test_vma.py calls it
TRAINED = [name for name in OF_A_MODEL if any(True for _ in PARTS[name]().parameters())]
ADDRESSES = kinds(pv.AddressPrior, pv.AddressGuide)
DENSITIES = kinds(pv.AddressPrior, pv.AddressGuide, pv.LatentPrior, pv.LatentGuide, pv.Likelihood)


def seen(*leading: int) -> Template:
    """An observation with features and maps, of any leading shape."""
    return Template(
        torch.rand(*leading, *EVENT), torch.randn(*leading, F), tuple(torch.randn(*leading, *m) for m in MAPS)
    )


def memory_of(template: Template, mask: Tensor | None = None, labels: Tensor = LABELS) -> EncodedMemory:
    """A memory of templates of leading shape `(S,)` or `(B, S)`."""
    leading = template.leading_shape
    labels = labels[..., : leading[-1]].expand(leading)
    memory = Memory(template.raw, labels, mask, per_datapoint=len(leading) == 2)
    return EncodedMemory(memory, template)


def inputs_of(part: Part, leading: tuple[int, ...], shared: bool = True) -> list[Any]:
    """What a part of this kind is called with."""
    slots = (S,) if shared else (leading[-1], S)
    if isinstance(part, pv.AddressPrior):
        return [memory_of(seen(*slots))]
    if isinstance(part, pv.AddressGuide):
        return [memory_of(seen(*slots)), seen(*leading)]
    if isinstance(part, pv.LatentPrior):
        return [seen(*leading)]
    if isinstance(part, pv.LatentGuide):
        return [seen(*leading), seen(*leading)]
    if isinstance(part, Encoder):
        return [torch.rand(*leading, *EVENT)]
    if isinstance(part, pv.Templates):
        return [Memory(torch.rand(*slots, *EVENT), LABELS.expand(slots), per_datapoint=not shared)]
    assert isinstance(part, pv.Likelihood | Decoder)
    return [torch.randn(*leading, D), seen(*leading)]


def each(fn: Callable[[Tensor], Tensor], template: Template) -> Template:
    return Template(fn(template.raw), fn(template.features), tuple(fn(m) for m in template.maps))


def row_of(value: Any, index: int) -> Any:
    """One datapoint, the last of the leading dims, with that dim kept; a shared memory as it is."""
    if isinstance(value, EncodedMemory):
        return value.of_datapoints(slice(index, index + 1))
    if isinstance(value, Memory):
        return value._map(lambda tensor, _: tensor[index : index + 1] if value.per_datapoint else tensor)
    if isinstance(value, Template):
        dim = len(value.leading_shape) - 1
        return each(lambda t: t.narrow(dim, index, 1), value)
    return value[index : index + 1]


def outputs_of(out: Any) -> list[Tensor]:
    """The tensors that say all about an output; their first dims are the leading ones."""
    if isinstance(out, Template):
        return [out.raw, out.features, *out.maps]
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Memory):
        return [out.templates]
    if isinstance(out, dist.Categorical):
        return [out.logits]
    if isinstance(out, dist.MultivariateNormal):
        return [out.loc, out.scale_tril]
    if isinstance(out, dist.TransformedDistribution):  # where it sends some noise
        noise = torch.linspace(-1, 1, out.event_shape[0]).to(out.base_dist.base_dist.loc).expand(out.shape())
        return list(itertools.accumulate(out.transforms, lambda z, transform: transform(z), initial=noise))[1:]
    if isinstance(out, CausalBernoulli):
        return [out.logits(torch.zeros(out.event_shape).to(full_precision(out.output)))]
    base = out.base_dist
    return [base.logits] if hasattr(base, "logits") else [base.loc, base.scale]


def fully_used(part: Part, inputs: list[Any]) -> Tensor:
    """A scalar that every weight of the part has a say in."""
    out = part(*inputs)
    if isinstance(out, torch.distributions.Distribution):
        value = out.sample()
        return (out.log_prob(value) * torch.randn(out.batch_shape)).sum()
    return sum((t * torch.randn_like(t)).sum() for t in outputs_of(out))  # type: ignore[return-value]


def subclasses(cls: type[Part]) -> Iterator[type[Part]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_every_part_in_the_package_is_listed() -> None:
    # The reference model's own parts are private, and are held to mathematics in the tests of the reference; those
    # that read a memory softly work in their baseline alone, and are held to it in its tests.
    softly = {pv.baselines.SoftAttentionDecoder, pv.baselines.SoftAttentionGuide}
    found = {
        cls
        for cls in subclasses(Part)
        if cls.__module__.startswith("pyro_vmem.") and not inspect.isabstract(cls) and not cls.__name__.startswith("_")
    }
    if not HAS_ZUKO:
        found -= {pv.FlowPrior, pv.FlowGuide}
    assert found - softly == {type(make()) for make in PARTS.values()}


def test_abstract_parts_cannot_be_made() -> None:
    for cls in (pv.AddressPrior, pv.AddressGuide, pv.LatentPrior, pv.LatentGuide, pv.Templates, Encoder, Decoder):
        with pytest.raises(TypeError, match="abstract"):
            cls()
    with pytest.raises(TypeError, match="abstract"):
        pv.Likelihood(mlp_decoder())


# What comes out


@pytest.mark.parametrize("name", kinds(pv.AddressPrior))
@pytest.mark.parametrize("shared", [True, False])
def test_address_prior_shapes(name: str, shared: bool) -> None:
    part = PARTS[name]()
    p = part(*inputs_of(part, (B,), shared))
    assert isinstance(p, dist.Categorical)
    assert p.logits.shape == ((S,) if shared else (B, S))


@pytest.mark.parametrize("name", kinds(pv.AddressGuide))
@pytest.mark.parametrize("leading", LEADING)
def test_address_guide_shapes(name: str, leading: tuple[int, ...]) -> None:
    part = PARTS[name]()
    for shared in [True, False] if leading else [True]:
        q = part(*inputs_of(part, leading, shared))
        assert isinstance(q, dist.Categorical)
        assert q.logits.shape == (*leading, S)


@pytest.mark.parametrize("name", kinds(pv.LatentPrior))
@pytest.mark.parametrize("leading", LEADING)
def test_latent_prior_shapes(name: str, leading: tuple[int, ...]) -> None:
    p = PARTS[name]()(seen(*leading))
    assert (p.batch_shape, p.event_shape) == (leading, (D,))
    assert p.has_rsample


BROADCASTS = [((7,), (5, 7)), ((5, 7), (7,)), ((7,), (3, 1, 7)), ((7,), (3, 1, 1)), ((), (5, 7)), ((3, 1, 7), (5, 7))]


@pytest.mark.parametrize("name", kinds(pv.LatentGuide))
@pytest.mark.parametrize(("x", "template"), [(shape, shape) for shape in LEADING] + BROADCASTS)
def test_latent_guide_shapes(name: str, x: tuple[int, ...], template: tuple[int, ...]) -> None:
    q = PARTS[name]()(seen(*x), seen(*template))
    assert (q.batch_shape, q.event_shape) == (torch.broadcast_shapes(x, template), (D,))
    assert q.has_rsample


@pytest.mark.parametrize("name", kinds(pv.Likelihood))
@pytest.mark.parametrize(("z", "template"), [(shape, shape) for shape in LEADING] + BROADCASTS)
def test_likelihood_shapes(name: str, z: tuple[int, ...], template: tuple[int, ...]) -> None:
    part = PARTS[name]()
    p = part(torch.randn(*z, D), seen(*template))
    assert (p.batch_shape, p.event_shape) == (torch.broadcast_shapes(z, template), EVENT)
    assert part.event_shape == EVENT
    assert part.draw(p, mean=True).shape == part.draw(p).shape == p.sample().shape == (*p.batch_shape, *EVENT)


@pytest.mark.parametrize("name", kinds(Decoder))
@pytest.mark.parametrize(("z", "template"), [(shape, shape) for shape in LEADING] + BROADCASTS)
def test_decoder_shapes(name: str, z: tuple[int, ...], template: tuple[int, ...]) -> None:
    out = PARTS[name]()(torch.randn(*z, D), seen(*template))
    assert out.shape == (*torch.broadcast_shapes(z, template), *EVENT)


@pytest.mark.parametrize("name", kinds(Encoder))
@pytest.mark.parametrize("leading", LEADING)
def test_encoder_shapes(name: str, leading: tuple[int, ...]) -> None:
    part, x = PARTS[name](), torch.rand(*leading, *EVENT)
    template = part(x)
    assert template.raw is x
    assert template.features.shape == (*leading, part.num_features)
    assert template.leading_shape == leading
    assert tuple(m.shape[-3] for m in template.maps) == part.map_channels
    assert all(m.shape[:-3] == leading for m in template.maps)


@pytest.mark.parametrize("name", kinds(pv.LatentGuide, pv.Likelihood, Decoder))
def test_broadcasting_equals_expanding(name: str) -> None:
    part = PARTS[name]()
    first, template = inputs_of(part, (5, 7))
    first = row_of_leading(first)
    expanded = (
        each(lambda t: t.expand(5, *t.shape), first) if isinstance(first, Template) else first.expand(5, *first.shape)
    )
    for ours, plain in zip(outputs_of(part(first, template)), outputs_of(part(expanded, template)), strict=True):
        torch.testing.assert_close(ours, plain)


def row_of_leading(value: Any) -> Any:
    """The first of the leading dims, dropped."""
    return each(lambda t: t[0], value) if isinstance(value, Template) else value[0]


@pytest.mark.parametrize("name", [name for name in OF_A_MODEL if name not in kinds(pv.Templates)])
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    part = PARTS[name]()
    for shared in [True, False]:
        inputs = inputs_of(part, (B,), shared)
        if shared and isinstance(part, pv.AddressPrior):
            continue  # without targets, and with one memory, there are no rows
        together = outputs_of(part(*inputs))
        for index in (0, 3, B - 1):
            alone = outputs_of(part(*(row_of(value, index) for value in inputs)))
            for ours, single in zip(together, alone, strict=True):
                expected = single.expand(1, *ours.shape[1:]) if single.dim() == ours.dim() else single
                torch.testing.assert_close(ours[index : index + 1], expected)


# What training and saving need


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("leading", [(7,), (5, 7)])
def test_every_parameter_gets_a_gradient(name: str, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)  # a small network of rectified units may be dead at the start
    part = PARTS[name]()
    fully_used(part, inputs_of(part, leading)).backward()
    # Behind a second convolution that starts at zero, the first of a residual block has nothing to learn yet.
    waiting = {id(p) for block in part.modules() if isinstance(block, Residual) for p in block.first.parameters()}
    for parameter_name, parameter in part.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert (parameter.grad.abs().sum() > 0) == (id(parameter) not in waiting), parameter_name


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_double_precision(name: str, float64: None) -> None:
    part = PARTS[name]()
    outputs = outputs_of(part(*inputs_of(part, (5, 7))))
    assert {t.dtype for t in outputs} == {torch.float64}


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_in_full_precision_under_autocast(name: str) -> None:
    part = PARTS[name]()
    inputs = inputs_of(part, (5, 7), shared=False)
    exact = outputs_of(part(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        halved = [  # what encoders under autocast make of the same observations
            memory_of(half(value.encoded)) if isinstance(value, EncodedMemory) else half(value) for value in inputs
        ]
        p = part(*halved)
        log_prob = p.log_prob(p.sample())
    assert {t.dtype for t in outputs_of(p)} == {torch.float32}
    assert log_prob.dtype == torch.float32
    for ours, full in zip(outputs_of(p), exact, strict=True):
        torch.testing.assert_close(ours, full, rtol=0.05, atol=0.05)
    if log_prob.requires_grad:
        log_prob.sum().backward()
        assert all(torch.isfinite(q.grad).all() for q in part.parameters() if q.grad is not None)


def half(value: Any) -> Any:
    if not isinstance(value, Template):
        return value
    return Template(value.raw, value.features.bfloat16(), tuple(m.bfloat16() for m in value.maps))


@pytest.mark.parametrize("name", PARTS)
def test_spec_and_build_are_inverse(name: str) -> None:
    part = PARTS[name]()
    spec = part.spec()
    again = made_from(spec)
    assert type(again) is type(part)
    assert again.spec() == spec
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in part.state_dict().items()}


def made_from(spec: Any) -> Any:
    """A part from its spec, by hand: nothing but plain data and constructors."""
    if isinstance(spec, list):
        return tuple(made_from(value) for value in spec)
    if isinstance(spec, dict):
        assert set(spec) == {"class_path", "init_args"}
        module, _, class_name = spec["class_path"].rpartition(".")
        cls = getattr(__import__(module, fromlist=[class_name]), class_name)
        return cls(**{name: made_from(value) for name, value in spec["init_args"].items()})
    assert spec is None or isinstance(spec, int | float | str | bool)
    return spec


@pytest.mark.parametrize("name", PARTS)
def test_a_copy_is_equal_and_shares_nothing(name: str) -> None:
    part = PARTS[name]()
    twin = copy.deepcopy(part)
    assert twin.spec() == part.spec()
    assert repr(twin) == repr(part)
    for (n, ours), (m, theirs) in zip(part.state_dict().items(), twin.state_dict().items(), strict=True):
        assert n == m
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    own = set(map(id, twin.modules()))
    assert all(id(v) in own for v in twin.arguments().values() if isinstance(v, Part))


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_weights_survive_a_file(name: str, tmp_path: Path) -> None:
    part, other = PARTS[name](), PARTS[name]()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_checkpoint(tmp_path / "part.safetensors", part.state_dict(), part.spec())
    tensors, spec = load_checkpoint(tmp_path / "part.safetensors")
    other.load_state_dict(tensors)
    assert spec == part.spec()
    inputs = inputs_of(part, (7,))
    for ours, theirs in zip(outputs_of(part(*inputs)), outputs_of(other(*inputs)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_training_mode_makes_no_difference(name: str) -> None:
    part = PARTS[name]()
    inputs = inputs_of(part, (7,))
    training, evaluating = outputs_of(part.train()(*inputs)), outputs_of(part.eval()(*inputs))
    assert all(torch.equal(*pair) for pair in zip(training, evaluating, strict=True))


def test_repr_shows_what_is_not_the_default() -> None:
    assert repr(pv.UniformPrior()) == "UniformPrior()"
    assert repr(pv.LearnedPrior(num_features=6)) == "LearnedPrior(num_features=6)"
    assert repr(pv.SimilarityGuide(6, normalise="dot")) == "SimilarityGuide(num_features=6, normalise='dot')"
    assert repr(pv.GaussianDecoder(MLPDecoder((4,)), 0.5)) == (
        "GaussianDecoder(network=MLPDecoder(event_shape=(4,)), scale=0.5)"
    )
    for make in PARTS.values():
        assert type(make()).__name__ in repr(make())


def test_a_part_that_was_swapped_in_is_in_the_spec() -> None:
    p = pv.BernoulliDecoder(mlp_decoder())
    p.network = MLPDecoder(EVENT, D, F, (9,))
    assert p.spec()["init_args"]["network"]["init_args"]["hidden"] == [9]
    vma = pv.VMA.for_vectors(4)
    assert vma.x_encoder is None
    vma.x_encoder = MLPEncoder((4,), 64, (9,))
    assert vma.spec()["init_args"]["x_encoder"]["init_args"]["hidden"] == [9]
    vma.x_encoder = None
    assert vma.spec()["init_args"]["x_encoder"] is None


# Addresses


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("shared", [True, False])
def test_address_probabilities_sum_to_one(name: str, shared: bool) -> None:
    part = PARTS[name]()
    q = part(*inputs_of(part, (5, B) if isinstance(part, pv.AddressGuide) else (B,), shared))
    torch.testing.assert_close(q.probs.sum(-1), torch.ones(q.batch_shape))


def with_memory(inputs: list[Any], memory: EncodedMemory) -> list[Any]:
    return [memory, *inputs[1:]]


def stir(part: Part, by: float = 0.5) -> Part:
    """Weights away from where they start, so that a learned prior is not the uniform one."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return part


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("shared", [True, False])
def test_permuting_slots_permutes_probabilities(name: str, shared: bool) -> None:
    part, order = stir(PARTS[name]()), torch.randperm(S)
    inputs = inputs_of(part, (B,), shared)
    template = each(lambda t: t.index_select(0 if shared else 1, order), inputs[0].encoded)
    before, after = part(*inputs), part(*with_memory(inputs, memory_of(template, labels=LABELS[order])))
    torch.testing.assert_close(after.probs, before.probs[..., order])


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("factor", [1.0, 3e5], ids=["", "far-out"])
def test_a_masked_slot_equals_an_absent_one(name: str, shared: bool, factor: float) -> None:
    part, slot_dim = stir(PARTS[name]()), 0 if shared else 1
    mask = torch.tensor([True, False, True, True, False])
    inputs = inputs_of(part, (B,), shared)
    # far out, logits in use can be as low as those that stand for "not in use"
    template = Template(inputs[0].encoded.raw, factor * inputs[0].encoded.features, inputs[0].encoded.maps)
    masked = memory_of(template, mask if shared else mask.expand(B, S))
    kept = each(lambda t: t.index_select(slot_dim, mask.nonzero().squeeze()), template)
    absent = memory_of(kept, labels=LABELS[mask])
    q, expected = part(*with_memory(inputs, masked)), part(*with_memory(inputs, absent))
    torch.testing.assert_close(q.probs[..., mask], expected.probs)
    assert (q.probs[..., ~mask] == 0).all()
    assert torch.isfinite(q.logits).all()
    torch.testing.assert_close(q.logits[..., mask], expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, -3e4, 3e4])
def test_masked_slots_never_win(scale: float) -> None:
    """However low the logits of slots in use, whatever those of the others."""
    memory = Memory(torch.zeros(4, 1), mask=torch.tensor([True, True, False, False]))
    logits = (scale + torch.tensor([0.0, 1.0, -2 * scale, 5e4])).requires_grad_()
    q = pv.over_slots(logits, memory)
    torch.testing.assert_close(q.probs, torch.tensor([0.2689, 0.7311, 0.0, 0.0]), atol=1e-3, rtol=0)
    assert (q.probs[2:] == 0).all()
    assert torch.isfinite(q.log_prob(torch.arange(4))).all()
    (grad,) = torch.autograd.grad(q.log_prob(torch.tensor(0)), logits)
    torch.testing.assert_close(grad, torch.tensor([1.0, 0.0, 0.0, 0.0]) - q.probs.detach())


def test_a_mask_may_differ_by_datapoint() -> None:
    mask = torch.tensor([[True, False, False], [True, True, True]])
    p = pv.UniformPrior()(memory_of(seen(2, 3), mask))
    torch.testing.assert_close(p.probs, torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize("normalise", ["memory", "cosine", "dot"])
def test_temperature_goes_from_the_most_similar_slot_to_any(normalise: Any) -> None:
    part = pv.SimilarityGuide(F, 4, normalise, temperature=1.0, tied=False)
    inputs = inputs_of(part, (B,))
    best = part(*inputs).probs.argmax(-1)
    for log_temperature, expected in [(-12.0, torch.eye(S)[best]), (15.0, torch.full((B, S), 1 / S))]:
        with torch.no_grad():
            part.log_temperature.fill_(log_temperature)
        torch.testing.assert_close(part(*inputs).probs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("normalise", ["memory", "cosine", "dot"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_similarity_is_the_formula(normalise: Any, tied: bool, shared: bool, float64: None) -> None:
    part = pv.SimilarityGuide(F, 4, normalise, temperature=0.3, tied=tied)
    memory, x = inputs_of(part, (B,), shared)
    keys = (memory.features @ part.embed_memory.weight.T + part.embed_memory.bias).expand(B, S, 4)
    queries = x.features @ part.embed_x.weight.T + part.embed_x.bias
    logits = torch.einsum("bse,be->bs", keys, queries) / 0.3
    if normalise != "dot":
        logits = logits / keys.norm(dim=-1)
    if normalise == "cosine":
        logits = logits / queries.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(part(memory, x).probs, logits.softmax(-1))
    assert part.temperature.item() == pytest.approx(0.3)
    assert sum(1 for _ in part.parameters()) == (3 if tied else 5)


@pytest.mark.parametrize("shared", [True, False])
def test_similarities_are_not_rounded_to_half_precision(shared: bool) -> None:
    part = pv.SimilarityGuide(F, 4, "memory", temperature=0.01, tied=False)
    memory, x = inputs_of(part, (B,), shared)
    with torch.autocast("cpu", torch.bfloat16):
        ours = part(memory, x).logits
        keys, queries = part.embed_memory(memory.features).float(), part.embed_x(x.features).float()
    keys = torch.nn.functional.normalize(keys, dim=-1).expand(B, S, 4)
    exact = torch.einsum("bse,be->bs", keys, queries) / 0.01
    torch.testing.assert_close(ours, exact.log_softmax(-1), rtol=1e-4, atol=1e-2)


def test_learned_prior_starts_uniform_and_is_the_formula(float64: None) -> None:
    part = pv.LearnedPrior(F)
    memory = memory_of(seen(S))
    torch.testing.assert_close(part(memory).probs, torch.full((S,), 1 / S))
    stir(part)
    unit = memory.features / memory.features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(part(memory).probs, (unit @ part.query).softmax(-1))


def masses(probs: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([(probs * (labels == c)).sum(-1) for c in labels.unique()], dim=-1)


@pytest.mark.parametrize("shared", [True, False])
def test_class_balanced_prior_gives_classes_equal_mass(shared: bool, float64: None) -> None:
    part = pv.ClassBalancedPrior()
    inputs = inputs_of(part, (B,), shared)
    torch.testing.assert_close(masses(part(*inputs).probs, LABELS), torch.full((*([B] * (not shared)), 3), 1 / 3))
    torch.testing.assert_close(part(*inputs).probs[..., 0], part(*inputs).probs[..., 2])
    # a class of which no slot is in use has no share
    mask = torch.tensor([True, False, True, False, True]).expand(*inputs[0].batch_shape, S)
    probs = part(memory_of(inputs[0].encoded, mask)).probs
    torch.testing.assert_close(probs, torch.tensor([0.25, 0.0, 0.25, 0.0, 0.5]).expand_as(probs))


def test_class_balanced_prior_with_classes_of_each_datapoints_own() -> None:
    labels = torch.tensor([[0, 0, 0, 1, 1], [5, 6, 7, 8, 9]])
    probs = pv.ClassBalancedPrior()(memory_of(seen(2, S), labels=labels)).probs
    torch.testing.assert_close(probs, torch.tensor([[1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4], [0.2] * 5]))


def test_class_balanced_prior_needs_labels() -> None:
    with pytest.raises(ValueError, match=r"^memory: ClassBalancedPrior needs labels, got none\. Make it with Memory\("):
        pv.ClassBalancedPrior()(Memory(torch.rand(3, 4)))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_tempered_prior_is_the_formula(temperature: float, float64: None) -> None:
    inner = stir(pv.ContentPrior(F, 8))
    memory = memory_of(seen(S))
    probs = inner(memory).probs ** (1 / temperature)
    torch.testing.assert_close(pv.TemperedPrior(inner, temperature)(memory).probs, probs / probs.sum())


def test_tempered_prior_goes_from_the_most_probable_slot_to_any() -> None:
    inner = stir(pv.ContentPrior(F, 8))
    memory = memory_of(seen(S))
    best = torch.eye(S)[inner(memory).probs.argmax()]
    torch.testing.assert_close(pv.TemperedPrior(inner, 1e-4)(memory).probs, best)
    torch.testing.assert_close(pv.TemperedPrior(inner, 1e6)(memory).probs, torch.full((S,), 1 / S))


def test_content_prior_is_the_formula(float64: None) -> None:
    part = pv.ContentPrior(F, 8)
    memory = memory_of(seen(S))
    assert (part(memory).probs - 1 / S).abs().max() < 0.05
    stir(part)
    layer = part.network[0][0]
    hidden = torch.tanh(memory.features @ layer.weight.T + layer.bias)
    torch.testing.assert_close(part(memory).probs, (hidden @ part.score.weight[0]).softmax(-1))


@pytest.mark.parametrize("shared", [True, False])
def test_pairwise_guide_scores_each_pair(shared: bool, float64: None) -> None:
    part = stir(pv.PairwiseGuide(F, 8))
    memory, x = inputs_of(part, (B,), shared)
    q = part(memory, x)
    first, second = part.join.first, part.join.second
    directions, targets = (f / f.norm(dim=-1, keepdim=True) for f in (memory.features, x.features))
    for b in range(B):
        keys = directions if shared else directions[b]
        scores = [
            part.score.weight[0] @ (first.weight @ targets[b] + first.bias + second.weight @ key).relu() for key in keys
        ]
        torch.testing.assert_close(q.probs[b], torch.stack(scores).softmax(0))


def test_before_training_the_pairwise_guide_looks_up_what_is_the_same() -> None:
    part = pv.PairwiseGuide(F)
    template = seen(40)
    probs = part(memory_of(template, labels=torch.zeros(40).long()), template).probs
    assert torch.equal(probs.argmax(-1), torch.arange(40))


@pytest.mark.parametrize("name", ["PairwiseGuide", "ContentPrior"])
def test_scores_are_not_rounded_to_half_precision(name: str) -> None:
    part = stir(PARTS[name]())
    inputs = inputs_of(part, (B,))
    with torch.no_grad():
        part.score.weight.mul_(100)
    exact = part(*inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        ours = part(*inputs).logits
    tolerance = 1e-4 if name == "PairwiseGuide" else 2.0  # of the latter, only the hidden layer is rounded
    torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shared", [True, False])
def test_defensive_guide_is_the_mixture(shared: bool, float64: None) -> None:
    inner, prior = stir(pv.PairwiseGuide(F, 8)), stir(pv.ContentPrior(F, 8))
    part = pv.DefensiveGuide(inner, 0.3, prior)
    memory, x = inputs_of(part, (B,), shared)
    q, p = inner(memory, x).probs, prior(memory).probs
    torch.testing.assert_close(part(memory, x).probs, 0.7 * q + 0.3 * p)
    assert (p / part(memory, x).probs).max() <= (1 + 1e-9) / 0.3


def test_defensive_guide_gives_a_truncated_one_full_support(float64: None) -> None:
    truncated = pv.TruncatedGuide(pv.SimilarityGuide(F, temperature=1e-3), k=1)
    memory, x = inputs_of(truncated, (B,))
    q = pv.DefensiveGuide(truncated, 0.1)(memory, x)
    torch.testing.assert_close(q.probs.sort(-1).values, torch.tensor([0.02] * 4 + [0.92]).expand(B, S))
    assert q.enumerate_support().shape == (S, B)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("views", [4, 8])
def test_guide_of_several_views_is_their_geometric_mean(views: int, shared: bool, float64: None) -> None:
    encoder = ConvEncoder((1, 6, 6), F, width=2)
    part = stir(pv.EncoderGuide(pv.SimilarityGuide(F, 4), encoder, views=views))
    one = pv.EncoderGuide(part.inner, part.encoder)
    templates, x = torch.rand(*(() if shared else (B,)), S, 1, 6, 6), torch.rand(B, 1, 6, 6)

    def q(guide: pv.EncoderGuide, turn: Callable[[Tensor], Tensor] = lambda images: images) -> Tensor:
        memory = Memory(turn(templates), per_datapoint=not shared)
        return guide(EncodedMemory(memory, encoder(memory.templates)), encoder(turn(x))).probs

    turns: list[Callable[[Tensor], Tensor]] = [functools.partial(torch.rot90, k=k, dims=(-2, -1)) for k in range(4)]
    if views == 8:
        turns += [functools.partial(lambda turn, images: turn(images.mT), turn) for turn in turns]
    each = torch.stack([q(one, turn) for turn in turns])
    assert each.std(0).max() > 0.005
    mean = each.log().mean(0).exp()
    torch.testing.assert_close(q(part), mean / mean.sum(-1, keepdim=True))
    for turn in turns:  # the same whichever way the whole is turned
        torch.testing.assert_close(q(part, turn), q(part))


def test_views_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"views: expected 1 or 4 or 8, got 2"):
        pv.EncoderGuide(pv.SimilarityGuide(F), FlatEncoder(EVENT), views=2)
    with pytest.raises(ValueError, match="views: 4 need square images"):
        pv.EncoderGuide(pv.SimilarityGuide(F), FlatEncoder(EVENT), views=4)


def test_learned_prior_is_not_rounded_to_half_precision() -> None:
    part = stir(pv.LearnedPrior(F))
    template = half(seen(S))
    with torch.autocast("cpu", torch.bfloat16):
        ours = part(memory_of(template)).logits
    exact = part(memory_of(Template(template.raw, template.features.float()))).logits
    torch.testing.assert_close(ours, exact)


# Latents and likelihoods


LATENTS = kinds(pv.LatentPrior, pv.LatentGuide)


@pytest.mark.parametrize("name", kinds(pv.LatentPrior))
def test_latent_priors_start_near_the_standard_gaussian(name: str) -> None:
    p = PARTS[name]()(seen(200))
    z = p.sample(torch.Size([500]))
    kl = (p.log_prob(z) - dist.Normal(torch.zeros(D), 1.0).to_event(1).log_prob(z)).mean(0)
    assert kl.max() < 0.5


@pytest.mark.parametrize("name", LATENTS)
def test_latents_are_finite_far_out(name: str) -> None:
    part = stir(PARTS[name]())
    inputs = [Template(t.raw, 1e6 * t.features, t.maps) for t in inputs_of(part, (B,))]
    p = part(*inputs)
    z = p.rsample()
    assert torch.isfinite(z).all()
    assert torch.isfinite(p.log_prob(z.clone())).all()
    if z.requires_grad:
        (p.log_prob(z).sum() + z.sum()).backward()
        assert all(torch.isfinite(q.grad).all() for q in part.parameters())
    if not isinstance(p, dist.TransformedDistribution):
        assert (p.stddev >= 0.99 * torch.tensor(-5.0).exp()).all()
        assert (p.stddev <= 1.01 * torch.tensor(5.0).exp()).all()


@pytest.mark.parametrize("name", kinds(pv.LatentPrior, pv.LatentGuide, pv.BernoulliDecoder, pv.GaussianDecoder))
def test_densities_are_the_formulas(name: str, float64: None) -> None:
    part = stir(PARTS[name]())
    p = part(*inputs_of(part, (B,)))
    value = p.sample().clone()  # a flow knows its own last draw
    outputs = outputs_of(p)
    if isinstance(p, dist.TransformedDistribution):
        by_hand = by_change_of_variables(p, value)
    elif isinstance(p, dist.MultivariateNormal):
        loc, tril = outputs
        precision, centred = (tril @ tril.mT).inverse(), value - loc
        squared = torch.einsum("bi,bij,bj->b", centred, precision, centred)
        by_hand = -0.5 * (squared - precision.logdet() + D * torch.log(torch.tensor(2 * torch.pi)))
    elif len(outputs) == 1:
        by_hand = torch.where(value == 1, outputs[0].sigmoid().log(), (-outputs[0]).sigmoid().log()).flatten(1).sum(1)
    else:
        loc, scale = outputs
        by_hand = -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
        by_hand = by_hand.flatten(1).sum(1)
    torch.testing.assert_close(p.log_prob(value), by_hand)


def by_change_of_variables(p: dist.TransformedDistribution, value: Tensor) -> Tensor:
    """log N(e) - log |det dz/de| of the noise e that becomes each value, by a Jacobian that autograd finds."""
    noise = value
    for transform in reversed(p.transforms):
        noise = transform.inv(noise)

    def push(noise: Tensor) -> Tensor:
        for transform in p.transforms:
            noise = transform(noise)
        return noise.sum(0)  # rows do not touch each other

    torch.testing.assert_close(push(noise), value.sum(0))
    jacobian = torch.autograd.functional.jacobian(push, noise).movedim(1, 0)
    return dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - torch.linalg.slogdet(jacobian).logabsdet


IN_THE_PLANE: dict[str, Callable[[], Part]] = {
    "TemplatePrior": lambda: pv.TemplatePrior(2, F, (8,)),
    "FullCovariancePrior": lambda: pv.FullCovariancePrior(2, F, (8,)),
    "FullCovarianceGuide": lambda: pv.FullCovarianceGuide(2, F, (8,)),
}
if HAS_ZUKO:
    IN_THE_PLANE |= {
        "FlowPrior": lambda: pv.FlowPrior(2, F, (8,)),
        "FlowGuide": lambda: pv.FlowGuide(2, F, (8,), transforms=2),
    }


@pytest.mark.parametrize("name", IN_THE_PLANE)
def test_densities_integrate_to_one_and_are_those_of_the_draws(name: str, float64: None) -> None:
    part = stir(IN_THE_PLANE[name](), by=0.2)
    with torch.no_grad():
        p = part(*inputs_of(part, ()))
        z = p.sample(torch.Size([20_000]))
        low, high = z.amin(0) - 2 * z.std(0), z.amax(0) + 2 * z.std(0)
        axes = [torch.linspace(float(a), float(b), 300) for a, b in zip(low, high, strict=True)]
        points = torch.cartesian_prod(*axes)
        mass = p.log_prob(points).exp() * (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert mass.sum() == pytest.approx(1.0, abs=2e-3)
    for statistic in (lambda v: v[:, 0], lambda v: v[:, 1], lambda v: v[:, 0] * v[:, 1], lambda v: v[:, 0] ** 2):
        assert_unbiased(statistic(z), (mass * statistic(points)).sum() / mass.sum())


def test_full_covariance_has_the_scales_of_the_diagonal_and_correlations(float64: None) -> None:
    part = stir(pv.FullCovariancePrior(D, F, (8,)))
    template = seen(B)
    p = part(template)
    scale = pv.TemplatePrior.forward(part, template).base_dist.scale
    torch.testing.assert_close(p.stddev, scale)
    correlations = p.covariance_matrix / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    assert (correlations.tril(-1).abs() > 0.1).any()


def test_full_covariance_contains_the_posterior_of_the_linear_model(float64: None) -> None:
    """With its weights set to it, every particle has the evidence as its weight."""
    reference = pv.LinearGaussianMemory(dim=4, latent_dim=3, noise=0.3)
    guide = pv.FullCovarianceGuide(3, 4, (6,))
    with torch.no_grad():
        origin = torch.zeros(4)
        start = reference.latent_posterior(origin, origin)
        tril, scale = start.scale_tril, start.stddev

        def slopes(mean: Callable[[Tensor], Tensor]) -> Tensor:
            return torch.stack([mean(row) - start.mean for row in torch.eye(4)], dim=1)

        # relu(u) - relu(-u) = u: hidden units in pairs hold the means
        of_x = slopes(lambda x: reference.latent_posterior(x, origin).mean)
        of_m = slopes(lambda m: reference.latent_posterior(origin, m).mean)
        guide.join.first.weight.copy_(torch.cat([of_x, -of_x]))
        guide.join.second.weight.copy_(torch.cat([of_m, -of_m]))
        guide.join.first.bias.zero_()
        loc_and_scale = guide.network[-1][0]
        loc_and_scale.weight.zero_()
        loc_and_scale.weight[:3].copy_(torch.cat([torch.eye(3), -torch.eye(3)], dim=1))
        loc_and_scale.bias.copy_(torch.cat([start.mean, 5 * torch.atanh(scale.log() / 5)]))
        guide.below[-1].weight.zero_()
        rows, columns = torch.tril_indices(3, 3, -1)
        guide.below[-1].bias.copy_(5 * torch.atanh((tril / tril.diagonal().unsqueeze(-1))[rows, columns] / 5))
    vma = reference.vma(latent_guide=guide)
    memory, x = Memory(torch.randn(5, 4)), torch.randn(3, 4)
    exact = reference.log_evidence(memory, x).detach()
    for _ in range(3):
        loss = pv.infer.VIMCO_ELBO(2).loss(vma.model, vma.guide, memory, x)
        assert loss == pytest.approx(-float(exact.sum()), rel=1e-9)


@pytest.mark.skipif(not HAS_ZUKO, reason="needs zuko")
@pytest.mark.parametrize("validate", [True, False])
def test_flows_leave_the_validation_of_arguments_as_it_was(validate: bool) -> None:
    code = f"""
import sys, torch, pyro, pyro_vmem
torch.distributions.Distribution.set_default_validate_args({validate})
assert "zuko" not in sys.modules
p = pyro_vmem.FlowPrior(4, 6)(pyro_vmem.Template(torch.rand(3, 5), torch.rand(3, 6)))
assert "zuko" in sys.modules
assert torch.distributions.Distribution._validate_args is {validate}
assert p.log_prob(p.sample()).shape == (3,)
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(not HAS_ZUKO, reason="needs zuko")
def test_flows_are_not_rounded_to_half_precision() -> None:
    part = stir(pv.FlowGuide(D, F, (8,)))
    p = part(*inputs_of(part, (B,)))
    z = p.sample().clone()
    exact = p.log_prob(z)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(p.log_prob(z), exact)


@pytest.mark.skipif(not HAS_ZUKO, reason="needs zuko")
def test_a_flow_starts_as_its_gaussian(float64: None) -> None:
    part = pv.FlowGuide(D, F, (8,))
    with torch.no_grad():
        for layer in part.flow.layers:
            layer.hyper.network[-1].weight.zero_()
    inputs = inputs_of(part, (B,))
    ours, gaussian = part(*inputs), pv.GaussianGuide.forward(part, *inputs)
    z = ours.sample()
    torch.testing.assert_close(ours.log_prob(z), ours.log_prob(z.clone()))
    torch.testing.assert_close(ours.log_prob(z), gaussian.log_prob(z))


def test_categorical_outputs_are_the_logits_of_each_value(float64: None) -> None:
    part = pv.CategoricalDecoder(MLPDecoder((LEVELS * 2, 4), D, F, (8,)), LEVELS)
    z, template = torch.randn(B, D), seen(B)
    logits = part.network(z, template).reshape(B, LEVELS, 2, 4).log_softmax(1)
    assert part.event_shape == (2, 4)
    p = part(z, template)
    for level in range(LEVELS):
        value = torch.full((B, 2, 4), level / (LEVELS - 1))
        torch.testing.assert_close(p.base_dist.log_prob(value), logits[:, level])


def test_discretised_logistic_is_around_the_output(float64: None) -> None:
    part = pv.DiscretisedLogisticDecoder(mlp_decoder(), num_levels=4, scale=0.3)
    z, template = torch.randn(B, D), seen(B)
    p = part(z, template).base_dist
    assert part.scale.item() == pytest.approx(0.3)
    torch.testing.assert_close(p.loc, part.network(z, template))
    cdf = torch.sigmoid((torch.tensor([1 / 6, 3 / 6, 5 / 6]).reshape(3, 1, 1, 1, 1) - p.loc) / 0.3)
    probs = torch.diff(torch.cat([torch.zeros_like(cdf[:1]), cdf, torch.ones_like(cdf[:1])]), dim=0)
    for level in range(4):
        torch.testing.assert_close(p.log_prob(torch.full_like(p.loc, level / 3)).exp(), probs[level])


@pytest.mark.parametrize("name", kinds(pv.DiscretisedLogisticDecoder, pv.CategoricalDecoder))
def test_levels_are_checked(name: str) -> None:
    part = PARTS[name]()
    part.check(torch.tensor([0.0, 0.5, 1.0]))
    for value in (0.25, -0.5, 1.5):
        with pytest.raises(ValueError, match=rf"x: {name} expects 3 levels, 0, 1/2, ..., 1.*\(2 \* x\).round\(\) / 2"):
            part.check(torch.tensor([0.0, value]))
    grey = pv.DiscretisedLogisticDecoder(mlp_decoder())
    grey.check(torch.arange(256) / 255)


@pytest.mark.parametrize("learn_scale", [True, False])
def test_gaussian_scale(learn_scale: bool) -> None:
    p = pv.GaussianDecoder(mlp_decoder(), scale=0.3, learn_scale=learn_scale)
    assert p.scale.item() == pytest.approx(0.3)
    assert ("log_scale" in dict(p.named_parameters())) == learn_scale
    assert "log_scale" in p.state_dict()


def test_bernoulli_refuses_what_it_gives_no_probability_to() -> None:
    part = pv.BernoulliDecoder(mlp_decoder())
    part.check(torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"x: BernoulliDecoder expects binary.*\[0.5, 1\].*\(x > 0.5\).float\(\)"):
        part.check(torch.tensor([0.5, 1.0]))
    pv.GaussianDecoder(mlp_decoder()).check(torch.tensor([0.5, -3.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(pv.SimilarityGuide, normalise="both"), r"normalise: expected 'memory'.*got 'both'"),
        (functools.partial(pv.SimilarityGuide, temperature=0.0), r"temperature: expected a positive number, got 0.0"),
        (functools.partial(pv.SimilarityGuide, temperature=float("nan")), r"temperature: .* got nan"),
        (functools.partial(pv.GaussianGuide, hidden=()), r"hidden: expected at least one hidden width"),
        (functools.partial(MLPDecoder, (4,), hidden=()), r"hidden: expected at least one hidden width"),
        (lambda: pv.GaussianDecoder(mlp_decoder(), scale=0.0), r"scale: expected a positive number, got 0.0"),
        (lambda: pv.GaussianDecoder(mlp_decoder(), scale=-1.0), r"scale: expected a positive number, got -1.0"),
        (lambda: pv.TemperedPrior(pv.UniformPrior(), 0.0), r"temperature: expected a positive number, got 0.0"),
        (lambda: pv.DefensiveGuide(pv.SimilarityGuide(), 0.0), r"share: expected a number in \(0, 1\), got 0\.0"),
        (lambda: pv.DefensiveGuide(pv.SimilarityGuide(), 1.0), r"share: expected a number in \(0, 1\), got 1\.0"),
        (
            functools.partial(pv.FullCovariancePrior, 1),
            r"latent_dim: expected a whole number in \[2, 1,048,576\], got 1",
        ),
        (
            functools.partial(pv.FullCovarianceGuide, 1),
            r"latent_dim: expected a whole number in \[2, 1,048,576\], got 1",
        ),
        (functools.partial(pv.FlowPrior, 1), r"latent_dim: expected a whole number in \[2, 1,048,576\], got 1"),
        (
            functools.partial(pv.FlowGuide, 4, transforms=0),
            r"transforms: expected a whole number in \[1, 1000\], got 0",
        ),
        (
            lambda: pv.DiscretisedLogisticDecoder(mlp_decoder(), 1),
            r"num_levels: expected a whole number in \[2, 1,048,576\], got 1",
        ),
        (lambda: pv.DiscretisedLogisticDecoder(mlp_decoder(), scale=0.0), r"scale: expected a positive number"),
        (
            lambda: pv.CategoricalDecoder(mlp_decoder(), 1),
            r"num_levels: expected a whole number in \[2, 1,048,576\], got 1",
        ),
        (lambda: pv.CategoricalDecoder(mlp_decoder(), 4), r"network: expected 4 outputs for each value, got .*1, 6, 5"),
        (
            functools.partial(pv.ExtraTemplates, 0, (4,)),
            r"num_slots: expected a whole number in \[1, 1,048,576\], got 0",
        ),
        (functools.partial(ConvEncoder, (28, 28)), r"image_shape: .*got \(28, 28\).*\(1, height, width\)"),
        (functools.partial(ConvDecoder, (28, 28)), r"image_shape: .*got \(28, 28\)"),
        (functools.partial(WarpDecoder, (1, 0, 28)), r"image_shape: .*got \(1, 0, 28\)"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], Part], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_misspelt_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        pv.SimilarityGuide(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="decodr"):
        pv.VMA.for_vectors(4, decodr="warp")
