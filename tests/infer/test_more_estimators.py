"""Sets without replacement, antithetic pairs, learned control variates, and straight-through gradients."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import Discrete, discrete_case, estimates, exact_bound, exact_elbo, gradients
from pyro.infer import Trace_ELBO, config_enumerate
from torch import nn

from pyro_vmem.infer import (
    RELAX_ELBO,
    RWS_ELBO,
    VIMCO_ELBO,
    DisARM_ELBO,
    EnumGuard,
    Reinforce_ELBO,
    StraightThrough_ELBO,
    UnorderedSet_ELBO,
)
from pyro_vmem.infer.exhaustive import exhaustive_bound
from pyro_vmem.infer.relax import Surrogate
from pyro_vmem.infer.unordered_set import leave_out, log_orders
from pyro_vmem.testing import assert_objective_unbiased, assert_same_bound, assert_unbiased

pytestmark = pytest.mark.usefixtures("float64")


class Switches(nn.Module):
    """Two switches in one site, and a third that the first two guide: eight states."""

    STATES = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))

    def __init__(self, one_hot=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def table(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.p_k, self.p_j, self.mean = table(2), table(3), table(4)
        self.q_k, self.q_j = table(2, 2), table(2, 3)
        self.one_hot = one_hot

    def bit(self, logits):
        """A switch, in the form of a one-hot vector if this is asked for: always the last dim."""
        if self.one_hot:
            return dist.OneHotCategorical(logits=torch.stack([torch.zeros_like(logits), logits], -1))
        return dist.Bernoulli(logits=logits)

    def on(self, value):
        return value[..., 1] if self.one_hot else value

    def logits(self, weights, k):
        return weights[..., 0] + (weights[..., 1:] * k).sum(-1)

    def predicted(self, k, j):
        return self.mean[0] + (self.mean[1:3] * k).sum(-1) + self.mean[3] * j * k[..., 0]

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            k = self.on(pyro.sample("k", self.bit(self.p_k).to_event(1)))
            j = self.on(pyro.sample("j", self.bit(self.logits(self.p_j, k))))
            pyro.sample("x", dist.Normal(self.predicted(k, j), 0.7), obs=x)

    def guide(self, x):
        side = (x > 0).long()
        with pyro.plate("data", len(x), dim=-1):
            k = self.on(pyro.sample("k", self.bit(self.q_k[side]).to_event(1)))
            pyro.sample("j", self.bit(self.logits(self.q_j[side], k)))

    def states(self, x):
        """log w and log q of every state, for each datapoint: (8, B) each."""
        side = (x > 0).long()
        k, j = self.STATES[:, None, :2], self.STATES[:, None, 2]

        def log_prob(of_k, of_j):
            return dist.Bernoulli(logits=of_k).log_prob(k).sum(-1) + dist.Bernoulli(
                logits=self.logits(of_j, k)
            ).log_prob(j)

        log_q = log_prob(self.q_k[side], self.q_j[side])
        log_x = dist.Normal(self.predicted(k, j), 0.7).log_prob(x)
        return log_prob(self.p_k, self.p_j) + log_x - log_q, log_q


class Random(Surrogate):
    """A control variate that is not zero."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)


CASES = {
    "set-2": (lambda: UnorderedSet_ELBO(2, "k"), Discrete),
    "set-3": (lambda: UnorderedSet_ELBO(3, "k"), Discrete),
    "disarm-2": (lambda: DisARM_ELBO(2), Switches),
    "disarm-4": (lambda: DisARM_ELBO(4), Switches),
    "relax-1": (lambda: RELAX_ELBO(1, Random()), Discrete),
    "relax-3": (lambda: RELAX_ELBO(3, Random()), Discrete),
    "relax-unvectorised": (lambda: RELAX_ELBO(2, Random(), vectorize_particles=False), Discrete),
    "relax-switches": (lambda: RELAX_ELBO(2, Random()), Switches),
    "relax-one-hot": (lambda: RELAX_ELBO(2, Random()), lambda: Switches(one_hot=True)),
    "reinforce-switches": (lambda: Reinforce_ELBO(2), Switches),
}
each = pytest.mark.parametrize("name", CASES)
X = torch.tensor([-0.8, 1.3], dtype=torch.float64)


@each
def test_gradient_is_exact_in_expectation(name):
    make, program = CASES[name]
    toy = program()
    parameters = list(toy.parameters())
    exact = gradients(-exact_elbo(*toy.states(X)).sum(), parameters)
    samples = estimates(make(), toy.model, toy.guide, [X.repeat(500)], parameters, 500, 40)
    assert_unbiased(samples, exact, resolution=0.02)


@each
def test_value_is_exact_in_expectation(name):
    make, program = CASES[name]
    toy, elbo = program(), make()
    values = torch.tensor([elbo.loss(toy.model, toy.guide, X.repeat(500)) / 500 for _ in range(40)])
    assert_unbiased(values, -exact_elbo(*toy.states(X)).sum().detach(), resolution=0.02)


