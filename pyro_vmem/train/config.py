"""How a model is trained: all settings that the numbers of a run depend on, in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vmem._utils.checks import Limit, NonNegativeInt, Positive, PositiveInt
from pyro_vmem.train.schedules import LinearRise, Schedule, WarmupCosine

__all__ = ["TrainingConfig"]


@dataclass(frozen=True)
class TrainingConfig:
    r"""The settings of a training run.

    Arguments:
        steps: The number of training steps.
        minutes: A time budget instead of `steps`. Training and schedules end with it, so the number of steps depends on
            the machine.
        lr: The learning rate, which `schedule` scales.
        optimizer: Makes the optimizer, called as `optimizer(parameters, lr=lr)`: a class of `torch.optim`, or a
            `functools.partial` of one with other arguments.
        schedule: The factor of the learning rate, a :class:`Schedule`; or a scheduler of torch, made by
            `schedule(optimizer)` and stepped once a training step, such as
            `lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20_000)`.
        kl_schedule: The weight of :math:`KL(z)`. It starts low, because with the full weight from the start the model
            does not learn to use the latent.
        clip_norm: The largest norm of the gradient of the loss per datapoint.
        precision: The precision of the networks: `"auto"` takes bfloat16 where the processor has it. Densities are
            always computed in full.
        seed: Seeds the samples of latents.
        patience: Early stopping: the run ends after this many validations in a row without a better bound. Default:
            never. The schedules are not shortened, so the learning rate may still be high at that point.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> TrainingConfig(steps=500, optimizer=torch.optim.AdamW, kl_schedule=LinearRise(share=0.3)).kl_schedule
        LinearRise(start=0.1, share=0.3)
    """

    steps: PositiveInt = 20_000
    minutes: Limit | None = None
    lr: Positive = 3e-3
    optimizer: Callable[..., Optimizer] = torch.optim.Adam
    schedule: Schedule | Callable[[Optimizer], LRScheduler] = WarmupCosine()
    kl_schedule: Schedule = LinearRise()
    clip_norm: Limit = 10.0
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: NonNegativeInt = 0
    patience: PositiveInt | None = None

    def __post_init__(self) -> None:
        if isinstance(self.schedule, type) and issubclass(self.schedule, Schedule):  # which can be called too
            raise ValueError(f"schedule: expected a schedule, such as WarmupCosine(), got {self.schedule!r}.")
