"""Normal approximations of a density along the path of a quasi-Newton method to its mode.

They are proposals for importance sampling where the guide of the latent is poor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vmem.parts.latents import FullPrecisionNormal

__all__: list[str] = []

DECODES_PER_GRADIENT = 2  # decoder passes: one forward, one backward to z; no weight needs a gradient
CAUTIOUS_STEPS = 3  # the first steps are half as long at most, because little is known about the curvature
SHORTEST_STEP = 1e-3  # below it a difference of gradients is rounding
MOMENT_DRAWS = 256  # for the moments of a distribution that does not know its own; none is decoded


class OptimizationPath:
    r"""The path of BFGS to the mode of a log density, from the mean of a Gaussian.

    The inverse Hessian starts as the covariance of the Gaussian. The normal approximation at a point has the point as
    its mean and the inverse Hessian as its covariance. Near the mode it can be too narrow; halfway it is wider.

    References:
        | Pathfinder: Parallel quasi-Newton variational inference (Zhang, Carpenter, Gelman, Vehtari, 2022)
        | https://arxiv.org/abs/2108.03782

    Example:
        >>> target = MultivariateNormal(torch.ones(2), 0.25 * torch.eye(2))
        >>> path = OptimizationPath(target.log_prob, torch.zeros(2), torch.eye(2)).advance(6)
        >>> path.normal_approximation.mean
        tensor([1., 1.])
    """

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],  # from (*, D) to (*)
        mean: Tensor,  # the first point, (*, D)
        scale_tril: Tensor,  # (*, D, D)
        longest_step: float = 4.0,
        variances: tuple[float, float] = (1e-4, 4.0),
        slack: float = 0.5,
    ) -> None:
        self._log_density, self._mean, self._scale_tril = log_density, mean, scale_tril
        self._longest_step, self._variances, self._slack = longest_step, variances, slack
        # Points are in units of the Gaussian's spread, in which its covariance is the identity. In double precision:
        # rounding must not make the inverse Hessian indefinite.
        self._point = torch.zeros_like(mean, dtype=torch.double)
        identity = torch.eye(mean.shape[-1], dtype=torch.double, device=mean.device)
        self._inverse_hessian = identity.expand(*mean.shape, mean.shape[-1])
        self._value, self._gradient = self._evaluate(self._point)
        self.gradients = 1

    @property
    def laplace_log_evidence(self) -> Tensor:
        r"""Laplace's approximation of the log integral at the current point, in nats, with shape `(*)`."""
        # With the first Gaussian's covariance: after few steps the inverse Hessian is too rough for its volume to help.
        log_volume = self._scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self._value.to(log_volume.dtype) + log_volume + 0.5 * math.log(2 * math.pi) * self._mean.shape[-1]

    @property
    def normal_approximation(self) -> MultivariateNormal:
        """The Gaussian around the current point, with batch shape `(*)`."""
        values, vectors = torch.linalg.eigh((self._inverse_hessian + self._inverse_hessian.mT) / 2)
        covariance = vectors * values.clamp(*self._variances).unsqueeze(-2) @ vectors.mT
        root = (self._scale_tril.double() @ torch.linalg.cholesky(covariance)).to(self._mean.dtype)
        return FullPrecisionNormal(self._latent(self._point.to(self._mean.dtype)), scale_tril=root)

    def advance(self, gradients: int) -> Self:
        """Continues to a total number of gradients."""
        for step in range(self.gradients, gradients):
            direction = (self._inverse_hessian @ self._gradient.unsqueeze(-1)).squeeze(-1)
            longest = self._longest_step / 2 if step <= CAUTIOUS_STEPS else self._longest_step
            shortened = (longest / direction.norm(dim=-1, keepdim=True)).clamp(max=1.0)
            proposed = self._point + (direction * shortened).nan_to_num(0.0)
            value, gradient = self._evaluate(proposed)
            # A step that is not accepted still tells the curvature.
            self._inverse_hessian = bfgs_update(
                self._inverse_hessian, proposed - self._point, self._gradient - gradient
            )
            accepted = value > self._value - self._slack
            self._value = torch.where(accepted, value, self._value)
            self._point = torch.where(accepted.unsqueeze(-1), proposed, self._point)
            self._gradient = torch.where(accepted.unsqueeze(-1), gradient, self._gradient)
        self.gradients = max(gradients, self.gradients)
        return self

    def select(self, rows: Tensor, log_density: Callable[[Tensor], Tensor]) -> Self:
        """Continues with the paths `(r, B)` of `(R, B)` only, which have this log density."""
        at = rows, torch.arange(rows.shape[1], device=rows.device)
        for name in ("_mean", "_scale_tril", "_point", "_inverse_hessian", "_value", "_gradient"):
            setattr(self, name, getattr(self, name)[at])
        self._log_density = log_density
        return self

    def _latent(self, point: Tensor) -> Tensor:
        # No matrix product: autocast would round it.
        return self._mean + (self._scale_tril * point.unsqueeze(-2)).sum(-1)

    def _evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log density and its gradient."""
        with torch.enable_grad():
            point = point.to(self._mean.dtype).requires_grad_()
            log_density = self._log_density(self._latent(point))
            (gradient,) = torch.autograd.grad(log_density.sum(), point)
        return log_density.detach().double(), gradient.double()


def bfgs_update(inverse_hessian: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """Updates the inverse Hessian `(*, D, D)` by a step and the fall of the gradient; not where it curves upwards."""
    along = (step * change).sum(-1)
    length = step.norm(dim=-1)
    peaked = (along > 1e-6 * length * change.norm(dim=-1)) & (length > SHORTEST_STEP)
    rho = (1 / along)[..., None, None]
    step, change = step.unsqueeze(-1), change.unsqueeze(-1)
    left = torch.eye(step.shape[-2], dtype=step.dtype, device=step.device) - rho * step @ change.mT
    updated = left @ inverse_hessian @ left.mT + rho * step @ step.mT
    return torch.where(peaked[..., None, None], updated, inverse_hessian)


def moments(q: torch.distributions.Distribution) -> tuple[Tensor, Tensor]:
    """Returns the mean `(*, D)` and a root of the covariance `(*, D, D)`, from draws if there is no closed form."""
    try:
        mean = q.mean
        scale_tril = q.scale_tril if isinstance(q, MultivariateNormal) else q.stddev.diag_embed()
    except NotImplementedError:
        z = q.sample(torch.Size([MOMENT_DRAWS]))
        mean, scale_tril = z.mean(0), z.std(0).diag_embed()
    return mean.detach(), scale_tril.detach()
