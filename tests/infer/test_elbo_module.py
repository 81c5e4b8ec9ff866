"""The objectives under `pyro.infer.ELBOModule` in a plain torch loop, as Lightning and scvi-tools run theirs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_vmem.infer import VIMCO_ELBO, RaoBlackwell_ELBO


class Mixture(PyroModule):
    """A mixture of three components, and a guide by a network."""

    def __init__(self):
        super().__init__()
        self.locs = nn.Parameter(torch.tensor([-1.0, 0.1, 1.0]))
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(self.locs[k], 0.7), obs=x)


class Guide(PyroModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(torch.stack([x, x**2 / 10], -1)).float()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("k", dist.Categorical(logits=logits))


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([-4.0, 0.0, 5.0])[torch.randint(3, (90,), generator=generator)] + 0.7 * torch.randn(
        90, generator=generator
    )


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("elbo", [VIMCO_ELBO(4), RaoBlackwell_ELBO(1, site="k")], ids=["vimco", "rao-blackwell"])
def test_a_plain_loop_with_accumulated_gradients(elbo, amp):
    torch.manual_seed(0)
    mixture, x = Mixture(), data()
    loss_fn = elbo(mixture, Guide(mixture.net))
    loss_fn(x[:2])
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.1)
    assert {id(p) for p in loss_fn.parameters()} == {id(p) for p in mixture.parameters()}
    for _ in range(60):
        optimizer.zero_grad()
        for part in x.split(30):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = loss_fn(part) / len(x)
            loss.backward()
        optimizer.step()
    torch.testing.assert_close(mixture.locs.detach().sort().values, torch.tensor([-4.0, 0.0, 5.0]), atol=0.4, rtol=0)


def test_gradients_of_parts_add_up_to_that_of_the_whole():
    """Of one draw: the parts' datapoints are given the same latents as in the whole."""
    torch.manual_seed(0)
    mixture, x = Mixture(), data()[:6]
    given = torch.tensor([0, 1, 2, 0, 1, 2])

    def fixed(x, given):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("k", dist.Categorical(logits=100.0 * torch.nn.functional.one_hot(given, 3)))

    def gradient(parts):
        mixture.zero_grad()
        for rows in parts:
            loss = VIMCO_ELBO(2).differentiable_loss(lambda x, _: mixture(x), fixed, x[rows], given[rows])
            loss.backward()
        return mixture.locs.grad.clone()

    whole = torch.arange(6)
    torch.testing.assert_close(gradient([whole]), gradient(whole.split(2)))
