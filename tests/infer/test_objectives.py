"""Every objective against its exact value and gradient, summed over all states of a small model."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import SubsampledDiscrete, discrete_case, estimates, exact_bound, exact_elbo, exact_wake, gradients

import pyro_vmem as pv
from pyro_vmem import infer
from pyro_vmem.infer import (
    IWAE_ELBO,
    RWS_ELBO,
    VIMCO_ELBO,
    ParticleELBO,
    RaoBlackwell_ELBO,
    Reinforce_ELBO,
)
from pyro_vmem.infer.annealing import scale_sites
from pyro_vmem.testing import assert_unbiased

pytestmark = pytest.mark.usefixtures("float64")


class Baseline(torch.nn.Module):
    """One number for each datapoint, from what the model is called with."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([-1.0, 0.5]))

    def forward(self, x):
        return self.weight[0] + self.weight[1] * x


# An objective, its exact value and a function with its exact gradient, of log w and log q of all states.
# A new objective is one line here; a test fails if one is missing.
CASES = {
    "vimco-2": (lambda: VIMCO_ELBO(2), lambda w, q: exact_bound(w, q, 2), None),
    "vimco-3": (lambda: VIMCO_ELBO(3), lambda w, q: exact_bound(w, q, 3), None),
    "vimco-geometric-2": (lambda: VIMCO_ELBO(2, "geometric"), lambda w, q: exact_bound(w, q, 2), None),
    "vimco-geometric-3": (lambda: VIMCO_ELBO(3, "geometric"), lambda w, q: exact_bound(w, q, 3), None),
    "vimco-backward-1-of-3": (lambda: VIMCO_ELBO(3, backward=1), lambda w, q: exact_bound(w, q, 3), None),
    "vimco-backward-2-of-3": (lambda: VIMCO_ELBO(3, backward=2), lambda w, q: exact_bound(w, q, 3), None),
    "iwae-backward": (lambda: IWAE_ELBO(2, backward=1), lambda w, q: exact_bound(w, q, 2), None),
    "rws-backward": (
        lambda: RWS_ELBO(2, backward=1),
        lambda w, q: exact_bound(w, q, 2),
        lambda w, q: exact_wake(w, q, 2),
    ),
    "iwae-1": (lambda: IWAE_ELBO(1), lambda w, q: exact_bound(w, q, 1), None),
    "iwae-3": (lambda: IWAE_ELBO(3), lambda w, q: exact_bound(w, q, 3), None),
    "rws-2": (lambda: RWS_ELBO(2), lambda w, q: exact_bound(w, q, 2), lambda w, q: exact_wake(w, q, 2)),
    "rws-3": (lambda: RWS_ELBO(3), lambda w, q: exact_bound(w, q, 3), lambda w, q: exact_wake(w, q, 3)),
    "rws-pathwise": (
        lambda: RWS_ELBO(2, pathwise=True),  # nothing is reparameterised here, so it is the same
        lambda w, q: exact_bound(w, q, 2),
        lambda w, q: exact_wake(w, q, 2),
    ),
    "reinforce-loo-2": (lambda: Reinforce_ELBO(2), exact_elbo, None),
    "reinforce-loo-4": (lambda: Reinforce_ELBO(4), exact_elbo, None),
    "reinforce-average": (lambda: Reinforce_ELBO(1, "average"), exact_elbo, None),
    "reinforce-network": (lambda: Reinforce_ELBO(1, Baseline()), exact_elbo, None),
    "reinforce-none": (lambda: Reinforce_ELBO(2, "none"), exact_elbo, None),
    "rao-blackwell-1": (lambda: RaoBlackwell_ELBO(1, site="k"), exact_elbo, None),
    "rao-blackwell-2": (lambda: RaoBlackwell_ELBO(2, site="k"), exact_elbo, None),
}
# Those of test_more_estimators.py and test_global_latents.py
MORE = {
    infer.DisARM_ELBO,
    infer.GlobalDraws_ELBO,
    infer.RELAX_ELBO,
    infer.StraightThrough_ELBO,
    infer.UnorderedSet_ELBO,
}
each = pytest.mark.parametrize("name", CASES)


