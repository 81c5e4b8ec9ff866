"""Shares of a minibatch draw what they would draw in the whole of it."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_run import sampler, small_vma

import pyro_vmem as pv
from pyro_vmem.infer.noise import share_noise

OBJECTIVES: list[pv.infer.ParticleELBO] = [
    pv.infer.VIMCO_ELBO(4, max_plate_nesting=1),
    pv.infer.VIMCO_ELBO(4, vectorize_particles=False, max_plate_nesting=1),
    pv.infer.VIMCO_ELBO(4, dreg=True, max_plate_nesting=1),
    pv.infer.RWS_ELBO(4, defensive=0.2, max_plate_nesting=1),
    pv.infer.RaoBlackwell_ELBO(3, max_plate_nesting=1),
]
SHARES = [slice(0, 5), slice(5, 6), slice(6, 12)]


@pytest.mark.parametrize("elbo", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("address_guide", ["similarity", "truncated", "mixed"])
def test_shares_draw_what_the_whole_draws(elbo: pv.infer.ParticleELBO, address_guide: str) -> None:
    vma, episode = small_vma(), sampler()[0]
    if address_guide != "similarity":
        vma = vma.replace(address_guide=pv.TruncatedGuide(vma.address_guide, k=4))
    if address_guide == "mixed":
        vma = vma.replace(address_guide=pv.DefensiveGuide(vma.address_guide, share=0.4))
    before = torch.get_rng_state()

    def drawn(guide: Any, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.set_rng_state(before)
        traces = elbo._get_traces(vma.model, guide, (episode.memory, x), {})
        return [guide.nodes[site]["value"] for _, guide in traces for site in "az"], torch.get_rng_state()

    whole, after = drawn(vma.guide, episode.x)
    for rows in SHARES:
        share, state = drawn(share_noise(rows, 12)(vma.guide), episode.x[rows])
        assert torch.equal(state, after)
        for one, two in zip(share, whole, strict=True):
            dim = two.shape.index(12)
            torch.testing.assert_close(one, two.narrow(dim, rows.start, rows.stop - rows.start))


DRAWS = {
    "uniform": lambda loc: dist.Uniform(loc, loc + 1.0),
    "exponential": lambda loc: dist.Exponential(loc.exp()),
    "bernoulli": lambda loc: dist.Bernoulli(logits=loc),
    "full covariance": lambda loc: dist.MultivariateNormal(loc[:, None].expand(-1, 3), torch.eye(3)),
    "flow": lambda loc: dist.TransformedDistribution(dist.Normal(loc, 1.0), dist.transforms.SigmoidTransform()),
    "the same for all": lambda loc: dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([len(loc)]),
    "not the same layout": lambda loc: dist.Normal(torch.zeros(3, 2), 1.0).to_event(2).expand([len(loc)]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_distributions_of_shareable_noise(name: str) -> None:
    def guide(loc: torch.Tensor) -> torch.Tensor:
        with pyro.plate("data", len(loc)):
            return pyro.sample("z", DRAWS[name](loc))

    loc = torch.linspace(-1.0, 1.0, 7)
    before = torch.get_rng_state()
    whole = guide(loc)
    after = torch.get_rng_state()
    for rows in (slice(0, 3), slice(3, 7)):
        torch.set_rng_state(before)
        torch.testing.assert_close(share_noise(rows, 7)(guide)(loc[rows]), whole[rows])
        assert torch.equal(torch.get_rng_state(), after)


def test_what_cannot_be_shared_is_refused_and_leaves_nothing_behind() -> None:
    def gamma(loc: torch.Tensor) -> torch.Tensor:
        with pyro.plate("data", len(loc)):
            return pyro.sample("z", dist.Gamma(loc.exp(), 1.0))

    def bare(loc: torch.Tensor) -> torch.Tensor:
        return pyro.sample("z", dist.Normal(torch.zeros(()), 1.0).expand([5]).to_event(1))

    for guide, match in (
        (gamma, "site 'z', a Gamma, cannot be shared .* '_standard_gamma' takes as many random numbers as it happens"),
        (bare, r"site 'z', a Independent, cannot be shared between processes: it draws numbers in the shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            share_noise(slice(0, 3), 7)(guide)(torch.zeros(3))
        assert torch.rand(3).shape == (3,)  # as ever
