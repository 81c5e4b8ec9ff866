"""What is recommended for a program, and that the program can be trained by it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vmem as pv
from pyro_vmem.infer import choose

X = torch.tensor([0.4, -1.1, 0.9])


def program(latent, shared=None):
    """A pair of programs with one latent of each datapoint, and perhaps one outside of the plate."""

    def run(x, given):
        offset = pyro.sample("g", shared()) if shared else 0.0
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", latent())
            if not given:
                pyro.sample("x", dist.Normal(k + offset, 1.0), obs=x)

    return lambda x: run(x, False), lambda x: run(x, True)


def categorical(size):
    return lambda: dist.Categorical(torch.ones(size))


CASES = {
    "continuous": (program(lambda: dist.Normal(0.0, 1.0)), "IWAE_ELBO(num_particles=4)", 4, "reparameterised"),
    "few": (program(categorical(3)), "UnorderedSet_ELBO(num_particles=3, site='k')", 3, "3 values of 'k' can be"),
    "some": (program(categorical(60)), "VIMCO_ELBO(num_particles=4)", 4, "60 values of 'k' are too many"),
    "four": (program(categorical(4)), "UnorderedSet_ELBO(num_particles=4, site='k')", 4, "4 values of 'k' can be"),
    "five": (program(categorical(5)), "VIMCO_ELBO(num_particles=4)", 4, "5 values of 'k' are too many"),
    "last of some": (program(categorical(128)), "VIMCO_ELBO(num_particles=4)", 4, "tighter bound of 4 samples"),
    "first of many": (program(categorical(129)), "RaoBlackwell_ELBO(k=3, site='k')", 4, "3 likeliest are summed"),
    "one": (program(categorical(1)), "VIMCO_ELBO(num_particles=4)", 4, "any will do"),
    "binary": (program(lambda: dist.Bernoulli(0.3)), "VIMCO_ELBO(num_particles=4)", 4, "['k']"),
    "global": (
        program(categorical(60), lambda: dist.Bernoulli(0.4)),
        "GlobalDraws_ELBO(VIMCO_ELBO(num_particles=4), draws=2)",
        8,
        "two draws of ['g']",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_choice_fits_the_latents(name):
    (model, guide), expected, decodes, why = CASES[name]
    state = torch.get_rng_state()
    choice = choose(model, guide, X)
    assert torch.equal(state, torch.get_rng_state())
    assert repr(choice.objective) == expected
    assert choice.decodes == decodes
    assert why in choice.why
    assert f"{decodes} decoder passes" in str(choice)
    assert math.isfinite(choice.objective.loss(model, guide, X))


def test_bytes_grow_with_the_minibatch():
    vma, memory = pv.VMA.for_vectors(5), pv.Memory(torch.randn(60, 5))
    small, large = (choose(vma.model, vma.guide, memory, torch.randn(n, 5)).gigabytes for n in (50, 500))
    assert 5 * small < large < 12 * small


def test_a_single_pass_is_refused():
    with pytest.raises(ValueError, match=r"num_particles: expected a whole number in \[2, 1,048,576\], got 1"):
        choose(*CASES["some"][0], X, num_particles=1)
