"""Statistical assertions for estimators, and for objectives of Pyro programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_vmem.infer import ParticleELBO
from pyro_vmem.infer.exhaustive import exhaustive_bound

__all__ = ["assert_objective_unbiased", "assert_same_bound", "assert_unbiased"]


def assert_unbiased(samples: Tensor, exact: Tensor, *, z: float = 5.0, resolution: float | None = None) -> None:
    r"""Asserts that the mean of independent estimates is the exact value, within its standard error.

    Every element must be within `z` standard errors of its exact value. With z = 5, one correct element in 1.7 million
    fails. `resolution` bounds the noise, because a test with noisy samples shows nothing.

    Arguments:
        samples: Independent estimates, with shape `(R, *)`.
        exact: The exact value, with shape `(*)`.
        z: The tolerance in standard errors of the mean.
        resolution: The largest standard error allowed, as a share of the norm of `exact`.

    Raises:
        ValueError: If the shapes do not fit, or there are fewer than 10 estimates.
        AssertionError: If an element is further off, or the estimates are too noisy to tell.

    Example:
        >>> rolls = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) + 3.0
        >>> assert_unbiased(rolls, torch.tensor([3.0, 3.0]))
        >>> assert_unbiased(rolls, torch.tensor([3.0, 3.5]))
        Traceback (most recent call last):
        AssertionError: element (1,): mean 3.03868 is 13.9 standard errors from the exact value 3.5.
    """
    if samples.shape[1:] != exact.shape or samples.shape[0] < 10:
        raise ValueError(
            f"samples: expected shape (R, {', '.join(map(str, exact.shape))}) with R >= 10 estimates of exact "
            f"{tuple(exact.shape)}, got {tuple(samples.shape)}."
        )
    mean = samples.mean(0)
    error = samples.std(0) / samples.shape[0] ** 0.5
    # Rounding bounds the error from below, also for an element without noise.
    rounding = 1e2 * torch.finfo(samples.dtype).eps * (exact.abs().max() + samples.abs().max())
    score = (mean - exact).abs() / (error + rounding).clamp(min=torch.finfo(samples.dtype).tiny)
    if score.numel() and not float(score.max()) <= z:  # NaN fails too
        worst = torch.unravel_index(score.argmax(), score.shape)
        at = tuple(int(i) for i in worst)
        raise AssertionError(
            f"element {at}: mean {float(mean[worst]):.6g} is {float(score[worst]):.1f} standard errors from the "
            f"exact value {float(exact[worst]):.6g}."
        )
    if resolution is not None and float(error.norm()) > resolution * float(exact.norm()):
        raise AssertionError(
            f"the estimates are too noisy to tell: the standard error is {float(error.norm() / exact.norm()):.3g} of "
            f"the exact value's norm, more than {resolution:.3g}. Draw more."
        )


def assert_objective_unbiased(
    elbo: ParticleELBO,
    model: Any,
    guide: Any,
    *args: Any,
    parameters: Iterable[Tensor],
    draws: int = 400,
    z: float = 5.0,
    **kwargs: Any,
) -> None:
    """Asserts that loss and gradients of an objective equal, in expectation, the sum over all values of the latents.

    Arguments:
        model: A Pyro model with few and small latents, whose joint values are all summed.
        parameters: The parameters of model and guide whose gradients are compared, of any shape.
        draws: The number of losses to draw.
        z: The tolerance in standard errors of the mean.

    Raises:
        ValueError: If the values cannot be summed: there are too many, or a distribution is not supported.
        AssertionError: If the loss or an element of the gradient is further off.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_vmem as pv
        >>> logit = torch.nn.Parameter(torch.tensor(0.3))
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         on = pyro.sample("on", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(on, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("on", dist.Bernoulli(logits=logit))
        >>> x = torch.tensor([0.5, 2.0])
        >>> assert_objective_unbiased(pv.infer.VIMCO_ELBO(2), model, guide, x, parameters=[logit])
    """
    wanted = list(parameters)

    def row(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
        return torch.cat([loss.detach().reshape(1), *(part.flatten() for part in parts)])

    samples = torch.stack([row(elbo.differentiable_loss(model, guide, *args, **kwargs)) for _ in range(draws)])
    assert_unbiased(samples, row(-exhaustive_bound(elbo, model, guide, *args, **kwargs)), z=z)


def assert_same_bound(
    one: Any, other: Any, model: Any, guide: Any, *args: Any, draws: int = 200, z: float = 5.0, **kwargs: Any
) -> None:
    """Asserts that two objectives have the same loss in expectation, for any programs.

    Arguments:
        one, other: Any two of `pyro.infer.ELBO`.
        draws: The number of losses to draw from each.
        z: The tolerance in standard errors of the difference.

    Raises:
        AssertionError: If the means differ by more.

    Example:
        >>> import pyro_vmem as pv
        >>> from pyro.infer import Trace_ELBO
        >>> vma, memory, x = pv.VMA.for_vectors(5), pv.Memory(torch.randn(6, 5)), torch.randn(3, 5)
        >>> assert_same_bound(pv.infer.Reinforce_ELBO(4), Trace_ELBO(), vma.model, vma.guide, memory, x)
    """
    losses = [[elbo.loss(model, guide, *args, **kwargs) for elbo in (one, other)] for _ in range(draws)]
    values = torch.tensor(losses, dtype=torch.get_default_dtype())
    assert_unbiased(values[:, 0] - values[:, 1], values.new_zeros(()), z=z)
