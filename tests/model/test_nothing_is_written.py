"""Models made of other models, or of their parts, leave every tensor of what they were handed as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.parts import ConvDecoder, ConvEncoder, MLPEncoder

SHAPE = (1, 8, 8)


def model(pixels: Any = "independent") -> pv.VMA:
    return pv.VMA.for_images(SHAPE, latent_dim=3, num_features=8, width=4, pixels=pixels, ink=0.2)


MADE: dict[str, Callable[[pv.VMA], Any]] = {
    "BernoulliDecoder": lambda vma: pv.BernoulliDecoder(vma.likelihood.network),
    "CausalBernoulliDecoder": lambda vma: pv.CausalBernoulliDecoder(model("causal").likelihood.network),
    "GaussianDecoder": lambda vma: pv.GaussianDecoder(vma.likelihood.network),
    "DiscretisedLogisticDecoder": lambda vma: pv.DiscretisedLogisticDecoder(vma.likelihood.network),
    "guides of guides": lambda vma: pv.DefensiveGuide(pv.TruncatedGuide(vma.address_guide)),
    "EncoderGuide": lambda vma: pv.EncoderGuide(vma.address_guide, vma.template_encoder),
    "VMA": lambda vma: pv.VMA(**vma.arguments()),
    "NoMemoryVAE": pv.baselines.NoMemoryVAE.like,
    "SoftAttentionVAE": pv.baselines.SoftAttentionVAE.like,
    "SetStatisticsVAE": pv.baselines.SetStatisticsVAE.like,
    "replace": lambda vma: vma.replace(address_guide=pv.PairwiseGuide(8), templates=pv.ExtraTemplates(2, SHAPE)),
    "replace by its own": lambda vma: vma.replace(likelihood=pv.BernoulliDecoder(vma.likelihood.network)),
    "build like": lambda vma: pv.build({"likelihood": "BernoulliDecoder", "address_guide": "PairwiseGuide"}, like=vma),
    "build with another level": lambda vma: pv.build(
        {"likelihood": {"init_args": {"network": {"init_args": {"level": 2.0}}}}}, like=vma
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_nothing_is_written(name: str) -> None:
    vma = model()
    before = copy.deepcopy(vma.state_dict())
    MADE[name](vma)
    after = vma.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_what_depends_on_a_part_is_made_anew_where_its_size_changes() -> None:
    vae = pv.baselines.SetStatisticsVAE.for_images(SHAPE, latent_dim=3, num_features=8, width=4)
    other = vae.replace(
        template_encoder=MLPEncoder(SHAPE, 5),
        latent_prior=pv.TemplatePrior(3, 5),
        latent_guide=pv.GaussianGuide(3, 5),
        likelihood=pv.BernoulliDecoder(ConvDecoder(SHAPE, 3, 5, None)),
    )
    assert (other.phi[0].in_features, other.rho.out_features) == (5, 5)
    assert other.generate(pv.Memory(torch.rand(3, *SHAPE)), 2).shape == (2, *SHAPE)
    same = vae.replace(template_encoder=ConvEncoder(SHAPE, 8, 4))
    assert (same.phi, same.rho) == (vae.phi, vae.rho)  # of the same size, and trained
