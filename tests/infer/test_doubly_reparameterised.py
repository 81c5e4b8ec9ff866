"""Doubly reparameterised gradients against the plain ones and closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import gradients
from torch import nn

import pyro_vmem as pv
from pyro_vmem.infer import IWAE_ELBO, RWS_ELBO, VIMCO_ELBO
from pyro_vmem.testing import assert_unbiased

pytestmark = pytest.mark.usefixtures("float64")


class Shared(nn.Module):
    """A categorical address and a Gaussian latent whose prior, likelihood and guide all read the same table.

    The table is in the conditional prior p(z | m_a) and in the guide q(z | x, m_a): its gradient has a part that flows
    through z and a part that does not, and the two are weighted differently.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = nn.Parameter(torch.randn(3, generator=generator))
        self.log_scale = nn.Parameter(torch.tensor(-0.3))
        self.logits = nn.Parameter(torch.randn(3, generator=generator))
        self.gain = nn.Parameter(torch.tensor(0.4))

    def model(self, x):
        pyro.module("shared", self)
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(3)))
            z = pyro.sample("z", dist.Normal(self.table[a], 1.0))
            pyro.sample("x", dist.Normal(z * self.gain.exp() + self.table[a], 0.8), obs=x)

    def guide(self, x):
        pyro.module("shared", self)
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Categorical(logits=self.logits + x.unsqueeze(-1) * self.table))
            pyro.sample("z", dist.Normal(0.5 * x - 0.3 * self.table[a], self.log_scale.exp()))


def draws(elbo, toy, x, copies, repeats):
    parameters = list(toy.parameters())
    rows = []
    for _ in range(repeats):
        loss = elbo.differentiable_loss(toy.model, toy.guide, x.repeat(copies)) / copies
        rows.append(gradients(loss, parameters))
    return torch.stack(rows)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda dreg, **kwargs: VIMCO_ELBO(3, dreg=dreg, **kwargs),
        lambda dreg, **kwargs: IWAE_ELBO(2, dreg=dreg, **kwargs),
        lambda dreg, **kwargs: RWS_ELBO(3, pathwise=True, dreg=dreg, **kwargs),
        lambda dreg, vectorize_particles: VIMCO_ELBO(3, dreg=dreg, backward=1 if vectorize_particles else None),
    ],
    ids=["vimco", "iwae", "rws", "vimco, backward"],
)
def test_the_gradient_is_the_plain_one_in_expectation(make, vectorize):
    """Of every parameter, those that prior and guide share included."""
    toy, x = Shared(), torch.tensor([-1.2, 0.7])
    plain = draws(make(False, vectorize_particles=vectorize), toy, x, 4000, 40)
    doubly = draws(make(True, vectorize_particles=vectorize), toy, x, 4000, 40)
    assert_unbiased(doubly - plain, torch.zeros(plain.shape[1]))
    assert float((doubly - plain).std(0).norm() / 40**0.5) < 0.05 * float(plain.mean(0).norm())  # fine enough to tell
    # for the scale of q(z), which has no part in the model, it is a different estimate of the same number
    assert float((doubly - plain)[:, 1].abs().min()) > 0


def test_weighting_the_models_part_too_would_be_wrong():
    """The weight of a path belongs to the path through z only: a factor on all of it is caught by the same test."""
    toy, x = Shared(), torch.tensor([-1.2, 0.7])

    class Wrong(VIMCO_ELBO):
        def estimate(self, particles):
            bound, surrogate = super().estimate(particles)
            share = particles.log_weights.detach().softmax(0)
            wrong = (share.square() * particles.log_weights).sum(0)
            particles.weight_paths(torch.ones_like(share))
            return bound, surrogate - bound + wrong

    plain = draws(VIMCO_ELBO(3), toy, x, 4000, 20)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_unbiased(draws(Wrong(3, dreg=True), toy, x, 4000, 20), plain.mean(0))


@pytest.mark.parametrize(("num_particles", "backward"), [(1, None), (4, None), (4, 1)])
def test_with_the_exact_guide_there_is_no_noise(num_particles, backward):
    """Sticking the landing: each single draw of the guide's gradient is zero, where the plain one's is not."""
    torch.manual_seed(0)
    reference = pv.LinearGaussianMemory(dim=3, latent_dim=1, generator=torch.Generator().manual_seed(0))
    memory, x = pv.Memory(torch.randn(1, 3)), torch.randn(6, 3)  # one slot: only z is uncertain
    exact = reference.latent_posterior(x, memory.templates.expand(6, 3))
    loc = nn.Parameter(exact.mean.detach().clone())
    log_scale = nn.Parameter(exact.variance.detach().sqrt().log())

    def guide(memory, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Categorical(logits=torch.zeros(1)))
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def noise(dreg):
        elbo = IWAE_ELBO(num_particles, dreg=dreg, backward=backward)
        loss = elbo.differentiable_loss(reference.vma().model, guide, memory, x)
        return gradients(loss, [loc, log_scale]).abs().max()

    assert noise(True) < 1e-12
    assert noise(False) > 1e-3


def test_value_and_terms_do_not_change():
    toy, x = Shared(), torch.tensor([-1.2, 0.7])
    found = []
    for dreg in (False, True):
        torch.manual_seed(0)
        terms = VIMCO_ELBO(4, dreg=dreg).terms(toy.model, toy.guide, x)
        found.append((terms.loss, terms.bound, terms.kl["z"], terms.reconstruction))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_and_a_scale_reach_the_direct_part():
    """Where a datapoint is masked out, nothing of it is left in any gradient."""
    toy, x = Shared(), torch.tensor([-1.2, 0.7])
    keep = torch.tensor([True, False])

    def loss(x):
        torch.manual_seed(0)
        model, guide = (pyro.poutine.scale(pyro.poutine.mask(fn, mask=keep), 0.5) for fn in (toy.model, toy.guide))
        return VIMCO_ELBO(4, dreg=True).differentiable_loss(model, guide, x)

    one = gradients(loss(x), list(toy.parameters()))
    other = gradients(loss(torch.tensor([-1.2, 5.0])), list(toy.parameters()))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("second", ["z2", "b"])
def test_latents_whose_guides_depend_on_a_reparameterised_one_are_refused(second):
    weight = nn.Parameter(torch.tensor(0.3))

    def program(x, given):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(weight * x, 1.0))
            other = dist.Normal(z, 1.0) if second == "z2" else dist.Bernoulli(logits=z)
            pyro.sample(second, other)
            if not given:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(3)
    with pytest.raises(ValueError, match=f"dreg: the guide of '{second}' depends on the value of 'z'"):
        VIMCO_ELBO(2, dreg=True).differentiable_loss(lambda x: program(x, False), lambda x: program(x, True), x)


def test_it_trains_a_vma():
    vma = pv.VMA.for_vectors(5)
    memory, x = pv.Memory(torch.randn(6, 5)), torch.randn(4, 5)
    vma, memory, x = vma.double(), memory, x
    loss = VIMCO_ELBO(3, dreg=True).differentiable_loss(vma.model, vma.guide, memory, x)
    assert gradients(loss, list(vma.parameters())).isfinite().all()
