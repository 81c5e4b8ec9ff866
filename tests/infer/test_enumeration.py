"""Stock objectives on a VMA: enumeration equals the sum by hand, in value and gradient."""

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate

import pyro_vmem as pv
from pyro_vmem.testing import assert_unbiased

pytestmark = pytest.mark.usefixtures("float64")


def case(per_datapoint=False):
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(dim=3, latent_dim=2, generator=torch.Generator().manual_seed(1))
    vma = reference.vma(
        exact=False,
        address_guide=pv.SimilarityGuide(3, normalise="memory", temperature=1.0, tied=False),
        latent_guide=pv.GaussianGuide(2, num_features=3),
    )
    templates = torch.randn(2, 5, 3) if per_datapoint else torch.randn(5, 3)
    return reference, vma, pv.Memory(templates, per_datapoint=per_datapoint), torch.randn(2, 3)


def hand_marginalised(vma, memory, x, noise):
    """-sum_a q(a) [log p(a) - log q(a) + E_z ...], the latent drawn with the given noise (S, B, D)."""
    encoded, target = vma.encode(memory), vma.encode_x(x)
    template = encoded.read(torch.arange(memory.num_slots).unsqueeze(-1))
    q_a = vma.address_guide(encoded, target).logits.T
    p_a = vma.address_prior(encoded).logits
    p_a = p_a.T if memory.per_datapoint else p_a.unsqueeze(-1)
    q_z = vma.latent_guide(target, template)
    z = q_z.mean + q_z.stddev * noise
    inner = vma.latent_prior(template).log_prob(z) + vma.likelihood(z, template).log_prob(x) - q_z.log_prob(z)
    return -(q_a.exp() * (p_a - q_a + inner)).sum()


@pytest.mark.parametrize("per_datapoint", [False, True])
def test_enumeration_is_the_sum_by_hand(per_datapoint):
    _, vma, memory, x = case(per_datapoint)
    guide = config_enumerate(vma.guide, "parallel")
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    torch.manual_seed(7)
    loss = elbo.differentiable_loss(vma.model, guide, memory, x)
    torch.manual_seed(7)
    by_hand = hand_marginalised(vma, memory, x, torch.randn(5, 2, 2))
    torch.testing.assert_close(loss, by_hand)
    parameters = list(vma.parameters())
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = torch.autograd.grad(by_hand, parameters, allow_unused=True)
    for (name, _), g, h in zip(vma.named_parameters(), ours, expected, strict=True):
        assert g is not None, name
        assert h is not None, name
        torch.testing.assert_close(g, h)


def test_a_masked_slot_survives_enumeration():
    _, vma, memory, x = case()
    masked = pv.Memory(memory.templates, mask=torch.tensor([True, True, False, True, True]))
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vma.model, config_enumerate(vma.guide), masked, x)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vma.parameters())


def test_with_the_exact_guide_the_bound_is_the_evidence_and_stationary():
    reference, _, memory, x = case()
    vma = reference.vma(name="exact")
    guide = config_enumerate(vma.guide, "parallel")
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vma.model, guide, memory, x)
    torch.testing.assert_close(loss, -reference.log_evidence(memory, x).sum())
    # Moving the guide away from the posterior in any direction can only lose: the gradient through it is zero.
    logits = reference.address_posterior(memory, x).logits.detach().requires_grad_()

    class Shifted(pv.AddressGuide):
        def forward(self, memory, x):
            # a model is tried on other numbers of targets and slots while it is built
            return pv.over_slots(logits if x.leading_shape == logits.shape[:1] else x.raw @ memory.templates.mT, memory)

    shifted = reference.vma(address_guide=Shifted(), name="shifted")
    guide = config_enumerate(shifted.guide, "parallel")
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(shifted.model, guide, memory, x)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-12


def test_score_function_objective_agrees_in_expectation():
    """TraceGraph_ELBO samples what TraceEnum_ELBO sums: the same gradient of the address guide, on average."""
    reference, vma, memory, x = case()
    vma = reference.vma(address_guide=vma.address_guide, name="score")  # exact latents: nothing else is sampled
    parameters = list(vma.address_guide.parameters())
    exact_loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(
        vma.model, config_enumerate(vma.guide, "parallel"), memory, x
    )
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(exact_loss, parameters)])
    copies, rows = 1000, []
    elbo = TraceGraph_ELBO(max_plate_nesting=1)
    for _ in range(30):
        vma.zero_grad()
        elbo.loss_and_grads(vma.model, vma.guide, memory, x.repeat(copies, 1))
        rows.append(torch.cat([p.grad.flatten() for p in parameters]) / copies)
    assert_unbiased(torch.stack(rows), exact, resolution=0.2)


def test_the_parameter_store_holds_the_models_own_parameters():
    _, vma, memory, x = case()
    pyro.infer.SVI(vma.model, vma.guide, pyro.optim.Adam({"lr": 0.1}), pv.infer.VIMCO_ELBO(2)).step(memory, x)
    store = pyro.get_param_store()
    assert {name.split("$$$")[0] for name in store} == {"vma"}
    assert all(store[f"vma$$${name}"] is p for name, p in vma.named_parameters())
