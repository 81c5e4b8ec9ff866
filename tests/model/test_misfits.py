"""Parts that do not fit together are refused where a model is built, with what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vmem as pv
from pyro_vmem import EncodedMemory, Memory, Template
from pyro_vmem.parts import MLPDecoder, MLPEncoder

X, D, F = 5, 4, 64


class Logits(pv.AddressGuide):
    def forward(self, memory: EncodedMemory, x: Template) -> Any:
        return x.features @ memory.features.mT


class AllSlotsAndMore(pv.AddressPrior):
    def forward(self, memory: EncodedMemory) -> dist.Categorical:
        return dist.Categorical(logits=torch.zeros(memory.num_slots + 1))


class Loose(pv.LatentPrior):
    latent_dim = D

    def forward(self, template: Template) -> dist.Distribution:
        return dist.Normal(torch.zeros(*template.leading_shape, D), 1.0)


class Bare(pv.parts.Encoder):
    event_shape, num_features = (X,), F

    def forward(self, x: Tensor) -> Any:
        return x


class Failing(pv.LatentGuide):
    latent_dim = D

    def forward(self, x: Template, template: Template) -> dist.Distribution:
        raise KeyError("no such key")


MISFITS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "features of another length": (
        lambda: {"address_guide": pv.SimilarityGuide(128)},
        r"^address_guide: SimilarityGuide\(\) does not take .* It is for num_features=128, the other parts for 64\.",
    ),
    "another length inside": (
        lambda: {"address_guide": pv.TruncatedGuide(pv.SimilarityGuide(32), k=2)},
        r"^address_guide: TruncatedGuide.* It is for num_features=32, the other parts for 64\. Give all the same\.",
    ),
    "a latent of another length": (
        lambda: {"likelihood": pv.GaussianDecoder(MLPDecoder((X,), D + 1, F))},
        r"^likelihood: .* It is for latent_dim=5, the other parts for 4\.",
    ),
    "a number for a guide": (
        lambda: {"address_guide": pv.TruncatedGuide(16)},
        r"^inner: expected AddressGuide, got 16\.",
    ),
    "a class for an object": (
        lambda: {"address_prior": pv.UniformPrior},
        r"address_prior: expected AddressPrior, got the class UniformPrior",
    ),
    "nothing for a part": (
        lambda: {"latent_prior": None},
        r"^latent_prior: expected LatentPrior, got None\.",
    ),
    "logits": (
        lambda: {"address_guide": Logits()},
        r"^address_guide: expected a Categorical over 2 slots, .* got Tensor \(3, 2\) of Logits\(\)\. Return ",
    ),
    "a slot too many": (
        lambda: {"address_prior": AllSlotsAndMore()},
        r"^address_prior: expected a Categorical over 2 slots, with batch shape \(\), got Categorical",
    ),
    "without to_event": (
        lambda: {"latent_prior": Loose()},
        r"^latent_prior: expected .* event shape \(4,\), got Normal with batch shape \(3, 4\) .* `\.to_event\(1\)`",
    ),
    "no template": (
        lambda: {"template_encoder": Bare()},
        r"^template_encoder: expected a Template with features \(3, 64\) .* got Tensor \(3, 5\) of Bare\(\)\. ",
    ),
    "an error of its own": (
        lambda: {"latent_guide": Failing()},
        r"^latent_guide: Failing\(\) .* KeyError: .no such key",
    ),
}


def model_of(**parts: Any) -> pv.VMA:
    return pv.VMA.for_vectors(X, D, F, **parts)


@pytest.mark.parametrize("name", MISFITS)
def test_parts_that_do_not_fit_are_refused_at_once(name: str) -> None:
    parts, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        model_of(**parts())


def test_a_part_put_in_later_is_tried_too() -> None:
    vma = model_of()
    with pytest.raises(ValueError, match=r"^address_guide: PairwiseGuide.* It is for num_features=128"):
        vma.replace(address_guide=pv.PairwiseGuide())


def test_features_of_targets_may_have_a_length_of_their_own() -> None:
    class Own(pv.AddressGuide):
        def forward(self, memory: EncodedMemory, x: Template) -> dist.Categorical:
            return pv.over_slots(x.features[..., :1] * memory.features.sum(-1), memory)

    class OwnLatent(pv.LatentGuide):
        latent_dim = D

        def forward(self, x: Template, template: Template) -> dist.Distribution:
            return dist.Normal(x.features[..., :D] + template.features[..., :D], 1.0).to_event(1)

    vma = model_of(x_encoder=MLPEncoder((X,), 32), address_guide=Own(), latent_guide=OwnLatent())
    assert vma.encode_x(torch.rand(3, X)).features.shape == (3, 32)


def test_trying_parts_out_leaves_no_trace() -> None:
    class Noisy(MLPEncoder):
        def __init__(self) -> None:
            super().__init__((X,), F)
            self.norm, self.drop = torch.nn.BatchNorm1d(F), torch.nn.Dropout()

        def forward(self, x: Tensor) -> Template:
            template = super().forward(x)
            return Template(x, self.drop(self.norm(template.features)) + torch.rand(()))

    encoder = Noisy()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.drop.eval()
    rest = [getattr(model_of(), role) for role in ("latent_prior", "likelihood", "address_guide", "latent_guide")]
    state = torch.get_rng_state()
    vma = pv.VMA(pv.UniformPrior(), *rest, template_encoder=encoder)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert vma.training
    assert encoder.norm.training
    assert not encoder.drop.training
    assert not list(pyro.get_param_store().keys())


def test_a_memory_that_is_not_encoded_says_so() -> None:
    vma, memory, x = model_of(), Memory(torch.rand(3, X)), torch.rand(2, X)
    with pytest.raises(AttributeError, match=r"^memory: .*'features'.* `vma\.encode\(memory\)`"):
        vma.address_guide(memory, vma.encode_x(x))
    assert not hasattr(memory, "features")


@pytest.mark.parametrize("memory", [np.zeros((3, X)), [[0.0] * X], torch.zeros(3, X)], ids=["array", "list", "tensor"])
def test_what_is_no_memory_is_refused(memory: Any) -> None:
    for ask in ("model", "guide", "lookup"):
        with pytest.raises(ValueError, match=r"^memory: expected Memory, got .* Use Memory\(templates\)\."):
            getattr(model_of(), ask)(memory, torch.zeros(2, X))


def test_a_model_that_is_built_under_autocast_uses_the_weights_that_are_loaded_into_it() -> None:
    trained = pv.VMA.for_vectors(5)
    memory, x = Memory(torch.randn(4, 5)), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = trained.lookup(memory, x).q.logits
        with torch.enable_grad():  # weights are kept where they have a gradient
            built = pv.VMA.for_vectors(5)
        built.load_state_dict(trained.state_dict())
        torch.testing.assert_close(built.lookup(memory, x).q.logits, expected)
