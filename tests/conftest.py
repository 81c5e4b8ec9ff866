"""What every test starts from and has to leave behind."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch


def torch_globals() -> dict[str, object]:
    """The settings of torch that a library must not change for the process it is in."""
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "argument validation": torch.distributions.Distribution._validate_args,
    }


@pytest.fixture(autouse=True)
def _globals_left_as_found() -> Iterator[None]:
    before = torch_globals()
    yield
    assert torch_globals() == before


@pytest.fixture(autouse=True)
def _validation(_globals_left_as_found: None) -> Iterator[None]:
    with pyro.validation_enabled(True):
        yield


@pytest.fixture(autouse=True)
def _param_store() -> Iterator[None]:
    """An empty parameter store for each test; what was in it before comes back."""
    store = pyro.get_param_store()
    with store.scope():
        assert not list(store.keys())
        yield


@pytest.fixture
def float64(_globals_left_as_found: None) -> Iterator[None]:
    """Double precision by default, for comparisons with mathematics."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
