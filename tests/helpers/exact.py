"""A model small enough to sum out, and the exact values that estimators are compared with."""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Discrete(nn.Module):
    """Two discrete latents, the second guided by the first: small enough to sum out, in model and guide."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def table(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.p_k, self.p_j, self.mean = table(3), table(3, 2), table(3, 2)
        self.q_k, self.q_j = table(2, 3), table(2, 3, 2)

    def plate(self, x):
        return pyro.plate("data", len(x), dim=-1)

    def model(self, x):
        pyro.module("discrete", self)
        with self.plate(x):
            k = pyro.sample("k", dist.Categorical(logits=self.p_k))
            j = pyro.sample("j", dist.Categorical(logits=self.p_j[k]))
            pyro.sample("x", dist.Normal(self.mean[k, j], 0.7), obs=x)

    def guide(self, x):
        pyro.module("discrete", self)
        side = (x > 0).long()
        with self.plate(x):
            k = pyro.sample("k", dist.Categorical(logits=self.q_k[side]))
            pyro.sample("j", dist.Categorical(logits=self.q_j[side, k]))

    def states(self, x):
        """log w and log q of every state (k, j), for each datapoint: (6, B) each."""
        side = (x > 0).long()
        log_q = self.q_k.log_softmax(-1)[side].unsqueeze(-1) + self.q_j.log_softmax(-1)[side]
        log_p = self.p_k.log_softmax(-1).unsqueeze(-1) + self.p_j.log_softmax(-1)
        log_x = dist.Normal(self.mean, 0.7).log_prob(x[:, None, None])
        return (log_p + log_x - log_q).flatten(1).T, log_q.flatten(1).T

    def mixed(self, x, share, top=None):
        """log r of every state, where each site is drawn from a mixture of the guide and the uniform: (6, B).

        The uniform is that on the `top` most probable values, or on all.
        """
        side = (x > 0).long()

        def mixture(q):
            least = q.sort(-1, descending=True).values[..., :top].min(-1, keepdim=True).values
            likely = (q >= least).double()
            return (1 - share) * q + share * likely / likely.sum(-1, keepdim=True)

        r_k, r_j = mixture(self.q_k.softmax(-1)[side]), mixture(self.q_j.softmax(-1)[side])
        return (r_k.unsqueeze(-1) * r_j).log().flatten(1).T


class SubsampledDiscrete(Discrete):
    """The same, where the minibatch is all there is of a data set `scale` times as large."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def plate(self, x):
        return pyro.plate("data", self.scale * len(x), subsample=torch.arange(len(x)), dim=-1)


def exact_bound(log_w, log_q, num_particles):
    """E log (1/K) sum_k w_k, summed over all states of all particles; `(B,)`."""
    total = 0.0
    for states in itertools.product(range(len(log_w)), repeat=num_particles):
        index = list(states)
        total = total + log_q[index].sum(0).exp() * (log_w[index].logsumexp(0) - math.log(num_particles))
    return total


def gradients(loss, parameters):
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert all(g is not None for g in grads), "a parameter has no gradient"
    return torch.cat([g.flatten() for g in grads])


def estimates(elbo, model, guide, args, parameters, copies, repeats):
    """Independent gradient estimates: each the mean over `copies` of the datapoints, `(repeats, P)`."""
    rows = []
    for _ in range(repeats):
        loss = elbo.differentiable_loss(model, guide, *args) / copies
        rows.append(gradients(loss, parameters))
    return torch.stack(rows)


def discrete_case():
    toy = Discrete()
    return toy, torch.tensor([-0.8, 1.3]), list(toy.parameters())


def exact_elbo(log_w, log_q):
    """E log w, summed over all states; `(B,)`."""
    return (log_q.exp() * log_w).sum(0)


def exact_wake(log_w, log_q, num_particles, log_r=None):
    """A surrogate whose gradient is the expectation of reweighted wake-sleep's, summed over all states; `(B,)`.

    Drawn from r if given; `log_w` is then log p, else log p - log q.
    """
    if log_r is not None:
        return sum_over_particles(log_w, log_q, num_particles, log_r)
    return sum_over_particles(log_w + log_q, log_q, num_particles, log_q)


def sum_over_particles(log_p, log_q, num_particles, log_r):
    total = 0.0
    for states in itertools.product(range(len(log_p)), repeat=num_particles):
        index = list(states)
        share = (log_p - log_r)[index].softmax(0).detach()
        probability = log_r[index].sum(0).exp().detach()
        total = total + probability * (share * (log_p + log_q)[index]).sum(0)
    return total