def test_every_objective_is_listed():
    listed = {type(make()) for make, _, _ in CASES.values()} | MORE
    assert {getattr(infer, name) for name in infer.__all__ if name.endswith("_ELBO")} == listed


@each
def test_gradient_is_exact_in_expectation(name):
    make, value, with_gradient = CASES[name]
    toy, x, parameters = discrete_case()
    exact = gradients(-(with_gradient or value)(*toy.states(x)).sum(), parameters)
    elbo, copies = make(), 2000
    samples = estimates(elbo, toy.model, toy.guide, [x.repeat(copies)], parameters, copies, 40)
    assert_unbiased(samples, exact, resolution=0.05)


@each
@pytest.mark.parametrize("vectorize", [True, False])
def test_value_is_exact_in_expectation(name, vectorize):
    make, value, _ = CASES[name]
    toy, x, _ = discrete_case()
    elbo = make()
    if not vectorize and isinstance(elbo, RaoBlackwell_ELBO):
        pytest.skip("its particles are always vectorized")
    elbo.vectorize_particles = vectorize
    values = torch.tensor([elbo.loss(toy.model, toy.guide, x.repeat(500)) / 500 for _ in range(40)])
    assert_unbiased(values, -value(*toy.states(x)).sum().detach(), resolution=0.02)


def test_the_models_part_of_wake_sleep_is_the_bounds_own_gradient():
    toy, x, _ = discrete_case()
    of_model = [toy.p_k, toy.p_j, toy.mean]
    torch.testing.assert_close(
        gradients(exact_wake(*toy.states(x), 3).sum(), of_model),
        gradients(exact_bound(*toy.states(x), 3).sum(), of_model),
    )


def test_wake_sleeps_guide_comes_closer_to_the_posteriors_gradient_with_more_particles():
    """Its declared bias is O(1/K): of the gradient of -KL(p(h | x) || q(h | x))."""
    toy, x, _ = discrete_case()
    of_guide = [toy.q_k, toy.q_j]

    def kl_to_guide(log_w, log_q):
        return ((log_w + log_q).softmax(0).detach() * log_q).sum(0)

    exact = gradients(kl_to_guide(*toy.states(x)).sum(), of_guide)
    gaps = [float((gradients(exact_wake(*toy.states(x), k).sum(), of_guide) - exact).norm()) for k in (2, 4)]
    assert gaps[1] < 0.75 * gaps[0]
    assert "O(1/K)" in RWS_ELBO.bias


@each
def test_terms_belong_to_the_loss(name):
    make, _, _ = CASES[name]
    toy, x, _ = discrete_case()
    terms = make().terms(toy.model, toy.guide, x.repeat(2000))
    p = terms.particles
    torch.testing.assert_close(terms.loss, -terms.bound.sum())
    torch.testing.assert_close(terms.shares.sum(0), torch.ones(4000))
    by_hand = p.log_likelihood + sum(p.log_prior[site] - p.log_guide[site] for site in ("k", "j"))
    torch.testing.assert_close(p.log_weights, by_hand)
    sampled = sum((terms.shares * (p.log_guide[site] - p.log_prior[site])).sum(0) for site in ("k", "j"))
    torch.testing.assert_close(terms.elbo, terms.reconstruction - sampled)
    if isinstance(make(), RaoBlackwell_ELBO | Reinforce_ELBO):
        torch.testing.assert_close(terms.bound, terms.elbo)
    # averages over the guide are those of the guide, however the particles were chosen
    log_w, log_q = toy.states(x)
    exact = (log_q.exp() * log_w).sum(0).detach()
    assert_unbiased(terms.elbo.reshape(2000, 2), exact)


