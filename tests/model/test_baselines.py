"""The baselines: evidence by quadrature, what does not depend on the memory, and that all works on them as on a VMA."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive
from pyro.optim import Adam
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem.memory import Template
from pyro_vmem.model import NoMemoryVAE, SetStatisticsVAE, SoftAttentionVAE
from pyro_vmem.parts.layers import Residual
from pyro_vmem.testing import assert_unbiased

BASELINES = [NoMemoryVAE, SetStatisticsVAE, SoftAttentionVAE]
OF_MEMORY = [SetStatisticsVAE, SoftAttentionVAE]
DIM, LATENT, SLOTS, B = 3, 2, 5, 4


def make(cls: type[pv.VMA], seed: int = 0) -> pv.VMA:
    """A small model away from its neutral start; its guide is close to the prior, so that weights have short tails."""
    torch.manual_seed(seed)
    model = cls.for_vectors(DIM, LATENT, num_features=8, hidden=(8,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("latent_guide"):
                parameter.add_((0.1 if name.startswith("latent_prior") else 0.3) * torch.randn_like(parameter))
    return model


def inputs(per_datapoint: bool = False) -> tuple[pv.Memory, Tensor]:
    torch.manual_seed(1)
    slots = (B, SLOTS) if per_datapoint else (SLOTS,)
    mask = torch.ones(slots, dtype=torch.bool)
    mask[..., -1] = False
    labels = torch.arange(SLOTS).expand(slots)
    return pv.Memory(2 * torch.randn(*slots, DIM), labels=labels, mask=mask), torch.randn(B, DIM)


def statistics_by_hand(model: SetStatisticsVAE, memory: pv.Memory) -> Tensor:
    """The pooled features of a memory of which all but the last slot are in use."""
    each = [model.phi(model.template_encoder(m).features) for m in memory.templates[:-1]]
    return model.rho(sum(each, torch.tensor(0.0)) / len(each))


def log_likelihood_by_hand(model: pv.VMA, memory: pv.Memory, x: Tensor, z: Tensor) -> Tensor:
    """log p(x | z, M) of one target for many z, from the weights alone."""
    encoder, likelihood = model.template_encoder, model.likelihood
    if isinstance(model, NoMemoryVAE):
        features, network = encoder(model.template).features, likelihood.network
    elif isinstance(model, SetStatisticsVAE):
        features, network = statistics_by_hand(model, memory), likelihood.network
    else:
        soft = likelihood.network
        network, attention = soft.inner, soft.attention
        slots = encoder(memory.templates).features[:-1]  # the last is masked
        keys = attention.embed_memory(slots)
        keys = keys / keys.norm(dim=-1, keepdim=True)
        weights = (attention.embed_x(soft.query(z)) @ keys.T / attention.temperature).softmax(-1)
        features = weights @ slots
    loc = network.network(network.join.first(z) + network.join.second(features))
    scale = likelihood.scale
    return (-0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def log_prior_by_hand(model: pv.VMA, memory: pv.Memory, z: Tensor) -> Tensor:
    """log p(z | M): a standard normal, but where statistics of the memory say otherwise."""
    loc, scale = torch.zeros(LATENT), torch.ones(LATENT)
    if isinstance(model, SetStatisticsVAE):
        features = statistics_by_hand(model, memory)
        normal = model.latent_prior(Template(features, features)).base_dist
        loc, scale = normal.loc, normal.scale
    return (-0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def grid() -> tuple[Tensor, float]:
    """Values of z, and the logarithm of the area that each stands for."""
    axis = torch.linspace(-7.0, 7.0, 281)
    return torch.cartesian_prod(axis, axis), 2 * math.log(float(axis[1] - axis[0]))


def exact_evidence(model: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
    """log p(x | M) with z summed over a fine grid."""
    z, log_area = grid()
    log_prior = log_prior_by_hand(model, memory, z) + log_area
    return torch.stack([(log_prior + log_likelihood_by_hand(model, memory, one, z)).logsumexp(0) for one in x])


def exact_bound(model: pv.VMA, memory: pv.Memory, x: Tensor) -> Tensor:
    """The evidence lower bound of all targets together, with z summed over a fine grid."""
    z, log_area = grid()
    q = model.latent_guide(model.encode_x(x), model.encode(memory).read(torch.zeros(B, dtype=torch.long)))
    log_q = q.log_prob(z.unsqueeze(1))
    log_p = torch.stack([log_likelihood_by_hand(model, memory, one, z) for one in x], 1)
    log_p = log_p + log_prior_by_hand(model, memory, z).unsqueeze(1)
    return ((log_q + log_area).exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("cls", BASELINES)
@pytest.mark.parametrize("method", ["sampled", "exact-address", "top-k", "refined"])
def test_evidence_is_that_of_quadrature(
    cls: type[pv.VMA], method: pv.diagnostics.evidence.Method, float64: None
) -> None:
    model, (memory, x) = make(cls), inputs()
    with torch.no_grad():
        exact = exact_evidence(model, memory, x)
    estimates = [pv.diagnostics.log_evidence(model, memory, x, 60, method, k=2) for _ in range(100)]
    assert_unbiased((torch.stack(estimates) - exact).exp(), torch.ones(B), resolution=0.2)


@pytest.mark.parametrize("cls", BASELINES)
def test_gradients_are_unbiased(cls: type[pv.VMA], float64: None) -> None:
    model, (memory, x) = make(cls), inputs()
    parameters = list(model.parameters())

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    exact = gradient(-exact_bound(model, memory, x))
    loss = pyro.infer.Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    draws = [gradient(loss.differentiable_loss(model.model, model.guide, memory, x)) for _ in range(60)]
    assert exact.norm() > 1
    # along some directions: a weight by itself may matter in so few draws that its mean is far from normal
    directions = torch.randn(len(exact), 30)
    assert_unbiased(torch.stack(draws) @ directions, exact @ directions, resolution=0.05)


@pytest.mark.parametrize("cls", BASELINES)
def test_a_memory_per_datapoint_is_read_by_its_datapoint(cls: type[pv.VMA], float64: None) -> None:
    model, (memory, x) = make(cls), inputs(per_datapoint=True)
    assert memory.mask is not None
    encoded, z, a = model.encode(memory), torch.randn(6, B, LATENT), torch.zeros(6, B, dtype=torch.long)
    together = model.likelihood(z, encoded.read(a)).log_prob(x)
    q = model.latent_guide(model.encode_x(x), encoded.read(a))
    for row in range(B):
        alone = pv.Memory(memory.templates[row], mask=memory.mask[row])
        template, one = model.encode(alone).read(a[:, :1]), x[row : row + 1]
        assert torch.allclose(together[:, row], log_likelihood_by_hand(model, alone, one[0], z[:, row]))
        chunk = encoded.of_datapoints(slice(row, row + 1)).read(a[:, :1])
        for of_row in (template, chunk):
            assert torch.allclose(together[:, row], model.likelihood(z[:, row : row + 1], of_row).log_prob(one)[:, 0])
            loc = model.latent_guide(model.encode_x(one), of_row).base_dist.loc
            assert torch.allclose(q.base_dist.loc[:, row], loc[:, 0])


def test_without_memory_evidence_is_the_same_under_any_memory(float64: None) -> None:
    model, (memory, x) = make(NoMemoryVAE), inputs()
    other = pv.Memory(memory.templates + 1.0, mask=memory.mask)
    found = [pv.diagnostics.estimate_evidence(model, m, x, 50, seed=0).log_evidence for m in (memory, other)]
    assert torch.equal(*found)


@pytest.mark.parametrize("cls", OF_MEMORY)
def test_evidence_depends_on_slots_in_use_alone(cls: type[pv.VMA], float64: None) -> None:
    model, (memory, x) = make(cls), inputs()

    def evidence(templates: Tensor) -> Tensor:
        altered = pv.Memory(templates, mask=memory.mask)
        return pv.diagnostics.estimate_evidence(model, altered, x, 50, seed=0, warn=False).log_evidence

    unused, used = memory.templates.clone(), memory.templates.clone()
    unused[-1] += 1.0
    used[0] += 1.0
    assert torch.allclose(evidence(memory.templates), evidence(unused))
    assert not torch.allclose(evidence(memory.templates), evidence(used), atol=1e-2)
    # nor does it matter in which order they are, beyond what the samples do
    assert torch.allclose(evidence(memory.templates), evidence(memory.templates[[3, 2, 1, 0, 4]]))


@pytest.mark.parametrize("cls", BASELINES)
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("per_datapoint", [False, True])
def test_every_parameter_gets_a_gradient(cls: type[pv.VMA], images: bool, per_datapoint: bool) -> None:
    if images:
        model = cls.for_images((1, 8, 7), latent_dim=2, num_features=8, width=4)
        memory = pv.Memory(
            torch.rand((B, SLOTS, 1, 8, 7) if per_datapoint else (SLOTS, 1, 8, 7)), per_datapoint=per_datapoint
        )
        x = (torch.rand(B, 1, 8, 7) > 0.5).float()
    else:
        model, (memory, x) = make(cls), inputs(per_datapoint)
    with torch.no_grad():
        for parameter in model.parameters():  # so that neither a blank template nor a second convolution is zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    pv.infer.VIMCO_ELBO(num_particles=4).differentiable_loss(model.model, model.guide, memory, x).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert not images or any(isinstance(block, Residual) for block in model.modules())


@pytest.mark.parametrize("cls", [NoMemoryVAE, SoftAttentionVAE])
def test_networks_are_those_of_the_vma(cls: type[pv.VMA]) -> None:
    vma = pv.VMA.for_images((1, 8, 8), latent_dim=2, num_features=8, width=4)
    model = cls.like(vma)  # type: ignore[attr-defined]
    assert model.template_encoder is vma.template_encoder
    shared = {id(p) for p in vma.parameters()} & {id(p) for p in model.parameters()}
    parts = (vma.likelihood, vma.latent_guide, vma.template_encoder)
    assert shared == {id(p) for part in parts for p in part.parameters()}
    assert isinstance(model.latent_prior, pv.StandardPrior)


def test_networks_of_set_statistics_are_those_of_the_vma() -> None:
    vma = pv.VMA.for_images((1, 8, 8), latent_dim=2, num_features=8, width=4)
    model = SetStatisticsVAE.like(vma)
    guides = {id(p) for p in vma.address_guide.parameters()}
    assert {id(p) for p in vma.parameters()} - {id(p) for p in model.parameters()} == guides
    more = {name.partition(".")[0] for name, p in model.named_parameters() if all(p is not q for q in vma.parameters())}
    assert more == {"phi", "rho"}


def test_statistics_of_a_set_are_means_over_its_slots_in_use(float64: None) -> None:
    torch.manual_seed(0)
    model = SetStatisticsVAE.for_images((1, 8, 7), latent_dim=2, num_features=8, width=4)
    templates = torch.rand(B, SLOTS, 1, 8, 7)
    mask = torch.tensor([[True] * n + [False] * (SLOTS - n) for n in (1, 2, 4, 5)])
    read = model.encode(pv.Memory(templates, mask=mask)).read(torch.tensor([[0], [3]]))
    assert read.leading_shape == (2, B)
    for row, n in enumerate((1, 2, 4, 5)):
        each = model.template_encoder(templates[row, :n])
        alone = model.encode(pv.Memory(templates[row, :n])).read(torch.tensor([2]))
        assert torch.allclose(read.raw[1, row], templates[row, :n].mean(0))
        assert torch.allclose(read.features[1, row], model.rho(model.phi(each.features).mean(0)))
        assert torch.allclose(read.features[1, row], alone.features[0])
        for found, expected in zip(read.maps, each.maps, strict=True):
            assert torch.allclose(found[1, row], expected.mean(0))
    assert not torch.allclose(read.features[0, 0], read.features[0, 1], atol=1e-3)


@pytest.mark.parametrize("cls", BASELINES)
def test_addresses_are_idle(cls: type[pv.VMA]) -> None:
    model, (memory, x) = make(cls), inputs()
    encoded = model.encode(memory)
    assert model.encode(encoded) is encoded
    q = model.address_guide(encoded, model.encode_x(x))
    assert torch.equal(pv.diagnostics.information_gain(q.logits, model.address_prior(encoded).logits), torch.zeros(B))
    terms = pv.infer.VIMCO_ELBO(4).terms(model.model, model.guide, memory, x)
    assert torch.equal(terms.kl["a"], torch.zeros(B))


@pytest.mark.parametrize("cls", BASELINES)
@pytest.mark.parametrize("per_datapoint", [False, True])
def test_all_that_works_on_a_vma_works_on_it(cls: type[pv.VMA], per_datapoint: bool) -> None:
    model, (memory, x) = make(cls), inputs(per_datapoint)
    svi = SVI(model.model, model.guide, Adam({"lr": 1e-3}), loss=pv.infer.VIMCO_ELBO(num_particles=4))
    assert math.isfinite(svi.step(memory, x))
    assert math.isfinite(svi.step(model.encode(memory), x))
    batch = (B,) if per_datapoint else ()
    assert model.generate(memory, 3).shape == (3, *batch, DIM)
    assert model.generate(memory, 3, address=0).shape == (3, *batch, DIM)
    assert model.classify(memory, x).shape == (B, SLOTS)
    drawn = Predictive(model.model, num_samples=6, parallel=True)(memory)
    assert drawn["x"].shape == (6, B if per_datapoint else 1, DIM)
    enumerated = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    guide = pyro.infer.config_enumerate(model.guide, "parallel", expand=True)
    assert math.isfinite(enumerated.loss(model.model, guide, memory, x))


@pytest.mark.parametrize("cls", BASELINES)
def test_it_can_be_trained_saved_and_loaded(cls: type[pv.VMA], tmp_path) -> None:
    torch.manual_seed(0)
    images = (torch.rand(24, 1, 8, 8) > 0.7).to(torch.uint8) * 255
    dataset = pv.data.FewShotDataset(images, torch.arange(24) % 6)
    model = cls.for_images((1, 8, 8), latent_dim=4, num_features=16, width=4, ink=0.01)
    episodes, held_out = (pv.data.EpisodeSampler(dataset, n_way=4, k_shot=1, n_query=2, seed=s) for s in (0, 1))
    before = pv.validate(model, held_out)["bound"]
    settings = {"steps": 20, "lr": 0.02, "schedule": pv.train.WarmupCosine(1), "validate_every": 10, "progress": False}
    pv.fit(model, episodes, validation=held_out, out=tmp_path, **settings)
    assert pv.validate(model, held_out)["bound"] > before + 3
    again = pv.load(tmp_path)
    assert type(again) is cls
    assert repr(again).startswith(f"{cls.__name__}('vma'")
    assert again.spec() == model.spec()
    episode = held_out[0]
    found = [
        pv.diagnostics.estimate_evidence(m, episode.memory, episode.x, 20, "sampled", seed=0, warn=False).log_evidence
        for m in (model, again)
    ]
    assert torch.equal(*found)


def test_half_precision_agrees() -> None:
    for cls in BASELINES:
        torch.manual_seed(0)
        model = cls.for_images((1, 12, 12), latent_dim=4, num_features=16, width=4)
        memory, x = pv.Memory(torch.rand(5, 1, 12, 12)), (torch.rand(6, 1, 12, 12) > 0.5).float()
        found = [
            pv.diagnostics.estimate_evidence(model, memory, x, 200, "sampled", seed=0, precision=precision)
            for precision in ("float32", "bfloat16")
        ]
        torch.testing.assert_close(found[0].log_evidence, found[1].log_evidence, rtol=0.01, atol=0.5)