@each
def test_shares_are_those_of_an_average_over_the_guide(name):
    make, program = CASES[name]
    toy = program()
    terms = make().terms(toy.model, toy.guide, X.repeat(2000))
    torch.testing.assert_close(terms.shares.sum(0), torch.ones(4000))
    assert_unbiased(terms.elbo.reshape(2000, 2), exact_elbo(*toy.states(X)).detach())


# Sampling without replacement


def probability_of(order, p):
    """That of drawing these values in this order."""
    total, left = 1.0, sum(p.values())
    for value in order:
        total, left = total * p[value] / left, left - p[value]
    return total


def test_leave_one_out_ratios_by_all_orders():
    """Against the definition: the probability of a set is the sum over its orders."""
    p = dict(enumerate([0.4, 0.25, 0.2, 0.1, 0.05]))
    drawn = [0, 2, 3]

    def of_set(values, domain):
        return sum(probability_of(order, domain) for order in itertools.permutations(values))

    def without(domain, *values):
        return {value: q for value, q in domain.items() if value not in values}

    log_q = torch.tensor([[math.log(p[value])] for value in drawn])
    first, second = leave_out(log_orders(log_q))
    for i, s in enumerate(drawn):
        rest = without(dict.fromkeys(drawn), s)
        own = of_set(rest, without(p, s))
        assert first[i].exp().item() == pytest.approx(own / of_set(drawn, p))
        for j, t in enumerate(drawn):
            expected = 1.0 if s == t else of_set(without(rest, t), without(p, s, t)) / own
            assert second[i, j].exp().item() == pytest.approx(expected)


def test_a_set_of_all_values_has_no_noise():
    """Of the site that is summed: the other one is reparameterised, or here, has one value only."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(k.double(), 1.0), obs=x)

    logits = torch.nn.Parameter(torch.tensor([0.5, -0.2, 0.1]))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("k", dist.Categorical(logits=logits))

    samples = estimates(UnorderedSet_ELBO(3, "k"), model, guide, [X], [logits], 1, 10)
    log_q = logits.log_softmax(-1)
    f = math.log(1 / 3) + dist.Normal(torch.arange(3.0), 1.0).log_prob(X.unsqueeze(-1)) - log_q
    torch.testing.assert_close(samples, gradients(-(log_q.exp() * f).sum(), [logits]).expand(10, 3))


def test_a_sure_guide_leaves_value_and_gradient_finite():
    toy, x, parameters = discrete_case()
    with torch.no_grad():
        toy.q_k.copy_(torch.tensor([[2000.0, 0.0, -2000.0]]).expand(2, 3))
    terms = UnorderedSet_ELBO(2, "k").terms(toy.model, toy.guide, x)
    assert terms.bound.isfinite().all()
    assert gradients(terms.loss, parameters).isfinite().all()


# Noise


def test_each_is_quieter_than_independent_draws():
    noise = {}
    for name, elbo, program in (
        ("independent", Reinforce_ELBO(2), Discrete),
        ("set", UnorderedSet_ELBO(2, "k"), Discrete),
        ("independent switches", Reinforce_ELBO(2), Switches),
        ("pairs", DisARM_ELBO(2), Switches),
    ):
        toy = program()
        noise[name] = estimates(elbo, toy.model, toy.guide, [X.repeat(50)], [toy.q_k], 50, 60).var(0).sum()
    assert noise["set"] < 0.8 * noise["independent"]
    assert noise["pairs"] < 0.8 * noise["independent switches"]


def test_the_control_variate_learns_to_take_noise_away():
    """Trained by SVI with all else at rest, against the same without it."""
    torch.manual_seed(0)
    toy, elbo = Switches(), RELAX_ELBO(1)
    optimizer = pyro.optim.Adam(lambda name: {"lr": 0.1 if name.startswith("control") else 0.0})
    svi = pyro.infer.SVI(toy.model, toy.guide, optimizer, elbo)
    for _ in range(60):
        svi.step(X.repeat(200))
    noise = [
        estimates(e, toy.model, toy.guide, [X.repeat(50)], [toy.q_k, toy.q_j], 50, 60).var(0).sum()
        for e in (elbo, Reinforce_ELBO(1, "none"))
    ]
    assert noise[0] < 0.7 * noise[1]


class Flat(torch.nn.Module):
    """A baseline of Reinforce: one number, whatever the datapoint."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand(x.shape)


