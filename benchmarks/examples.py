"""Six Pyro programs with discrete latents, each a module with a model and a guide: the same ones for all objectives.

They are no part of the package; they are what `benchmarks.programs`, a notebook and the tests run the objectives on.
"""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

__all__ = ["AIR", "BayesianMixture", "HiddenMarkov", "SemiSupervised", "SigmoidBelief", "TopicModel"]


def mlp(*sizes: int) -> nn.Sequential:
    """A network of the given widths; it is smooth, so that a quadrature can be exact."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class BayesianMixture(nn.Module):
    """A mixture of Gaussians on the line, whose weights and centres are latents of all the data.

    Arguments:
        components: How many Gaussians there are.
        batch: How many points a step looks at; by default all.
    """

    def __init__(self, components: int, batch: int | None = None) -> None:
        super().__init__()
        self.components, self.batch = components, batch
        self.log_scale = nn.Parameter(torch.tensor(0.0))
        self.loc = nn.Parameter(torch.linspace(-2.0, 2.0, components))
        self.log_width = nn.Parameter(torch.full((components,), -2.0))
        self.log_shape = nn.Parameter(torch.full((components,), 2.0))

    def model(self, x: Tensor) -> None:
        """The program; the points are `(B,)`."""
        pyro.module("mixture", self)
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(self.components)))
        with pyro.plate("components", self.components):
            locs = pyro.sample("locs", dist.Normal(torch.zeros(()), 10.0))
        with pyro.plate("data", len(x), subsample_size=self.batch) as rows:
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[k], self.log_scale.exp()), obs=x[rows])

    def guide(self, x: Tensor) -> None:
        """The assignments have their posterior, given the components."""
        pyro.module("mixture", self)
        weights = pyro.sample("weights", dist.Dirichlet(self.log_shape.exp()))
        with pyro.plate("components", self.components):
            locs = pyro.sample("locs", dist.Normal(self.loc, self.log_width.exp()))
        with pyro.plate("data", len(x), subsample_size=self.batch) as rows:
            log_x = dist.Normal(locs, self.log_scale.exp()).log_prob(x[rows].unsqueeze(-1))
            pyro.sample("k", dist.Categorical(logits=weights.log() + log_x))


class SemiSupervised(nn.Module):
    """A semi-supervised variational autoencoder: a class that is sometimes seen, and a latent within the class.

    References:
        | Semi-Supervised Learning with Deep Generative Models (Kingma et al., 2014), section 2.2
        | https://arxiv.org/abs/1406.5298

    Arguments:
        features: The numbers of a datapoint.
        classes: How many classes there are.
        latent: The numbers of the latent.
        hidden: The width of the networks.
    """

    def __init__(self, features: int, classes: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.classes, self.latent = classes, latent
        self.decoder = mlp(latent + classes, hidden, features)
        self.classifier = mlp(features, hidden, classes)
        self.encoder = mlp(features + classes, hidden, 2 * latent)

    def model(self, x: Tensor) -> None:
        """The program; the data are `(B, features)`."""
        pyro.module("semi-supervised", self)
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.ones(self.classes)))
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(join(z, self.one_hot(y))), 0.15).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The class, then the latent given the class."""
        pyro.module("semi-supervised", self)
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=self.classifier(x)))
            loc, log_scale = self.encoder(join(x, self.one_hot(y))).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def one_hot(self, y: Tensor) -> Tensor:
        """Labels as vectors."""
        return F.one_hot(y, self.classes).to(self.classifier[0].weight)


class TopicModel(nn.Module):
    """Latent Dirichlet allocation: each document has shares of topics, and each of its words is of one topic.

    References:
        | Latent Dirichlet Allocation (Blei, Ng & Jordan, 2003) | https://jmlr.org/papers/v3/blei03a.html

    Arguments:
        topics: How many topics there are.
        vocabulary: How many words there are.
        hidden: The width of the guide's network.
    """

    def __init__(self, topics: int, vocabulary: int, hidden: int = 32) -> None:
        super().__init__()
        self.topics, self.vocabulary = topics, vocabulary
        self.logits = nn.Parameter(torch.randn(topics, vocabulary))
        self.shares = mlp(vocabulary, hidden, topics)

    def model(self, x: Tensor) -> None:
        """The program; documents are words by number, `(N, B)`: N words of each of B documents."""
        pyro.module("topics", self)
        with pyro.plate("topics", self.topics):
            words = pyro.sample("words", dist.Dirichlet(torch.full((self.vocabulary,), 1.5)))
        with pyro.plate("data", x.shape[1], dim=-1):
            shares = pyro.sample("shares", dist.Dirichlet(torch.ones(self.topics)))
            with pyro.plate("places", len(x), dim=-2):
                topic = pyro.sample("topic", dist.Categorical(shares))
                pyro.sample("x", dist.Categorical(words[topic]), obs=x)

    def guide(self, x: Tensor) -> None:
        """The words of each topic are a point; the topic of a word has its posterior, given the rest."""
        pyro.module("topics", self)
        with pyro.plate("topics", self.topics):
            words = pyro.sample("words", dist.Delta(self.logits.softmax(-1), event_dim=1))
        counts = F.one_hot(x, self.vocabulary).sum(0).to(words)
        with pyro.plate("data", x.shape[1], dim=-1):
            shares = pyro.sample("shares", dist.Dirichlet(1 + F.softplus(self.shares(counts))))
            with pyro.plate("places", len(x), dim=-2):
                pyro.sample("topic", dist.Categorical(shares * words.T[x]))


