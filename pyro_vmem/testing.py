"""Statistical assertions for estimators."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_unbiased"]


def assert_unbiased(samples: Tensor, exact: Tensor, *, z: float = 5.0, resolution: float | None = None) -> None:
    r"""Asserts that the mean of independent estimates is the exact value, within its standard error.

    Every element must be within `z` standard errors of its exact value: with z = 5 one correct element in 1.7 million
    fails. A test that passes because its samples are noisy shows nothing; `resolution` bounds that noise.

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
    # Rounding bounds the error from below: an element without noise is compared as numbers of this size are.
    rounding = 1e2 * torch.finfo(samples.dtype).eps * (exact.abs().max() + samples.abs().max())
    score = (mean - exact).abs() / (error + rounding).clamp(min=torch.finfo(samples.dtype).tiny)
    if score.numel() and not float(score.max()) <= z:  # so that NaN fails too
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
