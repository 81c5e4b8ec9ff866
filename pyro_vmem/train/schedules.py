"""Schedules: a number that changes in the course of training, such as a learning rate or the weight of KL(z)."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

from pyro_vmem._utils.checks import NonNegative, NonNegativeInt, Probability

__all__ = ["Constant", "LinearRise", "Schedule", "WarmupCosine"]


class Schedule(abc.ABC):
    """A factor as a function of the progress of training.

    A subclass is a frozen dataclass of plain numbers, so that a configuration can name it.
    """

    @abc.abstractmethod
    def __call__(self, step: int, progress: float) -> float:
        """The factor for the next step.

        Arguments:
            step: How many steps have been taken.
            progress: The share of the run that is over, in [0, 1]: of its steps, or of its minutes.
        """


@dataclass(frozen=True)
class Constant(Schedule):
    """A constant factor.

    Arguments:
        value: The factor, at least 0.

    Example:
        >>> Constant()(500, 0.5)
        1.0
    """

    value: NonNegative = 1.0

    def __call__(self, step: int, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    r"""A linear rise over the first steps, times a cosine decay from 1 to 0 over the whole run.

    Arguments:
        warmup: The number of steps of the rise. Adam's estimate of the second moment is poor until then.

    References:
        | SGDR: Stochastic Gradient Descent with Warm Restarts (Loshchilov and Hutter, 2017)
        | https://arxiv.org/abs/1608.03983

    Example:
        >>> schedule = WarmupCosine(warmup=100)
        >>> schedule(0, 0.0), round(schedule(500, 0.5), 6), schedule(1000, 1.0)
        (0.01, 0.5, 0.0)
    """

    warmup: NonNegativeInt = 100

    def __call__(self, step: int, progress: float) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup)) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class LinearRise(Schedule):
    """A linear rise to 1 over the first part of the run, then 1.

    Arguments:
        start: The factor to start from, in [0, 1].
        share: The share of the run that the rise takes, in [0, 1].

    Example:
        >>> schedule = LinearRise(start=0.2, share=0.5)
        >>> schedule(0, 0.0), round(schedule(250, 0.25), 6), schedule(900, 0.9)
        (0.2, 0.6, 1.0)
    """

    start: Probability = 0.1
    share: Probability = 0.5

    def __call__(self, step: int, progress: float) -> float:
        return 1.0 if progress >= self.share else self.start + (1 - self.start) * progress / self.share
