"""The settings of a run and its schedules."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vmem.train import Constant, LinearRise, TrainingConfig, WarmupCosine


def test_the_learning_rate_rises_and_falls_by_a_cosine():
    schedule = WarmupCosine(warmup=4)
    found = [schedule(step, step / 8) for step in range(9)]
    rise = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    assert found == pytest.approx([r * math.cos(math.pi * i / 16) ** 2 for i, r in enumerate(rise)])
    assert WarmupCosine(warmup=0)(0, 0.0) == 1.0


def test_the_weight_rises_to_one_and_stays():
    schedule = LinearRise(start=0.2, share=0.5)
    assert [schedule(i, i / 8) for i in range(9)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1])
    assert LinearRise(share=0.0)(0, 0.0) == 1.0
    assert Constant(0.3)(5, 0.7) == 0.3


def test_settings_are_values():
    assert TrainingConfig(steps=5) == TrainingConfig(steps=5) != TrainingConfig(steps=6)
    with pytest.raises(FrozenInstanceError):
        TrainingConfig().steps = 3  # type: ignore[misc]


def test_numbers_of_numpy_are_taken_as_plain_ones():
    config = TrainingConfig(steps=np.int64(5), lr=np.float32(0.5), seed=np.int32(2))  # type: ignore[arg-type]
    assert (type(config.steps), type(config.lr), type(config.seed)) == (int, float, int)
    assert (config.steps, config.lr, config.seed) == (5, 0.5, 2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, r"steps: expected a whole number of at least 1, got 0"),
        ({"steps": 2.5}, r"steps: expected a whole number of at least 1, got 2\.5"),
        ({"steps": True}, r"steps: expected a whole number of at least 1, got True"),
        ({"minutes": -1.0}, r"minutes: expected a number above 0 or None, got \-1\.0"),
        ({"lr": 0.0}, r"lr: expected a positive number, got 0\.0"),
        ({"lr": math.nan}, r"lr: expected a positive number, got nan"),
        ({"clip_norm": 0.0}, "clip_norm: expected a number"),
        ({"seed": -1}, "seed: expected a whole number"),
        ({"precision": "half"}, r"precision: expected 'auto' or 'bfloat16' or 'float32', got 'half'"),
        ({"optimizer": "Adam"}, r"optimizer: expected Callable\[\.\.\., Optimizer\], got 'Adam'"),
        ({"schedule": 0.1}, r"schedule: expected Schedule or Callable\[\[Optimizer\], .*, got 0\.1"),
        (
            {"schedule": WarmupCosine},
            r"schedule: expected a schedule, such as WarmupCosine\(\), got <class",
        ),
        (
            {"kl_schedule": torch.optim.lr_scheduler.ConstantLR},
            r"kl_schedule: expected Schedule, got the class ConstantLR",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(settings: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        TrainingConfig(**settings)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WarmupCosine(-1), "warmup: expected a whole number"),
        (lambda: LinearRise(share=1.5), r"share: expected a number in \[0, 1\], got 1.5"),
        (lambda: LinearRise(start=-0.1), r"start: expected a number in \[0, 1\], got -0.1"),
        (lambda: Constant(-1.0), "value: expected a number"),
    ],
)
def test_schedules_check_their_numbers(make: Any, match: str):
    with pytest.raises(ValueError, match=match):
        make()
