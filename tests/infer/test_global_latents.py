"""Latents outside of the data plate, beside those of each datapoint: value and gradient against exhaustive sums."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import discrete_case, exact_bound, exact_elbo, gradients
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch import nn

from pyro_vmem.infer import (
    IWAE_ELBO,
    RELAX_ELBO,
    RWS_ELBO,
    VIMCO_ELBO,
    DisARM_ELBO,
    GlobalDraws_ELBO,
    RaoBlackwell_ELBO,
    Reinforce_ELBO,
    UnorderedSet_ELBO,
)
from pyro_vmem.infer.exhaustive import exhaustive_bound
from pyro_vmem.testing import assert_unbiased

pytestmark = pytest.mark.usefixtures("float64")
X = torch.tensor([-0.8, 1.3], dtype=torch.float64)


class Mixture(nn.Module):
    """Two components, one of them at a place g that all datapoints share, and which of the two each is of.

    The place is one of three, or anywhere on the line. The guide of a datapoint sees it.
    """

    PLACES = torch.tensor([-1.0, 0.5, 2.0])

    def __init__(self, discrete, local=dist.Categorical):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def table(*shape):
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.p_g, self.p_k, self.width = table(3), table(2), table()
        self.q_g, self.q_k, self.slope = table(3), table(2), table(2)
        self.discrete, self.local = discrete, local

    def plate(self, x):
        return pyro.plate("data", len(x), dim=-1)

    def prior(self, of_guide=False):
        table = self.q_g if of_guide else self.p_g
        return dist.Categorical(logits=table) if self.discrete else dist.Normal(table[0], table[1].exp())

    def place(self, g):
        return self.PLACES[g] if self.discrete else g

    def which(self, logits):
        if self.local is dist.Bernoulli:
            return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
        return self.local(logits=logits)

    def seen(self, k, g):
        return dist.Normal(torch.where(k == 1, self.place(g), -0.5), self.width.exp())

    def model(self, x):
        g = pyro.sample("g", self.prior())
        with self.plate(x):
            k = pyro.sample("k", self.which(self.p_k))
            pyro.sample("x", self.seen(k, g), obs=x)

    def guide(self, x):
        g = pyro.sample("g", self.prior(of_guide=True))
        with self.plate(x):
            pyro.sample("k", self.which(self.of_guide(g, x)))

    def of_guide(self, g, x):
        return self.q_k + self.slope * (x * self.place(g)).unsqueeze(-1)

    def exact(self, x, of_datapoint, scale=1.0):
        """The bound, summed over g (or integrated, by the trapezoid rule) and over the states of each datapoint."""
        if self.discrete:
            places, log_q = torch.arange(3), self.q_g.log_softmax(0)
            weights, log_p = log_q.exp(), self.p_g.log_softmax(0)
        else:
            nodes = torch.linspace(-9.0, 9.0, 200)
            places = self.q_g[0] + self.q_g[1].exp() * nodes
            log_q, log_p = self.prior(True).log_prob(places), self.prior().log_prob(places)
            weights = (-0.5 * nodes**2).softmax(0)
        total = 0.0
        for g, weight, ratio in zip(places, weights, log_p - log_q, strict=True):
            log_k = self.of_guide(g, x).log_softmax(-1).T  # (2, B)
            log_x = torch.stack([self.seen(torch.tensor(k), g).log_prob(x) for k in (0, 1)])
            log_w = self.p_k.log_softmax(0).unsqueeze(-1) + log_x - log_k
            total = total + weight * (scale * of_datapoint(log_w, log_k).sum() + ratio)
        return total


def of_two(log_w, log_q):
    return exact_bound(log_w, log_q, 2)


CASES = {
    "vimco": (lambda: VIMCO_ELBO(2), of_two, "Categorical"),
    "vimco-one-by-one": (lambda: VIMCO_ELBO(2, vectorize_particles=False), of_two, "Categorical"),
    "vimco-two-draws": (lambda: GlobalDraws_ELBO(VIMCO_ELBO(2), 2), of_two, "Categorical"),
    "iwae": (lambda: IWAE_ELBO(2), of_two, "Categorical"),
    "reinforce": (lambda: Reinforce_ELBO(2), exact_elbo, "Categorical"),
    "reinforce-three-draws": (lambda: GlobalDraws_ELBO(Reinforce_ELBO(2), 3), exact_elbo, "Categorical"),
    "rao-blackwell": (lambda: RaoBlackwell_ELBO(1, "k"), exact_elbo, "Categorical"),
    "set": (lambda: UnorderedSet_ELBO(2, "k"), exact_elbo, "Categorical"),
    "relax": (lambda: RELAX_ELBO(2), exact_elbo, "Categorical"),
    "disarm": (lambda: DisARM_ELBO(2), exact_elbo, "Bernoulli"),
}


def draws_of(elbo, toy, repeats, parameters, x=X):
    """Independent losses and gradients, with all draws of g anew in each."""
    losses, rows = [], []
    for _ in range(repeats):
        loss = elbo.differentiable_loss(toy.model, toy.guide, x)
        losses.append(loss.detach())
        rows.append(gradients(loss, parameters))
    return torch.stack(losses), torch.stack(rows)


CONTINUOUS = ["vimco", "vimco-two-draws", "rao-blackwell", "relax"]


@pytest.mark.parametrize(
    ("name", "discrete"), [*((name, True) for name in CASES), *((name, False) for name in CONTINUOUS)]
)
def test_value_and_gradient_are_exact_in_expectation(name, discrete):
    make, of_datapoint, local = CASES[name]
    toy = Mixture(discrete, getattr(dist, local))
    parameters = list(toy.parameters())
    if not discrete:
        toy.p_g.data[2] = toy.q_g.data[2] = 0.0
    exact = -toy.exact(X, of_datapoint)
    expected = gradients(exact, parameters)
    losses, samples = draws_of(make(), toy, 300, parameters)
    assert_unbiased(losses, exact.detach())
    assert_unbiased(samples, expected, resolution=0.1)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_sum_that_users_have_is_the_same(discrete):
    toy = Mixture(discrete)
    toy.q_g.data[1] = -1.5  # narrow, so that a quadrature is exact
    ours, expected = exhaustive_bound(VIMCO_ELBO(2), toy.model, toy.guide, X, nodes=40), toy.exact(X, of_two)
    parameters = list(toy.parameters())
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(ours, parameters), gradients(expected, parameters), rtol=1e-4, atol=1e-4)


class Subsampled(Mixture):
    """Two datapoints of six are seen in each step."""

    def plate(self, x):
        return pyro.plate("data", len(x), subsample_size=2, dim=-1)

    def model(self, x):
        g = pyro.sample("g", self.prior())
        with self.plate(x) as rows:
            k = pyro.sample("k", self.which(self.p_k))
            pyro.sample("x", self.seen(k, g), obs=x[rows])

    def guide(self, x):
        g = pyro.sample("g", self.prior(of_guide=True))
        with self.plate(x) as rows:
            pyro.sample("k", self.which(self.of_guide(g, x[rows])))


def test_subsampling_scales_the_data_and_not_the_global_latents():
    data = torch.linspace(-1.5, 1.5, 6)
    toy = Subsampled(True)
    parameters = list(toy.parameters())
    exact = -toy.exact(data, of_two)
    expected = gradients(exact, parameters)
    losses, samples = draws_of(GlobalDraws_ELBO(VIMCO_ELBO(2), 2), toy, 300, parameters, data)
    assert_unbiased(losses, exact.detach(), resolution=0.1)
    assert_unbiased(samples, expected, resolution=0.1)


def test_a_forgotten_score_of_the_global_latent_is_caught(monkeypatch):
    from pyro_vmem.infer.particles import Globals

    monkeypatch.setattr(Globals, "surrogate", lambda self, of_data: self.log_ratio)
    toy = Mixture(True)
    expected = gradients(-toy.exact(X, of_two), [toy.q_g])
    _, samples = draws_of(VIMCO_ELBO(2), toy, 300, [toy.q_g])
    with pytest.raises(AssertionError, match="standard errors from the exact value"):
        assert_unbiased(samples, expected)


def components(x):
    """A Bayesian mixture, its components in a plate of their own, which are indexed as they are."""
    with pyro.plate("components", 3, dim=-1):
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x), dim=-1):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[k], 0.5), obs=x)


def of_components(x):
    loc = pyro.param("loc", torch.tensor([-1.0, 0.1, 1.0]))
    with pyro.plate("components", 3, dim=-1):
        locs = pyro.sample("locs", dist.Normal(loc, 0.1))
    pyro.sample("weights", dist.Dirichlet(pyro.param("shape", 10 * torch.ones(3))))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("k", dist.Categorical(logits=-((x.unsqueeze(-1) - locs) ** 2)))


@pytest.mark.parametrize("elbo", [VIMCO_ELBO(4), RaoBlackwell_ELBO(2, "k"), VIMCO_ELBO(4, vectorize_particles=False)])
def test_components_are_indexed_without_a_dim_for_particles(elbo):
    terms = elbo.terms(components, of_components, X)
    assert terms.bound.shape == (2,)
    of_globals = terms.particles.of_globals
    assert of_globals.log_ratio.shape == ()
    assert elbo.global_names == {"locs", "weights"}
    torch.testing.assert_close(terms.loss, -(terms.bound.sum() + of_globals.log_ratio))


def test_an_autoguide_of_the_global_latents():
    hidden = pyro.poutine.block(components, hide=["k", "x"])
    for make in (AutoNormal, AutoDelta, AutoDiagonalNormal):
        pyro.clear_param_store()
        of_globals = make(hidden)

        def guide(x, of_globals=of_globals):
            locs = of_globals(x)["locs"]
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("k", dist.Categorical(logits=-((x.unsqueeze(-1) - locs) ** 2)))

        elbo = VIMCO_ELBO(4)
        assert math.isfinite(elbo.loss(components, guide, X))
        assert {"locs", "weights"} <= elbo.global_names


def test_one_objective_for_programs_with_and_without_global_latents():
    elbo, (toy, x, _) = VIMCO_ELBO(2), discrete_case()
    shared = Mixture(True)
    for _ in range(2):
        assert elbo.terms(shared.model, shared.guide, x).particles.of_globals is not None
        assert elbo.terms(toy.model, toy.guide, x).particles.of_globals is None


def test_what_cannot_be_done_is_refused():
    toy = Mixture(True)
    with pytest.raises(ValueError, match=r"RWS_ELBO has no gradient for latents outside.*\['g'\].*Use VIMCO_ELBO"):
        RWS_ELBO(2).loss(toy.model, toy.guide, X)
    with pytest.raises(ValueError, match=r"site: 'g' is outside of the data plate"):
        RaoBlackwell_ELBO(1, "g").loss(toy.model, toy.guide, X)
    with pytest.raises(ValueError, match=r"draws: expected a whole number in \[2, 1,048,576\], got 1"):
        GlobalDraws_ELBO(VIMCO_ELBO(4), 1)
    local, x, _ = discrete_case()
    with pytest.raises(ValueError, match=r"model: it has no latents outside of the data plate. Use VIMCO_ELBO"):
        GlobalDraws_ELBO(VIMCO_ELBO(4)).loss(local.model, local.guide, x)

    def part(x, given=True):
        with pyro.plate("all", 6, subsample_size=3, dim=-1):
            pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            if not given:
                pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"plate 'all' outside of the data plate is subsampled"):
        VIMCO_ELBO(2).loss(lambda x: part(x, False), part, X)