class SigmoidBelief(nn.Module):
    """A sigmoid belief network with two layers of binary latents.

    References:
        | Neural Variational Inference and Learning in Belief Networks (Mnih & Gregor, 2014)
        | https://arxiv.org/abs/1402.0030

    Arguments:
        pixels: The binary numbers of a datapoint.
        lower: The latents of the layer next to them.
        upper: Those of the layer above.
    """

    def __init__(self, pixels: int, lower: int, upper: int) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(upper))
        self.down, self.out = nn.Linear(upper, lower), nn.Linear(lower, pixels)
        self.seen, self.up = nn.Linear(pixels, lower), nn.Linear(lower, upper)

    def model(self, x: Tensor) -> None:
        """The program; the data are `(B, pixels)`."""
        pyro.module("belief", self)
        with pyro.plate("data", len(x), dim=-1):
            upper = pyro.sample("upper", dist.Bernoulli(logits=self.prior).to_event(1))
            lower = pyro.sample("lower", dist.Bernoulli(logits=self.down(upper)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.out(lower)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """From the data upwards."""
        pyro.module("belief", self)
        with pyro.plate("data", len(x), dim=-1):
            lower = pyro.sample("lower", dist.Bernoulli(logits=self.seen(2 * x - 1)).to_event(1))
            pyro.sample("upper", dist.Bernoulli(logits=self.up(2 * lower - 1)).to_event(1))


class HiddenMarkov(nn.Module):
    """A hidden Markov model of some steps.

    Arguments:
        states: The values of the hidden state.
        steps: How many steps a sequence has.
    """

    def __init__(self, states: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.first, self.move = nn.Parameter(torch.randn(states)), nn.Parameter(torch.randn(states, states))
        self.loc, self.log_scale = nn.Parameter(torch.linspace(-2.0, 2.0, states)), nn.Parameter(torch.tensor(-0.5))
        self.sees = nn.Linear(steps, steps * states)
        self.follows = nn.Parameter(torch.randn(states, states))

    def model(self, x: Tensor) -> None:
        """The program; sequences are `(B, steps)`."""
        pyro.module("markov", self)
        with pyro.plate("data", len(x), dim=-1):
            logits = self.first
            for t in pyro.markov(range(self.steps)):
                k = pyro.sample(f"k_{t}", dist.Categorical(logits=logits))
                pyro.sample(f"x_{t}", dist.Normal(self.loc[k], self.log_scale.exp()), obs=x[:, t])
                logits = self.move[k]

    def guide(self, x: Tensor) -> None:
        """Forward in time, from the whole sequence."""
        pyro.module("markov", self)
        seen = self.sees(x).reshape(len(x), self.steps, -1)
        with pyro.plate("data", len(x), dim=-1):
            logits = seen[:, 0]
            for t in pyro.markov(range(self.steps)):
                k = pyro.sample(f"k_{t}", dist.Categorical(logits=logits))
                if t + 1 < self.steps:
                    logits = seen[:, t + 1] + self.follows[k]


class AIR(nn.Module):
    r"""Attend, infer, repeat: an image is a sum of objects, and how many there are is a latent.

    The objects of an image come one after the other. `here_t` says whether there is another one; `where_t` is its
    scale and place, `what_t` its appearance. What comes after the last object is masked.

    References:
        | Attend, Infer, Repeat: Fast Scene Understanding with Generative Models (Eslami et al., 2016)
        | https://arxiv.org/abs/1603.08575

    Arguments:
        side: The canvas has `side` x `side` pixels.
        glimpse: An object has `glimpse` x `glimpse`.
        steps: The most objects on a canvas.
        what: The numbers that an appearance is made of.
        hidden: The width of the networks.
        noise: The standard deviation of a pixel.
    """

    def __init__(
        self, side: int, glimpse: int, steps: int = 3, what: int = 20, hidden: int = 128, noise: float = 0.3
    ) -> None:
        super().__init__()
        self.side, self.glimpse, self.steps, self.what, self.noise = side, glimpse, steps, what, noise
        self.register_buffer("presence", torch.tensor(0.5))  # the prior probability of one more object
        self.register_buffer("loc", torch.tensor([side / glimpse, 0.0, 0.0]))
        self.register_buffer("scale", torch.tensor([0.2, 1.0, 1.0]))
        self.decode = nn.Sequential(mlp(what, hidden, glimpse**2), nn.Unflatten(-1, (glimpse, glimpse)))
        self.see = mlp(side**2, hidden, hidden)
        self.next = mlp(hidden + 4 * steps, hidden, 7)
        self.encode = mlp(glimpse**2, hidden, 2 * what)
        with torch.no_grad():
            self.decode[0][-1].bias.fill_(-2.0)  # an object is mostly background at first
            self.next[-1].weight.mul_(0.1)
            self.next[-1].bias.copy_(torch.tensor([2.0, 0, 0, 0, -2, 0, 0]))  # and likely to be there

    def model(self, x: Tensor) -> None:
        """The program; images are `(B, side, side)`."""
        pyro.module("air", self)
        with pyro.plate("data", len(x), dim=-1):
            here, mean = x.new_ones(()), x.new_zeros(self.side, self.side)
            for t in range(self.steps):
                here = pyro.sample(f"here_{t}", dist.Bernoulli(here * self.presence))
                with poutine.mask(mask=here > 0):
                    where = pyro.sample(f"where_{t}", dist.Normal(self.loc, self.scale).to_event(1))
                    what = pyro.sample(f"what_{t}", dist.Normal(x.new_zeros(self.what), 1.0).to_event(1))
                drawn = warp(self.decode(what).sigmoid(), where, self.side)
                mean = mean + here[..., None, None] * drawn
            pyro.sample("x", dist.Normal(mean, self.noise).to_event(2), obs=x)

    def guide(self, x: Tensor) -> None:
        """One object after the other, from the image and where the objects before it are."""
        pyro.module("air", self)
        seen, before = self.see(x.flatten(1)), x.new_zeros(len(x), 4 * self.steps)
        with pyro.plate("data", len(x), dim=-1):
            here = x.new_ones(())
            for t in range(self.steps):
                logit, loc, scale = self.next(join(seen, before)).split([1, 3, 3], -1)
                here = pyro.sample(f"here_{t}", dist.Bernoulli(here * logit[..., 0].sigmoid()))
                with poutine.mask(mask=here > 0):
                    where = dist.Normal(self.loc + loc * self.scale, 0.3 * F.softplus(scale) + 1e-3)
                    where = pyro.sample(f"where_{t}", where.to_event(1))
                    glimpse = warp(x, inverse(where), self.glimpse)
                    loc, scale = self.encode(glimpse.flatten(-2)).chunk(2, -1)
                    pyro.sample(f"what_{t}", dist.Normal(loc, F.softplus(scale) + 1e-3).to_event(1))
                now = F.pad(join(here[..., None], here[..., None] * where), (4 * t, 4 * (self.steps - t - 1)))
                before = before + now


def join(*values: Tensor) -> Tensor:
    """Vectors one after the other, whatever the dims on the left are."""
    shape = torch.broadcast_shapes(*(value.shape[:-1] for value in values))
    return torch.cat([value.expand(*shape, -1) for value in values], -1)


def warp(images: Tensor, where: Tensor, size: int) -> Tensor:
    """Images `(*, h, h)` seen through windows: the point u of the result is the point s u + t of the image.

    Arguments:
        images: Square images, in coordinates from -1 to 1.
        where: s and the two numbers of t, `(*, 3)`.
        size: The rows and columns of the result.
    """
    h = images.shape[-1]
    u = (2 * torch.arange(size, device=images.device) + 1) / size - 1
    # Linear interpolation of a window without rotation: a matrix for rows and one for columns, faster than grid_sample.
    at = ((where[..., :1, None] * u + where[..., 1:, None] + 1) * h - 1) / 2
    columns, rows = F.relu(1 - (at[..., None] - torch.arange(h, device=images.device)).abs()).unbind(-3)
    return rows @ images @ columns.mT


def inverse(where: Tensor) -> Tensor:
    """The window that undoes another."""
    return torch.cat([torch.ones_like(where[..., :1]), -where[..., 1:]], -1) / where[..., :1]