@pytest.mark.parametrize("make", [lambda: RELAX_ELBO(1), lambda: Reinforce_ELBO(1, Flat())], ids=["relax", "baseline"])
def test_of_two_objectives_each_trains_its_own_network(make):
    elbos = [make(), make()]
    for elbo in elbos:
        toy, before = Switches(), [p.clone() for p in elbo.module.parameters()]
        svi = pyro.infer.SVI(toy.model, toy.guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        for _ in range(3):
            svi.step(X)
        assert any((now != then).any() for now, then in zip(elbo.module.parameters(), before, strict=True))
    assert not torch.equal(*(torch.nn.utils.parameters_to_vector(elbo.module.parameters()) for elbo in elbos))


# A declared bias


def test_straight_through_is_biased_as_it_declares():
    """Its value is right; its gradient is off by more than noise, and has hardly any of that."""
    toy = Switches(one_hot=True)
    elbo, parameters = StraightThrough_ELBO(2), list(toy.parameters())
    values = torch.tensor([elbo.loss(toy.model, toy.guide, X.repeat(500)) / 500 for _ in range(40)])
    assert_unbiased(values, -exact_elbo(*toy.states(X)).sum().detach(), resolution=0.02)
    exact = gradients(-exact_elbo(*toy.states(X)).sum(), parameters)
    samples = estimates(elbo, toy.model, toy.guide, [X.repeat(1000)], parameters, 1000, 20)
    with pytest.raises(AssertionError, match="standard errors from the exact value"):
        assert_unbiased(samples, exact)
    of_model = [toy.p_k, toy.p_j, toy.mean]  # which is differentiated as it is
    assert_unbiased(
        samples[:, : sum(p.numel() for p in of_model)], gradients(-exact_elbo(*toy.states(X)).sum(), of_model)
    )
    assert float(torch.nn.functional.cosine_similarity(samples.mean(0), exact, dim=0)) > 0.8
    assert elbo.bias in repr(elbo)
    assert "temperature=0.5" in repr(StraightThrough_ELBO(2, 0.5))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: UnorderedSet_ELBO(1), "num_particles: UnorderedSet_ELBO needs at least 2, got 1"),
        (lambda: UnorderedSet_ELBO(11), "num_particles: expected at most 10.*RaoBlackwell_ELBO"),
        (lambda: DisARM_ELBO(3), "num_particles: expected an even number"),
        (lambda: RELAX_ELBO(0), r"num_particles: expected a whole number in \[1, 10,000,000\], got 0"),
        (lambda: StraightThrough_ELBO(1, 0.0), "temperature: expected a positive number, got 0.0"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: UnorderedSet_ELBO(4, "k"), "num_particles: expected no more than the 3 values of site 'k', got 4"),
        (lambda: UnorderedSet_ELBO(2, "j"), "site: 'j' depends on another latent"),
        (lambda: DisARM_ELBO(2), "guide: DisARM_ELBO pairs Bernoulli sites.*Use VIMCO_ELBO"),
        (lambda: StraightThrough_ELBO(2), "'k' is a Categorical.*or use VIMCO_ELBO"),
    ],
)
def test_programs_that_cannot_be_done_are_refused(make, match):
    toy, x, _ = discrete_case()
    with pytest.raises(ValueError, match=match):
        make().loss(toy.model, toy.guide, x)


@pytest.mark.parametrize("make", [RELAX_ELBO, StraightThrough_ELBO])
def test_a_site_without_a_table_of_values_is_refused(make):
    def program(x, given):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Poisson(2.0))
            if not given:
                pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match="'k' is a Poisson"):
        make(2).loss(lambda x: program(x, False), lambda x: program(x, True), X)


def test_the_sum_over_all_values_is_that_by_hand():
    toy, x, parameters = discrete_case()
    for elbo, by_hand in ((Reinforce_ELBO(2), exact_elbo), (VIMCO_ELBO(2), lambda w, q: exact_bound(w, q, 2))):
        ours, expected = exhaustive_bound(elbo, toy.model, toy.guide, x), by_hand(*toy.states(x)).sum()
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradients(ours, parameters), gradients(expected, parameters))


def test_assertions_on_programs_hold_and_can_fail():
    toy, x, parameters = discrete_case()
    assert_objective_unbiased(VIMCO_ELBO(2), toy.model, toy.guide, x, parameters=parameters, draws=100)
    with pytest.raises(AssertionError, match="standard errors from the exact value"):
        assert_objective_unbiased(RWS_ELBO(2), toy.model, toy.guide, x, parameters=[toy.q_k, toy.q_j], draws=100)
    assert_same_bound(Reinforce_ELBO(2), Trace_ELBO(), toy.model, toy.guide, x, draws=60)
    with pytest.raises(AssertionError, match="standard errors from the exact value 0"):
        assert_same_bound(VIMCO_ELBO(8), Trace_ELBO(), toy.model, toy.guide, x, draws=60)


def test_the_assertion_sums_a_guide_that_is_marked_for_enumeration():
    toy, x, parameters = discrete_case()
    assert_objective_unbiased(EnumGuard(), toy.model, config_enumerate(toy.guide), x, parameters=parameters, draws=10)


def test_values_that_cannot_be_summed_are_refused():
    def program(x, given):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Poisson(1.0))
            if not given:
                pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match="the values of site 'k', Poisson, cannot be listed"):
        exhaustive_bound(VIMCO_ELBO(2), lambda x: program(x, False), lambda x: program(x, True), X)
    toy, x, _ = discrete_case()
    with pytest.raises(ValueError, match=r"6 joint values .* in 9 particles are more than 2,000,000 combinations"):
        exhaustive_bound(VIMCO_ELBO(9), toy.model, toy.guide, x)
