"""The objectives alone, on Pyro models that have nothing to do with a memory."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam

from pyro_vmem.infer import RWS_ELBO, VIMCO_ELBO, RaoBlackwell_ELBO, Reinforce_ELBO


def mixture_data():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([-4.0, 0.0, 5.0])[torch.randint(3, (150,), generator=generator)]
    return centres + 0.7 * torch.randn(150, generator=generator)


def mixture(x):
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    locs = pyro.param("locs", torch.tensor([-1.0, 0.1, 1.0]))
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("data", len(x), dim=-1):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[k], scale), obs=x)


def amortised(x):
    """Assignments by a quadratic in x, which is what the posterior is."""
    coefficients = pyro.param("coefficients", torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    features = torch.stack([x, torch.ones_like(x), x**2 / 10], dim=-1)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("k", dist.Categorical(logits=features @ coefficients))


def log_likelihood(x):
    """log p(x) of the mixture, the assignment summed out by hand, in nats a datapoint."""
    weights, locs, scale = (pyro.param(name).detach() for name in ("weights", "locs", "scale"))
    return float((weights.log() + dist.Normal(locs, scale).log_prob(x[:, None])).logsumexp(-1).mean())


OBJECTIVES = {
    "vimco": (VIMCO_ELBO(8), amortised),
    "rws": (RWS_ELBO(8), amortised),
    "reinforce": (Reinforce_ELBO(8), amortised),
    "rao-blackwell": (RaoBlackwell_ELBO(2, site="k"), amortised),
    "pyro's enumeration": (TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(amortised)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gaussian_mixture(name):
    """All come to the likelihood of the data's own components, from half a nat a datapoint below."""
    x = mixture_data()
    own = (math.log(1 / 3) + dist.Normal(torch.tensor([-4.0, 0.0, 5.0]), 0.7).log_prob(x[:, None])).logsumexp(-1)
    elbo, guide = OBJECTIVES[name]
    svi = SVI(mixture, guide, Adam({"lr": 0.1}), elbo)
    svi.step(x)
    before = log_likelihood(x)
    for _ in range(300):
        svi.step(x)
    assert before < float(own.mean()) - 0.5
    assert log_likelihood(x) > float(own.mean())  # the maximum is a little above the truth


def test_sparse_model_with_bernoulli_spikes():
    """Which of four causes are on: discrete sites need not be categorical, nor one-dimensional."""
    torch.manual_seed(0)
    loading = torch.tensor([[3.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3], [1, 1, 1, 1]])
    on = (torch.rand(100, 4) < 0.3).float()
    x = on @ loading.T + 0.3 * torch.randn(100, 5)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            s = pyro.sample("s", dist.Bernoulli(torch.full((4,), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(s @ loading.T, 0.3).to_event(1), obs=x)

    def guide(x):
        weight, bias = pyro.param("weight", torch.zeros(5, 4)), pyro.param("bias", torch.zeros(4))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("s", dist.Bernoulli(logits=x @ weight + bias).to_event(1))

    svi = SVI(model, guide, Adam({"lr": 0.1}), VIMCO_ELBO(8))
    for _ in range(200):
        svi.step(x)
    found = (x @ pyro.param("weight") + pyro.param("bias") > 0).float()
    assert (found == on).float().mean() > 0.98