@each
def test_the_exact_posterior_is_a_stationary_point(name):
    """Where the guide is the posterior, no objective moves it, in expectation."""
    make, _, _ = CASES[name]
    toy, x, _ = discrete_case()
    with torch.no_grad():  # the guide sees the sign of x only, so one x of each sign
        log_joint = (toy.states(x)[0] + toy.states(x)[1]).T.reshape(2, 3, 2)
        side = (x > 0).long()
        toy.q_k[side] = log_joint.logsumexp(-1)
        toy.q_j[side] = log_joint
    samples = estimates(make(), toy.model, toy.guide, [x.repeat(500)], [toy.q_k, toy.q_j], 500, 30)
    assert_unbiased(samples, torch.zeros_like(samples[0]))


@each
def test_a_masked_datapoint_and_a_subsampled_plate(name):
    make, _, _ = CASES[name]
    toy, x, _ = discrete_case()
    keep = torch.tensor([True, False])
    model, guide = (pyro.poutine.mask(fn, mask=keep) for fn in (toy.model, toy.guide))
    elbo = make()
    terms = elbo.terms(model, guide, x)
    if not isinstance(elbo, RaoBlackwell_ELBO):  # whose shares sum to one up to rounding
        assert terms.bound[1] == 0
    assert terms.bound[0] != 0
    terms = elbo.terms(*(scale_sites({"j": 0.5})(fn) for fn in (toy.model, toy.guide)), x)
    assert terms.loss.isfinite()


@each
def test_a_subsampled_plate_scales_the_sum_and_nothing_else(name):
    """With ten times the data, loss and gradients are ten times as large, and the terms of a datapoint as before."""
    make, _, _ = CASES[name]
    x, found = discrete_case()[1], []
    for scale in (1, 10):
        toy = SubsampledDiscrete(scale)
        pyro.clear_param_store()
        torch.manual_seed(0)
        terms = make().terms(toy.model, toy.guide, x.repeat(5))
        assert terms.particles.scale == scale
        found.append((terms.loss, gradients(terms.loss, list(toy.parameters())), terms))
    torch.testing.assert_close(found[1][0], 10 * found[0][0])
    torch.testing.assert_close(found[1][1], 10 * found[0][1])
    for site in ("k", "j"):
        torch.testing.assert_close(found[1][2].kl[site], found[0][2].kl[site])
    torch.testing.assert_close(found[1][2].bound, found[0][2].bound)


# One draw against the formula by hand


def drawn(elbo, seed=3):
    toy, x, parameters = discrete_case()
    elbo.max_plate_nesting = 1 + (elbo.num_particles > 1)
    torch.manual_seed(seed)
    terms = elbo.terms(toy.model, toy.guide, x)
    p = terms.particles
    return terms, p.log_weights, p.log_guide["k"] + p.log_guide["j"], parameters


