"""A Bayesian Gaussian mixture, its components latents of all the data, from minibatches of 100,000 points."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_vmem.infer import VIMCO_ELBO

CENTRES = torch.tensor([-4.0, 0.0, 5.0])
SIZE = 100_000


def points():
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(torch.tensor([0.2, 0.5, 0.3]), SIZE, replacement=True, generator=generator)
    return CENTRES[which] + 0.7 * torch.randn(SIZE, generator=generator)


def model(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", SIZE, subsample_size=200) as rows:
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[k], scale), obs=x[rows])


def guide(x):
    shape = pyro.param("shape", 100 * torch.ones(3), constraint=constraints.positive)
    weights = pyro.sample("weights", dist.Dirichlet(shape))
    scale = pyro.sample("scale", dist.LogNormal(pyro.param("log_scale", torch.tensor(0.0)), 0.02))
    loc = pyro.param("loc", torch.tensor([-2.0, 0.1, 2.0]))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(loc, 0.02))
    with pyro.plate("data", SIZE, subsample_size=200) as rows:
        log_joint = weights.log() + dist.Normal(locs, scale).log_prob(x[rows].unsqueeze(-1))
        pyro.sample("k", dist.Categorical(logits=log_joint))  # the posterior, given the components


def test_the_components_are_recovered():
    torch.manual_seed(0)
    x = points()
    svi = SVI(model, guide, Adam({"lr": 0.1}), VIMCO_ELBO(4))
    for _ in range(140):
        svi.step(x)
    torch.testing.assert_close(pyro.param("loc").detach(), CENTRES, atol=0.5, rtol=0)
    assert float(pyro.param("log_scale").detach().exp()) == pytest.approx(0.7, abs=0.15)
    shape = pyro.param("shape").detach()
    assert shape[1] > shape[2] > shape[0]  # as many as there are of each
