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


# What only looks at a model.
MEMORY, X = pv.Memory((torch.rand(6, *SHAPE) > 0.7).float(), torch.arange(6) % 3), torch.zeros(2, *SHAPE)
LOOKED: dict[str, Callable[[pv.VMA], Any]] = {
    "diagnose": lambda vma: pv.diagnostics.diagnose(vma, MEMORY, X, progress=False),
    "estimate_evidence": lambda vma: pv.diagnostics.estimate_evidence(vma, MEMORY, X, 8, warn=False),
    "refined": lambda vma: pv.diagnostics.estimate_evidence(vma, MEMORY, X, method="refined", warn=False),
    "sbc": lambda vma: pv.diagnostics.sbc(vma, MEMORY, num_simulations=20, progress=False),
    "contribution": lambda vma: pv.diagnostics.contribution(vma, MEMORY, X),
    "slot_log_evidence": lambda vma: pv.diagnostics.slot_log_evidence(vma, MEMORY, X, 2),
    "complete": lambda vma: vma.complete(MEMORY, X, X[0] == 0),
    "lookup": lambda vma: vma.lookup(MEMORY, X),
    "generate": lambda vma: vma.generate(MEMORY, 2),
}


CASES = [
    *((name, "independent", call) for name, call in (MADE | LOOKED).items()),
    *((name, "causal", call) for name, call in LOOKED.items()),
    ("CausalBernoulliDecoder", "causal", lambda vma: pv.CausalBernoulliDecoder(vma.likelihood.network)),
]


@pytest.mark.parametrize(("name", "pixels", "call"), CASES, ids=[f"{name}, {pixels}" for name, pixels, _ in CASES])
def test_nothing_is_written(name: str, pixels: str, call: Callable[[pv.VMA], Any]) -> None:
    vma = model(pixels)
    before = copy.deepcopy(vma.state_dict())
    call(vma)
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
