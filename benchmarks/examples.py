"""Six Pyro programs with discrete latents, each a module with a model and a guide: the same ones for all objectives.

They are no part of the package; they are what `benchmarks.programs`, a notebook and the tests run the objectives on.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

__all__ = ["AIR"]


def mlp(*sizes: int) -> nn.Sequential:
    """A network of the given widths."""
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


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
    """

    def __init__(self, side: int, glimpse: int, steps: int = 3, what: int = 20, hidden: int = 128) -> None:
        super().__init__()
        self.side, self.glimpse, self.steps, self.what = side, glimpse, steps, what
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
            pyro.sample("x", dist.Normal(mean, 0.3).to_event(2), obs=x)

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