def check_by_hand(terms, surrogate, parameters):
    ours = torch.autograd.grad(terms.loss, parameters, retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(-surrogate.sum(), parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_iwae_by_hand():
    terms, log_w, score, parameters = drawn(IWAE_ELBO(3))
    bound = log_w.logsumexp(0) - math.log(3)
    check_by_hand(terms, bound + (bound.detach() * score).sum(0), parameters)


def test_reinforce_by_hand():
    terms, log_w, score, parameters = drawn(Reinforce_ELBO(3))
    signal = torch.stack([log_w[k] - log_w[[j for j in range(3) if j != k]].mean(0) for k in range(3)]).detach()
    check_by_hand(terms, (log_w + signal * score).mean(0), parameters)


def test_wake_sleep_by_hand():
    terms, log_w, score, parameters = drawn(RWS_ELBO(3))
    share = log_w.detach().exp() / log_w.detach().exp().sum(0)
    check_by_hand(terms, (share * (log_w + score + score)).sum(0), parameters)  # log w + log q = log p


def test_rao_blackwell_by_hand():
    elbo = RaoBlackwell_ELBO(1, site="k")
    terms, f, _, parameters = drawn(elbo)
    log_k, log_j = terms.particles.log_guide["k"], terms.particles.log_guide["j"]
    q, rest = log_k[0].exp(), 1 - log_k[0].exp()
    inner = q * (f[0] + f[0].detach() * log_j[0]) + rest * (f[1] + f[1].detach() * log_j[1])
    # inside q * (...) the score of j is weighted by q without gradient through q: add it apart
    apart = (q * f[0]).detach() * log_j[0] + (rest * f[1]).detach() * log_j[1]
    outer = rest.detach() * (f[1] - f[0]).detach() * (log_k[1] - rest.log())
    assert not torch.allclose(inner, q * f[0] + rest * f[1])
    check_by_hand(terms, q * f[0] + rest * f[1] + apart + outer, parameters)


# What each is for


def test_the_running_average_is_a_number_and_moves_only_in_training():
    toy, x, _ = discrete_case()
    elbo = Reinforce_ELBO(1, "average", decay=0.5)
    elbo.loss(toy.model, toy.guide, x)
    assert elbo.module.mean.isnan()
    for n in (4, 3):  # a short last batch is no different
        elbo.differentiable_loss(toy.model, toy.guide, x.repeat(n))
    assert elbo.module.mean.isfinite()
    assert elbo.module.mean.shape == ()


def test_a_network_baseline_is_trained_with_the_rest_and_takes_variance_away():
    toy, x, _ = discrete_case()
    elbo = Reinforce_ELBO(1, Baseline())
    optimizer = pyro.optim.Adam(lambda name: {"lr": 0.1 if name.startswith("baseline") else 0.0})
    svi = pyro.infer.SVI(toy.model, toy.guide, optimizer, elbo)
    for _ in range(200):
        svi.step(x.repeat(50))
    log_w, log_q = toy.states(x)
    torch.testing.assert_close(elbo.module(x).detach(), exact_elbo(log_w, log_q).detach(), atol=0.3, rtol=0)
    noise = [
        estimates(e, toy.model, toy.guide, [x.repeat(50)], [toy.q_k], 50, 200).var(0).sum()
        for e in (elbo, Reinforce_ELBO(1, "none"))
    ]
    assert noise[0] < 0.5 * noise[1]


def test_a_baseline_of_another_shape_is_refused():
    toy, x, _ = discrete_case()
    with pytest.raises(ValueError, match=r"baseline: expected .* one number for each datapoint, \(2,\), got \(1, 2\)"):
        Reinforce_ELBO(1, torch.nn.Unflatten(0, (1, 2))).loss(toy.model, toy.guide, x)


@pytest.mark.parametrize("top", [None, 2])
def test_a_defensive_mixture_is_weighted_as_what_was_drawn_from(top: int | None):
    """Value and gradient against the sum over all states of both particles, drawn from the mixture."""
    toy, x, parameters = discrete_case()
    share, num_particles, copies = 0.3, 2, 2000
    log_w, log_q = toy.states(x)
    log_r = toy.mixed(x, share, top)
    value = exact_bound(log_w + log_q - log_r, log_r.detach(), num_particles)
    exact = gradients(-exact_wake(log_w + log_q, log_q, num_particles, log_r).sum(), parameters)
    elbo = RWS_ELBO(num_particles, defensive=share, top=top)
    samples = estimates(elbo, toy.model, toy.guide, [x.repeat(copies)], parameters, copies, 40)
    assert_unbiased(samples, exact, resolution=0.05)
    values = torch.tensor([elbo.loss(toy.model, toy.guide, x.repeat(500)) / 500 for _ in range(40)])
    assert_unbiased(values, -value.sum().detach(), resolution=0.02)


def test_a_defensive_mixture_tries_what_the_guide_has_given_up():
    """Where the guide is sure and wrong, only the mixture ever sees the other values."""
    toy, x, _ = discrete_case()
    with torch.no_grad():
        toy.q_k.copy_(torch.tensor([[0.0, 40.0, 0.0]]).expand(2, 3))
        toy.p_k.copy_(torch.tensor([6.0, 0.0, 0.0]))
        toy.mean.zero_()
    push = {}
    for share in (0.0, 0.2):
        elbo = RWS_ELBO(8, defensive=share)
        push[share] = gradients(elbo.differentiable_loss(toy.model, toy.guide, x.repeat(20)), [toy.q_k]).norm()
    assert push[0.0] < 1e-6
    assert push[0.2] > 1
    terms = elbo.terms(toy.model, toy.guide, x)
    by_hand = torch.distributions.kl_divergence(dist.Categorical(logits=toy.q_k[0]), dist.Categorical(logits=toy.p_k))
    torch.testing.assert_close(terms.kl["k"], by_hand.expand(2))  # the guide's own, not the mixture's


def test_baselines_take_variance_away():
    toy, x, _ = discrete_case()
    noise = {}
    for name, elbo in {
        "iwae": IWAE_ELBO(4),
        "vimco": VIMCO_ELBO(4),
        "none": Reinforce_ELBO(4, "none"),
        "loo": Reinforce_ELBO(4),
        "rao": RaoBlackwell_ELBO(2, site="k"),
    }.items():
        noise[name] = estimates(elbo, toy.model, toy.guide, [x.repeat(50)], [toy.q_k], 50, 200).var(0).sum()
    assert noise["vimco"] < 0.5 * noise["iwae"]
    assert noise["loo"] < 0.5 * noise["none"]
    assert noise["rao"] < 0.5 * noise["none"]


def test_with_all_but_certainty_outside_the_rest_counts_nothing():
    """Where the guide has no mass left to sample from, value and gradient stay finite."""
    toy, x, parameters = discrete_case()
    with torch.no_grad():
        toy.q_k.copy_(torch.tensor([[2000.0, 0.0, -2000.0]]).expand(2, 3))
    terms = RaoBlackwell_ELBO(1, site="k").terms(toy.model, toy.guide, x)
    assert terms.bound.isfinite().all()
    assert gradients(terms.loss, parameters).isfinite().all()


def test_truncated_guide_with_stock_enumeration_is_the_sum_by_hand():
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(1))
    inner = pv.SimilarityGuide(3, normalise="memory", temperature=1.0, tied=False)
    vma = reference.vma(address_guide=pv.TruncatedGuide(inner, k=2))  # exact latents: f = log p(x | m_a)
    memory, x = pv.Memory(torch.randn(5, 3)), torch.randn(4, 3)
    guide = pyro.infer.config_enumerate(vma.guide, "parallel", expand=True)
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vma.model, guide, memory, x)
    logits = inner(vma.encode(memory), vma.encode_x(x)).logits
    by_hand = 0.0
    for b in range(4):
        top = logits[b].topk(2).indices
        log_q = logits[b, top].log_softmax(0)
        f = reference.slot_log_evidence(memory, x)[b, top] - math.log(5) - log_q
        by_hand = by_hand - (log_q.exp() * f).sum()
    torch.testing.assert_close(loss, by_hand)
    parameters = list(inner.parameters())
    for one, other in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(by_hand, parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_truncated_categorical():
    logits, support = torch.randn(4, 2), torch.tensor([[0, 1], [5, 2], [3, 4], [2, 0]])
    q = pv.distributions.TruncatedCategorical(logits, support, 6)
    torch.testing.assert_close(q.probs.gather(-1, support).sum(-1), torch.ones(4))
    assert ((q.probs > 0).sum(-1) == 2).all()
    assert torch.isin(q.sample((100,))[:, 1], support[1]).all()
    expanded = q.expand([3, 4])
    assert torch.equal(expanded.enumerate_support()[:, 1], support.T)
    with pytest.raises(ValueError, match="expand=True"):
        q.enumerate_support(expand=False)
    with pytest.raises(ValueError, match=r"k: expected a whole number in \[1, 10,000,000\], got 0"):
        pv.TruncatedGuide(pv.SimilarityGuide(3), k=0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RWS_ELBO(1), "num_particles: RWS_ELBO needs at least 2, got 1"),
        (lambda: IWAE_ELBO(0), r"num_particles: expected a whole number in \[1, 10,000,000\], got 0"),
        (lambda: Reinforce_ELBO(1), "num_particles: the leave-one-out baseline needs at least 2, got 1"),
        (
            lambda: Reinforce_ELBO(2, "mean"),
            r"baseline: expected 'leave\-one\-out' or 'average' or 'none' .*, got 'mean'",
        ),
        (lambda: Reinforce_ELBO(2, decay=1.0), r"decay: expected a number in \[0, 1\), got 1.0"),
        (lambda: RWS_ELBO(4, defensive=1.0), r"defensive: expected a number in \[0, 1\), got 1.0"),
        (lambda: RWS_ELBO(4, top=2), "top: it has no effect without a share; got 2"),
        (
            lambda: RWS_ELBO(4, defensive=0.1, top=0),
            r"top: expected a whole number in \[1, 10,000,000\] or None, got 0",
        ),
        (lambda: RWS_ELBO(4, dreg=True), "dreg: no latent is differentiated through"),
        (
            lambda: VIMCO_ELBO(4, backward=4),
            r"backward: expected fewer than the 4 particles, got 4\. With backward=None the gradient is that of all",
        ),
        (
            lambda: IWAE_ELBO(1, backward=1),
            r"backward: expected fewer than the 1 particles, got 1\. With backward=None the gradient is that of all",
        ),
        (lambda: RWS_ELBO(4, backward=0), r"backward: expected a whole number in \[1, 10,000,000\] or None, got 0"),
        (lambda: VIMCO_ELBO(4, vectorize_particles=False, backward=1), "backward: particles have to be vectorized"),
        (lambda: VIMCO_ELBO(2.5), r"num_particles: expected a whole number in \[1, 10,000,000\], got 2\.5"),
        (lambda: VIMCO_ELBO(True), r"num_particles: expected a whole number in \[1, 10,000,000\], got True"),
        (lambda: RaoBlackwell_ELBO(2.0), r"k: expected a whole number in \[1, 10,000,000\], got 2\.0"),
        (lambda: IWAE_ELBO(4, backward=1.5), r"backward: expected a whole number .*or None, got 1\.5"),
        (
            lambda: ParticleELBO.__init__(Reinforce_ELBO(4), 4, backward=1),
            "backward: Reinforce_ELBO does not weight its particles",
        ),
        (lambda: RaoBlackwell_ELBO(0), r"k: expected a whole number in \[1, 10,000,000\], got 0"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"k": 3, "site": "k"}, "k: expected fewer than the 3 values of site 'k', got 3"),
        ({"k": 1, "site": "j"}, "site: 'j' depends on another latent"),
        ({"k": 1, "site": "b"}, r"site: the guide has no sample site 'b'; it has \['k', 'j'\]"),
    ],
)
def test_rao_blackwell_refuses_what_it_cannot_sum(kwargs, match):
    toy, x, _ = discrete_case()
    with pytest.raises(ValueError, match=match):
        RaoBlackwell_ELBO(**kwargs).loss(toy.model, toy.guide, x)


def test_rao_blackwell_refuses_a_site_that_is_not_categorical():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site: 'z' is Normal, expected a Categorical"):
        RaoBlackwell_ELBO(1, site="z").loss(model, guide, torch.zeros(3))


def test_reprs():
    assert (
        repr(VIMCO_ELBO(4, "geometric", backward=1)) == "VIMCO_ELBO(num_particles=4, baseline='geometric', backward=1)"
    )
    biased = "  # biased: guide: self-normalised, O(1/K)"
    assert repr(RWS_ELBO(3, backward=2)) == "RWS_ELBO(num_particles=3, backward=2)" + biased
    assert repr(RWS_ELBO(3, pathwise=True)) == "RWS_ELBO(num_particles=3, pathwise=True)" + biased
    assert repr(Reinforce_ELBO(1, Baseline())) == "Reinforce_ELBO(num_particles=1, baseline=Baseline)"
    assert repr(IWAE_ELBO(3)) == "IWAE_ELBO(num_particles=3)"
    assert repr(Reinforce_ELBO(3, decay=0.5)) == "Reinforce_ELBO(num_particles=3, decay=0.5)"
    assert repr(RaoBlackwell_ELBO(3, site="k")) == "RaoBlackwell_ELBO(k=3, site='k')"
