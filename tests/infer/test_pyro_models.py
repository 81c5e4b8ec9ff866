"""The objectives alone, on Pyro models that have nothing to do with a memory."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.optim import Adam

from benchmarks.examples import SemiSupervised
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
    """log p(x) of the mixture, the assignment summed out by hand, in nats per datapoint."""
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


SPARSE = {
    "vimco": VIMCO_ELBO(8),
    "rws": RWS_ELBO(8),
    "reinforce": Reinforce_ELBO(8),
    "pyro's score function": TraceGraph_ELBO(num_particles=8, vectorize_particles=True),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_model_with_bernoulli_spikes(name):
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

    svi = SVI(model, guide, Adam({"lr": 0.1}), SPARSE[name])
    for _ in range(200):
        svi.step(x)
    found = (x @ pyro.param("weight") + pyro.param("bias") > 0).float()
    assert (found == on).float().mean() > 0.98


def semi_supervised_data():
    """Two classes on two waves, one above the other; one label in twenty known, -1 where it is not."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (200,), generator=generator)
    t = 4 * torch.rand(200, generator=generator) - 2
    x = torch.stack([t, 2.0 * y - 1 + 0.4 * (2 * t).sin()], -1) + 0.1 * torch.randn(200, 2, generator=generator)
    return x, y, torch.where(torch.arange(200) % 20 == 0, y, -1)


SEMI_SUPERVISED = {
    "vimco": (VIMCO_ELBO(4, dreg=True), lambda guide: guide),
    "rws": (RWS_ELBO(4, pathwise=True), lambda guide: guide),
    "rao-blackwell": (RaoBlackwell_ELBO(1, site="y"), lambda guide: guide),
    "pyro's enumeration": (TraceEnum_ELBO(max_plate_nesting=1), lambda guide: config_enumerate(guide, "parallel")),
}


@pytest.mark.parametrize("name", SEMI_SUPERVISED)
def test_semi_supervised_autoencoder(name):
    """Ten labels and 190 unlabelled points: the discrete site is conditioned where it is seen, inferred where not."""
    x, y, seen = semi_supervised_data()
    torch.manual_seed(0)
    toy = SemiSupervised(features=2, classes=2, latent=1, hidden=32)
    known = seen >= 0
    elbo, wrap = SEMI_SUPERVISED[name]
    optimizer = torch.optim.Adam(toy.parameters(), lr=0.01)

    labelled = pyro.condition(toy.model, {"y": y[known]})
    given = pyro.poutine.block(pyro.condition(toy.guide, {"y": y[known]}), hide=["y"])

    def loss(with_unlabelled):
        supervised = VIMCO_ELBO(4, max_plate_nesting=1).differentiable_loss(labelled, given, x[known])
        supervised = supervised + torch.nn.functional.cross_entropy(toy.classifier(x[known]), y[known], reduction="sum")
        if not with_unlabelled:
            return supervised
        return supervised + elbo.differentiable_loss(toy.model, wrap(toy.guide), x[~known])

    def train(steps, with_unlabelled):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(with_unlabelled).backward()
            optimizer.step()

    train(100, False)  # which class is which, from ten labels
    before = float(loss(True).detach())
    train(100, True)
    assert float(loss(True).detach()) < before - 100
    assert (toy.classifier(x).argmax(-1) == y).float().mean() > 0.95
