"""Gaussians of the latent along a climb to its posterior's mode: proposals where the guide of the latent is off."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vmem.latent import FullPrecisionNormal
from pyro_vmem.memory import Template
from pyro_vmem.vma import VMA

__all__ = ["DECODES", "at_mean", "gaussians_on_path"]

KEPT = (4, 8)  # the gradients after which a Gaussian is kept: the earlier is the wider
DECODES = 2 * KEPT[-1]  # a gradient takes a decode, and as much to go back through it to z: weights need none
LONGEST = 4.0  # standard deviations of the guide that a step may go; half as many while curvature is little known
LITTLE_KNOWN = 3  # steps
NARROWEST, WIDEST = 1e-4, 4.0  # variances of a Gaussian, over those of the guide
SHORTEST = 1e-3  # a step, below which a difference of gradients is rounding
DRAWN = 256  # latents whose moments are taken, of a guide that does not know its own; they are not decoded
SLACK = 0.5  # nats that a step may lose


def gaussians_on_path(vma: VMA, x: Tensor, target: Template, template: Template) -> list[MultivariateNormal]:
    r"""Gaussians near :math:`p(z | x, m_a) \propto p(z | m_a) p(x | z, m_a)`, by a quasi-Newton method.

    From the mean of the guide, BFGS climbs the logarithm of that product. The inverse Hessian that it builds up begins
    with the guide's covariance, and is that of a Gaussian around the point it has come to. Its last points are near the
    mode, where a Gaussian can be too narrow; so one from halfway is returned too.

    References:
        | Pathfinder: Parallel quasi-Newton variational inference (Zhang, Carpenter, Gelman, Vehtari, 2022)
        | https://arxiv.org/abs/2108.03782

    Arguments:
        vma: The model and its guide.
        x: The targets, with shape `(B, *event)`.
        target: The same, encoded.
        template: A template for each, with leading shape `(*, B)`.

    Returns:
        Two Gaussians of z, with batch shape `(*, B)`; it takes :data:`DECODES` decodes each target and template.
    """
    mean, factor = _moments(vma.latent_guide(target, template))
    prior = vma.latent_prior(template)

    def climbed(u: Tensor) -> tuple[Tensor, Tensor]:
        """The log density and its gradient; u is z in units of the guide's spread."""
        with torch.enable_grad():
            u = u.to(mean.dtype).requires_grad_()
            z = mean + (factor * u.unsqueeze(-2)).sum(-1)  # no matrix product: autocast would round it
            log_joint = prior.log_prob(z) + vma.likelihood(z, template).log_prob(x)
            (gradient,) = torch.autograd.grad(log_joint.sum(), u)
        return log_joint.detach().double(), gradient.double()

    # In double precision: the inverse Hessian is to stay positive definite.
    u = torch.zeros_like(mean, dtype=torch.double)
    identity = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    inverse_hessian = identity.expand(*u.shape, u.shape[-1])
    value, gradient = climbed(u)
    kept: list[MultivariateNormal] = []
    for step in range(1, KEPT[-1]):
        move = (inverse_hessian @ gradient.unsqueeze(-1)).squeeze(-1)
        longest = LONGEST / 2 if step <= LITTLE_KNOWN else LONGEST
        there = u + (move * (longest / move.norm(dim=-1, keepdim=True)).clamp(max=1.0)).nan_to_num(0.0)
        value_there, gradient_there = climbed(there)
        inverse_hessian = _updated(inverse_hessian, there - u, gradient - gradient_there)
        better = value_there > value - SLACK
        value = torch.where(better, value_there, value)
        u = torch.where(better.unsqueeze(-1), there, u)
        gradient = torch.where(better.unsqueeze(-1), gradient_there, gradient)
        if step + 1 in KEPT:
            here = mean + (factor * u.to(mean.dtype).unsqueeze(-2)).sum(-1)
            kept.append(FullPrecisionNormal(here, scale_tril=(factor.double() @ _root(inverse_hessian)).to(mean.dtype)))
    return kept


def at_mean(vma: VMA, x: Tensor, target: Template, template: Template) -> Tensor:
    r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` at the mean of the guide, in nats; with shape `(*, B)`."""
    q_z = vma.latent_guide(target, template)
    z, _ = _moments(q_z)
    log_ratio: Tensor = vma.latent_prior(template).log_prob(z) - q_z.log_prob(z)
    return log_ratio + vma.likelihood(z, template).log_prob(x)


def _moments(q_z: torch.distributions.Distribution) -> tuple[Tensor, Tensor]:
    """Mean and a root of the covariance; those of draws, if it does not know its own."""
    try:
        mean = q_z.mean
        factor = q_z.scale_tril if isinstance(q_z, MultivariateNormal) else q_z.stddev.diag_embed()
    except NotImplementedError:
        z = q_z.sample(torch.Size([DRAWN]))
        mean, factor = z.mean(0), z.std(0).diag_embed()
    return mean.detach(), factor.detach()


def _updated(inverse_hessian: Tensor, moved: Tensor, change: Tensor) -> Tensor:
    """By what was learned of the curvature, where it is that of a peak."""
    along = (moved * change).sum(-1)
    length = moved.norm(dim=-1)
    peaked = (along > 1e-6 * length * change.norm(dim=-1)) & (length > SHORTEST)
    rho = (1 / along)[..., None, None]
    moved, change = moved.unsqueeze(-1), change.unsqueeze(-1)
    left = torch.eye(moved.shape[-2], dtype=moved.dtype, device=moved.device) - rho * moved @ change.mT
    updated = left @ inverse_hessian @ left.mT + rho * moved @ moved.mT
    return torch.where(peaked[..., None, None], updated, inverse_hessian)


def _root(covariance: Tensor) -> Tensor:
    """The lower triangular root of a covariance whose eigenvalues are put within bounds."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    root: Tensor = torch.linalg.cholesky(vectors * values.clamp(NARROWEST, WIDEST).unsqueeze(-2) @ vectors.mT)
    return root
