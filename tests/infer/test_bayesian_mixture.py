"""A Bayesian Gaussian mixture, its components latents of all the data, from minibatches of 100,000 points."""

import pyro
import pytest
import torch

from benchmarks.examples import BayesianMixture
from benchmarks.programs import points
from pyro_vmem.infer import VIMCO_ELBO, RaoBlackwell_ELBO


@pytest.mark.parametrize("elbo", [VIMCO_ELBO(4), RaoBlackwell_ELBO(2, site="k")], ids=["vimco", "rao-blackwell"])
def test_the_components_are_recovered(elbo):
    x, mixture = points(100_000), BayesianMixture(3, batch=200)
    svi = pyro.infer.SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    for _ in range(220):
        svi.step(x)
    order = mixture.loc.detach().argsort()
    torch.testing.assert_close(mixture.loc.detach()[order], torch.tensor([-4.0, 0.0, 5.0]), atol=0.5, rtol=0)
    assert float(mixture.log_scale.detach().exp()) == pytest.approx(0.7, abs=0.15)
    assert mixture.log_shape[order].argsort().tolist() == [0, 2, 1]  # as many as there are of each
