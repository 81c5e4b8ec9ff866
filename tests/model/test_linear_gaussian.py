"""The closed forms of the reference model against numerical integration and Bayes' rule by hand."""

import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.memory import EncodedMemory, Template

pytestmark = pytest.mark.usefixtures("float64")

GRID = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)


def one_dimensional(prior=None):
    torch.manual_seed(0)
    model = pv.LinearGaussianMemory(
        dim=2, latent_dim=1, address_prior=prior, generator=torch.Generator().manual_seed(2)
    )
    return model, pv.Memory(torch.randn(4, 2)), torch.randn(3, 2)


def on_grid(model, memory, x):
    """log p(z | m_a) p(x | z, m_a) at every grid point of z, through the model's own parts: (N, S, B)."""
    vma = model.vma()
    template = vma.encode(memory).read(torch.arange(memory.num_slots).unsqueeze(-1))
    z = GRID[:, None, None, None].expand(-1, memory.num_slots, len(x), 1)
    return vma.latent_prior(template).log_prob(z) + vma.likelihood(z, template).log_prob(x)


def test_evidence_against_integration():
    model, memory, x = one_dimensional()
    integral = torch.trapezoid(on_grid(model, memory, x).exp(), GRID, dim=0).log().T
    torch.testing.assert_close(model.slot_log_evidence(memory, x), integral)
    expected = (integral.exp().mean(-1)).log()  # a uniform prior
    torch.testing.assert_close(model.log_evidence(memory, x), expected)


def test_evidence_is_a_density_of_x():
    model, memory, _ = one_dimensional()
    side = torch.linspace(-14.0, 14.0, 561)
    x = torch.cartesian_prod(side, side)
    density = model.log_evidence(memory, x).exp().reshape(len(side), -1)
    assert torch.trapezoid(torch.trapezoid(density, side), side).item() == pytest.approx(1.0, abs=1e-6)


def test_latent_posterior_against_integration():
    model, memory, x = one_dimensional()
    joint = on_grid(model, memory, x)
    posterior = joint - torch.trapezoid(joint.exp(), GRID, dim=0).log()
    template = memory.templates.unsqueeze(1)
    closed = model.latent_posterior(x, template)
    torch.testing.assert_close(closed.log_prob(GRID[:, None, None, None]), posterior, rtol=1e-6, atol=1e-6)


def test_address_posterior_by_bayes_rule():
    prior = pv.LearnedPrior(2)
    with torch.no_grad():
        prior.query.copy_(torch.tensor([1.0, -2.0]))
    model, memory, x = one_dimensional(prior)
    p_a = prior(EncodedMemory(memory, Template(memory.templates, memory.templates))).probs
    joint = p_a * model.slot_log_evidence(memory, x).exp()
    torch.testing.assert_close(model.address_posterior(memory, x).probs, joint / joint.sum(-1, keepdim=True))
    torch.testing.assert_close(model.log_evidence(memory, x), joint.sum(-1).log())
    assert (p_a - 0.25).abs().max() > 0.1  # the prior is not the uniform one


def test_one_memory_per_datapoint_is_the_same_as_one_by_one():
    model, _, x = one_dimensional()
    templates = torch.randn(3, 4, 2)
    together = pv.Memory(templates, per_datapoint=True)
    alone = [model.log_evidence(pv.Memory(t), x[i : i + 1]) for i, t in enumerate(templates)]
    torch.testing.assert_close(model.log_evidence(together, x), torch.cat(alone))


def test_a_masked_slot_is_an_absent_one():
    model, memory, x = one_dimensional()
    masked = pv.Memory(memory.templates, mask=torch.tensor([True, False, True, True]))
    without = pv.Memory(memory.templates[[0, 2, 3]])
    torch.testing.assert_close(model.log_evidence(masked, x), model.log_evidence(without, x))
    assert (model.address_posterior(masked, x).probs[:, 1] == 0).all()


def test_a_duplicate_slot_shifts_the_evidence_as_the_formula_says():
    model, memory, x = one_dimensional()
    doubled = pv.Memory(torch.cat([memory.templates, memory.templates[:1]]))
    slot = model.slot_log_evidence(memory, x).exp()
    torch.testing.assert_close(model.log_evidence(doubled, x).exp(), (slot.sum(-1) + slot[:, 0]) / 5)


def test_same_generator_same_model_and_bad_arguments():
    one, two = (pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"noise: expected a positive number, got 0\.0"):
        pv.LinearGaussianMemory(noise=0.0)
    with pytest.raises(ValueError, match="exact: False needs both"):
        one.vma(exact=False)


def test_generate_at_a_temperature_has_the_variance_of_that_temperature() -> None:
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    memory, n, tau = pv.Memory(torch.randn(4, 3)), 40_000, 0.4
    x = reference.vma(exact=True).generate(memory, n, address=1, mean=True, temperature=tau)
    template = memory.templates[1]
    latent = reference.to_latent @ template + reference.latent_offset
    mean = reference.loading @ latent + reference.skip @ template + reference.offset
    scaled = tau * reference.loading * reference.latent_log_scale.exp()
    expected = (scaled @ scaled.mT).detach()
    error = x.std(0) / n**0.5
    assert ((x.mean(0) - mean.detach()).abs() < 5 * error).all()
    variance = expected.diagonal()
    assert ((x.var(0) - variance).abs() < 5 * variance * (2 / n) ** 0.5).all()
    at_mean = reference.vma(exact=True).generate(memory, 2, address=1, mean=True, temperature=0)
    torch.testing.assert_close(at_mean, mean.detach().expand(2, -1))


def test_the_best_of_some_draws_are_those_that_the_guide_recognises() -> None:
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(generator=torch.Generator().manual_seed(0))
    vma, memory = reference.vma(exact=True), pv.Memory(torch.randn(6, 3))
    for each in (memory, pv.Memory(memory.templates.expand(2, -1, -1), per_datapoint=True)):
        shares = []
        for best_of in (1, 8):
            x = vma.generate(each, 400, address=2, best_of=best_of)
            shares.append(reference.address_posterior(memory, x.flatten(0, -2)).probs[:, 2].mean())
            assert x.shape == (400, *each.batch_shape, 3)
        assert shares[1] > shares[0] + 0.1


@pytest.mark.parametrize("wrong", [{"n": 0}, {"best_of": 0}, {"temperature": -1.0}, {"temperature": float("nan")}])
def test_generate_refuses_numbers_out_of_range(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        pv.VMA.for_vectors(3).generate(pv.Memory(torch.randn(4, 3)), **wrong)
