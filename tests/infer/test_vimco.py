"""VIMCO against the exact multi-sample bound, summed over addresses and integrated over latents."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import discrete_case, estimates, exact_bound, gradients
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, config_enumerate
from pyro.optim import Adam
from torch import nn

import pyro_vmem as pv
from pyro_vmem.infer import VIMCO_ELBO
from pyro_vmem.infer import vimco as vimco_module
from pyro_vmem.infer.annealing import scale_sites
from pyro_vmem.testing import assert_unbiased

pytestmark = pytest.mark.usefixtures("float64")


def exact_bound_of_two(log_w, log_q):
    """The same for two particles with many states, in one outer sum."""
    pair = torch.logaddexp(log_w.unsqueeze(0), log_w.unsqueeze(1)) - math.log(2)
    return ((log_q.unsqueeze(0) + log_q.unsqueeze(1)).exp() * pair).sum((0, 1))


def test_a_wrong_estimator_is_caught(monkeypatch):
    """A baseline that looks at the particle itself is biased: the same test must say so."""
    toy, x, parameters = discrete_case()
    exact = gradients(-exact_bound(*toy.states(x), 2).sum(), parameters)
    monkeypatch.setattr(vimco_module, "leave_one_out", lambda log_w, _: 0.5 * log_w)
    samples = estimates(VIMCO_ELBO(2), toy.model, toy.guide, [x.repeat(2000)], parameters, 2000, 40)
    with pytest.raises(AssertionError, match="standard errors from the exact value"):
        assert_unbiased(samples, exact)


def test_pyros_importance_weighted_bound_is_caught_too():
    """Why VIMCO is here: stock RenyiELBO(alpha=0) drops the score of a discrete guide site, silently."""
    toy, x, _ = discrete_case()
    exact = gradients(-exact_bound(*toy.states(x), 2).sum(), [toy.q_k])
    renyi = RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    rows = []
    for _ in range(20):
        toy.zero_grad()
        renyi.loss_and_grads(toy.model, toy.guide, x.repeat(500))
        grad = toy.q_k.grad if toy.q_k.grad is not None else torch.zeros_like(toy.q_k)
        rows.append(grad.flatten() / 500)
    with pytest.raises(AssertionError):
        assert_unbiased(torch.stack(rows), exact)


@pytest.mark.parametrize(("baseline", "backward"), [("arithmetic", None), ("geometric", None), ("arithmetic", 1)])
def test_gradient_of_a_vma_is_exact_in_expectation(baseline, backward):
    """Addresses summed, the reparameterised latent by the trapezoid rule, which is exact for smooth tails."""
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(dim=2, latent_dim=1, generator=torch.Generator().manual_seed(1))
    vma = reference.vma(
        exact=False,
        address_guide=pv.SimilarityGuide(2, embed_dim=2, normalise="memory", temperature=1.0, tied=False),
        latent_guide=pv.GaussianGuide(1, num_features=2, hidden=(3,)),
    )
    memory, x = pv.Memory(torch.randn(3, 2)), torch.randn(2, 2)
    parameters = list(vma.parameters())

    def states(nodes):
        encoded, target = vma.encode(memory), vma.encode_x(x)
        template = encoded.read(torch.arange(3).unsqueeze(-1))
        log_q_a = vma.address_guide(encoded, target).logits.T  # (S, B)
        q_z = vma.latent_guide(target, template)
        points = torch.linspace(-9.0, 9.0, nodes)
        z = q_z.mean + q_z.stddev * points[:, None, None, None]  # (N, S, B, 1)
        log_w = vma.latent_prior(template).log_prob(z) + vma.likelihood(z, template).log_prob(x) - q_z.log_prob(z)
        log_w = log_w + vma.address_prior(encoded).logits.unsqueeze(-1) - log_q_a
        log_node = (-0.5 * points**2).log_softmax(0)[:, None, None]
        return log_w.flatten(0, 1), (log_q_a + log_node).flatten(0, 1)

    exact = gradients(-exact_bound_of_two(*states(200)).sum(), parameters)
    finer = gradients(-exact_bound_of_two(*states(300)).sum(), parameters)
    torch.testing.assert_close(exact, finer, rtol=1e-6, atol=1e-8)
    copies = 2000
    elbo = VIMCO_ELBO(2, baseline=baseline, max_plate_nesting=1, backward=backward)
    samples = estimates(elbo, vma.model, vma.guide, [memory, x.repeat(copies, 1)], parameters, copies, 40)
    assert_unbiased(samples, exact, resolution=0.05)


@pytest.mark.parametrize("baseline", ["arithmetic", "geometric"])
def test_one_draw_against_the_formula_by_hand(baseline):
    toy, x, parameters = discrete_case()
    elbo = VIMCO_ELBO(3, baseline=baseline, max_plate_nesting=1)
    torch.manual_seed(3)
    terms = elbo.terms(toy.model, toy.guide, x)
    log_w, score = terms.particles.log_weights, sum(terms.particles.score.values())
    surrogate = 0.0
    for b in range(2):
        bound = log_w[:, b].logsumexp(0) - math.log(3)
        surrogate = surrogate + bound
        for k in range(3):
            others = [log_w[j, b] for j in range(3) if j != k]
            if baseline == "arithmetic":
                left_out = torch.stack(others).logsumexp(0) - math.log(2)
            else:
                left_out = torch.stack([*others, sum(others) / 2]).logsumexp(0) - math.log(3)
            surrogate = surrogate + (bound - left_out).detach() * score[k, b]
    by_hand = gradients(-surrogate, parameters)
    torch.manual_seed(3)
    ours = gradients(elbo.differentiable_loss(toy.model, toy.guide, x), parameters)
    torch.testing.assert_close(ours, by_hand)


def test_leave_one_out_survives_a_dominating_weight():
    log_w = torch.tensor([[800.0], [-800.0], [-801.0]])
    out = vimco_module.leave_one_out(log_w, "arithmetic")
    expected = torch.tensor([[-800.0], [-801.0]]).logsumexp(0) - math.log(2)
    torch.testing.assert_close(out[0], expected)
    assert out.isfinite().all()
    assert vimco_module.leave_one_out(log_w, "geometric").isfinite().all()


def test_bounds_are_ordered_and_the_exact_guide_closes_them():
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    memory, x = pv.Memory(torch.randn(4, 3)), torch.randn(5, 3)
    exact = reference.log_evidence(memory, x).detach()
    rough = reference.vma(
        exact=False,
        address_guide=pv.SimilarityGuide(3),
        latent_guide=pv.GaussianGuide(2, num_features=3),
        name="rough",
    )
    copies = 4000
    repeated = x.repeat(copies, 1)
    means, errors = [], []
    for terms in (VIMCO_ELBO(k, max_plate_nesting=1).terms(rough.model, rough.guide, memory, repeated) for k in (2, 8)):
        if not means:
            elbo = terms.elbo.reshape(copies, -1).mean(1)
            means, errors = [elbo.mean()], [elbo.std() / copies**0.5]
        bound = terms.bound.reshape(copies, -1).mean(1)
        means.append(bound.mean())
        errors.append(bound.std() / copies**0.5)
    steps = torch.stack([*means, exact.mean()]).diff()
    assert (steps > 5 * max(errors)).all(), steps  # strictly, beyond the noise
    perfect = reference.vma(name="perfect")
    terms = VIMCO_ELBO(4, max_plate_nesting=1).terms(perfect.model, perfect.guide, memory, x)
    torch.testing.assert_close(terms.bound, exact)
    torch.testing.assert_close(terms.ess, torch.full((5,), 4.0))


def test_terms_add_up_to_the_loss():
    torch.manual_seed(0)
    vma = pv.VMA.for_vectors(3)
    memory, x = pv.Memory(torch.randn(6, 3)), torch.randn(5, 3)
    terms = VIMCO_ELBO(4, max_plate_nesting=1).terms(vma.model, vma.guide, memory, x)
    p = terms.particles
    log_w = p.log_likelihood + sum(p.log_prior[site] - p.log_guide[site] for site in ("a", "z"))
    torch.testing.assert_close(log_w, p.log_weights)
    torch.testing.assert_close(terms.loss, -(log_w.logsumexp(0) - math.log(4)).sum())
    sampled_kl_a = (p.log_guide["a"] - p.log_prior["a"]).mean(0)
    torch.testing.assert_close(terms.elbo, terms.reconstruction - sampled_kl_a - terms.kl["z"])
    encoded = vma.encode(memory)
    q, prior = vma.address_guide(encoded, vma.encode_x(x)).logits, vma.address_prior(encoded).logits
    torch.testing.assert_close(terms.kl["a"], pv.diagnostics.information_gain(q, prior).detach())
    assert ((terms.ess >= 1 - 1e-9) & (terms.ess <= 4 + 1e-9)).all()


def test_without_discrete_latents_it_is_the_importance_weighted_bound():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    loc = torch.tensor(0.3, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, 0.8))

    x = torch.tensor([0.2, -1.0, 2.0])
    stock = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(1)
    assert stock.loss(model, guide, x) != 0
    torch.manual_seed(1)
    terms = VIMCO_ELBO(5, max_plate_nesting=1).terms(model, guide, x)
    assert terms.particles.score == {}
    (ours,) = torch.autograd.grad(terms.loss, loc)
    torch.manual_seed(1)
    z = (
        loc
        + 0.8 * (poutine.trace(pyro.plate("k", 5, dim=-2)(guide)).get_trace(x).nodes["z"]["value"] - loc).detach() / 0.8
    )
    log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x) - dist.Normal(loc, 0.8).log_prob(z)
    (by_hand,) = torch.autograd.grad(-(log_w.logsumexp(0) - math.log(5)).sum(), loc)
    torch.testing.assert_close(ours, by_hand)


# Plates, scales and masks


def normal_pair(subsample=None, inner=None):
    def model(x):
        with pyro.plate("data", 10 if subsample is not None else len(x), subsample=subsample, dim=-2 if inner else -1):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            if inner:
                with pyro.plate("pixels", x.shape[-1], dim=-1):
                    pyro.sample("x", dist.Normal(k.to(x.dtype), 1.0), obs=x)
            else:
                pyro.sample("x", dist.Normal(k.to(x.dtype), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 10 if subsample is not None else len(x), subsample=subsample, dim=-2 if inner else -1):
            pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))

    return model, guide


def test_plate_subsampling_scales_the_sum_and_not_the_weights():
    x = torch.tensor([0.1, 0.9])
    torch.manual_seed(0)
    plain = VIMCO_ELBO(4).terms(*normal_pair(), x)
    torch.manual_seed(0)
    subsampled = VIMCO_ELBO(4).terms(*normal_pair(subsample=torch.tensor([3, 5])), x)
    torch.testing.assert_close(subsampled.bound, plain.bound)
    torch.testing.assert_close(subsampled.loss, 5.0 * plain.loss)


def test_an_inner_plate_is_summed():
    torch.manual_seed(0)
    model, guide = normal_pair(inner=True)
    terms = VIMCO_ELBO(4).terms(model, guide, torch.randn(3, 7))
    assert terms.bound.shape == (3,)
    assert terms.particles.log_weights.shape == (4, 3)


def test_a_masked_datapoint_counts_nothing():
    x = torch.tensor([0.1, 0.9])
    keep = torch.tensor([True, False])
    model, guide = (poutine.mask(fn, mask=keep) for fn in normal_pair())
    torch.manual_seed(0)
    terms = VIMCO_ELBO(4).terms(model, guide, x)
    assert terms.bound[1] == 0
    torch.manual_seed(0)
    whole = VIMCO_ELBO(4).terms(*normal_pair(), x)
    torch.testing.assert_close(terms.bound[0], whole.bound[0])


def test_scaled_sites_temper_the_weights():
    x = torch.tensor([0.1, 0.9])
    torch.manual_seed(0)
    plain = VIMCO_ELBO(4).terms(*normal_pair(), x).particles
    model, guide = (scale_sites({"k": 0.25})(fn) for fn in normal_pair())
    torch.manual_seed(0)
    scaled = VIMCO_ELBO(4).terms(model, guide, x).particles
    expected = plain.log_likelihood + 0.25 * (plain.log_prior["k"] - plain.log_guide["k"])
    torch.testing.assert_close(scaled.log_weights, expected)
    torch.testing.assert_close(scaled.score["k"], plain.score["k"])  # the score is of what was sampled


def test_a_short_last_batch_is_no_different():
    toy, x, parameters = discrete_case()
    svi = SVI(toy.model, toy.guide, Adam({"lr": 1e-2}), VIMCO_ELBO(2))
    assert all(math.isfinite(svi.step(x.repeat(n))) for n in (8, 8, 3))
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)


# The interface


def test_loss_and_grads_is_differentiable_loss():
    toy, x, parameters = discrete_case()
    elbo = VIMCO_ELBO(3)
    elbo.loss(toy.model, toy.guide, x)  # guesses the plate nesting, which draws
    torch.manual_seed(0)
    value = elbo.loss(toy.model, toy.guide, x)
    torch.manual_seed(0)
    assert elbo.loss_and_grads(toy.model, toy.guide, x) == value
    grads = torch.cat([p.grad.flatten() for p in parameters])
    torch.manual_seed(0)
    loss = elbo.differentiable_loss(toy.model, toy.guide, x)
    assert loss.item() == value
    torch.testing.assert_close(gradients(loss, parameters), grads)


def test_elbo_module():
    class Wrapped(nn.Module):
        def __init__(self, toy, fn):
            super().__init__()
            self.toy, self.fn = toy, fn

        def forward(self, x):
            return self.fn(x)

    toy, x, parameters = discrete_case()
    loss = VIMCO_ELBO(2)(Wrapped(toy, toy.model), Wrapped(toy, toy.guide))(x)
    loss.backward()
    assert all(p.grad is not None for p in parameters)


def test_training_reaches_the_posterior():
    """Far from the answer at first, close to it afterwards."""
    torch.manual_seed(0)
    toy, x, _ = discrete_case()
    for name in ("p_k", "p_j", "mean"):
        getattr(toy, name).requires_grad_(False)
    toy.eval()

    @torch.no_grad()
    def gap():
        log_w, log_q = toy.states(x)
        return float((log_q.exp() * (log_q - (log_w + log_q).log_softmax(0))).sum(0).mean())

    before = gap()
    svi = SVI(toy.model, toy.guide, Adam({"lr": 0.05}), VIMCO_ELBO(2))
    for _ in range(300):
        svi.step(x.repeat(16))
    assert before > 0.5
    assert gap() < 0.1 * before


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_particles": 1}, "num_particles: VIMCO_ELBO needs at least 2, got 1"),
        ({"baseline": "none"}, "baseline: expected 'arithmetic' or 'geometric', got 'none'"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        VIMCO_ELBO(**kwargs)


def test_an_enumerated_site_is_refused():
    toy, x, _ = discrete_case()
    with pytest.raises(ValueError, match=r"site 'k' is marked for enumeration.*TraceEnum_ELBO"):
        VIMCO_ELBO(2, max_plate_nesting=1).loss(toy.model, config_enumerate(toy.guide), x)


def test_a_subsampled_inner_plate_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 9, subsample_size=x.shape[-1], dim=-1):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="plate 'pixels' inside the data plate is subsampled"):
        VIMCO_ELBO(2).loss(model, guide, torch.zeros(3, 4))


def test_a_guide_without_a_site_is_refused():
    model, _ = normal_pair()
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="guide: it has no sample site 'k'"):
        VIMCO_ELBO(2).loss(model, lambda x: None, torch.zeros(3))


def test_repr_and_stock_objectives_side_by_side():
    toy, x, _ = discrete_case()
    assert repr(VIMCO_ELBO(3, "geometric")) == "VIMCO_ELBO(num_particles=3, baseline='geometric')"
    assert math.isfinite(Trace_ELBO().loss(toy.model, toy.guide, x))
