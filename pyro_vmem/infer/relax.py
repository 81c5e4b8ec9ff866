"""The evidence lower bound with a control variate that is learned on relaxed draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vmem._utils.checks import Size
from pyro_vmem._utils.param_store import register_unnamed
from pyro_vmem.distributions import SparseCategorical
from pyro_vmem.infer.elbo import ParticleELBO
from pyro_vmem.infer.particles import RELAXED, Particles
from pyro_vmem.infer.straight_through import discrete_of, log_probs_of, value_of

__all__ = ["RELAX_ELBO", "Surrogate"]


@dataclass(repr=False, eq=False)
class RELAX_ELBO(ParticleELBO):
    r"""The evidence lower bound of each datapoint, with a control variate learned on relaxed draws.

    .. math:: \nabla_\alpha = (f(b) - c(\tilde z)) \nabla_\alpha \log q(b) + \nabla_\alpha c(z)
        - \nabla_\alpha c(\tilde z), \qquad f = \log p(x, h) - \log q(h)

    where :math:`z = \alpha + \mathrm{Gumbel}` is the relaxed draw whose largest element is the value b, and
    :math:`\tilde z` is another relaxed draw, given b. The gradient is unbiased for any network c. The network is
    trained to minimise the variance of :math:`\nabla_\alpha`. `SVI` and `fit` train it with the rest; its parameters in
    the store begin with `"control"`. In a torch loop, give `elbo.module.parameters()` to the optimizer. It takes no
    decoder pass of its own. With two or more particles, f also has the mean over the others as a baseline.

    It applies to Categorical, OneHotCategorical and Bernoulli sites, also in Independent; each element has a control
    variate of its own.

    References:
        | Backpropagation through the Void (Grathwohl et al., 2018), equation 8 | https://arxiv.org/abs/1711.00123
        | REBAR: Low-variance, unbiased gradient estimates for discrete latent variable models (Tucker et al., 2017),
        | which c is the model's own bound of | https://arxiv.org/abs/1703.07370

    Arguments:
        num_particles: The number :math:`K \ge 1` of particles.
        control: The network c: called with z and with :math:`\log q` of all values, each `(*, S)`, it returns `(*)`.
            Default: a :class:`Surrogate`.
        vectorize_particles, max_plate_nesting: As of :class:`ParticleELBO`.

    Raises:
        ValueError: At the first loss, if a site of another kind, or a sparse one, is not reparameterised.

    Example:
        >>> import pyro_vmem as pv
        >>> vma = pv.VMA.for_vectors(5)
        >>> elbo = pv.infer.RELAX_ELBO(4)
        >>> elbo.differentiable_loss(vma.model, vma.guide, pv.Memory(torch.randn(6, 5)), torch.randn(3, 5)).shape
        torch.Size([])
    """

    discrete: ClassVar[str] = "score function, control variate learned on relaxed draws"

    control: nn.Module | None = None
    backward: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.module = Surrogate() if self.control is None else self.control

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        assert self.module is not None
        register_unnamed("control", self.module)
        return super()._get_trace(model, _Relaxed(self.module)(guide), args, kwargs)

    def estimate(self, particles: Particles) -> tuple[Tensor, Tensor]:
        f = particles.log_weights
        bound, count = f.mean(0), len(f)
        signal = f.detach() - (bound.detach() * count - f.detach()) / (count - 1) if count > 1 else f.detach()
        total = signal * sum(particles.score.values(), torch.zeros_like(f))
        for path, cross, square in (parts.unbind(1) for parts in particles.relaxed.values()):
            # The network makes the square of signal * score + h small, of which it has no part in the first square.
            total = total + path - 0.5 * (2 * signal * cross + square)
        return bound, bound + total.mean(0)


class Surrogate(nn.Module):
    r"""The control variate :math:`c(z) = \sum_s r_s\, g(r_s, q_s)` with :math:`r = \mathrm{softmax}(z / \lambda)`.

    The network g is small and the same for all values; :math:`q_s` is the probability of value s. So c applies to sites
    with any number of values. The temperature :math:`\lambda` is learned. At initialisation c is zero.

    Arguments:
        width: The width of the small network g.
    """

    def __init__(self, width: Size = 16) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(0.0))
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), last)

    def forward(self, z: Tensor, log_q: Tensor) -> Tensor:
        """The control variate, `(*)`, of relaxed draws and log-probabilities, each `(*, S)`."""
        relaxed = (z / self.log_temperature.exp()).softmax(-1)
        values: Tensor = self.net(torch.stack([relaxed, log_q.exp()], -1)).squeeze(-1)
        return (relaxed * values).sum(-1)


class _Relaxed(Messenger):
    """Draws discrete sites by relaxed draws, and notes what the control variate's gradient is at each."""

    def __init__(self, control: nn.Module) -> None:
        super().__init__()
        self.control = control

    def _pyro_sample(self, msg: Any) -> None:
        inner = discrete_of(msg)
        if inner is None:
            return
        log_q = None if isinstance(inner, SparseCategorical) else log_probs_of(inner)
        if log_q is None:
            raise ValueError(
                f"guide: RELAX_ELBO relaxes Categorical, OneHotCategorical and Bernoulli sites; {msg['name']!r} is a "
                f"{type(inner).__name__}. Use VIMCO_ELBO or Reinforce_ELBO."
            )
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            alpha = leaf.log_softmax(-1)
            z = alpha + _gumbel(alpha)
            index = z.detach().argmax(-1)
            given = _given(alpha, index)
            control = self.control(z, log_q.detach()), self.control(given, log_q.detach())
            # The gradient of c(z) - c(z') - c(z').detach() log q(b), all but the bound's part of the whole.
            score = nn.functional.one_hot(index, leaf.shape[-1]) - alpha.detach().exp()
            through: Tensor = torch.autograd.grad((control[0] - control[1]).sum(), leaf, create_graph=True)[0]
            h = through - control[1].unsqueeze(-1) * score
        msg["value"] = value_of(inner, index)
        parts = ((h.detach() * log_q), (h * score), (h * h))
        msg["infer"] = {**msg["infer"], RELAXED: [_sum_event(part.sum(-1), msg["fn"], inner) for part in parts]}


def _gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


def _given(alpha: Tensor, index: Tensor) -> Tensor:
    r"""A draw of :math:`\alpha + \mathrm{Gumbel}` given which element is the largest, as a function of :math:`\alpha`.

    The largest is a Gumbel draw of its own, since the exponentials sum to one; the others are cut off below it.
    """
    top = _gumbel(alpha[..., :1])
    others = -torch.logaddexp(-top, torch.empty_like(alpha).exponential_().log() - alpha)
    return others.scatter(-1, index.unsqueeze(-1), top)


def _sum_event(values: Tensor, fn: Any, inner: Any) -> Tensor:
    """Sums over the elements of a site that are independent within one event."""
    extra = len(inner.batch_shape) - len(fn.batch_shape)
    return values.sum(list(range(-extra, 0))) if extra else values
