"""Parts swapped in a trained model: what is shared, what is new, and what Pyro's parameter store makes of it."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

import pyro_vmem as pv
from pyro_vmem import VMA, Memory

X, F = 4, 6


def vectors() -> VMA:
    return VMA.for_vectors(X, latent_dim=2, num_features=F, hidden=(8,))


def data() -> tuple[Memory, torch.Tensor]:
    return Memory(torch.rand(5, X), labels=torch.arange(5)), torch.rand(3, X)


def svi_of(vma: VMA) -> SVI:
    return SVI(vma.model, vma.guide, Adam({"lr": 1e-2}), loss=pv.infer.VIMCO_ELBO(3))


def test_one_part_is_new_and_the_others_are_shared() -> None:
    vma, guide = vectors(), pv.PairwiseGuide(F, 8)
    other = vma.replace(address_guide=guide)
    assert type(other) is VMA
    assert other.address_guide is guide
    assert vma.address_guide is not guide
    for role in ("address_prior", "latent_prior", "likelihood", "latent_guide", "template_encoder"):
        assert getattr(other, role) is getattr(vma, role), role
    assert other.name == vma.name
    assert pv.build(other.spec()).spec() == other.spec()
    assert vma.spec()["init_args"]["address_guide"]["class_path"].endswith("SimilarityGuide")


def test_several_parts_and_the_name() -> None:
    vma = vectors().eval()
    encoder = pv.parts.MLPEncoder((X,), F, ())
    other = vma.replace(address_prior=pv.LearnedPrior(F), x_encoder=encoder, name="other")
    assert (other.name, vma.name) == ("other", "vma")
    assert other.x_encoder is encoder
    assert vma.x_encoder is None
    assert other.replace(x_encoder=None).x_encoder is None
    assert not other.training
    memory, x = data()
    assert other.classify(memory, x).shape == (3, 5)


def test_nothing_replaced_is_the_same_model() -> None:
    vma = vectors()
    other = vma.replace()
    assert other is not vma
    assert other.state_dict().keys() == vma.state_dict().keys()
    assert all(p is q for p, q in zip(vma.parameters(), other.parameters(), strict=True))


def test_a_copy_shares_nothing() -> None:
    vma = vectors()
    other = copy.deepcopy(vma).replace(address_guide=pv.PairwiseGuide(F, 8))
    assert not {id(p) for p in vma.parameters()} & {id(p) for p in other.parameters()}


def test_what_is_no_argument_is_shared_too() -> None:
    vae = pv.baselines.NoMemoryVAE.for_vectors(X, 2, F, (8,))
    with torch.no_grad():
        vae.template.fill_(0.7)
    other = vae.replace(latent_prior=pv.TemplatePrior(2, F, (8,)))
    assert type(other) is pv.baselines.NoMemoryVAE
    assert other.template is vae.template
    assert other.latent_prior is not vae.latent_prior
    assert other.address_guide is vae.address_guide


def test_what_does_not_fit_is_refused() -> None:
    vma = vectors()
    with pytest.raises(
        ValueError, match=r"^adress_guide: VMA has no such argument. Did you mean 'address_guide'\? It has"
    ):
        vma.replace(adress_guide=pv.PairwiseGuide(F))
    with pytest.raises(ValueError, match=r"^latent_guide: its latent_dim is 5, the latent_prior's is 2"):
        vma.replace(latent_guide=pv.GaussianGuide(5, F))


def test_with_the_same_name_the_store_is_cleared_first() -> None:
    vma = vectors()
    memory, x = data()
    svi_of(vma).step(memory, x)
    other = vma.replace(address_guide=pv.SimilarityGuide(F))
    before = other.address_guide.embed_memory.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"under the name 'vma'.*clear_param_store\(\).*name='vma2'"):
        svi_of(other).step(memory, x)
    assert torch.equal(other.address_guide.embed_memory.weight, before)
    pyro.clear_param_store()
    svi_of(other).step(memory, x)
    assert not torch.equal(other.address_guide.embed_memory.weight, before)


def test_with_a_name_of_its_own_both_can_be_trained() -> None:
    vma = vectors()
    memory, x = data()
    svi = svi_of(vma)
    svi.step(memory, x)
    other = vma.replace(address_guide=pv.SimilarityGuide(F), name="other")
    shared, own = vma.likelihood.log_scale, other.address_guide.embed_memory.weight
    values = [shared.item()], [own.detach().clone()]
    for step in (svi_of(other), svi):
        step.step(memory, x)
        values[0].append(shared.item())
        values[1].append(own.detach().clone())
    assert len(set(values[0])) == 3  # trained by both
    assert not torch.equal(values[1][0], values[1][1])
    assert torch.equal(values[1][1], values[1][2])  # the first model does not have it


def test_only_the_new_part_can_be_trained() -> None:
    """A better guide for a model that stays as it is: freeze the rest."""
    vma = vectors()
    memory, x = data()
    other = vma.requires_grad_(False).replace(address_guide=pv.PairwiseGuide(F, 8), latent_guide=pv.GaussianGuide(2, F))
    before = copy.deepcopy(vma.state_dict())
    weight = other.address_guide.score.weight.detach().clone()
    svi_of(other).step(memory, x)
    assert not torch.equal(other.address_guide.score.weight, weight)
    assert all(torch.equal(before[name], value) for name, value in vma.state_dict().items())
