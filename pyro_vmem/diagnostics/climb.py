"""Climbs to the mode of the latent's posterior and Gaussians on the way: proposals where the latent's guide is off."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vmem.memory import Template
from pyro_vmem.model import VMA
from pyro_vmem.parts.latents import FullPrecisionNormal

__all__ = ["DECODES", "Climb", "at_mean"]

DECODES = 2  # of a gradient: one decode, and as much to go back through it to z, as no weight needs a gradient
LONGEST = 4.0  # standard deviations of the guide that a step may go; half as many while curvature is little known
LITTLE_KNOWN = 3  # steps
NARROWEST, WIDEST = 1e-4, 4.0  # variances of a Gaussian, over those of the guide
SHORTEST = 1e-3  # a step, below which a difference of gradients is rounding
DRAWN = 256  # latents whose moments are taken, of a guide that does not know its own; they are not decoded
SLACK = 0.5  # nats that a step may lose


class Climb:
    r"""A climb of :math:`\log p(z | m_a) p(x | z, m_a)` from the mean of the guide, by a quasi-Newton method.

    The inverse Hessian that BFGS builds up begins with the guide's covariance, and is that of a Gaussian around the
    point it has come to. Near the mode it can be too narrow; one from halfway is wider.

    References:
        | Pathfinder: Parallel quasi-Newton variational inference (Zhang, Carpenter, Gelman, Vehtari, 2022)
        | https://arxiv.org/abs/2108.03782

    Arguments:
        vma: The model and its guide.
        x: The targets, with shape `(B, *event)`.
        target: The same, encoded.
        template: A template for each, with leading shape `(R, B)`.

    Attributes:
        gradients: How many were taken; each takes :data:`DECODES` decodes for each target and template.
    """

    def __init__(self, vma: VMA, x: Tensor, target: Template, template: Template) -> None:
        self._vma, self._x, self._template, self._prior = vma, x, template, vma.latent_prior(template)
        self._mean, self._factor = _moments(vma.latent_guide(target, template))
        # In double precision: the inverse Hessian is to stay positive definite.
        self._u = torch.zeros_like(self._mean, dtype=torch.double)  # z in units of the guide's spread
        identity = torch.eye(self._u.shape[-1], dtype=torch.double, device=x.device)
        self._inverse_hessian = identity.expand(*self._u.shape, self._u.shape[-1])
        self._value, self._gradient = self._at(self._u)
        self.gradients = 1

    @property
    def log_evidence(self) -> Tensor:
        r""":math:`\log p(z | m_a) p(x | z, m_a) / q(z | x, m_a)` in nats, `(R, B)`; q as at its own mean."""
        log_volume = self._factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self._value.to(log_volume.dtype) + log_volume + 0.5 * math.log(2 * math.pi) * self._mean.shape[-1]

    @property
    def gaussian(self) -> MultivariateNormal:
        """The Gaussian around the point that it has come to, with batch shape `(R, B)`."""
        root = (self._factor.double() @ _root(self._inverse_hessian)).to(self._mean.dtype)
        return FullPrecisionNormal(self._z(self._u.to(self._mean.dtype)), scale_tril=root)

    def go_on(self, gradients: int) -> Self:
        """Goes on until so many gradients were taken in all."""
        for step in range(self.gradients, gradients):
            move = (self._inverse_hessian @ self._gradient.unsqueeze(-1)).squeeze(-1)
            longest = LONGEST / 2 if step <= LITTLE_KNOWN else LONGEST
            there = self._u + (move * (longest / move.norm(dim=-1, keepdim=True)).clamp(max=1.0)).nan_to_num(0.0)
            value, gradient = self._at(there)
            self._inverse_hessian = _updated(self._inverse_hessian, there - self._u, self._gradient - gradient)
            better = value > self._value - SLACK
            self._value = torch.where(better, value, self._value)
            self._u = torch.where(better.unsqueeze(-1), there, self._u)
            self._gradient = torch.where(better.unsqueeze(-1), gradient, self._gradient)
        self.gradients = max(gradients, self.gradients)
        return self

    def keep(self, rows: Tensor, template: Template) -> Self:
        """Goes on with some templates of each target only: rows `(r, B)` of those there were."""
        at = rows, torch.arange(rows.shape[1], device=rows.device)
        for name in ("_mean", "_factor", "_u", "_inverse_hessian", "_value", "_gradient"):
            setattr(self, name, getattr(self, name)[at])
        self._template, self._prior = template, self._vma.latent_prior(template)
        return self

    def _z(self, u: Tensor) -> Tensor:
        return self._mean + (self._factor * u.unsqueeze(-2)).sum(-1)  # no matrix product: autocast would round it

    def _at(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The log density and its gradient."""
        with torch.enable_grad():
            u = u.to(self._mean.dtype).requires_grad_()
            z = self._z(u)
            log_joint = self._prior.log_prob(z) + self._vma.likelihood(z, self._template).log_prob(self._x)
            (gradient,) = torch.autograd.grad(log_joint.sum(), u)
        return log_joint.detach().double(), gradient.double()


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
